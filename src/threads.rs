//! Threads that may hang: they are joined with a limit, and abandoned beyond it.

use std::sync::mpsc;
use std::time::Duration;

use actix_rt::Arbiter;

/// How long a thread that was told to stop may take: what it does between two looks at its commands is done in milliseconds.
pub const JOIN_LIMIT: Duration = Duration::from_secs(3);

/// Waits until `join` returns, for [`JOIN_LIMIT`] at most. False when the thread is abandoned: whatever it still holds is lost,
/// and what it does when it wakes up must be harmless. Blocks.
pub fn join_or_abandon(name: &str, join: impl FnOnce() + Send + 'static) -> bool {
    let (done, ended) = mpsc::channel();
    let its_name = name.to_owned();
    let joining = std::thread::Builder::new().name("join".to_owned()).spawn(move || {
        join();
        if done.send(()).is_err() {
            tracing::warn!(thread = its_name, "abandoned thread has ended");
        }
    });
    // Without a thread to wait in there is nothing left to wait with: as if it had not ended.
    let joined = joining.is_ok() && ended.recv_timeout(JOIN_LIMIT).is_ok();
    if !joined {
        tracing::error!(thread = name, limit = ?JOIN_LIMIT, "thread does not end, it is abandoned");
    }
    joined
}

/// [`join_or_abandon`] for an arbiter that was told to stop.
pub fn join_arbiter(name: &str, arbiter: Arbiter) -> bool {
    join_or_abandon(name, move || _ = arbiter.join())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_does_not_end_is_abandoned() {
        assert!(join_or_abandon("short", || ()));
        let (hold, held) = mpsc::channel::<()>();
        assert!(!join_or_abandon("hung", move || _ = held.recv()));
        drop(hold);
    }
}
