//! Keys that must be looked at again, and when.
//!
//! A plain type, one per CacheReader. Whatever goes wrong with an item turns it back into its event here: nothing old
//! is ever sent again, the key is looked at anew. One event is held per cache and key; the newer of two wins and the
//! older is handed back, so that it can end as `superseded`.
//!
//! Every entry is in exactly one *line* (a doubly linked list through the slab), which makes each step O(1), whatever
//! the number of keys:
//!
//! | line | holds | leaves it |
//! | --- | --- | --- |
//! | ready | [`Dirtied::SessionLost`], and what was released | with the next [`DirtySet::take_due`] |
//! | again, one per step of the backoff | [`Dirtied::LookAgain`] | when its time has come; one wait per line, so a line is in order |
//! | source | [`Dirtied::SourceAway`] | with [`DirtySet::source_back`] |
//! | one per destination server | [`Dirtied::Later`] | one key as a probe at a time; the rest with [`DirtySet::server_answered`] |

mod slab;

use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use foldhash::fast::RandomState;
use hashbrown::{HashMap, HashTable};
use tokio::time::Instant;

use crate::backoff::{Backoff, doubled};
use slab::{Line, Slab};

/// First wait of a key answered `look_again`: the next look is almost always admitted, so hardly any.
const AGAIN_INITIAL: Duration = Duration::from_millis(1);
/// Longest such wait: a tenth of a turn, so that a refused key comes back while the slot is kept for its session.
const AGAIN_MAX: Duration = Duration::from_millis(100);
/// Steps from 1 ms to 100 ms: 1, 2, 4, 8, 16, 32, 64, 100.
const AGAIN_STEPS: usize = 8;

/// Between probes of a destination server that answered `later`: first about as long as a round trip, at most so long
/// that a server that is back is noticed within seconds.
const LATER: Backoff = match Backoff::new(Duration::from_millis(50), LATER_MAX) {
    Ok(backoff) => backoff,
    Err(_) => panic!("50 ms are above zero and below 5 s"),
};
const LATER_MAX: Duration = Duration::from_secs(5);
/// A server that is waited for again within this time, and has not answered meanwhile, has been away all the time: its keys
/// were parked, and a parked key comes back within a minute by default.
const LEFT_COUNTS: Duration = Duration::from_secs(90);
/// A probe of which nothing was heard for this long is given up and another goes: longer than any round trip.
const PROBE_LOST: Duration = LATER_MAX;

/// An event as the [`DirtySet`] needs to see it.
pub trait DirtyEvent {
    /// The cache key.
    fn key(&self) -> &Bytes;
    /// The cache, by its number in the configuration.
    fn cache(&self) -> u16;
    /// How often in a row the key was answered `look_again`. The set counts; the event carries it from one stay to the
    /// next.
    fn attempts(&self) -> u16;
    /// Stores what [`DirtyEvent::attempts`] gives back.
    fn set_attempts(&mut self, attempts: u16);
    /// Is this event newer than the other one of its key?
    fn supersedes(&self, other: &Self) -> bool;
}

/// Why a key is dirty, which decides when it is due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dirtied {
    /// The session ended with its item unanswered: due at once. Without a session the caller does not ask.
    SessionLost,
    /// The agent refused the look: due after 1 ms, doubling up to 100 ms.
    LookAgain,
    /// The source server did not answer: due when [`DirtySet::source_back`] is called.
    SourceAway,
    /// The destination server could not take it: waits with all others of that server for a probe to succeed.
    Later {
        /// The destination server, by the name the agent gave it.
        server: Arc<str>,
    },
}

impl Dirtied {
    /// The public name of the reason, in metrics and traces.
    pub const fn name(&self) -> &'static str {
        match self {
            Dirtied::SessionLost => "session_lost",
            Dirtied::LookAgain => "look_again",
            Dirtied::SourceAway => "source_away",
            Dirtied::Later { .. } => "later",
        }
    }
}

