//! The stamp rule: no look is applied after a newer one, and no clock is trusted.
//!
//! The agent's *tick* is raised each time memcached has answered a write batch; a session's items carry the last tick
//! the session had heard before it looked. One [`StampTable`] stands in front of each memcached server's one writing
//! connection and says of every item whether another session's look can have been newer. If so the item is not applied
//! but its key is looked at again, which costs one look and is always right.
//!
//! Why it is enough: a look stamped with tick `n` was sent after batch `n` was answered, hence after every look in that
//! batch was made. So `looked_at >= tick of the other session's write` proves the newer look, whatever the delays.
//! Within a session a key's items come in look order. `tests/stamps_simulation.rs` runs this and what is weaker.

use std::collections::VecDeque;
use std::time::Duration;

use hashbrown::HashMap;
use tokio::time::Instant;

/// A session as the agent numbers it; 0 is nobody.
///
/// A number is given again only when nothing of its former bearer can arrive any more: bytes of a dead session may
/// still be in decoding, and with the same number they would pass for the living one's.
pub type SessionId = u16;

/// Slots of a table as powers of two: 2^20, 16 MiB per memcached server.
pub const DEFAULT_SLOTS_LOG2: u32 = 20;

/// How long a refused session has the slot to itself: far longer than any look and its way here, short enough that a
/// session that died costs little.
const TURN: Duration = Duration::from_secs(1);

/// Turns remembered at a time. Beyond it a refused session gets none: only fairness suffers, and memory stays small
/// (some 4 MiB) even when every item is refused.
const MAX_TURNS: usize = 65_536;

/// Ticks take 48 bits: a million a second last nine years, and an agent starts again from 0.
const TICK_BITS: u32 = 48;
const TICK_MASK: u64 = (1 << TICK_BITS) - 1;
const NOBODY: SessionId = 0;

/// What becomes of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// It belongs to the batch now being put together.
    Apply,
    /// Another session's look may be newer: answer `look_again`.
    LookAgain,
}

/// One slot as it lies in the table: two words, each 16 bits of session above 48 bits of tick. An array of integers,
/// because zeroed pages come from the system untouched only for those.
type Packed = [u64; 2];

/// One slot, for the hash values that fall into it.
#[derive(Clone, Copy)]
struct Slot {
    /// Who wrote it last; nobody so far if 0.
    writer: SessionId,
    /// The tick of that write.
    tick: u64,
    /// Who has items for it in the open batch.
    taken: SessionId,
    /// The last tick at which a session other than `writer` wrote it.
    other: u64,
}

impl Slot {
    fn unpack([last, other]: Packed) -> Self {
        Self {
            writer: (last >> TICK_BITS) as SessionId,
            tick: last & TICK_MASK,
            taken: (other >> TICK_BITS) as SessionId,
            other: other & TICK_MASK,
        }
    }

    fn pack(self) -> Packed {
        [
            u64::from(self.writer) << TICK_BITS | self.tick,
            u64::from(self.taken) << TICK_BITS | self.other,
        ]
    }

    /// The last tick at which a session other than this one wrote the slot.
    fn written_by_others(self, session: SessionId) -> u64 {
        if self.writer == session { self.other } else { self.tick }
    }
}

#[derive(Clone, Copy)]
struct Turn {
    session: SessionId,
    until: Instant,
}

/// The stamps of one memcached server: which session wrote which slot last, and when.
///
/// Per batch: [`admit`](Self::admit) every item, then exactly one of [`written`](Self::written) and
/// [`abandoned`](Self::abandoned), before the next batch is put together.
pub struct StampTable {
    slots: Box<[Packed]>,
    /// Slots with items in the open batch, each once.
    open: Vec<u32>,
    turns: HashMap<u32, Turn, foldhash::fast::FixedState>,
    /// The turns in the order they end; some were taken since.
    ending: VecDeque<(Instant, u32)>,
}

impl StampTable {
    /// A table of 2^`slots_log2` slots of 16 bytes, on pages that take memory only once written. At most 2^28 slots.
    pub fn new(slots_log2: u32) -> Self {
        let slots = 1usize << slots_log2.min(28);
        Self {
            slots: vec![[0; 2]; slots].into_boxed_slice(),
            open: Vec::new(),
            turns: HashMap::default(),
            ending: VecDeque::new(),
        }
    }

    /// Reads the slots of these hashes, which changes nothing: in a row the processor waits for many of them at a time, but for
    /// each alone when it is first touched by [`admit`](Self::admit). That was a quarter of the agent's time.
    pub fn fetch(&self, slot_hashes: impl Iterator<Item = u64>) {
        let read = slot_hashes.fold(0, |read, hash| read ^ self.slots[self.index(hash) as usize][0]);
        std::hint::black_box(read);
    }

