//! How long to wait before the next try: exponential, jittered, without end.
//!
//! A plain type: randomness is passed in, time is the caller's.

use std::time::Duration;

/// The bounds of a [`Backoff`] that cannot be waited for. A mistake in the configuration: trying again never helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackoffError {
    /// A first wait of nothing would double to nothing: a busy loop.
    #[error("the first wait of a backoff is zero")]
    ZeroInitial,
    /// The longest wait is below the first.
    #[error("the longest wait of a backoff ({max:?}) is below its first ({initial:?})")]
    MaxBelowInitial {
        /// The first wait.
        initial: Duration,
        /// The longest wait.
        max: Duration,
    },
}

/// Waits that double from `initial` to `max`, each with equal jitter: at least half of it, the rest at random.
///
/// Equal jitter instead of full: a wait is never nearly nothing, so a dead server is never hammered by bad luck, and
/// still no two relays keep step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backoff {
    initial: Duration,
    max: Duration,
    attempts: u32,
}

impl Backoff {
    /// A backoff whose first wait is up to `initial` and whose longest is up to `max`.
    ///
    /// # Errors
    /// `initial` is zero, or `max` is below it.
    pub const fn new(initial: Duration, max: Duration) -> Result<Self, BackoffError> {
        if initial.is_zero() {
            return Err(BackoffError::ZeroInitial);
        }
        if max.as_nanos() < initial.as_nanos() {
            return Err(BackoffError::MaxBelowInitial { initial, max });
        }
        Ok(Self {
            initial,
            max,
            attempts: 0,
        })
    }

    /// The same for bounds that come from a checked configuration: what would be refused is brought to the nearest that
    /// is not.
    pub fn clamped(initial: Duration, max: Duration) -> Self {
        let initial = initial.max(Duration::from_millis(1));
        Self {
            initial,
            max: max.max(initial),
            attempts: 0,
        }
    }

    /// The next wait, and one attempt more. `random` is uniform over all of `u64`.
    ///
    /// The result is between half and all of `min(initial * 2^attempts, max)`.
    pub fn next(&mut self, random: u64) -> Duration {
        let whole = doubled(self.initial, self.attempts, self.max);
        self.attempts = self.attempts.saturating_add(1);
        let half = whole / 2;
        let span = u64::try_from((whole - half).as_nanos()).unwrap_or(u64::MAX);
        let jitter = (u128::from(span) * u128::from(random)) >> u64::BITS;
        // Below `span`, so it fits; the fallback only spares a panic path.
        half + Duration::from_nanos(u64::try_from(jitter).unwrap_or(span))
    }

    /// Starts over from `initial`. Call it on proof of life only (an answer), never on a mere connection: a server that
    /// accepts and then dies would otherwise be dialled at full speed.
    pub fn reset(&mut self) {
        self.attempts = 0;
    }

    /// Waits handed out since the last [`Backoff::reset`].
    pub fn attempts(&self) -> u32 {
        self.attempts
    }
}

/// `initial` doubled `times` times, at most `max`, and at most the 584 years that fit 64 bits of nanoseconds.
pub(crate) fn doubled(initial: Duration, times: u32, max: Duration) -> Duration {
    let nanos = |wait: Duration| u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX);
    let factor = 1u64.checked_shl(times).unwrap_or(u64::MAX);
    Duration::from_nanos(nanos(initial).saturating_mul(factor).min(nanos(max)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn backoff() -> Backoff {
        Backoff::new(Duration::from_millis(50), Duration::from_secs(5)).unwrap()
    }

    #[test]
    fn waits_double_up_to_the_longest() {
        let mut it = backoff();
        let waits: Vec<_> = (0..9).map(|_| it.next(u64::MAX).as_millis()).collect();
        // u64::MAX is one part in 2^64 below the whole wait, which rounds down by a nanosecond.
        assert_eq!(waits, [49, 99, 199, 399, 799, 1599, 3199, 4999, 4999]);
        assert_eq!(it.attempts(), 9);
    }

    #[test]
    fn a_reset_starts_over() {
        let mut it = backoff();
        (0..5).for_each(|_| _ = it.next(0));
        it.reset();
        assert_eq!((it.attempts(), it.next(0)), (0, Duration::from_millis(25)));
    }

    #[test]
    fn impossible_bounds_are_refused() {
        let ms = Duration::from_millis;
        assert_eq!(Backoff::new(ms(0), ms(5)), Err(BackoffError::ZeroInitial));
        assert_eq!(
            Backoff::new(ms(6), ms(5)),
            Err(BackoffError::MaxBelowInitial {
                initial: ms(6),
                max: ms(5)
            })
        );
        assert!(Backoff::new(ms(5), ms(5)).is_ok());
    }

    proptest! {
        #[test]
        fn a_wait_is_between_half_and_all_of_its_step(
            initial in 1u64..10_000_000_000, more in 0u64..u64::MAX / 2, randoms in prop::collection::vec(any::<u64>(), 1..80),
        ) {
            let (initial, max) = (Duration::from_nanos(initial), Duration::from_nanos(initial) + Duration::from_nanos(more));
            let mut it = Backoff::new(initial, max).unwrap();
            let mut step = initial;
            for random in randoms {
                let wait = it.next(random);
                prop_assert!(wait >= step / 2 && wait <= step, "{wait:?} for a step of {step:?}");
                step = step.saturating_mul(2).min(max);
            }
        }
    }
}
