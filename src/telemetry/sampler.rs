//! Which events are traced, and how many more when something is wrong. Plain types: no clock, no I/O.

use std::sync::atomic::{AtomicI64, AtomicU32, Ordering::Relaxed};

/// Draws a part of the events at random at the cost of one subtraction each: what is drawn is the gap to the next one.
#[derive(Clone, Debug)]
pub struct Sampler {
    ratio: f64,
    gap: u64,
}

impl Sampler {
    /// Draws this part, from 0 to 1.
    pub fn new(ratio: f64) -> Sampler {
        let mut sampler = Sampler { ratio, gap: 0 };
        sampler.gap = sampler.next_gap();
        sampler
    }

    /// Whether this event is one of them.
    pub fn draw(&mut self) -> bool {
        if self.gap > 0 {
            self.gap -= 1;
            return false;
        }
        self.gap = self.next_gap();
        // Without a ratio the gap is endless, but not when it is counted down to its end.
        self.ratio > 0.0
    }

    /// Events between two that are drawn: geometrically distributed, so that no pattern of the writers is met or missed.
    fn next_gap(&self) -> u64 {
        match self.ratio {
            ratio if ratio >= 1.0 => 0,
            ratio if ratio > 0.0 => {
                let uniform = 1.0 - rand::random::<f64>();
                (uniform.ln() / (1.0 - ratio).ln()) as u64
            }
            _ => u64::MAX,
        }
    }
}

/// At most so many in a second of the wall clock; the first ones of it.
#[derive(Debug)]
pub struct PerSecond {
    limit: u32,
    second: AtomicI64,
    taken: AtomicU32,
}

impl PerSecond {
    /// At most `limit` a second.
    pub fn new(limit: u32) -> PerSecond {
        PerSecond {
            limit,
            second: AtomicI64::new(i64::MIN),
            taken: AtomicU32::new(0),
        }
    }

    /// Whether one more may go at this time, in milliseconds since the epoch. Two threads at the turn of a second may let
    /// one or two too many through.
    pub fn take(&self, now_ms: i64) -> bool {
        let second = now_ms.div_euclid(1000);
        // Behind a backlog every event is slow and asks: once the second is full, that costs two plain reads.
        if self.second.load(Relaxed) == second && self.taken.load(Relaxed) >= self.limit {
            return false;
        }
        if self.second.swap(second, Relaxed) != second {
            self.taken.store(0, Relaxed);
        }
        self.limit > 0 && self.taken.fetch_add(1, Relaxed) < self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(ratio: f64, of: u64) -> u64 {
        let mut sampler = Sampler::new(ratio);
        (0..of).filter(|_| sampler.draw()).count() as u64
    }

    #[test]
    fn the_ratio_is_kept() {
        assert_eq!(drawn(0.0, 100_000), 0);
        assert_eq!(drawn(1.0, 1_000), 1_000);
        let half = drawn(0.5, 100_000);
        // Six standard deviations of 158.
        assert!((49_050..50_950).contains(&half), "{half}");
        let few = drawn(0.001, 10_000_000);
        assert!((9_400..10_600).contains(&few), "{few}");
    }

    #[test]
    fn no_more_than_the_limit_pass_in_a_second() {
        let limit = PerSecond::new(3);
        let passed = |now_ms| (0..10).filter(|_| limit.take(now_ms)).count();
        assert_eq!((passed(5_000), passed(5_999), passed(6_000)), (3, 0, 3));
        assert!(!PerSecond::new(0).take(1));
    }
}
