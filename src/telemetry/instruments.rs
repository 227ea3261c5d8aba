//! Every instrument, with name, unit and description; nobody else creates one (DESIGN section 10).
//!
//! There are two kinds. What happens per chunk or batch is recorded here as it happens. What is counted elsewhere anyway,
//! the accounts above all, is only *read*: at a collection, out of one [`Status`] for all instruments, so that the sums
//! hold inside every scrape. Nothing here is to be called once an event, but for [`FlowInstruments::count_look_again`],
//! which is one atomic addition.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, Weak};

use opentelemetry::metrics::{AsyncInstrument, Counter, Histogram, Meter};
use opentelemetry::{KeyValue, Value};

use super::tap::Taps;
use crate::admin::{FlowStatus, Status, StatusSource};

/// Seconds. From a fast local hop to an hour behind; DESIGN's figures (400 ms typical, p99 under 1 s) in the middle.
const LAG_BOUNDS: [f64; 18] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0, 3600.0,
];

/// Items; the default limit of a batch is 1024.
const ITEM_BOUNDS: [f64; 12] = [
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0,
];

/// Bytes on the wire; the default limit of a batch is 256 KiB, a single value may be 1 MiB.
const BYTE_BOUNDS: [f64; 8] = [256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0, 1048576.0, 4194304.0];

/// Different names that one [`Tally`] tells apart: there are nine kinds of actor and four reasons to look again.
const NAMES: usize = 16;

/// The process's instruments.
pub struct Instruments {
    source: OnceLock<Arc<dyn StatusSource>>,
    stage_lag: Histogram<f64>,
    batches: Counter<u64>,
    batch_items: Histogram<u64>,
    batch_bytes: Histogram<u64>,
    restarts: Tally,
    flows: RwLock<HashMap<String, Arc<FlowInstruments>>>,
    taps: Arc<Taps>,
}

impl Instruments {
    /// Creates every instrument on `meter`. What is read from a source says nothing until there is one.
    pub fn new(meter: &Meter) -> Arc<Instruments> {
        let instruments = Arc::new(Instruments {
            source: OnceLock::new(),
            stage_lag: meter
                .f64_histogram("evrepl_stage_lag_seconds")
                .with_unit("s")
                .with_description("Now minus produced-at of the newest event of a chunk or batch, at a stage")
                .with_boundaries(LAG_BOUNDS.to_vec())
                .build(),
            batches: meter
                .u64_counter("evrepl_batches_total")
                .with_unit("{batch}")
                .with_description("Batches that left, by what made them leave")
                .build(),
            batch_items: meter
                .u64_histogram("evrepl_batch_items")
                .with_unit("{item}")
                .with_description("Items in a batch")
                .with_boundaries(ITEM_BOUNDS.to_vec())
                .build(),
            batch_bytes: meter
                .u64_histogram("evrepl_batch_bytes")
                .with_unit("By")
                .with_description("Bytes of a batch on the wire, after compression")
                .with_boundaries(BYTE_BOUNDS.to_vec())
                .build(),
            restarts: Tally::default(),
            flows: RwLock::default(),
            taps: Arc::default(),
        });
        Observers {
            meter,
            instruments: Arc::downgrade(&instruments),
            count: 0,
        }
        .create();
        instruments
    }

    /// Instruments that nobody reads, for tests and tools.
    pub fn detached() -> Arc<Instruments> {
        use opentelemetry::metrics::MeterProvider;
        let provider = opentelemetry::metrics::noop::NoopMeterProvider::new();
        Instruments::new(&provider.meter("evrepl"))
    }

    /// Who looks at events as they pass.
    pub fn taps(&self) -> Arc<Taps> {
        self.taps.clone()
    }

    /// Where everything that is counted elsewhere is read from now on. The first source stays.
    pub fn register_source(&self, source: Arc<dyn StatusSource>) {
        if self.source.set(source).is_err() {
            tracing::warn!("the metrics already have a source of status");
        }
    }

