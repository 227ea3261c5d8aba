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
use crate::memcached::{Applied, Connection, MemcachedError, Write, WriteOp};
use crate::pulse::{PULSE_EVERY, Pulse};
use crate::relay::wall_ms;
use crate::sabotage;
use crate::stamps::{SessionId, StampTable, Verdict};
use crate::telemetry::{AnsweredItem, MemcachedInstruments, RateLimit};
use crate::wire::{Expiry, Item, ItemOp, Status};

/// Items of one call to memcached: enough to make its round trip cheap, few enough to answer soon.
const MAX_ITEMS: usize = 2048;
/// Bytes of values of one call.
pub const MAX_BYTES: usize = 2 << 20;
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
    /// Index in the batch, and the item; `cache` is the local index.
    pub items: Vec<(u32, Item)>,
}

/// What became of a part. A fact.
#[derive(Message, Debug)]
#[rtype(result = "()")]
pub struct ItemsApplied {
    /// Which batch of the session.
    pub batch: u64,
    /// This writer's server number.
    pub server: usize,
    /// By index in the batch; `None` is applied.
    pub results: Vec<(u32, Option<Status>)>,
    /// The tick after these writes.
    pub tick: u64,
    /// Microseconds from received to written.
    pub queued_us: u64,
    /// Microseconds that memcached took.
    pub applied_us: u64,
}

/// An item that was admitted to the call at hand.
struct Sent {
    part: usize,
    index: u32,
    /// How it ends if memcached does as asked, when that is not simply applied.
    status: Option<Status>,
    touch: bool,
}

/// A call to memcached, and whom it answers.
struct Call {
    parts: Vec<Answering>,
    sent: Vec<Sent>,
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
            started,
            stuck: false,
            slow: false,
            unsent: false,
        }
    }
}

struct Answering {
    live: Arc<AtomicBool>,
    reply: Recipient<ItemsApplied>,
    batch: u64,
    received: Instant,
    results: Vec<(u32, Option<Status>)>,
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
    /// Of an item, by its index in the batch, if it is traced.
    pub fn of(index: u32, item: &Item) -> Option<TracedItem> {
        Some(TracedItem {
            index,
            context: item.trace?,
            cache: item.cache,
            op: item.op,
            key: item.key.clone(),
        })
    }

