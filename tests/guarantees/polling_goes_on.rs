//! A relay that holds all it may pauses its partitions and polls on: the group keeps it for as long as its peer is away, and
//! no position is lost by the pause.

use std::time::{Duration, Instant};

use evrepl_lab::*;

const LIMIT: Duration = Duration::from_secs(60);
const EU: &str = "eu-west-1";

/// Shorter than the pause, as short as the session timeout allows.
const MAX_POLL_INTERVAL_MS: u64 = 6_500;
const PAUSED_FOR: Duration = Duration::from_millis(MAX_POLL_INTERVAL_MS + 3_500);

fn count(region: &Region, words: &str) -> usize {
    region.log().matches(words).count()
}

#[test]
fn partitions_that_are_paused_for_longer_than_max_poll_interval_stay_ours_and_lose_no_position() {
    const WRITES: usize = 40_000;
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .cache(CacheSpec::new("sessions").memcached_args(&["-m", "256"]))
        .us(|us| {
            us.set("flow.max_in_flight_events", "2000")
                .set("kafka.session_timeout", "\"6s\"")
                .set(
                    "kafka.properties",
                    &format!("{{ \"max.poll.interval.ms\" = \"{MAX_POLL_INTERVAL_MS}\" }}"),
                )
        })
        .build();
    pair.us.start();
    let sampler = Sampler::start(&[&pair.us]);
    let group = pair.us.group(EU);
    // Both of its consumers have all they will ever get: sources and retries.
    wait_until("all partitions are assigned", LIMIT, || {
        count(&pair.us, "partitions assigned") == 2
    });
    let keys = numbered("key", WRITES);
    pair.us.writer("sessions").set_all(keys.iter().map(|key| (key, key)));
    let paused = |status: &serde_json::Value| status["flows"][0]["paused_partitions"] == 4;
    pair.us.wait_until("every partition is paused", LIMIT, paused);
    let consumed = pair.us.flow(EU).consumed;
    assert!(consumed < WRITES as u64 / 2, "Kafka should hold the rest");
    // For longer than a member may be silent: it would leave the group, and its partitions with it.
    let changed = holds_within(PAUSED_FOR, || {
        let status = pair.us.status();
        !paused(&status) || count(&pair.us, "partitions revoked") + count(&pair.us, "partitions assigned") != 2
    });
    assert!(!changed, "{}", pair.us.log_tail(30));
    assert_eq!(pair.us.kafka().group(&group), Some(("Stable".to_owned(), 1)));
    assert_eq!(pair.us.flow(EU).consumed, consumed, "nothing is taken meanwhile");

    pair.eu.start();
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    // Each record once: a pause that lost a position would have lost or doubled some.
    accounted(&pair.both());
    sampler.finish();
    assert_eq!(count(&pair.us, "partitions assigned"), 2, "{}", pair.us.log_tail(30));
    assert_eq!(count(&pair.us, "partitions revoked"), 0);
    assert_eq!(count(&pair.us, "kafka refuses this consumer"), 0);
    assert_eq!(pair.us.status()["restarts"], serde_json::json!({}));
}

#[test]
fn events_that_trickle_in_are_sent_together() {
    const WRITES: usize = 60;
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .us(|us| us.set("flow.gather", "\"1s\""))
        .build();
    for region in pair.both() {
        region.start();
    }
    let mut writer = pair.us.writer("sessions");
    // One alone: it goes on although nothing follows, and shows that there is a session.
    writer.set(b"alone", b"at once");
    writer.flush();
    settle(&pair.both());
    let batches = || pair.us.metric("evrepl_batches_total", &[]).unwrap_or(0.0);
    let (before, began) = (batches(), Instant::now());
    let keys = numbered("key", WRITES);
    for key in &keys {
        writer.set(key.as_bytes(), key.as_bytes());
        // It is in Kafka before the next one is written: nothing but the relay brings them together.
        writer.flush();
    }
    settle(&pair.both());
    let windows = began.elapsed().as_secs_f64() + 2.0;
    let sent = batches() - before;
    assert!(sent >= 1.0 && sent <= 2.0 * windows, "{sent} batches in {windows} s");
    assert_same(&pair.both(), "sessions", &keys);
}

/// A pause throws away what librdkafka has fetched: relay and broker would fetch it again, and again.
#[test]
fn partitions_that_are_only_slower_than_kafka_are_not_paused() {
    const WRITES: usize = 20_000;
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .one_way()
        // Small chunks, each of which takes as long as on a machine that is busy with others: what is behind has time to spare.
        .us(|us| {
            us.set("flow.max_in_flight_events", "2000")
                .env("FAILPOINTS", "partition_consumer_chunk=sleep(20)")
        })
        .start();
    // There is a session: without one the flow would stand still, and pause.
    let mut writer = pair.us.writer("sessions");
    writer.set(b"first", b"x");
    writer.flush();
    settle(&pair.both());
    let keys = numbered("key", WRITES);
    let (mut seen, mut paused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| pair.us.writer("sessions").set_all(keys.iter().map(|key| (key, key))));
        wait_until("all are through", LIMIT, || {
            let status = pair.us.status();
            seen += 1;
            paused += usize::from(status["flows"][0]["paused_partitions"] != 0);
            pair.us.flow(EU).consumed == WRITES as u64 + 1
        });
    });
    assert!(seen >= 10, "looked {seen} times");
    assert_eq!(paused, 0, "of {seen} looks");
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
}
