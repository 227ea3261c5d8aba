//! `evrepl tap`.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::time::Duration;

use clap::Args;
use serde::Deserialize;
use serde_json::{Map, Value};
use time::OffsetDateTime;

use super::status::{StatusError, admin_agent, reachable};
use super::{CliError, ConfigArg, Done};

/// A region that is there shows it more often than that.
const SILENCE: Duration = Duration::from_secs(10);

/// The stages of the path in its order: JSON keeps none.
const STAGES: [&str; 8] = [
    "kafka",
    "queue",
    "wait",
    "look",
    "coalesce",
    "link",
    "agent_queue",
    "apply",
];

/// Show events as they pass, with their outcome and the time in each stage
///
/// Asks the evrepl that runs with this configuration, at admin.listen, and prints a line for each
/// event that ends: when, flow, cache, key, operation, outcome, lag, the milliseconds in each
/// stage, what else befell it, and its trace. Ends with Ctrl-C. Costs the region little, and
/// nothing once it ended; when events pass faster than they can be shown, it says how many were lost.
///
/// Shows what this node sends to its peers: not what other nodes of the region send, nor what is
/// received; of a key that another node has, tap that node. At most 4 may look at a node at once.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
#[group(id = "pick", required = true, multiple = false, args = ["key", "ratio"])]
pub(super) struct TapArgs {
    #[command(flatten)]
    config: ConfigArg,
    /// All events of this key, as memcached sees it, a client's prefix included
    #[arg(long, value_name = "KEY", allow_hyphen_values = true)]
    key: Option<OsString>,
    /// Such a part of all events, above 0 and up to 1, drawn at random
    #[arg(long, value_name = "R", value_parser = ratio)]
    ratio: Option<f64>,
    /// Only events of this cache
    #[arg(long, value_name = "C")]
    cache: Option<String>,
    /// Print the lines of JSON as they come
    #[arg(long)]
    json: bool,
    /// End after so many events
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
}

fn ratio(text: &str) -> Result<f64, String> {
    let ratio = text.parse().ok().filter(|ratio| *ratio > 0.0 && *ratio <= 1.0);
    ratio.ok_or_else(|| "it is above 0 and up to 1".to_owned())
}

/// Why there is nothing to see, or nothing more.
#[derive(Debug, thiserror::Error)]
pub(super) enum TapError {
    #[error("no [[cache]] has the name \"{cache}\"; there is {known}")]
    NoCache { cache: String, known: String },
    #[error("{0}")]
    Status(#[from] StatusError),
    #[error("evrepl at {address} refuses: {reason}")]
    Refused { address: String, reason: String },
    #[error("evrepl at {address} has ended, or is not heard of any more: {reason}")]
    Ended { address: String, reason: String },
}

impl TapArgs {
    /// Writes as it goes, unlike other subcommands: it may go on for hours.
    pub(super) fn execute(self) -> Result<Done, CliError> {
        let config = self.config.load()?;
        if let Some(cache) = self
            .cache
            .as_ref()
            .filter(|one| config.caches.iter().all(|c| c.name != **one))
        {
            let known: Vec<_> = config.caches.iter().map(|cache| cache.name.as_str()).collect();
            let (cache, known) = (cache.clone(), known.join(", "));
            return Err(TapError::NoCache { cache, known }.into());
        }
        let address = reachable(&config.admin.listen);
        let mut left = self.count.unwrap_or(u64::MAX);
        let lines = self.open(&address)?.lines();
        // Not on standard output, where a program may read events; and nobody minds if it cannot be said.
        let _ = writeln!(io::stderr(), "listening to {} at {address}, Ctrl-C ends", config.region);
        for line in lines {
            let ended = |reason: String| TapError::Ended {
                address: address.clone(),
                reason,
            };
            let line = line.map_err(|error| ended(error.to_string()))?;
            if line.is_empty() {
                continue;
            }
            let Some(shown) = Shown::read(&line) else { continue };
            left -= u64::from(matches!(shown, Shown::Passed(_)));
            let text = if self.json { line } else { shown.text() };
            let mut out = io::stdout().lock();
            if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() || left == 0 {
                return Ok(Done::ok(String::new()));
            }
        }
        let reason = "it closed the connection".to_owned();
        Err(TapError::Ended { address, reason }.into())
    }

    fn query(&self) -> String {
        let mut query = match (&self.key, self.ratio) {
            (Some(key), _) => format!("key={}", encoded(key.as_bytes())),
            (None, ratio) => format!("ratio={}", ratio.unwrap_or(1.0)),
        };
        if let Some(cache) = &self.cache {
            query.push_str("&cache=");
            query.push_str(&encoded(cache.as_bytes()));
        }
        query
    }

