//! Events of the front door's writes on their way to Kafka, and those that cannot go there now.
//!
//! An event goes into librdkafka's queue, which is bounded. What it has no room for, and what Kafka has not acknowledged in
//! time, is remembered as a key, once for all events of the key (an event says no more than "this key changed"), and produced
//! when Kafka takes events again. There is a bound on these too; what is beyond it is *lost*, counted and said.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;

use tokio::time::Instant;

use crate::config::{Cache, Config, EventAck, FrontDoor};
use crate::event::{self, Event, TraceContext};
use crate::hlc::Hlc;
use crate::kafka::{Delivery, EventProducer, EventSender, KafkaError, NotTaken};
use crate::relay::wall_ms;
use crate::telemetry::RateLimit;

use super::order::Receipt;
use super::unsent::{Said, Unsent};

/// How long an event waits for others that go with it, when no client waits for it. Each request costs the broker some 0.3 ms of
/// CPU and librdkafka's threads 0.1, however few events are in it: at 200 000 sets a second, 5 ms instead of 1 save a third of the
/// broker's CPU and a tenth of evrepl's.
const LINGER_QUEUED: Duration = Duration::from_millis(5);
/// The same, when its client waits for Kafka.
const LINGER_ACKED: Duration = Duration::from_millis(1);
/// Without an acknowledgement for so long, although one is due, Kafka is away for a topic: one may be missing, or without a
/// leader, while it takes those of the others.
const AWAY_AFTER: Duration = Duration::from_secs(1);
/// How often it is asked whether it is back.
const PROBE_EVERY: Duration = Duration::from_millis(500);
/// The same while an event waits to be sent.
const PROBE_RARELY: Duration = Duration::from_secs(5);
/// A cache without a write for so long, of which nothing waits, says no longer that Kafka is away.
const FORGET_AFTER: Duration = Duration::from_secs(30);
/// Remembered keys that are produced in one tick, when it is, at most; there are ten ticks a second, on the root's thread.
const RESEND: usize = 5000;
/// When it is tried again whether there is room for more of them: as long as one waits for others at least.
pub const SOON: Duration = Duration::from_millis(5);
/// After so long a new client is made.
const RENEW_AFTER: Duration = Duration::from_secs(20);

/// How often it is said that events are lost, while they are.
const SAY_LOST_EVERY: Duration = Duration::from_secs(10);

static AWAY: RateLimit = RateLimit::new();

/// Events of one cache, for `/status` and `/metrics`.
#[derive(Debug, Default)]
pub struct EventCounts {
    /// Acknowledged by Kafka.
    pub acknowledged: AtomicU64,
    /// Remembered as a key because Kafka did not take them; once, however often the key is produced again.
    pub remembered: AtomicU64,
    /// Neither: no peer hears of these writes, unless the key is written again.
    pub lost: AtomicU64,
}

/// What became of events whose answers are held back, for the thread that holds them.
pub trait Receipts: Send + Sync {
    /// Kafka has acknowledged this event, or not. Called on another thread: it must not wait.
    fn arrived(&self, receipt: Receipt, acknowledged: bool);
}

/// The topic of one cache.
#[derive(Default)]
struct Topic {
    name: String,
    counts: EventCounts,
    /// Keys whose events could not be produced.
    unsent: AtomicU64,
    /// Events in librdkafka's queue.
    queued: AtomicU64,
    /// When Kafka last acknowledged one, or the first of those that wait was produced.
    moved_ms: AtomicI64,
    /// When it last acknowledged one.
    heard_ms: AtomicI64,
    away: AtomicBool,
    /// When it was last tried, since it is away.
    tried_ms: AtomicI64,
    /// When a write was last let in that would be refused, so that there is something to try.
    let_in_ms: AtomicI64,
}

impl Topic {
    /// Whether it is time to see whether Kafka is back; then it is being done. One that waits to be sent will be, so that the
    /// next one has time: it would only take the room of others' events.
    fn try_now(&self, now_ms: i64) -> bool {
        let every = if self.queued.load(SeqCst) == 0 {
            PROBE_EVERY
        } else {
            PROBE_RARELY
        };
        once_in(every, &self.tried_ms, now_ms)
    }

