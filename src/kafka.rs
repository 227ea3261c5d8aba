//! The one module that names `rdkafka`: the consumer of a flow, the producer of events and dead letters, and topics.
//!
//! Nothing here knows what a record means. Offsets are committed only when the caller says so.

mod brokers;
mod events;
mod records;
mod settings;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions, NewTopic, TopicReplication};
use rdkafka::client::{ClientContext, DefaultClientContext};
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, RebalanceProtocol};
use rdkafka::error::{KafkaError as RdKafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{Header, Message, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer as _};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{Offset, TopicPartitionList};

use tokio::time::Instant;

use self::brokers::{FirstBrokers, commit_within};
pub use self::events::{Delivery, EventProducer, EventSender, NotTaken};
use self::records::RecordQueue;
pub use self::records::{Batch, MAX_BATCH, Record, Scratch};
pub(crate) use self::settings::explain;
pub use self::settings::{Refused, try_settings};
use crate::config::{Kafka, StartAt};
use crate::retention::{self, Gap};
use crate::telemetry::RateLimit;

/// How long a question to the broker may take before it is asked again or given up.
const ASK: Duration = Duration::from_secs(5);
/// The same for a question that keeps records waiting and is asked again anyway.
const ASK_SHORT: Duration = Duration::from_secs(1);
/// On top of the session timeout, for the rebalance that follows it and for the commits of what it assigned.
const CLAIM_MARGIN: Duration = Duration::from_secs(2);

/// What can go wrong between evrepl and Kafka.
#[derive(Debug, thiserror::Error)]
pub enum KafkaError {
    /// librdkafka refused the settings; never worth a retry.
    #[error("kafka settings refused: {0}")]
    Settings(String),
    /// The broker did not do what it was asked; worth a retry.
    #[error("kafka: {0}")]
    Broker(String),
    /// Nobody has answered; worth a retry.
    #[error("kafka does not answer: {0}")]
    Silent(String),
    /// A topic is not there (yet); worth a retry.
    #[error("kafka: topic unknown: {0}")]
    UnknownTopic(String),
    /// The client has forgotten every broker although they can be reached, and being reminded has not helped: a new one does.
    #[error("kafka client has lost its brokers, which can be reached")]
    Lost,
    /// This consumer can never work again: another process runs under the same `node`, or the broker refused it for good.
    #[error("kafka consumer is fenced or refused for good: {0}")]
    Fatal(String),
}

impl KafkaError {
    /// Whether the same call may work later.
    pub fn may_be_retried(&self) -> bool {
        matches!(
            self,
            KafkaError::Broker(_) | KafkaError::Silent(_) | KafkaError::UnknownTopic(_)
        )
    }
}

impl From<RdKafkaError> for KafkaError {
    fn from(error: RdKafkaError) -> Self {
        match error {
            RdKafkaError::ClientConfig(..) | RdKafkaError::ClientCreation(_) => KafkaError::Settings(error.to_string()),
            RdKafkaError::MessageConsumptionFatal(_) => KafkaError::Fatal(error.to_string()),
            RdKafkaError::MessageConsumption(
                RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic,
            ) => KafkaError::UnknownTopic(error.to_string()),
            other => KafkaError::Broker(other.to_string()),
        }
    }
}

/// One partition of a topic.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicPartition {
    /// The topic's name.
    pub topic: String,
    /// The partition's number.
    pub partition: i32,
}

/// What the consumer of a flow is told while it polls, on the polling thread.
pub trait RebalanceListener: Send + Sync {
    /// These partitions are ours now; records follow.
    fn assigned(&self, partitions: &[TopicPartition]);
    /// These partitions are about to be taken: finish within a bounded time and say which offsets to commit.
    fn revoking(&self, partitions: &[TopicPartition]) -> Vec<(TopicPartition, i64)>;
    /// When the last event before each offset that is committed next was produced, milliseconds since the epoch, where that has
    /// changed since the last call: a commit carries it as metadata, so that a gap that retention makes while nobody reads can
    /// be measured in time.
    fn times(&self) -> Vec<(TopicPartition, i64)>;
}

/// Settings common to every client: the user's properties, then those that evrepl owns.
fn client_config(kafka: &Kafka, client_id: &str) -> ClientConfig {
    let mut config = ClientConfig::new();
    for (name, value) in &kafka.properties {
        config.set(name, value);
    }
    config
        .set("bootstrap.servers", kafka.brokers.join(","))
        .set("client.id", client_id)
        // Added partitions are consumed within seconds; librdkafka's default is five minutes.
        .set_if_absent(kafka, "topic.metadata.refresh.interval.ms", "2000")
        // A broker that comes back is found at once; the default backs off to ten seconds.
        .set_if_absent(kafka, "reconnect.backoff.max.ms", "1000")
        .set_log_level(RDKafkaLogLevel::Warning);
    config
}

/// Of a flow's consumer.
fn flow_config(kafka: &Kafka, group: &str, node: &str, prefetch: Prefetch) -> ClientConfig {
    let session_ms = kafka.session_timeout.as_millis().to_string();
    let mut config = client_config(kafka, node);
    config
        .set("group.id", group)
        .set("group.instance.id", node)
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("session.timeout.ms", &session_ms)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        // Positions are set explicitly at assignment; this governs only offsets that retention has removed since.
        .set("auto.offset.reset", "earliest")
        .set_if_absent(kafka, "heartbeat.interval.ms", "500")
        // One queue holds every partition's prefetched records: its memory is part of the documented bound.
        .set_if_absent(kafka, "queued.max.messages.kbytes", &(prefetch.bytes >> 10).to_string())
        .set_if_absent(kafka, "queued.min.messages", &prefetch.records.to_string())
        // librdkafka's default of 50 MB would come on top of the queue.
        .set_if_absent(kafka, "fetch.max.bytes", &prefetch.answer.to_string())
        // After the queue was full, fetch again at once; librdkafka's default waits a second.
        .set_if_absent(kafka, "fetch.queue.backoff.ms", "10")
        .set_if_absent(kafka, "fetch.wait.max.ms", "100")
        .set_if_absent(kafka, "fetch.error.backoff.ms", "100");
    config
}

/// Of a producer that waits for every in-sync replica and for no others that go along.
fn producer_config(kafka: &Kafka, client_id: &str) -> ClientConfig {
    let mut config = client_config(kafka, client_id);
    config
        // Interactive: nobody waits for a batch to fill.
        .set_if_absent(kafka, "linger.ms", "1")
        .set_if_absent(kafka, IN_FLIGHT.0, IN_FLIGHT.1)
        // As long as anybody here waits for a record: one that was given up must not pile up behind its repetition.
        .set("message.timeout.ms", "10000")
        .set_if_absent(kafka, "queue.buffering.max.kbytes", "32768");
    config
}

