//! Events of the front door's writes on their way to Kafka, and those that cannot go there now.
//!
//! An event goes into librdkafka's queue, which is bounded. What it has no room for, and what Kafka has not acknowledged in
//! time, is remembered as a key, once for all events of the key (an event says no more than "this key changed"), and produced
//! when Kafka takes events again. There is a bound on these too; what is beyond it is *lost*, counted and said.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use tokio::time::Instant;

use crate::config::{Config, EventAck, FrontDoor};
use crate::event::{self, Event, Op, TraceContext};
use crate::hlc::Hlc;
use crate::kafka::{Delivery, EventProducer, EventSender, KafkaError, NotTaken};
use crate::relay::wall_ms;
use crate::telemetry::RateLimit;

use super::order::Receipt;

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
/// Remembered keys that are produced at once, when it is.
const RESEND: usize = 1000;
/// After so long a new client is made.
const RENEW_AFTER: Duration = Duration::from_secs(20);

static AWAY: RateLimit = RateLimit::new();
static LOST: RateLimit = RateLimit::new();

/// What an event says, besides its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Said {
    /// What happened.
    pub op: Op,
    /// The client's time to live.
    pub ttl: Option<u32>,
    /// The write only filled the cache.
    pub fill: bool,
}

impl Said {
    /// What both say, in whichever order they came (one that waits in librdkafka's queue may be behind one that found it full):
    /// never a touch alone, if one is more, and a fill only if both are.
    fn with(self, earlier: Said) -> Said {
        let op = Op::merged(earlier.op, self.op);
        // A touch of what was filled makes no write of it.
        let fills = |said: Said| said.fill || said.op == Op::Touch;
        Said {
            op,
            ttl: self.ttl,
            fill: op == Op::Set && fills(self) && fills(earlier),
        }
    }
}

/// Keys whose events Kafka does not have, by cache; at most so many.
struct Unsent {
    caches: Vec<HashMap<Box<[u8]>, Said, RandomState>>,
    count: usize,
    most: usize,
}

impl Unsent {
    fn new(caches: usize, most: usize) -> Unsent {
        Unsent {
            caches: (0..caches).map(|_| HashMap::default()).collect(),
            count: 0,
            most,
        }
    }

    /// False when there is no room for it.
    fn add(&mut self, cache: usize, key: &[u8], said: Said) -> bool {
        if let Some(known) = self.caches[cache].get_mut(key) {
            *known = said.with(*known);
            return true;
        }
        if self.count >= self.most {
            return false;
        }
        self.count += 1;
        self.caches[cache].insert(key.into(), said);
        true
    }

    /// Takes so many out, of whichever cache has some.
    fn take(&mut self, most: usize) -> Vec<(usize, Box<[u8]>, Said)> {
        let mut taken = Vec::new();
        for (cache, keys) in self.caches.iter_mut().enumerate() {
            let room = most - taken.len();
            let some: Vec<Box<[u8]>> = keys.keys().take(room).cloned().collect();
            taken.extend(
                some.into_iter()
                    .filter_map(|key| keys.remove_entry(&key))
                    .map(|(key, said)| (cache, key, said)),
            );
        }
        self.count -= taken.len();
        taken
    }
}

