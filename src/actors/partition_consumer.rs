//! PartitionConsumer: one per assigned partition of a flow.
//!
//! In: chunks, pulled one at a time from the partition's queue, so that outcomes never queue behind new work; outcomes from
//! the lanes. Out: events to the cache readers, watermarks to the poll thread, dead letters to Kafka.
//! After two panics with the same events in hand it hands these on apart, see [`crate::suspects`].
//! It ends when its partition is revoked; the next assignment gets a new one, with a new generation.
//! Bounded by: the queue (`mailbox.partition_consumer`), the permits of the flow, and [`MAX_DEAD_LETTERS`].

use std::hash::BuildHasher;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, PoisonError, mpsc};
use std::time::Duration;

use actix::prelude::*;
use bytes::Bytes;
use futures_util::StreamExt;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use tokio::time::Instant;

use crate::canary::Path;
use crate::event::{self, Op};
use crate::failpoint;
use crate::handoff::Handoff;
use crate::hashing;
use crate::kafka::{Produce, Producer};
use crate::memcached;
use crate::offsets::{Hold, Seq, Tracker};
use crate::outcome::Outcome;
use crate::parking::{self, Headers, KEPT_HEADER_BYTES, PRODUCED_AT};
use crate::permits::{self, PerServer, Urgency};
use crate::poll_thread::{
    Chunk, ChunkReady, PartitionQueue, PollCommand, RecordEntry, RecordExtra, RevokePartition, Revoked,
};
use crate::pulse::{PULSE_EVERY, Pulse};
use crate::relay::{
    EventsReported, Fate, FlowShared, HeldEvent, ORIGIN_OTHER, PartitionReport, Run, Stage, Ticket, wall_ms,
};
use crate::telemetry::{EventTrace, Note, RateLimit, Sampler};

use super::cache_reader::{LookAt, ParkPartition};

mod careful;

use careful::{Careful, Group, Trial};

/// Dead letters of one partition that wait for Kafka's acknowledgement; beyond it the partition takes no new chunk.
const MAX_DEAD_LETTERS: usize = 1024;
/// Dead letters that are produced at once: enough to fill Kafka's batches.
const DEAD_LETTERS_AT_ONCE: usize = 64;
/// A chunk of so many events shows whether its keys come again ...
const ENOUGH_TO_TELL: usize = 1024;
/// ... which they do when one event in so many is of a key that has one already.
const REPEATS: usize = 5;
/// How long one dead letter may wait for its acknowledgement before it is produced again.
const DEAD_LETTER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a retry partition waits between two chunks while there is no room for dirty keys.
const HELD_BACK_FOR: Duration = Duration::from_secs(1);
/// Pause before a dead letter that Kafka refused is produced again.
const DEAD_LETTER_PAUSE: Duration = Duration::from_millis(500);

/// The consumer ended in order: its partition was revoked.
#[derive(Message)]
#[rtype(result = "()")]
pub struct PartitionEnded(pub u32);

/// Every cache reader of a flow: by lane, then by server number.
pub type Readers = Arc<Vec<Vec<Handoff<LookAt>>>>;

/// Every cache reader of a flow, for facts.
pub type Parkers = Arc<Vec<Recipient<ParkPartition>>>;

/// What a partition consumer is made of.
pub struct PartitionConsumerParts {
    /// Its number in the flow, never used twice.
    pub id: u32,
    /// What the flow's actors share.
    pub shared: Arc<FlowShared>,
    /// Where its chunks come from.
    pub queue: Arc<PartitionQueue>,
    /// Index of the cache whose topic this is.
    pub cache: u16,
    /// It is the retry topic.
    pub retry: bool,
    /// Where its events go.
    pub readers: Readers,
    /// The same readers, to be told to park.
    pub parkers: Parkers,
    /// Where its watermarks go.
    pub commands: mpsc::Sender<PollCommand>,
    /// Writes its dead letters.
    pub producer: Producer,
    /// Told when it ends.
    pub ended: Recipient<PartitionEnded>,
}

