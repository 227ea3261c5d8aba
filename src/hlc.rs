//! The version clock: a hybrid logical clock, the source of an event's `ver` (DESIGN section 6).
//!
//! A version is one `u64`: 48 bits of milliseconds since the Unix epoch (enough until the year 10889) << 16, and a
//! counter of 16 bits. Compared as integers, versions order writes by time, and never step back on one node.
//! A counter that overflows carries into the milliseconds: the clock then runs ahead of the wall for a moment, which is
//! the price of 65 536 versions in one millisecond.
//!
//! Pure: the wall clock's reading is passed in.

/// Bits of the counter below the milliseconds.
const COUNTER_BITS: u32 = 16;

/// How far ahead of the wall clock another's version may push this one by default, in milliseconds. A minute: well
/// above what a clock under NTP errs by, and well below what would let one wrong clock win every conflict for long.
pub const DEFAULT_MAX_AHEAD_MS: u64 = 60_000;

/// A version that was not taken over. Not to be retried: the clock that made it is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HlcError {
    /// Its milliseconds lie too far ahead of the wall clock.
    #[error("version is {ahead_ms} ms ahead of the wall clock, more than {limit_ms} ms")]
    TooFarAhead { ahead_ms: u64, limit_ms: u64 },
}

/// The version that says this millisecond and nothing more: what an event without `ver` has, from its record's
/// timestamp in milliseconds since the epoch. Later than the year 10889 is that year.
pub const fn from_millis(ms: u64) -> u64 {
    const LAST_MS: u64 = u64::MAX >> COUNTER_BITS;
    let ms = if ms > LAST_MS { LAST_MS } else { ms };
    ms << COUNTER_BITS
}

/// The milliseconds since the epoch in a version.
pub const fn millis(version: u64) -> u64 {
    version >> COUNTER_BITS
}

/// A hybrid logical clock.
#[derive(Clone, Debug)]
pub struct Hlc {
    last: u64,
    max_ahead_ms: u64,
}

impl Hlc {
    /// A clock that has said nothing yet, and that follows others at most `max_ahead_ms` milliseconds ahead of the wall.
    pub const fn new(max_ahead_ms: u64) -> Hlc {
        Hlc { last: 0, max_ahead_ms }
    }

    /// The next version: above every version that this clock gave or took over, even when the wall clock stands still or
    /// jumps back. `wall_ms` is milliseconds since the epoch.
    pub fn now(&mut self, wall_ms: u64) -> u64 {
        // Saturation is reached only by a clock whose wall says the year 10889.
        self.last = from_millis(wall_ms).max(self.last.saturating_add(1));
        self.last
    }

    /// Takes another's version over, so that what is written here next is later than it.
    ///
    /// # Errors
    ///
    /// [`HlcError::TooFarAhead`], and the clock stays as it was, when `other` lies more than the limit ahead of
    /// `wall_ms`: one wrong clock must not drag every region with it.
    pub fn observe(&mut self, other: u64, wall_ms: u64) -> Result<(), HlcError> {
        let ahead_ms = millis(other).saturating_sub(wall_ms);
        if ahead_ms > self.max_ahead_ms {
            return Err(HlcError::TooFarAhead {
                ahead_ms,
                limit_ms: self.max_ahead_ms,
            });
        }
        self.last = self.last.max(other);
        Ok(())
    }
}

impl Default for Hlc {
    fn default() -> Hlc {
        Hlc::new(DEFAULT_MAX_AHEAD_MS)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WALL: u64 = 1_732_291_200_000;

    #[derive(Clone, Debug)]
    enum Step {
        Now(u64),
        Observe(u64, u64),
    }

    fn walls() -> impl Strategy<Value = u64> {
        // Close together and jumping both ways: standing still is as likely as going back.
        WALL - 3..WALL + 3
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let others = prop_oneof![
            (WALL - 5..WALL + 200_000, 0u64..4).prop_map(|(ms, counter)| from_millis(ms) + counter),
            any::<u64>()
        ];
        let step = prop_oneof![
            walls().prop_map(Step::Now),
            (others, walls()).prop_map(|(o, w)| Step::Observe(o, w))
        ];
        prop::collection::vec(step, 1..200)
    }

    #[test]
    fn a_fresh_clock_says_what_the_wall_says() {
        assert_eq!(Hlc::default().now(WALL), WALL << 16);
        assert_eq!(millis(from_millis(WALL)), WALL);
    }

    #[test]
    fn a_wall_that_jumps_back_does_not_turn_the_clock_back() {
        let mut clock = Hlc::default();
        let before = clock.now(WALL);
        assert_eq!(clock.now(WALL - 1_000), before + 1);
    }

    #[test]
    fn more_versions_than_a_millisecond_holds_borrow_from_the_next() {
        let mut clock = Hlc::default();
        let first = clock.now(WALL);
        let last = (0..70_000).map(|_| clock.now(WALL)).last();
        assert_eq!(last, Some(first + 70_000));
        assert_eq!(millis(first + 70_000), WALL + 1);
    }

    #[test]
    fn a_version_up_to_the_limit_is_followed_and_one_beyond_it_is_not() {
        let mut clock = Hlc::new(100);
        assert_eq!(clock.observe(from_millis(WALL + 100), WALL), Ok(()));
        assert_eq!(clock.now(WALL), from_millis(WALL + 100) + 1);
        let refused = clock.observe(from_millis(WALL + 101), WALL);
        assert_eq!(
            refused,
            Err(HlcError::TooFarAhead {
                ahead_ms: 101,
                limit_ms: 100
            })
        );
        assert_eq!(clock.now(WALL), from_millis(WALL + 100) + 2);
    }

    #[test]
    fn a_time_beyond_forty_eight_bits_is_the_last_one_they_hold() {
        let last = from_millis((1 << 48) - 1);
        assert_eq!((from_millis(1 << 48), from_millis(u64::MAX)), (last, last));
    }

    proptest! {
        #[test]
        fn the_clock_never_stands_or_steps_back(steps in steps()) {
            let mut clock = Hlc::default();
            let mut before = None;
            for step in steps {
                match step {
                    Step::Now(wall) => {
                        let now = clock.now(wall);
                        prop_assert!(before < Some(now));
                        prop_assert!(now >= from_millis(wall));
                        before = Some(now);
                    }
                    Step::Observe(other, wall) => {
                        if clock.observe(other, wall).is_ok() {
                            before = before.max(Some(other));
                        }
                    }
                }
            }
        }

        #[test]
        fn others_never_push_the_clock_further_ahead_than_the_limit(steps in steps()) {
            let mut clock = Hlc::default();
            for step in steps {
                if let Step::Observe(other, wall) = step {
                    let _ = clock.observe(other, wall);
                }
                // Walls differ by less than 6 ms, and 200 versions carry no further than one.
                prop_assert!(millis(clock.now(WALL)) <= WALL + DEFAULT_MAX_AHEAD_MS + 7);
            }
        }

        #[test]
        fn what_is_said_after_an_observed_version_is_later_than_it(ahead in 0..DEFAULT_MAX_AHEAD_MS, counter: u16) {
            let mut clock = Hlc::default();
            let other = from_millis(WALL + ahead) + u64::from(counter);
            prop_assert_eq!(clock.observe(other, WALL), Ok(()));
            prop_assert!(clock.now(WALL) > other);
        }
    }
}
