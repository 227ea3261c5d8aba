//! `evrepl replay`: keys of the past once more to one peer, through its retry topic.
//!
//! Source records of a time, or dead letters of the peer, become retry records; the running relay takes them from there like
//! anything that was parked. The reading has no consumer group, so the live stream does not notice. What is shipped is what
//! the cache holds when the relay looks: repeating a replay is harmless. One pass, nothing kept but what is on its way.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use futures_util::TryStreamExt as _;
use tokio::sync::mpsc;

use crate::canary;
use crate::config::Config;
use crate::event::{self, Event};
use crate::hlc;
use crate::kafka::{KafkaError, Produce, Producer, Read, Record, TopicReader, Topics};
use crate::memcached;
use crate::parking::{self, Headers, PRODUCED_AT, Parked, is_own};
use crate::relay::wall_ms;

/// Records between the reader and the producer.
const READ_AHEAD: usize = 1024;
/// Records that wait for Kafka's acknowledgement: enough to fill its batches.
const AT_ONCE: usize = 1024;
/// How long one poll waits.
const POLL: Duration = Duration::from_millis(100);
/// How long Kafka may be silent before the replay gives up; it is repeated as a whole then.
const PATIENCE: Duration = Duration::from_secs(30);
/// For a question about topics.
const ASK: Duration = Duration::from_secs(5);

/// What is replayed.
#[derive(Clone, Debug)]
pub struct Request {
    /// The peer's region.
    pub peer: String,
    /// Only this cache; else every cache that the peer gets.
    pub cache: Option<String>,
    /// Records that are not older than this; else all there are.
    pub since: Option<Duration>,
    /// The peer's dead letters instead of the source topic.
    pub dead_letter: bool,
}

/// Why a replay was not done, or not to its end. Repeating it is safe.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// No such peer.
    #[error("no [[peer]] has the region {peer:?}; there {}", known(.peers, "is"))]
    UnknownPeer { peer: String, peers: Vec<String> },
    /// Nothing is sent to that peer.
    #[error("peer {peer} has no address: this region only receives from it, and nobody would read its retry topics")]
    OnlyReceives { peer: String },
    /// No such cache.
    #[error("no [[cache]] has the name {cache:?}; there {}", known(.caches, "is"))]
    UnknownCache { cache: String, caches: Vec<String> },
    /// The peer does not get that cache.
    #[error("cache {cache} is not sent to peer {peer}; its `caches` are {}", .caches.join(", "))]
    NotSent {
        cache: String,
        peer: String,
        caches: Vec<String>,
    },
    /// A topic to read from is not there.
    #[error("topic {topic} does not exist; `evrepl check --connect` tells which topics there are")]
    NoTopic { topic: String },
    /// Kafka did not do what it was asked.
    #[error("{doing} {topic}: {source}; {produced} records were handed on, repeating the replay is safe")]
    Kafka {
        doing: &'static str,
        topic: String,
        produced: u64,
        source: KafkaError,
    },
}

impl ReplayError {
    /// The arguments are wrong: nothing was tried.
    pub fn is_usage(&self) -> bool {
        use ReplayError::{NotSent, OnlyReceives, UnknownCache, UnknownPeer};
        matches!(
            self,
            UnknownPeer { .. } | OnlyReceives { .. } | UnknownCache { .. } | NotSent { .. }
        )
    }
}

fn known(names: &[String], verb: &str) -> String {
    match names {
        [] => format!("{verb} none"),
        names => format!("{verb} {}", names.join(", ")),
    }
}

/// Counts that grow while a replay runs.
#[derive(Debug, Default)]
pub struct Progress {
    /// Offsets to go through, so far as it is known.
    pub offsets: AtomicU64,
    /// Records read.
    pub read: AtomicU64,
    /// Records that Kafka has acknowledged on the retry topic.
    pub produced: AtomicU64,
}

