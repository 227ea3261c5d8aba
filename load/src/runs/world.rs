//! The processes of a run: one region that is written, its relays, and the regions that its events go to.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use evrepl::outcome::Outcome;
use evrepl_lab::{Broker, CacheSpec, Certs, FlowStatus, PeerSpec, Region, RegionBuilder, flows, wait_until};

use super::generate::Spec;
use super::generate::events::Target;
use super::scenario::{MEMCACHED_MIB, Scenario};

/// The cache that is replicated.
pub const CACHE: &str = "sessions";

/// A region that starts on a busy machine is ready within this.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// What memcached is started with. The hash table has its size from the beginning: growing it would cost in the middle of a run
/// what a memcached that lives for weeks has long paid.
const HASH_POWER: &str = "hashpower=22";

/// The names of the regions that events go to.
const PEERS: [&str; 8] = [
    "eu-west-1",
    "eu-west-2",
    "eu-west-3",
    "eu-central-1",
    "ap-south-1",
    "ap-south-2",
    "sa-east-1",
    "ca-west-1",
];

/// Where evrepl exports its telemetry to.
#[derive(Clone, Debug)]
pub struct Exports {
    pub endpoint: String,
}

/// What all relays together say of all their flows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Totals {
    pub consumed: u64,
    pub in_flight: u64,
    /// Events in Kafka that are not finished, as the relays know it.
    pub offset_lag: u64,
    pub outcomes: BTreeMap<String, u64>,
}

impl Totals {
    /// Of these flows together.
    pub fn of(flows: &[FlowStatus]) -> Totals {
        let mut totals = Totals::default();
        for flow in flows {
            totals.consumed += flow.consumed;
            totals.in_flight += flow.in_flight;
            totals.offset_lag += flow.json["offset_lag"].as_u64().unwrap_or(0);
            for (name, count) in &flow.outcomes {
                *totals.outcomes.entry(name.clone()).or_default() += count;
            }
        }
        totals
    }

    /// How many ended this way.
    pub fn outcome(&self, outcome: Outcome) -> u64 {
        self.outcomes.get(outcome.name()).copied().unwrap_or(0)
    }

    /// Events that came to their end. One that was released or parked comes again.
    pub fn finished(&self) -> u64 {
        self.outcomes.values().sum::<u64>() - self.again()
    }

    /// Events that come again.
    pub fn again(&self) -> u64 {
        self.outcome(Outcome::Released) + self.outcome(Outcome::Parked)
    }
}

/// A source region with its relays, and its peers.
#[derive(Debug)]
pub struct World<'a> {
    // The relays first: they end before those they send to.
    /// The process that is also the source region's agent, and further ones of the same consumer group.
    pub relays: Vec<Region>,
    pub peers: Vec<Region>,
    broker: &'a Broker,
}

impl World<'_> {
    /// Builds everything; starts memcacheds, but no evrepl. `binary`: the evrepl to be run, when it is not the usual one.
    ///
    /// # Panics
    /// When memcached, Kafka or the certificates fail.
    pub fn build<'a>(
        broker: &'a Broker,
        scenario: &Scenario,
        binary: Option<&Path>,
        exports: Option<&Exports>,
    ) -> World<'a> {
        let memory = MEMCACHED_MIB.to_string();
        let cache = CacheSpec::new(CACHE)
            .partitions(scenario.partitions)
            .memcached_args(&["-m", &memory, "-o", HASH_POWER]);
        let names = &PEERS[..scenario.peers];
        let source = RegionBuilder::new("us-east-1");
        let certs = Arc::new(Certs::issue(&[&[source.name()], names].concat()));
        let common = |builder: RegionBuilder, cache: CacheSpec| {
            let builder = builder
                .kafka(&broker.client())
                .certs(&certs)
                .cache(cache)
                .lanes(scenario.lanes)
                .extra(&scenario.settings);
            let builder = match exports {
                Some(exports) => builder.telemetry(&exports.endpoint, scenario.traces),
                None => builder,
            };
            match binary {
                Some(binary) => builder.binary(binary),
                None => builder,
            }
        };
        let peers: Vec<RegionBuilder> = names.iter().map(|name| RegionBuilder::new(name)).collect();
        let to = peers
            .iter()
            .map(|peer| PeerSpec::at(peer.name(), &peer.agent_address()));
        let source = to.fold(common(source, cache.clone()), RegionBuilder::peer).build();
        let further = (2..=scenario.relays).map(|number| source.another_node(&format!("relay-{number}")));
        let mut relays: Vec<Region> = further.collect();
        relays.insert(0, source);
        let from = |builder: RegionBuilder| {
            // Nobody writes there.
            let builder = common(builder, cache.clone().partitions(1));
            builder.peer(PeerSpec::receive_only("us-east-1")).build()
        };
        World {
            relays,
            peers: peers.into_iter().map(from).collect(),
            broker,
        }
    }

    /// What the generator needs to know.
    pub fn spec(&self, scenario: &Scenario) -> Spec {
        let (source, peer) = (&self.relays[0], &self.peers[0]);
        Spec {
            memcached: source.cache(CACHE).memcached(0).address(),
            destination: peer.cache(CACHE).memcached(0).address(),
            target: Target {
                kafka: source.kafka().address().into(),
                topic: source.cache(CACHE).topic.clone(),
                partitions: scenario.partitions,
                linger_ms: scenario.linger_ms,
            },
            keys: scenario.keys,
            value_bytes: scenario.value_bytes,
        }
    }

    /// Starts the agents and returns when they take batches.
    ///
    /// # Panics
    /// When one doesn't come up.
    pub fn start_agents(&self) {
        self.peers.iter().for_each(Region::spawn);
        self.peers.iter().for_each(ready);
    }

    /// Starts the relays, and waits for nothing.
    ///
    /// # Panics
    /// When one can't be started.
    pub fn spawn_relays(&self) {
        self.relays.iter().for_each(Region::spawn);
    }

    /// Returns when the relays are ready.
    ///
    /// # Panics
    /// When one doesn't come up.
    pub fn await_relays(&self) {
        self.relays.iter().for_each(ready);
    }

    /// # Panics
    /// When a relay has ended.
    pub fn relays_run(&self) {
        for relay in &self.relays {
            assert!(relay.is_running(), "a relay has ended:\n{}", relay.log_tail(60));
        }
    }

    /// What the relays say, if all answer.
    pub fn totals(&self) -> Option<Totals> {
        let mut all = Vec::new();
        for relay in &self.relays {
            all.extend(flows(&relay.try_status()?).ok()?);
        }
        Some(Totals::of(&all))
    }

    /// Ends everything and deletes the topics: Kafka's disk is not for the next run to pay.
    pub fn end(self) {
        let regions = self.relays.into_iter().chain(self.peers);
        let topics: Vec<String> = regions.map(|region| region.cache(CACHE).topic.clone()).collect();
        for topic in topics.iter().collect::<std::collections::BTreeSet<_>>() {
            self.broker.delete_topic(topic);
        }
    }
}

fn ready(region: &Region) {
    wait_until(&format!("{} is ready", region.name()), READY_WITHIN, || {
        assert!(
            region.is_running(),
            "evrepl of {} ended:\n{}",
            region.name(),
            region.log_tail(60)
        );
        matches!(region.get("/readyz"), Ok((200, _)))
    });
}
