//! FrontDoorUpstream: the connection to one memcached server that all sessions of one thread share.
//!
//! In: commands of many clients, [`Forward`], a read's worth at a time. Out: the server's answers to each, [`Answers`], and an
//! event for every write that the server says has happened. What a client hears of a write waits for Kafka where
//! `front_door.event_ack` says so.
//! A connection that breaks, or does not answer within `memcached.timeout`, is given up: everything under way on it is answered
//! with an error, and for the writes among it, which may have run or may yet run, events are produced once the server has
//! answered a new connection and `agent.settle` has passed. Nothing is sent twice.
//! Restarts with the whole front door. Bounded by: what its sessions may have under way.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::pin::{Pin, pin};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as Task, Poll};
use std::time::Duration;

use actix::prelude::*;
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::config::{EventAck, OnKafkaDown};
use crate::event::{Op, TraceContext};
use crate::front_door::announcer::{AnnouncerHandle, Receipts};
use crate::front_door::answers::{self, Asked, Extent, Piece, Silence, Verdict};
use crate::front_door::binary::{self, TEMPORARY_FAILURE};
use crate::front_door::gets::{Gets, Got};
use crate::front_door::order::{Held, Part, Receipt};
use crate::front_door::out::Out;
use crate::front_door::recheck::Recheck;
use crate::front_door::sorted::{Sorted, Told};
use crate::front_door::text::{Hush, Span, Verb};
use crate::front_door::unsent::Said;
use crate::front_door::waits::{Letters, Waits};
use crate::front_door::{Charge, DoorShared, UpstreamState, UpstreamView};
use crate::memcached;
use crate::relay::wall_ms;
use crate::telemetry::{DoorWrite, RateLimit};

use super::front_door_session::FrontDoorSession;

/// Bytes asked of the socket at once.
const READ_BYTES: usize = 64 << 10;
/// Reads in one turn, before others get theirs.
const READS: usize = 16;
/// How often it is looked whether the server answers.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A receipt's number is that of its server, and one of the server's own below; it has 48 bits ([`AnnouncerHandle::announce`]).
const SERVER_SHIFT: u32 = 36;
const MAX_SERVER: Receipt = 0xfff;
/// A server that is away.
static AWAY: RateLimit = RateLimit::new();
/// One that is back.
static BACK: RateLimit = RateLimit::new();

/// One command, or a piece of one, whose answer is expected.
#[derive(Clone, Copy, Debug)]
pub struct Expect {
    /// What was asked.
    pub asked: Asked,
    /// The number of the operation as the client sent it, of a binary command.
    pub sent: u8,
    /// What tells answers apart, of a binary command.
    pub opaque: [u8; 4],
    /// What the client does not want to be told.
    pub hush: Hush,
    /// Whether it is all of its command.
    pub piece: Piece,
    /// Its answer follows the one before, for the same client, without anybody else's between.
    pub together: bool,
    /// A barrier was sent behind it.
    pub barrier: bool,
    /// It gives its item a new expiry, if it finds one.
    pub touches: bool,
    /// It only fills the cache.
    pub fill: bool,
    /// It is not the client's own: its answer concerns nobody.
    pub silent: bool,
    /// A `get` of one key, which may travel with others ([`Sent::Gets`]).
    pub single: bool,
    /// The key as memcached sees it, of a command that may write and of a `single` one, in [`Forward::keys`].
    pub key: Span,
    /// The client's time to live.
    pub ttl: Option<u32>,
}

impl Expect {
    /// Whether its client hears nothing of it, not even an error.
    fn is_mute(&self) -> bool {
        self.silent || self.hush == Hush::Everything
    }
}

/// A part of what is sent.
#[derive(Clone, Debug)]
pub enum Sent {
    /// These bytes.
    Bytes(Bytes),
    /// `get`s of one key each: those of [`Forward::asked`] at these places.
    Gets(Range<u32>),
}

/// Commands of one client, in order.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Forward {
    /// Whose they are.
    pub session: Addr<FrontDoorSession>,
    /// The number that this server has there.
    pub server: u32,
    /// What is sent.
    pub parts: Vec<Sent>,
    /// What is expected.
    pub asked: Vec<Expect>,
    /// The keys of writes, and of single `get`s.
    pub keys: Vec<u8>,
    /// Traces, by the place of their commands; most often none.
    pub traces: Vec<(u32, TraceContext)>,
    /// What all of this holds.
    pub charge: Charge,
}

