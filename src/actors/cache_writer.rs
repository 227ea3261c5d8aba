//! CacheWriter: one per memcached server of this region, shared by all sessions.
//!
//! In: parts of batches ([`ApplyItems`]). Out: results to the session they came from ([`ItemsApplied`]).
//! It checks each item's stamp, then writes in pipelined batches: one connection, one batch at a time. A call that takes too
//! long opens the breaker and is kept until it has answered or died: memcached may run what an abandoned connection sent
//! at any later time, so a writing connection is never doubled. A new one first gets an answer to `mn`, then waits
//! `agent.settle`: what the old one left has run by then.
//! Its connection is a state with a backoff; a panic rebuilds the agent (the ticks and stamps start anew, sessions end,
//! peers look again).
//! Bounded by: `mailbox.cache_writer` per session, [`MAX_ITEMS`] and [`MAX_BYTES`] per call.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::time::Duration;

use actix::prelude::*;
use bytes::Bytes;
use tokio::time::Instant;

use crate::agent::{AgentShared, Fence, ServerState};
use crate::backoff::Backoff;
use crate::breaker::{Allows, Breaker, BreakerState};
use crate::event::TraceContext;
use crate::handoff::{Carried, Slot};
use crate::hashing;
use crate::memcached::{Connection, MemcachedError, NotDone, SharedOp, Write, WriteOp, Writes};
use crate::pulse::{PULSE_EVERY, Pulse};
use crate::relay::wall_ms;
use crate::sabotage;
use crate::stamps::{SessionId, StampTable, Verdict};
use crate::telemetry::{AnsweredItem, MemcachedInstruments, RateLimit};
use crate::wire::{Expiry, ItemOp, PlacedItem, Status};

/// Items of one call to memcached: enough to make its round trip cheap, few enough to answer soon.
const MAX_ITEMS: usize = 2048;
/// Bytes of keys and values of one call, or a little more: few enough that what is written together stays in the processor's
/// cache, and that the buffer for it (see `memcached`) never grows; at values of a kilobyte 2 MiB cost a fifth more.
pub const MAX_BYTES: usize = 512 << 10;
/// Slots of the stamp table: 2^20, 16 MiB.
const STAMP_SLOTS_LOG2: u32 = 20;
/// memcached takes a longer relative time as a Unix time.
const MAX_RELATIVE_SECONDS: i64 = 2_592_000;
/// Between two log lines about refused writes: a server that is out of memory refuses each.
const REFUSALS_EVERY: Duration = Duration::from_secs(10);
/// A server that drops its connections may do so at each call.
static BROKEN: RateLimit = RateLimit::new();

/// The share of a batch that lives on this server. Travels by hand-off.
pub struct ApplyItems {
    /// Whose stamps these are.
    pub session: SessionId,
    /// False once that session has ended: its items are dirty keys at the relay by now.
    pub live: Arc<AtomicBool>,
    /// Who is told.
    pub reply: Recipient<ItemsApplied>,
    /// Which batch of the session.
    pub batch: u64,
    /// When the batch was received.
    pub received: Instant,
    /// Microseconds that the relay held the batch after the items' ages were written.
    pub held_us: u64,
    /// The calling region, for traces.
    pub peer: Arc<str>,
    /// The batch's bytes.
    pub raw: Bytes,
    /// The items, in the batch's order.
    pub items: Items,
}

/// Items of a batch that live on one server.
#[derive(Default)]
pub struct Items {
    /// In the batch's order.
    pub list: Vec<PartItem>,
    /// Their places in the batch, as (start, length), in order and apart.
    pub ranges: Vec<(u32, u32)>,
    /// Those of them that are traced.
    pub traced: Vec<TracedItem>,
}

/// What a writer needs of an item.
pub struct PartItem {
    /// Its place in the batch.
    pub index: u32,
    /// Where its key is in the batch's bytes.
    pub key: Range<u32>,
    /// Where its value is.
    pub value: Range<u32>,
    /// [`hashing::slot_hash`] of the key.
    pub slot: u64,
    /// The last tick its session had heard before the look.
    pub looked_at: u64,
    /// Microseconds from the look to the encoding of the batch.
    pub age_us: u64,
    /// The client's flags.
    pub flags: u32,
    /// What was left at the look.
    pub expiry: Expiry,
    /// The local index of its cache.
    pub cache: u16,
    /// What to do.
    pub op: ItemOp,
}

