//! A key's copy never goes back to an older state: not by a delayed batch, not by a clock that is wrong, not by a restarted
//! agent, not by two relays that carry the same key.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use evrepl::tls::{TlsMaterial, server_name};
use evrepl::wire::{
    self, Ack, CacheStatus, Codec, Decoder, Expiry, Frame, Hello, HelloAck, Item, ItemEncoder, ItemOp, Limits, Ping,
    Status,
};
use evrepl_lab::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

/// Generous: a machine that others load takes three times as long, and who waits in vain has failed anyway.
const LIMIT: Duration = Duration::from_secs(180);

const EU: &str = "eu-west-1";

/// A relay made by the test: it says exactly what it is told to, when it is told to, under the certificate of `us-east-1`.
pub(crate) struct FakeRelay {
    runtime: tokio::runtime::Runtime,
    stream: TlsStream<TcpStream>,
    buffer: BytesMut,
    decoder: Decoder,
    next_batch: u64,
    /// The last tick it has heard.
    tick: u64,
}

impl FakeRelay {
    /// Opens a session with the agent of `to`.
    pub(crate) fn dial(to: &Region) -> FakeRelay {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let certs = to.certs().path();
        let [certificate, key] = ["us-east-1.pem", "us-east-1.key"].map(|name| certs.join(name));
        let tls = TlsMaterial::load(&certificate, &key, &certs.join("ca.pem")).unwrap();
        let address = to.agent_address();
        let identity = to.name().to_string();
        let stream = runtime.block_on(async move {
            let tcp = TcpStream::connect(address).await.unwrap();
            tcp.set_nodelay(true).unwrap();
            tls.connect(server_name(&identity).unwrap(), tcp).await.unwrap()
        });
        let mut relay = FakeRelay {
            runtime,
            stream,
            buffer: BytesMut::new(),
            decoder: Decoder::new(Limits::default()),
            next_batch: 0,
            tick: 0,
        };
        relay.send(&Frame::Hello(Hello {
            min_version: wire::VERSION,
            max_version: wire::VERSION,
            software: "a test".into(),
            caches: vec!["sessions".into()],
            regions: vec!["us-east-1".into(), EU.into()],
            features: Vec::new(),
            max_frame_bytes: Limits::default().max_frame_bytes,
        }));
        let Frame::HelloAck(HelloAck { tick, caches, .. }) = relay.receive() else {
            panic!("an agent answers a hello with a hello-ack");
        };
        assert_eq!(caches, [CacheStatus::Accepted]);
        relay.tick = tick;
        relay
    }

    fn send(&mut self, frame: &Frame) {
        self.send_together(std::slice::from_ref(frame));
    }

    /// Sends frames in one piece.
    fn send_together(&mut self, frames: &[Frame]) {
        let mut bytes = BytesMut::new();
        frames.iter().for_each(|frame| wire::encode(frame, &mut bytes));
        let write = async {
            self.stream.write_all(&bytes).await.unwrap();
            self.stream.flush().await.unwrap();
        };
        self.runtime.block_on(write);
    }

    fn receive(&mut self) -> Frame {
        let read = async {
            loop {
                if let Some(frame) = self.decoder.decode(&mut self.buffer).unwrap() {
                    return frame;
                }
                let read = tokio::time::timeout(LIMIT, self.stream.read_buf(&mut self.buffer));
                let count = read.await.expect("the agent is silent").expect("the session broke");
                assert!(count > 0, "the agent closed the session");
            }
        };
        self.runtime.block_on(read)
    }

    /// Asks for the tick of now, as a relay does each second.
    fn hear(&mut self) -> u64 {
        self.send(&Frame::Ping(Ping {
            id: 1,
            sent_us: 0,
            offset_us: None,
        }));
        let Frame::Pong(pong) = self.receive() else {
            panic!("an agent answers a ping with a pong");
        };
        self.tick = pong.tick;
        pong.tick
    }

    /// What a look of this moment would say: stamped with the last tick that was heard.
    pub(crate) fn looks(&self, key: &str, value: Option<&str>) -> Item {
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
        Item {
            cache: 0,
            op: if value.is_some() { ItemOp::Set } else { ItemOp::Remove },
            key: Bytes::copy_from_slice(key.as_bytes()),
            value: Bytes::copy_from_slice(value.unwrap_or_default().as_bytes()),
            flags: 0,
            expiry: Expiry::Never,
            ver: now_ms << 16,
            origin: None,
            looked_at: self.tick,
            age_us: 0,
            produced_at_ms: now_ms,
            trace: None,
        }
    }