/// See the module.
pub struct PartitionConsumer {
    parts: PartitionConsumerParts,
    tracker: Tracker,
    /// Offset of the first record, for the lag before anything is finished.
    first: Option<i64>,
    /// Newest event per key of the chunk at hand, by its place among the events; kept for its memory.
    newest: HashTable<u32>,
    hasher: foldhash::fast::RandomState,
    /// Waits for permits: what it takes with it is not in flight yet.
    waiting: Option<SpawnHandle>,
    /// A chunk is being handed on.
    working: bool,
    /// Canaries in what waits for permits.
    canaries: usize,
    dead_letters: usize,
    /// It waits before it takes another chunk of retry records.
    held_back: bool,
    /// When it took the last one while there was no room for dirty keys.
    last_retry: Option<Instant>,
    revoke: Option<RevokePartition>,
    careful: Careful,
    /// Which events are traced of those without a decision of their own.
    sampler: Sampler,
    pulse: Arc<Pulse>,
    /// The last numbers have been handed over: nothing more is taken or reported.
    ended: bool,
}

impl PartitionConsumer {
    /// A consumer that starts with the queue's next chunk.
    pub fn new(parts: PartitionConsumerParts) -> Self {
        PartitionConsumer {
            tracker: Tracker::new(parts.queue.generation),
            careful: Careful::new(&parts),
            sampler: parts.shared.traces().sampler(),
            pulse: {
                let place = format!("{}[{}]", parts.queue.at.topic, parts.queue.at.partition);
                parts.shared.view.pulses.register("partition_consumer", place)
            },
            parts,
            first: None,
            newest: HashTable::new(),
            hasher: Default::default(),
            waiting: None,
            working: false,
            canaries: 0,
            dead_letters: 0,
            held_back: false,
            last_retry: None,
            revoke: None,
            ended: false,
        }
    }
}

impl Actor for PartitionConsumer {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        let reports = ctx.address().recipient();
        let consumers = &self.parts.shared.consumers;
        consumers
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(self.parts.id, reports);
        self.publish();
        ctx.run_interval(self.parts.shared.config.kafka.commit_interval, |act, _| act.commit());
        ctx.run_interval(PULSE_EVERY, |act, _| act.show_pulse());
        let (ready, revoke) = (ctx.address().recipient(), ctx.address().recipient());
        if !self.parts.queue.attach(ready, revoke) {
            // Revoked before it began: it has consumed nothing.
            self.retire(ctx);
        } else if !self.parts.retry {
            let (id, partition) = (self.parts.id, self.parts.queue.at.partition);
            self.path(|path| path.own(id, partition, Instant::now()));
        }
    }
}

impl Handler<ChunkReady> for PartitionConsumer {
    type Result = ();

    fn handle(&mut self, _: ChunkReady, ctx: &mut Self::Context) {
        self.advance(ctx);
    }
}

impl Handler<EventsReported> for PartitionConsumer {
    type Result = ();

    fn handle(&mut self, EventsReported(runs): EventsReported, ctx: &mut Self::Context) {
        if let Some(trial) = &mut self.careful.trial {
            trial.dirty |= runs.iter().any(|run| run.fate == Fate::Dirty);
        }
        for Run { first, count, fate } in runs {
            match fate {
                Fate::Finished(outcome) => self.tracker.finish_run(first, count.into(), outcome),
                Fate::Dirty => self.tracker.hold_run(first, count.into(), Hold::Dirty),
                Fate::InFlight => self.tracker.hold_run(first, count.into(), Hold::InFlight),
            };
        }
        self.publish();
        if self.careful.trial.is_some() {
            self.end_trial();
            self.advance(ctx);
        }
        self.end_if_done(ctx);
    }
}

impl Handler<RevokePartition> for PartitionConsumer {
    type Result = ();

