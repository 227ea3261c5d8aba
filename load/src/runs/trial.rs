//! One run of one scenario: starts what it needs, lets it happen, reads the accounts, compares, and ends it all.

use std::path::Path;
use std::time::Duration;

use evrepl::outcome::Outcome;
use evrepl_lab::Broker;

use super::generate::child::Generator;
use super::generate::keys::Keys;
use super::measured::Measured;
use super::scenario::{Kind, Scenario};
use super::world::{Exports, Totals, World};
use super::{climb, drain, open, verify};
use crate::stop::Stop;

/// A relay that finishes nothing for so long has lost what is left.
pub const STALLED_AFTER: Duration = Duration::from_secs(30);

/// Writes before an open loop begins: when they have come, the relay has its partitions and its links.
const FIRST_WRITES: u64 = 1_000;

/// What runs share.
#[derive(Debug)]
pub struct Bench<'a> {
    pub broker: &'a Broker,
    pub stop: &'a Stop,
    /// Where evrepl exports to; `None`: it exports nothing.
    pub exports: Option<Exports>,
}

impl Bench<'_> {
    /// Runs `scenario` once, with this evrepl or the usual one. `None` when somebody asked to stop.
    ///
    /// # Panics
    /// When something doesn't start, or breaks.
    pub fn run(&self, scenario: &Scenario, binary: Option<&Path>) -> Option<Measured> {
        let exports = self.exports.as_ref().filter(|_| scenario.traces > 0.0);
        let world = World::build(self.broker, scenario, binary, exports);
        world.start_agents();
        let program = std::env::current_exe().expect("this program has a path");
        let mut generator = Generator::start(&program, &world.spec(scenario));
        let (mut measured, writes) = match scenario.kind {
            Kind::Drain => drain::drain(&world, &mut generator, scenario, self.stop)?,
            kind => {
                world.spawn_relays();
                world.await_relays();
                generator.fill(FIRST_WRITES, |_| self.stop.asked());
                let first = FIRST_WRITES * world.peers.len() as u64;
                open::await_finished(&world, first, "first writes", self.stop)?;
                match kind {
                    Kind::Ramp => climb::climb(&world, &mut generator, scenario, self.stop)?,
                    _ => open::open(&world, &mut generator, scenario, self.stop)?,
                }
            }
        };
        drop(generator);
        self.judge(&world, scenario, &mut measured, writes);
        world.end();
        Some(measured)
    }

    /// The accounts, and every key.
    fn judge(&self, world: &World<'_>, scenario: &Scenario, measured: &mut Measured, writes: u64) {
        let events = writes * world.peers.len() as u64;
        let totals = world.totals().unwrap_or_default();
        measured
            .problems
            .extend(verify::accounts(&totals, events, scenario.relays));
        measured.superseded_share = superseded_share(&totals);
        measured.items_per_batch = items_per_batch(world);
        measured.outcomes = totals.outcomes;
        let keys = Keys::new(scenario.keys);
        for peer in &world.peers {
            let (lost, compared) = verify::lost(peer, &keys, writes, scenario.value_bytes);
            measured.lost += lost;
            measured.compared += compared;
        }
        if measured.lost > 0 {
            let lost = format!(
                "{} of {} keys are not as they were last written",
                measured.lost, measured.compared
            );
            measured.problems.push(lost);
        }
        let regions = world.peers.iter().chain(world.relays.first());
        measured.evictions = regions.map(verify::evictions).sum();
        if measured.evictions > 0 {
            let evicted = format!("{} values were evicted: more memory is needed", measured.evictions);
            measured.problems.push(evicted);
        }
    }
}

fn superseded_share(totals: &Totals) -> f64 {
    totals.outcome(Outcome::Superseded) as f64 / totals.finished().max(1) as f64
}

fn items_per_batch(world: &World<'_>) -> Option<f64> {
    let sum = |name: &str| -> f64 { world.relays.iter().filter_map(|relay| relay.metric(name, &[])).sum() };
    let batches = sum("evrepl_batch_items_count");
    (batches > 0.0).then(|| sum("evrepl_batch_items_sum") / batches)
}
