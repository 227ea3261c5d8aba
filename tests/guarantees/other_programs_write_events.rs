//! Anyone may write events with any Kafka client: here a Python program with confluent-kafka does, as JSON and as MessagePack,
//! with fields that evrepl does not know, compressed or not; and a flow begins where `start_at` says.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use evrepl::outcome::Outcome;
use evrepl_lab::place::{target, unique};
use evrepl_lab::{
    CacheSpec, Certs, PeerSpec, Region, RegionBuilder, Sampler, TwoRegions, TwoRegionsSpec, accounted, assert_same,
    broker, settle, shared, wait_until,
};
use serde_json::{Value, json};

const EU: &str = "eu-west-1";

/// Runs a Python program of the tests' environment: it finds `given` as JSON in its stdin and says JSON.
///
/// # Panics
/// When the environment is missing, or the program fails.
pub(crate) fn python(program: &str, given: &Value) -> Value {
    let python = target().join("venv/bin/python");
    let child = Command::new(&python)
        .args(["-c", program])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.unwrap_or_else(|error| panic!("cannot run {} (`make python`?): {error}", python.display()));
    // Read to its end before the program says anything, so that neither end waits for the other; dropped: the end.
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(given.to_string().as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "the python program failed: {said}\n{errors}");
    serde_json::from_str(&said).unwrap_or_else(|error| panic!("python said no JSON ({error}): {said}\n{errors}"))
}

/// Writes memcached and then the event, as an application in Python would. `writes`: key, value (`null`: nothing is written),
/// event as an object, format.
const WRITER: &str = r#"
import json, msgpack, sys
from confluent_kafka import Producer
from pymemcache.client.base import Client

given = json.load(sys.stdin)
host, port = given["memcached"].split(":")
cache = Client((host, int(port)), allow_unicode_keys=True)
producer = Producer({"bootstrap.servers": given["kafka"], "acks": "all", "compression.type": given["compression"]})
failed = []

def delivered(error, _):
    if error is not None:
        failed.append(str(error))

for key, value, event, form in given["writes"]:
    if value is not None:
        cache.set(key, value.encode(), noreply=False)
    elif event["op"] == "delete":
        cache.delete(key, noreply=False)
    if form == "msgpack":
        body = msgpack.packb(event)
    elif form == "msgpack wide":
        # Old raw strings and the widest integers: what another language's encoder may choose.
        body = b"\xdf" + len(event).to_bytes(4, "big")
        for name, what in event.items():
            body += b"\xdb" + len(name).to_bytes(4, "big") + name.encode()
            if isinstance(what, bool) or not isinstance(what, int):
                body += msgpack.packb(what)
            else:
                body += b"\xcf" + what.to_bytes(8, "big")
    elif form == "pretty json":
        body = json.dumps(event, indent=2).encode()
    else:
        body = json.dumps(event).encode()
    producer.produce(given["topic"], key=key.encode(), value=body, on_delivery=delivered)
left = producer.flush(30)
json.dump({"failed": failed, "left": left}, sys.stdout)
"#;

/// Has a Python program write `cache` of `region`.
fn write_in_python(region: &Region, cache: &str, compression: &str, writes: &[Value]) {
    let cache = region.cache(cache);
    let said = python(
        WRITER,
        &json!({
            "memcached": cache.memcached(0).address(),
            "kafka": region.kafka().address(),
            "topic": cache.topic,
            "compression": compression,
            "writes": writes,
        }),
    );
    assert_eq!(said, json!({ "failed": [], "left": 0 }));
}

