//! How far the peer's wall clock is ahead of ours, from pings: a plain type, all times are passed in.
//!
//! A ping tells it as exactly as half its round trip, for how much of that each way took is not known. A ping that waits
//! behind batches says little, so the one with the shortest round trip of the last few is believed, as NTP does.

use std::collections::VecDeque;

/// Pings that one is chosen from: the clocks of two machines drift by some microseconds in as many seconds.
const KEPT: usize = 8;

/// What the pings of one session have told.
#[derive(Clone, Debug, Default)]
pub struct ClockOffset {
    /// Round trip and offset, in microseconds, oldest first.
    pings: VecDeque<(u64, i64)>,
}

/// When a ping was sent, arrived, was answered there and the answer arrived: microseconds since the Unix epoch, the middle two
/// by the peer's clock.
#[derive(Clone, Copy, Debug)]
pub struct PingTimes {
    pub sent: u64,
    pub received: u64,
    pub answered: u64,
    pub back: u64,
}

impl PingTimes {
    /// The round trip without the time there.
    pub fn rtt_us(&self) -> u64 {
        let away = self.answered.saturating_sub(self.received);
        self.back.saturating_sub(self.sent).saturating_sub(away)
    }

    /// The usual estimate: the answer was made half a round trip ago.
    fn offset_us(&self) -> i64 {
        let ahead = |there: u64, here: u64| i128::from(there) - i128::from(here);
        let offset = (ahead(self.received, self.sent) + ahead(self.answered, self.back)) / 2;
        offset.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64
    }
}

impl ClockOffset {
    /// Takes a ping in. Returns the offset, the peer's clock minus ours in microseconds, as it is known now.
    pub fn ponged(&mut self, times: PingTimes) -> i64 {
        let (rtt, offset) = (times.rtt_us(), times.offset_us());
        if let Some(known) = self.offset_us() {
            let best = self.pings.iter().map(|(rtt, _)| *rtt).min().unwrap_or(0);
            // Both are right to half their round trips, or a clock was set in between.
            if known.abs_diff(offset) > best / 2 + rtt / 2 + 1 {
                self.pings.clear();
            }
        }
        if self.pings.len() == KEPT {
            self.pings.pop_front();
        }
        self.pings.push_back((rtt, offset));
        self.offset_us().unwrap_or(offset)
    }

    /// The offset of the ping with the shortest round trip, the newest of several.
    pub fn offset_us(&self) -> Option<i64> {
        let best = self.pings.iter().rev().min_by_key(|(rtt, _)| *rtt);
        best.map(|(_, offset)| *offset)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A ping at `sent` to a clock that is `ahead`, with these times under way.
    fn ping(sent: u64, ahead: i64, there: u64, back: u64) -> PingTimes {
        let received = (sent + there).checked_add_signed(ahead).unwrap();
        PingTimes {
            sent,
            received,
            answered: received + 3,
            back: sent + there + 3 + back,
        }
    }

    #[test]
    fn a_ping_that_waited_behind_batches_is_not_believed() {
        let mut clock = ClockOffset::default();
        assert_eq!(clock.ponged(ping(1_000_000, 500, 100, 100)), 500);
        assert_eq!(clock.ponged(ping(2_000_000, 500, 50_000, 100)), 500);
        assert_eq!(clock.ponged(ping(3_000_000, 510, 100, 100)), 510);
    }

    #[test]
    fn a_clock_that_was_set_is_followed_at_once() {
        let mut clock = ClockOffset::default();
        clock.ponged(ping(1_000_000, 0, 100, 100));
        assert_eq!(clock.ponged(ping(2_000_000, 5_000, 900, 900)), 5_000);
    }

    #[test]
    fn old_pings_are_forgotten() {
        let mut clock = ClockOffset::default();
        clock.ponged(ping(1_000_000, 0, 10, 10));
        let offsets: Vec<i64> = (0..9)
            .map(|n| clock.ponged(ping(2_000_000 + n, 100, 200, 200)))
            .collect();
        assert_eq!((offsets[0], offsets[8]), (0, 100));
    }

    proptest! {
        #[test]
        fn the_offset_is_right_to_half_the_shortest_round_trip(
            ahead in -10_000_000i64..10_000_000,
            pings in prop::collection::vec((0u64..1_000_000, 0u64..1_000_000), 1..8),
        ) {
            let mut clock = ClockOffset::default();
            let mut shortest = u64::MAX;
            for (n, (there, back)) in pings.into_iter().enumerate() {
                let offset = clock.ponged(ping(1_000_000_000 + n as u64, ahead, there, back));
                shortest = shortest.min(there + back);
                prop_assert!(offset.abs_diff(ahead) <= shortest / 2 + 1, "{offset} {ahead} {shortest}");
            }
        }
    }
}
