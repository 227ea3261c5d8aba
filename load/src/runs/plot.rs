//! Results side by side: the runs of several files by label, as a table of medians and as bars in an SVG, with the spread of
//! the runs on each bar.

use std::fmt::Write;
use std::fs;

use serde_json::Value;

use super::report::median;
use super::table::grouped;

/// What is drawn of each result, where it was measured: a title, where the number is, and its digits.
const PANELS: [(&str, &str, usize); 8] = [
    ("events/s", "/events_per_second", 0),
    ("latency p50, ms", "/latency_ms/p50", 1),
    ("latency p99, ms", "/latency_ms/p99", 1),
    ("latency p99.9, ms", "/latency_ms/p999", 1),
    ("relay, CPU s per million events", "/cpu_seconds_per_million/relay", 2),
    ("agent, CPU s per million events", "/cpu_seconds_per_million/agent", 2),
    ("relay, peak RSS MiB", "/peak_rss_mib/relay", 0),
    ("agent, peak RSS MiB", "/peak_rss_mib/agent", 0),
];

const WIDTH: usize = 760;
const LABELS: usize = 190;
const NUMBERS: usize = 110;
const BAR: usize = 18;
const GAP: usize = 6;
/// Above each panel, for its title.
const HEAD: usize = 26;

/// The runs that stand under one label.
#[derive(Debug)]
pub struct Labelled {
    pub label: String,
    runs: Vec<Value>,
}

impl Labelled {
    /// Reads `LABEL=FILE` arguments; files of the same label stand together, in the order in which the labels first come.
    ///
    /// # Errors
    /// A text that names the argument and what is wrong with it.
    pub fn read(arguments: &[String]) -> Result<Vec<Labelled>, String> {
        let mut all: Vec<Labelled> = Vec::new();
        for argument in arguments {
            let (label, file) = argument
                .rsplit_once('=')
                .ok_or_else(|| format!("{argument}: expected LABEL=FILE"))?;
            let text = fs::read_to_string(file).map_err(|error| format!("{argument}: {error}"))?;
            let report: Value = serde_json::from_str(&text).map_err(|error| format!("{argument}: {error}"))?;
            let runs = report["runs"].as_array().cloned().unwrap_or_default();
            if runs.is_empty() {
                return Err(format!("{argument}: there are no runs in it"));
            }
            match all.iter_mut().find(|known| known.label == label) {
                Some(known) => known.runs.extend(runs),
                None => all.push(Labelled {
                    label: label.to_owned(),
                    runs,
                }),
            }
        }
        Ok(all)
    }

    /// For the table: its name with the number of runs, and the medians.
    pub fn column(&self) -> (String, Value) {
        (format!("{} ({})", self.label, self.runs.len()), median(&self.runs))
    }

    /// Least, median and most of a number.
    fn numbers(&self, place: &str) -> Option<(f64, f64, f64)> {
        let mut numbers: Vec<f64> = self
            .runs
            .iter()
            .filter_map(|run| run.pointer(place)?.as_f64())
            .collect();
        numbers.sort_by(f64::total_cmp);
        Some((*numbers.first()?, numbers[(numbers.len() - 1) / 2], *numbers.last()?))
    }
}

/// The bars, a panel for each number that was measured under every label.
pub fn svg(title: &str, all: &[Labelled]) -> String {
    let mut panels = String::new();
    let mut y = 44;
    for (name, place, digits) in PANELS {
        let numbers: Vec<_> = all.iter().filter_map(|one| one.numbers(place)).collect();
        let most = numbers.iter().map(|(_, _, most)| *most).fold(0.0, f64::max);
        if numbers.len() != all.len() || most <= 0.0 {
            continue;
        }
        let _ = writeln!(
            panels,
            r#"<text x="0" y="{}" class="panel">{}</text>"#,
            y + 14,
            escaped(name)
        );
        y += HEAD;
        let room = (WIDTH - LABELS - NUMBERS) as f64;
        for (one, (least, median, highest)) in all.iter().zip(numbers) {
            let at = |number: f64| LABELS as f64 + number / most * room;
            let middle = y + BAR / 2;
            let _ = writeln!(
                panels,
                r#"<text x="{}" y="{}" class="label">{}</text><rect x="{LABELS}" y="{y}" width="{:.1}" height="{BAR}"/>"#,
                LABELS - 8,
                middle + 4,
                escaped(&one.label),
                at(median) - LABELS as f64,
            );
            let _ = writeln!(
                panels,
                r#"<path d="M{:.1} {middle}H{:.1}"/><text x="{:.1}" y="{}">{}</text>"#,
                at(least),
                at(highest),
                at(highest) + 8.0,
                middle + 4,
                grouped(median, digits),
            );
            y += BAR + GAP;
        }
        y += 8;
    }
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}">
<style>text{{font:13px sans-serif;fill:#222}}.title{{font-size:16px;font-weight:bold}}.panel{{font-weight:bold}}.label{{text-anchor:end}}rect{{fill:#4a7db5}}path{{stroke:#111;stroke-width:2}}</style>
<rect width="100%" height="100%" style="fill:#fff"/>
<text x="0" y="20" class="title">{}</text>
{panels}</svg>
"##,
        escaped(title)
    )
}

/// Text as it may stand in an SVG.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_number_that_all_have_is_a_panel_with_a_bar_for_each_label() {
        let one = |label: &str, rates: &[f64]| Labelled {
            label: label.to_owned(),
            runs: rates.iter().map(|rate| json!({ "events_per_second": rate })).collect(),
        };
        let all = [one("a < b", &[100.0, 120.0, 110.0]), one("c", &[55.0])];
        let drawn = svg("rates & more", &all);
        assert!(
            drawn.contains("rates &amp; more") && drawn.contains("a &lt; b"),
            "{drawn}"
        );
        assert!(drawn.contains(">110<") && drawn.contains(">55<"), "{drawn}");
        assert_eq!(drawn.matches("class=\"panel\"").count(), 1, "{drawn}");
        // As long as the number is of the largest there is.
        let room = (WIDTH - LABELS - NUMBERS) as f64;
        assert!(
            drawn.contains(&format!("width=\"{:.1}\"", room * 55.0 / 120.0)),
            "{drawn}"
        );
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let error = |argument: &str| Labelled::read(&[argument.to_owned()]).unwrap_err();
        assert!(error("file.json").contains("LABEL=FILE"));
        assert!(error("a=/nowhere.json").contains("/nowhere.json"));
    }
}
