//! Every metric, with name, type, unit, labels and what it tells; nobody else declares one (DESIGN section 10).
//! `docs/metrics.md` lists the same, and a test compares the two.
//!
//! There are two kinds. What happens per chunk, batch or call is recorded as it happens, in [`super::instruments`]. What is
//! counted elsewhere anyway, the accounts above all, is only *read*, at a collection, out of one [`Status`] for all metrics,
//! so that the sums hold inside every scrape. Whatever can be zero says zero from the start: an alert on a series that does
//! not exist yet never fires.

use opentelemetry::metrics::{AsyncInstrument, Counter, Histogram, Meter};
use opentelemetry::{KeyValue, Value};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};

use super::instruments::{FlowInstruments, Instruments};
use crate::admin::{CanaryStatus, FlowStatus, MailboxStatus, Status, StatusSource, WaitingFor};

/// What a metric does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only rises, until the process ends.
    Counter,
    /// It is what it is now.
    Gauge,
    /// Buckets, a sum and a count, which only rise.
    Histogram,
}

impl Kind {
    /// As Prometheus calls it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// One metric.
pub struct Metric {
    /// Its public name, which nothing is appended to.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// Its unit, by UCUM: `s`, `By`, `{event}`. No gauge has `1`: a Collector that translates for Prometheus would put `_ratio`
    /// behind its name.
    pub unit: &'static str,
    /// Its labels, not all of which every series has.
    pub labels: &'static [&'static str],
    /// What it tells, in a sentence.
    pub tells: &'static str,
    from: From,
}

/// Where its numbers come from.
enum From {
    /// Whoever sees it happen; a histogram has these bounds.
    Recorded(&'static [f64]),
    /// What is counted.
    Counted(fn(&Seen, Say<u64>)),
    /// What is measured.
    Measured(fn(&Seen, Say<f64>)),
}

type Say<'a, T> = &'a mut dyn FnMut(T, &[KeyValue]);

/// What is read at a collection.
pub(super) struct Seen<'a> {
    status: &'a Status,
    instruments: &'a Instruments,
}

/// Seconds. From a fast local hop to an hour behind; DESIGN's figures (400 ms typical, p99 under 1 s) in the middle.
const LAG_BOUNDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0, 3600.0,
];

/// Seconds. From a look in a tenth of a millisecond to an event that waited for an hour.
const STAGE_BOUNDS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0, 60.0, 600.0,
    3600.0,
];

/// Seconds of one call to a memcached on the same machine or network, up to its timeouts.
const CALL_BOUNDS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
];

/// Items; the default limit of a batch is 1024.
const ITEM_BOUNDS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0,
];

/// Bytes on the wire; the default limit of a batch is 256 KiB, a single value may be 1 MiB.
const BYTE_BOUNDS: &[f64] = &[256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0, 1048576.0, 4194304.0];

/// Times smaller; LZ4 gives text about 3.
const RATIO_BOUNDS: &[f64] = &[1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 25.0, 100.0];

/// Kinds of actor that can stall or be restarted, for their zeros.
const ACTORS: [&str; 12] = [
    "partition_consumer",
    "cache_reader",
    "batch_coalescer",
    "remote_link",
    "agent_listener",
    "agent_session",
    "cache_writer",
    "flow_supervisor",
    "poll_thread",
    "front_door_listener",
    "front_door_session",
    "front_door_upstream",
];

/// Why a key is looked at again.
const REASONS: [&str; 4] = ["session_lost", "look_again", "source_away", "later"];

/// What does not take a canary.
const NOT_WRITTEN: [&str; 2] = ["memcached", "kafka"];

/// Why a canary is dropped that was taken from Kafka.
const DROPPED: [&str; 14] = [
    "no_session",
    "session_lost",
    "source_away",
    "look_again",
    "later",
    "missing",
    "expired",
    "too_large",
    "superseded",
    "released",
    "flow_rebuilt",
    "suspects",
    "unreadable",
    "filtered",
];

/// What makes a batch leave.
const TRIGGERS: [&str; 4] = ["bytes", "items", "linger", "idle"];

pub(super) static STAGE_LAG: Metric = histogram(
    "evrepl_stage_lag_seconds",
    "s",
    &["flow", "stage"],
    "Now minus produced-at of the newest event of a chunk or batch, at a stage: `consumed`, `looked`, `sent`, `acked` where it \
     is sent from, `received`, `applied` where it is sent to, corrected by the clock offset",
    LAG_BOUNDS,
);