    /// Nothing waits, here or in librdkafka, that could show that Kafka is back.
    fn is_idle(&self) -> bool {
        self.queued.load(SeqCst) == 0 && self.unsent.load(SeqCst) == 0
    }

    /// Whether a write may go on now though Kafka is away; told to one. That others have filled the queue is no reason.
    fn lets_in(&self, now_ms: i64) -> bool {
        self.away.load(Relaxed) && self.is_idle() && once_in(PROBE_EVERY, &self.let_in_ms, now_ms)
    }

    /// Kafka did not take an event, or not in time. One that it has heard of a moment ago is there all the same: that was an
    /// event of before, or of a partition without a leader.
    fn has_failed(&self) {
        if !recent(AWAY_AFTER, &self.heard_ms, wall_ms()) {
            self.away.store(true, SeqCst);
        }
    }
}

/// Whether this was within a time. A clock that was set back makes it longer ago, not later.
fn recent(time: Duration, at_ms: &AtomicI64, now_ms: i64) -> bool {
    now_ms.saturating_sub(at_ms.load(Relaxed)).unsigned_abs() < time.as_millis() as u64
}

/// Whether this was not within a time, and is now; told to one thread.
fn once_in(time: Duration, at_ms: &AtomicI64, now_ms: i64) -> bool {
    let at = at_ms.load(Relaxed);
    !recent(time, at_ms, now_ms) && at_ms.compare_exchange(at, now_ms, SeqCst, Relaxed).is_ok()
}

/// What librdkafka's callbacks and the threads of the front door share.
struct Shared {
    topics: Vec<Topic>,
    unsent: Mutex<Unsent>,
    /// By their numbers, which are not given again: events of one that is gone may be under way.
    receivers: RwLock<Vec<Weak<dyn Receipts>>>,
}

/// The token of an event that nobody waits for; that of another is its receiver's number, from 1 on, and its receipt below.
const NOBODY: usize = 0;
/// Of a remembered key, which is produced again: nobody waits for it either.
const AGAIN: usize = 1;
const RECEIPT_BITS: u32 = 48;

impl Shared {
    fn unsent(&self) -> MutexGuard<'_, Unsent> {
        self.unsent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kafka did not take an event of this key.
    fn remember(&self, cache: usize, key: &[u8], said: Said, token: usize) {
        let topic = &self.topics[cache];
        let again = token == AGAIN;
        let kept = {
            let mut unsent = self.unsent();
            let kept = match again {
                true => {
                    unsent.came_back(cache, key, said);
                    true
                }
                false => unsent.add(cache, key, said),
            };
            topic.unsent.store(unsent.count(cache) as u64, SeqCst);
            kept
        };
        if !kept {
            topic.counts.lost.fetch_add(1, Relaxed);
        } else if !again {
            topic.counts.remembered.fetch_add(1, Relaxed);
        }
    }

    fn ended(&self, topic: &Topic, token: usize, acknowledged: bool) {
        topic.queued.fetch_sub(1, SeqCst);
        if acknowledged {
            let now_ms = wall_ms();
            topic.moved_ms.store(now_ms, Relaxed);
            topic.heard_ms.store(now_ms, Relaxed);
            if topic.away.load(Relaxed) && topic.away.swap(false, SeqCst) {
                tracing::info!(topic = topic.name, "kafka takes events of the front door again");
            }
        }
        if token >> RECEIPT_BITS == 0 {
            return;
        }
        let receivers = self.receivers.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(receiver) = receivers.get((token >> RECEIPT_BITS) - 1).and_then(Weak::upgrade) {
            receiver.arrived((token & ((1 << RECEIPT_BITS) - 1)) as Receipt, acknowledged);
        }
    }

    fn topic(&self, name: &str) -> Option<(usize, &Topic)> {
        self.topics.iter().enumerate().find(|(_, topic)| topic.name == name)
    }

    /// Events in librdkafka's queue.
    fn queued(&self) -> u64 {
        self.topics.iter().map(|topic| topic.queued.load(SeqCst)).sum()
    }
}

