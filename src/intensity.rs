//! Restart intensity: how many restarts within how long are too many. A plain type; the instant is passed in.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// Counts restarts in a sliding window.
#[derive(Debug)]
pub struct Intensity {
    max: usize,
    within: Duration,
    times: VecDeque<Instant>,
}

impl Intensity {
    /// More than `max` restarts in any `within` are too many.
    pub fn new(max: u32, within: Duration) -> Self {
        Intensity {
            max: max as usize,
            within,
            times: VecDeque::new(),
        }
    }

    /// A restart at `now`; true when it is one too many.
    pub fn exceeded(&mut self, now: Instant) -> bool {
        self.times.push_back(now);
        while self.times.front().is_some_and(|&at| now - at > self.within) {
            self.times.pop_front();
        }
        self.times.len() > self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_more_than_the_allowed_restarts_within_the_time_are_too_many() {
        let start = Instant::now();
        let at = |s| start + Duration::from_secs(s);
        let mut intensity = Intensity::new(2, Duration::from_secs(10));
        assert!(!intensity.exceeded(at(0)));
        assert!(!intensity.exceeded(at(1)));
        assert!(!intensity.exceeded(at(11)), "the first is out of the window");
        assert!(intensity.exceeded(at(11)));
    }

    #[test]
    fn none_allowed_means_the_first_is_one_too_many() {
        assert!(Intensity::new(0, Duration::from_secs(1)).exceeded(Instant::now()));
    }
}
