//! Every event has one outcome, each outcome is counted where it happened, and the sums agree with Kafka's own offsets, with
//! `/metrics` and with what the agent says it did.

use std::time::Duration;

use evrepl::outcome::Outcome;
use evrepl_lab::{
    CacheSpec, FlowStatus, Op, Region, Sampler, TwoRegionsSpec, accounted, assert_same, settle, shared, wait_until,
};

const EU: &str = "eu-west-1";
const FLOW: &str = "us-east-1->eu-west-1";

/// `/metrics` shows the same numbers as `/status`, outcome by outcome. Only for regions that are at rest.
#[track_caller]
fn metrics_say_the_same(region: &Region) {
    let flow = region.flow(EU);
    let metric = |name: &str, labels: &[(&str, &str)]| {
        let labels: Vec<(&str, &str)> = labels.iter().copied().chain([("flow", FLOW)]).collect();
        region.metric(name, &labels).map(|value| value as u64)
    };
    assert_eq!(metric("evrepl_events_consumed_total", &[]), Some(flow.consumed));
    assert_eq!(metric("evrepl_events_in_flight", &[]), Some(flow.in_flight));
    for outcome in Outcome::ALL {
        let label = [("outcome", outcome.name())];
        assert_eq!(
            metric("evrepl_events_total", &label),
            Some(flow.outcome(outcome)),
            "{outcome:?}"
        );
    }
    assert_eq!(metric("evrepl_events_total", &[]), Some(flow.finished()));
    // Every mailbox of the sending half says what it holds; the defaults of the configuration.
    let capacities = [
        ("partition_consumer", 4),
        ("cache_reader", 4),
        ("batch_coalescer", 8),
        ("remote_link", 16),
    ];
    for (actor, capacity) in capacities {
        assert_eq!(region.status()["mailboxes"][actor]["capacity"], capacity, "{actor}");
        let metric = region.metric("evrepl_mailbox_capacity", &[("actor", actor)]);
        assert_eq!(metric, Some(f64::from(capacity)), "{actor}");
    }
}

/// What the agent of `region` says it did, in `/status`, and in `/metrics` the same.
#[track_caller]
fn items_of(region: &Region, status: &str) -> u64 {
    let said = region.status()["agent"]["items"][status].as_u64();
    let metric = region.metric("evrepl_agent_items_total", &[("status", status)]);
    assert_eq!(metric.map(|value| value as u64), said, "{status}");
    said.unwrap_or(0)
}

/// What the flow has committed is what it consumed and finished: all of it, as another client reads both.
fn committed_to_the_end(region: &Region, cache: &str) {
    let (kafka, topic) = (region.kafka(), &region.cache(cache).topic);
    // Committed once a second.
    wait_until("the watermarks are committed", Duration::from_secs(10), || {
        let committed = kafka.committed(&region.group(EU), topic);
        let ends = kafka.end_offsets(topic);
        let whole = |(_, committed): &(i32, Option<i64>)| committed.unwrap_or(0);
        committed.iter().map(whole).eq(ends.iter().map(|(_, end)| *end))
    });
}

#[test]
fn ten_writes_of_one_key_in_one_chunk_cost_one_look_and_one_item() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().build();
    pair.eu.start();
    let mut writer = pair.us.writer("sessions");
    for n in 0..10 {
        writer.set(b"counter", format!("write {n}").as_bytes());
    }
    writer.flush();
    // Only now the relay runs, and finds all ten.
    pair.us.start();
    let sampler = Sampler::start(&pair.both());
    settle(&pair.both());
    // One look, one item: nothing else has read this memcached yet.
    let stats = pair.us.cache("sessions").memcached(0).client().stats().unwrap();
    assert_eq!(stats["cmd_get"], "1");
    let copy = pair.eu.cache("sessions").client().get(b"counter").unwrap();
    assert_eq!(copy, Some((b"write 9".to_vec(), 0)));
    assert_same(&pair.both(), "sessions", &["counter"]);
    let flow = pair.us.flow(EU);
    assert_eq!(
        (flow.outcome(Outcome::Applied), flow.outcome(Outcome::Superseded)),
        (1, 9)
    );
    assert_eq!((flow.consumed, flow.finished()), (10, 10));
    assert_eq!(items_of(&pair.eu, "applied"), 1);
    assert_eq!(pair.eu.status()["agent"]["applied"], 1);
    accounted(&pair.both());
    metrics_say_the_same(&pair.us);
    sampler.finish();
}

