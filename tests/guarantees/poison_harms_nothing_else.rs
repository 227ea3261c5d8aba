//! A record that can never be replicated goes to the dead-letter topic as it was, with the reason; it is counted, and what
//! stands before and behind it goes on.

use std::collections::HashMap;
use std::time::Duration;

use evrepl::outcome::Outcome;
use evrepl_lab::{
    CacheSpec, Format, Outgoing, PeerSpec, Record, RegionBuilder, Sampler, TwoRegionsSpec, accounted, assert_same,
    broker, settle, shared, wait_until,
};

const EU: &str = "eu-west-1";

/// Key, value, and the reason that the dead letter gives.
fn poisons() -> Vec<(Vec<u8>, Vec<u8>, &'static str)> {
    let event = br#"{"v":1,"op":"set"}"#.to_vec();
    let of = |value: &[u8], reason| (format!("poison:{reason}").into_bytes(), value.to_vec(), reason);
    vec![
        of(b"", "empty"),
        of(b"\xc1 neither", "not_messagepack"),
        of(b"{\"v\":1,\"op\":\"set\"", "not_json"),
        of(b"\x82\xa1v\x01\xa2op", "truncated"),
        of(b"\x82\xa1v\x01\xa2op\xa3setmore", "trailing_bytes"),
        of(br#"{"v":2,"op":"set"}"#, "unknown_version"),
        of(br#"{"v":1,"op":"increase"}"#, "unknown_op"),
        of(br#"{"op":"set"}"#, "missing_field"),
        of(br#"{"v":1,"op":"set","ttl":"soon"}"#, "wrong_type"),
        (Vec::new(), event.clone(), "key is empty"),
        (vec![b'k'; 251], event.clone(), "key is longer than 250 bytes"),
        (
            [&[b' '][..], &[b'k'; 186]].concat(),
            event,
            "key is longer than 186 bytes and has white space or control characters",
        ),
    ]
}

#[test]
fn a_record_that_is_no_event_is_kept_as_it_was_with_its_reason_and_the_rest_goes_on() {
    let _gate = shared();
    // One partition, so that each poison stands in everyone's way; six in the other cache, for its topics' sake.
    let pair = TwoRegionsSpec::new()
        .cache(CacheSpec::new("sessions").partitions(1))
        .cache(CacheSpec::new("wide").partitions(6))
        .start();
    let sampler = Sampler::start(&pair.both());
    let kafka = pair.us.kafka();
    let topic = &pair.us.cache("sessions").topic;
    for (cache, partitions) in [("sessions", 1), ("wide", 6)] {
        let source = &pair.us.cache(cache).topic;
        for beside in [format!("{source}.retry.{EU}"), format!("{source}.dead-letter")] {
            wait_until(
                &format!("{beside} is as wide as its source"),
                Duration::from_secs(30),
                || kafka.partitions(&beside).len() == partitions,
            );
        }
    }

    let poisons = poisons();
    let mut writer = pair.us.writer("sessions").format(Format::Json);
    let mut keys = Vec::new();
    let producer = kafka.producer(&[]);
    let headers: [(&str, &[u8]); 3] = [
        ("traceparent", b"of the writer"),
        ("tenant", b"\x00\xff"),
        ("tenant", b"second"),
    ];
    for (n, (key, value, _)) in poisons.iter().enumerate() {
        let before = format!("before:{n}");
        writer.set(before.as_bytes(), before.as_bytes());
        writer.flush();
        keys.push(before);
        producer.send(Outgoing {
            headers: &headers,
            timestamp: Some(1_700_000_000_000 + n as i64),
            ..Outgoing::new(topic, key, value)
        });
        producer.flush();
    }
    // Neither key nor value: another way to write nothing.
    producer.send(Outgoing {
        key: None,
        value: None,
        ..Outgoing::new(topic, b"", b"")
    });
    producer.flush();
    writer.set(b"behind", b"all of them");
    writer.flush();
    keys.push("behind".into());
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    assert!(pair.eu.cache("sessions").client().get(b"behind").unwrap().is_some());

    let letters = kafka.read_all(&format!("{topic}.dead-letter"));
    assert_eq!(letters.len(), poisons.len() + 1, "{letters:#?}");
    let text = |letter: &Record, name: &str| {
        let header = letter.header(name).unwrap_or_else(|| panic!("no {name} in {letter:?}"));
        String::from_utf8(header.to_vec()).unwrap()
    };
    for (n, (key, value, reason)) in poisons.iter().enumerate() {
        let produced_at = (1_700_000_000_000 + n as i64).to_string();
        let found = letters
            .iter()
            .find(|letter| letter.header("evrepl-produced-at") == Some(produced_at.as_bytes()));
        let letter = found.unwrap_or_else(|| panic!("no dead letter for {reason}: {letters:#?}"));
        assert_eq!((letter.key(), letter.value()), (&key[..], &value[..]), "{reason}");
        assert_eq!(text(letter, "evrepl-reason"), *reason);
        // Retention counts from the burial, however old the event was.
        assert!(letter.timestamp > Some(1_750_000_000_000), "{letter:?}");
        assert_eq!(text(letter, "evrepl-peer"), EU);
        // An event stands before each poison: it is the odd ones.
        assert_eq!(text(letter, "evrepl-offset"), (2 * n + 1).to_string());
        let original: Vec<(&str, &[u8])> = letter
            .headers
            .iter()
            .map(|(name, value)| (&name[..], &value[..]))
            .collect();
        assert_eq!(original[..3], headers, "{reason}");
    }
    let nothing = letters
        .iter()
        .find(|letter| text(letter, "evrepl-offset") == "24")
        .unwrap();
    assert_eq!(text(nothing, "evrepl-reason"), "key is empty");
    assert_eq!((&nothing.key, &nothing.value), (&None, &None), "null stays null");
    let flow = pair.us.flow(EU);
    assert_eq!(flow.outcome(Outcome::DeadLettered), poisons.len() as u64 + 1);
    assert_eq!(flow.outcome(Outcome::Applied), keys.len() as u64);
    accounted(&pair.both());
    sampler.finish();

    // They are behind the watermark: who starts again buries nothing twice.
    let group = pair.us.group(EU);
    wait_until("everything is committed", Duration::from_secs(10), || {
        kafka.committed(&group, topic) == [(0, Some(kafka.end_offsets(topic)[0].1))]
    });
    pair.us.restart();
    writer.set(b"behind", b"the restart");
    writer.flush();
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &["behind"]);
    assert_eq!(pair.us.flow(EU).outcome(Outcome::DeadLettered), 0);
    assert_eq!(kafka.read_all(&format!("{topic}.dead-letter")).len(), letters.len());
}

#[test]
fn each_peer_has_its_own_dead_letter_even_while_it_is_away() {
    let _gate = shared();
    // Two peers that never answer: poison needs none of them.
    let us = RegionBuilder::new("us-east-1")
        .cache(CacheSpec::new("sessions").partitions(2))
        .peer(PeerSpec::at(EU, "127.0.0.1:1"))
        .peer(PeerSpec::at("ap-south-1", "127.0.0.1:1"))
        .start();
    let sampler = Sampler::start(&[&us]);
    let topic = us.cache("sessions").topic.clone();
    let writer = us.writer("sessions");
    writer.produce(b"poison", b"no event", &[]);
    writer.flush();
    settle(&[&us]);
    let letters = broker().read_all(&format!("{topic}.dead-letter"));
    let mut count: HashMap<Vec<u8>, usize> = HashMap::new();
    for letter in &letters {
        *count.entry(letter.header("evrepl-peer").unwrap().to_vec()).or_default() += 1;
        assert_eq!((letter.key(), letter.value()), (&b"poison"[..], &b"no event"[..]));
    }
    let once = [(b"ap-south-1".to_vec(), 1), (EU.as_bytes().to_vec(), 1)];
    assert_eq!(count, HashMap::from(once));
    for peer in [EU, "ap-south-1"] {
        let flow = us.flow(peer);
        assert_eq!((flow.consumed, flow.outcome(Outcome::DeadLettered)), (1, 1), "{peer}");
    }
    accounted(&[&us]);
    sampler.finish();
}
