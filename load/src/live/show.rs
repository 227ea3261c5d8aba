//! The demo from its beginning to its end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use evrepl::outcome::Outcome;
use evrepl::writer::Writer;
use evrepl_lab::{Region, flows};
use serde::Serialize;
use tokio::runtime::Runtime;

use super::application::{Application, Shared, write_first};
use super::compare::{Compared, compare};
use super::jaeger::{self, Jaeger};
use super::ledger::sequence_of;
use super::screen::{Numbers, Screen};
use super::watcher::{OVERDUE, Watcher};
use super::world::{CACHE, World};
use crate::runs::table::grouped;
use crate::stop::Stop;

/// The first write of each direction waits for consumer groups to form and links to open.
const CONNECTED_WITHIN: Duration = Duration::from_secs(60);

/// What is still under way after the last write has lost its way when nothing moves for so long.
const STALLED_AFTER: Duration = Duration::from_secs(20);

/// What the demo was asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long it writes; `None`: until somebody asks to stop.
    pub time: Option<Duration>,
    /// Writes a second in each region, beside the probes.
    pub rate: u64,
    /// Where the numbers go as JSON.
    pub json: Option<PathBuf>,
    /// Whether Jaeger's page stays up after the summary, until somebody asks to stop.
    pub stay: bool,
}

/// What came of it. As JSON, this is what `--json` writes.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub writes: u64,
    pub replicated: u64,
    pub lost: u64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    #[serde(skip)]
    probes: u64,
    #[serde(skip)]
    compared: Compared,
    #[serde(skip)]
    failures: Vec<String>,
    #[serde(skip)]
    took: Duration,
}

impl Summary {
    /// Whether every write is in both regions.
    pub fn is_right(&self) -> bool {
        self.lost == 0 && self.failures.is_empty()
    }

    fn print(&self) {
        let count = |number: u64| grouped(number as f64, 0);
        println!();
        println!(
            "{} writes (sets, touches, deletes) in {:.0} s, in two regions",
            count(self.writes),
            self.took.as_secs_f64()
        );
        println!("  replicated  {}", count(self.replicated));
        println!("  lost        {}", count(self.lost));
        println!(
            "  end to end  p50 {:.1} ms, p99 {:.1} ms ({} probes, from just before a write to readable in the other memcached)",
            self.p50_ms,
            self.p99_ms,
            count(self.probes)
        );
        let verdict = match self.compared.different {
            0 => "all equal".to_string(),
            different => format!("{} are different", count(different)),
        };
        println!(
            "  compared    {} keys in both regions (values, flags, absence; expiry where touched): {verdict}",
            count(self.compared.keys)
        );
        if let Some(first) = &self.compared.first {
            println!("              the first: {first}");
        }
        for failure in &self.failures {
            println!("  {failure}");
        }
    }
}

/// Runs the demo. `None` when somebody asked to stop before it had begun.
///
/// # Errors
/// What didn't start or has broken, in words.
pub fn run(options: &Options, stop: &Stop) -> Result<Option<Summary>, String> {
    println!("starting two regions: memcached, Kafka (embedded) and evrepl for each");
    // Traces are a sight, not what is tested here: the demo goes on without them.
    let jaeger = Jaeger::start()
        .inspect(|jaeger| println!("traces appear at {} (Jaeger, embedded)", jaeger.page()))
        .inspect_err(|error| println!("no traces: Jaeger's page does not start: {error}"))
        .ok();
    let traced = jaeger
        .as_ref()
        .map(|jaeger| (jaeger.endpoint(), jaeger::ratio(options.rate)));
    let Some(world) = World::start(stop, traced)? else {
        return Ok(None);
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Two, as the machine's cores have four busy processes beside them.
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| format!("no runtime to write from: {error}"))?;
    let stage = Stage::new(&world, &runtime)?;
    if !stage.connect(stop)? {
        return Ok(None);
    }
    let summary = stage.play(options, stop)?;
    drop(stage);
    world.end();
    summary.print();
    if let Some(path) = &options.json {
        write_json(path, &summary)?;
    }
    if let Some(jaeger) = &jaeger {
        // Both processes have drained, so every span has been exported.
        print_trace(jaeger);
        if options.stay {
            println!("\nJaeger's page stays up until Ctrl-C");
            stop.done();
            stop.until_asked();
        }
    }
    Ok(Some(summary))
}

