//! A write arrives at the peer as it left: value, flags, expiry and key, byte for byte; what the peer cannot or must not hold
//! is removed there, and nothing comes back.

use std::time::Duration;

use evrepl::outcome::Outcome;
use evrepl_lab::{
    CacheSpec, Format, Op, Region, Sampler, TwoRegionsSpec, accounted, assert_same, settle, shared, two_regions,
    wait_until,
};

const US: &str = "us-east-1";
const EU: &str = "eu-west-1";

/// Two machines, two clocks that tick once a second, and the time a busy machine takes: how much shorter a copy may live.
const TTL_SLACK: i64 = 5;

/// Above this memcached takes an expiry as a Unix time.
const THIRTY_DAYS: u32 = 2_592_000;

fn unix_now() -> u32 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.unwrap().as_secs() as u32
}

/// Records that were ever written to a cache's topic of this region.
fn events_of(region: &Region, cache: &str) -> i64 {
    let ends = region.kafka().end_offsets(&region.cache(cache).topic);
    ends.iter().map(|(_, end)| end).sum()
}

/// Bytes that no encoding would let pass by chance and no compressor makes small.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

/// Keys of every kind that memcached takes, none of them another region's.
fn keys_of(region: &str) -> Vec<Vec<u8>> {
    let tag = region.as_bytes()[0];
    let every_byte = (0..=255u8).map(|byte| vec![tag, byte]);
    let kinds = [
        [&[tag][..], &noise(185, 7)].concat(),
        [&[tag][..], b"\r\nmn\r\n"].concat(),
        [&[tag][..], b" two words "].concat(),
        [&[tag][..], "schl\u{fc}ssel:\u{1f511}".as_bytes()].concat(),
        vec![tag; 250],
        vec![tag],
    ];
    every_byte.chain(kinds).collect()
}

#[test]
fn every_key_value_and_flag_arrives_unchanged_in_both_directions_at_once_and_nothing_comes_back() {
    let _gate = shared();
    let pair = two_regions();
    let sampler = Sampler::start(&pair.both());
    let mut all_keys = Vec::new();
    let mut written = [0, 0];
    let mut writers = [
        pair.us.writer("sessions"),
        pair.eu.writer("sessions").format(Format::Json),
    ];
    for (region, (writer, written)) in [US, EU].iter().zip(writers.iter_mut().zip(&mut written)) {
        let keys = keys_of(region);
        let name = |suffix: &str| format!("{region}:{suffix}").into_bytes();
        for (n, key) in keys.iter().enumerate() {
            let flags = [0, 1, 0x8000_0000, u32::MAX][n % 4];
            writer.set_with(key, &noise(n % 300, n as u64), flags, 0);
        }
        writer.set(&name("empty"), b"");
        writer.set(&name("large"), &noise(1_000_000, 11));
        writer.set(&name("large and soft"), &vec![b'a'; 1_000_000]);
        writer.set(&name("protocol"), b"\r\nEN\r\nms x 1\r\n1\r\n");
        writer.set(&name("replaced"), b"first");
        writer.set(&name("replaced"), b"second");
        writer.set(&name("deleted"), b"soon gone");
        writer.delete(&name("deleted"));
        writer.set(&name("back again"), b"old");
        writer.delete(&name("back again"));
        writer.set(&name("back again"), b"new");
        *written = keys.len() as i64 + 11;
        all_keys.extend(keys);
        all_keys.extend(
            [
                "empty",
                "large",
                "large and soft",
                "protocol",
                "replaced",
                "deleted",
                "back again",
            ]
            .map(name),
        );
    }
    writers.iter().for_each(|writer| writer.flush());
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &all_keys);
    // A comparison of two empty caches would say the same.
    for (region, other) in [(US, &pair.eu), (EU, &pair.us)] {
        let mut client = other.cache("sessions").client();
        let mut get = |suffix: &str| client.get(format!("{region}:{suffix}").as_bytes()).unwrap();
        assert_eq!(get("empty"), Some((vec![], 0)));
        assert_eq!(get("large"), Some((noise(1_000_000, 11), 0)));
        assert_eq!(get("replaced"), Some((b"second".to_vec(), 0)));
        assert_eq!(get("back again"), Some((b"new".to_vec(), 0)));
        assert_eq!(get("deleted"), None);
        let keys = keys_of(region);
        let found = client.get_many(&keys).unwrap();
        assert!(found.iter().all(Option::is_some));
        assert_eq!(found[3].as_ref().unwrap().1, u32::MAX);
    }

    // Deletes of what the peer holds by now.
    let gone: Vec<Vec<u8>> = [US, EU]
        .iter()
        .map(|region| format!("{region}:replaced").into_bytes())
        .collect();
    for (writer, key) in writers.iter_mut().zip(&gone) {
        writer.delete(key);
        writer.flush();
    }
    settle(&pair.both());
    for region in pair.both() {
        assert_eq!(region.cache("sessions").client().get_many(&gone).unwrap(), [None, None]);
    }
    accounted(&pair.both());
    sampler.finish();
    // What the agents wrote produced no event: each topic holds its own region's, and no flow saw any other.
    for (region, peer, written) in [(&pair.us, EU, written[0] + 1), (&pair.eu, US, written[1] + 1)] {
        assert_eq!(events_of(region, "sessions"), written, "{}", region.name());
        assert_eq!(region.flow(peer).consumed, written as u64);
        assert_eq!(region.flow(peer).outcome(Outcome::Filtered), 0);
    }
}