/// librdkafka's second names of properties that evrepl sets where nobody else does.
const ALIASES: &[(&str, &str)] = &[("linger.ms", "queue.buffering.max.ms"), (IN_FLIGHT.0, "max.in.flight")];

trait SetIfAbsent {
    /// Unless the configuration has it, by either name.
    fn set_if_absent(&mut self, kafka: &Kafka, name: &str, value: &str) -> &mut Self;
}

impl SetIfAbsent for ClientConfig {
    fn set_if_absent(&mut self, kafka: &Kafka, name: &str, value: &str) -> &mut Self {
        let alias = ALIASES
            .iter()
            .find(|(first, _)| *first == name)
            .map(|(_, alias)| *alias);
        let mut names = alias.into_iter().chain([name]);
        if !names.any(|name| kafka.properties.contains_key(name)) {
            self.set(name, value);
        }
        self
    }
}

/// librdkafka's callbacks for a flow's consumer.
struct FlowContext {
    start_at: StartAt,
    /// Its topics are made a moment after the first start.
    retry: bool,
    first_brokers: FirstBrokers,
    /// Where the records of all partitions come.
    records: OnceLock<Weak<RecordQueue>>,
    /// Another consumer has taken its place: whatever it still hears is nobody's business.
    abandoned: AtomicBool,
    listener: Box<dyn RebalanceListener>,
    /// Partitions each topic had when the flow first saw it: a commit carries the number as metadata, so that a partition
    /// added later is told from one that was there when `start_at` was decided.
    born: Mutex<HashMap<String, i32>>,
    /// Where each assigned partition begins.
    placed: Mutex<HashMap<TopicPartition, Placed>>,
    /// Offsets that librdkafka asked for in vain.
    missed: Mutex<Vec<(TopicPartition, i64)>>,
    /// What the listener has said of times, by partition.
    times: Mutex<HashMap<TopicPartition, i64>>,
    /// When partitions were last assigned, until it was checked that the group has left none out.
    assigned: Mutex<Option<Instant>>,
}

impl ClientContext for FlowContext {
    fn log(&self, level: RDKafkaLogLevel, fac: &str, message: &str) {
        log_librdkafka(level, fac, message);
        if fac == "OFFSET"
            && let Some((topic, partition, offset)) = retention::reset_in(message)
        {
            let topic = topic.to_owned();
            lock(&self.missed).push((TopicPartition { topic, partition }, offset));
        }
    }
    fn error(&self, error: RdKafkaError, reason: &str) {
        let unknown = error.rdkafka_error_code() == Some(RDKafkaErrorCode::UnknownTopicOrPartition);
        if unknown && self.retry {
            tracing::debug!(error = %error, reason, "kafka consumer");
            return;
        }
        if let Some(unsaid) = CONSUMER_ERRORS.due(&error.to_string()) {
            tracing::warn!(error = %error, reason, unsaid, "kafka consumer");
        }
    }
}

/// librdkafka says them for each broker, and at each try.
static CONSUMER_ERRORS: RateLimit = RateLimit::new();
/// By facility: the messages themselves differ in times and addresses.
static CLIENT_ERRORS: RateLimit = RateLimit::new();

fn log_librdkafka(level: RDKafkaLogLevel, fac: &str, message: &str) {
    use RDKafkaLogLevel::{Alert, Critical, Emerg, Error};
    // OFFSET: an offset that retention has removed, or a topic that was made anew.
    if !matches!(level, Emerg | Alert | Critical | Error) && fac != "OFFSET" {
        tracing::debug!(facility = fac, message, "librdkafka");
    } else if let Some(unsaid) = CLIENT_ERRORS.due(fac) {
        tracing::warn!(facility = fac, message, unsaid, "librdkafka");
    }
}

impl ConsumerContext for FlowContext {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, err: RDKafkaRespErr, list: &mut TopicPartitionList) {
        if self.abandoned.load(SeqCst) {
            let _ = consumer.unassign();
            return;
        }
        let partitions: Vec<TopicPartition> = list
            .elements()
            .iter()
            .map(|e| TopicPartition {
                topic: e.topic().to_owned(),
                partition: e.partition(),
            })
            .collect();
        let cooperative = matches!(consumer.rebalance_protocol(), RebalanceProtocol::Cooperative);
        match err {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => {
                let mut gone = lock(&self.placed);
                gone.retain(|at, _| !partitions.contains(at));
                drop(gone);
                let first = self.place(consumer, list).unwrap_or_else(|error| {
                    // librdkafka then starts at the committed offsets, or at the earliest: nothing is lost by it.
                    tracing::warn!(%error, "start positions could not be read, using what is committed");
                    Vec::new()
                });
                let committed = self.commit(consumer, &first, ASK);
                self.listener.assigned(&partitions);
                if let Some(records) = self.records.get().and_then(Weak::upgrade) {
                    let client = consumer.client().native_ptr();
                    partitions.iter().for_each(|at| records.collect(client, at));
                }
                let done = if cooperative {
                    consumer.incremental_assign(list)
                } else {
                    consumer.assign(list)
                };
                if let Err(error) = done {
                    tracing::error!(%error, "partitions could not be taken");
                }
                if let Err(error) = committed {
                    // With the next commit: they must not be decided anew.
                    tracing::warn!(%error, "start positions were not committed, trying on");
                    let stored = self.positions(&first).and_then(|first| consumer.store_offsets(&first));
                    if let Err(error) = stored {
                        tracing::warn!(%error, "start positions could not be kept for the next commit");
                    }
                }
                // A partition that was paused when it was last ours is still paused in librdkafka; its new queue is empty.
                if let Err(error) = consumer.resume(list) {
                    tracing::error!(%error, "partitions could not be resumed");
                }
                *lock(&self.assigned) = Some(Instant::now());
            }
            _ => {
                let commits = self.listener.revoking(&partitions);
                if let Err(error) = self.commit(consumer, &commits, ASK) {
                    // Whoever reads next consumes again: harmless, but worth knowing.
                    tracing::warn!(%error, "offsets of revoked partitions were not committed");
                }
                let done = if cooperative {
                    consumer.incremental_unassign(list)
                } else {
                    consumer.unassign()
                };
                if let Err(error) = done {
                    tracing::error!(%error, "partitions could not be given back");
                }
            }
        }
    }
}

