//! What happens shows in `/metrics`, as it is, and the same goes out over OTLP.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use evrepl::telemetry::metrics::METRICS;
use evrepl_lab::faults::world::faketime;
use evrepl_lab::{
    CacheSpec, OtlpSink, Region, TwoRegionsSpec, accounted, assert_same, holds_within, settle, shared, wait_until,
};

const FLOW: &str = "us-east-1->eu-west-1";
const LIMIT: Duration = Duration::from_secs(30);

/// One series of a scrape: its labels as they stand there, and its value.
type Series = (String, f64);

/// The series of one metric in one scrape.
fn series(scrape: &str, name: &str) -> Vec<Series> {
    let ours = scrape
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix('{'));
    let parsed = ours.filter_map(|rest| {
        let (labels, value) = rest.rsplit_once("} ")?;
        Some((labels.to_owned(), value.parse().ok()?))
    });
    parsed.collect()
}

/// The sum of a metric's series by flow.
fn by_flow(scrape: &str, name: &str) -> BTreeMap<String, f64> {
    let mut sums = BTreeMap::new();
    for (labels, value) in series(scrape, name) {
        let flow = labels.split("flow=\"").nth(1).and_then(|rest| rest.split('"').next());
        *sums.entry(flow.unwrap_or_default().to_owned()).or_default() += value;
    }
    sums
}

/// What the scrapes of one process have shown.
#[derive(Default)]
struct Scrapes {
    /// All of them, and those that showed something in flight or dirty keys.
    count: AtomicUsize,
    in_flight: AtomicUsize,
    dirty: AtomicUsize,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    wrong: Vec<String>,
    consumed: f64,
}

impl Scrapes {
    fn add(&self, scrape: &str) {
        let mut seen = self.seen.lock().unwrap();
        let consumed = by_flow(scrape, "evrepl_events_consumed_total");
        let ended = by_flow(scrape, "evrepl_events_total");
        let held = by_flow(scrape, "evrepl_events_in_flight");
        for (flow, consumed) in &consumed {
            let sum = ended.get(flow).copied().unwrap_or(0.0) + held.get(flow).copied().unwrap_or(0.0);
            if *consumed != sum {
                let wrong = format!("{flow}: consumed {consumed}, ended or held {sum}");
                seen.wrong.push(wrong);
            }
        }
        let total: f64 = consumed.values().sum();
        if total < seen.consumed {
            let wrong = format!("consumed fell from {} to {total}", seen.consumed);
            seen.wrong.push(wrong);
        }
        seen.consumed = total;
        let holds = series(scrape, "evrepl_events_in_flight");
        let held = |(_, count): &Series| *count > 0.0;
        let dirty = |(labels, count): &Series| labels.contains("hold=\"dirty\"") && *count > 0.0;
        self.in_flight.fetch_add(holds.iter().any(held).into(), SeqCst);
        self.dirty.fetch_add(holds.iter().any(dirty).into(), SeqCst);
        self.count.fetch_add(1, SeqCst);
    }
}

/// Tells the scraping threads to end.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// Scrapes as fast as it can until told to stop.
fn scrape_on(region: &Region, scrapes: &Scrapes, stop: &AtomicBool) {
    while !stop.load(SeqCst) {
        if let Ok((200, scrape)) = region.get("/metrics") {
            scrapes.add(&scrape);
        }
    }
}

/// Waits until twenty scrapes more have counted here.
fn twenty_more(what: &str, scrapes: &AtomicUsize) {
    let before = scrapes.load(SeqCst);
    wait_until(what, LIMIT, || scrapes.load(SeqCst) >= before + 20);
}

