//! One run of the lab: everything is started, broken, healed, and checked.

use std::fs;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use evrepl::outcome::Outcome;

use super::accounts::{Accounts, memory_limit, name_of, sample};
use super::caches::BROKEN;
use super::catalogue::{Fault, Side, Sums};
use super::history::{Held, History, Key, check};
use super::load::{Load, LoadControl, tell_servers};
use super::said;
use super::watcher::{Arrival, Watched, Watchers};
use super::world::{CACHE, Setup, World};
use crate::place::target;
use crate::region::{flow_sums, settled_within};
use crate::wait::holds_within;

/// Load before the fault and after it: the fault shall meet a stream that flows, and leave one that has to flow again.
const AROUND: Duration = Duration::from_millis(1_500);

/// How long it is watched after it has caught up: what an abandoned connection still holds would come within this.
const AFTERWARDS: Duration = Duration::from_millis(500);

/// What a run consists of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// As the table calls it.
    pub name: String,
    /// Played at the same time.
    pub faults: Vec<&'static Fault>,
    /// How long the fault lasts, as far as the fault itself doesn't take longer.
    pub time: Duration,
    pub seed: u64,
    /// How long it may take to catch up.
    pub settle_within: Duration,
    /// A last change to what is started.
    pub change: fn(&mut Setup),
}

impl Plan {
    /// A fault in its long form.
    pub fn long(fault: &'static Fault, seed: u64) -> Plan {
        Plan {
            name: fault.name.into(),
            faults: vec![fault],
            time: Duration::from_secs(fault.seconds),
            seed,
            settle_within: Duration::from_secs(120),
            change: |_| {},
        }
    }

    /// A fault in its short form.
    pub fn short(fault: &'static Fault, seed: u64) -> Plan {
        Plan {
            time: Duration::from_secs(fault.short_seconds),
            settle_within: Duration::from_secs(60),
            ..Plan::long(fault, seed)
        }
    }

    /// Two faults together, for as long as the shorter of them lasts and 20 s at most.
    pub fn two(faults: [&'static Fault; 2], short: bool, seed: u64) -> Plan {
        let [one, other] = faults.map(|fault| {
            if short {
                Plan::short(fault, seed)
            } else {
                Plan::long(fault, seed)
            }
        });
        Plan {
            name: format!("{} + {}", one.name, other.name),
            faults: faults.to_vec(),
            time: one.time.min(other.time).min(Duration::from_secs(20)),
            ..one
        }
    }
}

/// How the keys of the servers that were not broken fared during the fault.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Others {
    /// Keys written once that arrived, per second.
    pub per_second: f64,
    /// From memcached's answer at the source until the reader saw it at the destination, in milliseconds.
    pub p50_ms: f64,
    pub p99_ms: f64,
}

/// A line of the table.
#[derive(Clone, Debug, Default)]
pub struct Row {
    pub name: String,
    pub events: u64,
    /// How long the fault lasted, in seconds.
    pub seconds: f64,
    pub lost: u64,
    pub steps_back: u64,
    pub parked: u64,
    /// From the fault's end until everything written before that had arrived, in seconds; `None`: it never did.
    pub catch_up: Option<f64>,
    /// Of the process that came closest to its limit, in bytes, and that limit.
    pub peak: u64,
    pub limit: u64,
    pub others: Option<Others>,
    /// What was wrong, in words; empty when nothing was.
    pub problems: Vec<String>,
}

/// What a run shows of itself while it goes on.
#[derive(Debug, Default)]
pub struct Live {
    stage: Mutex<&'static str>,
    load: Mutex<Arc<LoadControl>>,
}

impl Live {
    /// What happens, and how many writes there were.
    pub fn now(&self) -> (&'static str, u64) {
        let load = self.load.lock().unwrap_or_else(PoisonError::into_inner);
        let stage = *self.stage.lock().unwrap_or_else(PoisonError::into_inner);
        (stage, load.writes.load(Relaxed))
    }

