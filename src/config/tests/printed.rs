//! What is written down: the examples, the schema, the configuration in force.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

/// The folder of the example files.
fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config")
}

fn example(name: &str) -> (String, Config) {
    let path = examples().join(name);
    let text = std::fs::read_to_string(&path).unwrap();
    let config = parse(&text, &path, std::iter::empty()).unwrap_or_else(|error| panic!("{error}"));
    (text, config)
}

/// The paths of all options in a schema, lists and tables as one (`cache.servers.weight`), with their descriptions.
fn options(schema: &serde_json::Value, path: &str, found: &mut BTreeMap<String, (String, Option<serde_json::Value>)>) {
    for (key, option) in schema["properties"].as_object().into_iter().flatten() {
        let path = section::join(path, key);
        let about = option["description"].as_str().unwrap_or_default().to_owned();
        found.insert(path.clone(), (about, option.get("default").cloned()));
        for inner in [option, &option["items"], &option["items"]["anyOf"][1]] {
            options(inner, &path, found);
        }
    }
}

fn every_option() -> BTreeMap<String, (String, Option<serde_json::Value>)> {
    let mut found = BTreeMap::new();
    options(&serde_json::from_str(&schema()).unwrap(), "", &mut found);
    assert!(found.len() > 60, "{}", found.len());
    found
}

#[test]
fn the_example_explains_every_option_and_shows_its_default() {
    let (text, config) = example("evrepl.toml");
    let mut section = String::new();
    let mut named = Vec::new();
    for line in text.lines() {
        let line = line.trim_start_matches("# ").trim();
        if line.starts_with('[') && line.ends_with(']') {
            section = line.trim_matches(['[', ']']).to_owned();
            named.push(section.clone());
        } else if let Some((key, value)) = line.split_once(" = ") {
            named.push(section::join(&section, key));
            let inline = ["address", "ring_name", "weight"].into_iter();
            let inline = inline.filter(|inner| value.contains(&format!("{inner} = ")));
            named.extend(inline.map(|inner| section::join(&section, &format!("{key}.{inner}"))));
        }
    }
    for option in every_option().keys() {
        assert!(named.contains(option), "{option} is not in evrepl.toml");
    }
    let defaults = read(LEAST);
    assert_eq!(config.agent, defaults.agent);
    assert_eq!(config.admin, defaults.admin);
    assert_eq!(config.telemetry, defaults.telemetry);
    assert_eq!(config.flow, defaults.flow);
    assert_eq!(config.batch, defaults.batch);
    assert_eq!(config.link, defaults.link);
    assert_eq!(config.mailbox, defaults.mailbox);
    assert_eq!(config.supervision, defaults.supervision);
    assert_eq!(config.drain, defaults.drain);
    assert_eq!(config.memcached, defaults.memcached);
    assert_eq!(config.misses, defaults.misses);
    assert_eq!(config.canary, defaults.canary);
    assert_eq!(config.kafka, defaults.kafka);
    let [cache, default] = [&config.caches[0], &defaults.caches[0]];
    assert_eq!(
        (cache.hash, cache.on_set, cache.max_value_bytes),
        (default.hash, default.on_set, default.max_value_bytes)
    );
}

#[test]
fn the_documentation_of_an_option_names_its_default() {
    for (option, (about, default)) in every_option() {
        assert!(!about.is_empty(), "{option} has no documentation");
        if let Some(default) = default {
            assert!(
                about.contains(&format!("Default: `{default}`")),
                "{option} has {default} but says {about:?}"
            );
        }
    }
}

