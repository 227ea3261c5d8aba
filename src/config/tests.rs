//! The guarantees of the whole: what is read, what is refused, what is written back.

use std::time::Duration;

use super::*;

mod from_environment;
mod front_doors;
mod printed;

const FILE: &str = "/etc/evrepl/evrepl.toml";

/// The least that is a configuration. What a test adds comes behind it.
const LEAST: &str = r#"region = "us-east-1"
kafka = { brokers = ["127.0.0.1:9092"] }
tls = { certificate = "a.pem", private_key = "a.key", ca = "/ca.pem" }
cache = [{ name = "sessions", topic = "evrepl.sessions", servers = ["127.0.0.1:11211"] }]
"#;

fn read_with(text: &str, env: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let env = env.iter().map(|(name, value)| (name.to_string(), value.to_string()));
    parse_on(Some("relay-1"), text, Path::new(FILE), env)
}

fn read(text: &str) -> Config {
    read_with(text, &[]).unwrap_or_else(|error| panic!("{error}"))
}

/// The least with more lines at its end, which may replace whole sections.
fn with(more: &str) -> String {
    format!("{LEAST}{more}\n")
}

/// The problems, one a line, without the name of the file.
fn problems_with(text: &str, env: &[(&str, &str)]) -> Vec<String> {
    let error = read_with(text, env).expect_err("nothing was wrong");
    error
        .to_string()
        .lines()
        .map(|line| line.trim_start_matches(&format!("{FILE}:")).to_owned())
        .collect()
}

fn problems(text: &str) -> Vec<String> {
    problems_with(text, &[])
}

/// That exactly one problem is reported for the least with `more`, and that it says all of `parts`.
#[track_caller]
fn refused(more: &str, parts: &[&str]) {
    refused_text(&with(more), parts);
}

#[track_caller]
fn refused_text(text: &str, parts: &[&str]) {
    let problems = problems(text);
    assert_eq!(problems.len(), 1, "{problems:#?}");
    for part in parts {
        assert!(problems[0].contains(part), "{part:?} is not in {:?}", problems[0]);
    }
}

#[test]
fn what_may_be_left_out_has_its_default() {
    let config = read(&with("[[peer]]\nregion = \"eu-west-1\""));
    assert_eq!(config.node, "relay-1-7101");
    let peer = &config.peers[0];
    assert_eq!((peer.identity.as_str(), &peer.address), ("eu-west-1", &None));
    assert_eq!(peer.caches, ["sessions"]);
    let cache = &config.caches[0];
    assert_eq!(
        (cache.hash, cache.on_set, cache.max_value_bytes),
        (HashKind::Ketama, OnSet::Replicate, 1 << 20)
    );
    assert_eq!(
        cache.servers[0],
        Server {
            address: "127.0.0.1:11211".to_owned(),
            ring_name: None,
            weight: 1
        }
    );
    assert_eq!(config.kafka.session_timeout, Duration::from_secs(6));
    assert_eq!(config.flow, Flow::default());
    assert_eq!((config.flow.lanes, config.flow.max_in_flight_events), (1, 65536));
    assert_eq!(
        (config.batch.max_bytes, config.batch.linger),
        (256 << 10, Duration::from_millis(2))
    );
    assert_eq!(
        (config.batch.compression, config.batch.min_saving),
        (Compression::Lz4, 0.2)
    );
    assert_eq!(config.admin.listen, "127.0.0.1:7100");
    assert_eq!(
        config.telemetry,
        Telemetry {
            otlp_endpoint: None,
            trace_ratio: 0.001,
            trace_keys: false,
            slow_after: Duration::from_secs(1),
            slow_traces_per_second: 10,
            log_format: LogFormat::Text
        }
    );
}

