//! Writer: writes memcached and then says so in Kafka, for applications in Rust and for `evrepl write`.
//!
//! The order is the whole point. The event is produced *after memcached answered* (DESIGN section 6): a relay that reads
//! it looks at the key at once, and must find the new value. A caller that gets [`Written`] knows that Kafka holds the
//! event, and from then on nothing is lost. A caller that gets an error asks it two things: whether the key must still be
//! announced ([`WriterError::must_be_announced`]), and whether the call may be repeated
//! ([`WriterError::may_be_retried`]).
//!
//! An event says no more than "this key changed", so one too many is harmless and one too few is not: whenever memcached
//! *may* have changed, the Writer produces the event, also when it then reports an error.
//!
//! ```no_run
//! use evrepl::event::Op;
//! use evrepl::writer::Writer;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let config = evrepl::config::load("evrepl.toml".as_ref(), evrepl::config::environment())?;
//! let writer = Writer::connect(&config).await?;
//! // A value that lives for an hour, with the flags of the application's own serializer.
//! match writer.set("sessions", b"user:17", b"{\"cart\":3}", 0, 3600).await {
//!     Ok(written) => println!("event at {}:{}", written.partition, written.offset),
//!     // memcached holds the value, or may: without an event the other regions would never hear of it.
//!     Err(error) if error.must_be_announced() => {
//!         writer.announce("sessions", b"user:17", Op::Set).await?;
//!     }
//!     Err(error) => return Err(error.into()),
//! }
//! # Ok(())
//! # }
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::config::{self, Config};
use crate::event::{self, Event, Op, TraceContext};
use crate::hashing::{HashKind, RingServer};
use crate::hlc::Hlc;
use crate::kafka::{KafkaError, Produce, Producer};
use crate::memcached::{Looked, MemcachedError, PooledClient, key_problem};

/// How long Kafka may take to acknowledge an event: longer than a partition needs to find a new leader.
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_secs(10);

/// Connections to each memcached server. What many callers ask at once goes together, so that more of them matter little.
const CONNECTIONS: usize = 2;

/// Room for an event with every field that the Writer sets.
const EVENT_BYTES: usize = 64;

/// Where Kafka holds the event of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Partition of the cache's topic.
    pub partition: i32,
    /// Offset in it.
    pub offset: i64,
    /// The event's version (see [`crate::hlc`]).
    pub ver: u64,
}

/// What is known of the key in memcached after an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyState {
    /// As it was before the call.
    Unchanged,
    /// Written, or, after a set that was refused, possibly removed.
    Changed,
    /// Nobody knows: the write may have run, and may yet run.
    Unknown,
}

/// Why a write did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum WriterError {
    /// The configuration has no such cache.
    #[error("no cache {cache:?} in the configuration, which has {known}")]
    UnknownCache {
        /// The cache that was asked for.
        cache: String,
        /// Those that there are.
        known: String,
    },
    /// memcached would not take this key, and nothing was sent.
    #[error("key refused: {problem}")]
    Key {
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Only [`Writer::connect`]: Kafka's client cannot be made.
    #[error("{0}")]
    Settings(KafkaError),
    /// memcached did not say that it has done it.
    #[error("{source}")]
    Memcached {
        /// What it said instead.
        source: MemcachedError,
        /// What is known of the key.
        key: KeyState,
        /// Kafka holds an event for the key all the same.
        announced: bool,
    },
    /// memcached is written, but the event is missing, as far as is known: [`Writer::announce`] produces it again.
    #[error("memcached is written, but kafka has not acknowledged the event: {source}")]
    NotAnnounced {
        /// What Kafka said.
        source: KafkaError,
    },
}

impl WriterError {
    /// What is known of the key in memcached.
    pub fn key_state(&self) -> KeyState {
        match self {
            WriterError::Memcached { key, .. } => *key,
            WriterError::NotAnnounced { .. } => KeyState::Changed,
            _ => KeyState::Unchanged,
        }
    }

    /// Whether the other regions may never hear of what happened to the key unless it is announced: by repeating the
    /// call until it succeeds, or by [`Writer::announce`].
    pub fn must_be_announced(&self) -> bool {
        match self {
            // An event that is there already may have been looked at before the write runs.
            WriterError::Memcached {
                key: KeyState::Unknown, ..
            } => true,
            WriterError::Memcached {
                key: KeyState::Changed,
                announced,
                ..
            } => !announced,
            WriterError::NotAnnounced { .. } => true,
            _ => false,
        }
    }

