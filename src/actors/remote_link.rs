//! RemoteLink: one per lane, the sending end of one persistent mutual-TLS connection to the peer.
//!
//! In: batches from the coalescer ([`ShipBatch`]), frames from the peer. Out: frames to the peer, outcomes to the partition
//! consumers, dirty keys to the cache readers, and the tick to the lane's clock.
//! When a session ends, all it had, sent or not, turns into dirty keys, and the actor stops: its supervisor starts it again,
//! with the same mailbox, and it dials after an exponential, jittered backoff, without end. A batch whose looks were made in
//! another session is never sent.
//! Bounded by: `mailbox.remote_link`, the peer's receive window, and a writer of [`WRITER_FRAMES`] frames.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_rustls::client::TlsStream;
use tracing::Instrument as _;

use crate::backoff::Backoff;
use crate::clock_offset::{ClockOffset, PingTimes};
use crate::coalesce::Trigger;
use crate::dirty::Dirtied;
use crate::event::TraceContext;
use crate::failpoint;
use crate::handoff::{Carried, Slot};
use crate::link::{LinkError, connect, hello, limits, terms};
use crate::outcome::Outcome;
use crate::pulse::{PULSE_EVERY, Pulse};
use crate::relay::{FlowShared, HeldEvent, HeldItem, LaneClock, LinkView, Reports, Stage, UnderWay, wall_ms, wall_us};
use crate::telemetry::names::SPAN_TARGET;
use crate::telemetry::{KeptFor, PathStage, RateLimit, TracedBatch};
use crate::tls::TlsMaterial;
use crate::wire::{self, Ack, Decoder, Frame, GoAway, HelloAck, Limits, Ping, Pong, Status};

use super::batch_coalescer::{BatchCoalescer, LinkIdle, ShipBatch};
use super::cache_reader::{CacheReader, KeysAnswered, KeysDirtied, SessionStarted};

/// Frames that may wait for the socket: one being written and one ready to follow it.
const WRITER_FRAMES: usize = 2;
/// A peer that answers pings but acks nothing has so many times `supervision.stalled_after` to find what hangs on its side;
/// then the session ends, and all it has is looked at again.
const ACKS_WITHIN: u32 = 2;
/// Bytes asked of the socket at once; acks are small.
const READ_BYTES: usize = 64 << 10;
/// By flow and lane: a peer whose sessions end again and again.
static OPENED: RateLimit = RateLimit::new();
static ENDED: RateLimit = RateLimit::new();
static NOT_OPENED: RateLimit = RateLimit::new();

/// The other actors of the lane; sent once, when it is built.
#[derive(Message)]
#[rtype(result = "()")]
pub struct MeetLane {
    /// By server number.
    pub readers: Vec<Addr<CacheReader>>,
    /// Told when nothing is under way.
    pub coalescer: Addr<BatchCoalescer>,
}

/// A frame came, or the connection ended. A fact.
#[derive(Message)]
#[rtype(result = "()")]
struct Received {
    session: u64,
    what: Result<Frame, LinkError>,
}

/// The writer has room again. A fact.
#[derive(Message)]
#[rtype(result = "()")]
struct Written {
    session: u64,
    result: Result<(), std::io::Error>,
}

/// The flow has drained: tell the peer, close the connection, and dial no more. Answered when that is done, or cannot be.
#[derive(Message, Clone, Copy)]
#[rtype(result = "()")]
pub struct SayGoodbye;

/// What a link is made of.
pub struct RemoteLinkParts {
    /// What the flow's actors share.
    pub shared: Arc<FlowShared>,
    /// Which lane.
    pub lane: usize,
    /// What the lane has heard; written here.
    pub clock: Arc<LaneClock>,
    /// Our certificate and the CA.
    pub tls: Arc<TlsMaterial>,
    /// Where the peer's agent listens.
    pub address: String,
}