    /// Makes its spans, now that it is answered.
    pub fn answered(
        &self,
        shared: &AgentShared,
        (peer, server): (&str, usize),
        (received, called): (Instant, Option<Instant>),
        results: &[(u32, Option<Status>)],
    ) {
        let status = results.iter().find(|(index, _)| *index == self.index);
        let status = status.and_then(|(_, status)| *status);
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
            answer: status.map_or("applied", Status::name),
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
            self.call(Call::new(now), Vec::new(), ctx);
        }
    }

    fn call(&mut self, call: Call, writes: Vec<Write>, ctx: &mut Context<Self>) {
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
        for sent in call.sent.drain(..) {
            answered.parts[sent.part]
                .results
                .push((sent.index, Some(Status::Later)));
        }
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
    fn collect(&mut self) -> (Call, Vec<Write>) {
        let now = Instant::now();
        let wall = wall_ms();
        let mut call = Call::new(now);
        let mut writes = Vec::new();
        let mut bytes = 0;
        while writes.len() < MAX_ITEMS && bytes < MAX_BYTES {
            // The slot goes back when this turn of the loop ends: the contents are in the call.
            let Some((part, _slot)) = self.queue.pop_front() else {
                break;
            };
            if !part.live.load(SeqCst) {
                continue;
            }
            let mut results = Vec::with_capacity(part.items.len());
            let mut traced = Vec::new();
            let waited_us = now.saturating_duration_since(part.received).as_micros() as u64;
            for (index, item) in part.items {
                traced.extend(TracedItem::of(index, &item));
                let slot = hashing::slot_hash(&item.key);
                if self.stamps.admit(slot, part.session, item.looked_at, now) == Verdict::LookAgain {
                    results.push((index, Some(Status::LookAgain)));
                    continue;
                }
                if sabotage::drop_acked_item() {
                    results.push((index, None));
                    continue;
                }
                let age_us =
                    // Whatever a peer says of itself: an absurd age is an expired item, never a negative one.
                    item.age_us.saturating_add(part.held_us).saturating_add(waited_us);
                let max_value = self.shared.config.caches[item.cache as usize].max_value_bytes;
                bytes += item.value.len() + item.key.len();
                let touch = item.op == ItemOp::Touch;
                let (write, status) = as_write(item, age_us, wall, max_value);
                writes.push(write);
                call.sent.push(Sent {
                    part: call.parts.len(),
                    index,
                    status,
                    touch,
                });
            }
            call.parts.push(Answering {
                live: part.live,
                reply: part.reply,
                batch: part.batch,
                received: part.received,
                results,
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
            Ok((connection, results)) => {
                self.link = Link::Ready(connection);
                if !results.is_empty() {
                    // Not the probes: they would be most of a server's calls that nothing is written to.
                    self.calls.call_answered(now.saturating_duration_since(call.started));
                }
                if self.answered(now.saturating_duration_since(call.started), now) {
                    tracing::info!(server = self.address(), "memcached answers again");
                }
                let mut refusal = None;
                for (sent, result) in call.sent.drain(..).zip(results) {
                    let status = match result {
                        Applied::Done => sent.status,
                        Applied::NotFound if sent.touch => Some(Status::LookAgain),
                        Applied::NotFound => sent.status,
                        Applied::TooLarge => Some(Status::TooLarge),
                        Applied::Refused(reason) => {
                            refusal = Some(reason);
                            Some(Status::Later)
                        }
                    };
                    call.parts[sent.part].results.push((sent.index, status));
                }
                if let Some(reason) = refusal
                    && self.refusal_said.is_none_or(|said| now - said >= REFUSALS_EVERY)
                {
                    self.refusal_said = Some(now);
                    tracing::warn!(server = self.address(), reason, "memcached refused a write");
                }
            }
            Err(error) => {
                if let Some(unsaid) = BROKEN.due(self.address()) {
                    tracing::warn!(server = self.address(), %error, unsaid, "memcached connection failed, keys without an answer are looked at again");
                }
                self.link = Link::None;
                self.calls.call_failed();
                self.fence.passes(self.server, None);
                self.breaker.record_failure(now, rand::random());
                for sent in call.sent.drain(..) {
                    call.parts[sent.part]
                        .results
                        .push((sent.index, Some(Status::LookAgain)));
                }
                self.connect(ctx);
            }
        }
        let applied_us = now.saturating_duration_since(call.started).as_micros() as u64;
        self.answer(call, applied_us);
        self.show();
        self.advance(ctx);
    }

    fn answer(&mut self, call: Call, applied_us: u64) {
        let tick = self.tick.load(SeqCst);
        for part in call.parts {
            let queued_us = call.started.saturating_duration_since(part.received).as_micros() as u64;
            self.count(&part.results);
            for item in &part.traced {
                let times = (part.received, (!call.unsent).then_some(call.started));
                item.answered(&self.shared, (&part.peer, self.server), times, &part.results);
            }
            if part.live.load(SeqCst) {
                let (batch, server) = (part.batch, self.server);
                part.reply.do_send(ItemsApplied {
                    batch,
                    server,
                    results: part.results,
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
            let results: Vec<_> = part
                .items
                .iter()
                .map(|(index, _)| (*index, Some(Status::Later)))
                .collect();
            self.count(&results);
            for item in part
                .items
                .iter()
                .filter_map(|(index, item)| TracedItem::of(*index, item))
            {
                item.answered(&self.shared, (&part.peer, self.server), (part.received, None), &results);
            }
            part.reply.do_send(ItemsApplied {
                batch: part.batch,
                server: self.server,
                results,
                tick: self.tick.load(SeqCst),
                queued_us: part.received.elapsed().as_micros() as u64,
                applied_us: 0,
            });
        }
    }

    fn count(&self, results: &[(u32, Option<Status>)]) {
        let of = |wanted: Option<Status>| results.iter().filter(|(_, status)| *status == wanted).count() as u64;
        let counts = &self.shared.counts;
        counts.applied.fetch_add(of(None), Relaxed);
        counts.look_again.fetch_add(of(Some(Status::LookAgain)), Relaxed);
        counts.later.fetch_add(of(Some(Status::Later)), Relaxed);
        counts.expired.fetch_add(of(Some(Status::Expired)), Relaxed);
        counts.too_large.fetch_add(of(Some(Status::TooLarge)), Relaxed);
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

/// The connection back with a result per write, or why it is gone.
type Done = Result<(Box<Connection>, Vec<Applied>), MemcachedError>;

async fn write(mut connection: Box<Connection>, writes: Vec<Write>) -> Done {
    let mut results = Vec::with_capacity(writes.len());
    if writes.is_empty() {
        connection.noop().await?;
        return Ok((connection, results));
    }
    connection.apply(&writes, &mut results).await?;
    let large = results
        .iter()
        .zip(&writes)
        .filter(|(result, _)| matches!(result, Applied::TooLarge));
    let removals: Vec<Write> = large
        .map(|(_, write)| Write {
            key: write.key.clone(),
            op: WriteOp::Delete,
        })
        .collect();
    if !removals.is_empty() {
        // What cannot be stored must not leave the old copy behind.
        connection
            .apply(&removals, &mut Vec::with_capacity(removals.len()))
            .await?;
    }
    Ok((connection, results))
}

/// An item as a write, and how it ends if that is not simply applied. `age_us` is the time since the look.
fn as_write(item: Item, age_us: u64, wall_ms: i64, max_value: usize) -> (Write, Option<Status>) {
    let remove = |key, status| {
        (
            Write {
                key,
                op: WriteOp::Delete,
            },
            status,
        )
    };
    let expiry = match item.expiry {
        Expiry::Never => Some(0),
        Expiry::Seconds(seconds) => exptime(seconds, age_us, wall_ms),
    };
    match (item.op, expiry) {
        (ItemOp::Remove, _) => remove(item.key, None),
        (_, None) => remove(item.key, Some(Status::Expired)),
        (ItemOp::Set, _) if item.value.len() > max_value => remove(item.key, Some(Status::TooLarge)),
        (ItemOp::Set, Some(expiry)) => {
            let op = WriteOp::Set {
                value: item.value,
                flags: item.flags,
                expiry,
            };
            (Write { key: item.key, op }, None)
        }
        (ItemOp::Touch, Some(expiry)) => (
            Write {
                key: item.key,
                op: WriteOp::Touch { expiry },
            },
            None,
        ),
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
