//! A broker that was fenced for a moment answers without naming any broker, and librdkafka then forgets all it knows.

use std::time::Duration;

use evrepl_lab::*;

use crate::front_door::Client;

const LIMIT: Duration = Duration::from_secs(60);
const SESSIONS: &str = "sessions";

#[test]
fn brokers_that_were_forgotten_are_found_again_by_the_clients_that_there_are() {
    let _gate = shared();
    let (own, heartbeats) = Broker::start_with_heartbeats();
    let kafka = own.client();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .us(move |us| {
            us.kafka(&kafka)
                .cache(CacheSpec::new(SESSIONS).front_door())
                .set("front_door.event_timeout", "\"500ms\"")
        })
        .eu(|eu| eu.cache(CacheSpec::new(SESSIONS)))
        .start();
    let mut client = Client::at(&pair.us);
    let acknowledged = || {
        pair.us.wait_until("events are acknowledged", LIMIT, |status| {
            let door = &status["front_doors"][0];
            door["queued_events"] == 0 && door["unsent_keys"] == 0 && door["kafka_away"] == false
        });
    };
    assert_eq!(client.set("before", "x"), "STORED");
    acknowledged();
    settle(&pair.both());

    let so_far = pair.us.log().len();
    heartbeats.stall();
    wait_until("the relay hears of no broker", LIMIT, || {
        pair.us.log()[so_far..].contains("kafka cannot be read")
    });
    wait_until("nor does the front door", LIMIT, || {
        assert_eq!(client.set("meanwhile", "x"), "STORED");
        pair.us.status()["front_doors"][0]["kafka_away"] == true
    });
    heartbeats.pass();
    assert_eq!(client.set("after", "x"), "STORED");
    acknowledged();
    settle(&pair.both());
    assert_same(&pair.both(), SESSIONS, &["before", "meanwhile", "after"]);
    assert_eq!(pair.us.terminate(), 0, "{}", pair.us.log_tail(30));
    let log = pair.us.log();
    for new in ["making a new kafka client", "made a new producer"] {
        assert!(!log.contains(new), "{log}");
    }
}