impl FlowContext {
    /// Sets each partition's first offset: what is committed; else `start_at` for a partition that was there when the flow
    /// was born; else its beginning. Gives those that are to be committed at once, as others may not be decided again.
    fn place(
        &self,
        consumer: &BaseConsumer<Self>,
        list: &mut TopicPartitionList,
    ) -> KafkaResult<Vec<(TopicPartition, i64)>> {
        let mut topics: BTreeMap<String, Vec<i32>> = BTreeMap::new();
        for element in list.elements() {
            topics
                .entry(element.topic().to_owned())
                .or_default()
                .push(element.partition());
        }
        let mut first = Vec::new();
        for (topic, mine) in topics {
            let ask = |limit| consumer.fetch_metadata(Some(&topic), limit);
            let metadata = ask(ASK_SHORT).or_else(|_| {
                self.first_brokers.remind(consumer.client());
                ask(ASK - ASK_SHORT)
            })?;
            let count = metadata.topics().first().map_or(0, |t| t.partitions().len() as i32);
            let mut all = TopicPartitionList::new();
            for partition in 0..count {
                all.add_partition(&topic, partition);
            }
            let committed = consumer.committed_offsets(all, ASK)?;
            let known = committed.elements();
            for element in &known {
                // The call may succeed while a partition's answer is missing: that is not the same as no commit.
                element.error()?;
            }
            let born = known
                .iter()
                .filter(|e| matches!(e.offset(), Offset::Offset(_)))
                .find_map(|e| Noted::read(e.metadata()).born)
                // Committed by somebody else's hand: the flow existed, so what has no commit was added later.
                .or_else(|| {
                    known
                        .iter()
                        .any(|e| matches!(e.offset(), Offset::Offset(_)))
                        .then_some(0)
                })
                .unwrap_or(count);
            lock(&self.born).insert(topic.clone(), born);
            let starts = log_starts(consumer, &topic, &mine);
            for partition in mine {
                let element = known.iter().find(|e| e.partition() == partition);
                let place = TopicPartition {
                    topic: topic.clone(),
                    partition,
                };
                let mut placed = Placed::default();
                let offset = match element.map(|e| e.offset()) {
                    Some(Offset::Offset(offset)) => {
                        placed.taken_ms = element.and_then(|e| Noted::read(e.metadata()).at);
                        if let Some(at) = placed.taken_ms {
                            lock(&self.times).insert(place.clone(), at);
                        }
                        match starts.get(&partition).copied() {
                            // Retention has passed us.
                            Some(start) if start > offset => {
                                placed.gap = Some(Gap {
                                    from: offset,
                                    to: start,
                                });
                                // Committed, or the same gap would be found again.
                                first.push((place.clone(), start));
                                start
                            }
                            _ => offset,
                        }
                    }
                    _ => {
                        let (low, high) = consumer.fetch_watermarks(&topic, partition, ASK)?;
                        let latest = self.start_at == StartAt::Latest && partition < born;
                        let offset = if latest { high } else { low };
                        first.push((place.clone(), offset));
                        offset
                    }
                };
                placed.next = Some(offset);
                lock(&self.placed).insert(place, placed);
                list.set_partition_offset(&topic, partition, Offset::Offset(offset))?;
            }
        }
        Ok(first)
    }

    /// Commits and waits for the answer, up to `limit`.
    fn commit(
        &self,
        consumer: &BaseConsumer<Self>,
        offsets: &[(TopicPartition, i64)],
        limit: Duration,
    ) -> KafkaResult<()> {
        if offsets.is_empty() {
            return Ok(());
        }
        let (client, positions) = (consumer.client(), self.positions(offsets)?);
        let asked = Instant::now();
        match commit_within(client, &positions, limit.min(ASK_SHORT)) {
            Err(RdKafkaError::ConsumerCommit(RDKafkaErrorCode::OperationTimedOut)) if limit > ASK_SHORT => {
                // Offsets may be committed twice.
                self.first_brokers.remind(client);
                commit_within(client, &positions, limit.saturating_sub(asked.elapsed()))
            }
            said => said,
        }
    }

    /// Offsets as they are committed, with their metadata.
    fn positions(&self, offsets: &[(TopicPartition, i64)]) -> KafkaResult<TopicPartitionList> {
        let mut list = TopicPartitionList::with_capacity(offsets.len());
        let (born, mut times) = (lock(&self.born), lock(&self.times));
        times.extend(self.listener.times());
        for (at, offset) in offsets {
            let mut element = list.add_partition(&at.topic, at.partition);
            element.set_offset(Offset::Offset(*offset))?;
            let noted = Noted {
                born: born.get(&at.topic).copied(),
                at: times.get(at).copied(),
            };
            element.set_metadata(noted.write());
        }
        Ok(list)
    }

    /// Partitions of `topics` that no member of the group is assigned; `None` while the group is being rebalanced.
    fn left_out(
        &self,
        consumer: &BaseConsumer<Self>,
        group: &str,
        topics: &[String],
    ) -> KafkaResult<Option<Vec<TopicPartition>>> {
        let groups = consumer.fetch_group_list(Some(group), ASK_SHORT)?;
        let Some(group) = groups.groups().iter().find(|found| found.state() == "Stable") else {
            return Ok(None);
        };
        let members = group.members().iter().filter_map(|member| member.assignment());
        let held: Vec<TopicPartition> = members.flat_map(assigned_in).collect();
        let mut left_out = Vec::new();
        for topic in topics {
            let metadata = consumer.fetch_metadata(Some(topic), ASK_SHORT)?;
            let count = metadata.topics().first().map_or(0, |t| t.partitions().len() as i32);
            let all = (0..count).map(|partition| TopicPartition {
                topic: topic.clone(),
                partition,
            });
            left_out.extend(all.filter(|at| !held.contains(at)));
        }
        Ok(Some(left_out))
    }
}

/// The partitions in a member's assignment, in Kafka's consumer protocol: version, then topics with their partitions. What is
/// cut off is left out.
fn assigned_in(mut bytes: &[u8]) -> Vec<TopicPartition> {
    fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = bytes.split_at_checked(count)?;
        *bytes = rest;
        Some(taken)
    }
    fn int(bytes: &mut &[u8]) -> Option<i32> {
        take(bytes, 4).map(|raw| i32::from_be_bytes([raw[0], raw[1], raw[2], raw[3]]))
    }
    let mut assigned = Vec::new();
    let mut read = || {
        take(&mut bytes, 2)?;
        for _ in 0..int(&mut bytes)? {
            let length = take(&mut bytes, 2).map(|raw| u16::from_be_bytes([raw[0], raw[1]]))?;
            let topic = String::from_utf8_lossy(take(&mut bytes, length.into())?).into_owned();
            for _ in 0..int(&mut bytes)? {
                let (topic, partition) = (topic.clone(), int(&mut bytes)?);
                assigned.push(TopicPartition { topic, partition });
            }
        }
        Some(())
    };
    let _ = read();
    assigned
}

/// Where a partition begins that was assigned.
#[derive(Clone, Copy, Debug, Default)]
pub struct Placed {
    /// The first offset to come; unknown when the broker did not answer.
    pub next: Option<i64>,
    /// Produced-at of the last event before it, milliseconds since the epoch, if the commit says so.
    pub taken_ms: Option<i64>,
    /// What retention has removed before it.
    pub gap: Option<Gap>,
}