#[test]
fn events_that_a_python_program_writes_as_json_and_messagepack_are_replicated() {
    let _gate = shared();
    // Compressed by the program, and by the broker once more in the second topic.
    let packed = unique("packed");
    broker().create_topic(&packed, 4, &[("compression.type", "zstd")]);
    let pair = TwoRegionsSpec::new()
        .us(move |us| {
            us.cache(CacheSpec::new("sessions"))
                .cache(CacheSpec::new("packed").topic(&packed))
        })
        .eu(|eu| eu.cache(CacheSpec::new("sessions")).cache(CacheSpec::new("packed")))
        .start();
    let sampler = Sampler::start(&pair.both());
    let mut keys = Vec::new();
    let mut writes = Vec::new();
    let formats = ["json", "pretty json", "msgpack", "msgpack wide"];
    // Everything that may be said about a write, by name; what stands in for a field that is unknown today is of any type.
    let now_ver = (1_900_000_000_000u64) << 16 | 7;
    let events = [
        ("shortest", json!({ "v": 1, "op": "set" })),
        ("ver", json!({ "v": 1, "op": "set", "ver": now_ver })),
        ("origin", json!({ "v": 1, "op": "set", "origin": "us-east-1" })),
        (
            "third",
            json!({ "v": 1, "op": "set", "origin": "ap-south-1", "fill": true }),
        ),
        (
            "last",
            json!({ "ttl": 2_592_001u32, "fill": false, "op": "set", "v": 1 }),
        ),
        (
            "null",
            json!({ "v": 1, "op": "set", "ttl": null, "ver": null, "origin": null, "fill": null }),
        ),
        (
            "unknown",
            json!({ "schema": { "of": ["us", 1, 2.5, true, null] }, "v": 1, "note": "\u{1f511} \"{", "op": "set", "V": 9 }),
        ),
        ("touch", json!({ "v": 1, "op": "touch", "ttl": 60 })),
    ];
    for form in formats {
        for (name, event) in &events {
            let key = format!("{form}:{name}").replace(' ', "_");
            writes.push(json!([key, format!("value of {key}"), event, form]));
            keys.push(key);
        }
        let key = format!("{form}:deleted").replace(' ', "_");
        writes.push(json!([key, "soon gone", { "v": 1, "op": "set" }, form]));
        writes.push(json!([key, null, { "v": 1, "op": "delete" }, form]));
        keys.push(key);
    }
    for form in ["json", "pretty json"] {
        // It does not fit the numbers of JavaScript, so that JSON may spell it as a string.
        let key = format!("{form}:ver as text").replace(' ', "_");
        let event = json!({ "v": 1, "op": "set", "ver": now_ver.to_string() });
        writes.push(json!([key, "value", event, form]));
        keys.push(key);
    }
    for form in formats {
        let key = format!("{form}:echo").replace(' ', "_");
        writes.push(json!([key, "of us", { "v": 1, "op": "set", "origin": EU }, form]));
    }
    write_in_python(&pair.us, "sessions", "none", &writes);
    write_in_python(&pair.us, "packed", "zstd", &writes);
    settle(&pair.both());
    for cache in ["sessions", "packed"] {
        assert_same(&pair.both(), cache, &keys);
        let mut there = pair.eu.cache(cache).client();
        for key in &keys {
            let copy = there.get(key.as_bytes()).unwrap();
            assert_eq!(copy.is_none(), key.ends_with(":deleted"), "{cache}: {key}");
        }
        for form in formats {
            let key = format!("{form}:echo").replace(' ', "_");
            assert_eq!(there.get(key.as_bytes()).unwrap(), None, "{cache}: {key}");
        }
    }
    let flow = pair.us.flow(EU);
    assert_eq!(flow.consumed, 2 * writes.len() as u64);
    assert_eq!(flow.outcome(Outcome::Filtered), 2 * formats.len() as u64);
    assert_eq!(flow.outcome(Outcome::DeadLettered), 0);
    accounted(&pair.both());
    sampler.finish();
}

