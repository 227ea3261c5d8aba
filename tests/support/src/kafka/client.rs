//! Looking at Kafka as any other client: topics, offsets, commits, records. Blocking; for tests, so it panics.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdkafka::admin::{AdminClient, AdminOptions, NewPartitions, NewTopic, TopicReplication, TopicResult};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{Headers, Message};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use super::producer::{Outgoing, Producer};

/// One call's time: a broker that was just restarted, on a busy machine, answers within this or is broken.
const CALL: Duration = Duration::from_secs(30);

/// A record as it lies in Kafka.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub partition: i32,
    pub offset: i64,
    /// Milliseconds since the Unix epoch.
    pub timestamp: Option<i64>,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    /// In their order; a name may come more than once.
    pub headers: Vec<(String, Vec<u8>)>,
}

impl Record {
    /// The key's bytes; empty when there is none.
    pub fn key(&self) -> &[u8] {
        self.key.as_deref().unwrap_or_default()
    }

    /// The value's bytes; empty when there is none.
    pub fn value(&self) -> &[u8] {
        self.value.as_deref().unwrap_or_default()
    }

    /// The last header of this name.
    pub fn header(&self, name: &str) -> Option<&[u8]> {
        self.headers
            .iter()
            .rev()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_slice())
    }
}

/// A client of one broker address. Its methods panic when Kafka refuses or doesn't answer within 30 s.
pub struct KafkaClient {
    address: String,
    /// By group; `""` is the one without a group, for metadata and end offsets. None of them ever subscribes.
    consumers: Mutex<HashMap<String, BaseConsumer>>,
}