    /// May this item be applied in the batch being put together?
    ///
    /// `slot_hash` is any hash of cache and key, the same for every session; `looked_at` is the item's stamp. Refused is
    /// an item whose slot another session wrote after `looked_at` or has items for in the open batch, or that comes while
    /// another session has its turn. Session 0 is always refused.
    pub fn admit(&mut self, slot_hash: u64, session: SessionId, looked_at: u64, now: Instant) -> Verdict {
        let index = self.index(slot_hash);
        let mut slot = Slot::unpack(self.slots[index as usize]);
        let turn = self
            .turns
            .get(&index)
            .filter(|turn| now < turn.until)
            .map(|turn| turn.session);

        let kept_for_another = turn.is_some_and(|owner| owner != session);
        let taken_by_another = slot.taken != NOBODY && slot.taken != session;
        if session == NOBODY || kept_for_another || taken_by_another || looked_at < slot.written_by_others(session) {
            if turn.is_none() && session != NOBODY {
                self.give_turn(index, session, now);
            }
            return Verdict::LookAgain;
        }

        if turn.is_some() {
            self.turns.remove(&index);
        }
        if slot.taken == NOBODY {
            slot.taken = session;
            self.slots[index as usize] = slot.pack();
            self.open.push(index);
        }
        Verdict::Apply
    }

    /// The batch of the items admitted since the last call was answered, or nothing of it can run any more: they were
    /// written at `tick`, which was raised for it.
    ///
    /// An unknown result counts as written (that refuses too much, never too little), once the connection's remains
    /// have run.
    pub fn written(&mut self, tick: u64) {
        for index in self.open.drain(..) {
            let place = &mut self.slots[index as usize];
            let slot = Slot::unpack(*place);
            let other = slot.written_by_others(slot.taken);
            *place = Slot {
                writer: slot.taken,
                tick: tick & TICK_MASK,
                taken: NOBODY,
                other,
            }
            .pack();
        }
    }

    /// The items admitted since the last call were certainly not sent: it is as if they had not come.
    pub fn abandoned(&mut self) {
        for index in self.open.drain(..) {
            let place = &mut self.slots[index as usize];
            *place = Slot {
                taken: NOBODY,
                ..Slot::unpack(*place)
            }
            .pack();
        }
    }

    /// Both halves of the hash count, so that one whose good bits are at either end serves.
    fn index(&self, slot_hash: u64) -> u32 {
        (slot_hash ^ (slot_hash >> 32)) as u32 & (self.slots.len() - 1) as u32
    }

