//! A drain whose processes run under valgrind, 50 times slower, and nobody shall notice; or under `perf`, at full speed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use evrepl_lab::{Broker, CacheSpec, OtlpSink, Region, RegionBuilder, Signal, TwoRegions, TwoRegionsSpec, flows};

use super::callgrind::Thread;
use super::flame::Flame;
use super::rules::Process;
use crate::processes::child_with;
use crate::runs::generate::Spec;
use crate::runs::generate::events::Target;
use crate::runs::generate::keys::{KeySpec, Keys};
use crate::runs::generate::writer::Writer;
use crate::runs::progress::Progress;
use crate::runs::verify;
use crate::runs::world::{CACHE, Totals};
use crate::stop::Stop;

/// Memory of each memcached: nothing may be evicted.
const MEMCACHED_MIB: &str = "2048";

/// The part of events that is traced, as by default.
const TRACE_RATIO: f64 = 0.001;

/// Partitions of the topic, as in the drains of the load runs.
const PARTITIONS: i32 = 4;

/// Every timeout as many times longer as valgrind makes a program slower, or more: nothing is to be restarted, and a batch is
/// to fill as it does at full speed. What goes by the clock (canaries, slow traces) is off: it would count 50 times.
const SLOW: &str = "
[kafka]
session_timeout = \"250s\"
commit_interval = \"30s\"
[agent]
idle_timeout = \"200s\"
[link]
connect_timeout = \"100s\"
ping_interval = \"50s\"
idle_timeout = \"200s\"
[memcached]
connect_timeout = \"60s\"
timeout = \"100s\"
slow_after = \"100s\"
[supervision]
stalled_after = \"600s\"
[drain]
grace_period = \"300s\"
[flow]
gather = \"50ms\"
retry_budget = \"600s\"
revoke_timeout = \"60s\"
[batch]
linger = \"100ms\"
[telemetry]
slow_after = \"3600s\"
";

/// The C library copies and fills what is large with `rep movsb` and `rep stosb`, and valgrind counts these once for each byte.
/// With a threshold that nothing reaches it takes vector instructions, and a copy counts by what it is.
const TUNABLES: &str = "glibc.cpu.x86_rep_movsb_threshold=0x40000000:glibc.cpu.x86_rep_stosb_threshold=0x40000000";

/// How often it is looked how far they are; the looking costs the relay nothing, it is the destination's memcached that is
/// asked.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// evrepl starts within this, under valgrind and on a busy machine.
const READY_WITHIN: Duration = Duration::from_secs(240);

/// What finishes nothing for so long has lost what is left.
const STALLED_AFTER: Duration = Duration::from_secs(240);

/// A drained process under valgrind has ended and written its files within this.
const ENDED_WITHIN: Duration = Duration::from_secs(300);

/// What shall be drained.
#[derive(Clone, Copy, Debug)]
pub struct Drain<'a> {
    pub events: u64,
    pub value_bytes: usize,
    /// Of evrepl, beyond those that valgrind makes necessary, as TOML.
    pub settings: &'a str,
}

impl Drain<'_> {
    /// Each event is of a key of its own.
    fn keys(&self) -> KeySpec {
        KeySpec {
            count: self.events,
            zipf: 0.0,
        }
    }
}

/// Drains once under callgrind, whose files stay in `folder`; what was there before goes. `None` when somebody asked to stop.
///
/// # Errors
/// What was wrong with the run: nothing of it may be believed then.
///
/// # Panics
/// When something doesn't start, or breaks.
pub fn counted(
    broker: &Broker,
    sink: &OtlpSink,
    drain: Drain<'_>,
    folder: &Path,
    stop: &Stop,
) -> Result<Option<()>, String> {
    // Files of threads that there are no more would be taken for this drain's.
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
    let slow = format!("{SLOW}{}", drain.settings);
    let pair = build(broker, sink, &slow, |process| valgrind(folder, process));
    if !filled(&pair, drain, stop) {
        return Ok(None);
    }
    pair.us.spawn();
    if !ready(&pair.us, stop) || !drained(&pair, drain.events, stop)? {
        return Ok(None);
    }
    let flow = pair.us.flow(pair.eu.name());
    for region in [&pair.us, &pair.eu] {
        region.signal(Signal::Terminate);
        match region.exit_code(ENDED_WITHIN) {
            Some(0) => {}
            Some(code) => {
                return Err(format!(
                    "evrepl of {} ended with {code}:\n{}",
                    region.name(),
                    region.log_tail(20)
                ));
            }
            None => return Err(format!("evrepl of {} runs on after SIGTERM", region.name())),
        }
        let log = region.log();
        // What restarts or waits under valgrind does other work than a drain does.
        if let Some(line) = log
            .lines()
            .find(|line| line.contains("ERROR") || line.contains("restart"))
        {
            return Err(format!("the log of {}: {line}", region.name()));
        }
    }
    let (lost, _) = verify::lost(&pair.eu, &Keys::new(drain.keys()), drain.events, drain.value_bytes);
    let evicted = verify::evictions(&pair.us) + verify::evictions(&pair.eu);
    match verify::accounts(&Totals::of(&[flow]), drain.events, 1) {
        Some(problem) => Err(problem),
        None if lost + evicted > 0 => Err(format!(
            "{lost} values are not as they were written, {evicted} were evicted"
        )),
        None => Ok(Some(())),
    }
}

