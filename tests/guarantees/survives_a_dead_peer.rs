//! While a peer is away Kafka holds what is meant for it, not the relay: memory and bytes in flight keep to their limits.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use evrepl_lab::*;

const LIMIT: Duration = Duration::from_secs(60);

const MIB: u64 = 1 << 20;

/// How far the relay may grow above its idle figure.
const GROWTH: u64 = 128 * MIB;

/// Between two looks at the relay's memory and bytes in flight.
const SAMPLE: Duration = Duration::from_millis(10);

/// The most that was seen of a relay, at any sample.
#[derive(Debug, Default)]
struct Peaks {
    samples: u64,
    rss: u64,
    in_flight_bytes: u64,
}

/// Looks at the relay all the time that `during` takes.
fn peaks(relay: &Region, during: impl FnOnce()) -> Peaks {
    /// Ends the looking, also when the test panics.
    struct Ends<'a>(&'a AtomicBool);
    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let looking = scope.spawn(|| {
            let mut peaks = Peaks::default();
            while !ended.load(Ordering::Relaxed) {
                peaks.rss = peaks.rss.max(relay.rss_bytes());
                if let Some(status) = relay.try_status() {
                    let number = |name: &str| status["flows"][0][name].as_u64().unwrap();
                    peaks.samples += 1;
                    peaks.in_flight_bytes = peaks.in_flight_bytes.max(number("in_flight_bytes"));
                }
                thread::park_timeout(SAMPLE);
            }
            peaks
        });
        let ends = Ends(&ended);
        during();
        drop(ends);
        looking.join().unwrap()
    })
}

#[test]
fn a_peer_that_is_down_for_300_000_writes_gets_them_all_and_costs_no_memory() {
    const WRITES: usize = 300_000;
    const IN_FLIGHT: u64 = 4_096;
    let _gate = exclusive();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .cache(CacheSpec::new("sessions").memcached_args(&["-m", "512"]))
        .us(|us| us.set("flow.max_in_flight_events", &IN_FLIGHT.to_string()))
        .build();
    pair.us.start();
    let sampler = Sampler::start(&[&pair.us]);
    let keys: Vec<String> = (0..WRITES).map(|n| format!("key:{n}")).collect();
    let value = |key: &String| format!("{key} {}", "x".repeat(100));
    let peaks = peaks(&pair.us, || {
        let mut writer = pair.us.writer("sessions");
        writer.set_all(keys.iter().map(|key| (key, value(key))));
        pair.us
            .wait_until("every partition is paused, with events in flight", LIMIT, |status| {
                let flow = &status["flows"][0];
                flow["paused_partitions"].as_u64() == Some(4) && flow["with_permit"].as_u64() > Some(0)
            });
        let flow = pair.us.flow("eu-west-1");
        assert_eq!(flow.state, "waiting_for_peer");
        assert!(flow.json["with_permit"].as_u64() <= Some(IN_FLIGHT), "{:#}", flow.json);
        assert_eq!(flow.finished(), 0, "nothing can have ended yet: {:?}", flow.outcomes);
        assert!(
            flow.consumed < WRITES as u64 / 4,
            "Kafka should hold the rest, not the relay"
        );
        pair.eu.start();
        settle_within(&pair.both(), 2 * LIMIT);
    });
    assert_same(&pair.both(), "sessions", &keys);
    accounted(&[&pair.us]);
    sampler.finish();
    let idle = pair.us.idle_rss_bytes();
    assert!(peaks.samples > 20 && idle > 0, "{peaks:?}");
    let grown = peaks.rss.saturating_sub(idle);
    assert!(
        grown <= GROWTH,
        "the relay grew by {} MiB above its idle {} MiB",
        grown / MIB,
        idle / MIB
    );
    assert_eq!(pair.us.status()["restarts"], serde_json::json!({}));
}

const LARGE: usize = 1_000_000;

/// What one value and all that belongs to it may count for, at most.
const LARGE_COUNTS: u64 = LARGE as u64 + 4_096;

