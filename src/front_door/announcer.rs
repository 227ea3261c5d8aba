//! Events of the front door's writes on their way to Kafka, and those that cannot go there now.
//!
//! An event goes into librdkafka's queue, which is bounded. What it has no room for, and what Kafka has not acknowledged in
//! time, is remembered as a key, once for all events of the key (an event says no more than "this key changed"), and produced
//! when Kafka takes events again. There is a bound on these too; what is beyond it is *lost*, counted and said.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;

use tokio::time::Instant;

use crate::config::{Config, EventAck, FrontDoor, OnSet};
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
/// Without an acknowledgement for so long, although one is due, Kafka is away.
const AWAY_AFTER: Duration = Duration::from_secs(1);
/// How often it is asked whether it is back.
const PROBE_EVERY: Duration = Duration::from_millis(500);
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

/// What librdkafka's callbacks and the threads of the front door share.
struct Shared {
    topics: Vec<String>,
    counts: Vec<EventCounts>,
    unsent: Mutex<Unsent>,
    /// Whether there are any, and how many.
    unsent_count: AtomicU64,
    /// Events in librdkafka's queue.
    queued: AtomicU64,
    /// When Kafka last acknowledged one, or the first of those that wait was produced.
    moved_ms: AtomicI64,
    away: AtomicBool,
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
            self.unsent_count.store(unsent.count() as u64, SeqCst);
            kept
        };
        let counts = &self.counts[cache];
        if !kept {
            counts.lost.fetch_add(1, Relaxed);
        } else if !again {
            counts.remembered.fetch_add(1, Relaxed);
        }
    }

    fn ended(&self, token: usize, acknowledged: bool) {
        self.queued.fetch_sub(1, SeqCst);
        if acknowledged {
            self.moved_ms.store(wall_ms(), Relaxed);
            if self.away.load(Relaxed) && self.away.swap(false, SeqCst) {
                tracing::info!("kafka takes events of the front door again");
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

    fn cache_of(&self, topic: &str) -> Option<usize> {
        self.topics.iter().position(|known| known == topic)
    }
}

impl Delivery for Shared {
    fn delivered(&self, token: usize, topic: &str) {
        if let Some(cache) = self.cache_of(topic) {
            self.counts[cache].acknowledged.fetch_add(1, Relaxed);
        }
        if token == AGAIN {
            self.unsent().arrived();
        }
        self.ended(token, true);
    }

    fn failed(&self, token: usize, topic: &str, key: &[u8], value: &[u8], error: KafkaError) {
        if let Some(unsaid) = AWAY.due(topic) {
            tracing::warn!(%error, topic, unsaid, "kafka did not take an event of the front door, its key is remembered");
        }
        self.away.store(true, SeqCst);
        // Our own events: they can be read.
        let said = event::decode_ref(value).map(|event| Said {
            op: event.op,
            ttl: event.ttl,
            fill: event.fill,
        });
        if let (Some(cache), Ok(said)) = (self.cache_of(topic), said) {
            self.remember(cache, key, said, token);
        }
        self.ended(token, false);
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
    probed: Option<Instant>,
    away_since: Option<Instant>,
    renewed: Option<Instant>,
    /// Events that are said to be lost, and when; by cache.
    said_lost: Vec<(u64, Option<Instant>)>,
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
            topics: config.caches.iter().map(|cache| cache.topic.clone()).collect(),
            counts: config.caches.iter().map(|_| EventCounts::default()).collect(),
            unsent: Mutex::new(Unsent::new(
                config.caches.iter().map(|cache| cache.on_set == OnSet::Invalidate),
                door.max_unsent_keys,
            )),
            unsent_count: AtomicU64::new(0),
            queued: AtomicU64::new(0),
            moved_ms: AtomicI64::new(wall_ms()),
            away: AtomicBool::new(false),
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
                probed: None,
                away_since: None,
                renewed: None,
                said_lost: vec![(0, None); config.caches.len()],
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

    /// Whether Kafka takes events, as far as is known, and there is room for one more.
    pub fn takes(&self) -> bool {
        !self.shared.away.load(Relaxed) && self.shared.queued.load(Relaxed) < self.most
    }

    /// Whether an acknowledgement is overdue.
    pub fn is_away(&self) -> bool {
        self.shared.away.load(Relaxed)
    }

    /// An event was not acknowledged in time; what becomes of it is not known yet.
    pub fn overdue(&self) {
        if !self.shared.away.swap(true, SeqCst)
            && let Some(unsaid) = AWAY.due("")
        {
            tracing::warn!(unsaid, "kafka has not acknowledged an event of the front door in time");
        }
    }

    /// Events that Kafka has not acknowledged, and keys whose events could not be produced.
    pub fn waiting(&self) -> (u64, u64) {
        (self.shared.queued.load(SeqCst), self.shared.unsent_count.load(SeqCst))
    }

    /// Of a cache, by its number in the configuration.
    pub fn counts(&self, cache: usize) -> &EventCounts {
        &self.shared.counts[cache]
    }

    /// Looks whether Kafka is away, or back, and produces what was remembered: called some times a second, and again in
    /// [`SOON`] when that is true: there would have been more to produce, had there been room.
    pub fn tick(&self, now: Instant) -> bool {
        let shared = &self.shared;
        let overdue = wall_ms() - shared.moved_ms.load(Relaxed) > AWAY_AFTER.as_millis() as i64;
        if overdue && shared.queued.load(SeqCst) > 0 && !shared.away.swap(true, SeqCst) {
            tracing::warn!("kafka acknowledges no events of the front door");
        }
        let mut resend = self.resend.lock().unwrap_or_else(PoisonError::into_inner);
        let away = shared.away.load(SeqCst);
        let back = !away && resend.away_since.take().is_some();
        self.say_lost(&mut resend, now, back);
        if !away {
            resend.probed = None;
        } else {
            let since = *resend.away_since.get_or_insert(now);
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
        if shared.unsent_count.load(SeqCst) == 0 {
            return false;
        }
        // One at a time, until one has arrived.
        let most = match (away, resend.probed) {
            (true, Some(probed)) if now - probed < PROBE_EVERY => return false,
            (true, _) => 1,
            // Half of the room is left to what clients write now.
            (false, _) => {
                let room = self.most.saturating_sub(shared.queued.load(SeqCst));
                (room as usize / 2).clamp(1, RESEND)
            }
        };
        resend.probed = Some(now);
        let taken = shared.unsent().take(most);
        let mut produced = 0;
        for (cache, key, said) in taken {
            // What is not taken is remembered again by itself.
            let now_ms = wall_ms().max(0) as u64;
            produced += usize::from(resend.sender.produce(cache, &key, said, None, AGAIN, now_ms));
        }
        // Now that they are queued: whoever looks sees them here or there.
        let left = {
            let unsent = shared.unsent();
            shared.unsent_count.store(unsent.count() as u64, SeqCst);
            unsent.count()
        };
        // What librdkafka refuses has time: it would refuse it again.
        let goes_on = produced > 0 || shared.queued.load(SeqCst) >= self.most;
        left > 0 && !away && most < RESEND && goes_on
    }

    /// Says how many events are lost, if not all were said: nobody will later.
    pub fn say_all_lost(&self) {
        let mut resend = self.resend.lock().unwrap_or_else(PoisonError::into_inner);
        self.say_lost(&mut resend, Instant::now(), true);
    }

    /// Says of each cache how many of its events are lost, if there are more than were said: the first at once, the others some
    /// time later, and all when it is over.
    fn say_lost(&self, resend: &mut Resend, now: Instant, over: bool) {
        for (cache, (said, at)) in resend.said_lost.iter_mut().enumerate() {
            let lost = self.shared.counts[cache].lost.load(Relaxed);
            let due = over || at.is_none_or(|at| now - at >= SAY_LOST_EVERY);
            if lost == *said || !due {
                continue;
            }
            tracing::error!(
                topic = self.shared.topics[cache],
                lost,
                more = lost - *said,
                "events are lost: kafka has not taken them, and front_door.max_unsent_keys are remembered; write these keys again when \
                 it takes events, or let them expire"
            );
            (*said, *at) = (lost, Some(now));
        }
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
        self.value.clear();
        let event = Event {
            ttl: said.ttl,
            ver: Some(self.clock.now(now_ms)),
            fill: said.fill,
            ..Event::new(said.op)
        };
        event::encode(&event, &mut self.value);
        let shared = &self.shared;
        // From now on one is due, if none was: before it is counted, or Kafka would seem to have been silent since the last.
        if shared.queued.load(Relaxed) == 0 {
            shared.moved_ms.store(now_ms as i64, SeqCst);
        }
        // Before it is produced: its outcome may come first.
        shared.queued.fetch_add(1, SeqCst);
        let traceparent = trace.map(TraceContext::format);
        let traceparent = traceparent.as_ref().map(|text| &text[..]);
        match self
            .sender
            .send(&shared.topics[cache], key, &self.value, traceparent, token)
        {
            Ok(()) => true,
            Err(not_taken) => {
                shared.queued.fetch_sub(1, SeqCst);
                if let NotTaken::Refused(error) = not_taken
                    && let Some(unsaid) = AWAY.due(&shared.topics[cache])
                {
                    tracing::warn!(%error, topic = shared.topics[cache], unsaid, "kafka's client takes no event of the front door");
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
    fn an_event_counts_once_however_often_its_key_is_produced_again() {
        let said = Said {
            op: Op::Set,
            ttl: None,
            fill: false,
        };
        let shared = Shared {
            topics: vec!["topic".to_owned()],
            counts: vec![EventCounts::default()],
            unsent: Mutex::new(Unsent::new([false].into_iter(), 2)),
            unsent_count: AtomicU64::new(0),
            queued: AtomicU64::new(3),
            moved_ms: AtomicI64::new(0),
            away: AtomicBool::new(true),
            receivers: RwLock::default(),
        };
        for key in [b"a", b"b", b"c", b"a"] {
            shared.remember(0, key, said, NOBODY);
        }
        for _ in 0..3 {
            let (cache, key, said) = shared.unsent().take(1).remove(0);
            shared.remember(cache, &key, said, AGAIN);
        }
        shared.unsent().take(1);
        shared.delivered(AGAIN, "topic");
        shared.remember(0, b"d", said, NOBODY);
        let counts = &shared.counts[0];
        assert_eq!(
            [&counts.remembered, &counts.lost, &counts.acknowledged].map(|count| count.load(Relaxed)),
            [4, 1, 1]
        );
    }
}
