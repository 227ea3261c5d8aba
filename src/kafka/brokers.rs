//! Brokers that a client has forgotten, and a commit that does not wait for them for long.
//!
//! Kafka's answer to a question for topics names the brokers that are there: none, when it comes from the only one and that was
//! fenced for a moment (a pause of some seconds is enough). librdkafka 2.12 then forgets every broker it knows and never asks
//! again (its issue 5301). Reminded of its first brokers, it goes on where it was.

use std::ffi::CString;
use std::net::{TcpStream, ToSocketAddrs};
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rdkafka::TopicPartitionList;
use rdkafka::bindings as ffi;
use rdkafka::client::{Client, ClientContext};
use rdkafka::error::{KafkaError as RdKafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::types::RDKafkaRespErr;
use tokio::time::Instant;

use crate::config::Kafka;

/// Between two reminders of a client. Each stays in it, some tens of bytes, and costs it a connection until a broker answers.
const REMIND_EVERY: Duration = Duration::from_secs(2);
/// The same after [`MANY`] in a row, which have not helped.
const REMIND_RARELY: Duration = Duration::from_secs(30);
/// As long as it takes until there are new clients where brokers can be reached.
const MANY: u32 = 10;

/// The brokers of the configuration, for a client that may have forgotten them.
pub(super) struct FirstBrokers {
    addresses: Vec<String>,
    list: Option<CString>,
    reminded: Mutex<Reminded>,
}

#[derive(Default)]
struct Reminded {
    at: Option<Instant>,
    in_a_row: u32,
}

impl Reminded {
    /// Whether it is time again; then it is done.
    fn due(&mut self, now: Instant) -> bool {
        let ago = self.at.map(|at| now.saturating_duration_since(at));
        let every = if self.in_a_row < MANY {
            REMIND_EVERY
        } else {
            REMIND_RARELY
        };
        if ago.is_some_and(|ago| ago < every) {
            return false;
        }
        (self.at, self.in_a_row) = (Some(now), self.in_a_row + 1);
        true
    }
}

#[allow(unsafe_code, reason = "rust-rdkafka has no binding for rd_kafka_brokers_add")]
impl FirstBrokers {
    pub fn of(kafka: &Kafka) -> FirstBrokers {
        FirstBrokers {
            addresses: kafka.brokers.clone(),
            list: CString::new(kafka.brokers.join(",")).ok(),
            reminded: Mutex::default(),
        }
    }

    /// Names them to a client that hears of no broker; not more often than is good for it.
    pub fn remind<C: ClientContext>(&self, client: &Client<C>) {
        let mut reminded = self.reminded.lock().unwrap_or_else(PoisonError::into_inner);
        if reminded.due(Instant::now())
            && let Some(list) = &self.list
        {
            // SAFETY: the client is alive, and it copies the list.
            unsafe { ffi::rd_kafka_brokers_add(client.native_ptr(), list.as_ptr()) };
        }
    }

    /// A broker was heard of: the next trouble is another one.
    pub fn heard(&self) {
        self.reminded.lock().unwrap_or_else(PoisonError::into_inner).in_a_row = 0;
    }

    /// Whether one of them accepts a connection, each within `limit`. Blocks.
    pub fn one_is_there(&self, limit: Duration) -> bool {
        let addresses = self.addresses.iter().filter_map(|broker| broker.to_socket_addrs().ok());
        addresses
            .flatten()
            .any(|address| TcpStream::connect_timeout(&address, limit).is_ok())
    }
}

/// Commits offsets and waits for the answer, up to `limit`: librdkafka's own waits for a coordinator as long as a session takes,
/// and much longer for an answer. A commit that was given up may still arrive, also behind a later one of the same thread: what
/// lies between is read again then, unless the next commit comes first.
///
/// # Errors
/// What the broker has said, or that it has said nothing.
#[allow(unsafe_code, reason = "rust-rdkafka has no binding for rd_kafka_commit_queue")]
pub(super) fn commit_within<C: ClientContext>(
    client: &Client<C>,
    offsets: &TopicPartitionList,
    limit: Duration,
) -> KafkaResult<()> {
    let client = client.native_ptr();
    // SAFETY: the client is alive, the offsets outlive the call, which copies them. Queue and event are each let go of once;
    // an answer that comes after the queue's end is let go of by librdkafka.
    unsafe {
        let Some(queue) = NonNull::new(ffi::rd_kafka_queue_new(client)) else {
            return Err(RdKafkaError::ConsumerCommit(RDKafkaErrorCode::OperationTimedOut));
        };
        let asked = ffi::rd_kafka_commit_queue(client, offsets.ptr(), queue.as_ptr(), None, std::ptr::null_mut());
        let mut said = asked;
        if asked == RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
            let answer = ffi::rd_kafka_queue_poll(queue.as_ptr(), limit.as_millis().clamp(1, 1 << 30) as i32);
            said = match answer.is_null() {
                true => RDKafkaRespErr::RD_KAFKA_RESP_ERR__TIMED_OUT,
                false => ffi::rd_kafka_event_error(answer),
            };
            ffi::rd_kafka_event_destroy(answer);
        }
        ffi::rd_kafka_queue_destroy(queue.as_ptr());
        match said {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR => Ok(()),
            code => Err(RdKafkaError::ConsumerCommit(code.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reminders_get_rare_while_they_do_not_help_and_are_frequent_in_a_new_trouble() {
        let (start, mut reminded, mut times) = (Instant::now(), Reminded::default(), Vec::new());
        for second in 0..100 {
            if reminded.due(start + Duration::from_secs(second)) {
                times.push(second);
            }
        }
        assert_eq!(times, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 48, 78]);
        reminded.in_a_row = 0;
        for (second, due) in [(100, true), (101, false), (102, true)] {
            assert_eq!(reminded.due(start + Duration::from_secs(second)), due, "{second}");
        }
    }
}
