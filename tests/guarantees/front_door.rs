//! Any memcached client writes at the front door, and the other region reads it: what happened there and nothing else, whatever
//! goes wrong around it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use evrepl_lab::{
    Broker, Cache, CacheSpec, KafkaClient, Region, TwoRegions, TwoRegionsSpec, accounted, assert_same, settle, shared,
    wait_until,
};
use serde_json::Value;

const SESSIONS: &str = "sessions";
const LIMIT: Duration = Duration::from_secs(60);

/// A client that says lines and reads lines.
pub(crate) struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    pub(crate) fn of(address: &str) -> Client {
        let stream = TcpStream::connect(address).unwrap_or_else(|error| panic!("{address}: {error}"));
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Client {
            stream: BufReader::new(stream),
        }
    }

    pub(crate) fn at(region: &Region) -> Client {
        Client::of(&region.cache(SESSIONS).front_door())
    }

    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.get_mut().write_all(bytes.as_ref()).unwrap();
    }

    /// The next line, without its end; empty when the connection has ended.
    pub(crate) fn line(&mut self) -> String {
        let mut line = Vec::new();
        self.stream.read_until(b'\n', &mut line).unwrap();
        String::from_utf8_lossy(&line).trim_end().to_owned()
    }

    fn try_line(&mut self) -> Option<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line).ok()?;
        line.strip_suffix("\r\n").map(str::to_owned)
    }

    pub(crate) fn ask(&mut self, command: &str) -> String {
        self.send(format!("{command}\r\n"));
        self.line()
    }

    pub(crate) fn set(&mut self, key: &str, value: &str) -> String {
        self.ask(&format!("set {key} 0 0 {}\r\n{value}", value.len()))
    }

    pub(crate) fn read_exact(&mut self, bytes: &mut [u8]) {
        self.stream.read_exact(bytes).unwrap();
    }

    /// Everything up to this line, which is taken too.
    pub(crate) fn until(&mut self, last: &str) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            let line = self.line();
            if line == last || line.is_empty() && self.stream.buffer().is_empty() && !last.is_empty() {
                return lines;
            }
            lines.push(line);
        }
    }

    fn rest(&mut self) -> String {
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).unwrap();
        String::from_utf8_lossy(&rest).into_owned()
    }
}

/// What `/status` says of the front door.
pub(crate) fn door(region: &Region) -> Value {
    region.status()["front_doors"][0].clone()
}

fn count(region: &Region, what: &str) -> u64 {
    door(region)[what].as_u64().unwrap()
}

fn pair(servers: usize) -> TwoRegionsSpec {
    let spec = move || CacheSpec::new(SESSIONS).servers(servers).front_door();
    TwoRegionsSpec::new()
        .us(move |us| us.cache(spec()))
        .eu(move |eu| eu.cache(spec()))
}

/// A region without a peer.
pub(crate) fn alone(kafka: &std::sync::Arc<KafkaClient>, cache: CacheSpec, settings: &[(&str, &str)]) -> Region {
    let mut region = evrepl_lab::RegionBuilder::new("us-east-1").kafka(kafka).cache(cache);
    for (path, literal) in settings {
        region = region.set(path, literal);
    }
    region.start()
}

/// A key that this server holds.
pub(crate) fn key_on(cache: &Cache, server: usize) -> String {
    let mut keys = (0..).map(|n| format!("key:{n}"));
    keys.find(|key| cache.server_of(key.as_bytes()) == server).unwrap()
}

/// Everything that was written has come to its end.
fn settled(pair: &TwoRegions) {
    arrived(pair);
    accounted(&pair.both());
}

pub(crate) fn arrived(pair: &TwoRegions) {
    for region in pair.both() {
        region.wait_until("events are acknowledged", LIMIT, |status| {
            status["front_doors"][0]["queued_events"] == 0 && status["front_doors"][0]["unsent_keys"] == 0
        });
    }
    settle(&pair.both());
}

