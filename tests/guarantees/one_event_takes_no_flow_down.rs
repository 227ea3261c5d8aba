//! An event that panics an actor each time it comes is found, alone among all that were in flight with it, and goes to the
//! dead-letter topic; everything else arrives, and the process lives.

use std::time::Duration;

use evrepl::outcome::Outcome;
use evrepl_lab::*;

const LIMIT: Duration = Duration::from_secs(60);

/// Events around the culprits: several chunks, and more in flight than are tried one by one.
const AROUND: usize = 5_000;

/// More than it takes, and fewer than a process bears in a minute by default: two on trial count as one, of ten.
const BORNE: u64 = 14;

fn write(region: &Region, keys: &[String]) {
    region.writer("sessions").set_in_pieces(keys, "value");
}

fn restarts(region: &Region, actor: &str) -> u64 {
    region.status()["restarts"][actor].as_u64().unwrap_or(0)
}

/// `actor` panics whenever one of the culprits is in its hands.
fn culprits_are_found(failpoint: &'static str, actor: &str, culprits: &[&str]) {
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .lanes(2)
        .extra("[kafka]\ncommit_interval = \"10ms\"")
        .us(move |us| us.env("FAILPOINTS", &format!("{failpoint}=panic(a test)")))
        .start();
    let sampler = Sampler::start(&[&pair.us]);
    let keys: Vec<String> = (0..2 * AROUND).map(|n| format!("key:{n}")).collect();
    let culprits: Vec<String> = culprits.iter().map(|culprit| (*culprit).to_owned()).collect();
    write(&pair.us, &keys[..AROUND]);
    write(&pair.us, &culprits);
    write(&pair.us, &keys[AROUND..]);
    pair.us.wait_until("the culprits are dead letters", LIMIT, |status| {
        flows(status).is_ok_and(|flows| flows[0].outcome(Outcome::DeadLettered) >= culprits.len() as u64)
    });
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    sampler.finish();

    let dead_letter_topic = format!("{}.dead-letter", pair.us.cache("sessions").topic);
    let letters = pair.us.kafka().read_all(&dead_letter_topic);
    let mut buried: Vec<&[u8]> = letters.iter().map(Record::key).collect();
    buried.sort_unstable();
    assert_eq!(buried, culprits.iter().map(|key| key.as_bytes()).collect::<Vec<_>>());
    for letter in &letters {
        assert_eq!(letter.header("evrepl-reason"), Some(&b"panicked"[..]));
        assert_eq!(letter.value(), Op::Set.event(Format::MessagePack));
    }
    let held = pair.eu.cache("sessions").client().get_many(&culprits).unwrap();
    assert!(held.iter().all(Option::is_none), "a culprit has passed all the same");

    let restarts = restarts(&pair.us, actor);
    let log = pair.us.log();
    let downs = log.lines().filter(|line| line.contains("flow is down"));
    downs.for_each(|line| println!("{line}"));
    println!("{} restarts for {} culprits", restarts, culprits.len());
    assert!((2..=BORNE).contains(&restarts), "{restarts} restarts");
    // They are behind the watermark: whoever starts again meets none of them.
    assert_eq!(pair.us.terminate(), 0, "{}", pair.us.log_tail(20));
    pair.us.start();
    write(&pair.us, &["after".to_owned()]);
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &["after"]);
    assert_eq!(pair.us.status()["restarts"], serde_json::json!({}));
}

#[test]
fn an_event_that_panics_its_partition_consumer_becomes_a_dead_letter_and_the_rest_arrives() {
    culprits_are_found("partition_consumer_event", "partition_consumer", &["panic!1"]);
}

#[test]
fn an_event_that_panics_its_cache_reader_becomes_a_dead_letter_and_the_rest_arrives() {
    culprits_are_found("cache_reader_event", "cache_reader", &["panic!1"]);
}

#[test]
fn an_event_that_panics_its_batch_coalescer_becomes_a_dead_letter_and_the_rest_arrives() {
    culprits_are_found("batch_coalescer_event", "batch_coalescer", &["panic!1"]);
}

#[test]
fn two_events_that_panic_their_remote_link_become_dead_letters_and_the_rest_arrives() {
    culprits_are_found("remote_link_event", "remote_link", &["panic!1", "panic!2"]);
}
