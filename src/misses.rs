//! Mass misses: when a large share of what is looked at on one memcached server is not there, something is wrong that no
//! single miss shows. The hash ring or a name in it is not the clients', the server evicts, or it was restarted after the
//! events. Windows of counts, one for each server; no I/O and no clock here.

use std::time::Duration;

use tokio::time::Instant;

/// While misses stay too many they are said again so often.
const SAY_EVERY: Duration = Duration::from_secs(60);
/// Parts of a window: what is older than the window leaves in steps of so many.
const PARTS: usize = 10;

/// What a high share of misses most likely means.
pub const LIKELY_CAUSES: &str = "wrong `hash`, `servers` or ring_name for this cache, evictions, the server was restarted after the events, or another region \
     writes to the same topic";

/// When misses are too many.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limit {
    /// From this share of misses on, 0 to 1.
    pub share: f64,
    /// Fewer looks say nothing.
    pub min_events: u64,
    /// The time in which looks are counted.
    pub within: Duration,
}

/// What a window says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Looks that were to find a value.
    pub looks: u64,
    /// Those that found none.
    pub missing: u64,
}

impl Counts {
    /// Misses among the looks, 0 to 1.
    pub fn share(self) -> f64 {
        self.missing as f64 / self.looks.max(1) as f64
    }
}

/// Misses too many, as they are seen in status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raised {
    /// Since when.
    pub since: Instant,
    /// The worst full window.
    pub worst: Counts,
    said: Instant,
}

/// The looks of one server.
#[derive(Clone, Debug, Default)]
pub struct Window {
    parts: [Counts; PARTS],
    /// The part that is counted in, since the first look.
    at: u64,
    began: Option<Instant>,
    raised: Option<Raised>,
}

impl Window {
    /// Adds a read's looks; true when it is to be said that misses are too many: when they have just become so, and now and
    /// then while they are.
    pub fn add(&mut self, now: Instant, counts: Counts, limit: &Limit) -> bool {
        self.turn(now, limit);
        let part = &mut self.parts[(self.at % PARTS as u64) as usize];
        part.looks += counts.looks;
        part.missing += counts.missing;
        let total = self.total();
        if total.looks < limit.min_events.max(1) {
            // Says nothing, neither that it is worse nor that it is better.
            return false;
        }
        if total.share() < limit.share || total.missing == 0 {
            self.raised = None;
            return false;
        }
        match &mut self.raised {
            None => {
                self.raised = Some(Raised {
                    since: now,
                    worst: total,
                    said: now,
                });
                true
            }
            Some(raised) => {
                if total.share() > raised.worst.share() {
                    raised.worst = total;
                }
                let due = now.saturating_duration_since(raised.said) >= SAY_EVERY;
                if due {
                    raised.said = now;
                }
                due
            }
        }
    }

    /// The looks of the window that ends with the last one added.
    pub fn total(&self) -> Counts {
        let add = |sum: Counts, part: &Counts| Counts {
            looks: sum.looks + part.looks,
            missing: sum.missing + part.missing,
        };
        self.parts.iter().fold(Counts::default(), add)
    }

    /// Misses were too many, and no full window has shown otherwise since.
    pub fn raised(&self) -> Option<Raised> {
        self.raised
    }

    /// Empties the parts that are older than the window.
    fn turn(&mut self, now: Instant, limit: &Limit) {
        let began = *self.began.get_or_insert(now);
        let part = (limit.within / PARTS as u32).max(Duration::from_millis(1));
        let at = (now.saturating_duration_since(began).as_nanos() / part.as_nanos()) as u64;
        for passed in (self.at + 1..=at).take(PARTS) {
            self.parts[(passed % PARTS as u64) as usize] = Counts::default();
        }
        if at >= self.at + PARTS as u64 {
            self.parts = Default::default();
        }
        self.at = self.at.max(at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMIT: Limit = Limit {
        share: 0.5,
        min_events: 100,
        within: Duration::from_secs(10),
    };

    fn of(looks: u64, missing: u64) -> Counts {
        Counts { looks, missing }
    }

    #[test]
    fn misses_are_too_many_from_the_share_on_and_said_once() {
        let mut window = Window::default();
        let now = Instant::now();
        assert!(!window.add(now, of(99, 99), &LIMIT), "too few to say anything");
        assert!(window.add(now, of(1, 1), &LIMIT));
        assert!(!window.add(now, of(100, 50), &LIMIT), "known already");
        let raised = window.raised().unwrap();
        assert_eq!((raised.since, raised.worst), (now, of(100, 100)));
        let later = now + SAY_EVERY;
        assert!(window.add(later, of(100, 60), &LIMIT), "still so");
        assert!(!window.add(later, of(100, 60), &LIMIT));
        assert_eq!(window.raised().unwrap().since, now);
    }

    #[test]
    fn they_are_over_when_a_full_window_says_so_and_not_because_nothing_comes() {
        let mut window = Window::default();
        let now = Instant::now();
        assert!(window.add(now, of(100, 100), &LIMIT));
        let later = now + Duration::from_secs(3600);
        assert!(!window.add(later, of(99, 0), &LIMIT));
        assert_eq!(window.total(), of(99, 0), "what is old has left");
        assert!(window.raised().is_some());
        window.add(later, of(1, 0), &LIMIT);
        assert!(window.raised().is_none());
        assert!(!window.add(later, of(99, 99), &LIMIT), "99 of 199");
        assert!(window.add(later, of(2, 2), &LIMIT));
    }

    #[test]
    fn what_is_older_than_the_window_leaves_in_steps() {
        let mut window = Window::default();
        let now = Instant::now();
        for second in 0..10 {
            window.add(now + Duration::from_secs(second), of(10, 1), &LIMIT);
        }
        assert_eq!(window.total(), of(100, 10));
        window.add(now + Duration::from_secs(10), of(10, 1), &LIMIT);
        assert_eq!(window.total(), of(100, 10));
        window.add(now + Duration::from_secs(14), of(0, 0), &LIMIT);
        assert_eq!(window.total(), of(60, 6));
        // A clock that went back is no reason to forget, or to panic.
        window.add(now, of(1, 1), &LIMIT);
        assert_eq!(window.total(), of(61, 7));
    }

    proptest! {
        /// Against the looks themselves: never more than the window and a part of it hold, never less than the window
        /// without a part.
        #[test]
        fn a_window_holds_what_is_in_it(adds in proptest::collection::vec((0u64..5_000, 0u64..50, 0u64..50), 1..60)) {
            let start = Instant::now();
            let mut window = Window::default();
            let mut log = Vec::new();
            let mut now = start;
            for (wait, missing, found) in adds {
                now += Duration::from_millis(wait);
                window.add(now, of(missing + found, missing), &LIMIT);
                log.push((now, missing + found));
                let within = |span: Duration| -> u64 {
                    log.iter().filter(|(at, _)| now - *at < span).map(|(_, looks)| looks).sum()
                };
                let total = window.total().looks;
                prop_assert!(total <= within(LIMIT.within + Duration::from_millis(1)));
                prop_assert!(total >= within(LIMIT.within - LIMIT.within / PARTS as u32));
            }
        }
    }
}