pub(super) static STAGE_SECONDS: Metric = histogram(
    "evrepl_stage_seconds",
    "s",
    &["flow", "stage"],
    "How long an event took for a stage of its path: `kafka`, `queue`, `wait`, `look`, `coalesce`, `link`, `agent_queue`, \
     `apply`; of one event an ack, all of them, so that they add up to its lag. `wait` is 0 unless it was looked at again or \
     parked, and then stands for all until its last look",
    STAGE_BOUNDS,
);

pub(super) static BATCH_ITEMS: Metric = histogram(
    "evrepl_batch_items",
    "{item}",
    &["flow"],
    "Items in a batch",
    ITEM_BOUNDS,
);

pub(super) static BATCH_BYTES: Metric = histogram(
    "evrepl_batch_bytes",
    "By",
    &["flow"],
    "Bytes of a batch on the wire, after compression",
    BYTE_BOUNDS,
);

pub(super) static COMPRESSION_RATIO: Metric = histogram(
    "evrepl_batch_compression_ratio",
    "1",
    &["flow"],
    "How many times smaller compression made a batch; 1 where it does not pay",
    RATIO_BOUNDS,
);

pub(super) static CANARY_LAG: Metric = histogram(
    "evrepl_canary_lag_seconds",
    "s",
    &["flow", "cache"],
    "From a canary's produced-at to the peer's ack",
    LAG_BOUNDS,
);

pub(super) static MEMCACHED_CALLS: Metric = histogram(
    "evrepl_memcached_call_seconds",
    "s",
    &["call", "cache", "server"],
    "Time of one pipelined call to an own memcached server that was answered, by what it did: `look` or `write`",
    CALL_BOUNDS,
);

pub(super) static MEMCACHED_FAILURES: Metric = recorded_counter(
    "evrepl_memcached_failures_total",
    "{call}",
    &["call", "cache", "server"],
    "Calls to an own memcached server that failed or got no answer in time",
);

