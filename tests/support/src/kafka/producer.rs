//! Writing to Kafka: every record is delivered, or the test panics.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{DeliveryResult, Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, ProducerContext, ThreadedProducer};
use rdkafka::{ClientConfig, ClientContext};

/// A delivery that takes longer than this has failed; longer than any broker outage that a test makes.
const DELIVERY: Duration = Duration::from_secs(120);

/// A record to be written.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    pub topic: &'a str,
    /// `None`: the key's hash chooses.
    pub partition: Option<i32>,
    pub key: Option<&'a [u8]>,
    pub value: Option<&'a [u8]>,
    pub headers: &'a [(&'a str, &'a [u8])],
    /// Milliseconds since the Unix epoch; `None`: now.
    pub timestamp: Option<i64>,
}

impl<'a> Outgoing<'a> {
    pub fn new(topic: &'a str, key: &'a [u8], value: &'a [u8]) -> Outgoing<'a> {
        Outgoing {
            topic,
            partition: None,
            key: Some(key),
            value: Some(value),
            headers: &[],
            timestamp: None,
        }
    }
}

#[derive(Debug, Default)]
struct Deliveries {
    sent: AtomicU64,
    delivered: AtomicU64,
    failed: AtomicU64,
}

#[derive(Clone)]
struct Counting(Arc<Deliveries>);

impl ClientContext for Counting {}

impl ProducerContext for Counting {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        let counter = if result.is_ok() {
            &self.0.delivered
        } else {
            &self.0.failed
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Writes records in batches, in the order they are given per partition.
pub struct Producer {
    inner: ThreadedProducer<Counting>,
    deliveries: Arc<Deliveries>,
}

impl Producer {
    pub(super) fn new(mut config: ClientConfig, properties: &[(&str, &str)]) -> Producer {
        config
            // In order, also when a request is repeated. Not idempotent: getting a producer id takes up to a second.
            .set("acks", "all")
            .set("max.in.flight.requests.per.connection", "1")
            .set("linger.ms", "1")
            .set("batch.num.messages", "10000")
            .set("queue.buffering.max.messages", "500000")
            .set("message.timeout.ms", DELIVERY.as_millis().to_string());
        for (key, value) in properties {
            config.set(*key, *value);
        }
        let deliveries = Arc::<Deliveries>::default();
        let inner = config
            .create_with_context(Counting(Arc::clone(&deliveries)))
            .unwrap_or_else(|error| panic!("a producer with {properties:?}: {error}"));
        Producer { inner, deliveries }
    }

    /// Takes a record, waiting while librdkafka's own queue is full.
    ///
    /// # Panics
    /// When librdkafka refuses it, or its queue stays full for two minutes.
    pub fn send(&self, outgoing: Outgoing<'_>) {
        let mut record = BaseRecord::<[u8], [u8]>::to(outgoing.topic);
        record.key = outgoing.key;
        record.payload = outgoing.value;
        record.partition = outgoing.partition;
        record.timestamp = outgoing.timestamp;
        if !outgoing.headers.is_empty() {
            let headers = OwnedHeaders::new_with_capacity(outgoing.headers.len());
            let insert = |headers: OwnedHeaders, (key, value): &(&str, &[u8])| {
                headers.insert(Header {
                    key,
                    value: Some(*value),
                })
            };
            record.headers = Some(outgoing.headers.iter().fold(headers, insert));
        }
        let deadline = Instant::now() + DELIVERY;
        loop {
            match self.inner.send(record) {
                Ok(()) => {
                    self.deliveries.sent.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), again))
                    if Instant::now() < deadline =>
                {
                    record = again;
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err((error, _)) => panic!("producing to {}: {error}", outgoing.topic),
            }
        }
    }

    /// Returns when everything taken so far is acknowledged.
    ///
    /// # Panics
    /// When a record could not be delivered.
    pub fn flush(&self) {
        let Deliveries {
            sent,
            delivered,
            failed,
        } = &*self.deliveries;
        let sent = sent.load(Ordering::Relaxed);
        let deadline = Instant::now() + 2 * DELIVERY;
        while delivered.load(Ordering::Relaxed) + failed.load(Ordering::Relaxed) < sent {
            assert!(
                Instant::now() < deadline,
                "librdkafka tells nothing of some of {sent} records"
            );
            // Not rust-rdkafka's own flush, which looks again only every 100 ms when its polling thread took the event.
            self.inner.poll(Duration::from_millis(1));
        }
        let failed = failed.load(Ordering::Relaxed);
        assert_eq!(failed, 0, "{failed} records were not delivered");
    }

    /// How many records Kafka has neither acknowledged nor, in the end, refused.
    pub fn under_way(&self) -> u64 {
        let Deliveries {
            sent,
            delivered,
            failed,
        } = &*self.deliveries;
        let ended = delivered.load(Ordering::Relaxed) + failed.load(Ordering::Relaxed);
        sent.load(Ordering::Relaxed).saturating_sub(ended)
    }

    /// How many records Kafka has acknowledged.
    pub fn delivered(&self) -> u64 {
        self.deliveries.delivered.load(Ordering::Relaxed)
    }
}

impl std::fmt::Debug for Producer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Producer")
            .field("delivered", &self.delivered())
            .finish_non_exhaustive()
    }
}