/// What a commit's metadata says: `evrepl born=4 at=1763971200000`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Noted {
    /// How many partitions the topic had when the flow was born.
    born: Option<i32>,
    /// Produced-at of the last event before the offset, milliseconds since the epoch.
    at: Option<i64>,
}

impl Noted {
    fn read(metadata: &str) -> Noted {
        let Some(words) = metadata.strip_prefix("evrepl ") else {
            return Noted::default();
        };
        let word = |name: &str| words.split(' ').find_map(|word| word.strip_prefix(name));
        Noted {
            born: word("born=").and_then(|number| number.parse().ok()),
            at: word("at=").and_then(|number| number.parse().ok()),
        }
    }

    fn write(self) -> String {
        let mut text = String::from("evrepl");
        if let Some(born) = self.born {
            text.push_str(&format!(" born={born}"));
        }
        if let Some(at) = self.at {
            text.push_str(&format!(" at={at}"));
        }
        text
    }
}

/// Where the logs of these partitions begin, in one question; empty when nobody answers, which is found out later then.
fn log_starts(consumer: &BaseConsumer<FlowContext>, topic: &str, partitions: &[i32]) -> HashMap<i32, i64> {
    let mut wanted = TopicPartitionList::with_capacity(partitions.len());
    for partition in partitions {
        // As a time it asks for the beginning of the log (ListOffsets' -2).
        if wanted
            .add_partition_offset(topic, *partition, Offset::Beginning)
            .is_err()
        {
            return HashMap::new();
        }
    }
    match consumer.offsets_for_times(wanted, ASK) {
        Ok(found) => {
            let known = |element: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| match element.offset() {
                Offset::Offset(offset) if element.error().is_ok() => Some((element.partition(), offset)),
                _ => None,
            };
            found.elements().iter().filter_map(known).collect()
        }
        Err(error) => {
            tracing::debug!(%error, topic, "not known where the log begins");
            HashMap::new()
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Drops a client on a thread of its own: its end may take a while. Without a thread it ends here.
fn end_elsewhere(client: impl Send + 'static) {
    let _ = std::thread::Builder::new()
        .name("kafka end".to_owned())
        .spawn(move || drop(client));
}

/// What one consumer's librdkafka may hold of records that were fetched and not yet taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefetch {
    /// Bytes of keys and values: `queued.max.messages.kbytes`. librdkafka counts only these.
    pub bytes: u64,
    /// Records from which on no more are fetched: `queued.min.messages`.
    pub records: u64,
    /// One answer of a broker, which is asked for before the limits are reached and comes on top: `fetch.max.bytes`.
    pub answer: u64,
}

/// What librdkafka keeps beside each fetched record: its queue entry without key and value, 400 bytes and some by its source.
const FETCHED_RECORD_BYTES: u64 = 512;
/// The smallest records that are worth a thought, on the wire: a short key, the shortest event and no headers.
const SMALL_RECORD_BYTES: u64 = 32;

impl Prefetch {
    /// Of a flow's consumer of source topics, or of retry topics, whose records have time.
    pub fn of(kafka: &Kafka, max_in_flight_bytes: usize, retry: bool) -> Prefetch {
        let property = |name: &str| kafka.properties.get(name).and_then(|value| value.parse::<u64>().ok());
        // Room for a second of events at the highest rates, small beside the values in flight.
        let part = max_in_flight_bytes as u64 / if retry { 16 } else { 4 };
        let kib = property("queued.max.messages.kbytes").unwrap_or((part >> 10).max(1 << 10));
        let bytes = kib.saturating_mul(1 << 10);
        Prefetch {
            bytes,
            records: property("queued.min.messages").unwrap_or(if retry { 10_000 } else { 50_000 }),
            answer: property("fetch.max.bytes").unwrap_or((bytes / 4).clamp(1 << 20, 4 << 20)),
        }
    }

    /// The memory that this may take, with an answer of each of so many brokers on top of full queues.
    pub fn memory(self, brokers: usize) -> u64 {
        let answers = self.answer.saturating_mul(brokers as u64);
        let records = self.records.saturating_add(answers / SMALL_RECORD_BYTES);
        let beside = records.saturating_mul(FETCHED_RECORD_BYTES);
        self.bytes.saturating_add(answers).saturating_add(beside)
    }
}

/// What [`FlowConsumer::serve`] came upon.
pub enum Served<'a> {
    /// A record that did not come with the others: one of a partition that could not be had to. To be taken before them.
    Stray(Record<'a>),
    /// Kafka is not well; polling goes on, unless it is [`KafkaError::Fatal`].
    Trouble(KafkaError),
}

/// The consumer of one flow, for its poll thread alone.
pub struct FlowConsumer {
    /// Gone before the client is.
    records: Arc<RecordQueue>,
    consumer: BaseConsumer<FlowContext>,
    group: String,
    topics: Vec<String>,
    /// How long a rebalance may take to come to rest: a member that has died in between is replaced.
    claim_within: Duration,
}

impl FlowConsumer {
    /// A consumer of `group`, a static member under the name `node`, of these topics: source topics, or retry topics, which
    /// need not be there yet and are read from their beginning whatever `start_at` says, for what was parked must come back.
    /// `listener` is called while polling.
    ///
    /// # Errors
    /// [`KafkaError::Settings`] when librdkafka refuses a property.
    pub fn new(
        kafka: &Kafka,
        group: &str,
        node: &str,
        topics: &[&str],
        retry: bool,
        prefetch: Prefetch,
        listener: Box<dyn RebalanceListener>,
    ) -> Result<Self, KafkaError> {
        let config = flow_config(kafka, group, node, prefetch);
        let context = FlowContext {
            start_at: if retry { StartAt::Earliest } else { kafka.start_at },
            retry,
            first_brokers: FirstBrokers::of(kafka),
            records: OnceLock::new(),
            abandoned: Default::default(),
            listener,
            born: Default::default(),
            placed: Default::default(),
            missed: Default::default(),
            times: Default::default(),
            assigned: Default::default(),
        };
        let consumer: BaseConsumer<FlowContext> = config.create_with_context(context)?;
        let records = RecordQueue::new(consumer.client().native_ptr());
        let records = Arc::new(records.ok_or_else(|| KafkaError::Settings("no queue for records".to_owned()))?);
        let _ = consumer.context().records.set(Arc::downgrade(&records));
        consumer.subscribe(topics)?;
        Ok(FlowConsumer {
            records,
            consumer,
            group: group.to_owned(),
            topics: topics.iter().map(|topic| (*topic).to_owned()).collect(),
            claim_within: kafka.session_timeout + CLAIM_MARGIN,
        })
    }

    /// Joins the group anew if it has left partitions out. A static member that is back within its session timeout is given
    /// its old assignment without a rebalance, and librdkafka only notices what changes from then on: partitions that were
    /// added meanwhile, or the topic of a cache that is new in the configuration, would belong to nobody; so would those that
    /// one member had just given up for another when both were killed.
    /// Asks the broker once after each assignment, and does nothing otherwise.
    ///
    /// # Errors
    /// [`KafkaError::Broker`] when the broker does not answer; it is asked again later.
    pub fn claim_left_out(&self) -> Result<(), KafkaError> {
        let context = self.consumer.context();
        let due = lock(&context.assigned).is_some_and(|at| at.elapsed() >= self.claim_within);
        if !due {
            return Ok(());
        }
        // Also when the broker does not answer: asked again after the same time, not in every round.
        *lock(&context.assigned) = Some(Instant::now());
        let Some(left_out) = context.left_out(&self.consumer, &self.group, &self.topics)? else {
            return Ok(());
        };
        *lock(&context.assigned) = None;
        if let Some(first) = left_out.first() {
            tracing::warn!(
                topic = first.topic,
                partition = first.partition,
                partitions = left_out.len(),
                "partitions belong to nobody in the group, joining it anew"
            );
            let topics: Vec<&str> = self.topics.iter().map(String::as_str).collect();
            self.consumer.unsubscribe();
            self.consumer.subscribe(&topics)?;
        }
        Ok(())
    }

    /// Runs what is due of rebalances and other events, without waiting. To be called often: nothing else does. `None` when
    /// nothing is left.
    pub fn serve(&self) -> Option<Served<'_>> {
        match self.consumer.poll(Duration::ZERO)? {
            Ok(message) => Record::of(message).map(Served::Stray),
            Err(error) => {
                let fatal = self.consumer.client().fatal_error();
                let fatal = fatal.map(|(_, reason)| KafkaError::Fatal(reason));
                Some(Served::Trouble(fatal.unwrap_or_else(|| error.into())))
            }
        }
    }

    /// Takes up to `most` records of partitions that are ours, [`MAX_BATCH`] at most, waiting up to `wait` for the first.
    pub fn take<'a>(&'a self, scratch: &'a mut Scratch, most: usize, wait: Duration) -> Batch<'a> {
        self.records.take(scratch, most, wait)
    }

    /// Whether a broker answers within `limit` per topic, and knows every topic of the flow, retry topics apart. Blocks for so
    /// long.
    pub fn answers(&self, limit: Duration) -> bool {
        let known = |topic: &String| {
            let metadata = self.consumer.fetch_metadata(Some(topic), limit)?;
            let retry = self.consumer.context().retry;
            KafkaResult::Ok(retry || metadata.topics().iter().all(|topic| topic.error().is_none()))
        };
        self.topics.iter().all(|topic| matches!(known(topic), Ok(true)))
    }

    /// Which of its topics the broker says there are none of, when asked for each; it has `limit` for each answer. Blocks.
    pub fn unknown_topics(&self, limit: Duration) -> Vec<String> {
        let mut unknown = Vec::new();
        for topic in &self.topics {
            // Who does not answer the first question is not asked the others.
            let Ok(metadata) = self.consumer.fetch_metadata(Some(topic), limit) else {
                break;
            };
            let mut errors = metadata.topics().iter().filter_map(|topic| topic.error());
            if errors.any(|error| RDKafkaErrorCode::from(error) == RDKafkaErrorCode::UnknownTopicOrPartition) {
                unknown.push(topic.clone());
            }
        }
        unknown
    }

    /// Whether this client hears from no broker within `limit`, although one of those to begin with accepts a connection. A
    /// topic that is missing is no such case: that is what a broker says. Blocks.
    pub fn has_lost_brokers(&self, limit: Duration) -> bool {
        let topic = self.topics.first().map(String::as_str);
        if self.consumer.fetch_metadata(topic, limit).is_ok() {
            return false;
        }
        self.consumer.context().first_brokers.one_is_there(limit)
    }

    /// Nothing is heard of Kafka: the client may have forgotten its brokers, and is reminded, however often this is called.
    pub fn remind(&self) {
        self.consumer.context().first_brokers.remind(self.consumer.client());
    }

    /// Something was heard of it again.
    pub fn heard(&self) {
        self.consumer.context().first_brokers.heard();
    }

    /// Lets go of a consumer that cannot even leave its group any more, without waiting for its end.
    pub fn abandon(self) {
        let context = self.consumer.context();
        context.abandoned.store(true, SeqCst);
        end_elsewhere(self);
    }

    /// Stops fetching a partition; what librdkafka had prefetched of it is thrown away and fetched again later.
    pub fn pause(&self, at: &TopicPartition) -> Result<(), KafkaError> {
        Ok(self.consumer.pause(&one(at))?)
    }

    /// Fetches a paused partition again, from where it was.
    pub fn resume(&self, at: &TopicPartition) -> Result<(), KafkaError> {
        Ok(self.consumer.resume(&one(at))?)
    }

    /// Writes watermarks to Kafka without waiting for the answer. It may never come: a rebalance or an absent broker makes
    /// librdkafka drop a commit and tell nobody. What is not committed goes with the next call, whose list may be empty.
    pub fn commit(&self, offsets: &[(TopicPartition, i64)]) -> Result<(), KafkaError> {
        if !offsets.is_empty() {
            self.consumer
                .store_offsets(&self.consumer.context().positions(offsets)?)?;
        }
        // Takes those stored offsets that no answer has confirmed.
        Ok(self.consumer.commit_consumer_state(CommitMode::Async)?)
    }

    /// Writes watermarks to Kafka and waits for the answer, up to `limit`.
    ///
    /// # Errors
    /// [`KafkaError::Broker`] when Kafka refuses them, as it does while the group is being rebalanced: whoever is given the
    /// partitions reads on from the last commit. [`KafkaError::Silent`] when it has not answered in time: it may still have them.
    pub fn commit_and_wait(&self, offsets: &[(TopicPartition, i64)], limit: Duration) -> Result<(), KafkaError> {
        use RDKafkaErrorCode::{BrokerTransportFailure, OperationTimedOut, WaitingForCoordinator};
        let done = self.consumer.context().commit(&self.consumer, offsets, limit);
        done.map_err(|error| match error.rdkafka_error_code() {
            Some(OperationTimedOut | WaitingForCoordinator | BrokerTransportFailure) => {
                KafkaError::Silent(error.to_string())
            }
            _ => error.into(),
        })
    }

    /// Where the partition's log begins, and one above its last record, as its last fetch reported them.
    pub fn cached_watermarks(&self, at: &TopicPartition) -> (Option<i64>, Option<i64>) {
        // Asks librdkafka's cache, not the broker.
        cached_watermarks(&self.consumer, at)
    }

    /// Where a partition that was assigned begins.
    pub fn placed(&self, at: &TopicPartition) -> Placed {
        lock(&self.consumer.context().placed)
            .get(at)
            .copied()
            .unwrap_or_default()
    }

    /// Offsets that were asked for in vain since the last call: the broker has removed them, and reading begins anew where the
    /// log begins. Known before the first record from there.
    pub fn missed(&self) -> Vec<(TopicPartition, i64)> {
        std::mem::take(&mut *lock(&self.consumer.context().missed))
    }
}

#[allow(
    unsafe_code,
    reason = "rust-rdkafka has no binding for rd_kafka_get_watermark_offsets, which reads a local cache"
)]
fn cached_watermarks(consumer: &BaseConsumer<FlowContext>, at: &TopicPartition) -> (Option<i64>, Option<i64>) {
    let Ok(topic) = std::ffi::CString::new(at.topic.as_str()) else {
        return (None, None);
    };
    let (mut low, mut high) = (-1i64, -1i64);
    // SAFETY: the client outlives the call, the topic name is a C string, and the two integers are written before it returns.
    let code = unsafe {
        rdkafka::bindings::rd_kafka_get_watermark_offsets(
            consumer.client().native_ptr(),
            topic.as_ptr(),
            at.partition,
            &mut low,
            &mut high,
        )
    };
    let known = |offset: i64| (code == RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR && offset >= 0).then_some(offset);
    (known(low), known(high))
}

