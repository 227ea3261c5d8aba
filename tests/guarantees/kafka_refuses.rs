//! A record that Kafka does not take (a dead letter, a parked event) is kept by the relay and produced until Kafka takes it;
//! until then nothing is committed past its event.

use std::time::Duration;

use evrepl::outcome::Outcome;
use evrepl_lab::*;

const LIMIT: Duration = Duration::from_secs(60);
const EU: &str = "eu-west-1";
const TOPIC: &str = "refused.sessions";

/// A pair that sends one way, through a broker that refuses on demand; nothing runs yet.
fn pair(mock: &MockKafka) -> TwoRegions {
    let dead_letters = format!("{TOPIC}.dead-letter");
    for topic in [TOPIC.to_owned(), dead_letters, format!("{TOPIC}.retry.{EU}")] {
        mock.create_topic(&topic, 1);
    }
    let (us, eu) = (mock.client(), mock.client());
    TwoRegionsSpec::new()
        .one_way()
        .cache(CacheSpec::new("sessions").topic(TOPIC).proxied())
        .extra("[kafka]\ncommit_interval = \"50ms\"\n[flow]\nretry_budget = \"300ms\"\nretry_backoff_initial = \"1h\"\nretry_backoff_max = \"1h\"")
        .us(move |us_| us_.kafka(&us).topics_exist())
        .eu(move |eu_| eu_.kafka(&eu).topics_exist())
        .build()
}

fn committed(region: &Region) -> i64 {
    region.kafka().committed(&region.group(EU), TOPIC)[0].1.unwrap_or(0)
}

fn said(region: &Region, words: &str) -> usize {
    region.log().matches(words).count()
}

#[test]
fn a_dead_letter_that_kafka_refuses_is_kept_and_nothing_is_committed_past_it() {
    let _gate = shared();
    let mock = MockKafka::start();
    let pair = pair(&mock);
    let mut writer = pair.us.writer("sessions");
    writer.set(b"before", b"value");
    writer.produce(b"poison", b"no event", &[]);
    writer.set(b"behind", b"value");
    writer.flush();
    mock.refuse_records();
    pair.us.start();
    pair.eu.start();
    wait_until("what is no poison arrives", LIMIT, || {
        pair.eu.cache("sessions").client().get(b"behind").unwrap().is_some()
    });
    wait_until("the dead letter was refused three times", LIMIT, || {
        said(&pair.us, "dead letter not taken by kafka") >= 3
    });
    let flow = pair.us.flow(EU);
    assert_eq!((flow.in_flight, flow.outcome(Outcome::DeadLettered)), (1, 0));
    assert_eq!(committed(&pair.us), 1, "only what stands before it");

    mock.take_records();
    wait_until("the dead letter is taken", LIMIT, || committed(&pair.us) == 3);
    let flow = pair.us.flow(EU);
    assert_eq!((flow.in_flight, flow.outcome(Outcome::DeadLettered)), (0, 1));
    let letters = pair.us.kafka().read_all(&format!("{TOPIC}.dead-letter"));
    assert!(!letters.is_empty() && letters.iter().all(|letter| letter.key() == b"poison"));
}

#[test]
fn an_event_whose_retry_record_kafka_refuses_stays_dirty_and_nothing_is_committed_past_it() {
    let _gate = shared();
    let mock = MockKafka::start();
    let pair = pair(&mock);
    pair.us.start();
    pair.eu.start();
    let mut writer = pair.us.writer("sessions");
    writer.set(b"first", b"value");
    writer.flush();
    wait_until("the flow works", LIMIT, || committed(&pair.us) == 1);
    pair.eu.cache("sessions").servers[0].proxy().cut();
    for n in 0..20 {
        writer.set(format!("key:{n}").as_bytes(), b"value");
    }
    writer.flush();
    mock.refuse_records();
    wait_until("retry records were refused three times", LIMIT, || {
        said(&pair.us, "kafka does not take retry records") >= 3
    });
    let flow = pair.us.flow(EU);
    assert_eq!(flow.outcome(Outcome::Parked), flow.consumed - flow.in_flight - 1);
    assert!(flow.in_flight > 0, "{:#}", flow.json);
    assert!(committed(&pair.us) < 21);
    balanced(&pair.us.status()).unwrap();

    mock.take_records();
    wait_until("what was refused is parked", LIMIT, || committed(&pair.us) == 21);
    let parked = pair.us.kafka().read_all(&format!("{TOPIC}.retry.{EU}"));
    for n in 0..20 {
        let key = format!("key:{n}");
        assert!(parked.iter().any(|record| record.key() == key.as_bytes()), "{key}");
    }
}
