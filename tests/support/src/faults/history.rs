//! What was written, what was seen at the destination, and whether the one can follow from the other. Pure.
//!
//! One writer writes a key, with versions that rise by one; a delete is a version too. So what a destination holds names the
//! write it comes from: a value by the version in it, nothing by a delete. A destination that follows the source, however
//! late and whatever it leaves out, shows versions that never fall.

use std::fmt;
use std::time::Instant;

/// A key of the load. Half of the writes go to keys that are written only once: on others the next write heals a lost event
/// and hides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// Written again and again.
    Hot(u32),
    /// Written once, as version 1.
    Once(u32),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Hot(number) => write!(f, "hot:{number}"),
            Key::Once(number) => write!(f, "once:{number}"),
        }
    }
}

/// The value of a version: `<key>:<version>:`, filled up to `bytes` with a pattern that depends on the version.
pub fn value_of(key: Key, version: u64, bytes: usize) -> Vec<u8> {
    let mut value = format!("{key}:{version}:").into_bytes();
    let mut state = version.wrapping_mul(2) | 1;
    while value.len() < bytes {
        // A multiplicative generator: what doesn't compress shows every byte that is wrong.
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        value.extend_from_slice(&state.to_le_bytes()[..(bytes - value.len()).min(8)]);
    }
    value
}

/// The version in a value of `key`; `None` when it is no value that [`value_of`] made for it.
pub fn version_in(key: Key, value: &[u8]) -> Option<u64> {
    let rest = value.strip_prefix(format!("{key}:").as_bytes())?;
    let digits = &rest[..rest.iter().position(|byte| *byte == b':')?];
    let version = std::str::from_utf8(digits).ok()?.parse().ok()?;
    // Whole and unchanged, not only well begun.
    (value_of(key, version, value.len()) == value).then_some(version)
}

/// One write of a key.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    /// From 1, one more with each write of the key.
    pub version: u64,
    pub delete: bool,
    /// Before memcached was asked.
    pub began: Instant,
    /// When memcached had answered; its event was produced after that.
    pub answered: Instant,
}

/// Every write of a run, by key, in order.
#[derive(Clone, Debug, Default)]
pub struct History {
    pub hot: Vec<Vec<Write>>,
    pub once: Vec<Write>,
}

impl History {
    pub fn of(&self, key: Key) -> &[Write] {
        match key {
            Key::Hot(number) => self.hot.get(number as usize).map_or(&[], Vec::as_slice),
            Key::Once(number) => self.once.get(number as usize..=number as usize).unwrap_or(&[]),
        }
    }

    /// All keys that were written.
    pub fn keys(&self) -> Vec<Key> {
        let hot = (0..self.hot.len() as u32).map(Key::Hot);
        let once = (0..self.once.len() as u32).map(Key::Once);
        hot.chain(once).filter(|key| !self.of(*key).is_empty()).collect()
    }

    /// How many writes there were.
    pub fn writes(&self) -> u64 {
        (self.once.len() + self.hot.iter().map(Vec::len).sum::<usize>()) as u64
    }

    /// What both regions must hold in the end: the version, `None` for nothing.
    pub fn last(&self, key: Key) -> Option<u64> {
        self.of(key)
            .last()
            .filter(|write| !write.delete)
            .map(|write| write.version)
    }
}

/// What a reader found under a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    Nothing,
    Version(u64),
    /// Bytes that no write made, their beginning.
    Foreign(String),
}

impl Held {
    pub fn from(key: Key, value: Option<&[u8]>) -> Held {
        match value {
            None => Held::Nothing,
            Some(value) => version_in(key, value).map_or_else(
                || Held::Foreign(value[..value.len().min(40)].escape_ascii().to_string()),
                Held::Version,
            ),
        }
    }
}

/// One look of a reader at the destination. Looks that find what the last one found need not be kept.
#[derive(Clone, Debug)]
pub struct Sighting {
    pub key: Key,
    pub held: Held,
    /// When the answer had come: what it says was true before.
    pub answered: Instant,
}

