//! One line that says how far a run is: refreshed on a terminal, every few seconds elsewhere. On stderr, so that stdout
//! holds nothing but results.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

const ON_A_TERMINAL: Duration = Duration::from_millis(200);
const ELSEWHERE: Duration = Duration::from_secs(5);

/// The progress of one step.
#[derive(Debug)]
pub struct Progress {
    what: String,
    total: u64,
    terminal: bool,
    next: Instant,
}

impl Progress {
    /// Of a step that ends at `total`.
    pub fn new(what: &str, total: u64) -> Progress {
        Progress {
            what: what.into(),
            total,
            terminal: std::io::stderr().is_terminal(),
            next: Instant::now(),
        }
    }

    /// Says how far it is, when it is time to.
    pub fn at(&mut self, done: u64) {
        let now = Instant::now();
        if now < self.next {
            return;
        }
        let percent = done * 100 / self.total.max(1);
        let line = format!("  {}: {done} of {} ({percent} %)", self.what, self.total);
        let mut stderr = std::io::stderr().lock();
        if self.terminal {
            let _ = write!(stderr, "\r{line}\x1b[K");
            let _ = stderr.flush();
            self.next = now + ON_A_TERMINAL;
        } else {
            let _ = writeln!(stderr, "{line}");
            self.next = now + ELSEWHERE;
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
