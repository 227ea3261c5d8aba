//! One run of one scenario: starts what it needs, lets it happen, reads the accounts, compares, and ends it all.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use evrepl_lab::{Broker, CacheSpec, FlowStatus, Region, TwoRegions, TwoRegionsSpec, flows, wait_until};
use serde::Serialize;

use super::progress::Progress;
use super::readable::{Seen, Watch, watch};
use super::scenario::{Kind, Scenario};
use super::source::Source;
use super::verify;
use crate::latency::Quantiles;
use crate::pace::due;
use crate::processes::{Usage, child_with};
use crate::stop::Stop;

/// Memory of each memcached: nothing of half a million 1 KiB values may be evicted.
const MEMCACHED_MIB: &str = "2048";

/// How often a drain reads the relay's accounts: 100 times in the shortest run, at a cost that doesn't show.
const SAMPLE: Duration = Duration::from_millis(25);

/// Seconds of writing at the same rate before a fixed run is measured: connections, the broker's compiler and the first
/// rebalance are not what it measures.
const WARM_UP: u64 = 5;

/// One in so many writes of a fixed run is watched: 25 000 samples of 500 000 writes, 25 beyond the p99.9.
const WATCH_EVERY: u64 = 20;

/// A relay that finishes nothing for so long has lost what is left.
const STALLED_AFTER: Duration = Duration::from_secs(30);

/// A region that starts on a busy machine is ready within this.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// What one run has shown.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measured {
    /// Events of the run, warm-up not counted.
    pub events: u64,
    /// Values that are not in the other region as they were written.
    pub lost: u64,
    pub evictions: u64,
    pub outcomes: BTreeMap<String, u64>,
    /// From the first to the last outcome.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub events_per_second: Option<f64>,
    /// From the start of the relay's process to its first outcome.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_outcome_seconds: Option<f64>,
    /// From when a write was due to when it was readable in the other region, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<Quantiles>,
    /// The slowest of the writes that were due in each second.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub slowest_ms_by_second: Vec<f64>,
    /// How late the application began its writes, in milliseconds: part of the latency that is not evrepl's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub writer_late_ms: Option<Quantiles>,
    /// CPU seconds, user and system, by process, for a million events.
    pub cpu_seconds_per_million: BTreeMap<&'static str, f64>,
    /// The same by thread of the relay and of the agent.
    pub thread_cpu_seconds_per_million: BTreeMap<&'static str, BTreeMap<String, f64>>,
    /// The most resident memory, in MiB.
    pub peak_rss_mib: BTreeMap<&'static str, f64>,
    /// Everything that should not be: empty in a run that may be believed.
    pub problems: Vec<String>,
}

/// The processes whose cost is counted.
struct Counted {
    pids: Vec<(&'static str, u32)>,
    before: Vec<Usage>,
}

impl Counted {
    fn new(pair: &TwoRegions) -> Counted {
        let memcached = |region: &Region| child_with(&region.cache("sessions").memcached(0).port().to_string());
        let mut pids = vec![
            ("agent", evrepl(&pair.eu)),
            ("broker", child_with("kafka.Kafka")),
            ("memcached of the relay", memcached(&pair.us)),
            ("memcached of the agent", memcached(&pair.eu)),
        ];
        // In a drain the relay doesn't run yet; then all it ever uses counts.
        if pair.us.is_running() {
            pids.push(("relay", evrepl(&pair.us)));
        }
        let before = pids.iter().map(|(_, pid)| Usage::of(*pid)).collect();
        Counted { pids, before }
    }

    fn since_its_start(&mut self, name: &'static str, pid: u32) {
        self.pids.push((name, pid));
        self.before.push(Usage::default());
    }

