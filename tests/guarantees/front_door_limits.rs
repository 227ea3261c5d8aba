//! What the front door does at its limits: many clients at once, servers and a Kafka that stand still, clients that are idle or
//! read nothing.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use base64::Engine as _;
use evrepl::event;
use evrepl_lab::{Broker, CacheSpec, Region, Signal, TwoRegionsSpec, assert_same, broker, shared, wait_until};
use serde_json::json;

use crate::front_door::{Client, alone, arrived, door, key_on};

const SESSIONS: &str = "sessions";
const LIMIT: Duration = Duration::from_secs(60);

/// A region with the Kafka that all share.
fn region(cache: CacheSpec, settings: &[(&str, &str)]) -> Region {
    alone(&broker().client(), cache, settings)
}

/// One whose front door may hold so much, and a client who knows of a large value there.
fn with_large(max_buffered: &str, bytes: usize) -> (Region, Client) {
    let cache = CacheSpec::new(SESSIONS).front_door();
    let region = region(
        cache,
        &[("front_door.max_buffered_bytes", &format!("\"{max_buffered}\""))],
    );
    let mut client = Client::at(&region);
    assert_eq!(client.set("large", &"v".repeat(bytes)), "STORED");
    (region, client)
}

/// One that holds little for its clients.
fn small() -> (Region, Client) {
    with_large("1MiB", 400_000)
}

/// So many clients that ask for the large value so often, and have read nothing yet.
fn greedy(region: &Region, clients: usize, gets: usize) -> Vec<Client> {
    let ask = |_| {
        let mut client = Client::at(region);
        client.send("get large\r\n".repeat(gets));
        client
    };
    (0..clients).map(ask).collect()
}

/// A request of the binary protocol.
fn binary_request(opcode: u8, opaque: [u8; 4], key: &[u8], extras: &[u8], value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x80, opcode, 0, key.len() as u8, extras.len() as u8, 0, 0, 0];
    bytes.extend(((key.len() + extras.len() + value.len()) as u32).to_be_bytes());
    bytes.extend(opaque);
    bytes.extend([0; 8]);
    [&bytes[..], extras, key, value].concat()
}

/// Lengths from nothing to more than is copied, and one that takes many reads.
fn length(key: usize) -> usize {
    match key {
        41 => 300_000,
        _ => key * 137,
    }
}

#[test]
fn gets_of_many_clients_travel_together_and_each_has_its_own_answer() {
    let _gate = shared();
    for threads in ["1", "2"] {
        let cache = CacheSpec::new(SESSIONS).servers(2).front_door();
        let region = region(cache, &[("front_door.threads", threads)]);
        let mut client = Client::at(&region);
        // Every third is not there.
        for key in (0..60).filter(|key| key % 3 != 0) {
            let value = format!("{key:x}").repeat(1 + length(key))[..length(key)].to_owned();
            assert_eq!(client.set(&format!("key:{key}"), &value), "STORED");
        }
        std::thread::scope(|scope| {
            for client in 0..16usize {
                let region = &region;
                scope.spawn(move || {
                    let mut own = Client::at(region);
                    for round in 0..30 {
                        // Some ask one by one, some for many, and for the same more than once.
                        let keys: Vec<usize> = (0..1 + client * 5)
                            .map(|n| (n * (client + 3) + round * 7) % 60)
                            .collect();
                        let asked: String = keys.iter().map(|key| format!("get key:{key}\r\n")).collect();
                        own.send(asked);
                        for key in keys {
                            if key % 3 != 0 {
                                let length = length(key);
                                assert_eq!(own.line(), format!("VALUE key:{key} 0 {length}"));
                                let value = own.line();
                                let digit = format!("{key:x}");
                                assert!(value.len() == length && value.starts_with(&digit[..length.min(digit.len())]));
                            }
                            assert_eq!(own.line(), "END", "of {key}");
                        }
                    }
                });
            }
        });
    }
}

