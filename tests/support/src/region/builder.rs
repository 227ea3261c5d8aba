//! What a region shall be, before it is one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::settings::{Settings, quoted};
use super::{Certs, Plan, Region};
use crate::cache::{Cache, CacheSpec};
use crate::kafka::{KafkaClient, broker};
use crate::place::{free_port, unique};

/// A `[[peer]]` of a region.
#[derive(Clone, Debug)]
pub struct PeerSpec {
    pub(crate) region: String,
    pub(crate) address: Option<String>,
    pub(crate) caches: Option<Vec<String>>,
    pub(crate) options: Vec<(String, String)>,
}

impl PeerSpec {
    /// A peer that this region sends to at `address`.
    pub fn at(region: &str, address: &str) -> PeerSpec {
        PeerSpec {
            address: Some(address.into()),
            ..PeerSpec::receive_only(region)
        }
    }

    /// A peer that this region only receives from.
    pub fn receive_only(region: &str) -> PeerSpec {
        PeerSpec {
            region: region.into(),
            address: None,
            caches: None,
            options: Vec::new(),
        }
    }

    /// Only these caches, instead of all.
    pub fn caches(mut self, caches: &[&str]) -> PeerSpec {
        self.caches = Some(caches.iter().map(|cache| cache.to_string()).collect());
        self
    }

    /// Another key of its `[[peer]]` table, with a TOML literal: `("identity", "\"staging-eu\"")`.
    pub fn option(mut self, key: &str, literal: &str) -> PeerSpec {
        self.options.push((key.into(), literal.into()));
        self
    }
}

/// Builds a [`Region`]. Its addresses are known from the start, so that two builders can name each other.
#[derive(Debug)]
pub struct RegionBuilder {
    name: String,
    node: String,
    agent_port: u16,
    admin_port: u16,
    kafka: Option<Arc<KafkaClient>>,
    topics_exist: bool,
    group_prefix: Option<String>,
    caches: Vec<CacheSpec>,
    peers: Vec<PeerSpec>,
    certs: Option<Arc<Certs>>,
    settings: Settings,
    environment: Vec<(String, String)>,
    under: Vec<String>,
    binary: Option<PathBuf>,
}

impl RegionBuilder {
    /// A region of this name (a DNS label), with one cache `sessions` unless told otherwise, on the shared broker.
    pub fn new(name: &str) -> RegionBuilder {
        RegionBuilder {
            name: name.into(),
            node: "relay-1".into(),
            agent_port: free_port(),
            admin_port: free_port(),
            kafka: None,
            topics_exist: false,
            group_prefix: None,
            caches: Vec::new(),
            peers: Vec::new(),
            certs: None,
            settings: Settings::default(),
            environment: Vec::new(),
            under: Vec::new(),
            binary: None,
        }
    }

    /// The region's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its agent will listen: what peers dial.
    pub fn agent_address(&self) -> String {
        format!("127.0.0.1:{}", self.agent_port)
    }

    /// Its Kafka; default: the broker that all tests share.
    pub fn kafka(mut self, kafka: &Arc<KafkaClient>) -> RegionBuilder {
        self.kafka = Some(Arc::clone(kafka));
        self
    }

    /// Creates no topics: they exist, or the Kafka has no admin calls (librdkafka's mock).
    pub fn topics_exist(mut self) -> RegionBuilder {
        self.topics_exist = true;
        self
    }

    /// The prefix of its consumer groups; default: a new one, so that tests on one broker never meet.
    pub fn group_prefix(mut self, prefix: &str) -> RegionBuilder {
        self.group_prefix = Some(prefix.into());
        self
    }

    /// Adds a cache.
    pub fn cache(mut self, spec: CacheSpec) -> RegionBuilder {
        self.caches.push(spec);
        self
    }

    /// Adds a peer.
    pub fn peer(mut self, peer: PeerSpec) -> RegionBuilder {
        self.peers.push(peer);
        self
    }

    /// Certificates shared with its peers; default: its own, which no peer would accept.
    pub fn certs(mut self, certs: &Arc<Certs>) -> RegionBuilder {
        self.certs = Some(Arc::clone(certs));
        self
    }

    /// How many lanes each flow gets.
    pub fn lanes(self, lanes: u32) -> RegionBuilder {
        self.set("flow.lanes", &lanes.to_string())
    }

    /// Where it exports traces and metrics to, such as [`OtlpSink::endpoint`](crate::OtlpSink::endpoint), and the share of
    /// events that it traces.
    pub fn telemetry(self, endpoint: &str, trace_ratio: f64) -> RegionBuilder {
        self.set("telemetry.otlp_endpoint", &quoted(endpoint))
            // `{:?}` writes 1.0, which is no integer to TOML.
            .set("telemetry.trace_ratio", &format!("{trace_ratio:?}"))
    }

    /// Any setting outside `[[cache]]` and `[[peer]]`, with a TOML literal: `("batch.linger", "\"5ms\"")`.
    pub fn set(mut self, path: &str, literal: &str) -> RegionBuilder {
        self.settings.set(path, literal);
        self
    }

    /// More settings as TOML text: `[table]` headers and one `key = value` per line.
    pub fn extra(mut self, toml: &str) -> RegionBuilder {
        self.settings.merge(toml);
        self
    }

    /// An environment variable of the process, such as `FAILPOINTS`.
    pub fn env(mut self, name: &str, value: &str) -> RegionBuilder {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Runs evrepl under another program, such as valgrind: these words stand in front of its command line.
    pub fn under(mut self, words: &[String]) -> RegionBuilder {
        self.under = words.to_vec();
        self
    }

    /// The evrepl binary that it runs, instead of the one that all others run.
    pub fn binary(mut self, path: &Path) -> RegionBuilder {
        self.binary = Some(path.into());
        self
    }

    /// Starts its memcacheds, creates its topics and writes its configuration, but doesn't start evrepl.
    ///
    /// # Panics
    /// When one of these fails.
    pub fn build(self) -> Region {
        let RegionBuilder {
            name,
            node,
            kafka,
            mut caches,
            mut settings,
            ..
        } = self;
        let kafka = kafka.unwrap_or_else(|| broker().client());
        if caches.is_empty() {
            caches.push(CacheSpec::new("sessions"));
        }
        let caches = caches.into_iter().map(|spec| {
            let topic = spec.topic.clone().unwrap_or_else(|| {
                let topic = unique(&format!("lab.{name}.{}", spec.name));
                if !self.topics_exist {
                    kafka.create_topic(&topic, spec.partitions, &[]);
                }
                topic
            });
            Arc::new(Cache::start(spec, topic))
        });
        let caches: Vec<Arc<Cache>> = caches.collect();
        let group_prefix = self.group_prefix.unwrap_or_else(|| unique("lab"));
        // What a test said about these wins.
        let said = std::mem::take(&mut settings);
        settings.set("region", &quoted(&name));
        settings.set("kafka.group_prefix", &quoted(&group_prefix));
        settings.set("kafka.brokers", &format!("[{}]", quoted(kafka.address())));
        settings.absorb(said);
        let plan = Plan {
            peers: self.peers,
            settings,
            environment: self.environment,
            under: self.under,
            binary: self.binary,
        };
        let certs = self.certs.unwrap_or_else(|| Arc::new(Certs::issue(&[&name])));
        Region::new(
            name,
            node,
            (self.agent_port, self.admin_port),
            (kafka, group_prefix),
            caches,
            certs,
            plan,
        )
    }

    /// [`RegionBuilder::build`], then [`Region::start`].
    pub fn start(self) -> Region {
        let region = self.build();
        region.start();
        region
    }
}
