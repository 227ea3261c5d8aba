//! The poll thread of a flow: a plain thread that owns the Kafka consumer and never blocks on anyone behind it.
//!
//! A flow has two: one for its source topics, and one, a member of a group of its own, for its retry topics: Kafka's sticky
//! assignor counts partitions, whatever their topic, and would give one relay all sources and another all retries.
//!
//! In: records. Out: chunks in each partition's queue, and rebalances as messages with a reply. A full queue pauses its
//! partition; polling goes on, so that the group keeps its member. Commits are commands; nothing else touches the consumer.

use std::collections::HashMap;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use actix::prelude::*;
use bytes::Bytes;
use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::canary;
use crate::event::TraceContext;
use crate::handoff::{Mailbox, MailboxGauge};
use crate::kafka::{FlowConsumer, KafkaError, MAX_BATCH, RebalanceListener, Record, Scratch, Served, TopicPartition};
use crate::parking::{Headers, Parked};
use crate::pulse::Pulse;
use crate::relay::{FlowView, wall_ms};
use crate::retention::{Found, Reading};
use crate::telemetry::RateLimit;
use crate::telemetry::names::SPAN_TARGET;

/// Largest chunk in events: more would not find many more repeats of a key, and one chunk must stay a small share of the
/// permits.
const MAX_CHUNK_EVENTS: usize = 16 * 1024;
/// The same where keys seldom come again.
const USUAL_CHUNK_EVENTS: usize = 4 * 1024;
/// The most events in one chunk of a flow that may have so many in flight: it is full at a quarter of them, and may get one more
/// batch of records, of whatever partition they are, before that is seen.
pub fn max_chunk(max_in_flight_events: usize) -> usize {
    let full = (max_in_flight_events / 4).clamp(1, MAX_CHUNK_EVENTS);
    full - 1 + max_batch(max_in_flight_events)
}

/// The most records that are taken from Kafka at once.
fn max_batch(max_in_flight_events: usize) -> usize {
    (max_in_flight_events / 4).clamp(1, MAX_BATCH)
}

/// Largest chunk in bytes of keys and values; events are tens of bytes, so only foreign records come near it.
const MAX_CHUNK_BYTES: usize = 4 << 20;
/// How long a poll may wait: also how long a command may wait to be seen.
const IDLE_POLL: Duration = Duration::from_millis(10);
/// The same for retry topics, where nobody waits for milliseconds.
const IDLE_RETRY_POLL: Duration = Duration::from_millis(50);
/// The same while a partition waits for room, which nobody announces.
const PAUSED_POLL: Duration = Duration::from_millis(2);
/// How long a partition whose queue is full keeps the poll thread waiting before it is paused, if no consumer takes a chunk
/// meanwhile: then all others have run dry, or stand still too. Much longer than a chunk takes that is worked on.
const PAUSE_AFTER: Duration = Duration::from_millis(50);
/// The same while others take chunks: they lose nothing by the wait before they have run dry, and a pause throws away what was
/// fetched. It ends the wait for one that stands still beside many.
const PAUSE_ANYWAY: Duration = Duration::from_secs(1);
/// How long rebalances and errors may wait while there are records without end.
const SERVE_EVERY: Duration = Duration::from_millis(5);
/// How often the high watermarks are read from librdkafka's cache, for the offset lag.
const WATERMARKS_EVERY: Duration = Duration::from_millis(250);
/// How often watermarks are committed again that Kafka has not confirmed.
const CONFIRM_EVERY: Duration = Duration::from_secs(1);
/// Before a group that has fenced this member is joined anew: a broker that restarts may fence a member whose join it had
/// begun to answer, and a second process under the same node fences it again and again.
const REJOIN_INITIAL: Duration = Duration::from_millis(500);
/// The longest such wait.
const REJOIN_MAX: Duration = Duration::from_secs(10);
/// How long Kafka is asked, in the same rhythm, whether it is back: an idle topic sends nothing that would say so. Polling
/// waits for it, which harms nobody while there is nothing to poll.
const ASK_WITHIN: Duration = Duration::from_millis(200);
/// How long Kafka may take to acknowledge what a revoked partition parks: the whole group waits for it.
const PARK_WITHIN: Duration = Duration::from_secs(2);
/// How long the last commit of a drain may take that has used up its time.
const COMMIT_AT_LEAST: Duration = Duration::from_millis(500);
/// Ends of chunks that a partition remembers until they are committed: more while a watermark is held.
const MAX_ENDS: usize = 256;
/// A consumer that has heard nothing for so long asks whether Kafka is there.
const SILENT: Duration = Duration::from_secs(5);
/// Trouble for so long, although a broker accepts connections, is a client that has lost its brokers: librdkafka forgets them
/// when a broker's metadata names none, as that of a broker does which was fenced for a moment; being reminded has not helped.
const LOST_AFTER: Duration = Duration::from_secs(15);
/// Between two log lines of the same trouble.
const TROUBLE_AGAIN: Duration = Duration::from_secs(10);
/// A retry record is taken so much before its time: records parked together would else pause their partition one by one.
const EARLY: Duration = Duration::from_millis(50);

/// For how much longer a partition whose queue has been full for `full` may keep the poll thread waiting, when no consumer has
/// taken a chunk for `nobody_took`; `None`: it is to be paused.
fn may_wait(full: Duration, nobody_took: Duration) -> Option<Duration> {
    let limit = match nobody_took >= PAUSE_AFTER {
        true => PAUSE_AFTER,
        false => PAUSE_ANYWAY,
    };
    limit.checked_sub(full).filter(|left| !left.is_zero())
}

/// Where a record's key and value lie in its chunk, and what came with it.
#[derive(Debug)]
pub struct RecordEntry {
    /// Offset in the partition.
    pub offset: i64,
    /// Produced-at, milliseconds since the epoch.
    pub produced_at_ms: i64,
    key: (u32, u32),
    value: (u32, u32),
    /// Only for records with headers.
    pub extra: Option<Arc<RecordExtra>>,
}

/// The headers of a record that has any.
#[derive(Clone, Debug, Default)]
pub struct RecordExtra {
    /// The writer's trace, from `traceparent`.
    pub trace: Option<TraceContext>,
    /// The peer of `evrepl-canary`.
    pub canary: Option<Box<str>>,
    /// All headers, for the dead-letter topic and for retry records.
    pub headers: Headers,
    /// What a retry record says of itself.
    pub parked: Option<Parked>,
    /// The region that wrote, when it is neither this one nor a peer.
    pub origin: Option<Box<str>>,
}

