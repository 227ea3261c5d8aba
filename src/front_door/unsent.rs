//! Keys whose events Kafka does not have: each is remembered once, for all its events, until one of them has arrived.

use foldhash::fast::RandomState;
use hashbrown::HashMap;

use crate::event::Op;

/// What an event says, besides its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Said {
    /// What happened.
    pub op: Op,
    /// The client's time to live.
    pub ttl: Option<u32>,
    /// The write only filled the cache.
    pub fill: bool,
}

impl Said {
    /// What an event says that comes late. A touch may have been overtaken meanwhile: where nobody looks at the keys of touches
    /// (`ignores_fills`), it does not say how long, for then somebody does.
    pub fn late(self, ignores_fills: bool) -> Said {
        match self.op == Op::Touch && ignores_fills {
            true => Said { ttl: None, ..self },
            false => self,
        }
    }

    /// What both say, in whichever order they came (one that waits in librdkafka's queue may be behind one that found it full):
    /// never a touch alone, if one is more, and a fill only if both are. Where nothing is heard of fills (`ignores_fills`) a touch
    /// is more than a fill: it still has to be heard of, and no copy has to go for it.
    fn with(self, earlier: Said, ignores_fills: bool) -> Said {
        let touches = [self, earlier].iter().any(|said| said.op == Op::Touch);
        let fills = [self, earlier].iter().any(|said| said.fill);
        let op = match touches && fills {
            true if ignores_fills => Op::Touch,
            _ => Op::merged(earlier.op, self.op),
        };
        // Elsewhere a touch of what was filled makes no other write of it.
        let fill = |said: Said| said.fill || (said.op == Op::Touch && !ignores_fills);
        Said {
            op,
            ttl: self.ttl,
            fill: op == Op::Set && fill(self) && fill(earlier),
        }
    }
}

#[derive(Debug)]
struct Keys {
    said: HashMap<Box<[u8]>, Said, RandomState>,
    ignores_fills: bool,
}

/// A key that is produced again, and what its event says.
pub type Taken = (Box<[u8]>, Said);

/// See the module. Not more than so many, by cache.
#[derive(Debug)]
pub struct Unsent {
    caches: Vec<Keys>,
    count: usize,
    /// Of these it is not known yet whether they have arrived: each keeps its place.
    taken: usize,
    most: usize,
}

impl Unsent {
    /// Of caches, of which it is told whether their peers ignore fills, with room for `most` keys.
    pub fn new(ignores_fills: impl Iterator<Item = bool>, most: usize) -> Unsent {
        Unsent {
            caches: ignores_fills
                .map(|ignores_fills| Keys {
                    said: HashMap::default(),
                    ignores_fills,
                })
                .collect(),
            count: 0,
            taken: 0,
            most,
        }
    }

    /// Keys of a cache that wait to be produced again.
    pub fn count(&self, cache: usize) -> usize {
        self.caches[cache].said.len()
    }

    /// Remembers a key; false when there is no room for it.
    pub fn add(&mut self, cache: usize, key: &[u8], said: Said) -> bool {
        let room = self.count + self.taken < self.most;
        let keys = &mut self.caches[cache];
        match keys.said.get_mut(key) {
            Some(known) => *known = said.with(*known, keys.ignores_fills),
            None if room => {
                keys.said.insert(key.into(), said);
                self.count += 1;
            }
            None => return false,
        }
        true
    }

    /// Takes so many of a cache out, if there are; each has to come to [`Unsent::arrived`] or [`Unsent::came_back`].
    pub fn take(&mut self, cache: usize, most: usize) -> Vec<Taken> {
        let keys = &mut self.caches[cache];
        let some: Vec<Box<[u8]>> = keys.said.keys().take(most).cloned().collect();
        let out = some.into_iter().filter_map(|key| keys.said.remove_entry(&key));
        let taken: Vec<Taken> = out.map(|(key, said)| (key, said.late(keys.ignores_fills))).collect();
        self.count -= taken.len();
        self.taken += taken.len();
        taken
    }

    /// Kafka has one that was taken out.
    pub fn arrived(&mut self) {
        self.taken -= 1;
    }