#[test]
fn an_event_that_came_from_the_peer_is_not_sent_back_to_it() {
    let _gate = shared();
    let pair = two_regions();
    let sampler = Sampler::start(&pair.both());
    let mut writer = pair.us.writer("sessions");
    let mut there = pair.eu.cache("sessions").client();
    for key in [&b"from the peer"[..], b"from here", b"from a third"] {
        writer.client().set(key, b"of us", 0, 0).unwrap();
        there.set(key, b"of eu", 0, 0).unwrap();
    }
    writer.produce(b"from the peer", br#"{"v":1,"op":"set","origin":"eu-west-1"}"#, &[]);
    writer.produce(b"from here", br#"{"v":1,"op":"set","origin":"us-east-1"}"#, &[]);
    writer.produce(b"from a third", br#"{"v":1,"op":"set","origin":"ap-south-1"}"#, &[]);
    writer.flush();
    settle(&pair.both());
    let value = |found: Option<(Vec<u8>, u32)>| found.map(|(value, _)| String::from_utf8(value).unwrap());
    assert_eq!(value(there.get(b"from the peer").unwrap()).as_deref(), Some("of eu"));
    assert_eq!(value(there.get(b"from here").unwrap()).as_deref(), Some("of us"));
    assert_eq!(value(there.get(b"from a third").unwrap()).as_deref(), Some("of us"));
    let flow = pair.us.flow(EU);
    assert_eq!(
        (flow.outcome(Outcome::Filtered), flow.outcome(Outcome::Applied)),
        (1, 2)
    );
    assert_eq!(
        (events_of(&pair.us, "sessions"), events_of(&pair.eu, "sessions")),
        (3, 0)
    );
    accounted(&pair.both());
    sampler.finish();
}

#[test]
fn a_copy_has_the_life_of_its_source_and_no_more() {
    let _gate = shared();
    let pair = two_regions();
    let sampler = Sampler::start(&pair.both());
    let mut writer = pair.us.writer("sessions");
    let lives: [(&[u8], u32); 7] = [
        (b"for ever", 0),
        (b"a minute", 60),
        (b"an hour", 3_600),
        (b"thirty days", THIRTY_DAYS),
        (b"a little more", unix_now() + THIRTY_DAYS + 60),
        (b"sixty days", unix_now() + 60 * 86_400),
        (b"a year", unix_now() + 365 * 86_400),
    ];
    for (key, exptime) in lives {
        writer.set_with(key, key, 3, exptime);
    }
    // Long enough to arrive, short enough to be seen ending.
    writer.set_with(b"short", b"short", 0, 6);
    writer.set_with(b"touched to a minute", b"1", 0, 0);
    writer.set_with(b"touched to sixty days", b"2", 0, 30);
    writer.set_with(b"touched to stay", b"3", 0, 30);
    writer.flush();
    let mut there = pair.eu.cache("sessions").client();
    wait_until("the short one has arrived", Duration::from_secs(6), || {
        there.get(b"short").unwrap().is_some()
    });
    let lives_there = there.ttl(b"short").unwrap().unwrap_or(0);
    assert!((0..=6).contains(&lives_there), "{lives_there} s");
    settle(&pair.both());
    writer.touch(b"touched to a minute", 60);
    writer.touch(b"touched to sixty days", unix_now() + 60 * 86_400);
    writer.touch(b"touched to stay", 0);
    writer.flush();
    settle(&pair.both());

    let mut keys: Vec<&[u8]> = lives.iter().map(|(key, _)| *key).collect();
    keys.extend([
        &b"touched to a minute"[..],
        b"touched to sixty days",
        b"touched to stay",
    ]);
    assert_same(&pair.both(), "sessions", &keys);
    for key in &keys {
        let copy = there.ttl(key).unwrap().expect("there is a copy");
        let source = writer.client().ttl(key).unwrap().expect("there is a source");
        let name = key.escape_ascii();
        match source {
            -1 => assert_eq!(copy, -1, "{name}"),
            // One second: the two memcacheds' clocks tick at different moments.
            _ => assert!(
                (source - TTL_SLACK..=source + 1).contains(&copy),
                "{name}: {source} s here, {copy} s there"
            ),
        }
    }
    assert_eq!(there.ttl(b"touched to stay").unwrap(), Some(-1));
    assert!(there.ttl(b"touched to sixty days").unwrap().unwrap() > 59 * 86_400);

    wait_until("the source of the short one ends", Duration::from_secs(8), || {
        writer.client().get(b"short").unwrap().is_none()
    });
    wait_until("so does its copy", Duration::from_secs(2), || {
        there.get(b"short").unwrap().is_none()
    });
    let flow = pair.us.flow(EU);
    assert_eq!(flow.outcome(Outcome::Applied), flow.consumed);
    accounted(&pair.both());
    sampler.finish();
}

#[test]
fn a_touch_never_stands_in_for_the_value_it_belongs_to() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().build();
    pair.eu.start();
    let mut writer = pair.us.writer("sessions");
    let mut there = pair.eu.cache("sessions").client();
    // Before the relay runs, so that set and touch lie in one chunk.
    there.set(b"set, then touched", b"old", 1, 0).unwrap();
    writer.set_with(b"set, then touched", b"new", 2, 30);
    writer.touch(b"set, then touched", 900);
    there.set(b"deleted, then touched", b"old", 1, 0).unwrap();
    writer.set(b"deleted, then touched", b"new");
    writer.delete(b"deleted, then touched");
    writer.touch(b"deleted, then touched", 900);
    // The peer never heard of this one.
    writer.client().set(b"only touched", b"value", 5, 0).unwrap();
    writer.touch(b"only touched", 700);
    writer.touch(b"only touched", 900);
    // The peer holds another value, which a touch must leave alone.
    there.set(b"other value", b"of eu", 1, 0).unwrap();
    writer.client().set(b"other value", b"of us", 2, 0).unwrap();
    writer.touch(b"other value", 900);
    writer.flush();
    pair.us.start();
    let sampler = Sampler::start(&pair.both());
    settle(&pair.both());
    assert_eq!(there.get(b"set, then touched").unwrap(), Some((b"new".to_vec(), 2)));
    assert_eq!(there.get(b"only touched").unwrap(), Some((b"value".to_vec(), 5)));
    assert_eq!(there.get(b"other value").unwrap(), Some((b"of eu".to_vec(), 1)));
    assert_eq!(there.get(b"deleted, then touched").unwrap(), None);
    for key in [&b"set, then touched"[..], b"only touched", b"other value"] {
        let copy = there.ttl(key).unwrap().unwrap();
        let source = writer.client().ttl(key).unwrap().unwrap();
        assert!(
            (source - TTL_SLACK..=source + 1).contains(&copy),
            "{}: {source} s, {copy} s",
            key.escape_ascii()
        );
    }
    let flow = pair.us.flow(EU);
    assert_eq!(flow.outcome(Outcome::Superseded), 4, "one chunk holds all of them");
    assert_eq!((flow.outcome(Outcome::Applied), flow.outcome(Outcome::Missing)), (3, 1));
    accounted(&pair.both());
    sampler.finish();
}

#[test]
fn what_the_peer_cannot_hold_leaves_no_old_copy_behind() {
    let _gate = shared();
    // Three limits, each standing alone: this region's policy and the peer's (its memcached would take all of it), and in
    // another cache the peer's memcached, whose items end at 512 KiB (every policy would take them).
    let pair = TwoRegionsSpec::new()
        .us(|us| {
            us.cache(CacheSpec::new("sessions").option("max_value_bytes", "800000"))
                .cache(CacheSpec::new("small"))
        })
        .eu(|eu| {
            let peers_policy = CacheSpec::new("sessions").option("max_value_bytes", "600000");
            eu.cache(peers_policy)
                .cache(CacheSpec::new("small").memcached_args(&["-I", "512k"]))
        })
        .start();
    let sampler = Sampler::start(&pair.both());
    let mut writer = pair.us.writer("sessions");
    let mut there = pair.eu.cache("sessions").client();
    let large: [(&[u8], usize); 2] = [(b"over policy", 900_000), (b"over peer's", 700_000)];
    let mut small = pair.us.writer("small");
    let mut small_there = pair.eu.cache("small").client();
    small_there.set(b"over server", b"old copy", 0, 0).unwrap();
    small.set(b"over server", &noise(560_000, 5));
    small.flush();
    let gone: Vec<&[u8]> = large
        .iter()
        .map(|(key, _)| *key)
        .chain([&b"missing"[..], b"stale", b"touched"])
        .collect();
    for key in gone.iter().copied().chain([&b"fits"[..]]) {
        there.set(key, b"old copy", 0, 0).unwrap();
    }
    for (key, size) in large {
        writer.set(key, &noise(size, 5));
    }
    writer.set(b"fits", &noise(400_000, 5));
    writer.say(Op::Set, b"missing");
    writer.say(Op::Touch, b"touched");
    writer.client().set(b"stale", b"not to be trusted", 0, 0).unwrap();
    writer.client().of(b"stale").mark_stale(b"stale").unwrap();
    writer.say(Op::Set, b"stale");
    writer.flush();
    settle(&pair.both());
    assert_eq!(there.get_many(&gone).unwrap(), vec![None; gone.len()]);
    assert_eq!(small_there.get(b"over server").unwrap(), None);
    assert_same(&pair.both(), "sessions", &[b"fits"]);
    assert!(there.get(b"fits").unwrap().is_some());
    // The look did not take the right to refresh from the applications: the next reader wins it.
    let seen = writer.client().of(b"stale").line("mg stale s").unwrap();
    assert!(seen.split(' ').any(|flag| flag == "W"), "{seen}");
    let flow = pair.us.flow(EU);
    assert_eq!(flow.outcome(Outcome::TooLarge), 3);
    assert_eq!(flow.outcome(Outcome::Missing), 3);
    assert_eq!(flow.outcome(Outcome::Applied), 1);
    accounted(&pair.both());
    sampler.finish();
}

#[test]
fn small_values_that_the_peers_memcached_refuses_harm_none_of_those_written_with_them() {
    let _gate = shared();
    // The peer's memcached takes no item above a kilobyte, which nobody has told the policies. It is silent about what it
    // stores, and its error lines don't say which value they mean.
    let pair = TwoRegionsSpec::new()
        .one_way()
        .eu(|eu| eu.cache(CacheSpec::new("sessions").memcached_args(&["-I", "1024", "-o", "slab_chunk_max=512"])))
        .start();
    let sampler = Sampler::start(&pair.both());
    let keys: Vec<String> = (0..600).map(|n| format!("key:{n}")).collect();
    let too_large = |n: usize| n % 20 == 7;
    let mut there = pair.eu.cache("sessions").client();
    for (_, key) in keys.iter().enumerate().filter(|(n, _)| too_large(*n)) {
        there.set(key.as_bytes(), b"old copy", 0, 0).unwrap();
    }
    let mut writer = pair.us.writer("sessions");
    let values = keys.iter().enumerate();
    writer.set_all(values.map(|(n, key)| (key, noise(if too_large(n) { 2000 } else { 100 }, n as u64))));
    writer.flush();
    settle(&pair.both());
    let found = there.get_many(&keys).unwrap();
    let expected = writer.client().get_many(&keys).unwrap();
    for (n, (found, expected)) in found.into_iter().zip(expected).enumerate() {
        assert!(expected.is_some());
        assert_eq!(found, expected.filter(|_| !too_large(n)), "{}", keys[n]);
    }
    let flow = pair.us.flow(EU);
    assert_eq!(flow.outcome(Outcome::TooLarge), 30);
    assert_eq!(flow.outcome(Outcome::Applied), 570);
    accounted(&pair.both());
    sampler.finish();
}

#[test]
fn what_expires_on_the_way_leaves_no_old_copy_behind() {
    let _gate = shared();
    // Longer on the way than the source lives.
    let pair = TwoRegionsSpec::new()
        .one_way()
        .extra("[batch]\nlinger = \"4s\"\nidle_linger = \"4s\"")
        .start();
    let sampler = Sampler::start(&pair.both());
    let mut writer = pair.us.writer("sessions");
    let mut there = pair.eu.cache("sessions").client();
    writer.client().set(b"touched", b"short", 0, 0).unwrap();
    for key in [&b"set"[..], b"touched"] {
        there.set(key, b"old copy", 0, 0).unwrap();
    }
    writer.set(b"stays", b"for ever");
    writer.set_with(b"stays for long", b"an hour", 0, 3_600);
    writer.set_with(b"set", b"short", 0, 3);
    writer.touch(b"touched", 3);
    writer.flush();
    settle(&pair.both());
    assert_eq!(there.get_many(&[&b"set"[..], b"touched"]).unwrap(), [None, None]);
    assert_same(&pair.both(), "sessions", &["stays", "stays for long"]);
    let copy = there.ttl(b"stays for long").unwrap().unwrap();
    let source = writer.client().ttl(b"stays for long").unwrap().unwrap();
    assert!(
        (source - TTL_SLACK..=source + 1).contains(&copy),
        "{source} s here, {copy} s there"
    );
    let flow = pair.us.flow(EU);
    assert_eq!((flow.outcome(Outcome::Expired), flow.outcome(Outcome::Applied)), (2, 2));
    accounted(&pair.both());
    sampler.finish();
}

#[test]
fn a_cache_that_invalidates_removes_copies_and_never_brings_one() {
    let _gate = shared();
    let invalidating = CacheSpec::new("sessions").option("on_set", "\"invalidate\"");
    let pair = TwoRegionsSpec::new().cache(invalidating).start();
    let sampler = Sampler::start(&pair.both());
    let mut writer = pair.us.writer("sessions");
    let mut there = pair.eu.cache("sessions").client();
    let keys: [&[u8]; 6] = [
        b"set",
        b"deleted",
        b"touched",
        b"touched to stay",
        b"touched too late",
        b"filled",
    ];
    for key in keys {
        there.set(key, b"of eu", 1, 60).unwrap();
    }
    writer.set(b"set", b"of us");
    writer.delete(b"deleted");
    writer.produce(b"touched", br#"{"v":1,"op":"touch","ttl":900}"#, &[]);
    writer.produce(b"touched to stay", br#"{"v":1,"op":"touch","ttl":0}"#, &[]);
    let ended = format!(r#"{{"v":1,"op":"touch","ttl":{}}}"#, unix_now() - 10);
    writer.produce(b"touched too late", ended.as_bytes(), &[]);
    writer.produce(b"touched in vain", br#"{"v":1,"op":"touch","ttl":900}"#, &[]);
    writer.client().set(b"filled", b"of us", 0, 0).unwrap();
    writer.produce(b"filled", br#"{"v":1,"op":"set","fill":true}"#, &[]);
    writer.flush();
    settle(&pair.both());
    assert_eq!(
        there.get_many(&[&b"set"[..], b"deleted", b"touched too late"]).unwrap(),
        [None, None, None]
    );
    assert_eq!(there.get(b"touched in vain").unwrap(), None);
    for key in [&b"touched"[..], b"touched to stay", b"filled"] {
        assert_eq!(
            there.get(key).unwrap(),
            Some((b"of eu".to_vec(), 1)),
            "{}",
            key.escape_ascii()
        );
    }
    let ttl = there.ttl(b"touched").unwrap().unwrap();
    assert!((900 - TTL_SLACK..=900).contains(&ttl), "{ttl} s");
    assert_eq!(there.ttl(b"touched to stay").unwrap(), Some(-1));
    let ttl = there.ttl(b"filled").unwrap().unwrap();
    assert!((0..=60).contains(&ttl), "{ttl} s");
    let flow = pair.us.flow(EU);
    assert_eq!(flow.outcome(Outcome::Deleted), 3);
    assert_eq!(flow.outcome(Outcome::Applied), 3);
    assert_eq!(flow.outcome(Outcome::Filtered), 1);
    accounted(&pair.both());
    sampler.finish();
}

#[test]
fn a_touch_that_does_not_say_how_long_is_looked_at_where_sets_invalidate() {
    let _gate = shared();
    let invalidating = CacheSpec::new("sessions").option("on_set", "\"invalidate\"").proxied();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .cache(invalidating)
        .us(|us| us.set("memcached.timeout", "\"5s\""))
        .start();
    let mut writer = pair.us.writer("sessions");
    let mut there = pair.eu.cache("sessions").client();
    for key in [&b"touched"[..], b"gone here", b"too late"] {
        there.set(key, b"of eu", 1, 60).unwrap();
    }
    writer.client().set(b"touched", b"of us", 0, 900).unwrap();
    let touch = br#"{"v":1,"op":"touch"}"#;
    writer.produce(b"touched", touch, &[]);
    writer.produce(b"gone here", touch, &[]);
    writer.flush();
    settle(&pair.both());
    assert_eq!(there.get(b"touched").unwrap(), Some((b"of eu".to_vec(), 1)));
    let ttl = there.ttl(b"touched").unwrap().unwrap();
    assert!((900 - TTL_SLACK..=900).contains(&ttl), "{ttl} s");
    assert_eq!(there.get(b"gone here").unwrap(), None);
    // An idle connection is closed now and then, which is no reason to do without an answer.
    pair.us.cache("sessions").servers[0].proxy().close_connections();
    writer.client().touch(b"touched", 500).unwrap();
    writer.produce(b"touched", touch, &[]);
    writer.flush();
    settle(&pair.both());
    let ttl = there.ttl(b"touched").unwrap().unwrap();
    assert!((500 - TTL_SLACK..=500).contains(&ttl), "{ttl} s");
    // Nobody answers: the copy goes, in the end, and nothing else waits for that.
    pair.us.cache("sessions").memcached(0).freeze();
    writer.produce(b"touched", touch, &[]);
    writer.flush();
    let in_flight = || pair.us.flow(EU).in_flight;
    wait_until("it is looked at", Duration::from_secs(60), || in_flight() == 1);
    writer.produce(b"too late", br#"{"v":1,"op":"set"}"#, &[]);
    writer.flush();
    wait_until("its copy is gone", Duration::from_secs(60), || {
        there.get(b"too late").unwrap().is_none()
    });
    assert_eq!(in_flight(), 1, "the touch is still looked at");
    settle(&pair.both());
    assert_eq!(there.get(b"touched").unwrap(), None);
    let flow = pair.us.flow(EU);
    assert_eq!((flow.outcome(Outcome::Deleted), flow.outcome(Outcome::Applied)), (3, 2));
    accounted(&pair.both());
}