/// All of them, in the order of `docs/metrics.md`.
#[rustfmt::skip]
pub static METRICS: &[&Metric] = &[
    // What the region is.
    &gauge("evrepl_info", "{info}", &["region", "version"], "1, with the region and the version of evrepl", |seen, say| {
        let status = seen.status;
        if !status.region.is_empty() {
            say(1, &[text("region", &status.region), text("version", &status.version)]);
        }
    }),

    // The accounts.
    &counter("evrepl_events_consumed_total", "{event}", &["flow"], "Events taken from Kafka", |seen, say| {
        for (flow, label) in seen.flows() {
            say(flow.consumed, &[label]);
        }
    }),
    &counter("evrepl_events_total", "{event}", &["flow", "outcome"], "Events ended, by outcome", |seen, say| {
        for (flow, label) in seen.flows() {
            for (outcome, count) in flow.outcomes.iter() {
                say(count, &[label.clone(), KeyValue::new("outcome", outcome.name())]);
            }
        }
    }),
    &gauge(
        "evrepl_events_in_flight", "{event}", &["flow", "hold"],
        "Events consumed and not ended, by where they are held: `waiting` for a permit, `with_permit`, or `dirty`",
        |seen, say| {
            for (flow, label) in seen.flows() {
                let holds = [("waiting", flow.waiting), ("with_permit", flow.with_permit), ("dirty", flow.dirty)];
                for (hold, count) in holds {
                    say(count, &[label.clone(), KeyValue::new("hold", hold)]);
                }
            }
        },
    ),
    &counter(
        "evrepl_late_outcomes_total", "{event}", &[],
        "Outcomes that came after their partition was given back; they are in no flow's sums",
        |seen, say| say(seen.status.late_outcomes, &[]),
    ),

    // Limits.
    &gauge("evrepl_in_flight_bytes", "By", &["flow"], "Bytes of keys and values in flight", |seen, say| {
        seen.flows().for_each(|(flow, label)| say(flow.in_flight_bytes, &[label]));
    }),
    &gauge("evrepl_in_flight_bytes_limit", "By", &["flow"], "The most there may be: `flow.max_in_flight_bytes`", |seen, say| {
        seen.flows().for_each(|(flow, label)| say(flow.in_flight_bytes_limit, &[label]));
    }),
    &gauge("evrepl_permits", "{event}", &["flow"], "Permits there are: `flow.max_in_flight_events`", |seen, say| {
        seen.flows().for_each(|(flow, label)| say(flow.permits, &[label]));
    }),
    &gauge(
        "evrepl_permits_free", "{event}", &["flow"],
        "Permits that nobody holds; a quarter of all is kept for dirty keys",
        |seen, say| seen.flows().for_each(|(flow, label)| say(flow.permits_free, &[label])),
    ),

    // Lag.
    &STAGE_LAG,
    &STAGE_SECONDS,
    &gauge("evrepl_offset_lag", "{event}", &["flow"], "Events in Kafka that are not finished", |seen, say| {
        for (flow, label) in seen.flows() {
            flow.offset_lag.iter().for_each(|lag| say(*lag, std::slice::from_ref(&label)));
        }
    }),
    &measured_gauge(
        "evrepl_commit_age_seconds", "s", &["flow"],
        "Since when the oldest chunk that was taken and is not committed has been in Kafka; 0 when all is committed",
        |seen, say| seen.flows().for_each(|(flow, label)| say(flow.commit_age_seconds, &[label])),
    ),

    // Kafka.
    &counter("evrepl_kafka_rebalances_total", "{rebalance}", &["flow"], "How often partitions were assigned", |seen, say| {
        seen.flows().for_each(|(flow, label)| say(flow.rebalances, &[label]));
    }),
    &measured_gauge(
        "evrepl_kafka_trouble_seconds", "s", &["flow"],
        "For how long Kafka could not be read; 0 when it can",
        |seen, say| {
            for (flow, label) in seen.flows() {
                let trouble = flow.kafka_trouble.as_ref();
                // Just begun is trouble too.
                say(trouble.map_or(0.0, |trouble| trouble.since_seconds.max(0.001)), &[label]);
            }
        },
    ),
    &gauge("evrepl_paused_partitions", "{partition}", &["flow"], "Partitions whose fetching is paused", |seen, say| {
        seen.flows().for_each(|(flow, label)| say(flow.paused_partitions, &[label]));
    }),
    &gauge(
        "evrepl_retry_partitions_waiting", "{partition}", &["flow"],
        "Retry partitions whose next record's time has not come",
        |seen, say| seen.flows().for_each(|(flow, label)| say(flow.retry_partitions_waiting, &[label])),
    ),
    &counter(
        "evrepl_retention_gap_events_total", "{event}", &["flow"],
        "Events that Kafka had removed before they were taken, at most",
        |seen, say| seen.flows().for_each(|(flow, label)| say(flow.retention_gap_events, &[label])),
    ),

    // The link.
    &gauge(
        "evrepl_link_state", "{state}", &["flow"],
        "State of the flow's least advanced link: 0 waiting, 1 dialling, 2 greeting, 3 open, 4 draining",
        |seen, say| {
            for (flow, label) in seen.flows() {
                let state = flow.links.iter().map(|link| link_state(&link.state)).min();
                say(state.unwrap_or(0), &[label]);
            }
        },
    ),
    &counter("evrepl_link_reconnects_total", "{session}", &["flow"], "Sessions after the first", |seen, say| {
        seen.flows().for_each(|(flow, label)| say(flow.reconnects, &[label]));
    }),
    &measured_gauge(
        "evrepl_link_rtt_seconds", "s", &["flow"],
        "Round trip of the last ping, of the slowest of the flow's links",
        |seen, say| {
            for (flow, label) in seen.flows() {
                let rtt = flow.links.iter().filter_map(|link| link.rtt_ms).reduce(f64::max);
                rtt.into_iter().for_each(|ms| say(ms / 1e3, std::slice::from_ref(&label)));
            }
        },
    ),
    &measured_gauge(
        "evrepl_link_clock_offset_seconds", "s", &["flow"],
        "The peer's wall clock minus ours, as the pings with the shortest round trips measured it",
        |seen, say| {
            for (flow, label) in seen.flows() {
                let offsets = flow.links.iter().filter_map(|link| link.clock_offset_ms);
                let widest = offsets.reduce(|one, other| if one.abs() >= other.abs() { one } else { other });
                widest.into_iter().for_each(|ms| say(ms / 1e3, std::slice::from_ref(&label)));
            }
        },
    ),

    // Batches.
    &counter("evrepl_batches_total", "{batch}", &["flow", "trigger"], "Batches that left, by what made them leave", |seen, say| {
        for (flow, label) in seen.own_flows() {
            for (trigger, count) in flow.batches().with_zeros(&TRIGGERS) {
                say(count, &[label.clone(), KeyValue::new("trigger", trigger)]);
            }
        }
    }),
    &BATCH_ITEMS,
    &BATCH_BYTES,
    &COMPRESSION_RATIO,
    &counter("evrepl_raw_bytes_total", "By", &["flow"], "Bytes of all batches before compression", |seen, say| {
        seen.own_flows().for_each(|(flow, label)| say(flow.raw_bytes(), &[label]));
    }),
    &counter("evrepl_wire_bytes_total", "By", &["flow"], "Bytes of all batches on the wire, after compression", |seen, say| {
        seen.own_flows().for_each(|(flow, label)| say(flow.wire_bytes(), &[label]));
    }),

    // Keys that wait.
    &gauge(
        "evrepl_dirty_keys", "{key}", &["flow", "server"],
        "Dirty keys, by the memcached server or the peer they wait for",
        |seen, say| {
            for (flow, label) in seen.flows() {
                for (server, wait) in waits(flow) {
                    say(wait.map_or(0, |wait| wait.keys), &[label.clone(), text("server", server)]);
                }
            }
        },
    ),
    &measured_gauge(
        "evrepl_dirty_age_seconds", "s", &["flow", "server"],
        "For how long the oldest dirty key has waited for this memcached server or peer; 0 when none waits",
        |seen, say| {
            for (flow, label) in seen.flows() {
                for (server, wait) in waits(flow) {
                    say(wait.map_or(0.0, |wait| wait.since_seconds), &[label.clone(), text("server", server)]);
                }
            }
        },
    ),
    &counter(
        "evrepl_looks_again_total", "{key}", &["flow", "reason"],
        "Keys that became dirty, by reason: `session_lost`, `look_again` (the peer asks for a newer look), `source_away` (own \
         memcached), `later` (the peer's memcached)",
        |seen, say| {
            for (flow, label) in seen.own_flows() {
                for (reason, count) in flow.looked_again().with_zeros(&REASONS) {
                    say(count, &[label.clone(), KeyValue::new("reason", reason)]);
                }
            }
        },
    ),

    // memcached.
    &MEMCACHED_CALLS,
    &MEMCACHED_FAILURES,
    &gauge(
        "evrepl_breaker_state", "{state}", &["side", "flow", "cache", "server"],
        "Circuit breaker of an own memcached server: 0 closed, 1 half open, 2 open; the `relay` reads from it, for a flow, the \
         `agent` writes to it",
        |seen, say| {
            for (flow, label) in seen.flows() {
                for of in &flow.breakers {
                    let labels = [
                        KeyValue::new("side", "relay"),
                        label.clone(),
                        text("cache", &of.cache),
                        text("server", &of.server),
                    ];
                    say(breaker_state(&of.state), &labels);
                }
            }
            for of in &seen.status.agent.servers {
                let labels = [KeyValue::new("side", "agent"), text("cache", &of.cache), text("server", &of.address)];
                say(breaker_state(&of.breaker), &labels);
            }
        },
    ),
    &gauge(
        "evrepl_mass_misses", "{state}", &["flow", "cache", "server"],
        "1 for a memcached server on which many keys that were set are missing: wrong hash or ring_name, evictions, or \
         restarted after the events",
        |seen, say| {
            for (flow, label) in seen.flows() {
                for of in &flow.breakers {
                    let raised = flow.mass_misses.iter().any(|one| one.cache == of.cache && one.server == of.server);
                    say(raised.into(), &[label.clone(), text("cache", &of.cache), text("server", &of.server)]);
                }
            }
        },
    ),

    // Canaries; nothing while they are off.
    &gauge(
        "evrepl_path_dead", "{state}", &["flow", "cache"],
        "1 while no canary arrives that should, or none can be written: the path from memcached here to memcached there is dead",
        |seen, say| seen.canaries().for_each(|(canary, labels)| say(canary.dead.into(), &labels)),
    ),
    &measured_gauge(
        "evrepl_canary_age_seconds", "s", &["flow", "cache"],
        "Now minus produced-at of the newest canary that arrived",
        |seen, say| {
            for (canary, labels) in seen.canaries() {
                canary.age_seconds.iter().for_each(|age| say(*age, &labels));
            }
        },
    ),
    &CANARY_LAG,
    &counter("evrepl_canaries_written_total", "{canary}", &["flow", "cache"], "Canaries that Kafka has acknowledged", |seen, say| {
        seen.canaries().for_each(|(canary, labels)| say(canary.written, &labels));
    }),
    &counter(
        "evrepl_canaries_failed_total", "{canary}", &["flow", "cache", "reason"],
        "Canaries that could not be written, by what did not take them: `memcached` or `kafka`",
        |seen, say| {
            for (canary, labels) in seen.canaries() {
                by_reason(&canary.failed, &NOT_WRITTEN, &labels, say);
            }
        },
    ),
    &counter(
        "evrepl_canaries_arrived_total", "{canary}", &["flow", "cache"],
        "Canaries that the peer has applied, heard by this node",
        |seen, say| seen.canaries().for_each(|(canary, labels)| say(canary.arrived, &labels)),
    ),
    &counter(
        "evrepl_canaries_lost_total", "{canary}", &["flow", "cache", "reason"],
        "Canaries that this node took from Kafka and dropped, by reason",
        |seen, say| {
            for (canary, labels) in seen.canaries() {
                by_reason(&canary.lost, &DROPPED, &labels, say);
            }
        },
    ),

    // The agent.
    &gauge("evrepl_agent_sessions", "{session}", &[], "Inbound sessions", |seen, say| {
        say(seen.status.agent.sessions.len() as u64, &[]);
    }),
    &counter(
        "evrepl_agent_items_total", "{item}", &["status"],
        "Items answered by the agent, by the status of the answer",
        |seen, say| {
            let items = &seen.status.agent.items;
            items.iter().for_each(|(name, count)| say(*count, &[text("status", name)]));
        },
    ),

    // The front door.
    &gauge(
        "evrepl_front_door_connections", "{connection}", &["cache"],
        "Clients at the front door",
        |seen, say| {
            for door in &seen.status.front_doors {
                say(door.connections, &[text("cache", &door.cache)]);
            }
        },
    ),
    &counter(
        "evrepl_front_door_connections_total", "{connection}", &["cache"],
        "Clients that have come to the front door",
        |seen, say| {
            for door in &seen.status.front_doors {
                say(door.accepted, &[text("cache", &door.cache)]);
            }
        },
    ),
    &counter(
        "evrepl_front_door_commands_total", "{command}", &["cache", "command"],
        "Commands of clients at the front door, by their name in text",
        |seen, say| {
            for door in &seen.status.front_doors {
                for (command, count) in &door.commands {
                    say(*count, &[text("cache", &door.cache), text("command", command)]);
                }
            }
        },
    ),
    &counter(
        "evrepl_front_door_events_total", "{event}", &["cache"],
        "Events of writes that memcached said have happened, or did not answer",
        |seen, say| {
            for door in &seen.status.front_doors {
                say(door.events, &[text("cache", &door.cache)]);
            }
        },
    ),
    &counter(
        "evrepl_front_door_events_acknowledged_total", "{event}", &["cache"],
        "Events of the front door that Kafka has acknowledged",
        |seen, say| {
            for door in &seen.status.front_doors {
                say(door.acknowledged, &[text("cache", &door.cache)]);
            }
        },
    ),
    &counter(
        "evrepl_front_door_events_remembered_total", "{event}", &["cache"],
        "Events of the front door that Kafka did not take, and whose keys were remembered to be produced later; each once, however often that is tried",
        |seen, say| {
            for door in &seen.status.front_doors {
                say(door.remembered, &[text("cache", &door.cache)]);
            }
        },
    ),
    &counter(
        "evrepl_front_door_events_lost_total", "{event}", &["cache"],
        "Events of the front door that were neither acknowledged nor remembered: peers do not hear of these writes. Too high where a broker had taken an event and its acknowledgement did not come",
        |seen, say| {
            for door in &seen.status.front_doors {
                say(door.lost, &[text("cache", &door.cache)]);
            }
        },
    ),
    &counter(
        "evrepl_front_door_flushes_total", "{command}", &["cache"],
        "`flush_all` at the front door, of which peers do not hear",
        |seen, say| {
            for door in &seen.status.front_doors {
                say(door.flushes, &[text("cache", &door.cache)]);
            }
        },
    ),
    &counter(
        "evrepl_front_door_unreachable_total", "{command}", &["cache"],
        "Commands that failed because a memcached server could not be reached or did not answer in time",
        |seen, say| {
            for door in &seen.status.front_doors {
                say(door.unreachable, &[text("cache", &door.cache)]);
            }
        },
    ),
    &counter(
        "evrepl_front_door_refused_total", "{command}", &["cache"],
        "Writes refused because Kafka takes no events, with `on_kafka_down = \"refuse\"`",
        |seen, say| {
            for door in &seen.status.front_doors {
                say(door.refused, &[text("cache", &door.cache)]);
            }
        },
    ),
    &counter(
        "evrepl_front_door_clients_dropped_total", "{client}", &["cache"],
        "Clients disconnected because they did not read, or send, what others needed the room of `max_buffered_bytes` for",
        |seen, say| {
            for door in &seen.status.front_doors {
                say(door.dropped, &[text("cache", &door.cache)]);
            }
        },
    ),
    &gauge(
        "evrepl_front_door_events_queued", "{event}", &["cache"],
        "Events of the front door that wait for Kafka's acknowledgement",
        |seen, say| {
            for door in &seen.status.front_doors {
                say(door.queued_events, &[text("cache", &door.cache)]);
            }
        },
    ),
    &gauge(
        "evrepl_front_door_keys_unsent", "{key}", &["cache"],
        "Keys of the front door whose events Kafka did not take, and that are remembered",
        |seen, say| {
            for door in &seen.status.front_doors {
                say(door.unsent_keys, &[text("cache", &door.cache)]);
            }
        },
    ),
    &gauge(
        "evrepl_front_door_kafka_away", "{state}", &["cache"],
        "1 while Kafka acknowledges no events of the front door",
        |seen, say| {
            for door in &seen.status.front_doors {
                say(door.kafka_away.into(), &[text("cache", &door.cache)]);
            }
        },
    ),
    &gauge(
        "evrepl_front_door_buffered_bytes", "By", &[],
        "Held for clients of all front doors: commands under way, and answers that they have not read",
        |seen, say| {
            if let Some(door) = seen.status.front_doors.first() {
                say(door.buffered_bytes, &[]);
            }
        },
    ),

    // Mailboxes.
    &gauge(
        "evrepl_mailbox_depth", "{message}", &["flow", "actor"],
        "Messages in all bounded mailboxes of a kind of actor",
        |seen, say| seen.mailboxes().for_each(|(mailbox, labels)| say(mailbox.depth, &labels)),
    ),
    &gauge(
        "evrepl_mailbox_fullest", "{message}", &["flow", "actor"],
        "Messages in the fullest of them, to be compared with the capacity",
        |seen, say| seen.mailboxes().for_each(|(mailbox, labels)| say(mailbox.fullest, &labels)),
    ),
    &gauge(
        "evrepl_mailbox_high_water", "{message}", &["flow", "actor"],
        "The most messages that one mailbox ever held",
        |seen, say| seen.mailboxes().for_each(|(mailbox, labels)| say(mailbox.high_water, &labels)),
    ),
    &gauge(
        "evrepl_mailbox_capacity", "{message}", &["flow", "actor"],
        "Messages that one mailbox holds: `[mailbox]`",
        |seen, say| seen.mailboxes().for_each(|(mailbox, labels)| say(mailbox.capacity, &labels)),
    ),
    &gauge(
        "evrepl_mailbox_senders_waiting", "{sender}", &["flow", "actor"],
        "Senders that wait for room in a mailbox now",
        |seen, say| seen.mailboxes().for_each(|(mailbox, labels)| say(mailbox.senders_waiting, &labels)),
    ),
    &counter(
        "evrepl_mailbox_waits_total", "{message}", &["flow", "actor"],
        "Messages that had to wait for room",
        |seen, say| seen.mailboxes().for_each(|(mailbox, labels)| say(mailbox.waits, &labels)),
    ),
    &measured_counter(
        "evrepl_mailbox_wait_seconds_total", "s", &["flow", "actor"],
        "How long senders waited for room",
        |seen, say| seen.mailboxes().for_each(|(mailbox, labels)| say(mailbox.waited_us as f64 / 1e6, &labels)),
    ),

    // The process.
    &gauge(
        "evrepl_alive", "{state}", &[],
        "1 while the process works, 0 when only a restart helps: what `/livez` answers",
        |seen, say| seen.checked(|source| source.alive().iter().all(|check| check.ok), say),
    ),
    &gauge(
        "evrepl_ready", "{state}", &[],
        "1 while the agent can take batches: what `/readyz` answers; 1 also when that says `degraded`",
        |seen, say| seen.checked(|source| source.ready().ready, say),
    ),
    &gauge(
        "evrepl_stalled_stages", "{stage}", &["actor"],
        "Stages that have work, wait for nobody and have not moved for a third of `supervision.stalled_after`, by kind of actor",
        |seen, say| {
            for (actor, count) in seen.stalled() {
                say(count, &[text("actor", actor)]);
            }
        },
    ),
    &counter("evrepl_restarts_total", "{restart}", &["actor"], "Restarts, by kind of actor", |seen, say| {
        for (actor, count) in seen.instruments.restarted().with_zeros(&ACTORS) {
            say(count, &[KeyValue::new("actor", actor)]);
        }
    }),
    &counter(
        "evrepl_telemetry_spans_exported_total", "{span}", &[], "Spans that the collector has taken",
        |seen, say| say(seen.instruments.traces().counts().exported.load(Relaxed), &[]),
    ),
    &counter(
        "evrepl_telemetry_spans_dropped_total", "{span}", &["reason"],
        "Spans that are lost: `queue_full`, or `refused` by a collector that is wrong, slow or away",
        |seen, say| {
            let counts = seen.instruments.traces().counts();
            for (reason, count) in [("queue_full", &counts.queue_full), ("refused", &counts.refused)] {
                say(count.load(Relaxed), &[KeyValue::new("reason", reason)]);
            }
        },
    ),
    &measured_gauge(
        "evrepl_certificate_expires_seconds", "s", &["certificate"],
        "Until the certificate expires: our `own`, or the first of `ca`; negative when it has",
        |seen, say| {
            for of in &seen.status.certificates {
                say(of.expires_in_seconds, &[text("certificate", &of.name)]);
            }
        },
    ),
];