    /// Kafka did not take one that was taken out.
    pub fn came_back(&mut self, cache: usize, key: &[u8], said: Said) {
        self.taken -= 1;
        // It has its place, if the key has not come in meanwhile.
        let kept = self.add(cache, key, said);
        debug_assert!(kept, "its place was kept");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SET: Said = Said {
        op: Op::Set,
        ttl: Some(60),
        fill: true,
    };

    fn of(op: Op) -> Said {
        Said {
            op,
            ttl: None,
            fill: false,
        }
    }

    #[test]
    fn a_key_is_remembered_once_and_only_so_many_are() {
        let mut unsent = Unsent::new([false, false].into_iter(), 3);
        assert!(unsent.add(0, b"a", SET) && unsent.add(0, b"a", of(Op::Delete)));
        assert!(unsent.add(0, b"a", SET) && unsent.add(1, b"a", SET) && unsent.add(1, b"b", SET));
        assert!(!unsent.add(0, b"c", SET));
        assert!(unsent.add(1, b"b", SET), "it is known");
        assert_eq!([0, 1].map(|cache| unsent.count(cache)), [1, 2]);
        // Something more than a fill has happened to it.
        assert_eq!(unsent.take(0, 2), [(b"a"[..].into(), Said { fill: false, ..SET })]);
        assert_eq!((unsent.take(1, 1).len(), unsent.take(1, 2).len()), (1, 1));
        assert_eq!([0, 1].map(|cache| unsent.count(cache)), [0, 0]);
    }

    #[test]
    fn what_is_produced_again_keeps_its_place_until_it_has_arrived() {
        let mut unsent = Unsent::new([false].into_iter(), 2);
        assert!(unsent.add(0, b"a", SET) && unsent.add(0, b"b", SET));
        let taken = unsent.take(0, 2);
        assert!(!unsent.add(0, b"c", SET), "both may come back");
        let (key, said) = &taken[0];
        unsent.came_back(0, key, *said);
        assert!(!unsent.add(0, b"c", SET));
        unsent.arrived();
        assert!(unsent.add(0, b"c", SET));
        assert_eq!(unsent.count(0), 2);
    }

    #[test]
    fn a_remembered_key_with_a_new_value_is_no_touch_whichever_came_first() {
        for (first, then, said) in [
            (Op::Set, Op::Touch, Op::Set),
            (Op::Touch, Op::Set, Op::Set),
            (Op::Touch, Op::Delete, Op::Delete),
            (Op::Delete, Op::Touch, Op::Set),
            (Op::Touch, Op::Touch, Op::Touch),
        ] {
            for ignores_fills in [false, true] {
                let mut unsent = Unsent::new([ignores_fills].into_iter(), 3);
                assert!(unsent.add(0, b"a", of(first)) && unsent.add(0, b"a", of(then)));
                let (_, taken) = unsent.take(0, 1).remove(0);
                assert_eq!((taken.op, taken.fill), (said, false), "{first:?}, {then:?}");
            }
        }
    }

    #[test]
    fn a_touch_that_comes_late_says_how_long_only_where_its_key_is_looked_at_anyway() {
        let touch = Said {
            ttl: Some(60),
            ..of(Op::Touch)
        };
        for (ignores_fills, ttl) in [(false, Some(60)), (true, None)] {
            let mut unsent = Unsent::new([ignores_fills].into_iter(), 3);
            assert!(unsent.add(0, b"a", touch));
            let (_, taken) = unsent.take(0, 1).remove(0);
            assert_eq!((taken.op, taken.ttl), (Op::Touch, ttl));
        }
    }

    /// Where peers ignore fills, what is said of a fill and of something else must not be one.
    #[test]
    fn a_touch_is_heard_of_though_its_key_was_filled_too() {
        let (touch, delete, set) = (of(Op::Touch), of(Op::Delete), of(Op::Set));
        for (one, other) in [(touch, SET), (SET, touch)] {
            let replicated = one.with(other, false);
            assert_eq!((replicated.op, replicated.fill), (Op::Set, true));
            let invalidated = one.with(other, true);
            assert_eq!((invalidated.op, invalidated.fill), (Op::Touch, false));
            assert_eq!(invalidated.with(set, true).op, Op::Set);
        }
        for ignores_fills in [false, true] {
            assert!(SET.with(SET, ignores_fills).fill);
            assert!(!touch.with(touch, ignores_fills).fill && !set.with(SET, ignores_fills).fill);
            let refilled = SET.with(delete, ignores_fills);
            assert_eq!((refilled.op, refilled.fill), (Op::Set, false));
            assert_eq!(delete.with(SET, ignores_fills).op, Op::Delete);
        }
    }
}