/// A time in which values may vanish at the destination for another reason than a delete: its memcached was restarted empty,
/// or refused writes (memcached drops the old value of a key whose new one it refuses). Nothing else excuses an absence, and
/// nothing at all an older version.
#[derive(Clone, Copy, Debug)]
pub struct Wipe {
    pub from: Instant,
    /// Until when values may vanish.
    pub until: Instant,
}

/// What can't follow from the writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A version was seen after a newer one (for `Held::Nothing`: without a delete that could be the reason).
    StepBack { key: Key, from: u64, to: Held },
    /// Never written, or not yet.
    Unwritten { key: Key, held: Held },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::StepBack { key, from, to } => write!(f, "{key} went back from version {from} to {to:?}"),
            Violation::Unwritten { key, held } => write!(f, "{key} held {held:?}, which nobody had written"),
        }
    }
}

/// Checks the sightings of one reader, which must be in their order; `wipes` are those of the server that it read.
pub fn check(history: &History, sightings: &[Sighting], wipes: &[Wipe]) -> Vec<Violation> {
    let mut keys = std::collections::HashMap::new();
    let mut violations = Vec::new();
    for sighting in sightings {
        let reached = keys.entry(sighting.key).or_insert(0);
        match follow(history.of(sighting.key), *reached, sighting, wipes) {
            Ok(now) => *reached = now,
            Err(violation) => {
                violations.push(violation);
                // It is told once; from here the key is followed anew.
                if let Held::Version(version) = sighting.held {
                    *reached = version;
                }
            }
        }
    }
    violations
}

