//! FrontDoorSession: one client at the front door.
//!
//! In: its bytes, and the servers' answers. Out: its commands to [`FrontDoorUpstream`], a read's worth at a time; its answers,
//! in its order.
//! It ends when the client does, when the client sends what no client would, or when it is idle for too long.
//! Bounded by: `front_door.max_pipelined` commands without an answer, [`MAX_UNREAD_BYTES`] of answers that it has not read (one
//! that does not read is not read from either, and holds nobody up), one value, and `front_door.max_buffered_bytes` of all
//! sessions. A client that does nothing holds no buffer.

use std::cell::RefCell;
use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context as Task, Poll};
use std::time::Duration;

use actix::prelude::*;
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::Instant;
use tokio_rustls::server::TlsStream;

use crate::config::OnKafkaDown;
use crate::event::TraceContext;
use crate::front_door::answers::{Asked, Piece};
use crate::front_door::base64;
use crate::front_door::binary::{self, Opcode};
use crate::front_door::order::Order;
use crate::front_door::out::Out;
use crate::front_door::recheck::Recheck;
use crate::front_door::text::{self, Hush, Parsed, Span, TextLimits, Verb};
use crate::front_door::{Charge, DoorShared, Place};
use crate::telemetry::event_trace::random_id;
use crate::telemetry::{RateLimit, Sampler};

use super::front_door_upstream::{Acknowledged, Answers, Expect, Forward, FrontDoorUpstream, Sent, failure};

/// Bytes asked of the socket at once.
const READ_BYTES: usize = 64 << 10;
/// Reads in one turn, before others get theirs.
const READS: usize = 4;
/// Answers that a client may leave unread before it is read no further.
const MAX_UNREAD_BYTES: usize = 256 << 10;
/// A list of keys that is longer is sent in pieces, if the server would not wait for it.
const PIECE_BYTES: usize = text::MAX_LINE_BYTES - 64;
/// The longest list of keys.
const MAX_LIST_BYTES: usize = 1 << 20;
/// And so much may be expected to come, as far as can be told from the answers before: what one client has under way on a
/// connection that it shares, all others wait for.
const MAX_EXPECTED_BYTES: usize = 512 << 10;
/// Of a client that has had no answer yet: it begins with four commands.
const UNKNOWN_ANSWER_BYTES: usize = MAX_EXPECTED_BYTES / 4;
/// A small command, and a key of usual length.
const COMMAND_BYTES: usize = 32;
const KEY_BYTES: usize = 24;

/// Behind what is not as clients write it.
const BARRIER: &[u8] = b"mn\r\n";
const TOO_LARGE: &[u8] = b"SERVER_ERROR object too large for cache\r\n";
/// A client for which bytes are held and that moves none for so long leaves, when others need the room.
const STUCK_FOR: Duration = Duration::from_secs(5);
/// The same, when nothing more is read from servers because of such clients.
const STUCK_FOR_ALL: Duration = Duration::from_secs(2);
static STUCK: RateLimit = RateLimit::new();
static FLUSHED: RateLimit = RateLimit::new();
const KAFKA_AWAY: &str = "kafka is away, the write was not made";

thread_local! {
    /// What all sessions of a thread read into.
    static SCRATCH: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// A client's connection.
pub enum ClientStream {
    /// In the clear.
    Tcp(TcpStream),
    /// On this machine.
    Unix(UnixStream),
    /// Encrypted.
    Tls(Box<TlsStream<TcpStream>>),
}

macro_rules! each {
    ($stream:expr, $inner:ident => $then:expr) => {
        match $stream {
            ClientStream::Tcp($inner) => $then,
            ClientStream::Unix($inner) => $then,
            ClientStream::Tls($inner) => $then,
        }
    };
}

impl ClientStream {
    fn poll_read_into(&mut self, task: &mut Task<'_>, buffer: &mut BytesMut) -> Poll<io::Result<usize>> {
        fn read(
            stream: &mut (impl AsyncRead + Unpin),
            task: &mut Task<'_>,
            buffer: &mut BytesMut,
        ) -> Poll<io::Result<usize>> {
            pin!(stream.read_buf(buffer)).poll(task)
        }
        each!(self, stream => read(stream, task, buffer))
    }

    fn poll_write(&mut self, task: &mut Task<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        each!(self, stream => Pin::new(stream).poll_write_vectored(task, slices))
    }

    fn poll_flush(&mut self, task: &mut Task<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_flush(task))
    }

    fn poll_shutdown(&mut self, task: &mut Task<'_>) -> Poll<io::Result<()>> {
        each!(self, stream => Pin::new(stream).poll_shutdown(task))
    }
}

