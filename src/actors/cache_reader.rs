//! CacheReader: one per memcached server of this region and lane.
//!
//! In: events ([`LookAt`]), dirty keys ([`KeysDirtied`]), and what the link says about its session. Out: items to the
//! lane's coalescer. It looks only while there is a session, one pipelined read at a time; every look is stamped with the
//! last tick heard before it was sent.
//! It holds the dirty keys of its server with their backoff, and the server's circuit breaker; a failed look is a state.
//! A dirty key beyond `flow.max_dirty_keys`, or one that has waited for longer than `flow.retry_budget` while the peer was
//! there, is parked: its event goes to the retry topic ([`crate::parking`]). A peer that is away parks nothing.
//! Bounded by: `mailbox.cache_reader`, the flow's permits and bytes, [`MAX_PARKING`], and `flow.max_dirty_keys`, beyond
//! which, while nothing can be parked, no mailbox slot is given up: the dirty keys exceed it by what is in the mailbox and
//! in flight at most.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use actix::prelude::*;
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::breaker::{Allows, Breaker, BreakerState};
use crate::dirty::{Dirtied, DirtySet};
use crate::event::Op;
use crate::failpoint;
use crate::handoff::{Carried, Handoff, Slot};
use crate::kafka::{KafkaError, Produce, Producer};
use crate::look::{MeanSize, expiry, remaining};
use crate::memcached::{Connection, Look, Looked, MemcachedError};
use crate::outcome::Outcome;
use crate::parking::{self, RetryRecord};
use crate::permits::Urgency;
use crate::pulse::{PULSE_EVERY, Pulse};
use crate::relay::{
    FlowShared, HeldEvent, HeldItem, ITEM_OVERHEAD, LaneClock, Next, Reports, Seen, Stage, WaitView, wall_ms,
};
use crate::telemetry::{Note, PathStage};

use crate::telemetry::MemcachedInstruments;

use super::batch_coalescer::TakeItems;

/// A key without a value is looked at once more after this: the event may be ahead of the write.
const SECOND_LOOK_AFTER: Duration = Duration::from_millis(25);
/// An event older than this is not ahead of its write.
const SECOND_LOOK_UNTIL_MS: i64 = 1_000;
/// One read takes so many-th of the flow's bytes at most.
const READ_PART: usize = 8;
/// Room for so many events is made before they are counted.
const READ_AHEAD: usize = 1024;
/// In a cache that invalidates: no touch is looked at for so long after a look that failed.
const NO_LOOK_FOR: Duration = Duration::from_secs(1);
/// How often what keys wait for is published.
const PUBLISH_EVERY: Duration = Duration::from_millis(250);
/// Events of one reader that are being parked; more wait as dirty keys, and in Kafka.
pub const MAX_PARKING: usize = 8192;
/// Calls of one reader that park events; what comes meanwhile waits for the next one.
const MAX_PARKS: usize = 4;
/// Retry records that are produced at once: enough to fill Kafka's batches.
const PARKED_AT_ONCE: usize = 1024;
/// How long one retry record may wait for its acknowledgement before its event is kept instead.
const PARK_WITHIN: Duration = Duration::from_secs(5);
/// Pause after Kafka has refused a retry record.
const PARK_PAUSE: Duration = Duration::from_secs(1);
/// How often, at most and at least, it is asked which events have waited for too long.
const OVERDUE_EVERY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Events to look at, in order. Travels by hand-off.
#[derive(Debug)]
pub struct LookAt {
    /// Each holds a permit.
    pub events: Vec<HeldEvent>,
}

/// Keys that must be looked at again. A fact: their events have given their permits up already.
#[derive(Message, Debug)]
#[rtype(result = "()")]
pub struct KeysDirtied(pub Vec<(HeldEvent, Dirtied)>);

/// The lane's link has a session: looks may be made.
#[derive(Message, Clone, Copy)]
#[rtype(result = "()")]
pub struct SessionStarted;

/// These keys were answered, otherwise than `later`: if one was a probe, the keys that wait for its server may go.
#[derive(Message, Debug)]
#[rtype(result = "()")]
pub struct KeysAnswered(pub Vec<(u16, Bytes)>);

/// The partition of this partition consumer is given back: what of it is dirty, or becomes so, is parked.
#[derive(Message, Clone, Copy, Debug)]
#[rtype(result = "()")]
pub struct ParkPartition(pub u32);

/// What a cache reader is made of.
pub struct CacheReaderParts {
    /// What the flow's actors share.
    pub shared: Arc<FlowShared>,
    /// Which lane.
    pub lane: usize,
    /// Number of its server among all servers of all caches.
    pub number: usize,
    /// Index of its cache.
    pub cache: usize,
    /// `host:port` of its server.
    pub address: String,
    /// What the lane has heard.
    pub clock: Arc<LaneClock>,
    /// Where its items go.
    pub coalescer: Handoff<TakeItems>,
    /// Parks events.
    pub producer: Producer,
}

/// A message that was taken in, with the slot it occupies until its last event is looked at.
struct Inbound {
    events: std::vec::IntoIter<HeldEvent>,
    _slot: Slot,
}