/// The events of one partition that were taken together: one buffer, and an entry per record.
#[derive(Debug)]
pub struct Chunk {
    data: Bytes,
    /// In offset order.
    pub records: Vec<RecordEntry>,
    /// When its first record was taken from Kafka.
    pub taken: Instant,
}

impl RecordEntry {
    /// When the event was produced: a retry record carries its event's own time, and its timestamp is that of the parking.
    pub fn produced_at(&self) -> i64 {
        let parked = self.extra.as_ref().and_then(|extra| extra.parked);
        parked
            .and_then(|parked| parked.produced_at_ms)
            .unwrap_or(self.produced_at_ms)
    }
}

/// Where a key or value lies that is null, as opposed to empty: chunks never grow so large.
const NULL: (u32, u32) = (u32::MAX, 0);

fn range((at, length): (u32, u32)) -> std::ops::Range<usize> {
    match (at, length) {
        NULL => 0..0,
        _ => at as usize..(at + length) as usize,
    }
}

impl Chunk {
    /// A record's key, a slice of the chunk's buffer; empty when it is null.
    pub fn key(&self, entry: &RecordEntry) -> Bytes {
        self.data.slice(range(entry.key))
    }

    /// A record's value, borrowed; empty when it is null.
    pub fn value(&self, entry: &RecordEntry) -> &[u8] {
        &self.data[range(entry.value)]
    }

    /// A record's key and value as they are in Kafka, where each may be null.
    pub fn exact(&self, entry: &RecordEntry) -> (Option<Bytes>, Option<&[u8]>) {
        (
            (entry.key != NULL).then(|| self.key(entry)),
            (entry.value != NULL).then(|| self.value(entry)),
        )
    }
}

/// There may be chunks in the queue.
#[derive(Message)]
#[rtype(result = "()")]
pub struct ChunkReady;

/// The partition is being taken away, or the flow drains: finish what is in flight, park what is dirty, give the rest back,
/// and reply with the watermark to commit.
#[derive(Message)]
#[rtype(result = "()")]
pub struct RevokePartition {
    /// When to park what is dirty then, if the peer is there.
    pub park_at: Instant,
    /// When to stop waiting for what is in flight.
    pub finish_by: Instant,
    /// When to stop waiting for what is being parked, too.
    pub deadline: Instant,
    /// Gets the watermark, `None` when nothing is to be committed, and how many events were unfinished.
    pub reply: mpsc::SyncSender<Revoked>,
}

/// The last words of a partition's consumer.
#[derive(Debug)]
pub struct Revoked {
    /// Offset to commit.
    pub watermark: Option<i64>,
    /// Events that were in flight at the deadline and are given back uncommitted.
    pub unfinished: u64,
}

/// These partitions were assigned; each has a queue that fills from now on.
#[derive(Message)]
#[rtype(result = "()")]
pub struct PartitionsAssigned(pub Vec<Arc<PartitionQueue>>);

/// The poll thread ended although nobody asked it to.
#[derive(Message, Debug)]
#[rtype(result = "()")]
pub struct PollThreadEnded(pub Option<KafkaError>);

struct QueueInner {
    chunks: VecDeque<Chunk>,
    consumer: Option<(Recipient<ChunkReady>, Recipient<RevokePartition>)>,
    /// The assignment is over: nothing of it may be consumed any more.
    revoked: bool,
}

/// Wakes the poll thread when there is room again in a queue.
#[derive(Debug, Default)]
struct Room {
    /// The thread, while it waits.
    waits: AtomicBool,
    thread: OnceLock<std::thread::Thread>,
    /// How often there was.
    appeared: AtomicUsize,
}

impl Room {
    fn appeared(&self) {
        self.appeared.fetch_add(1, Relaxed);
        if self.waits.swap(false, SeqCst)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }

    /// Waits until there is room in some queue, no longer than this. `full` is asked after the wait was announced: what made
    /// room before that woke nobody.
    fn wait(&self, limit: Duration, full: impl FnOnce() -> bool) {
        self.thread.get_or_init(std::thread::current);
        self.waits.store(true, SeqCst);
        if full() {
            std::thread::park_timeout(limit);
        }
        self.waits.store(false, SeqCst);
    }
}

/// The chunks of one assigned partition between the poll thread and its PartitionConsumer: the mailbox
/// `mailbox.partition_consumer`, in chunks.
pub struct PartitionQueue {
    /// Which partition.
    pub at: TopicPartition,
    /// Which assignment of it: outcomes of an older one are late.
    pub generation: u64,
    capacity: usize,
    inner: Mutex<QueueInner>,
    /// The consumer works on a chunk.
    busy: AtomicBool,
    flow_events: Arc<AtomicUsize>,
    flow_limit: usize,
    mailbox: Arc<Mailbox>,
    room: Arc<Room>,
    /// Offset and produced-at of the last record of each chunk that is not committed yet.
    ends: Mutex<VecDeque<(i64, i64)>>,
    /// Where it is shown that the partition waits for a retry record's time.
    view: Arc<FlowView>,
    /// Keys come again within the chunks: larger ones are worth it.
    pub repeats: AtomicBool,
    /// Fetching is paused because the queue is full.
    pub paused: AtomicBool,
    /// One above the partition's last record as the last fetch reported it; -1 when unknown.
    pub high_watermark: std::sync::atomic::AtomicI64,
    /// Where reading begins, and where the log begins if that is later: nothing below is left to do; -1 when unknown.
    pub floor: std::sync::atomic::AtomicI64,
}

impl PartitionQueue {
    fn lock(&self) -> MutexGuard<'_, QueueInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names the consumer; it gets a [`ChunkReady`] at once, for what is there already. False when the assignment is over
    /// already: nobody would ever revoke that consumer.
    pub fn attach(&self, ready: Recipient<ChunkReady>, revoke: Recipient<RevokePartition>) -> bool {
        let mut inner = self.lock();
        if inner.revoked {
            return false;
        }
        ready.do_send(ChunkReady);
        inner.consumer = Some((ready, revoke));
        true
    }

    /// Ends the assignment: gives whom to tell, if a consumer has attached.
    fn revoke(&self) -> Option<Recipient<RevokePartition>> {
        let mut inner = self.lock();
        inner.revoked = true;
        inner.consumer.take().map(|(_, revoke)| revoke)
    }