    /// The instruments of one flow, `us-east-1->eu-west-1`, to be kept by whoever uses them often.
    pub fn flow(&self, name: &str) -> Arc<FlowInstruments> {
        if let Some(flow) = self.flows.read().unwrap_or_else(PoisonError::into_inner).get(name) {
            return flow.clone();
        }
        let mut flows = self.flows.write().unwrap_or_else(PoisonError::into_inner);
        let flow = flows.entry(name.to_owned()).or_insert_with(|| {
            Arc::new(FlowInstruments {
                label: KeyValue::new("flow", Arc::<str>::from(name)),
                stage_lag: self.stage_lag.clone(),
                batches: self.batches.clone(),
                batch_items: self.batch_items.clone(),
                batch_bytes: self.batch_bytes.clone(),
                looks_again: Tally::default(),
            })
        });
        flow.clone()
    }

    /// [`FlowInstruments::record_stage_lag`] of the flow with this name.
    pub fn record_stage_lag(&self, flow: &str, stage: &'static str, seconds: f64) {
        self.flow(flow).record_stage_lag(stage, seconds);
    }

    /// [`FlowInstruments::record_batch`] of the flow with this name.
    pub fn record_batch(&self, flow: &str, trigger: &'static str, items: usize, bytes: usize) {
        self.flow(flow).record_batch(trigger, items, bytes);
    }

    /// [`FlowInstruments::count_look_again`] of the flow with this name.
    pub fn count_look_again(&self, flow: &str, reason: &'static str) {
        self.flow(flow).count_look_again(reason);
    }

    /// An actor of this kind was restarted.
    pub fn count_restart(&self, actor: &'static str) {
        self.restarts.count(actor);
    }

    /// Restarts so far, by kind of actor.
    pub fn restarts(&self) -> BTreeMap<String, u64> {
        self.restarts
            .counts()
            .map(|(actor, count)| (actor.to_owned(), count))
            .collect()
    }

    /// The snapshot that the observer with this number reads. Observers of one collection run one after the other on one
    /// thread, each once: one that has read this thread's snapshot already begins the next collection.
    fn snapshot(self: &Arc<Self>, observer: usize) -> Option<Arc<Status>> {
        thread_local! {
            static TAKEN: RefCell<Option<Taken>> = const { RefCell::new(None) };
        }
        struct Taken {
            of: Weak<Instruments>,
            readers: u64,
            status: Arc<Status>,
        }

        let source = self.source.get()?;
        let bit = 1 << observer;
        TAKEN.with_borrow_mut(|taken| match taken {
            Some(taken) if taken.readers & bit == 0 && taken.of.as_ptr() == Arc::as_ptr(self) => {
                taken.readers |= bit;
                Some(taken.status.clone())
            }
            _ => {
                let status = Arc::new(source.status());
                *taken = Some(Taken {
                    of: Arc::downgrade(self),
                    readers: bit,
                    status: status.clone(),
                });
                Some(status)
            }
        })
    }
}

/// The instruments of one flow.
pub struct FlowInstruments {
    label: KeyValue,
    stage_lag: Histogram<f64>,
    batches: Counter<u64>,
    batch_items: Histogram<u64>,
    batch_bytes: Histogram<u64>,
    looks_again: Tally,
}

impl FlowInstruments {
    /// The lag, in seconds, of the newest event of a chunk or batch at a stage.
    pub fn record_stage_lag(&self, stage: &'static str, seconds: f64) {
        self.stage_lag
            .record(seconds, &[self.label.clone(), KeyValue::new("stage", stage)]);
    }

    /// A batch left: on what trigger, with how many items, and how many bytes on the wire.
    pub fn record_batch(&self, trigger: &'static str, items: usize, bytes: usize) {
        self.batches
            .add(1, &[self.label.clone(), KeyValue::new("trigger", trigger)]);
        let flow = std::slice::from_ref(&self.label);
        self.batch_items.record(items as u64, flow);
        self.batch_bytes.record(bytes as u64, flow);
    }

    /// A key became dirty, for this reason. One atomic addition: it happens per event when a session is lost.
    pub fn count_look_again(&self, reason: &'static str) {
        self.looks_again.count(reason);
    }

    /// Keys that became dirty so far, by reason.
    pub fn looks_again(&self) -> BTreeMap<String, u64> {
        self.looks_again
            .counts()
            .map(|(reason, count)| (reason.to_owned(), count))
            .collect()
    }
}

