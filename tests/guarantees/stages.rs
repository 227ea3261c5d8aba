//! Which stage of the path takes how long can be seen from outside, and adds up to the whole.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use evrepl_lab::*;

const SLOW: Duration = Duration::from_millis(60);
const LIMIT: Duration = Duration::from_secs(60);

/// Seconds and events measured so far, by stage.
fn measured(region: &Region) -> BTreeMap<String, (f64, f64)> {
    let status = region.status();
    let stages = status["flows"][0]["stages"].as_object().unwrap();
    let number = |stage: &serde_json::Value, name: &str| stage[name].as_f64().unwrap();
    let stages = stages.iter().map(|(name, stage)| {
        let measured = (number(stage, "seconds_total"), number(stage, "count"));
        (name.clone(), measured)
    });
    stages.collect()
}

#[test]
fn a_stage_that_is_made_slow_is_the_one_that_grows_and_all_of_them_add_up_to_the_lag() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .cache(CacheSpec::new("sessions").proxied())
        .one_way()
        .proxied()
        .start();
    let mut writer = pair.us.writer("sessions");
    // The mean of each stage while ten writes pass, one after the other.
    let mut means = || {
        let before = measured(&pair.us);
        for n in 0..10 {
            writer.set(format!("key:{n}").as_bytes(), b"value");
            writer.flush();
            settle(&pair.both());
        }
        let mean = |(name, (seconds, count)): (String, (f64, f64))| {
            let (seconds_before, count_before) = before[&name];
            let measured = count - count_before;
            assert!(measured > 0.0, "{name} was not measured");
            (name, (seconds - seconds_before) / measured)
        };
        measured(&pair.us).into_iter().map(mean).collect::<BTreeMap<_, _>>()
    };
    let usual = means();
    assert_eq!(
        usual.keys().collect::<Vec<_>>(),
        [
            "agent_queue",
            "apply",
            "coalesce",
            "kafka",
            "link",
            "look",
            "queue",
            "wait"
        ]
    );
    let source = pair.us.cache("sessions").servers[0].proxy();
    let destination = pair.eu.cache("sessions").servers[0].proxy();
    for (proxy, stage) in [(source, "look"), (pair.us_to_eu(), "link"), (destination, "apply")] {
        proxy.latency(SLOW);
        let slow = means();
        proxy.pass();
        let grown = |name: &str| slow[name] - usual[name];
        let most = slow
            .keys()
            .max_by(|one, other| grown(one).total_cmp(&grown(other)))
            .unwrap();
        assert_eq!(most, stage, "{slow:?} after {usual:?}");
        assert!(grown(stage) > SLOW.as_secs_f64() * 0.8, "{slow:?} after {usual:?}");
    }

    // Of one event, alone in its ack: the stages and the lag are taken in the same moment.
    for proxy in [source, pair.us_to_eu(), destination] {
        proxy.latency(SLOW);
    }
    // On a busy machine one may be looked at again: that one has waited.
    wait_until("one passes without a second look", LIMIT, || {
        writer.set_all([("alone", "value")]);
        settle(&pair.both());
        let (lag, stages) = last(&pair.us);
        stages["wait"] == 0.0 && lag > 3.0 * SLOW.as_secs_f64()
    });
}

/// The lag of the last event that was acked, and its stages, which add up to it.
fn last(region: &Region) -> (f64, BTreeMap<String, f64>) {
    let status = region.status();
    let stages = status["flows"][0]["stages"].as_object().unwrap().iter();
    let stages = stages.map(|(name, stage)| (name.clone(), stage["last_seconds"].as_f64().unwrap()));
    let stages: BTreeMap<_, _> = stages.collect();
    let sum: f64 = stages.values().sum();
    let lag = status["flows"][0]["lag_seconds"]["acked"].as_f64().unwrap();
    // Both are cut to milliseconds; another thread may come between the readings of the two clocks.
    assert!(
        (sum - lag).abs() < 0.25 * lag,
        "{stages:?} add up to {sum}, the lag is {lag}"
    );
    (lag, stages)
}

/// Longer than anything else that happens to a single event.
const AWAY_SECONDS: f64 = 2.0;

#[test]
fn what_waited_for_a_memcached_of_the_peer_adds_up_too_and_its_wait_is_what_took_long() {
    let _gate = shared();
    // In the first flow its key waits as dirty, in the second it is parked on the retry topic meanwhile.
    for (retry_budget, is_parked) in [("30s", false), ("500ms", true)] {
        let pair = TwoRegionsSpec::new()
            .one_way()
            .extra(&format!(
                "[flow]\nretry_budget = \"{retry_budget}\"\nretry_backoff_max = \"1s\""
            ))
            .start();
        let memcached = pair.eu.cache("sessions").memcached(0);
        let mut writer = pair.us.writer("sessions");
        writer.set(b"before", b"value");
        writer.flush();
        settle(&pair.both());
        memcached.freeze();
        let frozen = Instant::now();
        writer.set(b"waits", b"value");
        writer.flush();
        pair.us.wait_until("it has waited for long", LIMIT, |status| {
            let flow = &status["flows"][0];
            let parked = flow["outcomes"]["parked"].as_u64() > Some(0);
            let waits = flow["dirty"].as_u64() > Some(0) || parked;
            waits && parked == is_parked && frozen.elapsed().as_secs_f64() > AWAY_SECONDS
        });
        memcached.thaw();
        settle(&pair.both());
        let (lag, stages) = last(&pair.us);
        assert!(lag > AWAY_SECONDS, "{lag}: {stages:?}");
        assert!(stages["wait"] > 0.75 * lag, "the lag is {lag}: {stages:?}");
    }
}