    /// Takes the oldest chunk; the caller is busy until it asks again.
    pub fn pull(&self) -> Option<Chunk> {
        let chunk = {
            // Under the lock, or a push between the two would see a busy consumer that is about to be idle.
            let mut inner = self.lock();
            let chunk = inner.chunks.pop_front();
            self.busy.store(chunk.is_some(), SeqCst);
            chunk
        };
        if let Some(chunk) = &chunk {
            self.flow_events.fetch_sub(chunk.records.len(), Relaxed);
            self.mailbox.left();
            self.room.appeared();
        }
        chunk
    }

    /// Chunks that wait.
    pub fn len(&self) -> usize {
        self.lock().chunks.len()
    }

    /// Does no chunk wait?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn show_wait(&self, until: Option<Instant>) {
        self.view.set_retry_wait(&self.at, until);
    }

    fn idle(&self) -> bool {
        !self.busy.load(SeqCst) && self.lock().chunks.is_empty()
    }

    fn has_room(&self, events: usize) -> bool {
        let queued = self.flow_events.load(Relaxed);
        let chunks = self.lock().chunks.len();
        // One chunk each always: a partition that is stuck must not take all the room there is.
        chunks < self.capacity && (chunks == 0 || queued + events <= self.flow_limit)
    }

    /// When the last record of the oldest chunk that is not committed came into Kafka, milliseconds since the epoch.
    pub fn uncommitted_since_ms(&self) -> Option<i64> {
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        ends.front().map(|(_, produced_at_ms)| *produced_at_ms)
    }

    /// When the last event of the last chunk was produced that ends before `offset`, which is committed now.
    fn committed(&self, offset: i64) -> Option<i64> {
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = None;
        while let Some((_, produced_at)) = ends.front().filter(|(end, _)| *end < offset) {
            at = Some(*produced_at);
            ends.pop_front();
        }
        at
    }

    fn push(&self, chunk: Chunk) {
        if let Some(last) = chunk.records.last() {
            let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
            if ends.len() >= MAX_ENDS {
                // Coarser: a time that is noted is then older than it need be.
                ends.pop_back();
            }
            ends.push_back((last.offset, last.produced_at_ms));
        }
        self.flow_events.fetch_add(chunk.records.len(), Relaxed);
        let mut inner = self.lock();
        inner.chunks.push_back(chunk);
        self.mailbox.entered();
        if let Some((ready, _)) = &inner.consumer
            && !self.busy.load(SeqCst)
        {
            ready.do_send(ChunkReady);
        }
    }
}

impl Drop for PartitionQueue {
    fn drop(&mut self) {
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        for chunk in inner.chunks.drain(..) {
            self.flow_events.fetch_sub(chunk.records.len(), Relaxed);
            self.mailbox.left();
        }
        self.show_wait(None);
    }
}

/// What librdkafka does not say: which topics are not there. None when they are there by now.
fn not_there(topics: &[String]) -> Option<String> {
    match topics {
        [] => None,
        [topic] => Some(format!("topic {topic} is not there, create it")),
        topics => Some(format!("topics {} are not there, create them", topics.join(", "))),
    }
}

/// What the poll thread is asked to do between two polls.
pub enum PollCommand {
    /// Write this watermark, of this assignment of the partition.
    Commit(TopicPartition, u64, i64),
    /// Stop fetching, revoke every partition until `deadline`, commit, reply with the number of events left, and end.
    Drain {
        /// When to stop waiting for what is in flight.
        deadline: Instant,
        /// Gets how many events were given back unfinished.
        reply: mpsc::SyncSender<u64>,
    },
    /// End at once.
    Stop,
}

/// What a poll thread needs to know.
pub struct PollSettings {
    /// Chunks one partition's queue holds.
    pub queue_chunks: usize,
    /// Events that all queues of the flow hold together.
    pub queue_events: usize,
    /// Chunks leave so often at most, unless one is full.
    pub gather: Duration,
    /// How long a revoked partition may finish what is in flight.
    pub revoke_timeout: Duration,
    /// Depth and high-water mark of the partition consumers' mailboxes.
    pub gauge: Arc<MailboxGauge>,
    /// It reads the topics that parked events come back from: their records may have to wait.
    pub retry: bool,
    /// The longest that a retry record says to wait.
    pub retry_wait_max: Duration,
    /// Where trouble with Kafka is noted.
    pub view: Arc<FlowView>,
    /// Gets assignments.
    pub flow: Recipient<PartitionsAssigned>,
    /// Told when the thread ends by itself.
    pub ended: Recipient<PollThreadEnded>,
    /// Shows that it polls.
    pub pulse: Arc<Pulse>,
}

impl PollSettings {
    fn trouble(&self, trouble: Option<String>) {
        self.view.set_kafka_trouble(self.retry, trouble);
    }
}

/// What a rebalance does, on the poll thread, inside a poll.
struct Rebalances {
    settings: Arc<PollSettings>,
    flow_events: Arc<AtomicUsize>,
    room: Arc<Room>,
    next_generation: AtomicUsize,
    queues: Mutex<HashMap<TopicPartition, Arc<PartitionQueue>>>,
    changed: AtomicBool,
    /// Produced-at of the last event before an offset that is to be committed.
    times: Mutex<Vec<(TopicPartition, i64)>>,
    /// Set while draining: the time a partition gets is then the drain's.
    deadline: Mutex<Option<Instant>>,
}

impl Rebalances {
    fn queues(&self) -> MutexGuard<'_, HashMap<TopicPartition, Arc<PartitionQueue>>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes when the last event before an offset was produced that is to be committed.
    fn note_time(&self, queue: &PartitionQueue, offset: i64) {
        if let Some(at) = queue.committed(offset) {
            let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
            times.push((queue.at.clone(), at));
        }
    }

    /// Lets go of everything, with nothing to commit to.
    fn revoke_all(&self) {
        let all: Vec<_> = self.queues().keys().cloned().collect();
        self.revoke(&all);
    }