#[test]
fn the_pair_of_example_regions_fits_together() {
    let (us, eu) = (example("us-east-1.toml").1, example("eu-west-1.toml").1);
    for (one, other, memcached, agent, admin) in [
        (&us, &eu, "127.0.0.1:11211", "127.0.0.1:7101", "127.0.0.1:7100"),
        (&eu, &us, "127.0.0.1:11212", "127.0.0.1:7201", "127.0.0.1:7200"),
    ] {
        assert_eq!((one.agent.listen.as_str(), one.admin.listen.as_str()), (agent, admin));
        let cache = one.cache("sessions").unwrap();
        assert_eq!(cache.servers[0].address, memcached);
        assert_eq!(cache.topic, format!("{}.sessions", one.region));
        let peer = one.peer(&other.region).unwrap();
        assert_eq!(peer.address.as_ref(), Some(&other.agent.listen));
        assert_eq!(one.tls.ca, examples().join("certs/ca.pem"));
        assert_eq!(
            one.tls.certificate,
            examples().join(format!("certs/{}.pem", one.region))
        );
        assert_eq!(
            one.tls.private_key,
            examples().join(format!("certs/{}.key", one.region))
        );
    }
}

#[test]
fn the_examples_print_as_files_that_read_back_equal() {
    for name in ["evrepl.toml", "us-east-1.toml", "eu-west-1.toml"] {
        let config = example(name).1;
        let printed = config.to_toml();
        let again = parse(&printed, Path::new("elsewhere.toml"), std::iter::empty());
        assert_eq!(again.unwrap_or_else(|error| panic!("{error}\n{printed}")), config);
    }
}

#[test]
fn a_relative_file_reads_back_equal_too() {
    let config = parse_on(Some("h"), LEAST, Path::new("config/x.toml"), std::iter::empty()).unwrap();
    let again = parse_on(
        Some("h"),
        &config.to_toml(),
        Path::new("config/x.toml"),
        std::iter::empty(),
    )
    .unwrap();
    assert_eq!(again, config);
    assert!(config.tls.certificate.is_absolute());
}

prop_compose! {
    fn any_time()(nanos in prop_oneof![Just(1_000_000u64), 1_000_000..100_000_000_000u64, (1..1000u64).prop_map(|s| s * 1_000_000_000)]) -> Duration {
        Duration::from_nanos(nanos)
    }
}

prop_compose! {
    fn any_config()(
        word in "\\PC{0,12}", ring in proptest::option::of("[ -~\u{7f}é\"\\\\\t\n]{1,12}"), weight in 1..u32::MAX,
        sizes in proptest::collection::vec(1usize..1 << 40, 3), times in proptest::collection::vec(any_time(), 4),
        ratio in 0.0..=1.0f64, counts in proptest::collection::vec(4..u32::MAX as usize, 4),
        words in (0..2usize, 0..2usize, 0..2usize), address in proptest::option::of("[a-z]{1,8}:[1-9][0-9]{0,3}"),
    ) -> Config {
        let mut config = read(&with("[[peer]]\nregion = \"eu-west-1\""));
        config.kafka.properties.insert("ssl.key.password".to_owned(), word);
        config.caches[0].servers[0].ring_name = ring;
        config.caches[0].servers[0].weight = weight;
        config.caches[0].hash = [HashKind::Ketama, HashKind::Consistent][words.0];
        config.caches[0].on_set = [OnSet::Replicate, OnSet::Invalidate][words.1];
        config.telemetry.log_format = [LogFormat::Text, LogFormat::Json][words.2];
        config.caches[0].max_value_bytes = sizes.iter().copied().min().unwrap();
        config.flow.max_in_flight_bytes = sizes[0];
        config.agent.session_window = sizes[1].min(sizes[2]);
        config.agent.max_in_flight_bytes = sizes[1].max(sizes[2]);
        config.batch.max_bytes = sizes[0];
        config.batch.linger = times[0];
        config.supervision.within = times[1];
        config.drain.grace_period = times[2];
        config.memcached.timeout = times[3];
        config.telemetry.trace_ratio = ratio;
        config.flow.max_in_flight_events = counts[0];
        config.flow.max_dirty_keys = counts[1];
        config.batch.max_items = counts[2].min(65_536);
        config.mailbox.remote_link = counts[3];
        config.peers[0].address = address;
        config
    }
}

proptest! {
    #[test]
    fn whatever_is_configured_prints_as_a_file_that_reads_back_equal(config in any_config()) {
        let printed = config.to_toml();
        match read_with(&printed, &[]) {
            Ok(again) => prop_assert_eq!(again, config),
            Err(error) => prop_assert!(false, "{}\n{}", error, printed),
        }
    }
}
