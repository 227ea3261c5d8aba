//! What the actors of one flow share: the event as it travels through a lane, the item it becomes, the accounts, the
//! permits, and the way outcomes go back to the partitions they came from.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak, mpsc};
use std::time::Duration;

use actix::prelude::*;
use actix_rt::ArbiterHandle;
use bytes::Bytes;
use tokio::time::Instant;

use crate::breaker::{BreakerState, ShownBreaker};
use crate::canary::{Ended, Paths};
use crate::config::Config;
use crate::event::{Op, TraceContext};
use crate::handoff::RelayMailboxes;
use crate::hashing::Ring;
use crate::hlc;
use crate::kafka::TopicPartition;
use crate::misses::{Counts, LIKELY_CAUSES, Limit, Raised, Window};
use crate::offsets::{Accounts, Seq};
use crate::outcome::Outcome;
use crate::permits::{self, ByteBudget, PerServer, Permits};
use crate::poll_thread::{PollCommand, RecordExtra};
use crate::pulse::Pulses;
use crate::retention::Gap;
use crate::suspects::Suspects;
use crate::telemetry::tap::PassedEvent;
use crate::telemetry::{EventTrace, FlowInstruments, Instruments, KeptFor, Note, PathStage, TracedEvent, Traces};
use crate::wire::Expiry;

/// Where an event came from: which partition consumer of the flow, and its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The partition consumer's number in its flow, never used twice.
    pub consumer: u32,
    /// The event's number in that consumer's tracker.
    pub seq: Seq,
}

impl Ticket {
    /// A canary's: no partition consumer has it, so it is in no account, and nobody is told what became of it but its path.
    pub const CANARY: Ticket = Ticket {
        consumer: u32::MAX,
        seq: 0,
    };
}

/// An event on its way through a lane. It holds a permit unless it waits as a dirty key.
#[derive(Clone, Debug)]
pub struct HeldEvent {
    /// The cache key.
    pub key: Bytes,
    /// Index of the cache in the configuration.
    pub cache: u16,
    /// Number of the key's server among all servers of all caches: whose permit it holds.
    pub server: u16,
    /// What happened; a touch only if every event merged into this one was a touch.
    pub op: Op,
    /// The writer's ttl, memcached's meaning; only a hint, and used only where nothing is looked at.
    pub ttl: Option<u32>,
    /// Hybrid logical clock of the write.
    pub ver: u64,
    /// Index of the writing region: 0 is this one, `n` the peer `n - 1`, [`ORIGIN_OTHER`] any other.
    pub origin: u16,
    /// Produced-at, milliseconds since the epoch.
    pub produced_at_ms: i64,
    /// Who is told how it ended.
    pub ticket: Ticket,
    /// How often in a row the key was answered `look_again`.
    pub attempts: u16,
    /// The key was dirty: its look is a full one, whatever happened.
    pub full: bool,
    /// The source had no value once already: the second time it is missing.
    pub missed: bool,
    /// The key may be a probe of a destination server: its reader wants to hear that it was answered.
    pub probe: bool,
    /// The write only filled the cache from a database.
    pub fill: bool,
    /// How often it has been parked on the retry topic.
    pub parked: u16,
    /// Since when its key has been dirty, without an end in between.
    pub dirty_since: Option<Instant>,
    /// Headers, trace, and whatever else came with the record, when anything did.
    pub extra: Option<Arc<RecordExtra>>,
    /// When its chunk was taken from Kafka.
    pub taken: Instant,
    /// What is traced of its way, if it is sampled.
    pub trace: Option<Box<EventTrace>>,
}

impl HeldEvent {
    /// An event as it is taken: nothing has happened to it, and its record says no more than that.
    pub fn new(
        key: Bytes,
        (cache, server): (u16, u16),
        op: Op,
        produced_at_ms: i64,
        ticket: Ticket,
        taken: Instant,
    ) -> Self {
        HeldEvent {
            key,
            cache,
            server,
            op,
            ttl: None,
            ver: hlc::from_millis(produced_at_ms.max(0) as u64),
            origin: 0,
            produced_at_ms,
            ticket,
            attempts: 0,
            full: false,
            missed: false,
            probe: false,
            fill: false,
            parked: 0,
            dirty_since: None,
            extra: None,
            taken,
            trace: None,
        }
    }

    /// The trace that its writer says it belongs to.
    pub fn writers_trace(&self) -> Option<TraceContext> {
        self.extra.as_ref()?.trace
    }

    /// It is a canary ([`crate::canary`]): never dirty, never parked, in no account.
    pub fn is_canary(&self) -> bool {
        self.ticket == Ticket::CANARY
    }

    /// The trace that the peer's spans belong to: that of our own spans, or else the writer's, if it is sampled.
    pub fn trace_context(&self) -> Option<TraceContext> {
        match &self.trace {
            Some(trace) if trace.exported => Some(trace.context()),
            _ => self.writers_trace().filter(TraceContext::sampled),
        }
    }

    /// Its way until its last look was sent was no straight one: it was looked at before, or its key was dirty, or it was parked.
    pub fn has_waited(&self) -> bool {
        self.dirty_since.is_some() || self.missed || self.parked > 0
    }

    /// It is at another stage of its way from now on.
    pub fn enter(&mut self, stage: PathStage, now: Instant) {
        if let Some(trace) = &mut self.trace {
            trace.enter(stage, now);
        }
    }

    /// Something happened to it, which its trace shows.
    pub fn note(&mut self, note: impl FnOnce() -> Note, now: Instant) {
        if let Some(trace) = &mut self.trace {
            trace.note(note(), now);
        }
    }
}