    /// Lets go of partitions: the offsets to commit, and how many events were unfinished at the deadline.
    fn revoke(&self, partitions: &[TopicPartition]) -> (Vec<(TopicPartition, i64)>, u64) {
        let revoked: Vec<_> = {
            let mut queues = self.queues();
            partitions.iter().filter_map(|at| queues.remove(at)).collect()
        };
        self.changed.store(true, SeqCst);
        let drain = *self.deadline.lock().unwrap_or_else(PoisonError::into_inner);
        let park_at = Instant::now() + self.settings.revoke_timeout;
        let (park_at, finish_by, deadline) = match drain {
            Some(deadline) => (park_at.min(deadline), deadline, deadline),
            None => (park_at, park_at, park_at + PARK_WITHIN),
        };
        let mut waiting = Vec::new();
        for queue in revoked {
            let consumer = queue.revoke();
            // Without a consumer nothing of this assignment was consumed.
            if let Some(revoke) = consumer {
                let (reply, answer) = mpsc::sync_channel(1);
                revoke.do_send(RevokePartition {
                    park_at,
                    finish_by,
                    deadline,
                    reply,
                });
                waiting.push((queue, answer));
            }
        }
        let (mut commits, mut unfinished) = (Vec::new(), 0);
        let partitions = waiting.len();
        let _span = tracing::info_span!(
            target: SPAN_TARGET,
            "revoke partitions",
            evrepl.flow = self.settings.view.name,
            evrepl.partitions = partitions,
        )
        .entered();
        for (queue, answer) in waiting {
            // The consumer answers by the deadline itself; the rest is for a thread that is slow to wake.
            let patience = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(500);
            match answer.recv_timeout(patience) {
                Ok(revoked) => {
                    unfinished += revoked.unfinished;
                    if let Some(offset) = revoked.watermark {
                        self.note_time(&queue, offset);
                        commits.push((queue.at.clone(), offset));
                    }
                }
                Err(_) => {
                    // At least one: what it held will be replayed.
                    unfinished += 1;
                    tracing::warn!(
                        partition = queue.at.partition,
                        topic = queue.at.topic,
                        "partition consumer did not answer"
                    );
                }
            }
        }
        tracing::info!(partitions, "partitions revoked");
        (commits, unfinished)
    }
}

impl RebalanceListener for Arc<Rebalances> {
    fn assigned(&self, partitions: &[TopicPartition]) {
        let queues: Vec<_> = partitions
            .iter()
            .map(|at| {
                Arc::new(PartitionQueue {
                    at: at.clone(),
                    generation: self.next_generation.fetch_add(1, Relaxed) as u64 + 1,
                    capacity: self.settings.queue_chunks,
                    inner: Mutex::new(QueueInner {
                        chunks: VecDeque::new(),
                        consumer: None,
                        revoked: false,
                    }),
                    busy: AtomicBool::new(false),
                    flow_events: self.flow_events.clone(),
                    flow_limit: self.settings.queue_events,
                    mailbox: Mailbox::new(&self.settings.gauge, self.settings.queue_chunks),
                    room: self.room.clone(),
                    ends: Mutex::default(),
                    view: self.settings.view.clone(),
                    repeats: AtomicBool::new(false),
                    paused: AtomicBool::new(false),
                    high_watermark: std::sync::atomic::AtomicI64::new(-1),
                    floor: std::sync::atomic::AtomicI64::new(-1),
                })
            })
            .collect();
        self.queues().extend(queues.iter().map(|q| (q.at.clone(), q.clone())));
        self.changed.store(true, SeqCst);
        self.settings.trouble(None);
        self.settings.view.rebalances.fetch_add(1, Relaxed);
        tracing::info!(partitions = queues.len(), "partitions assigned");
        self.settings.flow.do_send(PartitionsAssigned(queues));
    }

    fn revoking(&self, partitions: &[TopicPartition]) -> Vec<(TopicPartition, i64)> {
        self.revoke(partitions).0
    }

