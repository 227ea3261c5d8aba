//! Canaries: the lag of a path is known without traffic, a dead path is reported within five seconds whichever part of it is
//! dead, and none of that shows in any account.

use std::sync::Arc;
use std::time::{Duration, Instant};

use evrepl::outcome::Outcome;
use evrepl_lab::*;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
/// The promise, at an interval of a second.
const NOTICED_WITHIN: Duration = Duration::from_secs(5);

const US: &str = "us-east-1";
const EU: &str = "eu-west-1";
const AP: &str = "ap-south-1";

const EACH_SECOND: &str = "[canary]\ninterval = \"1s\"";
/// For what is counted rather than timed.
const OFTEN: &str = "[canary]\ninterval = \"100ms\"";

/// What `/status` of `region` says of its canaries to `peer`, in a status or fetched.
fn in_status(status: &Value, peer: &str) -> Value {
    let flows = status["flows"].as_array().into_iter().flatten();
    let mut found = flows.filter(|flow| flow["peer"] == peer);
    found.next().map_or(Value::Null, |flow| flow["canaries"][0].clone())
}

fn canary(region: &Region, peer: &str) -> Value {
    in_status(&region.status(), peer)
}

fn count(canary: &Value, name: &str) -> u64 {
    canary[name].as_u64().unwrap_or(0)
}

fn reasons(canary: &Value, name: &str) -> u64 {
    let counts = canary[name].as_object().into_iter().flatten();
    counts.filter_map(|(_, count)| count.as_u64()).sum()
}

#[track_caller]
fn arrive(region: &Region, peer: &str, more: u64) {
    let before = count(&canary(region, peer), "arrived");
    region.wait_until(&format!("{more} canaries arrive at {peer}"), LIMIT, |status| {
        count(&in_status(status, peer), "arrived") >= before + more
    });
}

/// Everything but canaries is at rest: this many events were consumed, and each has ended.
#[track_caller]
fn consumed(region: &Region, peer: &str, events: u64) {
    region.wait_until(&format!("{events} events for {peer} have ended"), LIMIT, |status| {
        let flow = flows(status)
            .unwrap()
            .into_iter()
            .find(|flow| flow.peer == peer)
            .unwrap();
        assert!(flow.consumed <= events, "more than there are: {:#}", flow.json);
        flow.consumed == events && flow.in_flight == 0
    });
    balanced(&region.status()).unwrap();
}

fn path_check(region: &Region) -> String {
    let (_, text) = region.get("/readyz?verbose").unwrap();
    let line = text.lines().find(|line| line.contains("] path "));
    line.unwrap_or_else(|| panic!("no path among the checks: {text}"))
        .to_owned()
}

#[test]
fn without_any_traffic_lag_is_known_at_both_regions_and_nothing_is_counted_as_consumed() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().extra(EACH_SECOND).start();
    for (region, peer) in [(&pair.us, EU), (&pair.eu, US)] {
        arrive(region, peer, 3);
        let canary = canary(region, peer);
        for (name, most) in [("lag_seconds", 5.0), ("age_seconds", 8.0)] {
            let seconds = canary[name].as_f64().unwrap_or(-1.0);
            assert!((0.0..most).contains(&seconds), "{name}: {canary:#}");
        }
        assert_eq!((&canary["dead"], &canary["expected"]), (&json!(false), &json!(true)));
        let flow = region.flow(peer);
        for stage in ["consumed", "looked", "sent", "acked"] {
            assert!(flow.json["lag_seconds"][stage].is_f64(), "{stage}: {:#}", flow.json);
        }
        assert_eq!((flow.consumed, flow.finished(), flow.in_flight), (0, 0, 0));
        assert_eq!(flow.json["with_permit"], 0);
        let check = path_check(region);
        assert!(check.starts_with("[ok]") && check.contains("arrived"), "{check}");
        let labels = [("flow", &*format!("{}->{peer}", region.name())), ("cache", "sessions")];
        let metric = |name: &str| region.metric(name, &labels);
        assert_eq!(metric("evrepl_path_dead"), Some(0.0));
        assert!(metric("evrepl_canary_age_seconds").is_some_and(|age| (0.0..8.0).contains(&age)));
        for counted in ["written_total", "arrived_total"] {
            assert!(metric(&format!("evrepl_canaries_{counted}")) >= Some(3.0), "{counted}");
        }
        assert!(metric("evrepl_canary_lag_seconds_count") >= Some(3.0));
        assert_eq!(region.metric("evrepl_events_consumed_total", &[]).unwrap_or(0.0), 0.0);
        // They are events to Kafka, and offsets are committed behind them.
        let topic = &region.cache("sessions").topic;
        wait_until("offsets are committed behind canaries", LIMIT, || {
            let committed = region.kafka().committed(&region.group(peer), topic);
            committed.iter().filter_map(|(_, offset)| *offset).sum::<i64>() >= 3
        });
    }
}