/// What became of one topic's records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// The cache.
    pub cache: String,
    /// Read from.
    pub from: String,
    /// Produced to.
    pub to: String,
    /// Records read.
    pub read: u64,
    /// Records that Kafka has acknowledged on the retry topic.
    pub produced: u64,
    /// Records that are no events; they are dead letters already.
    pub undecodable: u64,
    /// Canaries, and dead letters of other peers.
    pub not_meant: u64,
}

/// Replays; gives what became of each topic.
///
/// # Errors
/// See [`ReplayError`].
pub async fn run(config: Arc<Config>, request: Request, progress: Arc<Progress>) -> Result<Vec<Replayed>, ReplayError> {
    let caches = chosen(&config, &request)?;
    let since_ms = request
        .since
        .map(|since| wall_ms() - i64::try_from(since.as_millis()).unwrap_or(i64::MAX / 2));
    let client = format!("{}-replay", config.node);
    let failed = |doing, topic: &str, source| ReplayError::Kafka {
        doing,
        topic: topic.to_owned(),
        produced: progress.produced.load(Relaxed),
        source,
    };
    let topics = Arc::new(Topics::new(&config.kafka, &client).map_err(|error| failed("asking for", "topics", error))?);
    let producer =
        Producer::new(&config.kafka, &client).map_err(|error| failed("making a producer for", "kafka", error))?;
    let mut plan = Vec::new();
    for cache in caches {
        let source = config.caches[cache].topic.clone();
        let from = match request.dead_letter {
            true => config.kafka.dead_letter_topic_for(&source),
            false => source.clone(),
        };
        let to = config.kafka.retry_topic_for(&source, &request.peer);
        // All that can be wrong is said before anything is produced.
        let wanted = vec![source.clone(), from.clone(), to.clone()];
        let asked = topics.clone();
        let counts = tokio::task::spawn_blocking(move || asked.partitions(&wanted, ASK)).await;
        let counts = counts.unwrap_or_else(|error| Err(KafkaError::Broker(error.to_string())));
        let counts = counts.map_err(|error| failed("asking for", &from, error))?;
        let count = |topic: &str| counts.get(topic).copied().flatten();
        let Some(partitions) = count(&from) else {
            return Err(ReplayError::NoTopic { topic: from });
        };
        if count(&to).is_none() {
            let partitions = count(&source).unwrap_or(partitions);
            let made = topics.create(&config.kafka, &to, partitions).await;
            made.map_err(|error| failed("creating", &to, error))?;
        }
        plan.push((cache, from, to));
    }
    let mut done = Vec::new();
    for (cache, from, to) in plan {
        done.push(one_topic(&config, &request, since_ms, &producer, &progress, (cache, from, to)).await?);
    }
    Ok(done)
}

/// The caches that are meant, by index.
fn chosen(config: &Config, request: &Request) -> Result<Vec<usize>, ReplayError> {
    let Some(peer) = config.peers.iter().find(|peer| peer.region == request.peer) else {
        return Err(ReplayError::UnknownPeer {
            peer: request.peer.clone(),
            peers: config.peers.iter().map(|peer| peer.region.clone()).collect(),
        });
    };
    if peer.address.is_none() {
        return Err(ReplayError::OnlyReceives {
            peer: peer.region.clone(),
        });
    }
    let names = config.caches.iter().map(|cache| cache.name.as_str());
    let Some(only) = &request.cache else {
        let sent = names
            .enumerate()
            .filter(|(_, name)| peer.caches.iter().any(|sent| sent == name));
        return Ok(sent.map(|(n, _)| n).collect());
    };
    match names.clone().position(|name| name == only) {
        None => Err(ReplayError::UnknownCache {
            cache: only.clone(),
            caches: names.map(str::to_owned).collect(),
        }),
        Some(_) if !peer.caches.contains(only) => Err(ReplayError::NotSent {
            cache: only.clone(),
            peer: peer.region.clone(),
            caches: peer.caches.clone(),
        }),
        Some(n) => Ok(vec![n]),
    }
}

