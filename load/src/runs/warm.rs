//! The broker's compiler: it takes a part of both cores until it has seen everything often enough.

use crate::processes::{Usage, child_with};

/// Its second compiler, which is the one that takes long.
const COMPILER: &str = "C2 CompilerThre";
/// With so few CPU-seconds in one go it has little left to do.
const COMPILED: f64 = 1.0;
/// But no longer than this.
const MOST: u32 = 8;

/// Repeats `once` until the broker's compiler has little left to do. A broker that has lived for a day has it behind it; one
/// that has just started compiles for as long as all of a short run, and stalls everything.
///
/// # Errors
/// What `once` says.
pub fn warm_up(mut once: impl FnMut() -> Result<(), String>) -> Result<(), String> {
    let broker = child_with("kafka.Kafka");
    for number in 1..=MOST {
        let before = Usage::of(broker);
        once()?;
        let compiled = Usage::of(broker).since(&before).of_threads(COMPILER);
        eprintln!("warming up, {number}: the broker compiled for {compiled:.1} CPU-seconds");
        if compiled < COMPILED {
            break;
        }
    }
    Ok(())
}