    fn stage(&self, stage: &'static str) {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner) = stage;
    }

    fn show(&self, load: &Arc<LoadControl>) {
        *self.load.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(load);
    }
}

/// Runs it. What goes wrong is in the row, also when a part of the lab itself fails.
pub fn run(plan: &Plan, live: &Live) -> Row {
    let row = catch_unwind(AssertUnwindSafe(|| run_or_panic(plan, live)));
    row.unwrap_or_else(|panic| Row {
        name: plan.name.clone(),
        problems: vec![said(&*panic)],
        ..Row::default()
    })
}

/// Sets the flag also when a panic ends the scope: whoever waits for it must not wait for ever.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// What came out of a run, before it is judged.
struct Played {
    history: History,
    watched: Vec<Watched>,
    /// When the fault began and when it had been healed.
    fault: (Instant, Instant),
    problems: Vec<String>,
}

fn run_or_panic(plan: &Plan, live: &Live) -> Row {
    let mut setup = Setup::default();
    for fault in &plan.faults {
        (fault.setup)(&mut setup);
    }
    (plan.change)(&mut setup);
    live.show(&Arc::default());
    live.stage("starting");
    let world = World::start(&setup);
    live.show(&world.load);
    let limits: Vec<(String, u64)> = (world.all().iter())
        .map(|region| {
            (
                name_of(region),
                memory_limit(region).unwrap_or_else(|error| panic!("{error}")),
            )
        })
        .collect();
    let ended = AtomicBool::new(false);
    let all = world.all();
    let (played, accounts) = thread::scope(|scope| {
        let sampler = scope.spawn(|| sample(&all, &ended));
        let ends = Ends(&ended);
        let played = play(plan, &setup, &world, live);
        drop(ends);
        (played, sampler.join().unwrap_or_default())
    });
    live.stage("comparing");
    let row = judge(plan, &world, played, &accounts, &limits);
    if !row.problems.is_empty() {
        keep_logs(&row, &world);
    }
    row
}

fn play(plan: &Plan, setup: &Setup, world: &World, live: &Live) -> Played {
    let (watchers, senders) = Watchers::start(world.agent().cache(CACHE), setup.load);
    let tell = tell_servers(Arc::clone(world.agent().cache(CACHE)), senders);
    // New partitions are written to soon after they are there.
    let refreshing = [("topic.metadata.refresh.interval.ms", "500")];
    let writer = world.relay().writer_with(CACHE, &refreshing);
    let load = Load::start(setup.load, plan.seed, Arc::clone(&world.load), writer, tell);
    live.stage("load");
    world.wait_for_the_stream();
    world.hold(AROUND);
    live.stage("fault");
    let begun = Instant::now();
    let mut problems: Vec<String> = thread::scope(|scope| {
        let playing: Vec<_> = plan
            .faults
            .iter()
            .map(|fault| scope.spawn(|| (fault.play)(world, plan.time)))
            .collect();
        let ended = playing
            .into_iter()
            .map(|fault| fault.join().unwrap_or_else(|panic| Err(said(&*panic))));
        ended.filter_map(Result::err).collect()
    });
    let healed = Instant::now();
    live.stage("healed");
    world.hold(AROUND);
    // Without a history nothing can be judged: the run has failed, whatever the product did.
    let history = load
        .finish()
        .unwrap_or_else(|error| panic!("{}", [problems.join("\n"), error].join("\n")));
    live.stage("catching up");
    if let Err(error) = settled_within(&world.running(), plan.settle_within) {
        problems.push(error);
    }
    world.hold(AFTERWARDS);
    Played {
        history,
        watched: watchers.finish(),
        fault: (begun, healed),
        problems,
    }
}

