//! The short form of every fault of the lab (`make faults` runs the long ones), and proof that the lab notices what it
//! should: with an agent that drops or reorders writes, and a relay that commits too early.

use std::time::{Duration, Instant};

use evrepl_lab::faults::catalogue::{FAULTS, Fault, Part, Sums};
use evrepl_lab::faults::{Live, Plan, Row, Setup, run, two_at_random};
use evrepl_lab::{shared, wait_until};

/// Keys, and in what order they are written.
const SEED: u64 = 1;

/// Nothing was lost, no key stepped back, the accounts balanced, and memory kept to its limit.
#[track_caller]
fn nothing_is_lost_by(plan: &Plan) {
    let row = run(plan, &Live::default());
    assert!(
        row.problems.is_empty() && row.lost == 0 && row.steps_back == 0,
        "{}: lost {}, steps back {}; logs are in target/faults\n{}",
        row.name,
        row.lost,
        row.steps_back,
        row.problems.join("\n")
    );
}

/// A test for each fault, named by what nothing is lost by.
macro_rules! nothing_is_lost {
    ($($(#[$attribute:meta])* $test:ident: $fault:literal,)*) => {
        $(
            #[test]
            $(#[$attribute])*
            fn $test() {
                let _gate = shared();
                nothing_is_lost_by(&Plan::short(Fault::named($fault).unwrap(), SEED));
            }
        )*

        #[test]
        fn every_fault_of_the_lab_has_a_short_form_here() {
            let tested = [$($fault),*];
            for fault in FAULTS {
                assert!(tested.contains(&fault.name), "{} is not tested", fault.name);
            }
        }
    };
}

nothing_is_lost! {
    nothing_is_lost_without_a_fault: "nothing",
    nothing_is_lost_by_a_killed_relay: "kill_relay",
    nothing_is_lost_by_a_killed_agent: "kill_agent",
    nothing_is_lost_by_killing_relay_and_agent_together: "kill_both",
    nothing_is_lost_by_a_frozen_relay_that_wakes_as_a_zombie: "stop_relay",
    nothing_is_lost_by_a_frozen_agent: "stop_agent",
    nothing_is_lost_by_a_cut_link: "link_cut",
    nothing_is_lost_by_a_stalled_link: "link_stalled",
    nothing_is_lost_by_a_flapping_link: "link_flapping",
    nothing_is_lost_by_latency_and_resets: "link_lossy",
    nothing_is_lost_by_half_closed_connections: "link_half_closed",
    nothing_is_lost_by_corrupted_bytes: "link_corrupt",
    nothing_is_lost_by_a_restarted_broker: "broker_restarted",
    nothing_is_lost_by_a_stopped_broker: "broker_stopped",
    nothing_is_lost_by_a_frozen_broker: "broker_frozen",
    nothing_is_lost_by_a_storm_of_rebalances: "rebalance_storm",
    nothing_is_lost_by_killing_a_relay_that_lets_go_of_partitions: "rebalance_killed",
    nothing_is_lost_by_growing_partitions: "partitions_grow",
    nothing_is_lost_by_an_unreachable_destination_server: "dest_unreachable",
    nothing_is_lost_by_a_frozen_destination_server: "dest_frozen",
    nothing_is_lost_by_killing_whoever_had_written_a_frozen_server: "dest_frozen_killed",
    nothing_is_lost_by_a_slow_destination_server: "dest_slow",
    nothing_is_lost_by_a_full_destination_server: "dest_full",
    a_destination_server_that_came_back_empty_is_filled_by_a_replay: "dest_empty",
    nothing_is_lost_by_an_unreachable_source_server: "source_unreachable",
    nothing_is_lost_by_poison: "poison",
    nothing_is_lost_by_a_relay_whose_clock_jumps: "clock_one_relay",
    nothing_is_lost_by_a_region_whose_clocks_jump: "clock_region",
    nothing_is_lost_by_ten_times_the_permitted_bytes_in_flight: "big_values",
    nothing_is_lost_with_mailboxes_of_one: "mailbox_one",
}

#[test]
fn nothing_is_lost_by_two_faults_at_once() {
    let _gate = shared();
    nothing_is_lost_by(&Plan::two(two_at_random(SEED), true, SEED));
}

/// A run in which only the product's own fault happens.
static SABOTAGE: Fault = Fault {
    name: "sabotage",
    about: "evrepl itself is made to do what it must not",
    seconds: 5,
    short_seconds: 5,
    breaks: &[Part::Settings],
    sums: Sums::Exact,
    isolated: None,
    setup: |_| {},
    play: |world, time| {
        world.hold(time);
        Ok(())
    },
};

/// The row of a run with an evrepl that is made to do wrong.
fn sabotaged(fault: &'static Fault, change: fn(&mut Setup)) -> Row {
    let row = run(
        &Plan {
            change,
            ..Plan::short(fault, SEED)
        },
        &Live::default(),
    );
    assert!(
        row.events > 5_000,
        "the run itself failed:\n{}",
        row.problems.join("\n")
    );
    row
}

fn failpoints(environment: &mut Vec<(String, String)>, failpoints: &str) {
    environment.push(("FAILPOINTS".into(), failpoints.into()));
}

#[test]
fn the_lab_notices_one_item_in_ten_thousand_that_is_acked_and_dropped() {
    let _gate = shared();
    let row = sabotaged(&SABOTAGE, |setup| {
        // Two in some 24 000 items, each of a key that no later write heals.
        (setup.load.rate, setup.load.hot_keys) = (3_000, 0);
        let never = "9999*off->1*return->9999*off->1*return->off";
        failpoints(&mut setup.environment[1], &format!("drop_acked_item={never}"));
    });
    assert!((1..=2).contains(&row.lost), "lost {}: {:?}", row.lost, row.problems);
    assert_eq!(row.steps_back, 0);
}

#[test]
fn the_lab_notices_a_look_that_is_applied_late_behind_the_stamps() {
    let _gate = shared();
    let row = sabotaged(&SABOTAGE, |setup| {
        failpoints(&mut setup.environment[1], "apply_late=return");
    });
    assert!(row.steps_back > 0, "steps back {}: {:?}", row.steps_back, row.problems);
}

/// kill -9 while events wait whose key can't be looked at, with a commit behind the first of each partition.
static KILLED_BEHIND_A_COMMIT: Fault = Fault {
    play: |world, _| {
        let source = world.source(0).proxy();
        source.cut();
        let relay = world.relay();
        // What was looked at before goes its way; then nothing can be finished any more, and the last commit has been made.
        let (mut last, mut since) = (0, Instant::now());
        wait_until("the last watermarks are committed", Duration::from_secs(30), || {
            let committed = evrepl_lab::flow_sums(&[relay])[0].committed;
            if committed != last {
                (last, since) = (committed, Instant::now());
            }
            since.elapsed() > Duration::from_secs(3)
        });
        world.kill_and_start(relay, Duration::ZERO);
        source.pass();
        Ok(())
    },
    ..SABOTAGE
};

#[test]
fn the_lab_notices_one_event_that_is_committed_early_with_a_kill_behind_it() {
    let _gate = shared();
    let row = sabotaged(&KILLED_BEHIND_A_COMMIT, |setup| {
        setup.load.hot_keys = 0;
        failpoints(&mut setup.environment[0], "commit_early=return");
    });
    // One of each of four partitions.
    assert!((1..=4).contains(&row.lost), "lost {}: {:?}", row.lost, row.problems);
}