/// What a session is made of.
pub struct SessionParts {
    /// What the front door's actors share.
    pub shared: Arc<DoorShared>,
    /// The cache, by its number in the configuration.
    pub cache: usize,
    /// Everything that it writes only fills the cache.
    pub fills: bool,
    /// The connections to the cache's servers, of this thread: for text, and for binary.
    pub text: Arc<[Addr<FrontDoorUpstream>]>,
    /// See `text`.
    pub binary: Arc<[Addr<FrontDoorUpstream>]>,
    /// The client.
    pub stream: ClientStream,
    /// Its right to be here.
    pub place: Place,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Unknown,
    Text,
    Binary,
}

/// As many bytes are held for clients as may be: who holds some and has stopped reading, or sending, leaves.
#[derive(Message)]
#[rtype(result = "()")]
pub struct MakeRoom {
    /// All clients wait for it.
    pub pressing: bool,
}

/// Leave, as soon as there is nothing to answer.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Leave;

/// See the module.
pub struct FrontDoorSession {
    parts: SessionParts,
    id: u64,
    protocol: Protocol,
    /// The beginning of a command that is not whole.
    inbox: BytesMut,
    /// How much more it needs at least, if that is known.
    missing: usize,
    /// What came while the client had too much under way.
    stalled: Bytes,
    /// Bytes of a value that is too large, to be thrown away.
    skip: usize,
    order: Order,
    out: Out,
    /// About the size of an answer, of late.
    answer_bytes: usize,
    charge: Charge,
    /// The socket may hold some of what was written.
    unflushed: bool,
    /// It was not read when it was last looked at, for it has too much under way.
    closed: bool,
    /// Nothing more is read: the connection ends behind the answers.
    leaving: bool,
    /// Looks whether there is room again, while there is none.
    room: Recheck,
    active: Instant,
    sampler: Sampler,
}

/// Commands for one server, from one read.
#[derive(Default)]
struct Building {
    parts: Vec<Sent>,
    asked: Vec<Expect>,
    keys: Vec<u8>,
    traces: Vec<(u32, TraceContext)>,
    /// What is sent as it was read, and is not among the parts yet.
    run: Option<(usize, usize)>,
    bytes: usize,
}

impl Building {
    fn as_is(&mut self, data: &Bytes, start: usize, end: usize) {
        self.bytes += end - start;
        match &mut self.run {
            Some((_, last)) if *last == start => *last = end,
            _ => {
                self.close(data);
                self.run = Some((start, end));
            }
        }
    }

    fn own(&mut self, data: &Bytes, bytes: Vec<u8>) {
        self.close(data);
        self.bytes += bytes.len();
        self.parts.push(Sent::Bytes(bytes.into()));
    }

    fn close(&mut self, data: &Bytes) {
        if let Some((start, end)) = self.run.take() {
            self.parts.push(Sent::Bytes(data.slice(start..end)));
        }
    }

    /// Asks for one key with `get`, perhaps together with others.
    fn get(&mut self, data: &Bytes, key: &[u8], mut expect: Expect) {
        self.close(data);
        self.bytes += key.len();
        (expect.single, expect.key) = (true, self.key(key, false));
        let at = self.asked.len() as u32;
        self.asked.push(expect);
        match self.parts.last_mut() {
            Some(Sent::Gets(places)) if places.end == at => places.end += 1,
            _ => self.parts.push(Sent::Gets(at..at + 1)),
        }
    }

    /// The command that is asked next begins a trace.
    fn trace(&mut self) {
        let context = TraceContext {
            trace_id: random_id(),
            span_id: random_id(),
            flags: TraceContext::SAMPLED,
        };
        self.traces.push((self.asked.len() as u32, context));
    }

    /// Takes a copy of a key.
    fn key(&mut self, key: &[u8], is_base64: bool) -> Span {
        let at = self.keys.len();
        // One that is not base64 is refused by memcached.
        if !is_base64 || !base64::decode(key, &mut self.keys) {
            self.keys.extend_from_slice(key);
        }
        Span {
            at: at as u32,
            length: (self.keys.len() - at) as u32,
        }
    }
}

