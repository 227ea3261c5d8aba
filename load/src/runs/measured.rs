//! What one run has shown: what its JSON holds. Everything is a number that can be a median, or the same in every run.

use std::collections::BTreeMap;

use serde::Serialize;

use super::lag::Lag;
use crate::latency::Quantiles;

/// One run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measured {
    /// Events that were measured, warm-up not counted. One that goes to four regions counts four times, here and in whatever
    /// is "a million".
    pub events: u64,
    /// Keys that are not in every peer's memcached as they were last written.
    pub lost: u64,
    /// Keys that were compared.
    pub compared: u64,
    pub evictions: u64,
    /// Of the whole run, as the relays count.
    pub outcomes: BTreeMap<String, u64>,
    /// The share of all events that a newer one made unnecessary.
    pub superseded_share: f64,
    /// Items in a batch, on the average of the whole run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub items_per_batch: Option<f64>,
    /// In a drain without its first tenth; in an open loop, outcomes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub events_per_second: Option<f64>,
    /// From the start of the relay's process to its first outcome.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_outcome_seconds: Option<f64>,
    /// Writes a second of an open loop, as they were due.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<u64>,
    /// The highest rate that a ramp found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rate: Option<u64>,
    /// All that a ramp tried.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Tried>,
    /// What the lag of an open loop did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lag: Option<Lag>,
    /// From when a write was due to when it was readable in the other region.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<Quantiles>,
    /// The same of the writes that were due in each second.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub latency_ms_by_second: Vec<Quantiles>,
    /// How late the generator began its writes: part of the latency that is not evrepl's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub writer_late_ms: Option<Quantiles>,
    /// CPU seconds, user and system, by process, for a million events.
    pub cpu_seconds_per_million: BTreeMap<&'static str, f64>,
    /// What of it was system time: the kernel's work for the process.
    pub system_seconds_per_million: BTreeMap<&'static str, f64>,
    /// What is compared between runs.
    pub cpu: Cpu,
    /// CPU seconds a million by process and thread; threads of one name together, only those that live.
    pub thread_cpu_seconds_per_million: BTreeMap<&'static str, BTreeMap<String, f64>>,
    /// The most resident memory of any one process, in MiB, since it started.
    pub peak_rss_mib: BTreeMap<&'static str, f64>,
    /// Resident memory each second, in MiB.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rss_mib_by_second: BTreeMap<&'static str, Vec<f64>>,
    /// Whether that is at the end what it was after a minute.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rss_is_flat: BTreeMap<&'static str, bool>,
    /// Everything that should not be: empty in a run that may be believed.
    pub problems: Vec<String>,
}

/// A rate that a ramp tried.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Tried {
    pub rate: u64,
    pub seconds: u64,
    pub lag: Lag,
    pub latency_ms: Quantiles,
}

/// evrepl's own cost.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Cpu {
    /// Seconds a million of all relays and agents.
    pub relay_and_agent: f64,
    /// The same divided by what the memcacheds used in the same run: a machine whose speed changes is slower for them, too.
    pub relay_by_memcacheds: f64,
    pub agent_by_memcacheds: f64,
    pub relay_and_agent_by_memcacheds: f64,
}

impl Cpu {
    pub fn new(by_role: &BTreeMap<&'static str, f64>) -> Cpu {
        let of = |role: &str| by_role.get(role).copied().unwrap_or(0.0);
        let (relay, agent) = (of("relay"), of("agent"));
        let memcacheds = of("memcached of the relay") + of("memcached of the agent");
        // A run too short for the kernel's clock has used nothing; a ratio of that is no number.
        let by = |cpu: f64| if memcacheds > 0.0 { cpu / memcacheds } else { 0.0 };
        Cpu {
            relay_and_agent: relay + agent,
            relay_by_memcacheds: by(relay),
            agent_by_memcacheds: by(agent),
            relay_and_agent_by_memcacheds: by(relay + agent),
        }
    }
}