#[test]
fn paths_are_relative_to_the_file() {
    let config = read(
        &with(
            r#"[kafka.properties]
ssl.ca.location = "ca.pem"
"ssl.key.location" = "/keys/kafka.key"
https.ca.location = "probe"
"#,
        )
        .replace(
            "kafka = { brokers = [\"127.0.0.1:9092\"] }\n",
            "kafka.brokers = [\"a:1\"]\n",
        ),
    );
    assert_eq!(config.tls.certificate, Path::new("/etc/evrepl/a.pem"));
    assert_eq!(config.tls.ca, Path::new("/ca.pem"));
    assert_eq!(config.kafka.properties["ssl.ca.location"], "/etc/evrepl/ca.pem");
    assert_eq!(config.kafka.properties["ssl.key.location"], "/keys/kafka.key");
    assert_eq!(config.kafka.properties["https.ca.location"], "probe");
}

#[test]
fn every_problem_of_a_file_is_reported_at_once_with_its_place_and_what_to_write_instead() {
    let text = r#"region = "US East"
[kafka]
brokers = ["127.0.0.1"]
[[cache]]
name = "sessions"
topic = "evrepl sessions"
servers = ["127.0.0.1:11211", { address = "127.0.0.1:11211", weight = 0 }]
hash = "ketma"
[[peer]]
region = "eu-west-1"
caches = ["session"]
[batch]
lingr = "2ms"
max_bytes = "256 kilos"
linger = 2
[flow]
lanes = two
max_in_flight_events = 3
[mailbox]
cache_reader = 0
[nonsense]
x = 1
"#;
    let expected = [
        "1:1: `tls` is missing; write one `[tls]` with `certificate`, `private_key`, `ca`",
        "1:10: `region` is \"US East\"; write a DNS label: lower-case letters, digits and `-`, like `\"us-east-1\"`",
        "3:12: `kafka.brokers[0]` is \"127.0.0.1\"; write a host and a port, like `\"10.0.0.5:11211\"` or `\"[::1]:11211\"`",
        "6:9: `cache[0].topic` is \"evrepl sessions\"; write a name that Kafka accepts: letters, digits, `.`, `_` and `-`, \
         at most 249, like `\"evrepl.sessions\"`",
        "7:71: `cache[0].servers[1].weight` is 0; write a whole number of at least 1",
        "8:8: `cache[0].hash` is \"ketma\"; did you mean `ketama`? write `\"ketama\"` or `\"consistent\"`",
        "11:11: `peer[0].caches[0]` is \"session\", which is no cache here; did you mean `sessions`?",
        "13:1: `batch.lingr` is not an option; did you mean `linger`?",
        "14:13: `batch.max_bytes` is \"256 kilos\"; write a size of at least one byte, like `\"256KiB\"`",
        "15:10: `batch.linger` is 2; write a time with its unit, like `\"2ms\"` or `\"1m 30s\"`, from 0s to 30days",
        "17:9: `lanes` is two, which is not a TOML value; write a whole number from 1 to 1024",
        "18:24: `flow.max_in_flight_events` is 3; write a whole number of at least 4",
        "20:16: `mailbox.cache_reader` is 0; write a whole number of at least 1",
    ];
    let problems = problems(text);
    assert_eq!(problems[..expected.len()], expected);
    assert!(problems[expected.len()].starts_with("21:2: `nonsense` is not an option; write one of `region`, `node`,"));
    assert_eq!(problems.len(), expected.len() + 1);
}

#[test]
fn an_empty_file_is_told_everything_it_needs() {
    assert_eq!(
        problems(""),
        [
            "1:1: `cache` is missing; write a `[[cache]]` for each, with `name`, `topic`, `servers`",
            "1:1: `kafka` is missing; write one `[kafka]` with `brokers`",
            "1:1: `region` is missing; write a DNS label: lower-case letters, digits and `-`, like `\"us-east-1\"`",
            "1:1: `tls` is missing; write one `[tls]` with `certificate`, `private_key`, `ca`",
        ]
    );
}

