//! The faults: what each is called, what it needs, and how long it lasts.

use std::time::Duration;

use super::world::{Setup, World};
use super::{caches, kafka, network, processes, random};

/// What a fault breaks. Two faults that break the same part don't happen together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Relay,
    /// Further relays of the same region.
    Members,
    Agent,
    Link,
    Kafka,
    Destination,
    Source,
    Clock,
    /// What is written.
    Load,
    /// How the processes are configured.
    Settings,
}

/// What the accounts can show at the end of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sums {
    /// Consumed, without what was released, is what Kafka holds behind the offset where the process began.
    Exact,
    /// A member that was fenced or lost its broker may have finished events that it could not commit: those are consumed
    /// again, and so none is left out.
    AtLeast,
    /// Processes took their counts with them: the committed offsets are what remains to be compared.
    Committed,
}

/// Where one server of three is broken, so that the others must not feel it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Source,
    Destination,
}

/// A fault of the lab.
#[derive(Debug)]
pub struct Fault {
    /// As `--only` takes it.
    pub name: &'static str,
    /// One line.
    pub about: &'static str,
    /// How long it lasts in the lab's table.
    pub seconds: u64,
    /// How long in the test suite; at most 8.
    pub short_seconds: u64,
    pub breaks: &'static [Part],
    pub sums: Sums,
    /// On which side it breaks one server of three; the others must not feel it.
    pub isolated: Option<Side>,
    pub setup: fn(&mut Setup),
    /// Breaks, lets the time pass, and heals.
    pub play: fn(&World, Duration) -> Result<(), String>,
}

impl Fault {
    /// # Errors
    /// When there is none of this name.
    pub fn named(name: &str) -> Result<&'static Fault, String> {
        let found = FAULTS.iter().copied().find(|fault| fault.name == name);
        found.ok_or_else(|| format!("there is no fault {name}; --list names them"))
    }
}

/// All of them, in the order of the table.
pub static FAULTS: &[&Fault] = &[
    &caches::NOTHING,
    &processes::KILL_RELAY,
    &processes::KILL_AGENT,
    &processes::KILL_BOTH,
    &processes::STOP_RELAY,
    &processes::STOP_AGENT,
    &network::LINK_CUT,
    &network::LINK_STALLED,
    &network::LINK_FLAPPING,
    &network::LINK_LOSSY,
    &network::LINK_HALF_CLOSED,
    &network::LINK_CORRUPT,
    &kafka::BROKER_RESTARTED,
    &kafka::BROKER_STOPPED,
    &kafka::BROKER_FROZEN,
    &kafka::REBALANCE_STORM,
    &kafka::REBALANCE_KILLED,
    &kafka::PARTITIONS_GROW,
    &caches::DEST_UNREACHABLE,
    &caches::DEST_FROZEN,
    &caches::DEST_FROZEN_KILLED,
    &caches::DEST_SLOW,
    &caches::DEST_FULL,
    &caches::DEST_EMPTY,
    &caches::SOURCE_UNREACHABLE,
    &processes::POISON,
    &processes::CLOCK_ONE_RELAY,
    &processes::CLOCK_REGION,
    &processes::BIG_VALUES,
    &processes::MAILBOX_ONE,
];

/// Two faults that break different parts, chosen by a seed.
pub fn two_at_random(seed: u64) -> [&'static Fault; 2] {
    let mut state = seed;
    let mut draw = || FAULTS[1 + random::draw(&mut state, FAULTS.len() as u32 - 1) as usize];
    loop {
        let (one, other) = (draw(), draw());
        if one.name != other.name && !one.breaks.iter().any(|part| other.breaks.contains(part)) {
            return [one, other];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_short_forms_are_short() {
        for (index, fault) in FAULTS.iter().enumerate() {
            assert_eq!(FAULTS.iter().position(|other| other.name == fault.name), Some(index));
            assert!((1..=8).contains(&fault.short_seconds), "{}", fault.name);
            assert!(std::ptr::eq(Fault::named(fault.name).unwrap(), *fault));
        }
        assert!(Fault::named("no such").is_err());
    }

    #[test]
    fn a_seed_always_chooses_the_same_two_and_they_never_break_the_same_part() {
        for seed in 0..200 {
            let [one, other] = two_at_random(seed);
            assert_eq!(two_at_random(seed).map(|fault| fault.name), [one.name, other.name]);
            assert!(one.breaks.iter().all(|part| !other.breaks.contains(part)));
        }
    }
}