/// Answers of one server to one client, in order.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Answers {
    /// The server's number there.
    pub server: u32,
    /// What it answered.
    pub parts: Vec<Part>,
}

/// Kafka has acknowledged these events of a client's, or not.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Acknowledged(pub Letters);

/// Receipts have arrived.
#[derive(Message)]
#[rtype(result = "()")]
struct ReceiptsArrived;

/// Where librdkafka's thread leaves receipts.
struct Letterbox {
    letters: Mutex<Letters>,
    owner: Mutex<Option<Recipient<ReceiptsArrived>>>,
}

impl Receipts for Letterbox {
    fn arrived(&self, receipt: Receipt, acknowledged: bool) {
        let first = {
            let mut letters = self.letters.lock().unwrap_or_else(PoisonError::into_inner);
            letters.push((receipt, acknowledged));
            letters.len() == 1
        };
        // Once for all that come until they are fetched.
        if first && let Some(owner) = &*self.owner.lock().unwrap_or_else(PoisonError::into_inner) {
            owner.do_send(ReceiptsArrived);
        }
    }
}

/// A key that may have been written, or may yet be, and what its event says.
type Doubtful = (Vec<u8>, Said);

/// Commands under way.
struct Open {
    forward: Forward,
    /// How many of them are answered.
    answered: usize,
    since: Instant,
}

impl Open {
    /// The keys that what is not answered may have written.
    fn may_have_written(&self) -> impl Iterator<Item = Doubtful> {
        let unanswered = self.forward.asked[self.answered..].iter();
        unanswered.flat_map(|expect| may_have_written(expect, &self.forward.keys))
    }
}

type Dial = Pin<Box<dyn Future<Output = io::Result<(TcpStream, Silence)>>>>;

enum Link {
    /// Nobody needs it, or it is tried again then.
    Closed(Option<Instant>),
    Dialling(Dial),
    Open(TcpStream),
}

/// What a connection is made of; the same parts make the next one.
#[derive(Clone)]
pub struct UpstreamParts {
    /// What the front door's actors share.
    pub shared: Arc<DoorShared>,
    /// The cache, by its number in the configuration.
    pub cache: usize,
    /// The server, by its number in the cache.
    pub server: usize,
    /// For binary commands.
    pub binary: bool,
    /// What others see of it.
    pub view: Arc<UpstreamView>,
}

/// See the module.
pub struct FrontDoorUpstream {
    parts: UpstreamParts,
    address: String,
    link: Link,
    backoff: Backoff,
    silence: Silence,
    open: VecDeque<Open>,
    out: Out,
    /// The `get`s of one key in `out` and on their way.
    gets: Gets,
    inbox: BytesMut,
    /// How much of the answer at the beginning of `inbox` is known to be there.
    seen: usize,
    announcer: AnnouncerHandle,
    letterbox: Arc<Letterbox>,
    /// Our number among the receivers of receipts, where there are receipts.
    receiver: Option<usize>,
    last_receipt: Receipt,
    waits: Waits<Addr<FrontDoorSession>>,
    /// Writes that may have run, or may yet run, on a connection that was given up.
    unsettled: Vec<Doubtful>,
    /// Of these the server has answered a new connection since; they are announced then.
    settling: Option<(Instant, Vec<Doubtful>)>,
    /// Nothing is read from the server: clients do not read what is there.
    pause: Recheck,
    /// Meanwhile it has said something.
    answers_wait: bool,
    /// It could not be used.
    was_away: bool,
}

impl FrontDoorUpstream {
    /// A connection that is made when it is needed.
    pub fn new(parts: UpstreamParts) -> Self {
        let config = &parts.shared.config;
        let letterbox = Arc::new(Letterbox {
            letters: Mutex::default(),
            owner: Mutex::default(),
        });
        let acked = config.front_door.event_ack == EventAck::Acked;
        FrontDoorUpstream {
            address: config.caches[parts.cache].servers[parts.server].address.clone(),
            was_away: false,
            link: Link::Closed(None),
            backoff: Backoff::clamped(config.memcached.backoff_initial, config.memcached.backoff_max),
            silence: Silence::default(),
            open: VecDeque::new(),
            out: Out::default(),
            gets: Gets::new(config.front_door.merge_gets),
            inbox: BytesMut::new(),
            seen: 0,
            announcer: parts.shared.announcer.handle(),
            receiver: acked.then(|| {
                let receipts = Arc::downgrade(&letterbox);
                parts.shared.announcer.receiver(receipts)
            }),
            letterbox,
            last_receipt: 0,
            waits: Waits::default(),
            unsettled: Vec::new(),
            settling: None,
            pause: Recheck::default(),
            answers_wait: false,
            parts,
        }
    }

