//! Parking: an event that has waited too long, or for which there is no room, goes to its peer's retry topic and frees the
//! watermark. It comes back from there after a while, and is looked at like any other.
//!
//! A retry record has the event's key, its headers and its value with `ver` and `origin` filled in, and three headers of its
//! own. Its timestamp is that of the parking: Kafka's retention counts from then. No I/O and no clock here.

use std::time::Duration;

use crate::backoff::doubled;
use crate::config::Config;
use crate::event::{self, Event, Op};
use crate::relay::{HeldEvent, ORIGIN_OTHER};

/// Header: when the event was produced, milliseconds since the epoch, decimal.
pub const PRODUCED_AT: &str = "evrepl-produced-at";
/// Header: not to be taken before this time, milliseconds since the epoch, decimal. Absent: at once.
pub const NOT_BEFORE: &str = "evrepl-not-before";
/// Header: how often the event has been parked, decimal. Absent: never, as in what `evrepl replay` writes.
pub const ATTEMPT: &str = "evrepl-attempt";

/// Headers of more bytes than this are not kept while an event waits, but for its trace: a waiting key must stay small.
pub const KEPT_HEADER_BYTES: usize = 4 << 10;

/// A record's headers, in order.
pub type Headers = Vec<(Box<str>, Box<[u8]>)>;

/// Headers as a producer takes them.
pub fn borrowed(headers: &[(Box<str>, Box<[u8]>)]) -> Vec<(&str, &[u8])> {
    headers.iter().map(|(name, value)| (&**name, &**value)).collect()
}

/// A header whose value is a number, decimal.
pub fn number(name: &str, value: i64) -> (Box<str>, Box<[u8]>) {
    (name.into(), value.to_string().into_bytes().into())
}

/// Whether a header is one that parking writes.
pub fn is_own(name: &str) -> bool {
    matches!(name, PRODUCED_AT | NOT_BEFORE | ATTEMPT)
}

/// What a retry record says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parked {
    /// When its event was produced.
    pub produced_at_ms: Option<i64>,
    /// Not to be taken before.
    pub not_before_ms: Option<i64>,
    /// How often it has been parked.
    pub attempt: u16,
}

impl Parked {
    /// Out of a record's headers; what cannot be read counts as absent.
    pub fn read(headers: &[(Box<str>, Box<[u8]>)]) -> Parked {
        let number = |value: &[u8]| std::str::from_utf8(value).ok()?.parse::<i64>().ok();
        let mut parked = Parked::default();
        for (name, value) in headers {
            match &**name {
                PRODUCED_AT => parked.produced_at_ms = number(value),
                NOT_BEFORE => parked.not_before_ms = number(value),
                ATTEMPT => {
                    parked.attempt = number(value).map_or(0, |attempt| attempt.clamp(0, i64::from(u16::MAX)) as u16);
                }
                _ => {}
            }
        }
        parked
    }

    /// How long it is still to wait at this wall-clock time; `None` when it is not.
    pub fn wait(&self, now_ms: i64) -> Option<Duration> {
        let left = self.not_before_ms?.saturating_sub(now_ms);
        u64::try_from(left)
            .ok()
            .filter(|left| *left > 0)
            .map(Duration::from_millis)
    }
}

/// A record for the retry topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetryRecord {
    /// Which topic.
    pub topic: String,
    /// The event, MessagePack.
    pub value: Vec<u8>,
    /// The event's own headers, then those of parking.
    pub headers: Headers,
}

