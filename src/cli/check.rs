//! `evrepl check`.

use std::fmt::Write as _;
use std::time::Duration;

use clap::Args;

use super::probe::{self, Verdict};
use super::{CliError, ConfigArg, Done, EXIT_CONFIG, runtime, table};
use crate::actors::cache_reader::MAX_PARKING;
use crate::actors::cache_writer::MAX_BYTES as MAX_CALL_BYTES;
use crate::config::{Config, Peer};
use crate::kafka::{Prefetch, try_settings};
use crate::poll_thread::max_chunk;
use crate::stamps::DEFAULT_SLOTS_LOG2;

const MIB: u64 = 1 << 20;
/// The process with nothing in flight: code, threads, and the buffers of librdkafka, TLS and HTTP. An estimate.
const BASE_BYTES: u64 = 64 * MIB;
/// An event as it is held: the longest key (250 bytes), and what is kept beside it, indexes included. An estimate.
const EVENT_BYTES: u64 = 512;
/// Events of a flow are held in the queues of its source partitions, in those of its retry partitions, and with a permit.
const EVENT_HOLDS: u64 = 3;
/// Values are held once, and once more while they are read from memcached or packed into a batch.
const VALUE_HOLDS: u64 = 2;
/// An event on its way to the retry topic: as it is held, its record, and librdkafka's copy of that.
const PARKED_BYTES: u64 = 2048;
/// Bytes of a stamp: which session wrote last and when, and when another one did.
const STAMP_BYTES: u64 = 16;
/// What the allocator keeps for itself or in the wrong place: this part of everything that comes and goes. An estimate.
const ALLOCATOR_PART: u64 = 4;

/// Tell everything that is wrong with a configuration, and how much memory it may take
///
/// Prints `ok` with a summary and exits with 0, or prints every problem with its place and exits
/// with 78. What only librdkafka can tell of `[kafka]` is among it. Nobody is asked, and
/// no certificate is read: they may be on another machine.
///
/// With --connect it also asks what the configuration names, and changes nothing there: Kafka and
/// its topics, each memcached server (and whether a few of the keys that it holds belong there by
/// the ring), the certificate, each peer, and the addresses to listen on (whether they are free, or
/// this region's evrepl answers there). One line each: `ok`, `missing` (what evrepl makes itself or
/// waits for) or `failed`; exits with 78 if any failed.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    config: ConfigArg,
    /// Also ask everything that it names; takes a few seconds at most
    #[arg(long)]
    connect: bool,
}

impl CheckArgs {
    pub(super) fn execute(self) -> Result<Done, CliError> {
        let config = self.config.load()?;
        try_settings(&config).map_err(|refused| CliError::Kafka {
            file: self.config.config.clone(),
            refused,
        })?;
        let mut text = format!("ok  {}\n\n", self.config.config.display());
        summarize(&config, &mut text);
        if !self.connect {
            return Ok(Done::ok(text));
        }
        let runtime = runtime()?;
        let findings = runtime.block_on(probe::everything(&config));
        // A look-up of a name or a call of librdkafka may still be at it; nobody waits for its end.
        runtime.shutdown_timeout(Duration::ZERO);
        let failed = findings.iter().any(|finding| finding.verdict == Verdict::Failed);
        text.push('\n');
        let rows: Vec<_> = findings
            .into_iter()
            .map(|found| [found.verdict.name().to_owned(), found.what, found.detail])
            .collect();
        table(&rows, &mut text);
        Ok(Done {
            text,
            code: if failed { EXIT_CONFIG } else { 0 },
        })
    }
}

/// Who this is, what it replicates, with whom, and the memory that it may take.
fn summarize(config: &Config, out: &mut String) {
    let mut rows = vec![["region".to_owned(), format!("{}, node {}", config.region, config.node)]];
    for cache in &config.caches {
        let servers = counted(cache.servers.len() as u64, "memcached server");
        let policy = format!("on_set {}", cache.on_set.as_str());
        rows.push([
            "cache".to_owned(),
            format!("{}: topic {}, {servers}, {policy}", cache.name, cache.topic),
        ]);
    }
    for peer in &config.peers {
        let way = match &peer.address {
            Some(address) => format!("sends to {address} and receives"),
            None => "only receives".to_owned(),
        };
        rows.push([
            "peer".to_owned(),
            format!("{}: {way}; caches {}", peer.region, peer.caches.join(", ")),
        ]);
    }
    if config.peers.is_empty() {
        rows.push(["peer".to_owned(), "none: nothing is sent or received".to_owned()]);
    }
    table(&rows, out);
    let parts = memory_bound(config);
    let total = parts.iter().fold(0u64, |sum, part| sum.saturating_add(part.bytes));
    out.push_str("\nmemory, at most:\n");
    let mut rows: Vec<_> = parts
        .into_iter()
        .map(|part| [format!("  {}", part.name), mib(part.bytes), part.why])
        .collect();
    rows.push(["  together".to_owned(), mib(total), String::new()]);
    table(&rows, out);
}

