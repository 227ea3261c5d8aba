//! `evrepl-faults`: every fault in the middle of load, and what was lost by it.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use evrepl_lab::faults::{FAULTS, Fault, Live, Plan, Row, run, two_at_random};
use evrepl_load::fault_table::{document, is_right, isolation, line, table};
use evrepl_load::stop::Stop;
use evrepl_load::{needs, plain_panics};

/// As many pairs of faults, each chosen by a seed.
const PAIRS: u64 = 5;

/// The name of these pairs on the command line.
const TWO_AT_RANDOM: &str = "two_at_random";

/// As a shell reports a program ended by SIGINT.
const INTERRUPTED: u8 = 130;

/// Breaks two regions on this machine in every way it knows while an application writes to them, and checks after each fault
/// that every key is equal in both, that none ever went back to an older state, that every event is accounted for, and that
/// no process took more memory than `evrepl check` prints. Exits 0 only if all of that held each time.
#[derive(Debug, Parser)]
#[command(name = "evrepl-faults", version)]
struct Arguments {
    /// A fault by its name; may be repeated. Default: all of them, then five pairs at random.
    #[arg(long, value_name = "FAULT")]
    only: Vec<String>,
    /// Chooses keys, and in `two_at_random` the faults; the pairs take this and the next four.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// The short forms that the test suite runs, 8 s of fault at most.
    #[arg(long)]
    short: bool,
    /// Also writes the table, as Markdown, to this file.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Lists the faults and ends.
    #[arg(long)]
    list: bool,
}

impl Arguments {
    fn plans(&self) -> Result<Vec<Plan>, String> {
        let plan = |fault| match self.short {
            true => Plan::short(fault, self.seed),
            false => Plan::long(fault, self.seed),
        };
        let pair = |seed| Plan {
            name: format!(
                "{TWO_AT_RANDOM} {seed}: {}",
                two_at_random(seed).map(|fault| fault.name).join(" + ")
            ),
            ..Plan::two(two_at_random(seed), self.short, seed)
        };
        if self.only.is_empty() {
            let pairs = (self.seed..self.seed + PAIRS).map(pair);
            return Ok(FAULTS.iter().map(|fault| plan(*fault)).chain(pairs).collect());
        }
        let named = |name: &String| match name.as_str() {
            TWO_AT_RANDOM => Ok(pair(self.seed)),
            name => Fault::named(name).map(plan),
        };
        self.only.iter().map(named).collect()
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.list {
        for fault in FAULTS {
            println!("{:20} {:>3} s  {}", fault.name, fault.seconds, fault.about);
        }
        println!("{TWO_AT_RANDOM:20}  20 s  two of these at the same time, chosen by --seed");
        return ExitCode::SUCCESS;
    }
    plain_panics("evrepl-faults");
    let stop = Stop::on_signals(evrepl_load::remove_leftovers);
    let ran = run_all(&arguments, &stop);
    evrepl_load::remove_leftovers();
    match ran {
        Ok(_) if stop.asked() => ExitCode::from(INTERRUPTED),
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("evrepl-faults: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything held.
fn run_all(arguments: &Arguments, stop: &Stop) -> Result<bool, String> {
    let plans = arguments.plans()?;
    needs::regions()?;
    needs::kafka()?;
    eprintln!("starting Apache Kafka");
    evrepl_lab::broker();
    let began = Instant::now();
    let mut rows: Vec<Row> = Vec::new();
    for (index, plan) in plans.iter().enumerate() {
        if stop.asked() {
            break;
        }
        let row = watched(&format!("[{:>2}/{}] {}", index + 1, plans.len(), plan.name), plan);
        println!("{}", line(&row));
        for problem in &row.problems {
            println!("      {}", problem.replace('\n', "\n      "));
        }
        rows.push(row);
    }
    let took = began.elapsed();
    println!("\n{}\n\n{}", table(&rows), isolation(&rows));
    if let Some(path) = &arguments.out {
        save(path, &document(&rows, took))?;
    }
    let right = rows.iter().all(is_right);
    if !right {
        println!("logs of what went wrong are in target/faults");
    }
    Ok(right && rows.len() == plans.len())
}

fn save(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// Runs one while a line on the terminal shows how far it is.
fn watched(title: &str, plan: &Plan) -> Row {
    let (live, ended) = (Live::default(), AtomicBool::new(false));
    let terminal = std::io::stderr().is_terminal();
    thread::scope(|scope| {
        let shows = scope.spawn(|| {
            let began = Instant::now();
            while terminal && !ended.load(Ordering::Relaxed) {
                let (stage, writes) = live.now();
                eprint!(
                    "\r\x1b[K{title}: {stage}, {writes} writes, {} s",
                    began.elapsed().as_secs()
                );
                let _ = std::io::stderr().flush();
                thread::park_timeout(Duration::from_millis(250));
            }
            if terminal {
                eprint!("\r\x1b[K");
            }
        });
        if !terminal {
            eprintln!("{title}");
        }
        let row = run(plan, &live);
        ended.store(true, Ordering::Relaxed);
        shows.thread().unpark();
        row
    })
}