impl RemoteLinkParts {
    /// Its own name among all links, for [`RateLimit::due`].
    fn label(&self) -> String {
        format!("{} lane {}", self.shared.view.name, self.lane)
    }
}

enum State {
    /// Until the backoff has passed.
    Waiting,
    /// Connecting, or greeting.
    Dialling,
    /// A session.
    Open(Session),
}

struct Session {
    writer: mpsc::Sender<Outgoing>,
    /// Bytes, decompressed, that the peer is willing to hold.
    window: u64,
    used: u64,
    heard: Instant,
    /// When the peer last acked anything, or was sent the first batch since.
    acked: Instant,
    /// The peer drains: nothing more is sent.
    leaving: bool,
}

/// A frame for the socket: a head and, for a batch, its payload uncopied.
struct Outgoing {
    head: Bytes,
    payload: Bytes,
    /// It is the last one: told when the connection is closed behind it.
    last: Option<oneshot::Sender<()>>,
}

/// A batch that was sent and is not finished.
struct Outstanding {
    items: Vec<HeldItem>,
    /// By index in the batch, a bit each: answered.
    answered: Vec<u64>,
    open: usize,
    bytes: usize,
    window: u64,
    closed: Instant,
    _under_way: UnderWay,
    /// What its own span says of it, when items of it are traced.
    traced: Option<Box<Traced>>,
}

impl Outstanding {
    /// Notes that an item is answered; false when it was already.
    fn answer(&mut self, index: usize) -> bool {
        let (word, bit) = (&mut self.answered[index / 64], 1 << (index % 64));
        let first = *word & bit == 0;
        *word |= bit;
        self.open -= usize::from(first);
        first
    }

    /// The events of the items that are not answered.
    fn unanswered(self) -> impl Iterator<Item = HeldEvent> {
        let answered = self.answered;
        let open = move |index: &usize| answered[index / 64] & (1 << (index % 64)) == 0;
        let items = self.items.into_iter().enumerate();
        items.filter_map(move |(index, item)| open(&index).then_some(item.event))
    }
}

/// See [`Outstanding::traced`].
struct Traced {
    members: Vec<TraceContext>,
    trigger: Trigger,
    wire_bytes: usize,
    items: usize,
}

/// See the module.
pub struct RemoteLink {
    parts: RemoteLinkParts,
    readers: Vec<Addr<CacheReader>>,
    coalescer: Option<Addr<BatchCoalescer>>,
    state: State,
    /// Number of the session that is open or was last.
    epoch: u64,
    backoff: Backoff,
    waiting: VecDeque<(ShipBatch, Slot)>,
    outstanding: BTreeMap<u64, Outstanding>,
    next_batch: u64,
    next_ping: u64,
    clock_offset: ClockOffset,
    view: LinkView,
    pulse: Arc<Pulse>,
}

impl RemoteLink {
    /// A link that dials as soon as it is started.
    pub fn new(parts: RemoteLinkParts) -> Self {
        let link = &parts.shared.config.link;
        let view = LinkView {
            state: "waiting",
            since: Instant::now(),
            attempts: 0,
            last_error: None,
            rtt_us: None,
            clock_offset_us: None,
        };
        RemoteLink {
            readers: Vec::new(),
            coalescer: None,
            state: State::Waiting,
            epoch: 0,
            backoff: Backoff::clamped(link.backoff_initial, link.backoff_max),
            waiting: VecDeque::new(),
            outstanding: BTreeMap::new(),
            next_batch: 0,
            next_ping: 0,
            clock_offset: ClockOffset::default(),
            view,
            pulse: parts
                .shared
                .view
                .pulses
                .register("remote_link", format!("lane {}", parts.lane)),
            parts,
        }
    }
}

impl Actor for RemoteLink {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        let wait = match self.backoff.attempts() {
            0 if self.epoch == 0 && self.view.last_error.is_none() => Duration::ZERO,
            _ => self.backoff.next(rand::random()),
        };
        ctx.run_later(wait, |act, ctx| act.dial(ctx));
        let ping = self.parts.shared.config.link.ping_interval;
        ctx.run_interval(ping, |act, ctx| act.keep_alive(ctx));
        ctx.run_interval(PULSE_EVERY, |act, _| act.show_pulse());
    }
}

