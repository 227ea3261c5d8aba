//! The generator: a process of its own (`evrepl-load generate`) that is the application of a load run. It shares the cores with
//! what is measured, so it costs as little as can be, and what it costs is seen in `/proc`.
//!
//! A [`writer`] sets keys in memcached ([`pipe`]), waits for the answer and produces their events ([`events`]), at full speed or
//! open loop: each write is due at a moment of its own. A [`readable`] thread watches some of the values arrive in the other
//! region. [`serve`] is the process, [`child`] its handle; they talk in lines of JSON ([`Command`], [`Said`]).

pub mod child;
pub mod events;
pub mod keys;
pub mod pipe;
pub mod readable;
pub mod serve;
pub mod writer;

use serde::{Deserialize, Serialize};

use crate::latency::Quantiles;
use events::Target;
use keys::KeySpec;
use readable::Seen;

/// What a generator writes, and where. The first line that it reads.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spec {
    /// The memcached it writes.
    pub memcached: String,
    /// The memcached in which values become readable.
    pub destination: String,
    pub target: Target,
    pub keys: KeySpec,
    pub value_bytes: usize,
}

/// Every further line that it reads. Writes are numbered from 0 through the whole life of the process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Writes so many more, as fast as it can. Answered by `Wrote`, once Kafka has acknowledged all.
    Fill(u64),
    /// Answered by `Wrote`, as above, and by `Seen`.
    OpenLoop(OpenLoop),
    /// What is under way ends as soon as may be: no more is written, nothing more is waited for.
    Halt,
}

/// Writes at a rate, whatever becomes of them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OpenLoop {
    /// The number of the first write: as many as were written before.
    pub first: u64,
    /// When that is due, since the Unix epoch.
    pub start_unix_nanos: u64,
    /// Writes a second.
    pub rate: u64,
    /// The first so many are neither watched nor counted as late.
    pub warm_up: u64,
    /// How many follow.
    pub count: u64,
    /// One in so many of these is watched.
    pub watch_every: u64,
    /// How often the writer wakes, and how often the reader asks.
    pub tick_micros: u64,
}

/// Every line that it writes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Said {
    /// Connected; writes come when asked for.
    Ready,
    /// How many it has written so far, now and then.
    At(u64),
    Wrote(Wrote),
    Seen(Seen),
    /// It can't go on, and why.
    Failed(String),
}

/// The end of a `Fill` or an `OpenLoop`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Wrote {
    /// How many it has written in its life.
    pub written: u64,
    /// How late writes began after they were due.
    pub late_ms: Quantiles,
}