impl Delivery for Shared {
    fn delivered(&self, token: usize, topic: &str) {
        let Some((_, topic)) = self.topic(topic) else { return };
        topic.counts.acknowledged.fetch_add(1, Relaxed);
        if token == AGAIN {
            self.unsent().arrived();
        }
        self.ended(topic, token, true);
    }

    fn failed(&self, token: usize, topic: &str, key: &[u8], value: &[u8], error: KafkaError) {
        let Some((cache, topic)) = self.topic(topic) else {
            return;
        };
        if let Some(unsaid) = AWAY.due(&topic.name) {
            tracing::warn!(%error, topic = topic.name, unsaid, "kafka did not take an event of the front door, its key is remembered");
        }
        topic.has_failed();
        // Our own events: they can be read.
        let said = event::decode_ref(value).map(|event| Said {
            op: event.op,
            ttl: event.ttl,
            fill: event.fill,
        });
        if let Ok(said) = said {
            self.remember(cache, key, said, token);
        }
        self.ended(topic, token, false);
    }
}

/// See the module. One for the process.
pub struct Announcer {
    shared: Arc<Shared>,
    producer: Arc<EventProducer>,
    most: u64,
    resend: Mutex<Resend>,
}

struct Resend {
    sender: AnnouncerHandle,
    /// The cache whose turn is first.
    first: usize,
    /// Since when nothing was heard of Kafka though a topic is away.
    silent_since: Option<Instant>,
    renewed: Option<Instant>,
    /// By cache.
    said: Vec<SaidOf>,
}

/// What was said of a cache.
#[derive(Clone, Default)]
struct SaidOf {
    /// Kafka is away.
    away: bool,
    /// So many events are lost, and when that was.
    lost: (u64, Option<Instant>),
}

/// How long an event waits for others that go along.
pub(crate) fn event_linger(door: &FrontDoor) -> Duration {
    door.event_linger.unwrap_or(match door.event_ack {
        EventAck::Queued => LINGER_QUEUED,
        EventAck::Acked => LINGER_ACKED,
    })
}

impl Announcer {
    /// For every cache of the configuration.
    ///
    /// # Errors
    /// [`KafkaError::Settings`] when librdkafka refuses a property.
    pub fn new(config: &Config) -> Result<Arc<Announcer>, KafkaError> {
        let door = &config.front_door;
        let shared = Arc::new(Shared {
            topics: (config.caches.iter())
                .map(|cache| Topic {
                    name: cache.topic.clone(),
                    ..Topic::default()
                })
                .collect(),
            unsent: Mutex::new(Unsent::new(
                config.caches.iter().map(Cache::invalidates),
                door.max_unsent_keys,
            )),
            receivers: RwLock::default(),
        });
        let client_id = format!("{}-front-door", config.node);
        let producer = EventProducer::new(
            &config.kafka,
            &client_id,
            door.max_queued_events,
            door.event_timeout,
            event_linger(door),
            shared.clone(),
        )?;
        let sender = handle(&shared, &producer);
        Ok(Arc::new(Announcer {
            most: door.max_queued_events as u64,
            shared,
            producer,
            resend: Mutex::new(Resend {
                sender,
                first: 0,
                silent_since: None,
                renewed: None,
                said: vec![SaidOf::default(); config.caches.len()],
            }),
        }))
    }

    /// For one thread.
    pub fn handle(&self) -> AnnouncerHandle {
        handle(&self.shared, &self.producer)
    }

    /// Registers who is told of receipts; its number is for [`AnnouncerHandle::announce`].
    pub fn receiver(&self, receiver: Weak<dyn Receipts>) -> usize {
        let mut receivers = self.shared.receivers.write().unwrap_or_else(PoisonError::into_inner);
        receivers.push(receiver);
        receivers.len()
    }

    /// Whether Kafka takes events of this cache, as far as is known, and there is room for one more.
    pub fn takes(&self, cache: usize) -> bool {
        !self.is_away(cache) && self.shared.queued() < self.most
    }

