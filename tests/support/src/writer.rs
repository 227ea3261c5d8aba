//! An application that writes: memcached first, then the event.

use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use crate::cache::{Cache, CacheClient};
use crate::kafka::{KafkaClient, Outgoing, Producer};
use crate::memcached::Put;

/// How the value of an event is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    #[default]
    MessagePack,
    Json,
}

/// What an event says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Set,
    Delete,
    Touch,
}

impl Op {
    /// The shortest event, `{"v": 1, "op": ...}`. Spelt out byte by byte: evrepl's encoder is what is being tested.
    pub fn event(self, format: Format) -> &'static [u8] {
        match (format, self) {
            (Format::MessagePack, Op::Set) => b"\x82\xa1v\x01\xa2op\xa3set",
            (Format::MessagePack, Op::Delete) => b"\x82\xa1v\x01\xa2op\xa6delete",
            (Format::MessagePack, Op::Touch) => b"\x82\xa1v\x01\xa2op\xa5touch",
            (Format::Json, Op::Set) => br#"{"v":1,"op":"set"}"#,
            (Format::Json, Op::Delete) => br#"{"v":1,"op":"delete"}"#,
            (Format::Json, Op::Touch) => br#"{"v":1,"op":"touch"}"#,
        }
    }
}

/// Writes one cache of one region with connections of its own. Events are on their way when a call returns, and in Kafka
/// after [`Writer::flush`]. Methods panic when memcached or Kafka refuses.
#[derive(Debug)]
pub struct Writer {
    cache: Arc<Cache>,
    client: CacheClient,
    producer: Producer,
    format: Format,
    kafka: String,
    properties: Vec<(String, String)>,
}

impl Writer {
    pub(crate) fn new(cache: Arc<Cache>, kafka: &KafkaClient, properties: &[(&str, &str)]) -> Writer {
        let own = |(name, value): &(&str, &str)| (name.to_string(), value.to_string());
        Writer {
            client: cache.client(),
            producer: kafka.producer(properties),
            kafka: kafka.address().into(),
            properties: properties.iter().map(own).collect(),
            cache,
            format: Format::default(),
        }
    }

    /// Writes JSON events from now on (or MessagePack ones again).
    pub fn format(mut self, format: Format) -> Writer {
        self.format = format;
        self
    }

    /// Sets and says so.
    pub fn set(&mut self, key: &[u8], value: &[u8]) {
        self.set_with(key, value, 0, 0);
    }

    /// Sets with flags and expiry (memcached's: 0 never, up to 30 days in seconds) and says so.
    pub fn set_with(&mut self, key: &[u8], value: &[u8], flags: u32, exptime: u32) {
        self.client
            .set(key, value, flags, exptime)
            .unwrap_or_else(|error| self.refused("set", error));
        self.say(Op::Set, key);
    }

    /// Deletes and says so, also when there was nothing.
    pub fn delete(&mut self, key: &[u8]) {
        self.client
            .delete(key)
            .unwrap_or_else(|error| self.refused("delete", error));
        self.say(Op::Delete, key);
    }

    /// Changes the expiry and says so.
    pub fn touch(&mut self, key: &[u8], exptime: u32) {
        self.client
            .touch(key, exptime)
            .unwrap_or_else(|error| self.refused("touch", error));
        self.say(Op::Touch, key);
    }

    /// Produces the shortest event for `key`, without writing memcached.
    pub fn say(&self, op: Op, key: &[u8]) {
        self.produce(key, op.event(self.format), &[]);
    }

    /// Produces a record value with a timestamp (milliseconds since the Unix epoch; `None`: now), without writing memcached.
    pub fn produce_at(&self, key: &[u8], value: &[u8], timestamp: Option<i64>) {
        self.producer.send(Outgoing {
            timestamp,
            ..Outgoing::new(&self.cache.topic, key, value)
        });
    }

    /// Produces any record value, with headers, without writing memcached.
    pub fn produce(&self, key: &[u8], value: &[u8], headers: &[(&str, &[u8])]) {
        self.producer.send(Outgoing {
            headers,
            ..Outgoing::new(&self.cache.topic, key, value)
        });
    }