    fn times(&self) -> Vec<(TopicPartition, i64)> {
        std::mem::take(&mut self.times.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A handle on the running thread.
pub struct PollThread {
    commands: mpsc::Sender<PollCommand>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl PollThread {
    /// Starts the thread under this name; `connect` makes the consumer there, and is tried again while Kafka does not answer.
    pub fn start(
        name: &str,
        settings: PollSettings,
        connect: impl Fn(Box<dyn RebalanceListener>) -> Result<FlowConsumer, KafkaError> + Send + 'static,
    ) -> std::io::Result<PollThread> {
        let (commands, inbox) = mpsc::channel();
        let settings = Arc::new(settings);
        let thread = std::thread::Builder::new()
            .name(name.chars().take(15).collect())
            .spawn(move || {
                let rebalances = Arc::new(Rebalances {
                    settings: settings.clone(),
                    flow_events: Arc::default(),
                    room: Arc::default(),
                    next_generation: AtomicUsize::new(0),
                    queues: Mutex::default(),
                    changed: AtomicBool::new(false),
                    times: Mutex::default(),
                    deadline: Mutex::new(None),
                });
                let mut backoff = Backoff::clamped(REJOIN_INITIAL, REJOIN_MAX);
                loop {
                    let ended = match connect(Box::new(rebalances.clone())) {
                        Ok(consumer) => PollLoop::new(consumer, rebalances.clone(), &inbox).run(),
                        Err(error) => Err(error),
                    };
                    match ended {
                        Ok(()) => return,
                        Err(error @ (KafkaError::Fatal(_) | KafkaError::Lost)) => {
                            match error {
                                KafkaError::Lost => tracing::error!(%error, "making a new kafka client"),
                                _ => tracing::error!(
                                    %error,
                                    "kafka refuses this consumer, joining anew; if this repeats, another process has the same node"
                                ),
                            }
                            settings.trouble(Some(error.to_string()));
                            rebalances.revoke_all();
                            if !wait_to_rejoin(&inbox, backoff.next(rand::random())) {
                                return;
                            }
                        }
                        Err(error) => {
                            tracing::error!(%error, "poll thread ended");
                            settings.ended.do_send(PollThreadEnded(Some(error)));
                            return;
                        }
                    }
                }
            })?;
        Ok(PollThread {
            commands,
            thread: Some(thread),
        })
    }

    /// Whether the thread has ended, in order or not.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(|thread| thread.is_finished())
    }

    /// A sender of commands, for the partition consumers.
    pub fn commands(&self) -> mpsc::Sender<PollCommand> {
        self.commands.clone()
    }

    /// Waits until the thread has ended, however long that takes. Blocks.
    pub fn join(mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for PollThread {
    fn drop(&mut self) {
        // A send to a thread that has ended fails, which is as good.
        let _ = self.commands.send(PollCommand::Stop);
    }
}

/// Waits before the group is joined anew; false when the thread is to end instead.
fn wait_to_rejoin(inbox: &mpsc::Receiver<PollCommand>, wait: Duration) -> bool {
    let until = Instant::now() + wait;
    loop {
        match inbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
            // Of partitions that are not ours any more.
            Ok(PollCommand::Commit(..)) => {}
            Ok(PollCommand::Drain { reply, .. }) => {
                let _ = reply.send(0);
                return false;
            }
            Ok(PollCommand::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return false,
            Err(mpsc::RecvTimeoutError::Timeout) => return true,
        }
    }
}

/// A partition as the loop sees it.
struct Lane {
    queue: Arc<PartitionQueue>,
    /// Of the records that came last, see [`Record::topic_id`].
    topic_id: usize,
    /// It is a retry topic's.
    retry: bool,
    data: Vec<u8>,
    records: Vec<RecordEntry>,
    /// Bytes and records of the last chunk.
    last: (usize, usize),
    /// When the first of them came.
    taken: Instant,
    /// Since when there has been no room for a full chunk.
    full_since: Option<Instant>,
    /// Whether retention has passed us.
    reading: Reading,
    /// A retry record whose time has not come: it goes before everything that is fetched after it.
    not_before: Option<(Instant, Waiting)>,
}

/// A record that was taken out of librdkafka before its time.
struct Waiting {
    entry: RecordEntry,
    key: Option<Vec<u8>>,
    value: Option<Vec<u8>>,
}

impl Lane {
    fn full(&self, max_events: usize) -> bool {
        self.records.len() >= max_events || self.data.len() >= MAX_CHUNK_BYTES
    }

    /// Whether the queue has room for what was collected.
    fn fits(&self) -> bool {
        self.queue.has_room(self.records.len())
    }

    /// Moves what was collected to the queue; false when there is no room.
    fn flush(&mut self) -> bool {
        if self.records.is_empty() {
            return true;
        }
        if !self.queue.has_room(self.records.len()) {
            return false;
        }
        self.full_since = None;
        self.last = (self.data.len(), self.records.len());
        let data = Bytes::from(std::mem::take(&mut self.data));
        let records = std::mem::take(&mut self.records);
        let taken = self.taken;
        self.queue.push(Chunk { data, records, taken });
        true
    }

    fn put(&mut self, key: Option<&[u8]>, value: Option<&[u8]>, entry: RecordEntry) {
        if self.records.is_empty() {
            self.taken = Instant::now();
            // As large as the last one, rather than grown step by step.
            self.data.reserve(self.last.0);
            self.records.reserve(self.last.1);
        }
        let mut put = |bytes: Option<&[u8]>| {
            let Some(bytes) = bytes else { return NULL };
            let at = self.data.len() as u32;
            self.data.extend_from_slice(bytes);
            (at, bytes.len() as u32)
        };
        let (key, value) = (put(key), put(value));
        self.records.push(RecordEntry { key, value, ..entry });
    }

    /// Takes a record over. False when its time has not come: the partition is to be paused until then.
    fn add(&mut self, record: &Record<'_>, produced_at_ms: i64, wait_max: Duration) -> bool {
        if let Some((_, waiting)) = self.not_before.take() {
            // The pause came too late: rather early than overtaken or lost.
            self.take_in(waiting);
        }
        let mut extra: Option<RecordExtra> = None;
        record.for_each_header(|name, value| {
            let extra = extra.get_or_insert_default();
            match name {
                "traceparent" => extra.trace = TraceContext::parse(value),
                canary::HEADER => extra.canary = Some(String::from_utf8_lossy(value).into()),
                _ => {}
            }
            extra.headers.push((name.into(), value.into()));
        });
        if self.retry
            && let Some(extra) = &mut extra
        {
            extra.parked = Some(Parked::read(&extra.headers));
        }
        let wait = extra
            .as_ref()
            .and_then(|extra| extra.parked?.wait(wall_ms()))
            // Whatever a clock has done meanwhile: no longer than a retry may be told to wait.
            .map(|wait| wait.min(wait_max))
            .filter(|wait| *wait > EARLY);
        let entry = RecordEntry {
            offset: record.offset(),
            produced_at_ms,
            key: (0, 0),
            value: (0, 0),
            extra: extra.map(Arc::new),
        };
        let Some(wait) = wait else {
            self.put(record.key(), record.value(), entry);
            return true;
        };
        let waiting = Waiting {
            entry,
            key: record.key().map(<[u8]>::to_vec),
            value: record.value().map(<[u8]>::to_vec),
        };
        let due = Instant::now() + wait;
        self.not_before = Some((due, waiting));
        self.queue.show_wait(Some(due));
        false
    }

    /// Takes in the record whose time has come.
    fn ripen(&mut self, now: Instant) {
        if let Some((_, waiting)) = self.not_before.take_if(|(due, _)| *due <= now) {
            self.take_in(waiting);
        }
    }

    fn take_in(&mut self, Waiting { entry, key, value }: Waiting) {
        self.put(key.as_deref(), value.as_deref(), entry);
        self.queue.show_wait(None);
    }
}

struct PollLoop<'a> {
    consumer: FlowConsumer,
    rebalances: Arc<Rebalances>,
    inbox: &'a mpsc::Receiver<PollCommand>,
    lanes: Vec<Lane>,
    last: usize,
    /// Bytes of a record, as they last came.
    mean_bytes: usize,
    watermarks_at: Instant,
    confirmed_at: Instant,
    /// How often there was room when that was last another number, and when.
    room_appeared: (usize, Instant),
    trouble: Option<Trouble>,
    /// When Kafka was last heard of.
    heard: Instant,
    /// When chunks last left.
    flushed_at: Instant,
}

/// Kafka does not answer.
struct Trouble {
    /// When this was last said.
    said: Instant,
    /// Since when, or since it was last found that the brokers are not lost.
    since: Instant,
}

impl<'a> PollLoop<'a> {
    fn new(consumer: FlowConsumer, rebalances: Arc<Rebalances>, inbox: &'a mpsc::Receiver<PollCommand>) -> Self {
        let watermarks_at = Instant::now();
        PollLoop {
            consumer,
            rebalances,
            inbox,
            lanes: Vec::new(),
            last: 0,
            mean_bytes: 0,
            watermarks_at,
            confirmed_at: watermarks_at,
            room_appeared: (0, watermarks_at),
            trouble: None,
            heard: watermarks_at,
            flushed_at: watermarks_at,
        }
    }

    fn run(mut self) -> Result<(), KafkaError> {
        let mut scratch = Scratch::default();
        // There may be more records at hand.
        let mut more = false;
        let mut served_at = Instant::now();
        loop {
            self.rebalances.settings.pulse.moved("polled");
            fail::fail_point!("poll_thread_poll");
            if !self.obey()? {
                return Ok(());
            }
            let now = Instant::now();
            if !more || now.saturating_duration_since(served_at) >= SERVE_EVERY {
                served_at = now;
                self.serve()?;
            }
            more = false;
            if self.wait_for_room(now) {
                self.make_room(false, now);
                continue;
            }
            let (most, wait) = (self.batch_limit(), self.patience());
            let batch = self.consumer.take(&mut scratch, most, wait);
            let (taken, mut bytes, mut trouble) = (batch.len(), 0, None);
            if taken > 0 {
                self.heard = self.confirmed_at;
                Self::trouble_over(&mut self.trouble, &self.consumer, &self.rebalances.settings);
            }
            let settings = &self.rebalances.settings;
            for record in batch {
                match record {
                    Ok(record) => {
                        bytes += Self::take(&mut self.lanes, &mut self.last, &self.consumer, settings, &record);
                    }
                    Err(error) => trouble = Some(error),
                }
            }
            if let Some(error) = trouble {
                self.troubled(error)?;
            }
            self.mean_bytes = bytes.checked_div(taken).unwrap_or(self.mean_bytes);
            more = taken == most;
            let gathers = if more { None } else { self.gathers() };
            for at in 0..self.lanes.len() {
                if self.lanes[at].records.is_empty() {
                    continue;
                }
                let limit = self.chunk_limit(&self.lanes[at]);
                let lane = &mut self.lanes[at];
                if lane.full(limit) {
                    if !lane.flush() {
                        lane.full_since.get_or_insert_with(Instant::now);
                    }
                } else if gathers.is_none() && lane.queue.idle() {
                    lane.flush();
                }
            }
            self.make_room(!more && gathers.is_none(), now);
            if self.has_lost_brokers() {
                let PollLoop { consumer, .. } = self;
                consumer.abandon();
                return Err(KafkaError::Lost);
            }
            if let Some(left) = gathers
                && self.lanes.iter().all(|lane| lane.full_since.is_none())
            {
                // Rather than a wait for the next record, which would end with it.
                std::thread::park_timeout(left.min(SERVE_EVERY));
                more = true;
            }
        }
    }

    /// Runs rebalances and whatever else Kafka has to say.
    fn serve(&mut self) -> Result<(), KafkaError> {
        while let Some(said) = self.serve_one() {
            said.map_or(Ok(()), |error| self.troubled(error))?;
        }
        Ok(())
    }

    /// One thing that Kafka has to say, with the trouble in it; `None` when there is nothing left.
    fn serve_one(&mut self) -> Option<Option<KafkaError>> {
        let served = self.consumer.serve();
        if self.rebalances.changed.swap(false, SeqCst) {
            Self::follow(&mut self.lanes, &self.rebalances, &self.consumer);
        }
        match served? {
            Served::Stray(record) => {
                let settings = &self.rebalances.settings;
                Self::take(&mut self.lanes, &mut self.last, &self.consumer, settings, &record);
                Some(None)
            }
            Served::Trouble(error) => Some(Some(error)),
        }
    }

    /// Waits for room if a partition's chunk is full and its queue too: true when that wait has come to its end, whatever
    /// ended it. A partition that is only slower than Kafka, as all are while a flow catches up, has room in a moment, and a
    /// pause would throw away what is fetched of it, again and again. The others live on what is in their queues meanwhile. One
    /// that has none for longer is paused, so that it is in nobody's way.
    fn wait_for_room(&mut self, now: Instant) -> bool {
        let appeared = self.rebalances.room.appeared.load(Relaxed);
        if appeared != self.room_appeared.0 {
            self.room_appeared = (appeared, now);
        }
        let nobody_took = now.saturating_duration_since(self.room_appeared.1);
        let mut left = PAUSE_AFTER;
        let mut waits = false;
        for lane in &mut self.lanes {
            let Some(since) = lane.full_since.filter(|_| !lane.queue.paused.load(Relaxed)) else {
                continue;
            };
            if lane.flush() {
                continue;
            }
            let Some(may_wait) = may_wait(now.saturating_duration_since(since), nobody_took) else {
                Self::pause(&self.consumer, lane);
                continue;
            };
            left = left.min(may_wait);
            waits = true;
        }
        if waits {
            let full = || !self.lanes.iter().any(|lane| lane.full_since.is_some() && lane.fits());
            self.rebalances.room.wait(left, full);
        }
        waits
    }

    /// For how much longer chunks that are not full grow, for some left a moment ago. Each chunk is a wake-up of everyone up
    /// to the peer's memcached, and Kafka hands over the records of one answer partition by partition.
    fn gathers(&mut self) -> Option<Duration> {
        let collected = |lane: &Lane| !lane.records.is_empty() && !lane.queue.paused.load(Relaxed);
        if !self.lanes.iter().any(collected) {
            return None;
        }
        let now = Instant::now();
        let left = (self.flushed_at + self.rebalances.settings.gather).saturating_duration_since(now);
        if left.is_zero() {
            self.flushed_at = now;
            return None;
        }
        Some(left)
    }

    /// How long to wait for the next record.
    fn patience(&self) -> Duration {
        let (mut collected, mut waits_for_room) = (false, false);
        for lane in &self.lanes {
            let (some, fits) = (!lane.records.is_empty(), lane.records.is_empty() || lane.fits());
            collected |= some && fits;
            waits_for_room |= !fits || (lane.not_before.is_none() && lane.queue.paused.load(Relaxed));
        }
        match (collected, waits_for_room) {
            (_, true) => PAUSED_POLL,
            (true, false) => Duration::ZERO,
            (false, false) if self.rebalances.settings.retry => IDLE_RETRY_POLL,
            (false, false) => IDLE_POLL,
        }
    }

    /// How many records to take at once: chunks may not grow far beyond their limits, in events or in bytes. Retry records come
    /// one by one: the first whose time has not come stops its partition.
    fn batch_limit(&self) -> usize {
        let settings = &self.rebalances.settings;
        if settings.retry {
            return 1;
        }
        let bytes = MAX_CHUNK_BYTES / self.mean_bytes.max(1);
        max_batch(settings.queue_events).min(bytes).max(1)
    }

    /// Takes a record over; says how large it is.
    fn take(
        lanes: &mut [Lane],
        last: &mut usize,
        consumer: &FlowConsumer,
        settings: &PollSettings,
        record: &Record<'_>,
    ) -> usize {
        let Some(at) = Self::lane_of(lanes, *last, record) else {
            return 0;
        };
        *last = at;
        let (offset, produced_at) = (record.offset(), record.timestamp_ms());
        if !lanes[at].reading.expects(offset) {
            Self::heed_missed(lanes, consumer);
            let lane = &mut lanes[at];
            let (log_start, _) = consumer.cached_watermarks(&lane.queue.at);
            let found = lane.reading.take(offset, produced_at, log_start);
            Self::tell(&settings.view, &lane.queue.at, found);
        } else {
            lanes[at].reading.take(offset, produced_at, None);
        }
        let lane = &mut lanes[at];
        let before = lane.data.len();
        if !lane.add(record, produced_at, settings.retry_wait_max) {
            Self::pause(consumer, lane);
        }
        lane.data.len().saturating_sub(before)
    }

    /// Kafka is not well.
    ///
    /// # Errors
    /// What this consumer cannot recover from.
    fn troubled(&mut self, error: KafkaError) -> Result<(), KafkaError> {
        match error {
            KafkaError::Fatal(_) => return Err(error),
            // Retry topics are made a moment after the first start.
            KafkaError::UnknownTopic(_) if self.rebalances.settings.retry => {}
            error => {
                // Once in a while: librdkafka repeats itself while a broker is away.
                let said = self.trouble.as_ref().map(|trouble| trouble.said);
                if said.is_none_or(|at| at.elapsed() > TROUBLE_AGAIN) {
                    let what = match &error {
                        KafkaError::UnknownTopic(_) => not_there(&self.consumer.unknown_topics(ASK_WITHIN)),
                        _ => None,
                    };
                    self.say_trouble(what.unwrap_or_else(|| error.to_string()));
                }
            }
        }
        Ok(())
    }

    /// Flushes what fits, when nothing more is at hand, and resumes partitions whose queue is half empty again: hysteresis,
    /// for a pause throws the prefetched records away.
    fn make_room(&mut self, drained: bool, now: Instant) {
        for lane in &mut self.lanes {
            let paused = lane.queue.paused.load(Relaxed);
            if lane.not_before.is_some() {
                lane.ripen(now);
            }
            // While there is more at hand a chunk grows on behind a consumer that is busy.
            let flushed = if drained || paused {
                lane.flush()
            } else {
                lane.records.is_empty()
            };
            if paused && flushed && lane.not_before.is_none() {
                let length = lane.queue.lock().chunks.len();
                if length <= lane.queue.capacity / 2 {
                    match self.consumer.resume(&lane.queue.at) {
                        Ok(()) => lane.queue.paused.store(false, Relaxed),
                        Err(error) => say_rarely(&error, "partition could not be resumed"),
                    }
                }
            }
        }
        if now.saturating_duration_since(self.confirmed_at) >= CONFIRM_EVERY {
            self.confirmed_at = now;
            if let Err(error) = self.consumer.commit(&[]) {
                say_rarely(&error, "commit could not be queued; the next one covers it");
            }
            self.look_after_kafka();
        }
        if now.saturating_duration_since(self.watermarks_at) >= WATERMARKS_EVERY {
            self.watermarks_at = now;
            if let Err(error) = self.consumer.claim_left_out() {
                say_rarely(
                    &error,
                    "not known whether the group has left partitions out, asking again",
                );
            }
            Self::heed_missed(&mut self.lanes, &self.consumer);
            for lane in &mut self.lanes {
                let (log_start, high) = self.consumer.cached_watermarks(&lane.queue.at);
                if let Some(high) = high {
                    lane.queue.high_watermark.store(high, Relaxed);
                }
                lane.queue.floor.fetch_max(log_start.unwrap_or(-1), Relaxed);
                let found = lane.reading.look(log_start);
                Self::tell(&self.rebalances.settings.view, &lane.queue.at, found);
            }
        }
    }

    /// Takes over which offsets librdkafka has asked for in vain.
    fn heed_missed(lanes: &mut [Lane], consumer: &FlowConsumer) {
        for (at, offset) in consumer.missed() {
            if let Some(lane) = lanes.iter_mut().find(|lane| lane.queue.at == at) {
                lane.reading.missed(offset);
            }
        }
    }

    /// Says what of a partition is gone.
    fn tell(view: &FlowView, at: &TopicPartition, found: Option<Found>) {
        let milliseconds = |ms: i64| Duration::from_millis(ms.max(0) as u64);
        match found {
            None => {}
            Some(Found::Span(ms)) => {
                view.retention_gap_spans(at, milliseconds(ms));
                tracing::warn!(
                    flow = view.name,
                    topic = at.topic,
                    partition = at.partition,
                    spans = ?milliseconds(ms),
                    "so much time lies between the last event taken before the gap and the first one behind it"
                );
            }
            Some(Found::Gap(gap, spans)) => {
                let spans = spans.map(milliseconds);
                view.retention_gap(at, gap, spans);
                tracing::error!(
                    flow = view.name,
                    topic = at.topic,
                    partition = at.partition,
                    from = gap.from,
                    to = gap.to,
                    events = gap.events(),
                    ?spans,
                    "kafka has removed events before this flow took them, going on with the oldest there is: only the next \
                     write of their keys brings these to the peer, no replay can; lengthen the topic's retention"
                );
            }
        }
    }

    /// How many events a lane's chunk may hold: together the partitions' chunks are what the queues may hold, for each partition
    /// may have one whatever the others have. Where a key seldom comes again within a chunk, a larger one finds no more repeats
    /// and only falls out of the processor's caches.
    fn chunk_limit(&self, lane: &Lane) -> usize {
        let share = self.rebalances.settings.queue_events / self.lanes.len().max(4);
        let most = if lane.queue.repeats.load(Relaxed) {
            MAX_CHUNK_EVENTS
        } else {
            USUAL_CHUNK_EVENTS
        };
        share.clamp(1, most)
    }

    /// An idle topic says nothing, whether Kafka is there or not: after a silence it is asked, and while there is trouble.
    fn look_after_kafka(&mut self) {
        if self.trouble.is_none() && self.heard.elapsed() < SILENT {
            return;
        }
        self.heard = Instant::now();
        if !self.consumer.answers(ASK_WITHIN) {
            self.consumer.remind();
            if self.trouble.is_none() {
                self.say_trouble("no answer to a question for the topics".to_owned());
            }
        } else if Self::trouble_over(&mut self.trouble, &self.consumer, &self.rebalances.settings) {
            tracing::info!("kafka answers again");
        }
    }

    fn say_trouble(&mut self, error: String) {
        tracing::warn!(error, "kafka cannot be read, polling on");
        self.rebalances.settings.trouble(Some(error));
        let said = Instant::now();
        let since = self.trouble.as_ref().map_or(said, |trouble| trouble.since);
        self.trouble = Some(Trouble { said, since });
    }

    /// Kafka was heard of; true when it had not been.
    fn trouble_over(trouble: &mut Option<Trouble>, consumer: &FlowConsumer, settings: &PollSettings) -> bool {
        let over = trouble.take().is_some();
        if over {
            consumer.heard();
            settings.trouble(None);
        }
        over
    }

    /// Whether the client has lost its brokers, although they are there.
    fn has_lost_brokers(&mut self) -> bool {
        let Some(trouble) = self.trouble.as_mut().filter(|it| it.since.elapsed() >= LOST_AFTER) else {
            return false;
        };
        let lost = self.consumer.has_lost_brokers(ASK_WITHIN);
        if !lost {
            // Asked again after the same time.
            trouble.since = Instant::now();
        }
        lost
    }

    fn pause(consumer: &FlowConsumer, lane: &Lane) {
        match consumer.pause(&lane.queue.at) {
            Ok(()) => lane.queue.paused.store(true, Relaxed),
            Err(error) => say_rarely(&error, "partition could not be paused"),
        }
    }

    fn lane_of(lanes: &mut [Lane], last: usize, record: &Record<'_>) -> Option<usize> {
        // Records come in runs of one partition.
        let topic = record.topic_id();
        let runs_on = |lane: &&mut Lane| lane.topic_id == topic && lane.queue.at.partition == record.partition();
        if lanes.get_mut(last).filter(runs_on).is_some() {
            return Some(last);
        }
        let fits = |lane: &Lane| lane.queue.at.partition == record.partition() && lane.queue.at.topic == record.topic();
        let at = lanes.iter().position(fits)?;
        lanes[at].topic_id = topic;
        Some(at)
    }

    /// Takes over what a rebalance changed. What was collected of a revoked partition was never consumed.
    fn follow(lanes: &mut Vec<Lane>, rebalances: &Rebalances, consumer: &FlowConsumer) {
        let queues = rebalances.queues();
        lanes.retain(|lane| queues.get(&lane.queue.at).is_some_and(|q| Arc::ptr_eq(q, &lane.queue)));
        for queue in queues.values() {
            if !lanes.iter().any(|lane| lane.queue.at == queue.at) {
                let placed = consumer.placed(&queue.at);
                let mut reading = Reading::starts(placed.next, placed.taken_ms);
                queue.floor.fetch_max(placed.next.unwrap_or(-1), Relaxed);
                if let Some(gap) = placed.gap {
                    reading = reading.after_gap();
                    Self::tell(&rebalances.settings.view, &queue.at, Some(Found::Gap(gap, None)));
                }
                lanes.push(Lane {
                    topic_id: 0,
                    reading,
                    retry: rebalances.settings.retry,
                    queue: queue.clone(),
                    data: Vec::new(),
                    records: Vec::new(),
                    taken: Instant::now(),
                    last: (0, 0),
                    full_since: None,
                    not_before: None,
                });
            }
        }
    }

    /// Carries out commands; false when the thread is to end.
    fn obey(&mut self) -> Result<bool, KafkaError> {
        let mut commits: HashMap<TopicPartition, i64> = HashMap::new();
        let mut go_on = true;
        loop {
            match self.inbox.try_recv() {
                Ok(PollCommand::Commit(at, generation, offset)) => {
                    // Only of partitions that are still ours, and of this assignment: another member's commit must not be
                    // overwritten, nor one of a later assignment by one of an earlier.
                    let ours = self.rebalances.queues();
                    if ours.get(&at).is_some_and(|queue| queue.generation == generation) {
                        commits.insert(at, offset);
                    }
                }
                Ok(PollCommand::Drain { deadline, reply }) => {
                    *self.rebalances.deadline.lock().unwrap_or_else(PoisonError::into_inner) = Some(deadline);
                    let all: Vec<_> = self.lanes.iter().map(|lane| lane.queue.at.clone()).collect();
                    let (last, unfinished) = self.rebalances.revoke(&all);
                    commits.extend(last);
                    let all: Vec<_> = commits.drain().collect();
                    let left = deadline.saturating_duration_since(Instant::now()).max(COMMIT_AT_LEAST);
                    let committed = self.consumer.commit_and_wait(&all, left);
                    if let Err(error) = &committed {
                        tracing::warn!(%error, "last offsets were not committed, they will be replayed");
                    }
                    // Without an answer at least one event comes again, and there may be nobody else to read it now.
                    let again = matches!(committed, Err(KafkaError::Silent(_)));
                    let _ = reply.send(unfinished.max(again.into()));
                    return Ok(false);
                }
                Ok(PollCommand::Stop) | Err(mpsc::TryRecvError::Disconnected) => {
                    go_on = false;
                    break;
                }
                Err(mpsc::TryRecvError::Empty) => break,
            }
        }
        if !commits.is_empty() {
            let commits: Vec<_> = commits.into_iter().collect();
            let ours = self.rebalances.queues();
            for (at, offset) in &commits {
                if let Some(queue) = ours.get(at) {
                    self.rebalances.note_time(queue, *offset);
                }
            }
            drop(ours);
            if let Err(error) = self.consumer.commit(&commits) {
                say_rarely(&error, "commit could not be queued; the next one covers it");
            }
        }
        Ok(go_on)
    }
}
/// Of what is tried again in the next round, which is soon.
static TROUBLES: RateLimit = RateLimit::new();

fn say_rarely(error: &KafkaError, what: &str) {
    if let Some(unsaid) = TROUBLES.due(what) {
        tracing::warn!(%error, unsaid, "{what}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_partition_that_stands_still_beside_others_is_paused_after_a_second_and_one_of_a_flow_that_does_at_once() {
        // Others take chunks.
        assert_eq!(may_wait(ms(0), ms(0)), Some(ms(1000)));
        assert_eq!(may_wait(ms(400), ms(49)), Some(ms(600)));
        assert_eq!(may_wait(ms(1000), ms(0)), None);
        // Nobody does.
        assert_eq!(may_wait(ms(0), ms(50)), Some(ms(50)));
        assert_eq!(may_wait(ms(49), ms(5000)), Some(ms(1)));
        assert_eq!(may_wait(ms(50), ms(50)), None);
        assert_eq!(may_wait(ms(400), ms(60)), None);
    }
}
