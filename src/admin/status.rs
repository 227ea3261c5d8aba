//! What `/status` and `/readyz` answer: plain data, filled by whoever holds the accounts, also read back by
//! `evrepl status` and by tests. The names are public (DESIGN section 10).

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Index, IndexMut};

use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Trouble;
use crate::outcome::Outcome;

/// Where the numbers come from. Called from the telemetry threads for every request and every collection of metrics, so
/// it must neither block nor wait for an actor.
pub trait StatusSource: Send + Sync {
    /// Everything, as one snapshot: in each flow `consumed` is the sum of its outcomes and what is in flight.
    fn status(&self) -> Status;

    /// Whether the agent can take batches, and how everything else fares.
    fn ready(&self) -> Readiness;

    /// Whether the process works at all: one check that fails is enough, and a restart helps.
    fn alive(&self) -> Vec<Check>;

    /// The caches there are, by name.
    fn caches(&self) -> Vec<String>;
}

/// The answer of `GET /status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// This region.
    pub region: String,
    /// The version of evrepl.
    pub version: String,
    /// What is wrong, the worst first; empty when all is well.
    pub troubles: Vec<Trouble>,
    /// Stages that have work and have not moved for a while.
    pub stalls: Vec<StallStatus>,
    /// One entry a peer that is sent to.
    pub flows: Vec<FlowStatus>,
    /// The receiving half.
    pub agent: AgentStatus,
    /// Outcomes that arrived after their partition was given back; they are in no flow's sums.
    pub late_outcomes: u64,
    /// Restarts by kind of actor, since the process began.
    pub restarts: BTreeMap<String, u64>,
    /// Bounded mailboxes by kind of actor, those of all flows and of the agent together.
    pub mailboxes: BTreeMap<String, MailboxStatus>,
    /// The certificates that this region relies on.
    pub certificates: Vec<CertificateStatus>,
    /// The front doors of the caches that have one.
    pub front_doors: Vec<FrontDoorStatus>,
}

/// The front door of one cache.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FrontDoorStatus {
    /// The cache.
    pub cache: String,
    /// Clients now.
    pub connections: u64,
    /// Clients since the process began.
    pub accepted: u64,
    /// Commands by name, since the process began: `commands["set"]`.
    pub commands: BTreeMap<String, u64>,
    /// Events of writes that memcached said have happened, or did not answer.
    pub events: u64,
    /// Of these and of those produced again, those that Kafka has.
    pub acknowledged: u64,
    /// Those that Kafka did not take, whose keys are or were remembered.
    pub remembered: u64,
    /// Those that were neither produced nor remembered: peers don't hear of these writes.
    pub lost: u64,
    /// `flush_all`, which peers don't hear of.
    pub flushes: u64,
    /// Commands that failed because a server could not be reached.
    pub unreachable: u64,
    /// Writes refused because Kafka is away.
    pub refused: u64,
    /// Clients that were disconnected because they neither read nor sent, and others needed the room.
    pub dropped: u64,
    /// The servers behind it: `idle`, `connecting`, `open` or `away`.
    pub servers: BTreeMap<String, String>,
    /// Events that wait for Kafka's acknowledgement.
    pub queued_events: u64,
    /// Keys that are remembered now.
    pub unsent_keys: u64,
    /// Kafka acknowledges none.
    pub kafka_away: bool,
    /// Writes are refused now: Kafka is away, or as many events wait as may, and `on_kafka_down` says so.
    pub refuses: bool,
    /// Held for clients of all front doors: commands under way, and answers that they have not read.
    pub buffered_bytes: u64,
    /// As much as may be: clients wait to be read.
    pub full: bool,
}

/// A certificate, or several that are read from one file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CertificateStatus {
    /// `own`, or `ca`.
    pub name: String,
    /// Seconds until it, or the first of them, expires; negative when it has.
    pub expires_in_seconds: f64,
}