#[test]
fn a_memcached_that_stands_still_is_an_error_and_what_it_does_when_it_wakes_up_is_replicated() {
    let _gate = shared();
    let spec = || CacheSpec::new(SESSIONS).front_door();
    let pair = TwoRegionsSpec::new()
        .us(move |us| us.cache(spec()).set("memcached.timeout", "\"500ms\""))
        .eu(move |eu| eu.cache(spec()))
        .one_way()
        .start();
    let mut client = Client::at(&pair.us);
    for key in ["set", "gat", "delete"] {
        assert_eq!(client.set(key, "old"), "STORED");
    }
    arrived(&pair);
    let memcached = &pair.us.cache(SESSIONS).servers[0].memcached;
    memcached.freeze();
    let began = Instant::now();
    client.send("set set 0 0 3\r\nnew\r\ngat 1000 gat\r\ndelete delete noreply\r\n");
    for _ in 0..2 {
        let said = client.line();
        assert!(said.ends_with("did not answer, the command may have run"), "{said}");
    }
    assert!(began.elapsed() < LIMIT);
    // A client that comes now does not hang either.
    let said = Client::at(&pair.us).set("other", "x");
    assert!(said.starts_with("SERVER_ERROR memcached at 127.0.0.1:"), "{said}");
    memcached.thaw();
    let there = || memcached.client().get_many([b"set".as_slice(), b"delete"]).unwrap();
    wait_until("memcached does what it was sent", LIMIT, || {
        let there = there();
        there[0].as_ref().is_some_and(|(value, _)| value == b"new") && there[1].is_none()
    });
    wait_until("the peer hears of it", LIMIT, || {
        let there = pair
            .eu
            .cache(SESSIONS)
            .client()
            .get_many(&[&b"set"[..], b"delete"])
            .unwrap();
        there[0].as_ref().is_some_and(|(value, _)| value == b"new") && there[1].is_none()
    });
    arrived(&pair);
    let door = &pair.us.status()["front_doors"][0];
    assert_eq!(door["events"], door["acknowledged"], "{door}");
    assert_same(&pair.both(), SESSIONS, &["set", "gat", "delete", "other"]);
}

#[test]
fn an_answer_that_waits_for_kafka_waits_no_longer_than_it_may() {
    let _gate = shared();
    let broker = Broker::start();
    let region = alone(
        &broker.client(),
        CacheSpec::new(SESSIONS).front_door(),
        &[
            ("front_door.event_timeout", "\"1s\""),
            ("front_door.event_ack", "\"acked\""),
        ],
    );
    let mut client = Client::at(&region);
    assert_eq!(client.set("before", "x"), "STORED");
    assert_eq!(door(&region)["acknowledged"], 1, "it was answered after kafka had it");
    broker.freeze();
    let sets: String = (0..300).map(|n| format!("set key:{n} 0 0 1\r\nx\r\n")).collect();
    client.send(sets);
    (0..300).for_each(|n| assert_eq!(client.line(), "STORED", "{n}"));
    // From here on it is known that Kafka is away: nobody waits for it.
    assert_eq!(door(&region)["kafka_away"], true);
    for n in 0..100 {
        assert_eq!(client.set(&format!("later:{n}"), "x"), "STORED");
    }
    broker.thaw();
    region.wait_until("all are produced", LIMIT, |status| {
        let door = &status["front_doors"][0];
        door["unsent_keys"] == 0 && door["queued_events"] == 0 && door["kafka_away"] == false
    });
    let mut keys: Vec<Vec<u8>> = (broker.client().read_all(&region.cache(SESSIONS).topic).iter())
        .map(|record| record.key().to_vec())
        .collect();
    keys.sort();
    keys.dedup();
    assert_eq!((keys.len(), &door(&region)["lost"]), (401, &json!(0)));
}

#[test]
fn nobody_waits_for_a_kafka_that_is_away_where_writes_go_on_without_it() {
    let _gate = shared();
    let broker = Broker::start();
    let settings = [
        ("front_door.event_timeout", "\"10m\""),
        ("front_door.event_ack", "\"acked\""),
    ];
    let region = alone(&broker.client(), CacheSpec::new(SESSIONS).front_door(), &settings);
    let mut client = Client::at(&region);
    assert_eq!(client.set("before", "x"), "STORED");
    broker.freeze();
    client.send("set a 0 0 1\r\nx\r\nset b 0 0 1\r\nx\r\nget a\r\n");
    assert_eq!(
        (client.line(), client.line()),
        ("STORED".to_owned(), "STORED".to_owned())
    );
    assert_eq!(client.until("END").len(), 2);
    let door = door(&region);
    assert_eq!((&door["kafka_away"], &door["queued_events"]), (&json!(true), &json!(2)));
    broker.thaw();
    region.wait_until("kafka has the events", LIMIT, |status| {
        status["front_doors"][0]["acknowledged"] == 3
    });
}