    fn handle(&mut self, revoke: RevokePartition, ctx: &mut Self::Context) {
        if let Some(waiting) = self.waiting.take() {
            // These hold no permit yet: nothing of theirs is anywhere else.
            ctx.cancel_future(waiting);
            self.working = false;
            for _ in 0..std::mem::take(&mut self.canaries) {
                self.path(|path| path.dropped("released"));
            }
        }
        let left = |at: Instant| at.saturating_duration_since(Instant::now());
        ctx.run_later(left(revoke.park_at), |act, ctx| act.park_rest(ctx));
        ctx.run_later(left(revoke.finish_by), |act, ctx| act.end_if_done(ctx));
        ctx.run_later(left(revoke.deadline), |act, ctx| act.end(ctx));
        self.revoke = Some(revoke);
        if self.parts.shared.going_down.load(SeqCst) {
            self.end(ctx);
            return;
        }
        self.end_if_done(ctx);
    }
}

/// Permits that were taken for events which are not yet a reader's; dropped, they go back.
struct TakenPermits {
    shared: Arc<FlowShared>,
    taken: PerServer,
}

impl Drop for TakenPermits {
    fn drop(&mut self) {
        self.shared.permits.give(&self.taken);
    }
}

impl PartitionConsumer {
    fn show_pulse(&self) {
        let waits_for = if self.waiting.is_some() {
            Some("room at a reader, or permits")
        } else if self.careful.trial.is_some() {
            Some("events on trial")
        } else if self.dead_letters >= MAX_DEAD_LETTERS {
            Some("kafka to take dead letters")
        } else if self.held_back {
            Some("room for dirty keys")
        } else if self.revoke.is_some() || self.ended {
            Some("the end of its assignment")
        } else {
            None
        };
        let work = self.parts.queue.len() + self.careful.groups.len() + usize::from(self.working);
        self.pulse.holds(work as u64, waits_for);
    }

    /// Takes the next chunk if nothing keeps it from doing so.
    fn advance(&mut self, ctx: &mut Context<Self>) {
        while !self.working && !self.ended && self.revoke.is_none() && self.dead_letters < MAX_DEAD_LETTERS {
            if let Some(group) = self.careful.groups.pop_front() {
                self.hand_on(group, ctx);
                continue;
            }
            if self.held_back(ctx) {
                return;
            }
            let Some(chunk) = self.parts.queue.pull() else { return };
            let events = self.take(&chunk, ctx);
            // What a trial may take of the permits.
            let most = self.parts.shared.permits.most_for_chunks();
            self.careful.group(events, most);
            self.publish();
        }
    }

    /// While there is no room for dirty keys, what was parked comes back slowly: most of it would only be parked again, in the
    /// way of what is new.
    fn held_back(&mut self, ctx: &mut Context<Self>) -> bool {
        if !self.parts.retry || self.parts.shared.crowded.load(SeqCst) == 0 {
            return false;
        }
        let now = Instant::now();
        let next = self.last_retry.map_or(now, |last| last + HELD_BACK_FOR);
        if next <= now {
            self.last_retry = Some(now);
            return false;
        }
        if !self.held_back {
            self.held_back = true;
            ctx.run_later(next - now, |act, ctx| {
                act.held_back = false;
                act.advance(ctx);
            });
        }
        true
    }