/// A stage that has work, waits for nobody, and does not move.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StallStatus {
    /// The flow it belongs to, or `agent`.
    pub of: String,
    /// The kind of actor.
    pub stage: String,
    /// Which one.
    pub place: String,
    /// How much work it has: messages, batches or keys.
    pub work: u64,
    /// For how long it has not moved.
    pub since_seconds: f64,
}

/// One flow.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FlowStatus {
    /// The region it goes to.
    pub peer: String,
    /// What it does, in a word.
    pub state: String,
    /// Events taken from Kafka, since the process began.
    pub consumed: u64,
    /// Events consumed and without outcome: `waiting` + `with_permit` + `dirty`.
    pub in_flight: u64,
    /// Taken, and waiting for a permit.
    pub waiting: u64,
    /// Holding a permit.
    pub with_permit: u64,
    /// Waiting as dirty keys.
    pub dirty: u64,
    /// Permits there are: the most events that may be in flight.
    pub permits: u64,
    /// Permits that nobody holds.
    pub permits_free: u64,
    /// Bytes of values and keys in flight.
    pub in_flight_bytes: u64,
    /// The most there may be.
    pub in_flight_bytes_limit: u64,
    /// Events ended, by how; every name, zeros included.
    pub outcomes: Outcomes,
    /// Events in Kafka that are not finished; `null` until Kafka has said.
    pub offset_lag: Option<u64>,
    /// Since when the oldest chunk that was taken and is not committed has been in Kafka; 0 when all is committed.
    pub commit_age_seconds: f64,
    /// How often partitions were assigned, since the process began.
    pub rebalances: u64,
    /// The last lag at each stage, in seconds; a stage that nothing has passed is absent.
    pub lag_seconds: BTreeMap<String, f64>,
    /// How long the stages of the path take, by name: `kafka`, `queue`, `wait`, `look`, `coalesce`, `link`, `agent_queue`,
    /// `apply`.
    pub stages: BTreeMap<String, StageStatus>,
    /// Its bounded mailboxes by kind of actor.
    pub mailboxes: BTreeMap<String, MailboxStatus>,
    /// Partitions whose fetching is paused.
    pub paused_partitions: u64,
    /// Retry partitions whose next record's time has not come.
    pub retry_partitions_waiting: u64,
    /// Seconds until the first of these records is taken.
    pub retry_next_seconds: Option<f64>,
    /// What keeps Kafka from being read; polling goes on.
    pub kafka_trouble: Option<KafkaTrouble>,
    /// By lane.
    pub links: Vec<LinkStatus>,
    /// Sessions begun after the first one, all lanes together.
    pub reconnects: u64,
    /// The circuit breakers of the own memcached servers that are read from.
    pub breakers: Vec<BreakerStatus>,
    /// What dirty keys wait for.
    pub waiting_for: Vec<WaitingFor>,
    /// Keys that became dirty, by reason, since the process began.
    pub looks_again: BTreeMap<String, u64>,
    /// How often Kafka had removed events before they were taken, since the process began.
    pub retention_gaps: u64,
    /// How many events that were, at most.
    pub retention_gap_events: u64,
    /// The last of these gaps.
    pub last_retention_gap: Option<RetentionGap>,
    /// Own memcached servers on which many keys that were set are missing; empty when all is well.
    pub mass_misses: Vec<MassMisses>,
    /// What canaries say of the path of each cache; empty when `canary.interval` is 0.
    pub canaries: Vec<CanaryStatus>,
}

/// The path to the peer for one cache, as canaries show it. They are in no account.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CanaryStatus {
    /// The cache.
    pub cache: String,
    /// None arrives that should, or none can be written.
    pub dead: bool,
    /// For how long it is dead.
    pub dead_seconds: Option<f64>,
    /// How it fares, in words.
    pub why: String,
    /// Canaries are to arrive at this node: it has a partition of the cache's topic.
    pub expected: bool,
    /// Now minus the time at which the newest that arrived was produced; `null` until one has arrived.
    pub age_seconds: Option<f64>,
    /// From produced-at to the peer's ack, of the newest that arrived.
    pub lag_seconds: Option<f64>,
    /// Written by this node, and acknowledged by Kafka.
    pub written: u64,
    /// Attempts of this node to write one that failed, by reason: `memcached` or `kafka`.
    pub failed: BTreeMap<String, u64>,
    /// Applied by the peer, heard by this node.
    pub arrived: u64,
    /// Taken from Kafka by this node and dropped, by reason.
    pub lost: BTreeMap<String, u64>,
}