    fn open(&self, address: &str) -> Result<impl BufRead + use<>, TapError> {
        let agent = admin_agent(|config| {
            config
                .timeout_connect(Some(SILENCE))
                .timeout_recv_response(Some(SILENCE))
                .timeout_per_read(Some(SILENCE))
                .http_status_as_error(false)
        });
        let answer = agent.get(format!("http://{address}/tap?{}", self.query())).call();
        let mut answer = answer.map_err(|error| StatusError::of(address, &error, SILENCE))?;
        let refused = |reason: String| TapError::Refused {
            address: address.to_owned(),
            reason: reason.trim().to_owned(),
        };
        match answer.status().as_u16() {
            200 => Ok(BufReader::new(answer.into_body().into_reader())),
            404 => Err(refused("it has no /tap, it is of an older version".to_owned())),
            _ => Err(refused(answer.body_mut().read_to_string().unwrap_or_default())),
        }
    }
}

/// Letters, digits and what no URL gives a meaning, the rest percent-encoded.
fn encoded(bytes: &[u8]) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~:".contains(byte);
    let one = |byte: &u8| match plain(byte) {
        true => char::from(*byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    bytes.iter().map(one).collect()
}

/// A line of `/tap`.
enum Shown {
    Passed(Box<Passed>),
    Lost(u64),
}

/// What is shown of an event; a field that another version lacks is shown as empty.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Passed {
    flow: String,
    cache: String,
    key: String,
    op: String,
    outcome: String,
    produced_at_ms: i64,
    total_us: u64,
    stages_us: Map<String, Value>,
    notes: Vec<String>,
    trace_id: Option<String>,
}

impl Shown {
    fn read(line: &str) -> Option<Shown> {
        let value: Value = serde_json::from_str(line).ok()?;
        match value.get("lost").and_then(Value::as_u64) {
            Some(lost) => Some(Shown::Lost(lost)),
            None => Some(Shown::Passed(serde_json::from_value(value).ok()?)),
        }
    }

    fn text(&self) -> String {
        match self {
            Shown::Lost(lost) => format!("... {lost} events passed faster than they could be shown"),
            Shown::Passed(passed) => passed.text(),
        }
    }
}

impl Passed {
    fn text(&self) -> String {
        let Passed {
            flow,
            cache,
            key,
            op,
            outcome,
            ..
        } = self;
        let ended_ms = self.produced_at_ms.saturating_add((self.total_us / 1000) as i64);
        let mut text = format!(
            "{} {flow} {cache} {key} {op} {outcome} {}",
            clock(ended_ms),
            ms(self.total_us)
        );
        // Stages that another version has come last.
        let known = STAGES
            .iter()
            .filter_map(|stage| Some((*stage, self.stages_us.get(*stage)?)));
        let others = self
            .stages_us
            .iter()
            .filter(|(stage, _)| !STAGES.contains(&stage.as_str()));
        let stages = known.chain(others.map(|(stage, us)| (stage.as_str(), us)));
        let stages: Vec<String> = stages
            .map(|(stage, us)| format!("{stage} {}", ms(us.as_u64().unwrap_or(0))))
            .collect();
        if !stages.is_empty() {
            text.push_str(&format!(" ({})", stages.join(", ")));
        }
        for note in &self.notes {
            text.push_str(&format!(" [{note}]"));
        }
        if let Some(trace) = &self.trace_id {
            text.push_str(&format!(" trace {trace}"));
        }
        text
    }
}

/// `1.5ms`, `2.25s`.
fn ms(us: u64) -> String {
    match us {
        1_000_000.. => format!("{:.2}s", us as f64 / 1e6),
        _ => format!("{:.1}ms", us as f64 / 1e3),
    }
}

/// The time of day, UTC.
fn clock(ms: i64) -> String {
    match OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000) {
        Ok(at) => {
            let (hour, minute, second, milli) = at.time().as_hms_milli();
            format!("{hour:02}:{minute:02}:{second:02}.{milli:03}Z")
        }
        Err(_) => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line() {
        let line = r#"{"flow":"a->b","cache":"s","key":"user:1%20","op":"set","outcome":"applied","produced_at_ms":
            1700000000500,"total_us":2250000,"stages_us":{"apply":400,"kafka":1249600,"later":1,"queue":1000000},
            "notes":["looked again"],"trace_id":"0af7"}"#;
        assert_eq!(
            Shown::read(line).unwrap().text(),
            "22:13:22.750Z a->b s user:1%20 set applied 2.25s (kafka 1.25s, queue 1.00s, apply 0.4ms, later 0.0ms) \
             [looked again] trace 0af7"
        );
        assert_eq!(
            Shown::read(r#"{"lost":3}"#).unwrap().text(),
            "... 3 events passed faster than they could be shown"
        );
        assert!(Shown::read("<html>").is_none());
        let other = Shown::read(r#"{"key":"k","produced_at_ms":9223372036854775807}"#).unwrap();
        assert!(other.text().contains(" k "), "{}", other.text());
    }

    #[test]
    fn a_query_is_safe_in_a_url() {
        assert_eq!(encoded(b"user:1&\xff +%"), "user:1%26%FF%20%2B%25");
    }
}