    /// Decodes a chunk, gives every record its account, and keeps the newest event per key.
    fn take(&mut self, chunk: &Chunk, ctx: &mut Context<Self>) -> Vec<HeldEvent> {
        let _inside = self.pulse.enter("took a chunk");
        self.pulse.moved("took a chunk");
        let careful = self.careful.begin(chunk);
        fail::fail_point!("partition_consumer_chunk");
        let mut events: Vec<HeldEvent> = Vec::with_capacity(chunk.records.len());
        let mut poisoned = Vec::new();
        let mut canaries = Vec::new();
        self.newest.clear();
        let shared = self.parts.shared.clone();
        let traced = shared.traces().enabled();
        let taps = shared.instruments.taps();
        let tapped = taps.active();
        let partition = self.parts.queue.at.partition;
        let cache = &shared.config.caches[usize::from(self.parts.cache)].name;
        let trace = |sampler: &mut Sampler, event: &mut HeldEvent, offset| {
            let context = event.writers_trace();
            // The writer's decision, or else the ratio's.
            let exported = traced && context.map_or_else(|| sampler.draw(), |context| context.sampled());
            let tapped = tapped && taps.wants(cache, &event.key);
            if exported || tapped {
                let mut trace = EventTrace::begin(context, event.taken);
                trace.record = Some((partition, offset));
                (trace.exported, trace.tapped) = (exported, tapped);
                event.trace = Some(Box::new(trace));
            }
        };
        for record in &chunk.records {
            self.first.get_or_insert(record.offset);
            if let Some(peer) = record.extra.as_ref().and_then(|extra| extra.canary.as_deref()) {
                self.tracker.pass(record.offset);
                if peer == self.parts.shared.peer().region && !self.parts.retry {
                    self.take_canary(chunk, record, careful, &mut canaries);
                }
                continue;
            }
            let seq = self.tracker.open(record.offset);
            let read = match careful {
                false => self.read(chunk, record, seq),
                true => self.read_carefully(chunk, record, seq),
            };
            match read {
                Ok(Some(mut event)) => {
                    trace(&mut self.sampler, &mut event, record.offset);
                    let hash = self.hasher.hash_one(&event.key[..]);
                    let same = |at: &u32| events[*at as usize].key == event.key;
                    let hash_of = |at: &u32| self.hasher.hash_one(&events[*at as usize].key[..]);
                    match self.newest.entry(hash, same, hash_of) {
                        Entry::Vacant(entry) => {
                            entry.insert(events.len() as u32);
                            events.push(event);
                        }
                        Entry::Occupied(entry) => {
                            let older = &mut events[*entry.get() as usize];
                            self.tracker.finish(older.ticket.seq, Outcome::Superseded);
                            if older.trace.is_some() {
                                older.note(|| Note::Superseded, Instant::now());
                                self.parts.shared.trace_ended(older, Outcome::Superseded, None);
                            }
                            let op = Op::merged(older.op, event.op);
                            *older = HeldEvent { op, ..event };
                        }
                    }
                }
                Ok(None) => {
                    self.tracker.finish(seq, Outcome::Filtered);
                }
                Err(reason) => poisoned.push((seq, DeadLetter::new(chunk, record, reason))),
            }
        }
        self.newest.clear();
        // A small chunk says little: at low rates few keys come again.
        if chunk.records.len() >= ENOUGH_TO_TELL {
            let again = chunk.records.len() - events.len();
            (self.parts.queue.repeats).store(again * REPEATS >= chunk.records.len(), SeqCst);
        }
        if let Some(newest) = chunk.records.last() {
            self.parts.shared.lag(Stage::Consumed, newest.produced_at());
        }
        self.bury(poisoned, ctx);
        events.append(&mut canaries);
        events
    }

    /// A canary for this peer: it goes on beside the chunk's events, unless it would only wait.
    fn take_canary(&self, chunk: &Chunk, record: &RecordEntry, careful: bool, canaries: &mut Vec<HeldEvent>) {
        let shared = &self.parts.shared;
        let lost = |reason| self.path(|path| path.dropped(reason));
        if careful {
            // It must be in nobody's way who looks for what panics.
            lost("suspects");
            return;
        }
        if !shared.view.has_session() {
            lost("no_session");
            return;
        }
        let event = match self.read(chunk, record, Ticket::CANARY.seq) {
            Ok(Some(event)) => HeldEvent {
                ticket: Ticket::CANARY,
                ..event
            },
            Ok(None) => {
                lost(Outcome::Filtered.name());
                return;
            }
            Err(_) => {
                lost("unreadable");
                return;
            }
        };
        match canaries.iter_mut().find(|older| older.key == event.key) {
            Some(older) => {
                *older = event;
                lost(Outcome::Superseded.name());
            }
            None => canaries.push(event),
        }
    }