/// A destination server that keys wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitingFor<'a> {
    /// By the name the agent gave it.
    pub server: &'a Arc<str>,
    /// Keys that wait.
    pub keys: usize,
    /// Since when it has not answered, as far as is known: also while its keys were parked in between.
    pub since: Instant,
    /// When the next probe goes; `None` while one is out.
    pub next_probe: Option<Instant>,
}

/// The line an entry is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Ready,
    Again(u8),
    Source,
    Server(u32),
}

/// The keys that wait for one destination server.
struct Waiting {
    server: Arc<str>,
    line: Line,
    since: Instant,
    backoff: Backoff,
    /// When the next probe goes; while one is out, when it is given up.
    due: Instant,
    probe: Option<(u16, Bytes)>,
}

/// The dirty keys of one CacheReader: one event each, and when each is due. See the module for its lines.
///
/// Instants passed in never go back. Memory is bounded by the caller, who asks [`len`](Self::len) before it inserts.
pub struct DirtySet<E> {
    slab: Slab<E>,
    /// Slab indices, found by cache and key.
    index: HashTable<u32>,
    hasher: RandomState,
    ready: Line,
    again: [Line; AGAIN_STEPS],
    source: Line,
    /// By number; few, for a peer has few servers.
    servers: Vec<Option<Waiting>>,
    by_name: HashMap<Arc<str>, u32, RandomState>,
    /// Servers that nobody waits for any more although they have not answered: since when they did not, and when that was.
    left: HashMap<Arc<str>, (Instant, Instant), RandomState>,
    /// The keys that are out as probes, and for which server.
    probes: HashMap<(u16, Bytes), u32, RandomState>,
    random: u64,
}

impl<E: DirtyEvent> DirtySet<E> {
    /// An empty set. `seed` is random: it jitters the probes, so that lanes and relays do not probe in step.
    pub fn new(seed: u64) -> Self {
        Self {
            slab: Slab::default(),
            index: HashTable::new(),
            hasher: RandomState::default(),
            ready: Line::default(),
            again: Default::default(),
            source: Line::default(),
            servers: Vec::new(),
            by_name: HashMap::default(),
            left: HashMap::default(),
            probes: HashMap::default(),
            random: seed,
        }
    }

    /// Makes the event's key dirty for this reason. Returns the older of two events if the key was dirty already; the
    /// newer one waits as the latest reason says.
    pub fn insert(&mut self, event: E, reason: Dirtied, now: Instant) -> Option<E> {
        let wins = self
            .held(event.cache(), event.key())
            .is_none_or(|held| event.supersedes(held));
        self.insert_judged(event, reason, now, wins)
    }

    /// The event that a dirty key holds.
    pub fn held(&self, cache: u16, key: &Bytes) -> Option<&E> {
        self.find(cache, key).map(|id| &self.slab.get(id).event)
    }

    /// [`insert`](Self::insert) for a caller who knows better which of two events must stay: `wins` is for this one.
    pub fn insert_judged(&mut self, event: E, reason: Dirtied, now: Instant, wins: bool) -> Option<E> {
        self.probe_returned(&event, &reason, now);
        let look_again = reason == Dirtied::LookAgain;
        let (id, superseded) = match self.find(event.cache(), event.key()) {
            Some(id) => (id, Some(self.supersede(id, event, wins))),
            None => (self.add(event, now), None),
        };
        let entry = self.slab.get_mut(id);
        let attempts = entry.event.attempts().saturating_add(u16::from(look_again));
        entry.event.set_attempts(attempts);
        let before = entry.place;

        let (place, due) = match reason {
            Dirtied::SessionLost => (Place::Ready, now),
            Dirtied::SourceAway => (Place::Source, now),
            Dirtied::Later { server } => (Place::Server(self.server(server, now)), now),
            Dirtied::LookAgain => {
                let step = u32::from(attempts - 1).min(AGAIN_STEPS as u32 - 1);
                (Place::Again(step as u8), now + doubled(AGAIN_INITIAL, step, AGAIN_MAX))
            }
        };
        // Whoever waits already waits on: only a refusal starts a new wait in the same line.
        if before != Some(place) || look_again {
            self.unlink(id);
            self.link(id, place, due);
        }
        if let Some(Place::Server(left)) = before.filter(|left| *left != place) {
            self.forget_if_idle(left, now);
        }
        superseded
    }