#[test]
fn what_was_consumed_has_ended_or_is_held_in_every_scrape_of_a_faulty_run() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .cache(CacheSpec::new("sessions").servers(2))
        .one_way()
        .proxied()
        .start();
    let second = pair.us.another_node("relay-2");
    let all = [&pair.us, &second, &pair.eu];
    let keys: Vec<String> = (0..20_000).map(|n| format!("key:{}", n % 7_000)).collect();
    let mut more = 0;
    let stop = AtomicBool::new(false);
    let (first, other) = (Scrapes::default(), Scrapes::default());
    thread::scope(|scope| {
        // Also when something here panics: the scope waits for its threads.
        let _stop = Stop(&stop);
        scope.spawn(|| scrape_on(&pair.us, &first, &stop));
        scope.spawn(|| scrape_on(&second, &other, &stop));
        let mut writer = pair.us.writer("sessions");
        let mut write = |part: usize| {
            let part = &keys[part * 4_000..(part + 1) * 4_000];
            writer.set_all(part.iter().map(|key| (key, key)));
        };
        pair.us_to_eu().latency(Duration::from_millis(5));
        write(0);
        // A link that is lost, a destination that dies, a second relay that takes half of the partitions.
        pair.us_to_eu().cut();
        write(1);
        twenty_more("scrapes without a link", &first.in_flight);
        pair.us_to_eu().pass();
        pair.eu.cache("sessions").memcached(0).kill();
        write(2);
        twenty_more("scrapes while a destination is dead", &first.dirty);
        second.start();
        pair.eu.cache("sessions").memcached(0).restart();
        write(3);
        pair.us_to_eu().close_connections();
        write(4);
        // Kafka gives the second relay its partitions when the first has let go of them, maybe after all this.
        wait_until("the second relay consumes", LIMIT, || {
            more += 1;
            writer.set_all([(format!("more:{more}"), "value")]);
            second.metric("evrepl_events_consumed_total", &[]) > Some(0.0)
        });
        settle(&all);
        twenty_more("scrapes of the end", &first.count);
        twenty_more("scrapes of the end", &other.count);
    });
    let (seen, others) = (first.seen.into_inner().unwrap(), other.seen.into_inner().unwrap());
    println!("{:?} and {:?} scrapes", first.count, other.count);
    assert_eq!(seen.wrong, Vec::<String>::new(), "of {:?} scrapes", first.count);
    assert_eq!(others.wrong, Vec::<String>::new(), "of {:?} scrapes", other.count);
    // And they are the right sums: what was written, what was parked and came back from the retry topic, and what one gave back
    // and the other consumed again.
    let ended = |outcome| {
        let of = |region: &Region| region.metric("evrepl_events_total", &[("outcome", outcome)]);
        of(&pair.us).unwrap_or(0.0) + of(&second).unwrap_or(0.0)
    };
    let (released, parked) = (ended("released"), ended("parked"));
    let taken = seen.consumed + others.consumed - released - parked;
    let written = (keys.len() + more) as f64;
    // What had ended behind an event that was given back is consumed again with it.
    let right = taken == written || (released > 0.0 && taken > written);
    assert!(
        right,
        "{taken} of {written} consumed, without {parked} parked and {released} released"
    );
    if taken == written {
        accounted(&all);
    }
    // What that memcached held was lost with it, and its keys were written again or not.
    assert_same(&pair.both(), "sessions", &keys[16_000..]);
}

#[test]
fn lag_at_the_agent_is_right_although_its_clock_is_half_a_minute_ahead() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().build();
    pair.eu.set_env("LD_PRELOAD", Some(&faketime().to_string_lossy()));
    pair.eu.set_env("FAKETIME", Some("+30s"));
    pair.eu.set_env("FAKETIME_DONT_FAKE_MONOTONIC", Some("1"));
    pair.eu.start();
    pair.us.start();
    pair.us.wait_until("the clocks are compared", LIMIT, |status| {
        status["flows"][0]["links"][0]["clock_offset_ms"].is_f64()
    });
    let mut writer = pair.us.writer("sessions");
    // The agent learns of the offset with the second ping, a round trip after the first; what came before has no lag there.
    let lag = |region: &Region, stage: &str, what: &str| {
        let name = format!("evrepl_stage_lag_seconds_{what}");
        region.metric(&name, &[("stage", stage), ("flow", FLOW)]).unwrap_or(0.0)
    };
    let mut n = 0;
    wait_until("the agent tells the lag of twenty batches", LIMIT, || {
        n += 1;
        writer.set(format!("key:{n}").as_bytes(), b"value");
        writer.flush();
        settle(&pair.both());
        lag(&pair.eu, "applied", "count") >= 20.0
    });
    for stage in ["received", "applied"] {
        let mean = lag(&pair.eu, stage, "sum") / lag(&pair.eu, stage, "count");
        println!("{stage}: {mean:.3} s");
        assert!((0.0..3.0).contains(&mean), "{stage} says {mean} s");
    }
    let acked = lag(&pair.us, "acked", "sum") / lag(&pair.us, "acked", "count");
    let applied = lag(&pair.eu, "applied", "sum") / lag(&pair.eu, "applied", "count");
    // Applied before it was acked, as two clocks see it that pings have compared.
    assert!(
        applied <= acked + 0.1,
        "applied after {applied} s, acked after {acked} s"
    );
    let offset = pair.us.metric("evrepl_link_clock_offset_seconds", &[("flow", FLOW)]);
    assert!(offset.is_some_and(|offset| (offset - 30.0).abs() < 0.5), "{offset:?}");
}