#[test]
fn a_value_of_the_wrong_kind_is_told_the_right_one() {
    refused("[[batch]]", &["5:1: `batch` is a list; write one `[batch]`"]);
    refused(
        "peer = { region = \"eu\" }",
        &["`peer` is a table; write a `[[peer]]` for each, with `region`"],
    );
    refused("node = 7", &["5:8: `node` is 7; write a name that Kafka accepts"]);
    refused(
        "[telemetry]\ntrace_ratio = 1.5",
        &["6:15: `telemetry.trace_ratio` is 1.5; write a number from 0 to 1"],
    );
    refused("[telemetry]\ntrace_ratio = nan", &["trace_ratio"]);
    refused(
        "[telemetry]\notlp_endpoint = \"127.0.0.1:4317\"",
        &["write the URL of an OTLP/gRPC receiver without a path, like `\"http://127.0.0.1:4317\"`"],
    );
    refused(
        "[link]\nping_interval = \"0s\"",
        &["is \"0s\"; write a time", "from 1ms to 30days"],
    );
    refused("[flow]\nlanes = 100000", &["write a whole number from 1 to 1024"]);
    refused("[batch]\nmax_bytes = \"0B\"", &["write a size of at least one byte"]);
    refused("[batch]\nmax_bytes = \"999999EiB\"", &["write a size"]);
    refused("[agent]\nlisten = \"7101\"", &["write a host and a port"]);
    refused("[batch]\ncompression = \"zstd\"", &["write `\"none\"` or `\"lz4\"`"]);
}

#[test]
fn names_that_must_differ_do() {
    let cache = |name: &str, topic: &str, server: &str| {
        with("").replace(
            "}]\n",
            &format!("}}, {{ name = {name:?}, topic = {topic:?}, servers = [\"127.0.0.1:1\", {server}] }}]\n"),
        )
    };
    assert!(read_with(&cache("b", "b", "\"127.0.0.1:2\""), &[]).is_ok());
    refused_text(
        &cache("sessions", "b", "\"127.0.0.1:2\""),
        &["`cache[1].name` is \"sessions\" as `cache[0].name` is"],
    );
    refused_text(
        &cache("b", "evrepl.sessions", "\"127.0.0.1:2\""),
        &["`cache[1].topic` is", "a topic of its own"],
    );
    refused_text(
        &cache("b", "b", "\"127.0.0.1:11211\""),
        &[
            "4:144: `cache[1].servers[1]` is \"127.0.0.1:11211\" as `cache[0].servers[0]` is; a server belongs to one cache",
        ],
    );
    refused_text(
        &cache("b", "b", "{ address = \"127.0.0.1:1\" }"),
        &["a server belongs to one cache, once"],
    );
    let two = |first: &str, second: &str| format!("[[peer]]\nregion = \"eu\"\n{first}\n[[peer]]\n{second}");
    refused(
        &two("", "region = \"eu\"\nidentity = \"x\""),
        &["9:10: `peer[1].region` is \"eu\" as `peer[0].region` is"],
    );
    refused(
        &two("identity = \"ap\"", "region = \"ap\""),
        &["`peer[1].identity` is \"ap\" as `peer[0].identity` is"],
    );
}

#[test]
fn a_peer_is_another_region_with_caches_of_this_one() {
    refused(
        "[[peer]]\nregion = \"us-east-1\"",
        &["6:10: `peer[0].region` is this region itself"],
    );
    refused(
        "[[peer]]\nregion = \"eu\"\ncaches = []",
        &["names no cache; name one, or leave it out for every cache"],
    );
    refused(
        "[[peer]]\nregion = \"eu\"\ncaches = [\"users\"]",
        &["7:11:", "\"users\", which is no cache here; write one of `sessions`"],
    );
    refused(
        "[[peer]]\nregion = \"EU\"",
        &["`peer[0].region` is \"EU\"; write a DNS label"],
    );
    refused(
        "[[peer]]\nregion = \"eu\"\naddress = \"10.0.0.1:0\"",
        &["`peer[0].address` is \"10.0.0.1:0\"; write a host and a port"],
    );
}

