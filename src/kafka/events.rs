//! Producing events as fast as writes come: no future for each, no allocation of ours, the outcome by callback.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rdkafka::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::{KafkaError as RdKafkaError, RDKafkaErrorCode};
use rdkafka::message::{DeliveryResult, Header, Message, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ThreadedProducer};

use crate::config::Kafka;

use super::{FirstBrokers, IN_FLIGHT, KafkaError, SetIfAbsent, client_config, end_elsewhere, log_librdkafka};

/// Hears what became of each record. Called on librdkafka's thread: it must not wait.
pub trait Delivery: Send + Sync + 'static {
    /// Kafka has acknowledged the record that was produced with this token, to this topic.
    fn delivered(&self, token: usize, topic: &str);
    /// It has not, and will not be asked again: the record's topic, key and value come back.
    fn failed(&self, token: usize, topic: &str, key: &[u8], value: &[u8], error: KafkaError);
}

/// Why a record was not taken.
#[derive(Debug)]
pub enum NotTaken {
    /// As many records wait as may.
    Full,
    /// librdkafka refuses it.
    Refused(KafkaError),
}

struct Context {
    delivery: Arc<dyn Delivery>,
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, fac: &str, message: &str) {
        log_librdkafka(level, fac, message);
    }
    fn error(&self, error: RdKafkaError, reason: &str) {
        tracing::debug!(error = %error, reason, "kafka producer of events");
    }
}

impl rdkafka::producer::ProducerContext for Context {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, token: usize) {
        match result {
            Ok(message) => self.delivery.delivered(token, message.topic()),
            Err((error, message)) => {
                let (key, value) = (message.key().unwrap_or_default(), message.payload().unwrap_or_default());
                let error = KafkaError::from(error.clone());
                self.delivery.failed(token, message.topic(), key, value, error);
            }
        }
    }
}

type Inner = ThreadedProducer<Context>;

/// Of a producer of events.
pub(super) fn events_config(
    kafka: &Kafka,
    client_id: &str,
    max_events: usize,
    timeout: Duration,
    linger: Duration,
) -> ClientConfig {
    let mut config = client_config(kafka, client_id);
    config
        .set("queue.buffering.max.messages", max_events.to_string())
        .set("message.timeout.ms", timeout.as_millis().to_string())
        // An event is some 60 bytes, a key at most 250 more.
        .set_if_absent(
            kafka,
            "queue.buffering.max.kbytes",
            &(max_events / 2).max(1024).to_string(),
        )
        .set_if_absent(kafka, "linger.ms", &(linger.as_secs_f64() * 1000.0).to_string())
        .set_if_absent(kafka, IN_FLIGHT.0, IN_FLIGHT.1)
        .set_if_absent(kafka, "batch.num.messages", "10000");
    config
}

/// See the module. Made once; each thread that produces has an [`EventSender`] of its own.
pub struct EventProducer {
    config: ClientConfig,
    first_brokers: FirstBrokers,
    delivery: Arc<dyn Delivery>,
    current: RwLock<Arc<Inner>>,
    /// Which of them it is.
    generation: AtomicU64,
}

impl EventProducer {
    /// A producer that waits for every in-sync replica, of whose records `max_events` may wait, each for `timeout`; one waits
    /// `linger` for others that go along.
    ///
    /// # Errors
    /// [`KafkaError::Settings`] when librdkafka refuses a property.
    pub fn new(
        kafka: &Kafka,
        client_id: &str,
        max_events: usize,
        timeout: Duration,
        linger: Duration,
        delivery: Arc<dyn Delivery>,
    ) -> Result<Arc<EventProducer>, KafkaError> {
        let config = events_config(kafka, client_id, max_events, timeout, linger);
        let producer = config.create_with_context(Context {
            delivery: delivery.clone(),
        })?;
        Ok(Arc::new(EventProducer {
            config,
            first_brokers: FirstBrokers::of(kafka),
            delivery,
            current: RwLock::new(Arc::new(producer)),
            generation: AtomicU64::new(0),
        }))
    }

    /// For one thread.
    pub fn sender(self: &Arc<Self>) -> EventSender {
        EventSender {
            current: self.current(),
            generation: self.generation.load(SeqCst),
            producer: self.clone(),
        }
    }

    fn current(&self) -> Arc<Inner> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Nothing is heard of Kafka: the producer may have forgotten its brokers, and is reminded, however often this is called.
    pub fn remind(&self) {
        self.first_brokers.remind(self.current().client());
    }

    /// Something was heard of it again.
    pub fn heard(&self) {
        self.first_brokers.heard();
    }

    /// Puts a new one in its place: librdkafka may have lost its brokers for good (see [`KafkaError::Lost`]), and when it has
    /// not, a new one is no worse. What the old one holds still fails or arrives.
    ///
    /// # Errors
    /// [`KafkaError::Settings`]: then the old one stays.
    pub fn renew(&self) -> Result<(), KafkaError> {
        let context = Context {
            delivery: self.delivery.clone(),
        };
        let new = Arc::new(self.config.create_with_context(context)?);
        let old = std::mem::replace(&mut *self.current.write().unwrap_or_else(PoisonError::into_inner), new);
        self.generation.fetch_add(1, SeqCst);
        // Its end waits for what it had.
        end_elsewhere(old);
        Ok(())
    }
}

/// Produces events, from one thread.
pub struct EventSender {
    producer: Arc<EventProducer>,
    current: Arc<Inner>,
    generation: u64,
}

impl EventSender {
    /// Hands one event over, with its `traceparent` if it has one. `token` comes back with its outcome.
    ///
    /// # Errors
    /// [`NotTaken`]; nothing comes back then.
    pub fn send(
        &mut self,
        topic: &str,
        key: &[u8],
        value: &[u8],
        traceparent: Option<&[u8]>,
        token: usize,
    ) -> Result<(), NotTaken> {
        let generation = self.producer.generation.load(Relaxed);
        if generation != self.generation {
            let old = std::mem::replace(&mut self.current, self.producer.current());
            self.generation = generation;
            // If this was its last user, its end waits for what it had.
            end_elsewhere(old);
        }
        let mut record = BaseRecord::<[u8], [u8], usize>::with_opaque_to(topic, token)
            .key(key)
            .payload(value);
        if let Some(trace) = traceparent {
            record = record.headers(OwnedHeaders::new_with_capacity(1).insert(Header {
                key: "traceparent",
                value: Some(trace),
            }));
        }
        match self.current.send(record) {
            Ok(()) => Ok(()),
            Err((RdKafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), _)) => Err(NotTaken::Full),
            Err((error, _)) => Err(NotTaken::Refused(error.into())),
        }
    }
}