/// See the module.
pub struct CacheReader {
    parts: CacheReaderParts,
    /// Its cache is one with `on_set = "invalidate"`: what is looked at there are [`CacheReader::touches`].
    invalidates: bool,
    /// Touches that do not say how long. Nothing else waits for them: a removal that overtakes one leaves nothing to touch.
    touches: Vec<HeldEvent>,
    /// Some are being looked at.
    touches_are_read: bool,
    /// When that failed.
    look_failed_at: Option<Instant>,
    inbox: VecDeque<Inbound>,
    /// Messages whose events are dirty keys beyond `flow.max_dirty_keys`: they keep their slots.
    overflow: Vec<Inbound>,
    dirty: DirtySet<HeldEvent>,
    /// Dirty keys that have a permit again.
    ready: VecDeque<HeldEvent>,
    /// Keys without a value, until their second look.
    missed: VecDeque<(Instant, HeldEvent)>,
    /// Permits for dirty keys are being waited for.
    acquiring: bool,
    /// Dirty, and about to be parked.
    to_park: Vec<HeldEvent>,
    /// Events on their way to the retry topic.
    parking: usize,
    /// In how many calls.
    parks: usize,
    /// Kafka has refused a retry record: nothing is parked before.
    refused_until: Option<Instant>,
    /// The flow has been told that there is no room for another dirty key.
    was_crowded: bool,
    /// When the last session was seen to have ended.
    no_session_since: Instant,
    /// Partition consumers whose events are parked.
    leaving: HashSet<u32>,
    /// The session that is open and since when: time without one counts towards no budget.
    session: (u64, Option<Instant>),
    connection: Option<Connection>,
    reading: bool,
    /// Messages of other partitions may be about to come.
    gathering: bool,
    /// When the read at hand was begun.
    look_began: Instant,
    /// It takes so long that nothing waits behind it.
    stuck: bool,
    sending: bool,
    outbox: Vec<HeldItem>,
    waits_for_bytes: bool,
    breaker: Breaker,
    source_away_since: Option<Instant>,
    last_error: Option<String>,
    mean: MeanSize,
    timer: Option<(Instant, SpawnHandle)>,
    published: usize,
    calls: MemcachedInstruments,
    pulse: Arc<Pulse>,
}

impl CacheReader {
    /// A reader without connection; it dials when it first looks.
    pub fn new(parts: CacheReaderParts) -> Self {
        let config = &parts.shared.config;
        let backoff = Backoff::clamped(config.memcached.backoff_initial, config.memcached.backoff_max);
        let cache = &config.caches[parts.cache];
        let invalidates = cache.invalidates();
        CacheReader {
            invalidates,
            touches: Vec::new(),
            touches_are_read: false,
            look_failed_at: None,
            inbox: VecDeque::new(),
            overflow: Vec::new(),
            dirty: DirtySet::new(rand::random()),
            ready: VecDeque::new(),
            missed: VecDeque::new(),
            acquiring: false,
            to_park: Vec::new(),
            parking: 0,
            parks: 0,
            was_crowded: false,
            no_session_since: Instant::now(),
            refused_until: None,
            leaving: HashSet::new(),
            session: (0, None),
            connection: None,
            reading: false,
            gathering: false,
            look_began: Instant::now(),
            stuck: false,
            sending: false,
            outbox: Vec::new(),
            waits_for_bytes: false,
            breaker: Breaker::new(config.memcached.breaker_failures, backoff),
            source_away_since: None,
            last_error: None,
            // No value is read to invalidate a copy.
            mean: MeanSize::new(if invalidates { 0 } else { cache.max_value_bytes }),
            timer: None,
            published: 0,
            calls: {
                let cache = &config.caches[parts.cache].name;
                parts.shared.instruments.memcached(cache, &parts.address, "look")
            },
            pulse: {
                let place = format!("lane {}, server {}", parts.lane, parts.address);
                parts.shared.view.pulses.register("cache_reader", place)
            },
            parts,
        }
    }
}

impl Actor for CacheReader {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.run_interval(PUBLISH_EVERY, |act, _| act.publish());
        let config = &self.parts.shared.config;
        let overdue = (config.flow.retry_budget / 4).clamp(OVERDUE_EVERY.0, OVERDUE_EVERY.1);
        ctx.run_interval(overdue, |act, ctx| act.park_overdue(ctx));
        ctx.run_interval(config.memcached.look_at_calls_every(), |act, ctx| act.check_look(ctx));
        ctx.run_interval(PULSE_EVERY, |act, _| act.show_pulse());
    }
}

impl Handler<Carried<LookAt>> for CacheReader {
    type Result = ();

    fn handle(&mut self, carried: Carried<LookAt>, ctx: &mut Self::Context) {
        self.inbox.push_back(Inbound {
            events: carried.message.events.into_iter(),
            _slot: carried.slot,
        });
        if self.reading || self.gathering {
            // The next look takes it along.
            if self.stuck {
                self.advance(ctx);
            }
            return;
        }
        // The other partitions hand on what came with it at this moment: one look for all of them.
        self.gathering = true;
        ctx.spawn(tokio::task::yield_now().into_actor(self).map(|(), act, ctx| {
            act.gathering = false;
            act.advance(ctx);
        }));
    }
}

impl Handler<KeysDirtied> for CacheReader {
    type Result = ();

    fn handle(&mut self, KeysDirtied(keys): KeysDirtied, ctx: &mut Self::Context) {
        let now = Instant::now();
        let mut reports = Reports::default();
        for (event, why) in keys {
            self.hold_dirty(event, why, now, &mut reports);
        }
        self.parts.shared.report(&mut reports);
        self.advance(ctx);
    }
}

impl Handler<SessionStarted> for CacheReader {
    type Result = ();