impl Supervised for RemoteLink {
    fn restarting(&mut self, _: &mut Context<Self>) {
        // The session's tasks are gone with the old context; its items became dirty keys when it ended. Not counted: a
        // peer that is away is a state.
        self.state = State::Waiting;
    }
}

impl Handler<MeetLane> for RemoteLink {
    type Result = ();

    fn handle(&mut self, MeetLane { readers, coalescer }: MeetLane, _: &mut Self::Context) {
        self.readers = readers;
        self.coalescer = Some(coalescer);
        if let State::Open(_) = self.state {
            self.tell_readers();
        }
    }
}

impl Handler<Carried<ShipBatch>> for RemoteLink {
    type Result = ();

    fn handle(&mut self, Carried { message, slot }: Carried<ShipBatch>, ctx: &mut Self::Context) {
        let _inside = self.pulse.enter("took a batch");
        fail::fail_point!("remote_link_ship");
        failpoint::at_keys("remote_link_event", message.items.iter().map(|item| &item.event.key));
        self.waiting.push_back((message, slot));
        self.pump(ctx);
    }
}

impl Handler<Received> for RemoteLink {
    type Result = ();

    fn handle(&mut self, Received { session, what }: Received, ctx: &mut Self::Context) {
        let State::Open(open) = &mut self.state else { return };
        if session != self.epoch {
            return;
        }
        open.heard = Instant::now();
        match what {
            Ok(Frame::Ack(ack)) => self.acked(ack, ctx),
            Ok(Frame::Pong(pong)) => self.ponged(&pong),
            Ok(Frame::GoAway(away)) => {
                tracing::info!(
                    flow = self.parts.shared.view.name,
                    reason = away.reason,
                    "peer is leaving"
                );
                open.leaving = true;
                self.set_view("draining");
                self.leave_if_done(ctx);
            }
            Ok(Frame::Ping(_)) => {}
            Ok(Frame::Hello(_)) => self.end(LinkError::Unexpected("hello"), ctx),
            Ok(Frame::HelloAck(_)) => self.end(LinkError::Unexpected("hello-ack"), ctx),
            Ok(Frame::Batch(_)) => self.end(LinkError::Unexpected("batch"), ctx),
            Err(error) => self.end(error, ctx),
        }
    }
}

impl Handler<Written> for RemoteLink {
    type Result = ();

    fn handle(&mut self, Written { session, result }: Written, ctx: &mut Self::Context) {
        if session != self.epoch || !matches!(self.state, State::Open(_)) {
            return;
        }
        match result {
            Ok(()) => self.pump(ctx),
            Err(error) => self.end(error.into(), ctx),
        }
    }
}

impl Handler<SayGoodbye> for RemoteLink {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: SayGoodbye, _: &mut Self::Context) -> Self::Result {
        self.parts.clock.end();
        let State::Open(open) = std::mem::replace(&mut self.state, State::Waiting) else {
            return Box::pin(std::future::ready(()));
        };
        let mut head = BytesMut::new();
        let reason = "the relay has drained".to_owned();
        wire::encode(&Frame::GoAway(GoAway { reason }), &mut head);
        let (last, closed) = oneshot::channel();
        Box::pin(async move {
            let goodbye = Outgoing {
                head: head.freeze(),
                payload: Bytes::new(),
                last: Some(last),
            };
            if open.writer.send(goodbye).await.is_ok() {
                let _ = closed.await;
            }
        })
    }
}

impl RemoteLink {
    fn show_pulse(&self) {
        let waits_for = match &self.state {
            State::Waiting | State::Dialling => Some("a session"),
            State::Open(open) if open.leaving => Some("the peer, which is leaving"),
            // Has a limit of its own, or the relay would be restarted for what its peer does.
            State::Open(_) if !self.outstanding.is_empty() => Some("acks of the peer"),
            State::Open(_) => None,
        };
        self.pulse
            .holds((self.waiting.len() + self.outstanding.len()) as u64, waits_for);
    }