/// A pair with two partitions, `us` not started and beginning where `start_at` says; five old events in each partition.
fn pair_with_a_past(start_at: &'static str) -> (TwoRegions, Vec<String>) {
    let pair = TwoRegionsSpec::new()
        .cache(CacheSpec::new("sessions").partitions(2))
        .one_way()
        .us(move |us| us.set("kafka.start_at", &format!("{start_at:?}")))
        .build();
    pair.eu.start();
    let past: Vec<String> = (0..10).map(|n| format!("past:{n}")).collect();
    for (n, key) in past.iter().enumerate() {
        write_into(&pair.us, n as i32 % 2, key);
    }
    (pair, past)
}

/// Writes memcached, then the event into this partition.
fn write_into(region: &Region, partition: i32, key: &str) {
    let cache = region.cache("sessions");
    cache.client().set(key.as_bytes(), key.as_bytes(), 0, 0).unwrap();
    region.kafka().produce(
        &cache.topic,
        Some(partition),
        key.as_bytes(),
        br#"{"v":1,"op":"set"}"#,
        &[],
    );
}

fn committed(region: &Region) -> Vec<Option<i64>> {
    let found = region
        .kafka()
        .committed(&region.group(EU), &region.cache("sessions").topic);
    found.into_iter().map(|(_, offset)| offset).collect()
}

#[test]
fn a_flow_that_starts_at_the_earliest_event_brings_what_was_there_before_it() {
    let _gate = shared();
    let (pair, past) = pair_with_a_past("earliest");
    pair.us.start();
    let sampler = Sampler::start(&pair.both());
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &past);
    assert_eq!(pair.us.flow(EU).outcome(Outcome::Applied), 10);
    accounted(&pair.both());
    sampler.finish();
}

#[test]
fn a_flow_that_starts_at_the_latest_event_skips_its_past_but_no_partition_added_later_and_nothing_while_it_was_down() {
    let _gate = shared();
    let (pair, past) = pair_with_a_past("latest");
    let topic = pair.us.cache("sessions").topic.clone();
    let mut there = pair.eu.cache("sessions").client();
    pair.us.start();
    let sampler = Sampler::start(&pair.both());
    // At once, not with the first event: else a flow that dies before it would skip more the next time.
    wait_until("its first positions are committed", Duration::from_secs(20), || {
        committed(&pair.us) == [Some(5), Some(5)]
    });
    let mut keys = vec!["since:0".to_string(), "since:1".into()];
    write_into(&pair.us, 0, &keys[0]);
    write_into(&pair.us, 1, &keys[1]);
    // Into the new partition before the relay can know of it.
    pair.us.kafka().add_partitions(&topic, 3);
    for n in 0..3 {
        let key = format!("added:{n}");
        write_into(&pair.us, 2, &key);
        keys.push(key);
    }
    wait_until("all of it has arrived", Duration::from_secs(30), || {
        there.get_many(&keys).unwrap().iter().all(Option::is_some)
    });
    settle(&pair.both());
    wait_until("all of it is committed", Duration::from_secs(10), || {
        committed(&pair.us) == [Some(6), Some(6), Some(3)]
    });
    let flow = pair.us.flow(EU);
    assert_eq!((flow.consumed, flow.outcome(Outcome::Applied)), (5, 5));

    // Killed, so that nothing is committed on the way out; one more partition appears, and events in all four.
    pair.us.kill();
    pair.us.kafka().add_partitions(&topic, 4);
    for partition in 0..4 {
        let key = format!("while down:{partition}");
        write_into(&pair.us, partition, &key);
        keys.push(key);
    }
    pair.us.start();
    wait_until(
        "what was written meanwhile has arrived",
        Duration::from_secs(30),
        || there.get_many(&keys).unwrap().iter().all(Option::is_some),
    );
    settle(&pair.both());
    wait_until("all of it is committed", Duration::from_secs(10), || {
        committed(&pair.us) == [Some(7), Some(7), Some(4), Some(1)]
    });
    assert_same(&pair.both(), "sessions", &keys);
    assert_eq!(there.get_many(&past).unwrap(), vec![None; past.len()]);
    let flow = pair.us.flow(EU);
    assert_eq!((flow.consumed, flow.outcome(Outcome::Applied)), (4, 4));
    sampler.finish();
}