    /// Whether a write may go on though Kafka is away, as far as is known: one now and then, where nothing else would show that
    /// it is back. To be asked by who then does.
    pub fn lets_in(&self, cache: usize) -> bool {
        self.shared.topics[cache].lets_in(wall_ms())
    }

    /// Whether an acknowledgement of this cache's events is overdue.
    pub fn is_away(&self, cache: usize) -> bool {
        self.shared.topics[cache].away.load(Relaxed)
    }

    /// An event was not acknowledged in time; what becomes of it is not known yet.
    pub fn overdue(&self, cache: usize) {
        let topic = &self.shared.topics[cache];
        if !topic.away.swap(true, SeqCst)
            && let Some(unsaid) = AWAY.due(&topic.name)
        {
            tracing::warn!(
                topic = topic.name,
                unsaid,
                "kafka has not acknowledged an event of the front door in time"
            );
        }
    }

    /// Events of this cache that Kafka has not acknowledged, and keys whose events could not be produced.
    pub fn waiting(&self, cache: usize) -> (u64, u64) {
        let topic = &self.shared.topics[cache];
        (topic.queued.load(SeqCst), topic.unsent.load(SeqCst))
    }

    /// Of a cache, by its number in the configuration.
    pub fn counts(&self, cache: usize) -> &EventCounts {
        &self.shared.topics[cache].counts
    }

    /// Looks whether Kafka is away, or back, and produces what was remembered: called some times a second, and again in
    /// [`SOON`] when that is true: there would have been more to produce, had there been room.
    pub fn tick(&self, now: Instant) -> bool {
        let mut resend = self.resend.lock().unwrap_or_else(PoisonError::into_inner);
        let now_ms = wall_ms();
        for (cache, topic) in self.shared.topics.iter().enumerate() {
            let overdue = now_ms - topic.moved_ms.load(Relaxed) > AWAY_AFTER.as_millis() as i64;
            if overdue && topic.queued.load(SeqCst) > 0 && !topic.away.swap(true, SeqCst) {
                tracing::warn!(topic = topic.name, "kafka acknowledges no events of the front door");
            }
            let away = topic.away.load(SeqCst);
            let back = !away && std::mem::replace(&mut resend.said[cache].away, away);
            resend.said[cache].away = away;
            self.say_lost(&mut resend, cache, now, back);
        }
        self.look_after_producer(&mut resend, now, now_ms);
        self.produce_again(&mut resend, now_ms)
    }

    /// A producer that hears nothing may have forgotten its brokers.
    fn look_after_producer(&self, resend: &mut Resend, now: Instant, now_ms: i64) {
        let topics = &self.shared.topics;
        let heard = topics.iter().any(|topic| recent(AWAY_AFTER, &topic.heard_ms, now_ms));
        if heard || !topics.iter().any(|topic| topic.away.load(SeqCst)) {
            if resend.silent_since.take().is_some() && heard {
                self.producer.heard();
            }
            return;
        }
        let since = *resend.silent_since.get_or_insert(now);
        self.producer.remind();
        let tried = resend.renewed.map_or(since, |renewed| renewed.max(since));
        if now - tried >= RENEW_AFTER {
            resend.renewed = Some(now);
            match self.producer.renew() {
                Ok(()) => tracing::warn!("kafka has taken no event for {RENEW_AFTER:?}, made a new producer"),
                Err(error) => tracing::warn!(%error, "no new kafka producer could be made"),
            }
        }
    }