fn one(at: &TopicPartition) -> TopicPartitionList {
    let mut list = TopicPartitionList::with_capacity(1);
    list.add_partition(&at.topic, at.partition);
    list
}

/// What is produced: an event, a dead letter, a retry.
#[derive(Clone, Debug, Default)]
pub struct Produce<'a> {
    /// Topic to produce to.
    pub topic: &'a str,
    /// Partition of it; that of the key when absent.
    pub partition: Option<i32>,
    /// Record key: the cache key.
    pub key: Option<&'a [u8]>,
    /// Record value.
    pub value: Option<&'a [u8]>,
    /// Record headers, in order.
    pub headers: &'a [(&'a str, &'a [u8])],
    /// Produced-at in milliseconds since the epoch; now when absent.
    pub timestamp_ms: Option<i64>,
}

struct ProducerContext;

impl ClientContext for ProducerContext {
    fn log(&self, level: RDKafkaLogLevel, fac: &str, message: &str) {
        log_librdkafka(level, fac, message);
    }
    fn error(&self, error: RdKafkaError, reason: &str) {
        tracing::debug!(error = %error, reason, "kafka producer");
    }
}

/// A producer that says when Kafka has acknowledged. Cheap to clone.
#[derive(Clone)]
pub struct Producer {
    config: Arc<ClientConfig>,
    first_brokers: Arc<FirstBrokers>,
    current: Arc<RwLock<CurrentProducer>>,
    /// The last record was not taken: whoever gets one through says so.
    failing: Arc<AtomicBool>,
}

