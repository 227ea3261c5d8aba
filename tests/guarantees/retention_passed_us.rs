//! Events that Kafka removed before the flow took them are gone, and never silently: counted with place, size and time, in
//! the log, in the status and in the readiness; and the flow goes on with the oldest there is.

use std::time::Duration;

use evrepl_lab::*;

const LIMIT: Duration = Duration::from_secs(60);
const EU: &str = "eu-west-1";

fn spec() -> TwoRegionsSpec {
    TwoRegionsSpec::new()
        .one_way()
        .cache(CacheSpec::new("sessions").partitions(1).memcached_args(&["-m", "256"]))
        .extra("[kafka]\ncommit_interval = \"50ms\"\n[flow]\nmax_in_flight_events = 1000")
}

fn keys(from: usize, to: usize) -> Vec<String> {
    (from..to).map(|n| format!("key:{n}")).collect()
}

fn write(region: &Region, keys: &[String]) {
    region.writer("sessions").set_all(keys.iter().map(|key| (key, key)));
}

fn gaps(region: &Region) -> (u64, u64) {
    let flow = region.flow(EU).json;
    let number = |name: &str| flow[name].as_u64().unwrap();
    (number("retention_gaps"), number("retention_gap_events"))
}

/// From and to of the last gap.
fn last(region: &Region) -> (i64, i64) {
    let gap = region.flow(EU).json["last_retention_gap"].clone();
    assert_eq!(gap["topic"], region.cache("sessions").topic.as_str());
    assert_eq!(gap["partition"], 0);
    (gap["from"].as_i64().unwrap(), gap["to"].as_i64().unwrap())
}

/// So many gaps were found, and all that is left is done.
fn done(region: &Region, gaps: u64) {
    region.wait_until(&format!("{gaps} gaps, and nothing left to do"), LIMIT, |status| {
        let flow = &status["flows"][0];
        flow["retention_gaps"] == gaps && flow["in_flight"] == 0 && flow["offset_lag"] == 0
    });
}

#[test]
fn a_gap_that_retention_makes_before_a_running_flow_is_found_counted_and_passed() {
    const FIRST: usize = 20_000;
    let _gate = shared();
    let pair = spec().build();
    let topic = pair.us.cache("sessions").topic.clone();
    pair.us.start();
    let sampler = Sampler::start(&[&pair.us]);
    let readyz = pair.us.get("/readyz?verbose").unwrap().1;
    assert!(readyz.contains("[ok] retention us-east-1->eu-west-1"), "{readyz}");
    let first = keys(0, FIRST);
    let paused = |what: &str| {
        pair.us
            .wait_until(what, LIMIT, |status| status["flows"][0]["paused_partitions"] == 1);
    };
    write(&pair.us, &first);
    paused("the relay holds all it may");
    assert_eq!(gaps(&pair.us), (0, 0));
    pair.us.kafka().delete_records(&topic, 0, 15_000);
    pair.eu.start();
    done(&pair.us, 1);
    let (from, to) = last(&pair.us);
    assert!(from > 0 && from < 15_000 && to == 15_000, "{from} to {to}");
    let (_, events) = gaps(&pair.us);
    assert_eq!(events, (to - from) as u64);
    assert_eq!(pair.us.flow(EU).consumed + events, FIRST as u64);
    assert!(pair.us.flow(EU).json["last_retention_gap"]["spans_seconds"].as_f64() >= Some(0.0));
    // What was taken before, and what was left, is there.
    assert_same(&pair.both(), "sessions", &first[..from as usize]);
    assert_same(&pair.both(), "sessions", &first[15_000..]);
    let flow = [("flow", "us-east-1->eu-west-1")];
    let counted = pair.us.metric("evrepl_retention_gap_events_total", &flow);
    assert_eq!(counted, Some(events as f64));
    let (code, readyz) = pair.us.get("/readyz?verbose").unwrap();
    assert_eq!(code, 200);
    assert!(readyz.starts_with("degraded\n"), "{readyz}");
    assert!(
        readyz.contains("[failed] retention us-east-1->eu-west-1 (does not gate): "),
        "{readyz}"
    );
    assert!(
        pair.us
            .log()
            .contains("kafka has removed events before this flow took them")
    );

    // Once more, with nothing left that would come after the gap.
    pair.eu.kill();
    let second = keys(FIRST, 2 * FIRST);
    write(&pair.us, &second);
    paused("the relay holds all it may, again");
    let end = pair.us.kafka().end_offsets(&topic)[0].1;
    pair.us.kafka().delete_records(&topic, 0, end);
    pair.eu.start();
    done(&pair.us, 2);
    assert_eq!(last(&pair.us).1, end);
    assert_eq!(pair.us.flow(EU).consumed + gaps(&pair.us).1, 2 * FIRST as u64);
    let after = keys(2 * FIRST, 2 * FIRST + 100);
    write(&pair.us, &after);
    done(&pair.us, 2);
    wait_until("what is written after the gap arrives", LIMIT, || {
        compare(&pair.both(), "sessions", &after).is_empty()
    });
    assert_eq!(pair.us.flow(EU).consumed + gaps(&pair.us).1, 2 * FIRST as u64 + 100);
    sampler.finish();
}

#[test]
fn a_gap_that_retention_made_while_nobody_read_is_found_at_the_start_and_only_once() {
    let _gate = shared();
    let pair = spec().start();
    let topic = pair.us.cache("sessions").topic.clone();
    let kafka = pair.us.kafka();
    let all = keys(0, 1_500);
    write(&pair.us, &all[..1_000]);
    settle(&pair.both());
    assert_eq!(pair.us.terminate(), 0);
    write(&pair.us, &all[1_000..]);
    kafka.delete_records(&topic, 0, 1_300);
    pair.us.start();
    done(&pair.us, 1);
    assert_eq!((last(&pair.us), gaps(&pair.us)), ((1_000, 1_300), (1, 300)));
    assert_eq!(pair.us.flow(EU).consumed, 200);
    assert_same(&pair.both(), "sessions", &all[1_300..]);
    // The commit said when its last event was produced.
    pair.us.wait_until("the gap's span of time is known", LIMIT, |status| {
        let spans = status["flows"][0]["last_retention_gap"]["spans_seconds"].as_f64();
        spans.is_some_and(|spans| spans > 0.0 && spans < 600.0)
    });

    // Everything is gone: there is no record to tell by.
    assert_eq!(pair.us.terminate(), 0);
    write(&pair.us, &keys(1_500, 1_600));
    kafka.delete_records(&topic, 0, 1_600);
    pair.us.start();
    done(&pair.us, 1);
    assert_eq!((last(&pair.us), gaps(&pair.us)), ((1_500, 1_600), (1, 100)));
    // Told and committed: whoever starts next has nothing to tell.
    assert_eq!(pair.us.terminate(), 0);
    let late = keys(1_600, 1_700);
    write(&pair.us, &late);
    pair.us.start();
    done(&pair.us, 0);
    pair.us
        .wait_until("what was written while it was away is taken", LIMIT, |status| {
            status["flows"][0]["consumed"] == 100
        });
    assert_eq!(gaps(&pair.us), (0, 0));
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &late);
    let readyz = pair.us.get("/readyz?verbose").unwrap().1;
    assert!(readyz.contains("[ok] retention us-east-1->eu-west-1"), "{readyz}");
}