    /// Whether there would have been more to produce, had there been room.
    fn produce_again(&self, resend: &mut Resend, now_ms: i64) -> bool {
        let shared = &self.shared;
        // Half of the room is left to what clients write now.
        let room = (self.most.saturating_sub(shared.queued()) as usize / 2).clamp(1, RESEND);
        let mut left = room;
        let mut soon = false;
        let caches = shared.topics.len();
        resend.first = (resend.first + 1) % caches;
        for cache in (0..caches).map(|n| (resend.first + n) % caches) {
            let topic = &shared.topics[cache];
            let away = topic.away.load(SeqCst);
            if topic.unsent.load(SeqCst) == 0 {
                // The next write tries; but where none comes nobody should be told for ever.
                let tries = [&topic.tried_ms, &topic.let_in_ms];
                if away && topic.is_idle() && !tries.iter().any(|at_ms| recent(FORGET_AFTER, at_ms, now_ms)) {
                    topic.away.store(false, SeqCst);
                }
                continue;
            }
            // One at a time, until one has arrived.
            let most = match away {
                true if !topic.try_now(now_ms) => continue,
                true => 1,
                false => left,
            };
            let taken = shared.unsent().take(cache, most);
            let mut produced = 0;
            for (key, said) in taken {
                // What is not taken is remembered again by itself.
                produced += usize::from(
                    resend
                        .sender
                        .produce(cache, &key, said, None, AGAIN, now_ms.max(0) as u64),
                );
            }
            // Now that they are queued: whoever looks sees them here or there.
            let waiting = {
                let unsent = shared.unsent();
                topic.unsent.store(unsent.count(cache) as u64, SeqCst);
                unsent.count(cache)
            };
            left = left.saturating_sub(produced);
            // What librdkafka refuses has time: it would refuse it again.
            soon |= waiting > 0 && !away && (produced > 0 || shared.queued() >= self.most);
            if left == 0 {
                break;
            }
        }
        soon && room < RESEND
    }

    /// Says how many events are lost, if not all were said: nobody will later.
    pub fn say_all_lost(&self) {
        let mut resend = self.resend.lock().unwrap_or_else(PoisonError::into_inner);
        for cache in 0..self.shared.topics.len() {
            self.say_lost(&mut resend, cache, Instant::now(), true);
        }
    }

    /// Says how many events of a cache are lost, if there are more than were said: the first at once, the others some time
    /// later, and all when it is over.
    fn say_lost(&self, resend: &mut Resend, cache: usize, now: Instant, over: bool) {
        let topic = &self.shared.topics[cache];
        let (said, at) = &mut resend.said[cache].lost;
        let lost = topic.counts.lost.load(Relaxed);
        let due = over || at.is_none_or(|at| now - at >= SAY_LOST_EVERY);
        if lost == *said || !due {
            return;
        }
        tracing::error!(
            topic = topic.name,
            lost,
            more = lost - *said,
            "events are lost: kafka has not taken them, and front_door.max_unsent_keys are remembered; their keys are not \
             known any more: let them expire, or write again what was written meanwhile"
        );
        (*said, *at) = (lost, Some(now));
    }
}

fn handle(shared: &Arc<Shared>, producer: &Arc<EventProducer>) -> AnnouncerHandle {
    AnnouncerHandle {
        shared: shared.clone(),
        sender: producer.sender(),
        clock: Hlc::default(),
        value: Vec::new(),
    }
}

/// Announces writes, from one thread.
pub struct AnnouncerHandle {
    shared: Arc<Shared>,
    sender: EventSender,
    clock: Hlc,
    value: Vec<u8>,
}

impl AnnouncerHandle {
    /// Produces an event, or remembers its key. `waits` names who is told when Kafka has it; false when nobody will be, since
    /// Kafka did not take it now. `now_ms` is the wall clock.
    pub fn announce(
        &mut self,
        cache: usize,
        key: &[u8],
        said: Said,
        trace: Option<&TraceContext>,
        waits: Option<(usize, Receipt)>,
        now_ms: u64,
    ) -> bool {
        let token = waits.map_or(NOBODY, |(receiver, receipt)| {
            receiver << RECEIPT_BITS | receipt as usize
        });
        self.produce(cache, key, said, trace, token, now_ms)
    }