    fn dial(&mut self, ctx: &mut Context<Self>) {
        self.state = State::Dialling;
        self.set_view("dialling");
        let limit = self.parts.shared.config.link.connect_timeout;
        let connect = connect(
            self.parts.address.clone(),
            self.parts.tls.clone(),
            self.parts.shared.peer().identity.clone(),
            hello(&self.parts.shared),
        );
        let span = tracing::info_span!(
            target: SPAN_TARGET,
            "dial",
            otel.kind = "client",
            otel.status_description = tracing::field::Empty,
            otel.status_code = tracing::field::Empty,
            peer.service = self.parts.shared.peer().region,
            server.address = self.parts.address,
            evrepl.flow = self.parts.shared.view.name,
            evrepl.lane = self.parts.lane,
        );
        let of = span.clone();
        let dial = async move {
            let result = match tokio::time::timeout(limit, connect).await {
                Ok(result) => result,
                Err(_) => Err(LinkError::Timeout(limit)),
            };
            if let Err(error) = &result {
                of.record("otel.status_code", "ERROR");
                of.record("otel.status_description", error.to_string());
            }
            result
        };
        ctx.spawn(
            dial.instrument(span)
                .into_actor(self)
                .map(|result, act, ctx| match result {
                    Ok((stream, buffered, ack)) => act.begin(stream, buffered, ack, ctx),
                    Err(error) => act.end(error, ctx),
                }),
        );
    }