/// Events of one cache, for `/status` and `/metrics`.
#[derive(Debug, Default)]
pub struct EventCounts {
    /// Acknowledged by Kafka.
    pub acknowledged: AtomicU64,
    /// Remembered as a key because Kafka did not take them.
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

/// The token of an event that nobody waits for; that of another is its receiver's number plus one, and its receipt below.
const NOBODY: usize = 0;
const RECEIPT_BITS: u32 = 48;

impl Shared {
    fn unsent(&self) -> MutexGuard<'_, Unsent> {
        self.unsent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, cache: usize, key: &[u8], said: Said) {
        let (kept, count) = {
            let mut unsent = self.unsent();
            (unsent.add(cache, key, said), unsent.count)
        };
        self.unsent_count.store(count as u64, SeqCst);
        let counts = &self.counts[cache];
        if kept {
            counts.remembered.fetch_add(1, Relaxed);
            return;
        }
        let lost = counts.lost.fetch_add(1, Relaxed) + 1;
        if let Some(unsaid) = LOST.due(&self.topics[cache]) {
            tracing::error!(
                topic = self.topics[cache],
                lost,
                unsaid,
                "events are lost: kafka takes none, and front_door.max_unsent_keys are remembered; write these keys again, or \
                 replay the topic's keys (evrepl replay), when it is back"
            );
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
        if token == NOBODY {
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
            self.remember(cache, key, said);
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
            unsent: Mutex::new(Unsent::new(config.caches.len(), door.max_unsent_keys)),
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

    /// Events that Kafka has not acknowledged, and keys whose events could not be produced.
    pub fn waiting(&self) -> (u64, u64) {
        (self.shared.queued.load(SeqCst), self.shared.unsent_count.load(SeqCst))
    }

    /// Of a cache, by its number in the configuration.
    pub fn counts(&self, cache: usize) -> &EventCounts {
        &self.shared.counts[cache]
    }

    /// Looks whether Kafka is away, or back, and produces what was remembered: called some times a second.
    pub fn tick(&self, now: Instant) {
        let shared = &self.shared;
        let overdue = wall_ms() - shared.moved_ms.load(Relaxed) > AWAY_AFTER.as_millis() as i64;
        if overdue && shared.queued.load(SeqCst) > 0 && !shared.away.swap(true, SeqCst) {
            tracing::warn!("kafka acknowledges no events of the front door");
        }
        let mut resend = self.resend.lock().unwrap_or_else(PoisonError::into_inner);
        let away = shared.away.load(SeqCst);
        if !away {
            (resend.away_since, resend.probed) = (None, None);
        } else {
            let since = *resend.away_since.get_or_insert(now);
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
            return;
        }
        // One at a time, until one has arrived.
        let most = match (away, resend.probed) {
            (true, Some(probed)) if now - probed < PROBE_EVERY => return,
            (true, _) => 1,
            (false, _) => RESEND,
        };
        resend.probed = Some(now);
        let taken = {
            let mut unsent = shared.unsent();
            let taken = unsent.take(most);
            shared.unsent_count.store(unsent.count as u64, SeqCst);
            taken
        };
        for (cache, key, said) in taken {
            // What is not taken is remembered again by itself.
            resend.sender.announce(cache, &key, said, None, None, wall_ms() as u64);
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
        self.value.clear();
        let event = Event {
            ttl: said.ttl,
            ver: Some(self.clock.now(now_ms)),
            fill: said.fill,
            ..Event::new(said.op)
        };
        event::encode(&event, &mut self.value);
        let token = waits.map_or(NOBODY, |(receiver, receipt)| {
            receiver << RECEIPT_BITS | receipt as usize
        });
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
                shared.remember(cache, key, said);
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SET: Said = Said {
        op: Op::Set,
        ttl: Some(60),
        fill: true,
    };

    #[test]
    fn a_key_is_remembered_once_and_only_so_many_are() {
        let mut unsent = Unsent::new(2, 3);
        assert!(unsent.add(0, b"a", SET));
        assert!(unsent.add(
            0,
            b"a",
            Said {
                op: Op::Delete,
                ttl: None,
                fill: false
            }
        ));
        assert!(unsent.add(0, b"a", SET) && unsent.add(1, b"a", SET) && unsent.add(1, b"b", SET));
        assert!(!unsent.add(0, b"c", SET));
        assert!(unsent.add(1, b"b", SET), "it is known");
        let mut taken = unsent.take(2);
        taken.extend(unsent.take(2));
        assert_eq!((taken.len(), unsent.count), (3, 0));
        // Something more than a fill has happened to it.
        assert!(taken.contains(&(0, b"a"[..].into(), Said { fill: false, ..SET })));
        assert!(unsent.add(0, b"c", SET));
    }

    #[test]
    fn a_remembered_key_with_a_new_value_is_no_touch_whichever_came_first() {
        let of = |op| Said {
            op,
            ttl: None,
            fill: false,
        };
        for (first, then, said) in [
            (Op::Set, Op::Touch, Op::Set),
            (Op::Touch, Op::Set, Op::Set),
            (Op::Touch, Op::Delete, Op::Delete),
            (Op::Delete, Op::Touch, Op::Set),
            (Op::Touch, Op::Touch, Op::Touch),
        ] {
            let mut unsent = Unsent::new(1, 3);
            assert!(unsent.add(0, b"a", of(first)) && unsent.add(0, b"a", of(then)));
            let (_, _, taken) = unsent.take(1).remove(0);
            assert_eq!((taken.op, taken.fill), (said, false), "{first:?}, {then:?}");
        }
        let touch = of(Op::Touch);
        assert!(
            touch.with(SET).fill && SET.with(touch).fill && !of(Op::Delete).with(SET).fill && !touch.with(touch).fill
        );
    }
}
