//! When a write becomes readable in the other region's memcached: a thread that asks for some of the keys, from the moment
//! at which each was due to be written.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::keys::{Keys, flags};
use super::pipe::Pipe;
use crate::latency::{Latencies, Quantiles};
use crate::pace::due;

/// A key that is long in coming is asked for again after this share of its age, so that keys which wait by the thousand
/// don't become a load of their own; what it adds to a latency is at most that share.
const PATIENCE: u32 = 20;

/// Which writes are watched.
#[derive(Clone, Copy, Debug)]
pub struct Watch {
    /// The number of the first write that is due at `start`.
    pub first: u64,
    /// The first so many are not watched.
    pub warm_up: u64,
    /// How many follow.
    pub count: u64,
    pub rate: u64,
    /// Every so many-th of them is watched.
    pub every: u64,
    pub start: Instant,
    /// How often it asks: the finest that is told apart, always to evrepl's disadvantage.
    pub tick: Duration,
}

/// What it saw.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// From when a write was due to when it, or a later one of its key, could be read.
    pub latency_ms: Quantiles,
    /// The same of the writes that were due in each second.
    pub by_second_ms: Vec<Quantiles>,
    /// The median of the first and of the last third of the time.
    pub thirds_p50_ms: [f64; 2],
    /// Watched writes that never came.
    pub missing: u64,
}

#[derive(Debug, Default)]
struct Record {
    all: Latencies,
    seconds: Vec<Latencies>,
    thirds: [Latencies; 3],
}

impl Record {
    /// Of a write that was due after `share` of the time, in that second.
    fn add(&mut self, second: usize, share: f64, age: Duration) {
        self.all.record(age);
        if self.seconds.len() <= second {
            self.seconds.resize_with(second + 1, Latencies::default);
        }
        self.seconds[second].record(age);
        self.thirds[((share * 3.0) as usize).min(2)].record(age);
    }

    fn seen(&self, missing: u64) -> Seen {
        Seen {
            latency_ms: self.all.quantiles(),
            by_second_ms: self.seconds.iter().map(Latencies::quantiles).collect(),
            thirds_p50_ms: [self.thirds[0].ms(0.5), self.thirds[2].ms(0.5)],
            missing,
        }
    }
}

struct Awaited {
    number: u64,
    due: Instant,
    ask: Instant,
}

/// Watches until every write has come, or `give_up` is set and those still missing were asked for once more.
///
/// # Errors
/// When memcached doesn't answer.
pub fn watch(pipe: &mut Pipe, keys: &Keys, watch: Watch, give_up: &AtomicBool) -> io::Result<Seen> {
    let mut record = Record::default();
    let mut awaited: Vec<Awaited> = Vec::new();
    let begin = watch.start + due(watch.warm_up, watch.rate);
    let mut next = 0;
    loop {
        let over = give_up.load(Ordering::Relaxed);
        let now = Instant::now();
        while next < watch.count && begin + due(next, watch.rate) <= now {
            let due = begin + due(next, watch.rate);
            awaited.push(Awaited {
                number: watch.first + watch.warm_up + next,
                due,
                ask: due,
            });
            next += watch.every;
        }
        let (asked, mut rest): (Vec<Awaited>, Vec<Awaited>) = awaited.drain(..).partition(|one| over || one.ask <= now);
        let names: Vec<u64> = asked.iter().map(|one| keys.of(one.number)).collect();
        let mut held = Vec::with_capacity(names.len());
        pipe.flags(&names, |_, found| held.push(found))?;
        // After the answers: what it took to ask counts too.
        let answered = Instant::now();
        for (mut one, held) in asked.into_iter().zip(held) {
            let age = answered.duration_since(one.due);
            if held.is_some_and(|held| is_at_least(held, one.number)) {
                let due = one.due.duration_since(begin);
                let share = due.as_secs_f64() * watch.rate as f64 / watch.count as f64;
                record.add(due.as_secs() as usize, share, age);
            } else {
                one.ask = answered + (age / PATIENCE).max(watch.tick);
                rest.push(one);
            }
        }
        awaited = rest;
        if over || (next >= watch.count && awaited.is_empty()) {
            return Ok(record.seen(awaited.len() as u64));
        }
        std::thread::sleep(watch.tick);
    }
}

/// Whether flags are those of write `number` or of a later one: of the numbers with these low bits, the nearest counts.
fn is_at_least(held: u32, number: u64) -> bool {
    (held.wrapping_sub(flags(number)) as i32) >= 0
}

#[cfg(test)]
mod tests {
    use evrepl_lab::Memcached;

    use super::super::keys::{KeySpec, key};
    use super::*;
    use crate::values::Values;

    #[test]
    fn a_watched_write_that_never_comes_is_missing_and_the_others_are_timed() {
        let memcached = Memcached::start();
        let mut client = memcached.client();
        let keys = Keys::new(KeySpec { count: 50, zipf: 0.0 });
        // The second round: of key 40 only the first write has come, of key 30 a later one.
        for number in (50..100).filter(|number| *number != 90) {
            client.set(&key(number - 50), b"value", flags(number), 0).unwrap();
        }
        client.set(&key(40), b"value", flags(40), 0).unwrap();
        client.set(&key(30), b"value", flags(180), 0).unwrap();
        let watched = Watch {
            first: 40,
            warm_up: 10,
            count: 50,
            rate: 1_000_000,
            every: 10,
            start: Instant::now() - Duration::from_secs(1),
            tick: Duration::from_millis(1),
        };
        let mut pipe = Pipe::connect(&memcached.address(), Values::new(5)).unwrap();
        let seen = watch(&mut pipe, &keys, watched, &AtomicBool::new(true)).unwrap();
        assert_eq!((seen.latency_ms.samples, seen.missing), (4, 1));
        assert!(seen.latency_ms.p50 >= 999.0 && seen.thirds_p50_ms[0] >= 999.0);
        assert_eq!(seen.by_second_ms.len(), 1);
    }

    #[test]
    fn a_later_write_is_told_from_an_earlier_one_past_four_billion() {
        let four_billion = 1_u64 << 32;
        for (held, number, at_least) in [(7, 7, true), (8, 7, true), (6, 7, false)] {
            assert_eq!(is_at_least(flags(four_billion + held), four_billion + number), at_least);
        }
        assert!(is_at_least(flags(four_billion + 3), four_billion - 3));
        assert!(!is_at_least(flags(four_billion - 3), four_billion + 3));
    }
}
