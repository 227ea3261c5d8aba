//! The end of it: every key in both regions.

use evrepl_lab::Region;

use super::ledger::{Entry, Held, Ledger, as_expected};
use super::world::CACHE;

/// How many keys are read at once.
const PIECE: usize = 10_000;

/// What memcached's own clock and two roundings down may make of one expiry.
const EXPIRY_WITHIN: i64 = 5;

/// What the comparison has found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Compared {
    pub keys: u64,
    /// Keys that are not in the other region as they are in their own, or not as they were written.
    pub different: u64,
    /// The first of them, in words.
    pub first: Option<String>,
}

impl Compared {
    fn found(&mut self, key: &[u8], what: &str) {
        self.different += 1;
        self.first
            .get_or_insert_with(|| format!("{}: {what}", key.escape_ascii()));
    }

    /// Takes over `other`'s.
    pub fn add(&mut self, other: Compared) {
        self.keys += other.keys;
        self.different += other.different;
        self.first = self.first.take().or(other.first);
    }
}

/// Compares every key that was written in region `own` with its copy in `other`: value, flags, absence, and the expiry of
/// those touched last.
///
/// # Errors
/// When a memcached doesn't answer.
pub fn compare(ledger: &Ledger, own: &Region, other: &Region) -> std::io::Result<Compared> {
    let (mut source, mut copy) = (own.cache(CACHE).client(), other.cache(CACHE).client());
    let mut compared = Compared::default();
    for piece in ledger.written().chunks(PIECE) {
        let keys: Vec<Vec<u8>> = piece.iter().map(|(number, _)| ledger.key(*number)).collect();
        let (here, there) = (source.get_many(&keys)?, copy.get_many(&keys)?);
        for (index, (_, entry)) in piece.iter().enumerate() {
            compared.keys += 1;
            let (key, here, there) = (&keys[index], &here[index], &there[index]);
            if !as_expected(entry.held, here.as_ref()) {
                compared.found(key, "its own region does not hold what was written");
            } else if here != there {
                compared.found(key, "the other region's copy is another");
            } else if expires(entry) && !close(source.ttl(key)?, copy.ttl(key)?) {
                compared.found(key, "the other region's copy expires at another time");
            }
        }
    }
    Ok(compared)
}

fn expires(entry: &Entry) -> bool {
    entry.touched && matches!(entry.held, Held::Value(_))
}

fn close(here: Option<i64>, there: Option<i64>) -> bool {
    match (here, there) {
        (Some(here), Some(there)) => here >= 0 && there >= 0 && (here - there).abs() <= EXPIRY_WITHIN,
        (here, there) => here == there,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::ledger::{flags, value};
    use evrepl_lab::{CacheSpec, KafkaClient, RegionBuilder};
    use std::sync::Arc;
    use std::time::Instant;

    #[test]
    fn expiries_are_close_when_only_rounding_parts_them() {
        assert!(close(Some(3_600), Some(3_598)) && close(None, None));
        // For ever is not close to anything, not even to for ever: a touched key expires.
        assert!(!close(Some(3_600), Some(3_000)) && !close(Some(3_600), Some(-1)) && !close(Some(3_600), None));
        assert!(!close(Some(-1), Some(-1)));
    }

    #[test]
    fn every_way_in_which_a_copy_can_differ_is_found() {
        let region = |name: &str| {
            RegionBuilder::new(name)
                .kafka(&Arc::new(KafkaClient::new("127.0.0.1:9")))
                .topics_exist()
                .cache(CacheSpec::new(CACHE))
                .build()
        };
        let (own, other, ledger) = (region("own"), region("other"), Ledger::new("own"));
        let (mut source, mut copy) = (own.cache(CACHE).client(), other.cache(CACHE).client());
        let note = |number, held, touched| {
            ledger.begin(number);
            ledger.done(number, held, touched, Instant::now());
        };
        for number in 0..6 {
            let touched = number == 5;
            note(number, Held::Value(number), touched);
            for client in [&mut source, &mut copy] {
                let ttl = if touched { 3_600 } else { 0 };
                client
                    .set(&ledger.key(number), &value(number), flags(number), ttl)
                    .unwrap();
            }
        }
        note(6, Held::Nothing, false);
        let all = compare(&ledger, &own, &other).unwrap();
        assert_eq!((all.keys, all.different, all.first), (7, 0, None));

        copy.set(&ledger.key(0), &value(1), flags(0), 0).unwrap();
        copy.set(&ledger.key(1), &value(1), 0, 0).unwrap();
        copy.delete(&ledger.key(2)).unwrap();
        source.delete(&ledger.key(3)).unwrap();
        copy.touch(&ledger.key(5), 600).unwrap();
        copy.set(&ledger.key(6), b"left behind", 0, 0).unwrap();
        let all = compare(&ledger, &own, &other).unwrap();
        assert_eq!((all.keys, all.different), (7, 6));
        assert!(all.first.unwrap().starts_with("own:000000: "));
    }
}
