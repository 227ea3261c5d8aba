//! The open batch: the newest item per key, until it leaves on bytes, count or linger, or because nothing is under way. A plain type without clock or I/O.

use std::hash::BuildHasher;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use tokio::time::Instant;

use crate::relay::{HeldEvent, HeldItem, Seen};

/// Why a batch left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// It reached `batch.max_bytes`.
    Bytes,
    /// It reached `batch.max_items`.
    Items,
    /// Its oldest item had waited for `batch.linger`.
    Linger,
    /// Its oldest item had waited for `batch.idle_linger`, and nothing was under way to the peer.
    Idle,
}

impl Trigger {
    /// The public name.
    pub fn name(self) -> &'static str {
        match self {
            Trigger::Bytes => "bytes",
            Trigger::Items => "items",
            Trigger::Linger => "linger",
            Trigger::Idle => "idle",
        }
    }
}

/// An event that another one replaced, and the bytes that its item held and no longer does.
#[derive(Debug)]
pub struct Replaced {
    /// The event that is superseded.
    pub event: HeldEvent,
    /// Bytes to give back to the flow's budget.
    pub bytes: usize,
}

/// See the module.
#[derive(Debug)]
pub struct OpenBatch {
    max_items: usize,
    max_bytes: usize,
    items: Vec<HeldItem>,
    /// By cache and key: the place among the items.
    newest: HashTable<u32>,
    hasher: foldhash::fast::RandomState,
    bytes: usize,
    opened: Option<Instant>,
}

impl OpenBatch {
    /// An empty batch that is full at `max_items` items or `max_bytes` bytes of keys, values and overhead.
    pub fn new(max_items: usize, max_bytes: usize) -> Self {
        OpenBatch {
            max_items,
            max_bytes,
            items: Vec::with_capacity(max_items.min(4096)),
            newest: HashTable::new(),
            hasher: Default::default(),
            bytes: 0,
            opened: None,
        }
    }

    /// Items in the batch.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there is nothing to ship.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// When the first item came.
    pub fn opened(&self) -> Option<Instant> {
        self.opened
    }

    /// What makes it leave now, if anything does without waiting.
    pub fn full(&self) -> Option<Trigger> {
        if self.bytes >= self.max_bytes {
            Some(Trigger::Bytes)
        } else if self.items.len() >= self.max_items {
            Some(Trigger::Items)
        } else {
            None
        }
    }

    /// Bytes of keys, values and overhead so far.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds an item; the key's older one is replaced. Of their two events the one stays that `survives` (the new one, the
    /// old one) says. A touch only brings its expiry to an item with a value, keeping that
    /// value's stamp, and is itself superseded by a removal: the write that brought the key back has an event of its own.
    pub fn push(
        &mut self,
        mut item: HeldItem,
        now: Instant,
        survives: impl Fn(&HeldEvent, &HeldEvent) -> bool,
    ) -> Option<Replaced> {
        self.opened.get_or_insert(now);
        let items = &self.items;
        let hash_of = |event: &HeldEvent| self.hasher.hash_one((event.cache, &event.key[..]));
        let same = |at: &u32| {
            let held = &items[*at as usize].event;
            held.key == item.event.key && held.cache == item.event.cache
        };
        let rehash = |at: &u32| hash_of(&items[*at as usize].event);
        let at = match self.newest.entry(hash_of(&item.event), same, rehash) {
            Entry::Vacant(entry) => {
                entry.insert(self.items.len() as u32);
                self.bytes += item.bytes();
                self.items.push(item);
                return None;
            }
            Entry::Occupied(entry) => *entry.get() as usize,
        };
        let older = &mut self.items[at];
        let stays = survives(&item.event, &older.event);
        // Whoever waits for the probe's answer gets it from the item that is sent in its stead.
        let probe = item.event.probe | older.event.probe;
        if let (Seen::Touch(_), Seen::Nothing(_)) = (&item.seen, &older.seen) {
            let bytes = item.bytes();
            let strangers = older.event.ticket.consumer != item.event.ticket.consumer;
            if strangers && stays && !survives(&older.event, &item.event) {
                // The removal's event is nobody's any more: the touch's answers for the key.
                std::mem::swap(&mut older.event, &mut item.event);
            }
            older.event.probe = probe;
            return Some(Replaced {
                bytes,
                event: item.event,
            });
        }
        let held = older.bytes() + item.bytes();
        let before = older.bytes();
        let mut event = match (&mut older.seen, item.seen) {
            (Seen::Value { expiry, .. }, Seen::Touch(newer)) => {
                *expiry = newer;
                // One age for both: the expiry's. The stamp stays that of the value, the older look.
                older.looked = item.looked;
                if older.session != item.session {
                    // Two looks of two sessions: the value's may not be sent any more.
                    older.session = 0;
                }
                std::mem::replace(&mut older.event, item.event)
            }
            (_, seen) => {
                let newer = HeldItem { seen, ..item };
                std::mem::replace(older, newer).event
            }
        };
        if !stays {
            std::mem::swap(&mut older.event, &mut event);
        }
        older.event.probe = probe;
        let after = older.bytes();
        self.bytes = self.bytes + after - before;
        Some(Replaced {
            event,
            bytes: held - after,
        })
    }

