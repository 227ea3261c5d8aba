//! A real Prometheus of a test's own, and its promtool: Debian's package `prometheus`, which `make setup` installs.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::place::{Dir, free_port};
use crate::process::Process;
use crate::region::get;
use crate::wait::{holds_within, wait_until};

/// How long it may take until it answers, on a machine where everything starts at once.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// A running Prometheus that scrapes each second; dropped, it ends and its data is gone.
#[derive(Debug)]
pub struct Prometheus {
    port: u16,
    process: Process,
    _dir: Dir,
}

impl Prometheus {
    /// Starts one that scrapes these addresses (`host:port`) as the job `evrepl`, with these rules.
    ///
    /// # Panics
    /// When it is not installed, or does not answer.
    pub fn start(targets: &[String], rules: &Path) -> Prometheus {
        let (dir, port) = (Dir::new("prometheus"), free_port());
        let config = dir.path().join("prometheus.yml");
        let rules = rules
            .canonicalize()
            .unwrap_or_else(|error| panic!("{}: {error}", rules.display()));
        let text = format!(
            "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\nrule_files: [{rules:?}]\n\
             scrape_configs: [{{ job_name: evrepl, static_configs: [{{ targets: {targets:?} }}] }}]\n"
        );
        std::fs::write(&config, text).unwrap_or_else(|error| panic!("cannot write {}: {error}", config.display()));
        let mut command = Command::new("prometheus");
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", dir.path().join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"));
        let process = Process::spawn("prometheus", command, &dir.path().join("log"));
        let prometheus = Prometheus {
            port,
            process,
            _dir: dir,
        };
        let ready = || matches!(get(&prometheus.url("/-/ready")), Ok((200, _)));
        let answered = holds_within(READY_WITHIN, || !prometheus.process.is_running() || ready());
        assert!(
            answered && prometheus.process.is_running(),
            "prometheus does not answer after {READY_WITHIN:?}:\n{}",
            prometheus.process.log_tail(30)
        );
        prometheus
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    fn api(&self, path: &str) -> Result<Value, String> {
        let (_, body) = get(&self.url(&format!("/api/v1/{path}")))?;
        let answer: Value = serde_json::from_str(&body).map_err(|error| format!("{error}: {body}"))?;
        match answer["status"].as_str() {
            Some("success") => Ok(answer["data"].clone()),
            _ => Err(answer["error"].to_string()),
        }
    }

    /// What a query gives now: its series, or its one number.
    ///
    /// # Errors
    /// In Prometheus's words, when it is no query, or cannot be answered.
    pub fn query(&self, query: &str) -> Result<Vec<Value>, String> {
        let data = self.api(&format!("query?query={}", escaped(query)))?;
        match &data["result"] {
            Value::Array(series) if data["resultType"] != "scalar" => Ok(series.clone()),
            one => Ok(vec![one.clone()]),
        }
    }

    /// The values that a label of a metric has.
    ///
    /// # Errors
    /// In Prometheus's words.
    pub fn label_values(&self, metric: &str, label: &str) -> Result<Vec<Value>, String> {
        let data = self.api(&format!("label/{label}/values?match[]={}", escaped(metric)))?;
        Ok(data.as_array().cloned().unwrap_or_default())
    }

    /// All rules, as they fare.
    ///
    /// # Panics
    /// When they cannot be had.
    pub fn rules(&self) -> Vec<Value> {
        let data = self.api("rules").unwrap_or_else(|error| panic!("the rules: {error}"));
        let groups = data["groups"].as_array().cloned().unwrap_or_default();
        let rules = groups.iter().filter_map(|group| group["rules"].as_array());
        rules.flatten().cloned().collect()
    }

    /// Waits until every rule has been evaluated.
    ///
    /// # Panics
    /// When one has not after half a minute.
    pub fn wait_for_rules(&self) {
        wait_until("prometheus has evaluated its rules", READY_WITHIN, || {
            let rules = self.rules();
            !rules.is_empty() && rules.iter().all(|rule| rule["health"] != "unknown")
        });
    }
}

/// Runs promtool in a folder: what it says, and whether it is content.
///
/// # Panics
/// When it is not installed.
pub fn promtool(folder: &Path, arguments: &[&str]) -> (bool, String) {
    let output = Command::new("promtool")
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("cannot run promtool (`make setup` installs it): {error}"));
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&said).into_owned())
}

/// A folder of this repository.
pub fn repository(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(folder)
}

fn escaped(query: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' | b'.' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    query.bytes().map(byte).collect()
}