    fn dial(&self) -> Dial {
        let (address, binary) = (self.address.clone(), self.parts.binary);
        let timeout = self.parts.shared.config.memcached.connect_timeout;
        Box::pin(async move {
            let greeted = async {
                let mut stream = memcached::dial(&address).await?;
                let silence = match binary {
                    true => greet_binary(&mut stream).await?,
                    false => greet(&mut stream).await?,
                };
                Ok((stream, silence))
            };
            match tokio::time::timeout(timeout, greeted).await {
                Ok(result) => result,
                Err(_) => Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("no answer within {timeout:?}"),
                )),
            }
        })
    }

    /// Does what can be done now; called whenever anything has happened.
    fn turn(&mut self, task: &mut Task<'_>) {
        loop {
            match &mut self.link {
                Link::Closed(at) => {
                    if self.open.is_empty() && self.unsettled.is_empty() {
                        return;
                    }
                    if at.is_some_and(|at| Instant::now() < at) {
                        // Nobody waits for a server that was away a moment ago.
                        self.fail_all("cannot be reached", false);
                        return;
                    }
                    self.parts.view.set(UpstreamState::Connecting);
                    self.link = Link::Dialling(self.dial());
                }
                Link::Dialling(dial) => match dial.as_mut().poll(task) {
                    Poll::Pending => return,
                    Poll::Ready(Ok((stream, silence))) => {
                        self.silence = silence;
                        self.backoff.reset();
                        self.parts.view.set(UpstreamState::Open);
                        self.link = Link::Open(stream);
                        if std::mem::take(&mut self.was_away)
                            && let Some(unsaid) = BACK.due(&self.address)
                        {
                            let cache = &self.parts.shared.config.caches[self.parts.cache].name;
                            tracing::info!(cache, server = self.address, unsaid, "front door uses memcached again");
                        }
                        self.let_settle();
                        // What waited for the connection has waited for nothing else.
                        let now = Instant::now();
                        self.open.iter_mut().for_each(|open| open.since = now);
                    }
                    Poll::Ready(Err(error)) => {
                        self.say_away(&error);
                        self.close();
                        self.fail_all("cannot be reached", false);
                        return;
                    }
                },
                Link::Open(_) => {
                    if let Err(error) = self.exchange(task) {
                        self.give_up(&error);
                    }
                    return;
                }
            }
        }
    }

    fn exchange(&mut self, task: &mut Task<'_>) -> io::Result<()> {
        let Link::Open(stream) = &mut self.link else {
            return Ok(());
        };
        self.gets.close(&mut self.out);
        while !self.out.is_empty() {
            match (self.out).poll_write(|slices| Pin::new(&mut *stream).poll_write_vectored(task, slices)) {
                Poll::Ready(wrote) => wrote?,
                Poll::Pending => break,
            }
        }
        for _ in 0..READS {
            let Link::Open(stream) = &mut self.link else {
                return Ok(());
            };
            if !self.parts.shared.takes_answers() {
                self.pause.soon(task);
                self.answers_wait = stream.poll_read_ready(task).is_ready();
                return Ok(());
            }
            if self.pause.waits() {
                self.pause.done();
                // It was not the server that took so long.
                let now = Instant::now();
                self.open.iter_mut().for_each(|open| open.since = now);
            }
            if self.inbox.capacity() - self.inbox.len() < READ_BYTES / 16 {
                self.inbox.reserve(READ_BYTES);
            }
            match pin!(stream.read_buf(&mut self.inbox)).poll(task) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Poll::Ready(Ok(_)) => {
                    let missing = self.take_answers().map_err(io::Error::other)?;
                    if missing > READ_BYTES {
                        self.inbox.reserve(missing);
                    }
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(()),
            }
        }
        task.waker().wake_by_ref();
        Ok(())
    }

    /// Takes whole answers out of the inbox; says how many bytes the next one lacks at least.
    fn take_answers(&mut self) -> Result<usize, String> {
        let mut sorted = Sorted::default();
        let missing = self.sort_answers(&mut sorted);
        if let Some(open) = self.open.front() {
            sorted.finish(open.forward.server, open.forward.session.clone());
        }
        // Also when the next one makes no sense.
        let bytes = self.inbox.split_to(sorted.taken()).freeze();
        for (server, session, parts) in sorted.parts(&bytes) {
            session.do_send(Answers { server, parts });
        }
        // An inbox that was made for one large value is not kept.
        if self.inbox.is_empty() && self.inbox.capacity() > 4 * READ_BYTES {
            self.inbox = BytesMut::new();
        }
        missing
    }

    fn sort_answers(&mut self, sorted: &mut Sorted<Addr<FrontDoorSession>>) -> Result<usize, String> {
        let now = (wall_ms().max(0) as u64, Instant::now());
        while sorted.taken() < self.inbox.len() {
            let Some(open) = self.open.front() else {
                return Err("it says what nobody has asked for".to_owned());
            };
            let (expect, first) = (open.forward.asked[open.answered], open.answered == 0);
            let rest = &self.inbox[sorted.taken()..];
            if expect.single {
                let together = expect.together && !first;
                match self.gets.answer(expect.key.of_bytes(&open.forward.keys), rest)? {
                    Got::Missing(missing) => return Ok(missing),
                    Got::Value { value, end } => sorted.value(rest, value, end, together),
                    Got::Nothing { end } => sorted.value(rest, 0, end, together),
                    Got::Failed { line, last } => {
                        sorted.error(&rest[..line], last, together);
                    }
                }
            } else {
                let length = match answers::extent(rest, expect.asked.shape(expect.barrier), &mut self.seen)? {
                    Extent::Whole(length) => length,
                    Extent::Missing(missing) => return Ok(missing),
                };
                self.seen = 0;
                let answer = &rest[..length];
                if !belongs(answer, &expect) {
                    let said = String::from_utf8_lossy(&answer[..length.min(80)]);
                    return Err(format!("it answers {:?} to {:?}", said, expect.asked));
                }
                let verdict = judge(answer, &expect, self.silence);
                let told = match verdict.changed {
                    true => self.announce(sorted.taken(), length, &expect, now),
                    false => Told::AtOnce,
                };
                if matches!(expect.asked, Asked::Binary(_)) {
                    self.inbox[sorted.taken() + 1] = expect.sent;
                }
                sorted.add(length, verdict, expect.piece, told, expect.together && !first);
            }
            let Some(open) = self.open.front_mut() else { break };
            open.answered += 1;
            if open.answered == open.forward.asked.len()
                && let Some(open) = self.open.pop_front()
            {
                sorted.finish(open.forward.server, open.forward.session);
            }
        }
        Ok(0)
    }

    /// Produces the events of an answer; says when the client is told of it.
    fn announce(&mut self, at: usize, length: usize, expect: &Expect, (now_ms, now): (u64, Instant)) -> Told {
        let (said, refuses) = (said(expect), self.refuses());
        let shared = &self.parts.shared;
        let receipt = self
            .receiver
            .filter(|_| refuses || !shared.announcer.is_away(self.parts.cache))
            .map(|receiver| {
                self.last_receipt = (self.last_receipt + 1) & ((1 << SERVER_SHIFT) - 1);
                // A client has answers of several servers: their receipts differ.
                let server = self.parts.server as Receipt & MAX_SERVER;
                (receiver, server << SERVER_SHIFT | self.last_receipt)
            });
        let Some(open) = self.open.front() else {
            return Told::AtOnce;
        };
        let place = open.answered as u32;
        let trace = open
            .forward
            .traces
            .iter()
            .find(|(at, _)| *at == place)
            .map(|(_, trace)| trace);
        let (cache, mut events, mut produced) = (self.parts.cache, 0, 0);
        let announcer = &mut self.announcer;
        let mut announce = |key: &[u8]| {
            events += 1;
            produced += u32::from(announcer.announce(cache, key, said, trace, receipt, now_ms));
        };
        match expect.asked {
            Asked::Text(Verb::Gat | Verb::Gats) => {
                answers::keys_of_values(&self.inbox[at..at + length]).for_each(&mut announce);
            }
            _ => announce(expect.key.of_bytes(&open.forward.keys)),
        }
        shared.counts[cache].events.fetch_add(u64::from(events), Relaxed);
        if let Some(context) = trace {
            let config = &shared.config.caches[cache];
            shared.instruments.traces().written(&DoorWrite {
                context: *context,
                cache: &config.name,
                topic: &config.topic,
                server: &self.address,
                key: expect.key.of_bytes(&open.forward.keys),
                op: said.op.name(),
                times: [open.since, Instant::now()],
            });
        }
        let Some((_, receipt)) = receipt else {
            return Told::AtOnce;
        };
        let failure = (refuses && !expect.is_mute())
            .then(|| failure(expect, "kafka has not acknowledged the event of this write"));
        if produced == 0 {
            // Nothing will come back: it is known now.
            return failure.map_or(Told::AtOnce, Told::Instead);
        }
        let session = open.forward.session.clone();
        self.waits.add(receipt, session, produced, produced < events, now);
        Told::Later(Held { receipt, failure })
    }

    fn refuses(&self) -> bool {
        self.parts.shared.config.front_door.on_kafka_down == OnKafkaDown::Refuse
    }

    /// The connection is of no more use, and what was sent on it may have run.
    fn give_up(&mut self, error: &io::Error) {
        let quiet = self.open.is_empty();
        if !quiet || error.kind() != io::ErrorKind::UnexpectedEof {
            self.say_away(error);
        }
        self.close();
        if quiet {
            // memcached has closed a connection that nobody needed.
            self.link = Link::Closed(None);
            self.parts.view.set(UpstreamState::Idle);
        }
        self.fail_all("did not answer, the command may have run", true);
    }

    fn close(&mut self) {
        let wait = self.backoff.next(rand::random());
        self.link = Link::Closed(Some(Instant::now() + wait));
        self.parts.view.set(UpstreamState::Away);
        self.inbox = BytesMut::new();
        self.seen = 0;
        self.pause.done();
    }

    /// The server answers: what a lost connection left behind comes to rest from now on.
    fn let_settle(&mut self) {
        if self.settling.is_none() && !self.unsettled.is_empty() {
            let at = Instant::now() + self.parts.shared.config.agent.settle;
            self.settling = Some((at, std::mem::take(&mut self.unsettled)));
        }
    }

    /// These may have been written, or may yet be.
    fn doubt(&mut self, keys: impl Iterator<Item = Doubtful>) {
        let before = self.unsettled.len();
        self.unsettled.extend(keys);
        self.parts.shared.doubt(self.unsettled.len() - before);
    }

    fn announce_doubtful(&mut self, keys: Vec<Doubtful>) {
        let now_ms = wall_ms().max(0) as u64;
        let counts = &self.parts.shared.counts[self.parts.cache];
        counts.events.fetch_add(keys.len() as u64, Relaxed);
        let ignores_fills = self.parts.shared.config.caches[self.parts.cache].invalidates();
        for (key, said) in &keys {
            let said = said.late(ignores_fills);
            self.announcer.announce(self.parts.cache, key, said, None, None, now_ms);
        }
        self.parts.shared.settle(keys.len());
    }

    fn say_away(&mut self, error: &io::Error) {
        self.was_away = true;
        if let Some(unsaid) = AWAY.due(&self.address) {
            let cache = &self.parts.shared.config.caches[self.parts.cache].name;
            tracing::warn!(cache, server = self.address, %error, unsaid, "front door cannot use memcached");
        }
    }

    /// Answers everything that is under way with an error. `sent`: it may have reached the server.
    fn fail_all(&mut self, why: &str, sent: bool) {
        // What is answered with an error must not be sent to the next connection.
        self.out.clear();
        self.gets.clear();
        let reason = format!("memcached at {} {why}", self.address);
        let failed = std::mem::take(&mut self.open);
        if sent {
            self.doubt(failed.iter().flat_map(Open::may_have_written));
        }
        for open in failed {
            let Forward {
                session, server, asked, ..
            } = open.forward;
            let mut parts = Vec::new();
            for expect in &asked[open.answered..] {
                let bytes = match expect.is_mute() {
                    true => Bytes::new(),
                    false => failure(expect, &reason),
                };
                parts.push(Part {
                    commands: 1,
                    bytes,
                    piece: expect.piece,
                    failed: expect.piece != Piece::Whole,
                    held: None,
                });
            }
            let counts = &self.parts.shared.counts[self.parts.cache];
            counts.unreachable.fetch_add(parts.len() as u64, Relaxed);
            session.do_send(Answers { server, parts });
        }
    }

    /// Answers whose events have not been acknowledged in time: librdkafka looks only once a second what is too late. With `serve`
    /// nobody waits for a Kafka that is away.
    fn end_waits(&mut self, now: Instant) {
        let shared = &self.parts.shared;
        let limit = shared.config.front_door.event_timeout;
        let away = shared.announcer.is_away(self.parts.cache) && !self.refuses();
        let ended = self.waits.end(now, limit, away);
        if !ended.is_empty() {
            shared.announcer.overdue(self.parts.cache);
        }
        tell(ended);
    }

    /// Looks whether the server takes too long, or Kafka, and whether what a lost connection left behind has come to rest.
    fn look(&mut self) {
        let now = Instant::now();
        self.end_waits(now);
        let timeout = self.parts.shared.config.memcached.timeout;
        // While nothing is read it is not the server that takes so long, unless it has said nothing.
        let excused = self.pause.waits() && self.answers_wait;
        let late = !excused && self.open.front().is_some_and(|open| now - open.since > timeout);
        if late && matches!(self.link, Link::Open(_)) {
            self.give_up(&io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no answer within {timeout:?}"),
            ));
        }
        if let Some((_, keys)) = self.settling.take_if(|(at, _)| now >= *at) {
            self.announce_doubtful(keys);
        }
        if matches!(self.link, Link::Open(_)) {
            self.let_settle();
        }
    }
}