/// A pair whose flow may hold 8 MiB of values, on memcacheds with room for 300 large ones.
fn eight_mebibytes() -> TwoRegionsSpec {
    TwoRegionsSpec::new()
        .one_way()
        .proxied()
        .cache(CacheSpec::new("sessions").memcached_args(&["-m", "1024"]))
        .us(|us| us.set("flow.max_in_flight_bytes", "\"8MiB\""))
}

#[test]
fn a_value_of_a_megabyte_does_not_break_the_limit_of_bytes_in_flight_by_more_than_one_read() {
    const VALUES: u64 = 300;
    let _gate = exclusive();
    let pair = eight_mebibytes().start();
    let sampler = Sampler::start(&[&pair.us]);
    let keys: Vec<String> = (0..VALUES).map(|n| format!("large:{n}")).collect();
    let mut writer = pair.us.writer("sessions");
    // All values before all events: making 300 MB of noise takes longer than a stalled session lasts.
    for (n, key) in keys.iter().enumerate() {
        let value = noise(n as u64, LARGE);
        writer.client().set(key.as_bytes(), &value, 0, 0).unwrap();
    }
    let peaks = peaks(&pair.us, || {
        // Nothing gets through at first, so that the relay holds all it is willing to.
        pair.us_to_eu().stall();
        keys.iter().for_each(|key| writer.say(Op::Set, key.as_bytes()));
        writer.flush();
        pair.us.wait_until("the relay holds all it may", LIMIT, |status| {
            status["flows"][0]["in_flight_bytes"].as_u64() > Some(7 * MIB)
        });
        pair.us_to_eu().pass();
        settle(&pair.both());
    });
    assert_same(&pair.both(), "sessions", &keys);
    assert_eq!(pair.eu.cache("sessions").memcached(0).client().items().unwrap(), VALUES);
    accounted(&[&pair.us]);
    sampler.finish();
    // Every value is of the same size, so a read asks for what fits; for one value at least.
    assert!(peaks.in_flight_bytes <= 8 * MIB + LARGE_COUNTS, "{peaks:?}");
    assert!(peaks.rss <= pair.us.idle_rss_bytes() + GROWTH, "{peaks:?}");
    assert_eq!(
        pair.us.flow("eu-west-1").json["in_flight_bytes"],
        0,
        "bytes were not given back"
    );
}

#[test]
fn values_that_grow_unexpectedly_break_the_limit_by_one_read_and_then_nobody_reads() {
    const READ: u64 = 16;
    let _gate = exclusive();
    let pair = eight_mebibytes()
        .us(|us| us.set("memcached.max_read_keys", &READ.to_string()))
        .start();
    let sampler = Sampler::start(&[&pair.us]);
    let mut writer = pair.us.writer("sessions");
    // The relay learns that values are small.
    let small: Vec<String> = (0..2_000).map(|n| format!("small:{n}")).collect();
    writer.set_all(small.iter().map(|key| (key, "small")));
    settle(&[&pair.us]);
    let keys: Vec<String> = (0..100).map(|n| format!("large:{n}")).collect();
    for (n, key) in keys.iter().enumerate() {
        let value = noise(n as u64, LARGE);
        writer.client().set(key.as_bytes(), &value, 0, 0).unwrap();
    }
    let peaks = peaks(&pair.us, || {
        pair.us_to_eu().stall();
        keys.iter().for_each(|key| writer.say(Op::Set, key.as_bytes()));
        writer.flush();
        pair.us.wait_until("the relay holds more than it may", LIMIT, |status| {
            status["flows"][0]["in_flight_bytes"].as_u64() > Some(8 * MIB)
        });
        pair.us_to_eu().pass();
        settle(&pair.both());
    });
    assert_same(&pair.both(), "sessions", &keys);
    accounted(&[&pair.us]);
    sampler.finish();
    assert!(peaks.in_flight_bytes <= 8 * MIB + READ * LARGE_COUNTS, "{peaks:?}");
    assert_eq!(
        pair.us.flow("eu-west-1").json["in_flight_bytes"],
        0,
        "bytes were not given back"
    );
}
