//! `evrepl replay` brings keys of the past to a peer once more, out of Kafka, while the live stream goes on.

use std::process::{Command, Output};
use std::time::Duration;

use evrepl::outcome::Outcome;
use evrepl_lab::*;

const LIMIT: Duration = Duration::from_secs(60);
const EU: &str = "eu-west-1";

fn replay(region: &Region, arguments: &[&str]) -> Output {
    let mut command = Command::new(evrepl());
    command
        .arg("replay")
        .arg("--config")
        .arg(region.config_path())
        .args(arguments);
    command.output().expect("evrepl can be started")
}

/// What it says, once it ended with this code.
fn said(region: &Region, arguments: &[&str], code: i32) -> String {
    let output = replay(region, arguments);
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
    text.into_owned()
}

#[test]
fn a_memcached_that_was_restarted_empty_is_filled_again_while_the_live_stream_goes_on() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .cache(CacheSpec::new("sessions"))
        .cache(CacheSpec::new("pages"))
        .start();
    let sampler = Sampler::start(&[&pair.us]);
    let keys: Vec<String> = (0..3_000).map(|n| format!("key:{n}")).collect();
    let mut writer = pair.us.writer("sessions");
    writer.set_all(keys.iter().map(|key| (key, "value")));
    writer.produce(b"poison", b"no event", &[]);
    let mut pages = pair.us.writer("pages");
    pages.set_all([("page", "value")]);
    writer.flush();
    settle(&pair.both());
    for cache in ["sessions", "pages"] {
        pair.eu.cache(cache).memcached(0).restart();
        assert_eq!(pair.eu.cache(cache).memcached(0).client().items().unwrap(), 0);
    }
    let assigned = |region: &Region| region.log().matches("partitions assigned").count();
    // Source and retry topics: all that it will ever get.
    wait_until("all partitions are assigned", LIMIT, || assigned(&pair.us) == 2);

    let text = said(&pair.us, &["--peer", EU, "--since", "1h", "--cache", "sessions"], 0);
    let topic = &pair.us.cache("sessions").topic;
    assert_eq!(
        text,
        format!("sessions: 3001 records read from {topic}, 3000 handed to {topic}.retry.{EU}, 1 skipped as no event\n")
    );
    // Written while the replay is on its way back.
    let live: Vec<String> = (0..1_000).map(|n| format!("key:{}", n * 2)).collect();
    writer.set_all(live.iter().map(|key| (key, "newer")));
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    let held = pair.eu.cache("sessions").client().get(b"key:0").unwrap();
    assert_eq!(held.map(|(value, _)| value), Some(b"newer".to_vec()));
    // Not asked for, so not replayed.
    assert_eq!(pair.eu.cache("pages").client().get(b"page").unwrap(), None);
    accounted(&pair.both());
    sampler.finish();
    assert_eq!(assigned(&pair.us), 2, "the replay disturbed the group");

    // A replay of what is old enough only: the time index knows.
    let written = pair
        .us
        .kafka()
        .end_offsets(topic)
        .iter()
        .map(|(_, end)| end)
        .sum::<i64>();
    assert_eq!(written, 4_001);
    let text = said(&pair.us, &["--peer", EU, "--since", "1ms"], 0);
    assert!(
        text.contains("sessions: 0 records read") && text.contains("pages: 0 records read"),
        "{text}"
    );
    let text = said(&pair.us, &["--peer", EU, "--since", "1d"], 0);
    assert!(
        text.contains("sessions: 4001 records read") && text.contains("pages: 1 records read"),
        "{text}"
    );
    settle(&pair.both());
    assert_same(&pair.both(), "pages", &["page"]);
}