    /// Whether the same call may succeed later. Repeating is safe: a write is only made again, an event only looked at
    /// again.
    pub fn may_be_retried(&self) -> bool {
        match self {
            WriterError::UnknownCache { .. } | WriterError::Key { .. } => false,
            WriterError::Memcached { source, .. } => source.is_retryable(),
            WriterError::Settings(source) | WriterError::NotAnnounced { source } => source.may_be_retried(),
        }
    }
}

/// Writes caches of this region and produces their events. Cheap to clone; use one for a whole process: what many tasks write
/// at once goes to memcached and to Kafka together, over few connections (`examples/writer.rs`).
#[derive(Clone)]
pub struct Writer {
    shared: Arc<Shared>,
    trace: Option<TraceContext>,
    fill: bool,
}

struct Shared {
    caches: BTreeMap<String, WrittenCache>,
    producer: Producer,
    // Held for a few instructions beside two round trips, never across them.
    clock: Mutex<Hlc>,
    acknowledged_within: Duration,
}

struct WrittenCache {
    topic: String,
    client: PooledClient,
}

impl Writer {
    /// A writer of every cache of the configuration, in a tokio runtime. Connections are made by the first call that needs
    /// them.
    ///
    /// # Errors
    /// [`WriterError::Settings`] when librdkafka refuses a property.
    pub async fn connect(config: &Config) -> Result<Writer, WriterError> {
        Writer::connect_within(config, ACKNOWLEDGED_WITHIN).await
    }

    async fn connect_within(config: &Config, acknowledged_within: Duration) -> Result<Writer, WriterError> {
        let timeout = config.memcached.timeout.max(config.memcached.connect_timeout);
        let mut caches = BTreeMap::new();
        for cache in &config.caches {
            let client = PooledClient::new(
                hash_kind(cache.hash),
                &ring_servers(&cache.servers),
                timeout,
                CONNECTIONS,
            );
            caches.insert(
                cache.name.clone(),
                WrittenCache {
                    topic: cache.topic.clone(),
                    client,
                },
            );
        }
        // Not the node's name, under which the brokers know this region's relay.
        let producer = Producer::new(&config.kafka, "evrepl-writer").map_err(WriterError::Settings)?;
        let shared = Shared {
            caches,
            producer,
            clock: Mutex::new(Hlc::default()),
            acknowledged_within,
        };
        Ok(Writer {
            shared: Arc::new(shared),
            trace: None,
            fill: false,
        })
    }

    /// The same writer, whose sets only fill the cache from a database: caches with `on_set = "invalidate"` ignore their events,
    /// or two regions would remove each other's copies.
    pub fn filling(&self) -> Writer {
        Writer {
            fill: true,
            ..self.clone()
        }
    }

    /// The same writer, whose events carry this trace in the header `traceparent`: for one request of the application.
    pub fn with_trace(&self, trace: TraceContext) -> Writer {
        Writer {
            trace: Some(trace),
            ..self.clone()
        }
    }

    /// Stores a value, with the client's 32 flag bits. `ttl` has memcached's meaning: 0 never, up to 2 592 000 seconds from
    /// now, above that Unix time in seconds.
    ///
    /// # Errors
    /// See [`WriterError`]. A set that memcached refuses, for example as too large, may have removed the key's old value:
    /// its event is produced then too, and the error says so.
    pub async fn set(
        &self,
        cache: &str,
        key: &[u8],
        value: &[u8],
        flags: u32,
        ttl: u32,
    ) -> Result<Written, WriterError> {
        let cache = self.cache(cache, key)?;
        let set = cache.client.set(key, value, flags, ttl).await;
        if let Err(source) = set {
            return Err(self.refused(cache, key, Op::Set, source).await);
        }
        self.produce(cache, key, Op::Set, Some(ttl)).await
    }

    /// Removes a key. The event is produced also when memcached had no such key: a peer may still hold it.
    ///
    /// # Errors
    /// See [`WriterError`].
    pub async fn delete(&self, cache: &str, key: &[u8]) -> Result<Written, WriterError> {
        let cache = self.cache(cache, key)?;
        if let Err(source) = cache.client.delete(key).await {
            return Err(self.refused(cache, key, Op::Delete, source).await);
        }
        self.produce(cache, key, Op::Delete, None).await
    }

    /// Gives a key a new expiry; `ttl` as for [`Writer::set`]. `None`, and no event, when memcached has no such key.
    ///
    /// # Errors
    /// See [`WriterError`].
    pub async fn touch(&self, cache: &str, key: &[u8], ttl: u32) -> Result<Option<Written>, WriterError> {
        let cache = self.cache(cache, key)?;
        match cache.client.touch(key, ttl).await {
            Ok(true) => Ok(Some(self.produce(cache, key, Op::Touch, Some(ttl)).await?)),
            Ok(false) => Ok(None),
            Err(source) => Err(self.refused(cache, key, Op::Touch, source).await),
        }
    }