struct CurrentProducer {
    producer: FutureProducer<ProducerContext>,
    made: Instant,
    /// No record has been taken since.
    failing_since: Option<Instant>,
}

/// Requests under way to one broker, as Java's client has it; librdkafka's default is a million. It sends one for each partition
/// and linger, however few records that are, and a broker answers those of one connection one after the other: if it falls
/// behind, small requests would queue there, each as expensive as ever (measured at 20 000 records a second, 4 partitions: lag grew
/// to seconds, and does not with 5). With this bound what waits, waits here, and goes together.
const IN_FLIGHT: (&str, &str) = ("max.in.flight.requests.per.connection", "5");

/// A producer that has got nothing through for so long is replaced: librdkafka may have lost its brokers for good (see
/// [`KafkaError::Lost`]), and when it has not, a new one is no worse.
const PRODUCER_FAILS: Duration = Duration::from_secs(20);

impl Producer {
    /// A producer that waits for every in-sync replica. Not idempotent: a repeated event is harmless, and the handshake of
    /// an idempotent one would hold the first record back for up to a second.
    ///
    /// # Errors
    /// [`KafkaError::Settings`] when librdkafka refuses a property.
    pub fn new(kafka: &Kafka, client_id: &str) -> Result<Self, KafkaError> {
        let config = producer_config(kafka, client_id);
        let producer = config.create_with_context(ProducerContext)?;
        let current = CurrentProducer {
            producer,
            made: Instant::now(),
            failing_since: None,
        };
        Ok(Producer {
            first_brokers: Arc::new(FirstBrokers::of(kafka)),
            config: Arc::new(config),
            current: Arc::new(RwLock::new(current)),
            failing: Arc::default(),
        })
    }

    fn producer(&self) -> FutureProducer<ProducerContext> {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        current.producer.clone()
    }

    fn note(&self, taken: bool) {
        if taken && !self.failing.load(Relaxed) {
            return;
        }
        self.failing.store(!taken, Relaxed);
        if taken {
            self.first_brokers.heard();
        }
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if taken {
            current.failing_since = None;
            return;
        }
        let since = *current.failing_since.get_or_insert_with(Instant::now);
        if since.elapsed() < PRODUCER_FAILS || current.made.elapsed() < PRODUCER_FAILS {
            return;
        }
        current.made = Instant::now();
        match self.config.create_with_context(ProducerContext) {
            Ok(producer) => {
                tracing::warn!("kafka has taken no record for {PRODUCER_FAILS:?}, making a new producer");
                let old = std::mem::replace(&mut current.producer, producer);
                // Its end waits for what it had.
                end_elsewhere(old);
            }
            Err(error) => tracing::warn!(%error, "no new kafka producer could be made"),
        }
    }

    /// Produces one record and waits until Kafka has acknowledged it; gives partition and offset.
    ///
    /// # Errors
    /// [`KafkaError::Broker`] when Kafka did not take it within `timeout`; whether it was written is then unknown.
    pub async fn send(&self, record: &Produce<'_>, timeout: Duration) -> Result<(i32, i64), KafkaError> {
        let mut headers = OwnedHeaders::new_with_capacity(record.headers.len());
        for (key, value) in record.headers {
            headers = headers.insert(Header {
                key,
                value: Some(*value),
            });
        }
        let mut out = FutureRecord::<[u8], [u8]>::to(record.topic);
        (out.key, out.payload, out.partition) = (record.key, record.value, record.partition);
        if !record.headers.is_empty() {
            out = out.headers(headers);
        }
        if let Some(at) = record.timestamp_ms {
            out = out.timestamp(at);
        }
        let result = match tokio::time::timeout(timeout, self.producer().send(out, timeout)).await {
            Ok(Ok(delivery)) => Ok((delivery.partition, delivery.offset)),
            Ok(Err((error, _))) => {
                if matches!(error.rdkafka_error_code(), Some(RDKafkaErrorCode::MessageTimedOut)) {
                    self.first_brokers.remind(self.producer().client());
                }
                Err(error.into())
            }
            Err(_) => {
                self.first_brokers.remind(self.producer().client());
                Err(KafkaError::Broker(format!("no acknowledgement within {timeout:?}")))
            }
        };
        self.note(result.is_ok());
        result
    }