    fn handle(&mut self, _: SessionStarted, ctx: &mut Self::Context) {
        self.advance(ctx);
    }
}

impl Handler<ParkPartition> for CacheReader {
    type Result = ();

    fn handle(&mut self, ParkPartition(consumer): ParkPartition, ctx: &mut Self::Context) {
        self.leaving.insert(consumer);
        if self.peer_takes() && self.refused_until.is_none() {
            let its = |event: &HeldEvent| event.ticket.consumer == consumer;
            self.dirty
                .take_where(Instant::now(), usize::MAX, its, &mut self.to_park);
        }
        self.advance(ctx);
    }
}

impl Handler<KeysAnswered> for CacheReader {
    type Result = ();

    fn handle(&mut self, KeysAnswered(keys): KeysAnswered, ctx: &mut Self::Context) {
        for (cache, key) in keys {
            self.dirty.key_answered(cache, &key);
        }
        self.advance(ctx);
    }
}

impl CacheReader {
    fn show_pulse(&self) {
        let away = || !matches!(self.breaker.state(Instant::now()), BreakerState::Closed);
        let waits_for = if self.parts.clock.read().0 == 0 {
            Some("a session")
        } else if self.sending {
            Some("room at the coalescer")
        } else if self.reading || self.touches_are_read {
            // Has a limit of its own.
            Some("memcached's answer")
        } else if self.waits_for_bytes {
            Some("bytes in flight")
        } else if away() {
            Some("memcached, which is away")
        } else {
            None
        };
        let events = self.inbox.len() + self.ready.len() + self.missed.len() + self.outbox.len() + self.touches.len();
        self.pulse.holds(events as u64, waits_for);
    }

    /// Does whatever can be done now; called after everything that happens.
    fn advance(&mut self, ctx: &mut Context<Self>) {
        let now = Instant::now();
        // Also without a session: the link turns them back into keys, which hold no bytes.
        self.send(ctx);
        self.park(ctx);
        let (session, tick) = self.parts.clock.read();
        if session != self.session.0 {
            self.session = (session, (session != 0).then_some(now));
            self.no_session_since = now;
        }
        self.tell_crowded();
        if session == 0 {
            // Takes nothing: Kafka holds the rest.
            return;
        }
        if !self.full() {
            self.overflow.clear();
        }
        if self.stuck {
            self.shelve(&Dirtied::SourceAway, now);
            self.park(ctx);
            return;
        }
        self.acquire(now, ctx);
        if !self.reading && self.outbox.is_empty() {
            match self.breaker.state(now) {
                BreakerState::Closed => while self.read(session, tick, now, self.read_size(), ctx) {},
                _ => self.set_aside(session, tick, now, ctx),
            }
        }
        if !self.touches.is_empty() && !self.touches_are_read {
            let touches = std::mem::take(&mut self.touches);
            self.look(touches, session, tick, now, ctx);
        }
        self.park(ctx);
        self.set_timer(ctx);
    }

    /// Lets the flow's retry partitions know whether there is room for dirty keys.
    fn tell_crowded(&mut self) {
        let crowded = self.crowded();
        if crowded != self.was_crowded {
            self.was_crowded = crowded;
            match crowded {
                true => self.parts.shared.crowded.fetch_add(1, SeqCst),
                false => self.parts.shared.crowded.fetch_sub(1, SeqCst),
            };
        }
    }

    /// There is room for no further dirty key.
    fn crowded(&self) -> bool {
        self.dirty.len() >= self.parts.shared.config.flow.max_dirty_keys
    }

    /// No new message is taken while there are too many dirty keys and none can be parked.
    fn full(&self) -> bool {
        self.crowded() && !self.can_park()
    }

    /// Whether the peer is there and takes this cache. What waits for it to do so is not parked, for that would be everything.
    fn peer_takes(&self) -> bool {
        self.session.0 != 0 && self.parts.clock.read().0 == self.session.0 && self.parts.clock.accepts(self.parts.cache)
    }

    /// Whether an event may go to the retry topic: the peer is there, Kafka takes records, and not too many are on their way.
    fn can_park(&self) -> bool {
        self.peer_takes() && self.refused_until.is_none() && self.parking + self.to_park.len() < MAX_PARKING
    }

    /// Events that have waited for longer than the budget are parked. The time that a peer was away does not count: what it
    /// left behind only needs to be looked at.
    fn park_overdue(&mut self, ctx: &mut Context<Self>) {
        let now = Instant::now();
        if self.refused_until.is_some_and(|until| until <= now) {
            self.refused_until = None;
        }
        if !self.dirty.is_empty() || !self.leaving.is_empty() {
            let live = self.parts.shared.live_consumers();
            self.leaving.retain(|consumer| live.contains(consumer));
            // An event of an assignment that is over was given back: whoever has the partition now reads it again.
            let over = |event: &HeldEvent| !live.contains(&event.ticket.consumer);
            self.dirty.take_where(now, usize::MAX, over, &mut Vec::new());
        }
        let Some(since) = self.session.1.filter(|_| self.can_park() && !self.dirty.is_empty()) else {
            return;
        };
        let budget = self.parts.shared.config.flow.retry_budget;
        let leaving = &self.leaving;
        let overdue = |event: &HeldEvent| {
            let waited = now - event.dirty_since.map_or(since, |dirty| dirty.max(since));
            // Those that could not be parked when their partition was given back.
            waited >= budget || leaving.contains(&event.ticket.consumer)
        };
        let room = MAX_PARKING - self.parking - self.to_park.len();
        self.dirty.take_where(now, room, overdue, &mut self.to_park);
        self.advance(ctx);
    }

