//! Events into Kafka as cheaply as librdkafka takes them: many with one call, and a report only of those that failed.
//!
//! `unsafe`, because rust-rdkafka has no call for many records.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use evrepl::event::{self, Event, Op};
use rdkafka::bindings::{
    RD_KAFKA_MSG_F_COPY, rd_kafka_message_t, rd_kafka_produce_batch, rd_kafka_resp_err_t, rd_kafka_topic_destroy,
    rd_kafka_topic_new, rd_kafka_topic_t,
};
use rdkafka::message::DeliveryResult;
use rdkafka::producer::{BaseProducer, Producer, ProducerContext};
use rdkafka::{ClientConfig, ClientContext};
use serde::{Deserialize, Serialize};

use super::keys::{KEY_BYTES, key};
use crate::values::Mixer;

/// How long Kafka may take for what is still under way.
const FLUSHED_WITHIN: Duration = Duration::from_secs(120);

/// How long it is waited for room in librdkafka's queue before the next try.
const ROOM: Duration = Duration::from_millis(1);

/// Where events go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// Bootstrap address.
    pub kafka: String,
    pub topic: String,
    pub partitions: i32,
    /// How long an event waits for others.
    pub linger_ms: f64,
}

/// Counts what could not be delivered.
struct Failures(Arc<AtomicU64>);

impl ClientContext for Failures {}

impl ProducerContext for Failures {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        self.0.fetch_add(u64::from(result.is_err()), Ordering::Relaxed);
    }
}

/// Produces the same event for many keys.
pub struct Events {
    producer: BaseProducer<Failures>,
    failed: Arc<AtomicU64>,
    topic: *mut rd_kafka_topic_t,
    event: Vec<u8>,
    /// The names of the keys of one call, by partition.
    names: Vec<Vec<u8>>,
    messages: Vec<rd_kafka_message_t>,
}

// SAFETY: librdkafka's topic handle may be used from any thread.
unsafe impl Send for Events {}

impl Events {
    /// # Panics
    /// When librdkafka refuses the producer's properties.
    pub fn new(target: &Target) -> Events {
        let failed = Arc::<AtomicU64>::default();
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &target.kafka)
            .set("acks", "all")
            .set("linger.ms", target.linger_ms.to_string())
            // As evrepl's own producers, for the reason that stands there (src/kafka.rs).
            .set("max.in.flight.requests.per.connection", "5")
            // What is delivered tells nobody: half of what a record costs. All that are not under way any more and not
            // failed are delivered.
            .set("delivery.report.only.error", "true")
            .set("queue.buffering.max.messages", "1000000");
        let producer: BaseProducer<Failures> = config
            .create_with_context(Failures(Arc::clone(&failed)))
            .unwrap_or_else(|error| panic!("a producer for the load: {error}"));
        let name = CString::new(target.topic.as_str()).expect("a topic's name has no zero byte");
        // SAFETY: the client lives in `producer`, which drops after `topic` is given back; the name is copied.
        let topic = unsafe { rd_kafka_topic_new(producer.client().native_ptr(), name.as_ptr(), std::ptr::null_mut()) };
        assert!(!topic.is_null(), "librdkafka knows no topic {}", target.topic);
        // With the version that a real writer's event carries; which one makes no difference to its length.
        let ver = Some(1_700_000_000_000 << 16);
        let mut encoded = Vec::new();
        event::encode(
            &Event {
                ver,
                ..Event::new(Op::Set)
            },
            &mut encoded,
        );
        Events {
            producer,
            failed,
            topic,
            event: encoded,
            names: vec![Vec::new(); target.partitions as usize],
            messages: Vec::new(),
        }
    }

    /// Takes an event for each of these keys; waits while librdkafka's queue is full.
    ///
    /// # Panics
    /// When librdkafka refuses one for good.
    pub fn produce(&mut self, keys: impl Iterator<Item = u64>) {
        for number in keys {
            let partition = partition_of(number, self.names.len());
            self.names[partition].extend_from_slice(&key(number));
        }
        for partition in 0..self.names.len() {
            let mut names = std::mem::take(&mut self.names[partition]);
            if !names.is_empty() {
                self.produce_to(partition as i32, &mut names);
                names.clear();
            }
            self.names[partition] = names;
        }
        self.producer.poll(Duration::ZERO);
    }

    fn produce_to(&mut self, partition: i32, names: &mut [u8]) {
        self.messages.clear();
        let event = &mut self.event;
        self.messages
            .extend(names.chunks_mut(KEY_BYTES).map(|name| rd_kafka_message_t {
                err: rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR,
                rkt: std::ptr::null_mut(),
                partition,
                payload: event.as_mut_ptr().cast(),
                len: event.len(),
                key: name.as_mut_ptr().cast(),
                key_len: name.len(),
                offset: 0,
                _private: std::ptr::null_mut(),
            }));
        while !self.messages.is_empty() {
            let count = self.messages.len();
            // SAFETY: the messages, and the keys and the event they point to, live through the call, which copies both.
            let taken = unsafe {
                rd_kafka_produce_batch(
                    self.topic,
                    partition,
                    RD_KAFKA_MSG_F_COPY,
                    self.messages.as_mut_ptr(),
                    count as i32,
                )
            };
            if taken as usize == count {
                break;
            }
            self.messages.retain_mut(|message| {
                let error = std::mem::replace(&mut message.err, rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR);
                let full = error == rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR__QUEUE_FULL;
                assert!(
                    full || error == rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR,
                    "an event was refused: {error:?}"
                );
                full
            });
            self.producer.poll(ROOM);
        }
    }

    /// Returns when Kafka has acknowledged everything so far.
    ///
    /// # Panics
    /// When it refuses something, or takes longer than two minutes.
    pub fn flush(&self) {
        let deadline = Instant::now() + FLUSHED_WITHIN;
        while self.producer.in_flight_count() > 0 && Instant::now() < deadline {
            self.producer.poll(ROOM);
        }
        let (left, failed) = (self.producer.in_flight_count(), self.failed.load(Ordering::Relaxed));
        assert!(
            left == 0 && failed == 0,
            "{failed} events were not delivered, {left} are under way after {FLUSHED_WITHIN:?}"
        );
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        // SAFETY: given back once, and not used after; the client still lives.
        unsafe { rd_kafka_topic_destroy(self.topic) };
    }
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

/// A key has one partition, as with any writer. Not librdkafka's own choice: that costs a look at the topic for each record.
fn partition_of(key: u64, partitions: usize) -> usize {
    Mixer::new(key).below(partitions as u64) as usize
}