/// Counts by name without a lock or an allocation, for the few names that the code itself knows.
#[derive(Default)]
struct Tally([(OnceLock<&'static str>, AtomicU64); NAMES]);

impl Tally {
    fn count(&self, name: &'static str) {
        for (taken, count) in &self.0[..NAMES - 1] {
            if *taken.get_or_init(|| name) == name {
                count.fetch_add(1, Relaxed);
                return;
            }
        }
        let (taken, count) = &self.0[NAMES - 1];
        taken.get_or_init(|| "other");
        count.fetch_add(1, Relaxed);
    }

    fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.0
            .iter()
            .filter_map(|(name, count)| Some((*name.get()?, count.load(Relaxed))))
    }
}

/// Creates the instruments that read.
struct Observers<'a> {
    meter: &'a Meter,
    /// The meter keeps the observers for ever; they must not keep the instruments.
    instruments: Weak<Instruments>,
    count: usize,
}

type Report<'a> = &'a mut dyn FnMut(u64, &[KeyValue]);

impl Observers<'_> {
    fn create(mut self) {
        self.counter(
            "evrepl_events_consumed_total",
            "{event}",
            "Events taken from Kafka",
            |status, say| {
                for (flow, label) in flows(status) {
                    if flow.consumed_by_cache.is_empty() {
                        say(flow.consumed, &[label]);
                        continue;
                    }
                    for (cache, consumed) in &flow.consumed_by_cache {
                        say(*consumed, &[label.clone(), text("cache", cache)]);
                    }
                }
            },
        );
        self.counter(
            "evrepl_events_total",
            "{event}",
            "Events ended, by outcome",
            |status, say| {
                for (flow, label) in flows(status) {
                    for (outcome, count) in flow.outcomes.iter() {
                        say(count, &[label.clone(), KeyValue::new("outcome", outcome.name())]);
                    }
                }
            },
        );
        self.gauge(
            "evrepl_events_in_flight",
            "{event}",
            "Events consumed and not ended",
            |status, say| {
                for (flow, label) in flows(status) {
                    let holds = [
                        ("waiting", flow.waiting),
                        ("with_permit", flow.with_permit),
                        ("dirty", flow.dirty),
                    ];
                    for (hold, count) in holds {
                        say(count, &[label.clone(), KeyValue::new("hold", hold)]);
                    }
                }
            },
        );
        self.gauge(
            "evrepl_in_flight_bytes",
            "By",
            "Bytes of keys and values in flight",
            |status, say| {
                flows(status).for_each(|(flow, label)| say(flow.in_flight_bytes, &[label]));
            },
        );
        self.gauge(
            "evrepl_offset_lag",
            "{event}",
            "Events in Kafka that are not finished",
            |status, say| {
                for (flow, label) in flows(status) {
                    flow.offset_lag
                        .iter()
                        .for_each(|lag| say(*lag, std::slice::from_ref(&label)));
                }
            },
        );
        let states = "State of the flow's least advanced link: 0 waiting, 1 dialling, 2 greeting, 3 open, 4 draining";
        self.gauge("evrepl_link_state", "1", states, |status, say| {
            for (flow, label) in flows(status) {
                let state = flow.links.iter().map(|link| link_state(&link.state)).min();
                say(state.unwrap_or(0), &[label]);
            }
        });
        self.counter(
            "evrepl_link_reconnects_total",
            "{session}",
            "Sessions after the first",
            |status, say| {
                flows(status).for_each(|(flow, label)| say(flow.reconnects, &[label]));
            },
        );
        self.gauge(
            "evrepl_dirty_keys",
            "{key}",
            "Dirty keys, by the server they wait for",
            |status, say| {
                for (flow, label) in flows(status) {
                    for wait in &flow.waiting_for {
                        say(wait.keys, &[label.clone(), text("server", &wait.server)]);
                    }
                }
            },
        );
        self.gauge(
            "evrepl_mass_misses",
            "1",
            "1 for a memcached server on which many keys that were set are missing: wrong hash or ring_name, evictions, or \
             restarted after the events",
            |status, say| {
                for (flow, label) in flows(status) {
                    for one in &flow.mass_misses {
                        say(1, &[label.clone(), text("cache", &one.cache), text("server", &one.server)]);
                    }
                }
            },
        );
        self.counter(
            "evrepl_retention_gap_events_total",
            "{event}",
            "Events that Kafka had removed before they were taken, at most",
            |status, say| {
                flows(status).for_each(|(flow, label)| say(flow.retention_gap_events, &[label]));
            },
        );
        self.gauge(
            "evrepl_mailbox_depth",
            "{message}",
            "Messages in bounded mailboxes",
            |status, say| {
                status
                    .mailboxes
                    .iter()
                    .for_each(|(actor, mailbox)| say(mailbox.depth, &[text("actor", actor)]));
            },
        );
        self.gauge(
            "evrepl_mailbox_high_water",
            "{message}",
            "Most messages in a mailbox so far",
            |status, say| {
                status
                    .mailboxes
                    .iter()
                    .for_each(|(actor, mailbox)| say(mailbox.high_water, &[text("actor", actor)]));
            },
        );
        self.gauge(
            "evrepl_mailbox_capacity",
            "{message}",
            "Messages that a mailbox holds",
            |status, say| {
                status
                    .mailboxes
                    .iter()
                    .for_each(|(actor, mailbox)| say(mailbox.capacity, &[text("actor", actor)]));
            },
        );
        self.counter(
            "evrepl_agent_items_total",
            "{item}",
            "Items answered by the agent",
            |status, say| {
                status
                    .agent
                    .items
                    .iter()
                    .for_each(|(name, count)| say(*count, &[text("status", name)]));
            },
        );
        self.gauge(
            "evrepl_agent_sessions",
            "{session}",
            "Inbound sessions",
            |status, say| {
                say(status.agent.sessions.len() as u64, &[]);
            },
        );
        let late = "Outcomes that came after their partition was given back";
        self.counter("evrepl_late_outcomes_total", "{event}", late, |status, say| {
            say(status.late_outcomes, &[])
        });
        self.create_tallies();
    }

    /// The two that are counted in this file.
    fn create_tallies(&self) {
        let held = self.instruments.clone();
        self.meter
            .u64_observable_counter("evrepl_restarts_total")
            .with_unit("{restart}")
            .with_description("Restarts, by kind of actor")
            .with_callback(move |observer| {
                let Some(instruments) = held.upgrade() else { return };
                for (actor, count) in instruments.restarts.counts() {
                    observer.observe(count, &[KeyValue::new("actor", actor)]);
                }
            })
            .build();
        let held = self.instruments.clone();
        self.meter
            .u64_observable_counter("evrepl_looks_again_total")
            .with_unit("{key}")
            .with_description("Keys that became dirty, by reason")
            .with_callback(move |observer| {
                let Some(instruments) = held.upgrade() else { return };
                for flow in instruments
                    .flows
                    .read()
                    .unwrap_or_else(PoisonError::into_inner)
                    .values()
                {
                    for (reason, count) in flow.looks_again.counts() {
                        observer.observe(count, &[flow.label.clone(), KeyValue::new("reason", reason)]);
                    }
                }
            })
            .build();
    }

    fn counter(&mut self, name: &'static str, unit: &'static str, description: &'static str, read: Read) {
        let observe = self.reader(read);
        let counter = self
            .meter
            .u64_observable_counter(name)
            .with_unit(unit)
            .with_description(description);
        counter.with_callback(move |observer| observe(observer)).build();
    }

    fn gauge(&mut self, name: &'static str, unit: &'static str, description: &'static str, read: Read) {
        let observe = self.reader(read);
        let gauge = self
            .meter
            .u64_observable_gauge(name)
            .with_unit(unit)
            .with_description(description);
        gauge.with_callback(move |observer| observe(observer)).build();
    }

    fn reader(&mut self, read: Read) -> impl Fn(&dyn AsyncInstrument<u64>) + Send + Sync + 'static {
        let number = self.count;
        self.count += 1;
        let instruments = self.instruments.clone();
        move |observer| {
            let Some(status) = instruments
                .upgrade()
                .and_then(|instruments| instruments.snapshot(number))
            else {
                return;
            };
            read(&status, &mut |value, labels| observer.observe(value, labels));
        }
    }
}

/// Reads one instrument's values out of a snapshot.
type Read = fn(&Status, Report<'_>);

fn flows(status: &Status) -> impl Iterator<Item = (&FlowStatus, KeyValue)> {
    status
        .flows
        .iter()
        .map(|flow| (flow, KeyValue::new("flow", format!("{}->{}", status.region, flow.peer))))
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
