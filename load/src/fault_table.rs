//! What the fault lab prints: a line for each fault as it ends, and the tables.

use std::fmt::Write;
use std::time::Duration;

use evrepl_lab::faults::{Others, Row};
use time::OffsetDateTime;

use crate::runs::table::grouped;

/// Others shall keep at least this share of the throughput of a run without the fault, and at most this many times its p99.
const THROUGHPUT_KEPT: f64 = 0.8;
const P99_TIMES: f64 = 2.0;

const TITLES: [&str; 9] = [
    "fault",
    "events",
    "seconds of fault",
    "lost",
    "steps back",
    "parked",
    "time to catch up, s",
    "peak memory, MiB (limit)",
    "",
];

/// Whether nothing was wrong.
pub fn is_right(row: &Row) -> bool {
    row.problems.is_empty() && row.lost == 0 && row.steps_back == 0
}

/// One line, as a fault ends.
pub fn line(row: &Row) -> String {
    let [name, events, seconds, lost, back, parked, catch_up, memory, verdict] = cells(row);
    format!(
        "{name}: {events} events, {seconds} s of fault, lost {lost}, steps back {back}, parked {parked}, caught up after \
         {catch_up} s, {memory} MiB: {verdict}"
    )
}

fn cells(row: &Row) -> [String; 9] {
    let mib = |bytes: u64| grouped((bytes >> 20) as f64, 0);
    [
        row.name.clone(),
        grouped(row.events as f64, 0),
        grouped(row.seconds, 1),
        grouped(row.lost as f64, 0),
        grouped(row.steps_back as f64, 0),
        grouped(row.parked as f64, 0),
        row.catch_up.map_or("never".into(), |seconds| grouped(seconds, 1)),
        format!("{} ({})", mib(row.peak), mib(row.limit)),
        if is_right(row) { "ok" } else { "FAILED" }.into(),
    ]
}

/// The table, as Markdown.
pub fn table(rows: &[Row]) -> String {
    let cells: Vec<Vec<String>> = rows.iter().map(|row| cells(row).to_vec()).collect();
    markdown(&TITLES, &cells)
}

/// How the keys of two whole destination servers fared while a third was broken, as Markdown; empty without such runs.
pub fn isolation(rows: &[Row]) -> String {
    let with_others = rows.iter().filter_map(|row| Some((row, row.others?)));
    let Some((_, whole)) = with_others.clone().find(|(row, _)| row.name == "nothing") else {
        return String::new();
    };
    let cells = with_others.map(|(row, others)| {
        let kept = others.per_second / whole.per_second;
        let times = others.p99_ms / whole.p99_ms;
        let verdict = match kept >= THROUGHPUT_KEPT && times <= P99_TIMES {
            true => "ok",
            false => "not isolated",
        };
        let Others {
            per_second,
            p50_ms,
            p99_ms,
        } = others;
        vec![
            row.name.clone(),
            format!("{} ({} %)", grouped(per_second, 0), grouped(kept * 100.0, 0)),
            grouped(p50_ms, 1),
            format!("{} ({}x)", grouped(p99_ms, 1), grouped(times, 1)),
            verdict.into(),
        ]
    });
    let titles = ["fault", "keys of the others, a second", "p50, ms", "p99, ms", ""];
    markdown(&titles, &cells.collect::<Vec<_>>())
}

