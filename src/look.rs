//! What a look needs besides the connection: sizing it before its values are known, and the time that is left. Pure.

use crate::memcached::RemainingTtl;
use crate::wire::Expiry;

/// memcached takes a ttl above this as a Unix time.
const MAX_RELATIVE_TTL: u32 = 2_592_000;

pub fn expiry(ttl: RemainingTtl) -> Expiry {
    match ttl {
        RemainingTtl::Never => Expiry::Never,
        RemainingTtl::Seconds(seconds) => Expiry::Seconds(seconds),
    }
}

/// What is left of a writer's ttl; `None` when nothing is, or when there is no ttl to go by.
pub fn remaining(ttl: Option<u32>, produced_at_ms: i64, wall_ms: i64) -> Option<Expiry> {
    let ttl = ttl?;
    if ttl == 0 {
        return Some(Expiry::Never);
    }
    let ends_ms = if ttl <= MAX_RELATIVE_TTL {
        produced_at_ms + i64::from(ttl) * 1000
    } else {
        i64::from(ttl) * 1000
    };
    let seconds = (ends_ms - wall_ms) / 1000;
    (seconds > 0).then(|| Expiry::Seconds(seconds.min(i64::from(u32::MAX)) as u32))
}

/// Mean size of the values lately read, quick to rise and slow to fall: a read is sized before its values are known.
#[derive(Debug)]
pub struct MeanSize {
    bytes: usize,
}

impl MeanSize {
    /// Starts with the largest value there may be, until values have been seen.
    pub fn new(largest: usize) -> Self {
        MeanSize { bytes: largest }
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn saw(&mut self, bytes: usize, values: usize) {
        if values == 0 {
            return;
        }
        let mean = bytes / values;
        // Falls by a quarter of the way per read, rises at once.
        self.bytes = if mean >= self.bytes {
            mean
        } else {
            self.bytes - (self.bytes - mean).div_ceil(4)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_sized_for_the_largest_value_until_values_were_seen_and_again_when_they_grow() {
        let mut mean = MeanSize::new(1 << 20);
        mean.saw(0, 0);
        assert_eq!(mean.bytes(), 1 << 20);
        for _ in 0..60 {
            mean.saw(1000, 10);
        }
        assert_eq!(mean.bytes(), 100);
        mean.saw(500_000, 10);
        assert_eq!(mean.bytes(), 50_000);
    }

    #[test]
    fn a_writers_ttl_is_rounded_down_and_never_becomes_for_ever() {
        assert_eq!(remaining(Some(0), 0, 99), Some(Expiry::Never));
        assert_eq!(remaining(Some(10), 1_000, 1_000), Some(Expiry::Seconds(10)));
        assert_eq!(remaining(Some(10), 1_000, 1_001), Some(Expiry::Seconds(9)));
        assert_eq!(remaining(Some(10), 1_000, 11_000), None);
        assert_eq!(
            remaining(Some(4_000_000), 0, 3_999_000_000),
            Some(Expiry::Seconds(1_000))
        );
        assert_eq!(remaining(None, 0, 0), None);
    }
}
