//! What processes cost, as the kernel counts it in /proc.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use evrepl_lab::holds_within;

/// Clock ticks a second in /proc; 100 on every Linux that evrepl is built for.
const TICKS: f64 = 100.0;

/// A process that was started shows its arguments within this, on a machine however busy.
const STARTED_WITHIN: Duration = Duration::from_secs(5);

/// What a process has used so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    /// User and system, in seconds, threads that have ended included.
    pub cpu_seconds: f64,
    /// What of it the kernel ran for the process: sockets, mostly.
    pub system_seconds: f64,
    /// User and system by the name of the thread; threads of one name together, only those that live.
    pub threads: BTreeMap<String, f64>,
    /// The most resident memory it ever had, in bytes.
    pub peak_rss_bytes: u64,
}

impl Usage {
    /// Of a process; all zero when there is none of this id.
    pub fn of(pid: u32) -> Usage {
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let mut threads = BTreeMap::new();
        for thread in fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            let exact = fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
            if let Some(stat) = parse_stat(&stat) {
                let cpu = parse_schedstat(&exact).unwrap_or(stat.cpu_seconds);
                *threads.entry(stat.name.to_string()).or_default() += cpu;
            }
        }
        let stat = read("stat");
        let stat = parse_stat(&stat);
        Usage {
            cpu_seconds: stat.as_ref().map_or(0.0, |stat| stat.cpu_seconds),
            system_seconds: stat.as_ref().map_or(0.0, |stat| stat.system_seconds),
            threads,
            peak_rss_bytes: in_kib(&read("status"), "VmHWM:"),
        }
    }

    /// What was used between `before` and now; the peak stays as it is.
    pub fn since(&self, before: &Usage) -> Usage {
        let less = |(name, cpu): (&String, &f64)| (name.clone(), cpu - before.threads.get(name).unwrap_or(&0.0));
        Usage {
            cpu_seconds: self.cpu_seconds - before.cpu_seconds,
            system_seconds: self.system_seconds - before.system_seconds,
            threads: self.threads.iter().map(less).collect(),
            peak_rss_bytes: self.peak_rss_bytes,
        }
    }

    /// CPU seconds of the threads whose name begins so.
    pub fn of_threads(&self, prefix: &str) -> f64 {
        let named = self.threads.iter().filter(|(name, _)| name.starts_with(prefix));
        named.map(|(_, cpu)| cpu).sum()
    }
}

/// The child of this process that was called with an argument that ends in `argument`.
///
/// # Panics
/// When there is none: whoever asks has started it.
pub fn child_with(argument: &str) -> u32 {
    let mut found = None;
    // A process has no arguments yet for a moment while it turns into its program.
    holds_within(STARTED_WITHIN, || {
        found = find_child(argument);
        found.is_some()
    });
    found.unwrap_or_else(|| panic!("no process of ours was started with {argument}"))
}

fn find_child(argument: &str) -> Option<u32> {
    let us = std::process::id();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok());
    pids.find(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        parse_stat(&stat).is_some_and(|stat| stat.parent == us)
            && arguments
                .split(|byte| *byte == 0)
                .any(|one| one.ends_with(argument.as_bytes()))
    })
}

struct Stat<'a> {
    name: &'a str,
    parent: u32,
    cpu_seconds: f64,
    system_seconds: f64,
}

/// A line of /proc/<pid>/stat: the second field is the name in parentheses and may hold anything.
fn parse_stat(line: &str) -> Option<Stat<'_>> {
    let (head, rest) = line.rsplit_once(')')?;
    let (_, name) = head.split_once('(')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // After the name: state, parent, ...; user and system time are the 14th and 15th of the line.
    let seconds = |index: usize| Some(fields.get(index)?.parse::<u64>().ok()? as f64 / TICKS);
    let (user, system) = (seconds(11)?, seconds(12)?);
    Some(Stat {
        name,
        parent: fields.get(1)?.parse().ok()?,
        cpu_seconds: user + system,
        system_seconds: system,
    })
}

/// Resident memory of a process now, in bytes; 0 when there is none of this id.
pub fn rss_bytes(pid: u32) -> u64 {
    in_kib(
        &fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default(),
        "VmRSS:",
    )
}

/// A thread's line of /proc/<pid>/task/<tid>/schedstat begins with its time on a CPU in nanoseconds, where the kernel keeps it.
fn parse_schedstat(line: &str) -> Option<f64> {
    let nanos: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(nanos as f64 / 1e9)
}

/// A line of /proc/<pid>/status that is in kB, as bytes.
fn in_kib(status: &str, name: &str) -> u64 {
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1_024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_and_blanks_does_not_shift_the_fields() {
        let line =
            "4242 (rdk: (b) 1) S 17 4242 4242 0 -1 4194560 10 0 0 0 250 50 0 0 20 0 1 0 99 1000 5 18446744073709551615";
        let stat = parse_stat(line).unwrap();
        assert_eq!((stat.name, stat.parent), ("rdk: (b) 1", 17));
        assert_eq!((stat.cpu_seconds, stat.system_seconds), (3.0, 0.5));
        assert_eq!(parse_schedstat("2500000000 17 4\n"), Some(2.5));
        assert!(parse_schedstat("").is_none());
        assert!(parse_stat("").is_none() && parse_stat("1 (x) S").is_none());
        assert_eq!(in_kib("VmPeak:\t 900 kB\nVmHWM:\t 300 kB\n", "VmHWM:"), 300 << 10);
    }

    #[test]
    fn usage_of_ourselves_names_our_threads_and_only_grows() {
        let before = Usage::of(std::process::id());
        let mut mixer = crate::values::Mixer::new(1);
        let sum = (0..5_000_000).fold(0_u64, |sum, _| sum.wrapping_add(mixer.draw()));
        std::hint::black_box(sum);
        let after = Usage::of(std::process::id());
        assert!(after.peak_rss_bytes > 0 && !after.threads.is_empty());
        assert!(after.since(&before).cpu_seconds >= 0.0);
        assert_eq!(Usage::of(u32::MAX), Usage::default());
    }
}
