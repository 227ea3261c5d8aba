//! What has to wait for a memcached server waits as dirty keys, and on the retry topic once that takes too long or there are
//! too many; nothing else waits for it, and a peer that is away parks nothing.

use std::time::Duration;

use evrepl::outcome::Outcome;
use evrepl_lab::*;

const LIMIT: Duration = Duration::from_secs(60);
const EU: &str = "eu-west-1";
const SERVERS: usize = 3;
/// The server that fails.
const DEAD: usize = 1;

/// Parked early and back soon, so that a test need not wait.
const SOON: &str = "[flow]\nretry_budget = \"500ms\"\nretry_backoff_initial = \"200ms\"\nretry_backoff_max = \"1s\"\n\
                    [kafka]\ncommit_interval = \"50ms\"";

fn three_servers() -> CacheSpec {
    CacheSpec::new("sessions").servers(SERVERS).proxied()
}

/// The keys that live on this server of the region, and the others.
fn split<'k>(region: &Region, server: usize, keys: &'k [String]) -> (Vec<&'k String>, Vec<&'k String>) {
    let cache = region.cache("sessions");
    keys.iter().partition(|key| cache.server_of(key.as_bytes()) == server)
}

fn retry_topic(region: &Region) -> String {
    format!("{}.retry.{EU}", region.cache("sessions").topic)
}

fn write(region: &Region, keys: &[String], value: &str) {
    region.writer("sessions").set_all(keys.iter().map(|key| (key, value)));
}

fn arrived(region: &Region, keys: &[&String], value: &str) -> usize {
    let found = region.cache("sessions").client().get_many(keys).unwrap();
    let is = |found: &Option<Value>| found.as_ref().is_some_and(|(found, _)| found == value.as_bytes());
    found.iter().filter(|found| is(found)).count()
}

fn all_arrive(region: &Region, keys: &[&String], value: &str) {
    let what = format!("{} keys arrive", keys.len());
    wait_until(&what, LIMIT, || arrived(region, keys, value) == keys.len());
}

fn parked(region: &Region) -> u64 {
    region.flow(EU).outcome(Outcome::Parked)
}

/// Nothing is in flight, and everything that is in the source topic is committed.
fn source_is_done(region: &Region) -> bool {
    let topic = &region.cache("sessions").topic;
    let ends = region.kafka().end_offsets(topic);
    let committed = region.kafka().committed(&region.group(EU), topic);
    committed
        .iter()
        .zip(&ends)
        .all(|((_, committed), (_, end))| committed.unwrap_or(0) == *end)
}

fn number(record: &Record, header: &str) -> i64 {
    let text = String::from_utf8(record.header(header).unwrap_or_default().to_vec()).unwrap();
    text.parse()
        .unwrap_or_else(|error| panic!("header {header} is {text:?}: {error}"))
}

#[test]
fn keys_of_a_dead_destination_server_are_parked_and_come_back_while_others_never_wait_for_them() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().cache(three_servers()).extra(SOON).start();
    let sampler = Sampler::start(&pair.both());
    let dead = pair.eu.cache("sessions").servers[DEAD].proxy();
    dead.cut();
    let keys = numbered("key", 3_000);
    let (its, others) = split(&pair.eu, DEAD, &keys);
    assert!(its.len() > 300 && others.len() > 300);
    let writer = pair.us.writer("sessions");
    write(&pair.us, &keys, "first");
    // One of them with everything that an event may say, and a header of its writer's.
    let rich = its[0];
    writer.produce(
        rich.as_bytes(),
        br#"{"v":1,"op":"set","ttl":600,"ver":"7000000","unknown":[1],"fill":true,"origin":"sa-east-1"}"#,
        &[("x-tenant", b"\x00\xff")],
    );
    writer.flush();
    all_arrive(&pair.eu, &others, "first");
    wait_until("offsets are committed past the keys that wait", LIMIT, || {
        source_is_done(&pair.us)
    });
    assert!(parked(&pair.us) >= its.len() as u64);
    assert_eq!(arrived(&pair.eu, &its, "first"), 0, "its server is away");
    balanced(&pair.us.status()).unwrap();

    let records = pair.us.kafka().read_all(&retry_topic(&pair.us));
    // The plain event of the same key may have been parked before it.
    let of = |record: &&Record| {
        let event = evrepl::event::decode(record.value()).unwrap();
        record.key() == rich.as_bytes() && event.ver == Some(7_000_000)
    };
    let first = records.iter().find(of).expect("the event was parked");
    let last = records.iter().rev().find(of).unwrap();
    let event = evrepl::event::decode(first.value()).unwrap();
    assert_eq!(
        (event.ttl, event.origin.as_deref(), event.fill),
        (Some(600), Some("sa-east-1"), true)
    );
    assert_eq!(first.header("x-tenant"), Some(&b"\x00\xff"[..]));
    assert_eq!(number(first, "evrepl-attempt"), 1);
    let (produced, parked_at) = (number(first, "evrepl-produced-at"), first.timestamp.unwrap());
    assert!(produced <= parked_at && parked_at - produced < 60_000);
    let wait = number(first, "evrepl-not-before") - parked_at;
    assert!((100..=200).contains(&wait), "{wait} ms after it was parked");
    assert!(last.offset >= first.offset);

    // What waits shows for whom, and what is done.
    pair.us.wait_until("status says who is waited for", LIMIT, |status| {
        let waiting = status["flows"][0]["waiting_for"].as_array().unwrap();
        let of_dead = |one: &serde_json::Value| one["server"].as_str().is_some_and(|it| it.contains(&dead.address()));
        waiting
            .iter()
            .any(|one| of_dead(one) && !one["next"].as_str().unwrap_or_default().is_empty())
    });
    // A newer value meanwhile, and one that is gone again.
    write(&pair.us, &keys[..1_000], "second");
    dead.pass();
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    accounted(&pair.both());
    sampler.finish();
}