fn judge(plan: &Plan, world: &World, played: Played, accounts: &Accounts, limits: &[(String, u64)]) -> Row {
    let Played {
        history,
        watched,
        fault: (begun, healed),
        mut problems,
    } = played;
    let lost = lost(world, &history, &mut problems);
    let mut steps_back = 0;
    for (server, watched) in watched.iter().enumerate() {
        let violations = check(&history, &watched.sightings, &world.wipes(server));
        steps_back += violations.len() as u64;
        problems.extend(violations.iter().take(5).map(ToString::to_string));
        if watched.looks < 10 {
            problems.push(format!(
                "the reader of server {server} looked {} times only",
                watched.looks
            ));
        }
    }
    if accounts.samples < 10 {
        problems.push(format!("only {} samples of /status", accounts.samples));
    }
    problems.extend(accounts.wrong.iter().cloned());
    let lost_sums = world.sums_are_lost().then_some(Sums::Committed);
    let sums = plan.faults.iter().map(|fault| fault.sums).chain(lost_sums).max();
    let sums = sums.unwrap_or(Sums::Exact);
    problems.extend(compare_with_kafka(world, sums));
    let poison = world.load.poison.load(Relaxed);
    let buried = accounts.outcome(Outcome::DeadLettered);
    // What is consumed, or said, once more is also buried once more.
    let once = sums == Sums::Exact && !world.was_replaced() && world.load.renewals.load(Relaxed) == 0;
    if buried < poison || (buried > poison && once) {
        problems.push(format!("{poison} records were no events, {buried} were dead-lettered"));
    }
    let (peak, limit) = closest(accounts, limits);
    if peak > limit {
        problems.push(format!(
            "{} MiB of memory, but {} is the limit",
            peak >> 20,
            limit >> 20
        ));
    }
    let arrivals = || watched.iter().flat_map(|watched| &watched.arrivals);
    let before = |written: Instant| written <= healed;
    let last = arrivals()
        .filter(|arrival| before(arrival.written))
        .map(|arrival| arrival.seen)
        .max();
    // Beside a second fault nobody knows whose it is that the others feel.
    let isolated = match plan.faults[..] {
        [only] => only.isolated,
        _ => None,
    };
    Row {
        name: plan.name.clone(),
        events: history.writes() + poison,
        seconds: (healed - begun).as_secs_f64(),
        lost,
        steps_back,
        parked: accounts.outcome(Outcome::Parked),
        catch_up: last
            .filter(|_| lost == 0)
            .map(|last| last.saturating_duration_since(healed).as_secs_f64()),
        peak,
        limit,
        others: isolated.map(|side| others(world, side, &watched, begun..healed)),
        problems,
    }
}

/// How many keys are not in the destination what they are in the source, and what was last written.
fn lost(world: &World, history: &History, problems: &mut Vec<String>) -> u64 {
    // In pieces: values may be large.
    const PIECE: usize = 500;
    let mut clients = [world.relay(), world.agent()].map(|region| region.cache(CACHE).client());
    let (mut lost, mut unwritten) = (0, 0);
    for keys in history.keys().chunks(PIECE) {
        let names: Vec<String> = keys.iter().map(Key::to_string).collect();
        let [source, destination] = clients.each_mut().map(|client| {
            let found = client.get_many(&names);
            found.unwrap_or_else(|error| panic!("comparing the regions: {error}"))
        });
        for ((key, source), destination) in keys.iter().zip(source).zip(destination) {
            let [here, there] = [&source, &destination]
                .map(|found| Held::from(*key, found.as_ref().map(|(value, _)| value.as_slice())));
            let wanted = history.last(*key).map_or(Held::Nothing, Held::Version);
            if here != wanted {
                unwritten += 1;
            }
            if there != wanted || source != destination {
                lost += 1;
                if lost <= 5 {
                    problems.push(format!("{key} should be {wanted:?}, is {there:?} at the destination"));
                }
            }
        }
    }
    if unwritten > 0 {
        problems.push(format!(
            "{unwritten} keys are not in the source what was written: the lab is at fault"
        ));
    }
    for region in [world.relay(), world.agent()] {
        for server in &region.cache(CACHE).servers {
            let stats = server.memcached.client().stats().unwrap_or_default();
            if stats.get("evictions").is_none_or(|evictions| evictions != "0") {
                problems.push(format!(
                    "{} of {} has evicted values: the lab is at fault",
                    server.address,
                    region.name()
                ));
            }
        }
    }
    lost
}

