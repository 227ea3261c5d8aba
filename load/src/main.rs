//! `evrepl-load`: how much evrepl carries, how fast, and at what cost, against a real Apache Kafka and real memcached.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use evrepl_lab::Broker;
use evrepl_lab::otlp::OtlpSink;
use evrepl_load::runs::arguments::{Arguments, Planned, results};
use evrepl_load::runs::compare::compare;
use evrepl_load::runs::generate::child::SUBCOMMAND;
use evrepl_load::runs::generate::serve::serve;
use evrepl_load::runs::report::{Report, load_average};
use evrepl_load::runs::scenario::Scenario;
use evrepl_load::runs::trial::Bench;
use evrepl_load::runs::warm::warm_up;
use evrepl_load::runs::world::Exports;
use evrepl_load::runs::{door, table, tools};
use evrepl_load::stop::Stop;
use evrepl_load::{needs, plain_panics};
use serde_json::Value;

/// A load average above this says that somebody else is using the machine.
const QUIET: f64 = 0.5;

/// The broker may have enough memory and its second compiler: it is not what is measured.
const JVM: [&str; 2] = ["-Xms1g", "-Xmx1g"];

fn main() -> ExitCode {
    plain_panics("evrepl-load");
    // Not for people: this program's own child.
    if std::env::args().nth(1).as_deref() == Some(SUBCOMMAND) {
        return ended(serve(std::io::stdin().lock(), std::io::stdout()).map(|()| true));
    }
    if std::env::args().nth(1).as_deref() == Some(door::SUBCOMMAND) {
        return ended(door::serve().map(|()| true));
    }
    let arguments = Arguments::parse();
    let ran = run(&arguments);
    evrepl_load::remove_leftovers();
    ended(ran)
}

fn ended(right: Result<bool, String>) -> ExitCode {
    match right {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("evrepl-load: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing was lost or wrong.
fn run(arguments: &Arguments) -> Result<bool, String> {
    if let Some(tool) = &arguments.tool {
        print!("{}", tools::run(tool)?);
        return Ok(true);
    }
    if let [a, b] = arguments.compare.as_slice() {
        print!("{}", tools::compare_files(a, b)?);
        return Ok(true);
    }
    let planned = arguments.planned()?;
    if arguments.list {
        planned.iter().for_each(|one| println!("{}", one.scenario.name));
        return Ok(true);
    }
    needs::regions()?;
    needs::kafka()?;
    if cfg!(debug_assertions) {
        eprintln!("evrepl-load: this is not a release build; its figures say nothing");
    }
    if load_average() > QUIET {
        eprintln!(
            "evrepl-load: something else uses this machine (load average {:.1}); its figures say little",
            load_average()
        );
    }
    let stop = Stop::on_signals(evrepl_load::remove_leftovers);
    eprintln!("starting Apache Kafka");
    let broker = Broker::start_with(&[], &JVM);
    if arguments.door {
        let settings = arguments.settings()?;
        let (runs, seconds) = (arguments.runs.unwrap_or(1), arguments.seconds.unwrap_or(5) as f64);
        let folder = results(&arguments.out);
        println!(
            "{}",
            door::run(
                &broker,
                &stop,
                None,
                &settings,
                (runs, seconds),
                (&arguments.cases, !arguments.cold),
                &folder
            )?
        );
        return Ok(true);
    }
    let sink = OtlpSink::start_counting();
    let bench = Bench {
        broker: &broker,
        stop: &stop,
        exports: Some(Exports {
            endpoint: sink.endpoint(),
        }),
    };
    if !arguments.cold {
        warm_up(|| {
            bench
                .run(&Scenario::warm_up(), None)
                .map(|_| ())
                .ok_or_else(|| "stopped".to_owned())
        })?;
    }
    let right = match arguments.ab.as_slice() {
        [a, b] => in_turn(arguments, planned, &bench, [a, b])?,
        _ => one_by_one(arguments, planned, &bench)?,
    };
    println!("{} spans were taken", sink.span_count());
    Ok(right)
}

fn one_by_one(arguments: &Arguments, planned: Vec<Planned>, bench: &Bench<'_>) -> Result<bool, String> {
    let folder = results(&arguments.out);
    let (mut columns, mut right) = (Vec::<(String, Value)>::new(), true);
    for Planned { mut scenario, runs } in planned {
        // Half of the maximum that has just been found, if it has.
        let maximum = scenario.half_of.as_ref().and_then(|of| {
            let (_, median) = columns.iter().find(|(name, _)| name == of)?;
            median["max_rate"].as_u64()
        });
        scenario.rate = maximum.map_or(scenario.rate, |rate| rate / 2);
        let mut report = Report::new(&scenario, &evrepl_lab::evrepl(), "");
        for number in 1..=runs {
            eprintln!("{}, run {number} of {runs}", scenario.name);
            right &= once(bench, &scenario, None, &mut report, &folder)?;
        }
        columns.push((scenario.name, report.median()));
    }
    println!("{}", table::medians(&columns));
    Ok(right)
}

/// Each scenario with both binaries: A B B A A B, so that a machine that becomes slower or faster does so for both.
fn in_turn(
    arguments: &Arguments,
    planned: Vec<Planned>,
    bench: &Bench<'_>,
    binaries: [&PathBuf; 2],
) -> Result<bool, String> {
    if let Some(missing) = binaries.iter().find(|binary| !binary.is_file()) {
        return Err(format!("there is no {}", missing.display()));
    }
    // The processes have a working directory of their own.
    let binaries = binaries.map(|binary| binary.canonicalize().unwrap_or_else(|_| binary.clone()));
    let folder = results(&arguments.out);
    let mut right = true;
    for Planned { scenario, runs } in planned {
        let [a, b] = &binaries;
        let mut reports = [(a, "a"), (b, "b")].map(|(binary, of)| Report::new(&scenario, binary, of));
        for pair in 0..runs {
            let order = if pair % 2 == 0 { [0, 1] } else { [1, 0] };
            for which in order {
                let name = ["A", "B"][which];
                eprintln!("{}, {name}, run {} of {runs}", scenario.name, pair + 1);
                right &= once(bench, &scenario, Some(&binaries[which]), &mut reports[which], &folder)?;
            }
        }
        let names = binaries.each_ref().map(|binary| binary.display().to_string());
        let [a, b] = &reports;
        println!(
            "{}\n\n{}",
            scenario.name,
            compare((&names[0], a.runs()), (&names[1], b.runs()))
        );
    }
    Ok(right)
}

/// One run, kept in its report's file as soon as it has ended. Whether nothing was wrong.
fn once(
    bench: &Bench<'_>,
    scenario: &Scenario,
    binary: Option<&Path>,
    report: &mut Report,
    folder: &Path,
) -> Result<bool, String> {
    let measured = bench.run(scenario, binary).ok_or("stopped")?;
    for problem in &measured.problems {
        eprintln!("{}: {problem}", scenario.name);
    }
    report.add(&measured).map_err(|error| error.to_string())?;
    let path = report
        .save(folder)
        .map_err(|error| format!("cannot write the results to {}: {error}", folder.display()))?;
    eprintln!("{}: {}", scenario.name, path.display());
    Ok(measured.problems.is_empty())
}
