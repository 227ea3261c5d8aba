//! Threads of actors: they have names, and as they may hang, they are joined with a limit and abandoned beyond it.

use std::ffi::CString;
use std::sync::mpsc;
use std::time::Duration;

use actix_rt::Arbiter;

/// How long a thread that was told to stop may take: what it does between two looks at its commands is done in milliseconds.
pub const JOIN_LIMIT: Duration = Duration::from_secs(3);

/// A thread for actors that `top -H` shows under this name, of which Linux keeps 15 bytes: actix's own are all `actix-rt|system`.
pub fn named_arbiter(name: &str) -> Arbiter {
    let arbiter = Arbiter::new();
    if let Ok(name) = CString::new(name) {
        // Without a name it works as well.
        arbiter.spawn_fn(move || _ = rustix::thread::set_name(&name));
    }
    arbiter
}

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
    fn an_arbiter_is_seen_by_its_name() {
        actix_rt::System::new().block_on(async {
            let arbiter = named_arbiter("lane0 of a region with a long name");
            let (tell, told) = mpsc::channel();
            arbiter.spawn_fn(move || _ = tell.send(std::fs::read_to_string("/proc/thread-self/comm")));
            assert_eq!(told.recv().unwrap().unwrap().trim_end(), "lane0 of a regi");
            arbiter.stop();
            let _ = arbiter.join();
        });
    }

    #[test]
    fn a_thread_that_does_not_end_is_abandoned() {
        assert!(join_or_abandon("short", || ()));
        let (hold, held) = mpsc::channel::<()>();
        assert!(!join_or_abandon("hung", move || _ = held.recv()));
        drop(hold);
    }
}
