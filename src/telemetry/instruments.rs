//! The facts that actors tell, and the instruments behind them; what each metric is stands in [`super::metrics`].
//!
//! Nothing here is to be called once an event, but for [`FlowInstruments::count_look_again`], which is one atomic addition.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, Weak};
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::metrics::{BoundHistogram, Counter, Histogram, Meter};

use super::metrics::{
    self, BATCH_BYTES, BATCH_ITEMS, CANARY_LAG, COMPRESSION_RATIO, MEMCACHED_CALLS, MEMCACHED_FAILURES, STAGE_LAG,
    STAGE_SECONDS,
};
use super::tap::Taps;
use super::traces::Traces;
use crate::admin::{Status, StatusSource};

/// Different names that one [`Tally`] or [`ByStage`] tells apart: there are nine kinds of actor and of stage, and four reasons to
/// look again.
const NAMES: usize = 16;

/// The process's instruments.
pub struct Instruments {
    source: OnceLock<Arc<dyn StatusSource>>,
    stage_lag: Histogram<f64>,
    stage_seconds: Histogram<f64>,
    batch_items: Histogram<f64>,
    batch_bytes: Histogram<f64>,
    compression_ratio: Histogram<f64>,
    canary_lag: Histogram<f64>,
    memcached_calls: Histogram<f64>,
    memcached_failures: Counter<u64>,
    restarts: Tally,
    flows: RwLock<HashMap<String, Arc<FlowInstruments>>>,
    taps: Arc<Taps>,
    traces: Arc<Traces>,
}

impl Instruments {
    /// Creates every instrument on `meter`. What is read from a source is empty until there is one.
    pub fn new(meter: &Meter, traces: Arc<Traces>) -> Arc<Instruments> {
        let instruments = Arc::new(Instruments {
            source: OnceLock::new(),
            stage_lag: STAGE_LAG.histogram(meter),
            stage_seconds: STAGE_SECONDS.histogram(meter),
            batch_items: BATCH_ITEMS.histogram(meter),
            batch_bytes: BATCH_BYTES.histogram(meter),
            compression_ratio: COMPRESSION_RATIO.histogram(meter),
            canary_lag: CANARY_LAG.histogram(meter),
            memcached_calls: MEMCACHED_CALLS.histogram(meter),
            memcached_failures: MEMCACHED_FAILURES.counter(meter),
            restarts: Tally::default(),
            flows: RwLock::default(),
            taps: Arc::default(),
            traces,
        });
        metrics::observe(meter, &Arc::downgrade(&instruments));
        instruments
    }

    /// Instruments that nobody reads, for tests and tools.
    pub fn detached() -> Arc<Instruments> {
        use opentelemetry::metrics::MeterProvider;
        let provider = opentelemetry::metrics::noop::NoopMeterProvider::new();
        Instruments::new(&provider.meter("evrepl"), Arc::new(Traces::off()))
    }

    /// The traces of single events.
    pub fn traces(&self) -> &Arc<Traces> {
        &self.traces
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

    /// Where everything that is counted elsewhere is read from.
    pub(super) fn source(&self) -> Option<&dyn StatusSource> {
        self.source.get().map(AsRef::as_ref)
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
                stage_lag: ByStage::new(&self.stage_lag),
                stage_seconds: ByStage::new(&self.stage_seconds),
                batches_closed: OnceLock::new(),
                batch_items: self.batch_items.clone(),
                batch_bytes: self.batch_bytes.clone(),
                compression_ratio: self.compression_ratio.clone(),
                canary_lag: self.canary_lag.clone(),
                batches: Tally::default(),
                raw_bytes: AtomicU64::new(0),
                wire_bytes: AtomicU64::new(0),
                looks_again: Tally::default(),
            })
        });
        flow.clone()
    }

    /// [`FlowInstruments::record_stage_lag`] of the flow with this name.
    pub fn record_stage_lag(&self, flow: &str, stage: &'static str, seconds: f64) {
        self.flow(flow).record_stage_lag(stage, seconds);
    }

    /// The instruments of the calls to one memcached server, to be kept by whoever makes them; `call` is `look` or `write`.
    pub fn memcached(&self, cache: &str, server: &str, call: &'static str) -> MemcachedInstruments {
        let labels = [
            KeyValue::new("call", call),
            KeyValue::new("cache", Arc::<str>::from(cache)),
            KeyValue::new("server", Arc::<str>::from(server)),
        ];
        // A failure that is the first must not be the series' beginning: no alert would see it rise.
        self.memcached_failures.add(0, &labels);
        MemcachedInstruments {
            labels,
            calls: self.memcached_calls.clone(),
            bound: OnceLock::new(),
            failures: self.memcached_failures.clone(),
        }
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

    pub(super) fn restarted(&self) -> &Tally {
        &self.restarts
    }

    /// The snapshot that the observer with this number reads. Observers of one collection run one after the other on one
    /// thread, each once: one that has read this thread's snapshot already begins the next collection. Without a source it
    /// is empty.
    pub(super) fn snapshot(self: &Arc<Self>, observer: usize) -> Arc<Status> {
        thread_local! {
            static TAKEN: RefCell<Option<Taken>> = const { RefCell::new(None) };
        }
        struct Taken {
            of: Weak<Instruments>,
            readers: u128,
            status: Arc<Status>,
        }

        let Some(source) = self.source.get() else {
            return Arc::default();
        };
        let bit = 1 << observer;
        TAKEN.with_borrow_mut(|taken| match taken {
            Some(taken) if taken.readers & bit == 0 && taken.of.as_ptr() == Arc::as_ptr(self) => {
                taken.readers |= bit;
                taken.status.clone()
            }
            _ => {
                let status = Arc::new(source.status());
                *taken = Some(Taken {
                    of: Arc::downgrade(self),
                    readers: bit,
                    status: status.clone(),
                });
                status
            }
        })
    }
}

