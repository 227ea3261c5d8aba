//! `evrepl check`.

use std::fmt::Write as _;
use std::time::Duration;

use clap::Args;

use super::probe::{self, Verdict};
use super::{CliError, ConfigArg, Done, EXIT_CONFIG, runtime, table};
use crate::config::{Config, Peer};
use crate::stamps::DEFAULT_SLOTS_LOG2;

const MIB: u64 = 1 << 20;
/// The process with nothing in flight: code, threads, and the buffers of librdkafka, TLS and HTTP. An estimate.
const BASE_BYTES: u64 = 64 * MIB;
/// An event as it is held: the longest key (250 bytes), and what is kept beside it, indexes included. An estimate.
const EVENT_BYTES: u64 = 512;
/// Events of a flow are held once in the queues of its partitions and once with a permit.
const EVENT_HOLDS: u64 = 2;
/// Bytes of a stamp: which session wrote last and when, and when another one did.
const STAMP_BYTES: u64 = 16;
/// The part of `flow.max_in_flight_bytes` that librdkafka may prefetch for a flow.
const PREFETCH_PART: u64 = 4;

/// Tell everything that is wrong with a configuration, and how much memory it may take
///
/// Prints `ok` with a summary and exits with 0, or prints every problem with its place and exits
/// with 78.
///
/// With --connect it also asks what the configuration names, and changes nothing there: Kafka and
/// its topics, each memcached server (and whether a few of the keys that it holds belong there by
/// the ring), the certificate, each peer, and the two addresses to listen
/// on. One line each: `ok`, `missing` (what evrepl makes itself or waits for) or `failed`; exits
/// with 78 if any failed.
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
    let total: u64 = parts.iter().map(|part| part.bytes).sum();
    out.push_str("\nmemory, at most:\n");
    let mut rows: Vec<_> = parts
        .into_iter()
        .map(|part| [format!("  {}", part.name), mib(part.bytes), part.why])
        .collect();
    rows.push(["  together".to_owned(), mib(total), String::new()]);
    table(&rows, out);
}

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
    let prefetch = (in_flight / PREFETCH_PART).max(MIB);
    let events = config.flow.max_in_flight_events as u64;
    let dirty = config.flow.max_dirty_keys as u64;
    let stamps = STAMP_BYTES << DEFAULT_SLOTS_LOG2;
    // Limits may be written as large as one likes.
    let times = |factors: &[u64]| {
        factors
            .iter()
            .fold(1u64, |product, factor| product.saturating_mul(*factor))
    };
    let parts = [
        ("base", BASE_BYTES, "code, threads and buffers; an estimate".to_owned()),
        (
            "values in flight",
            times(&[count, in_flight]),
            format!("{each} x flow.max_in_flight_bytes {}", mib(in_flight)),
        ),
        (
            "events in flight",
            times(&[count, EVENT_HOLDS, events, EVENT_BYTES]),
            format!("{each} x flow.max_in_flight_events {events} x {EVENT_BYTES} B, queued and with permit"),
        ),
        (
            "prefetch",
            times(&[count, prefetch]),
            format!("{each} x {}, a quarter of flow.max_in_flight_bytes", mib(prefetch)),
        ),
        (
            "dirty keys",
            times(&[readers, dirty, EVENT_BYTES]),
            format!(
                "{} x flow.max_dirty_keys {dirty} x {EVENT_BYTES} B",
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
    ];
    parts.map(|(name, bytes, why)| Part { name, bytes, why }).into()
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
        let text = format!(
            r#"region = "us-east-1"
            node = "relay-1"
            kafka = {{ brokers = ["127.0.0.1:9092"] }}
            tls = {{ certificate = "a.pem", private_key = "a.key", ca = "ca.pem" }}
            cache = [
                {{ name = "sessions", topic = "s", servers = ["127.0.0.1:11211", "127.0.0.1:11212"] }},
                {{ name = "pages", topic = "p", servers = ["127.0.0.1:11213"] }},
            ]
            {more}"#
        );
        crate::config::parse(&text, "/etc/evrepl.toml".as_ref(), std::iter::empty()).unwrap()
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
                ("values in flight", (2 * 8) << 20),
                ("events in flight", 2 * 2 * 1000 * 512),
                ("prefetch", (2 * 2) << 20),
                // Two lanes, three servers to one peer and one to the other.
                ("dirty keys", 2 * (3 + 1) * 100 * 512),
                ("stamps", (3 * 16) << 20),
                ("agent in flight", 32 << 20),
            ]
        );
    }

    #[test]
    fn a_region_that_only_receives_holds_nothing_for_flows() {
        let config = config(r#"peer = [{ region = "eu-west-1" }]"#);
        for (name, bytes) in bound(&config) {
            let receives = ["base", "stamps", "agent in flight"].contains(&name);
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