impl Items {
    /// Appends an item of the batch with these bytes; `cache` is the local index.
    pub fn push(&mut self, index: u32, cache: u16, item: PlacedItem, raw: &Bytes) {
        match self.ranges.last_mut() {
            Some((start, length)) if *start + *length == index => *length += 1,
            _ => self.ranges.push((index, 1)),
        }
        if item.trace.is_some() {
            self.traced.extend(TracedItem::of(index, cache, &item, raw));
        }
        self.list.push(PartItem {
            index,
            slot: hashing::slot_hash(item.key_of(raw)),
            key: item.key,
            value: item.value,
            looked_at: item.looked_at,
            age_us: item.age_us,
            flags: item.flags,
            expiry: item.expiry,
            cache,
            op: item.op,
        });
    }

    /// None of them is written: they are told to come back.
    pub fn turned_away(self, shared: &AgentShared, at: (&str, usize), received: Instant) -> Finished {
        let places = self.ranges.iter().flat_map(|&(start, length)| start..start + length);
        let finished = Finished {
            exceptions: places.map(|place| (place, Status::Later)).collect(),
            ranges: self.ranges,
        };
        finished.account(&self.traced, shared, at, (received, None));
        finished
    }
}

/// How the items of a part ended.
#[derive(Debug, Default)]
pub struct Finished {
    /// All of them, as (start, length) of places in the batch, in order and apart.
    pub ranges: Vec<(u32, u32)>,
    /// Those that did not simply apply, by their place, each once.
    pub exceptions: Vec<(u32, Status)>,
}

impl Finished {
    /// How many items there are.
    pub fn items(&self) -> u32 {
        self.ranges.iter().map(|(_, length)| length).sum()
    }

    /// Counts the items, and makes the spans of those that are traced, with the peer and the server's number, and with when
    /// they were received and memcached was called.
    fn account(
        &self,
        traced: &[TracedItem],
        shared: &AgentShared,
        at: (&str, usize),
        times: (Instant, Option<Instant>),
    ) {
        let counts = &shared.counts;
        let mut applied = u64::from(self.items());
        for (_, status) in &self.exceptions {
            applied = applied.saturating_sub(1);
            let count = match status {
                Status::LookAgain => &counts.look_again,
                Status::Later => &counts.later,
                Status::Expired => &counts.expired,
                Status::TooLarge => &counts.too_large,
                // Nothing here says so.
                Status::Refused => continue,
            };
            count.fetch_add(1, Relaxed);
        }
        counts.applied.fetch_add(applied, Relaxed);
        for item in traced {
            item.answered(shared, at, times, self);
        }
    }

    /// The public name of how the item with this place ended.
    fn name_of(&self, place: u32) -> &'static str {
        let status = self.exceptions.iter().find(|(index, _)| *index == place);
        status.map_or("applied", |(_, status)| status.name())
    }
}

/// What became of a part. A fact.
#[derive(Message, Debug)]
#[rtype(result = "()")]
pub struct ItemsApplied {
    /// Which batch of the session.
    pub batch: u64,
    /// This writer's server number.
    pub server: usize,
    /// The part's items.
    pub finished: Finished,
    /// The tick after these writes.
    pub tick: u64,
    /// Microseconds from received to written.
    pub queued_us: u64,
    /// Microseconds that memcached took.
    pub applied_us: u64,
}

/// A call to memcached, and whom it answers.
struct Call {
    parts: Vec<Answering>,
    /// Of each write, which part it is of and its place in that batch.
    sent: Vec<(u32, u32)>,
    /// Writes that are removals because the item may not be stored, by their place in the call, in order.
    removals: Vec<(u32, Status)>,
    started: Instant,
    /// It takes so long that everything else is answered `later` meanwhile.
    stuck: bool,
    /// It has taken longer than `memcached.slow_after`, and that was said.
    slow: bool,
    /// There was nothing in it that memcached had to be asked.
    unsent: bool,
}

