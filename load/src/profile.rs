//! `evrepl-profile`: how many instructions an event costs, by stage.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use evrepl_lab::{Broker, OtlpSink};
use evrepl_load::budget::attribute::Counted;
use evrepl_load::budget::drain::{self, Drain};
use evrepl_load::budget::frames::Frames;
use evrepl_load::budget::rules::Process;
use evrepl_load::budget::table;
use evrepl_load::runs::progress::Progress;
use evrepl_load::setting::Setting;
use evrepl_load::stop::Stop;
use evrepl_load::{needs, plain_panics};

/// A run has as many events as the short one, and these times as many: the difference is what is counted.
const LONGER: u64 = 3;

/// The drain of which samples are taken has so many times more events: it must last some seconds at full speed.
const FLAME: u64 = 20;

/// A drain in which something was restarted counts for nothing and is tried again: on a machine that is busy enough, valgrind
/// makes evrepl so slow that it gives up a broker.
const TRIES: u32 = 3;

/// More than this of a process's instructions without a stage, and the rules want mending.
const UNCLAIMED: f64 = 0.10;

/// Counts, with valgrind's callgrind, the instructions of a relay and an agent per event and stage, in a drain of a full topic.
/// The counts do not depend on what else the machine does. Instructions in the kernel are not among them.
#[derive(Debug, Parser)]
#[command(name = "evrepl-profile", version)]
struct Arguments {
    /// Events of the shorter of the two drains that are subtracted from each other; the longer one has three times as many.
    #[arg(long, value_name = "N", default_value_t = 50_000, value_parser = clap::value_parser!(u64).range(1..))]
    events: u64,
    /// Bytes of each value; may be repeated [default: 100 and 1024]
    #[arg(long = "value-bytes", value_name = "N")]
    value_bytes: Vec<usize>,
    /// How often each is counted: the tables show the mean, and how far the furthest is from it.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// A setting of both evrepl processes, with a TOML literal: `flow.lanes=2`; may be repeated.
    #[arg(long = "set", value_name = "TABLE.KEY=LITERAL")]
    settings: Vec<String>,
    /// How many functions are listed in each list; 0 for the tables alone.
    #[arg(long, value_name = "N", default_value_t = 15)]
    top: usize,
    /// Where callgrind's files go, to be looked at with callgrind_annotate or KCachegrind [default: target/profile]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Counts nothing, but takes samples of a drain at full speed with `perf`, and draws flame graphs of both processes into
    /// --out; it has 20 times --events.
    #[arg(long)]
    flame: bool,
    /// Runs nothing and reads what an earlier run with the same arguments has left.
    #[arg(long)]
    read: bool,
}

impl Arguments {
    fn sizes(&self) -> Vec<usize> {
        match self.value_bytes.is_empty() {
            true => vec![100, 1024],
            false => self.value_bytes.clone(),
        }
    }

    fn settings(&self) -> Result<String, String> {
        let each = self.settings.iter();
        each.map(|setting| Setting::parse(setting).map(|setting| setting.lines()))
            .collect()
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    plain_panics("evrepl-profile");
    let ran = run(&arguments);
    evrepl_load::remove_leftovers();
    match ran {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("evrepl-profile: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether the rules claim enough.
fn run(arguments: &Arguments) -> Result<bool, String> {
    let target = || evrepl_lab::place::target().join("profile");
    let out = arguments.out.clone().unwrap_or_else(target);
    if arguments.flame {
        return flames(arguments, &out).map(|()| true);
    }
    if !arguments.read {
        count(arguments, &out)?;
    }
    let mut claimed = true;
    let mut frames = Frames::default();
    for bytes in arguments.sizes() {
        for process in [Process::Relay, Process::Agent] {
            let mut runs = Vec::new();
            for run in 1..=arguments.runs {
                let mut read = |events| {
                    let threads = drain::threads(&folder(&out, bytes, events, run), process)?;
                    Ok::<_, String>(Counted::of(process, &threads, &mut frames))
                };
                let (short, long) = (read(arguments.events)?, read(arguments.events * LONGER)?);
                runs.push(long.per_event(&short, (arguments.events * (LONGER - 1)) as f64));
            }
            println!("## {}, {bytes} B: instructions per event\n", process.name());
            println!("{}", table::budget(process, &runs));
            let (last, top) = (&runs[runs.len() - 1], arguments.top);
            let total = last.total();
            for (title, functions) in [
                (
                    "by function as written, with what of Rust's library was put into it",
                    &last.written,
                ),
                ("by function as linked", &last.itself),
                ("the same with all that it calls", &last.inclusive),
                ("claimed by no rule", &last.unclaimed),
            ] {
                if top > 0 {
                    println!("{title}:\n\n{}", table::top(functions, total, top));
                }
            }
            claimed &= table::unclaimed(last) < UNCLAIMED;
        }
    }
    println!("The kernel's instructions are not counted.");
    Ok(claimed)
}

fn folder(out: &Path, bytes: usize, events: u64, run: u32) -> PathBuf {
    out.join(format!("{bytes}b-{events}-{run}"))
}

/// Whatever both ways need.
fn start() -> Result<(Broker, OtlpSink, Stop), String> {
    needs::regions()?;
    needs::kafka()?;
    let stop = Stop::on_signals(evrepl_load::remove_leftovers);
    eprintln!("starting Apache Kafka");
    Ok((Broker::start(), OtlpSink::start(), stop))
}

fn flames(arguments: &Arguments, out: &Path) -> Result<(), String> {
    needs::program("perf", "linux-perf")?;
    let settings = arguments.settings()?;
    let (broker, sink, stop) = start()?;
    for bytes in arguments.sizes() {
        let drain = Drain {
            events: arguments.events * FLAME,
            value_bytes: bytes,
            settings: &settings,
        };
        let sampled = drain::sampled(&broker, &sink, drain, &out.join("perf"), &stop)?.ok_or("stopped")?;
        for (process, flame) in sampled {
            let path = out.join(format!("{}-{bytes}b.svg", process.name()));
            let title = format!("{}, {bytes} B values: {} samples", process.name(), flame.samples());
            std::fs::write(&path, flame.svg(&title))
                .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
            println!("{}", path.display());
        }
    }
    Ok(())
}

fn count(arguments: &Arguments, out: &Path) -> Result<(), String> {
    needs::program("valgrind", "valgrind")?;
    let settings = arguments.settings()?;
    let (broker, sink, stop) = start()?;
    let sizes = arguments.sizes();
    let mut progress = Progress::new("drains", sizes.len() as u64 * u64::from(arguments.runs) * 2);
    let mut done = 0;
    for bytes in sizes {
        for run in 1..=arguments.runs {
            for events in [arguments.events, arguments.events * LONGER] {
                let folder = folder(out, bytes, events, run);
                let drain = Drain {
                    events,
                    value_bytes: bytes,
                    settings: &settings,
                };
                progress.at(done);
                let mut tries = 1;
                while let Err(error) = drain::counted(&broker, &sink, drain, &folder, &stop) {
                    if tries == TRIES {
                        return Err(error);
                    }
                    eprintln!("evrepl-profile: once more, because {error}");
                    tries += 1;
                }
                if stop.asked() {
                    return Err("stopped".into());
                }
                done += 1;
            }
        }
    }
    Ok(())
}
