//! Eyes on the other region's memcached: a thread that times probes and finds keys that are overdue.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use evrepl_lab::CacheClient;

use super::application::{Probe, Shared};
use super::ledger::{Entry, as_expected, sequence_of};
use crate::latency::Latencies;

/// A key that is not right so long after its write was done counts as lost, until it is right after all.
pub const OVERDUE: Duration = Duration::from_secs(5);

/// How often probes are looked for: the finest latency that is told apart, always to evrepl's disadvantage.
const POLL: Duration = Duration::from_millis(1);

/// How often keys are checked that became due.
const CHECK: Duration = Duration::from_millis(250);

/// A probe that is long in coming is looked for again after this share of its age.
const PATIENCE: u32 = 20;

/// What the watcher has seen so far.
#[derive(Clone, Debug, Default)]
pub struct Sight {
    /// From just before a probe was written to when it was readable.
    pub latencies: Latencies,
    /// Keys that are overdue now.
    pub lost: u64,
    /// Probes that are not readable yet.
    pub waiting: u64,
}

/// A running watcher.
pub struct Watcher {
    sight: Arc<Mutex<Sight>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Watches what `shared`'s application wrote, with a client of the *other* region.
    ///
    /// # Panics
    /// When there can't be another thread.
    pub fn start(shared: &Arc<Shared>, client: CacheClient) -> Watcher {
        let (sight, over) = (Arc::<Mutex<Sight>>::default(), Arc::<AtomicBool>::default());
        let eyes = Eyes {
            shared: Arc::clone(shared),
            client,
            sight: Arc::clone(&sight),
            probes: Vec::new(),
            overdue: BTreeMap::new(),
        };
        let ended = Arc::clone(&over);
        let thread = thread::Builder::new()
            .name("watcher".into())
            .spawn(move || eyes.watch(&ended))
            .expect("a thread for the watcher");
        Watcher {
            sight,
            over,
            thread: Some(thread),
        }
    }

    pub fn sight(&self) -> Sight {
        self.sight.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether it still watches; it ends by itself when memcached doesn't answer.
    pub fn watches(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Eyes {
    shared: Arc<Shared>,
    client: CacheClient,
    sight: Arc<Mutex<Sight>>,
    /// With when each is looked for next.
    probes: Vec<(Probe, Instant)>,
    /// By key: as it should be.
    overdue: BTreeMap<u64, Entry>,
}

impl Eyes {
    fn watch(mut self, over: &AtomicBool) {
        let mut check = Instant::now();
        while !over.load(Ordering::Relaxed) {
            let now = Instant::now();
            self.look_for_probes(now);
            if now >= check {
                check = now + CHECK;
                self.check_due(now);
            }
            thread::sleep(POLL);
        }
    }

    fn look_for_probes(&mut self, now: Instant) {
        let new = self.shared.take_probes();
        self.probes.extend(new.into_iter().map(|probe| (probe, now)));
        let (asked, mut rest): (Vec<_>, Vec<_>) = self.probes.drain(..).partition(|(_, next)| *next <= now);
        if asked.is_empty() {
            self.probes = rest;
            return;
        }
        let numbers: Vec<u64> = asked.iter().map(|(probe, _)| probe.number).collect();
        let found = self.read(&numbers);
        let answered = Instant::now();
        let mut sight = self.sight.lock().unwrap_or_else(PoisonError::into_inner);
        for ((probe, _), found) in asked.into_iter().zip(found) {
            let age = answered - probe.since;
            let sequence = found.and_then(|(value, _)| sequence_of(&value));
            if sequence.is_some_and(|sequence| sequence >= probe.sequence) {
                sight.latencies.record(age);
            } else {
                rest.push((probe, answered + (age / PATIENCE).max(POLL)));
            }
        }
        sight.waiting = rest.len() as u64;
        drop(sight);
        self.probes = rest;
    }

    /// Checks the keys that became due, and again those that were not right.
    fn check_due(&mut self, now: Instant) {
        let Some(then) = now.checked_sub(OVERDUE) else { return };
        let ledger = &self.shared.ledger;
        self.overdue.extend(ledger.take_due(then));
        // One that was written again has a later turn.
        self.overdue
            .retain(|number, entry| ledger.entry(*number).version == entry.version);
        let numbers: Vec<u64> = self.overdue.keys().copied().collect();
        let found = self.read(&numbers);
        let ledger = &self.shared.ledger;
        for (number, found) in numbers.into_iter().zip(found) {
            let entry = self.overdue[&number];
            // The look may have met a write that began after it was chosen.
            let written = ledger.entry(number).version != entry.version;
            if written || as_expected(entry.held, found.as_ref()) {
                self.overdue.remove(&number);
            }
        }
        let mut sight = self.sight.lock().unwrap_or_else(PoisonError::into_inner);
        sight.lost = self.overdue.len() as u64;
    }

    fn read(&mut self, numbers: &[u64]) -> Vec<Option<(Vec<u8>, u32)>> {
        let keys: Vec<Vec<u8>> = numbers.iter().map(|number| self.shared.ledger.key(*number)).collect();
        let found = self.client.get_many(&keys);
        found.unwrap_or_else(|error| panic!("the other region's memcached does not answer: {error}"))
    }
}