impl FrontDoorSession {
    /// A session that begins.
    pub fn new(parts: SessionParts) -> Self {
        FrontDoorSession {
            sampler: Sampler::new(parts.shared.config.front_door.trace_ratio),
            charge: Charge::new(&parts.shared, 0),
            parts,
            id: 0,
            protocol: Protocol::Unknown,
            inbox: BytesMut::new(),
            missing: 0,
            stalled: Bytes::new(),
            skip: 0,
            order: Order::default(),
            out: Out::default(),
            answer_bytes: UNKNOWN_ANSWER_BYTES,
            unflushed: false,
            closed: false,
            leaving: false,
            room: Recheck::default(),
            active: Instant::now(),
        }
    }

    /// Does what can be done now; called whenever anything has happened.
    fn turn(&mut self, ctx: &mut Context<Self>, task: &mut Task<'_>) {
        let done = self
            .write(task)
            .and_then(|()| self.read(ctx, task))
            .and_then(|()| self.write(task));
        if done.is_err() {
            ctx.stop();
            return;
        }
        self.charge.set(
            self.out.len() + self.order.unsent(),
            self.inbox.capacity() + self.stalled.len(),
        );
        if self.leaving && self.order.is_empty() && self.out.is_empty() && !self.unflushed {
            let _ = self.parts.stream.poll_shutdown(task);
            ctx.stop();
        } else if self.closed && self.is_open() {
            // What stood in the way has been written since: nobody else will say so.
            task.waker().wake_by_ref();
        }
    }

    fn write(&mut self, task: &mut Task<'_>) -> io::Result<()> {
        loop {
            while self.out.len() < MAX_UNREAD_BYTES
                && let Some(bytes) = self.order.pop()
            {
                self.out.push(bytes);
            }
            if self.out.is_empty() {
                break;
            }
            match self.out.poll_write(|slices| self.parts.stream.poll_write(task, slices)) {
                Poll::Ready(wrote) => wrote?,
                Poll::Pending => return Ok(()),
            }
            self.active = Instant::now();
            self.unflushed = true;
        }
        // TLS has taken more than the socket: it is asked until it has nothing left.
        if self.unflushed
            && let Poll::Ready(result) = self.parts.stream.poll_flush(task)
        {
            self.unflushed = false;
            result?;
        }
        Ok(())
    }

    /// Whether the client may have more under way.
    fn is_open(&self) -> bool {
        let commands = self.order.commands();
        let expected = commands as usize * self.answer_bytes;
        !self.leaving
            && commands < self.parts.shared.config.front_door.max_pipelined
            && (commands == 0 || expected < MAX_EXPECTED_BYTES)
            && self.out.len() + self.order.unsent() < MAX_UNREAD_BYTES
    }

    /// Whether there is room for one more command. Without any, a client that has nothing under way and gets small answers may
    /// still ask for one: those that hold the room delay nobody but their like.
    fn has_room(&self) -> bool {
        let small = self.answer_bytes <= UNKNOWN_ANSWER_BYTES;
        self.parts.shared.has_room()
            || (small && self.order.commands() == 0 && self.order.unsent() == 0 && self.out.is_empty())
    }

    fn read(&mut self, ctx: &mut Context<Self>, task: &mut Task<'_>) -> io::Result<()> {
        for _ in 0..READS {
            self.closed = !self.is_open();
            if self.closed {
                return Ok(());
            }
            // The rest of a value is read in any case.
            if (self.inbox.is_empty() || !self.stalled.is_empty()) && !self.has_room() {
                self.room.soon(task);
                return Ok(());
            }
            self.room.done();
            if !self.stalled.is_empty() {
                let data = std::mem::take(&mut self.stalled);
                self.take(data, ctx);
                continue;
            }
            match self.fill(task) {
                Poll::Ready(Ok(Some(data))) => {
                    self.active = Instant::now();
                    self.take(data, ctx);
                }
                // Of a large value, or nothing but it.
                Poll::Ready(Ok(None)) if self.missing > 0 => {}
                Poll::Ready(Ok(None)) => {
                    // It sends no more: it gets its answers, as from memcached.
                    self.leaving = true;
                    return Ok(());
                }
                Poll::Ready(Err(error)) => return Err(error),
                Poll::Pending => return Ok(()),
            }
        }
        task.waker().wake_by_ref();
        Ok(())
    }