    /// Looks at a key, without bumping it in memcached's LRU. No event comes of it.
    ///
    /// # Errors
    /// [`WriterError::UnknownCache`], [`WriterError::Key`], or [`WriterError::Memcached`] with an unchanged key.
    pub async fn get(&self, cache: &str, key: &[u8]) -> Result<Looked, WriterError> {
        let cache = self.cache(cache, key)?;
        cache.client.get(key).await.map_err(|source| WriterError::Memcached {
            source,
            key: KeyState::Unchanged,
            announced: false,
        })
    }

    /// Produces an event for a key and nothing else: for a write whose event is missing, or for one that somebody else
    /// made. Waits for Kafka's acknowledgement.
    ///
    /// # Errors
    /// [`WriterError::UnknownCache`], [`WriterError::Key`], [`WriterError::NotAnnounced`].
    pub async fn announce(&self, cache: &str, key: &[u8], op: Op) -> Result<Written, WriterError> {
        let cache = self.cache(cache, key)?;
        self.produce(cache, key, op, None).await
    }

    fn cache(&self, name: &str, key: &[u8]) -> Result<&WrittenCache, WriterError> {
        let Some(cache) = self.shared.caches.get(name) else {
            let known: Vec<&str> = self.shared.caches.keys().map(String::as_str).collect();
            return Err(WriterError::UnknownCache {
                cache: name.to_owned(),
                known: known.join(", "),
            });
        };
        match key_problem(key) {
            Some(problem) => Err(WriterError::Key { problem }),
            None => Ok(cache),
        }
    }

    /// The error of a write that memcached did not confirm; where the key may have changed, after producing the event.
    async fn refused(&self, cache: &WrittenCache, key: &[u8], op: Op, source: MemcachedError) -> WriterError {
        let state = state_after(&source);
        let announced = state != KeyState::Unchanged && self.produce(cache, key, op, None).await.is_ok();
        WriterError::Memcached {
            source,
            key: state,
            announced,
        }
    }

    async fn produce(
        &self,
        cache: &WrittenCache,
        key: &[u8],
        op: Op,
        ttl: Option<u32>,
    ) -> Result<Written, WriterError> {
        let ver = self
            .shared
            .clock
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .now(wall_ms());
        let mut value = Vec::with_capacity(EVENT_BYTES);
        event::encode(
            &Event {
                ttl,
                ver: Some(ver),
                fill: self.fill && op == Op::Set,
                ..Event::new(op)
            },
            &mut value,
        );
        let traceparent = self.trace.map(|trace| trace.format());
        let header = traceparent.as_ref().map(|text| [("traceparent", &text[..])]);
        let record = Produce {
            topic: &cache.topic,
            partition: None,
            key: Some(key),
            value: Some(&value),
            headers: header.as_ref().map_or(&[], |header| header),
            timestamp_ms: None,
        };
        let sent = self
            .shared
            .producer
            .send(&record, self.shared.acknowledged_within)
            .await;
        let (partition, offset) = sent.map_err(|source| WriterError::NotAnnounced { source })?;
        Ok(Written { partition, offset, ver })
    }
}

/// What a failed write has left behind.
fn state_after(error: &MemcachedError) -> KeyState {
    match error {
        // Nothing was sent.
        MemcachedError::Connect { .. } | MemcachedError::ConnectTimeout { .. } | MemcachedError::Unavailable { .. } => {
            KeyState::Unchanged
        }
        // memcached has dropped the old item (always when too large, sometimes when refused).
        MemcachedError::TooLarge | MemcachedError::Refused { .. } => KeyState::Changed,
        _ => KeyState::Unknown,
    }
}

fn wall_ms() -> u64 {
    // A clock before 1970 says nothing; versions then only count.
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as u64)
}

pub(crate) fn hash_kind(kind: config::HashKind) -> HashKind {
    match kind {
        config::HashKind::Ketama => HashKind::Ketama,
        config::HashKind::Consistent => HashKind::Consistent,
    }
}

pub(crate) fn ring_servers(servers: &[config::Server]) -> Vec<RingServer> {
    let server = |server: &config::Server| RingServer {
        address: server.address.clone(),
        ring_name: server.ring_name.clone(),
        weight: server.weight,
    };
    servers.iter().map(server).collect()
}

#[cfg(test)]
mod tests {
    use evrepl_lab::memcached::Memcached;