fn build(broker: &Broker, sink: &OtlpSink, settings: &str, under: impl Fn(Process) -> Vec<String>) -> TwoRegions {
    let cache = CacheSpec::new("sessions")
        .partitions(PARTITIONS)
        .memcached_args(&["-m", MEMCACHED_MIB]);
    let (us, eu) = (broker.client(), broker.client());
    let under = |process| {
        let words = under(process);
        move |builder: RegionBuilder| match words.is_empty() {
            true => builder,
            false => builder.under(&words).env("GLIBC_TUNABLES", TUNABLES),
        }
    };
    let (relay, agent) = (under(Process::Relay), under(Process::Agent));
    TwoRegionsSpec::new()
        .one_way()
        .cache(cache)
        .telemetry(&sink.endpoint(), TRACE_RATIO)
        .extra(settings)
        .us(move |builder| relay(builder.kafka(&us)))
        .eu(move |builder| agent(builder.kafka(&eu)))
        .build()
}

/// Starts the agent and fills the topic; whether both is done, false when somebody asked to stop.
fn filled(pair: &TwoRegions, drain: Drain<'_>, stop: &Stop) -> bool {
    pair.eu.spawn();
    let mut progress = Progress::new("written, the relay stopped", drain.events);
    let source = pair.us.cache(CACHE);
    let spec = Spec {
        memcached: source.memcached(0).address(),
        destination: String::new(),
        target: Target {
            kafka: pair.us.kafka().address().into(),
            topic: source.topic.clone(),
            partitions: PARTITIONS,
            linger_ms: 1.0,
        },
        keys: drain.keys(),
        value_bytes: drain.value_bytes,
    };
    let written = Writer::connect(&spec).and_then(|mut writer| {
        writer.fill(drain.events, |done| {
            progress.at(done);
            stop.asked()
        })
    });
    if let Err(error) = written {
        panic!("writing memcached: {error}");
    }
    !stop.asked() && ready(&pair.eu, stop)
}

/// Drains once at full speed while `perf` takes samples of both processes, and gives what it saw of the relay and the agent.
/// `None` when somebody asked to stop.
///
/// # Errors
/// When perf can't, or something is wrong with the drain.
///
/// # Panics
/// When something doesn't start, or breaks.
pub fn sampled(
    broker: &Broker,
    sink: &OtlpSink,
    drain: Drain<'_>,
    folder: &Path,
    stop: &Stop,
) -> Result<Option<[(Process, Flame); 2]>, String> {
    fs::create_dir_all(folder).map_err(|error| format!("cannot make {}: {error}", folder.display()))?;
    let pair = build(broker, sink, drain.settings, |_| Vec::new());
    if !filled(&pair, drain, stop) {
        return Ok(None);
    }
    pair.us.spawn();
    let regions = [(Process::Relay, &pair.us), (Process::Agent, &pair.eu)];
    let recorders = regions.map(|(process, region)| {
        let data = folder.join(format!("{}.perf", process.name()));
        (perf_record(region, &data, folder), data)
    });
    if !drained(&pair, drain.events, stop)? {
        return Ok(None);
    }
    for (recorder, _) in &recorders {
        recorder.signal(Signal::Interrupt);
    }
    let flames = recorders.each_ref().map(|(recorder, data)| {
        if recorder.wait(ENDED_WITHIN).is_none() {
            return Err("perf record does not end".into());
        }
        perf_script(data).map_err(|error| format!("perf: {error}\n{}", recorder.log_tail(20)))
    });
    let [relay, agent] = flames;
    Ok(Some([(Process::Relay, relay?), (Process::Agent, agent?)]))
}