/// An origin that is neither this region nor a peer.
pub const ORIGIN_OTHER: u16 = u16::MAX;

impl crate::dirty::DirtyEvent for HeldEvent {
    fn key(&self) -> &Bytes {
        &self.key
    }
    fn cache(&self) -> u16 {
        self.cache
    }
    fn attempts(&self) -> u16 {
        self.attempts
    }
    fn set_attempts(&mut self, attempts: u16) {
        self.attempts = attempts;
    }
    fn supersedes(&self, other: &Self) -> bool {
        (self.produced_at_ms, self.ticket.seq) >= (other.produced_at_ms, other.ticket.seq)
    }
}

/// What a look saw, to be brought to the peer.
#[derive(Clone, Debug)]
pub enum Seen {
    /// A value with its flags and remaining life.
    Value {
        /// The value's bytes.
        value: Bytes,
        /// The client's flags.
        flags: u32,
        /// Remaining at the look.
        expiry: Expiry,
    },
    /// Only the remaining life: the event was a touch.
    Touch(Expiry),
    /// Nothing that can be stored: the peer's copy goes. The outcome says why.
    Nothing(Outcome),
}

/// An item on its way from the look to the ack, with the event it answers.
#[derive(Clone, Debug)]
pub struct HeldItem {
    /// The newest event of the key.
    pub event: HeldEvent,
    /// What was seen.
    pub seen: Seen,
    /// The last tick heard before the read was sent.
    pub looked_at: u64,
    /// The session in which the look was made; it is never sent in another.
    pub session: u64,
    /// When the read was sent.
    pub looked: Instant,
    /// When it was answered.
    pub seen_at: Instant,
}

impl HeldItem {
    /// How the event ends when the peer applies it.
    pub fn outcome(&self) -> Outcome {
        match self.seen {
            Seen::Value { .. } | Seen::Touch(_) => Outcome::Applied,
            Seen::Nothing(outcome) => outcome,
        }
    }

    /// It only touches: with nothing there to touch, the key is looked at again.
    pub fn only_touches(&self) -> bool {
        matches!(self.seen, Seen::Touch(_))
    }

    /// Bytes of the flow's budget that this item holds.
    pub fn bytes(&self) -> usize {
        match &self.seen {
            Seen::Value { value, .. } => value.len() + ITEM_OVERHEAD + self.event.key.len(),
            _ => ITEM_OVERHEAD + self.event.key.len(),
        }
    }
}

/// Bytes that an item holds besides key and value: its entry here and its frame on the wire.
pub const ITEM_OVERHEAD: usize = 256;

/// What became of an event, as its partition consumer hears it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It ended.
    Finished(Outcome),
    /// Its key waits as dirty, without a permit.
    Dirty,
    /// It has a permit (again).
    InFlight,
}

/// What became of events that follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first of them.
    pub first: Seq,
    /// How many they are.
    pub count: u32,
    /// Of each of them.
    pub fate: Fate,
}

/// Fates of events of one partition consumer, in order. A fact: it takes no slot.
#[derive(Message, Debug)]
#[rtype(result = "()")]
pub struct EventsReported(pub Vec<Run>);

/// One partition's numbers, taken in one snapshot.
#[derive(Clone, Debug, Default)]
pub struct PartitionReport {
    /// Consumed, outcomes and what is held.
    pub accounts: Accounts,
    /// Events in Kafka that this flow has not finished; unknown before the first fetch.
    pub offset_lag: Option<i64>,
    /// Fetching is paused.
    pub paused: bool,
    /// When the oldest chunk that is not committed came into Kafka, milliseconds since the epoch.
    pub uncommitted_since_ms: Option<i64>,
}

/// The accounts of a flow. They outlive its rebuilds: what a partition consumer leaves is added to the retired totals in
/// the same step in which its own numbers go.
#[derive(Debug, Default)]
pub struct FlowAccounts {
    inner: Mutex<AccountsInner>,
    /// Outcomes that came for an assignment that had ended.
    pub late: AtomicU64,
}

#[derive(Debug, Default)]
struct AccountsInner {
    retired: Accounts,
    live: HashMap<u32, PartitionReport>,
    /// Consumers with lower numbers are gone: one that wakes up on an abandoned thread has nothing to say.
    floor: u32,
}

impl FlowAccounts {
    fn lock(&self) -> MutexGuard<'_, AccountsInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces a partition consumer's numbers.
    pub fn report(&self, consumer: u32, report: PartitionReport) {
        let mut inner = self.lock();
        if consumer >= inner.floor {
            inner.live.insert(consumer, report);
        }
    }

    /// A partition consumer ended in order: everything it held has an outcome.
    pub fn retire(&self, consumer: u32, last: &Accounts) {
        let mut inner = self.lock();
        if consumer >= inner.floor {
            inner.live.remove(&consumer);
            inner.retired.merge(last);
        }
    }

    /// The flow is rebuilt: what its consumers still held is released, and none below `floor` is heard any more.
    pub fn retire_all(&self, floor: u32) {
        let mut inner = self.lock();
        inner.floor = floor;
        let live = std::mem::take(&mut inner.live);
        for report in live.into_values() {
            let mut accounts = report.accounts;
            accounts.release_held();
            inner.retired.merge(&accounts);
        }
    }