/// How long events take for one stage of their path: one event an ack is measured, in all stages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StageStatus {
    /// Of all that were measured, since the process began.
    pub seconds_total: f64,
    /// How many were measured.
    pub count: u64,
    /// Of the last one.
    pub last_seconds: f64,
}

/// The circuit breaker of a memcached server.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct BreakerStatus {
    /// The cache that the server belongs to.
    pub cache: String,
    /// `host:port`.
    pub server: String,
    /// `closed`, `half_open` or `open`; of several lanes, the worst.
    pub state: String,
}

/// A memcached server on which many keys that were set are missing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MassMisses {
    /// The cache that it belongs to.
    pub cache: String,
    /// `host:port`.
    pub server: String,
    /// Looks that were to find a value, in the worst window.
    pub looks: u64,
    /// Those that found none.
    pub missing: u64,
    /// Seconds since it was noticed; it stays until a full window shows otherwise.
    pub since_seconds: f64,
    /// What it most likely means.
    pub likely_causes: String,
}

/// Events that Kafka had removed before the flow took them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RetentionGap {
    /// Of which topic.
    pub topic: String,
    /// Of which partition.
    pub partition: i32,
    /// The first offset that is gone.
    pub from: i64,
    /// The first one that is there again.
    pub to: i64,
    /// How long ago it was found, in seconds.
    pub seconds_ago: f64,
    /// Seconds between the last event taken before it and the first one behind it, once both are known.
    pub spans_seconds: Option<f64>,
}

/// Kafka cannot be read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct KafkaTrouble {
    /// What librdkafka says.
    pub reason: String,
    /// For how long.
    pub since_seconds: f64,
}

/// One link.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LinkStatus {
    /// `waiting`, `dialling`, `greeting`, `open` or `draining`.
    pub state: String,
    /// Seconds in that state.
    pub since_seconds: f64,
    /// Seconds without a session; `null` while there is one.
    pub away_seconds: Option<f64>,
    /// Failed attempts since the last session.
    pub attempts: u32,
    /// Why the last session or attempt ended.
    pub last_error: Option<String>,
    /// Round trip of the last ping, in milliseconds.
    pub rtt_ms: Option<f64>,
    /// The peer's wall clock minus ours, in milliseconds.
    pub clock_offset_ms: Option<f64>,
}

/// Dirty keys that wait for one memcached server, or for the peer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct WaitingFor {
    /// Its address, or the peer's region.
    pub server: String,
    /// How many keys.
    pub keys: u64,
    /// Seconds since the first of them waits.
    pub since_seconds: f64,
    /// What is done about it, and when.
    pub next: String,
}

/// The receiving half.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentStatus {
    /// Inbound sessions.
    pub sessions: Vec<SessionStatus>,
    /// Items that did what they should, since the process began: `items["applied"]`.
    pub applied: u64,
    /// Items answered, by the status of the answer.
    pub items: BTreeMap<String, u64>,
    /// Own memcached servers.
    pub servers: Vec<ServerStatus>,
    /// Its bounded mailboxes by kind of actor.
    pub mailboxes: BTreeMap<String, MailboxStatus>,
    /// New sessions are accepted.
    pub listening: bool,
}

/// One inbound session.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SessionStatus {
    /// The calling region, from its certificate.
    pub peer: String,
    /// Its address.
    pub remote: String,
    /// Seconds since it began.
    pub since_seconds: f64,
    /// Bytes it may have unacknowledged.
    pub window: u64,
}

