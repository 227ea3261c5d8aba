//! What remains of the runs: medians, and a file with everything and the machine it was measured on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Map, Value, json};
use time::OffsetDateTime;

use super::measured::Measured;
use super::scenario::Scenario;

/// The runs of one scenario.
#[derive(Debug)]
pub struct Report {
    scenario: Scenario,
    /// When it began, as it stands in the file's name.
    started: String,
    /// Which of several evrepl binaries it is of; empty when there is only one.
    of: String,
    /// The evrepl that is run.
    binary: PathBuf,
    load_before: f64,
    runs: Vec<Value>,
}

impl Report {
    /// Of no runs yet, all with this evrepl. `of` tells the binaries of a comparison apart, in the file's name too.
    pub fn new(scenario: &Scenario, binary: &Path, of: &str) -> Report {
        Report {
            scenario: scenario.clone(),
            started: now(),
            of: of.into(),
            binary: binary.into(),
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

    /// The runs so far.
    pub fn runs(&self) -> &[Value] {
        &self.runs
    }

    /// Writes `<folder>/<scenario>-<time>.json`, over what it wrote before, and says where it is.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn save(&self, folder: &Path) -> std::io::Result<PathBuf> {
        fs::create_dir_all(folder)?;
        let of = if self.of.is_empty() {
            String::new()
        } else {
            format!("-{}", self.of)
        };
        let path = folder.join(format!("{}-{}{of}.json", self.scenario.name, self.started));
        let all = json!({
            "scenario": self.scenario,
            "command": std::env::args().collect::<Vec<_>>().join(" "),
            "started": self.started,
            "of": self.of,
            "evrepl": self.binary,
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

/// The time, as files are named by it.
pub fn now() -> String {
    let at = OffsetDateTime::now_utc();
    format!(
        "{:04}{:02}{:02}T{:02}{:02}{:02}Z",
        at.year(),
        u8::from(at.month()),
        at.day(),
        at.hour(),
        at.minute(),
        at.second()
    )
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
pub fn machine() -> Value {
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
}