    fn begin(&mut self, stream: TlsStream<TcpStream>, buffered: BytesMut, ack: HelloAck, ctx: &mut Context<Self>) {
        let shared = &self.parts.shared;
        self.epoch += 1;
        self.clock_offset = ClockOffset::default();
        let session = self.epoch;
        if session > 1 {
            shared
                .view
                .reconnects
                .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        let terms = terms(shared, &ack);
        self.parts.clock.begin(session, ack.tick, &terms);
        if let Some(unsaid) = OPENED.due(&self.parts.label()) {
            tracing::info!(
                flow = shared.view.name,
                lane = self.parts.lane,
                peer_session = ack.session,
                window = ack.window_bytes,
                software = ack.software,
                unsaid,
                "session open"
            );
        }
        let (read, write) = tokio::io::split(stream);
        let (writer, outgoing) = mpsc::channel(WRITER_FRAMES);
        let address = ctx.address();
        ctx.spawn(write_frames(write, outgoing, session, address.clone()).into_actor(self));
        ctx.spawn(read_frames(read, buffered, limits(), session, address).into_actor(self));
        self.state = State::Open(Session {
            writer,
            window: ack.window_bytes,
            used: 0,
            heard: Instant::now(),
            acked: Instant::now(),
            leaving: false,
        });
        self.view.last_error = None;
        self.set_view("open");
        self.tell_readers();
        // A first ping at once: its answer is the proof of life that ends the backoff, and measures the clocks.
        self.ping();
        self.pump(ctx);
    }

    fn tell_readers(&self) {
        for reader in &self.readers {
            reader.do_send(SessionStarted);
        }
    }

    /// Sends what the window and the writer have room for.
    fn pump(&mut self, ctx: &mut Context<Self>) {
        let mut strays = Vec::new();
        while let Some((batch, _)) = self.waiting.front() {
            let stray = match &self.state {
                State::Open(_) => batch.session != self.epoch,
                _ => true,
            };
            if stray {
                // Its looks were made before this session began: they may be older than what the peer has by now.
                let Some((batch, _slot)) = self.waiting.pop_front() else {
                    break;
                };
                self.parts.shared.give_bytes(batch.bytes);
                strays.extend(batch.items);
                continue;
            }
            let State::Open(open) = &mut self.state else { break };
            let size = u64::from(batch.encoded.raw_len);
            // One batch may always go, or a batch larger than the window never would.
            if open.leaving || (open.used > 0 && open.used + size > open.window) {
                break;
            }
            let Ok(permit) = open.writer.try_reserve() else { break };
            let Some((batch, _slot)) = self.waiting.pop_front() else {
                break;
            };
            let id = self.next_batch;
            self.next_batch += 1;
            let held_us = batch.encoded_at.elapsed().as_micros() as u64;
            let traced = (!batch.members.is_empty()).then(|| {
                Box::new(Traced {
                    members: batch.members,
                    trigger: batch.trigger,
                    wire_bytes: batch.encoded.payload.len(),
                    items: batch.items.len(),
                })
            });
            let frame = batch.encoded.into_frame(id, held_us);
            let mut head = BytesMut::with_capacity(wire::BATCH_OVERHEAD);
            wire::encode_batch_head(&frame, &mut head);
            permit.send(Outgoing {
                head: head.freeze(),
                payload: frame.payload,
                last: None,
            });
            if open.used == 0 {
                open.acked = Instant::now();
            }
            open.used += size;
            if let Some(last) = batch.items.last() {
                self.parts.shared.lag(Stage::Sent, last.event.produced_at_ms);
            }
            self.outstanding.insert(
                id,
                Outstanding {
                    open: batch.items.len(),
                    answered: vec![0; batch.items.len().div_ceil(64)],
                    items: batch.items,
                    bytes: batch.bytes,
                    window: size,
                    closed: batch.encoded_at,
                    _under_way: batch.under_way,
                    traced,
                },
            );
        }
        if !strays.is_empty() {
            let mut reports = Reports::default();
            let mut dirty = DirtyKeys::default();
            for item in strays {
                dirty.add(&self.parts.shared, item.event, Dirtied::SessionLost, &mut reports);
            }
            self.parts.shared.report(&mut reports);
            dirty.send(&self.readers);
        }
        self.leave_if_done(ctx);
    }

    fn acked(&mut self, ack: Ack, ctx: &mut Context<Self>) {
        self.backoff.reset();
        self.parts.clock.heard(ack.tick);
        let Some(batch) = self.outstanding.get_mut(&ack.batch) else {
            // Of a batch that an earlier ack finished: nothing to do, nothing to trust either.
            tracing::debug!(batch = ack.batch, "ack of an unknown batch");
            return;
        };
        if let Err(error) = ack.check(batch.items.len() as u32) {
            self.end(error.into(), ctx);
            return;
        }
        let mut reports = Reports::default();
        let mut dirty = DirtyKeys::default();
        let mut answered: Vec<(usize, Vec<(u16, Bytes)>)> = Vec::new();
        let mut newest = None;
        let (now, now_ms) = (Instant::now(), wall_ms());
        let agent_us = (ack.queued_us, ack.applied_us);
        let slow_before = self.parts.shared.traces().slow_before(now_ms);
        let mut passed = None;
        for (index, exception) in ack.finished() {
            if !batch.answer(index as usize) {
                continue;
            }
            let item = &mut batch.items[index as usize];
            newest = Some(item.event.produced_at_ms);
            let status = exception.map(|exception| exception.status);
            if status.is_none() {
                let waited = (item.event.has_waited(), item.event.parked > 0);
                passed = Some((
                    item.event.produced_at_ms,
                    item.event.taken,
                    waited,
                    (item.looked, item.seen_at),
                ));
            }
            let why = match status {
                Some(Status::TooLarge) => Some(KeptFor::Failed),
                None | Some(Status::Expired) if item.event.produced_at_ms < slow_before => Some(KeptFor::Slow),
                _ => None,
            };
            if let Some(trace) = &mut item.event.trace {
                trace.agent_us = Some(agent_us);
            }
            if let Some(why) = why.filter(|_| !item.event.is_canary()) {
                keep(&self.parts.shared, item, why, batch.closed, agent_us, now_ms);
            }
            if item.event.probe && status != Some(Status::Later) {
                let reader = self.parts.shared.server_number(item.event.cache, &item.event.key);
                let key = (item.event.cache, item.event.key.clone());
                match answered.iter_mut().find(|(number, _)| *number == reader) {
                    Some((_, keys)) => keys.push(key),
                    None => answered.push((reader, vec![key])),
                }
            }
            match status {
                None => reports.finished(&item.event, item.outcome()),
                Some(Status::LookAgain) if item.only_touches() && self.parts.shared.invalidates(item.event.cache) => {
                    // Nothing to touch and nothing to bring: done.
                    reports.finished(&item.event, Outcome::Applied);
                }
                Some(Status::LookAgain) => {
                    dirty.add(&self.parts.shared, item.event.clone(), Dirtied::LookAgain, &mut reports);
                }
                Some(Status::Later | Status::Refused) => {
                    let server = exception
                        .and_then(|e| ack.servers.get(e.server as usize))
                        .map(String::as_str);
                    let server: Arc<str> = server.unwrap_or(&self.parts.shared.peer().region).into();
                    dirty.add(
                        &self.parts.shared,
                        item.event.clone(),
                        Dirtied::Later { server },
                        &mut reports,
                    );
                }
                Some(Status::Expired) => reports.finished(&item.event, Outcome::Expired),
                Some(Status::TooLarge) => reports.finished(&item.event, Outcome::TooLarge),
            }
        }
        let closed = batch.closed;
        if batch.open == 0
            && let Some(batch) = self.outstanding.remove(&ack.batch)
        {
            self.parts.shared.give_bytes(batch.bytes);
            if let State::Open(open) = &mut self.state {
                open.used -= batch.window;
            }
            if let Some(traced) = &batch.traced {
                self.parts.shared.traces().shipped(&TracedBatch {
                    flow: &self.parts.shared.view.name,
                    peer: &self.parts.shared.peer().region,
                    closed,
                    acked: now,
                    items: traced.items,
                    bytes: (traced.wire_bytes, batch.window as usize),
                    trigger: traced.trigger.name(),
                    members: &traced.members,
                });
            }
        }
        if let Some((produced_at_ms, taken, (has_waited, was_parked), (looked, seen))) = passed {
            // Of one event, the last of the ack: its stages add up to its lag.
            let in_agent = Duration::from_micros(agent_us.0.saturating_add(agent_us.1));
            let lag = Duration::from_millis((now_ms - produced_at_ms).max(0) as u64);
            let in_kafka = lag.saturating_sub(now - taken);
            let queued = looked.saturating_duration_since(taken);
            // Where one that has waited was meanwhile is not kept: all of it until its last look is the wait; of a parked
            // one also the time in Kafka, most of which it was there to wait.
            let [in_kafka, queued, waited] = match (has_waited, was_parked) {
                (false, _) => [in_kafka, queued, Duration::ZERO],
                (true, false) => [in_kafka, Duration::ZERO, queued],
                (true, true) => [Duration::ZERO, Duration::ZERO, in_kafka + queued],
            };
            let stages = [
                in_kafka,
                queued,
                waited,
                seen.saturating_duration_since(looked),
                closed.saturating_duration_since(seen),
                now.saturating_duration_since(closed).saturating_sub(in_agent),
                Duration::from_micros(agent_us.0),
                Duration::from_micros(agent_us.1),
            ];
            self.parts.shared.passed(&stages);
        }
        self.pulse.moved("heard an ack");
        if let State::Open(open) = &mut self.state {
            open.acked = Instant::now();
        }
        if let Some(produced_at_ms) = newest {
            // By the same clock reading as the stages, which add up to it.
            self.parts.shared.lag_at(Stage::Acked, produced_at_ms, now_ms);
        }
        self.parts.shared.report(&mut reports);
        dirty.send(&self.readers);
        for (reader, keys) in answered {
            self.readers[reader].do_send(KeysAnswered(keys));
        }
        self.pump(ctx);
        if let Some(coalescer) = self.coalescer.as_ref().filter(|_| self.parts.clock.tell_idle()) {
            coalescer.do_send(LinkIdle);
        }
    }

    fn ponged(&mut self, pong: &Pong) {
        self.backoff.reset();
        self.parts.clock.heard(pong.tick);
        let times = PingTimes {
            sent: pong.sent_us,
            received: pong.received_us,
            answered: pong.answered_us,
            back: wall_us(),
        };
        let first = self.clock_offset.offset_us().is_none();
        self.view.rtt_us = Some(times.rtt_us());
        self.view.clock_offset_us = Some(self.clock_offset.ponged(times));
        self.parts.shared.set_link(self.parts.lane, self.view.clone());
        if first {
            // The peer can tell no lag before it knows.
            self.ping();
        }
    }

    fn keep_alive(&mut self, ctx: &mut Context<Self>) {
        let limit = self.parts.shared.config.link.idle_timeout;
        let State::Open(open) = &self.state else { return };
        if open.heard.elapsed() > limit {
            self.end(LinkError::Silent(limit), ctx);
            return;
        }
        let limit = self.parts.shared.config.supervision.stalled_after * ACKS_WITHIN;
        if !self.outstanding.is_empty() && open.acked.elapsed() > limit {
            self.end(LinkError::NoAcks(limit), ctx);
            return;
        }
        self.ping();
    }

    fn ping(&mut self) {
        let State::Open(open) = &self.state else { return };
        let mut frame = BytesMut::new();
        wire::encode(
            &Frame::Ping(Ping {
                id: self.next_ping,
                sent_us: wall_us(),
                offset_us: self.clock_offset.offset_us(),
            }),
            &mut frame,
        );
        // A writer without room is busy with batches, whose acks say as much.
        if open
            .writer
            .try_send(Outgoing {
                head: frame.freeze(),
                payload: Bytes::new(),
                last: None,
            })
            .is_ok()
        {
            self.next_ping += 1;
        }
    }

    fn leave_if_done(&mut self, ctx: &mut Context<Self>) {
        if let State::Open(open) = &self.state
            && open.leaving
            && self.outstanding.is_empty()
        {
            self.end(LinkError::Closed, ctx);
        }
    }

    /// Ends the session, or the attempt at one: everything it had becomes dirty keys, and the supervisor starts over.
    fn end(&mut self, error: LinkError, ctx: &mut Context<Self>) {
        self.parts.clock.end();
        let was_open = matches!(self.state, State::Open(_));
        self.state = State::Waiting;
        let mut reports = Reports::default();
        let mut dirty = DirtyKeys::default();
        for (_, batch) in std::mem::take(&mut self.outstanding) {
            self.parts.shared.give_bytes(batch.bytes);
            for event in batch.unanswered() {
                dirty.add(&self.parts.shared, event, Dirtied::SessionLost, &mut reports);
            }
        }
        for (batch, _slot) in std::mem::take(&mut self.waiting) {
            self.parts.shared.give_bytes(batch.bytes);
            for item in batch.items {
                dirty.add(&self.parts.shared, item.event, Dirtied::SessionLost, &mut reports);
            }
        }
        let keys = dirty.len();
        self.parts.shared.report(&mut reports);
        dirty.send(&self.readers);
        let text = error.to_string();
        let flow = &*self.parts.shared.view.name;
        let lane = self.parts.lane;
        if was_open {
            if let Some(unsaid) = ENDED.due(&self.parts.label()) {
                tracing::warn!(flow, lane, error = text, dirty_keys = keys, unsaid, "session ended");
            }
        } else if self.view.last_error.as_deref() != Some(&text)
            && let Some(unsaid) = NOT_OPENED.due(&self.parts.label())
        {
            tracing::warn!(flow, lane, error = text, unsaid, "no session, dialling on");
        }
        self.view.last_error = Some(text);
        self.set_view("waiting");
        ctx.stop();
    }

    fn set_view(&mut self, state: &'static str) {
        self.view.state = state;
        self.view.since = Instant::now();
        self.view.attempts = self.backoff.attempts();
        self.parts.shared.set_link(self.parts.lane, self.view.clone());
    }
}

/// Traces an event that was slow or has failed and is not traced, if there is room for one more such trace in this second: out
/// of the times that it, its look and its batch have anyway.
fn keep(shared: &FlowShared, item: &mut HeldItem, why: KeptFor, closed: Instant, agent_us: (u64, u64), now_ms: i64) {
    let Some(trace) = shared.keep_trace(&mut item.event, why, now_ms) else {
        return;
    };
    trace.enter(PathStage::Look, item.looked);
    trace.enter(PathStage::Coalesce, item.seen_at);
    trace.enter(PathStage::Link, closed);
    trace.agent_us = Some(agent_us);
}

/// Dirty keys on their way back to the readers they came from.
#[derive(Default)]
struct DirtyKeys {
    keys: Vec<(usize, Vec<(HeldEvent, Dirtied)>)>,
}

impl DirtyKeys {
    fn add(&mut self, shared: &FlowShared, event: HeldEvent, why: Dirtied, reports: &mut Reports) {
        reports.dirty(&event);
        if event.is_canary() {
            reports.lost(&event, why.name());
            return;
        }
        let reader = shared.server_number(event.cache, &event.key);
        match self.keys.iter_mut().find(|(number, _)| *number == reader) {
            Some((_, keys)) => keys.push((event, why)),
            None => self.keys.push((reader, vec![(event, why)])),
        }
    }