#[test]
fn every_outcome_is_counted_once_and_the_sums_agree_with_kafka_metrics_and_the_agent() {
    let _gate = shared();
    // The linger is longer than a source lives, so that one expires on the way.
    let pair = TwoRegionsSpec::new()
        .cache(CacheSpec::new("sessions").option("max_value_bytes", "1000"))
        .one_way()
        .extra("[batch]\nlinger = \"4s\"\nidle_linger = \"4s\"")
        .build();
    pair.eu.start();
    let sampler = Sampler::start(&pair.both());
    let mut writer = pair.us.writer("sessions");
    let applied: Vec<String> = (0..50).map(|n| format!("applied:{n}")).collect();
    let removed = [
        "deleted:0",
        "deleted:1",
        "deleted:2",
        "missing:0",
        "missing:1",
        "large",
        "expiring",
    ];
    let mut there = pair.eu.cache("sessions").client();
    for key in removed {
        there.set(key.as_bytes(), b"old copy", 0, 0).unwrap();
    }
    writer.set_all(applied.iter().map(|key| (key, key)));
    for key in &removed[..3] {
        writer.delete(key.as_bytes());
    }
    for key in &removed[3..5] {
        writer.say(Op::Set, key.as_bytes());
    }
    writer.set(b"large", &[b'x'; 1_001]);
    for n in 0..5 {
        writer.set(b"rewritten", format!("{n}").as_bytes());
    }
    writer.produce(b"echo", br#"{"v":1,"op":"set","origin":"eu-west-1"}"#, &[]);
    writer.produce(b"poison", b"no event", &[]);
    writer.produce(b"poison", br#"{"v":2,"op":"set"}"#, &[]);
    writer.flush();
    pair.us.start();
    pair.us
        .wait_until("the relay consumes", Duration::from_secs(30), |status| {
            status["flows"][0]["consumed"].as_u64() >= Some(64)
        });
    writer.set_with(b"expiring", b"short", 0, 3);
    writer.flush();
    settle(&pair.both());
    let expected = [
        (Outcome::Applied, 51),
        (Outcome::Deleted, 3),
        (Outcome::Missing, 2),
        (Outcome::Superseded, 4),
        (Outcome::Expired, 1),
        (Outcome::TooLarge, 1),
        (Outcome::Filtered, 1),
        (Outcome::Stale, 0),
        (Outcome::Parked, 0),
        (Outcome::DeadLettered, 2),
        (Outcome::Released, 0),
    ];
    let flow = pair.us.flow(EU);
    for (outcome, count) in expected {
        assert_eq!(flow.outcome(outcome), count, "{outcome:?} of {:?}", flow.outcomes);
    }
    assert_eq!(flow.consumed, 65);
    assert_same(&pair.both(), "sessions", &applied);
    assert_same(&pair.both(), "sessions", &["rewritten", "large but not here"]);
    assert!(there.get_many(&removed).unwrap().iter().all(Option::is_none));
    // The agent's own count: an item for each event that was not superseded, filtered or buried here. Removals for want of a
    // value or for its size are decided by the relay, so that to the agent they are applied; an expiry is its own finding.
    assert_eq!(items_of(&pair.eu, "applied"), 51 + 3 + 2 + 1);
    assert_eq!(items_of(&pair.eu, "expired"), 1);
    accounted(&pair.both());
    metrics_say_the_same(&pair.us);
    committed_to_the_end(&pair.us, "sessions");
    sampler.finish();
}

#[test]
fn what_a_revoked_partition_gives_back_is_released_and_consumed_again_by_its_next_owner() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().proxied().start();
    let second = pair.us.another_node("relay-2");
    let all = [&pair.us, &second, &pair.eu];
    let sampler = Sampler::start(&all);
    let mut writer = pair.us.writer("sessions");
    let keys: Vec<String> = (0..400).map(|n| format!("key:{n}")).collect();
    writer.set_all(keys[..200].iter().map(|key| (key, "before")));
    settle(&pair.both());
    // From here on nothing can be finished.
    pair.us_to_eu().cut();
    writer.set_all(keys.iter().map(|key| (key, "while the peer is away")));
    // Not all: what a busy partition has not taken yet waits in front of it, and is nobody's.
    pair.us
        .wait_until("much is in flight", Duration::from_secs(20), |status| {
            status["flows"][0]["in_flight"].as_u64() >= Some(100)
        });
    second.start();
    pair.us
        .wait_until("partitions were given back", Duration::from_secs(30), |status| {
            status["flows"][0]["outcomes"]["released"].as_u64() > Some(0)
        });
    pair.us_to_eu().pass();
    settle(&all);
    let flows = [pair.us.flow(EU), second.flow(EU)];
    let sum = |of: &dyn Fn(&FlowStatus) -> u64| flows.iter().map(of).sum::<u64>();
    let released = sum(&|flow| flow.outcome(Outcome::Released));
    assert!(
        (1..400).contains(&released),
        "some partitions move, not all: {released} of 400"
    );
    assert_eq!(flows[1].outcome(Outcome::Released), 0);
    assert_eq!(sum(&|flow| flow.consumed), 600 + released);
    // Released twice or lost on the way over would show here.
    let ended = sum(&|flow| flow.outcome(Outcome::Applied) + flow.outcome(Outcome::Superseded));
    assert_eq!(ended, 600);
    assert!(flows[1].consumed > 0);
    assert_same(&pair.both(), "sessions", &keys);
    accounted(&all);
    metrics_say_the_same(&pair.us);
    metrics_say_the_same(&second);
    committed_to_the_end(&pair.us, "sessions");
    sampler.finish();
}