/// The version that a key has reached at least, now that it was seen like this.
fn follow(writes: &[Write], reached: u64, sighting: &Sighting, wipes: &[Wipe]) -> Result<u64, Violation> {
    let (key, held) = (sighting.key, sighting.held.clone());
    // What had not begun when the answer came can't be what was seen.
    let begun = writes.iter().filter(|write| write.began <= sighting.answered);
    match sighting.held {
        Held::Version(version) => {
            if !begun.into_iter().any(|write| write.version == version && !write.delete) {
                return Err(Violation::Unwritten { key, held });
            }
            if version < reached {
                return Err(Violation::StepBack {
                    key,
                    from: reached,
                    to: held,
                });
            }
            Ok(version)
        }
        Held::Foreign(_) => Err(Violation::Unwritten { key, held }),
        // Nothing has arrived yet.
        Held::Nothing if reached == 0 => Ok(0),
        Held::Nothing => {
            let here = writes.iter().find(|write| write.version == reached);
            if here.is_some_and(|write| write.delete) {
                return Ok(reached);
            }
            // The next delete is the least that can have happened; a value from before it would be a step back.
            if let Some(delete) = begun.into_iter().find(|write| write.delete && write.version > reached) {
                return Ok(delete.version);
            }
            let wiped = |wipe: &Wipe| (wipe.from..=wipe.until).contains(&sighting.answered);
            match wipes.iter().any(wiped) {
                // What comes back must still not be older than what was there.
                true => Ok(reached),
                false => Err(Violation::StepBack {
                    key,
                    from: reached,
                    to: held,
                }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const KEY: Key = Key::Hot(0);

    /// One hot key, written once a second from second 1 on: `s` a set, `d` a delete.
    fn story(begin: Instant, ops: &str) -> History {
        let writes = ops.chars().enumerate().map(|(index, op)| Write {
            version: index as u64 + 1,
            delete: op == 'd',
            began: begin + Duration::from_secs(index as u64 + 1),
            answered: begin + Duration::from_millis(index as u64 * 1_000 + 1_100),
        });
        History {
            hot: vec![writes.collect()],
            once: Vec::new(),
        }
    }

    /// Checks what was seen one by one at second 10; `None` is nothing.
    fn seen(ops: &str, versions: &[Option<u64>]) -> usize {
        let begin = Instant::now();
        let sightings: Vec<Sighting> = versions.iter().map(|held| sighting(begin, 10, *held)).collect();
        check(&story(begin, ops), &sightings, &[]).len()
    }

    fn sighting(begin: Instant, second: u64, held: Option<u64>) -> Sighting {
        Sighting {
            key: KEY,
            held: held.map_or(Held::Nothing, Held::Version),
            answered: begin + Duration::from_secs(second),
        }
    }

    #[test]
    fn versions_may_be_left_out_but_never_fall() {
        assert_eq!(seen("ssss", &[None, Some(1), Some(3), Some(3), Some(4)]), 0);
        assert_eq!(seen("ssss", &[Some(3), Some(2)]), 1);
        assert_eq!(
            seen("ssss", &[Some(4), Some(1), Some(4)]),
            1,
            "one step back is told once"
        );
    }

    #[test]
    fn an_absence_needs_a_delete_and_is_then_as_new_as_that_delete() {
        assert_eq!(seen("ssds", &[Some(1), None, Some(4)]), 0);
        assert_eq!(seen("ss", &[Some(1), None]), 1);
        assert_eq!(
            seen("ssds", &[Some(1), None, Some(2)]),
            1,
            "the delete is newer than version 2"
        );
        assert_eq!(
            seen("sdsds", &[Some(1), None, Some(3)]),
            0,
            "only the first delete must have happened"
        );
        assert_eq!(seen("sdsds", &[Some(1), None, None, Some(3), None, Some(3)]), 1);
        assert_eq!(
            seen("sdss", &[Some(3), None]),
            1,
            "that delete is older than what was there"
        );
    }

    #[test]
    fn nothing_is_seen_before_it_was_written_and_nothing_that_never_was() {
        let begin = Instant::now();
        let history = story(begin, "sds");
        let early = |second, held| check(&history, &[sighting(begin, second, held)], &[]).len();
        assert_eq!((early(2, Some(3)), early(3, Some(3))), (1, 0));
        assert_eq!(early(9, Some(2)), 1, "a delete has no value");
        assert_eq!(early(9, Some(7)), 1);
        // A delete that comes later excuses no absence of now.
        let absent = [sighting(begin, 1, Some(1)), sighting(begin, 1, None)];
        assert_eq!(check(&history, &absent, &[]).len(), 1);
        let foreign = Sighting {
            held: Held::from(KEY, Some(b"hot:1:1:")),
            ..sighting(begin, 9, None)
        };
        assert_eq!(check(&history, &[foreign], &[]).len(), 1);
    }

    #[test]
    fn a_wiped_server_excuses_absence_while_it_lasts_and_never_an_older_version() {
        let begin = Instant::now();
        let history = story(begin, "sss");
        let wipes = [Wipe {
            from: begin + Duration::from_secs(4),
            until: begin + Duration::from_secs(6),
        }];
        let check = |sightings: &[(u64, Option<u64>)]| {
            let sightings: Vec<Sighting> = sightings.iter().map(|(at, held)| sighting(begin, *at, *held)).collect();
            super::check(&history, &sightings, &wipes).len()
        };
        assert_eq!(check(&[(4, Some(2)), (5, None), (7, Some(3))]), 0);
        assert_eq!(check(&[(4, Some(2)), (7, None)]), 1);
        assert_eq!(check(&[(4, Some(2)), (5, None), (6, Some(1))]), 1);
    }

    #[test]
    fn a_value_says_whose_it_is_and_a_changed_byte_is_noticed() {
        for bytes in [0, 20, 1_000] {
            let mut value = value_of(KEY, 12, bytes);
            assert_eq!(version_in(KEY, &value), Some(12));
            assert_eq!(version_in(Key::Hot(1), &value), None);
            *value.last_mut().unwrap() ^= 1;
            assert_eq!(version_in(KEY, &value), None);
        }
        assert_ne!(value_of(KEY, 12, 100), value_of(KEY, 14, 100));
    }

    #[test]
    fn the_last_write_decides_what_must_be_there() {
        let begin = Instant::now();
        assert_eq!(story(begin, "ssd").last(KEY), None);
        assert_eq!(story(begin, "sds").last(KEY), Some(3));
        assert_eq!(story(begin, "sds").keys(), [KEY]);
        assert_eq!(story(begin, "sds").writes(), 3);
    }
}