impl RetryRecord {
    /// The event as it is parked at `now_ms` on the way to this peer, by the number it has in the configuration.
    pub fn of(held: &HeldEvent, config: &Config, peer: usize, now_ms: i64) -> RetryRecord {
        let cache = &config.caches[held.cache as usize];
        let extra = held.extra.as_deref();
        let origin = match held.origin {
            0 => config.region.as_str(),
            ORIGIN_OTHER => extra
                .and_then(|extra| extra.origin.as_deref())
                .unwrap_or(&config.region),
            peer => config.peers[peer as usize - 1].region.as_str(),
        };
        let event = Event {
            // A touch that stands for a write it superseded must not come back as a mere touch.
            op: if held.full && held.op == Op::Touch {
                Op::Set
            } else {
                held.op
            },
            ttl: held.ttl,
            ver: Some(held.ver),
            origin: Some(origin.into()),
            fill: held.fill,
        };
        let mut value = Vec::new();
        event::encode(&event, &mut value);
        let wait = doubled(
            config.flow.retry_backoff_initial,
            u32::from(held.parked),
            config.flow.retry_backoff_max,
        );
        let not_before = now_ms.saturating_add(wait.as_millis() as i64);
        let own = [
            (PRODUCED_AT, held.produced_at_ms),
            (NOT_BEFORE, not_before),
            (ATTEMPT, i64::from(held.parked.saturating_add(1))),
        ];
        // What is traced goes on being traced when it comes back, below the span of this attempt.
        let trace = held.trace.as_ref().filter(|trace| trace.exported);
        let trace = trace.map(|trace| trace.root_context().format());
        let kept = extra.into_iter().flat_map(|extra| &extra.headers);
        let kept = kept.filter(|(name, _)| !is_own(name) && (trace.is_none() || &**name != "traceparent"));
        let kept = kept.cloned();
        let own = own.map(|(name, value)| number(name, value));
        let trace = trace.map(|trace| ("traceparent".into(), Box::from(trace)));
        RetryRecord {
            topic: config.kafka.retry_topic_for(&cache.topic, &config.peers[peer].region),
            value,
            headers: kept.chain(own).chain(trace).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::poll_thread::RecordExtra;
    use crate::relay::Ticket;
    use bytes::Bytes;
    use std::sync::Arc;

    fn config() -> Config {
        let text = r#"
            region = "us-east-1"
            kafka = { brokers = ["127.0.0.1:9092"] }
            tls = { certificate = "a.pem", private_key = "a.key", ca = "ca.pem" }
            cache = [{ name = "sessions", topic = "s", servers = ["127.0.0.1:11211"] }]
            peer = [{ region = "eu-west-1", address = "127.0.0.1:7201" }, { region = "ap-south-1" }]
            flow = { retry_backoff_initial = "2s", retry_backoff_max = "5s" }"#;
        crate::config::parse(text, "/etc/evrepl.toml".as_ref(), std::iter::empty()).unwrap()
    }

    fn held(headers: &[(&str, &str)]) -> HeldEvent {
        let own = |(name, value): &(&str, &str)| (Box::from(*name), Box::from(value.as_bytes()));
        let headers: Headers = headers.iter().map(own).collect();
        HeldEvent {
            key: Bytes::from_static(b"k"),
            cache: 0,
            server: 0,
            op: Op::Touch,
            ttl: Some(60),
            ver: 7 << 16,
            origin: 2,
            produced_at_ms: 900,
            ticket: Ticket { consumer: 0, seq: 0 },
            attempts: 0,
            full: false,
            missed: false,
            probe: false,
            fill: true,
            parked: 0,
            dirty_since: None,
            extra: Some(Arc::new(RecordExtra {
                parked: Some(Parked::read(&headers)),
                headers,
                ..RecordExtra::default()
            })),
            taken: tokio::time::Instant::now(),
            trace: None,
        }
    }

    fn parked(event: &HeldEvent) -> (RetryRecord, Event, Parked) {
        let record = RetryRecord::of(event, &config(), 0, 1_000);
        let event = event::decode(&record.value).unwrap();
        let parked = Parked::read(&record.headers);
        (record, event, parked)
    }

    #[test]
    fn a_retry_record_is_the_event_with_version_and_origin_filled_in_and_its_headers_kept() {
        let (record, event, parked) = parked(&held(&[("traceparent", "00-1"), ("x-tenant", "7")]));
        assert_eq!(record.topic, "s.retry.eu-west-1");
        let names: Vec<&str> = record.headers.iter().map(|(name, _)| &**name).collect();
        assert_eq!(names, ["traceparent", "x-tenant", PRODUCED_AT, NOT_BEFORE, ATTEMPT]);
        assert_eq!(record.headers[1].1.as_ref(), b"7");
        assert_eq!(
            (event.op, event.ttl, event.ver, event.origin.as_deref(), event.fill),
            (Op::Touch, Some(60), Some(7 << 16), Some("ap-south-1"), true)
        );
        let wanted = Parked {
            produced_at_ms: Some(900),
            not_before_ms: Some(3_000),
            attempt: 1,
        };
        assert_eq!(parked, wanted);
    }

    #[test]
    fn parked_again_it_waits_twice_as_long_up_to_the_limit_and_its_own_headers_do_not_pile_up() {
        let mut event = held(&[(PRODUCED_AT, "900"), (NOT_BEFORE, "950"), (ATTEMPT, "1")]);
        event.parked = 1;
        let (record, _, parked) = parked(&event);
        assert_eq!((record.headers.len(), parked.attempt), (3, 2));
        assert_eq!(parked.not_before_ms, Some(1_000 + 4_000));
        event.parked = 60_000;
        assert_eq!(super::tests::parked(&event).2.not_before_ms, Some(1_000 + 5_000));
        event.parked = u16::MAX;
        assert_eq!(super::tests::parked(&event).2.attempt, u16::MAX);
    }

    #[test]
    fn a_touch_that_stands_for_a_write_comes_back_as_a_write() {
        let mut event = held(&[]);
        event.full = true;
        assert_eq!(parked(&event).1.op, Op::Set);
    }

    #[test]
    fn an_origin_that_is_no_peer_survives() {
        let mut event = held(&[]);
        event.origin = ORIGIN_OTHER;
        event.extra = Some(Arc::new(RecordExtra {
            origin: Some("sa-east-1".into()),
            ..RecordExtra::default()
        }));
        assert_eq!(parked(&event).1.origin.as_deref(), Some("sa-east-1"));
        (event.origin, event.extra) = (0, None);
        assert_eq!(parked(&event).1.origin.as_deref(), Some("us-east-1"));
    }

    #[test]
    fn a_record_waits_until_its_time_and_nonsense_does_not_wait() {
        let at = |text: &str| Parked::read(&[(NOT_BEFORE.into(), text.as_bytes().into())]);
        assert_eq!(at("1500").wait(1_000), Some(Duration::from_millis(500)));
        assert_eq!(at("1500").wait(1_500), None);
        assert_eq!(at("1500").wait(i64::MAX), None);
        assert_eq!(at("-9223372036854775808").wait(i64::MAX), None);
        assert_eq!(at("soon").wait(0), None);
        assert_eq!(Parked::default().wait(0), None);
        let odd = Parked::read(&[(ATTEMPT.into(), b"-3".as_slice().into())]);
        assert_eq!(odd.attempt, 0);
    }
}
