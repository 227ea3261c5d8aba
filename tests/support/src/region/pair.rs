//! The usual pair of regions, `us-east-1` and `eu-west-1`, connected both ways.

use std::sync::Arc;
use std::time::Duration;

use super::{Certs, PeerSpec, Region, RegionBuilder};
use crate::cache::CacheSpec;
use crate::proxy::FaultProxy;
use crate::wait::wait_until;

type Change = Box<dyn FnOnce(RegionBuilder) -> RegionBuilder>;

/// The usual pair, started: one memcached and four partitions each, on the shared broker, without proxies.
///
/// # Panics
/// When something doesn't start.
pub fn two_regions() -> TwoRegions {
    TwoRegionsSpec::new().start()
}

/// Two running regions that know each other.
#[derive(Debug)]
pub struct TwoRegions {
    // The regions first: they end before the network between them does.
    /// `us-east-1`.
    pub us: Region,
    /// `eu-west-1`.
    pub eu: Region,
    /// In front of the agent of `eu`: carries the links from `us`.
    us_to_eu: Option<FaultProxy>,
    eu_to_us: Option<FaultProxy>,
}

impl TwoRegions {
    /// The network that carries the flow from `us` to `eu`.
    ///
    /// # Panics
    /// When the spec asked for no proxies.
    pub fn us_to_eu(&self) -> &FaultProxy {
        self.us_to_eu.as_ref().expect("a pair with proxies")
    }

    /// The network that carries the flow from `eu` to `us`.
    ///
    /// # Panics
    /// When the spec asked for no proxies.
    pub fn eu_to_us(&self) -> &FaultProxy {
        self.eu_to_us.as_ref().expect("a pair with proxies")
    }

    /// Both, for `settle`, `compare` and `Sampler`.
    pub fn both(&self) -> [&Region; 2] {
        [&self.us, &self.eu]
    }
}

/// What a pair shall be.
pub struct TwoRegionsSpec {
    caches: Vec<CacheSpec>,
    proxied: bool,
    one_way: bool,
    us: Vec<Change>,
    eu: Vec<Change>,
}

impl Default for TwoRegionsSpec {
    fn default() -> TwoRegionsSpec {
        TwoRegionsSpec::new()
    }
}

impl TwoRegionsSpec {
    pub fn new() -> TwoRegionsSpec {
        TwoRegionsSpec {
            caches: Vec::new(),
            proxied: false,
            one_way: false,
            us: Vec::new(),
            eu: Vec::new(),
        }
    }

    /// Adds a cache to both regions (with memcacheds and a topic of its own in each); without any: `sessions`.
    pub fn cache(mut self, spec: CacheSpec) -> TwoRegionsSpec {
        self.caches.push(spec);
        self
    }

    /// Puts a [`FaultProxy`] in front of each agent.
    pub fn proxied(mut self) -> TwoRegionsSpec {
        self.proxied = true;
        self
    }

    /// `us` sends to `eu`, and `eu` only receives.
    pub fn one_way(mut self) -> TwoRegionsSpec {
        self.one_way = true;
        self
    }

    /// How many lanes each flow gets.
    pub fn lanes(self, lanes: u32) -> TwoRegionsSpec {
        self.extra(&format!("[flow]\nlanes = {lanes}"))
    }

    /// Where both export traces and metrics to, and the share of events that they trace.
    pub fn telemetry(self, endpoint: &str, trace_ratio: f64) -> TwoRegionsSpec {
        let (us, eu) = (endpoint.to_string(), endpoint.to_string());
        self.us(move |builder| builder.telemetry(&us, trace_ratio))
            .eu(move |builder| builder.telemetry(&eu, trace_ratio))
    }

    /// Settings for both, as TOML text (see [`RegionBuilder::extra`]).
    pub fn extra(self, toml: &str) -> TwoRegionsSpec {
        let (us, eu) = (toml.to_string(), toml.to_string());
        self.us(move |builder| builder.extra(&us))
            .eu(move |builder| builder.extra(&eu))
    }

    /// Changes `us-east-1` only.
    pub fn us(mut self, change: impl FnOnce(RegionBuilder) -> RegionBuilder + 'static) -> TwoRegionsSpec {
        self.us.push(Box::new(change));
        self
    }

    /// Changes `eu-west-1` only.
    pub fn eu(mut self, change: impl FnOnce(RegionBuilder) -> RegionBuilder + 'static) -> TwoRegionsSpec {
        self.eu.push(Box::new(change));
        self
    }

    /// Builds both without starting evrepl.
    ///
    /// # Panics
    /// When memcached, Kafka or the certificates fail.
    pub fn build(self) -> TwoRegions {
        let (us, eu) = (RegionBuilder::new("us-east-1"), RegionBuilder::new("eu-west-1"));
        let certs = Arc::new(Certs::issue(&[us.name(), eu.name()]));
        let proxy = |target: &RegionBuilder| self.proxied.then(|| FaultProxy::start(&target.agent_address()));
        let (us_to_eu, eu_to_us) = (proxy(&eu), proxy(&us));
        let dialled = |proxy: &Option<FaultProxy>, target: &RegionBuilder| {
            proxy
                .as_ref()
                .map_or_else(|| target.agent_address(), FaultProxy::address)
        };
        let to_eu = PeerSpec::at(eu.name(), &dialled(&us_to_eu, &eu));
        let to_us = match self.one_way {
            true => PeerSpec::receive_only(us.name()),
            false => PeerSpec::at(us.name(), &dialled(&eu_to_us, &us)),
        };
        let finish = |builder: RegionBuilder, peer: PeerSpec, changes: Vec<Change>| {
            let builder = self
                .caches
                .iter()
                .cloned()
                .fold(builder.certs(&certs).peer(peer), RegionBuilder::cache);
            changes
                .into_iter()
                .fold(builder, |builder, change| change(builder))
                .build()
        };
        TwoRegions {
            us: finish(us, to_eu, self.us),
            eu: finish(eu, to_us, self.eu),
            us_to_eu,
            eu_to_us,
        }
    }

    /// Builds and starts both; returns when both are ready to take batches.
    ///
    /// # Panics
    /// When something doesn't start.
    pub fn start(self) -> TwoRegions {
        let pair = self.build();
        // Both processes first: each start waits for its own only.
        pair.us.spawn();
        pair.eu.start();
        for region in pair.both() {
            wait_until(&format!("{} is ready", region.name()), Duration::from_secs(30), || {
                assert!(
                    region.is_running(),
                    "evrepl of {} ended:\n{}",
                    region.name(),
                    region.log_tail(60)
                );
                matches!(region.get("/readyz"), Ok((200, _)))
            });
        }
        pair.us.note_idle();
        pair
    }
}