#[test]
fn without_the_option_no_canary_is_written_and_nothing_is_said_of_paths() {
    let _gate = shared();
    let pair = two_regions();
    pair.us.writer("sessions").set(b"key", b"value");
    settle(&pair.both());
    accounted(&pair.both());
    assert_eq!(pair.us.flow(EU).json["canaries"], json!([]));
    let (_, checks) = pair.us.get("/readyz?verbose").unwrap();
    assert!(!checks.contains("path "), "{checks}");
    assert_eq!(pair.us.metric("evrepl_path_dead", &[]), None);
}

#[test]
fn canaries_change_no_account_of_real_writes_and_leak_no_permit_whatever_becomes_of_them() {
    const KEYS: u64 = 1_000;
    let _gate = shared();
    // With eight permits, six of them for chunks, a few canaries that kept theirs would stop everything.
    let pair = TwoRegionsSpec::new()
        .one_way()
        .proxied()
        .cache(CacheSpec::new("sessions").proxied())
        .extra(OFTEN)
        .extra("[flow]\nmax_in_flight_events = 8\n[memcached]\nbackoff_max = \"200ms\"")
        .start();
    let keys: Vec<String> = (0..KEYS).map(|n| format!("key:{n}")).collect();
    let mut writer = pair.us.writer("sessions");
    arrive(&pair.us, EU, 20);
    writer.set_all(keys.iter().map(|key| (key, "one")));
    consumed(&pair.us, EU, KEYS);
    arrive(&pair.us, EU, 20);
    let lost = |reason: &str, of: &Value| of["lost"][reason].as_u64().unwrap_or(0);
    // Every way to be dropped, several times each.
    let theirs = pair.eu.cache("sessions").servers[0].proxy();
    let ours = pair.us.cache("sessions").servers[0].proxy();
    for round in 0..3 {
        for (reason, breaks) in [
            ("session_lost", pair.us_to_eu()),
            ("later", theirs),
            ("source_away", ours),
        ] {
            let before = lost(reason, &canary(&pair.us, EU));
            if reason == "session_lost" {
                // What is under way when the session ends is lost with it.
                breaks.stall();
                arrive_no_more(&pair.us);
                breaks.cut();
            } else if reason == "source_away" {
                // Without its memcached evrepl writes none.
                breaks.cut();
                for _ in 0..4 {
                    say_canary(&pair.us, EU);
                }
            } else {
                breaks.cut();
            }
            pair.us
                .wait_until(&format!("canaries are lost: {reason}, {round}"), LIMIT, |status| {
                    if reason == "source_away" {
                        say_canary(&pair.us, EU);
                    }
                    lost(reason, &in_status(status, EU)) > before
                });
            breaks.pass();
            arrive(&pair.us, EU, 5);
        }
    }
    writer.set_all(keys.iter().map(|key| (key, "two")));
    consumed(&pair.us, EU, 2 * KEYS);
    assert_same(&pair.both(), "sessions", &keys);
    let flow = pair.us.flow(EU);
    let ended = flow.outcome(Outcome::Applied) + flow.outcome(Outcome::Superseded);
    assert_eq!(ended, 2 * KEYS, "{:?}", flow.outcomes);
    assert_eq!(flow.json["dirty"], 0);
    pair.us.wait_until("every permit is back", LIMIT, |status| {
        let flow = &status["flows"][0];
        flow["permits"] == 8 && flow["permits_free"] == 8
    });
    assert_eq!(pair.us.status()["restarts"], json!({}));
    assert_eq!(pair.us.status()["late_outcomes"], 0);
}

