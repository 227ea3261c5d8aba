//! A circuit breaker for one server: after failures in a row nothing is sent to it but one probe at a time.
//!
//! A plain type: the instant and randomness are passed in.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use tokio::time::Instant;

use crate::backoff::Backoff;

/// What a breaker lets through right now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// The server answers: everything passes.
    Closed,
    /// Nothing passes before this instant.
    Open {
        /// When a probe may go.
        until: Instant,
    },
    /// One probe may go, or is out.
    HalfOpen,
}

/// A breaker's state for other threads to see.
#[derive(Debug, Default)]
pub struct ShownBreaker(AtomicU8);

impl ShownBreaker {
    /// Shows this state.
    pub fn show(&self, state: BreakerState) {
        let state = match state {
            BreakerState::Closed => 0,
            BreakerState::HalfOpen => 1,
            BreakerState::Open { .. } => 2,
        };
        self.0.store(state, Relaxed);
    }

    /// The public name of the state shown last, and how bad it is: 0 closed, 1 half open, 2 open.
    pub fn seen(&self) -> (u8, &'static str) {
        match self.0.load(Relaxed) {
            0 => (0, "closed"),
            1 => (1, "half_open"),
            _ => (2, "open"),
        }
    }
}

/// The answer to one request to use the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Allows {
    /// Go ahead.
    Yes,
    /// Go ahead with *one* call, whose result decides: owe the breaker a `record_success`, `record_failure` or
    /// `record_abandoned`.
    Probe,
    /// Not now.
    No,
}

#[derive(Clone, Debug)]
enum Inner {
    Closed { failures: u32 },
    Open { until: Instant, probe_out: bool },
}

/// Closed, open, half-open; probes without end, spaced by a [`Backoff`] that only a success resets.
#[derive(Clone, Debug)]
pub struct Breaker {
    inner: Inner,
    threshold: u32,
    backoff: Backoff,
}

impl Breaker {
    /// A closed breaker that opens after `threshold` failures in a row (0 counts as 1) and probes as `backoff` says.
    pub fn new(threshold: u32, backoff: Backoff) -> Self {
        Self {
            inner: Inner::Closed { failures: 0 },
            threshold: threshold.max(1),
            backoff,
        }
    }

    /// The state at `now`, changing nothing.
    pub fn state(&self, now: Instant) -> BreakerState {
        match self.inner {
            Inner::Closed { .. } => BreakerState::Closed,
            Inner::Open {
                until,
                probe_out: false,
            } if now < until => BreakerState::Open { until },
            Inner::Open { .. } => BreakerState::HalfOpen,
        }
    }

    /// May a call be made at `now`? [`Allows::Probe`] is given once, until its result is recorded.
    pub fn allows(&mut self, now: Instant) -> Allows {
        match &mut self.inner {
            Inner::Closed { .. } => Allows::Yes,
            Inner::Open { until, probe_out } if !*probe_out && now >= *until => {
                *probe_out = true;
                Allows::Probe
            }
            Inner::Open { .. } => Allows::No,
        }
    }

    /// When the next probe may go, for a timer; `None` while closed or while a probe is out.
    pub fn probe_at(&self) -> Option<Instant> {
        match self.inner {
            Inner::Open {
                until,
                probe_out: false,
            } => Some(until),
            _ => None,
        }
    }

    /// Failures in a row while closed, tries without an answer while open (for status).
    pub fn failures(&self) -> u32 {
        match self.inner {
            Inner::Closed { failures } => failures,
            Inner::Open { .. } => self.threshold.saturating_add(self.backoff.attempts()).saturating_sub(1),
        }
    }

    /// The server answered, whichever call that was: it lives. Closes. Returns true if it was not closed before.
    pub fn record_success(&mut self) -> bool {
        let was_open = matches!(self.inner, Inner::Open { .. });
        self.inner = Inner::Closed { failures: 0 };
        self.backoff.reset();
        was_open
    }