    /// Sends what is to be parked to the retry topic; what Kafka refuses is dirty again.
    fn park(&mut self, ctx: &mut Context<Self>) {
        if self.to_park.is_empty() || self.parks >= MAX_PARKS {
            return;
        }
        self.parks += 1;
        let events = std::mem::take(&mut self.to_park);
        self.parking += events.len();
        let (shared, producer) = (self.parts.shared.clone(), self.parts.producer.clone());
        let park = async move {
            let park = |event| park_one(event, &shared, &producer);
            let all = futures_util::stream::iter(events)
                .map(park)
                .buffer_unordered(PARKED_AT_ONCE);
            all.collect::<Vec<_>>().await
        };
        ctx.spawn(park.into_actor(self).map(|parked, act, ctx| act.parked(parked, ctx)));
    }

    fn parked(&mut self, parked: Vec<(HeldEvent, Result<(), KafkaError>)>, ctx: &mut Context<Self>) {
        let now = Instant::now();
        self.parks -= 1;
        self.parking -= parked.len();
        let mut reports = Reports::default();
        let shared = self.parts.shared.clone();
        let (mut refused, mut kept) = (None, 0);
        for (mut event, result) in parked {
            match result {
                Ok(()) => {
                    event.note(|| Note::Parked, now);
                    reports.finished_dirty(&event, Outcome::Parked);
                    shared.trace_failed(&mut event, Outcome::Parked, "parked on the retry topic");
                }
                Err(error) => {
                    refused = Some(error);
                    kept += 1;
                    let why = self.waits_for_source();
                    self.keep_dirty(event, why, now, &mut reports);
                }
            }
        }
        if let Some(error) = refused {
            tracing::warn!(
                flow = self.parts.shared.view.name,
                server = self.parts.address,
                events = kept,
                %error,
                "kafka does not take retry records, their events are kept and nothing is committed past them"
            );
            self.refused_until = Some(now + PARK_PAUSE);
        }
        self.parts.shared.report(&mut reports);
        self.advance(ctx);
    }

    /// What a key of this server waits for when nothing else is known.
    fn waits_for_source(&self) -> Dirtied {
        match self.breaker.state(Instant::now()) {
            BreakerState::Closed if !self.stuck => Dirtied::LookAgain,
            _ => Dirtied::SourceAway,
        }
    }

    /// A read that takes long keeps nothing waiting behind it: what else there is waits as dirty, without permits or slots.
    fn check_look(&mut self, ctx: &mut Context<Self>) {
        if !self.reading || self.stuck {
            return;
        }
        if self.look_began.elapsed() >= self.parts.shared.config.memcached.stuck_limit() {
            self.stuck = true;
            self.source_away_since.get_or_insert(self.look_began);
            self.advance(ctx);
        }
    }

    /// Turns everything at hand into dirty keys, so that it holds no permits that others could use. The slots of its
    /// messages stay taken while the set is full: that is what stops the partitions.
    fn shelve(&mut self, why: &Dirtied, now: Instant) {
        let mut reports = Reports::default();
        let missed = std::mem::take(&mut self.missed).into_iter().map(|(_, event)| event);
        let mut events: Vec<HeldEvent> = self.ready.drain(..).chain(missed).collect();
        while let Some(event) = self.next_inbound() {
            events.push(event);
        }
        for event in events {
            reports.dirty(&event);
            self.hold_dirty(event, why.clone(), now, &mut reports);
        }
        self.parts.shared.report(&mut reports);
    }

    /// While the server does not answer: one key goes as a probe when it is time, everything else waits as dirty.
    fn set_aside(&mut self, session: u64, tick: u64, now: Instant, ctx: &mut Context<Self>) {
        let due = self.breaker.probe_at().is_some_and(|at| at <= now);
        if due && self.ready.is_empty() && self.dirty.is_empty() && !self.acquiring {
            // Nobody waits who could ask: what comes does, or a path that has only canaries would never live again.
            let first = self.next_inbound();
            self.ready.extend(first);
        }
        if self.ready.is_empty() {
            self.shelve(&Dirtied::SourceAway, now);
            // One of the waiting keys asks whether the server is back; the others wait on.
            if due
                && !self.acquiring
                && let Some(event) = self.dirty.take_source_probe()
            {
                self.take_permits(vec![event], ctx);
            }
            return;
        }
        if self.breaker.allows(now) == Allows::Probe {
            self.read(session, tick, now, 1, ctx);
            if !self.reading {
                // Nothing that must be looked at, so nothing asked.
                self.breaker.record_abandoned();
            }
        }
        self.shelve(&Dirtied::SourceAway, now);
    }

    /// Keys that are due ask for permits, before new chunks do.
    fn acquire(&mut self, now: Instant, ctx: &mut Context<Self>) {
        if self.acquiring || self.dirty.is_empty() || !self.ready.is_empty() {
            return;
        }
        let mut due = Vec::new();
        let most = self
            .parts
            .shared
            .config
            .memcached
            .max_read_keys
            .min(self.parts.shared.permits.total() / 4)
            .max(1);
        self.dirty.take_due(now, most, &mut due);
        if due.is_empty() {
            return;
        }
        if self.dirty.waiting_for().next().is_some() {
            due.iter_mut().for_each(|event| event.probe = true);
        }
        self.take_permits(due, ctx);
    }