/// A canary written by hand: its key is there already, and nothing but its event is needed.
fn say_canary(region: &Region, peer: &str) {
    let cache = region.cache("sessions");
    let key = format!("evrepl-canary:{}:by-hand:{peer}", region.name());
    let event = br#"{"v":1,"op":"set"}"#;
    region.kafka().produce(
        &cache.topic,
        None,
        key.as_bytes(),
        event,
        &[("evrepl-canary", peer.as_bytes())],
    );
}

/// Waits until nothing arrives any more.
fn arrive_no_more(region: &Region) {
    let mut last = (0, Instant::now());
    wait_until("nothing arrives any more", LIMIT, || {
        let arrived = count(&canary(region, EU), "arrived");
        if arrived != last.0 {
            last = (arrived, Instant::now());
        }
        last.1.elapsed() >= Duration::from_millis(500)
    });
}

#[test]
fn a_canary_for_one_peer_is_ignored_by_the_flow_to_another() {
    let _gate = shared();
    let certs = Arc::new(Certs::issue(&[US, EU, AP]));
    let [us, eu, ap] = [US, EU, AP].map(|name| RegionBuilder::new(name).certs(&certs));
    let us = us
        .peer(PeerSpec::at(EU, &eu.agent_address()))
        .peer(PeerSpec::at(AP, &ap.agent_address()))
        .extra(OFTEN);
    let [eu, ap] = [eu, ap].map(|builder| builder.peer(PeerSpec::receive_only(US)).start());
    let us = us.start();
    for peer in [EU, AP] {
        arrive(&us, peer, 50);
    }
    let key = |peer: &str| format!("evrepl-canary:{US}:relay-1:{peer}").into_bytes();
    for (region, own, other) in [(&eu, EU, AP), (&ap, AP, EU)] {
        let mut client = region.cache("sessions").client();
        assert!(client.get(&key(own)).unwrap().is_some(), "{own} has its own");
        assert_eq!(client.get(&key(other)).unwrap(), None, "{own} has that of {other}");
        let canary = canary(&us, own);
        // One of the other's would be one too many; one under way may not be counted as written yet.
        let ended = count(&canary, "arrived") + reasons(&canary, "lost");
        assert!(ended <= count(&canary, "written") + 1, "{canary:#}");
        assert_eq!(us.flow(own).consumed, 0);
    }
    // A canary for nobody here is nobody's, and blocks nothing.
    let topic = &us.cache("sessions").topic;
    us.kafka()
        .produce(topic, Some(0), b"stray", b"no event", &[("evrepl-canary", b"nowhere")]);
    us.kafka().produce(
        topic,
        Some(0),
        b"broken",
        b"no event",
        &[("evrepl-canary", EU.as_bytes())],
    );
    us.wait_until("the broken one is dropped", LIMIT, |status| {
        in_status(status, EU)["lost"]["unreadable"] == 1
    });
    arrive(&us, EU, 5);
    assert_eq!((us.flow(EU).finished(), us.flow(AP).finished()), (0, 0));
    let letters = us.kafka().read_all(&format!("{topic}.dead-letter"));
    assert!(letters.is_empty(), "a canary is no dead letter");
}