    /// Does something with the path of this cache, if canaries show it.
    fn path(&self, work: impl FnOnce(&mut Path)) {
        self.parts.shared.view.canaries.with(self.parts.cache, work);
    }

    /// One record as an event; `None` when it is not for this peer, an error's stable reason when it is poison.
    fn read(&self, chunk: &Chunk, record: &RecordEntry, seq: Seq) -> Result<Option<HeldEvent>, &'static str> {
        let key = chunk.key(record);
        failpoint::at_keys("partition_consumer_event", std::iter::once(&key));
        let shared = &self.parts.shared;
        if let Some(problem) = memcached::key_problem(&key) {
            return Err(problem);
        }
        let event = event::decode_ref(chunk.value(record)).map_err(|error| error.reason())?;
        let mut extra = record.extra.as_ref().map(kept);
        let origin = match event.origin() {
            None => 0,
            Some(origin) if origin == shared.config.region => 0,
            Some(origin) => match shared.config.peers.iter().position(|peer| peer.region == origin) {
                // It came from there: sending it back would be an echo.
                Some(peer) if peer == shared.view.peer => return Ok(None),
                Some(peer) => peer as u16 + 1,
                None => {
                    let extra = extra.get_or_insert_default();
                    Arc::make_mut(extra).origin = Some(origin.into());
                    ORIGIN_OTHER
                }
            },
        };
        let produced_at_ms = record.produced_at();
        if event.fill && shared.config.caches[self.parts.cache as usize].invalidates() {
            return Ok(None);
        }
        let ticket = Ticket {
            consumer: self.parts.id,
            seq,
        };
        let taken = HeldEvent::new(key, self.first_server(), event.op, produced_at_ms, ticket, chunk.taken);
        Ok(Some(HeldEvent {
            ttl: event.ttl,
            ver: event.ver.unwrap_or(taken.ver),
            origin,
            fill: event.fill,
            parked: extra
                .as_ref()
                .and_then(|extra| extra.parked)
                .map_or(0, |parked| parked.attempt),
            extra,
            ..taken
        }))
    }

    /// Gives each reader its share of a chunk, in order. First a place in each reader's mailbox, then the permits of all in
    /// one request: a partition that waits for a reader holds no permit meanwhile.
    /// A group on trial takes every permit that chunks may have: nothing else is in flight beside it.
    fn hand_on(&mut self, Group { events, offsets }: Group, ctx: &mut Context<Self>) {
        self.working = true;
        let count = events.len();
        // Canaries are in no account.
        let mut runs: Vec<(Seq, u64)> = Vec::new();
        for seq in events
            .iter()
            .filter(|event| !event.is_canary())
            .map(|event| event.ticket.seq)
        {
            match runs.last_mut() {
                Some((first, length)) if *first + *length == seq => *length += 1,
                _ => runs.push((seq, 1)),
            }
        }
        let held: u64 = runs.iter().map(|(_, length)| length).sum();
        self.canaries = count - held as usize;
        let shares = self.split(events);
        let shared = self.parts.shared.clone();
        let readers = self.parts.readers.clone();
        let mut wanted: PerServer = PerServer::new();
        for (_, server, events) in &shares {
            permits::add(&mut wanted, *server, events.len());
        }
        if let Some((_, first)) = wanted.first_mut().filter(|_| !offsets.is_empty()) {
            // A trial has the flow to itself.
            *first += shared.permits.most_for_chunks().saturating_sub(count);
        }
        let take = async move {
            let mut places = Vec::with_capacity(shares.len());
            for (lane, server, events) in shares {
                // Without a reader the flow is about to be rebuilt.
                places.push((readers[lane][server].reserve().await?, events));
            }
            shared.permits.take(wanted.clone(), Urgency::Chunk).await;
            Some((places, TakenPermits { shared, taken: wanted }))
        };
        let handle = ctx.spawn(take.into_actor(self).map(move |taken, act, ctx| {
            act.waiting = None;
            act.working = false;
            let Some((places, mut taken)) = taken else { return };
            for _ in 0..std::mem::take(&mut act.canaries) {
                act.path(Path::taken);
            }
            for (first, length) in runs {
                act.tracker.hold_run(first, length, Hold::InFlight);
            }
            act.publish();
            for (place, events) in places {
                let (server, count) = (
                    events.first().map_or(0, |event| usize::from(event.server)),
                    events.len(),
                );
                if place.send(LookAt { events }).is_ok()
                    && let Some((_, taken)) = taken.taken.iter_mut().find(|(of, _)| *of == server)
                {
                    // From here on the lane returns them.
                    *taken -= count;
                }
            }
            if !offsets.is_empty() {
                act.working = true;
                act.careful.trial = Some(Trial {
                    _permits: taken,
                    offsets,
                    dirty: false,
                });
            }
            act.advance(ctx);
        }));
        self.waiting = Some(handle);
    }

    /// The events of a chunk by lane and server, each share in order.
    fn split(&self, events: Vec<HeldEvent>) -> Vec<(usize, usize, Vec<HeldEvent>)> {
        let cache = &self.parts.shared.caches[self.parts.cache as usize];
        let lanes = self.parts.readers.len();
        let servers = cache.ring.servers();
        if lanes == 1 && servers == 1 {
            return vec![(0, cache.first_server, events)];
        }
        let mut shares: Vec<Vec<HeldEvent>> = (0..lanes * servers).map(|_| Vec::new()).collect();
        for mut event in events {
            let lane = hashing::lane_of(event.cache, &event.key, lanes);
            let server = cache.ring.server_of(&event.key);
            event.server = (cache.first_server + server) as u16;
            shares[lane * servers + server].push(event);
        }
        let numbered = shares.into_iter().enumerate().filter(|(_, share)| !share.is_empty());
        numbered
            .map(|(n, share)| (n / servers, cache.first_server + n % servers, share))
            .collect()
    }

    /// Produces a chunk's dead letters until Kafka has acknowledged each; only then their events are finished.
    fn bury(&mut self, letters: Vec<(Seq, DeadLetter)>, ctx: &mut Context<Self>) {
        let Some((_, first)) = letters.first() else { return };
        let shared = self.parts.shared.clone();
        let producer = self.parts.producer.clone();
        let at = &self.parts.queue.at;
        // A retry record's too: it is an event of that topic.
        let source = &shared.config.caches[self.parts.cache as usize].topic;
        let topic = shared.config.kafka.dead_letter_topic_for(source);
        if let Some(unsaid) = DEAD_LETTERS.due(&format!("{} {} {}", shared.view.name, at.topic, first.reason)) {
            tracing::warn!(
                flow = shared.view.name,
                topic = at.topic,
                partition = at.partition,
                offset = first.offset,
                reason = first.reason,
                trace_id = first.trace_id(),
                events = letters.len(),
                unsaid,
                "events cannot be replicated, handing them to the dead-letter topic; offset and reason are the first one's"
            );
        }
        self.dead_letters += letters.len();
        let produce = async move {
            let all = futures_util::stream::iter(&letters).for_each_concurrent(DEAD_LETTERS_AT_ONCE, |(_, letter)| {
                letter.produce_until_taken(&producer, &topic, &shared)
            });
            all.await;
            letters
        };
        ctx.spawn(produce.into_actor(self).map(move |letters, act, ctx| {
            act.dead_letters -= letters.len();
            for (seq, letter) in letters {
                act.tracker.finish(seq, Outcome::DeadLettered);
                act.trace_buried(seq, letter);
            }
            act.publish();
            act.end_if_done(ctx);
            act.advance(ctx);
        }));
    }

    /// This cache and its first server: of several the ring tells which when a chunk is split.
    fn first_server(&self) -> (u16, u16) {
        let server = self.parts.shared.caches[usize::from(self.parts.cache)].first_server as u16;
        (self.parts.cache, server)
    }

    /// A dead letter failed: it gets a trace, of what is known of it.
    fn trace_buried(&self, seq: Seq, letter: DeadLetter) {
        let shared = &self.parts.shared;
        if !shared.traces().enabled() {
            return;
        }
        let ticket = Ticket {
            consumer: self.parts.id,
            seq,
        };
        let key = letter.key.unwrap_or_default();
        let place = self.first_server();
        let mut event = HeldEvent {
            extra: letter.extra,
            // Which op it was is not known.
            ..HeldEvent::new(key, place, Op::Set, letter.produced_at_ms, ticket, letter.taken)
        };
        shared.trace_failed(&mut event, Outcome::DeadLettered, letter.reason);
    }

    fn commit(&mut self) {
        if let Some(offset) = self.tracker.commit_due() {
            let offset = crate::sabotage::commit_early(offset, self.tracker.accounts().in_flight_total());
            let _ = self.parts.commands.send(PollCommand::Commit(
                self.parts.queue.at.clone(),
                self.parts.queue.generation,
                offset,
            ));
        }
        // The offset lag moves also when nothing happens here.
        self.publish();
    }

    /// One snapshot of this partition's numbers for whoever reads the accounts.
    fn publish(&self) {
        if self.ended {
            return;
        }
        use std::sync::atomic::Ordering::Relaxed;
        let high = self.parts.queue.high_watermark.load(Relaxed);
        // What retention has removed is no lag. An end below it was heard before the gap, and says nothing any more.
        let floor = self.parts.queue.floor.load(Relaxed);
        let position = self.tracker.watermark().or(self.first).unwrap_or(-1).max(floor);
        let report = PartitionReport {
            accounts: self.tracker.accounts(),
            offset_lag: (position >= 0 && high >= floor.max(0)).then(|| (high - position).max(0)),
            paused: self.parts.queue.paused.load(Relaxed),
            uncommitted_since_ms: self.parts.queue.uncommitted_since_ms(),
        };
        self.parts.shared.view.accounts.report(self.parts.id, report);
    }

    /// What is dirty now, or becomes dirty later, goes to the retry topic: whoever reads that next need not wait for it.
    /// With the peer away nothing is parked, for then everything would be.
    fn park_rest(&mut self, ctx: &mut Context<Self>) {
        if self.revoke.is_some() && self.parts.shared.view.has_session() {
            for reader in self.parts.parkers.iter() {
                reader.do_send(ParkPartition(self.parts.id));
            }
        }
        self.end_if_done(ctx);
    }

    fn end_if_done(&mut self, ctx: &mut Context<Self>) {
        let Some(revoke) = &self.revoke else { return };
        let held = self.tracker.accounts();
        // What waits was never given to anyone.
        let only_waiting = !self.working && held.in_flight + held.dirty + self.dead_letters as u64 == 0;
        // Dirty keys are being parked, if there is anyone to do it.
        let in_time = Instant::now() < revoke.finish_by || (held.dirty > 0 && self.parts.shared.view.has_session());
        if held.in_flight_total() == 0 || only_waiting || !in_time {
            self.end(ctx);
        }
    }

    fn end(&mut self, ctx: &mut Context<Self>) {
        let Some(revoke) = self.revoke.take() else { return };
        let held = self.tracker.accounts();
        // What only waited for permits is as Kafka still has it: it is no work left.
        let unfinished = held.in_flight + held.dirty + self.dead_letters as u64;
        self.leave_suspects();
        self.tracker.release_open();
        self.retire(ctx);
        let _ = revoke.reply.send(Revoked {
            watermark: self.tracker.watermark(),
            unfinished,
        });
    }

    /// Hands the last numbers over and stops.
    fn retire(&mut self, ctx: &mut Context<Self>) {
        self.ended = true;
        let shared = &self.parts.shared;
        shared
            .consumers
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.parts.id);
        if !shared.going_down.load(SeqCst) {
            let id = self.parts.id;
            self.path(|path| path.disown(id, Instant::now()));
        }
        shared.view.accounts.retire(self.parts.id, &self.tracker.accounts());
        self.parts.ended.do_send(PartitionEnded(self.parts.id));
        ctx.stop();
    }
}