    /// Waits until everything produced has been acknowledged or `timeout` has passed. Blocks the thread.
    pub fn flush(&self, timeout: Duration) -> Result<(), KafkaError> {
        Ok(self.producer().flush(timeout)?)
    }
}

/// Reads a topic once, from a time on to where it ends now, beside every consumer group: partitions are assigned by hand,
/// nothing is joined and nothing committed.
pub struct TopicReader {
    consumer: BaseConsumer<ReaderContext>,
    topic: String,
    /// By partition: the offset at which this reading ends.
    open: BTreeMap<i32, i64>,
    offsets: u64,
}

struct ReaderContext;

impl ClientContext for ReaderContext {
    fn log(&self, level: RDKafkaLogLevel, fac: &str, message: &str) {
        tracing::debug!(?level, facility = fac, message, "librdkafka");
    }
    fn error(&self, error: RdKafkaError, reason: &str) {
        tracing::debug!(error = %error, reason, "kafka reader");
    }
}

impl ConsumerContext for ReaderContext {}

/// What one read of a [`TopicReader`] brought.
pub enum Read<'a> {
    /// A record.
    Record(Record<'a>),
    /// Nothing within the time.
    Nothing,
    /// The topic has been read to where it ended at the start.
    End,
}

impl TopicReader {
    /// A reader that begins with the first record that is no older than `since_ms` by Kafka's time index, or with the oldest
    /// there is. `group` is only named, for brokers that let clients name some groups and no others.
    ///
    /// # Errors
    /// [`KafkaError::UnknownTopic`], [`KafkaError::Broker`] when Kafka does not answer, [`KafkaError::Settings`].
    pub fn open(
        kafka: &Kafka,
        group: &str,
        client_id: &str,
        topic: &str,
        since_ms: Option<i64>,
    ) -> Result<Self, KafkaError> {
        let mut config = client_config(kafka, client_id);
        config
            .set("group.id", group)
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("enable.partition.eof", "true")
            .set("allow.auto.create.topics", "false")
            .set("auto.offset.reset", "earliest")
            // Bounded: what is read waits for what is produced.
            .set_if_absent(kafka, "queued.max.messages.kbytes", "16384")
            .set_if_absent(kafka, "fetch.wait.max.ms", "100");
        let consumer: BaseConsumer<ReaderContext> = config.create_with_context(ReaderContext)?;
        let metadata = consumer.fetch_metadata(Some(topic), ASK)?;
        let found = metadata.topics().iter().find(|found| found.name() == topic);
        let partitions = found.filter(|found| found.error().is_none() && !found.partitions().is_empty());
        let Some(partitions) = partitions.map(|found| found.partitions()) else {
            return Err(KafkaError::UnknownTopic(topic.to_owned()));
        };
        let mut begin = BTreeMap::new();
        let mut open = BTreeMap::new();
        for partition in partitions {
            let (low, high) = consumer.fetch_watermarks(topic, partition.id(), ASK)?;
            begin.insert(partition.id(), low);
            open.insert(partition.id(), high);
        }
        if let Some(since) = since_ms {
            let mut times = TopicPartitionList::new();
            for partition in open.keys() {
                times.add_partition_offset(topic, *partition, Offset::Offset(since.max(0)))?;
            }
            for element in consumer.offsets_for_times(times, ASK)?.elements() {
                element.error()?;
                match element.offset() {
                    Offset::Offset(first) => begin.insert(element.partition(), first),
                    // Nothing so new.
                    _ => open.remove(&element.partition()),
                };
            }
        }
        open.retain(|partition, end| begin.get(partition).is_some_and(|first| first < end));
        let mut assignment = TopicPartitionList::with_capacity(open.len());
        let mut offsets = 0;
        for (partition, end) in &open {
            assignment.add_partition_offset(topic, *partition, Offset::Offset(begin[partition]))?;
            offsets += (end - begin[partition]) as u64;
        }
        consumer.assign(&assignment)?;
        Ok(TopicReader {
            consumer,
            topic: topic.to_owned(),
            open,
            offsets,
        })
    }

    /// Offsets between beginning and end: at least as many as there are records.
    pub fn offsets(&self) -> u64 {
        self.offsets
    }

    /// Waits up to `timeout` for a record. Blocks.
    ///
    /// # Errors
    /// [`KafkaError::Broker`] and [`KafkaError::Fatal`]; after the first the same call may work again.
    pub fn read(&mut self, timeout: Duration) -> Result<Read<'_>, KafkaError> {
        if self.open.is_empty() {
            return Ok(Read::End);
        }
        match self.consumer.poll(timeout) {
            None => Ok(Read::Nothing),
            Some(Ok(message)) => {
                let (partition, offset) = (message.partition(), message.offset());
                let Some(end) = self.open.get(&partition).copied() else {
                    return Ok(Read::Nothing);
                };
                if offset + 1 >= end {
                    self.open.remove(&partition);
                    let mut done = TopicPartitionList::with_capacity(1);
                    done.add_partition(&self.topic, partition);
                    // What the live stream adds is not for this reading.
                    self.consumer.pause(&done)?;
                }
                let record = Record::of(message).filter(|_| offset < end);
                Ok(record.map_or(Read::Nothing, Read::Record))
            }
            // Transaction markers and what compaction took may stand between the last record and the end.
            Some(Err(RdKafkaError::PartitionEOF(partition))) => {
                self.open.remove(&partition);
                Ok(Read::Nothing)
            }
            Some(Err(error)) => Err(error.into()),
        }
    }
}

/// What the broker says about the topics that were asked for.
pub type TopicCounts = BTreeMap<String, Option<i32>>;

/// Topics, seen from outside any flow. Every call blocks its thread.
pub struct Topics {
    admin: AdminClient<DefaultClientContext>,
    first_brokers: FirstBrokers,
}

impl Topics {
    /// A client for topics.
    ///
    /// # Errors
    /// [`KafkaError::Settings`] when librdkafka refuses a property.
    pub fn new(kafka: &Kafka, client_id: &str) -> Result<Self, KafkaError> {
        let mut config = client_config(kafka, client_id);
        // Asking for a topic's metadata must not make it; only a deliberate step below does.
        config.set("allow.auto.create.topics", "false");
        Ok(Topics {
            admin: config.create()?,
            first_brokers: FirstBrokers::of(kafka),
        })
    }

