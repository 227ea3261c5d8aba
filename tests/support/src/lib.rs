//! The lab: real regions, brokers, memcacheds and a network that fails on demand, for evrepl's tests, demo and load runs.
//!
//! Nothing here is a mock. [`broker()`] is an Apache Kafka, a [`Memcached`] is memcached, a [`Region`] is the `evrepl`
//! binary with a configuration file; each process ends with its handle and, whatever happens, with the test process.
//! The lab shares no code with what it tests (its memcached client, its hash ring and its events are its own), apart
//! from the names of the outcomes.
//!
//! A test reads as a story:
//!
//! ```no_run
//! use evrepl_lab::*;
//!
//! let _gate = shared();
//! let pair = TwoRegionsSpec::new().proxied().start();
//! let sampler = Sampler::start(&pair.both());
//! let mut writer = pair.us.writer("sessions");
//! let keys: Vec<String> = (0..10_000).map(|n| format!("key:{n}")).collect();
//! writer.set_all(keys.iter().map(|key| (key, "value")));
//! pair.us_to_eu().cut();
//! writer.set_all(keys.iter().map(|key| (key, "written while the peer was away")));
//! pair.us_to_eu().pass();
//! settle(&pair.both());
//! assert_same(&pair.both(), "sessions", &keys);
//! accounted(&pair.both());
//! sampler.finish();
//! ```
//!
//! Panicking is this crate's way of reporting: its callers are tests, and a panic prints the logs of what it started.

pub mod cache;
pub mod faults;
pub mod kafka;
pub mod memcached;
pub mod otlp;
pub mod place;
pub mod process;
pub mod prometheus;
pub mod proxy;
pub mod region;
pub mod wait;
pub mod writer;

pub use cache::{Cache, CacheClient, CacheSpec, Server};
pub use kafka::{Broker, KafkaClient, MockKafka, Outgoing, Producer, Record, broker};
pub use memcached::{Memcached, MetaClient, Put, Ring, Value};
pub use otlp::{OtlpSink, SinkEvent, SinkLink, SinkPoint, SinkSpan, SinkStatus, SpanKind};
pub use place::{Dir, free_port, unique};
pub use process::{Process, Signal};
pub use prometheus::{Prometheus, promtool, repository};
pub use proxy::FaultProxy;
pub use region::{
    Certs, FlowStatus, FlowSums, Mismatch, PeerSpec, Region, RegionBuilder, Sampler, TwoRegions, TwoRegionsSpec,
    accounted, assert_same, balanced, compare, evrepl, flow_sums, flows, settle, settle_within, settled_within,
    two_regions,
};
pub use wait::{exclusive, holds_within, shared, wait_until};
pub use writer::{Format, Op, Writer, noise, numbered};