/// The path from `us` to `eu` dies of `breaks` within five seconds and says `why`, once; it lives again after `heals`.
#[track_caller]
fn dies_and_lives(region: &Region, why: &[&str], breaks: impl FnOnce(), heals: impl FnOnce()) {
    arrive(region, EU, 3);
    region.wait_until("the path lives", LIMIT, |status| in_status(status, EU)["dead"] == false);
    let begun = Instant::now();
    breaks();
    let dead = holds_within(NOTICED_WITHIN.saturating_sub(begun.elapsed()), || {
        region
            .try_status()
            .is_some_and(|status| in_status(&status, EU)["dead"] == true)
    });
    let took = begun.elapsed();
    let seen = canary(region, EU);
    assert!(dead, "not noticed in {took:?}: {seen:#}\n{}", region.log_tail(30));
    let said = seen["why"].as_str().unwrap_or_default();
    assert!(why.iter().any(|why| said.contains(why)), "{said:?}, not {why:?}");
    assert_eq!(
        region.metric("evrepl_path_dead", &[("flow", &format!("{US}->{EU}"))]),
        Some(1.0)
    );
    let check = path_check(region);
    assert!(
        check.starts_with("[failed]") && check.contains("does not gate"),
        "{check}"
    );
    heals();
    region.wait_until("the path lives again", LIMIT, |status| {
        in_status(status, EU)["dead"] == false
    });
    arrive(region, EU, 3);
    wait_until("the check passes again", LIMIT, || {
        path_check(region).starts_with("[ok]")
    });
    // One line a turn. On a machine that stalls for seconds there may be more turns than these two.
    let log = region.log();
    let turns = log
        .lines()
        .map(|line| (line.contains("path is dead"), line.contains("path lives again")));
    let turns: Vec<bool> = turns
        .filter(|(died, lives)| *died || *lives)
        .map(|(died, _)| died)
        .collect();
    let in_turns = turns.iter().enumerate().all(|(n, died)| *died == (n % 2 == 0));
    assert!(turns.len() >= 2 && in_turns, "{turns:?}: {}", region.log_tail(30));
    assert_eq!(region.flow(EU).consumed, 0);
    assert_eq!(region.status()["restarts"], json!({}));
}

#[test]
fn a_killed_agent_of_the_peer_is_a_dead_path_within_five_seconds() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().extra(EACH_SECOND).start();
    let why = ["none has arrived"];
    dies_and_lives(&pair.us, &why, || pair.eu.kill(), || pair.eu.start());
}

#[test]
fn a_stalled_link_is_a_dead_path_within_five_seconds() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().proxied().extra(EACH_SECOND).start();
    let link = pair.us_to_eu();
    dies_and_lives(&pair.us, &["none has arrived"], || link.stall(), || link.pass());
}

#[test]
fn an_own_memcached_that_was_killed_is_a_dead_path_within_five_seconds() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().extra(EACH_SECOND).start();
    let memcached = pair.us.cache("sessions").memcached(0);
    let why = format!("cannot be written: memcached {}", memcached.address());
    dies_and_lives(&pair.us, &[&why], || memcached.kill(), || memcached.restart());
}

#[test]
fn a_frozen_memcached_of_the_peer_is_a_dead_path_within_five_seconds() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().extra(EACH_SECOND).start();
    let memcached = pair.eu.cache("sessions").memcached(0);
    let why = ["the last that was lost: later"];
    dies_and_lives(&pair.us, &why, || memcached.freeze(), || memcached.thaw());
}

#[test]
fn a_frozen_kafka_is_a_dead_path_within_five_seconds() {
    let _gate = shared();
    let broker = Broker::start();
    let client = broker.client();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .extra(EACH_SECOND)
        .us(move |us| us.kafka(&client))
        .start();
    let why = ["cannot be written: kafka has not answered", "cannot be written: topic"];
    dies_and_lives(&pair.us, &why, || broker.freeze(), || broker.thaw());
}

#[test]
fn a_killed_kafka_is_a_dead_path_within_five_seconds() {
    let _gate = shared();
    let broker = Broker::start();
    let client = broker.client();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .extra(EACH_SECOND)
        .us(move |us| us.kafka(&client))
        .start();
    let why = ["cannot be written: kafka has not answered", "cannot be written: topic"];
    dies_and_lives(&pair.us, &why, || broker.kill(), || broker.start_again());
}

