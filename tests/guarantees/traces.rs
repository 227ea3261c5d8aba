//! One write can be followed from whoever made it to the peer's memcached, as one trace; what is slow or fails is traced too;
//! and whatever becomes of the collector, replication does not feel it.

use std::process::Command;
use std::time::Duration;

use evrepl_lab::otlp::{OtlpSink, SinkSpan, SinkStatus, SpanKind};
use evrepl_lab::*;

const LIMIT: Duration = Duration::from_secs(30);
/// A writer's trace that is sampled, and one that is not.
const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const NOT_SAMPLED: &str = "00-1bf7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
/// The path inside the relay, in order.
const RELAY_STAGES: [&str; 5] = ["in kafka", "queue", "look", "coalesce", "ship to eu-west-1"];

fn trace_id(traceparent: &str) -> &str {
    &traceparent[3..35]
}

fn of<'a>(spans: &'a [SinkSpan], trace: &str) -> Vec<&'a SinkSpan> {
    spans.iter().filter(|span| span.trace_id == trace).collect()
}

fn named<'a>(spans: &[&'a SinkSpan], name: &str) -> &'a SinkSpan {
    let found: Vec<_> = spans.iter().filter(|span| span.name == name).collect();
    assert_eq!(found.len(), 1, "spans named {name:?} in {spans:#?}");
    found[0]
}

fn children<'a>(spans: &[&'a SinkSpan], parent: &SinkSpan) -> Vec<&'a SinkSpan> {
    let mut found: Vec<_> = spans
        .iter()
        .filter(|span| span.parent_span_id.as_deref() == Some(&parent.span_id))
        .copied()
        .collect();
    found.sort_by_key(|span| (span.start_unix_nanos, span.end_unix_nanos));
    found
}

fn attribute<'a>(span: &'a SinkSpan, name: &str) -> &'a str {
    span.attributes
        .get(name)
        .and_then(|value| value.as_str())
        .unwrap_or_default()
}

fn happened(span: &SinkSpan) -> Vec<&str> {
    span.events.iter().map(|event| event.name.as_str()).collect()
}

/// Waits until a trace has the relay's root and as many spans of the agent.
fn whole(sink: &OtlpSink, trace: &str, applies: usize) -> Vec<SinkSpan> {
    sink.wait_for("the whole trace", LIMIT, |spans| {
        let of = of(spans, trace);
        let there = of.iter().any(|span| span.name.starts_with("process "))
            && of.iter().filter(|span| span.name.starts_with("apply ")).count() == applies;
        there.then(|| of.into_iter().cloned().collect())
    })
}

/// One stage begins where the other has ended; the microsecond between them is for Jaeger's critical path.
fn follows(one: &SinkSpan, next: &SinkSpan) {
    let gap = next.start_unix_nanos.checked_sub(one.end_unix_nanos);
    assert!(gap.is_some_and(|gap| gap <= 1_000), "{one:#?} to {next:#?}");
}

/// The relay's part: one consumer span, and below it the stages one after the other, without a gap.
fn relay_part<'a>(spans: &[&'a SinkSpan], stages: &[&str]) -> (&'a SinkSpan, Vec<&'a SinkSpan>) {
    let root = named(spans, "process sessions");
    assert_eq!((root.kind, root.region()), (SpanKind::Consumer, "us-east-1"));
    let below = children(spans, root);
    let names: Vec<_> = below.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(names, stages);
    assert_eq!(below[0].start_unix_nanos, root.start_unix_nanos);
    for (one, next) in below.iter().zip(&below[1..]) {
        follows(one, next);
    }
    assert_eq!(below[below.len() - 1].end_unix_nanos, root.end_unix_nanos);
    (root, below)
}

/// The agent's part below the span of a shipment.
fn agent_part<'a>(spans: &[&'a SinkSpan], ship: &SinkSpan, answer: &str) -> &'a SinkSpan {
    let [apply] = children(spans, ship)[..] else {
        panic!("not one span below {ship:#?}: {spans:#?}")
    };
    assert_eq!((apply.name.as_str(), apply.kind), ("apply sessions", SpanKind::Server));
    assert_eq!(apply.region(), "eu-west-1");
    assert_eq!(attribute(apply, "evrepl.answer"), answer);
    // One machine, one clock.
    assert!(apply.start_unix_nanos >= ship.start_unix_nanos && apply.end_unix_nanos <= ship.end_unix_nanos);
    apply
}