    /// Reads once; what is whole enough to be looked at comes out. Nothing comes out when a value needs more, and when the
    /// client has said its last.
    fn fill(&mut self, task: &mut Task<'_>) -> Poll<io::Result<Option<Bytes>>> {
        if self.inbox.len() + self.missing > READ_BYTES {
            // A buffer of its own, that nothing is copied out of.
            if self.inbox.capacity() < self.inbox.len() + self.missing {
                self.inbox.reserve(self.missing);
            }
            return self.parts.stream.poll_read_into(task, &mut self.inbox).map_ok(|count| {
                self.active = Instant::now();
                if count == 0 {
                    self.missing = 0;
                    return None;
                }
                self.missing = self.missing.saturating_sub(count);
                (self.missing == 0).then(|| std::mem::take(&mut self.inbox).freeze())
            });
        }
        SCRATCH.with_borrow_mut(|scratch| {
            scratch.clear();
            if scratch.capacity() < self.inbox.len() + READ_BYTES / 8 {
                scratch.reserve(READ_BYTES);
            }
            scratch.extend_from_slice(&self.inbox);
            self.parts.stream.poll_read_into(task, scratch).map_ok(|count| {
                self.missing = 0;
                if count == 0 {
                    return None;
                }
                self.inbox = BytesMut::new();
                Some(scratch.split().freeze())
            })
        })
    }

    /// Takes the commands in `data`.
    fn take(&mut self, data: Bytes, ctx: &mut Context<Self>) {
        let mut at = self.skip.min(data.len());
        self.skip -= at;
        let servers = self.parts.text.len();
        let mut building: Vec<Building> = std::iter::repeat_with(Building::default).take(servers).collect();
        if let [only] = &mut building[..] {
            // About as many as there are: growing takes longer than a little too much.
            let commands = (data.len() / COMMAND_BYTES).clamp(1, 64);
            only.asked.reserve(commands);
            only.keys.reserve(commands * KEY_BYTES);
        }
        self.missing = 0;
        if self.protocol == Protocol::Unknown && at < data.len() {
            self.protocol = match data[at] == binary::REQUEST {
                true => Protocol::Binary,
                false => Protocol::Text,
            };
        }
        while at < data.len() {
            if !self.is_open() || !self.has_room() {
                // Those of a client that leaves are nobody's any more.
                if !self.leaving {
                    self.stalled = data.slice(at..);
                }
                break;
            }
            let taken = match self.protocol {
                Protocol::Binary => self.take_binary(&data, at, &mut building),
                _ => self.take_text(&data, at, &mut building),
            };
            let Some(taken) = taken else {
                let rest = &data[at..];
                let mut inbox =
                    BytesMut::with_capacity(rest.len() + if self.missing > READ_BYTES { self.missing } else { 0 });
                inbox.extend_from_slice(rest);
                self.inbox = inbox;
                break;
            };
            at += taken;
            if at > data.len() {
                self.skip = at - data.len();
                break;
            }
        }
        for (server, building) in building.into_iter().enumerate() {
            self.send(&data, server, building, ctx);
        }
    }

    fn send(&self, data: &Bytes, server: usize, mut building: Building, ctx: &mut Context<Self>) {
        if building.asked.is_empty() {
            return;
        }
        building.close(data);
        let commands = building.asked.len();
        let upstreams = match self.protocol {
            Protocol::Binary => &self.parts.binary,
            _ => &self.parts.text,
        };
        upstreams[server].do_send(Forward {
            session: ctx.address(),
            server: server as u32,
            parts: building.parts,
            asked: building.asked,
            keys: building.keys,
            traces: building.traces,
            // With what will come of it, as far as can be told: it may all be there before the client reads any of it.
            charge: Charge::new(
                &self.parts.shared,
                building.bytes + (commands * self.answer_bytes).min(MAX_EXPECTED_BYTES),
            ),
        });
    }

    fn count(&self, verb: Verb) {
        self.parts.shared.counts[self.parts.cache].commands[verb as usize].fetch_add(1, Relaxed);
    }

    /// Whether a write must be refused now, since its event could not be produced.
    fn refuses(&self) -> bool {
        let shared = &self.parts.shared;
        let refuses = shared.config.front_door.on_kafka_down == OnKafkaDown::Refuse && !shared.announcer.takes();
        if refuses {
            shared.counts[self.parts.cache].refused.fetch_add(1, Relaxed);
        }
        refuses
    }