    /// The flow's totals, its offset lag and how many of its partitions are paused.
    pub fn total(&self) -> (Accounts, Option<i64>, usize) {
        let inner = self.lock();
        let mut total = inner.retired.clone();
        let (mut lag, mut paused) = (None, 0);
        for report in inner.live.values() {
            total.merge(&report.accounts);
            if let Some(known) = report.offset_lag {
                lag = Some(lag.unwrap_or(0) + known);
            }
            paused += usize::from(report.paused);
        }
        (total, lag, paused)
    }
}

impl FlowAccounts {
    /// When the oldest chunk that was taken and is not committed came into Kafka, milliseconds since the epoch.
    pub fn uncommitted_since_ms(&self) -> Option<i64> {
        let inner = self.lock();
        inner
            .live
            .values()
            .filter_map(|report| report.uncommitted_since_ms)
            .min()
    }
}

/// The stages whose lag is reported, in the order of the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Taken from Kafka.
    Consumed,
    /// Seen in the local cache.
    Looked,
    /// Handed to the connection.
    Sent,
    /// Acknowledged by the peer.
    Acked,
}

impl Stage {
    /// All stages.
    pub const ALL: [Stage; 4] = [Stage::Consumed, Stage::Looked, Stage::Sent, Stage::Acked];

    /// The public name.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Consumed => "consumed",
            Stage::Looked => "looked",
            Stage::Sent => "sent",
            Stage::Acked => "acked",
        }
    }
}

/// How long events took for one stage of their path: of one event an ack, those of all stages of the same event, so that the
/// means of all stages add up to the mean lag.
#[derive(Debug, Default)]
pub struct StageTimes {
    /// Microseconds of all that were measured.
    pub total_us: AtomicU64,
    /// How many were measured.
    pub count: AtomicU64,
    /// Microseconds of the last one.
    pub last_us: AtomicU64,
}

/// What `/status` shows of a link.
#[derive(Clone, Debug)]
pub struct LinkView {
    /// `waiting`, `dialling`, `greeting`, `open` or `draining`.
    pub state: &'static str,
    /// Since when.
    pub since: Instant,
    /// Failed attempts since the last session.
    pub attempts: u32,
    /// Why the last session or attempt ended.
    pub last_error: Option<String>,
    /// Round trip of the last ping, microseconds.
    pub rtt_us: Option<u64>,
    /// The peer's wall clock minus ours, microseconds, as the last ping measured it.
    pub clock_offset_us: Option<i64>,
}

/// What a reader's dirty keys wait for.
#[derive(Clone, Debug)]
pub struct WaitView {
    /// The memcached server or peer that is waited for.
    pub server: String,
    /// Keys that wait.
    pub keys: usize,
    /// Since when.
    pub since: Instant,
    /// What is done about it, and when.
    pub next: Next,
}

/// What happens next for keys that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// One key asks the server then.
    Probe(Instant),
    /// A key has asked, and its answer is waited for.
    ProbeOut,
    /// A call that was made long ago is still waited for.
    Answer,
    /// They are looked at as soon as there are permits.
    Look,
    /// They are looked at when the link has a session again.
    Session,
}

impl Next {
    /// In words, as seen at `now`.
    pub fn describe(self, now: Instant) -> String {
        match self {
            Next::Probe(at) => format!("probe in {:.1} s", at.saturating_duration_since(now).as_secs_f64()),
            Next::ProbeOut => "probe under way".to_owned(),
            Next::Answer => "a slow call is waited for".to_owned(),
            Next::Look => "look again at once".to_owned(),
            Next::Session => "look again when the peer is back".to_owned(),
        }
    }

    /// What of two comes first.
    fn sooner(self, other: Next) -> Next {
        match (self, other) {
            (Next::Probe(one), Next::Probe(another)) => Next::Probe(one.min(another)),
            (Next::Probe(_), other) => other,
            (one, _) => one,
        }
    }
}

/// What retention has taken from a flow, since the process began.
#[derive(Clone, Debug, Default)]
pub struct RetentionView {
    /// How often.
    pub gaps: u64,
    /// How many events, at most.
    pub events: u64,
    /// The last one.
    pub last: Option<GapView>,
}

/// Events of a partition that Kafka had removed before the flow took them.
#[derive(Clone, Debug)]
pub struct GapView {
    /// Where.
    pub at: TopicPartition,
    /// Which.
    pub gap: Gap,
    /// When it was found.
    pub found: Instant,
    /// Between the last event taken before it and the first one behind it.
    pub spans: Option<Duration>,
}

/// A memcached server of this region, and how many of the keys looked at were missing there.
#[derive(Clone, Debug)]
pub struct ServerLooks {
    /// The cache that it belongs to.
    pub cache: String,
    /// `host:port`.
    pub server: String,
    /// Its last looks.
    pub window: Window,
}

