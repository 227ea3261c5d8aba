//! A ramp: open loops at rates that a search chooses, one after the other, in one pair of processes.

use super::generate::child::Generator;
use super::measured::{Measured, Tried};
use super::open::{Paced, observe};
use super::scenario::Scenario;
use super::search::{Search, Step};
use super::world::World;
use crate::stop::Stop;

/// How long a rate is tried: its thirds are far enough apart to tell a few percent.
const TRY_SECONDS: u64 = 6;

/// And before that, at the same rate.
const SETTLE_SECONDS: u64 = 2;

/// `None` when somebody asked to stop.
pub fn climb(
    world: &World<'_>,
    generator: &mut Generator,
    scenario: &Scenario,
    stop: &Stop,
) -> Option<(Measured, u64)> {
    let mut search = Search::from(scenario.rate);
    let mut steps: Vec<Tried> = Vec::new();
    let mut last = Measured::default();
    loop {
        let (rate, seconds) = match search.next() {
            Step::Try(rate) => (rate, TRY_SECONDS),
            Step::Confirm(rate) => (rate, scenario.seconds),
            Step::Found(rate) => {
                last.max_rate = Some(rate);
                break;
            }
            Step::NotFound => {
                last.problems.push("no rate was borne without growing lag".into());
                break;
            }
        };
        let paced = Paced {
            rate,
            warm_up_seconds: SETTLE_SECONDS,
            seconds,
            impatient: true,
        };
        let observed = observe(world, generator, paced, &format!("tried, {rate} a second"), stop)?;
        let passed = observed.lag.is_some_and(|lag| !lag.grows);
        let tried = Tried {
            rate,
            seconds,
            lag: observed.lag.unwrap_or_default(),
            latency_ms: observed.seen.latency_ms,
        };
        eprintln!(
            "  {rate} a second for {seconds} s: {}",
            if passed { "borne" } else { "too much" }
        );
        steps.push(tried);
        search.saw(passed);
        last = observed.into_measured();
        // A rate that is too high leaves watched writes behind that were never made.
        last.problems.clear();
    }
    last.steps = steps;
    Some((last, generator.written()))
}