    fn take_permits(&mut self, due: Vec<HeldEvent>, ctx: &mut Context<Self>) {
        self.acquiring = true;
        let (shared, number) = (self.parts.shared.clone(), self.parts.number);
        let take = async move {
            shared.permits.take(vec![(number, due.len())], Urgency::Dirty).await;
            due
        };
        ctx.spawn(take.into_actor(self).map(|due, act, ctx| {
            let mut reports = Reports::default();
            for event in &due {
                reports.in_flight(event.ticket);
            }
            act.parts.shared.report(&mut reports);
            act.ready.extend(due);
            act.acquiring = false;
            act.advance(ctx);
        }));
    }

    fn next_inbound(&mut self) -> Option<HeldEvent> {
        loop {
            let front = self.inbox.front_mut()?;
            if let Some(event) = front.events.next() {
                if front.events.len() == 0 {
                    self.taken_over();
                }
                return Some(event);
            }
            self.taken_over();
        }
    }

    /// Takes up to `most` events out of the messages, oldest first.
    fn take_inbound(&mut self, most: usize, events: &mut Vec<HeldEvent>) {
        while events.len() < most
            && let Some(front) = self.inbox.front_mut()
        {
            events.extend(front.events.by_ref().take(most - events.len()));
            if front.events.len() == 0 {
                self.taken_over();
            }
        }
    }

    /// The oldest message has no more events: its slot is given up, unless the dirty keys are too many already.
    fn taken_over(&mut self) {
        if let Some(message) = self.inbox.pop_front()
            && self.full()
        {
            self.overflow.push(message);
        }
    }

    /// How many keys the next read may ask for: what the free bytes hold of values of the mean size, and a part of all bytes,
    /// for memcached's replies must be there within the time of one call.
    fn read_size(&self) -> usize {
        let bytes = &self.parts.shared.bytes;
        let room = bytes.free().min(bytes.limit() / READ_PART) / (self.mean.bytes() + ITEM_OVERHEAD);
        room.min(self.parts.shared.config.memcached.max_read_keys).max(1)
    }

    /// Starts one read of at most `most` keys; true when it could do more without waiting for anything.
    fn read(&mut self, session: u64, tick: u64, now: Instant, most: usize, ctx: &mut Context<Self>) -> bool {
        let _inside = self.pulse.enter("read");
        fail::fail_point!("cache_reader_read", |_| false);
        if self.full() && !self.inbox.is_empty() {
            // What is new waits behind what is dirty, and is looked at when it is its turn.
            self.shelve(&Dirtied::SessionLost, now);
            self.acquire(now, ctx);
        }
        if self.ready.is_empty() && self.inbox.is_empty() && self.missed.front().is_none_or(|(due, _)| *due > now) {
            return false;
        }
        if self.parts.shared.bytes.free() == 0 {
            self.wait_for_bytes(ctx);
            return false;
        }
        let mut events = Vec::with_capacity(most.min(READ_AHEAD));
        let mut reports = Reports::default();
        if self.dirty.is_empty() && self.ready.is_empty() && self.missed.is_empty() {
            // The usual case: what came is what is read.
            self.take_inbound(most, &mut events);
        }
        while events.len() < most {
            let event = match self.ready.pop_front() {
                Some(event) => event,
                None => match self.missed.front() {
                    Some((due, _)) if *due <= now => match self.missed.pop_front() {
                        Some((_, event)) => event,
                        None => break,
                    },
                    _ => match self.next_inbound() {
                        Some(event) => event,
                        None => break,
                    },
                },
            };
            if !self.dirty.is_empty() && self.dirty.contains(event.cache, &event.key) {
                // It joins the key that waits and supersedes the event that waited.
                reports.dirty(&event);
                self.join(event, now, &mut reports);
                continue;
            }
            events.push(event);
        }
        self.parts.shared.report(&mut reports);
        if events.is_empty() {
            return false;
        }
        if !self.parts.clock.accepts(self.parts.cache) {
            self.wait_for_cache(events, now);
            return true;
        }
        if self.invalidates {
            // What an event says of its key's time is believed. One that says nothing, such as the front door's that comes late
            // and may have been overtaken by another touch, asks for what it is now.
            let looks = self.look_failed_at.is_none_or(|at| now - at >= NO_LOOK_FOR);
            let unknown = |event: &HeldEvent| event.op == Op::Touch && !event.full && event.ttl.is_none();
            if looks && events.iter().any(unknown) {
                let (touches, rest): (Vec<_>, Vec<_>) = events.into_iter().partition(unknown);
                self.touches.extend(touches);
                events = rest;
            }
            self.invalidate(events, session, tick, now, ctx);
            return false;
        }
        self.look(events, session, tick, now, ctx);
        false
    }

    /// The peer does not know this cache, or does not let us write it: its keys wait, and ask now and then.
    fn wait_for_cache(&mut self, events: Vec<HeldEvent>, now: Instant) {
        let cache = &self.parts.shared.config.caches[self.parts.cache].name;
        let server: Arc<str> = format!("{} to accept cache {cache}", self.parts.shared.peer().region).into();
        let mut reports = Reports::default();
        for event in events {
            reports.dirty(&event);
            self.hold_dirty(event, Dirtied::Later { server: server.clone() }, now, &mut reports);
        }
        self.parts.shared.report(&mut reports);
    }