#[test]
fn what_a_client_writes_is_replicated_and_only_what_has_happened_is_an_event() {
    let _gate = shared();
    let pair = pair(1).one_way().start();
    let mut client = Client::at(&pair.us);
    let mut events = 0;
    // Command, what is answered, and how many events come of it.
    let steps = [
        ("set a 7 0 5\r\nhello", "STORED", 1),
        ("add a 0 0 1\r\nx", "NOT_STORED", 0),
        ("add b 0 0 1\r\nx", "STORED", 1),
        ("replace none 0 0 1\r\nx", "NOT_STORED", 0),
        ("append a 0 0 1\r\n!", "STORED", 1),
        ("prepend a 0 0 1\r\n>", "STORED", 1),
        ("set n 0 600 2\r\n41", "STORED", 1),
        ("incr n 1", "42", 1),
        ("decr none 1", "NOT_FOUND", 0),
        (
            "incr a 1",
            "CLIENT_ERROR cannot increment or decrement non-numeric value",
            0,
        ),
        ("touch n 900", "TOUCHED", 1),
        ("touch none 900", "NOT_FOUND", 0),
        ("set gone 0 0 1\r\nx", "STORED", 1),
        ("delete gone", "DELETED", 1),
        ("delete gone", "NOT_FOUND", 0),
        ("set k 0 0 -1", "CLIENT_ERROR bad command line format", 0),
        ("ms m 2 F5 T0 Oab c0\r\nhi", "HD Oab c1", 1),
        ("mg m v", "VA 2", 0),
        ("mg m T0", "HD", 1),
        ("ma n N0 J5", "HD", 1),
        ("ma made N0 J5", "HD", 1),
        ("md made q", "", 1),
        ("mg nothing T9 q", "", 0),
        ("ms bm9uLWFzY2lpIPA= 1 b\r\nx", "HD", 1),
    ];
    for (command, answer, made) in steps {
        client.send(format!("{command}\r\n"));
        if answer.is_empty() {
            assert_eq!(client.ask("mn"), "MN", "{command}");
        } else {
            let said = client.line();
            // Versions of an item are memcached's own.
            let said = said.split(" c").next().unwrap().to_owned();
            assert_eq!(said, answer.split(" c").next().unwrap(), "{command}");
        }
        if answer.starts_with("VA") {
            assert_eq!(client.line(), "hi");
        }
        events += made;
        assert_eq!(count(&pair.us, "events"), events, "{command}");
    }
    client.send("gat 60 a none b\r\n");
    assert_eq!(client.until("END").len(), 4);
    client.send("set quiet 0 0 1 noreply\r\nq\r\nmn\r\n");
    assert_eq!(client.line(), "MN");
    events += 3;
    assert_eq!(count(&pair.us, "events"), events);
    settled(&pair);
    let keys: Vec<&[u8]> = vec![
        b"a",
        b"b",
        b"n",
        b"m",
        b"gone",
        b"made",
        b"quiet",
        b"none",
        b"non-ascii \xf0",
    ];
    assert_same(&pair.both(), SESSIONS, &keys);
    assert_eq!(count(&pair.us, "lost") + count(&pair.us, "remembered"), 0);
    assert_eq!(pair.us.flow("eu-west-1").consumed, events);
}

#[test]
fn several_servers_look_like_one_and_a_list_comes_in_its_order() {
    let _gate = shared();
    let pair = pair(3).one_way().start();
    let mut client = Client::at(&pair.us);
    let keys: Vec<String> = (0..400).map(|n| format!("key:{n}")).collect();
    let sets: String = keys
        .iter()
        .map(|key| format!("set {key} 0 0 {}\r\n{key}\r\n", key.len()))
        .collect();
    client.send(&sets);
    keys.iter().for_each(|_| assert_eq!(client.line(), "STORED"));
    // Longer than a line may be, with keys that are not there between.
    let list: Vec<String> = keys
        .iter()
        .flat_map(|key| [key.clone(), format!("not:{key}")])
        .collect();
    client.send(format!("gets {}\r\nmn\r\n", list.join(" ")));
    for key in &keys {
        assert!(client.line().starts_with(&format!("VALUE {key} 0 {} ", key.len())));
        assert_eq!(client.line(), *key);
    }
    assert_eq!((client.line(), client.line()), ("END".to_owned(), "MN".to_owned()));
    for server in &pair.us.cache(SESSIONS).servers {
        let held = server.memcached.client().items().unwrap();
        assert!((40..300).contains(&held), "{held} of 400");
    }
    settled(&pair);
    assert_same(&pair.both(), SESSIONS, &keys);
    // All are emptied, and no peer is.
    assert_eq!(client.ask("flush_all"), "OK");
    client.send(format!("get {}\r\n", keys.join(" ")));
    assert_eq!(client.line(), "END");
    let there: usize = pair
        .eu
        .cache(SESSIONS)
        .servers
        .iter()
        .map(|server| server.memcached.client().items().unwrap() as usize)
        .sum();
    assert_eq!((there, count(&pair.us, "flushes")), (400, 1));
    // A list of which one server is away is an error, once, and the next command is not.
    pair.us.cache(SESSIONS).servers[1].memcached.kill();
    client.send(format!("get {}\r\nmn\r\n", keys.join(" ")));
    let said = client.until("MN");
    assert!(
        said.len() == 1 && said[0].starts_with("SERVER_ERROR memcached at 127.0.0.1:"),
        "{said:?}"
    );
}