#[test]
fn what_must_not_be_empty_is_not() {
    refused_text(
        &LEAST.replace("[\"127.0.0.1:9092\"]", "[]"),
        &["2:", "`kafka.brokers` names no broker"],
    );
    refused_text(
        &LEAST.replace("[\"127.0.0.1:11211\"]", "[]"),
        &["4:", "`cache[0].servers` names no server"],
    );
    let (head, _) = LEAST.split_once("cache = ").unwrap();
    refused_text(
        &format!("{head}cache = []\n"),
        &["4:9: there is no cache; write at least one `[[cache]]`"],
    );
}

#[test]
fn a_property_that_evrepl_owns_is_refused_with_the_reason() {
    for (property, advice) in [
        ("group.id", "set `kafka.group_prefix`"),
        ("group.instance.id", "set `node`"),
        ("bootstrap.servers", "set `kafka.brokers`"),
        ("enable.auto.commit", "leave it out"),
        ("enable.auto.offset.store", "leave it out"),
        ("auto.offset.reset", "set `kafka.start_at`"),
        ("partition.assignment.strategy", "leave it out"),
        ("client.id", "set `node`"),
        ("session.timeout.ms", "set `kafka.session_timeout`"),
        ("message.timeout.ms", "set `front_door.event_timeout`"),
        ("delivery.timeout.ms", "set `front_door.event_timeout`"),
        ("queue.buffering.max.messages", "set `front_door.max_queued_events`"),
    ] {
        let text = LEAST.replace("9092\"]", &format!("9092\"], properties = {{ {property:?} = \"x\" }}"));
        refused_text(
            &text,
            &["2:", &format!("the property `{property}` is evrepl's own: "), advice],
        );
    }
    let properties = "9092\"], properties = { \"fetch.wait.max.ms\" = 5, \"log.connection.close\" = false }";
    let config = read(&LEAST.replace("9092\"]", properties));
    assert_eq!(config.kafka.properties["fetch.wait.max.ms"], "5");
    assert_eq!(config.kafka.properties["log.connection.close"], "false");
}

#[test]
fn topics_made_from_templates_are_topics_that_nothing_else_uses() {
    let kafka = |more: &str| LEAST.replace("9092\"]", &format!("9092\"], {more}"));
    refused_text(
        &kafka("retry_topic = \"{topic}.retry\""),
        &["with `{topic}` and `{peer}` in it"],
    );
    refused_text(&kafka("dead_letter_topic = \"dead\""), &["with `{topic}` in it"]);
    refused_text(
        &kafka("dead_letter_topic = \"{topic}.{region}\""),
        &["nothing else in braces"],
    );
    refused_text(
        &kafka("dead_letter_topic = \"{topic}\""),
        &["makes \"evrepl.sessions\"", "which is `cache[0].topic` too"],
    );
    let long = "x".repeat(240);
    refused_text(
        &LEAST.replace("\"evrepl.sessions\"", &format!("{long:?}")),
        &["longer than 249; write shorter names"],
    );
    let mut clash = kafka("dead_letter_topic = \"{topic}.x.eu\", retry_topic = \"{topic}.x.{peer}\"");
    clash.push_str("[[peer]]\nregion = \"eu\"\n");
    refused_text(
        &clash,
        &[
            "`kafka.retry_topic` makes \"evrepl.sessions.x.eu\"",
            "`kafka.dead_letter_topic` too",
        ],
    );
}

#[test]
fn canaries_are_off_or_no_faster_than_anybody_looks() {
    refused(
        "[canary]\ninterval = \"99ms\"",
        &["6:12: `canary.interval` is 99ms; write at least 100ms, or \"0s\" for no canaries"],
    );
    for interval in ["0s", "100ms", "1s"] {
        read(&with(&format!("[canary]\ninterval = {interval:?}")));
    }
}