/// What outlives a flow's rebuild and is read from other threads: its accounts and its observable state.
#[derive(Debug)]
pub struct FlowView {
    /// Index of the peer in the configuration.
    pub peer: usize,
    /// `us-east-1->eu-west-1`.
    pub name: String,
    /// Exact accounts.
    pub accounts: FlowAccounts,
    /// Bytes in flight now.
    pub in_flight_bytes: AtomicU64,
    lag_us: [AtomicI64; Stage::ALL.len()],
    stages: [StageTimes; PathStage::ALL.len()],
    links: Mutex<Vec<Option<LinkView>>>,
    /// By lane: since when there is no session.
    away: Mutex<Vec<Option<Instant>>>,
    waits: Mutex<HashMap<(usize, usize), Vec<WaitView>>>,
    /// The flow drains.
    pub draining: AtomicBool,
    /// What canaries say of the path of each cache.
    pub canaries: Paths,
    /// Sessions begun after the first one.
    pub reconnects: AtomicU64,
    /// How often partitions were assigned.
    pub rebalances: AtomicU64,
    retention: Mutex<RetentionView>,
    /// By lane, and in it by server, through all caches.
    breakers: Vec<ShownBreaker>,
    /// Of the incarnation that runs.
    shared: Mutex<Weak<FlowShared>>,
    /// By server, through all caches.
    looks: Mutex<Vec<ServerLooks>>,
    /// Of the source topics, and of the retry topics: what keeps them from being read, and since when.
    kafka: Mutex<[Option<(String, Instant)>; 2]>,
    /// Retry partitions that wait for the time of their next record, and that time.
    retries: Mutex<HashMap<TopicPartition, Instant>>,
    suspects: Mutex<Suspects>,
    /// The pulses of everything in it.
    pub pulses: Pulses,
    /// Depths of the mailboxes, by kind of actor.
    pub mailboxes: RelayMailboxes,
    /// Which incarnation may write here.
    incarnation: AtomicU64,
    stop: Mutex<Option<StopFlow>>,
}

/// What must be stopped if a flow's supervisor cannot do it any more.
#[derive(Debug)]
pub struct StopFlow {
    /// The threads of its lanes.
    pub lanes: Vec<ArbiterHandle>,
    /// To its poll threads.
    pub polls: Vec<mpsc::Sender<PollCommand>>,
}

impl FlowView {
    /// The view of the flow to `peer` with `lanes` lanes.
    pub fn new(config: &Config, peer: usize) -> Self {
        let servers = config.caches.iter().flat_map(|cache| {
            cache.servers.iter().map(|server| ServerLooks {
                cache: cache.name.clone(),
                server: server.address.clone(),
                window: Window::default(),
            })
        });
        let servers: Vec<ServerLooks> = servers.collect();
        FlowView {
            peer,
            name: format!("{}->{}", config.region, config.peers[peer].region),
            accounts: FlowAccounts::default(),
            in_flight_bytes: AtomicU64::new(0),
            lag_us: [const { AtomicI64::new(-1) }; Stage::ALL.len()],
            stages: Default::default(),
            links: Mutex::new(vec![None; config.flow.lanes]),
            away: Mutex::new(vec![Some(Instant::now()); config.flow.lanes]),
            waits: Mutex::default(),
            draining: AtomicBool::new(false),
            canaries: Paths::new(config, peer),
            reconnects: AtomicU64::new(0),
            rebalances: AtomicU64::new(0),
            retention: Mutex::default(),
            breakers: (0..config.flow.lanes * servers.len())
                .map(|_| ShownBreaker::default())
                .collect(),
            shared: Mutex::default(),
            looks: Mutex::new(servers),
            kafka: Mutex::default(),
            retries: Mutex::default(),
            suspects: Mutex::default(),
            pulses: Pulses::default(),
            mailboxes: RelayMailboxes::default(),
            incarnation: AtomicU64::new(0),
            stop: Mutex::default(),
        }
    }

    /// A new incarnation of the flow begins, and gets its number: what is left of older ones writes here no more.
    pub fn begin_incarnation(&self) -> u64 {
        self.incarnation.fetch_add(1, SeqCst) + 1
    }

    /// Notes what the actors of the incarnation share that begins.
    pub fn set_shared(&self, shared: &Arc<FlowShared>) {
        *self.shared.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(shared);
    }

