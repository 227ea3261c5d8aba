//! Waiting for conditions, never for time; and the gates that keep heavy tests apart.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;
use std::time::{Duration, Instant};

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(20);

/// Whether `condition` came true within `limit`.
pub fn holds_within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(POLL);
    }
}

/// Waits until `condition` holds.
///
/// # Panics
/// When it doesn't within `limit`, naming `what` was waited for.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, condition: impl FnMut() -> bool) {
    if !holds_within(limit, condition) {
        panic!("waited {limit:?} in vain: {what}");
    }
}

static GATE: RwLock<()> = RwLock::new(());

/// For a test that needs the machine to itself (it measures, or it floods): waits until no other gated test runs.
pub fn exclusive() -> RwLockWriteGuard<'static, ()> {
    // A test that failed inside the gate says nothing about the next one.
    GATE.write().unwrap_or_else(PoisonError::into_inner)
}

/// For every other test that starts regions: runs beside its like, but not beside an [`exclusive`] one.
pub fn shared() -> RwLockReadGuard<'static, ()> {
    GATE.read().unwrap_or_else(PoisonError::into_inner)
}