/// A batch that was closed, to be told of.
#[derive(Clone, Copy, Debug)]
pub struct BatchClosed {
    /// What made it leave.
    pub trigger: &'static str,
    /// How many items it has.
    pub items: usize,
    /// Its bytes before compression.
    pub raw: usize,
    /// Its bytes on the wire.
    pub wire: usize,
}

/// A histogram by stage, whose labels are looked up once for each: there are a dozen records to each batch.
struct ByStage {
    histogram: Histogram<f64>,
    bound: [OnceLock<(&'static str, BoundHistogram<f64>)>; NAMES],
}

impl ByStage {
    fn new(histogram: &Histogram<f64>) -> ByStage {
        ByStage {
            histogram: histogram.clone(),
            bound: [const { OnceLock::new() }; NAMES],
        }
    }

    fn record(&self, flow: &KeyValue, stage: &'static str, seconds: f64) {
        let labels = || [flow.clone(), KeyValue::new("stage", stage)];
        for slot in &self.bound {
            let (its, bound) = slot.get_or_init(|| (stage, self.histogram.bind(&labels())));
            if *its == stage {
                bound.record(seconds);
                return;
            }
        }
        self.histogram.record(seconds, &labels());
    }
}

/// The instruments of one flow.
pub struct FlowInstruments {
    label: KeyValue,
    stage_lag: ByStage,
    stage_seconds: ByStage,
    /// Of the next three, with their label.
    batches_closed: OnceLock<[BoundHistogram<f64>; 3]>,
    batch_items: Histogram<f64>,
    batch_bytes: Histogram<f64>,
    compression_ratio: Histogram<f64>,
    canary_lag: Histogram<f64>,
    batches: Tally,
    raw_bytes: AtomicU64,
    wire_bytes: AtomicU64,
    looks_again: Tally,
}

impl FlowInstruments {
    /// The lag, in seconds, of the newest event of a chunk or batch at a stage.
    pub fn record_stage_lag(&self, stage: &'static str, seconds: f64) {
        self.stage_lag.record(&self.label, stage, seconds);
    }

    /// How long, in seconds, an event took for a stage of its path.
    pub fn record_stage_seconds(&self, stage: &'static str, seconds: f64) {
        self.stage_seconds.record(&self.label, stage, seconds);
    }

    /// A batch was closed and leaves.
    pub fn batch_closed(&self, batch: BatchClosed) {
        self.batches.count(batch.trigger);
        self.raw_bytes.fetch_add(batch.raw as u64, Relaxed);
        self.wire_bytes.fetch_add(batch.wire as u64, Relaxed);
        let [items, bytes, ratio] = self.batches_closed.get_or_init(|| {
            [&self.batch_items, &self.batch_bytes, &self.compression_ratio]
                .map(|histogram| histogram.bind(std::slice::from_ref(&self.label)))
        });
        items.record(batch.items as f64);
        bytes.record(batch.wire as f64);
        ratio.record(batch.raw as f64 / batch.wire.max(1) as f64);
    }

    /// A canary of this cache was acked, so many seconds after it was produced.
    pub fn canary_acked(&self, cache: &str, seconds: f64) {
        let cache = KeyValue::new("cache", cache.to_owned());
        self.canary_lag.record(seconds, &[self.label.clone(), cache]);
    }

    pub(super) fn batches(&self) -> &Tally {
        &self.batches
    }

    pub(super) fn raw_bytes(&self) -> u64 {
        self.raw_bytes.load(Relaxed)
    }

    pub(super) fn wire_bytes(&self) -> u64 {
        self.wire_bytes.load(Relaxed)
    }

    pub(super) fn looked_again(&self) -> &Tally {
        &self.looks_again
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

/// The instruments of the calls to one memcached server.
pub struct MemcachedInstruments {
    labels: [KeyValue; 3],
    calls: Histogram<f64>,
    bound: OnceLock<BoundHistogram<f64>>,
    failures: Counter<u64>,
}

impl MemcachedInstruments {
    /// A call was answered, after this time.
    pub fn call_answered(&self, took: Duration) {
        let calls = self.bound.get_or_init(|| self.calls.bind(&self.labels));
        calls.record(took.as_secs_f64());
    }

    /// A call failed, or got no answer in time.
    pub fn call_failed(&self) {
        self.failures.add(1, &self.labels);
    }
}

/// Counts by name without a lock or an allocation, for the few names that the code itself knows.
#[derive(Default)]
pub(super) struct Tally([(OnceLock<&'static str>, AtomicU64); NAMES]);

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

    /// The same, and zero for each of `names` that was never counted.
    pub(super) fn with_zeros(&self, names: &'static [&'static str]) -> impl Iterator<Item = (&'static str, u64)> {
        let never = |name: &&&'static str| self.counts().all(|(counted, _)| counted != **name);
        let zeros = names.iter().filter(never).map(|name| (*name, 0));
        self.counts().chain(zeros)
    }
}
