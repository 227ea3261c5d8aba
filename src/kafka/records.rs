//! Records in batches: one queue of our own for the records of all assigned partitions, emptied many at a time.
//!
//! librdkafka hands an application one record a call, each wrapped in an event, with an allocation, two clock readings and
//! several locks: 0.7 CPU seconds per million records, twice what the rest of consuming costs.
//! `rd_kafka_consume_batch_queue` does without them, but on the *consumer's* queue it also swallows the rebalance events that
//! rust-rdkafka waits for. So the partitions are forwarded to this queue, before they are assigned, and the consumer's queue
//! keeps the events. librdkafka leaves a queue alone that the application has forwarded, and drops records of an assignment
//! that is over by itself.

use std::ffi::{CStr, CString};
use std::marker::PhantomData;
use std::os::raw::c_char;
use std::ptr::{self, NonNull};
use std::time::Duration;

use rdkafka::bindings as ffi;
use rdkafka::error::{KafkaError as RdKafkaError, RDKafkaErrorCode};
use rdkafka::message::BorrowedMessage;
use rdkafka::types::{RDKafka, RDKafkaMessage, RDKafkaRespErr};

use super::{KafkaError, TopicPartition};

/// The most records that are taken at once: by then what a call costs is spread thin, and as much memory is held twice for a
/// moment.
pub const MAX_BATCH: usize = 1024;

/// A record, borrowed from librdkafka.
pub struct Record<'a> {
    message: NonNull<RDKafkaMessage>,
    held: Held<'a>,
}

/// Who lets go of a message.
enum Held<'a> {
    /// The record.
    Here(PhantomData<&'a ()>),
    /// rust-rdkafka.
    There(#[allow(dead_code, reason = "held for its end")] BorrowedMessage<'a>),
}

#[allow(
    unsafe_code,
    reason = "rust-rdkafka has no batches, and its messages are no others than these"
)]
impl<'a> Record<'a> {
    pub(super) fn of(message: BorrowedMessage<'a>) -> Option<Record<'a>> {
        Some(Record {
            message: NonNull::new(message.ptr())?,
            held: Held::There(message),
        })
    }

    fn raw(&self) -> &RDKafkaMessage {
        // SAFETY: a message lives until it is let go of, which is when this is dropped, and nobody else has it.
        unsafe { self.message.as_ref() }
    }

    /// The topic's name; empty for one that is no text, which no topic of Kafka is.
    pub fn topic(&self) -> &str {
        // SAFETY: the message holds its topic, and the topic its name, which is a C string.
        let name = unsafe { CStr::from_ptr(ffi::rd_kafka_topic_name(self.raw().rkt)) };
        name.to_str().unwrap_or_default()
    }

    /// The same for all records of a topic of one consumer, and different from those of its other topics.
    pub fn topic_id(&self) -> usize {
        self.raw().rkt as usize
    }

    /// The partition's number.
    pub fn partition(&self) -> i32 {
        self.raw().partition
    }

    /// The record's offset in its partition.
    pub fn offset(&self) -> i64 {
        self.raw().offset
    }

    /// The record's key, if it has one.
    pub fn key(&self) -> Option<&[u8]> {
        slice(self.raw().key.cast(), self.raw().key_len)
    }

    /// The record's value, if it has one.
    pub fn value(&self) -> Option<&[u8]> {
        slice(self.raw().payload.cast(), self.raw().len)
    }

    /// Milliseconds since the epoch; 0 when the broker does not know.
    pub fn timestamp_ms(&self) -> i64 {
        let mut kind = ffi::rd_kafka_timestamp_type_t::RD_KAFKA_TIMESTAMP_NOT_AVAILABLE;
        // SAFETY: the message is alive, and the kind is written before the call returns.
        let at = unsafe { ffi::rd_kafka_message_timestamp(self.message.as_ptr(), &mut kind) };
        at.max(0)
    }

    /// The record's headers, in order.
    pub fn for_each_header(&self, mut each: impl FnMut(&str, &[u8])) {
        let mut headers = ptr::null_mut();
        // SAFETY: the message is alive. It keeps its headers, which are read from it at the first call.
        let found = unsafe { ffi::rd_kafka_message_headers(self.message.as_ptr(), &mut headers) };
        if found != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
            return;
        }
        for index in 0.. {
            let (mut name, mut value, mut length) = (ptr::null::<c_char>(), ptr::null(), 0);
            // SAFETY: as above; name and value are of the message and are only read before it ends.
            let found = unsafe { ffi::rd_kafka_header_get_all(headers, index, &mut name, &mut value, &mut length) };
            if found != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
                return;
            }
            // SAFETY: a header's name is a C string.
            let name = unsafe { CStr::from_ptr(name) };
            each(&name.to_string_lossy(), slice(value.cast(), length).unwrap_or_default());
        }
    }

    fn error(&self) -> Option<KafkaError> {
        let code = self.raw().err;
        (code != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR)
            .then(|| RdKafkaError::MessageConsumption(RDKafkaErrorCode::from(code)).into())
    }
}

