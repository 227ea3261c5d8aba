//! The command line: which scenarios are run, how often, and with what changed.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use super::files;
use super::scenario::{Group, Kind, Scenario};
use crate::setting::Setting;

/// How often rows of the goals and points of a curve are run.
const GOAL_RUNS: u32 = 5;
const GROWTH_RUNS: u32 = 3;

/// How often each binary of a comparison is run: as often first as second.
const AB_RUNS: u32 = 4;

/// How long rows of the goals take.
const GOAL_SECONDS: u64 = 30;

/// The long run, when all scenarios are run once.
const SHORT_LONG_RUN: u64 = 60;

const PRESETS: &str = "\
Without --scenario or a preset, every scenario is run once, the long one for a minute: about 20 minutes.
  --goals    the rows of the goals, five runs of 30 seconds each (a ramp takes two minutes): about 75 minutes
  --growth   the points of all curves, three runs each: about 30 minutes
  --long     the long run, 10 minutes: about 11 minutes
  --door     the front door against a memcached: about 2 minutes, and nothing else
Presets but --door may be combined with each other and with --scenario.";

/// Runs load scenarios through evrepl processes, a real Apache Kafka and memcacheds on this machine; prints a table and
/// keeps everything measured as JSON. Exits 0 only if nothing was lost and nothing went wrong.
#[derive(Debug, Parser)]
#[command(name = "evrepl-load", version, after_help = PRESETS, args_conflicts_with_subcommands = true)]
pub struct Arguments {
    #[command(subcommand)]
    pub tool: Option<Tool>,
    /// A scenario of load/scenarios, by its name (see --list), or a family of them; may be repeated.
    #[arg(long = "scenario", value_name = "NAME")]
    pub scenarios: Vec<String>,
    /// Runs the rows of the goals.
    #[arg(long)]
    pub goals: bool,
    /// Runs the points of all curves.
    #[arg(long)]
    pub growth: bool,
    /// Runs the long run.
    #[arg(long)]
    pub long: bool,
    /// Runs nothing but the front door's cases, each through evrepl and directly against memcached, in turn: 2 minutes a run of
    /// 5 seconds each.
    #[arg(long)]
    pub door: bool,
    /// Of the front door's cases only those in whose names this stands ("get, 100"); may be repeated.
    #[arg(long = "case", value_name = "PART", requires = "door")]
    pub cases: Vec<String>,
    /// How often each scenario is run; the table shows medians [default: 1, and what the presets say]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: Option<u32>,
    /// How long a scenario is measured. A drain gets as many events as it is expected to need so long for.
    #[arg(long, value_name = "S", conflicts_with = "events", value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: Option<u64>,
    /// Writes a second, where there is a rate; the first one that a ramp tries; the maximum that half-… writes half of.
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u64).range(1..))]
    pub rate: Option<u64>,
    /// How many events a drain has, instead of the scenario's own number.
    #[arg(long, value_name = "N")]
    pub events: Option<u64>,
    /// Bytes of each value, instead of the scenario's own number.
    #[arg(long, value_name = "N")]
    pub value_bytes: Option<usize>,
    /// How long the generator's producer waits for more events, in milliseconds: librdkafka's linger.ms.
    #[arg(long, value_name = "MS")]
    pub linger: Option<f64>,
    /// A setting of all evrepl processes, with a TOML literal: `flow.lanes=2`, `'batch.linger="5ms"'`; may be repeated.
    #[arg(long = "set", value_name = "TABLE.KEY=LITERAL")]
    pub settings: Vec<String>,
    /// The part of the events whose traces are exported, with all metrics, to a collector inside this program that only counts
    /// them [default: 0.001]
    #[arg(long, value_name = "RATIO", conflicts_with = "no_traces")]
    pub traces: Option<f64>,
    /// Nothing is exported.
    #[arg(long)]
    pub no_traces: bool,
    /// Doesn't run anything before the first scenario to warm up the broker.
    #[arg(long)]
    pub cold: bool,
    /// Where the results go [default: load/results]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Runs nothing: compares two results of one scenario, B with A.
    #[arg(long, num_args = 2, value_names = ["A.json", "B.json"])]
    pub compare: Vec<PathBuf>,
    /// Runs each scenario with both evrepl binaries in turn, A B B A A B …, --runs times each [default: 4], and ends with a
    /// comparison.
    #[arg(long, num_args = 2, value_names = ["BIN_A", "BIN_B"])]
    pub ab: Vec<PathBuf>,
    /// Lists the scenarios and ends.
    #[arg(long)]
    pub list: bool,
}