fn perf_record(region: &Region, data: &Path, folder: &Path) -> evrepl_lab::Process {
    let mut command = Command::new("perf");
    // The clock, because a virtual machine seldom has counters; a prime, so that nothing periodic is missed or met.
    command.args(["record", "-e", "cpu-clock", "-F", "997", "--call-graph", "fp", "-p"]);
    command.arg(child_with(&region.config_path().to_string_lossy()).to_string());
    command.arg("-o").arg(data);
    evrepl_lab::Process::spawn("perf", command, &folder.join("perf.log"))
}

fn perf_script(data: &Path) -> Result<Flame, String> {
    let output = Command::new("perf")
        .args(["script", "--no-inline", "--no-demangle", "-F", "comm,ip,sym", "-i"])
        .arg(data)
        .output()
        .map_err(|error| error.to_string())?;
    let flame = Flame::parse(&String::from_utf8_lossy(&output.stdout));
    match flame.samples() {
        0 => Err(format!("no samples: {}", String::from_utf8_lossy(&output.stderr))),
        _ => Ok(flame),
    }
}

/// In front of evrepl's own command line.
fn valgrind(folder: &Path, process: Process) -> Vec<String> {
    let out = folder.join(process.name());
    [
        "valgrind",
        "--tool=callgrind",
        // Names as the linker has them: two functions that differ in a type alone stay two.
        "--demangle=no",
        "--dump-instr=yes",
        "--separate-threads=yes",
        // Else a thread that always has work keeps the others from theirs.
        "--fair-sched=try",
        &format!("--callgrind-out-file={}", out.display()),
    ]
    .map(String::from)
    .into()
}

/// Whether it is ready; false when somebody asked to stop.
fn ready(region: &Region, stop: &Stop) -> bool {
    let started = Instant::now();
    while !matches!(region.get("/readyz"), Ok((200, _))) {
        assert!(
            region.is_running(),
            "evrepl of {} ended:\n{}",
            region.name(),
            region.log_tail(60)
        );
        assert!(
            started.elapsed() < READY_WITHIN,
            "evrepl of {} is not ready",
            region.name()
        );
        if stop.wait(LOOK_EVERY) {
            return false;
        }
    }
    true
}

fn drained(pair: &TwoRegions, events: u64, stop: &Stop) -> Result<bool, String> {
    let mut destination = pair.eu.cache("sessions").memcached(0).client();
    let mut progress = Progress::new("drained", events);
    let (mut last, mut moved) = (0, Instant::now());
    loop {
        for region in [&pair.us, &pair.eu] {
            assert!(
                region.is_running(),
                "evrepl of {} has ended:\n{}",
                region.name(),
                region.log_tail(60)
            );
        }
        let mut now = destination
            .items()
            .map_err(|error| format!("asking the destination: {error}"))?;
        progress.at(now);
        if now >= events {
            // All is written; the accounts follow with the last ack.
            let status = pair.us.try_status();
            let flow = status.and_then(|status| flows(&status).ok()?.into_iter().next());
            if flow.is_some_and(|flow| flow.finished() >= events) {
                return Ok(true);
            }
            now = events;
        }
        if now > last {
            (last, moved) = (now, Instant::now());
        } else if moved.elapsed() > STALLED_AFTER {
            return Err(format!("stalled at {last} of {events}:\n{}", pair.us.log_tail(20)));
        }
        if stop.wait(LOOK_EVERY) {
            return Ok(false);
        }
    }
}

/// The threads of a process, from the files that [`counted`] left.
///
/// # Errors
/// When one can't be read.
pub fn threads(folder: &Path, process: Process) -> Result<Vec<Thread>, String> {
    let listed = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mine = format!("{}-", process.name());
    let mut paths: Vec<PathBuf> = listed.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(&mine))
    });
    paths.sort();
    if paths.is_empty() {
        return Err(format!(
            "{}: callgrind has left no file of the {}",
            folder.display(),
            process.name()
        ));
    }
    let read = |path: &PathBuf| {
        let bytes = fs::read(path).map_err(|error| error.to_string())?;
        // Names of files may be anything.
        Thread::parse(&String::from_utf8_lossy(&bytes))
    };
    paths
        .iter()
        .map(|path| read(path).map_err(|error| format!("{}: {error}", path.display())))
        .collect()
}