/// Learns what this memcached keeps silent about; it has answered when this returns.
async fn greet(stream: &mut TcpStream) -> io::Result<Silence> {
    let key = format!("evrepl:nothing:{:016x}", rand::random::<u64>());
    let text = format!("md {key} q\r\nmn\r\nma {key} q\r\nmn\r\n");
    stream.write_all(text.as_bytes()).await?;
    let mut answer = Vec::new();
    let lines = |answer: &[u8]| -> Option<Vec<String>> {
        let text = String::from_utf8_lossy(answer);
        let whole = text.rsplit_once('\n')?.0;
        let lines: Vec<String> = whole.lines().map(|line| line.trim_end().to_owned()).collect();
        // One without meta commands says ERROR to each.
        let count = |word: &str| lines.iter().filter(|line| line.as_str() == word).count();
        (count("MN") == 2 || count("ERROR") == 4).then_some(lines)
    };
    loop {
        if let Some(lines) = lines(&answer) {
            let barrier = lines.iter().position(|line| line == "MN").unwrap_or(lines.len());
            return Ok(Silence {
                delete_misses: barrier == 0,
                arithmetic_misses: lines.get(barrier + 1).is_some_and(|line| line == "MN"),
            });
        }
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if answer.len() > 4096 {
            return Err(io::Error::other("this is no memcached"));
        }
    }
}

