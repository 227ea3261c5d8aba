//! `evrepl check` says beforehand how much memory a configuration may take, and no process takes more: not with a backlog in
//! Kafka, values far beyond what may be in flight, a dead server's keys waiting and being parked, and all of it coming back.

use std::time::Duration;

use evrepl::outcome::Outcome;
use evrepl_lab::faults::accounts::memory_limit;
use evrepl_lab::*;

const LIMIT: Duration = Duration::from_secs(90);
const EU: &str = "eu-west-1";
const MIB: u64 = 1 << 20;

const LIMITS: &str = "[flow]\nmax_in_flight_events = 8192\nmax_in_flight_bytes = \"8MiB\"\nmax_dirty_keys = 20000\n\
                      retry_budget = \"1s\"\nretry_backoff_initial = \"500ms\"\nretry_backoff_max = \"1s\"\n\
                      [agent]\nmax_in_flight_bytes = \"32MiB\"\nsession_window = \"16MiB\"";

#[test]
fn no_process_takes_more_memory_than_check_has_said() {
    const SMALL: usize = 80_000;
    const LARGE: usize = 300;
    let _gate = exclusive();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .proxied()
        .cache(
            CacheSpec::new("sessions")
                .servers(3)
                .proxied()
                .memcached_args(&["-m", "512"]),
        )
        .extra(LIMITS)
        .start();
    let limits = pair.both().map(|region| memory_limit(region).unwrap());
    let small: Vec<String> = (0..SMALL).map(|n| format!("small:{n}")).collect();
    let large: Vec<String> = (0..LARGE).map(|n| format!("large:{n}")).collect();
    let mut writer = pair.us.writer("sessions");
    for (n, key) in large.iter().enumerate() {
        writer
            .client()
            .set(key.as_bytes(), &noise(n as u64, 1_000_000), 0, 0)
            .unwrap();
    }
    // The peer is away: Kafka holds what the relay may not.
    pair.us_to_eu().cut();
    writer.set_all(
        small
            .iter()
            .map(|key| (key, "a value of forty bytes, more or less, it is")),
    );
    large.iter().for_each(|key| writer.say(Op::Set, key.as_bytes()));
    writer.flush();
    pair.us.wait_until("every partition is paused", LIMIT, |status| {
        status["flows"][0]["paused_partitions"] == 4
    });
    // It is back, but one of its servers is not: a third of everything waits, and is parked.
    let dead = pair.eu.cache("sessions").servers[1].proxy();
    dead.cut();
    pair.us_to_eu().pass();
    pair.us.wait_until("much is parked", LIMIT, |status| {
        status["flows"][0]["outcomes"]["parked"].as_u64() > Some(SMALL as u64 / 4)
    });
    dead.pass();
    settle_within(&pair.both(), 2 * LIMIT);
    assert_same(&pair.both(), "sessions", &small);
    assert_same(&pair.both(), "sessions", &large);
    accounted(&pair.both());
    assert!(pair.us.flow(EU).outcome(Outcome::Parked) > 0);
    for (region, limit) in pair.both().into_iter().zip(limits) {
        let (_, peak) = region.peak_rss_bytes().unwrap();
        let (name, idle) = (region.name(), region.idle_rss_bytes());
        println!(
            "{name}: idle {} MiB, peak {} MiB, said {} MiB",
            idle / MIB,
            peak / MIB,
            limit / MIB
        );
        assert!(
            peak <= limit,
            "{name} took {} MiB, check said {} MiB",
            peak / MIB,
            limit / MIB
        );
        // What is said is of use only if it is near.
        assert!(
            limit < 16 * peak,
            "{name} took {} MiB, check said {} MiB",
            peak / MIB,
            limit / MIB
        );
    }
}
