//! What a region says about itself, and whether its sums are right.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use evrepl::outcome::Outcome;
use serde_json::Value;

use super::Region;

/// How often a [`Sampler`] looks.
const SAMPLE: Duration = Duration::from_millis(50);

/// One flow of `/status`.
#[derive(Clone, Debug)]
pub struct FlowStatus {
    pub peer: String,
    pub state: String,
    /// Events taken from Kafka since the process started.
    pub consumed: u64,
    pub in_flight: u64,
    /// By name, zeros included.
    pub outcomes: BTreeMap<String, u64>,
    /// Everything it says.
    pub json: Value,
}

impl FlowStatus {
    /// How many events ended this way; 0 for a name it doesn't have.
    pub fn outcome(&self, outcome: Outcome) -> u64 {
        self.outcomes.get(outcome.name()).copied().unwrap_or(0)
    }

    /// How many events ended at all.
    pub fn finished(&self) -> u64 {
        self.outcomes.values().sum()
    }
}

/// The flows of a `/status`.
///
/// # Errors
/// What is missing or of a wrong type, in words.
pub fn flows(status: &Value) -> Result<Vec<FlowStatus>, String> {
    let list = status["flows"].as_array().ok_or("status has no flows[]")?;
    list.iter().map(flow).collect()
}

fn flow(json: &Value) -> Result<FlowStatus, String> {
    let text = |name: &str| {
        json[name]
            .as_str()
            .map(str::to_string)
            .ok_or(format!("a flow without {name}: {json}"))
    };
    let number = |name: &str| {
        json[name]
            .as_u64()
            .ok_or(format!("a flow without a number {name}: {json}"))
    };
    let outcomes = json["outcomes"]
        .as_object()
        .ok_or(format!("a flow without outcomes: {json}"))?;
    let outcomes: BTreeMap<String, u64> = outcomes
        .iter()
        .map(|(name, count)| count.as_u64().map(|count| (name.clone(), count)))
        .collect::<Option<_>>()
        .ok_or(format!("outcomes that are no numbers: {json}"))?;
    Ok(FlowStatus {
        peer: text("peer")?,
        state: text("state")?,
        consumed: number("consumed")?,
        in_flight: number("in_flight")?,
        outcomes,
        json: json.clone(),
    })
}

/// Whether every flow of a `/status` accounts for each event: consumed = sum of outcomes + in flight, with every outcome
/// named and none unknown.
///
/// # Errors
/// Which flow is off, and by how much.
pub fn balanced(status: &Value) -> Result<(), String> {
    for flow in flows(status)? {
        let mut names: Vec<&str> = Outcome::ALL.iter().map(|outcome| outcome.name()).collect();
        names.sort_unstable();
        if !flow.outcomes.keys().map(String::as_str).eq(names) {
            return Err(format!(
                "the flow to {} has other outcomes than the documented: {:?}",
                flow.peer, flow.outcomes
            ));
        }
        let accounted = flow.finished() + flow.in_flight;
        if flow.consumed != accounted {
            let off = i128::from(flow.consumed) - i128::from(accounted);
            return Err(format!(
                "the flow to {} consumed {} but accounts for {accounted} (off by {off}): in flight {}, {:?}",
                flow.peer, flow.consumed, flow.in_flight, flow.outcomes
            ));
        }
    }
    Ok(())
}

fn agent() -> &'static ureq::Agent {
    static AGENT: OnceLock<ureq::Agent> = OnceLock::new();
    AGENT.get_or_init(|| {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(2)))
            .http_status_as_error(false)
            // A restarted process has the port of the old one; a kept connection would fail first.
            .max_idle_connections(0)
            .proxy(None);
        config.build().into()
    })
}

pub(crate) fn get(url: &str) -> Result<(u16, String), String> {
    let mut response = agent().get(url).call().map_err(|error| format!("{url}: {error}"))?;
    let body = response
        .body_mut()
        .read_to_string()
        .map_err(|error| format!("{url}: {error}"))?;
    Ok((response.status().as_u16(), body))
}

pub(super) fn fetch(admin_url: &str) -> Result<Value, String> {
    let (code, body) = get(&format!("{admin_url}/status"))?;
    if code != 200 {
        return Err(format!("{admin_url}/status answered {code}: {body}"));
    }
    serde_json::from_str(&body).map_err(|error| format!("{admin_url}/status is not JSON: {error}"))
}

