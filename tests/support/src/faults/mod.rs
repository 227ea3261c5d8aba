//! The fault lab: load, a fault in the middle of it, and the proof that nothing was lost by it.
//!
//! [`run()`] starts a [`World`] (two regions, real Kafka and memcached, a network that fails on demand), lets an application
//! write it ([`load`]) and readers watch its destination ([`watcher`]), plays one or two faults of the [`catalogue`], waits
//! until everything has caught up, and checks three things:
//!
//! - every key is equal in both regions, and as it was last written; half of the writes go to keys written only once;
//! - no key went back to an older state at the destination while it was watched ([`history`], pure);
//! - `consumed = sum(outcomes) + in flight` at every sample of every process, `consumed` is what Kafka's offsets say, and no
//!   process took more memory than `evrepl check` had printed ([`accounts`]).
//!
//! `make faults` runs all of them; the short form of each is a test. That the lab notices what it should is tested too, with
//! a product that is made to lose, to reorder and to commit too early.

pub mod accounts;
mod caches;
pub mod catalogue;
pub mod history;
mod kafka;
pub mod load;
mod network;
mod processes;
pub mod random;
mod run;
pub mod watcher;
pub mod world;

pub use catalogue::{FAULTS, Fault, two_at_random};
pub use run::{Live, Others, Plan, Row, run};
pub use world::{Setup, World};

/// What a panic said.
fn said(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied())
        .unwrap_or("a panic")
        .to_string()
}