type Labels = &'static [&'static str];

const fn metric(
    name: &'static str,
    kind: Kind,
    unit: &'static str,
    labels: Labels,
    tells: &'static str,
    from: From,
) -> Metric {
    Metric {
        name,
        kind,
        unit,
        labels,
        tells,
        from,
    }
}

const fn counter(
    name: &'static str,
    unit: &'static str,
    labels: Labels,
    tells: &'static str,
    read: fn(&Seen, Say<u64>),
) -> Metric {
    metric(name, Kind::Counter, unit, labels, tells, From::Counted(read))
}

const fn gauge(
    name: &'static str,
    unit: &'static str,
    labels: Labels,
    tells: &'static str,
    read: fn(&Seen, Say<u64>),
) -> Metric {
    metric(name, Kind::Gauge, unit, labels, tells, From::Counted(read))
}

const fn measured_counter(
    name: &'static str,
    unit: &'static str,
    labels: Labels,
    tells: &'static str,
    read: fn(&Seen, Say<f64>),
) -> Metric {
    metric(name, Kind::Counter, unit, labels, tells, From::Measured(read))
}

const fn measured_gauge(
    name: &'static str,
    unit: &'static str,
    labels: Labels,
    tells: &'static str,
    read: fn(&Seen, Say<f64>),
) -> Metric {
    metric(name, Kind::Gauge, unit, labels, tells, From::Measured(read))
}