impl Call {
    fn new(started: Instant) -> Call {
        Call {
            parts: Vec::new(),
            sent: Vec::new(),
            removals: Vec::new(),
            started,
            stuck: false,
            slow: false,
            unsent: false,
        }
    }

    /// This write of the call did not simply apply.
    fn except(&mut self, write: u32, status: Status) {
        let (part, index) = self.sent[write as usize];
        self.parts[part as usize].finished.exceptions.push((index, status));
    }

    /// Nothing that was sent has simply applied.
    fn except_all(&mut self, status: Status) {
        for (part, index) in self.sent.drain(..) {
            self.parts[part as usize].finished.exceptions.push((index, status));
        }
    }
}

struct Answering {
    live: Arc<AtomicBool>,
    reply: Recipient<ItemsApplied>,
    batch: u64,
    received: Instant,
    finished: Finished,
    /// Those of its items that are traced.
    traced: Vec<TracedItem>,
    peer: Arc<str>,
}

/// What the spans of a traced item need of it.
pub struct TracedItem {
    index: u32,
    context: TraceContext,
    cache: u16,
    op: ItemOp,
    key: Bytes,
}

impl TracedItem {
    /// Of an item, by its place in the batch, if it is traced; `cache` is the local index.
    fn of(index: u32, cache: u16, item: &PlacedItem, raw: &Bytes) -> Option<TracedItem> {
        Some(TracedItem {
            index,
            context: item.trace?,
            cache,
            op: item.op,
            key: raw.slice(item.key.start as usize..item.key.end as usize),
        })
    }

    /// Makes its spans, now that it is answered.
    fn answered(
        &self,
        shared: &AgentShared,
        (peer, server): (&str, usize),
        (received, called): (Instant, Option<Instant>),
        finished: &Finished,
    ) {
        shared.instruments.traces().answered(&AnsweredItem {
            context: self.context,
            peer,
            cache: &shared.config.caches[usize::from(self.cache)].name,
            server: &shared.servers[server].address,
            key: &self.key,
            op: match self.op {
                ItemOp::Set => "set",
                ItemOp::Touch => "touch",
                ItemOp::Remove => "delete",
            },
            received,
            called,
            answered: Instant::now(),
            answer: finished.name_of(self.index),
        });
    }
}

enum Link {
    /// No connection; the next attempt is due.
    None,
    /// Connecting, or settling.
    Connecting,
    /// Ready.
    Ready(Box<Connection>),
    /// In a call.
    Calling,
}

/// See the module.
pub struct CacheWriter {
    shared: Arc<AgentShared>,
    tick: Arc<AtomicU64>,
    server: usize,
    stamps: StampTable,
    breaker: Breaker,
    queue: VecDeque<(ApplyItems, Slot)>,
    link: Link,
    call: Option<Call>,
    refusal_said: Option<Instant>,
    fence: Arc<Fence>,
    calls: MemcachedInstruments,
    pulse: Arc<Pulse>,
}

impl CacheWriter {
    /// A writer for the server with this number; it connects at once.
    pub fn new(shared: Arc<AgentShared>, tick: Arc<AtomicU64>, fence: Arc<Fence>, server: usize) -> Self {
        let address = shared.servers[server].address.clone();
        let settings = &shared.config.memcached;
        let backoff = Backoff::clamped(settings.backoff_initial, settings.backoff_max);
        CacheWriter {
            stamps: StampTable::new(STAMP_SLOTS_LOG2),
            breaker: Breaker::new(settings.breaker_failures, backoff),
            queue: VecDeque::new(),
            link: Link::None,
            call: None,
            refusal_said: None,
            fence,
            calls: {
                let cache = &shared.servers[server].cache;
                shared.instruments.memcached(cache, &address, "write")
            },
            pulse: shared.pulses.register("cache_writer", address),
            shared,
            tick,
            server,
        }
    }
}

impl Actor for CacheWriter {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.connect(ctx);
        // One timer for all calls: one each would leave thousands behind, polled at every turn.
        let settings = &self.shared.config.memcached;
        ctx.run_interval(settings.look_at_calls_every(), |act, ctx| act.check_call(ctx));
        let often = (settings.timeout / 4).max(Duration::from_millis(1));
        ctx.run_interval(often, |act, ctx| act.probe(ctx));
        ctx.run_interval(PULSE_EVERY, |act, _| act.show_pulse());
    }
}

