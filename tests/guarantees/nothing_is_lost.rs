//! Whatever dies on the way, every key ends equal and every event is accounted for.
//!
//! Half of the writes go to keys that are written only once: on any other key the next write would heal a loss and hide it.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use evrepl::outcome::Outcome;
use evrepl_lab::*;

const LIMIT: Duration = Duration::from_secs(60);

/// Writes of one test.
const WRITES: usize = 50_000;

/// Keys that the other half of the writes goes to, over and over.
const HOT_KEYS: usize = 500;

/// A piece of writes: events of a piece leave after all its values are written.
const PIECE: usize = 500;

/// How long a process that is back may take until it finishes its first event.
const RESUMES_WITHIN: Duration = Duration::from_secs(3);

/// Watermarks are committed all the time: an offset that is committed too early is then a loss, and not undone by a replay of
/// everything since the last second.
const COMMITS: &str = "[kafka]\ncommit_interval = \"10ms\"\n";

const EU: &str = "eu-west-1";

fn key(write: usize) -> String {
    match write % 2 {
        0 => format!("once:{write}"),
        _ => format!("hot:{}", write % HOT_KEYS),
    }
}

/// Every key that was ever written by this many writes.
fn keys(writes: usize) -> Vec<String> {
    let all: HashSet<String> = (0..writes).map(key).collect();
    all.into_iter().collect()
}

/// The application: 50 000 writes on a thread of its own, while the test breaks things.
fn write_on(mut writer: Writer) -> JoinHandle<()> {
    thread::spawn(move || {
        for piece in 0..WRITES / PIECE {
            let writes = piece * PIECE..(piece + 1) * PIECE;
            writer.set_all(writes.map(|write| (key(write), format!("value {write}"))));
        }
    })
}

/// Waits until a part of the writes has arrived, and a part has not.
fn in_the_middle(region: &Region) {
    region.wait_until("a fifth of the writes has arrived", LIMIT, |status| {
        flows(status).is_ok_and(|flows| flows[0].finished() >= WRITES as u64 / 5)
    });
    let arrived = region.flow(EU).finished();
    assert!(arrived < WRITES as u64, "too late: everything has arrived already");
}

/// From now, which should be when the process is spawned, to its first finished event.
fn time_to_work(region: &Region) -> Duration {
    let spawned = Instant::now();
    region.spawn();
    region.wait_until("an event is finished", LIMIT, |status| {
        flows(status).is_ok_and(|flows| flows[0].finished() > 0)
    });
    spawned.elapsed()
}

/// Nothing differs, nothing is in flight, and every sample added up.
fn all_arrived(pair: &TwoRegions, sampler: Sampler) {
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys(WRITES));
    for region in pair.both() {
        balanced(&region.status()).unwrap();
    }
    sampler.finish();
}

/// So far apart that the relay always has work in its hands, whatever the moment it dies.
fn far_apart(pair: TwoRegions) -> TwoRegions {
    pair.us_to_eu().latency(Duration::from_millis(20));
    pair
}

fn memcached() -> CacheSpec {
    CacheSpec::new("sessions").memcached_args(&["-m", "256"])
}

#[test]
fn a_relay_that_is_restarted_in_the_middle_of_writes_drains_resumes_within_three_seconds_and_loses_nothing() {
    let _gate = exclusive();
    let pair = far_apart(
        TwoRegionsSpec::new()
            .cache(memcached())
            .extra(COMMITS)
            .proxied()
            .start(),
    );
    let sampler = Sampler::start(&pair.both());
    let writing = write_on(pair.us.writer("sessions"));
    in_the_middle(&pair.us);
    assert_eq!(pair.us.terminate(), 0, "a relay that can drain says so");
    let resumed = time_to_work(&pair.us);
    println!("work resumed after {resumed:?}");
    assert!(resumed <= RESUMES_WITHIN, "work resumed only after {resumed:?}");
    writing.join().unwrap();
    all_arrived(&pair, sampler);
}

#[test]
fn a_relay_that_is_killed_in_the_middle_of_writes_resumes_within_three_seconds_and_loses_nothing() {
    let _gate = exclusive();
    let pair = far_apart(
        TwoRegionsSpec::new()
            .cache(memcached())
            .extra(COMMITS)
            .proxied()
            .start(),
    );
    let sampler = Sampler::start(&pair.both());
    let writing = write_on(pair.us.writer("sessions"));
    in_the_middle(&pair.us);
    assert!(pair.us.flow(EU).in_flight > 0, "it has nothing in its hands");
    pair.us.kill();
    let resumed = time_to_work(&pair.us);
    println!("work resumed after {resumed:?}");
    assert!(resumed <= RESUMES_WITHIN, "work resumed only after {resumed:?}");
    writing.join().unwrap();
    all_arrived(&pair, sampler);
}