    /// Ships each item as a batch of its own, all in one piece, and waits for nothing.
    pub(crate) fn ship_apart(&mut self, items: &[Item]) {
        let frames = items.iter().zip(self.next_batch..).map(|(item, id)| {
            let mut encoder = ItemEncoder::default();
            encoder.push(&item.as_ref());
            Frame::Batch(encoder.finish(Codec::Raw).into_frame(id, 0))
        });
        let frames: Vec<Frame> = frames.collect();
        self.next_batch += frames.len() as u64;
        self.send_together(&frames);
    }

    /// Ships items as one batch and waits for the answer to all of them.
    fn ship(&mut self, items: &[Item]) -> Vec<Option<Status>> {
        let mut encoder = ItemEncoder::default();
        items.iter().for_each(|item| encoder.push(&item.as_ref()));
        let id = self.next_batch;
        self.next_batch += 1;
        self.send(&Frame::Batch(encoder.finish(Codec::Raw).into_frame(id, 0)));
        let mut answers: Vec<Option<Option<Status>>> = vec![None; items.len()];
        while answers.contains(&None) {
            let Frame::Ack(ack) = self.receive() else {
                panic!("an agent answers a batch with acks");
            };
            assert_eq!(ack.batch, id);
            self.note(&ack, &mut answers);
        }
        answers.into_iter().flatten().collect()
    }

    fn note(&mut self, ack: &Ack, answers: &mut [Option<Option<Status>>]) {
        ack.check(answers.len() as u32).unwrap();
        self.tick = self.tick.max(ack.tick);
        for (index, exception) in ack.finished() {
            answers[index as usize] = Some(exception.map(|exception| exception.status));
        }
    }
}

/// An item whose relay's clock is an hour ahead: everything in it that a clock wrote says it is the newest.
fn an_hour_ahead(item: Item) -> Item {
    const HOUR_MS: u64 = 3_600_000;
    Item {
        ver: item.ver + (HOUR_MS << 16),
        produced_at_ms: item.produced_at_ms + HOUR_MS,
        ..item
    }
}

/// A region that only receives, ready.
fn receiving_region() -> TwoRegions {
    let pair = TwoRegionsSpec::new()
        .one_way()
        .eu(|eu| eu.set("agent.threads", "3"))
        .build();
    pair.eu.start();
    ready(&pair.eu);
    pair
}

fn ready(region: &Region) {
    wait_until("the agent is ready", LIMIT, || {
        matches!(region.get("/readyz"), Ok((200, _)))
    });
}

fn value_at(region: &Region, key: &str) -> Option<String> {
    let found = region.cache("sessions").client().get(key.as_bytes()).unwrap();
    found.map(|(value, _)| String::from_utf8(value).unwrap())
}

const APPLIED: Option<Status> = None;

#[test]
fn an_older_look_that_arrives_late_is_refused_even_when_its_clock_is_an_hour_ahead() {
    let _gate = shared();
    let eu = receiving_region().eu;
    let (mut a, mut b) = (FakeRelay::dial(&eu), FakeRelay::dial(&eu));
    // The slots have a history: both relays wrote before.
    assert_eq!(a.ship(&[a.looks("set", Some("0"))]), [APPLIED]);
    b.hear();
    assert_eq!(b.ship(&[b.looks("removed", Some("0"))]), [APPLIED]);

    a.hear();
    let delayed = [
        a.looks("set", Some("old")),
        a.looks("removed", Some("old")),
        a.looks("untouched", Some("only a wrote it")),
    ]
    .map(an_hour_ahead);
    b.hear();
    assert_eq!(
        b.ship(&[b.looks("set", Some("new")), b.looks("removed", None)]),
        [APPLIED, APPLIED]
    );
    assert_eq!(
        a.ship(&delayed),
        [Some(Status::LookAgain), Some(Status::LookAgain), APPLIED],
        "older looks must be refused, and nothing else"
    );
    assert_eq!(value_at(&eu, "set").as_deref(), Some("new"));
    assert_eq!(value_at(&eu, "removed"), None, "a removal must not be undone");

    // It looks again, having heard the answer, and this time it is the newest.
    assert_eq!(a.ship(&[a.looks("set", Some("newest"))]), [APPLIED]);
    assert_eq!(value_at(&eu, "set").as_deref(), Some("newest"));
    let status = eu.status();
    assert_eq!(status["agent"]["items"]["look_again"], 2);
    assert_eq!(status["agent"]["items"]["applied"], 6);
}