impl Handler<Carried<ApplyItems>> for CacheWriter {
    type Result = ();

    fn handle(&mut self, Carried { message, slot }: Carried<ApplyItems>, ctx: &mut Self::Context) {
        let _inside = self.pulse.enter("took a part");
        self.queue.push_back((message, slot));
        self.advance(ctx);
    }
}

impl CacheWriter {
    fn address(&self) -> &str {
        &self.shared.servers[self.server].address
    }

    fn away(&self) -> bool {
        // Also while it is reconnected to after a failure: what is handed over then would hold up the other servers.
        let reconnects = matches!(self.link, Link::None | Link::Connecting) && self.breaker.failures() > 0;
        reconnects
            || self.call.as_ref().is_some_and(|call| call.stuck)
            || !matches!(self.breaker.state(Instant::now()), BreakerState::Closed)
    }

    fn show_pulse(&self) {
        let waits_for = match self.link {
            _ if self.away() => Some("memcached, which is away"),
            // Kept for as long as it takes; nobody waits behind one that takes long.
            Link::Calling => Some("memcached's answer"),
            Link::None | Link::Connecting => Some("a connection to memcached"),
            Link::Ready(_) => None,
        };
        self.pulse.holds(self.queue.len() as u64, waits_for);
    }

    fn show(&self) {
        if !self.fence.is_open() {
            return;
        }
        let state = match &self.link {
            _ if self.away() => ServerState::Away,
            Link::Ready(_) | Link::Calling => ServerState::Answers,
            Link::None | Link::Connecting => ServerState::Connecting,
        };
        let server = &self.shared.servers[self.server];
        let now = Instant::now();
        server.breaker.show(match &self.call {
            // Nothing is written to it until the call has come back.
            Some(call) if call.stuck => BreakerState::Open { until: now },
            _ => self.breaker.state(now),
        });
        server.set(state);
    }

    fn advance(&mut self, ctx: &mut Context<Self>) {
        if self.away() {
            self.answer_later();
            return;
        }
        if !matches!(self.link, Link::Ready(_)) || self.queue.is_empty() {
            return;
        }
        fail::fail_point!("cache_writer_apply");
        let (call, writes) = self.collect();
        if writes.is_empty() {
            // Nothing to write: refused looks and dead sessions only.
            let call = Call { unsent: true, ..call };
            self.answer(call, 0);
            self.advance(ctx);
            return;
        }
        self.call(call, writes, ctx);
    }

    /// Asks a server that nothing is written to for a sign of life: without that, a dead one would pass for one that answers
    /// until the next write, and one that was slow for ever for slow.
    fn probe(&mut self, ctx: &mut Context<Self>) {
        let now = Instant::now();
        if self.queue.is_empty() && matches!(self.link, Link::Ready(_)) && self.breaker.allows(now) != Allows::No {
            self.call(Call::new(now), Writes::default(), ctx);
        }
    }

    fn call(&mut self, call: Call, writes: Writes, ctx: &mut Context<Self>) {
        if !self.fence.is_open() {
            return;
        }
        let Link::Ready(connection) = std::mem::replace(&mut self.link, Link::Calling) else {
            return;
        };
        let _inside = self.pulse.enter("began a call");
        fail::fail_point!("cache_writer_call", !writes.is_empty(), |_| ());
        self.call = Some(call);
        ctx.spawn(
            write(connection, writes)
                .into_actor(self)
                .map(|done, act, ctx| act.written(done, ctx)),
        );
    }

    /// Nobody waits behind a call that takes long; the call itself is kept, however long it takes.
    fn check_call(&mut self, ctx: &mut Context<Self>) {
        let settings = &self.shared.config.memcached;
        let limit = settings.slow_limit();
        let Some(call) = &mut self.call else { return };
        let took = call.started.elapsed();
        if !call.stuck && took >= settings.stuck_limit() {
            call.stuck = true;
            self.show();
            self.advance(ctx);
        } else if !call.slow && took >= limit {
            call.slow = true;
            tracing::warn!(
                server = self.address(),
                slow_after = ?limit,
                "memcached does not answer, the call is kept"
            );
            self.answer_call_later();
        }
    }

