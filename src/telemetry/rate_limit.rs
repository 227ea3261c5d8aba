//! Log lines that may repeat without end (a stranger who dials again and again, a partition that cannot be resumed) are said
//! a few times in ten seconds, and then with how often they were not said in between.
//!
//! For what is a *state*, such as a peer that is away, a line at its beginning and one at its end are better; this is for what
//! merely happens again.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Different things that one limit tells apart; what is beyond them shares one place.
const MOST_KINDS: usize = 64;

/// How often in [`EVERY`] one thing is said: the first lines tell most.
const MOST_LINES: u32 = 5;

/// Short enough for whoever reads along.
const EVERY: Duration = Duration::from_secs(10);

/// One kind of line; a static beside the place that logs it.
#[derive(Debug)]
pub struct RateLimit {
    said: LazyLock<Mutex<HashMap<String, Said>>>,
}

#[derive(Debug)]
struct Said {
    began: Instant,
    lines: u32,
    unsaid: u64,
}

impl Default for RateLimit {
    fn default() -> RateLimit {
        RateLimit::new()
    }
}

impl RateLimit {
    /// Nothing was said yet.
    pub const fn new() -> RateLimit {
        RateLimit {
            said: LazyLock::new(Mutex::default),
        }
    }

    /// Whether to log it about this thing now: `Some`, and in it, when there were any, how many lines were left out.
    pub fn due(&self, about: &str) -> Option<Option<u64>> {
        self.due_at(about, Instant::now())
    }

    fn due_at(&self, about: &str, now: Instant) -> Option<Option<u64>> {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() >= MOST_KINDS && !said.contains_key(about) {
            // Forgotten only when its time is over and nothing is owed: else whoever varies the thing gets every line.
            said.retain(|_, one| one.unsaid > 0 || now.saturating_duration_since(one.began) < EVERY);
        }
        let about = match said.len() >= MOST_KINDS && !said.contains_key(about) {
            true => "",
            false => about,
        };
        match said.get_mut(about) {
            Some(one) if now.saturating_duration_since(one.began) >= EVERY => {
                (one.began, one.lines) = (now, 1);
                let unsaid = std::mem::take(&mut one.unsaid);
                Some((unsaid > 0).then_some(unsaid))
            }
            Some(one) if one.lines < MOST_LINES => {
                one.lines += 1;
                Some(None)
            }
            Some(one) => {
                one.unsaid += 1;
                None
            }
            None => {
                let first = Said {
                    began: now,
                    lines: 1,
                    unsaid: 0,
                };
                said.insert(about.to_owned(), first);
                Some(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_repeats_is_said_a_few_times_and_then_with_how_often_it_was_not() {
        static LIMIT: RateLimit = RateLimit::new();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        for _ in 0..MOST_LINES {
            assert_eq!(LIMIT.due_at("a", at(0)), Some(None));
        }
        assert_eq!(LIMIT.due_at("a", at(1)), None);
        assert_eq!(LIMIT.due_at("b", at(2)), Some(None), "another thing");
        assert_eq!(LIMIT.due_at("a", at(9)), None);
        assert_eq!(LIMIT.due_at("a", at(10)), Some(Some(2)));
        assert_eq!(LIMIT.due_at("a", at(11)), Some(None));
    }

    #[test]
    fn things_without_end_take_no_memory_without_end_and_no_lines_either() {
        let limit = RateLimit::new();
        let now = Instant::now();
        let lines = (0..10_000)
            .filter(|n| limit.due_at(&n.to_string(), now).is_some())
            .count();
        assert_eq!(lines, MOST_KINDS + MOST_LINES as usize);
        assert_eq!(limit.said.lock().unwrap().len(), MOST_KINDS + 1);
        // Later there is room again.
        assert_eq!(limit.due_at("new", now + EVERY), Some(None));
        assert!(limit.said.lock().unwrap().len() <= 2);
    }
}