#[test]
fn a_look_made_before_another_relays_write_is_refused_whoever_arrives_first() {
    let _gate = shared();
    let eu = receiving_region().eu;
    let (mut a, mut b) = (FakeRelay::dial(&eu), FakeRelay::dial(&eu));
    // Both look before either has written: nobody can tell whose look was the later one, so the second must look again.
    let (from_a, from_b) = (a.looks("key", Some("a")), b.looks("key", Some("b")));
    assert_eq!(b.ship(std::slice::from_ref(&from_b)), [APPLIED]);
    assert_eq!(a.ship(&[an_hour_ahead(from_a)]), [Some(Status::LookAgain)]);
    // Within one session the order of the items is the order of the looks.
    assert_eq!(
        a.ship(&[a.looks("key", Some("a2")), a.looks("key", Some("a3"))]),
        [APPLIED, APPLIED]
    );
    assert_eq!(value_at(&eu, "key").as_deref(), Some("a3"));
    assert_eq!(b.ship(&[from_b]), [Some(Status::LookAgain)]);
}

/// What threads beside a test go by; it falls when the test ends, also by a panic, or nobody could be joined.
struct Flag(AtomicBool);

impl Flag {
    fn raised() -> Flag {
        Flag(AtomicBool::new(true))
    }

    fn is_up(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Falls with the guard.
    fn guard(&self) -> Fall<'_> {
        Fall(self)
    }
}

struct Fall<'a>(&'a Flag);

impl Drop for Fall<'_> {
    fn drop(&mut self) {
        self.0.0.store(false, Ordering::Relaxed);
    }
}

/// Where a look is when its session ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum LookIs {
    /// Sent, and not acknowledged.
    OnItsWay,
    /// Still in the relay, in an open batch.
    InTheCoalescer,
}

/// A look that a real relay made in the session of an agent that is gone. The new agent counts its ticks anew, so the stamp of
/// the old session would say nothing there, or worse: that it is newer than what another relay has written meanwhile.
fn a_look_of_a_session_that_ended_is_made_again(place: LookIs) {
    // A batch of two leaves at once; one item alone stays in the coalescer for longer than the agent takes to restart.
    let pair = TwoRegionsSpec::new()
        .one_way()
        .proxied()
        .us(|us| us.extra("[batch]\nmax_items = 2\nlinger = \"4s\"\nidle_linger = \"4s\""))
        .start();
    let sampler = Sampler::start(&[&pair.us]);
    let mut writer = pair.us.writer("sessions");
    let mut two = |first: (&str, &str), second: (&str, &str)| {
        writer.set_all([first, second]);
    };
    // The relay has heard many ticks of the old agent, more than the new one has had when the old look would come.
    let mut other = FakeRelay::dial(&pair.eu);
    while other.hear() < 100 {
        other.ship(&[other.looks("elsewhere", Some("x"))]);
    }
    two(("warm:1", "x"), ("warm:2", "x"));
    settle(&[&pair.us]);

    if place == LookIs::OnItsWay {
        pair.us_to_eu().stall();
        two(("key", "old"), ("beside", "x"));
    } else {
        two(("key", "older"), ("key", "old"));
    }
    pair.us.wait_until("the relay has looked", LIMIT, |status| {
        status["flows"][0]["in_flight_bytes"].as_u64() > Some(0)
    });
    let mut application = pair.us.cache("sessions").client();
    application.set(b"key", b"new", 0, 0).unwrap();
    pair.eu.restart();
    ready(&pair.eu);
    let mut other = FakeRelay::dial(&pair.eu);
    assert_eq!(other.ship(&[other.looks("key", Some("new"))]), [APPLIED]);
    let watching = Flag::raised();
    thread::scope(|scope| {
        let watched = watching.guard();
        let watcher = scope.spawn(|| {
            let mut client = pair.eu.cache("sessions").client();
            let mut seen = Vec::new();
            while watching.is_up() {
                let value = client.get(b"key").unwrap().map(|(value, _)| value);
                if seen.last() != Some(&value) {
                    seen.push(value);
                }
            }
            seen
        });
        while other.hear() < 150 {
            other.ship(&[other.looks("elsewhere", Some("x"))]);
        }
        if place == LookIs::InTheCoalescer {
            pair.us.wait_until("the relay has a session again", LIMIT, |status| {
                status["flows"][0]["reconnects"].as_u64() > Some(0)
            });
            let flow = pair.us.flow(EU);
            assert_eq!(
                flow.json["with_permit"], 1,
                "too late: the batch has left\n{:#}",
                flow.json
            );
        }
        pair.us_to_eu().pass();
        pair.us
            .wait_until("the relay has done something about the old look", LIMIT, |status| {
                let flow = &status["flows"][0];
                flow["with_permit"] == 0 || flow["looks_again"]["session_lost"].as_u64() > Some(0)
            });
        // Company for the key that is looked at again, or it would stay in the coalescer once more.
        two(("more:1", "x"), ("more:2", "x"));
        two(("more:3", "x"), ("more:4", "x"));
        settle(&[&pair.us]);
        drop(watched);
        let seen = watcher.join().unwrap();
        assert_eq!(seen, [Some(b"new".to_vec())], "the key went back to an older state");
    });
    assert_eq!(value_at(&pair.eu, "key").as_deref(), Some("new"));
    accounted(&[&pair.us]);
    sampler.finish();
}