/// Whether what the processes consumed is what Kafka's offsets say.
fn compare_with_kafka(world: &World, sums: Sums) -> Vec<String> {
    let running = world.running();
    // Committed once a second.
    let whole = || flow_sums(&running).iter().all(|flow| flow.committed == flow.produced);
    let _ = holds_within(Duration::from_secs(10), whole);
    let mut wrong = Vec::new();
    for flow in flow_sums(&running) {
        if flow.committed != flow.produced {
            wrong.push(format!(
                "{}: {} records, but {} are committed",
                flow.flow, flow.produced, flow.committed
            ));
        }
        let own = flow.produced - world.began_at(&flow.flow).min(flow.produced);
        let right = match sums {
            Sums::Exact => flow.consumed == own,
            Sums::AtLeast => flow.consumed >= own,
            Sums::Committed => true,
        };
        if !right {
            wrong.push(format!("{}: consumed {} of {own} records", flow.flow, flow.consumed));
        }
    }
    wrong
}

/// Peak and limit of the process that came closest to its limit.
fn closest(accounts: &Accounts, limits: &[(String, u64)]) -> (u64, u64) {
    let of = |(name, limit): &(String, u64)| accounts.peaks.get(name).map(|peak| (*peak, *limit));
    let share = |(peak, limit): &(u64, u64)| peak * 1_000 / (*limit).max(1);
    limits.iter().filter_map(of).max_by_key(share).unwrap_or_default()
}

fn others(world: &World, side: Side, watched: &[Watched], fault: Range<Instant>) -> Others {
    let cache = match side {
        Side::Source => world.relay().cache(CACHE),
        Side::Destination => world.agent().cache(CACHE),
    };
    let whole = |arrival: &&Arrival| cache.server_of(Key::Once(arrival.key).to_string().as_bytes()) != BROKEN;
    let arrivals = watched.iter().flat_map(|watched| &watched.arrivals).filter(whole);
    let during: Vec<&Arrival> = arrivals.filter(|arrival| fault.contains(&arrival.written)).collect();
    let arrived = during.iter().filter(|arrival| arrival.seen <= fault.end).count();
    let mut times: Vec<f64> = during
        .iter()
        .map(|arrival| (arrival.seen - arrival.written).as_secs_f64() * 1e3)
        .collect();
    times.sort_unstable_by(f64::total_cmp);
    let quantile = |share: f64| times.get(((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1)));
    Others {
        per_second: arrived as f64 / (fault.end - fault.start).as_secs_f64(),
        p50_ms: quantile(0.5).copied().unwrap_or(f64::NAN),
        p99_ms: quantile(0.99).copied().unwrap_or(f64::NAN),
    }
}

/// Logs and last statuses of a run that went wrong, in `target/faults/`.
fn keep_logs(row: &Row, world: &World) {
    let folder = target().join("faults").join(row.name.replace([' ', '+'], "_"));
    let keep = || -> std::io::Result<()> {
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("problems.txt"), row.problems.join("\n"))?;
        for region in world.all() {
            let name = format!("{}-{}", region.name(), region.node());
            fs::write(folder.join(format!("{name}.log")), region.log())?;
            let status = region.try_status().unwrap_or_default();
            fs::write(folder.join(format!("{name}.json")), format!("{status:#}"))?;
        }
        Ok(())
    };
    if let Err(error) = keep() {
        eprintln!("cannot keep the logs in {}: {error}", folder.display());
    }
}