    /// Whether a trace begins with this write.
    fn traces(&mut self, opaque: &[u8]) -> bool {
        let prefix = self.parts.shared.config.front_door.trace_opaque.as_ref();
        self.sampler.draw() || prefix.is_some_and(|prefix| opaque.starts_with(prefix.as_bytes()))
    }

    fn fills(&self, verb: Verb, adds: bool) -> bool {
        let cache = &self.parts.shared.config.caches[self.parts.cache];
        self.parts.fills || cache.fills(verb.name()) || (adds && cache.fills(Verb::Add.name()))
    }

    fn server_of(&self, key: &[u8]) -> usize {
        match self.parts.text.len() {
            1 => 0,
            _ => self.parts.shared.rings[self.parts.cache].server_of(key),
        }
    }

    /// The server of a key as a text client sends it; without a key, the first one.
    fn server_of_text(&self, key: &[u8], is_base64: bool) -> usize {
        match (key.is_empty(), is_base64) {
            (true, _) => 0,
            (false, false) => self.server_of(key),
            // As memcached sees it.
            (false, true) => {
                let mut plain = Vec::new();
                match base64::decode(key, &mut plain) {
                    true => self.server_of(&plain),
                    false => 0,
                }
            }
        }
    }

    /// Takes one command of a text client; gives the bytes that it takes, or nothing if it is not whole.
    fn take_text(&mut self, data: &Bytes, at: usize, building: &mut [Building]) -> Option<usize> {
        let limits = TextLimits {
            line_bytes: MAX_LIST_BYTES,
            value_bytes: self.parts.shared.config.caches[self.parts.cache].max_value_bytes,
        };
        let bytes = &data[at..];
        let command = match text::parse(bytes, limits) {
            Parsed::Forward(command) => command,
            Parsed::Incomplete { missing } => {
                self.missing = missing;
                return None;
            }
            Parsed::Answer { length, answer } => {
                self.order.answer(Bytes::from_static(answer));
                return Some(length);
            }
            Parsed::TooLarge(command) => {
                self.text_too_large(data, bytes, &command, building);
                return Some(command.length);
            }
            Parsed::Quit | Parsed::Nonsense => {
                self.leaving = true;
                return Some(bytes.len());
            }
        };
        self.count(command.verb);
        let writes = command.verb.writes() && (command.verb != Verb::MetaGet || command.touches);
        if writes && self.refuses() {
            if command.hush != Hush::Everything {
                self.order.answer(format!("SERVER_ERROR {KAFKA_AWAY}\r\n").into());
            }
            return Some(command.length);
        }
        match command.verb {
            Verb::FlushAll | Verb::Verbosity => self.text_to_all(data, at, &command, building),
            verb if verb.takes_keys() => self.text_list(data, at, &command, building),
            _ => self.text_keyed(data, at, &command, writes, building),
        }
        Some(command.length)
    }

    fn expect(&self, command: &text::Command, piece: Piece, together: bool) -> Expect {
        Expect {
            asked: Asked::Text(command.verb),
            sent: 0,
            opaque: [0; 4],
            hush: command.hush,
            piece,
            together,
            barrier: false,
            touches: command.touches,
            fill: self.fills(command.verb, command.adds),
            silent: false,
            single: false,
            key: Span::default(),
            ttl: command.ttl,
        }
    }

    /// A command of one key, or of none: then the first server answers it.
    fn text_keyed(
        &mut self,
        data: &Bytes,
        at: usize,
        command: &text::Command,
        writes: bool,
        building: &mut [Building],
    ) {
        let bytes = &data[at..];
        let key = command.key.of_bytes(bytes);
        let server = self.server_of_text(key, command.base64);
        let together = self.order.ask(server as u32);
        let mut expect = self.expect(command, Piece::Whole, together);
        // Whether a counter was made cannot be told from the answer: with both flags memcached itself decides what it says.
        let own = command.verb == Verb::MetaArithmetic && command.hush == Hush::Usual && command.creates;
        expect.barrier = own || command.odd;
        if own {
            expect.hush = Hush::Nothing;
        }
        let building = &mut building[server];
        if writes {
            expect.key = building.key(key, command.base64);
            if self.traces(command.opaque.of_bytes(bytes)) {
                building.trace();
            }
        }
        match command.cut.filter(|_| !own) {
            None => building.as_is(data, at, at + command.length),
            Some(cut) => {
                let cut = cut.range();
                let value = command.head;
                let mut line = Vec::with_capacity(value);
                line.extend_from_slice(&bytes[..cut.start]);
                line.extend_from_slice(&bytes[cut.end..value]);
                building.own(data, line);
                if value < command.length {
                    building.as_is(data, at + value, at + command.length);
                }
            }
        }
        if expect.barrier {
            building.own(data, BARRIER.to_vec());
        }
        building.asked.push(expect);
    }