    /// The call is kept, its items are not: what becomes of them is not known, so they are told to come back like all others,
    /// which frees their permits and lets their events be parked. Nothing else is written before the call has come back, and
    /// its slots are stamped then: a look made meanwhile by another session is made again.
    fn answer_call_later(&mut self) {
        let Some(call) = &mut self.call else { return };
        let mut answered = Call::new(call.started);
        answered.parts = std::mem::take(&mut call.parts);
        answered.sent = std::mem::take(&mut call.sent);
        call.removals.clear();
        answered.except_all(Status::Later);
        self.answer(answered, 0);
    }

    /// The server answered, after this time: whether that is a sign of health.
    fn answered(&mut self, took: Duration, now: Instant) -> bool {
        let limit = self.shared.config.memcached.slow_limit();
        if took < limit {
            return self.breaker.record_success();
        }
        if self.breaker.record_failure(now, rand::random()) {
            tracing::warn!(server = self.address(), ?took, slow_after = ?limit, "memcached is slow, its items are told to wait");
        }
        false
    }

    /// Takes parts off the queue, oldest first, and lets each item pass the stamps.
    fn collect(&mut self) -> (Call, Writes) {
        let now = Instant::now();
        let wall = wall_ms();
        let mut call = Call::new(now);
        let mut writes = Writes::default();
        let mut bytes = 0;
        while writes.len() < MAX_ITEMS && bytes < MAX_BYTES {
            // The slot goes back when this turn of the loop ends: the contents are in the call.
            let Some((part, _slot)) = self.queue.pop_front() else {
                break;
            };
            if !part.live.load(SeqCst) {
                continue;
            }
            let Items { list, ranges, traced } = part.items;
            let mut exceptions = Vec::new();
            let waited_us = now.saturating_duration_since(part.received).as_micros() as u64;
            let of = call.parts.len() as u32;
            writes.share(part.raw);
            call.sent.reserve(list.len());
            writes.reserve(list.len());
            self.stamps.fetch(list.iter().map(|item| item.slot));
            for item in list {
                if self.stamps.admit(item.slot, part.session, item.looked_at, now) == Verdict::LookAgain {
                    exceptions.push((item.index, Status::LookAgain));
                    continue;
                }
                if sabotage::drop_acked_item() {
                    continue;
                }
                let age_us =
                    // Whatever a peer says of itself: an absurd age is an expired item, never a negative one.
                    item.age_us.saturating_add(part.held_us).saturating_add(waited_us);
                let max_value = self.shared.config.caches[item.cache as usize].max_value_bytes;
                bytes += item.value.len() + item.key.len();
                let (op, status) = as_op(&item, age_us, wall, max_value);
                if let Some(status) = status {
                    call.removals.push((writes.len() as u32, status));
                }
                call.sent.push((of, item.index));
                writes.push_shared(item.key, op);
            }
            call.parts.push(Answering {
                live: part.live,
                reply: part.reply,
                batch: part.batch,
                received: part.received,
                finished: Finished { ranges, exceptions },
                traced,
                peer: part.peer,
            });
        }
        sabotage::apply_late(&mut writes);
        (call, writes)
    }

    fn written(&mut self, done: Done, ctx: &mut Context<Self>) {
        let _inside = self.pulse.enter("wrote a batch");
        self.pulse.moved("wrote a batch");
        let Some(mut call) = self.call.take() else { return };
        let now = Instant::now();
        // Raised after memcached has answered, or failed: whoever hears this tick before a look sees these writes, or sees
        // that they never ran once the next connection has settled.
        let tick = self.tick.fetch_add(1, SeqCst) + 1;
        self.stamps.written(tick);
        match done {
            Ok((connection, asked, not_done)) => {
                self.link = Link::Ready(connection);
                if asked {
                    // Not the probes: they would be most of a server's calls that nothing is written to.
                    self.calls.call_answered(now.saturating_duration_since(call.started));
                }
                if self.answered(now.saturating_duration_since(call.started), now) {
                    tracing::info!(server = self.address(), "memcached answers again");
                }
                self.take_results(&mut call, not_done, now);
            }
            Err(error) => {
                if let Some(unsaid) = BROKEN.due(self.address()) {
                    tracing::warn!(server = self.address(), %error, unsaid, "memcached connection failed, keys without an answer are looked at again");
                }
                self.link = Link::None;
                self.calls.call_failed();
                self.fence.passes(self.server, None);
                self.breaker.record_failure(now, rand::random());
                call.except_all(Status::LookAgain);
                self.connect(ctx);
            }
        }
        let applied_us = now.saturating_duration_since(call.started).as_micros() as u64;
        self.answer(call, applied_us);
        self.show();
        self.advance(ctx);
    }