#[test]
fn a_write_by_hand_is_one_trace_from_the_command_to_the_peers_memcached() {
    let _gate = shared();
    let sink = OtlpSink::start();
    let pair = TwoRegionsSpec::new().one_way().telemetry(&sink.endpoint(), 0.0).start();
    let config = pair.us.config_path();
    let output = Command::new(evrepl())
        .args(["write", "set", "--trace", "--config"])
        .arg(&config)
        .args(["sessions", "user:17", "value"])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let trace = said.lines().find_map(|line| line.strip_prefix("trace ")).expect(&said);
    let spans = whole(&sink, trace, 1);
    let spans: Vec<_> = spans.iter().collect();

    let write = named(&spans, "set sessions");
    assert_eq!(
        (write.kind, write.parent_span_id.as_deref()),
        (SpanKind::Producer, None)
    );
    assert_eq!(attribute(write, "messaging.system"), "kafka");
    let (root, stages) = relay_part(&spans, &RELAY_STAGES);
    assert_eq!(root.parent_span_id.as_deref(), Some(write.span_id.as_str()));
    assert!(root.start_unix_nanos >= write.start_unix_nanos);
    assert_eq!(attribute(root, "evrepl.outcome"), "applied");
    assert_eq!(
        attribute(root, "messaging.destination.name"),
        pair.us.topics_to("eu-west-1")[0]
    );
    // `printf %s user:17 | md5sum`; the key itself is nobody's business.
    assert_eq!(attribute(root, "evrepl.key.hash"), "14e2e805152178ef");
    assert!(!root.attributes.contains_key("evrepl.key"), "{root:#?}");
    assert_eq!(attribute(stages[2], "db.system.name"), "memcached");
    let apply = agent_part(&spans, stages[4], "applied");
    let below = children(&spans, apply);
    let names: Vec<_> = below.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(names, ["agent queue", "set"]);
    follows(below[0], below[1]);
    assert_eq!(below[1].kind, SpanKind::Client);
    // Two processes of one kind, told apart.
    let instance = |span: &SinkSpan| span.resource["service.instance.id"].as_str().unwrap().to_owned();
    assert_ne!(instance(root), instance(apply));

    // The batch links to its member.
    let batch = sink.wait_for("the batch's span", LIMIT, |spans| {
        spans
            .iter()
            .find(|span| span.name == "ship batch to eu-west-1")
            .cloned()
    });
    let links: Vec<_> = batch
        .links
        .iter()
        .map(|link| (&*link.trace_id, &*link.span_id))
        .collect();
    assert_eq!(links, [(trace, stages[4].span_id.as_str())]);
}

#[test]
fn a_write_that_is_looked_at_again_and_one_that_is_superseded_say_so() {
    let _gate = shared();
    let sink = OtlpSink::start();
    let pair = TwoRegionsSpec::new().one_way().telemetry(&sink.endpoint(), 0.0).start();
    let writer = pair.us.writer("sessions");
    let there = pair.eu.cache("sessions").memcached(0);
    pair.us.cache("sessions").client().set(b"key", b"value", 0, 0).unwrap();

    there.freeze();
    writer.produce(
        b"key",
        Op::Set.event(Format::MessagePack),
        &[("traceparent", SAMPLED.as_bytes())],
    );
    writer.flush();
    pair.us
        .wait_until("its key waits for the frozen server", LIMIT, |status| {
            let waiting = status["flows"][0]["waiting_for"].as_array().unwrap();
            waiting
                .iter()
                .any(|wait| wait["server"].as_str().unwrap().ends_with("at eu-west-1"))
        });
    // Superseded, as a dirty key, by one that is not traced.
    let second = SAMPLED.replace("0af7", "0bf7");
    writer.produce(
        b"key",
        Op::Set.event(Format::MessagePack),
        &[("traceparent", second.as_bytes())],
    );
    writer.flush();
    let superseded = sink.wait_for("the superseded one ends", LIMIT, |spans| {
        let of = of(spans, trace_id(SAMPLED));
        of.iter()
            .find(|span| span.name == "process sessions")
            .map(|span| (*span).clone())
    });
    assert_eq!(attribute(&superseded, "evrepl.outcome"), "superseded");
    let notes = happened(&superseded);
    assert!(
        notes.starts_with(&["looked at again", "circuit breaker open"]),
        "{notes:?}"
    );
    assert_eq!(notes.last(), Some(&"superseded by a newer write"));
    there.thaw();
    settle(&pair.both());

    let spans = sink.wait_for("the other one ends", LIMIT, |spans| {
        let of = of(spans, trace_id(&second));
        let applied =
            |span: &&&SinkSpan| span.name == "apply sessions" && attribute(span, "evrepl.answer") == "applied";
        let there = of.iter().any(|span| span.name == "process sessions") && of.iter().any(|span| applied(&span));
        there.then(|| of.into_iter().cloned().collect::<Vec<_>>())
    });
    let spans: Vec<_> = spans.iter().collect();
    let root = named(&spans, "process sessions");
    assert_eq!(attribute(root, "evrepl.outcome"), "applied");
    let below = children(&spans, root);
    let names: Vec<_> = below.iter().map(|span| span.name.as_str()).collect();
    assert_eq!((names[0], names[1]), ("in kafka", "queue"));
    assert!(names.contains(&"wait"), "{names:?}");
    assert_eq!(names[names.len() - 3..], ["look", "coalesce", "ship to eu-west-1"]);
    for (one, next) in below.iter().zip(&below[1..]) {
        follows(one, next);
    }
    agent_part(&spans, below[below.len() - 1], "applied");
}

