//! The stamp rule in a small world of its own: relays, links, an agent and its memcached servers, seeded and in
//! simulated time.
//!
//! Several relays look at keys of one source, several at once; reads, links and memcached take any time but keep their
//! order; sessions end, the agent restarts, batches end unanswered or unsent. With the real [`StampTable`] no run ends
//! different from the source, steps back on the way or fails to settle. Each rule that is weaker goes wrong in the same
//! world, which shows that the world is hard enough.

mod tables;
mod world;

use std::time::Duration;

use evrepl::stamps::Verdict;
use tables::{Rule, Table};
use tokio::time::Instant;
use world::{Item, Seen, World};

#[test]
fn with_stamps_no_run_differs_steps_back_or_fails_to_settle() {
    let mut all = Seen::default();
    for seed in 0..3000 {
        let seen = World::run(Rule::Stamps, seed);
        assert!(!seen.wrong(), "seed {seed}: {seen:?}");
        all.refused += seen.refused;
        all.applied += seen.applied;
        all.unknown += seen.unknown;
        all.abandoned += seen.abandoned;
        all.resessioned += seen.resessioned;
        all.restarts += seen.restarts;
    }
    println!("{all:?}");
    let rarest = all
        .refused
        .min(all.applied)
        .min(all.unknown)
        .min(all.abandoned)
        .min(all.resessioned)
        .min(all.restarts);
    assert!(rarest > 1000, "the world has become too kind: {all:?}");
}

/// At least one of the first seeds must go wrong.
fn goes_wrong(rule: Rule, seeds: u64) {
    let runs: Vec<_> = (0..seeds).map(|seed| World::run(rule, seed)).collect();
    let wrong = runs.iter().filter(|seen| seen.wrong()).count();
    println!("{rule:?}: {wrong} of {seeds}");
    assert!(
        wrong > 0,
        "{rule:?} did nothing wrong in {seeds} runs: this world shows nothing"
    );
}

#[test]
fn applying_every_item_as_it_comes_goes_wrong() {
    goes_wrong(Rule::Nothing, 100);
}

#[test]
fn trusting_the_relays_clocks_goes_wrong() {
    goes_wrong(Rule::Clocks, 100);
}

#[test]
fn remembering_one_writer_per_slot_goes_wrong() {
    goes_wrong(Rule::OneWriter, 1500);
}

#[test]
fn sharing_a_slot_within_a_batch_goes_wrong() {
    goes_wrong(Rule::SharedBatch, 300);
}

#[test]
fn a_stamp_taken_after_the_look_goes_wrong() {
    goes_wrong(Rule::StampedLate, 300);
}

#[test]
fn sending_looks_from_before_the_session_goes_wrong() {
    goes_wrong(Rule::LooksOutliveSession, 1000);
}

#[test]
fn keeping_ticks_from_before_the_session_goes_wrong() {
    goes_wrong(Rule::TickOutlivesSession, 300);
}

#[test]
fn writing_before_the_old_agents_batch_has_run_goes_wrong() {
    goes_wrong(Rule::NotSettled, 1000);
}

/// A near relay writes a slot every two milliseconds; a far one needs 50 ms from its look to the agent. When is its first
/// item applied? `None`: not within ten seconds.
fn far_relay_gets_through(rule: Rule) -> Option<u64> {
    let mut table = Table::new(rule);
    let begin = Instant::now();
    let item = |session, looked_at| Item {
        relay: 0,
        life: 0,
        agent_life: 0,
        session,
        key: 0,
        value: 0,
        looked_at,
        clock: 0,
    };
    let (mut tick, mut far_look) = (0, None);
    for ms in (0..10_000).step_by(2) {
        let now = begin + Duration::from_millis(ms);
        if ms % 50 == 0 {
            if far_look.is_some_and(|look| table.admit(&item(2, look), now) == Verdict::Apply) {
                return Some(ms);
            }
            far_look = Some(tick);
        }
        if table.admit(&item(1, tick), now) == Verdict::Apply {
            tick += 1;
            table.written(tick);
        }
    }
    None
}

#[test]
fn a_fast_relay_does_not_starve_a_slow_one() {
    assert_eq!(
        far_relay_gets_through(Rule::Stamps),
        Some(100),
        "its second look is admitted"
    );
    assert_eq!(
        far_relay_gets_through(Rule::NoTurns),
        None,
        "without turns none ever is"
    );
}
