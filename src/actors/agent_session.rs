//! AgentSession: the receiving end of one link.
//!
//! In: frames from the peer, results from the cache writers. Out: parts of batches to the writers, acks to the peer.
//! It just ends when the connection does; the peer dials again and looks again at what was not acked.
//! Bounded by: its window in bytes (a peer that exceeds it is cut off), `mailbox.agent_session` frames, and
//! `mailbox.cache_writer` parts per writer. A server that does not take writes is answered `later` at once.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use actix::prelude::*;
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_rustls::server::TlsStream;

use crate::agent::{AgentShared, PeerClock, ServerState, SessionGuard};
use crate::handoff::{Carried, Handoff, Slot};
use crate::pulse::Pulse;
use crate::relay::wall_us;
use crate::telemetry::{FlowInstruments, RateLimit};
use crate::wire::{
    self, Ack, BatchFrame, Decoder, Exception, Frame, GoAway, Limits, Pong, Status, WireError, decode_items,
};

use super::agent_listener::ThreadPlace;
use super::cache_writer::{ApplyItems, Items, ItemsApplied};

/// Frames to the peer that may wait for the socket. A peer that lets so many acks pile up does not read them.
const OUT_FRAMES: usize = 256;
/// Bytes asked of the socket at once. TLS itself would ask for 4 KiB at a time, which is five system calls for each of its
/// records, and a tenth of what a value of a kilobyte costs here.
pub(super) const SOCKET_READ_BYTES: usize = 64 << 10;
/// Room for the first bytes of a frame: what one TLS record holds. Room for the rest is made when its length is known, so that
/// a batch gets a buffer of its own size.
const FIRST_BYTES: usize = 16 << 10;
/// Of a peer whose sessions end again and again.
static ENDED: RateLimit = RateLimit::new();

/// A batch that was received, and when. Travels by hand-off.
struct BatchReceived {
    frame: BatchFrame,
    at: Instant,
}

/// The connection ended. A fact.
#[derive(Message)]
#[rtype(result = "()")]
struct ConnectionEnded(Option<SessionError>);