#[test]
fn an_agent_that_is_killed_in_the_middle_of_writes_loses_nothing() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().cache(memcached()).start();
    let sampler = Sampler::start(&pair.both());
    let writing = write_on(pair.us.writer("sessions"));
    in_the_middle(&pair.us);
    pair.eu.kill();
    pair.us.wait_until("the relay has noticed", LIMIT, |status| {
        flows(status).is_ok_and(|flows| flows[0].state == "waiting_for_peer")
    });
    pair.eu.start();
    writing.join().unwrap();
    all_arrived(&pair, sampler);
    accounted(&[&pair.us]);
}

#[test]
fn a_link_that_is_cut_twice_in_the_middle_of_writes_loses_nothing() {
    let _gate = shared();
    let pair = far_apart(TwoRegionsSpec::new().cache(memcached()).proxied().start());
    let sampler = Sampler::start(&pair.both());
    let writing = write_on(pair.us.writer("sessions"));
    in_the_middle(&pair.us);
    pair.us_to_eu().cut();
    pair.us
        .wait_until("what was in flight waits as dirty keys", LIMIT, |status| {
            status["flows"][0]["dirty"].as_u64() > Some(0)
        });
    pair.us_to_eu().pass();
    let before = pair.us.flow(EU).finished();
    // In its second session: an event that joins a dirty key ends the older one also without a session.
    pair.us.wait_until("it goes on", LIMIT, |status| {
        let again = status["flows"][0]["reconnects"].as_u64() >= Some(1);
        again && flows(status).is_ok_and(|flows| flows[0].finished() > before)
    });
    pair.us_to_eu().close_connections();
    pair.us.wait_until("it has its third session", LIMIT, |status| {
        status["flows"][0]["reconnects"].as_u64() >= Some(2)
    });
    writing.join().unwrap();
    all_arrived(&pair, sampler);
    accounted(&pair.both());
}

#[test]
fn a_relay_node_that_dies_and_one_that_joins_lose_nothing() {
    let _gate = shared();
    // The partitions of a dead node are the others' after the session timeout, which is longer than the idle timeouts.
    let quick = "session_timeout = \"2s\"\n[link]\nidle_timeout = \"1500ms\"\nping_interval = \"300ms\"\n\
                 [agent]\nidle_timeout = \"1500ms\"";
    let pair = far_apart(
        TwoRegionsSpec::new()
            .cache(memcached())
            .extra(&format!("{COMMITS}{quick}"))
            .proxied()
            .start(),
    );
    let [second, third] = ["relay-2", "relay-3"].map(|node| pair.us.another_node(node));
    second.start();
    let group = pair.us.group(EU);
    wait_until("both nodes share the group", LIMIT, || {
        pair.us.kafka().group(&group) == Some(("Stable".into(), 2))
    });
    let sampler = Sampler::start(&[&pair.us, &second, &third, &pair.eu]);
    let writing = write_on(pair.us.writer("sessions"));
    second.wait_until("the second node has some of the work", LIMIT, |status| {
        flows(status).is_ok_and(|flows| flows[0].finished() >= 1_000)
    });
    assert!(
        second.flow(EU).in_flight > 0,
        "the node that is to die has nothing in its hands"
    );
    second.kill();
    third.start();
    writing.join().unwrap();
    let nodes = [&pair.us, &third, &pair.eu];
    settle(&nodes);
    // Nobody takes the dead node's partitions before its session has timed out: only now all of it has an owner.
    wait_until("the dead node is out of the group", LIMIT, || {
        pair.us.kafka().group(&group) == Some(("Stable".into(), 2))
    });
    let late: Vec<String> = (0..2_000).map(|n| format!("late:{n}")).collect();
    pair.us.writer("sessions").set_all(late.iter().map(|key| (key, "late")));
    settle(&nodes);
    assert!(third.flow(EU).consumed > 0, "the node that joined has no work");
    assert_same(&pair.both(), "sessions", &keys(WRITES));
    assert_same(&pair.both(), "sessions", &late);
    sampler.finish();
}

/// A key's value as the test writes it in one round.
fn round(number: u32) -> Vec<u8> {
    format!("round {number}").into_bytes()
}

/// How many of the keys hold what at `region`: absent, or a round's value.
fn held(region: &Region, keys: &[String]) -> Vec<Option<Vec<u8>>> {
    let found = region.cache("sessions").client().get_many(keys).unwrap();
    found.into_iter().map(|found| found.map(|(value, _)| value)).collect()
}

