//! The application of a load run: writes memcached in pipelined batches, then produces the events.
//!
//! It must cost little beside what it measures, so it knows nothing but sets of keys that are numbers.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use evrepl::event::{self, Event, Op};
use evrepl_lab::{CacheClient, Put, Region};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::DeliveryResult;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer, ProducerContext};
use rdkafka::{ClientConfig, ClientContext};

use crate::latency::Latencies;
use crate::pace::{due, due_by};
use crate::values;

/// Bytes of a key: a prefix and ten digits.
pub const KEY_BYTES: usize = 15;

/// How many writes go to memcached at once when all may be written at full speed.
const FILL: u64 = 1_024;

/// How long Kafka may take for what is still under way.
const FLUSHED_WITHIN: Duration = Duration::from_secs(120);

/// An open-loop tick: shorter ones would cost more in system calls than in writes, longer ones would show in the latency.
const TICK: Duration = Duration::from_millis(1);

/// The key of write `number`: `load:` and ten digits.
pub fn key(number: u64) -> [u8; KEY_BYTES] {
    let mut key = *b"load:0000000000";
    let mut rest = number;
    for digit in key[5..].iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    key
}

#[derive(Default)]
struct Deliveries {
    done: AtomicU64,
    failed: AtomicU64,
}

struct Counting(Arc<Deliveries>);

impl ClientContext for Counting {}

impl ProducerContext for Counting {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        self.0.done.fetch_add(1, Ordering::Relaxed);
        if result.is_err() {
            self.0.failed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Writes cache `sessions` of a region.
pub struct Source {
    client: CacheClient,
    producer: BaseProducer<Counting>,
    deliveries: Arc<Deliveries>,
    topic: String,
    event: Vec<u8>,
    value_bytes: usize,
    sent: u64,
    keys: Vec<u8>,
    values: Vec<u8>,
}

impl Source {
    /// # Panics
    /// When librdkafka refuses the producer's properties.
    pub fn new(region: &Region, value_bytes: usize) -> Source {
        let cache = region.cache("sessions");
        let deliveries = Arc::<Deliveries>::default();
        let mut config: ClientConfig = region.kafka().config();
        config
            .set("acks", "all")
            // As evrepl's own Writer: an event waits a millisecond for others.
            .set("linger.ms", "1")
            .set("queue.buffering.max.messages", "1000000");
        let producer = config.create_with_context(Counting(Arc::clone(&deliveries)));
        let mut event = Vec::new();
        // With the version that a real writer's event carries; which one makes no difference to its length.
        let ver = Some(1_700_000_000_000 << 16);
        event::encode(
            &Event {
                ver,
                ..Event::new(Op::Set)
            },
            &mut event,
        );
        Source {
            client: cache.client(),
            producer: producer.unwrap_or_else(|error| panic!("a producer for the load: {error}")),
            deliveries,
            topic: cache.topic.clone(),
            event,
            value_bytes,
            sent: 0,
            keys: Vec::new(),
            values: Vec::new(),
        }
    }

    /// Writes these numbers as fast as it can; `progress` hears how far it is, and says whether to stop.
    pub fn fill(&mut self, numbers: Range<u64>, mut progress: impl FnMut(u64) -> bool) {
        let mut from = numbers.start;
        while from < numbers.end && !progress(from - numbers.start) {
            let to = numbers.end.min(from + FILL);
            self.write(from..to);
            from = to;
        }
        self.flush();
    }

    /// Writes these numbers at `rate` a second from `start` on, each when it is due or, after a delay, at once. Returns how
    /// late the writes began.
    pub fn open_loop(
        &mut self,
        numbers: Range<u64>,
        rate: u64,
        start: Instant,
        mut progress: impl FnMut(u64) -> bool,
    ) -> Latencies {
        let mut late = Latencies::default();
        let count = numbers.end - numbers.start;
        let mut done = 0;
        while done < count && !progress(done) {
            let now = Instant::now();
            let wait = (start + due(done, rate)).saturating_duration_since(now);
            if !wait.is_zero() {
                std::thread::sleep(wait.max(TICK));
                continue;
            }
            let elapsed = now.duration_since(start);
            let to = due_by(elapsed, rate).min(count).min(done + FILL);
            for index in done..to {
                late.record(elapsed.saturating_sub(due(index, rate)));
            }
            self.write(numbers.start + done..numbers.start + to);
            done = to;
        }
        self.flush();
        late
    }

    /// memcached first; the events when it has answered.
    fn write(&mut self, numbers: Range<u64>) {
        self.keys.clear();
        self.values.clear();
        for number in numbers.clone() {
            self.keys.extend_from_slice(&key(number));
            values::append(&mut self.values, number, self.value_bytes);
        }
        // Not by chunks of the values, which may be empty.
        let puts: Vec<Put<'_>> = (0..numbers.end - numbers.start)
            .map(|index| {
                let index = index as usize;
                Put {
                    key: &self.keys[index * KEY_BYTES..][..KEY_BYTES],
                    value: &self.values[index * self.value_bytes..][..self.value_bytes],
                    flags: flags(numbers.start + index as u64),
                    exptime: 0,
                }
            })
            .collect();
        if let Err(error) = self.client.set_many(&puts) {
            panic!("writing memcached: {error}");
        }
        for put in &puts {
            let mut record = BaseRecord::to(&self.topic).key(put.key).payload(&self.event[..]);
            loop {
                match self.producer.send(record) {
                    Ok(()) => break,
                    Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), again)) => {
                        record = again;
                        self.producer.poll(TICK);
                    }
                    Err((error, _)) => panic!("producing to {}: {error}", self.topic),
                }
            }
        }
        self.sent += puts.len() as u64;
        self.producer.poll(Duration::ZERO);
    }

    /// Returns when Kafka has acknowledged everything so far.
    fn flush(&self) {
        let flushed = self.producer.flush(FLUSHED_WITHIN);
        let (done, failed) = (&self.deliveries.done, &self.deliveries.failed);
        let (done, failed) = (done.load(Ordering::Relaxed), failed.load(Ordering::Relaxed));
        assert!(
            flushed.is_ok() && done == self.sent && failed == 0,
            "kafka acknowledged {} of {} events: {flushed:?}",
            done - failed,
            self.sent
        );
    }

    /// How many were written so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }
}

/// The flags of write `number`: all bits of its low half.
pub fn flags(number: u64) -> u32 {
    number as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_distinct_and_of_one_length() {
        assert_eq!(&key(0), b"load:0000000000");
        assert_eq!(&key(1_234_567_890), b"load:1234567890");
        assert_ne!(key(500_000), key(499_999));
    }
}