    /// Is this key dirty?
    pub fn contains(&self, cache: u16, key: &Bytes) -> bool {
        self.find(cache, key).is_some()
    }

    /// The key is not to be held, although this became of its item: if it was a probe, that is over.
    pub fn forget_probe(&mut self, event: &E, reason: &Dirtied, now: Instant) {
        let probed = self.probes.get(&(event.cache(), event.key().clone())).copied();
        self.probe_returned(event, reason, now);
        if let Some(number) = probed {
            self.forget_if_idle(number, now);
        }
    }

    /// Lets a fresh event join its key if that is dirty: `Ok` with the older of the two, superseded; the other one waits
    /// as the key did.
    ///
    /// # Errors
    /// The event, if its key is not dirty.
    pub fn join(&mut self, event: E) -> Result<E, E> {
        let wins = self
            .held(event.cache(), event.key())
            .is_none_or(|held| event.supersedes(held));
        self.join_judged(event, wins)
    }

    /// [`join`](Self::join) for a caller who knows better which of two events must stay: `wins` is for this one.
    ///
    /// # Errors
    /// The event, if its key is not dirty.
    pub fn join_judged(&mut self, event: E, wins: bool) -> Result<E, E> {
        match self.find(event.cache(), event.key()) {
            Some(id) => Ok(self.supersede(id, event, wins)),
            None => Err(event),
        }
    }

    /// Moves at most `max` events that are due into `out`: one probe per destination server whose time has come, then
    /// the keys to look at again, then what is ready. They are not dirty any more; what fails is inserted again. Returns
    /// how many it moved.
    pub fn take_due(&mut self, now: Instant, max: usize, out: &mut Vec<E>) -> usize {
        let full = out.len().saturating_add(max);
        let before = out.len();
        if !self.probes.is_empty() {
            self.give_up_lost_probes(now);
        }
        for number in 0..self.servers.len() as u32 {
            if out.len() == full {
                break;
            }
            out.extend(self.take_probe(number, now));
        }
        for step in 0..AGAIN_STEPS {
            while out.len() < full
                && let Some(id) = self.again[step].front()
                && self.slab.get(id).due <= now
            {
                out.push(self.remove(id));
            }
        }
        while out.len() < full
            && let Some(id) = self.ready.front()
        {
            out.push(self.remove(id));
        }
        out.len() - before
    }

    /// When [`take_due`](Self::take_due) next has something, in the past if it has now. `None`: only
    /// [`source_back`](Self::source_back) or an insert changes that.
    pub fn next_due(&self) -> Option<Instant> {
        let lines = self.again.iter().chain([&self.ready]);
        let entries = lines.filter_map(|line| Some(self.slab.get(line.front()?).due));
        entries
            .chain(
                self.servers
                    .iter()
                    .flatten()
                    .filter(|waiting| !waiting.line.is_empty())
                    .map(|it| it.due),
            )
            .min()
    }

    /// Takes one key that waits for the source server, to ask whether it is back; the others wait on.
    pub fn take_source_probe(&mut self) -> Option<E> {
        let id = self.source.front()?;
        Some(self.remove(id))
    }

    /// The source server answers again: its keys are ready. Returns how many.
    pub fn source_back(&mut self) -> usize {
        let mut line = std::mem::take(&mut self.source);
        self.make_ready(&mut line)
    }

    /// A destination server answered: all its keys are ready. Returns how many; 0 for a server nobody waits for.
    pub fn server_answered(&mut self, server: &str) -> usize {
        self.left.remove(server);
        match self.by_name.get(server) {
            Some(&number) => self.release(number),
            None => 0,
        }
    }

    /// An item of this key was answered otherwise than `later`. If it was out as a probe, its server is back: the same as
    /// [`server_answered`](Self::server_answered), for a caller who does not know which key probed which server. Costs
    /// next to nothing while no probe is out.
    pub fn key_answered(&mut self, cache: u16, key: &Bytes) -> usize {
        if self.probes.is_empty() {
            return 0;
        }
        match self.probes.get(&(cache, key.clone())) {
            Some(&number) => self.release(number),
            None => 0,
        }
    }

