//! evrepl replicates memcached writes between regions through Kafka.

pub mod actors;
pub mod admin;
pub mod agent;
pub mod backoff;
pub mod breaker;
pub mod certs;
pub mod coalesce;
pub mod config;
pub mod dirty;
pub mod event;
pub mod handoff;
pub mod hashing;
pub mod hlc;
pub mod kafka;
pub mod memcached;
pub mod offsets;
pub mod outcome;
pub mod permits;
pub mod poll_thread;
pub mod relay;
pub mod stamps;
pub mod telemetry;
pub mod tls;
pub mod wire;