#[test]
fn a_look_on_its_way_to_an_agent_that_is_restarted_is_made_again() {
    let _gate = shared();
    a_look_of_a_session_that_ended_is_made_again(LookIs::OnItsWay);
}

#[test]
fn a_look_that_waits_in_the_relay_while_the_agent_is_restarted_is_made_again() {
    let _gate = shared();
    a_look_of_a_session_that_ended_is_made_again(LookIs::InTheCoalescer);
}

/// What was done to one key at the source, in order (`None`: it is not there), and what a reader of the destination saw.
#[derive(Clone, Debug)]
struct History {
    written: Vec<Option<u64>>,
    seen: Vec<Option<u64>>,
}

impl History {
    fn new() -> History {
        History {
            written: vec![None],
            seen: Vec::new(),
        }
    }

    /// The first thing seen that is older than what was seen before it: with its place among the things seen.
    fn step_back(&self) -> Option<usize> {
        let mut at = 0;
        self.seen.iter().position(|seen| {
            // The earliest state it can have been leaves most room for what follows.
            match self.written[at..].iter().position(|written| written == seen) {
                Some(ahead) => {
                    at += ahead;
                    false
                }
                None => true,
            }
        })
    }
}

#[test]
fn step_backs_are_noticed_also_across_a_delete() {
    let history = |seen: &[Option<u64>]| History {
        written: vec![None, Some(1), Some(2), None, Some(4), None],
        seen: seen.to_vec(),
    };
    assert_eq!(
        history(&[None, Some(1), Some(2), None, Some(4), None]).step_back(),
        None
    );
    assert_eq!(history(&[Some(1), None, Some(4)]).step_back(), None);
    assert_eq!(history(&[Some(2), Some(1)]).step_back(), Some(1));
    assert_eq!(history(&[Some(1), None, Some(2)]).step_back(), Some(2));
    assert_eq!(history(&[Some(4), Some(4), None, Some(4)]).step_back(), Some(3));
}

