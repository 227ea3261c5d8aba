//! The front door's figures: the same commands to a memcached directly and through evrepl to another one, in turn, in one run.

pub mod client;

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use evrepl_lab::{Broker, CacheSpec, Memcached, Put, Region, RegionBuilder, wait_until};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use self::client::{Asked, Seen, key};
use super::compare::Spread;
use super::report::{machine, now};
use super::table::{grouped, markdown};
use super::warm::warm_up;
use crate::processes::{Usage, child_with};
use crate::stop::Stop;

/// The subcommand of this program that is the client.
pub const SUBCOMMAND: &str = "door-client";
const CACHE: &str = "sessions";
/// 100 000 values of 100 bytes.
const KEYS: u64 = 100_000;
const VALUE_BYTES: usize = 100;
/// The open loop's.
const RATE: u64 = 20_000;
const WARM_UP: Duration = Duration::from_secs(15);
/// Connections and commands that each sends at once.
const SHAPES: [(usize, usize); 4] = [(1, 1), (1, 64), (100, 1), (100, 16)];

/// The figures of one kind of load.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Case {
    pub name: String,
    /// `memcached` or `front door`.
    pub through: String,
    pub seen: Seen,
    /// CPU seconds a million commands.
    pub memcached: f64,
    pub evrepl: f64,
    /// The part of evrepl's that librdkafka takes to produce events.
    pub producer: f64,
    pub broker: f64,
    pub client: f64,
}

/// The child: does what its input asks.
///
/// # Errors
/// What stood in the way.
pub fn serve() -> Result<(), String> {
    let asked: Asked = serde_json::from_reader(std::io::stdin()).map_err(|error| error.to_string())?;
    let seen = client::run(&asked)?;
    serde_json::to_writer(std::io::stdout(), &seen).map_err(|error| error.to_string())
}

struct World {
    direct: Memcached,
    region: Region,
}

impl World {
    fn start(broker: &Broker, binary: Option<&Path>, settings: &[(String, String)]) -> World {
        let arguments = ["-m", "256", "-o", "hashpower=20"];
        let cache = CacheSpec::new(CACHE).memcached_args(&arguments).front_door();
        let mut region = RegionBuilder::new("us-east-1").kafka(&broker.client()).cache(cache);
        for (path, literal) in settings {
            region = region.set(path, literal);
        }
        if let Some(binary) = binary {
            region = region.binary(binary);
        }
        let world = World {
            direct: Memcached::start_with(&arguments),
            region: region.start(),
        };
        let value = vec![b'v'; VALUE_BYTES];
        for memcached in [&world.direct, &world.region.cache(CACHE).servers[0].memcached] {
            let keys: Vec<String> = (0..KEYS).map(key).collect();
            for some in keys.chunks(1000) {
                let puts: Vec<Put<'_>> = some
                    .iter()
                    .map(|key| Put {
                        key: key.as_bytes(),
                        value: &value,
                        flags: 0,
                        exptime: 0,
                    })
                    .collect();
                memcached.client().set_many(&puts).expect("memcached takes values");
            }
        }
        world
    }

    /// What the client is asked to do, directly or through the front door, with so many connections and commands at once.
    fn asks(
        &self,
        door: bool,
        command: &str,
        (connections, pipelined): (usize, usize),
        rate: Option<u64>,
        seconds: f64,
    ) -> Asked {
        Asked {
            address: match door {
                true => self.region.cache(CACHE).front_door(),
                false => self.direct.address(),
            },
            command: command.to_owned(),
            connections,
            pipelined,
            rate,
            keys: KEYS,
            value_bytes: VALUE_BYTES,
            seconds,
        }
    }

    /// One case, directly or through the front door.
    fn run(&self, name: &str, door: bool, asked: Asked) -> Result<Case, String> {
        let memcached = match door {
            true => self.region.cache(CACHE).servers[0].memcached.port(),
            false => self.direct.port(),
        };
        let pids = [
            child_with(&memcached.to_string()),
            child_with(&self.region.config_path().display().to_string()),
            child_with("kafka.Kafka"),
        ];
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let child = Command::new(program)
            .arg(SUBCOMMAND)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = child.map_err(|error| format!("the client can't be started: {error}"))?;
        let before = pids.map(Usage::of);
        let mut stdin = child.stdin.take().ok_or("no input")?;
        stdin
            .write_all(&serde_json::to_vec(&asked).map_err(|error| error.to_string())?)
            .map_err(|error| error.to_string())?;
        drop(stdin);
        let pid = child.id();
        // Its own cost is read just before it ends; a child that has ended has none.
        std::thread::sleep(Duration::from_secs_f64(asked.seconds + 0.9));
        let client = Usage::of(pid);
        let output = child.wait_with_output().map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(format!("{name}: the client failed"));
        }
        let seen: Seen = serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())?;
        if door && asked.command == "set" {
            wait_until("kafka has the events", Duration::from_secs(60), || {
                self.region.status()["front_doors"][0]["queued_events"] == 0
            });
        }
        let used: Vec<Usage> = pids
            .iter()
            .zip(&before)
            .map(|(&pid, before)| Usage::of(pid).since(before))
            .collect();
        // With the second that does not count.
        let millions = seen.commands as f64 / 1e6 * (asked.seconds + 1.0) / asked.seconds;
        let per = |cpu: f64| cpu / millions;
        Ok(Case {
            name: name.to_owned(),
            through: if door { "front door" } else { "memcached" }.to_owned(),
            memcached: per(used[0].cpu_seconds),
            evrepl: per(used[1].cpu_seconds),
            producer: per(used[1].of_threads("rdk:") + used[1].of_threads("producer poll")),
            broker: per(used[2].cpu_seconds),
            client: per(client.cpu_seconds),
            seen,
        })
    }
}