/// What an event keeps of what came with its record: all, unless its headers are so large that they could not be kept while
/// it waits.
fn kept(extra: &Arc<RecordExtra>) -> Arc<RecordExtra> {
    let bytes: usize = extra.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
    if bytes <= KEPT_HEADER_BYTES {
        return extra.clone();
    }
    let mut less = RecordExtra::clone(extra);
    less.headers
        .retain(|(name, value)| matches!(&**name, "traceparent" | "tracestate") && value.len() < KEPT_HEADER_BYTES / 2);
    Arc::new(less)
}

/// A writer that is wrong is wrong in each chunk.
static DEAD_LETTERS: RateLimit = RateLimit::new();
/// Of each letter otherwise, in each try.
static NOT_BURIED: RateLimit = RateLimit::new();

/// A record that cannot become an event, as it was.
struct DeadLetter {
    offset: i64,
    reason: &'static str,
    key: Option<Bytes>,
    value: Option<Vec<u8>>,
    extra: Option<Arc<RecordExtra>>,
    produced_at_ms: i64,
    taken: Instant,
}

impl DeadLetter {
    fn new(chunk: &Chunk, record: &RecordEntry, reason: &'static str) -> Self {
        let (key, value) = chunk.exact(record);
        DeadLetter {
            offset: record.offset,
            reason,
            key,
            value: value.map(<[u8]>::to_vec),
            extra: record.extra.clone(),
            produced_at_ms: record.produced_at(),
            taken: chunk.taken,
        }
    }