/// What is done with results.
#[derive(Clone, Debug, Subcommand)]
pub enum Tool {
    /// Prints tables of results: the goals, the curves, and everything, in Markdown.
    Table {
        /// Results of load/results.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Draws results: a curve with its spread for each family of scenarios, latency and memory by time for each run that has
    /// them.
    Plot {
        /// Results of load/results.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        /// Where the SVGs go [default: load/results]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Draws results side by side as bars, with their spread, and prints their table.
    Bars {
        /// Where the SVG goes.
        #[arg(value_name = "SVG")]
        file: PathBuf,
        /// A result to be drawn, and what to call it; those of the same label stand together.
        #[arg(required = true, value_name = "LABEL=FILE")]
        of: Vec<String>,
        /// What stands above the bars.
        #[arg(long, value_name = "TEXT", default_value = "")]
        title: String,
    },
}

/// A scenario and how often it is run.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    pub scenario: Scenario,
    pub runs: u32,
}

/// The folder of results, unless another was named.
pub fn results(named: &Option<PathBuf>) -> PathBuf {
    let own = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/results"));
    named.clone().unwrap_or_else(own)
}

impl Arguments {
    /// What is to be run, in order: what needs another's result stands after it.
    ///
    /// # Errors
    /// What can't be, in words.
    pub fn planned(&self) -> Result<Vec<Planned>, String> {
        let all = files::all()?;
        let mut planned = Vec::new();
        let mut plan = |scenario: Scenario, runs: u32| {
            let runs = self.runs.unwrap_or(if self.ab.is_empty() { runs } else { AB_RUNS });
            self.changed(scenario)
                .map(|scenario| planned.push(Planned { scenario, runs }))
        };
        for scenario in files::named(&all, &self.scenarios)? {
            plan(scenario, 1)?;
        }
        let nothing_said = self.scenarios.is_empty() && !self.goals && !self.growth && !self.long;
        for mut scenario in all {
            match scenario.group {
                Group::Goal if self.goals => {
                    scenario.last(GOAL_SECONDS);
                    plan(scenario, GOAL_RUNS)?;
                }
                Group::Growth if self.growth => plan(scenario, GROWTH_RUNS)?,
                Group::Long if self.long => plan(scenario, 1)?,
                Group::Long if nothing_said => {
                    scenario.last(SHORT_LONG_RUN);
                    plan(scenario, 1)?;
                }
                _ if nothing_said => plan(scenario, 1)?,
                _ => {}
            }
        }
        planned.sort_by_key(|one| one.scenario.half_of.is_some());
        Ok(planned)
    }

    /// The settings of all evrepl processes: path and literal.
    ///
    /// # Errors
    /// When one is no setting.
    pub fn settings(&self) -> Result<Vec<(String, String)>, String> {
        let each = self.settings.iter().map(|setting| {
            let setting = Setting::parse(setting)?;
            Ok((setting.path(), setting.literal))
        });
        each.collect()
    }

    fn changed(&self, mut scenario: Scenario) -> Result<Scenario, String> {
        if scenario.kind != Kind::Drain {
            if let Some(rate) = self.rate {
                scenario.rate = if scenario.half_of.is_some() { rate / 2 } else { rate };
                scenario.half_of = None;
            }
        } else if let Some(events) = self.events {
            scenario.events = events;
        }
        if let Some(bytes) = self.value_bytes {
            scenario.value_bytes = bytes;
            scenario.keys.count = scenario.keys.count.min(scenario.most_keys());
            scenario.events = scenario.events.min(scenario.most_events());
        }
        if let Some(seconds) = self.seconds {
            scenario.last(seconds);
        }
        scenario.linger_ms = self.linger.unwrap_or(scenario.linger_ms);
        scenario.traces = if self.no_traces {
            0.0
        } else {
            self.traces.unwrap_or(scenario.traces)
        };
        for setting in &self.settings {
            scenario.settings += &Setting::parse(setting)?.lines();
        }
        scenario
            .check()
            .map_err(|error| format!("{}: {error}", scenario.name))?;
        Ok(scenario)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(arguments: &[&str]) -> Vec<Planned> {
        let arguments = Arguments::parse_from(["evrepl-load"].iter().chain(arguments));
        arguments.planned().unwrap()
    }

    #[test]
    fn without_anything_said_every_scenario_is_run_once() {
        let all = planned(&[]);
        assert_eq!(all.len(), files::all().unwrap().len());
        assert!(all.iter().all(|one| one.runs == 1));
        let long = all.iter().find(|one| one.scenario.group == Group::Long);
        assert!(long.is_none_or(|long| long.scenario.seconds == SHORT_LONG_RUN));
    }

    #[test]
    fn the_goals_are_five_runs_of_thirty_seconds_and_what_needs_a_ramp_comes_after_it() {
        let goals = planned(&["--goals"]);
        assert!(goals.iter().all(|one| one.runs == 5 && one.scenario.seconds == 30));
        let drain = goals.iter().find(|one| one.scenario.name == "drain-100").unwrap();
        assert_eq!(drain.scenario.events, 30 * drain.scenario.expect);
        for (place, one) in goals.iter().enumerate() {
            if let Some(of) = &one.scenario.half_of {
                assert!(goals[..place].iter().any(|before| before.scenario.name == *of));
            }
        }
    }

    #[test]
    fn the_command_line_changes_a_scenario() {
        let [one] = planned(&[
            "--scenario",
            "fixed-100",
            "--rate",
            "50000",
            "--runs",
            "3",
            "--no-traces",
        ])
        .try_into()
        .unwrap();
        assert_eq!((one.scenario.rate, one.runs, one.scenario.traces), (50_000, 3, 0.0));
        let [one] = planned(&["--scenario", "drain-1k", "--seconds", "2", "--value-bytes", "65536"])
            .try_into()
            .unwrap();
        assert_eq!(one.scenario.events, 2 * one.scenario.expect);
        assert!(one.scenario.keys.count <= one.scenario.most_keys());
    }
}