#[test]
fn an_answer_that_waits_for_kafka_is_told_by_its_own_event_and_in_its_turn() {
    let _gate = shared();
    let broker = Broker::start();
    let region = alone(
        &broker.client(),
        CacheSpec::new(SESSIONS).servers(2).front_door(),
        &[("front_door.event_ack", "\"acked\""), ("memcached.timeout", "\"30s\"")],
    );
    let cache = region.cache(SESSIONS);
    let (slow, quick) = (key_on(cache, 0), key_on(cache, 1));
    let mut client = Client::at(&region);
    // The first of either server.
    client.send(format!(
        "set {slow} 0 0 1\r\nx\r\nset {quick} 0 0 1\r\nx\r\nset {slow} 0 0 1\r\ny\r\n"
    ));
    (0..3).for_each(|_| assert_eq!(client.line(), "STORED"));
    // What Kafka has acknowledged before its turn came.
    cache.servers[0].memcached.freeze();
    client.send(format!("get {slow}\r\nset {quick} 0 0 1\r\nz\r\nget {quick}\r\n"));
    region.wait_until("kafka has the event", LIMIT, |status| {
        status["front_doors"][0]["acknowledged"] == 4
    });
    cache.servers[0].memcached.thaw();
    assert_eq!(client.until("END").len(), 2);
    assert_eq!(client.line(), "STORED");
    assert_eq!(client.until("END")[1], "z");
}

#[test]
fn a_binary_value_that_is_too_large_harms_nobody_else() {
    let _gate = shared();
    let cache = CacheSpec::new(SESSIONS)
        .front_door()
        .option("max_value_bytes", "\"64KiB\"");
    let region = region(cache, &[]);
    let mut own = std::net::TcpStream::connect(region.cache(SESSIONS).front_door()).unwrap();
    own.set_read_timeout(Some(LIMIT)).unwrap();
    let mut ask = |bytes: Vec<u8>| -> (u16, [u8; 4]) {
        own.write_all(&bytes).unwrap();
        let mut header = [0; 24];
        own.read_exact(&mut header).unwrap();
        let length = u32::from_be_bytes(header[8..12].try_into().unwrap());
        own.read_exact(&mut vec![0; length as usize]).unwrap();
        let status = u16::from_be_bytes([header[6], header[7]]);
        (status, header[12..16].try_into().unwrap())
    };
    assert_eq!(ask(binary_request(1, *b"one1", b"key", &[0; 8], b"old")), (0, *b"one1"));
    let large = vec![b'x'; 70_000];
    assert_eq!(ask(binary_request(1, *b"two2", b"key", &[0; 8], &large)), (3, *b"two2"));
    // As memcached: what was there is gone; and the connection that others share is still the same.
    assert_eq!(ask(binary_request(0, *b"thr3", b"key", &[], b"")), (1, *b"thr3"));
    assert_eq!(door(&region)["unreachable"], 0);
}

#[test]
fn clients_that_read_nothing_hold_so_many_bytes_and_get_what_they_asked_for_when_they_read() {
    let _gate = shared();
    let (region, client) = small();
    drop(client);
    let before = region.rss_bytes();
    let clients = greedy(&region, 40, 20);
    wait_until("the room is taken", LIMIT, || door(&region)["full"] == true);
    // 320 MB were asked for. Whoever came first may have some more than there is room for.
    for _ in 0..50 {
        let held = door(&region)["buffered_bytes"].as_u64().unwrap();
        assert!(held < 12 << 20, "{held} bytes");
    }
    let grown = region.rss_bytes().saturating_sub(before);
    assert!(grown < 60 << 20, "{grown} bytes");
    std::thread::scope(|scope| {
        for mut client in clients {
            scope.spawn(move || {
                for _ in 0..20 {
                    assert_eq!(client.line(), "VALUE large 0 400000");
                    assert_eq!(client.line().len(), 400_000);
                    assert_eq!(client.line(), "END");
                }
            });
        }
    });
    wait_until("nothing is held", LIMIT, || door(&region)["buffered_bytes"] == 0);
}