    /// The writer's trace, for the log.
    fn trace_id(&self) -> Option<String> {
        Some(self.extra.as_ref()?.trace?.trace_id_hex())
    }

    async fn produce_until_taken(&self, producer: &Producer, topic: &str, shared: &FlowShared) {
        while let Err(error) = self.produce(producer, topic, shared).await {
            if let Some(unsaid) = NOT_BURIED.due(topic) {
                tracing::warn!(%error, topic, unsaid, "dead letter not taken by kafka, trying again");
            }
            tokio::time::sleep(DEAD_LETTER_PAUSE).await;
        }
    }

    async fn produce(
        &self,
        producer: &Producer,
        topic: &str,
        shared: &FlowShared,
    ) -> Result<(), crate::kafka::KafkaError> {
        let (offset, produced_at) = (self.offset.to_string(), self.produced_at_ms.to_string());
        let headers: &Headers = self
            .extra
            .as_ref()
            .map_or(const { &Headers::new() }, |extra| &extra.headers);
        let mut headers = parking::borrowed(headers);
        headers.push(("evrepl-reason", self.reason.as_bytes()));
        headers.push(("evrepl-peer", shared.peer().region.as_bytes()));
        headers.push(("evrepl-offset", offset.as_bytes()));
        // A retry record has it already.
        if self.produced_at_ms > 0 && headers.iter().all(|(name, _)| *name != PRODUCED_AT) {
            headers.push((PRODUCED_AT, produced_at.as_bytes()));
        }
        let record = Produce {
            topic,
            partition: None,
            key: self.key.as_deref(),
            value: self.value.as_deref(),
            headers: &headers,
            // Retention counts from the burial: an event that was late would else be gone at once.
            timestamp_ms: None,
        };
        producer.send(&record, DEAD_LETTER_TIMEOUT).await.map(|_| ())
    }
}

impl FlowShared {
    /// Notes the lag of an event at a stage.
    pub fn lag(&self, stage: Stage, produced_at_ms: i64) {
        self.lag_at(stage, produced_at_ms, wall_ms());
    }

    /// The same at this time, milliseconds since the epoch.
    pub fn lag_at(&self, stage: Stage, produced_at_ms: i64, now_ms: i64) {
        let us = (now_ms - produced_at_ms).max(0) * 1000;
        self.view.lag(stage, us);
        self.metrics.record_stage_lag(stage.name(), us as f64 / 1e6);
    }
}