async fn one_topic(
    config: &Arc<Config>,
    request: &Request,
    since_ms: Option<i64>,
    producer: &Producer,
    progress: &Arc<Progress>,
    (cache, from, to): (usize, String, String),
) -> Result<Replayed, ReplayError> {
    let (hand, taken) = mpsc::channel::<RetryRecord>(READ_AHEAD);
    let before = progress.produced.load(Relaxed);
    let reading = {
        let (config, request, progress, from) = (config.clone(), request.clone(), progress.clone(), from.clone());
        tokio::task::spawn_blocking(move || read(&config, &request, since_ms, &from, &progress, &hand))
    };
    let records = futures_util::stream::unfold(taken, |mut taken| async move {
        let record = taken.recv().await?;
        Some((Ok::<_, KafkaError>(record), taken))
    });
    let produced = records
        .try_for_each_concurrent(AT_ONCE, |record| {
            let (producer, to, progress) = (producer, &to, progress);
            async move {
                let headers = parking::borrowed(&record.headers);
                let out = Produce {
                    topic: to,
                    partition: None,
                    key: record.key.as_deref(),
                    value: record.value.as_deref(),
                    headers: &headers,
                    timestamp_ms: None,
                };
                producer.send(&out, PATIENCE).await?;
                progress.produced.fetch_add(1, Relaxed);
                Ok(())
            }
        })
        .await;
    // When producing has failed, the reader has nobody left to hand to, and ends.
    let read = reading
        .await
        .unwrap_or_else(|error| Err(KafkaError::Broker(error.to_string())));
    let failed = |doing, topic: &String, source| ReplayError::Kafka {
        doing,
        topic: topic.clone(),
        produced: progress.produced.load(Relaxed),
        source,
    };
    produced.map_err(|error| failed("producing to", &to, error))?;
    let counts = read.map_err(|error| failed("reading", &from, error))?;
    Ok(Replayed {
        cache: config.caches[cache].name.clone(),
        from,
        to,
        produced: progress.produced.load(Relaxed) - before,
        ..counts
    })
}

/// Reads a topic to where it ended at the start, on a thread of its own.
fn read(
    config: &Config,
    request: &Request,
    since_ms: Option<i64>,
    topic: &str,
    progress: &Progress,
    hand: &mpsc::Sender<RetryRecord>,
) -> Result<Replayed, KafkaError> {
    let group = config.kafka.group_for(&config.region, &request.peer);
    let client = format!("{}-replay", config.node);
    let mut reader = TopicReader::open(&config.kafka, &group, &client, topic, since_ms)?;
    progress.offsets.fetch_add(reader.offsets(), Relaxed);
    let mut counts = Replayed::default();
    let mut heard = tokio::time::Instant::now();
    loop {
        let prepared = match reader.read(POLL) {
            Ok(Read::End) => return Ok(counts),
            Ok(Read::Record(record)) => prepare(&record.into(), &config.region, request),
            Ok(Read::Nothing) if heard.elapsed() < PATIENCE => continue,
            Ok(Read::Nothing) => return Err(KafkaError::Broker(format!("no record within {PATIENCE:?}"))),
            Err(error) if error.may_be_retried() && heard.elapsed() < PATIENCE => continue,
            Err(error) => return Err(error),
        };
        heard = tokio::time::Instant::now();
        counts.read += 1;
        progress.read.fetch_add(1, Relaxed);
        match prepared {
            Ok(record) => {
                if hand.blocking_send(record).is_err() {
                    return Ok(counts);
                }
            }
            Err(Skip::Undecodable) => counts.undecodable += 1,
            Err(Skip::NotMeant) => counts.not_meant += 1,
        }
    }
}

/// A record as it was read.
#[derive(Clone, Debug, Default)]
struct Found {
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    headers: Headers,
    timestamp_ms: i64,
}

impl From<Record<'_>> for Found {
    fn from(record: Record<'_>) -> Found {
        let mut headers = Headers::new();
        record.for_each_header(|name, value| headers.push((name.into(), value.into())));
        Found {
            key: record.key().map(<[u8]>::to_vec),
            value: record.value().map(<[u8]>::to_vec),
            headers,
            timestamp_ms: record.timestamp_ms(),
        }
    }
}

