//! A memcached that freezes with writes in its hands runs them when it thaws, whoever sent them and whatever became of the
//! sender. No key may step back by that: a writing connection is never doubled, and a new one first waits until what an older
//! one had left has run.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use evrepl_lab::*;

const LIMIT: Duration = Duration::from_secs(60);
const KEYS: usize = 2_000;
/// Large, so that what a call leaves in a frozen memcached takes it a while to run.
const VALUE_BYTES: usize = 1_000;
const ROUNDS: u64 = 4;

fn keys() -> Vec<String> {
    (0..KEYS).map(|n| format!("key:{n}")).collect()
}

fn value(version: u64) -> Vec<u8> {
    let mut value = format!("{version}:").into_bytes();
    value.resize(VALUE_BYTES, b'x');
    value
}

fn versions(client: &mut CacheClient, keys: &[String]) -> Vec<u64> {
    let found = client.get_many(keys).unwrap();
    let version = |(value, _): Value| {
        let text = String::from_utf8(value).unwrap();
        text.split(':').next().unwrap().parse().unwrap()
    };
    found.into_iter().map(|found| found.map_or(0, version)).collect()
}

/// One worker thread that takes one request from each connection in turn: the worst that memcached may do to two
/// connections that it finds full when it thaws. One partition, so that keys keep their order on the way.
fn one_request_in_turn() -> CacheSpec {
    let arguments = ["-m", "256", "-t", "1", "-R", "1"];
    CacheSpec::new("sessions").partitions(1).memcached_args(&arguments)
}

/// The agent has a call out that memcached does not answer.
fn has_a_call_out(region: &Region) -> bool {
    region.status()["agent"]["servers"][0]["state"] == "away"
}

/// Bytes that a memcached has been sent and has not read, of all its connections.
fn unread_bytes(memcached: &Memcached) -> u64 {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let port = format!(":{:04X}", memcached.port());
    // Columns: number, local address, remote address, state (01 is established, 08 closed by the other end), tx:rx queues.
    let unread = |line: &str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let of = columns[1].ends_with(&port) && ["01", "08"].contains(&columns[3]);
        of.then(|| u64::from_str_radix(columns[4].split(':').nth(1).unwrap(), 16).unwrap())
    };
    table.lines().skip(1).filter_map(unread).sum()
}

/// Freezes the region's memcached at a moment when the agent has just sent it many writes; false when that never was.
fn freeze_with_writes_inside(region: &Region) -> bool {
    let memcached = region.cache("sessions").memcached(0);
    // A sign of life that the agent asks for is a few bytes and no such call. What catches none is thawed long before
    // `memcached.slow_after`: behind an open breaker the relay would send nothing until its next probe.
    let caught = || holds_within(Duration::from_millis(100), || unread_bytes(memcached) > 64 << 10);
    let inside = holds_within(LIMIT, || {
        memcached.freeze();
        let inside = caught();
        if !inside {
            memcached.thaw();
        }
        inside
    });
    inside && holds_within(LIMIT, || has_a_call_out(region))
}

#[test]
fn writes_that_a_killed_agent_left_in_a_frozen_memcached_step_no_key_back() {
    let _gate = exclusive();
    let pair = TwoRegionsSpec::new().cache(one_request_in_turn()).one_way().start();
    let keys = keys();
    let there = pair.eu.cache("sessions");
    let written = AtomicU64::new(0);
    let write = || {
        let version = written.load(SeqCst) + 1;
        // In one order and then in the other: what is written first by one connection is written last by another.
        let mut keys: Vec<&String> = keys.iter().collect();
        if version.is_multiple_of(2) {
            keys.reverse();
        }
        let mut writer = pair.us.writer("sessions");
        writer.set_all(keys.iter().map(|key| (key, value(version))));
        written.store(version, SeqCst);
    };
    for round in 0..ROUNDS {
        // Connected before: a frozen memcached accepts nobody.
        let mut watcher = there.client();
        let mut last = versions(&mut watcher, &keys);
        let frozen = AtomicBool::new(false);
        thread::scope(|scope| {
            let writing = scope.spawn(|| {
                while !frozen.load(SeqCst) {
                    write();
                }
            });
            let inside = freeze_with_writes_inside(&pair.eu);
            frozen.store(true, SeqCst);
            writing.join().unwrap();
            assert!(inside, "round {round}: no call was out when memcached froze");
        });
        // Both ends die with it; only memcached still knows of that call.
        pair.eu.kill();
        if round % 2 == 0 {
            pair.us.kill();
        }
        // The last write of the round: no later one heals what this one loses.
        write();
        pair.eu.spawn();
        if round % 2 == 0 {
            pair.us.start();
        }
        wait_until("the next agent has a session and waits for memcached", LIMIT, || {
            let there = || {
                pair.eu
                    .try_status()
                    .is_some_and(|it| it["agent"]["sessions"][0].is_object())
            };
            there() && has_a_call_out(&pair.eu)
        });
        there.memcached(0).thaw();
        let thawed = Instant::now();
        while last.iter().any(|seen| *seen < written.load(SeqCst)) {
            assert!(
                thawed.elapsed() < LIMIT,
                "round {round}: the last write does not arrive everywhere"
            );
            for (n, found) in versions(&mut watcher, &keys).into_iter().enumerate() {
                let key = &keys[n];
                assert!(found >= last[n], "round {round}: {key} is {found} after {}", last[n]);
                last[n] = found;
            }
        }
        settle(&pair.both());
        assert_same(&pair.both(), "sessions", &keys);
    }
}

#[test]
fn a_call_that_a_frozen_memcached_keeps_is_never_sent_again_on_another_connection() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().start();
    let keys = keys();
    let write = |version| {
        pair.us
            .writer("sessions")
            .set_all(keys.iter().map(|key| (key, value(version))))
    };
    write(1);
    settle(&pair.both());
    let there = pair.eu.cache("sessions").memcached(0);
    let connections = || {
        let stats = there.client().stats().unwrap();
        stats["total_connections"].parse::<u64>().unwrap()
    };
    let before = connections();
    there.freeze();
    write(2);
    wait_until("the agent has a call out", LIMIT, || has_a_call_out(&pair.eu));
    // Longer than any time limit of the configuration: the call is kept all the same.
    let frozen = Instant::now();
    pair.us.wait_until("its keys wait for it", LIMIT, |status| {
        let waiting = status["flows"][0]["waiting_for"].as_array().unwrap();
        !waiting.is_empty() && frozen.elapsed() > Duration::from_secs(4)
    });
    there.thaw();
    settle(&pair.both());
    // The one that asks, and nobody else.
    assert_eq!(connections() - before, 1, "a second writing connection was made");
    assert_same(&pair.both(), "sessions", &keys);
}