impl std::fmt::Debug for KafkaClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KafkaClient")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl KafkaClient {
    /// A client of the Kafka at `address` (`host:port`); connects on first use.
    pub fn new(address: &str) -> KafkaClient {
        KafkaClient {
            address: address.into(),
            consumers: Mutex::default(),
        }
    }

    /// The bootstrap address, `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A client configuration that finds a restarted broker within a fraction of a second.
    pub fn config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.address)
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "200");
        config
    }

    /// Whether it answers a question about its metadata within `limit`.
    pub fn answers(&self, limit: Duration) -> bool {
        let answers = self.with_consumer("", |consumer| {
            consumer
                .fetch_metadata(None, limit)
                .is_ok_and(|all| !all.brokers().is_empty())
        });
        if !answers {
            self.forget("");
        }
        answers
    }

    /// Creates a topic and waits until it can be written. `configs` are topic configs, such as `("retention.ms", "-1")`.
    pub fn create_topic(&self, topic: &str, partitions: i32, configs: &[(&str, &str)]) {
        let mut new = NewTopic::new(topic, partitions, TopicReplication::Fixed(1));
        for (key, value) in configs {
            new = new.set(key, value);
        }
        self.admin(topic, |admin, options| block_on(admin.create_topics([&new], options)));
        self.await_partitions(topic, partitions as usize);
    }

    /// Raises the number of partitions to `total`.
    pub fn add_partitions(&self, topic: &str, total: usize) {
        self.admin(topic, |admin, options| {
            block_on(admin.create_partitions([&NewPartitions::new(topic, total)], options))
        });
        self.await_partitions(topic, total);
    }

    /// Removes a partition's records below `offset`, as retention does.
    ///
    /// # Panics
    /// When Kafka refuses.
    pub fn delete_records(&self, topic: &str, partition: i32, offset: i64) {
        let mut below = TopicPartitionList::new();
        below
            .add_partition_offset(topic, partition, Offset::Offset(offset))
            .expect("an offset to delete below");
        let (admin, options) = self.admin_client();
        let done = block_on(admin.delete_records(&below, &options))
            .unwrap_or_else(|error| panic!("deleting records of {topic}: {error}"));
        for element in done.elements() {
            element
                .error()
                .unwrap_or_else(|error| panic!("deleting records of {topic}[{partition}]: {error}"));
        }
    }

    /// Deletes a topic.
    pub fn delete_topic(&self, topic: &str) {
        self.admin(topic, |admin, options| block_on(admin.delete_topics(&[topic], options)));
    }

    /// The topic's partitions that have a leader, in order; empty when there is no such topic.
    pub fn partitions(&self, topic: &str) -> Vec<i32> {
        let what = format!("the partitions of {topic}");
        let all = self.patiently("", &what, |consumer, limit| consumer.fetch_metadata(Some(topic), limit));
        let found = all.topics().iter().filter(|found| found.error().is_none());
        let found = found.flat_map(|found| found.partitions());
        let led = found.filter(|one| one.error().is_none() && one.leader() >= 0);
        let mut partitions: Vec<i32> = led.map(|one| one.id()).collect();
        partitions.sort_unstable();
        partitions
    }

    /// (partition, end offset) of every partition: how many records were ever written to each.
    pub fn end_offsets(&self, topic: &str) -> Vec<(i32, i64)> {
        let end = |partition| {
            let what = format!("the end offset of {topic}[{partition}]");
            let ask = |consumer: &BaseConsumer, limit| consumer.fetch_watermarks(topic, partition, limit);
            (partition, self.patiently("", &what, ask).1)
        };
        self.partitions(topic).into_iter().map(end).collect()
    }

    /// (partition, committed offset) of every partition; `None` where the group has committed nothing.
    pub fn committed(&self, group: &str, topic: &str) -> Vec<(i32, Option<i64>)> {
        let mut wanted = TopicPartitionList::new();
        for partition in self.partitions(topic) {
            wanted.add_partition(topic, partition);
        }
        let what = format!("the offsets of {group} in {topic}");
        let found = self.patiently(group, &what, |consumer, limit| {
            consumer.committed_offsets(wanted.clone(), limit)
        });
        let mut offsets: Vec<(i32, Option<i64>)> = found
            .elements()
            .iter()
            .map(|element| match element.offset() {
                Offset::Offset(offset) => (element.partition(), Some(offset)),
                _ => (element.partition(), None),
            })
            .collect();
        offsets.sort_unstable();
        offsets
    }

    /// The group's state as Kafka names it (`Stable`, `Empty`, `PreparingRebalance`, ...) and its number of members.
    pub fn group(&self, group: &str) -> Option<(String, usize)> {
        let list = self
            .with_consumer("", |consumer| consumer.fetch_group_list(Some(group), CALL))
            .ok()?;
        let found = list.groups().first()?;
        Some((found.state().to_string(), found.members().len()))
    }

    /// Every record that is in the topic now, by partition and offset.
    pub fn read_all(&self, topic: &str) -> Vec<Record> {
        let ends: HashMap<i32, i64> = self.end_offsets(topic).into_iter().collect();
        let mut assignment = TopicPartitionList::new();
        let mut records = Vec::new();
        // A reader of its own: the shared ones must stay without an assignment.
        let reader: BaseConsumer = self
            .config()
            .set("group.id", "evrepl-lab.reader")
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            // The end of a partition is reported after one more fetch, which waits this long for records.
            .set("fetch.wait.max.ms", "10")
            .create()
            .expect("a reader's configuration is valid");
        for (&partition, &end) in &ends {
            if end > 0 {
                assignment
                    .add_partition_offset(topic, partition, Offset::Beginning)
                    .expect("an offset for the reader");
            }
        }
        let mut open = assignment.count();
        reader.assign(&assignment).expect("a reader may assign itself");
        let deadline = Instant::now() + CALL;
        while open > 0 {
            assert!(
                Instant::now() < deadline,
                "reading {topic} ended after {} of {ends:?}",
                records.len()
            );
            match reader.poll(Duration::from_millis(100)) {
                None => {}
                // Reached its end: whatever is there has been read, compacted and transaction markers included.
                Some(Err(KafkaError::PartitionEOF(_))) => open -= 1,
                Some(Err(error)) => panic!("reading {topic}: {error}"),
                Some(Ok(message)) => records.push(Record {
                    partition: message.partition(),
                    offset: message.offset(),
                    timestamp: message.timestamp().to_millis(),
                    key: message.key().map(<[u8]>::to_vec),
                    value: message.payload().map(<[u8]>::to_vec),
                    headers: message.headers().map_or_else(Vec::new, |headers| {
                        headers
                            .iter()
                            .map(|one| (one.key.to_string(), one.value.unwrap_or_default().to_vec()))
                            .collect()
                    }),
                }),
            }
        }
        records.sort_unstable_by_key(|record| (record.partition, record.offset));
        records
    }

    /// Writes one record and returns when Kafka has acknowledged it. Without a partition the key's hash chooses.
    pub fn produce(&self, topic: &str, partition: Option<i32>, key: &[u8], value: &[u8], headers: &[(&str, &[u8])]) {
        let producer = self.producer(&[]);
        producer.send(Outgoing {
            partition,
            headers,
            ..Outgoing::new(topic, key, value)
        });
        producer.flush();
    }

    /// A producer for many records; `properties` are librdkafka's, such as `("partitioner", "murmur2_random")`. A broker that
    /// dies under it may leave a record twice, as with most applications; `("enable.idempotence", "true")` prevents that.
    pub fn producer(&self, properties: &[(&str, &str)]) -> Producer {
        Producer::new(self.config(), properties)
    }

    fn await_partitions(&self, topic: &str, count: usize) {
        crate::wait::wait_until(&format!("{topic} has {count} partitions"), CALL, || {
            self.partitions(topic).len() >= count
        });
    }

    fn with_consumer<T>(&self, group: &str, act: impl FnOnce(&BaseConsumer) -> T) -> T {
        let mut consumers = self.consumers.lock().unwrap_or_else(PoisonError::into_inner);
        let consumer = consumers.entry(group.to_string()).or_insert_with(|| {
            let mut config = self.config();
            if !group.is_empty() {
                config.set("group.id", group);
            }
            config
                .set("enable.auto.commit", "false")
                .create()
                .expect("a looking consumer's configuration is valid")
        });
        act(consumer)
    }

    /// Repeats a question that may fail while a restarted broker finds its feet: its old connections die one by one, and its
    /// group coordinator loads for a moment. Each time from a new client, since librdkafka 2.12 may have lost its last broker
    /// for good (its issue 5301). Panics when that takes longer than [`CALL`].
    fn patiently<T>(&self, group: &str, what: &str, ask: impl Fn(&BaseConsumer, Duration) -> KafkaResult<T>) -> T {
        let deadline = Instant::now() + CALL;
        loop {
            match self.with_consumer(group, |consumer| ask(consumer, CALL / 3)) {
                Ok(answer) => return answer,
                Err(error) if Instant::now() >= deadline => panic!("{what}: {error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
            self.forget(group);
        }
    }

    /// The next question comes from a new client.
    fn forget(&self, group: &str) {
        let mut consumers = self.consumers.lock().unwrap_or_else(PoisonError::into_inner);
        consumers.remove(group);
    }

    fn admin_client(&self) -> (AdminClient<DefaultClientContext>, AdminOptions) {
        let admin = self.config().create();
        let options = AdminOptions::new()
            .request_timeout(Some(CALL))
            .operation_timeout(Some(CALL));
        (admin.expect("an admin client's configuration is valid"), options)
    }

    fn admin(
        &self,
        topic: &str,
        act: impl Fn(&AdminClient<DefaultClientContext>, &AdminOptions) -> KafkaResult<Vec<TopicResult>>,
    ) {
        let (admin, options) = self.admin_client();
        for result in act(&admin, &options).unwrap_or_else(|error| panic!("changing topic {topic}: {error}")) {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((_, code)) => panic!("changing topic {topic}: {code}"),
            }
        }
    }
}

/// The admin client's own thread completes its futures; this only waits for one.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime to wait in")
        .block_on(future)
}
