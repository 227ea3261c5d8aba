//! FrontDoorSession: one client at the front door.
//!
//! In: its bytes, and the servers' answers. Out: its commands to [`FrontDoorUpstream`], a read's worth at a time ([`commands`] makes
//! them); its answers, in its order.
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

use crate::front_door::binary;
use crate::front_door::order::Order;
use crate::front_door::out::Out;
use crate::front_door::recheck::Recheck;
use crate::front_door::{Charge, DoorShared, Place};
use crate::telemetry::{RateLimit, Sampler};

use self::commands::Building;
use super::front_door_upstream::{Acknowledged, Answers, Forward, FrontDoorUpstream};

mod commands;

/// Bytes asked of the socket at once.
const READ_BYTES: usize = 64 << 10;
/// Reads in one turn, before others get theirs.
const READS: usize = 4;
/// Answers that a client may leave unread before it is read no further.
const MAX_UNREAD_BYTES: usize = 256 << 10;
/// And so much may be expected to come, as far as can be told from the answers before: what one client has under way on a
/// connection that it shares, all others wait for.
const MAX_EXPECTED_BYTES: usize = 512 << 10;
/// Of a client that has had no answer yet: it begins with four commands.
const UNKNOWN_ANSWER_BYTES: usize = MAX_EXPECTED_BYTES / 4;
/// A small command, and a key of usual length.
const COMMAND_BYTES: usize = 32;
const KEY_BYTES: usize = 24;

/// A client for which bytes are held and that moves none for so long leaves, when others need the room.
const STUCK_FOR: Duration = Duration::from_secs(5);
/// When nothing is read from servers because of clients that read too slowly, those leave that hold more than others and have
/// not caught up for so long.
const BEHIND_FOR: Duration = Duration::from_secs(2);
static STUCK: RateLimit = RateLimit::new();

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
        let read = each!(self, stream => read(stream, task, buffer));
        match read {
            // A TLS client that closes without saying so has said its last, as any other: each command that came whole is its own.
            Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => Poll::Ready(Ok(0)),
            read => read,
        }
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
    /// Answers are not read from servers any more, so that all clients wait: this is what a client has not read on the average.
    pub pressing: Option<usize>,
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
    /// Of an answer whose end has not come.
    begun_bytes: usize,
    /// Since when it has not read all that it could.
    behind: Option<Instant>,
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
            begun_bytes: 0,
            behind: None,
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
        let unread = self.unread();
        // What waits for another server, or for Kafka, cannot be read yet.
        let waits = self.order.unsent() - self.order.tellable();
        self.charge
            .set(unread, waits + self.inbox.capacity() + self.stalled.len());
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
                self.behind = None;
                break;
            }
            match self.out.poll_write(|slices| self.parts.stream.poll_write(task, slices)) {
                Poll::Ready(wrote) => wrote?,
                Poll::Pending => {
                    self.behind.get_or_insert_with(Instant::now);
                    return Ok(());
                }
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

    /// Bytes of answers that the client could read.
    fn unread(&self) -> usize {
        self.out.len() + self.order.tellable()
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
            self.begun_bytes += part.bytes.len();
            if part.commands > 0 {
                let each = std::mem::take(&mut self.begun_bytes) / part.commands as usize;
                // Rises at once, and falls in some steps.
                self.answer_bytes = each.max(self.answer_bytes / 4);
            }
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
        let shared = &self.parts.shared;
        // Not what it cannot send because nobody reads it.
        let unsent = if self.closed { 0 } else { self.inbox.len() };
        let holds = self.out.len() + self.order.unsent() + unsent;
        let stuck = holds > 0 && self.active.elapsed() >= STUCK_FOR;
        // One after the other, until it is enough.
        let too_slow = pressing.is_some_and(|usual| self.unread() >= usual)
            && !shared.takes_answers()
            && self.behind.is_some_and(|since| since.elapsed() >= BEHIND_FOR);
        if !stuck && !too_slow {
            return;
        }
        let cache = &shared.config.caches[self.parts.cache].name;
        shared.counts[self.parts.cache].dropped.fetch_add(1, Relaxed);
        if let Some(unsaid) = STUCK.due(cache) {
            let why = match stuck {
                true => format!("it has read and sent nothing for {STUCK_FOR:?}"),
                false => "it reads more slowly than it asks, and all others wait".to_owned(),
            };
            tracing::warn!(
                cache,
                bytes = holds,
                why,
                unsaid,
                "a client of the front door was disconnected, for others need the room (front_door.max_buffered_bytes)"
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