    fn produce(
        &mut self,
        cache: usize,
        key: &[u8],
        said: Said,
        trace: Option<&TraceContext>,
        token: usize,
        now_ms: u64,
    ) -> bool {
        let shared = &self.shared;
        let topic = &shared.topics[cache];
        if token != AGAIN && topic.away.load(Relaxed) && !topic.try_now(now_ms as i64) && !topic.is_idle() {
            // It would only be in the way of the events of others, and be too late in the end.
            shared.remember(cache, key, said, token);
            return false;
        }
        self.value.clear();
        let event = Event {
            ttl: said.ttl,
            ver: Some(self.clock.now(now_ms)),
            fill: said.fill,
            ..Event::new(said.op)
        };
        event::encode(&event, &mut self.value);
        // From now on one is due, if none was: before it is counted, or Kafka would seem to have been silent since the last.
        if topic.queued.load(Relaxed) == 0 {
            topic.moved_ms.store(now_ms as i64, SeqCst);
        }
        // Before it is produced: its outcome may come first.
        topic.queued.fetch_add(1, SeqCst);
        let traceparent = trace.map(TraceContext::format);
        let traceparent = traceparent.as_ref().map(|text| &text[..]);
        match self.sender.send(&topic.name, key, &self.value, traceparent, token) {
            Ok(()) => true,
            Err(not_taken) => {
                topic.queued.fetch_sub(1, SeqCst);
                if let NotTaken::Refused(error) = not_taken {
                    topic.away.store(true, SeqCst);
                    if let Some(unsaid) = AWAY.due(&topic.name) {
                        tracing::warn!(%error, topic = topic.name, unsaid, "kafka's client takes no event of the front door");
                    }
                }
                shared.remember(cache, key, said, token);
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Op;

    #[test]
    fn while_kafka_is_away_one_event_tries_and_the_next_when_it_has_failed_or_waits_for_long() {
        let topic = Topic::default();
        let due = |times: &[i64]| -> Vec<bool> { times.iter().map(|at| topic.try_now(1_000_000 + at)).collect() };
        assert_eq!(due(&[0, 0, 499, 500, 501]), [true, false, false, true, false]);
        topic.queued.store(1, SeqCst);
        assert_eq!(due(&[1000, 5499, 5500]), [false, false, true]);
        topic.queued.store(0, SeqCst);
        // The clock was set back.
        assert_eq!(due(&[5600, 1000]), [false, true]);
    }

    #[test]
    fn a_write_is_let_in_only_where_kafka_is_away_and_nothing_else_tries() {
        let topic = Topic::default();
        assert!(!topic.lets_in(1_000_000), "the queue is full, of others' events");
        topic.away.store(true, SeqCst);
        assert_eq!([0, 1, 500].map(|at| topic.lets_in(1_000_000 + at)), [true, false, true]);
        topic.unsent.store(1, SeqCst);
        assert!(!topic.lets_in(2_000_000));
    }

    #[test]
    fn an_event_that_fails_says_nothing_of_a_kafka_that_was_heard_of_a_moment_ago() {
        let topic = Topic::default();
        topic.heard_ms.store(wall_ms(), Relaxed);
        topic.has_failed();
        assert!(!topic.away.load(Relaxed));
        topic.heard_ms.store(wall_ms() - 60_000, Relaxed);
        topic.has_failed();
        assert!(topic.away.load(Relaxed));
    }

    #[test]
    fn an_event_counts_once_however_often_its_key_is_produced_again() {
        let said = Said {
            op: Op::Set,
            ttl: None,
            fill: false,
        };
        let shared = Shared {
            topics: vec![Topic {
                name: "topic".to_owned(),
                queued: AtomicU64::new(3),
                away: AtomicBool::new(true),
                ..Topic::default()
            }],
            unsent: Mutex::new(Unsent::new([false].into_iter(), 2)),
            receivers: RwLock::default(),
        };
        for key in [b"a", b"b", b"c", b"a"] {
            shared.remember(0, key, said, NOBODY);
        }
        for _ in 0..3 {
            let (key, said) = shared.unsent().take(0, 1).remove(0);
            shared.remember(0, &key, said, AGAIN);
        }
        shared.unsent().take(0, 1);
        shared.delivered(AGAIN, "topic");
        shared.remember(0, b"d", said, NOBODY);
        let counts = &shared.topics[0].counts;
        assert_eq!(
            [&counts.remembered, &counts.lost, &counts.acknowledged].map(|count| count.load(Relaxed)),
            [4, 1, 1]
        );
    }
}
