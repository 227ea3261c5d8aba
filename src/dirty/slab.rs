//! Where the dirty set's entries live, and the lines through them.

use tokio::time::Instant;

use super::Place;

/// No entry: the end of a line. A slab never gets that long.
const NONE: u32 = u32::MAX;

/// One dirty key.
pub(super) struct Entry<E> {
    pub(super) event: E,
    /// When its time comes, in lines that go by time; else when it came.
    pub(super) due: Instant,
    /// The line it is in.
    pub(super) place: Option<Place>,
    before: u32,
    after: u32,
}

/// Entries by a number that stays theirs; freed numbers are given again.
pub(super) struct Slab<E> {
    entries: Vec<Option<Entry<E>>>,
    free: Vec<u32>,
}

impl<E> Default for Slab<E> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<E> Slab<E> {
    /// A new entry in no line.
    pub(super) fn add(&mut self, event: E, due: Instant) -> u32 {
        let entry = Some(Entry {
            event,
            due,
            place: None,
            before: NONE,
            after: NONE,
        });
        match self.free.pop() {
            Some(id) => {
                self.entries[id as usize] = entry;
                id
            }
            None => {
                self.entries.push(entry);
                (self.entries.len() - 1) as u32
            }
        }
    }

    /// The entry of a number; numbers come from the set's own index and lines, so there is one.
    pub(super) fn get(&self, id: u32) -> &Entry<E> {
        self.entries[id as usize]
            .as_ref()
            .unwrap_or_else(|| unreachable!("a line or the index names a freed entry"))
    }

    pub(super) fn get_mut(&mut self, id: u32) -> &mut Entry<E> {
        self.entries[id as usize]
            .as_mut()
            .unwrap_or_else(|| unreachable!("a line or the index names a freed entry"))
    }

    /// Gives the number back. The entry is in no line any more.
    pub(super) fn remove(&mut self, id: u32) -> E {
        let entry = self.entries[id as usize].take();
        self.free.push(id);
        entry
            .unwrap_or_else(|| unreachable!("a line or the index names a freed entry"))
            .event
    }

    /// The numbers of all entries for which this is true, at most `max`.
    pub(super) fn find(&self, max: usize, mut wanted: impl FnMut(&E) -> bool) -> Vec<u32> {
        let entries = self.entries.iter().enumerate();
        let found =
            entries.filter_map(|(id, entry)| entry.as_ref().filter(|entry| wanted(&entry.event)).map(|_| id as u32));
        found.take(max).collect()
    }

    pub(super) fn into_events(self) -> impl Iterator<Item = E> {
        self.entries.into_iter().flatten().map(|entry| entry.event)
    }
}

/// Entries in the order they came; any of them can leave at once.
pub(super) struct Line {
    first: u32,
    last: u32,
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            first: NONE,
            last: NONE,
            len: 0,
        }
    }
}

impl Line {
    pub(super) fn front(&self) -> Option<u32> {
        Some(self.first).filter(|id| *id != NONE)
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Puts an entry that is in no line behind all others.
    pub(super) fn push<E>(&mut self, slab: &mut Slab<E>, id: u32) {
        let entry = slab.get_mut(id);
        (entry.before, entry.after) = (self.last, NONE);
        match self.last {
            NONE => self.first = id,
            last => slab.get_mut(last).after = id,
        }
        self.last = id;
        self.len += 1;
    }

    /// Takes an entry of this line out of it.
    pub(super) fn unlink<E>(&mut self, slab: &mut Slab<E>, id: u32) {
        let entry = slab.get_mut(id);
        let (before, after) = (entry.before, entry.after);
        match before {
            NONE => self.first = after,
            before => slab.get_mut(before).after = after,
        }
        match after {
            NONE => self.last = before,
            after => slab.get_mut(after).before = before,
        }
        self.len -= 1;
    }
}
