//! Whether everything arrived: every key, every event, and no memcached that gave up anything.

use evrepl::outcome::Outcome;
use evrepl_lab::Region;

use super::generate::keys::Keys;
use super::generate::pipe::Pipe;
use super::progress::Progress;
use super::world::{CACHE, Totals};
use crate::values::Values;

/// How many keys are compared between two looks at the clock.
const PIECE: usize = 10_240;

/// How many keys of the first `writes` the region does not hold as they were last written (value, flags, and being there), and
/// how many keys were compared.
///
/// # Panics
/// When its memcached doesn't answer.
pub fn lost(region: &Region, keys: &Keys, writes: u64, value_bytes: usize) -> (u64, u64) {
    let address = region.cache(CACHE).memcached(0).address();
    let broken = |error: std::io::Error| -> ! { panic!("comparing keys of {}: {error}", region.name()) };
    let mut pipe = Pipe::connect(&address, Values::new(value_bytes)).unwrap_or_else(|error| broken(error));
    let last = keys.last_writes(writes);
    let mut progress = Progress::new(&format!("keys compared in {}", region.name()), last.len() as u64);
    let mut lost = 0;
    for (number, some) in last.chunks(PIECE).enumerate() {
        progress.at((number * PIECE) as u64);
        lost += pipe.differ(some).unwrap_or_else(|error| broken(error));
    }
    (lost, last.len() as u64)
}

/// How many values a region's memcached has thrown out to make room.
///
/// # Panics
/// When it doesn't answer.
pub fn evictions(region: &Region) -> u64 {
    let stats = region.cache(CACHE).memcached(0).client().stats();
    let stats = stats.unwrap_or_else(|error| panic!("the stats of {}'s memcached: {error}", region.name()));
    stats.get("evictions").and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// What is wrong with the accounts of flows that should have brought `events` over. With several relays partitions move, and
/// what moves may be brought over twice.
pub fn accounts(totals: &Totals, events: u64, relays: usize) -> Option<String> {
    let brought = totals.outcome(Outcome::Applied) + totals.outcome(Outcome::Superseded);
    let consumed = totals.consumed - totals.again();
    let whole = match relays {
        1 => consumed == events && brought == events,
        _ => consumed >= events && brought == consumed,
    };
    let right = whole && totals.in_flight == 0;
    (!right).then(|| {
        format!(
            "{events} events, but consumed {}, in flight {}, applied + superseded {brought}; outcomes {:?}",
            totals.consumed, totals.in_flight, totals.outcomes
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(consumed: u64, applied: u64, missing: u64, in_flight: u64) -> Totals {
        let outcomes = [("applied", applied), ("missing", missing), ("superseded", 1)];
        Totals {
            consumed,
            in_flight,
            offset_lag: 0,
            outcomes: outcomes.map(|(name, count)| (name.into(), count)).into(),
        }
    }

    #[test]
    fn accounts_that_do_not_add_up_are_told() {
        assert_eq!(accounts(&totals(10, 9, 0, 0), 10, 1), None);
        assert!(accounts(&totals(10, 8, 1, 0), 10, 1).is_some());
        assert!(accounts(&totals(11, 9, 1, 0), 10, 1).is_some());
        assert!(accounts(&totals(10, 8, 0, 1), 10, 1).is_some());
        // As much as was sent has ended, and yet something is under way: somebody counts wrongly.
        assert!(accounts(&totals(10, 9, 0, 1), 10, 1).is_some());
    }

    #[test]
    fn what_comes_again_counts_once_and_only_two_relays_may_bring_it_twice() {
        let mut again = totals(14, 9, 0, 0);
        again.outcomes.insert("released".into(), 3);
        again.outcomes.insert("parked".into(), 1);
        assert_eq!((again.finished(), accounts(&again, 10, 1)), (10, None));
        assert!(accounts(&totals(11, 10, 0, 0), 10, 1).is_some());
        assert_eq!(accounts(&totals(11, 10, 0, 0), 10, 2), None);
        assert!(accounts(&totals(9, 8, 0, 0), 10, 2).is_some());
        assert!(accounts(&totals(11, 9, 1, 0), 10, 2).is_some());
    }
}