/// A record for the retry topic, to be taken at once.
#[derive(Debug, PartialEq, Eq)]
struct RetryRecord {
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
    headers: Headers,
}

#[derive(Debug, PartialEq, Eq)]
enum Skip {
    /// No event: it is a dead letter already.
    Undecodable,
    /// A canary, or a dead letter of another peer.
    NotMeant,
}

/// A found record as a retry record.
fn prepare(found: &Found, region: &str, request: &Request) -> Result<RetryRecord, Skip> {
    let header = |name: &str| found.headers.iter().rev().find(|(known, _)| **known == *name);
    let other_peer = || header("evrepl-peer").is_none_or(|(_, peer)| **peer != *request.peer.as_bytes());
    if header(canary::HEADER).is_some() || (request.dead_letter && other_peer()) {
        return Err(Skip::NotMeant);
    }
    let produced_at = Parked::read(&found.headers)
        .produced_at_ms
        .unwrap_or(found.timestamp_ms)
        .max(0);
    let value = match request.dead_letter {
        // As it was: a newer version may be able to read it.
        true => found.value.clone(),
        false => {
            if memcached::key_problem(found.key.as_deref().unwrap_or_default()).is_some() {
                return Err(Skip::Undecodable);
            }
            let event = event::decode(found.value.as_deref().unwrap_or_default()).map_err(|_| Skip::Undecodable)?;
            let event = Event {
                ver: Some(event.ver.unwrap_or_else(|| hlc::from_millis(produced_at as u64))),
                origin: Some(event.origin.unwrap_or_else(|| region.into())),
                ..event
            };
            let mut value = Vec::new();
            event::encode(&event, &mut value);
            Some(value)
        }
    };
    let ours = |name: &str| is_own(name) || matches!(name, "evrepl-reason" | "evrepl-peer" | "evrepl-offset");
    let kept = found.headers.iter().filter(|(name, _)| !ours(name)).cloned();
    let own = parking::number(PRODUCED_AT, produced_at);
    Ok(RetryRecord {
        key: found.key.clone(),
        value,
        headers: kept.chain([own]).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Op;

    fn request(dead_letter: bool) -> Request {
        Request {
            peer: "eu-west-1".to_owned(),
            cache: None,
            since: None,
            dead_letter,
        }
    }

    fn found(value: &[u8], headers: &[(&str, &str)]) -> Found {
        let own = |(name, value): &(&str, &str)| (Box::from(*name), Box::from(value.as_bytes()));
        Found {
            key: Some(b"k".to_vec()),
            value: Some(value.to_vec()),
            headers: headers.iter().map(own).collect(),
            timestamp_ms: 1_000,
        }
    }

    fn names(record: &RetryRecord) -> Vec<(&str, &str)> {
        let text = |value| std::str::from_utf8(value).unwrap();
        record
            .headers
            .iter()
            .map(|(name, value)| (&**name, text(value)))
            .collect()
    }

    #[test]
    fn an_event_is_filled_in_as_the_relay_would_and_keeps_its_headers() {
        let record = prepare(
            &found(br#"{"v":1,"op":"touch","ttl":5}"#, &[("traceparent", "00-1")]),
            "us-east-1",
            &request(false),
        )
        .unwrap();
        let event = event::decode(record.value.as_deref().unwrap()).unwrap();
        assert_eq!((event.op, event.ttl), (Op::Touch, Some(5)));
        assert_eq!(event.ver, Some(hlc::from_millis(1_000)));
        assert_eq!(event.origin.as_deref(), Some("us-east-1"));
        assert_eq!(
            names(&record),
            [("traceparent", "00-1"), ("evrepl-produced-at", "1000")]
        );
        let value = br#"{"v":1,"op":"set","ver":7,"origin":"ap-south-1"}"#;
        let record = prepare(&found(value, &[]), "us-east-1", &request(false)).unwrap();
        let event = event::decode(record.value.as_deref().unwrap()).unwrap();
        assert_eq!((event.ver, event.origin.as_deref()), (Some(7), Some("ap-south-1")));
    }

    #[test]
    fn what_is_no_event_and_what_is_a_canary_is_skipped() {
        let skip = |found: &Found| prepare(found, "us-east-1", &request(false)).unwrap_err();
        let event = br#"{"v":1,"op":"set"}"#;
        assert_eq!(skip(&found(b"no event", &[])), Skip::Undecodable);
        assert_eq!(skip(&Found::default()), Skip::Undecodable);
        let keyless = Found {
            key: None,
            ..found(event, &[])
        };
        assert_eq!(skip(&keyless), Skip::Undecodable);
        assert_eq!(skip(&found(event, &[("evrepl-canary", "eu-west-1")])), Skip::NotMeant);
    }

    #[test]
    fn a_dead_letter_of_the_peer_goes_as_it_was_without_the_marks_of_its_burial() {
        let marks = [
            ("tenant", "7"),
            ("evrepl-produced-at", "900"),
            ("evrepl-not-before", "950"),
            ("evrepl-attempt", "3"),
            ("evrepl-reason", "unknown_version"),
            ("evrepl-peer", "eu-west-1"),
            ("evrepl-offset", "12"),
        ];
        let record = prepare(&found(b"\x81of a later version", &marks), "us-east-1", &request(true)).unwrap();
        assert_eq!(record.value.as_deref(), Some(&b"\x81of a later version"[..]));
        assert_eq!(names(&record), [("tenant", "7"), ("evrepl-produced-at", "900")]);
        let other = found(b"x", &[("evrepl-peer", "ap-south-1")]);
        assert_eq!(prepare(&other, "us-east-1", &request(true)), Err(Skip::NotMeant));
        assert_eq!(
            prepare(&found(b"x", &[]), "us-east-1", &request(true)),
            Err(Skip::NotMeant)
        );
        let nothing = Found {
            headers: found(b"", &[("evrepl-peer", "eu-west-1")]).headers,
            ..Found::default()
        };
        let record = prepare(&nothing, "us-east-1", &request(true)).unwrap();
        assert_eq!((record.key, record.value), (None, None));
    }

    fn config() -> Config {
        let text = r#"
            region = "us-east-1"
            kafka = { brokers = ["127.0.0.1:9092"] }
            tls = { certificate = "a.pem", private_key = "a.key", ca = "ca.pem" }
            cache = [
                { name = "sessions", topic = "s", servers = ["127.0.0.1:11211"] },
                { name = "pages", topic = "p", servers = ["127.0.0.1:11212"] },
            ]
            peer = [
                { region = "eu-west-1", address = "127.0.0.1:7201", caches = ["pages"] },
                { region = "ap-south-1" },
            ]"#;
        crate::config::parse(text, "/etc/evrepl.toml".as_ref(), std::iter::empty()).unwrap()
    }

    #[test]
    fn only_what_the_peer_gets_is_replayed_and_mistakes_say_what_there_is() {
        let choose = |peer: &str, cache: Option<&str>| {
            let request = Request {
                peer: peer.to_owned(),
                cache: cache.map(str::to_owned),
                ..request(false)
            };
            chosen(&config(), &request).map_err(|error| {
                assert!(error.is_usage());
                error.to_string()
            })
        };
        assert_eq!(choose("eu-west-1", None), Ok(vec![1]));
        assert_eq!(choose("eu-west-1", Some("pages")), Ok(vec![1]));
        for (peer, cache, says) in [
            ("eu-west-2", None, "there is eu-west-1, ap-south-1"),
            ("ap-south-1", None, "has no address"),
            ("eu-west-1", Some("sessions"), "not sent to peer eu-west-1"),
            ("eu-west-1", Some("page"), "there is sessions, pages"),
        ] {
            let error = choose(peer, cache).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