    /// Permits that nobody holds; `None` while there is no incarnation, and nothing holds any.
    pub fn free_permits(&self) -> Option<usize> {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner).upgrade()?;
        Some(shared.permits.available())
    }

    /// By lane, and in it by server through all caches, the breakers of the memcached servers that are read from.
    pub fn breakers(&self) -> &[ShownBreaker] {
        &self.breakers
    }

    /// Notes what to stop if the flow's supervisor hangs.
    pub fn set_stop(&self, stop: StopFlow) {
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner) = Some(stop);
    }

    /// Stops what a supervisor that hangs has left running.
    pub fn stop_rest(&self) {
        let stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(StopFlow { lanes, polls }) = stop {
            lanes.iter().for_each(|lane| _ = lane.stop());
            polls.iter().for_each(|poll| _ = poll.send(PollCommand::Stop));
        }
    }

    /// The events that may be what takes the flow down.
    pub fn suspects(&self) -> MutexGuard<'_, Suspects> {
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The servers on which too many keys are missing.
    pub fn mass_misses(&self) -> Vec<(ServerLooks, Raised)> {
        let looks = self.looks.lock().unwrap_or_else(PoisonError::into_inner);
        let raised = looks.iter().filter_map(|one| Some((one.clone(), one.window.raised()?)));
        raised.collect()
    }

    /// What retention has taken from this flow.
    pub fn retention(&self) -> RetentionView {
        self.retention.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes that Kafka has removed events before this flow took them.
    pub fn retention_gap(&self, at: &TopicPartition, gap: Gap, spans: Option<Duration>) {
        let mut view = self.retention.lock().unwrap_or_else(PoisonError::into_inner);
        view.gaps += 1;
        view.events += gap.events();
        view.last = Some(GapView {
            at: at.clone(),
            gap,
            found: Instant::now(),
            spans,
        });
    }

    /// Notes how much time the last gap of a partition spans, if it is the last one still.
    pub fn retention_gap_spans(&self, at: &TopicPartition, spans: Duration) {
        let mut view = self.retention.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = view.last.as_mut().filter(|last| last.at == *at) {
            last.spans = Some(spans);
        }
    }

    /// A retry partition waits until then for its next record, or for nothing any more.
    pub fn set_retry_wait(&self, at: &TopicPartition, until: Option<Instant>) {
        let mut retries = self.retries.lock().unwrap_or_else(PoisonError::into_inner);
        match until {
            Some(until) => retries.insert(at.clone(), until),
            None => retries.remove(at),
        };
    }

    /// How many retry partitions wait for the time of their next record, and the first such time.
    pub fn retry_waits(&self) -> (usize, Option<Instant>) {
        let retries = self.retries.lock().unwrap_or_else(PoisonError::into_inner);
        (retries.len(), retries.values().min().copied())
    }

    /// What keeps Kafka from being read, if anything does, and since when.
    pub fn kafka_trouble(&self) -> Option<(String, Instant)> {
        let troubles = self.kafka.lock().unwrap_or_else(PoisonError::into_inner);
        troubles.iter().flatten().next().cloned()
    }

    /// Notes what keeps the source topics, or the retry topics, from being read, or that nothing does.
    pub fn set_kafka_trouble(&self, retry: bool, trouble: Option<String>) {
        let mut kafka = self.kafka.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = &mut kafka[usize::from(retry)];
        let since = slot.as_ref().map_or_else(Instant::now, |(_, since)| *since);
        *slot = trouble.map(|trouble| (trouble, since));
    }

    /// Notes the lag at a stage, in microseconds.
    pub fn lag(&self, stage: Stage, us: i64) {
        self.lag_us[stage as usize].store(us, Relaxed);
    }

    /// The last lag noted at a stage, in seconds.
    pub fn lag_seconds(&self, stage: Stage) -> Option<f64> {
        let us = self.lag_us[stage as usize].load(Relaxed);
        (us >= 0).then_some(us as f64 / 1e6)
    }

    /// How long the stages of the path took, in its order.
    pub fn stage_times(&self) -> impl Iterator<Item = (PathStage, &StageTimes)> {
        PathStage::ALL.into_iter().zip(&self.stages)
    }

    /// Replaces what is known of a lane's link.
    pub fn set_link(&self, lane: usize, view: LinkView) {
        // A link goes through several states, and through rebuilds, on its way to a session.
        let away = &mut self.away.lock().unwrap_or_else(PoisonError::into_inner)[lane];
        match view.state {
            "open" => *away = None,
            _ => _ = away.get_or_insert_with(Instant::now),
        }
        self.links.lock().unwrap_or_else(PoisonError::into_inner)[lane] = Some(view);
    }

    /// Whether it drains.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    /// Whether the peer is there: a lane has a session.
    pub fn has_session(&self) -> bool {
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        links.iter().flatten().any(|link| link.state == "open")
    }

    /// By lane, since when there is no session.
    pub fn away_since(&self) -> Vec<Option<Instant>> {
        self.away.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The links, by lane.
    pub fn links(&self) -> Vec<Option<LinkView>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces what a reader's keys wait for.
    pub fn set_waits(&self, lane: usize, reader: usize, waits: Vec<WaitView>) {
        self.waits
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert((lane, reader), waits);
    }

    /// What keys wait for, all readers together.
    pub fn waits(&self) -> Vec<WaitView> {
        let waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        let mut merged: Vec<WaitView> = Vec::new();
        for wait in waits.values().flatten() {
            match merged.iter_mut().find(|w| w.server == wait.server) {
                Some(known) => {
                    known.keys += wait.keys;
                    known.since = known.since.min(wait.since);
                    known.next = known.next.sooner(wait.next);
                }
                None => merged.push(wait.clone()),
            }
        }
        merged
    }

    /// Forgets what died with the flow's actors; partition consumers from `floor` on belong to the next incarnation.
    pub fn reset(&self, floor: u32) {
        self.incarnation.fetch_add(1, SeqCst);
        self.pulses.clear();
        self.accounts.retire_all(floor);
        self.canaries.went_down();
        self.waits.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.retries.lock().unwrap_or_else(PoisonError::into_inner).clear();
        for link in self.links.lock().unwrap_or_else(PoisonError::into_inner).iter_mut() {
            *link = None;
        }
        self.in_flight_bytes.store(0, Relaxed);
    }
}

/// A cache as the relay uses it.
#[derive(Debug)]
pub struct RelayCache {
    /// Which servers its keys live on.
    pub ring: Ring,
    /// Number of its first server among all servers of all caches; its servers follow one another.
    pub first_server: usize,
}

/// What the actors of one incarnation of a flow share.
pub struct FlowShared {
    /// The whole configuration.
    pub config: Arc<Config>,
    /// Rings and server numbers, by cache index.
    pub caches: Vec<RelayCache>,
    /// By cache index, the number a cache has on the wire; unused for caches that this peer does not get.
    pub wire_caches: Vec<u16>,
    /// Accounts and state that outlive this incarnation.
    pub view: Arc<FlowView>,
    /// The right to be in flight.
    pub permits: Permits,
    /// Bytes of values held.
    pub bytes: ByteBudget,
    /// Readers that have no room for another dirty key.
    pub crowded: AtomicUsize,
    /// Where fates go.
    pub consumers: RwLock<HashMap<u32, Recipient<EventsReported>>>,
    /// This flow's instruments.
    pub metrics: Arc<FlowInstruments>,
    /// Every instrument.
    pub instruments: Arc<Instruments>,
    /// The lanes are being stopped: what is in flight stays so, and nobody waits for it.
    pub going_down: AtomicBool,
    /// Which incarnation of the flow this is.
    pub incarnation: u64,
}

impl FlowShared {
    /// Whether the flow has not been built anew since: an actor on an abandoned thread may wake up long after.
    pub fn is_current(&self) -> bool {
        self.view.incarnation.load(SeqCst) == self.incarnation
    }

    /// Replaces what is known of a lane's link.
    pub fn set_link(&self, lane: usize, link: LinkView) {
        if self.is_current() {
            self.view.set_link(lane, link);
        }
    }

    /// Shows the breaker of a reader's server.
    pub fn show_breaker(&self, lane: usize, reader: usize, state: BreakerState) {
        let readers = self.view.breakers.len() / self.config.flow.lanes;
        if self.is_current() {
            self.view.breakers[lane * readers + reader].show(state);
        }
    }

    /// Replaces what a reader's keys wait for.
    pub fn set_waits(&self, lane: usize, reader: usize, waits: Vec<WaitView>) {
        if self.is_current() {
            self.view.set_waits(lane, reader, waits);
        }
    }

    /// Shows how many bytes are in flight.
    fn show_bytes(&self) {
        if self.is_current() {
            self.view.in_flight_bytes.store(self.bytes.used() as u64, Relaxed);
        }
    }

    /// Tells each partition consumer what became of its events, and returns the permits of those that gave theirs up.
    pub fn report(&self, reports: &mut Reports) {
        if !reports.fates.is_empty() {
            let consumers = self.consumers.read().unwrap_or_else(PoisonError::into_inner);
            for (consumer, fates) in reports.fates.drain(..) {
                match consumers.get(&consumer) {
                    Some(recipient) => recipient.do_send(EventsReported(fates)),
                    None => {
                        let ended = fates.iter().filter(|run| matches!(run.fate, Fate::Finished(_)));
                        let ended = ended.map(|run| u64::from(run.count)).sum::<u64>();
                        self.view.accounts.late.fetch_add(ended, Relaxed);
                    }
                }
            }
        }
        self.permits.give(&reports.permits);
        reports.permits.clear();
        reports.canaries.drain(..).for_each(|ended| self.canary_ended(&ended));
        for (event, outcome) in reports.traced.drain(..) {
            self.trace_ended(&event, outcome, None);
        }
    }

    fn canary_ended(&self, ended: &Ended) {
        if !self.is_current() {
            return;
        }
        let lag = ended.lag();
        if ended.lost.is_none() {
            let cache = &self.config.caches[usize::from(ended.cache)].name;
            self.metrics.canary_acked(cache, lag.as_secs_f64());
        }
        let paths = &self.view.canaries;
        paths.with(ended.cache, |path| path.ended(ended, lag, Instant::now()));
    }

    /// An event has passed the stages of the path, all of them, in these times.
    pub fn passed(&self, times: &[Duration; PathStage::ALL.len()]) {
        for (stage, took) in PathStage::ALL.into_iter().zip(times) {
            let its = &self.view.stages[stage as usize];
            let us = took.as_micros() as u64;
            its.total_us.fetch_add(us, Relaxed);
            its.count.fetch_add(1, Relaxed);
            its.last_us.store(us, Relaxed);
            self.metrics.record_stage_seconds(stage.name(), took.as_secs_f64());
        }
    }

    /// The traces of single events.
    pub fn traces(&self) -> &Traces {
        self.instruments.traces()
    }

    /// A traced event has ended, with an error or without.
    pub fn trace_ended(&self, event: &HeldEvent, outcome: Outcome, error: Option<&str>) {
        let Some(trace) = &event.trace else { return };
        let cache = &self.config.caches[usize::from(event.cache)];
        let server = usize::from(event.server) - self.caches[usize::from(event.cache)].first_server;
        let about = TracedEvent {
            flow: &self.view.name,
            peer: &self.peer().region,
            group: &self.config.kafka.group_for(&self.config.region, &self.peer().region),
            topic: &cache.topic,
            cache: &cache.name,
            server: &cache.servers[server].address,
            key: &event.key,
            op: event.op.name(),
            produced_at_ms: event.produced_at_ms,
            error,
        };
        self.traces().ended(&about, trace, outcome);
        if trace.tapped {
            let now = Instant::now();
            let since_taken = now - trace.taken;
            let total = Duration::from_millis((wall_ms() - event.produced_at_ms).max(0) as u64).max(since_taken);
            self.instruments.taps().say(PassedEvent {
                flow: about.flow.to_owned(),
                cache: about.cache.to_owned(),
                key: event.key.clone(),
                op: about.op,
                outcome: outcome.name(),
                produced_at_ms: event.produced_at_ms,
                total_us: total.as_micros() as u64,
                stages: trace.stage_times(total - since_taken, now),
                notes: trace.notes().iter().map(|(_, note)| note.describe()).collect(),
                trace_id: trace.exported.then(|| trace.context().trace_id_hex()),
            });
        }
    }

    /// Begins the trace of an event that is not traced and should have been, if there is room for one more such trace in this
    /// second. Its key may have waited, but where it was meanwhile is not known.
    pub fn keep_trace<'a>(&self, event: &'a mut HeldEvent, why: KeptFor, now_ms: i64) -> Option<&'a mut EventTrace> {
        let writers = event.writers_trace();
        // One that could not be decoded has no trace yet, whatever its writer has decided.
        let sampled = self.traces().enabled() && writers.is_some_and(|context| context.sampled());
        if event.trace.is_some() || !(sampled || self.traces().keeps_one_more(why, now_ms)) {
            return None;
        }
        let mut trace = EventTrace::begin(writers, event.taken);
        trace.kept_for = (!sampled).then_some(why);
        if let Some(since) = event.dirty_since {
            trace.enter(PathStage::Wait, since);
        }
        Some(event.trace.insert(Box::new(trace)))
    }

    /// Traces an event that was not sampled and has failed.
    pub fn trace_failed(&self, event: &mut HeldEvent, outcome: Outcome, error: &str) {
        if self.keep_trace(event, KeptFor::Failed, wall_ms()).is_some() {
            self.trace_ended(event, outcome, Some(error));
        }
    }

    /// The partition consumers of the flow that still run.
    pub fn live_consumers(&self) -> HashSet<u32> {
        let consumers = self.consumers.read().unwrap_or_else(PoisonError::into_inner);
        consumers.keys().copied().collect()
    }

    /// Returns the bytes of an item that is no longer held.
    pub fn give_bytes(&self, bytes: usize) {
        self.bytes.give(bytes);
        self.show_bytes();
    }

    /// Takes bytes for items that were read.
    pub fn take_bytes(&self, bytes: usize) {
        self.bytes.take(bytes);
        self.show_bytes();
    }

    /// Of two events of a key, whether the one that comes must stay rather than the one that is held. An event whose
    /// partition consumer has ended is nobody's: its offset is uncommitted and will be read again, so it must never end a
    /// live one as superseded. Among equals the newer one stays.
    pub fn survives(&self, comes: &HeldEvent, held: &HeldEvent) -> bool {
        if comes.ticket.consumer == held.ticket.consumer {
            return comes.ticket.seq >= held.ticket.seq;
        }
        // Different consumers meet in one key only around rebalances and with writers that partition differently.
        let consumers = self.consumers.read().unwrap_or_else(PoisonError::into_inner);
        let live = |event: &HeldEvent| consumers.contains_key(&event.ticket.consumer);
        match (live(comes), live(held)) {
            (true, false) => true,
            (false, true) => false,
            _ => comes.produced_at_ms >= held.produced_at_ms,
        }
    }

    /// Counts what a read has seen of a server, by its number through all caches: once for each read.
    pub fn count_misses(&self, server: usize, seen: &[HeldItem]) {
        let mut counts = Counts::default();
        for item in seen.iter().filter(|item| !item.event.is_canary()) {
            // Of a deleted key nothing was to be found.
            counts.looks += u64::from(!matches!(item.seen, Seen::Nothing(Outcome::Deleted)));
            counts.missing += u64::from(matches!(item.seen, Seen::Nothing(Outcome::Missing)));
        }
        let misses = &self.config.misses;
        let limit = Limit {
            share: misses.share,
            min_events: misses.min_events as u64,
            within: misses.within,
        };
        let mut looks = self.view.looks.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(its) = looks.get_mut(server) else { return };
        if its.window.add(Instant::now(), counts, &limit) {
            let total = its.window.total();
            tracing::warn!(
                flow = self.view.name,
                cache = its.cache,
                server = its.server,
                missing = total.missing,
                looks = total.looks,
                likely_causes = LIKELY_CAUSES,
                "many keys that were set are missing in memcached, their copies at the peer are removed; `evrepl check \
                 --connect` compares the server with the ring"
            );
        }
    }

    /// The number that a cache has on the wire: its place among the peer's caches.
    pub fn wire_cache(&self, cache: u16) -> u16 {
        self.wire_caches[cache as usize]
    }

    /// The server that a key of a cache lives on, numbered through all caches.
    pub fn server_number(&self, cache: u16, key: &[u8]) -> usize {
        let cache = &self.caches[cache as usize];
        cache.first_server + cache.ring.server_of(key)
    }

    /// The cache whose events a topic carries, by its number, and whether that is its retry topic.
    pub fn cache_of_topic(&self, topic: &str) -> Option<(u16, bool)> {
        let (kafka, region) = (&self.config.kafka, &self.peer().region);
        let mut caches = (0u16..).zip(&self.config.caches);
        caches.find_map(|(number, cache)| match cache.topic == topic {
            true => Some((number, false)),
            false => (kafka.retry_topic_for(&cache.topic, region) == topic).then_some((number, true)),
        })
    }

    /// The peer this flow goes to.
    pub fn peer(&self) -> &crate::config::Peer {
        &self.config.peers[self.view.peer]
    }
}

