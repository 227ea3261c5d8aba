//! `evrepl-demo`: two regions on this machine, in front of your eyes.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use evrepl_load::live::application::MAX_RATE;
use evrepl_load::live::show::{self, Options};
use evrepl_load::stop::Stop;
use evrepl_load::{needs, plain_panics, remove_leftovers};

/// As a shell reports a program ended by SIGINT.
const INTERRUPTED: u8 = 130;

/// Runs two regions on this machine: memcached and `evrepl run` as processes, Kafka inside this one, and an application in
/// each that sets, touches and deletes. Shows what happens, then compares every key in both regions, and shows the way of one
/// write in Jaeger. Exits 0 only if nothing was lost.
#[derive(Debug, Parser)]
#[command(name = "evrepl-demo", version)]
struct Arguments {
    /// How long it writes, in seconds; 0: until Ctrl-C.
    #[arg(long, value_name = "N", default_value_t = 30)]
    seconds: u64,
    /// Writes a second in each region.
    #[arg(long, value_name = "R", default_value_t = 2_000, value_parser = clap::value_parser!(u64).range(1..=MAX_RATE))]
    rate: u64,
    /// Also writes {"writes":…,"replicated":…,"lost":…,"p50_ms":…,"p99_ms":…} to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Jaeger's page stays up after the summary until Ctrl-C, as it does by itself on a terminal.
    #[arg(long)]
    stay: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    plain_panics("evrepl-demo");
    if let Err(missing) = needs::regions() {
        eprintln!("evrepl-demo: {missing}");
        return ExitCode::FAILURE;
    }
    let stop = Stop::on_signals(remove_leftovers);
    let options = Options {
        time: (arguments.seconds > 0).then(|| Duration::from_secs(arguments.seconds)),
        rate: arguments.rate,
        json: arguments.json,
        stay: arguments.stay || std::io::stdout().is_terminal(),
    };
    let shown = show::run(&options, &stop);
    // Each part has removed its own files; this is the folder they were in.
    remove_leftovers();
    match shown {
        Ok(Some(summary)) if summary.is_right() => ExitCode::SUCCESS,
        Ok(Some(_)) => ExitCode::FAILURE,
        Ok(None) => ExitCode::from(INTERRUPTED),
        Err(error) => {
            eprintln!("evrepl-demo: {error}");
            ExitCode::FAILURE
        }
    }
}
