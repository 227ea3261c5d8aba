//! When a value becomes readable in the other region's memcached: a thread that asks for some of the keys, from the moment
//! at which each was due to be written.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use evrepl_lab::CacheClient;

use super::source::key;
use crate::latency::Latencies;
use crate::pace::due;

/// How often it asks: the finest that is told apart, always to evrepl's disadvantage.
const POLL: Duration = Duration::from_millis(1);

/// A key that is long in coming is asked for again after this share of its age, so that keys which wait by the thousand
/// don't become a load of their own; what it adds to a latency is at most that share.
const PATIENCE: u32 = 20;

/// Which keys are watched.
#[derive(Clone, Copy, Debug)]
pub struct Watch {
    /// The first number of the open loop.
    pub first: u64,
    pub count: u64,
    pub rate: u64,
    /// Every so many-th write.
    pub every: u64,
    /// When the open loop begins.
    pub start: Instant,
}

/// What it saw.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// From when a write was due to when it could be read.
    pub latencies: Latencies,
    /// The slowest of the writes that were due in each second, in milliseconds: whether it was one stall or many.
    pub slowest_by_second: Vec<f64>,
    /// Watched keys that never came.
    pub missing: u64,
    /// When the last one was seen.
    pub last: Option<Instant>,
}

impl Seen {
    fn record(&mut self, due: Duration, age: Duration) {
        self.latencies.record(age);
        let second = due.as_secs() as usize;
        if self.slowest_by_second.len() <= second {
            self.slowest_by_second.resize(second + 1, 0.0);
        }
        let slowest = &mut self.slowest_by_second[second];
        *slowest = slowest.max(age.as_secs_f64() * 1e3);
    }
}

struct Awaited {
    number: u64,
    due: Instant,
    ask: Instant,
}

/// Watches until every key has come, or `give_up` is set and those still missing were asked for once more.
///
/// # Panics
/// When memcached doesn't answer.
pub fn watch(client: &mut CacheClient, watch: Watch, give_up: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    let mut awaited: Vec<Awaited> = Vec::new();
    let mut next = 0;
    loop {
        let over = give_up.load(Ordering::Relaxed);
        let now = Instant::now();
        while next < watch.count && watch.start + due(next, watch.rate) <= now {
            let due = watch.start + due(next, watch.rate);
            awaited.push(Awaited {
                number: watch.first + next,
                due,
                ask: due,
            });
            next += watch.every;
        }
        let (asked, mut rest): (Vec<Awaited>, Vec<Awaited>) = awaited.drain(..).partition(|one| over || one.ask <= now);
        let keys: Vec<_> = asked.iter().map(|one| key(one.number)).collect();
        let found = client
            .get_many(&keys)
            .unwrap_or_else(|error| panic!("reading the other region's memcached: {error}"));
        // After the answers: what it took to ask counts too.
        let answered = Instant::now();
        for (mut one, found) in asked.into_iter().zip(found) {
            let age = answered.duration_since(one.due);
            if found.is_some() {
                seen.record(one.due.duration_since(watch.start), age);
                seen.last = Some(answered);
            } else {
                one.ask = answered + (age / PATIENCE).max(POLL);
                rest.push(one);
            }
        }
        awaited = rest;
        if over || (next >= watch.count && awaited.is_empty()) {
            seen.missing = awaited.len() as u64;
            return seen;
        }
        std::thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runs::source::flags;
    use evrepl_lab::{CacheSpec, Memcached, RegionBuilder};

    #[test]
    fn a_watched_key_that_never_comes_is_missing_and_the_others_are_timed() {
        // Only the memcached of a region is wanted here.
        let region = RegionBuilder::new("watched")
            .kafka(&std::sync::Arc::new(evrepl_lab::KafkaClient::new("127.0.0.1:9")))
            .topics_exist()
            .cache(CacheSpec::new("sessions").given(&[std::sync::Arc::new(Memcached::start())]))
            .build();
        let mut client = region.cache("sessions").client();
        for number in (0..100).filter(|number| *number != 40) {
            client.set(&key(number), b"value", flags(number), 0).unwrap();
        }
        let watched = Watch {
            first: 0,
            count: 100,
            rate: 1_000_000,
            every: 10,
            start: Instant::now() - Duration::from_secs(1),
        };
        let seen = watch(&mut client, watched, &AtomicBool::new(true));
        assert_eq!((seen.latencies.count(), seen.missing), (9, 1));
        assert!(seen.latencies.ms(0.0) >= 999.0);
        assert!(seen.slowest_by_second.len() == 1 && seen.slowest_by_second[0] >= 999.0);
    }
}
