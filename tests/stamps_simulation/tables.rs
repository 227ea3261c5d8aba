//! The real stamp table, and the weaker ones beside it.

use evrepl::stamps::{SessionId, StampTable, Verdict};
use tokio::time::Instant;

use crate::world::{Item, SERVERS};

/// Two slots per server for four keys each: collisions are the rule.
const SLOTS_LOG2: u32 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The rule as built.
    Stamps,
    /// Every item is applied as it comes.
    Nothing,
    /// An item whose relay clock (20 ms apart) is behind the slot's is refused.
    Clocks,
    /// A slot remembers its last writer and tick only; a session's own items always pass after its own.
    OneWriter,
    /// Several sessions may write one slot in one batch.
    SharedBatch,
    /// As built, but a refused session gets no turn. Nothing goes wrong by it, but a slow relay may wait for ever.
    NoTurns,
    /// As built, but the stamp is taken when the read is answered, not before it is sent.
    StampedLate,
    /// As built, but looks from before the session began are sent in it.
    LooksOutliveSession,
    /// As built, but a relay keeps the highest tick it ever heard across sessions.
    TickOutlivesSession,
    /// As built, but a restarted agent writes before what its predecessor left has run.
    NotSettled,
}

/// The tables of the weaker rules.
pub struct WeakTable {
    rule: Rule,
    slots: Vec<WeakSlot>,
    open: Vec<(usize, SessionId)>,
}

#[derive(Clone, Copy, Default)]
struct WeakSlot {
    writer: SessionId,
    tick: u64,
    other: u64,
    clock: i64,
}

impl WeakTable {
    fn new(rule: Rule) -> Self {
        Self {
            rule,
            slots: vec![
                WeakSlot {
                    clock: i64::MIN,
                    ..WeakSlot::default()
                };
                1 << SLOTS_LOG2
            ],
            open: Vec::new(),
        }
    }

    fn admit(&mut self, index: usize, item: &Item) -> Verdict {
        let slot = &mut self.slots[index];
        let own = slot.writer == item.session;
        let taken = self
            .open
            .iter()
            .any(|(other, session)| *other == index && *session != item.session);
        let refused = match self.rule {
            Rule::Nothing => false,
            Rule::Clocks => item.clock < slot.clock,
            Rule::OneWriter => taken || (!own && item.looked_at < slot.tick),
            rule => (taken && rule == Rule::NoTurns) || item.looked_at < if own { slot.other } else { slot.tick },
        };
        if refused {
            return Verdict::LookAgain;
        }
        slot.clock = slot.clock.max(item.clock);
        self.open.push((index, item.session));
        Verdict::Apply
    }

    fn written(&mut self, tick: u64) {
        for (index, session) in self.open.drain(..) {
            let slot = &mut self.slots[index];
            if slot.writer != session {
                slot.other = slot.tick;
            }
            (slot.writer, slot.tick) = (session, tick);
        }
    }
}

pub enum Table {
    Real(StampTable),
    Weak(WeakTable),
}

impl Table {
    pub fn new(rule: Rule) -> Self {
        match rule {
            Rule::Nothing | Rule::Clocks | Rule::OneWriter | Rule::SharedBatch | Rule::NoTurns => {
                Table::Weak(WeakTable::new(rule))
            }
            _ => Table::Real(StampTable::new(SLOTS_LOG2)),
        }
    }

    pub fn admit(&mut self, item: &Item, now: Instant) -> Verdict {
        let hash = item.key / SERVERS;
        match self {
            Table::Real(table) => table.admit(hash as u64, item.session, item.looked_at, now),
            Table::Weak(table) => table.admit(hash % (1 << SLOTS_LOG2), item),
        }
    }

    pub fn written(&mut self, tick: u64) {
        match self {
            Table::Real(table) => table.written(tick),
            Table::Weak(table) => table.written(tick),
        }
    }

    pub fn abandoned(&mut self) {
        match self {
            Table::Real(table) => table.abandoned(),
            Table::Weak(table) => table.open.clear(),
        }
    }
}