    fn look(&mut self, mut events: Vec<HeldEvent>, session: u64, tick: u64, now: Instant, ctx: &mut Context<Self>) {
        failpoint::at_keys("cache_reader_event", events.iter().map(|event| &event.key));
        events.iter_mut().for_each(|event| event.enter(PathStage::Look, now));
        match self.invalidates {
            true => self.touches_are_read = true,
            false => self.reading = true,
        }
        self.look_began = now;
        let reserved = events.len() * (self.mean.bytes() + ITEM_OVERHEAD);
        self.parts.shared.take_bytes(reserved);
        let connection = self.connection.take();
        let address = self.parts.address.clone();
        let settings = self.parts.shared.config.memcached.clone();
        let read = async move {
            let mut out = Vec::with_capacity(events.len());
            let work = async {
                if let Some(mut connection) = connection {
                    match connection.look(&events, &mut out).await {
                        Ok(()) => return Ok(connection),
                        // It was closed while it was idle, as memcached does (`idle_timeout`) and firewalls do.
                        Err(MemcachedError::Io { .. } | MemcachedError::Closed { .. }) => {}
                        Err(error) => return Err(error),
                    }
                }
                let mut connection = Connection::connect(&address, settings.connect_timeout).await?;
                connection.look(&events, &mut out).await?;
                Ok::<_, MemcachedError>(connection)
            };
            // A read that is given up harms nobody: its connection goes with it.
            let limit = settings.timeout + settings.connect_timeout;
            let result = match tokio::time::timeout(limit, work).await {
                Ok(Ok(connection)) => Ok(connection),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("no answer within {limit:?}")),
            };
            (result, events, out)
        };
        ctx.spawn(read.into_actor(self).map(move |(result, events, out), act, ctx| {
            (act.reading, act.touches_are_read) = (false, false);
            act.stuck = false;
            act.pulse.moved("looked");
            act.parts.shared.give_bytes(reserved);
            match result {
                Ok(connection) => {
                    act.connection = Some(connection);
                    match act.invalidates {
                        true => act.calls.call_answered(act.look_began.elapsed()),
                        false => act.server_answered(),
                    }
                    act.looked(events, out, session, tick, now);
                }
                Err(error) if act.invalidates => act.touches_in_vain(events, &error),
                Err(error) => act.look_failed(events, error),
            }
            act.advance(ctx);
        }));
    }

    fn server_answered(&mut self) {
        let (now, took) = (Instant::now(), self.look_began.elapsed());
        let limit = self.parts.shared.config.memcached.slow_limit();
        self.calls.call_answered(took);
        if took >= limit {
            self.server_failed(
                now,
                format!("answered only after {took:?}, memcached.slow_after is {limit:?}"),
            );
            if !matches!(self.breaker.state(now), BreakerState::Closed) {
                return;
            }
        } else if self.breaker.record_success() {
            tracing::info!(
                flow = self.parts.shared.view.name,
                server = self.parts.address,
                "memcached answers again"
            );
        }
        if self.source_away_since.take().is_some() {
            self.dirty.source_back();
        }
    }

    fn server_failed(&mut self, now: Instant, error: String) {
        if self.breaker.record_failure(now, rand::random()) {
            tracing::warn!(
                flow = self.parts.shared.view.name,
                server = self.parts.address,
                error,
                "memcached does not answer as it should, its keys wait"
            );
        }
        self.last_error = Some(error);
        if !matches!(self.breaker.state(now), BreakerState::Closed) {
            self.source_away_since.get_or_insert(now);
        }
    }

    /// Copies whose touches cannot be looked at go: nothing waits for a memcached of a cache that invalidates.
    fn touches_in_vain(&mut self, mut events: Vec<HeldEvent>, error: &str) {
        self.calls.call_failed();
        tracing::debug!(server = self.parts.address, error, "touches could not be looked at");
        self.look_failed_at = Some(Instant::now());
        events.iter_mut().for_each(|event| event.full = true);
        self.ready.extend(events);
    }

    fn look_failed(&mut self, events: Vec<HeldEvent>, error: String) {
        let now = Instant::now();
        self.calls.call_failed();
        self.server_failed(now, error);
        let why = self.waits_for_source();
        if why == Dirtied::LookAgain && self.source_away_since.take().is_some() {
            // What was set aside behind this read goes on like its own keys.
            self.dirty.source_back();
        }
        let mut reports = Reports::default();
        for event in events {
            reports.dirty(&event);
            self.hold_dirty(event, why.clone(), now, &mut reports);
        }
        self.parts.shared.report(&mut reports);
    }

    /// Turns what was seen into items.
    fn looked(&mut self, events: Vec<HeldEvent>, seen: Vec<Looked>, session: u64, tick: u64, looked: Instant) {
        let cache = &self.parts.shared.config.caches[self.parts.cache];
        let max_value = cache.max_value_bytes.min(self.parts.clock.max_value());
        let wall = wall_ms();
        let now = Instant::now();
        let (mut bytes, mut values, mut value_bytes) = (0, 0, 0);
        let before = self.outbox.len();
        self.outbox.reserve(events.len());
        let mut reports = Reports::default();
        if let Some(newest) = events.last() {
            self.parts.shared.lag(Stage::Looked, newest.produced_at_ms);
        }
        for (mut event, looked_as) in events.into_iter().zip(seen) {
            let seen = match looked_as {
                Looked::Hit { value, .. } if value.len() > max_value => {
                    value_bytes += value.len();
                    values += 1;
                    Seen::Nothing(Outcome::TooLarge)
                }
                Looked::Hit { ttl, .. } if event.op == Op::Touch && !event.full => Seen::Touch(expiry(ttl)),
                Looked::Hit { value, flags, ttl } => {
                    // A canary's size says nothing of the application's values.
                    value_bytes += if event.is_canary() { 0 } else { value.len() };
                    values += usize::from(!event.is_canary());
                    Seen::Value {
                        value,
                        flags,
                        expiry: expiry(ttl),
                    }
                }
                Looked::Miss | Looked::Stale { .. } if self.invalidates => Seen::Nothing(Outcome::Deleted),
                Looked::Miss if event.op == Op::Delete => Seen::Nothing(Outcome::Deleted),
                // The event may be ahead of the write: once more in a moment, while others pass.
                Looked::Miss if !event.missed && wall - event.produced_at_ms <= SECOND_LOOK_UNTIL_MS => {
                    event.missed = true;
                    event.note(|| Note::NotThereYet, now);
                    event.enter(PathStage::Wait, now);
                    self.missed.push_back((now + SECOND_LOOK_AFTER, event));
                    continue;
                }
                Looked::Miss | Looked::Stale { .. } => Seen::Nothing(Outcome::Missing),
                Looked::Refused(reason) => {
                    tracing::debug!(server = self.parts.address, reason, "memcached refused a look");
                    reports.dirty(&event);
                    self.hold_dirty(event, Dirtied::LookAgain, now, &mut reports);
                    continue;
                }
            };
            if let Some(trace) = &mut event.trace {
                trace.value_bytes = match &seen {
                    Seen::Value { value, .. } => Some(value.len()),
                    Seen::Touch(_) | Seen::Nothing(_) => None,
                };
                trace.enter(PathStage::Coalesce, now);
            }
            let item = HeldItem {
                event,
                seen,
                looked_at: tick,
                session,
                looked,
                seen_at: now,
            };
            bytes += item.bytes();
            self.outbox.push(item);
        }
        self.mean.saw(value_bytes, values);
        self.parts
            .shared
            .count_misses(self.parts.number, &self.outbox[before..]);
        self.parts.shared.take_bytes(bytes);
        self.parts.shared.report(&mut reports);
    }

    /// With `on_set = "invalidate"` nothing is looked at, touches apart that do not say how long: a set or a delete removes the
    /// peer's copy, a touch touches it.
    fn invalidate(&mut self, events: Vec<HeldEvent>, session: u64, tick: u64, now: Instant, ctx: &mut Context<Self>) {
        if events.is_empty() {
            return;
        }
        let mut bytes = 0;
        for mut event in events {
            event.enter(PathStage::Coalesce, now);
            let seen = match event.op {
                Op::Touch if !event.full => match remaining(event.ttl, event.produced_at_ms, wall_ms()) {
                    Some(expiry) => Seen::Touch(expiry),
                    None => Seen::Nothing(Outcome::Deleted),
                },
                _ => Seen::Nothing(Outcome::Deleted),
            };
            let item = HeldItem {
                event,
                seen,
                looked_at: tick,
                session,
                looked: now,
                seen_at: now,
            };
            bytes += item.bytes();
            self.outbox.push(item);
        }
        self.parts.shared.take_bytes(bytes);
        self.send(ctx);
    }

    /// Hands the outbox to the coalescer, one message at a time so that order survives.
    fn send(&mut self, ctx: &mut Context<Self>) {
        if self.sending || self.outbox.is_empty() {
            return;
        }
        self.sending = true;
        let items = std::mem::take(&mut self.outbox);
        let coalescer = self.parts.coalescer.clone();
        let send = async move { coalescer.send(TakeItems { items }).await.is_ok() };
        ctx.spawn(send.into_actor(self).map(|sent, act, ctx| {
            act.sending = false;
            act.pulse.moved("handed items on");
            if sent {
                act.advance(ctx);
            }
            // Else the coalescer is gone and the flow is about to be rebuilt from its committed offsets.
        }));
    }

    fn wait_for_bytes(&mut self, ctx: &mut Context<Self>) {
        if self.waits_for_bytes {
            return;
        }
        self.waits_for_bytes = true;
        let shared = self.parts.shared.clone();
        let least = self.mean.bytes() + ITEM_OVERHEAD;
        let wait = async move { shared.bytes.wait_for(least).await };
        ctx.spawn(wait.into_actor(self).map(|(), act, ctx| {
            act.waits_for_bytes = false;
            act.advance(ctx);
        }));
    }

    /// An event whose permit was given up waits as its key's one event, or is parked: when there is no room for another key,
    /// or nobody who could wait for it.
    fn hold_dirty(&mut self, mut event: HeldEvent, why: Dirtied, now: Instant, reports: &mut Reports) {
        if event.is_canary() {
            reports.lost(&event, why.name());
            return;
        }
        let leaves = !self.leaving.is_empty() && self.leaving.contains(&event.ticket.consumer);
        if (leaves || (self.crowded() && !self.dirty.contains(event.cache, &event.key))) && self.can_park() {
            event.key = Bytes::copy_from_slice(&event.key);
            event.full = true;
            self.dirty.forget_probe(&event, &why, now);
            self.to_park.push(event);
            return;
        }
        self.keep_dirty(event, why, now, reports);
    }

    fn keep_dirty(&mut self, mut event: HeldEvent, why: Dirtied, now: Instant, reports: &mut Reports) {
        event.dirty_since.get_or_insert(now);
        self.trace_dirty(&mut event, &why, now);
        // The key alone, or one waiting key would keep a whole chunk's buffer.
        event.key = Bytes::copy_from_slice(&event.key);
        (event.probe, event.missed, event.full) = (false, false, true);
        self.parts.shared.metrics.count_look_again(why.name());
        let held = self.dirty.held(event.cache, &event.key);
        let wins = held.is_none_or(|held| self.parts.shared.survives(&event, held));
        if let Some(older) = self.dirty.insert_judged(event, why, now, wins) {
            reports.finished_dirty(&older, Outcome::Superseded);
        }
    }

    /// The trace of an event whose key waits says for what.
    fn trace_dirty(&self, event: &mut HeldEvent, why: &Dirtied, now: Instant) {
        let Some(trace) = &mut event.trace else { return };
        trace.note(Note::LookAgain(why.name()), now);
        match why {
            Dirtied::Later { server } => trace.note(Note::BreakerOpen(server.clone()), now),
            Dirtied::SourceAway => trace.note(Note::BreakerOpen(self.parts.address.as_str().into()), now),
            Dirtied::SessionLost | Dirtied::LookAgain => {}
        }
        trace.enter(PathStage::Wait, now);
    }

    fn join(&mut self, mut event: HeldEvent, now: Instant, reports: &mut Reports) {
        if event.is_canary() {
            reports.lost(&event, Outcome::Superseded.name());
            return;
        }
        event.enter(PathStage::Wait, now);
        event.key = Bytes::copy_from_slice(&event.key);
        event.op = Op::merged(Op::Set, event.op);
        event.full = true;
        event.dirty_since.get_or_insert(now);
        let held = self.dirty.held(event.cache, &event.key);
        let wins = held.is_none_or(|held| self.parts.shared.survives(&event, held));
        match self.dirty.join_judged(event, wins) {
            Ok(older) => reports.finished_dirty(&older, Outcome::Superseded),
            Err(event) => self.hold_dirty(event, Dirtied::LookAgain, now, reports),
        }
    }

    /// Wakes at the next thing that is due by time alone.
    fn set_timer(&mut self, ctx: &mut Context<Self>) {
        let probe = (!self.dirty.is_empty()).then(|| self.breaker.probe_at()).flatten();
        let closed = matches!(self.breaker.state(Instant::now()), BreakerState::Closed);
        let missed = if closed {
            self.missed.front().map(|(due, _)| *due)
        } else {
            None
        };
        let dirty = if self.acquiring || !self.ready.is_empty() {
            None
        } else {
            self.dirty.next_due()
        };
        let Some(next) = [probe, missed, dirty].into_iter().flatten().min() else {
            return;
        };
        if let Some((at, handle)) = self.timer {
            if at <= next && at > Instant::now() {
                return;
            }
            ctx.cancel_future(handle);
        }
        // A moment at least: what is due now but cannot be done is woken by what it waits for.
        let wait = next
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        let handle = ctx.run_later(wait, |act, ctx| {
            act.timer = None;
            act.advance(ctx);
        });
        self.timer = Some((Instant::now() + wait, handle));
    }

    fn publish(&mut self) {
        let (lane, number, now) = (self.parts.lane, self.parts.number, Instant::now());
        let breaker = match self.stuck {
            // Nothing is read from it until the call has come back.
            true => BreakerState::Open { until: now },
            false => self.breaker.state(now),
        };
        self.parts.shared.show_breaker(lane, number, breaker);
        if self.dirty.is_empty() && self.published == 0 {
            return;
        }
        self.published = self.dirty.len();
        let mut waits: Vec<WaitView> = Vec::new();
        let mut elsewhere = 0;
        for waiting in self.dirty.waiting_for() {
            elsewhere += waiting.keys;
            waits.push(WaitView {
                server: waiting.server.to_string(),
                keys: waiting.keys,
                since: waiting.since,
                next: waiting.next_probe.map_or(Next::ProbeOut, Next::Probe),
            });
        }
        let rest = self.dirty.len().saturating_sub(elsewhere);
        if rest > 0 {
            let peer = |since| (self.parts.shared.peer().region.clone(), since);
            let ((server, since), next) = match self.source_away_since {
                Some(since) => {
                    let probe = self.breaker.probe_at().map_or(Next::ProbeOut, Next::Probe);
                    let next = if self.stuck { Next::Answer } else { probe };
                    ((self.parts.address.clone(), since), next)
                }
                None if self.parts.clock.read().0 == 0 => (peer(self.no_session_since), Next::Session),
                None => (peer(Instant::now()), Next::Look),
            };
            waits.push(WaitView {
                server,
                keys: rest,
                since,
                next,
            });
        }
        self.parts.shared.set_waits(self.parts.lane, self.parts.number, waits);
    }
}

impl Look for HeldEvent {
    fn key(&self) -> &[u8] {
        &self.key
    }
    fn value(&self) -> bool {
        self.op != Op::Touch || self.full
    }
}

/// Puts an event on its retry topic. Gives it back with what Kafka said.
async fn park_one(event: HeldEvent, shared: &FlowShared, producer: &Producer) -> (HeldEvent, Result<(), KafkaError>) {
    let record = RetryRecord::of(&event, &shared.config, shared.view.peer, wall_ms());
    let headers = parking::borrowed(&record.headers);
    let record = Produce {
        topic: &record.topic,
        partition: None,
        key: Some(&event.key),
        value: Some(&record.value),
        headers: &headers,
        timestamp_ms: None,
    };
    let result = producer.send(&record, PARK_WITHIN).await.map(|_| ());
    (event, result)
}