/// What a client at the front door takes that does nothing, what an event takes in librdkafka's queue, and what a remembered key
/// takes, of some 50 bytes.
const CLIENT_BYTES: u64 = 8192;
const QUEUED_BYTES: u64 = 1024;
const UNSENT_BYTES: u64 = 160;

/// A part of the memory that this configuration allows.
struct Part {
    name: &'static str,
    bytes: u64,
    why: String,
}

fn memory_bound(config: &Config) -> Vec<Part> {
    let flows: Vec<&Peer> = config.peers.iter().filter(|peer| peer.address.is_some()).collect();
    let servers: usize = config.caches.iter().map(|cache| cache.servers.len()).sum();
    // A reader for each lane, and for each server of the caches that the peer gets, has dirty keys of its own.
    let readers = |peer: &&Peer| {
        let sent = config.caches.iter().filter(|cache| peer.caches.contains(&cache.name));
        config.flow.lanes * sent.map(|cache| cache.servers.len()).sum::<usize>()
    };
    let readers = flows.iter().map(readers).sum::<usize>() as u64;
    let (count, servers) = (flows.len() as u64, servers as u64);
    let each = counted(count, "flow");
    let in_flight = config.flow.max_in_flight_bytes as u64;
    let prefetch = |retry| Prefetch::of(&config.kafka, config.flow.max_in_flight_bytes, retry);
    let (sources, retries) = (prefetch(false), prefetch(true));
    let brokers = config.kafka.brokers.len();
    let [source, retry] = [sources, retries].map(|prefetch| prefetch.memory(brokers));
    // Beyond the limit a reader keeps what is in its mailbox, while nothing can be parked.
    let chunk = max_chunk(config.flow.max_in_flight_events);
    let overflow = (config.mailbox.cache_reader as u64).saturating_mul(chunk as u64);
    let value = config
        .caches
        .iter()
        .map(|cache| cache.max_value_bytes)
        .max()
        .unwrap_or(0) as u64;
    let call = MAX_CALL_BYTES as u64 + value;
    let sessions = config.peers.len() as u64;
    let events = config.flow.max_in_flight_events as u64;
    let dirty = config.flow.max_dirty_keys as u64;
    let stamps = STAMP_BYTES << DEFAULT_SLOTS_LOG2;
    let held = dirty.saturating_add(overflow);
    // Limits may be written as large as one likes.
    let times = |factors: &[u64]| {
        factors
            .iter()
            .fold(1u64, |product, factor| product.saturating_mul(*factor))
    };
    let mut parts = vec![
        ("base", BASE_BYTES, "code, threads and buffers; an estimate".to_owned()),
        (
            "values in flight",
            times(&[count, VALUE_HOLDS, in_flight]),
            format!(
                "{each} x flow.max_in_flight_bytes {}, held and being read or packed",
                mib(in_flight)
            ),
        ),
        (
            "events in flight",
            times(&[count, EVENT_HOLDS, events, EVENT_BYTES]),
            format!(
                "{each} x flow.max_in_flight_events {events} x {EVENT_BYTES} B, queued twice (sources, retries) and with permit"
            ),
        ),
        (
            "prefetch",
            times(&[count, source.saturating_add(retry)]),
            format!(
                "{each} x ({} of sources + {} of retries): bytes, a broker's answer on top, and what librdkafka keeps beside {} + {} \
                 records",
                mib(source),
                mib(retry),
                sources.records,
                retries.records
            ),
        ),
        (
            "dirty keys",
            times(&[readers, held, EVENT_BYTES]),
            format!(
                "{} x (flow.max_dirty_keys {dirty} + {overflow} in the mailbox) x {EVENT_BYTES} B",
                counted(readers, "reader")
            ),
        ),
        (
            "parking",
            times(&[readers, MAX_PARKING as u64, PARKED_BYTES]),
            format!(
                "{} x {MAX_PARKING} events x {PARKED_BYTES} B",
                counted(readers, "reader")
            ),
        ),
        (
            "stamps",
            times(&[servers, stamps]),
            format!("{} x {}", counted(servers, "memcached server"), mib(stamps)),
        ),
        (
            "agent in flight",
            config.agent.max_in_flight_bytes as u64,
            "agent.max_in_flight_bytes, all sessions together".to_owned(),
        ),
        (
            "agent calls",
            times(&[servers.saturating_add(sessions), call]),
            format!(
                "({} + {}) x {}: a call to memcached each, a value that a session unpacks",
                counted(servers, "memcached server"),
                counted(sessions, "peer"),
                mib(call)
            ),
        ),
    ];
    if config.has_front_door() {
        let door = &config.front_door;
        let (queued, unsent) = (door.max_queued_events as u64, door.max_unsent_keys as u64);
        let clients = door.max_connections as u64;
        parts.push((
            "front door",
            [
                door.max_buffered_bytes as u64,
                times(&[clients, CLIENT_BYTES]),
                times(&[queued, QUEUED_BYTES]),
                times(&[unsent, UNSENT_BYTES]),
            ]
            .into_iter()
            .fold(0, u64::saturating_add),
            format!(
                "front_door.max_buffered_bytes {} + {clients} clients x {CLIENT_BYTES} B + {queued} queued events x {QUEUED_BYTES} B \
                 + {unsent} remembered keys x {UNSENT_BYTES} B",
                mib(door.max_buffered_bytes as u64)
            ),
        ));
    }
    // What is there from the beginning to the end needs nothing on top.
    let moving = parts.iter().filter(|(name, ..)| !matches!(*name, "base" | "stamps"));
    let moving = moving.fold(0u64, |sum, (_, bytes, _)| sum.saturating_add(*bytes));
    parts.push((
        "allocator",
        moving / ALLOCATOR_PART,
        format!("1/{ALLOCATOR_PART} of what comes and goes; an estimate"),
    ));
    let part = |(name, bytes, why)| Part { name, bytes, why };
    parts.into_iter().map(part).collect()
}

fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// Rounded up: a bound is not less than it is.
fn mib(bytes: u64) -> String {
    let mut out = String::new();
    let _ = write!(out, "{} MiB", bytes.div_ceil(MIB));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(more: &str) -> Config {
        let rest = format!(
            r#"kafka = {{ brokers = ["127.0.0.1:9092"] }}
            cache = [
                {{ name = "sessions", topic = "s", servers = ["127.0.0.1:11211", "127.0.0.1:11212"] }},
                {{ name = "pages", topic = "p", servers = ["127.0.0.1:11213"] }},
            ]
            {more}"#
        );
        crate::config::for_tests(&rest)
    }

    fn bound(config: &Config) -> Vec<(&'static str, u64)> {
        memory_bound(config)
            .into_iter()
            .map(|part| (part.name, part.bytes))
            .collect()
    }

    #[test]
    fn the_memory_bound_counts_flows_lanes_and_servers() {
        let config = config(
            r#"flow = { lanes = 2, max_in_flight_events = 1000, max_in_flight_bytes = "8MiB", max_dirty_keys = 100 }
            peer = [
                { region = "eu-west-1", address = "127.0.0.1:7201" },
                { region = "ap-south-1", address = "127.0.0.1:7301", caches = ["pages"] },
                { region = "sa-east-1" },
            ]
            agent = { max_in_flight_bytes = "32MiB" }"#,
        );
        assert_eq!(
            bound(&config),
            [
                ("base", 64 << 20),
                ("values in flight", (2 * 2 * 8) << 20),
                ("events in flight", 2 * 3 * 1000 * 512),
                // A queue's bytes, an answer of 1 MiB, and 512 B for each record of both.
                (
                    "prefetch",
                    2 * ((3 << 20) + (50_000 + 32_768) * 512 + (2 << 20) + (10_000 + 32_768) * 512)
                ),
                // Two lanes, three servers to one peer and one to the other; four chunks of 499 events at most in each mailbox.
                ("dirty keys", 2 * (3 + 1) * (100 + 4 * 499) * 512),
                ("parking", 2 * (3 + 1) * 8192 * 2048),
                ("stamps", (3 * 16) << 20),
                ("agent in flight", 32 << 20),
                ("agent calls", (3 + 3) * ((512 << 10) + (1 << 20))),
                ("allocator", 90_363_904),
            ]
        );
    }

    #[test]
    fn what_the_properties_say_of_the_prefetch_counts() {
        let mut config = config(r#"peer = [{ region = "eu-west-1", address = "127.0.0.1:7201" }]"#);
        for (name, value) in [
            ("queued.max.messages.kbytes", "2048"),
            ("queued.min.messages", "100"),
            ("fetch.max.bytes", "1048576"),
        ] {
            config.kafka.properties.insert(name.to_owned(), value.to_owned());
        }
        let each = (2 << 20) + (1 << 20) + (100 + 32_768) * 512;
        assert!(bound(&config).contains(&("prefetch", 2 * each)), "{:?}", bound(&config));
    }

    #[test]
    fn a_region_that_only_receives_holds_nothing_for_flows() {
        let config = config(r#"peer = [{ region = "eu-west-1" }]"#);
        for (name, bytes) in bound(&config) {
            let receives = ["base", "stamps", "agent in flight", "agent calls", "allocator"].contains(&name);
            assert_eq!(bytes > 0, receives, "{name}");
        }
    }

    #[test]
    fn the_summary_names_region_caches_peers_and_the_whole_bound() {
        let mut text = String::new();
        summarize(
            &config(r#"peer = [{ region = "eu-west-1", address = "127.0.0.1:7201" }]"#),
            &mut text,
        );
        for line in [
            "region  us-east-1, node relay-1",
            "cache   sessions: topic s, 2 memcached servers, on_set replicate",
            "peer    eu-west-1: sends to 127.0.0.1:7201 and receives; caches sessions, pages",
        ] {
            assert!(text.lines().any(|written| written == line), "{text}");
        }
        assert!(text.contains("  together          "), "{text}");
    }
}