#[test]
fn nobody_sees_a_step_back_while_two_relays_with_four_lanes_carry_the_same_keys() {
    const KEYS: usize = 12;
    let _gate = shared();
    // A dead node's partitions go to the others after the session timeout, which is longer than the idle timeouts.
    let quick = "[kafka]\nsession_timeout = \"2s\"\n[link]\nidle_timeout = \"1500ms\"\nping_interval = \"300ms\"\n\
                 [agent]\nidle_timeout = \"1500ms\"";
    let pair = TwoRegionsSpec::new()
        .one_way()
        .lanes(4)
        .proxied()
        .extra(quick)
        .eu(|eu| eu.set("agent.threads", "4"))
        .start();
    // The second node has a longer way: what it saw before the first arrives after it.
    let longer_way = FaultProxy::start(&pair.eu.agent_address());
    longer_way.latency(Duration::from_millis(8));
    let second = pair.us.another_node("relay-2");
    second.set_env("EVREPL__PEER__0__ADDRESS", Some(&longer_way.address()));
    second.start();
    let group = pair.us.group(EU);
    let members = |count| pair.us.kafka().group(&group) == Some(("Stable".into(), count));
    wait_until("both nodes share the group", LIMIT, || members(2));
    let sampler = Sampler::start(&[&pair.us, &second]);

    let keys: Vec<String> = (0..KEYS).map(|n| format!("key:{n}")).collect();
    // Two writers with different partitioners, so that each key's events are in two partitions, with two relays.
    let partitioners = ["murmur2_random", "fnv1a_random"];
    let mut writers = partitioners.map(|name| pair.us.writer_with("sessions", &[("partitioner", name)]));
    let mut histories = vec![History::new(); KEYS];
    let (writing, watching) = (Flag::raised(), Flag::raised());
    // States that the reader has seen of the key it has seen least of.
    let least_seen = AtomicUsize::new(0);
    thread::scope(|scope| {
        let (written_on, watched) = (writing.guard(), watching.guard());
        let write = scope.spawn(|| {
            let mut written: Vec<Vec<Option<u64>>> = vec![vec![None]; KEYS];
            let mut counter = 0_u64;
            while writing.is_up() {
                // Set, set, delete on one key after the other; who says so changes with every step.
                let key = (counter / 3) as usize % KEYS;
                let writer = &mut writers[(counter % 2) as usize];
                let state = (counter % 3 != 2).then_some(counter);
                match state {
                    Some(counter) => writer.set(keys[key].as_bytes(), counter.to_string().as_bytes()),
                    None => writer.delete(keys[key].as_bytes()),
                }
                written[key].push(state);
                counter += 1;
            }
            writers.iter().for_each(Writer::flush);
            written
        });
        let watch = scope.spawn(|| {
            let mut client = pair.eu.cache("sessions").client();
            let mut seen: Vec<Vec<Option<u64>>> = vec![Vec::new(); KEYS];
            while watching.is_up() {
                for (seen, found) in seen.iter_mut().zip(client.get_many(&keys).unwrap()) {
                    let found = found.map(|(value, _)| String::from_utf8(value).unwrap().parse().unwrap());
                    if seen.last() != Some(&found) {
                        seen.push(found);
                    }
                }
                let least = seen.iter().map(Vec::len).min().unwrap_or(0);
                least_seen.store(least, Ordering::Relaxed);
            }
            seen
        });
        let finished = |region: &Region| region.flow(EU).finished();
        for node in [&pair.us, &second] {
            wait_until("both nodes work", LIMIT, || finished(node) > 10_000);
        }
        // One falls asleep with work in its hands; the other takes over; then it wakes up and goes on where it was.
        second.freeze();
        wait_until("the sleeper is out of the group", LIMIT, || members(1));
        let before = finished(&pair.us);
        wait_until("the other has taken over", LIMIT, || {
            finished(&pair.us) > before + 5_000
        });
        second.thaw();
        wait_until("both nodes share the group again", LIMIT, || members(2));
        let before = finished(&second);
        wait_until("the sleeper works again", LIMIT, || finished(&second) > before + 5_000);
        wait_until("the reader has seen enough to tell", LIMIT, || {
            least_seen.load(Ordering::Relaxed) > 100
        });
        drop(written_on);
        let written = write.join().unwrap();
        settle(&[&pair.us, &second]);
        drop(watched);
        let seen = watch.join().unwrap();
        for (history, (written, seen)) in histories.iter_mut().zip(written.into_iter().zip(seen)) {
            *history = History { written, seen };
        }
    });
    for (key, history) in keys.iter().zip(&histories) {
        if let Some(at) = history.step_back() {
            let around = &history.seen[at.saturating_sub(5)..(at + 3).min(history.seen.len())];
            panic!("{key} went back to an older state: ... {around:?} ...");
        }
    }
    assert_same(&pair.both(), "sessions", &keys);
    let refused = pair.eu.status()["agent"]["items"]["look_again"].as_u64();
    assert!(refused > Some(0), "the two relays never met on a key");
    sampler.finish();
}