#[test]
fn times_that_depend_on_each_other_fit() {
    refused(
        "[agent]\nidle_timeout = \"6s\"",
        &["6:16: `agent.idle_timeout` is 6s; write less than `kafka.session_timeout`, which is 6s"],
    );
    refused(
        "[link]\nidle_timeout = \"7s\"",
        &["`link.idle_timeout` is 7s; write less than `kafka.session_timeout`"],
    );
    refused(
        "[link]\nbackoff_max = \"10ms\"",
        &["`link.backoff_initial` is 50ms; write at most `link.backoff_max`"],
    );
    refused(
        "[memcached]\nbackoff_initial = \"6s\"",
        &["6:19: `memcached.backoff_initial` is 6s"],
    );
    refused(
        "[link]\nidle_timeout = \"1s\"",
        &["`link.ping_interval` is 1s; write less than `link.idle_timeout`"],
    );
    // The defaults were right; the one that was written is where to look.
    let short = LEAST.replace("9092\"]", "9092\"], session_timeout = \"5s\"");
    let problems = problems(&short);
    assert_eq!(problems.len(), 2, "{problems:#?}");
    assert!(
        problems.iter().all(|problem| problem.starts_with("2:")),
        "{problems:#?}"
    );
    // A time that cannot be read is no reason to judge another by its default.
    refused("[agent]\nidle_timeout = \"soon\"", &["write a time"]);
}

#[test]
fn a_value_fits_in_where_it_must_go_through() {
    refused(
        "[flow]\nmax_in_flight_bytes = \"64KiB\"",
        &["6:23: `flow.max_in_flight_bytes` is 65536 B, less than one value"],
    );
    refused(
        "[agent]\nsession_window = \"64KiB\"",
        &["`agent.session_window` is 65536 B, less than one value"],
    );
    refused(
        "[agent]\nsession_window = \"1GiB\"",
        &["more than `agent.max_in_flight_bytes`"],
    );
    refused(
        "[admin]\nlisten = \"127.0.0.1:7101\"",
        &["the same; write another port"],
    );
    read(&with(
        "[admin]\nlisten = \"127.0.0.1:0\"\n[agent]\nlisten = \"127.0.0.1:0\"",
    ));
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let error = load(Path::new("/nowhere/evrepl.toml"), std::iter::empty()).unwrap_err();
    assert!(
        error.to_string().starts_with("/nowhere/evrepl.toml: cannot be read: "),
        "{error}"
    );
}

#[test]
fn without_a_host_name_the_node_must_be_written() {
    let error = parse_on(None, LEAST, Path::new(FILE), std::iter::empty()).unwrap_err();
    assert!(error.to_string().contains("1:1: `node` is missing"), "{error}");
    assert!(
        parse_on(
            None,
            &format!("node = \"relay-9\"\n{LEAST}"),
            Path::new(FILE),
            std::iter::empty()
        )
        .is_ok()
    );
}

#[test]
fn groups_and_topics_are_named_as_configured() {
    let kafka = read(LEAST).kafka;
    assert_eq!(kafka.group_for("us-east-1", "eu-west-1"), "evrepl.us-east-1.eu-west-1");
    assert_eq!(
        kafka.retry_topic_for("sessions", "eu-west-1"),
        "sessions.retry.eu-west-1"
    );
    assert_eq!(kafka.dead_letter_topic_for("sessions"), "sessions.dead-letter");
}

#[test]
fn a_password_is_printed_only_by_who_asks_for_everything() {
    let config = read(&LEAST.replace("9092\"]", "9092\"], properties = { \"sasl.password\" = \"hunter2\" }"));
    assert!(!format!("{config:?}").contains("hunter2"));
    assert!(!config.without_secrets().to_toml().contains("hunter2"));
    assert!(config.to_toml().contains("hunter2"));
}
