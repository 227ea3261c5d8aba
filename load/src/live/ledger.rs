//! What every key of one region must hold: noted by the application that writes them, read by whoever checks.
//!
//! A key is a number below [`KEYS`]; each number is written by one task only, so that what was written last is known.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::values;

/// Keys that are written again and again: what most caches look like.
pub const HOT: u64 = 10_000;

/// Keys that are written once, and again only after so many others: on a key written often, the next write heals a loss
/// and hides it.
pub const ONCE: u64 = 200_000;

/// Keys whose arrival is timed.
pub const PROBES: u64 = 64;

/// All keys: hot ones first, then those written once, then probes.
pub const KEYS: u64 = HOT + ONCE + PROBES;

/// What a key must hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Held {
    /// It was never written.
    #[default]
    Never,
    /// The value of this sequence number.
    Value(u64),
    /// Nothing: it was deleted.
    Nothing,
    /// A write ended in an error: either of two states, the same in both regions.
    Unknown,
}

/// What the ledger says of a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    pub held: Held,
    /// The last write gave it a new expiry.
    pub touched: bool,
    /// Counts its writes, so that a reader notices one that happened meanwhile.
    pub version: u32,
    /// A write is under way.
    pub writing: bool,
}

struct Pages {
    entries: Vec<Entry>,
    /// Finished writes in the order in which they finished.
    recent: VecDeque<(Instant, u64, u32)>,
}

/// The ledger of one region.
pub struct Ledger {
    region: String,
    pages: Mutex<Pages>,
    sequence: AtomicU64,
    writes: AtomicU64,
    failed: AtomicU64,
    first_failure: Mutex<Option<String>>,
}

impl Ledger {
    pub fn new(region: &str) -> Ledger {
        Ledger {
            region: region.into(),
            pages: Mutex::new(Pages {
                entries: vec![Entry::default(); KEYS as usize],
                recent: VecDeque::new(),
            }),
            sequence: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            first_failure: Mutex::new(None),
        }
    }

    /// The key of this number: every region's keys have a prefix of their own.
    pub fn key(&self, number: u64) -> Vec<u8> {
        format!("{}:{number:06}", self.region).into_bytes()
    }

    /// A number that no value of this region has had.
    pub fn next_sequence(&self) -> u64 {
        self.sequence.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// What the key holds now.
    pub fn entry(&self, number: u64) -> Entry {
        self.pages().entries[number as usize]
    }

    /// A write of the key begins.
    pub fn begin(&self, number: u64) {
        let entry = &mut self.pages().entries[number as usize];
        entry.writing = true;
        entry.version = entry.version.wrapping_add(1);
    }

    /// The write is done: memcached has answered and Kafka holds the event.
    pub fn done(&self, number: u64, held: Held, touched: bool, now: Instant) {
        let mut pages = self.pages();
        let entry = &mut pages.entries[number as usize];
        (entry.held, entry.touched, entry.writing) = (held, touched, false);
        let version = entry.version;
        pages.recent.push_back((now, number, version));
        self.writes.fetch_add(1, Ordering::Relaxed);
    }

    /// The write has failed for good: what the key holds is not known.
    pub fn failed(&self, number: u64, why: String) {
        let entry = &mut self.pages().entries[number as usize];
        (entry.held, entry.touched, entry.writing) = (Held::Unknown, false, false);
        self.failed.fetch_add(1, Ordering::Relaxed);
        let mut first = self.first_failure.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(why);
    }

    /// Takes the keys whose last write was done before `then`, with their entries: they should be in the other region.
    pub fn take_due(&self, then: Instant) -> Vec<(u64, Entry)> {
        let mut pages = self.pages();
        let mut due = Vec::new();
        while let Some((at, number, version)) = pages.recent.front().copied()
            && at <= then
        {
            pages.recent.pop_front();
            let entry = pages.entries[number as usize];
            // One that was written again has a later turn.
            if entry.version == version {
                due.push((number, entry));
            }
        }
        due
    }

    /// Every key that was ever written.
    pub fn written(&self) -> Vec<(u64, Entry)> {
        let pages = self.pages();
        let all = pages.entries.iter().copied().zip(0..);
        all.filter(|(entry, _)| entry.held != Held::Never)
            .map(|(entry, number)| (number, entry))
            .collect()
    }

    /// Writes that Kafka holds the event of.
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    /// Writes that failed, and why the first one did.
    pub fn failures(&self) -> Option<(u64, String)> {
        let first = self.first_failure.lock().unwrap_or_else(PoisonError::into_inner);
        let first = first.clone()?;
        Some((self.failed.load(Ordering::Relaxed), first))
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The value of a sequence number: the number in 16 hexadecimal digits, then up to 400 bytes of any kind.
pub fn value(sequence: u64) -> Vec<u8> {
    let mut value = format!("{sequence:016x}").into_bytes();
    let length = values::Mixer::new(sequence).below(400);
    values::append(&mut value, sequence, length as usize);
    value
}

/// The flags of a sequence number's value: all 32 bits are used.
pub fn flags(sequence: u64) -> u32 {
    values::Mixer::new(!sequence).draw() as u32
}

/// The sequence number that a value carries.
pub fn sequence_of(value: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(value.get(..16)?).ok()?;
    u64::from_str_radix(digits, 16).ok()
}

/// Whether a memcached's answer is what the key must hold.
pub fn as_expected(held: Held, found: Option<&(Vec<u8>, u32)>) -> bool {
    match (held, found) {
        (Held::Value(sequence), Some((bytes, held))) => *held == flags(sequence) && *bytes == value(sequence),
        (Held::Nothing | Held::Never, None) => true,
        (Held::Unknown, _) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn only_the_last_write_of_a_key_becomes_due_and_only_when_it_is_done() {
        let (ledger, now) = (Ledger::new("us-east-1"), Instant::now());
        let later = now + Duration::from_secs(1);
        for held in [Held::Value(1), Held::Nothing] {
            ledger.begin(7);
            ledger.done(7, held, false, now);
        }
        ledger.begin(8);
        assert_eq!(ledger.take_due(now - Duration::from_millis(1)), []);
        let due = ledger.take_due(later);
        assert_eq!(due.len(), 1);
        assert_eq!((due[0].0, due[0].1.held), (7, Held::Nothing));
        // A key that is being written again is not due for what it held before.
        ledger.done(8, Held::Value(2), false, now);
        ledger.begin(8);
        assert_eq!(ledger.take_due(later), []);
        assert_eq!(ledger.writes(), 3);
    }

    #[test]
    fn a_wrong_value_wrong_flags_and_a_copy_left_behind_are_noticed() {
        let right = (value(5), flags(5));
        assert_eq!(sequence_of(&right.0), Some(5));
        assert!(as_expected(Held::Value(5), Some(&right)));
        assert!(!as_expected(Held::Value(6), Some(&right)));
        assert!(!as_expected(Held::Value(5), Some(&(value(5), 0))));
        assert!(!as_expected(Held::Value(5), None));
        assert!(!as_expected(Held::Nothing, Some(&right)));
        assert!(as_expected(Held::Nothing, None) && as_expected(Held::Unknown, None));
        assert_eq!(sequence_of(b"short"), None);
    }

    #[test]
    fn what_failed_is_counted_and_the_first_reason_kept() {
        let ledger = Ledger::new("us-east-1");
        assert_eq!(ledger.failures(), None);
        for why in ["first", "second"] {
            ledger.begin(1);
            ledger.failed(1, why.into());
        }
        assert_eq!(ledger.failures(), Some((2, "first".into())));
        assert_eq!(ledger.written()[0].1.held, Held::Unknown);
    }
}