/// Fates collected while a batch is worked on, sent with [`FlowShared::report`].
#[derive(Debug, Default)]
pub struct Reports {
    fates: Vec<(u32, Vec<Run>)>,
    /// Where the last one went: events come in runs of one partition.
    last: usize,
    permits: PerServer,
    canaries: Vec<Ended>,
    /// Events that ended and are traced.
    traced: Vec<(HeldEvent, Outcome)>,
}

impl Reports {
    /// An event that held a permit ended.
    pub fn finished(&mut self, event: &HeldEvent, outcome: Outcome) {
        permits::add(&mut self.permits, event.server.into(), 1);
        if event.is_canary() {
            self.canaries.push(Ended::of(event, outcome));
            return;
        }
        self.finished_dirty(event, outcome);
    }

    /// An event that waited as dirty, without a permit, ended.
    pub fn finished_dirty(&mut self, event: &HeldEvent, outcome: Outcome) {
        self.push(event.ticket, Fate::Finished(outcome));
        if event.trace.is_some() {
            let mut event = event.clone();
            if outcome == Outcome::Superseded {
                event.note(|| Note::Superseded, Instant::now());
            }
            self.traced.push((event, outcome));
        }
    }

    /// An event gave its permit up and waits as dirty. A canary does not wait: it is to be dropped ([`Reports::lost`]).
    pub fn dirty(&mut self, event: &HeldEvent) {
        permits::add(&mut self.permits, event.server.into(), 1);
        if event.is_canary() {
            return;
        }
        self.push(event.ticket, Fate::Dirty);
    }