/// Why a session ended although the peer did not close it.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("connection: {0}")]
    Io(#[from] std::io::Error),
    #[error("protocol: {0}")]
    Wire(#[from] WireError),
    #[error("nothing heard for {0:?}")]
    Silent(std::time::Duration),
    #[error("peer sent {used} bytes, more than its window of {window}")]
    Window { used: u64, window: u64 },
    #[error("peer does not read its acks")]
    AcksPileUp,
    #[error("unexpected {0} frame")]
    Unexpected(&'static str),
    #[error("item for a cache that the greeting did not accept")]
    Cache,
    #[error("item looked at after tick {looked_at}, which is not yet: the tick is {tick}")]
    Future { looked_at: u64, tick: u64 },
    #[error("the agent is being rebuilt")]
    Rebuilt,
}

/// What a session is made of.
pub struct AgentSessionParts {
    /// What the agent's actors share.
    pub shared: Arc<AgentShared>,
    /// The agent's counter of answered write batches.
    pub tick: Arc<AtomicU64>,
    /// By server number.
    pub writers: Vec<Handoff<ApplyItems>>,
    /// The calling region.
    pub peer: Arc<str>,
    /// Its number and window.
    pub guard: SessionGuard,
    /// Its place on this thread.
    pub on_thread: ThreadPlace,
    /// By the caller's cache number, our own index.
    pub caches: Vec<Option<u16>>,
    /// What a frame may be.
    pub limits: Limits,
    /// The connection.
    pub stream: TlsStream<BufReader<TcpStream>>,
    /// What was read behind the hello.
    pub buffered: BytesMut,
}

/// A batch that is not fully acked.
struct Open {
    left: u32,
    raw: u64,
    /// When its newest event was produced, by the peer's clock.
    produced_at_ms: u64,
}

/// Parts on their way to one writer, in order.
#[derive(Default)]
struct Outbox {
    parts: VecDeque<ApplyItems>,
    sending: bool,
}

/// See the module.
pub struct AgentSession {
    shared: Arc<AgentShared>,
    tick: Arc<AtomicU64>,
    writers: Vec<Handoff<ApplyItems>>,
    peer: Arc<str>,
    guard: SessionGuard,
    _on_thread: ThreadPlace,
    caches: Vec<Option<u16>>,
    limits: Limits,
    io: Option<(TlsStream<BufReader<TcpStream>>, BytesMut)>,
    out: Option<mpsc::Sender<Bytes>>,
    inbox: VecDeque<(BatchReceived, Slot)>,
    outboxes: Vec<Outbox>,
    open: HashMap<u64, Open>,
    used: u64,
    leaving: bool,
    clock: Arc<PeerClock>,
    metrics: Arc<FlowInstruments>,
    pulse: Arc<Pulse>,
}

impl AgentSession {
    /// Starts the session on this arbiter.
    pub fn begin(parts: AgentSessionParts) -> Addr<AgentSession> {
        let AgentSessionParts {
            shared,
            tick,
            writers,
            peer,
            guard,
            on_thread,
            caches,
            limits,
            stream,
            buffered,
        } = parts;
        let outboxes = writers.iter().map(|_| Outbox::default()).collect();
        let place = format!("session {} of {peer}", guard.id);
        let flow = format!("{peer}->{}", shared.config.region);
        let metrics = shared.instruments.flow(&flow);
        AgentSession {
            pulse: shared.pulses.register("agent_session", place),
            shared,
            tick,
            writers,
            peer,
            guard,
            _on_thread: on_thread,
            caches,
            limits,
            io: Some((stream, buffered)),
            out: None,
            inbox: VecDeque::new(),
            outboxes,
            open: HashMap::new(),
            used: 0,
            leaving: false,
            clock: Arc::default(),
            metrics,
        }
        .start()
    }
}

impl Actor for AgentSession {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        let Some((stream, buffered)) = self.io.take() else {
            return;
        };
        let (read, write) = tokio::io::split(stream);
        let (out, outgoing) = mpsc::channel(OUT_FRAMES);
        self.out = Some(out.clone());
        let address = ctx.address();
        let slots = self.shared.config.mailbox.agent_session;
        let batches = Handoff::new(address.clone().recipient(), slots, &self.shared.mailboxes.agent_session);
        let idle = self.shared.config.agent.idle_timeout;
        let answers = Answers {
            out,
            tick: self.tick.clone(),
            peer: self.peer.clone(),
            clock: self.clock.clone(),
        };
        let limits = self.limits;
        let reading = async move {
            let ended = tokio::select! {
                result = read_frames(read, buffered, limits, idle, batches, answers) => result.err(),
                result = write_frames(write, outgoing) => result.err().map(SessionError::Io),
            };
            address.do_send(ConnectionEnded(ended));
        };
        ctx.spawn(reading.into_actor(self));
        let shared = self.shared.clone();
        ctx.run_interval(std::time::Duration::from_millis(200), move |act, ctx| {
            if shared.draining.load(SeqCst) && !act.leaving {
                act.leave(ctx);
            }
        });
    }
}

impl Handler<Carried<BatchReceived>> for AgentSession {
    type Result = ();

    fn handle(&mut self, Carried { message, slot }: Carried<BatchReceived>, ctx: &mut Self::Context) {
        let _inside = self.pulse.enter("took a batch");
        fail::fail_point!("agent_session_batch");
        self.inbox.push_back((message, slot));
        self.advance(ctx);
    }
}

impl Handler<ItemsApplied> for AgentSession {
    type Result = ();

    fn handle(&mut self, done: ItemsApplied, ctx: &mut Self::Context) {
        let finished = done.finished.items();
        let exceptions = done.finished.exceptions.into_iter();
        let mut ack = Ack {
            batch: done.batch,
            tick: done.tick,
            queued_us: done.queued_us,
            applied_us: done.applied_us,
            ranges: done.finished.ranges,
            exceptions: exceptions
                .map(|(index, status)| Exception {
                    index,
                    status,
                    server: 0,
                })
                .collect(),
            servers: Vec::new(),
        };
        if ack.exceptions.iter().any(|exception| exception.status == Status::Later) {
            ack.servers.push(format!(
                "{} at {}",
                self.shared.servers[done.server].address, self.shared.config.region
            ));
        }
        ack.normalize();
        if let Some(open) = self.open.get_mut(&done.batch) {
            if done.applied_us > 0
                && let Some(lag) = self.clock.seconds_since(open.produced_at_ms, wall_us())
            {
                self.metrics.record_stage_lag("applied", lag);
            }
            open.left = open.left.saturating_sub(finished);
            if open.left == 0
                && let Some(open) = self.open.remove(&done.batch)
            {
                self.used -= open.raw;
            }
        }
        self.say(&Frame::Ack(ack), ctx);
    }
}

impl Handler<ConnectionEnded> for AgentSession {
    type Result = ();

    fn handle(&mut self, ConnectionEnded(error): ConnectionEnded, ctx: &mut Self::Context) {
        self.end(error, ctx);
    }
}

impl AgentSession {
    /// Takes batches while the writers have room for what came before. As many parts as the mailbox has frames may wait for
    /// one server, so that a server that takes its time holds the others up late; one that takes too long is away.
    fn advance(&mut self, ctx: &mut Context<Self>) {
        let most = self.shared.config.mailbox.agent_session;
        while self.outboxes.iter().all(|outbox| outbox.parts.len() < most) {
            // The slot goes back at the end of this turn: the batch's contents are in the outboxes.
            let Some((batch, _slot)) = self.inbox.pop_front() else {
                return;
            };
            if let Err(error) = self.take(batch, ctx) {
                self.end(Some(error), ctx);
                return;
            }
        }
    }

    fn take(
        &mut self,
        BatchReceived { frame, at }: BatchReceived,
        ctx: &mut Context<Self>,
    ) -> Result<(), SessionError> {
        let raw = u64::from(frame.raw_len);
        // One batch may always come, or one larger than the window never could.
        if self.used > 0 && self.used + raw > self.guard.window {
            return Err(SessionError::Window {
                used: self.used + raw,
                window: self.guard.window,
            });
        }
        let items = decode_items(&frame, &self.limits)?;
        let raw_bytes = items.raw().clone();
        let tick = self.tick.load(SeqCst);
        let mut shares: Vec<Items> = self.writers.iter().map(|_| Items::default()).collect();
        if let [only] = &mut shares[..] {
            only.list.reserve(items.declared());
        }
        let mut produced_at_ms = 0;
        for (item, index) in items.zip(0..) {
            let item = item?;
            produced_at_ms = item.produced_at_ms;
            let cache = self
                .caches
                .get(item.cache as usize)
                .copied()
                .flatten()
                .ok_or(SessionError::Cache)?;
            if item.looked_at > tick {
                // No relay can have heard it: the stamps would believe it and let an old look pass.
                return Err(SessionError::Future {
                    looked_at: item.looked_at,
                    tick,
                });
            }
            let of = &self.shared.caches[cache as usize];
            let server = of.first_server + of.ring.server_of(item.key_of(&raw_bytes));
            shares[server].push(index, cache, item, &raw_bytes);
        }
        self.used += raw;
        let received_us = wall_us().saturating_sub(at.elapsed().as_micros() as u64);
        if frame.items > 0
            && let Some(lag) = self.clock.seconds_since(produced_at_ms, received_us)
        {
            self.metrics.record_stage_lag("received", lag);
        }
        let left = frame.items;
        self.open.insert(
            frame.id,
            Open {
                left,
                raw,
                produced_at_ms,
            },
        );
        if frame.items == 0 {
            self.open.remove(&frame.id);
            self.used -= raw;
        }
        let shares = shares
            .into_iter()
            .enumerate()
            .filter(|(_, items)| !items.list.is_empty());
        for (server, items) in shares {
            if self.shared.servers[server].state() == ServerState::Away {
                let finished = items.turned_away(&self.shared, (&self.peer, server), at);
                let done = ItemsApplied {
                    batch: frame.id,
                    server,
                    finished,
                    tick: self.tick.load(SeqCst),
                    queued_us: 0,
                    applied_us: 0,
                };
                self.handle(done, ctx);
                continue;
            }
            let part = ApplyItems {
                session: self.guard.id,
                live: self.guard.live.clone(),
                reply: ctx.address().recipient(),
                batch: frame.id,
                received: at,
                held_us: frame.held_us,
                peer: self.peer.clone(),
                raw: raw_bytes.clone(),
                items,
            };
            self.outboxes[server].parts.push_back(part);
            self.send(server, ctx);
        }
        Ok(())
    }

    /// Hands a writer its parts, one at a time so that order survives.
    fn send(&mut self, server: usize, ctx: &mut Context<Self>) {
        let outbox = &mut self.outboxes[server];
        if outbox.sending {
            return;
        }
        let Some(part) = outbox.parts.pop_front() else { return };
        outbox.sending = true;
        let writer = self.writers[server].clone();
        let send = async move { writer.send(part).await.is_ok() };
        ctx.spawn(send.into_actor(self).map(move |sent, act, ctx| {
            act.outboxes[server].sending = false;
            if !sent {
                act.end(Some(SessionError::Rebuilt), ctx);
                return;
            }
            act.send(server, ctx);
            act.advance(ctx);
        }));
    }

    fn say(&mut self, frame: &Frame, ctx: &mut Context<Self>) {
        let mut bytes = BytesMut::new();
        wire::encode(frame, &mut bytes);
        if let Some(out) = &self.out
            && let Err(mpsc::error::TrySendError::Full(_)) = out.try_send(bytes.freeze())
        {
            self.end(Some(SessionError::AcksPileUp), ctx);
        }
    }

    /// Tells the peer to send nothing more; the session ends when what it sent is acked.
    fn leave(&mut self, ctx: &mut Context<Self>) {
        self.leaving = true;
        self.say(
            &Frame::GoAway(GoAway {
                reason: "draining".to_owned(),
            }),
            ctx,
        );
    }

    fn end(&mut self, error: Option<SessionError>, ctx: &mut Context<Self>) {
        if let Some(unsaid) = ENDED.due(&self.peer) {
            let (peer, session) = (&*self.peer, self.guard.id);
            match error {
                None => tracing::info!(peer, session, unsaid, "session closed by peer"),
                Some(error) => tracing::warn!(peer, session, %error, unsaid, "session ended"),
            }
        }
        self.out = None;
        ctx.stop();
    }
}

/// What the reading end answers pings with, and whom.
struct Answers {
    out: mpsc::Sender<Bytes>,
    tick: Arc<AtomicU64>,
    peer: Arc<str>,
    clock: Arc<PeerClock>,
}

/// Reads frames until the peer closes. Pings are answered here, so that a busy session still shows its life.
async fn read_frames(
    mut read: ReadHalf<TlsStream<BufReader<TcpStream>>>,
    mut buffer: BytesMut,
    limits: Limits,
    idle: std::time::Duration,
    batches: Handoff<BatchReceived>,
    Answers { out, tick, peer, clock }: Answers,
) -> Result<(), SessionError> {
    let mut decoder = Decoder::new(limits);
    let mut goodbye = false;
    loop {
        while let Some(frame) = decoder.decode(&mut buffer)? {
            match frame {
                Frame::Batch(frame) => {
                    let at = Instant::now();
                    if batches.send(BatchReceived { frame, at }).await.is_err() {
                        return Ok(());
                    }
                }
                Frame::Ping(ping) => {
                    let received_us = wall_us();
                    ping.offset_us.into_iter().for_each(|offset| clock.set(offset));
                    let mut bytes = BytesMut::new();
                    let pong = Pong {
                        id: ping.id,
                        sent_us: ping.sent_us,
                        received_us,
                        answered_us: wall_us(),
                        tick: tick.load(SeqCst),
                    };
                    wire::encode(&Frame::Pong(pong), &mut bytes);
                    if let Err(mpsc::error::TrySendError::Full(_)) = out.try_send(bytes.freeze()) {
                        return Err(SessionError::AcksPileUp);
                    }
                }
                Frame::GoAway(away) => {
                    tracing::info!(peer = &*peer, reason = away.reason, "peer says goodbye");
                    goodbye = true;
                }
                Frame::Pong(_) => {}
                Frame::Hello(_) => return Err(SessionError::Unexpected("hello")),
                Frame::HelloAck(_) => return Err(SessionError::Unexpected("hello-ack")),
                Frame::Ack(_) => return Err(SessionError::Unexpected("ack")),
            }
        }
        if buffer.capacity() == buffer.len() {
            buffer.reserve(FIRST_BYTES);
        }
        match tokio::time::timeout(idle, read.read_buf(&mut buffer)).await {
            Err(_) => return Err(SessionError::Silent(idle)),
            Ok(Ok(0)) => return Ok(()),
            Ok(Ok(_)) => {}
            Ok(Err(_)) if goodbye => return Ok(()),
            Ok(Err(error)) => return Err(error.into()),
        }
    }
}

async fn write_frames(
    mut write: WriteHalf<TlsStream<BufReader<TcpStream>>>,
    mut outgoing: mpsc::Receiver<Bytes>,
) -> Result<(), std::io::Error> {
    while let Some(frame) = outgoing.recv().await {
        write.write_all(&frame).await?;
        if outgoing.is_empty() {
            write.flush().await?;
        }
    }
    write.shutdown().await
}
