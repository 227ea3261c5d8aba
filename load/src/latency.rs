//! Latencies, from microseconds to minutes.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// The longest that is told apart; longer ones count as this.
const LONGEST: Duration = Duration::from_secs(600);

/// Three digits: a p99.9 of 400 ms is known to 1 ms.
const DIGITS: u8 = 3;

/// How long something took, many times.
#[derive(Clone, Debug)]
pub struct Latencies {
    micros: Histogram<u64>,
}

/// Quantiles in milliseconds, and of how many they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
    pub samples: u64,
}

impl Default for Latencies {
    fn default() -> Latencies {
        // Grows with what it is told: there is one for each second of a long run.
        let micros = Histogram::new(DIGITS);
        Latencies {
            micros: micros.expect("the digits are a constant within HDR's own"),
        }
    }
}

impl Latencies {
    pub fn record(&mut self, took: Duration) {
        // It grows as far as that, so there is nothing that doesn't fit.
        let _ = self.micros.record(took.min(LONGEST).as_micros() as u64);
    }

    /// Takes over all of `other`'s.
    pub fn add(&mut self, other: &Latencies) {
        // Both grow, so there is nothing that doesn't fit.
        let _ = self.micros.add(&other.micros);
    }

    /// Milliseconds that a share `quantile` of all stayed at or below; 0 without any.
    pub fn ms(&self, quantile: f64) -> f64 {
        self.micros.value_at_quantile(quantile) as f64 / 1e3
    }

    pub fn count(&self) -> u64 {
        self.micros.len()
    }

    pub fn quantiles(&self) -> Quantiles {
        Quantiles {
            p50: self.ms(0.5),
            p99: self.ms(0.99),
            p999: self.ms(0.999),
            max: self.micros.max() as f64 / 1e3,
            samples: self.count(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_in_milliseconds_and_merging_keeps_every_sample() {
        let (mut low, mut high) = (Latencies::default(), Latencies::default());
        for ms in 1..=500 {
            low.record(Duration::from_millis(ms));
            high.record(Duration::from_millis(500 + ms));
        }
        low.add(&high);
        let all = low.quantiles();
        assert_eq!(all.samples, 1_000);
        assert!(
            (all.p50 - 500.0).abs() < 1.0 && (all.p99 - 990.0).abs() < 1.0 && all.max >= 1_000.0,
            "{all:?}"
        );
    }

    #[test]
    fn what_takes_longer_than_the_longest_still_counts() {
        let mut latencies = Latencies::default();
        latencies.record(Duration::from_secs(86_400));
        assert_eq!(latencies.count(), 1);
        assert!(latencies.ms(1.0) >= 600_000.0);
    }
}