    /// Partitions of each topic, `None` for one that does not exist.
    ///
    /// # Errors
    /// [`KafkaError::Broker`] when no broker answers in time.
    pub fn partitions(&self, topics: &[String], timeout: Duration) -> Result<TopicCounts, KafkaError> {
        let mut counts = TopicCounts::new();
        for topic in topics {
            let client = self.admin.inner();
            let metadata = client
                .fetch_metadata(Some(topic), timeout)
                .inspect_err(|_| self.first_brokers.remind(client))?;
            self.first_brokers.heard();
            let found = metadata.topics().iter().find(|t| t.name() == topic);
            let count = found
                .filter(|t| t.error().is_none())
                .map(|t| t.partitions().len() as i32);
            counts.insert(topic.clone(), count.filter(|&n| n > 0));
        }
        Ok(counts)
    }

    /// Topics of which members of this group read partitions now; none of a group that is being rebalanced.
    ///
    /// # Errors
    /// [`KafkaError::Broker`] when no broker answers in time.
    pub fn read_by(&self, group: &str, timeout: Duration) -> Result<BTreeSet<String>, KafkaError> {
        let groups = self.admin.inner().fetch_group_list(Some(group), timeout)?;
        let found = groups.groups().iter().filter(|found| found.name() == group);
        let members = found.flat_map(|group| group.members());
        let assigned = members.filter_map(|member| member.assignment()).flat_map(assigned_in);
        Ok(assigned.map(|at| at.topic).collect())
    }

    /// Raises the number of a topic's partitions to `total`; success also when somebody else has done so.
    ///
    /// # Errors
    /// [`KafkaError::Broker`] with the broker's reason.
    pub async fn add_partitions(&self, topic: &str, total: i32) -> Result<(), KafkaError> {
        let new = NewPartitions::new(topic, total.max(0) as usize);
        let options = AdminOptions::new()
            .request_timeout(Some(ASK))
            .operation_timeout(Some(ASK));
        match self.admin.create_partitions([&new], &options).await?.into_iter().next() {
            // It has as many already, or more: seen in the next look.
            None | Some(Ok(_) | Err((_, RDKafkaErrorCode::InvalidPartitions))) => Ok(()),
            Some(Err((_, code))) => Err(KafkaError::Broker(format!(
                "topic {topic} could not get {total} partitions: {code}"
            ))),
        }
    }

    /// Creates a topic; one that exists already is success. Where the broker has no admin API, asks for its metadata with
    /// automatic creation allowed.
    ///
    /// # Errors
    /// [`KafkaError::Broker`] with the broker's reason.
    pub async fn create(&self, kafka: &Kafka, topic: &str, partitions: i32) -> Result<(), KafkaError> {
        let new = NewTopic::new(topic, partitions, TopicReplication::Fixed(-1));
        let options = AdminOptions::new()
            .request_timeout(Some(ASK))
            .operation_timeout(Some(ASK));
        let reason = match self.admin.create_topics([&new], &options).await {
            Ok(results) => match results.into_iter().next() {
                None | Some(Ok(_)) => return Ok(()),
                Some(Err((_, RDKafkaErrorCode::TopicAlreadyExists))) => return Ok(()),
                Some(Err((_, code))) => code.to_string(),
            },
            Err(error) => error.to_string(),
        };
        let mut config = client_config(kafka, "evrepl-topics");
        config.set("allow.auto.create.topics", "true");
        let topic = topic.to_owned();
        // A consumer without a group: metadata of a producer client would not ask for the topic to be made.
        let asked = tokio::task::spawn_blocking(move || -> KafkaResult<bool> {
            let consumer: BaseConsumer = config.create()?;
            let metadata = consumer.fetch_metadata(Some(&topic), ASK)?;
            Ok(metadata
                .topics()
                .first()
                .is_some_and(|t| t.error().is_none() && !t.partitions().is_empty()))
        })
        .await;
        match asked {
            Ok(Ok(true)) => Ok(()),
            _ => Err(KafkaError::Broker(format!("topic could not be created: {reason}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nobody;

    impl RebalanceListener for Nobody {
        fn assigned(&self, _: &[TopicPartition]) {}
        fn revoking(&self, _: &[TopicPartition]) -> Vec<(TopicPartition, i64)> {
            Vec::new()
        }
        fn times(&self) -> Vec<(TopicPartition, i64)> {
            Vec::new()
        }
    }

    /// librdkafka's own gives up after a session.
    #[test]
    fn a_commit_without_a_coordinator_is_given_up_in_time() {
        let config = crate::config::for_tests(
            "cache = [{ name = \"c\", topic = \"t\", servers = [\"127.0.0.1:2\"] }]\n[kafka]\nbrokers = [\"127.0.0.1:1\"]",
        );
        let prefetch = Prefetch::of(&config.kafka, 1 << 20, false);
        let consumer = FlowConsumer::new(
            &config.kafka,
            "group",
            "node",
            &["topic"],
            false,
            prefetch,
            Box::new(Nobody),
        );
        let at = TopicPartition {
            topic: "topic".to_owned(),
            partition: 0,
        };
        let limit = ASK_SHORT + Duration::from_millis(100);
        let consumer = consumer.unwrap();
        let said = consumer.commit_and_wait(&[(at, 7)], limit);
        // Nor is its end to be waited for.
        consumer.abandon();
        assert!(
            matches!(&said, Err(KafkaError::Silent(error)) if error.contains("OperationTimedOut")),
            "{said:?}"
        );
    }

    #[test]
    fn a_members_assignment_is_read_and_what_is_cut_off_is_left_out() {
        let mut bytes = b"\x00\x03\x00\x00\x00\x02\x00\x01a\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x07".to_vec();
        bytes.extend_from_slice(b"\x00\x02bb\x00\x00\x00\x01\x00\x00\x00\x01\xff\xff\xff\xff");
        let at = |topic: &str, partition| TopicPartition {
            topic: topic.into(),
            partition,
        };
        assert_eq!(assigned_in(&bytes), [at("a", 0), at("a", 7), at("bb", 1)]);
        assert_eq!(assigned_in(&bytes[..21]), [at("a", 0), at("a", 7)]);
        assert_eq!(assigned_in(b""), []);
    }

    #[test]
    fn what_a_commit_notes_is_read_back_and_so_is_what_older_versions_noted() {
        for (born, at) in [
            (Some(4), Some(1_763_971_200_000)),
            (Some(4), None),
            (None, Some(7)),
            (None, None),
        ] {
            let noted = Noted { born, at };
            assert_eq!(Noted::read(&noted.write()), noted, "{}", noted.write());
        }
        let older = Noted {
            born: Some(12),
            at: None,
        };
        assert_eq!(Noted::read("evrepl born=12"), older);
        for other in ["", "born=4", "evrepl born=many", "somebody else's"] {
            assert_eq!(Noted::read(other), Noted::default(), "{other:?}");
        }
    }
}