async fn greet_binary(stream: &mut TcpStream) -> io::Result<Silence> {
    let mut request = [0; binary::HEADER_BYTES];
    (request[0], request[1]) = (binary::REQUEST, binary::Opcode::Noop as u8);
    stream.write_all(&request).await?;
    let mut answer = [0; binary::HEADER_BYTES];
    stream.read_exact(&mut answer).await?;
    match binary::response_length(&answer) {
        Ok(Some(binary::HEADER_BYTES)) => Ok(Silence::default()),
        _ => Err(io::Error::other("this memcached speaks no binary protocol")),
    }
}

/// The keys that a command without an answer may have written, with what their events say.
fn may_have_written(expect: &Expect, keys: &[u8]) -> Vec<Doubtful> {
    let named = expect.key.of_bytes(keys);
    let said = said(expect);
    match expect.asked {
        _ if expect.single || expect.key.is_empty() => Vec::new(),
        Asked::Text(Verb::Gat | Verb::Gats) => named
            .split(|&byte| byte == b' ')
            // It may have blanks more than it needs.
            .filter(|key| !key.is_empty())
            .map(|key| (key.to_vec(), said))
            .collect(),
        _ => vec![(named.to_vec(), said)],
    }
}

fn said(expect: &Expect) -> Said {
    let op = match expect.asked.op() {
        // Ours, in place of a fill that is too large: no more than it would have been.
        Op::Delete if expect.silent && expect.fill => Op::Set,
        op => op,
    };
    Said {
        op,
        ttl: expect.ttl,
        fill: expect.fill && op == Op::Set,
    }
}

