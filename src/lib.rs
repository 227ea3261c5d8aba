//! evrepl replicates memcached writes between regions through Kafka. The life of one write:
//!
//! 1. The application sets its memcached and produces an [`event`]: *this key changed*. [`writer`] does both.
//! 2. The [`poll_thread`] of the flow to a peer takes records from [`kafka`] and puts chunks into the partition's queue.
//! 3. [`actors::partition_consumer`] decodes them, keeps the newest event per key, gives each an account in its tracker
//!    ([`offsets`]), takes [`permits`], and splits them by lane and server ([`hashing`]).
//! 4. [`actors::cache_reader`] looks at the keys in [`memcached`] and stamps each look with the last tick heard. What could
//!    not be looked at or was not acked waits there as a dirty key ([`dirty`], [`breaker`], [`backoff`]), and is parked on the
//!    retry topic when it waits too long ([`parking`]).
//! 5. [`actors::batch_coalescer`] keeps the newest item per key ([`coalesce`]) and encodes a batch ([`wire`]).
//! 6. [`actors::remote_link`] sends it over mutual TLS ([`tls`]) within the peer's window; when the session ends, all it had
//!    becomes dirty keys.
//! 7. [`actors::agent_session`] of the peer, started by [`actors::agent_listener`], checks, decodes and splits it.
//! 8. [`actors::cache_writer`] checks the [`stamps`], writes memcached, raises the tick and answers; the ack travels back,
//!    each event gets its [`outcome`], and the watermark is committed.
//!
//! Small writes of our own go the same way, by which a dead path is noticed ([`canary`]).
//! An event that panics whoever has it in hand is found by [`suspects`] and becomes a dead letter.
//! Bounded mailboxes are in [`handoff`], what the actors of a flow share in [`relay`], of the agent in [`agent`];
//! [`actors::region_supervisor`] is the root of the tree and [`run`] starts it.

pub mod actors;
pub mod admin;
pub mod agent;
pub mod backoff;
pub mod breaker;
pub mod canary;
pub mod certs;
pub mod cli;
pub mod clock_offset;
pub mod coalesce;
pub mod config;
pub mod dirty;
pub mod event;
pub mod failpoint;
pub mod front_door;
pub mod handoff;
pub mod hashing;
pub mod hlc;
pub mod intensity;
pub mod kafka;
pub mod link;
mod listening;
pub mod look;
pub mod memcached;
pub mod misses;
pub mod offsets;
pub mod outcome;
pub mod parking;
pub mod permits;
pub mod poll_thread;
pub mod pulse;
pub mod region;
pub mod relay;
pub mod replay;
pub mod retention;
pub mod run;
mod sabotage;
pub mod stamps;
pub mod suspects;
pub mod telemetry;
pub mod threads;
pub mod tls;
pub mod topics;
pub mod vitals;
pub mod wire;
pub mod writer;
