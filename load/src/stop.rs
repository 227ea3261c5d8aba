//! Ctrl-C: the first one asks, the next one ends the process, unless the first has had its effect.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

/// As a shell reports a program ended by SIGINT.
const INTERRUPTED: i32 = 130;

/// Whether somebody wants this program to come to its end. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    shared: Arc<(Mutex<bool>, Condvar)>,
}

impl Stop {
    /// Listens for SIGINT, SIGTERM and SIGHUP (a closed terminal). The first asks; one that comes while that holds removes
    /// `leftovers` and ends the process at once, and the kernel ends its children with it.
    ///
    /// # Panics
    /// When the process can't have a thread or a signal handler.
    pub fn on_signals(leftovers: impl FnOnce() + Send + 'static) -> Stop {
        let stop = Stop::default();
        let asked = stop.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        let runtime = runtime.expect("a runtime for signals");
        // The handlers are in place when this returns, not only once the thread runs.
        let signals = {
            let _inside = runtime.enter();
            [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal)
        };
        let [mut interrupt, mut terminate, mut hangup] = signals.map(|signal| signal.expect("a signal handler"));
        let listen = async move {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                    _ = hangup.recv() => {}
                }
                if asked.ask() {
                    break;
                }
            }
            leftovers();
            std::process::exit(INTERRUPTED);
        };
        thread::Builder::new()
            .name("signals".into())
            .spawn(move || runtime.block_on(listen))
            .expect("a thread for signals");
        stop
    }

    /// Asks; whether somebody had already.
    pub fn ask(&self) -> bool {
        let (asked, changed) = &*self.shared;
        let before = std::mem::replace(&mut *asked.lock().unwrap_or_else(PoisonError::into_inner), true);
        changed.notify_all();
        before
    }

    /// What was asked for is done: the next one asks again.
    pub fn done(&self) {
        *self.shared.0.lock().unwrap_or_else(PoisonError::into_inner) = false;
    }

    pub fn asked(&self) -> bool {
        *self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sleeps until somebody asks.
    pub fn until_asked(&self) {
        let (asked, changed) = &*self.shared;
        let held = asked.lock().unwrap_or_else(PoisonError::into_inner);
        drop(
            changed
                .wait_while(held, |asked| !*asked)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Sleeps for `time`, or until somebody asks; says whether somebody has.
    pub fn wait(&self, time: Duration) -> bool {
        let (asked, changed) = &*self.shared;
        let until = Instant::now() + time;
        let mut held = asked.lock().unwrap_or_else(PoisonError::into_inner);
        while !*held {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            held = changed
                .wait_timeout(held, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        *held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_waits_is_woken_by_the_first_ask() {
        let stop = Stop::default();
        assert!(!stop.asked() && !stop.wait(Duration::ZERO));
        let waiting = stop.clone();
        let waiter = thread::spawn(move || waiting.wait(Duration::from_secs(600)));
        assert!(!stop.ask());
        assert!(waiter.join().unwrap() && stop.asked());
    }

    #[test]
    fn whoever_asks_twice_is_known_unless_the_first_was_done() {
        let stop = Stop::default();
        assert!(!stop.ask() && stop.ask());
        stop.until_asked();
        stop.done();
        assert!(!stop.asked() && !stop.ask() && stop.ask());
    }
}
