//! The environment over the file.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

#[test]
fn any_setting_comes_from_the_environment() {
    let file = with("[[peer]]\nregion = \"eu\"\naddress = \"a:1\"\n[batch]\nlinger = \"9ms\"");
    let env = [
        ("EVREPL__BATCH__LINGER", "5ms"),
        ("EVREPL__FLOW__LANES", "3"),
        ("EVREPL__TELEMETRY__TRACE_RATIO", "0.5"),
        ("EVREPL__TELEMETRY__OTLP_ENDPOINT", ""),
        ("EVREPL__PEER__0__ADDRESS", "b:2"),
        ("EVREPL__PEER__1__REGION", "ap"),
        ("EVREPL__KAFKA__BROKERS", "a:1, b:2"),
        ("EVREPL__KAFKA__PROPERTIES__SASL_PASSWORD", "a=b#c"),
        ("EVREPL__CACHE__0__SERVERS__0", "c:3"),
        ("EVREPL__CACHE__0__SERVERS__1__ADDRESS", "d:4"),
        ("EVREPL__CACHE__0__SERVERS__1__WEIGHT", "2"),
        ("EVREPL__MAILBOX", "{ cache_reader = 9 }"),
        ("EVREPL__CACHE__0__HASH", "consistent"),
        ("EVREPL_CONFIG", "elsewhere"),
        ("PATH", "/bin"),
    ];
    let config = read_with(&file, &env).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(config.batch.linger, Duration::from_millis(5));
    assert_eq!((config.flow.lanes, config.telemetry.trace_ratio), (3, 0.5));
    assert_eq!(config.peers[0].address.as_deref(), Some("b:2"));
    assert_eq!(config.peers[1].region, "ap");
    assert_eq!(config.kafka.brokers, ["a:1", "b:2"]);
    assert_eq!(config.kafka.properties["sasl.password"], "a=b#c");
    assert_eq!(config.caches[0].servers[0].address, "c:3");
    assert_eq!(
        config.caches[0].servers[1],
        Server {
            address: "d:4".to_owned(),
            ring_name: None,
            weight: 2
        }
    );
    assert_eq!(config.mailbox.cache_reader, 9);
    assert_eq!(config.caches[0].hash, HashKind::Consistent);
}

#[test]
fn the_whole_configuration_may_come_from_the_environment() {
    let env = [
        ("EVREPL__REGION", "us-east-1"),
        ("EVREPL__KAFKA__BROKERS__0", "127.0.0.1:9092"),
        ("EVREPL__TLS__CERTIFICATE", "a.pem"),
        ("EVREPL__TLS__PRIVATE_KEY", "a.key"),
        ("EVREPL__TLS__CA", "/ca.pem"),
        ("EVREPL__CACHE__0__NAME", "sessions"),
        ("EVREPL__CACHE__0__TOPIC", "evrepl.sessions"),
        ("EVREPL__CACHE__0__SERVERS", "[\"127.0.0.1:11211\"]"),
    ];
    assert_eq!(
        read_with("", &env).unwrap_or_else(|error| panic!("{error}")),
        read(LEAST)
    );
}

#[test]
fn what_is_wrong_with_a_variable_is_said_with_its_name() {
    let env = [
        ("EVREPL__BATCH__LINGER", "5x"),
        ("EVREPL__BATCH__LINGRE", "5ms"),
        ("EVREPL__BTCH__LINGER", "5ms"),
        ("EVREPL__CACHE__0__SERVERS__0__WEIGHT", "2"),
        ("EVREPL__CACHE__1__NAME", "users"),
        ("EVREPL__CACHE__7__NAME", "x"),
        ("EVREPL__CACHE__NAME", "x"),
        ("EVREPL__FLOW", "{ lanes ="),
        ("EVREPL__FLOW__LANES", "3"),
        ("EVREPL__KAFKA__PROPERTIES__GROUP_ID", "x"),
        ("EVREPL__LINK__", "x"),
        ("EVREPL__MAILBOX__CACHE_READER", ""),
        ("EVREPL__mailbox__cache_reader", "1"),
    ];
    let expected = [
        "EVREPL__BATCH__LINGER: `batch.linger` is \"5x\"; write a time with its unit",
        "EVREPL__BATCH__LINGRE: `batch.lingre` is not an option; did you mean `linger`?",
        "EVREPL__BTCH__LINGER: `btch` is not an option; did you mean `batch`?",
        "EVREPL__CACHE__0__SERVERS__0__WEIGHT: sets a part of a value that has none (\"127.0.0.1:11211\"); set it as a whole",
        "EVREPL__CACHE__1__NAME: `cache[1].servers` is missing; write a list in brackets, each element a host and a port",
        "EVREPL__CACHE__1__NAME: `cache[1].topic` is missing; write a name that Kafka accepts",
        "EVREPL__CACHE__7__NAME: sets element 7 of a list of 2; write 2 to add one",
        "EVREPL__CACHE__NAME: names `name` in a list; name an element of it first",
        "EVREPL__FLOW: `flow` is \"{ lanes =\", which is not TOML (",
        "EVREPL__FLOW__LANES: sets a part of what EVREPL__FLOW sets as a whole; keep one of the two",
        "EVREPL__KAFKA__PROPERTIES__GROUP_ID: the property `group.id` is evrepl's own",
        "EVREPL__LINK__: names no option; write `EVREPL__SECTION__OPTION`",
        "EVREPL__MAILBOX__CACHE_READER: `mailbox.cache_reader` is \"\"; write a whole number",
        "EVREPL__mailbox__cache_reader: sets the same as EVREPL__MAILBOX__CACHE_READER",
    ];
    let problems = problems_with(LEAST, &env);
    for (problem, expected) in problems.iter().zip(expected) {
        assert!(problem.starts_with(expected), "{problem:?} is not {expected:?}");
    }
    assert_eq!(problems.len(), expected.len(), "{problems:#?}");
}

proptest! {
    #[test]
    fn whatever_the_environment_holds_reading_it_ends_without_a_panic(
        name in "EVREPL__(CACHE|PEER|KAFKA|BATCH|X)(__(0|1|SERVERS|BROKERS|PROPERTIES|LINGER|A_B|)){0,3}",
        value in "[\\[\\]{}\"=,a-c0-9. \n]{0,12}",
    ) {
        let before = read(LEAST);
        if let Ok(config) = read_with(LEAST, &[(&name, &value)]) {
            prop_assert_eq!(config.region, before.region);
        }
    }
}