    use super::*;
    use crate::memcached::Looked;

    /// A broker that is not there: port 9 is discard's, and nobody has it.
    const NO_KAFKA: &str = "127.0.0.1:9";

    fn config(server: &str) -> Config {
        let text = format!(
            r#"region = "us-east-1"
            node = "writer-test"
            kafka = {{ brokers = ["{NO_KAFKA}"] }}
            tls = {{ certificate = "a.pem", private_key = "a.key", ca = "ca.pem" }}
            cache = [{{ name = "sessions", topic = "t", servers = ["{server}"] }}]"#
        );
        config::parse(&text, "/etc/evrepl.toml".as_ref(), std::iter::empty()).unwrap()
    }

    /// A writer whose Kafka is away, and that soon believes it.
    async fn writer(server: &str) -> Writer {
        Writer::connect_within(&config(server), Duration::from_millis(20))
            .await
            .unwrap()
    }

    fn memcached_error(source: MemcachedError, announced: bool) -> WriterError {
        WriterError::Memcached {
            key: state_after(&source),
            source,
            announced,
        }
    }

    #[tokio::test]
    async fn a_write_without_kafka_is_in_memcached_and_asks_to_be_announced() {
        let server = Memcached::start();
        let writer = writer(&server.address()).await;
        let error = writer.set("sessions", b"k", b"v", 7, 0).await.unwrap_err();
        assert!(matches!(error, WriterError::NotAnnounced { .. }), "{error}");
        assert!(error.must_be_announced() && error.may_be_retried() && error.key_state() == KeyState::Changed);
        let held = writer.cache("sessions", b"k").unwrap().client.get(b"k").await.unwrap();
        assert!(
            matches!(held, Looked::Hit { ref value, flags: 7, .. } if value == "v"),
            "{held:?}"
        );
    }

    #[tokio::test]
    async fn a_touch_that_misses_makes_no_event_and_a_delete_that_misses_does() {
        let server = Memcached::start();
        let writer = writer(&server.address()).await;
        // No error, although Kafka is away: it was not asked.
        assert_eq!(writer.touch("sessions", b"nothing", 60).await.unwrap(), None);
        let error = writer.delete("sessions", b"nothing").await.unwrap_err();
        assert!(matches!(error, WriterError::NotAnnounced { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_value_too_large_asks_to_be_announced_because_the_old_one_is_gone() {
        let server = Memcached::start();
        let writer = writer(&server.address()).await;
        let _ = writer.set("sessions", b"k", b"old", 0, 0).await;
        let error = writer.set("sessions", b"k", &vec![0; 2 << 20], 0, 0).await.unwrap_err();
        assert!(
            matches!(
                error,
                WriterError::Memcached {
                    source: MemcachedError::TooLarge,
                    announced: false,
                    ..
                }
            ),
            "{error}"
        );
        assert!(error.must_be_announced() && !error.may_be_retried());
        assert_eq!(
            writer.cache("sessions", b"k").unwrap().client.get(b"k").await.unwrap(),
            Looked::Miss
        );
    }

    #[tokio::test]
    async fn what_never_reached_memcached_needs_no_event() {
        // Nobody listens there either.
        let writer = writer(NO_KAFKA).await;
        let error = writer.set("sessions", b"k", b"v", 0, 0).await.unwrap_err();
        assert!(
            matches!(
                error,
                WriterError::Memcached {
                    key: KeyState::Unchanged,
                    announced: false,
                    ..
                }
            ),
            "{error}"
        );
        assert!(!error.must_be_announced() && error.may_be_retried());
    }

    #[tokio::test]
    async fn unknown_caches_and_impossible_keys_are_refused_before_anything_is_sent() {
        let writer = writer(NO_KAFKA).await;
        let error = writer.delete("session", b"k").await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "no cache \"session\" in the configuration, which has sessions"
        );
        assert!(!error.may_be_retried() && !error.must_be_announced());
        let error = writer.announce("sessions", b"", Op::Set).await.unwrap_err();
        assert!(
            matches!(error, WriterError::Key { .. }) && !error.may_be_retried(),
            "{error}"
        );
    }

    #[test]
    fn an_unknown_end_asks_to_be_announced_even_after_an_event() {
        let unknown = || MemcachedError::OutcomeUnknown {
            detail: "timed out".to_owned(),
        };
        for announced in [false, true] {
            let error = memcached_error(unknown(), announced);
            assert!(error.must_be_announced() && error.may_be_retried() && error.key_state() == KeyState::Unknown);
        }
        assert!(!memcached_error(MemcachedError::TooLarge, true).must_be_announced());
    }
}
