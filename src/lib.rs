//! evrepl replicates memcached writes between regions through Kafka.

pub mod admin;
pub mod backoff;
pub mod breaker;
pub mod config;
pub mod dirty;
pub mod event;
pub mod hashing;
pub mod hlc;
pub mod memcached;
pub mod offsets;
pub mod outcome;
pub mod stamps;
pub mod telemetry;
pub mod tls;
pub mod wire;