#[test]
fn a_write_that_was_answered_after_kafka_had_it_survives_a_kill() {
    let _gate = shared();
    let pair = pair(1)
        .one_way()
        .us(|us| us.set("front_door.event_ack", "\"acked\""))
        .start();
    let mut answered = Vec::new();
    for round in 0..3 {
        let mut client = Client::at(&pair.us);
        let keys: Vec<String> = (0..1000 + 100 * round).map(|n| format!("key:{round}:{n}")).collect();
        let mut stored = 0;
        for (n, key) in keys.iter().enumerate() {
            client.send(format!("set {key} 0 0 1\r\nx\r\n"));
            // Several under way.
            if n >= 16 {
                assert_eq!(client.line(), "STORED");
                stored += 1;
            }
        }
        pair.us.kill();
        // What was on its way to the client when it happened.
        while client.try_line().is_some_and(|line| line == "STORED") {
            stored += 1;
        }
        answered.extend_from_slice(&keys[..stored]);
        pair.us.start();
    }
    // What was consumed before a kill is in no process's account.
    arrived(&pair);
    assert_same(&pair.both(), SESSIONS, &answered);
}

#[test]
fn a_memcached_that_dies_is_an_error_and_back_when_it_is_and_the_others_go_on() {
    let _gate = shared();
    let pair = pair(2).one_way().start();
    let mut client = Client::at(&pair.us);
    let cache = pair.us.cache(SESSIONS);
    let (dead, well) = (key_on(cache, 0), key_on(cache, 1));
    assert_eq!(
        (client.set(&dead, "1"), client.set(&well, "1")),
        ("STORED".to_owned(), "STORED".to_owned())
    );
    cache.servers[0].memcached.kill();
    let said = client.set(&dead, "2");
    assert!(said.starts_with("SERVER_ERROR memcached at 127.0.0.1:"), "{said}");
    // At once, while nobody dials.
    for _ in 0..20 {
        let said = client.set(&dead, "never");
        assert!(said.starts_with("SERVER_ERROR memcached at 127.0.0.1:"), "{said}");
    }
    assert_eq!(client.set(&well, "2"), "STORED");
    cache.servers[0].memcached.restart();
    wait_until("the server is asked again", LIMIT, || {
        client.send(format!("get {dead}\r\n"));
        let said = client.line();
        assert!(
            !said.starts_with("VALUE"),
            "a write that was an error has run: {said} {}",
            client.line()
        );
        said == "END"
    });
    wait_until("the server is used again", LIMIT, || client.set(&dead, "3") == "STORED");
    settled(&pair);
    assert_same(&pair.both(), SESSIONS, &[dead, well]);
    assert!(count(&pair.us, "unreachable") > 0);
}

#[test]
fn a_client_that_does_not_read_delays_nobody_else() {
    let _gate = shared();
    let pair = pair(1).one_way().start();
    let mut client = Client::at(&pair.us);
    let value = "v".repeat(500_000);
    assert_eq!(client.set("large", &value), "STORED");
    let mut slow = Client::at(&pair.us);
    slow.stream.get_mut().set_nonblocking(true).unwrap();
    // Until it can send no more: nothing is read from it.
    let began = Instant::now();
    let mut sent = 0u64;
    let mut stuck_since = None;
    while began.elapsed() < LIMIT {
        match slow.stream.get_mut().write(b"get large\r\n") {
            Ok(count) => {
                sent += count as u64;
                stuck_since = None;
            }
            Err(_) if stuck_since.get_or_insert_with(Instant::now).elapsed() > Duration::from_millis(500) => break,
            Err(_) => std::thread::yield_now(),
        }
    }
    assert!(stuck_since.is_some(), "it could send {sent} bytes");
    for n in 0..200 {
        assert_eq!(client.set(&format!("key:{n}"), "x"), "STORED");
    }
    let rss = pair.us.rss_bytes();
    assert!(rss < 200 << 20, "{rss} bytes");
    // And it gets what it asked for, when it reads.
    slow.stream.get_mut().set_nonblocking(false).unwrap();
    for _ in 0..50 {
        assert_eq!(slow.line(), "VALUE large 0 500000");
        assert_eq!(slow.line().len(), 500_000);
        assert_eq!(slow.line(), "END");
    }
}