#[test]
fn of_two_nodes_one_without_partitions_reports_no_dead_path_and_takes_over_when_it_has_them() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .cache(CacheSpec::new("sessions").partitions(1))
        .extra(EACH_SECOND)
        .start();
    arrive(&pair.us, EU, 2);
    let second = pair.us.another_node("relay-2");
    second.start();
    let expects = |region: &Region| canary(region, EU)["expected"] == true;
    let both = [&pair.us, &second];
    wait_until("the partition is with one of them", LIMIT, || {
        both.into_iter().filter(|region| expects(region)).count() == 1
    });
    let (owner, other) = match expects(&pair.us) {
        true => (&pair.us, &second),
        false => (&second, &pair.us),
    };
    // For longer than a path may be silent.
    arrive(owner, EU, 6);
    assert!(!expects(other));
    assert_eq!(canary(other, EU)["dead"], false);
    assert!(!other.log().contains("path is dead"), "{}", other.log_tail(20));
    assert!(path_check(other).starts_with("[ok]"));
    owner.kill();
    arrive(other, EU, 3);
    other.wait_until("its path lives", LIMIT, |status| in_status(status, EU)["dead"] == false);
    assert_eq!(other.flow(EU).consumed, 0);
}

#[test]
fn a_canary_that_cannot_be_written_holds_up_no_shutdown() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().extra(OFTEN).start();
    arrive(&pair.us, EU, 3);
    pair.us.cache("sessions").memcached(0).freeze();
    pair.us.wait_until("canaries cannot be written", LIMIT, |status| {
        in_status(status, EU)["failed"]["memcached"].as_u64() > Some(1)
    });
    let begun = Instant::now();
    assert_eq!(pair.us.terminate(), 0, "{}", pair.us.log_tail(20));
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[test]
fn a_stage_of_the_relay_that_hangs_is_a_dead_path_within_five_seconds() {
    let _gate = shared();
    // A batch each second, and after the fifth none leaves.
    let pair = TwoRegionsSpec::new()
        .one_way()
        .extra(EACH_SECOND)
        .us(|us| us.env("FAILPOINTS", "batch_coalescer_send=5*off->return"))
        .start();
    let arrived = |status: &Value| count(&in_status(status, EU), "arrived");
    let (mut last, mut since) = (0, Instant::now());
    let mut noticed = None;
    wait_until("the path dies", LIMIT, || {
        let status = pair.us.status();
        if arrived(&status) != last {
            (last, since) = (arrived(&status), Instant::now());
        }
        noticed = (in_status(&status, EU)["dead"] == true).then(|| since.elapsed());
        noticed.is_some()
    });
    assert!(last > 0, "it never lived");
    // From the last that arrived: the stage was dead before the next would have.
    assert!(noticed < Some(NOTICED_WITHIN), "{noticed:?}");
    let why = canary(&pair.us, EU)["why"].as_str().unwrap_or_default().to_owned();
    assert!(why.contains("written, none has arrived"), "{why}");
}

#[test]
fn canaries_go_the_way_of_each_cache_whatever_its_policy_and_over_any_number_of_servers_and_lanes() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .lanes(2)
        .cache(CacheSpec::new("sessions").servers(3))
        .cache(CacheSpec::new("pages").option("on_set", "\"invalidate\""))
        .extra(OFTEN)
        .start();
    pair.us.wait_until("canaries of both caches arrive", LIMIT, |status| {
        let canaries = &status["flows"][0]["canaries"];
        let cache = |n: usize, name: &str| canaries[n]["cache"] == name && count(&canaries[n], "arrived") >= 20;
        cache(0, "sessions") && cache(1, "pages")
    });
    assert_eq!((pair.us.flow(EU).consumed, pair.us.flow(EU).finished()), (0, 0));
    // Each partition carries some: all that a node has are tried.
    for cache in ["sessions", "pages"] {
        let topic = &pair.us.cache(cache).topic;
        let ends = pair.us.kafka().end_offsets(topic);
        assert!(ends.iter().all(|(_, end)| *end > 0), "{cache}: {ends:?}");
    }
}