    /// What became of the writes of a call that memcached answered.
    fn take_results(&mut self, call: &mut Call, not_done: Vec<(u32, NotDone)>, now: Instant) {
        if call.sent.is_empty() {
            // They were told to come back while the call took so long.
            return;
        }
        for (write, status) in std::mem::take(&mut call.removals) {
            if not_done.binary_search_by_key(&write, |(write, _)| *write).is_err() {
                call.except(write, status);
            }
        }
        let mut refusal = None;
        for (write, how) in not_done {
            // What the fault lab has added is nobody's.
            if write as usize >= call.sent.len() {
                continue;
            }
            let status = match how {
                NotDone::NotFound | NotDone::Unknown => Status::LookAgain,
                NotDone::TooLarge => Status::TooLarge,
                NotDone::Refused(reason) => {
                    refusal = Some(reason);
                    Status::Later
                }
            };
            call.except(write, status);
        }
        if let Some(reason) = refusal
            && self.refusal_said.is_none_or(|said| now - said >= REFUSALS_EVERY)
        {
            self.refusal_said = Some(now);
            tracing::warn!(server = self.address(), reason, "memcached refused a write");
        }
    }

    fn answer(&mut self, call: Call, applied_us: u64) {
        let tick = self.tick.load(SeqCst);
        for part in call.parts {
            let queued_us = call.started.saturating_duration_since(part.received).as_micros() as u64;
            let times = (part.received, (!call.unsent).then_some(call.started));
            part.finished
                .account(&part.traced, &self.shared, (&part.peer, self.server), times);
            if part.live.load(SeqCst) {
                let (batch, server) = (part.batch, self.server);
                part.reply.do_send(ItemsApplied {
                    batch,
                    server,
                    finished: part.finished,
                    tick,
                    queued_us,
                    applied_us,
                });
            }
        }
    }

    /// The server does not take writes: what waits is told to come back, which frees its window and permits.
    fn answer_later(&mut self) {
        for (part, _slot) in std::mem::take(&mut self.queue) {
            let finished = part
                .items
                .turned_away(&self.shared, (&part.peer, self.server), part.received);
            part.reply.do_send(ItemsApplied {
                batch: part.batch,
                server: self.server,
                finished,
                tick: self.tick.load(SeqCst),
                queued_us: part.received.elapsed().as_micros() as u64,
                applied_us: 0,
            });
        }
    }

    /// Connects, gets an answer to `mn`, and waits until what an older connection left has run.
    fn connect(&mut self, ctx: &mut Context<Self>) {
        self.link = Link::Connecting;
        let address = self.address().to_owned();
        let settings = self.shared.config.memcached.clone();
        let settle = self.shared.config.agent.settle;
        let (fence, server) = (self.fence.clone(), self.server);
        let connect = async move {
            let mut connection = Connection::connect(&address, settings.connect_timeout).await?;
            let asked = Instant::now();
            match tokio::time::timeout(settings.timeout, connection.noop()).await {
                Ok(answer) => answer?,
                Err(_) => {
                    return Err(MemcachedError::ConnectTimeout {
                        address,
                        timeout: settings.timeout,
                    });
                }
            }
            let took = asked.elapsed();
            tokio::time::sleep(settle).await;
            let socket = connection.socket()?;
            if !fence.passes(server, Some(socket)) {
                // Nobody's writer any more: its thread ends as soon as this is polled no more.
                std::future::pending::<()>().await;
            }
            Ok((Box::new(connection), took))
        };
        ctx.spawn(connect.into_actor(self).map(|result, act, ctx| {
            let now = Instant::now();
            match result {
                Ok((connection, took)) => {
                    act.link = Link::Ready(connection);
                    if act.answered(took, now) {
                        tracing::info!(server = act.address(), "memcached answers again");
                    }
                }
                Err(error) => {
                    act.link = Link::None;
                    if act.breaker.record_failure(now, rand::random()) {
                        tracing::warn!(server = act.address(), %error, "memcached does not answer, its items are told to wait");
                    }
                    let wait = match act.breaker.probe_at() {
                        Some(at) => at.saturating_duration_since(now),
                        None => act.shared.config.memcached.backoff_initial,
                    };
                    ctx.run_later(wait.max(Duration::from_millis(1)), |act, ctx| {
                        // The attempt is the probe.
                        let _ = act.breaker.allows(Instant::now());
                        act.connect(ctx);
                    });
                }
            }
            act.show();
            act.advance(ctx);
        }));
    }
}