    fn text_to_all(&mut self, data: &Bytes, at: usize, command: &text::Command, building: &mut [Building]) {
        let bytes = &data[at..];
        if command.verb == Verb::FlushAll {
            self.flushed();
        }
        let mut line = command.line.of_bytes(bytes).to_vec();
        if let Some(cut) = command.cut {
            line.drain(cut.range());
        }
        line.extend_from_slice(b"\r\n");
        line.extend_from_slice(BARRIER);
        let servers = building.len();
        for (server, building) in building.iter_mut().enumerate() {
            let together = self.order.ask(server as u32);
            building.own(data, line.clone());
            building.asked.push(Expect {
                barrier: true,
                ..self.expect(command, piece(server, servers), together)
            });
        }
    }

    fn flushed(&self) {
        let cache = &self.parts.shared.config.caches[self.parts.cache].name;
        self.parts.shared.counts[self.parts.cache].flushes.fetch_add(1, Relaxed);
        if let Some(unsaid) = FLUSHED.due(cache) {
            tracing::warn!(
                cache,
                unsaid,
                "flush_all at the front door: this region's servers are emptied, no peer's are"
            );
        }
    }

    fn text_list(&mut self, data: &Bytes, at: usize, command: &text::Command, building: &mut [Building]) {
        let bytes = &data[at..];
        if command.gets_one() {
            let key = command.key.of_bytes(bytes);
            let server = self.server_of(key);
            let together = self.order.ask(server as u32);
            building[server].get(data, key, self.expect(command, Piece::Whole, together));
            return;
        }
        let waits = matches!(command.verb, Verb::Get | Verb::Gets);
        let gives = command.verb.writes();
        let one = building.len() == 1 && (waits || command.length <= text::MAX_LINE_BYTES);
        if one || command.key.is_empty() {
            let together = self.order.ask(0);
            let mut expect = self.expect(command, Piece::Whole, together);
            if gives && !command.key.is_empty() {
                let keys = &command.line.of_bytes(bytes)[command.key.at as usize..];
                expect.key = building[0].key(keys, false);
            }
            building[0].as_is(data, at, at + command.length);
            if command.odd {
                expect.barrier = true;
                building[0].own(data, BARRIER.to_vec());
            }
            building[0].asked.push(expect);
            return;
        }
        // Pieces of keys that follow one another and have the same server.
        let head = text::head(bytes, command);
        let mut pieces: Vec<(usize, Vec<u8>)> = Vec::new();
        for key in text::keys(bytes, command) {
            let server = self.server_of(key);
            match pieces.last_mut() {
                Some((last, piece)) if *last == server && piece.len() + key.len() < PIECE_BYTES => {
                    piece.push(b' ');
                    piece.extend_from_slice(key);
                }
                _ => pieces.push((server, [head, key].concat())),
            }
        }
        let count = pieces.len();
        for (n, (server, mut line)) in pieces.into_iter().enumerate() {
            let together = self.order.ask(server as u32);
            let mut expect = self.expect(command, piece(n, count), together);
            let building = &mut building[server];
            if gives {
                expect.key = building.key(&line[head.len()..], false);
            }
            line.extend_from_slice(b"\r\n");
            building.own(data, line);
            building.asked.push(expect);
        }
    }

    /// memcached says so too, and drops the old value for a set: so it is deleted.
    fn text_too_large(&mut self, data: &Bytes, bytes: &[u8], command: &text::Command, building: &mut [Building]) {
        self.count(command.verb);
        if command.verb.drops_when_refused() && !self.refuses() {
            let key = command.key.of_bytes(bytes);
            let (verb, line) = match command.base64 {
                true => (Verb::MetaDelete, [b"md ", key, b" b\r\n"].concat()),
                false => (Verb::Delete, [b"delete ", key, b"\r\n"].concat()),
            };
            let server = self.server_of_text(key, command.base64);
            let together = self.order.ask(server as u32);
            let building = &mut building[server];
            let expect = Expect {
                asked: Asked::Text(verb),
                silent: true,
                hush: Hush::Everything,
                key: building.key(key, command.base64),
                ttl: None,
                ..self.expect(command, Piece::Whole, together)
            };
            building.own(data, line);
            building.asked.push(expect);
        }
        if command.hush != Hush::Everything {
            self.order.answer(Bytes::from_static(TOO_LARGE));
        }
    }