    /// Sets many values without expiry: memcached in pipelined batches, then their events; returns how many, once all
    /// events are in Kafka.
    pub fn set_all<K: AsRef<[u8]>, V: AsRef<[u8]>>(&mut self, pairs: impl IntoIterator<Item = (K, V)>) -> u64 {
        // A batch's events leave only after all its writes: large enough that round trips don't count, small enough
        // that events begin to flow at once.
        const BATCH: usize = 2_048;
        let mut pairs = pairs.into_iter();
        let mut total = 0;
        loop {
            let batch: Vec<(K, V)> = pairs.by_ref().take(BATCH).collect();
            if batch.is_empty() {
                break;
            }
            let puts: Vec<Put<'_>> = batch
                .iter()
                .map(|(key, value)| Put {
                    key: key.as_ref(),
                    value: value.as_ref(),
                    flags: 0,
                    exptime: 0,
                })
                .collect();
            self.client
                .set_many(&puts)
                .unwrap_or_else(|error| self.refused("set", error));
            for put in &puts {
                self.say(Op::Set, put.key);
            }
            total += batch.len() as u64;
        }
        self.flush();
        total
    }

    /// How many events are under way to Kafka.
    pub fn under_way(&self) -> u64 {
        self.producer.under_way()
    }

    /// Gives up what is under way and goes on with a new producer, if Kafka answers a new client: librdkafka 2.12 may lose its
    /// last broker for good (its issue 5301). Whether it did.
    pub fn renew(&mut self) -> bool {
        let kafka = KafkaClient::new(&self.kafka);
        // A refused connection is told at once; librdkafka would go on trying.
        let answers = TcpStream::connect(&self.kafka).is_ok() && kafka.answers(Duration::from_secs(2));
        if answers {
            let properties = self
                .properties
                .iter()
                .map(|(name, value)| (name.as_str(), value.as_str()));
            self.producer = kafka.producer(&properties.collect::<Vec<_>>());
        }
        answers
    }

    /// Sets all keys to one value in small pieces, so that they make many chunks.
    pub fn set_in_pieces<K: AsRef<[u8]>>(&mut self, keys: &[K], value: &str) {
        for piece in keys.chunks(500) {
            self.set_all(piece.iter().map(|key| (key, value)));
        }
    }

    /// Returns when every event so far is in Kafka.
    pub fn flush(&self) {
        self.producer.flush();
    }

    /// The client it writes memcached with: for writes without an event.
    pub fn client(&mut self) -> &mut CacheClient {
        &mut self.client
    }

    fn refused<T>(&self, op: &str, error: std::io::Error) -> T {
        panic!("{op} in cache {}: {error}", self.cache.name)
    }
}

/// `<name>:0` and so on.
pub fn numbered(name: &str, count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{name}:{n}")).collect()
}

/// Bytes that no compression makes smaller, another sequence for each `seed`.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        // xorshift64: good enough to look random to LZ4.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..length.div_ceil(8)).flat_map(|_| next()).collect();
    bytes.truncate(length);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::CacheSpec;
    use crate::kafka::broker;
    use crate::place::unique;

    #[test]
    fn every_write_is_in_memcached_and_every_event_in_kafka() {
        let topic = unique("writer");
        broker().create_topic(&topic, 4, &[]);
        let cache = Arc::new(Cache::start(
            CacheSpec::new("sessions").servers(3).memcached_args(&["-m", "256"]),
            topic,
        ));
        let mut writer = Writer::new(Arc::clone(&cache), broker(), &[]);
        let keys: Vec<String> = (0..50_000).map(|n| format!("key:{n}")).collect();
        assert_eq!(writer.set_all(keys.iter().map(|key| (key, key))), 50_000);
        writer.delete(b"key:0");
        writer.touch(b"key:1", 100);
        writer.flush();
        let found = cache.client().get_many(&keys).unwrap();
        assert_eq!(found[0], None);
        assert!(
            keys.iter()
                .zip(&found)
                .skip(1)
                .all(|(key, found)| found.as_ref().unwrap().0 == key.as_bytes())
        );
        assert!((0..3).all(|index| cache.memcached(index).client().items().unwrap() > 5_000));
        let end: i64 = broker().end_offsets(&cache.topic).iter().map(|(_, end)| end).sum();
        assert_eq!(end, 50_002);
    }
}
