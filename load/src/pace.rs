//! An open loop: each write is due at a moment of its own, whatever became of those before it.

use std::time::Duration;

/// When write `index` is due at `rate` writes a second, counted from the beginning. `rate` is not 0.
pub fn due(index: u64, rate: u64) -> Duration {
    // In u128, since hours at a million a second pass u64 in nanoseconds times the rate.
    Duration::from_nanos((u128::from(index) * 1_000_000_000 / u128::from(rate)) as u64)
}

/// How many writes are due `elapsed` after the beginning: at least the first.
pub fn due_by(elapsed: Duration, rate: u64) -> u64 {
    (elapsed.as_nanos() * u128::from(rate) / 1_000_000_000) as u64 + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_due_evenly_for_hours() {
        assert_eq!(due(0, 20_000), Duration::ZERO);
        assert_eq!(due(20_000, 20_000), Duration::from_secs(1));
        assert_eq!(due(3_600 * 1_000_000, 1_000_000), Duration::from_secs(3_600));
        assert_eq!(due(1, 3), Duration::from_nanos(333_333_333));
    }

    #[test]
    fn a_write_is_due_at_its_moment_and_not_before() {
        for rate in [1, 7, 20_000, 1_000_000] {
            for index in [1, 2, 999, 123_456] {
                assert!(due_by(due(index, rate) + Duration::from_nanos(1), rate) > index);
                assert!(due_by(due(index, rate) - Duration::from_nanos(1), rate) <= index);
            }
        }
    }
}
