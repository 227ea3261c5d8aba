//! Results as Markdown.

use std::fmt::Write;

use serde_json::Value;

/// Everything that is measured as one number: its name, where it is in a run's JSON, and its digits.
pub const ROWS: [(&str, &str, usize); 37] = [
    ("events", "/events", 0),
    ("events/s", "/events_per_second", 0),
    ("maximum rate", "/max_rate", 0),
    ("rate", "/rate", 0),
    ("first outcome after, s", "/first_outcome_seconds", 2),
    ("lag in the first third, s", "/lag/seconds/first", 3),
    ("lag in the last third, s", "/lag/seconds/last", 3),
    ("latency p50, ms", "/latency_ms/p50", 1),
    ("latency p99, ms", "/latency_ms/p99", 1),
    ("latency p99.9, ms", "/latency_ms/p999", 1),
    ("latency max, ms", "/latency_ms/max", 1),
    ("of it the writer's lateness, p50, ms", "/writer_late_ms/p50", 1),
    ("of it the writer's lateness, p99, ms", "/writer_late_ms/p99", 1),
    ("relay and agent, CPU s per million", "/cpu/relay_and_agent", 2),
    ("relay, CPU s per million", "/cpu_seconds_per_million/relay", 2),
    ("relay, of it the kernel", "/system_seconds_per_million/relay", 2),
    ("agent, CPU s per million", "/cpu_seconds_per_million/agent", 2),
    ("agent, of it the kernel", "/system_seconds_per_million/agent", 2),
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
    ("generator, CPU s per million", "/cpu_seconds_per_million/generator", 2),
    (
        "trace sink, CPU s per million",
        "/cpu_seconds_per_million/trace sink",
        3,
    ),
    ("the tool itself, CPU s per million", "/cpu_seconds_per_million/tool", 3),
    ("relay, CPU by the memcacheds' CPU", "/cpu/relay_by_memcacheds", 3),
    ("agent, CPU by the memcacheds' CPU", "/cpu/agent_by_memcacheds", 3),
    (
        "relay and agent, by the memcacheds' CPU",
        "/cpu/relay_and_agent_by_memcacheds",
        3,
    ),
    ("superseded share", "/superseded_share", 3),
    ("items per batch", "/items_per_batch", 0),
    ("relay, peak RSS MiB", "/peak_rss_mib/relay", 0),
    ("agent, peak RSS MiB", "/peak_rss_mib/agent", 0),
    ("broker, peak RSS MiB", "/peak_rss_mib/broker", 0),
    (
        "memcached of the relay, peak RSS MiB",
        "/peak_rss_mib/memcached of the relay",
        0,
    ),
    (
        "memcached of the agent, peak RSS MiB",
        "/peak_rss_mib/memcached of the agent",
        0,
    ),
    ("keys compared", "/compared", 0),
    ("evictions", "/evictions", 0),
    ("lost", "/lost", 0),
];

/// A Markdown table with a column for each (name, median); a row that is measured in none of them is left out.
pub fn medians(columns: &[(String, Value)]) -> String {
    let mut lines: Vec<Vec<String>> = vec![vec![String::new()]];
    lines[0].extend(columns.iter().map(|(name, _)| name.clone()));
    let known = |place: &str| {
        columns
            .iter()
            .any(|(_, median)| median.pointer(place).is_some_and(Value::is_number))
    };
    for (title, place, digits) in ROWS.into_iter().filter(|(_, place, _)| known(place)) {
        let cell = |(_, median): &(String, Value)| {
            let number = median.pointer(place).and_then(Value::as_f64);
            number.map_or("–".into(), |number| grouped(number, digits))
        };
        let mut line = vec![title.to_string()];
        line.extend(columns.iter().map(cell));
        lines.push(line);
    }
    markdown(&lines)
}

/// A Markdown table; the first line is its head, the first column is text.
pub fn markdown(lines: &[Vec<String>]) -> String {
    let wide = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..lines[0].len()).map(wide).collect();
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
    use serde_json::json;

    use super::*;

    #[test]
    fn a_table_has_a_column_for_each_scenario_and_says_what_was_not_measured() {
        let columns = [
            ("drain-100".to_string(), json!({ "events": 500_000, "lost": 0 })),
            ("ramp-100".to_string(), json!({ "max_rate": 250_000 })),
        ];
        let table = medians(&columns);
        assert!(
            table.contains("| events ")
                && table.contains(" 500 000 |")
                && table.contains(" 250 000 |")
                && table.contains("–")
                && !table.contains("latency"),
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
