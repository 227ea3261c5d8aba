//! Applications find replicated keys with the client they have: pylibmc, which is libmemcached, writes three servers in one
//! region and reads three others in the next.

use std::fs;

use evrepl::outcome::Outcome;
use evrepl_lab::{CacheSpec, Op, Region, Sampler, TwoRegions, TwoRegionsSpec, Writer, accounted, settle, shared};
use serde_json::{Value, json};

use crate::other_programs_write_events::python;

const US: &str = "us-east-1";
const EU: &str = "eu-west-1";

/// How many keys a test writes: each of three servers gets hundreds.
const KEYS: usize = 1_200;

/// `servers`, `behaviors`, and what to do: `set` a mapping, `delete` keys, `get` keys. Says what it found.
const CLIENT: &str = r#"
import json, pylibmc, sys

given = json.load(sys.stdin)
client = pylibmc.Client(given["servers"], binary=False, behaviors=given["behaviors"])
failed = [key for key, value in given.get("set", {}).items() if not client.set(key, value)]
failed += [key for key in given.get("delete", []) if not client.delete(key)]
json.dump({"failed": failed, "found": client.get_multi(given.get("get", []))}, sys.stdout)
"#;

/// A client of servers by the names it knows them by, `host:port` or `host:port:weight`.
struct Pylibmc {
    servers: Vec<String>,
    behaviors: Value,
}

impl Pylibmc {
    fn new(servers: &[String], behavior: &str) -> Pylibmc {
        Pylibmc {
            servers: servers.to_vec(),
            behaviors: json!({ behavior: true }),
        }
    }

    fn call(&self, what: Value) -> Value {
        let mut given = json!({ "servers": self.servers, "behaviors": self.behaviors });
        given.as_object_mut().unwrap().extend(what.as_object().unwrap().clone());
        let mut said = python(CLIENT, &given);
        assert_eq!(said["failed"], json!([]));
        said["found"].take()
    }

    fn set(&self, values: &Value) {
        self.call(json!({ "set": values }));
    }

    fn delete(&self, keys: &[String]) {
        self.call(json!({ "delete": keys }));
    }

    fn get(&self, keys: &[String]) -> Value {
        self.call(json!({ "get": keys }))
    }

    /// Those of `keys` that are on the server at `index`, whatever the ring says.
    fn on_server(&self, index: usize, keys: &[String]) -> Vec<String> {
        let found = Pylibmc::new(&self.servers[index..=index], "ketama").get(keys);
        let found = found.as_object().unwrap();
        keys.iter().filter(|key| found.contains_key(*key)).cloned().collect()
    }
}

fn keys(region: &str) -> Vec<String> {
    (0..KEYS).map(|n| format!("{region}:user/{n}")).collect()
}

/// Values of the types that pylibmc tells apart by flags.
fn values(keys: &[String], generation: &str) -> Value {
    let value = |(n, key): (usize, &String)| match n % 3 {
        0 => json!(format!("{generation} of {key}")),
        1 => json!(n * 7),
        _ => json!({ "of": [key, null, generation] }),
    };
    keys.iter()
        .enumerate()
        .map(|pair| (pair.1.clone(), value(pair)))
        .collect()
}

fn say(writer: &Writer, op: Op, keys: &[String]) {
    keys.iter().for_each(|key| writer.say(op, key.as_bytes()));
    writer.flush();
}

fn addresses(region: &Region) -> Vec<String> {
    let servers = &region.cache("sessions").servers;
    servers.iter().map(|server| server.address.clone()).collect()
}

/// Writes with a pylibmc client in each region, in both at once, and finds all of it with the other region's; then deletes.
/// Returns the keys that `us` wrote and that are still there.
fn written_here_and_found_there(pair: &TwoRegions, us: &Pylibmc, eu: &Pylibmc) -> Vec<String> {
    let (of_us, of_eu) = (keys(US), keys(EU));
    let (values_us, values_eu) = (values(&of_us, "first"), values(&of_eu, "first"));
    let (writer_us, writer_eu) = (pair.us.writer("sessions"), pair.eu.writer("sessions"));
    us.set(&values_us);
    eu.set(&values_eu);
    say(&writer_us, Op::Set, &of_us);
    say(&writer_eu, Op::Set, &of_eu);
    settle(&pair.both());
    for client in [us, eu] {
        assert_eq!(client.get(&of_us), values_us);
        assert_eq!(client.get(&of_eu), values_eu);
    }
    let (gone, stay) = of_us.split_at(KEYS / 4);
    us.delete(gone);
    say(&writer_us, Op::Delete, gone);
    settle(&pair.both());
    assert_eq!(eu.get(gone), json!({}));
    // Where another ring would have looked, there may be copies of keys that this one doesn't find.
    for index in 0..3 {
        assert_eq!(eu.on_server(index, gone), Vec::<String>::new());
    }
    assert_eq!(eu.get(stay).as_object().unwrap().len(), stay.len());
    let flow = pair.us.flow(EU);
    assert_eq!(flow.outcome(Outcome::Applied), KEYS as u64);
    assert_eq!(flow.outcome(Outcome::Deleted), gone.len() as u64);
    assert_eq!(pair.eu.flow(US).outcome(Outcome::Applied), KEYS as u64);
    accounted(&pair.both());
    stay.to_vec()
}