#[test]
fn a_cache_that_is_new_in_the_configuration_is_served_after_a_restart() {
    let _gate = shared();
    let names = ["sessions", "profiles"];
    let both = |builder: RegionBuilder| {
        names
            .into_iter()
            .fold(builder, |builder, name| builder.cache(CacheSpec::new(name)))
    };
    let certs = Arc::new(Certs::issue(&["us-east-1", EU]));
    let eu = both(
        RegionBuilder::new(EU)
            .certs(&certs)
            .peer(PeerSpec::receive_only("us-east-1")),
    )
    .start();
    let group_prefix = unique("lab");
    let us = |topic: &str| {
        RegionBuilder::new("us-east-1")
            .certs(&certs)
            .peer(PeerSpec::at(EU, &eu.agent_address()))
            .group_prefix(&group_prefix)
            .cache(CacheSpec::new("sessions").topic(topic))
    };
    let topic = unique("sessions");
    broker().create_topic(&topic, 2, &[]);
    let before = us(&topic).start();
    before.writer("sessions").set_all([("key", "before")]);
    settle(&[&before, &eu]);
    before.terminate();
    // The same process to Kafka, and back before its session is over: it gets its old partitions without a rebalance.
    let after = us(&topic).cache(CacheSpec::new("profiles")).start();
    let sampler = Sampler::start(&[&after]);
    after.writer("sessions").set_all([("key", "after")]);
    after
        .writer("profiles")
        .set_all((0..100).map(|n| (format!("key:{n}"), "profile")));
    let mut there = eu.cache("profiles").client();
    let keys: Vec<String> = (0..100).map(|n| format!("key:{n}")).collect();
    wait_until("the new cache arrives", Duration::from_secs(30), || {
        there.get_many(&keys).unwrap().iter().all(Option::is_some)
    });
    settle(&[&after, &eu]);
    assert_same(&[&after, &eu], "profiles", &keys);
    assert_same(&[&after, &eu], "sessions", &["key"]);
    sampler.finish();
}

#[test]
fn the_programs_of_the_page_about_events_are_right_as_they_stand_there() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().start();
    let cache = pair.us.cache("sessions");
    let programs = target().join("clients");
    let (java, kafka) = (programs.join("java"), target().join("kafka/libs"));
    let classes = format!(
        "{}:{}/*:{}/*",
        programs.join("events/java").display(),
        java.display(),
        kafka.display()
    );
    let path = |name: &str| programs.join(name).display().to_string();
    let commands = [
        ("shell", vec!["bash".to_owned(), path("events/write.sh")]),
        (
            "python",
            vec![
                target().join("venv/bin/python").display().to_string(),
                path("events/write.py"),
            ],
        ),
        (
            "java",
            vec!["java".to_owned(), "-cp".to_owned(), classes, "WriteEvent".to_owned()],
        ),
        ("go", vec![path("events/write-go")]),
    ];
    let mut keys = Vec::new();
    for (language, command) in commands {
        let key = format!("written-in:{language}");
        let output = Command::new(&command[0])
            .args(&command[1..])
            .args([
                &cache.memcached(0).address(),
                pair.us.kafka().address(),
                &cache.topic,
                &key,
                "hello w\u{f6}rld",
            ])
            .output()
            .unwrap_or_else(|error| panic!("{language} (`make client-programs python`?): {error}"));
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{language}: {errors}");
        keys.push(key);
    }
    let consumed = keys.len() as u64;
    wait_until("they are there", Duration::from_secs(60), || {
        pair.us.flow(EU).consumed == consumed
    });
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    for key in &keys {
        let found = pair.eu.cache("sessions").client().get(key.as_bytes()).unwrap();
        assert!(found.is_some(), "{key} is not there");
    }
}
