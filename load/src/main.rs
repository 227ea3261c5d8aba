//! `evrepl-load`: how much evrepl carries, how fast, and at what cost, against a real Apache Kafka and real memcached.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use evrepl_lab::Broker;
use evrepl_lab::otlp::OtlpSink;
use evrepl_load::runs::plot::{Labelled, svg};
use evrepl_load::runs::report::{Report, load_average, table};
use evrepl_load::runs::scenario::{Kind, Scenario};
use evrepl_load::runs::trial;
use evrepl_load::stop::Stop;
use evrepl_load::{needs, plain_panics};

/// A load average above this says that somebody else is using the machine.
const QUIET: f64 = 0.5;

/// The broker may have enough memory and its second compiler: it is not what is measured.
const JVM: [&str; 2] = ["-Xms1g", "-Xmx1g"];

/// Runs load scenarios through two evrepl processes, a real Apache Kafka and two memcacheds on this machine; prints a table
/// and keeps everything measured as JSON. Exits 0 only if nothing was lost.
#[derive(Debug, Parser)]
#[command(name = "evrepl-load", version)]
struct Arguments {
    /// A scenario of load/scenarios, by its file name without .toml; may be repeated. Default: all of them.
    #[arg(long = "scenario", value_name = "NAME")]
    scenarios: Vec<String>,
    /// How often each scenario is run; the table shows medians.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// How long the scenarios with a fixed rate write, instead of until they have written their events.
    #[arg(long, value_name = "S", conflicts_with = "events")]
    seconds: Option<u64>,
    /// Writes a second, in the scenarios with a fixed rate.
    #[arg(long, value_name = "R")]
    rate: Option<u64>,
    /// How many events, instead of the scenario's own number.
    #[arg(long, value_name = "N")]
    events: Option<u64>,
    /// Bytes of each value, instead of the scenario's own number.
    #[arg(long, value_name = "N")]
    value_bytes: Option<usize>,
    /// A setting of both evrepl processes, with a TOML literal: `flow.lanes=2`, `batch.linger="5ms"`; may be repeated.
    #[arg(long = "set", value_name = "PATH=LITERAL")]
    settings: Vec<String>,
    /// Both evrepl processes export traces of this part of the events, and metrics, to a collector inside this program, which
    /// takes everything and keeps it. Without it nothing is exported.
    #[arg(long, value_name = "RATIO")]
    traces: Option<f64>,
    /// Where the results go [default: load/results]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Runs nothing: draws earlier results, given by --of, side by side into this SVG, and prints their table.
    #[arg(long, value_name = "FILE", requires = "of")]
    plot: Option<PathBuf>,
    /// A result to be drawn, and what to call it; those of the same label stand together. May be repeated.
    #[arg(long, value_name = "LABEL=FILE", requires = "plot")]
    of: Vec<String>,
    /// What stands above the plot.
    #[arg(long, value_name = "TEXT", default_value = "", requires = "plot")]
    title: String,
    /// Lists the scenarios and ends.
    #[arg(long)]
    list: bool,
}

impl Arguments {
    fn scenarios(&self) -> Result<Vec<Scenario>, String> {
        let names = match self.scenarios.is_empty() {
            true => Scenario::names()?,
            false => self.scenarios.clone(),
        };
        names.iter().map(|name| self.changed(Scenario::named(name)?)).collect()
    }

    fn changed(&self, mut scenario: Scenario) -> Result<Scenario, String> {
        if scenario.kind == Kind::Fixed {
            scenario.rate = self.rate.unwrap_or(scenario.rate);
            if let Some(seconds) = self.seconds {
                scenario.events = seconds.saturating_mul(scenario.rate);
            }
        }
        scenario.events = self.events.unwrap_or(scenario.events);
        scenario.value_bytes = self.value_bytes.unwrap_or(scenario.value_bytes);
        for setting in &self.settings {
            let (path, literal) = setting
                .split_once('=')
                .ok_or_else(|| format!("--set {setting}: expected PATH=LITERAL"))?;
            let (table, key) = path
                .rsplit_once('.')
                .ok_or_else(|| format!("--set {setting}: expected TABLE.KEY=LITERAL"))?;
            scenario.settings += &format!("\n[{table}]\n{key} = {literal}\n");
        }
        scenario
            .check()
            .map_err(|error| format!("{}: {error}", scenario.name))?;
        Ok(scenario)
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    plain_panics("evrepl-load");
    let ran = run(&arguments);
    evrepl_load::remove_leftovers();
    match ran {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("evrepl-load: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing was lost.
fn run(arguments: &Arguments) -> Result<bool, String> {
    let scenarios = arguments.scenarios()?;
    if arguments.list {
        for scenario in scenarios {
            println!("{}", scenario.name);
        }
        return Ok(true);
    }
    if let Some(file) = &arguments.plot {
        let all = Labelled::read(&arguments.of)?;
        std::fs::write(file, svg(&arguments.title, &all))
            .map_err(|error| format!("cannot write {}: {error}", file.display()))?;
        println!("{}", table(&all.iter().map(Labelled::column).collect::<Vec<_>>()));
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
    let folder = arguments
        .out
        .clone()
        .unwrap_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/results")));
    eprintln!("starting Apache Kafka");
    let broker = Broker::start_with(&[], &JVM);
    let sink = arguments.traces.map(|ratio| (OtlpSink::start(), ratio));
    let (mut columns, mut right) = (Vec::new(), true);
    for mut scenario in scenarios {
        if let Some((sink, ratio)) = &sink {
            scenario.settings += &format!(
                "\n[telemetry]\notlp_endpoint = {:?}\ntrace_ratio = {ratio:?}\n",
                sink.endpoint()
            );
        }
        let mut report = Report::new(&scenario);
        for number in 1..=arguments.runs {
            eprintln!("{}, run {number} of {}", scenario.name, arguments.runs);
            let Some(measured) = trial::run(&broker, &scenario, &stop) else {
                return Err("stopped".into());
            };
            for problem in &measured.problems {
                eprintln!("{}: {problem}", scenario.name);
                right = false;
            }
            report.add(&measured).map_err(|error| error.to_string())?;
        }
        let path = report
            .save(&folder)
            .map_err(|error| format!("cannot write the results to {}: {error}", folder.display()))?;
        eprintln!("{}: {}", scenario.name, path.display());
        columns.push((scenario.name, report.median()));
    }
    println!("{}", table(&columns));
    if let Some((sink, _)) = &sink {
        println!("{} spans were taken", sink.spans().len());
    }
    Ok(right)
}