#[test]
fn the_writers_decision_counts_and_the_ratio_is_for_those_without_one() {
    let _gate = shared();
    let sink = OtlpSink::start();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .telemetry(&sink.endpoint(), 1.0)
        .extra("[telemetry]\ntrace_keys = true")
        .start();
    let mut writer = pair.us.writer("sessions");
    pair.us.cache("sessions").client().set(b"not", b"value", 0, 0).unwrap();
    writer.produce(
        b"not",
        Op::Set.event(Format::MessagePack),
        &[("traceparent", NOT_SAMPLED.as_bytes())],
    );
    let keys = numbered("drawn", 20);
    writer.set_all(keys.iter().map(|key| (key, "value")));
    settle(&pair.both());
    let traced = sink.wait_for("those that the ratio draws, which is all", LIMIT, |spans| {
        let mut keys: Vec<String> = spans
            .iter()
            .filter(|span| span.kind == SpanKind::Server)
            .map(|span| attribute(span, "evrepl.key").to_owned())
            .collect();
        keys.sort();
        (keys.len() >= 20).then_some(keys)
    });
    let mut expected = keys.clone();
    expected.sort();
    assert_eq!(traced, expected);
    assert!(of(&sink.spans(), trace_id(NOT_SAMPLED)).is_empty());
}

#[test]
fn what_is_slow_or_fails_is_traced_although_it_was_not_sampled_but_only_a_few_of_it() {
    let _gate = shared();
    let sink = OtlpSink::start();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .proxied()
        .telemetry(&sink.endpoint(), 0.0)
        .extra("[telemetry]\nslow_after = \"300ms\"\nslow_traces_per_second = 2")
        .start();
    let mut writer = pair.us.writer("sessions");
    writer.set(b"fast", b"value");
    settle(&pair.both());
    pair.us_to_eu().latency(Duration::from_millis(400));
    let keys = numbered("slow", 50);
    writer.set_all(keys.iter().map(|key| (key, "value")));
    settle(&pair.both());
    pair.us_to_eu().pass();
    writer.produce(b"poison", b"no event", &[]);
    writer.flush();

    let failed = sink.wait_for("the dead letter's trace", LIMIT, |spans| {
        let failed = |span: &&SinkSpan| attribute(span, "evrepl.outcome") == "dead_lettered";
        spans.iter().find(failed).cloned()
    });
    assert_eq!(attribute(&failed, "evrepl.trace.kept_for"), "failed");
    assert!(matches!(failed.status, SinkStatus::Error(_)), "{failed:#?}");
    let spans = sink.spans();
    let slow: Vec<_> = spans
        .iter()
        .filter(|span| attribute(span, "evrepl.trace.kept_for") == "slow")
        .collect();
    // All of them end within a second or two.
    assert!((1..=4).contains(&slow.len()), "{slow:#?}");
    let spans = of(&spans, &slow[0].trace_id);
    let (root, stages) = relay_part(&spans, &RELAY_STAGES);
    let longest = stages
        .iter()
        .max_by_key(|span| span.end_unix_nanos - span.start_unix_nanos)
        .unwrap();
    assert_eq!(longest.name, "ship to eu-west-1", "{stages:#?}");
    // The agent did not know: its part is as its ack reported it, in the middle of the way.
    let [apply] = children(&spans, stages[4])[..] else {
        panic!("{spans:#?}")
    };
    assert_eq!(apply.attributes["evrepl.trace.reported_by_peer"], true);
    assert_eq!(apply.kind, SpanKind::Server);
    let lag = root.attributes["evrepl.lag_seconds"].as_f64().unwrap();
    assert!(lag >= 0.3, "{lag}");
}

#[test]
fn a_collector_that_is_slow_refuses_or_is_gone_slows_nothing_and_what_is_lost_is_counted() {
    let _gate = shared();
    let sink = OtlpSink::start();
    let pair = TwoRegionsSpec::new().one_way().telemetry(&sink.endpoint(), 1.0).start();
    let mut writer = pair.us.writer("sessions");
    let keys = numbered("key", 20_000);
    let mut write = |round: &str| {
        writer.set_all(keys.iter().map(|key| (key, round)));
        settle(&pair.both());
    };
    // Each round makes 120 000 spans, more than wait for a collector.
    sink.slow(Duration::from_secs(60));
    write("slow");
    sink.vanish();
    write("gone");
    let dropped = |reason| {
        let labels = [("reason", reason)];
        pair.us
            .metric("evrepl_telemetry_spans_dropped_total", &labels)
            .unwrap_or(0.0)
    };
    assert!(dropped("queue_full") > 0.0);
    wait_until("what the collector did not take is counted", LIMIT, || {
        dropped("refused") > 0.0
    });
    sink.come_back();
    sink.take();
    let before = sink.spans().len();
    wait_until("spans arrive again", LIMIT, || {
        let mut writer = pair.us.writer("sessions");
        writer.set(b"again", b"value");
        sink.spans().len() > before
    });
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    accounted(&pair.both());
}