    /// A call failed. Returns true if that opened the breaker from closed.
    ///
    /// While it is open and no probe is out, this is a call from before it opened: it says nothing new, and stragglers
    /// must not push the probe away.
    pub fn record_failure(&mut self, now: Instant, random: u64) -> bool {
        match &mut self.inner {
            Inner::Closed { failures } => {
                *failures += 1;
                let opens = *failures >= self.threshold;
                if opens {
                    self.open(now, random);
                }
                opens
            }
            Inner::Open { probe_out: true, .. } => {
                self.open(now, random);
                false
            }
            Inner::Open { .. } => false,
        }
    }

    /// The probe was not made after all (its caller stopped): the next caller gets it.
    pub fn record_abandoned(&mut self) {
        if let Inner::Open { probe_out, .. } = &mut self.inner {
            *probe_out = false;
        }
    }

    fn open(&mut self, now: Instant, random: u64) {
        self.inner = Inner::Open {
            until: now + self.backoff.next(random),
            probe_out: false,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const MS: Duration = Duration::from_millis(1);

    /// Opens after 3 failures; with `random` 0 the waits are 50, 100, 200 ms.
    fn breaker() -> (Breaker, Instant) {
        (
            Breaker::new(3, Backoff::new(100 * MS, 10_000 * MS).unwrap()),
            Instant::now(),
        )
    }

    fn opened() -> (Breaker, Instant) {
        let (mut it, now) = breaker();
        assert_eq!(
            [
                it.record_failure(now, 0),
                it.record_failure(now, 0),
                it.record_failure(now, 0)
            ],
            [false, false, true]
        );
        (it, now)
    }

    #[test]
    fn only_failures_in_a_row_open_it() {
        let (mut it, now) = breaker();
        for _ in 0..10 {
            assert!(!it.record_failure(now, 0) && !it.record_failure(now, 0));
            assert!(!it.record_success());
        }
        assert_eq!((it.state(now), it.allows(now)), (BreakerState::Closed, Allows::Yes));
        let (it, now) = opened();
        assert_eq!(it.state(now + 49 * MS), BreakerState::Open { until: now + 50 * MS });
    }

    #[test]
    fn while_open_nothing_passes_and_then_one_probe() {
        let (mut it, now) = opened();
        assert_eq!(
            (it.allows(now + 49 * MS), it.probe_at()),
            (Allows::No, Some(now + 50 * MS))
        );
        let then = now + 50 * MS;
        assert_eq!(it.state(then), BreakerState::HalfOpen);
        assert_eq!(
            (it.allows(then), it.allows(then), it.allows(then + 3600 * 1000 * MS)),
            (Allows::Probe, Allows::No, Allows::No)
        );
        assert_eq!((it.state(then), it.probe_at()), (BreakerState::HalfOpen, None));
    }

    #[test]
    fn a_success_closes_it_and_resets_the_backoff() {
        let (mut it, now) = opened();
        let _ = it.allows(now + 50 * MS);
        assert!(it.record_success());
        assert_eq!((it.allows(now), it.failures()), (Allows::Yes, 0));
        (0..3).for_each(|_| _ = it.record_failure(now, 0));
        assert_eq!(it.probe_at(), Some(now + 50 * MS));
    }

    #[test]
    fn probes_go_on_without_end_further_and_further_apart() {
        let (mut it, mut now) = opened();
        let mut waits = Vec::new();
        for _ in 0..100 {
            let at = it.probe_at().unwrap();
            waits.push((at - now).as_millis());
            now = at;
            assert_eq!(it.allows(now), Allows::Probe);
            assert!(!it.record_failure(now, 0));
        }
        assert_eq!(waits[..9], [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!((waits[99], it.failures()), (5000, 103));
    }

    #[test]
    fn stragglers_from_before_it_opened_do_not_push_the_probe_away() {
        let (mut it, now) = opened();
        (0..50).for_each(|i| _ = it.record_failure(now + i * MS, 0));
        assert_eq!(it.probe_at(), Some(now + 50 * MS));
        assert!(
            it.record_success(),
            "an answer is proof of life, whichever call it belongs to"
        );
    }

    #[test]
    fn an_abandoned_probe_goes_to_the_next_caller() {
        let (mut it, now) = opened();
        assert_eq!(it.allows(now + 50 * MS), Allows::Probe);
        it.record_abandoned();
        assert_eq!(it.allows(now + 50 * MS), Allows::Probe);
    }
}
