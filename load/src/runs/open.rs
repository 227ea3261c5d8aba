//! An open loop: writes come at a rate, whatever becomes of them, and the relay's accounts are read while they do.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::costs::Costs;
use super::generate::child::Generator;
use super::generate::readable::Seen;
use super::generate::{OpenLoop, Wrote};
use super::lag::{Lag, Thirds, flat};
use super::measured::Measured;
use super::progress::Progress;
use super::scenario::{Kind, Scenario};
use super::trial::STALLED_AFTER;
use super::world::{Totals, World};
use crate::pace::due_by;
use crate::stop::Stop;

/// Before the first write is due: the generator and this process have heard of it by then.
const AHEAD: Duration = Duration::from_millis(200);

/// How often the relay's accounts are read.
const SAMPLE: Duration = Duration::from_millis(250);

/// How many writes a second are watched: enough for a p99.9 of ten seconds, and no load of their own.
const WATCHED: u64 = 1_000;

/// But never more than every so many-th: at low rates the questions would outnumber the writes.
const LEAST_EVERY: u64 = 4;

/// Below this rate the generator wakes four times as often: there, time is what is measured, and above it CPU.
const CALM: u64 = 60_000;
const CALM_TICK: Duration = Duration::from_micros(250);
const TICK: Duration = Duration::from_millis(1);

/// A lag of so many seconds will not shrink any more within a run.
const HOPELESS: f64 = 5.0;

/// Writes at a rate for a time.
#[derive(Clone, Copy, Debug)]
pub struct Paced {
    pub rate: u64,
    pub warm_up_seconds: u64,
    pub seconds: u64,
    /// Ends early once the lag has become hopeless.
    pub impatient: bool,
}

/// What was seen of it.
#[derive(Debug)]
pub struct Observed {
    pub seen: Seen,
    pub wrote: Wrote,
    /// Outcomes in the measured time, and how long that was.
    pub finished: u64,
    pub took: Duration,
    pub lag: Option<Lag>,
    pub measured: Measured,
}

/// Runs an open loop and waits until everything has come. `None` when somebody asked to stop.
pub fn observe(
    world: &World<'_>,
    generator: &mut Generator,
    paced: Paced,
    what: &str,
    stop: &Stop,
) -> Option<Observed> {
    let Paced { rate, seconds, .. } = paced;
    let (flows, first) = (world.peers.len() as u64, generator.written());
    let (warm_up, count) = (paced.warm_up_seconds * rate, seconds * rate);
    let start = Instant::now() + AHEAD;
    let start_unix = SystemTime::now() + AHEAD;
    generator.open_loop(OpenLoop {
        first,
        start_unix_nanos: start_unix.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64,
        rate,
        warm_up,
        count,
        watch_every: (rate / WATCHED).max(LEAST_EVERY),
        tick_micros: tick(rate).as_micros() as u64,
    });
    let begin = start + Duration::from_secs(paced.warm_up_seconds);
    let end = begin + Duration::from_secs(seconds);
    let mut progress = Progress::new(what, warm_up + count);
    let mut measured = Measured {
        rate: Some(rate),
        ..Measured::default()
    };
    let mut window: Option<(Costs, Instant, u64)> = None;
    let mut rss: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
    let (mut samples, mut finished_in, mut took) = (Vec::new(), 0, Duration::ZERO);
    let mut next = start;
    loop {
        let now = Instant::now();
        if now < next {
            if stop.asked() {
                generator.halt();
                return None;
            }
            generator.listen(next - now);
            continue;
        }
        world.relays_run();
        let Some(totals) = world.totals() else {
            next += SAMPLE;
            continue;
        };
        let now = Instant::now();
        let due = first + due_by(now - start, rate).min(warm_up + count);
        let lag = (due * flows).saturating_sub(totals.finished()) as f64 / (rate * flows) as f64;
        samples.push(((now - start).as_secs_f64(), lag));
        progress.at(due - first);
        if let Some((costs, _, _)) = window.as_ref().filter(|_| samples.len() % 4 == 0) {
            for (role, mib) in costs.rss_mib() {
                rss.entry(role).or_default().push(mib);
            }
        }
        if window.is_none() && now >= begin {
            window = Some((Costs::begin(world, generator), now, totals.finished()));
        }
        let hopeless = paced.impatient && lag > HOPELESS;
        if now >= end || hopeless {
            if let Some((costs, at, before)) = &window {
                (finished_in, took) = (totals.finished() - before, now - *at);
                costs.read(&mut measured, finished_in);
            }
            if hopeless {
                generator.halt();
            }
            break;
        }
        // The window's ends are met exactly.
        next += SAMPLE;
        for edge in [begin, end] {
            if next > edge && now < edge {
                next = edge;
            }
        }
    }
    drop(progress);
    let wrote = wrote(generator, stop)?;
    await_finished(world, wrote.written * flows, "replicated", stop)?;
    let seen = seen(generator, stop)?;
    let (from, to) = ((begin - start).as_secs_f64(), (end - start).as_secs_f64());
    let latency = Thirds {
        first: seen.thirds_p50_ms[0] / 1e3,
        last: seen.thirds_p50_ms[1] / 1e3,
    };
    // Ended early: it has grown as far as that.
    let grown = Thirds {
        first: 0.0,
        last: samples.last().map_or(0.0, |(_, lag)| *lag),
    };
    let early = samples.last().is_some_and(|(at, _)| *at < to);
    let thirds = if early {
        Some(grown)
    } else {
        Thirds::of(&samples, from, to)
    };
    measured.rss_is_flat = rss.iter().filter_map(|(role, mib)| Some((*role, flat(mib)?))).collect();
    measured.rss_mib_by_second = rss;
    Some(Observed {
        seen,
        wrote,
        finished: finished_in,
        took,
        lag: thirds.map(|seconds| Lag::new(seconds, latency)),
        measured,
    })
}

