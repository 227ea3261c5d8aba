//! What sessions may have unacknowledged is bounded, one by one and all together, whatever a peer does.

use std::time::Duration;

use evrepl_lab::*;

use crate::order_per_key::FakeRelay;

const LIMIT: Duration = Duration::from_secs(60);
const EU: &str = "eu-west-1";

/// A window must hold a value of the largest size.
fn small_values() -> CacheSpec {
    CacheSpec::new("sessions").option("max_value_bytes", "\"64KiB\"")
}

#[test]
fn a_session_that_sends_more_than_its_window_is_ended_and_others_go_on() {
    let _gate = shared();
    // Patient with memcached, so that nothing is answered while it is frozen.
    let patient = "[agent]\nsession_window = \"64KiB\"\n[memcached]\ntimeout = \"20s\"\nslow_after = \"20s\"";
    let pair = TwoRegionsSpec::new()
        .cache(small_values())
        .one_way()
        .extra(patient)
        .start();
    pair.us.wait_until("the relay has a session", LIMIT, |status| {
        status["flows"][0]["state"] == "running"
    });
    let value = "x".repeat(40 << 10);
    let mut honest = FakeRelay::dial(&pair.eu);
    let mut greedy = FakeRelay::dial(&pair.eu);
    let sessions = || pair.eu.status()["agent"]["sessions"].as_array().map_or(0, Vec::len);
    assert_eq!(sessions(), 3);
    let memcached = pair.eu.cache("sessions").memcached(0);
    memcached.freeze();
    // One batch may always come, and what fits beside it.
    honest.ship_apart(&[honest.looks("honest", Some(&value))]);
    greedy.ship_apart(&["first", "second"].map(|key| greedy.looks(key, Some(&value))));
    wait_until("the greedy session is over", LIMIT, || sessions() == 2);
    let log = pair.eu.log();
    let said: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("more than its window of 65536"))
        .collect();
    assert_eq!(said.len(), 1, "{}", pair.eu.log_tail(20));
    memcached.thaw();
    pair.us.writer("sessions").set_all([("key", "value")]);
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &["key"]);
    wait_until("the honest session's item is there", LIMIT, || {
        let found = pair.eu.cache("sessions").client().get(b"honest").unwrap();
        found.is_some_and(|(found, _)| found == value.as_bytes())
    });
}

#[test]
fn all_sessions_together_hold_no_more_than_the_agent_grants() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .cache(small_values())
        .one_way()
        .lanes(3)
        .eu(|eu| eu.extra("[agent]\nmax_in_flight_bytes = \"1MiB\"\nsession_window = \"512KiB\""))
        .start();
    let refused = |status: &serde_json::Value| {
        let links = status["flows"][0]["links"].as_array().unwrap();
        let open = links.iter().filter(|link| link["state"] == "open").count();
        let why = |link: &serde_json::Value| {
            link["last_error"]
                .as_str()
                .is_some_and(|it| it.contains("max_in_flight_bytes"))
        };
        open == 2 && links.iter().filter(|link| link["state"] != "open").all(why)
    };
    pair.us.wait_until(
        "two lanes have a window each and the third is told why not",
        LIMIT,
        refused,
    );
    let granted = pair.eu.status()["agent"]["sessions"].clone();
    let granted: Vec<u64> = granted
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["window"].as_u64().unwrap())
        .collect();
    assert_eq!(granted, [512 << 10, 512 << 10]);
    assert!(pair.us.flow(EU).json["links"].as_array().unwrap().len() == 3);
}