    /// A canary that gave its permit up is dropped, for this reason.
    pub fn lost(&mut self, canary: &HeldEvent, reason: &'static str) {
        self.canaries.push(Ended::lost(canary, reason));
    }

    /// A dirty event has a permit again.
    pub fn in_flight(&mut self, ticket: Ticket) {
        self.push(ticket, Fate::InFlight);
    }

    fn push(&mut self, ticket: Ticket, fate: Fate) {
        if self
            .fates
            .get(self.last)
            .is_none_or(|(consumer, _)| *consumer != ticket.consumer)
        {
            let known = self.fates.iter().position(|(consumer, _)| *consumer == ticket.consumer);
            self.last = known.unwrap_or(self.fates.len());
            if known.is_none() {
                self.fates.push((ticket.consumer, Vec::new()));
            }
        }
        let runs = &mut self.fates[self.last].1;
        match runs.last_mut() {
            // Events of a partition go through a lane in order: most follow one another, and end alike.
            Some(run) if run.fate == fate && run.first + u64::from(run.count) == ticket.seq && run.count < u32::MAX => {
                run.count += 1;
            }
            _ => runs.push(Run {
                first: ticket.seq,
                count: 1,
                fate,
            }),
        }
    }
}

/// What a session agreed on.
#[derive(Clone, Debug, Default)]
pub struct SessionTerms {
    /// The largest value that the peer takes, in bytes.
    pub max_value: u64,
    /// The largest batch that the peer takes, in bytes, decompressed.
    pub max_batch: u64,
    /// Both ends know LZ4.
    pub lz4: bool,
    /// By cache index: the peer knows the cache and lets us write it.
    pub accepted: Vec<bool>,
}