/// The link to the trace of one write that went from one region to the other.
fn print_trace(jaeger: &Jaeger) {
    match jaeger.crossing() {
        Ok(Some(trace)) => println!(
            "  one trace   {} ({}, {} spans, {:.1} ms)",
            jaeger.page_of(&trace),
            trace.regions.join(" -> "),
            trace.spans,
            trace.took.as_secs_f64() * 1e3
        ),
        Ok(None) => println!("  one trace   none has crossed both regions"),
        Err(error) => println!("  one trace   not found: {error}"),
    }
}

fn write_json(path: &Path, summary: &Summary) -> Result<(), String> {
    let text = serde_json::to_string(summary).map_err(|error| error.to_string())?;
    std::fs::write(path, text + "\n").map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// One direction: who writes, and where it should arrive.
struct Direction<'a> {
    own: &'a Region,
    other: &'a Region,
    shared: Arc<Shared>,
    writer: Writer,
}

impl Direction<'_> {
    /// How many of its writes the relay has brought to an end, but never more than were made; `None` when it doesn't answer.
    fn finished(&self) -> Option<u64> {
        let status = self.own.try_status()?;
        let flow = flows(&status).ok()?.into_iter().next()?;
        // Neither of these has reached the other region; a parked event is consumed again, as is a released one.
        let elsewhere = [Outcome::Released, Outcome::Parked, Outcome::DeadLettered];
        Some(flow.finished() - elsewhere.map(|outcome| flow.outcome(outcome)).iter().sum::<u64>())
    }
}

/// Both directions, ready to be played.
struct Stage<'a> {
    world: &'a World,
    runtime: &'a Runtime,
    directions: [Direction<'a>; 2],
}