/// Runs every case `runs` times, directly and through the front door in turn, keeps the results and gives a table.
///
/// # Errors
/// What stood in the way.
pub fn run(
    broker: &Broker,
    stop: &Stop,
    binary: Option<&Path>,
    settings: &[(String, String)],
    (runs, seconds): (u32, f64),
    (only, warm): (&[String], bool),
    folder: &Path,
) -> Result<String, String> {
    let mut all: Vec<Vec<Case>> = Vec::new();
    for run in 1..=runs {
        let world = World::start(broker, binary, settings);
        if run == 1 && warm {
            let asked = world.asks(true, "set", (16, 16), None, WARM_UP.as_secs_f64());
            warm_up(|| world.run("warm-up", true, asked.clone()).map(|_| ()))?;
        }
        let mut cases = Vec::new();
        for command in ["get", "set"] {
            for (connections, pipelined) in SHAPES {
                let name = format!("{command}, {connections} connections, {pipelined} at once");
                cases.push((name, command, connections, pipelined, None));
            }
            cases.push((
                format!("{command}, 16 connections, {RATE}/s"),
                command,
                16,
                1,
                Some(RATE),
            ));
        }
        cases.retain(|(name, ..)| only.is_empty() || only.iter().any(|part| name.contains(part.as_str())));
        if cases.is_empty() {
            return Err(format!("no case of the front door has {only:?} in its name"));
        }
        for (n, (name, command, connections, pipelined, rate)) in cases.into_iter().enumerate() {
            for door in if (n as u32 + run).is_multiple_of(2) {
                [false, true]
            } else {
                [true, false]
            } {
                if stop.asked() {
                    return Err("stopped".to_owned());
                }
                let asked = world.asks(door, command, (connections, pipelined), rate, seconds);
                eprintln!(
                    "run {run} of {runs}: {name}, {}",
                    if door { "front door" } else { "memcached" }
                );
                let case = world.run(&name, door, asked)?;
                let at = all
                    .iter()
                    .position(|cases| cases[0].name == case.name && cases[0].through == case.through);
                match at {
                    Some(at) => all[at].push(case),
                    None => all.push(vec![case]),
                }
            }
        }
    }
    let path = folder.join("door").join(format!("door-{}.json", now()));
    let result: Value = json!({
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "evrepl": binary,
        "machine": machine(),
        "cases": all,
    });
    let saved =
        std::fs::create_dir_all(folder.join("door")).and_then(|()| std::fs::write(&path, format!("{result:#}\n")));
    saved.map_err(|error| format!("{}: {error}", path.display()))?;
    eprintln!("{}", path.display());
    Ok(table(&all))
}

fn table(all: &[Vec<Case>]) -> String {
    let head = [
        "",
        "commands/s",
        "p50 ms",
        "p99 ms",
        "memcached",
        "evrepl",
        "of it producer",
        "broker",
        "client",
    ];
    let mut lines: Vec<Vec<String>> = vec![head.map(str::to_owned).to_vec()];
    for cases in all {
        let cell = |of: fn(&Case) -> f64, digits: usize| {
            let spread = Spread::of(cases.iter().map(of));
            spread.map_or_else(String::new, |spread| grouped(spread.median, digits))
        };
        lines.push(vec![
            format!("{}: {}", cases[0].name, cases[0].through),
            cell(|case| case.seen.commands as f64 / case.seen.seconds, 0),
            cell(|case| case.seen.latency.p50, 3),
            cell(|case| case.seen.latency.p99, 3),
            cell(|case| case.memcached, 2),
            cell(|case| case.evrepl, 2),
            cell(|case| case.producer, 2),
            cell(|case| case.broker, 2),
            cell(|case| case.client, 2),
        ]);
    }
    format!(
        "{}\nMedians; the columns from memcached on are CPU seconds a million commands.\n",
        markdown(&lines)
    )
}
