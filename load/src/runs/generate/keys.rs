//! Which key a write goes to: one after the other, round and round, or some far more often than others.

use serde::{Deserialize, Serialize};

use crate::values::Mixer;

/// Bytes of a key: a prefix and ten digits.
pub const KEY_BYTES: usize = 15;

/// Draws that are made before a run; one that is longer begins again. Four times as many as the keys of the hottest scenario.
const DRAWS: usize = 1 << 22;

/// Which keys there are, and how often each is written.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct KeySpec {
    /// How many.
    pub count: u64,
    /// The exponent of Zipf's law: the key of rank n is written in proportion to `n.powf(-zipf)`. 0: one after the other.
    pub zipf: f64,
}

/// The keys of a run, ready to be asked. The same spec has always the same keys.
#[derive(Debug)]
pub struct Keys {
    count: u64,
    draws: Vec<u32>,
}

impl Keys {
    /// Makes all draws, if there are any to make.
    ///
    /// # Panics
    /// Without a single key.
    pub fn new(spec: KeySpec) -> Keys {
        assert!(spec.count > 0, "no keys to write");
        let draws = match spec.zipf > 0.0 {
            true => draws(spec, DRAWS),
            false => Vec::new(),
        };
        Keys {
            count: spec.count,
            draws,
        }
    }

    /// The number of the key that write `number` goes to.
    pub fn of(&self, number: u64) -> u64 {
        match self.draws.is_empty() {
            true => number % self.count,
            false => u64::from(self.draws[number as usize % self.draws.len()]),
        }
    }

    /// The keys that writes below `writes` went to, each with the number of its last write, in order.
    pub fn last_writes(&self, writes: u64) -> Vec<(u64, u64)> {
        if self.draws.is_empty() {
            let first = writes.saturating_sub(self.count);
            let mut last: Vec<_> = (first..writes).map(|number| (number % self.count, number)).collect();
            last.sort_unstable();
            return last;
        }
        let mut last = vec![None; self.count as usize];
        // The last round through the draws, and before it nothing that this one doesn't overwrite.
        for number in writes.saturating_sub(self.draws.len() as u64)..writes {
            last[self.of(number) as usize] = Some(number);
        }
        let written = |(key, number): (usize, Option<u64>)| Some((key as u64, number?));
        last.into_iter().enumerate().filter_map(written).collect()
    }
}

/// `count` keys by Zipf's law.
fn draws(spec: KeySpec, count: usize) -> Vec<u32> {
    let mut sum = 0.0;
    let up_to: Vec<f64> = (1..=spec.count)
        .map(|rank| {
            sum += (rank as f64).powf(-spec.zipf);
            sum
        })
        .collect();
    let mut mixer = Mixer::new(spec.count);
    let mut draw = || {
        // 53 bits: all that an f64 tells apart between 0 and 1.
        let at = (mixer.draw() >> 11) as f64 / (1_u64 << 53) as f64 * sum;
        up_to.partition_point(|up_to| *up_to <= at).min(up_to.len() - 1) as u32
    };
    (0..count).map(|_| draw()).collect()
}

/// The key of that number: `load:` and ten digits.
pub fn key(number: u64) -> [u8; KEY_BYTES] {
    let mut key = *b"load:0000000000";
    digits(&mut key[5..], number);
    key
}

/// Writes a number over these digits, with zeros before it.
pub fn digits(places: &mut [u8], number: u64) {
    let mut rest = number;
    for digit in places.iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
}

/// The flags of write `number`: all bits of its low half, so that a reader knows which write it sees without the value.
pub fn flags(number: u64) -> u32 {
    number as u32
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use super::*;

    #[test]
    fn keys_are_distinct_and_of_one_length() {
        assert_eq!(&key(0), b"load:0000000000");
        assert_eq!(&key(1_234_567_890), b"load:1234567890");
        assert_ne!(key(500_000), key(499_999));
    }

    #[test]
    fn the_last_write_of_every_key_is_known() {
        for (count, zipf) in [(1, 0.0), (7, 0.0), (1_000, 0.0), (7, 1.1), (1_000, 1.1)] {
            let keys = Keys::new(KeySpec { count, zipf });
            for writes in [0, 1, 6, 7, 8, 20_000] {
                let mut last = BTreeMap::new();
                for number in 0..writes {
                    last.insert(keys.of(number), number);
                }
                assert_eq!(keys.last_writes(writes), last.into_iter().collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn hot_keys_come_as_often_as_zipf_says() {
        let keys = Keys::new(KeySpec {
            count: 1_000_000,
            zipf: 1.1,
        });
        let distinct = |writes: u64| (0..writes).map(|number| keys.of(number)).collect::<HashSet<_>>().len();
        // Known from elsewhere: 43 % of 4 096 draws are distinct, 26 % of 65 536.
        let share = distinct(4_096) * 100 / 4_096;
        assert!((41..=45).contains(&share), "{share}");
        let share = distinct(65_536) * 100 / 65_536;
        assert!((24..=28).contains(&share), "{share}");
    }
}