    /// Moves at most `max` events for which `wanted` is true into `out`, whatever they wait for; they are not dirty any more.
    /// Looks at every entry: for now and then.
    pub fn take_where(&mut self, now: Instant, max: usize, wanted: impl FnMut(&E) -> bool, out: &mut Vec<E>) {
        for id in self.slab.find(max, wanted) {
            let left = self.slab.get(id).place;
            out.push(self.remove(id));
            if let Some(Place::Server(number)) = left {
                self.forget_if_idle(number, now);
            }
        }
    }

    /// How many keys are dirty.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Is no key dirty?
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// The destination servers that are waited for.
    pub fn waiting_for(&self) -> impl Iterator<Item = WaitingFor<'_>> {
        self.servers.iter().flatten().map(|waiting| WaitingFor {
            server: &waiting.server,
            keys: waiting.line.len(),
            since: waiting.since,
            next_probe: waiting.probe.is_none().then_some(waiting.due),
        })
    }

    /// How many keys wait for the source server.
    pub fn waiting_for_source(&self) -> usize {
        self.source.len()
    }

    /// Hands back every event, in no particular order, and forgets all servers: the set is as new.
    pub fn drain_all(&mut self) -> Vec<E> {
        let emptied = Self::new(self.next_random());
        std::mem::replace(self, emptied).slab.into_events().collect()
    }

    fn hash(&self, cache: u16, key: &[u8]) -> u64 {
        self.hasher.hash_one((cache, key))
    }

    fn find(&self, cache: u16, key: &Bytes) -> Option<u32> {
        let same = |id: &u32| {
            let event = &self.slab.get(*id).event;
            event.cache() == cache && event.key() == key
        };
        self.index.find(self.hash(cache, key), same).copied()
    }

    /// A new entry in no line yet.
    fn add(&mut self, event: E, now: Instant) -> u32 {
        let hash = self.hash(event.cache(), event.key());
        let id = self.slab.add(event, now);
        let (slab, hasher) = (&self.slab, &self.hasher);
        self.index.insert_unique(hash, id, |id| {
            let event = &slab.get(*id).event;
            hasher.hash_one((event.cache(), &event.key()[..]))
        });
        id
    }

    /// Takes an entry out of its line and the set.
    fn remove(&mut self, id: u32) -> E {
        self.unlink(id);
        let event = &self.slab.get(id).event;
        let hash = self.hash(event.cache(), event.key());
        if let Ok(found) = self.index.find_entry(hash, |other| *other == id) {
            found.remove();
        }
        self.slab.remove(id)
    }

    /// Keeps the newer event in the entry, with the attempts of the key, and returns the older.
    fn supersede(&mut self, id: u32, mut event: E, wins: bool) -> E {
        let held = &mut self.slab.get_mut(id).event;
        let attempts = held.attempts().max(event.attempts());
        if wins {
            std::mem::swap(held, &mut event);
        }
        held.set_attempts(attempts);
        event
    }

    fn line(&mut self, place: Place) -> Option<(&mut Line, &mut Slab<E>)> {
        let line = match place {
            Place::Ready => &mut self.ready,
            Place::Again(step) => &mut self.again[usize::from(step)],
            Place::Source => &mut self.source,
            Place::Server(number) => &mut self.servers.get_mut(number as usize)?.as_mut()?.line,
        };
        Some((line, &mut self.slab))
    }

    fn link(&mut self, id: u32, place: Place, due: Instant) {
        if let Some((line, slab)) = self.line(place) {
            line.push(slab, id);
            let entry = slab.get_mut(id);
            (entry.place, entry.due) = (Some(place), due);
        }
    }

    fn unlink(&mut self, id: u32) {
        let place = self.slab.get_mut(id).place.take();
        if let Some((line, slab)) = place.and_then(|place| self.line(place)) {
            line.unlink(slab, id);
        }
    }

    /// The number of a server, which is waited for from now on if it was not before.
    fn server(&mut self, server: Arc<str>, now: Instant) -> u32 {
        if let Some(&number) = self.by_name.get(&server) {
            return number;
        }
        let mut backoff = LATER;
        let due = now + backoff.next(self.next_random());
        let number = self
            .servers
            .iter()
            .position(Option::is_none)
            .unwrap_or(self.servers.len());
        if number == self.servers.len() {
            self.servers.push(None);
        }
        self.by_name.insert(server.clone(), number as u32);
        let left = self.left.remove(&server).filter(|(_, left)| now - *left < LEFT_COUNTS);
        self.servers[number] = Some(Waiting {
            server,
            line: Line::default(),
            since: left.map_or(now, |(since, _)| since),
            backoff,
            due,
            probe: None,
        });
        number as u32
    }

    /// The oldest key of a server as a probe, if its time has come.
    fn take_probe(&mut self, number: u32, now: Instant) -> Option<E> {
        let waiting = self.servers.get_mut(number as usize)?.as_mut()?;
        if waiting.due > now {
            return None;
        }
        let id = waiting.line.front()?;
        let event = &self.slab.get(id).event;
        let probe = (event.cache(), event.key().clone());
        waiting.due = now + PROBE_LOST;
        waiting.probe = Some(probe.clone());
        self.probes.insert(probe, number);
        Some(self.remove(id))
    }

    /// Nothing was heard of these probes for too long: others may go.
    fn give_up_lost_probes(&mut self, now: Instant) {
        for number in 0..self.servers.len() {
            if let Some(waiting) = &mut self.servers[number]
                && waiting.due <= now
                && let Some(lost) = waiting.probe.take()
            {
                self.probes.remove(&lost);
                self.forget_if_idle(number as u32, now);
            }
        }
    }

    /// If the event's key was out as a probe, the probe is over: after a `later` the next one waits longer, after
    /// anything else nothing is known of the server and the next may go at once.
    fn probe_returned(&mut self, event: &E, reason: &Dirtied, now: Instant) {
        if self.probes.is_empty() {
            return;
        }
        let Some(number) = self.probes.remove(&(event.cache(), event.key().clone())) else {
            return;
        };
        let random = self.next_random();
        let Some(Some(waiting)) = self.servers.get_mut(number as usize) else {
            return;
        };
        waiting.probe = None;
        if matches!(reason, Dirtied::Later { server } if *server == waiting.server) {
            // The key is about to join the line again, so the server is not forgotten and its backoff lives on.
            waiting.due = now + waiting.backoff.next(random);
        } else {
            waiting.due = now;
            self.forget_if_idle(number, now);
        }
    }

    fn release(&mut self, number: u32) -> usize {
        let Some(mut waiting) = self.forget(number) else {
            return 0;
        };
        self.make_ready(&mut waiting.line)
    }

    /// Nobody waits for the server any more, which has not answered: its keys were parked, or wait for something else.
    fn forget_if_idle(&mut self, number: u32, now: Instant) {
        if let Some(Some(waiting)) = self.servers.get(number as usize)
            && waiting.line.is_empty()
            && waiting.probe.is_none()
            && let Some(waiting) = self.forget(number)
        {
            self.left.retain(|_, (_, left)| now - *left < LEFT_COUNTS);
            self.left.insert(waiting.server, (waiting.since, now));
        }
    }

    fn forget(&mut self, number: u32) -> Option<Waiting> {
        let waiting = self.servers.get_mut(number as usize)?.take()?;
        self.by_name.remove(&waiting.server);
        if let Some(probe) = &waiting.probe {
            self.probes.remove(probe);
        }
        Some(waiting)
    }

    fn make_ready(&mut self, line: &mut Line) -> usize {
        let released = line.len();
        while let Some(id) = line.front() {
            line.unlink(&mut self.slab, id);
            self.ready.push(&mut self.slab, id);
            self.slab.get_mut(id).place = Some(Place::Ready);
        }
        released
    }

    /// The next number of splitmix64: jitter needs no better.
    fn next_random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests;
