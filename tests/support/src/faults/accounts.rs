//! What every process says of itself during a run: whether its sums hold at each sample, and how much memory it took.

use std::collections::{BTreeMap, HashMap};
use std::process::Command;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use evrepl::outcome::Outcome;

use crate::region::{Region, balanced, evrepl, flows};

/// Often enough to meet a sum that is wrong for a moment, seldom enough to cost no core.
const SAMPLE: Duration = Duration::from_millis(50);

/// What was seen of all processes together.
#[derive(Debug, Default)]
pub struct Accounts {
    pub samples: u64,
    /// The first few moments when a sum was wrong.
    pub wrong: Vec<String>,
    /// The most memory that a process of a region and node ever had, by its name.
    pub peaks: BTreeMap<String, u64>,
    /// How often each process ended events so, the last thing that was heard of it, by process and outcome.
    outcomes: HashMap<(u32, &'static str), u64>,
}

impl Accounts {
    /// Over all processes, dead ones included as far as they were heard.
    pub fn outcome(&self, outcome: Outcome) -> u64 {
        let of = |((_, name), count): (&(u32, &'static str), &u64)| (*name == outcome.name()).then_some(*count);
        self.outcomes.iter().filter_map(of).sum()
    }

    fn look(&mut self, region: &Region, status: &serde_json::Value, pid: u32) {
        self.samples += 1;
        if let Err(error) = balanced(status)
            && self.wrong.len() < 5
        {
            self.wrong
                .push(format!("{} ({}): {error}", region.name(), region.node()));
        }
        for outcome in Outcome::ALL {
            let count = flows(status).map_or(0, |flows| flows.iter().map(|flow| flow.outcome(outcome)).sum());
            let last = self.outcomes.entry((pid, outcome.name())).or_default();
            *last = count.max(*last);
        }
    }
}

/// Looks at these processes until `stop`, each from a thread of its own: one that is frozen holds up no other.
pub fn sample(regions: &[&Region], stop: &AtomicBool) -> Accounts {
    let all = Mutex::new(Accounts::default());
    thread::scope(|scope| {
        for &region in regions {
            let all = &all;
            scope.spawn(move || {
                // Once more after the end: that is when all must be right.
                let mut ended = false;
                while !ended {
                    ended = stop.load(Relaxed);
                    let memory = region.peak_rss_bytes();
                    let status = region.try_status();
                    let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some((pid, bytes)) = memory {
                        let peak = all.peaks.entry(name_of(region)).or_default();
                        *peak = bytes.max(*peak);
                        if let Some(status) = status {
                            all.look(region, &status, pid);
                        }
                    }
                    drop(all);
                    thread::sleep(SAMPLE);
                }
            });
        }
    });
    all.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// As the table calls a process.
pub fn name_of(region: &Region) -> String {
    format!("{} {}", region.name(), region.node())
}

/// The limit that `evrepl check` prints for a region's configuration: its line `together`, in bytes.
///
/// # Errors
/// When it refuses the configuration, or prints no such line.
pub fn memory_limit(region: &Region) -> Result<u64, String> {
    let output = Command::new(evrepl())
        .arg("check")
        .arg("--config")
        .arg(region.config_path())
        .output()
        .map_err(|error| format!("evrepl check: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.trim().strip_prefix("together"));
    let mib = line.and_then(|line| line.trim().strip_suffix("MiB")?.trim().parse::<u64>().ok());
    mib.map(|mib| mib << 20).ok_or_else(|| {
        format!(
            "evrepl check prints no limit of memory: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        )
    })
}
