//! Whether everything arrived: every value, every event, and no memcached that gave up anything.

use evrepl::outcome::Outcome;
use evrepl_lab::{FlowStatus, Region};

use super::progress::Progress;
use super::source::{flags, key};
use crate::values;

/// How many values are compared at once.
const PIECE: u64 = 20_000;

/// How many of the numbers below `count` the region does not hold as they were written: value, flags, and being there.
///
/// # Panics
/// When its memcached doesn't answer.
pub fn lost(region: &Region, count: u64, value_bytes: usize) -> u64 {
    let mut client = region.cache("sessions").client();
    let mut progress = Progress::new("values compared", count);
    let (mut lost, mut wanted) = (0, Vec::new());
    for from in (0..count).step_by(PIECE as usize) {
        progress.at(from);
        let numbers = from..count.min(from + PIECE);
        let keys: Vec<_> = numbers.clone().map(key).collect();
        let found = client
            .get_many(&keys)
            .unwrap_or_else(|error| panic!("comparing values of {}: {error}", region.name()));
        for (number, found) in numbers.zip(found) {
            wanted.clear();
            values::append(&mut wanted, number, value_bytes);
            let same = found.is_some_and(|(value, held)| value == wanted && held == flags(number));
            lost += u64::from(!same);
        }
    }
    lost
}

/// How many values a region's memcached has thrown out to make room.
///
/// # Panics
/// When it doesn't answer.
pub fn evictions(region: &Region) -> u64 {
    let stats = region.cache("sessions").memcached(0).client().stats();
    let stats = stats.unwrap_or_else(|error| panic!("the stats of {}'s memcached: {error}", region.name()));
    stats.get("evictions").and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// What is wrong with the accounts of a flow that should have brought `events` distinct keys over.
pub fn accounts(flow: &FlowStatus, events: u64) -> Option<String> {
    let (applied, superseded) = (flow.outcome(Outcome::Applied), flow.outcome(Outcome::Superseded));
    let right = flow.consumed == events && flow.in_flight == 0 && applied + superseded == events;
    (!right).then(|| {
        format!(
            "{events} events, but consumed {}, in flight {}, applied + superseded {}; outcomes {:?}",
            flow.consumed,
            flow.in_flight,
            applied + superseded,
            flow.outcomes
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(consumed: u64, applied: u64, missing: u64, in_flight: u64) -> FlowStatus {
        let outcomes = [("applied", applied), ("missing", missing), ("superseded", 1)];
        FlowStatus {
            peer: "eu-west-1".into(),
            state: "running".into(),
            consumed,
            in_flight,
            outcomes: outcomes.map(|(name, count)| (name.into(), count)).into(),
            json: serde_json::Value::Null,
        }
    }

    #[test]
    fn accounts_that_do_not_add_up_are_told() {
        assert_eq!(accounts(&flow(10, 9, 0, 0), 10), None);
        assert!(accounts(&flow(10, 8, 1, 0), 10).is_some());
        assert!(accounts(&flow(11, 9, 1, 0), 10).is_some());
        assert!(accounts(&flow(10, 8, 0, 1), 10).is_some());
        // As much as was sent has ended, and yet something is under way: somebody counts wrongly.
        assert!(accounts(&flow(10, 9, 0, 1), 10).is_some());
    }
}