#[test]
fn writes_go_on_without_kafka_and_their_keys_are_produced_when_it_is_back() {
    let _gate = shared();
    let broker = Broker::start();
    let region = alone(
        &broker.client(),
        CacheSpec::new(SESSIONS).front_door(),
        &[
            ("front_door.event_timeout", "\"500ms\""),
            ("front_door.max_queued_events", "100"),
        ],
    );
    let mut client = Client::at(&region);
    assert_eq!(client.set("before", "x"), "STORED");
    region.wait_until("the first event is there", LIMIT, |status| {
        status["front_doors"][0]["acknowledged"] == 1
    });
    broker.freeze();
    for n in 0..1000 {
        assert_eq!(client.set(&format!("key:{}", n % 250), "x"), "STORED");
    }
    for n in 0..250 {
        assert_eq!(client.ask(&format!("touch key:{n} 500")), "TOUCHED");
    }
    region.wait_until("every key is remembered", LIMIT, |status| {
        let door = &status["front_doors"][0];
        door["unsent_keys"] == 250 && door["kafka_away"] == true
    });
    broker.thaw();
    region.wait_until("all are produced", LIMIT, |status| {
        let door = &status["front_doors"][0];
        door["unsent_keys"] == 0 && door["queued_events"] == 0 && door["kafka_away"] == false
    });
    let events = broker.client().read_all(&region.cache(SESSIONS).topic);
    let mut keys: Vec<Vec<u8>> = events.iter().map(|record| record.key().to_vec()).collect();
    keys.sort();
    keys.dedup();
    assert_eq!((keys.len(), count(&region, "lost")), (251, 0));
    // A touch alone would leave the peers with the old value.
    let mut set: Vec<&[u8]> = (events.iter())
        .filter(|record| evrepl::event::decode(record.value()).unwrap().op.name() == "set")
        .map(|record| record.key())
        .collect();
    set.sort();
    set.dedup();
    assert_eq!(set.len(), 251);
}

#[test]
fn of_two_touches_the_peer_has_the_later_one_whichever_kafka_took_first() {
    let _gate = shared();
    let broker = Broker::start();
    let kafka = broker.client();
    let spec = || CacheSpec::new(SESSIONS).front_door().option("on_set", "\"invalidate\"");
    let pair = TwoRegionsSpec::new()
        .one_way()
        .us(move |us| us.kafka(&kafka).cache(spec()).set("front_door.event_timeout", "\"2s\""))
        .eu(move |eu| eu.cache(spec()))
        .start();
    let (mut us, mut there) = (Client::at(&pair.us), pair.eu.cache(SESSIONS).client());
    let keys = evrepl_lab::numbered("key", 20);
    for key in &keys {
        assert_eq!(us.set(key, "of us"), "STORED");
    }
    arrived(&pair);
    for key in &keys {
        there.set(key.as_bytes(), b"of eu", 0, 300).unwrap();
    }
    let mut touch = |seconds: u32| {
        for key in &keys {
            assert_eq!(us.ask(&format!("touch {key} {seconds}")), "TOUCHED");
        }
    };

    broker.freeze();
    touch(5000);
    pair.us.wait_until("they are remembered", LIMIT, |status| {
        let door = &status["front_doors"][0];
        // Some are tried again.
        door["remembered"] == 20 && door["unsent_keys"].as_u64() >= Some(10)
    });
    // These wait to be sent, and those for Kafka to be back.
    touch(60);
    broker.thaw();
    arrived(&pair);
    for key in &keys {
        let ttl = there.ttl(key.as_bytes()).unwrap().unwrap();
        assert!((1..=60).contains(&ttl), "{key}: {ttl} s");
    }
}

