//! The generator does what it says, and short runs of every kind come to their end with files that say so.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use evrepl_lab::{Dir, Memcached, broker, exclusive, shared, unique};
use evrepl_load::runs::generate::child::Generator;
use evrepl_load::runs::generate::events::Target;
use evrepl_load::runs::generate::keys::{KeySpec, Keys, key};
use evrepl_load::runs::generate::pipe::Pipe;
use evrepl_load::runs::generate::{OpenLoop, Spec, Wrote};
use evrepl_load::values::Values;
use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_evrepl-load");

/// What the generator is asked, answered by a machine that compiles meanwhile.
const ANSWERS_WITHIN: Duration = Duration::from_secs(60);

/// A generator whose values are readable at once: both memcacheds are the same.
fn generator(memcached: &Memcached, keys: KeySpec) -> (Generator, Spec) {
    let topic = unique("generator");
    broker().create_topic(&topic, 4, &[]);
    let spec = Spec {
        memcached: memcached.address(),
        destination: memcached.address(),
        target: Target {
            kafka: broker().address().into(),
            topic,
            partitions: 4,
            linger_ms: 1.0,
        },
        keys,
        value_bytes: 100,
    };
    (Generator::start(Path::new(PROGRAM), &spec), spec)
}

fn open_loop(first: u64, rate: u64, warm_up: u64, count: u64) -> OpenLoop {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    OpenLoop {
        first,
        start_unix_nanos: now.as_nanos() as u64,
        rate,
        warm_up,
        count,
        watch_every: 2,
        tick_micros: 1_000,
    }
}

fn wrote(generator: &mut Generator) -> Wrote {
    loop {
        if let Some(wrote) = generator.wrote() {
            return wrote;
        }
        generator.listen(ANSWERS_WITHIN);
    }
}

#[test]
fn the_generator_writes_every_key_and_an_event_for_each_write_and_sees_what_it_watches() {
    let _gate = shared();
    let memcached = Memcached::start();
    let spec = KeySpec {
        count: 3_000,
        zipf: 0.0,
    };
    let (mut generator, told) = generator(&memcached, spec);
    assert_eq!(generator.fill(10_000, |_| false).written, 10_000);
    generator.open_loop(open_loop(10_000, 10_000, 500, 1_500));
    assert_eq!(wrote(&mut generator).written, 12_000);
    while generator.seen().is_none() {
        generator.listen(ANSWERS_WITHIN);
    }
    let seen = generator.seen().unwrap();
    assert_eq!((seen.latency_ms.samples, seen.missing), (750, 0));

    let mut pipe = Pipe::connect(&memcached.address(), Values::new(100)).unwrap();
    assert_eq!(pipe.differ(&Keys::new(spec).last_writes(12_000)).unwrap(), 0);
    let records = broker().read_all(&told.target.topic);
    assert_eq!(records.len(), 12_000);
    // Each key in one partition, with as many events as it was written.
    let of_key_7: Vec<i32> = records
        .iter()
        .filter(|record| record.key() == key(7))
        .map(|record| record.partition)
        .collect();
    assert_eq!(of_key_7, [of_key_7[0]; 4]);
    assert!((0..4).all(|partition| records.iter().filter(|record| record.partition == partition).count() > 2_000));
}

#[test]
fn a_generator_that_is_told_to_halt_stops_writing_and_goes_on_when_it_is_told_to() {
    let _gate = shared();
    let memcached = Memcached::start();
    let (mut generator, told) = generator(
        &memcached,
        KeySpec {
            count: 1_000,
            zipf: 1.1,
        },
    );
    generator.open_loop(open_loop(0, 1_000, 0, 3_600_000));
    while generator.written() < 100 {
        generator.listen(ANSWERS_WITHIN);
    }
    generator.halt();
    let halted = wrote(&mut generator).written;
    assert!((100..3_600_000).contains(&halted), "{halted}");
    assert_eq!(generator.fill(500, |_| false).written, halted + 500);
    let end: i64 = broker()
        .end_offsets(&told.target.topic)
        .iter()
        .map(|(_, end)| end)
        .sum();
    assert_eq!(end as u64, halted + 500);
}

/// Runs the tool; the medians that its files hold, by scenario, and what it printed.
fn run(arguments: &[&str]) -> (BTreeMap<String, Value>, String) {
    let dir = Dir::new("load-runs");
    let output = Command::new(PROGRAM)
        .args(["--cold", "--out"])
        .arg(dir.path())
        .args(arguments)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    let files = std::fs::read_dir(dir.path()).unwrap().flatten();
    let report = |path: PathBuf| -> Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    let mut medians = BTreeMap::new();
    for report in files.map(|file| report(file.path())) {
        for run in report["runs"].as_array().unwrap() {
            assert_eq!((&run["lost"], &run["problems"]), (&json!(0), &json!([])), "{run:#}");
        }
        medians.insert(
            report["scenario"]["name"].as_str().unwrap().into(),
            report["median"].clone(),
        );
    }
    let printed = [output.stdout, output.stderr].concat();
    (medians, String::from_utf8_lossy(&printed).into_owned())
}

#[test]
fn short_runs_of_every_kind_lose_nothing_and_say_what_they_measured() {
    let _gate = exclusive();
    // Not sustained-…: whether the lag grows is the machine's affair, and others may use it.
    let names = ["drain-100", "hot-100", "peers-2", "relays-2", "fixed-1k"];
    let mut arguments: Vec<&str> = names.iter().flat_map(|name| ["--scenario", name]).collect();
    arguments.extend(["--events", "20000", "--rate", "400"]);
    let (medians, printed) = run(&arguments);
    assert!(printed.contains("| superseded share "), "{printed}");
    let spans = printed.lines().find_map(|line| line.strip_suffix(" spans were taken"));
    assert!(
        spans.is_some_and(|spans| spans.parse::<u64>().unwrap() > 0),
        "{printed}"
    );
    let number = |name: &str, place: &str| medians[name].pointer(place).and_then(Value::as_f64).unwrap_or(-1.0);
    for name in names {
        let all = &medians[name];
        assert!(
            number(name, "/compared") > 0.0 && number(name, "/items_per_batch") >= 1.0,
            "{all:#}"
        );
        assert!(number(name, "/cpu/relay_and_agent_by_memcacheds") > 0.0, "{all:#}");
        assert!(number(name, "/cpu_seconds_per_million/generator") >= 0.0, "{all:#}");
        let system = number(name, "/system_seconds_per_million/relay");
        assert!(system <= number(name, "/cpu_seconds_per_million/relay"), "{all:#}");
    }
    // A drain so short may lie between two samples: then it has no rate.
    assert!(number("drain-100", "/events_per_second") != 0.0);
    assert!(number("hot-100", "/superseded_share") > 0.2 && number("hot-100", "/compared") < 15_000.0);
    assert_eq!(
        (number("peers-2", "/events"), number("peers-2", "/compared")),
        (40_000.0, 40_000.0)
    );
    let fixed = &medians["fixed-1k"];
    assert_eq!(number("fixed-1k", "/latency_ms/samples"), 1_000.0, "{fixed:#}");
    assert!(number("fixed-1k", "/lag/seconds/last") >= 0.0, "{fixed:#}");
    assert!(
        fixed["rss_mib_by_second"]["relay"].as_array().unwrap().len() >= 5,
        "{fixed:#}"
    );
}