/// What a lane has heard from its peer: which session is open, and the last tick. Written by the link, read by the readers
/// before they look.
#[derive(Debug, Default)]
pub struct LaneClock {
    session: AtomicU64,
    tick: AtomicU64,
    max_value: AtomicU64,
    max_batch: AtomicU64,
    lz4: AtomicBool,
    /// By cache index.
    accepted: Vec<AtomicBool>,
    /// Batches that were handed to the link and are not acked.
    under_way: AtomicUsize,
    /// The coalescer waits for there to be none.
    idle_awaited: AtomicBool,
}

/// A batch is under way, from the coalescer until it is acked or given up.
#[derive(Debug)]
pub struct UnderWay(Arc<LaneClock>);

impl UnderWay {
    /// One batch more.
    pub fn new(clock: &Arc<LaneClock>) -> UnderWay {
        clock.under_way.fetch_add(1, Relaxed);
        UnderWay(clock.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Relaxed);
    }
}

impl LaneClock {
    /// Whether no batch is under way.
    pub fn is_idle(&self) -> bool {
        self.under_way.load(Relaxed) == 0
    }

    /// The coalescer wants to hear when no batch is under way any more.
    pub fn await_idle(&self) {
        self.idle_awaited.store(true, Relaxed);
    }

    /// Whether the coalescer is to be told now that no batch is under way. Once.
    pub fn tell_idle(&self) -> bool {
        self.is_idle() && self.idle_awaited.swap(false, Relaxed)
    }

    /// The clock of a lane that has heard nothing yet.
    pub fn new(caches: usize) -> Self {
        let accepted = (0..caches).map(|_| AtomicBool::new(false)).collect();
        LaneClock {
            accepted,
            ..LaneClock::default()
        }
    }

    /// Whether the peer takes this cache in this session.
    pub fn accepts(&self, cache: usize) -> bool {
        self.accepted[cache].load(Relaxed)
    }

    /// Whether batches may be compressed in this session.
    pub fn lz4(&self) -> bool {
        self.lz4.load(Relaxed)
    }

    /// Session (0: none) and last tick heard.
    pub fn read(&self) -> (u64, u64) {
        (self.session.load(Relaxed), self.tick.load(Relaxed))
    }

    /// The largest value that the peer takes in this session, in bytes.
    pub fn max_value(&self) -> usize {
        self.max_value.load(Relaxed) as usize
    }

    /// The largest batch that the peer takes in this session, in bytes.
    pub fn max_batch(&self) -> usize {
        self.max_batch.load(Relaxed) as usize
    }

    /// A session began with these terms.
    pub fn begin(&self, session: u64, tick: u64, terms: &SessionTerms) {
        self.max_value.store(terms.max_value, Relaxed);
        self.max_batch.store(terms.max_batch, Relaxed);
        self.lz4.store(terms.lz4, Relaxed);
        for (cache, accepted) in self.accepted.iter().enumerate() {
            accepted.store(terms.accepted.get(cache).copied().unwrap_or(false), Relaxed);
        }
        self.tick.store(tick, Relaxed);
        self.session.store(session, Relaxed);
    }

    /// The peer said this tick.
    pub fn heard(&self, tick: u64) {
        self.tick.fetch_max(tick, Relaxed);
    }

    /// The session ended.
    pub fn end(&self) {
        self.session.store(0, Relaxed);
    }
}

/// Milliseconds since the epoch by the wall clock; for lag and expiry, never for order.
pub fn wall_ms() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as i64)
}

/// Microseconds since the epoch by the wall clock.
pub fn wall_us() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_micros() as u64)
}