/// One measured open loop. `None` when somebody asked to stop.
pub fn open(world: &World<'_>, generator: &mut Generator, scenario: &Scenario, stop: &Stop) -> Option<(Measured, u64)> {
    let paced = Paced {
        rate: scenario.rate,
        warm_up_seconds: scenario.warm_up_seconds,
        seconds: scenario.seconds,
        impatient: false,
    };
    let what = format!("written, {} a second", scenario.rate);
    let observed = observe(world, generator, paced, &what, stop)?;
    let written = observed.wrote.written;
    let mut measured = observed.into_measured();
    match measured.lag {
        Some(lag) if lag.grows && scenario.kind == Kind::Sustained => measured.problems.push(format!(
            "the lag grows: from {:.2} s in the first third to {:.2} s in the last, latency from {:.2} s to {:.2} s",
            lag.seconds.first, lag.seconds.last, lag.latency_seconds.first, lag.latency_seconds.last
        )),
        None => measured
            .problems
            .push("the relay did not answer while it was measured".into()),
        _ => {}
    }
    for (role, _) in measured.rss_is_flat.iter().filter(|(_, flat)| !**flat) {
        measured.problems.push(format!("the memory of the {role} grows"));
    }
    Some((measured, written))
}

impl Observed {
    pub fn into_measured(self) -> Measured {
        let mut measured = self.measured;
        measured.events = self.finished;
        if self.took > Duration::ZERO {
            measured.events_per_second = Some(self.finished as f64 / self.took.as_secs_f64());
        }
        measured.lag = self.lag;
        measured.latency_ms = Some(self.seen.latency_ms);
        measured.latency_ms_by_second = self.seen.by_second_ms;
        measured.writer_late_ms = Some(self.wrote.late_ms);
        if self.seen.missing > 0 {
            let missing = format!("{} watched values never became readable", self.seen.missing);
            measured.problems.push(missing);
        }
        measured
    }
}

fn tick(rate: u64) -> Duration {
    if rate <= CALM { CALM_TICK } else { TICK }
}

fn wrote(generator: &mut Generator, stop: &Stop) -> Option<Wrote> {
    loop {
        if let Some(wrote) = generator.wrote() {
            return Some(wrote);
        }
        if stop.asked() {
            return None;
        }
        generator.listen(SAMPLE);
    }
}

/// Asks for what is still missing once more if it has not come by now: everything that came has its outcome.
fn seen(generator: &mut Generator, stop: &Stop) -> Option<Seen> {
    let patience = Instant::now() + Duration::from_secs(2);
    let mut halted = false;
    loop {
        if let Some(seen) = generator.seen() {
            return Some(seen.clone());
        }
        if stop.asked() {
            return None;
        }
        if !halted && Instant::now() >= patience {
            generator.halt();
            halted = true;
        }
        generator.listen(SAMPLE);
    }
}

/// Waits until the relays have finished `events`; `None` when somebody asked to stop. What stalls is left to the accounts.
pub fn await_finished(world: &World<'_>, events: u64, what: &str, stop: &Stop) -> Option<Totals> {
    let mut progress = Progress::new(what, events);
    let (mut last, mut moved) = (Totals::default(), Instant::now());
    while last.finished() < events && moved.elapsed() < STALLED_AFTER {
        world.relays_run();
        if let Some(now) = world.totals().filter(|now| now.finished() > last.finished()) {
            (last, moved) = (now, Instant::now());
        }
        progress.at(last.finished());
        if stop.wait(Duration::from_millis(25)) {
            return None;
        }
    }
    Some(last)
}