    /// What was used since the beginning, into `measured`.
    fn read(&self, measured: &mut Measured, events: u64) {
        let million = events as f64 / 1e6;
        for ((name, pid), before) in self.pids.iter().zip(&self.before) {
            let used = Usage::of(*pid).since(before);
            measured
                .cpu_seconds_per_million
                .insert(name, used.cpu_seconds / million);
            let mib = used.peak_rss_bytes as f64 / f64::from(1 << 20);
            measured.peak_rss_mib.insert(name, mib);
            if matches!(*name, "relay" | "agent") {
                let threads = used.threads.into_iter().map(|(name, cpu)| (name, cpu / million));
                measured.thread_cpu_seconds_per_million.insert(name, threads.collect());
            }
        }
    }
}

fn evrepl(region: &Region) -> u32 {
    child_with(&region.config_path().to_string_lossy())
}

/// Runs `scenario` once on `broker`. `None` when somebody asked to stop.
///
/// # Panics
/// When something doesn't start, or breaks.
pub fn run(broker: &Broker, scenario: &Scenario, stop: &Stop) -> Option<Measured> {
    let pair = build(broker, scenario);
    pair.eu.start();
    ready(&pair.eu);
    let (mut measured, written) = match scenario.kind {
        Kind::Drain => drain(&pair, scenario, stop)?,
        Kind::Fixed => fixed(&pair, scenario, stop)?,
    };
    let flow = pair.us.flow(pair.eu.name());
    measured.problems.extend(verify::accounts(&flow, written));
    measured.outcomes = flow.outcomes;
    measured.lost = verify::lost(&pair.eu, written, scenario.value_bytes);
    if measured.lost > 0 {
        let lost = format!("{} of {written} values are not as they were written", measured.lost);
        measured.problems.push(lost);
    }
    measured.evictions = verify::evictions(&pair.us) + verify::evictions(&pair.eu);
    if measured.evictions > 0 {
        let evicted = format!("{} values were evicted: more memory is needed", measured.evictions);
        measured.problems.push(evicted);
    }
    Some(measured)
}

fn build(broker: &Broker, scenario: &Scenario) -> TwoRegions {
    let cache = CacheSpec::new("sessions")
        .partitions(scenario.partitions)
        .memcached_args(&["-m", MEMCACHED_MIB]);
    let (us, eu) = (broker.client(), broker.client());
    TwoRegionsSpec::new()
        .one_way()
        .cache(cache)
        .extra(&scenario.settings)
        .us(move |builder| builder.kafka(&us))
        .eu(move |builder| builder.kafka(&eu))
        .build()
}

fn ready(region: &Region) {
    wait_until(&format!("{} is ready", region.name()), READY_WITHIN, || {
        assert!(
            region.is_running(),
            "evrepl of {} ended:\n{}",
            region.name(),
            region.log_tail(60)
        );
        matches!(region.get("/readyz"), Ok((200, _)))
    });
}

/// The relay's flow, when it answers.
fn asked(pair: &TwoRegions) -> Option<FlowStatus> {
    let status = pair.us.try_status()?;
    flows(&status).ok()?.into_iter().next()
}

fn drain(pair: &TwoRegions, scenario: &Scenario, stop: &Stop) -> Option<(Measured, u64)> {
    let events = scenario.events;
    {
        let mut progress = Progress::new("written, the relay stopped", events);
        Source::new(&pair.us, scenario.value_bytes).fill(0..events, |done| {
            progress.at(done);
            stop.asked()
        });
    }
    if stop.asked() {
        return None;
    }
    let mut counted = Counted::new(pair);
    let started = Instant::now();
    pair.us.spawn();
    counted.since_its_start("relay", evrepl(&pair.us));
    let mut progress = Progress::new("drained", events);
    let mut measured = Measured {
        events,
        ..Measured::default()
    };
    // The first sample with an outcome: events after it over the time after it, so how many it holds does no harm.
    let mut first: Option<(Instant, u64)> = None;
    let (mut last, mut moved) = (0, Instant::now());
    while last < events {
        if stop.wait(SAMPLE) {
            return None;
        }
        assert!(pair.us.is_running(), "the relay has ended:\n{}", pair.us.log_tail(60));
        let finished = asked(pair).map_or(last, |flow| flow.finished());
        let now = Instant::now();
        if finished > last {
            (last, moved) = (finished, now);
            if first.is_none() {
                first = Some((now, finished));
                measured.first_outcome_seconds = Some((now - started).as_secs_f64());
            }
        } else if now - moved > STALLED_AFTER + READY_WITHIN * u32::from(first.is_none()) {
            measured.problems.push(format!("stalled at {last} of {events}"));
            break;
        }
        progress.at(last);
    }
    if let Some((at, count)) = first.filter(|(at, _)| *at < moved) {
        measured.events_per_second = Some((last - count) as f64 / (moved - at).as_secs_f64());
    }
    counted.read(&mut measured, events);
    Some((measured, events))
}

fn fixed(pair: &TwoRegions, scenario: &Scenario, stop: &Stop) -> Option<(Measured, u64)> {
    let (events, rate) = (scenario.events, scenario.rate);
    pair.us.start();
    ready(&pair.us);
    let mut source = Source::new(&pair.us, scenario.value_bytes);
    let warm_up = WARM_UP * rate;
    {
        let mut progress = Progress::new("written to warm up", warm_up);
        source.open_loop(0..warm_up, rate, Instant::now(), |done| {
            progress.at(done);
            stop.asked()
        });
    }
    finished(pair, warm_up, "warmed up", stop)?;

    let counted = Counted::new(pair);
    let own_before = Usage::of(std::process::id());
    let give_up = Arc::new(AtomicBool::new(false));
    // A moment for the threads to start in; nothing is due before.
    let start = Instant::now() + Duration::from_millis(100);
    let watched = Watch {
        first: warm_up,
        count: events,
        rate,
        every: WATCH_EVERY,
        start,
    };
    let (mut client, over) = (pair.eu.cache("sessions").client(), Arc::clone(&give_up));
    let reader = thread::Builder::new()
        .name("load-reader".into())
        .spawn(move || (watch(&mut client, watched, &over), own_thread_cpu("load-reader")))
        .expect("a thread for the reader");
    let (writes, stopped) = (warm_up..warm_up + events, stop.clone());
    let mut progress = Progress::new("written at the fixed rate", events);
    let writer = thread::Builder::new()
        .name("load-writer".into())
        .spawn(move || {
            let late = source.open_loop(writes, rate, start, |done| {
                progress.at(done);
                stopped.asked()
            });
            let cpu = own_thread_cpu("load-writer");
            // The producer's own threads end with it, and their part of the account with them.
            let rdkafka = Usage::of(std::process::id()).since(&own_before).of_threads("rdk:");
            (late, cpu + rdkafka)
        })
        .expect("a thread for the writer");
    let (late, writer_cpu) = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let settled = finished(pair, warm_up + events, "replicated", stop);
    let mut measured = Measured {
        events,
        ..Measured::default()
    };
    // Read before the reader ends, which it does only when the last watched value has been seen.
    counted.read(&mut measured, events);
    give_up.store(true, Ordering::Relaxed);
    let (seen, reader_cpu): (Seen, f64) = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    settled?;
    let million = events as f64 / 1e6;
    measured.cpu_seconds_per_million.insert("writer", writer_cpu / million);
    measured.cpu_seconds_per_million.insert("reader", reader_cpu / million);
    if seen.missing > 0 {
        let missing = format!("{} watched values never became readable", seen.missing);
        measured.problems.push(missing);
    }
    let last_due = start + due(events, rate);
    let ended = seen.last.map_or(last_due, |last| last.max(last_due));
    measured.events_per_second = Some(events as f64 / (ended - start).as_secs_f64());
    measured.latency_ms = Some(seen.latencies.quantiles());
    measured.slowest_ms_by_second = seen.slowest_by_second;
    measured.writer_late_ms = Some(late.quantiles());
    Some((measured, warm_up + events))
}

/// CPU seconds of this process's thread of that name, as it is now.
fn own_thread_cpu(name: &str) -> f64 {
    Usage::of(std::process::id()).of_threads(name)
}

/// Waits until the relay has finished `events`; `None` when somebody asked to stop. One that stalls is left to the accounts.
fn finished(pair: &TwoRegions, events: u64, what: &str, stop: &Stop) -> Option<()> {
    let mut progress = Progress::new(what, events);
    let (mut last, mut moved) = (0, Instant::now());
    while last < events && moved.elapsed() < STALLED_AFTER {
        assert!(pair.us.is_running(), "the relay has ended:\n{}", pair.us.log_tail(60));
        let now = asked(pair).map_or(last, |flow| flow.finished());
        if now > last {
            (last, moved) = (now, Instant::now());
        }
        progress.at(last);
        if stop.wait(SAMPLE) {
            return None;
        }
    }
    Some(())
}