#[test]
fn clients_that_never_read_give_way_to_those_that_do() {
    let _gate = shared();
    let (region, mut client) = small();
    let _stuck = greedy(&region, 20, 20);
    // And one that never sends all of its value.
    let mut half = Client::at(&region);
    half.send(format!("set half 0 0 500000\r\n{}", "h".repeat(300_000)));
    wait_until("the room is taken", LIMIT, || door(&region)["full"] == true);
    // It waits as long as it must, and is served.
    for n in 0..100 {
        assert_eq!(client.set(&format!("key:{n}"), "x"), "STORED");
    }
    wait_until("those that hold the room and do nothing are sent away", LIMIT, || {
        door(&region)["full"] == false
    });
    assert!(door(&region)["dropped"].as_u64().unwrap() > 0);
}

#[test]
fn large_answers_that_nobody_reads_delay_nobody_else() {
    let _gate = shared();
    let (region, mut client) = with_large("256MiB", 1_000_000);
    let _greedy = greedy(&region, 40, 1000);
    // 40 GB were asked for: of each client no more than a few are on the way at once.
    for n in 0..100 {
        assert_eq!(client.set(&format!("key:{n}"), "x"), "STORED");
        client.send(format!("get key:{n}\r\n"));
        assert_eq!(client.until("END").len(), 2);
        let held = door(&region)["buffered_bytes"].as_u64().unwrap();
        assert!(held < 256 << 20, "{held} bytes are held");
    }
    let door = door(&region);
    assert_eq!(
        (&door["full"], &door["dropped"]),
        (&false.into(), &0.into()),
        "{door:#}"
    );
    assert_eq!(door["connections"], 41);
}

#[test]
fn when_more_comes_than_there_is_room_for_those_that_are_behind_leave_and_no_server_is_given_up() {
    let _gate = shared();
    let (region, mut client) = with_large("32MiB", 1_000_000);
    // Nothing is known of their answers yet, so that each has some under way: 160 MB together.
    let _greedy = greedy(&region, 40, 1000);
    wait_until("it presses", LIMIT, || door(&region)["full"] == true);
    for n in 0..100 {
        assert_eq!(client.set(&format!("key:{n}"), "x"), "STORED");
        let held = door(&region)["buffered_bytes"].as_u64().unwrap();
        assert!(held < 100 << 20, "{held} bytes are held");
    }
    let door = door(&region);
    assert!(door["dropped"].as_u64().unwrap() > 0, "{door:#}");
    // It was not the server that was slow.
    assert_eq!(door["unreachable"], 0, "{door:#}");
}

#[test]
fn a_key_with_line_breaks_is_no_answer_to_anybody() {
    let _gate = shared();
    let region = region(CacheSpec::new(SESSIONS).front_door(), &[]);
    let mut evil = Client::at(&region);
    let key = b"y\r\nVA 6\r\nforged\r\nSTORED";
    // memcached gives it back as it is, whether a binary client has made it, or `N`.
    let mut binary = Client::at(&region);
    binary.send(binary_request(1, [0; 4], key, &[0; 8], b"v"));
    let mut header = [0; 24];
    binary.read_exact(&mut header);
    assert_eq!(&header[6..8], [0, 0]);
    let key = base64::engine::general_purpose::STANDARD.encode(key);
    let other = base64::engine::general_purpose::STANDARD.encode("x\r\nSTORED");
    assert_eq!(evil.ask(&format!("mg {other} b N60")), "HD W");
    let refused = "CLIENT_ERROR a key with a line break cannot be in an answer";
    for command in [
        format!("mg {key} b k v"),
        format!("mg {other} k b"),
        format!("me {key} b"),
        format!("ms {key} 1 b k\r\nv"),
        format!("ma {other} b k N60"),
        format!("md {other} b k"),
    ] {
        assert_eq!(evil.ask(&command), refused, "{command}");
    }
    // Without being named it is a key as any other.
    assert_eq!(evil.ask(&format!("mg {key} b v")), "VA 1");
    assert_eq!(evil.line(), "v");
    assert_eq!(evil.ask("mn"), "MN");
    let listed = "CLIENT_ERROR keys are not listed at the front door";
    assert_eq!(evil.ask("stats cachedump 1 10"), listed);
    assert_eq!(evil.ask("stats detail dump"), listed);
    assert_eq!(door(&region)["unreachable"], 0);
}