fn judge(answer: &[u8], expect: &Expect, silence: Silence) -> Verdict {
    let verdict = match expect.asked {
        Asked::Text(verb) if expect.barrier => {
            answers::judge_barrier(answer, verb, expect.hush, expect.piece, expect.touches, silence)
        }
        Asked::Text(verb) => answers::judge(answer, verb, expect.hush, expect.piece, expect.touches, silence),
        Asked::Binary(opcode) => answers::judge_binary(answer, opcode, expect.hush == Hush::Usual, expect.piece),
    };
    Verdict {
        shown: if expect.silent { 0 } else { verdict.shown },
        ..verdict
    }
}

/// Whether an answer can be the one to this. If not, every later one would go to the wrong client.
fn belongs(answer: &[u8], expect: &Expect) -> bool {
    match expect.asked {
        Asked::Text(_) if expect.barrier => true,
        Asked::Text(verb) => answers::is_plausible(answer, verb),
        Asked::Binary(opcode) => binary::answers(answer, opcode, expect.opaque),
    }
}

/// An error in the client's protocol.
pub fn failure(expect: &Expect, reason: &str) -> Bytes {
    match expect.asked {
        Asked::Text(_) => format!("SERVER_ERROR {reason}\r\n").into(),
        Asked::Binary(_) => {
            let mut out = Vec::new();
            binary::put_response(
                &mut out,
                expect.sent,
                TEMPORARY_FAILURE,
                expect.opaque,
                reason.as_bytes(),
            );
            out.into()
        }
    }
}

