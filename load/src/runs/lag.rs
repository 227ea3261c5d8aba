//! Whether something grows while it should not: what is under way in a run, and memory in a long one.

use serde::{Deserialize, Serialize};

/// How much longer the lag may be at the end than at the beginning, in seconds: a stall of that length may still be under
/// way. Of a run of 30 seconds, whose thirds are 20 seconds apart, a rate of half a percent above the maximum passes.
pub const LAG_TOLERANCE_SECONDS: f64 = 0.1;

/// Memory may be so much more at the end than after the first minute: an allocator's doing, not a leak's.
const RSS_TOLERANCE: f64 = 1.05;
const RSS_TOLERANCE_MIB: f64 = 3.0;

/// Something in the first and in the last third of a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Thirds {
    pub first: f64,
    pub last: f64,
}

impl Thirds {
    /// The medians of the samples in the first and the last third of the time between `from` and `to`; `None` when one of
    /// them has no sample. Samples are (when, how much).
    pub fn of(samples: &[(f64, f64)], from: f64, to: f64) -> Option<Thirds> {
        let third = (to - from) / 3.0;
        let median = |from: f64, to: f64| {
            let inside = samples.iter().filter(|(at, _)| (from..=to).contains(at));
            let mut inside: Vec<f64> = inside.map(|(_, much)| *much).collect();
            inside.sort_by(f64::total_cmp);
            inside.get(inside.len() / 2).copied()
        };
        Some(Thirds {
            first: median(from, from + third)?,
            last: median(to - third, to)?,
        })
    }

    /// Whether the last is more than the first by more than `tolerance`.
    pub fn grow(&self, tolerance: f64) -> bool {
        self.last > self.first + tolerance
    }
}

/// What a run's lag did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Lag {
    /// Writes that were due and had no outcome yet, at the rate of the run, in seconds.
    pub seconds: Thirds,
    /// The median latency of the watched writes, in seconds.
    pub latency_seconds: Thirds,
    /// Whether one of them has grown beyond the tolerance.
    pub grows: bool,
}

impl Lag {
    pub fn new(seconds: Thirds, latency_seconds: Thirds) -> Lag {
        let grows = seconds.grow(LAG_TOLERANCE_SECONDS) || latency_seconds.grow(LAG_TOLERANCE_SECONDS);
        Lag {
            seconds,
            latency_seconds,
            grows,
        }
    }
}

/// Whether memory, sampled each second in MiB, is at the end what it was after the first minute. `None`: too short to say.
pub fn flat(mib_by_second: &[f64]) -> Option<bool> {
    const MINUTE: usize = 60;
    if mib_by_second.len() < 3 * MINUTE {
        return None;
    }
    let median = |some: &[f64]| {
        let mut some = some.to_vec();
        some.sort_by(f64::total_cmp);
        some[some.len() / 2]
    };
    let begin = median(&mib_by_second[MINUTE..2 * MINUTE]);
    let end = median(&mib_by_second[mib_by_second.len() - MINUTE..]);
    Some(end <= begin * RSS_TOLERANCE + RSS_TOLERANCE_MIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lag, in seconds, of 30 seconds at `rate`, of which `most` a second can be done, sampled four times a second.
    fn backlog(rate: f64, most: f64) -> Vec<(f64, f64)> {
        let at = |quarter: u32| f64::from(quarter) / 4.0;
        let grown = (rate - most).max(0.0) / rate;
        (0..=120)
            .map(|quarter| (at(quarter), 0.02 + grown * at(quarter)))
            .collect()
    }

    #[test]
    fn a_rate_that_is_too_high_grows_and_one_that_is_not_does_not() {
        let grows = |rate| {
            Thirds::of(&backlog(rate, 240_000.0), 0.0, 30.0)
                .unwrap()
                .grow(LAG_TOLERANCE_SECONDS)
        };
        for rate in [1_000.0, 200_000.0, 240_000.0, 241_000.0] {
            assert!(!grows(rate), "{rate}");
        }
        for rate in [242_000.0, 250_000.0, 500_000.0] {
            assert!(grows(rate), "{rate}");
        }
    }

    #[test]
    fn a_stall_that_passes_is_no_growth_and_one_that_stays_is() {
        let mut samples = backlog(100_000.0, 200_000.0);
        samples[110..120].iter_mut().for_each(|(_, lag)| *lag = 2.0);
        assert!(!Thirds::of(&samples, 0.0, 30.0).unwrap().grow(LAG_TOLERANCE_SECONDS));
        let mut noisy = backlog(100_000.0, 200_000.0);
        noisy[100].1 = 2.0;
        assert!(!Thirds::of(&noisy, 0.0, 30.0).unwrap().grow(LAG_TOLERANCE_SECONDS));
        samples[80..].iter_mut().for_each(|(_, lag)| *lag = 2.0);
        assert!(Thirds::of(&samples, 0.0, 30.0).unwrap().grow(LAG_TOLERANCE_SECONDS));
        assert_eq!(Thirds::of(&samples, 100.0, 130.0), None);
        assert_eq!(Thirds::of(&[], 0.0, 30.0), None);
    }

    #[test]
    fn memory_is_flat_when_it_ends_as_it_was_after_a_minute() {
        let steady: Vec<f64> = (0..600).map(|second| 80.0 + f64::from(second % 7) / 3.0).collect();
        assert_eq!(flat(&steady), Some(true));
        let warms_up: Vec<f64> = (0..600).map(|second| 80.0_f64.min(20.0 + f64::from(second))).collect();
        assert_eq!(flat(&warms_up), Some(true));
        let leaks: Vec<f64> = (0..600).map(|second| 80.0 + f64::from(second) / 50.0).collect();
        assert_eq!(flat(&leaks), Some(false));
        assert_eq!(flat(&steady[..100]), None);
    }
}
