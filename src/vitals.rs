//! Whether the process works at all, which is what `/livez` answers: its root turns, what the root supervises is there, and
//! it has not given up. Everything that is away outside, and everything that supervision mends, is no part of it.
//!
//! A plain type that the root writes to and the admin interface reads; the instant is passed in.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::admin::Check;

/// See the module.
#[derive(Debug)]
pub struct Vitals {
    /// What may take so long at most: a turn of the root's thread, or being built anew.
    limit: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    turned: Instant,
    /// Parts of the process, and since when they are down.
    parts: BTreeMap<String, Option<Instant>>,
    gave_up: Option<String>,
}

impl Vitals {
    /// A process that begins now, with nothing in it.
    pub fn new(limit: Duration, now: Instant) -> Vitals {
        let state = Mutex::new(State {
            turned: now,
            parts: BTreeMap::new(),
            gave_up: None,
        });
        Vitals { limit, state }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The root's thread turns.
    pub fn turned(&self, now: Instant) {
        self.lock().turned = now;
    }

    /// A part is built.
    pub fn up(&self, part: &str) {
        self.lock().parts.insert(part.to_owned(), None);
    }

    /// A part went down, and is to be built anew.
    pub fn down(&self, part: &str, now: Instant) {
        let mut state = self.lock();
        let since = state.parts.entry(part.to_owned()).or_default();
        since.get_or_insert(now);
    }

    /// Nothing is mended any more; the first reason stays.
    pub fn give_up(&self, why: &str) {
        self.lock().gave_up.get_or_insert_with(|| why.to_owned());
    }

    /// One by one; the process works when all are met.
    pub fn checks(&self, now: Instant) -> Vec<Check> {
        let state = self.lock();
        let still = now.saturating_duration_since(state.turned);
        let detail = match still >= self.limit {
            false => "turns".to_owned(),
            true => format!("has not turned for {} s", still.as_secs()),
        };
        let mut checks = vec![check("root thread", still < self.limit, detail)];
        let (ok, detail) = match &state.gave_up {
            None => (true, "mends what breaks".to_owned()),
            Some(why) => (false, format!("gave up: {why}")),
        };
        checks.push(check("supervision", ok, detail));
        for (part, since) in &state.parts {
            let down = since.map(|since| now.saturating_duration_since(since));
            let (ok, detail) = match down {
                None => (true, "is there".to_owned()),
                Some(down) if down < self.limit => (true, format!("is built anew, since {} s", down.as_secs())),
                Some(down) => (false, format!("is down for {} s and not built anew", down.as_secs())),
            };
            checks.push(check(part, ok, detail));
        }
        checks
    }
}

fn check(name: &str, ok: bool, detail: String) -> Check {
    Check {
        name: name.to_owned(),
        ok,
        gates: true,
        detail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn failed(vitals: &Vitals, now: Instant) -> Vec<String> {
        let checks = vitals.checks(now).into_iter().filter(|check| !check.ok);
        checks
            .map(|check| format!("{}: {}", check.name, check.detail))
            .collect()
    }

    #[test]
    fn a_process_works_while_its_root_turns_and_nothing_stays_down() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let vitals = Vitals::new(LIMIT, start);
        vitals.up("flow a->b");
        assert_eq!(failed(&vitals, at(9)), [""; 0]);
        assert_eq!(failed(&vitals, at(10)), ["root thread: has not turned for 10 s"]);
        vitals.turned(at(11));
        assert_eq!(failed(&vitals, at(20)), [""; 0]);

        vitals.down("flow a->b", at(20));
        vitals.down("flow a->b", at(25));
        vitals.turned(at(35));
        assert_eq!(failed(&vitals, at(29)), [""; 0], "it is being mended");
        assert_eq!(
            failed(&vitals, at(35)),
            ["flow a->b: is down for 15 s and not built anew"]
        );
        vitals.up("flow a->b");
        assert_eq!(failed(&vitals, at(35)), [""; 0]);
    }

    #[test]
    fn who_has_given_up_says_why_and_for_good() {
        let now = Instant::now();
        let vitals = Vitals::new(LIMIT, now);
        vitals.give_up("11 restarts within 60s");
        vitals.give_up("something later");
        assert_eq!(failed(&vitals, now), ["supervision: gave up: 11 restarts within 60s"]);
    }
}