/// The part of an actor that is polled with it.
struct Turn;

impl ActorFuture<FrontDoorUpstream> for Turn {
    type Output = ();

    fn poll(
        self: Pin<&mut Self>,
        act: &mut FrontDoorUpstream,
        _: &mut Context<FrontDoorUpstream>,
        task: &mut Task<'_>,
    ) -> Poll<()> {
        act.turn(task);
        Poll::Pending
    }
}

impl Drop for FrontDoorUpstream {
    /// What may have been written is not forgotten when the front door is rebuilt: a look that comes early is better than none.
    fn drop(&mut self) {
        let open = std::mem::take(&mut self.open);
        self.doubt(open.iter().flat_map(Open::may_have_written));
        let mut keys = std::mem::take(&mut self.unsettled);
        keys.extend(self.settling.take().into_iter().flat_map(|(_, keys)| keys));
        self.announce_doubtful(keys);
    }
}

impl Actor for FrontDoorUpstream {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        let owner = ctx.address().recipient();
        *self.letterbox.owner.lock().unwrap_or_else(PoisonError::into_inner) = Some(owner);
        ctx.spawn(Turn);
        ctx.run_interval(LOOK_EVERY, |act, _| act.look());
    }
}

impl Handler<Forward> for FrontDoorUpstream {
    type Result = ();

    fn handle(&mut self, mut forward: Forward, _: &mut Self::Context) {
        fail::fail_point!("front_door_upstream_forward");
        for part in std::mem::take(&mut forward.parts) {
            match part {
                Sent::Bytes(bytes) => {
                    self.gets.close(&mut self.out);
                    self.out.push(bytes);
                }
                Sent::Gets(places) => {
                    for expect in &forward.asked[places.start as usize..places.end as usize] {
                        self.gets.add(expect.key.of_bytes(&forward.keys), &mut self.out);
                    }
                }
            }
        }
        self.open.push_back(Open {
            forward,
            answered: 0,
            since: Instant::now(),
        });
    }
}

impl Handler<ReceiptsArrived> for FrontDoorUpstream {
    type Result = ();

    fn handle(&mut self, _: ReceiptsArrived, _: &mut Self::Context) {
        let letters = std::mem::take(&mut *self.letterbox.letters.lock().unwrap_or_else(PoisonError::into_inner));
        tell(self.waits.arrived(letters));
    }
}

fn tell(told: Vec<(Addr<FrontDoorSession>, Letters)>) {
    for (session, letters) in told {
        session.do_send(Acknowledged(letters));
    }
}
