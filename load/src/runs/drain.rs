//! A drain: everything is written while the relays are stopped; then they start on a full topic.

use std::time::{Duration, Instant};

use super::costs::Costs;
use super::generate::child::Generator;
use super::measured::Measured;
use super::progress::Progress;
use super::scenario::Scenario;
use super::trial::STALLED_AFTER;
use super::world::World;
use crate::stop::Stop;

/// The first so many-th part of the events is not in the rate: partitions are assigned one by one, the broker reads from disk.
const WARM_UP: u64 = 10;

/// How often the accounts are read at least and at most: a drain's end is met to 10 ms, and being asked costs the relay nothing
/// that shows.
const SAMPLE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));

/// And while nothing happens.
const WAITING: Duration = Duration::from_millis(25);

/// A relay that starts joins its group within this.
const JOINED_WITHIN: Duration = Duration::from_secs(60);

/// `None` when somebody asked to stop.
pub fn drain(
    world: &World<'_>,
    generator: &mut Generator,
    scenario: &Scenario,
    stop: &Stop,
) -> Option<(Measured, u64)> {
    let writes = scenario.events;
    {
        let mut progress = Progress::new("written, the relay stopped", writes);
        generator.fill(writes, |done| {
            progress.at(done);
            stop.asked()
        });
    }
    if stop.asked() {
        return None;
    }
    let events = writes * world.peers.len() as u64;
    let mut costs = Costs::begin(world, generator);
    let started = Instant::now();
    world.spawn_relays();
    costs.relays(world);
    let mut progress = Progress::new("drained", events);
    let mut measured = Measured {
        events,
        ..Measured::default()
    };
    let mut warm: Option<(Instant, u64)> = None;
    let (mut last, mut moved) = (0, Instant::now());
    let mut next = SAMPLE.0;
    while last < events {
        if stop.wait(next) {
            return None;
        }
        world.relays_run();
        let finished = world.totals().map_or(last, |totals| totals.finished());
        let now = Instant::now();
        let patience = STALLED_AFTER + JOINED_WITHIN * u32::from(last == 0);
        if finished > last {
            next = until_next(events - finished.min(events), finished - last, now - moved);
            (last, moved) = (finished, now);
            measured
                .first_outcome_seconds
                .get_or_insert((now - started).as_secs_f64());
            if warm.is_none() && finished >= events / WARM_UP {
                warm = Some((now, finished));
            }
        } else if now - moved > patience {
            measured.problems.push(format!("stalled at {last} of {events}"));
            break;
        } else {
            next = WAITING;
        }
        progress.at(last);
    }
    if let Some((at, count)) = warm.filter(|(at, _)| *at < moved) {
        measured.events_per_second = Some((last - count) as f64 / (moved - at).as_secs_f64());
    }
    costs.read(&mut measured, events);
    Some((measured, writes))
}

/// Half of the time that is left, if it goes on as it did: so the end is met exactly with few looks.
fn until_next(left: u64, done: u64, took: Duration) -> Duration {
    let rest = took.mul_f64(left as f64 / done.max(1) as f64);
    (rest / 2).clamp(SAMPLE.0, SAMPLE.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_drain_is_looked_for_more_often_the_nearer_it_is() {
        let second = Duration::from_secs(1);
        assert_eq!(until_next(1_000_000, 1_000, second), SAMPLE.1);
        assert_eq!(until_next(300, 1_000, second), Duration::from_millis(150));
        assert_eq!(until_next(0, 1_000, second), SAMPLE.0);
    }
}