#[test]
fn what_a_full_queue_had_no_room_for_comes_as_fast_as_kafka_takes_it() {
    // One in each look, ten times a second, would take longer than the limit.
    const KEYS: usize = 650;
    let _gate = shared();
    let region = alone(
        &evrepl_lab::broker().client(),
        CacheSpec::new(SESSIONS).front_door(),
        &[("front_door.max_queued_events", "1")],
    );
    let mut client = Client::at(&region);
    let sets = (0..KEYS).map(|n| format!("set key:{n} 0 0 1\r\nx\r\n"));
    client.send(sets.collect::<String>());
    (0..KEYS).for_each(|_| assert_eq!(client.line(), "STORED"));
    region.wait_until("all are produced", LIMIT, |status| {
        status["front_doors"][0]["acknowledged"] == KEYS && status["front_doors"][0]["unsent_keys"] == 0
    });
    assert!(count(&region, "remembered") > KEYS as u64 / 2);
}

#[test]
fn a_topic_that_is_missing_is_the_trouble_of_its_own_cache_alone() {
    const MISSING: &str = "lab.missing";
    let _gate = shared();
    let broker = Broker::start_with(
        &[("auto.create.topics.enable", "false")],
        &["-Xmx512m", "-XX:TieredStopAtLevel=1"],
    );
    let region = evrepl_lab::RegionBuilder::new("us-east-1")
        .kafka(&broker.client())
        .cache(CacheSpec::new("missing").front_door().topic(MISSING))
        .cache(CacheSpec::new(SESSIONS).front_door())
        .set("front_door.event_ack", "\"acked\"")
        .set("front_door.on_kafka_down", "\"refuse\"")
        .set("front_door.event_timeout", "\"500ms\"")
        .start();
    let mut sessions = Client::at(&region);
    let mut missing = Client::of(&region.cache("missing").front_door());
    assert!(missing.set("key", "x").starts_with("SERVER_ERROR"));
    region.wait_until("it is known", LIMIT, |status| {
        status["front_doors"][0]["kafka_away"] == true
    });
    for n in 0..20 {
        assert_eq!(sessions.set(&format!("key:{n}"), "x"), "STORED");
        assert!(missing.set("key", "x").starts_with("SERVER_ERROR"));
    }
    let doors = &region.status()["front_doors"];
    assert_eq!(
        (&doors[1]["refused"], &doors[1]["kafka_away"]),
        (&0.into(), &false.into())
    );
    assert!(doors[0]["refused"].as_u64() > Some(0), "{doors}");
    broker.client().create_topic(MISSING, 4, &[]);
    wait_until("the topic is there", LIMIT, || missing.set("key", "x") == "STORED");
}

#[test]
fn events_that_are_lost_are_counted_once_and_said_to_the_last_one() {
    let _gate = shared();
    let broker = Broker::start();
    let settings = [
        ("front_door.event_timeout", "\"500ms\""),
        ("front_door.max_queued_events", "10"),
        ("front_door.max_unsent_keys", "20"),
        ("drain.grace_period", "\"1s\""),
    ];
    let region = alone(&broker.client(), CacheSpec::new(SESSIONS).front_door(), &settings);
    let mut client = Client::at(&region);
    assert_eq!(client.set("before", "x"), "STORED");
    region.wait_until("the first event is there", LIMIT, |status| {
        status["front_doors"][0]["acknowledged"] == 1
    });
    broker.freeze();
    let mut write = |round: &str, keys: usize| {
        let sets = (0..keys).map(|n| format!("set {round}:{n} 0 0 1\r\nx\r\n"));
        client.send(sets.collect::<String>());
        (0..keys).for_each(|_| assert_eq!(client.line(), "STORED"));
    };
    write("first", 300);
    // One key is tried again and again; the others wait.
    for unsent in [20, 19, 20, 19] {
        region.wait_until("one is tried again", LIMIT, |status| {
            status["front_doors"][0]["unsent_keys"] == unsent && status["front_doors"][0]["lost"] == 280
        });
    }
    write("second", 100);
    region.wait_until("each is lost", LIMIT, |status| status["front_doors"][0]["lost"] == 380);
    broker.thaw();
    region.wait_until("all others are produced", LIMIT, |status| {
        let door = &status["front_doors"][0];
        door["unsent_keys"] == 0 && door["queued_events"] == 0
    });
    assert_eq!(count(&region, "remembered"), 20);
    wait_until("all that were lost are said", LIMIT, || {
        region.log().contains("lost=380")
    });

    broker.freeze();
    write("third", 15);
    assert_eq!(region.terminate(), 75);
    let log = region.log();
    assert!(
        log.contains("could not be produced, they are lost") && !log.contains("replayed"),
        "{log}"
    );
}