/// The connection back, whether there was anything to write, and which writes were not simply done; or why it is gone.
type Done = Result<(Box<Connection>, bool, Vec<(u32, NotDone)>), MemcachedError>;

async fn write(mut connection: Box<Connection>, writes: Writes) -> Done {
    if writes.is_empty() {
        connection.noop().await?;
        return Ok((connection, false, Vec::new()));
    }
    let not_done = connection.apply(&writes).await?;
    let large = not_done.iter().filter(|(_, how)| *how == NotDone::TooLarge);
    let removals: Writes = large
        .map(|(place, _)| Write {
            key: writes.get(*place as usize).key,
            op: WriteOp::Delete,
        })
        .collect();
    if !removals.is_empty() {
        // What cannot be stored must not leave the old copy behind.
        connection.apply(&removals).await?;
    }
    Ok((connection, true, not_done))
}

/// What an item asks of memcached, and how it ends if that is not simply applied. `age_us` is the time since the look.
fn as_op(item: &PartItem, age_us: u64, wall_ms: i64, max_value: usize) -> (SharedOp, Option<Status>) {
    let expiry = match item.expiry {
        Expiry::Never => Some(0),
        Expiry::Seconds(seconds) => exptime(seconds, age_us, wall_ms),
    };
    match (item.op, expiry) {
        (ItemOp::Remove, _) => (SharedOp::Delete, None),
        (_, None) => (SharedOp::Delete, Some(Status::Expired)),
        (ItemOp::Set, _) if item.value.len() > max_value => (SharedOp::Delete, Some(Status::TooLarge)),
        (ItemOp::Set, Some(expiry)) => {
            let set = SharedOp::Set {
                value: item.value.clone(),
                flags: item.flags,
                expiry,
            };
            (set, None)
        }
        (ItemOp::Touch, Some(expiry)) => (SharedOp::Touch { expiry }, None),
    }
}

/// memcached's exptime for what is left of `seconds` after `age_us`, rounded down; `None` when nothing is left, for 0 would
/// mean for ever.
fn exptime(seconds: u32, age_us: u64, wall_ms: i64) -> Option<u32> {
    let left = (i64::from(seconds) * 1_000_000 - age_us.min(i64::MAX as u64) as i64).div_euclid(1_000_000);
    match left {
        ..=0 => None,
        1..=MAX_RELATIVE_SECONDS => Some(left as u32),
        _ => Some((wall_ms / 1000 + left).min(i64::from(u32::MAX)) as u32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_of_a_ttl_is_rounded_down_and_never_becomes_for_ever() {
        assert_eq!(exptime(10, 0, 0), Some(10));
        assert_eq!(exptime(10, 1, 0), Some(9));
        assert_eq!(exptime(1, 1, 0), None);
        assert_eq!(exptime(0, 0, 0), None);
        assert_eq!(exptime(5, u64::MAX, 0), None);
    }

    #[test]
    fn more_than_thirty_days_travel_as_a_unix_time() {
        let wall_ms = 1_800_000_000_000;
        assert_eq!(exptime(2_592_000, 0, wall_ms), Some(2_592_000));
        assert_eq!(exptime(3_456_000, 0, wall_ms), Some(1_800_000_000 + 3_456_000));
        assert_eq!(exptime(u32::MAX, 0, wall_ms), Some(u32::MAX));
    }
}
