//! A ring that is not the clients' makes every other key look missing. It is said, loudly, and `evrepl check` finds it.

use std::process::Command;
use std::time::Duration;

use evrepl::outcome::Outcome;
use evrepl_lab::*;

/// Generous: a machine that others load takes three times as long, and who waits in vain has failed anyway.
const LIMIT: Duration = Duration::from_secs(180);
const EU: &str = "eu-west-1";

/// The lines of `evrepl check --connect` about this.
fn found(region: &Region, what: &str) -> Vec<String> {
    let mut command = Command::new(evrepl());
    command
        .arg("check")
        .arg("--connect")
        .arg("--config")
        .arg(region.config_path());
    let output = command.output().expect("evrepl can be started");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let found: Vec<String> = text
        .lines()
        .filter(|line| line.contains(what))
        .map(str::to_owned)
        .collect();
    let failed = found.iter().any(|line| line.starts_with("failed"));
    assert!(!failed || output.status.code() == Some(78), "{text}");
    found
}

fn rings(region: &Region) -> Vec<String> {
    found(region, "ring sessions")
}

#[test]
fn a_ring_that_is_not_the_clients_is_noticed_by_its_misses_and_by_check() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .cache(CacheSpec::new("sessions").servers(3).option("hash", "\"consistent\""))
        .build();
    for region in pair.both() {
        region.start();
    }
    assert_eq!(
        rings(&pair.us),
        Vec::<String>::new(),
        "servers without keys say nothing"
    );
    let keys: Vec<String> = (0..2_000).map(|n| format!("key:{n}")).collect();
    let mut writer = pair.us.writer("sessions");
    // Its clients use the other ring, so two of three looks are at a server that does not have the key.
    writer.set_all(keys.iter().map(|key| (key, "value")));
    pair.us.wait_until("the misses are noticed", LIMIT, |status| {
        let servers = status["flows"][0]["mass_misses"].as_array().unwrap();
        servers.len() == 3
            && servers
                .iter()
                .all(|one| one["missing"].as_u64() > one["looks"].as_u64().map(|n| n / 2))
    });
    settle(&pair.both());
    assert!(pair.us.flow(EU).outcome(Outcome::Missing) > 1_000);
    let one = pair.us.flow(EU).json["mass_misses"][0].clone();
    assert!(
        one["likely_causes"].as_str().unwrap().contains("wrong `hash`"),
        "{one:#}"
    );
    assert_eq!(
        pair.us.metric("evrepl_mass_misses", &[("cache", "sessions")]),
        Some(3.0)
    );
    let said = pair
        .us
        .log()
        .matches("many keys that were set are missing in memcached")
        .count();
    assert_eq!(said, 3, "once for each server, however many reads there were");

    let found = rings(&pair.us);
    assert_eq!(found.len(), 3, "{found:#?}");
    for line in &found {
        assert!(
            line.starts_with("failed") && line.contains("of 200 sampled keys belong here by the ring: "),
            "{line}"
        );
    }
    // The ring that the clients use.
    let config = std::fs::read_to_string(pair.us.config_path()).unwrap();
    std::fs::write(pair.us.config_path(), config.replace("\"consistent\"", "\"ketama\"")).unwrap();
    let found = rings(&pair.us);
    assert_eq!(found.len(), 3, "{found:#?}");
    for line in &found {
        assert!(
            line.starts_with("ok") && line.contains("200 of 200 sampled keys belong here"),
            "{line}"
        );
    }
    // Right again, it works, and the warning goes.
    pair.us.kill();
    pair.us.spawn();
    writer.set_all(keys.iter().map(|key| (key, "second")));
    pair.us.wait_until("nothing is wrong any more", LIMIT, |status| {
        let flow = &status["flows"][0];
        flow["mass_misses"].as_array().is_some_and(Vec::is_empty) && flow["outcomes"]["applied"].as_u64() >= Some(1_000)
    });
}

#[test]
fn a_topic_that_two_regions_read_as_their_own_is_found_by_check() {
    let _gate = shared();
    let (topic, group) = (unique("lab.of-two"), unique("lab"));
    broker().client().create_topic(&topic, 4, &[]);
    let pair = TwoRegionsSpec::new()
        .cache(CacheSpec::new("sessions").topic(&topic))
        .us({
            let group = group.clone();
            move |us| us.group_prefix(&group)
        })
        .eu(move |eu| eu.group_prefix(&group))
        .start();
    wait_until("check finds it", LIMIT, || {
        let found = found(&pair.us, &format!("topic {topic} "));
        found
            .iter()
            .any(|line| line.starts_with("failed") && line.contains("eu-west-1 reads it too"))
    });
}
