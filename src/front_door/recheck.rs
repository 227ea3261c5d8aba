//! Looking again after a moment, for what nobody announces.

use std::future::Future;
use std::pin::Pin;
use std::task::Context as Task;
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

/// How often it is looked.
const EVERY: Duration = Duration::from_millis(5);

/// A timer of one actor; nothing while it need not look again.
#[derive(Default)]
pub struct Recheck(Option<Pin<Box<Sleep>>>);

impl Recheck {
    /// Has the task polled again in a moment.
    pub fn soon(&mut self, task: &mut Task<'_>) {
        let timer = self.0.get_or_insert_with(|| Box::pin(sleep(EVERY)));
        if timer.as_mut().poll(task).is_ready() {
            timer.as_mut().reset(Instant::now() + EVERY);
            let _ = timer.as_mut().poll(task);
        }
    }

    /// It need not.
    pub fn done(&mut self) {
        self.0 = None;
    }

    /// Whether it does.
    pub fn waits(&self) -> bool {
        self.0.is_some()
    }
}