impl<'a> Stage<'a> {
    fn new(world: &'a World, runtime: &'a Runtime) -> Result<Stage<'a>, String> {
        let [us, eu] = world.regions();
        let direction = |own: &'a Region, other: &'a Region| {
            let path = own.config_path();
            // The demo's own configuration: settings in the environment are somebody else's.
            let config = evrepl::config::load(&path, std::iter::empty()).map_err(|error| error.to_string())?;
            let writer = runtime.block_on(Writer::connect(&config));
            Ok::<_, String>(Direction {
                own,
                other,
                shared: Arc::new(Shared::new(own.name())),
                writer: writer.map_err(|error| format!("the application of {}: {error}", own.name()))?,
            })
        };
        Ok(Stage {
            world,
            runtime,
            directions: [direction(us, eu)?, direction(eu, us)?],
        })
    }

    /// Writes one key in each region and returns when both are in the other one; `false` when somebody asked to stop.
    fn connect(&self, stop: &Stop) -> Result<bool, String> {
        let mut open = Vec::new();
        for direction in &self.directions {
            let first = write_first(&direction.shared, &direction.writer);
            let (number, sequence) = self.runtime.block_on(first);
            let key = direction.shared.ledger.key(number);
            open.push((direction, direction.other.cache(CACHE).client(), key, sequence));
        }
        let deadline = Instant::now() + CONNECTED_WITHIN;
        while !open.is_empty() {
            if stop.wait(Duration::from_millis(20)) {
                return Ok(false);
            }
            self.world.check()?;
            open.retain_mut(|(_, client, key, sequence)| {
                let found = client.get(key).ok().flatten();
                found.and_then(|(value, _)| sequence_of(&value)) != Some(*sequence)
            });
            if let Some((direction, ..)) = open.first().filter(|_| Instant::now() > deadline) {
                return Err(format!(
                    "nothing arrives from {} in {} s; the end of its log:\n{}",
                    direction.own.name(),
                    CONNECTED_WITHIN.as_secs(),
                    direction.own.log_tail(20)
                ));
            }
        }
        Ok(true)
    }

    fn play(&self, options: &Options, stop: &Stop) -> Result<Summary, String> {
        let titles = self
            .directions
            .each_ref()
            .map(|direction| format!("{} -> {}", direction.own.name(), direction.other.name()));
        println!(
            "both regions are connected: {} writes a second in each; lost: not in the other region {} s after the write{}\n",
            options.rate,
            OVERDUE.as_secs(),
            if options.time.is_none() { "; Ctrl-C ends it" } else { "" }
        );
        let watchers = self
            .directions
            .each_ref()
            .map(|direction| Watcher::start(&direction.shared, direction.other.cache(CACHE).client()));
        let applications = {
            let _inside = self.runtime.enter();
            self.directions
                .each_ref()
                .map(|direction| Application::start(&direction.shared, &direction.writer, options.rate))
        };
        let (start, mut screen, mut finished) = (Instant::now(), Screen::new(), [0; 2]);
        let took = loop {
            let took = start.elapsed();
            let over = options.time.is_some_and(|time| took >= time) || stop.asked();
            if over {
                break took;
            }
            let what = match options.time {
                Some(time) => format!("{} s of {} s", took.as_secs(), time.as_secs()),
                None => format!("{} s", took.as_secs()),
            };
            self.look(&mut finished, &watchers)?;
            screen.draw(&what, &titles, &self.numbers(&finished, &watchers));
            let left = options.time.map_or(screen.interval(), |time| time.saturating_sub(took));
            stop.wait(left.min(screen.interval()));
        };
        for application in applications {
            self.runtime.block_on(application.end());
        }
        self.wait_for_the_rest(&mut screen, &titles, &mut finished, &watchers)?;
        let both = self.numbers(&finished, &watchers);
        screen.soon();
        screen.draw("all written", &titles, &both);
        drop(watchers);
        self.summary(took, &both)
    }

    /// Draws until the relays have brought every write to an end and every probe was readable, or nothing moves any more.
    fn wait_for_the_rest(
        &self,
        screen: &mut Screen,
        titles: &[String; 2],
        finished: &mut [u64; 2],
        watchers: &[Watcher; 2],
    ) -> Result<(), String> {
        // A second Ctrl-C ends the process; the first has had its effect.
        let (pause, mut moved) = (Stop::default(), Instant::now());
        loop {
            let before = *finished;
            self.look(finished, watchers)?;
            if *finished != before {
                moved = Instant::now();
            }
            let all = self
                .directions
                .iter()
                .zip(&*finished)
                .all(|(direction, finished)| *finished >= direction.shared.ledger.writes());
            let waiting = watchers.iter().any(|watcher| watcher.sight().waiting > 0);
            if (all && !waiting) || moved.elapsed() > STALLED_AFTER {
                return Ok(());
            }
            screen.draw("the rest", titles, &self.numbers(finished, watchers));
            pause.wait(Duration::from_millis(20));
        }
    }

    /// Asks the relays how far they are, and whether everything still runs.
    fn look(&self, finished: &mut [u64; 2], watchers: &[Watcher; 2]) -> Result<(), String> {
        self.world.check()?;
        if let Some(index) = watchers.iter().position(|watcher| !watcher.watches()) {
            let region = self.directions[index].other.name();
            return Err(format!("the memcached of {region} does not answer"));
        }
        for (finished, direction) in finished.iter_mut().zip(&self.directions) {
            *finished = direction.finished().unwrap_or(*finished);
        }
        Ok(())
    }

    fn numbers(&self, finished: &[u64; 2], watchers: &[Watcher; 2]) -> [Numbers; 2] {
        [0, 1].map(|index| {
            let sight = watchers[index].sight();
            let writes = self.directions[index].shared.ledger.writes();
            Numbers {
                writes,
                // The relay may be ahead of our own count, and what is replayed after a rebalance counts twice there.
                replicated: finished[index].min(writes),
                lost: sight.lost,
                latencies: sight.latencies,
            }
        })
    }

    fn summary(&self, took: Duration, both: &[Numbers; 2]) -> Result<Summary, String> {
        let mut compared = Compared::default();
        let mut failures = Vec::new();
        for direction in &self.directions {
            let ledger = &direction.shared.ledger;
            let one = compare(ledger, direction.own, direction.other);
            compared.add(one.map_err(|error| format!("comparing the regions: {error}"))?);
            if let Some((count, first)) = ledger.failures() {
                let name = direction.own.name();
                failures.push(format!("{count} writes failed in {name}, the first because: {first}"));
            }
        }
        let total = Numbers::sum(both);
        // An event that never came to its end is lost, even where the next write of its key has healed it.
        let lost = compared.different.max(total.in_flight());
        Ok(Summary {
            writes: total.writes,
            // What the relays believe to have brought over, less what isn't there.
            replicated: total.replicated.min(total.writes.saturating_sub(lost)),
            lost,
            p50_ms: total.latencies.ms(0.5),
            p99_ms: total.latencies.ms(0.99),
            probes: total.latencies.count(),
            compared,
            failures,
            took,
        })
    }
}
