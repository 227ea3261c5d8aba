//! What each process of a run has used between two moments.

use std::collections::BTreeMap;

use evrepl_lab::Region;

use super::generate::child::Generator;
use super::measured::{Cpu, Measured};
use super::world::{CACHE, World};
use crate::processes::{Usage, child_with};

/// Threads that used less, in seconds a million events, are left out.
const SHOWN: f64 = 0.001;

/// The thread of the tool that takes what evrepl exports.
const SINK: &str = "otlp-sink";

/// The processes whose cost is counted, by what they are to the run.
#[derive(Debug)]
pub struct Costs {
    processes: Vec<(&'static str, u32, Usage)>,
}

impl Costs {
    /// Begins to count. Relays that run count from now on; those that don't are begun by [`Costs::relays`].
    pub fn begin(world: &World<'_>, generator: &Generator) -> Costs {
        let memcached = |region: &Region| child_with(&region.cache(CACHE).memcached(0).port().to_string());
        let mut pids = vec![
            ("broker", child_with("kafka.Kafka")),
            ("memcached of the relay", memcached(&world.relays[0])),
            ("generator", generator.pid()),
            ("tool", std::process::id()),
        ];
        for peer in &world.peers {
            pids.push(("agent", evrepl(peer)));
            pids.push(("memcached of the agent", memcached(peer)));
        }
        let relays = world.relays.iter().filter(|relay| relay.is_running());
        pids.extend(relays.map(|relay| ("relay", evrepl(relay))));
        let with_usage = |(role, pid)| (role, pid, Usage::of(pid));
        Costs {
            processes: pids.into_iter().map(with_usage).collect(),
        }
    }

    /// Counts all that relays use from their start on, which has just been.
    pub fn relays(&mut self, world: &World<'_>) {
        let started = world
            .relays
            .iter()
            .map(|relay| ("relay", evrepl(relay), Usage::default()));
        self.processes.extend(started);
    }

    /// Resident memory now, in MiB, of relays and agents.
    pub fn rss_mib(&self) -> BTreeMap<&'static str, f64> {
        let mut all = BTreeMap::new();
        for (role, pid, _) in &self.processes {
            if matches!(*role, "relay" | "agent") {
                *all.entry(*role).or_default() += mib(crate::processes::rss_bytes(*pid));
            }
        }
        all
    }

    /// What was used since the beginning, for `events`.
    pub fn read(&self, measured: &mut Measured, events: u64) {
        let million = events.max(1) as f64 / 1e6;
        let mut by_role: BTreeMap<&'static str, f64> = BTreeMap::new();
        for (role, pid, before) in &self.processes {
            let used = Usage::of(*pid).since(before);
            let mut cpu = used.cpu_seconds;
            if *role == "tool" {
                let sink = used.of_threads(SINK);
                by_role.insert("trace sink", sink / million);
                cpu -= sink;
            }
            *by_role.entry(role).or_default() += cpu / million;
            // Of the tool it is not known which of its threads it was.
            if *role != "tool" {
                let system = measured.system_seconds_per_million.entry(role).or_default();
                *system += used.system_seconds / million;
            }
            let peak = measured.peak_rss_mib.entry(role).or_default();
            *peak = peak.max(mib(used.peak_rss_bytes));
            let threads = measured.thread_cpu_seconds_per_million.entry(role).or_default();
            for (name, cpu) in used.threads {
                *threads.entry(name).or_default() += cpu / million;
            }
            threads.retain(|_, cpu| *cpu >= SHOWN);
        }
        measured.cpu = Cpu::new(&by_role);
        measured.cpu_seconds_per_million = by_role;
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn evrepl(region: &Region) -> u32 {
    child_with(&region.config_path().to_string_lossy())
}