const fn histogram(
    name: &'static str,
    unit: &'static str,
    labels: Labels,
    tells: &'static str,
    bounds: &'static [f64],
) -> Metric {
    metric(name, Kind::Histogram, unit, labels, tells, From::Recorded(bounds))
}

const fn recorded_counter(name: &'static str, unit: &'static str, labels: Labels, tells: &'static str) -> Metric {
    metric(name, Kind::Counter, unit, labels, tells, From::Recorded(&[]))
}

impl Metric {
    /// The histogram, to be recorded.
    pub(super) fn histogram(&self, meter: &Meter) -> Histogram<f64> {
        let From::Recorded(bounds) = self.from else {
            unreachable!("{} is read, not recorded", self.name)
        };
        meter
            .f64_histogram(self.name)
            .with_unit(self.unit)
            .with_description(self.tells)
            .with_boundaries(bounds.to_vec())
            .build()
    }

    /// The counter, to be added to.
    pub(super) fn counter(&self, meter: &Meter) -> Counter<u64> {
        meter
            .u64_counter(self.name)
            .with_unit(self.unit)
            .with_description(self.tells)
            .build()
    }
}

/// Has the meter read everything that is only read. The meter keeps what it is given for ever, so it must not be the
/// instruments.
pub(super) fn observe(meter: &Meter, instruments: &Weak<Instruments>) {
    for (number, metric) in METRICS.iter().enumerate() {
        let held = instruments.clone();
        match (&metric.from, metric.kind) {
            (From::Recorded(_), _) => {}
            (From::Counted(read), Kind::Counter) => {
                let counter = meter.u64_observable_counter(metric.name);
                let counter = counter.with_unit(metric.unit).with_description(metric.tells);
                counter
                    .with_callback(move |observer| report(&held, number, *read, observer))
                    .build();
            }
            (From::Counted(read), _) => {
                let gauge = meter.u64_observable_gauge(metric.name);
                let gauge = gauge.with_unit(metric.unit).with_description(metric.tells);
                gauge
                    .with_callback(move |observer| report(&held, number, *read, observer))
                    .build();
            }
            (From::Measured(read), Kind::Counter) => {
                let counter = meter.f64_observable_counter(metric.name);
                let counter = counter.with_unit(metric.unit).with_description(metric.tells);
                counter
                    .with_callback(move |observer| report(&held, number, *read, observer))
                    .build();
            }
            (From::Measured(read), _) => {
                let gauge = meter.f64_observable_gauge(metric.name);
                let gauge = gauge.with_unit(metric.unit).with_description(metric.tells);
                gauge
                    .with_callback(move |observer| report(&held, number, *read, observer))
                    .build();
            }
        }
    }
}