#[test]
fn a_source_memcached_that_dies_and_comes_back_empty_leaves_no_old_copy_behind() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().cache(memcached()).start();
    let sampler = Sampler::start(&pair.both());
    let keys: Vec<String> = (0..20_000).map(|n| format!("key:{n}")).collect();
    let mut writer = pair.us.writer("sessions");
    writer.set_all(keys.iter().map(|key| (key, round(1))));
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);

    writer.set_all(keys.iter().map(|key| (key, round(2))));
    let source = pair.us.cache("sessions");
    pair.us.wait_until("round 2 is arriving", LIMIT, |status| {
        flows(status).is_ok_and(|flows| flows[0].finished() > 22_000)
    });
    source.memcached(0).kill();
    let address = source.servers[0].address.clone();
    pair.us
        .wait_until("the relay says whom its keys wait for", LIMIT, |status| {
            let waiting = status["flows"][0]["waiting_for"].as_array();
            waiting.is_some_and(|waiting| waiting.iter().any(|one| one["server"] == address.as_str()))
        });
    assert!(pair.us.flow(EU).in_flight > 0, "what waits is in flight, not forgotten");
    source.memcached(0).restart();
    // Every second key is written again; the others are gone for good in this region.
    let again = || keys.iter().step_by(2);
    let mut writer = pair.us.writer("sessions");
    writer.set_all(again().map(|key| (key, round(3))));
    settle(&pair.both());
    let again: Vec<String> = again().cloned().collect();
    assert_same(&pair.both(), "sessions", &again);
    let there = held(&pair.eu, &keys);
    let old = there.iter().filter(|value| **value == Some(round(1))).count();
    assert_eq!(old, 0, "{old} copies of round 1 were left behind");
    let gone = there.iter().filter(|value| value.is_none()).count() as u64;
    assert!(
        gone > 0,
        "nothing was removed: the memcached died too late to show anything"
    );
    let missing = pair.us.flow(EU).outcome(Outcome::Missing);
    assert!(
        missing >= gone,
        "{gone} copies were removed but {missing} events found no value"
    );
    accounted(&pair.both());
    sampler.finish();
}

#[test]
fn a_destination_memcached_that_dies_and_comes_back_gets_everything_it_had_not_answered() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().cache(memcached()).start();
    let sampler = Sampler::start(&pair.both());
    let keys: Vec<String> = (0..20_000).map(|n| format!("key:{n}")).collect();
    let mut writer = pair.us.writer("sessions");
    writer.set_all(keys.iter().map(|key| (key, round(1))));
    pair.us.wait_until("round 1 is arriving", LIMIT, |status| {
        flows(status).is_ok_and(|flows| flows[0].finished() > 2_000)
    });
    let destination = pair.eu.cache("sessions").memcached(0);
    destination.kill();
    pair.us
        .wait_until("the relay says whom its keys wait for", LIMIT, |status| {
            let waiting = status["flows"][0]["waiting_for"].as_array();
            let address = destination.address();
            waiting.is_some_and(|waiting| {
                waiting
                    .iter()
                    .any(|one| one["server"].as_str().is_some_and(|server| server.contains(&address)))
            })
        });
    let before = pair.us.flow(EU).outcome(Outcome::Applied);
    assert!(before < 20_000, "too late: everything has arrived already");
    // What is written while it is away, to the same keys and to others, arrives too.
    let late: Vec<String> = (0..1_000).map(|n| format!("late:{n}")).collect();
    writer.set_all(late.iter().chain(&keys[..1_000]).map(|key| (key, round(2))));
    destination.restart();
    settle(&pair.both());
    let written_late: Vec<&String> = late.iter().chain(&keys[..1_000]).collect();
    assert_same(&pair.both(), "sessions", &written_late);
    // It came back empty: what it had answered before is gone there, as after any restart, and nothing else is.
    let gone = held(&pair.eu, &keys).iter().filter(|value| value.is_none()).count() as u64;
    assert!(
        gone <= before,
        "{gone} keys are missing but only {before} had been applied"
    );
    accounted(&pair.both());
    sampler.finish();
}

#[test]
fn partitions_that_are_added_while_writing_lose_nothing() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().cache(memcached().partitions(2)).lanes(2).start();
    let sampler = Sampler::start(&pair.both());
    let kafka = pair.us.kafka();
    let topic = pair.us.cache("sessions").topic.clone();
    let refreshing = [("topic.metadata.refresh.interval.ms", "100")];
    let mut writer = pair.us.writer_with("sessions", &refreshing);
    let written = AtomicU64::new(0);
    thread::scope(|scope| {
        let writing = scope.spawn(|| {
            // Goes on until the new partitions have had their share, so that no key keeps to its first partition.
            let mut write = 0;
            while write < WRITES || kafka.end_offsets(&topic).iter().filter(|(_, end)| *end > 0).count() < 6 {
                writer.set_all((write..write + PIECE).map(|write| (key(write), format!("value {write}"))));
                write += PIECE;
                written.store(write as u64, Ordering::Relaxed);
            }
        });
        wait_until("writing is under way", LIMIT, || {
            written.load(Ordering::Relaxed) > 10_000
        });
        kafka.add_partitions(&topic, 6);
        writing.join().unwrap();
    });
    settle(&pair.both());
    assert_same(
        &pair.both(),
        "sessions",
        &keys(written.load(Ordering::Relaxed) as usize),
    );
    accounted(&pair.both());
    sampler.finish();
}