#[test]
fn writes_are_refused_without_kafka_where_that_is_asked_for() {
    let _gate = shared();
    let broker = Broker::start();
    let settings = [
        ("front_door.event_timeout", "\"500ms\""),
        ("front_door.event_ack", "\"acked\""),
        ("front_door.on_kafka_down", "\"refuse\""),
    ];
    let cache = CacheSpec::new(SESSIONS).front_door();
    let region = alone(&broker.client(), cache, &settings);
    let mut client = Client::at(&region);
    assert_eq!(client.set("key", "old"), "STORED");
    broker.freeze();
    // This one has reached memcached: it is an error, and its event is not forgotten.
    assert_eq!(
        client.set("key", "between"),
        "SERVER_ERROR kafka has not acknowledged the event of this write"
    );
    assert_eq!(
        client.set("key", "new"),
        "SERVER_ERROR kafka is away, the write was not made"
    );
    client.send("get key\r\n");
    assert_eq!(client.until("END")[1], "between");
    broker.thaw();
    wait_until("writes are taken again", LIMIT, || {
        client.set("key", "newest") == "STORED"
    });
    region.wait_until("all are produced", LIMIT, |status| {
        status["front_doors"][0]["unsent_keys"] == 0
    });
    assert!(count(&region, "refused") > 0);
}

#[test]
fn a_fill_removes_no_peers_copy_where_sets_do() {
    let _gate = shared();
    let spec = || {
        CacheSpec::new(SESSIONS)
            .front_door()
            .option("on_set", "\"invalidate\"")
            .option("fill_commands", "[\"add\"]")
    };
    let pair = TwoRegionsSpec::new()
        .us(move |us| us.cache(spec()))
        .eu(move |eu| eu.cache(spec()))
        .start();
    let (mut us, mut eu) = (Client::at(&pair.us), Client::at(&pair.eu));
    // Both fill from their databases; neither takes it from the other.
    assert_eq!(us.ask("add user 0 0 1\r\n1"), "STORED");
    assert_eq!(us.ask("ms meta 1 ME\r\n1"), "HD");
    settled(&pair);
    assert_eq!(eu.ask("add user 0 0 1\r\n1"), "STORED");
    assert_eq!(eu.ask("ms meta 1 ME\r\n1"), "HD");
    settled(&pair);
    for key in ["user", "meta"] {
        us.send(format!("get {key}\r\n"));
        assert_eq!(us.until("END").len(), 2, "{key}");
    }
    // What is written anew is.
    assert_eq!(eu.set("user", "2"), "STORED");
    settled(&pair);
    assert_eq!(us.ask("get user"), "END");
}

#[test]
fn two_applications_write_at_two_front_doors_at_once() {
    let _gate = shared();
    let pair = pair(2).start();
    let keys: Vec<Vec<String>> = ["us", "eu"]
        .iter()
        .map(|region| (0..3000).map(|n| format!("{region}:{}", n % 500)).collect())
        .collect();
    std::thread::scope(|scope| {
        for (region, keys) in pair.both().into_iter().zip(&keys) {
            scope.spawn(move || {
                let mut client = Client::at(region);
                for (n, key) in keys.iter().enumerate() {
                    let said = match n % 7 {
                        6 => client.ask(&format!("delete {key}")),
                        _ => client.set(key, &format!("{n}")),
                    };
                    assert!(["STORED", "DELETED", "NOT_FOUND"].contains(&&*said), "{said}");
                }
            });
        }
    });
    settled(&pair);
    assert_same(&pair.both(), SESSIONS, &keys.concat());
}

#[test]
fn the_front_door_leaves_when_its_clients_have_their_answers() {
    let _gate = shared();
    let pair = pair(1).one_way().start();
    let mut client = Client::at(&pair.us);
    let sets: String = (0..500).map(|n| format!("set key:{n} 0 0 1\r\nx\r\n")).collect();
    client.send(&sets);
    assert_eq!(client.line(), "STORED");
    assert_eq!(pair.us.terminate(), 0);
    let rest = client.rest();
    let stored = 1 + rest.matches("STORED\r\n").count();
    assert_eq!(rest.len(), (stored - 1) * 8, "{rest}");
    pair.us.start();
    // Not `settled`: what the process before this one had consumed is not in its numbers.
    arrived(&pair);
    let keys: Vec<String> = (0..stored).map(|n| format!("key:{n}")).collect();
    assert_same(&pair.both(), SESSIONS, &keys);
}