fn report<T>(held: &Weak<Instruments>, number: usize, read: fn(&Seen, Say<T>), observer: &dyn AsyncInstrument<T>) {
    let Some(instruments) = held.upgrade() else { return };
    let seen = Seen {
        status: &instruments.snapshot(number),
        instruments: &instruments,
    };
    read(&seen, &mut |value, labels| observer.observe(value, labels));
}

impl Seen<'_> {
    fn flows(&self) -> impl Iterator<Item = (&FlowStatus, KeyValue)> {
        let of = |flow: &FlowStatus| format!("{}->{}", self.status.region, flow.peer);
        self.status
            .flows
            .iter()
            .map(move |flow| (flow, KeyValue::new("flow", of(flow))))
    }

    /// What is counted for the flows that leave here.
    fn own_flows(&self) -> impl Iterator<Item = (Arc<FlowInstruments>, KeyValue)> {
        self.flows()
            .map(|(_, label)| (self.instruments.flow(&label.value.as_str()), label))
    }

    fn canaries(&self) -> impl Iterator<Item = (&CanaryStatus, [KeyValue; 2])> {
        self.flows().flat_map(|(flow, label)| {
            let canaries = flow.canaries.iter();
            canaries.map(move |canary| (canary, [label.clone(), text("cache", &canary.cache)]))
        })
    }

    /// What the source answers when asked, which is no part of its status; nothing while there is none.
    fn checked(&self, ask: fn(&dyn StatusSource) -> bool, say: Say<u64>) {
        if let Some(source) = self.instruments.source() {
            say(ask(source).into(), &[]);
        }
    }

    /// Stages that do not move, by kind of actor, zeros included.
    fn stalled(&self) -> BTreeMap<&str, u64> {
        let mut stalled: BTreeMap<&str, u64> = ACTORS.iter().map(|actor| (*actor, 0)).collect();
        for stall in &self.status.stalls {
            *stalled.entry(&stall.stage).or_default() += 1;
        }
        stalled
    }

    /// Those of each flow, and those of the agent, which belong to none.
    fn mailboxes(&self) -> impl Iterator<Item = (&MailboxStatus, Vec<KeyValue>)> {
        let flows = self.flows().flat_map(|(flow, label)| {
            let mailboxes = flow.mailboxes.iter();
            mailboxes.map(move |(actor, mailbox)| (mailbox, vec![label.clone(), text("actor", actor)]))
        });
        let agent = self.status.agent.mailboxes.iter();
        flows.chain(agent.map(|(actor, mailbox)| (mailbox, vec![text("actor", actor)])))
    }
}