#[test]
fn dead_letters_of_a_peer_come_back_as_they_were_and_those_of_others_stay() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().start();
    let topic = pair.us.cache("sessions").topic.clone();
    let dead_letters = format!("{topic}.dead-letter");
    let kafka = pair.us.kafka();
    wait_until("the dead-letter topic is there", LIMIT, || {
        !kafka.partitions(&dead_letters).is_empty()
    });
    // As an older version has left them, which could not read what this one can.
    let value = br#"{"v":1,"op":"set","later":true}"#;
    let mut client = pair.us.cache("sessions").client();
    for (key, peer) in [("ours", EU), ("theirs", "ap-south-1")] {
        client.set(key.as_bytes(), b"value", 0, 0).unwrap();
        let headers: [(&str, &[u8]); 4] = [
            ("tenant", b"7"),
            ("evrepl-reason", b"wrong_type"),
            ("evrepl-peer", peer.as_bytes()),
            ("evrepl-offset", b"0"),
        ];
        kafka.produce(&dead_letters, None, key.as_bytes(), value, &headers);
    }
    let text = said(&pair.us, &["--peer", EU, "--dead-letter"], 0);
    assert!(
        text.contains("2 records read") && text.contains("1 handed to") && text.contains("1 not meant for this peer"),
        "{text}"
    );
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &["ours"]);
    assert_eq!(pair.eu.cache("sessions").client().get(b"theirs").unwrap(), None);
    let records = kafka.read_all(&format!("{topic}.retry.{EU}"));
    let [record] = &records[..] else { panic!("{records:#?}") };
    assert_eq!((record.key(), record.value()), (&b"ours"[..], &value[..]));
    let names: Vec<&str> = record.headers.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["tenant", "evrepl-produced-at"]);
    assert_eq!(pair.us.flow(EU).outcome(Outcome::Applied), 1);
}

#[test]
fn what_cannot_be_replayed_says_why() {
    let _gate = shared();
    let region = RegionBuilder::new("us-east-1")
        .peer(PeerSpec::at(EU, "127.0.0.1:1"))
        .peer(PeerSpec::receive_only("sa-east-1"))
        .build();
    let refused = |arguments: &[&str], code, words: &str| {
        let text = said(&region, arguments, code);
        assert!(text.contains(words), "{arguments:?}: {text}");
    };
    refused(
        &["--peer", "eu-west-2", "--since", "1h"],
        2,
        "there is eu-west-1, sa-east-1",
    );
    refused(&["--peer", "sa-east-1", "--since", "1h"], 2, "only receives");
    refused(
        &["--peer", EU, "--since", "1h", "--cache", "pages"],
        2,
        "there is sessions",
    );
    // evrepl never ran here: nothing was ever buried.
    let dead_letters = format!("{}.dead-letter does not exist", region.cache("sessions").topic);
    refused(&["--peer", EU, "--dead-letter"], 1, &dead_letters);
    // The retry topic is made, as wide as its source.
    refused(&["--peer", EU, "--since", "1h"], 0, "0 records read");
    let retry = format!("{}.retry.{EU}", region.cache("sessions").topic);
    assert_eq!(region.kafka().partitions(&retry).len(), 4);
    region.set("kafka.brokers", "[\"127.0.0.1:1\"]");
    refused(&["--peer", EU, "--since", "1h"], 1, "kafka");
}

#[test]
fn retry_topics_get_as_many_partitions_as_their_source_within_seconds() {
    let _gate = shared();
    let us = RegionBuilder::new("us-east-1")
        .cache(CacheSpec::new("sessions").partitions(2))
        .peer(PeerSpec::at(EU, "127.0.0.1:1"))
        .peer(PeerSpec::at("ap-south-1", "127.0.0.1:1"))
        .start();
    let topic = us.cache("sessions").topic.clone();
    let retries = [EU, "ap-south-1"].map(|peer| format!("{topic}.retry.{peer}"));
    let grown = |count: usize| {
        for retry in &retries {
            wait_until(
                &format!("{retry} has {count} partitions"),
                Duration::from_secs(20),
                || us.kafka().partitions(retry).len() == count,
            );
        }
    };
    grown(2);
    us.kafka().add_partitions(&topic, 7);
    grown(7);
    us.kafka().add_partitions(&topic, 9);
    grown(9);
}