    /// Takes one command of a binary client; gives the bytes that it takes, or nothing if it is not whole.
    fn take_binary(&mut self, data: &Bytes, at: usize, building: &mut [Building]) -> Option<usize> {
        let limit = self.parts.shared.config.caches[self.parts.cache].max_value_bytes;
        let bytes = &data[at..];
        let (command, too_large) = match binary::parse(bytes, limit) {
            binary::Parsed::Forward(command) => (command, false),
            binary::Parsed::TooLarge(command) => (command, true),
            binary::Parsed::Incomplete { missing } => {
                self.missing = missing;
                return None;
            }
            binary::Parsed::Answer { length, answer, close } => {
                if let Some(answer) = answer {
                    let mut out = Vec::new();
                    answer.put(&mut out);
                    self.order.answer(out.into());
                }
                if close {
                    self.leaving = true;
                    return Some(bytes.len());
                }
                return Some(length);
            }
            binary::Parsed::Nonsense => {
                self.leaving = true;
                return Some(bytes.len());
            }
        };
        let verb = verb_of(command.opcode);
        self.count(verb);
        let expect = Expect {
            asked: Asked::Binary(command.opcode),
            sent: command.sent,
            opaque: command.opaque,
            hush: if command.quiet { Hush::Usual } else { Hush::Nothing },
            piece: Piece::Whole,
            together: false,
            barrier: false,
            touches: false,
            fill: self.fills(verb, false),
            silent: false,
            single: false,
            key: Span::default(),
            ttl: command.ttl,
        };
        let writes = command.opcode.writes();
        if writes && self.refuses() {
            self.order.answer(failure(&expect, KAFKA_AWAY));
            return Some(command.length);
        }
        let key = &bytes[command.key.0..command.key.1];
        if too_large {
            if command.opcode == Opcode::Set {
                let server = self.server_of(key);
                let together = self.order.ask(server as u32);
                let building = &mut building[server];
                let mut request = vec![0; binary::HEADER_BYTES];
                (request[0], request[1]) = (binary::REQUEST, Opcode::Delete as u8);
                request[2..4].copy_from_slice(&(key.len() as u16).to_be_bytes());
                request[8..12].copy_from_slice(&(key.len() as u32).to_be_bytes());
                // The answer is known by it.
                request[12..16].copy_from_slice(&command.opaque);
                request.extend_from_slice(key);
                building.own(data, request);
                let key = building.key(key, false);
                building.asked.push(Expect {
                    asked: Asked::Binary(Opcode::Delete),
                    silent: true,
                    together,
                    key,
                    ttl: None,
                    ..expect
                });
            }
            let mut out = Vec::new();
            binary::put_response(&mut out, command.sent, binary::TOO_LARGE, command.opaque, b"Too large.");
            self.order.answer(out.into());
            return Some(command.length);
        }
        if command.opcode == Opcode::Flush {
            self.flushed();
            let servers = building.len();
            let mut request = bytes[..command.length].to_vec();
            request[1] = command.opcode as u8;
            for (server, building) in building.iter_mut().enumerate() {
                let together = self.order.ask(server as u32);
                building.own(data, request.clone());
                building.asked.push(Expect {
                    piece: piece(server, servers),
                    together,
                    ..expect
                });
            }
            return Some(command.length);
        }
        let server = match command.opcode {
            // Not a key.
            Opcode::Stat | Opcode::Version => 0,
            _ => self.server_of(key),
        };
        let together = self.order.ask(server as u32);
        let building = &mut building[server];
        let mut expect = Expect { together, ..expect };
        if writes {
            expect.key = building.key(key, false);
            if self.traces(b"") {
                building.trace();
            }
        }
        if command.quiet {
            let mut header = bytes[..binary::HEADER_BYTES].to_vec();
            header[1] = command.opcode as u8;
            building.own(data, header);
            building.as_is(data, at + binary::HEADER_BYTES, at + command.length);
        } else {
            building.as_is(data, at, at + command.length);
        }
        building.asked.push(expect);
        Some(command.length)
    }
}