    fn len(&self) -> usize {
        self.keys.iter().map(|(_, keys)| keys.len()).sum()
    }

    fn send(self, readers: &[Addr<CacheReader>]) {
        for (reader, keys) in self.keys {
            readers[reader].do_send(KeysDirtied(keys));
        }
    }
}

impl FlowShared {
    /// Whether the cache's policy is to remove copies, never to bring them.
    fn invalidates(&self, cache: u16) -> bool {
        self.config.caches[cache as usize].invalidates()
    }
}

async fn read_frames(
    mut read: tokio::io::ReadHalf<TlsStream<TcpStream>>,
    mut buffer: BytesMut,
    limits: Limits,
    session: u64,
    link: Addr<RemoteLink>,
) {
    let mut decoder = Decoder::new(limits);
    let error = 'reading: loop {
        loop {
            match decoder.decode(&mut buffer) {
                // Awaited: one frame at a time is in the link's mailbox.
                Ok(Some(frame)) => {
                    if link
                        .send(Received {
                            session,
                            what: Ok(frame),
                        })
                        .await
                        .is_err()
                    {
                        return;
                    }
                }
                Ok(None) => break,
                Err(error) => break 'reading error.into(),
            }
        }
        buffer.reserve(READ_BYTES);
        match read.read_buf(&mut buffer).await {
            Ok(0) => break LinkError::Closed,
            Ok(_) => {}
            Err(error) => break error.into(),
        }
    };
    let _ = link
        .send(Received {
            session,
            what: Err(error),
        })
        .await;
}

async fn write_frames(
    mut write: tokio::io::WriteHalf<TlsStream<TcpStream>>,
    mut outgoing: mpsc::Receiver<Outgoing>,
    session: u64,
    link: Addr<RemoteLink>,
) {
    while let Some(frame) = outgoing.recv().await {
        let result = async {
            write.write_all(&frame.head).await?;
            write.write_all(&frame.payload).await?;
            if outgoing.is_empty() {
                write.flush().await?;
            }
            if let Some(closed) = frame.last {
                write.shutdown().await?;
                let _ = closed.send(());
            }
            Ok(())
        }
        .await;
        let failed = Result::is_err(&result);
        link.do_send(Written { session, result });
        if failed {
            return;
        }
    }
}
