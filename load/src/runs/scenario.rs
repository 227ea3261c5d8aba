//! What a load run does: a scenario of a file in `load/scenarios`, changed by the command line.

use serde::Serialize;

use super::generate::keys::KeySpec;

/// How the events get to the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Everything is written while the relay is stopped; then it starts and drains a full topic.
    Drain,
    /// An application writes at a fixed rate, whatever evrepl makes of it.
    Fixed,
    /// The same, and it is wrong if the lag grows.
    Sustained,
    /// Searches the highest rate at which the lag doesn't grow.
    Ramp,
}

impl Kind {
    /// Every kind, with its name in a file.
    pub const ALL: [(&'static str, Kind); 4] = [
        ("drain", Kind::Drain),
        ("fixed", Kind::Fixed),
        ("sustained", Kind::Sustained),
        ("ramp", Kind::Ramp),
    ];
}

/// What a scenario is for: which preset runs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// A row of the goals.
    Goal,
    /// A point of a curve: how cost grows.
    Growth,
    /// Whether anything grows with time.
    Long,
}

impl Group {
    /// Every group, with its name in a file.
    pub const ALL: [(&'static str, Group); 3] =
        [("goal", Group::Goal), ("growth", Group::Growth), ("long", Group::Long)];
}

/// One point of a family of scenarios: what differs between them, and what it is here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Point {
    pub axis: String,
    pub value: u64,
}

/// One scenario.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scenario {
    /// The file's name without `.toml`; of a family, with what differs.
    pub name: String,
    pub group: Group,
    pub kind: Kind,
    /// Of a family.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub point: Option<Point>,
    /// How many events are drained.
    pub events: u64,
    /// The most bytes that all their values may have.
    #[serde(skip)]
    pub bytes: u64,
    /// Events a second that a drain is expected to reach: what a number of seconds is made events with.
    pub expect: u64,
    /// How long an open loop is measured; in a ramp, its last step.
    pub seconds: u64,
    /// How long an open loop writes before.
    pub warm_up_seconds: u64,
    /// Writes a second; in a ramp, those to begin with.
    pub rate: u64,
    /// The scenario whose maximum rate this one's is half of, if that was run before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub half_of: Option<String>,
    pub value_bytes: usize,
    pub keys: KeySpec,
    /// Of the topic.
    pub partitions: i32,
    /// Of each flow.
    pub lanes: u32,
    /// Regions that the events go to.
    pub peers: usize,
    /// Processes that share the topic's partitions.
    pub relays: usize,
    /// How long the generator's producer waits for more events.
    pub linger_ms: f64,
    /// The share of events whose traces are exported; with it metrics are, too. 0: nothing is exported.
    pub traces: f64,
    /// Further evrepl settings for all regions, as TOML: `[table]` headers and one `key = value` a line.
    pub settings: String,
}

/// What one memcached may hold, beside the value's and the key's bytes: its header, and what is lost to its size classes.
const ITEM_BYTES: u64 = 90;

/// Memory of each memcached.
pub const MEMCACHED_MIB: u64 = 2_048;

/// Of that memory, what values may take: the size classes differ by a quarter.
const ROOM: u64 = (MEMCACHED_MIB << 20) * 3 / 4;

impl Scenario {
    /// What is run before all others, and counts nowhere: thousands of requests of each kind, so that the broker's compiler has
    /// seen them.
    pub fn warm_up() -> Scenario {
        Scenario {
            name: "warm-up".into(),
            group: Group::Goal,
            kind: Kind::Fixed,
            point: None,
            events: 0,
            bytes: u64::MAX,
            expect: 0,
            seconds: 10,
            warm_up_seconds: 5,
            rate: 40_000,
            half_of: None,
            value_bytes: 100,
            keys: KeySpec {
                count: 1_000_000,
                zipf: 0.0,
            },
            partitions: 4,
            lanes: 1,
            peers: 1,
            relays: 1,
            linger_ms: 1.0,
            traces: 0.0,
            settings: String::new(),
        }
    }

    /// How many keys there may be, so that nothing is thrown out of memcached.
    pub fn most_keys(&self) -> u64 {
        ROOM / (self.value_bytes as u64 + ITEM_BYTES)
    }

    /// How many events there may be, so that all their values are at most `bytes`.
    pub fn most_events(&self) -> u64 {
        self.bytes / (self.value_bytes as u64).max(1)
    }

    /// Lets it take about so long.
    pub fn last(&mut self, seconds: u64) {
        self.seconds = seconds;
        if self.kind == Kind::Drain {
            self.events = seconds.saturating_mul(self.expect).min(self.most_events());
        }
    }

    /// Whether it can be run.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self) -> Result<(), String> {
        let drain = self.kind == Kind::Drain;
        let most = self.most_keys();
        match () {
            () if drain && self.rate != 0 => Err("a drain has no rate".into()),
            () if drain && self.events == 0 => Err("a drain needs events above 0".into()),
            () if drain && self.expect == 0 => Err("a drain needs expect above 0".into()),
            () if !drain && self.events != 0 => Err("only a drain has events; the others have seconds".into()),
            () if !drain && self.rate == 0 => Err("a run that is no drain needs a rate above 0".into()),
            () if !drain && self.seconds == 0 => Err("a run that is no drain needs seconds above 0".into()),
            () if self.partitions < 1 => Err("partitions must be above 0".into()),
            () if self.lanes < 1 || self.peers < 1 || self.relays < 1 => {
                Err("lanes, peers and relays must be above 0".into())
            }
            () if self.keys.count < 1 => Err("keys must be above 0".into()),
            () if !(0.0..10.0).contains(&self.keys.zipf) => Err("zipf must be between 0 and 10".into()),
            () if self.keys.count > most => Err(format!(
                "keys must be at most {most}: a memcached of {MEMCACHED_MIB} MiB holds no more values of {} bytes",
                self.value_bytes
            )),
            // memcached's limit for an item is 1 MiB with its key and header.
            () if self.value_bytes > 1_000_000 => Err("value_bytes must be at most 1000000".into()),
            () if !(0.0..=1.0).contains(&self.traces) => Err("traces must be between 0 and 1".into()),
            () => Ok(()),
        }
    }
}
