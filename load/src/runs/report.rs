//! What remains of the runs: a table on stdout, medians, and a file with everything and the machine it was measured on.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Map, Value, json};
use time::OffsetDateTime;

use super::scenario::Scenario;
use super::trial::Measured;

/// The runs of one scenario.
#[derive(Debug)]
pub struct Report {
    scenario: Scenario,
    started: OffsetDateTime,
    load_before: f64,
    runs: Vec<Value>,
}

impl Report {
    pub fn new(scenario: &Scenario) -> Report {
        Report {
            scenario: scenario.clone(),
            started: OffsetDateTime::now_utc(),
            load_before: load_average(),
            runs: Vec::new(),
        }
    }

    /// Adds a run.
    ///
    /// # Errors
    /// When it can't be written as JSON.
    pub fn add(&mut self, measured: &Measured) -> serde_json::Result<()> {
        self.runs.push(serde_json::to_value(measured)?);
        Ok(())
    }

    /// The median of every number over the runs.
    pub fn median(&self) -> Value {
        median(&self.runs)
    }

    /// Writes `<folder>/<scenario>-<time>.json` and says where it is.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn save(&self, folder: &Path) -> std::io::Result<PathBuf> {
        let at = self.started;
        let time = format!(
            "{:04}{:02}{:02}T{:02}{:02}{:02}Z",
            at.year(),
            u8::from(at.month()),
            at.day(),
            at.hour(),
            at.minute(),
            at.second()
        );
        fs::create_dir_all(folder)?;
        let path = folder.join(format!("{}-{time}.json", self.scenario.name));
        let all = json!({
            "scenario": self.scenario,
            "command": std::env::args().collect::<Vec<_>>().join(" "),
            "started": time,
            "load_average_before": self.load_before,
            "machine": machine(),
            "build": if cfg!(debug_assertions) { "dev" } else { "release" },
            "median": self.median(),
            "runs": self.runs,
        });
        fs::write(&path, format!("{all:#}\n"))?;
        Ok(path)
    }
}

/// One, five and fifteen minutes: the first.
pub fn load_average() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace()
        .next()
        .and_then(|word| word.parse().ok())
        .unwrap_or(0.0)
}

/// What the figures depend on.
fn machine() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let line = |text: &str, name: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(name));
        found.map(|rest| rest.trim_start_matches([' ', '\t', ':']).to_string())
    };
    let said = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_string())
    };
    json!({
        "cpu": line(&read("/proc/cpuinfo"), "model name"),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "memory": line(&read("/proc/meminfo"), "MemTotal"),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "memcached": said("memcached", &["-V"]),
        "commit": said("git", &["describe", "--always", "--dirty"]),
    })
}

/// The median of every number in `runs`, which have one shape; of what isn't a number, the first run's.
pub fn median(runs: &[Value]) -> Value {
    match runs.first() {
        None => Value::Null,
        Some(Value::Number(_)) => {
            let mut numbers: Vec<&Value> = runs.iter().filter(|run| run.is_number()).collect();
            numbers.sort_by(|a, b| a.as_f64().unwrap_or(0.0).total_cmp(&b.as_f64().unwrap_or(0.0)));
            // Of an even number of runs the lower of the two in the middle: a value that was measured.
            numbers[(numbers.len() - 1) / 2].clone()
        }
        Some(Value::Object(first)) => {
            let of = |name: &String| {
                let values: Vec<Value> = runs.iter().filter_map(|run| run.get(name)).cloned().collect();
                (name.clone(), median(&values))
            };
            Value::Object(first.keys().map(of).collect::<Map<_, _>>())
        }
        Some(other) => other.clone(),
    }
}