/// What dirty keys wait for, and what they could wait for and do not: the peer, and the own servers.
fn waits(flow: &FlowStatus) -> impl Iterator<Item = (&str, Option<&WaitingFor>)> {
    let known = flow.breakers.iter().map(|of| &of.server).chain([&flow.peer]);
    let without = known.filter(|server| flow.waiting_for.iter().all(|wait| wait.server != **server));
    let waiting = flow.waiting_for.iter().map(|wait| (wait.server.as_str(), Some(wait)));
    waiting.chain(without.map(|server| (server.as_str(), None)))
}

/// Every count, and zero for each of `reasons` that was never counted.
fn by_reason(counts: &BTreeMap<String, u64>, reasons: &[&'static str], labels: &[KeyValue], say: Say<u64>) {
    let never = reasons.iter().filter(|reason| !counts.contains_key(**reason));
    let counted = counts.iter().map(|(reason, count)| (reason.as_str(), *count));
    for (reason, count) in counted.chain(never.map(|reason| (*reason, 0))) {
        let labels: Vec<KeyValue> = labels.iter().cloned().chain([text("reason", reason)]).collect();
        say(count, &labels);
    }
}

fn text(name: &'static str, value: &str) -> KeyValue {
    KeyValue::new(name, Value::from(value.to_owned()))
}

fn link_state(name: &str) -> u64 {
    match name {
        "dialling" => 1,
        "greeting" => 2,
        "open" => 3,
        "draining" => 4,
        _ => 0,
    }
}

fn breaker_state(name: &str) -> u64 {
    match name {
        "half_open" => 1,
        "open" => 2,
        _ => 0,
    }
}