/// Which piece of so many this is.
fn piece(n: usize, count: usize) -> Piece {
    match (count, n + 1 == count) {
        (1, _) => Piece::Whole,
        (_, true) => Piece::Last,
        (_, false) => Piece::More,
    }
}

/// What a binary operation counts as.
fn verb_of(opcode: Opcode) -> Verb {
    match opcode {
        Opcode::Get | Opcode::GetKey => Verb::Get,
        Opcode::Set => Verb::Set,
        Opcode::Add => Verb::Add,
        Opcode::Replace => Verb::Replace,
        Opcode::Delete => Verb::Delete,
        Opcode::Increment => Verb::Incr,
        Opcode::Decrement => Verb::Decr,
        Opcode::Flush => Verb::FlushAll,
        Opcode::Append => Verb::Append,
        Opcode::Prepend => Verb::Prepend,
        Opcode::Stat => Verb::Stats,
        Opcode::Touch => Verb::Touch,
        Opcode::GetAndTouch | Opcode::GetKeyAndTouch => Verb::Gat,
        Opcode::Version | Opcode::Quit | Opcode::Noop | Opcode::SaslList | Opcode::SaslAuth | Opcode::SaslStep => {
            Verb::Version
        }
    }
}

/// The part of an actor that is polled with it.
struct Turn;

impl ActorFuture<FrontDoorSession> for Turn {
    type Output = ();

    fn poll(
        self: Pin<&mut Self>,
        act: &mut FrontDoorSession,
        ctx: &mut Context<FrontDoorSession>,
        task: &mut Task<'_>,
    ) -> Poll<()> {
        act.turn(ctx, task);
        Poll::Pending
    }
}

impl Actor for FrontDoorSession {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.id = self.parts.shared.enter(ctx.address());
        let shared = &self.parts.shared;
        shared.counts[self.parts.cache].accepted.fetch_add(1, Relaxed);
        let idle = shared.config.front_door.idle_timeout;
        if !idle.is_zero() {
            ctx.run_interval(idle / 4, move |act, ctx| {
                if act.order.is_empty() && act.active.elapsed() > idle {
                    ctx.stop();
                }
            });
        }
        ctx.spawn(Turn);
    }

    fn stopped(&mut self, _: &mut Self::Context) {
        self.parts.shared.leave(self.id);
    }
}

impl Handler<Answers> for FrontDoorSession {
    type Result = ();

    fn handle(&mut self, Answers { server, parts }: Answers, _: &mut Self::Context) {
        for part in parts {
            let each = part.bytes.len() / part.commands.max(1) as usize;
            // Rises at once, and falls in some steps.
            self.answer_bytes = each.max(self.answer_bytes / 4);
            self.order.answered(server, part);
        }
    }
}

impl Handler<Acknowledged> for FrontDoorSession {
    type Result = ();

    fn handle(&mut self, Acknowledged(receipts): Acknowledged, _: &mut Self::Context) {
        for (receipt, acknowledged) in receipts {
            self.order.acknowledged(receipt, acknowledged);
        }
    }
}

impl Handler<MakeRoom> for FrontDoorSession {
    type Result = ();

    fn handle(&mut self, MakeRoom { pressing }: MakeRoom, ctx: &mut Self::Context) {
        // What waits for another server is not what the client does not read.
        let limit = match pressing && !self.out.is_empty() {
            true => STUCK_FOR_ALL,
            false => STUCK_FOR,
        };
        let holds = self.out.len() + self.order.unsent() + self.inbox.len();
        if holds == 0 || self.active.elapsed() < limit {
            return;
        }
        let cache = &self.parts.shared.config.caches[self.parts.cache].name;
        self.parts.shared.counts[self.parts.cache].dropped.fetch_add(1, Relaxed);
        if let Some(unsaid) = STUCK.due(cache) {
            tracing::warn!(
                cache,
                bytes = holds,
                unsaid,
                "a client of the front door was disconnected: it has read and sent nothing for {limit:?}, and as many bytes \
                 are held for clients as may be (front_door.max_buffered_bytes)"
            );
        }
        ctx.stop();
    }
}

impl Handler<Leave> for FrontDoorSession {
    type Result = ();

    fn handle(&mut self, _: Leave, _: &mut Self::Context) {
        self.leaving = true;
    }
}
