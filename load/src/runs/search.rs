//! The search for the highest rate without growing lag, as a plain rule: what to try next, and when it is found.

/// How much higher the next try is while everything passes.
const UP: f64 = 1.2;

/// And how much lower while nothing does.
const DOWN: f64 = 0.7;

/// It has been found when the lowest rate that failed is no more than so much above the highest that passed.
const CLOSE: f64 = 1.03;

/// A rate that fails the long try is lowered by so much for the next one.
const BACK: f64 = 0.96;

/// Below this there is nothing to be found.
const LEAST: f64 = 100.0;

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    /// See whether it bears this many writes a second, for a short time.
    Try(u64),
    /// The same for the whole time: it has passed for a short one.
    Confirm(u64),
    /// This is the highest that was confirmed.
    Found(u64),
    /// Not even the least was borne.
    NotFound,
}

/// What is known so far.
#[derive(Clone, Debug)]
pub struct Search {
    /// The highest that passed a short try.
    passed: f64,
    /// The lowest that failed one.
    failed: f64,
    next: Step,
}

impl Search {
    /// Begins at this rate.
    pub fn from(rate: u64) -> Search {
        Search {
            passed: 0.0,
            failed: f64::INFINITY,
            next: Step::Try(rate),
        }
    }

    pub fn next(&self) -> Step {
        self.next
    }

    /// Whether the lag did not grow in the step that was next.
    pub fn saw(&mut self, passed: bool) {
        match self.next {
            Step::Try(rate) => {
                match passed {
                    true => self.passed = self.passed.max(rate as f64),
                    false => self.failed = self.failed.min(rate as f64),
                }
                self.choose();
            }
            Step::Confirm(rate) if passed => self.next = Step::Found(rate),
            Step::Confirm(rate) => {
                let lower = rate as f64 * BACK;
                self.next = match lower < LEAST {
                    true => Step::NotFound,
                    false => Step::Confirm(lower as u64),
                };
            }
            Step::Found(_) | Step::NotFound => {}
        }
    }

    fn choose(&mut self) {
        let (passed, failed) = (self.passed, self.failed);
        self.next = if passed == 0.0 && failed * DOWN < LEAST {
            Step::NotFound
        } else if passed == 0.0 {
            Step::Try((failed * DOWN) as u64)
        } else if failed.is_infinite() {
            Step::Try((passed * UP) as u64)
        } else if failed <= passed * CLOSE {
            Step::Confirm(passed as u64)
        } else {
            Step::Try((passed * failed).sqrt() as u64)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::values::Mixer;

    /// Steps until it is found: a short try bears `eager` times what a long one does.
    fn found(from: u64, most: f64, eager: f64) -> (Step, usize) {
        let mut search = Search::from(from);
        for steps in 0..200 {
            match search.next() {
                Step::Try(rate) => search.saw(rate as f64 <= most * eager),
                Step::Confirm(rate) => search.saw(rate as f64 <= most),
                end => return (end, steps),
            }
        }
        panic!("no end from {from} to {most}");
    }

    #[test]
    fn the_highest_rate_is_found_from_anywhere_within_a_few_percent() {
        let mut mixer = Mixer::new(6);
        for _ in 0..2_000 {
            let most = 2_000.0 + mixer.below(500_000) as f64;
            let from = 1_000 + mixer.below(600_000);
            let eager = 1.0 + mixer.below(20) as f64 / 100.0;
            let (end, steps) = found(from, most, eager);
            let Step::Found(rate) = end else {
                panic!("{end:?} from {from} to {most}")
            };
            assert!(rate as f64 <= most, "{rate} of {most}");
            assert!(
                rate as f64 >= most * 0.95,
                "{rate} of {most}, from {from}, eager {eager}"
            );
            assert!(steps < 60, "{steps}");
        }
    }

    #[test]
    fn a_machine_that_bears_nothing_has_no_highest_rate() {
        assert_eq!(found(100_000, 0.0, 1.0).0, Step::NotFound);
        let mut search = Search::from(1_000);
        search.saw(true);
        assert_eq!(search.next(), Step::Try(1_200));
    }
}