#[test]
fn more_dirty_keys_than_there_may_be_are_parked_and_nothing_pauses() {
    let _gate = shared();
    let limits = "[flow]\nmax_dirty_keys = 100\nmax_in_flight_events = 2000\nretry_budget = \"1h\"\n\
                  retry_backoff_initial = \"200ms\"\nretry_backoff_max = \"1s\"";
    let pair = TwoRegionsSpec::new().cache(three_servers()).extra(limits).start();
    let sampler = Sampler::start(&pair.both());
    let dead = pair.eu.cache("sessions").servers[DEAD].proxy();
    dead.cut();
    let keys = numbered("key", 20_000);
    let (its, others) = split(&pair.eu, DEAD, &keys);
    write(&pair.us, &keys, "value");
    all_arrive(&pair.eu, &others, "value");
    wait_until("more are parked than may be dirty", LIMIT, || {
        parked(&pair.us) as usize >= its.len() - 100
    });
    assert!(pair.us.flow(EU).json["dirty"].as_u64().unwrap() <= 100 + 2000);
    dead.pass();
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    accounted(&pair.both());
    sampler.finish();
}

#[test]
fn keys_of_a_dead_source_server_are_parked_too() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().cache(three_servers()).extra(SOON).start();
    let sampler = Sampler::start(&pair.both());
    let dead = pair.us.cache("sessions").servers[DEAD].proxy();
    dead.cut();
    let keys = numbered("key", 3_000);
    let (its, others) = split(&pair.us, DEAD, &keys);
    // The application still reaches it.
    write(&pair.us, &keys, "value");
    all_arrive(&pair.eu, &others, "value");
    wait_until("offsets are committed past the keys that wait", LIMIT, || {
        source_is_done(&pair.us)
    });
    assert!(parked(&pair.us) >= its.len() as u64);
    dead.pass();
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    accounted(&pair.both());
    sampler.finish();
}

#[test]
fn a_peer_that_is_away_parks_nothing() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().proxied().extra(SOON).start();
    let sampler = Sampler::start(&pair.both());
    let keys = numbered("key", 2_000);
    pair.us_to_eu().stall();
    write(&pair.us, &keys, "value");
    pair.us.wait_until("its session is over", LIMIT, |status| {
        status["flows"][0]["state"] == "waiting_for_peer" && status["flows"][0]["dirty"].as_u64() > Some(0)
    });
    pair.us
        .wait_until("its keys have waited for longer than the budget", LIMIT, |status| {
            let waiting = status["flows"][0]["links"][0]["attempts"].as_u64();
            waiting > Some(2)
        });
    pair.us_to_eu().pass();
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    assert_eq!(parked(&pair.us), 0);
    assert!(
        pair.us
            .kafka()
            .end_offsets(&retry_topic(&pair.us))
            .iter()
            .all(|(_, end)| *end == 0)
    );
    accounted(&pair.both());
    sampler.finish();
}

#[test]
fn a_relay_with_a_dead_server_drains_in_order_by_parking_and_its_successor_brings_what_was_parked() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .cache(three_servers())
        // Latest: a retry topic is read from its beginning all the same.
        .extra("[kafka]\nstart_at = \"latest\"\n[flow]\nretry_backoff_initial = \"200ms\"")
        .start();
    let (kafka, group) = (pair.us.kafka(), pair.us.group(EU));
    wait_until("its first positions are committed", LIMIT, || {
        let committed = kafka.committed(&group, &pair.us.cache("sessions").topic);
        committed.len() == 4 && committed.iter().all(|(_, offset)| offset.is_some())
    });
    let dead = pair.eu.cache("sessions").servers[DEAD].proxy();
    dead.cut();
    let keys = numbered("key", 3_000);
    let (its, others) = split(&pair.eu, DEAD, &keys);
    write(&pair.us, &keys, "value");
    all_arrive(&pair.eu, &others, "value");
    pair.us
        .wait_until("only the dead server's keys are left", LIMIT, |status| {
            flows(status).is_ok_and(|flows| flows[0].in_flight as usize == its.len())
        });
    assert_eq!(pair.us.terminate(), 0, "{}", pair.us.log_tail(20));
    assert!(source_is_done(&pair.us), "everything was committed");
    let parked = pair.us.kafka().end_offsets(&retry_topic(&pair.us));
    let parked: i64 = parked.iter().map(|(_, end)| end).sum();
    assert_eq!(parked as usize, its.len());
    dead.pass();
    pair.us.start();
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
}

#[test]
fn a_frozen_or_slow_server_keeps_nobody_waiting_on_either_side() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().cache(three_servers()).extra(SOON).start();
    let sampler = Sampler::start(&pair.both());
    for (round, slow) in [
        ("frozen there", &pair.eu),
        ("frozen here", &pair.us),
        ("slow there", &pair.eu),
        ("slow here", &pair.us),
    ] {
        let proxy = slow.cache("sessions").servers[DEAD].proxy();
        match round.starts_with("frozen") {
            true => proxy.stall(),
            false => proxy.latency(Duration::from_millis(400)),
        }
        let keys = numbered(round, 6_000);
        let keys: Vec<String> = keys.iter().map(|key| key.replace(' ', "-")).collect();
        let (_, others) = split(slow, DEAD, &keys);
        write(&pair.us, &keys, "value");
        all_arrive(&pair.eu, &others, "value");
        proxy.pass();
        settle(&pair.both());
        assert_same(&pair.both(), "sessions", &keys);
    }
    accounted(&pair.both());
    sampler.finish();
}