/// One memcached server that the agent writes to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServerStatus {
    /// `host:port`.
    pub address: String,
    /// The cache that it belongs to.
    pub cache: String,
    /// `connecting`, `answers` or `away`.
    pub state: String,
    /// Seconds since it last took writes; `null` while it does.
    pub away_seconds: Option<f64>,
    /// Its circuit breaker: `closed`, `half_open` or `open`.
    pub breaker: String,
}

/// The bounded mailboxes of one kind of actor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MailboxStatus {
    /// Messages in all of them now.
    pub depth: u64,
    /// Messages in the fullest one now.
    pub fullest: u64,
    /// The most there ever were in one.
    pub high_water: u64,
    /// What one holds.
    pub capacity: u64,
    /// Senders that wait for room now.
    pub senders_waiting: u64,
    /// Messages that had to wait for room, since the process began.
    pub waits: u64,
    /// Microseconds that they waited.
    pub waited_us: u64,
}

impl MailboxStatus {
    /// Adds those of the same kind in another flow.
    pub fn add(&mut self, other: &MailboxStatus) {
        self.depth += other.depth;
        self.fullest = self.fullest.max(other.fullest);
        self.high_water = self.high_water.max(other.high_water);
        self.capacity = self.capacity.max(other.capacity);
        self.senders_waiting += other.senders_waiting;
        self.waits += other.waits;
        self.waited_us += other.waited_us;
    }
}

/// Events ended, by outcome: a map with every name when serialized.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcomes([u64; Outcome::COUNT]);

impl Outcomes {
    /// Every outcome with its count.
    pub fn iter(&self) -> impl Iterator<Item = (Outcome, u64)> {
        Outcome::ALL.into_iter().zip(self.0)
    }

    /// Of all outcomes together.
    pub fn sum(&self) -> u64 {
        self.0.iter().sum()
    }
}

impl From<[u64; Outcome::COUNT]> for Outcomes {
    /// Counts in the order of [`Outcome::ALL`].
    fn from(counts: [u64; Outcome::COUNT]) -> Outcomes {
        Outcomes(counts)
    }
}

impl Index<Outcome> for Outcomes {
    type Output = u64;

    fn index(&self, outcome: Outcome) -> &u64 {
        &self.0[outcome.index()]
    }
}

impl IndexMut<Outcome> for Outcomes {
    fn index_mut(&mut self, outcome: Outcome) -> &mut u64 {
        &mut self.0[outcome.index()]
    }
}

impl Serialize for Outcomes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(Outcome::COUNT))?;
        for (outcome, count) in self.iter() {
            map.serialize_entry(outcome.name(), &count)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Outcomes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Outcomes, D::Error> {
        struct Counts;

        impl<'de> Visitor<'de> for Counts {
            type Value = Outcomes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from outcome to count")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Outcomes, A::Error> {
                let mut outcomes = Outcomes::default();
                while let Some((name, count)) = map.next_entry::<String, u64>()? {
                    // A name of a later version is passed over: an older `evrepl status` still shows the rest.
                    if let Some(outcome) = Outcome::ALL.into_iter().find(|outcome| outcome.name() == name) {
                        outcomes[outcome] = count;
                    }
                }
                Ok(outcomes)
            }
        }

        deserializer.deserialize_map(Counts)
    }
}

/// What `/readyz` is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readiness {
    /// The agent can take batches.
    pub ready: bool,
    /// Ready, but something does not work.
    pub degraded: bool,
    /// One by one.
    pub checks: Vec<Check>,
}

impl Readiness {
    /// Ready when every check that gates is met, degraded when any is not.
    pub fn of(checks: Vec<Check>) -> Readiness {
        Readiness {
            ready: checks.iter().all(|check| check.ok || !check.gates),
            degraded: checks.iter().any(|check| !check.ok),
            checks,
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What, in a word.
    pub name: String,
    /// It works.
    pub ok: bool,
    /// Without it nothing is ready. Kafka and peers never gate, or two regions would wait for each other.
    pub gates: bool,
    /// In what state it is; empty when there is nothing to say.
    pub detail: String,
}