#[allow(unsafe_code, reason = "see Record")]
impl Drop for Record<'_> {
    fn drop(&mut self) {
        if let Held::Here(_) = self.held {
            // SAFETY: it was taken off the queue for us alone, and this is its only end.
            unsafe { ffi::rd_kafka_message_destroy(self.message.as_ptr()) };
        }
    }
}

#[allow(unsafe_code, reason = "see Record")]
fn slice<'a>(at: *const u8, length: usize) -> Option<&'a [u8]> {
    // SAFETY: key, value and header values are `length` bytes of their message; the callers bind the lifetime to it.
    (!at.is_null()).then(|| unsafe { std::slice::from_raw_parts(at, length) })
}

/// Room for what is taken at once, kept from call to call.
#[derive(Default)]
pub struct Scratch(Vec<*mut RDKafkaMessage>);

/// The queue of all records.
pub(super) struct RecordQueue {
    queue: NonNull<ffi::rd_kafka_queue_t>,
}

// SAFETY: librdkafka's queues may be used from any thread, from several at once.
#[allow(unsafe_code, reason = "see above")]
unsafe impl Send for RecordQueue {}
#[allow(unsafe_code, reason = "see above")]
unsafe impl Sync for RecordQueue {}

#[allow(unsafe_code, reason = "rust-rdkafka has none of these calls")]
impl RecordQueue {
    /// A queue of this client, which must outlive it.
    pub fn new(client: *mut RDKafka) -> Option<RecordQueue> {
        // SAFETY: the client is alive.
        let queue = NonNull::new(unsafe { ffi::rd_kafka_queue_new(client) })?;
        Some(RecordQueue { queue })
    }

    /// Has the records of a partition come here from its next assignment on. To be called before each.
    pub fn collect(&self, client: *mut RDKafka, at: &TopicPartition) {
        let Ok(topic) = CString::new(at.topic.as_str()) else {
            return;
        };
        // SAFETY: client and name are alive during the calls; the handle on the partition's queue is given back.
        unsafe {
            let partition = ffi::rd_kafka_queue_get_partition(client, topic.as_ptr(), at.partition);
            if !partition.is_null() {
                ffi::rd_kafka_queue_forward(partition, self.queue.as_ptr());
                ffi::rd_kafka_queue_destroy(partition);
            }
        }
    }

    /// Takes up to `most` records, waiting up to `wait` for the first.
    pub fn take<'a>(&'a self, Scratch(scratch): &'a mut Scratch, most: usize, wait: Duration) -> Batch<'a> {
        scratch.clear();
        scratch.resize(most.clamp(1, MAX_BATCH), ptr::null_mut());
        let mut taken = 0;
        if !wait.is_zero() {
            // It waits until it has as many as were asked for: one, then what else is there.
            taken = self.take_into(&mut scratch[..1], wait);
        }
        if wait.is_zero() || (taken > 0 && scratch.len() > 1) {
            taken += self.take_into(&mut scratch[taken..], Duration::ZERO);
        }
        scratch.truncate(taken);
        Batch {
            messages: scratch.drain(..),
            queue: PhantomData,
        }
    }

    fn take_into(&self, into: &mut [*mut RDKafkaMessage], wait: Duration) -> usize {
        let wait_ms = wait.as_millis().min(60_000) as i32;
        // SAFETY: the queue is alive, and there is room for as many messages as is said.
        let taken =
            unsafe { ffi::rd_kafka_consume_batch_queue(self.queue.as_ptr(), wait_ms, into.as_mut_ptr(), into.len()) };
        // -1 says that the client has no such queue any more.
        usize::try_from(taken).unwrap_or(0)
    }
}

#[allow(unsafe_code, reason = "see RecordQueue")]
impl Drop for RecordQueue {
    fn drop(&mut self) {
        // SAFETY: nothing is taken any more. What comes for it from now on is let go of by librdkafka.
        unsafe { ffi::rd_kafka_queue_destroy(self.queue.as_ptr()) };
    }
}

/// Records that were taken together, in the order in which they came: of each partition in offset order.
pub struct Batch<'a> {
    messages: std::vec::Drain<'a, *mut RDKafkaMessage>,
    queue: PhantomData<&'a RecordQueue>,
}

impl Batch<'_> {
    /// How many are left.
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Whether none is left.
    pub fn is_empty(&self) -> bool {
        self.messages.len() == 0
    }
}

impl<'a> Iterator for Batch<'a> {
    type Item = Result<Record<'a>, KafkaError>;

    fn next(&mut self) -> Option<Self::Item> {
        let record = Record {
            message: NonNull::new(self.messages.next()?)?,
            held: Held::Here(PhantomData),
        };
        Some(match record.error() {
            Some(error) => Err(error),
            None => Ok(record),
        })
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}