    fn give_turn(&mut self, index: u32, session: SessionId, now: Instant) {
        while let Some(&(until, ended)) = self.ending.front().filter(|(until, _)| *until <= now) {
            self.ending.pop_front();
            if self.turns.get(&ended).is_some_and(|turn| turn.until == until) {
                self.turns.remove(&ended);
            }
        }
        if self.ending.len() < MAX_TURNS {
            let until = now + TURN;
            self.turns.insert(index, Turn { session, until });
            self.ending.push_back((until, index));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Verdict::{Apply, LookAgain};
    use super::*;

    const A: SessionId = 1;
    const B: SessionId = 2;
    const C: SessionId = 65_535;

    /// A table with everything in one slot, and an instant.
    fn one_slot() -> (StampTable, Instant) {
        (StampTable::new(0), Instant::now())
    }

    #[test]
    fn a_look_from_before_another_sessions_write_is_refused() {
        let (mut table, now) = one_slot();
        assert_eq!(table.admit(7, A, 0, now), Apply);
        table.written(5);
        assert_eq!(table.admit(7, B, 4, now), LookAgain);
        assert_eq!(table.admit(7, B, 5, now), Apply);
    }

    #[test]
    fn the_last_writers_own_items_are_measured_by_the_last_other_write() {
        let (mut table, now) = one_slot();
        for (session, tick) in [(A, 5), (B, 7), (A, 9), (A, 12)] {
            assert_eq!(table.admit(7, session, tick - 1, now), Apply);
            table.written(tick);
        }
        assert_eq!(table.admit(7, A, 6, now), LookAgain, "b wrote at 7");
        assert_eq!(table.admit(7, A, 7, now), Apply, "its own writes since do not count");
        table.written(13);
        assert_eq!(table.admit(7, C, 12, now), LookAgain, "a wrote at 13");
    }

    #[test]
    fn in_an_open_batch_a_slot_belongs_to_the_first_session_there() {
        let (mut table, now) = one_slot();
        assert_eq!(
            [
                table.admit(7, A, 0, now),
                table.admit(8, A, 0, now),
                table.admit(7, B, 99, now)
            ],
            [Apply, Apply, LookAgain]
        );
        table.written(100);
        assert_eq!(table.admit(7, B, 100, now), Apply, "the next batch is open to all");
    }

    #[test]
    fn the_first_item_admitted_does_not_vouch_for_an_older_look_of_its_session() {
        let (mut table, now) = one_slot();
        assert_eq!(table.admit(7, B, 0, now), Apply);
        table.written(5);
        assert_eq!(
            [table.admit(7, A, 5, now), table.admit(8, A, 4, now)],
            [Apply, LookAgain]
        );
    }

    #[test]
    fn an_abandoned_batch_leaves_no_trace() {
        let (mut table, now) = one_slot();
        assert_eq!(table.admit(7, A, 0, now), Apply);
        table.abandoned();
        assert_eq!(table.admit(7, B, 0, now), Apply);
        table.written(3);
        assert_eq!(table.admit(7, B, 0, now), Apply, "only b ever wrote");
    }

    #[test]
    fn a_refused_session_has_the_slot_until_it_comes_or_a_second_is_over() {
        let (mut table, now) = one_slot();
        assert_eq!(table.admit(7, A, 0, now), Apply);
        table.written(1);
        assert_eq!(table.admit(7, B, 0, now), LookAgain);
        let soon = now + Duration::from_millis(999);
        assert_eq!(
            [
                table.admit(7, A, 1, soon),
                table.admit(7, C, 1, soon),
                table.admit(7, B, 1, soon)
            ],
            [LookAgain, LookAgain, Apply]
        );
        table.written(2);
        assert_eq!(table.admit(7, A, 2, soon), Apply, "the turn is used up");
        table.written(3);

        assert_eq!(table.admit(7, B, 2, soon), LookAgain);
        assert_eq!(table.admit(7, A, 3, soon + TURN), Apply, "the turn is over");
    }

    #[test]
    fn a_turn_is_not_prolonged_by_older_looks_still_on_their_way() {
        let (mut table, now) = one_slot();
        assert_eq!(table.admit(7, A, 0, now), Apply);
        table.written(1);
        for ms in [0, 500, 999] {
            assert_eq!(table.admit(7, B, 0, now + Duration::from_millis(ms)), LookAgain);
        }
        assert_eq!(table.admit(7, A, 1, now + TURN), Apply);
    }

    #[test]
    fn turns_are_forgotten_when_they_end_and_bounded_before() {
        let (mut table, now) = (StampTable::new(18), Instant::now());
        for slot in 0..100_000 {
            assert_eq!(table.admit(slot, A, 0, now), Apply);
        }
        table.written(1);
        for slot in 0..100_000 {
            assert_eq!(table.admit(slot, B, 0, now), LookAgain);
        }
        assert_eq!((table.turns.len(), table.ending.len()), (MAX_TURNS, MAX_TURNS));
        assert_eq!(table.admit(3, B, 0, now + TURN), LookAgain);
        assert_eq!((table.turns.len(), table.ending.len()), (1, 1));
    }

    #[test]
    fn nobody_is_never_admitted() {
        let (mut table, now) = one_slot();
        assert_eq!(table.admit(7, NOBODY, 9, now), LookAgain);
        assert_eq!(table.admit(7, A, 0, now), Apply);
    }

    #[test]
    fn the_largest_session_and_tick_keep_to_their_bits() {
        let (mut table, now) = one_slot();
        for session in [A, C] {
            assert_eq!(table.admit(7, session, TICK_MASK, now), Apply);
            table.written(TICK_MASK);
        }
        assert_eq!(table.admit(7, A, TICK_MASK - 1, now), LookAgain);
        let slot = Slot::unpack(table.slots[0]);
        assert_eq!(
            (slot.writer, slot.tick, slot.taken, slot.other),
            (C, TICK_MASK, NOBODY, TICK_MASK)
        );
    }

    #[test]
    fn either_half_of_the_hash_spreads_over_the_slots() {
        let table = StampTable::new(DEFAULT_SLOTS_LOG2);
        let distinct = |shift: u32| {
            (0..1000u64)
                .map(|i| table.index(i << shift))
                .collect::<std::collections::HashSet<_>>()
                .len()
        };
        assert_eq!((distinct(0), distinct(32)), (1000, 1000));
        assert_eq!(std::mem::size_of_val(&*table.slots), 16 << 20);
    }
}