#[test]
fn a_dead_memcached_opens_its_breaker_on_either_side_and_no_other() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .cache(CacheSpec::new("sessions").servers(2))
        .one_way()
        .start();
    let breaker = |region: &Region, side: &str, server: usize| {
        let address = region.cache("sessions").memcached(server).address();
        region.metric("evrepl_breaker_state", &[("side", side), ("server", &address)])
    };
    let keys: Vec<String> = (0..200).map(|n| format!("key:{n}")).collect();
    let mut writer = pair.us.writer("sessions");
    writer.set_all(keys.iter().map(|key| (key, "before")));
    settle(&pair.both());
    let sides = [(&pair.us, "relay"), (&pair.eu, "agent")];
    for (region, side) in sides {
        assert_eq!(
            (breaker(region, side, 0), breaker(region, side, 1)),
            (Some(0.0), Some(0.0))
        );
    }
    for (region, side) in sides {
        let memcached = region.cache("sessions").memcached(1);
        memcached.kill();
        let mut n = 0;
        wait_until("its breaker opens", LIMIT, || {
            // The relay finds out by looking.
            n += 1;
            keys.iter()
                .for_each(|key| writer.say(evrepl_lab::Op::Set, key.as_bytes()));
            writer.flush();
            breaker(region, side, 1) > Some(0.0)
        });
        assert_eq!(breaker(region, side, 0), Some(0.0), "{side}");
        let failures = region.metric("evrepl_memcached_failures_total", &[("server", &memcached.address())]);
        assert!(failures > Some(0.0) || side == "agent", "{side}: {failures:?}");
        memcached.restart();
        wait_until("its breaker closes", LIMIT, || breaker(region, side, 1) == Some(0.0));
    }
    settle(&pair.both());
    // Calls were timed on both sides.
    for (region, call) in [(&pair.us, "look"), (&pair.eu, "write")] {
        let calls = region.metric("evrepl_memcached_call_seconds_count", &[("call", call)]);
        assert!(calls > Some(0.0), "{call}: {calls:?}");
    }
}

#[test]
fn the_age_of_what_is_not_committed_grows_while_the_peer_is_away_and_permits_are_counted() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().proxied().start();
    let metric = |name: &str| pair.us.metric(name, &[("flow", FLOW)]);
    let mut writer = pair.us.writer("sessions");
    writer.set(b"before", b"value");
    writer.flush();
    settle(&pair.both());
    wait_until("all is committed", LIMIT, || {
        metric("evrepl_commit_age_seconds") == Some(0.0)
    });
    assert_eq!(metric("evrepl_permits"), metric("evrepl_permits_free"));
    pair.us_to_eu().cut();
    pair.us.wait_until("the link is down", LIMIT, |status| {
        status["flows"][0]["state"] == "waiting_for_peer"
    });
    writer.set_all((0..500).map(|n| (format!("key:{n}"), "value")));
    wait_until("the age has grown", LIMIT, || {
        metric("evrepl_commit_age_seconds") > Some(2.0)
    });
    assert!(
        metric("evrepl_permits_free") < metric("evrepl_permits"),
        "looks wait with permits"
    );
    assert!(metric("evrepl_link_state") < Some(3.0));
    pair.us_to_eu().pass();
    settle(&pair.both());
    wait_until("all is committed", LIMIT, || {
        metric("evrepl_commit_age_seconds") == Some(0.0)
    });
    assert_eq!(metric("evrepl_permits"), metric("evrepl_permits_free"));
    assert!(metric("evrepl_kafka_rebalances_total") >= Some(1.0));
    assert!(metric("evrepl_raw_bytes_total") >= metric("evrepl_wire_bytes_total"));
}

#[test]
fn otlp_carries_the_same_metrics_with_the_same_names_and_units() {
    let _gate = shared();
    let sink = OtlpSink::start();
    let pair = TwoRegionsSpec::new()
        .telemetry(&sink.endpoint(), 0.0)
        .extra("[canary]\ninterval = \"1s\"")
        .one_way()
        .us(|us| us.cache(CacheSpec::new("sessions").front_door()))
        .eu(|eu| eu.cache(CacheSpec::new("sessions")))
        .start();
    let mut writer = pair.us.writer("sessions");
    writer.set_all((0..200).map(|n| (format!("key:{n}"), "value")));
    settle(&pair.both());
    let scraped = || -> BTreeSet<String> {
        let scrapes = pair.both().map(Region::metrics);
        let types = scrapes.iter().flat_map(|scrape| scrape.lines());
        let names = types.filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
        names.map(str::to_owned).collect()
    };
    // Exported every ten seconds.
    let exported = || -> BTreeSet<String> {
        let names = sink.metric_names().into_iter();
        names.filter(|name| name.starts_with("evrepl_")).collect()
    };
    let declared: BTreeSet<String> = METRICS.iter().map(|metric| metric.name.to_owned()).collect();
    let came = holds_within(LIMIT, || scraped() == declared && exported() == declared);
    assert!(
        came,
        "scraped but not declared, or the reverse: {:?}; exported: {:?}",
        scraped().symmetric_difference(&declared).collect::<Vec<_>>(),
        exported().symmetric_difference(&declared).collect::<Vec<_>>()
    );
    for metric in METRICS {
        for point in sink.points(metric.name) {
            assert_eq!(point.unit, metric.unit, "{}", metric.name);
        }
    }
}