    /// Empties the batch: its items in the order in which their keys first came.
    pub fn take(&mut self) -> Vec<HeldItem> {
        self.newest.clear();
        self.bytes = 0;
        self.opened = None;
        let next = Vec::with_capacity((self.items.len() * 2).min(self.max_items));
        std::mem::replace(&mut self.items, next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Op;
    use crate::outcome::Outcome;
    use crate::relay::Ticket;
    use crate::wire::Expiry;
    use bytes::Bytes;
    use proptest::prelude::*;

    fn item(key: u8, seq: u64, seen: Seen, looked_at: u64) -> HeldItem {
        HeldItem {
            event: HeldEvent {
                ver: seq,
                ..HeldEvent::new(
                    Bytes::from(vec![key]),
                    (0, 0),
                    Op::Set,
                    0,
                    Ticket { consumer: 0, seq },
                    Instant::now(),
                )
            },
            seen,
            looked_at,
            session: 1,
            looked: Instant::now(),
            seen_at: Instant::now(),
        }
    }

    fn newer(_: &HeldEvent, _: &HeldEvent) -> bool {
        true
    }

    fn value(bytes: &'static [u8]) -> Seen {
        Seen::Value {
            value: Bytes::from_static(bytes),
            flags: 7,
            expiry: Expiry::Never,
        }
    }

    #[test]
    fn the_newest_item_of_a_key_is_the_one_that_leaves() {
        let now = Instant::now();
        let mut batch = OpenBatch::new(10, 1 << 20);
        assert!(batch.push(item(1, 0, value(b"old"), 1), now, newer).is_none());
        assert!(batch.push(item(2, 1, value(b"other"), 1), now, newer).is_none());
        let replaced = batch.push(item(1, 2, value(b"newer"), 2), now, newer).unwrap();
        assert_eq!(replaced.event.ticket.seq, 0);
        let items = batch.take();
        assert_eq!(items.len(), 2);
        assert!(matches!(&items[0].seen, Seen::Value { value, .. } if value == "newer"));
        assert_eq!(items[0].looked_at, 2);
        assert!(batch.is_empty() && batch.opened().is_none());
    }

    #[test]
    fn a_touch_brings_its_expiry_to_a_value_and_keeps_the_older_stamp() {
        let now = Instant::now();
        let mut batch = OpenBatch::new(10, 1 << 20);
        batch.push(item(1, 0, value(b"v"), 5), now, newer);
        let replaced = batch
            .push(item(1, 1, Seen::Touch(Expiry::Seconds(60)), 9), now, newer)
            .unwrap();
        assert_eq!(replaced.event.ticket.seq, 0, "the older event is the superseded one");
        let items = batch.take();
        assert_eq!((items[0].event.ticket.seq, items[0].looked_at), (1, 5));
        match &items[0].seen {
            Seen::Value {
                value,
                flags: 7,
                expiry: Expiry::Seconds(60),
            } => assert_eq!(value, "v"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_touch_that_joins_a_removal_is_superseded() {
        let now = Instant::now();
        let mut batch = OpenBatch::new(10, 1 << 20);
        batch.push(item(1, 0, Seen::Nothing(Outcome::Deleted), 5), now, newer);
        let replaced = batch
            .push(item(1, 1, Seen::Touch(Expiry::Never), 6), now, newer)
            .unwrap();
        assert_eq!(replaced.event.ticket.seq, 1);
        assert!(matches!(batch.take()[0].seen, Seen::Nothing(Outcome::Deleted)));
    }

    #[test]
    fn an_event_that_is_nobodys_never_ends_a_live_one() {
        let now = Instant::now();
        let mut batch = OpenBatch::new(10, 1 << 20);
        let live = |comes: &HeldEvent, held: &HeldEvent| comes.ticket.seq < held.ticket.seq;
        batch.push(item(1, 0, value(b"older look"), 5), now, live);
        let replaced = batch.push(item(1, 9, value(b"newer look"), 6), now, live).unwrap();
        assert_eq!(replaced.event.ticket.seq, 9);
        batch.push(item(2, 9, Seen::Nothing(Outcome::Deleted), 5), now, live);
        let mut touch = item(2, 1, Seen::Touch(Expiry::Never), 6);
        touch.event.ticket.consumer = 1;
        let replaced = batch.push(touch, now, live).unwrap();
        assert_eq!(replaced.event.ticket.seq, 9);
        let items = batch.take();
        assert!(matches!(&items[0].seen, Seen::Value { value, .. } if value == "newer look"));
        assert_eq!((items[0].event.ticket.seq, items[0].looked_at), (0, 6));
        assert!(matches!(items[1].seen, Seen::Nothing(Outcome::Deleted)));
        assert_eq!(items[1].event.ticket.seq, 1);
    }

    #[test]
    fn it_is_full_on_bytes_or_on_items() {
        let now = Instant::now();
        let mut batch = OpenBatch::new(2, 10_000);
        batch.push(item(1, 0, value(b"v"), 1), now, newer);
        assert_eq!(batch.full(), None);
        batch.push(item(2, 1, value(b"v"), 1), now, newer);
        assert_eq!(batch.full(), Some(Trigger::Items));
        batch.take();
        batch.push(
            item(
                1,
                2,
                Seen::Value {
                    value: vec![0; 10_000].into(),
                    flags: 0,
                    expiry: Expiry::Never,
                },
                1,
            ),
            now,
            newer,
        );
        assert_eq!(batch.full(), Some(Trigger::Bytes));
    }

    proptest! {
        #[test]
        fn every_event_and_every_byte_is_in_the_batch_or_was_handed_back(steps in prop::collection::vec((0u8..6, 0u8..4, 0usize..50), 1..200)) {
            let now = Instant::now();
            let mut batch = OpenBatch::new(1000, 1 << 30);
            let (mut taken, mut replaced_events, mut held) = (0usize, 0usize, 0usize);
            for (seq, (key, kind, size)) in steps.iter().enumerate() {
                let seen = match kind {
                    0 => Seen::Nothing(Outcome::Missing),
                    1 => Seen::Touch(Expiry::Seconds(5)),
                    _ => Seen::Value { value: vec![0; *size].into(), flags: 0, expiry: Expiry::Never },
                };
                let item = item(*key, seq as u64, seen, seq as u64);
                held += item.bytes();
                if let Some(replaced) = batch.push(item, now, newer) {
                    replaced_events += 1;
                    held -= replaced.bytes;
                }
            }
            let items = batch.take();
            taken += items.len();
            prop_assert_eq!(taken + replaced_events, steps.len());
            prop_assert_eq!(items.iter().map(HeldItem::bytes).sum::<usize>(), held);
        }
    }
}