/// The sum of all samples of `name` whose labels include `labels`, from Prometheus text.
pub(super) fn metric(text: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let samples = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let (found, value) = match rest.strip_prefix('{') {
            // Our label values (regions, caches, addresses, stages) never hold a brace.
            Some(rest) => rest.split_once('}')?,
            None => ("", rest.strip_prefix(' ')?),
        };
        // A comma on both sides: `stage="x"` must not match in `my_stage="x"`.
        let found = format!(",{found},");
        let all = labels
            .iter()
            .all(|(label, value)| found.contains(&format!(",{label}=\"{value}\",")));
        all.then(|| value.split_whitespace().next()?.parse::<f64>().ok())
            .flatten()
    });
    samples.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
}

/// Polls `/status` of regions in the background and remembers every moment when a flow's sum was wrong.
#[derive(Debug)]
pub struct Sampler {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<(u64, Vec<String>)>>,
}

impl Sampler {
    /// Begins with these regions; a region that doesn't answer (killed, frozen) is passed over.
    pub fn start(regions: &[&Region]) -> Sampler {
        let urls: Vec<(String, String)> = regions
            .iter()
            .map(|region| (region.name().into(), region.admin_url()))
            .collect();
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&stop);
        let thread = thread::Builder::new().name("lab-sampler".into()).spawn(move || {
            let (mut samples, mut wrong) = (0, Vec::new());
            while !asked.load(Ordering::Relaxed) {
                for (name, url) in &urls {
                    let Ok(status) = fetch(url) else { continue };
                    samples += 1;
                    // The first few tell the story; thousands of the same would only hide it.
                    if let Err(error) = balanced(&status)
                        && wrong.len() < 10
                    {
                        wrong.push(format!("{name}: {error}"));
                    }
                }
                thread::park_timeout(SAMPLE);
            }
            (samples, wrong)
        });
        Sampler {
            stop,
            thread: Some(thread.expect("a thread for the sampler")),
        }
    }

    /// Ends it: how many statuses it saw.
    ///
    /// # Panics
    /// When one of them was out of balance, or there was none.
    #[track_caller]
    pub fn finish(mut self) -> u64 {
        let (samples, wrong) = self.end().expect("a sampler ends once");
        assert!(wrong.is_empty(), "out of balance:\n{}", wrong.join("\n"));
        assert!(samples > 0, "the sampler saw no status at all");
        samples
    }

    fn end(&mut self) -> Option<(u64, Vec<String>)> {
        let thread = self.thread.take()?;
        self.stop.store(true, Ordering::Relaxed);
        thread.thread().unpark();
        thread.join().ok()
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        if let Some((_, wrong)) = self.end()
            && !wrong.is_empty()
        {
            let text = format!("out of balance:\n{}", wrong.join("\n"));
            // A second panic while one unwinds would abort the whole test binary.
            if thread::panicking() {
                println!("{text}")
            } else {
                panic!("{text}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn status(consumed: u64, applied: u64, in_flight: u64) -> Value {
        let mut outcomes: serde_json::Map<String, Value> = Outcome::ALL
            .iter()
            .map(|outcome| (outcome.name().to_string(), json!(0)))
            .collect();
        outcomes["applied"] = json!(applied);
        json!({ "flows": [{ "peer": "eu-west-1", "state": "running", "consumed": consumed, "in_flight": in_flight,
                            "outcomes": outcomes }] })
    }

    #[test]
    fn an_event_that_is_not_accounted_for_is_noticed() {
        assert_eq!(balanced(&status(10, 7, 3)), Ok(()));
        assert!(balanced(&status(10, 7, 2)).unwrap_err().contains("off by 1"));
        assert!(balanced(&status(10, 8, 3)).unwrap_err().contains("off by -1"));
        let mut unnamed = status(10, 7, 3);
        unnamed["flows"][0]["outcomes"]
            .as_object_mut()
            .unwrap()
            .remove("parked");
        assert!(balanced(&unnamed).is_err());
        assert!(balanced(&json!({})).is_err());
    }

    #[test]
    fn samples_of_a_metric_are_summed_by_label() {
        let text = "# HELP a_total x\na_total{flow=\"x\",my_outcome=\"applied\"} 4\na_total{flow=\"x\",outcome=\"applied\"} 2\n\
                    a_total{flow=\"y\",outcome=\"applied\"} 3\na_total_b 7\nc 1.5 1700000000\n";
        assert_eq!(metric(text, "a_total", &[("outcome", "applied")]), Some(5.0));
        assert_eq!(metric(text, "a_total", &[]), Some(9.0));
        assert_eq!(metric(text, "a_total", &[("flow", "y")]), Some(3.0));
        assert_eq!(metric(text, "c", &[]), Some(1.5));
        assert_eq!(metric(text, "a", &[]), None);
    }
}