/// Each of three servers holds some, and together they hold all.
#[track_caller]
fn spread(client: &Pylibmc, keys: &[String]) -> Vec<Vec<String>> {
    let shares: Vec<Vec<String>> = (0..3).map(|index| client.on_server(index, keys)).collect();
    let counts: Vec<usize> = shares.iter().map(Vec::len).collect();
    assert!(counts.iter().all(|&count| count > keys.len() / 20), "{counts:?}");
    assert_eq!(
        counts.iter().sum::<usize>(),
        keys.len(),
        "no key on two servers: {counts:?}"
    );
    shares
}

#[test]
fn keys_on_three_servers_are_found_by_pylibmc_in_the_other_region_which_places_them_differently() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .cache(CacheSpec::new("sessions").servers(3))
        .start();
    let sampler = Sampler::start(&pair.both());
    let [us, eu] = pair
        .both()
        .map(|region| Pylibmc::new(&addresses(region), "ketama_weighted"));
    let keys = written_here_and_found_there(&pair, &us, &eu);
    assert_ne!(spread(&us, &keys), spread(&eu, &keys));
    sampler.finish();
}

#[test]
fn keys_on_the_consistent_ring_are_found_by_pylibmc_in_the_other_region() {
    let _gate = shared();
    let spec = CacheSpec::new("sessions").servers(3).option("hash", "\"consistent\"");
    let pair = TwoRegionsSpec::new().cache(spec).start();
    let sampler = Sampler::start(&pair.both());
    let [us, eu] = pair.both().map(|region| Pylibmc::new(&addresses(region), "ketama"));
    let keys = written_here_and_found_there(&pair, &us, &eu);
    assert_ne!(spread(&us, &keys), spread(&eu, &keys));
    // The other ring of the same servers is no help: it finds what it places alike by chance, a third or so.
    let weighted = Pylibmc::new(&us.servers, "ketama_weighted").get(&keys);
    assert!(weighted.as_object().unwrap().len() < keys.len() * 2 / 3);
    sampler.finish();
}

/// Replaces the servers of a region's only cache by what `entry` makes of each address. The region must not run yet.
fn configure_servers(region: &Region, entry: impl Fn(usize, &str) -> String) {
    let path = region.config_path();
    let text = fs::read_to_string(&path).unwrap();
    let addresses = addresses(region);
    let quoted: Vec<String> = addresses.iter().map(|address| format!("{address:?}")).collect();
    let list = format!("servers = [{}]", quoted.join(", "));
    assert!(text.contains(&list), "{text}");
    let entries: Vec<String> = addresses
        .iter()
        .enumerate()
        .map(|(n, address)| entry(n, address))
        .collect();
    fs::write(
        path,
        text.replace(&list, &format!("servers = [{}]", entries.join(", "))),
    )
    .unwrap();
}

#[test]
fn servers_with_ring_names_place_keys_as_the_clients_that_know_them_by_those_names() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .cache(CacheSpec::new("sessions").servers(3))
        .one_way()
        .build();
    // The applications of `us` say localhost, which no address says; `eu` has other ports and is told the same names, so
    // that its servers correspond to those of `us` one by one. The first has twice the share.
    let names: Vec<String> = addresses(&pair.us)
        .iter()
        .map(|address| address.replace("127.0.0.1", "localhost"))
        .collect();
    let weights = [2, 1, 1];
    for region in pair.both() {
        configure_servers(region, |n, address| {
            format!(
                "{{ address = {address:?}, ring_name = {:?}, weight = {} }}",
                names[n], weights[n]
            )
        });
    }
    pair.eu.start();
    pair.us.start();
    let sampler = Sampler::start(&pair.both());
    let weighted: Vec<String> = names
        .iter()
        .zip(weights)
        .map(|(name, weight)| format!("{name}:{weight}"))
        .collect();
    let us = Pylibmc::new(&weighted, "ketama_weighted");
    let keys = keys(US);
    let written = values(&keys, "first");
    us.set(&written);
    let writer = pair.us.writer("sessions");
    say(&writer, Op::Set, &keys);
    settle(&pair.both());
    assert_eq!(
        pair.us.flow(EU).outcome(Outcome::Applied),
        KEYS as u64,
        "every look went to the right server"
    );
    let eu = Pylibmc::new(&addresses(&pair.eu), "ketama_weighted");
    let shares = spread(&us, &keys);
    assert_eq!(shares, spread(&eu, &keys));
    assert!(
        shares[0].len() > KEYS * 2 / 5,
        "half of the keys, more or less: {}",
        shares[0].len()
    );
    // Values too: each server of `eu` asked for what its counterpart holds.
    for (index, share) in shares.iter().enumerate() {
        let found = Pylibmc::new(&eu.servers[index..=index], "ketama").get(share);
        assert_eq!(found.as_object().unwrap().len(), share.len());
        assert!(share.iter().all(|key| found[key] == written[key]));
    }
    let gone = &keys[..KEYS / 4];
    us.delete(gone);
    say(&writer, Op::Delete, gone);
    settle(&pair.both());
    for index in 0..3 {
        assert_eq!(eu.on_server(index, gone), Vec::<String>::new());
    }
    accounted(&pair.both());
    sampler.finish();
}