/// The whole of `docs/faults.md`.
pub fn document(rows: &[Row], took: Duration) -> String {
    let mut text = String::from(
        "# Faults\n\nWhat `make faults` found: each line is a run of two regions under load in which this fault happened. \
         `lost` are keys that are not, in the end, what they are in the source; `steps back` are moments in which a key at \
         the destination was seen to hold an older state than before; both must be 0. Memory is that of the evrepl process \
         that came closest to the limit that `evrepl check` prints.\n\n",
    );
    let now = OffsetDateTime::now_utc();
    let command = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
    let _ = writeln!(
        text,
        "- date: {}\n- machine: {}\n- command: `make faults ARGS=\"{command}\"`\n- took: {} min\n- events: {}\n",
        now.date(),
        machine(),
        grouped(took.as_secs_f64() / 60.0, 1),
        grouped(rows.iter().map(|row| row.events).sum::<u64>() as f64, 0),
    );
    text += &table(rows);
    let isolation = isolation(rows);
    if !isolation.is_empty() {
        text += "\n## While one of three destination servers is broken\n\nThe keys of the other two, against the run without \
                 a fault: at least 80 % of its throughput and at most twice its p99 is the goal. The time is from the \
                 source memcached's answer until a reader saw the key at the destination, which looks each 5 ms.\n\n";
        text += &isolation;
    }
    let wrong: Vec<&Row> = rows.iter().filter(|row| !is_right(row)).collect();
    if !wrong.is_empty() {
        text += "\n## What went wrong\n\n";
        for row in wrong {
            // The first lines say what; whole statuses are in target/faults.
            let problems = row
                .problems
                .iter()
                .map(|problem| problem.lines().next().unwrap_or_default());
            let _ = writeln!(text, "- {}: {}", row.name, problems.collect::<Vec<_>>().join("; "));
        }
    }
    text
}

fn machine() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{cores} cores, {}", model.map_or("an unnamed CPU", |(_, name)| name))
}

fn markdown(titles: &[&str], rows: &[Vec<String>]) -> String {
    let wide = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([titles[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..titles.len()).map(wide).collect();
    let mut text = String::new();
    let mut put = |cells: &mut dyn Iterator<Item = &str>| {
        for (column, cell) in cells.enumerate() {
            let width = widths[column];
            let _ = match column {
                0 => write!(text, "| {cell:<width$} |"),
                _ => write!(text, " {cell:>width$} |"),
            };
        }
        text.push('\n');
    };
    put(&mut titles.iter().copied());
    let rules: Vec<String> = widths
        .iter()
        .enumerate()
        .map(|(column, width)| rule(column, *width))
        .collect();
    put(&mut rules.iter().map(String::as_str));
    rows.iter().for_each(|row| put(&mut row.iter().map(String::as_str)));
    text
}

fn rule(column: usize, width: usize) -> String {
    match column {
        0 => "-".repeat(width.max(1)),
        _ => format!("{}:", "-".repeat(width.saturating_sub(1))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, per_second: f64, p99_ms: f64) -> Row {
        Row {
            name: name.into(),
            events: 12_345,
            seconds: 20.04,
            catch_up: Some(1.26),
            peak: 100 << 20,
            limit: 300 << 20,
            others: Some(Others {
                per_second,
                p50_ms: 5.0,
                p99_ms,
            }),
            ..Row::default()
        }
    }

    #[test]
    fn a_row_is_right_only_when_nothing_is_wrong() {
        let good = row("nothing", 1.0, 1.0);
        assert!(is_right(&good));
        assert!(!is_right(&Row {
            lost: 1,
            ..good.clone()
        }));
        assert!(!is_right(&Row {
            steps_back: 1,
            ..good.clone()
        }));
        let bad = Row {
            problems: vec!["x".into()],
            ..good.clone()
        };
        assert!(!is_right(&bad) && line(&bad).ends_with("FAILED"));
        let table = table(&[good]);
        for cell in ["| nothing |", " 12 345 |", " 20.0 |", " 1.3 |", " 100 (300) |", " ok |"] {
            assert!(table.contains(cell), "{table}");
        }
    }

    #[test]
    fn the_others_are_compared_with_the_run_without_a_fault() {
        let rows = [
            row("nothing", 600.0, 10.0),
            row("frozen", 590.0, 19.0),
            row("slow", 400.0, 11.0),
        ];
        let table = isolation(&rows);
        assert!(table.contains("590 (98 %)") && table.contains("19.0 (1.9x)"), "{table}");
        assert_eq!(table.matches("not isolated").count(), 1, "{table}");
        assert_eq!(isolation(&rows[1..]), "");
    }
}