#[test]
fn who_comes_while_it_drains_is_sent_away_at_once() {
    let _gate = shared();
    let region = region(
        CacheSpec::new(SESSIONS).front_door(),
        &[("memcached.timeout", "\"60s\"")],
    );
    let memcached = &region.cache(SESSIONS).servers[0].memcached;
    let mut client = Client::at(&region);
    assert_eq!(client.set("key", "old"), "STORED");
    memcached.freeze();
    client.send("set key 0 0 3\r\nnew\r\n");
    region.signal(Signal::Terminate);
    wait_until("it drains", LIMIT, || region.log().contains("draining"));
    for _ in 0..5 {
        assert_eq!(Client::at(&region).line(), "");
    }
    assert!(region.is_running());
    memcached.thaw();
    assert_eq!((client.line(), client.line()), ("STORED".to_owned(), String::new()));
    assert_eq!(region.exit_code(LIMIT), Some(0));
}

#[test]
fn a_client_that_is_idle_for_too_long_is_disconnected_and_one_that_waits_for_its_answer_is_not() {
    let _gate = shared();
    let cache = CacheSpec::new(SESSIONS).front_door();
    let region = region(cache, &[("front_door.idle_timeout", "\"1s\"")]);
    let (mut idle, mut busy) = (Client::at(&region), Client::at(&region));
    assert_eq!(idle.set("key", "x"), "STORED");
    let since = Instant::now();
    let memcached = &region.cache(SESSIONS).servers[0].memcached;
    memcached.freeze();
    busy.send("get key\r\n");
    // Until nothing can come any more.
    assert_eq!(idle.line(), "");
    assert!(since.elapsed() > Duration::from_millis(900), "{:?}", since.elapsed());
    assert_eq!(door(&region)["connections"], 1);
    memcached.thaw();
    let said = busy.line();
    assert!(
        said.starts_with("VALUE key") || said.starts_with("SERVER_ERROR"),
        "{said}"
    );
}

#[test]
fn what_comes_in_at_the_door_for_fills_only_fills() {
    let _gate = shared();
    let path = std::env::temp_dir().join(format!("evrepl-fills-{}.sock", std::process::id()));
    let cache = CacheSpec::new(SESSIONS)
        .front_door()
        .option("listen_fills", &format!("\"unix:{}\"", path.display()))
        .option("max_value_bytes", "\"1KiB\"");
    let region = region(cache, &[]);
    let mut fills = UnixStream::connect(&path).unwrap();
    fills
        .write_all(b"set filled 0 0 1\r\nx\r\ndelete filled\r\nquit\r\n")
        .unwrap();
    let mut said = String::new();
    fills.read_to_string(&mut said).unwrap();
    assert_eq!(said, "STORED\r\nDELETED\r\n");
    let mut client = Client::at(&region);
    assert_eq!(client.set("written", "x"), "STORED");
    // What is too large is gone here, and no peer's copy goes for it: it filled.
    for set in ["set large 0 0 1025", "ms large 1025"] {
        assert_eq!(client.set("large", "x"), "STORED");
        let mut fills = UnixStream::connect(&path).unwrap();
        let value = "x".repeat(1025);
        write!(fills, "{set}\r\n{value}\r\nget large\r\nquit\r\n").unwrap();
        let mut said = String::new();
        fills.read_to_string(&mut said).unwrap();
        assert_eq!(said, "SERVER_ERROR object too large for cache\r\nEND\r\n");
    }
    region.wait_until("kafka has the events", LIMIT, |status| {
        status["front_doors"][0]["acknowledged"] == 7
    });
    let mut events: Vec<(String, &str, bool)> = (broker().client().read_all(&region.cache(SESSIONS).topic).iter())
        .map(|record| {
            let event = event::decode(record.value()).unwrap();
            let key = String::from_utf8(record.key().to_vec()).unwrap();
            (key, event.op.name(), event.fill)
        })
        .collect();
    events.sort();
    let expected = [
        ("filled", "delete", false),
        ("filled", "set", true),
        ("large", "set", false),
        ("large", "set", false),
        ("large", "set", true),
        ("large", "set", true),
        ("written", "set", false),
    ];
    assert_eq!(events, expected.map(|(key, op, fill)| (key.to_owned(), op, fill)));
    std::fs::remove_file(&path).unwrap();
}