/// A row of the table: its name, where its number is, and the number of digits.
const ROWS: [(&str, &str, usize); 18] = [
    ("events", "/events", 0),
    ("events/s", "/events_per_second", 0),
    ("first outcome after, s", "/first_outcome_seconds", 2),
    ("latency p50, ms", "/latency_ms/p50", 1),
    ("latency p99, ms", "/latency_ms/p99", 1),
    ("latency p99.9, ms", "/latency_ms/p999", 1),
    ("latency max, ms", "/latency_ms/max", 1),
    ("of it the writer's lateness, p99, ms", "/writer_late_ms/p99", 1),
    ("relay, CPU s per million", "/cpu_seconds_per_million/relay", 2),
    ("agent, CPU s per million", "/cpu_seconds_per_million/agent", 2),
    ("broker, CPU s per million", "/cpu_seconds_per_million/broker", 2),
    (
        "memcached of the relay, CPU s per million",
        "/cpu_seconds_per_million/memcached of the relay",
        2,
    ),
    (
        "memcached of the agent, CPU s per million",
        "/cpu_seconds_per_million/memcached of the agent",
        2,
    ),
    ("writer, CPU s per million", "/cpu_seconds_per_million/writer", 2),
    ("reader, CPU s per million", "/cpu_seconds_per_million/reader", 2),
    ("relay, peak RSS MiB", "/peak_rss_mib/relay", 0),
    ("agent, peak RSS MiB", "/peak_rss_mib/agent", 0),
    ("lost", "/lost", 0),
];

/// A Markdown table with a column for each (name, median).
pub fn table(columns: &[(String, Value)]) -> String {
    let mut lines: Vec<Vec<String>> = vec![vec![String::new()]];
    lines[0].extend(columns.iter().map(|(name, _)| name.clone()));
    for (title, place, digits) in ROWS {
        let cell = |(_, median): &(String, Value)| {
            let number = median.pointer(place).and_then(Value::as_f64);
            number.map_or("–".into(), |number| grouped(number, digits))
        };
        let mut line = vec![title.to_string()];
        line.extend(columns.iter().map(cell));
        lines.push(line);
    }
    let wide = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..=columns.len()).map(wide).collect();
    let mut text = String::new();
    for (number, line) in lines.iter().enumerate() {
        for (column, cell) in line.iter().enumerate() {
            let width = widths[column];
            let _ = match column {
                0 => write!(text, "| {cell:<width$} |"),
                _ => write!(text, " {cell:>width$} |"),
            };
        }
        text.push('\n');
        if number == 0 {
            for (column, width) in widths.iter().enumerate() {
                let _ = match column {
                    0 => write!(text, "| {} |", "-".repeat(*width)),
                    _ => write!(text, " {}: |", "-".repeat(width.saturating_sub(1))),
                };
            }
            text.push('\n');
        }
    }
    text
}

/// A number with blanks between its thousands.
pub fn grouped(number: f64, digits: usize) -> String {
    let text = format!("{number:.digits$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 {
            grouped.push(' ');
        }
        grouped.push(digit);
    }
    grouped + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_taken_number_by_number_and_never_invented() {
        let run =
            |rate: f64, lost: u64| json!({ "events_per_second": rate, "lost": lost, "cpu": { "relay": rate * 2.0 } });
        let runs = [run(3.0, 0), run(1.0, 5), run(2.0, 1)];
        assert_eq!(
            median(&runs),
            json!({ "events_per_second": 2.0, "lost": 1, "cpu": { "relay": 4.0 } })
        );
        assert_eq!(median(&runs[..2])["events_per_second"], json!(1.0));
        assert_eq!(median(&[]), Value::Null);
    }

    #[test]
    fn a_table_has_a_column_for_each_scenario_and_says_what_was_not_measured() {
        let columns = [("drain-100".to_string(), json!({ "events": 500_000, "lost": 0 }))];
        let table = table(&columns);
        assert!(
            table.contains("| events ") && table.contains(" 500 000 |") && table.contains("–"),
            "{table}"
        );
        let widths: Vec<usize> = table.lines().map(|line| line.chars().count()).collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "{table}");
    }

    #[test]
    fn thousands_are_grouped() {
        assert_eq!(grouped(1_234_567.0, 0), "1 234 567");
        assert_eq!(grouped(999.25, 1), "999.2");
        assert_eq!(grouped(0.0, 0), "0");
    }
}
