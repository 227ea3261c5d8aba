//! The front door: memcached's own protocol in front of a cache's servers, so that any client's writes are replicated.
//!
//! What arrives is read here ([`text`], [`binary`]), forwarded to the server of its key, and what the server answers
//! ([`answers`]) goes back in the order of the commands ([`order`]). A write that memcached says has happened becomes an event
//! ([`announcer`]); keys whose events Kafka does not take are remembered ([`unsent`]), and answers
//! that wait for Kafka are in [`waits`]. The actors are [`crate::actors::front_door_listener`], [`crate::actors::front_door_session`] and
//! [`crate::actors::front_door_upstream`]; everything else here is pure, but for the announcer.

pub mod announcer;
pub mod answers;
pub mod base64;
pub mod binary;
#[doc(hidden)]
pub mod fuzz;
pub mod gets;
pub mod order;
pub mod out;
pub mod recheck;
pub mod sorted;
pub mod text;
pub mod unsent;
pub mod waits;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use actix::Addr;

use crate::actors::front_door_session::{FrontDoorSession, Leave, MakeRoom};
use crate::config::{Config, OnKafkaDown};
use crate::hashing::Ring;
use crate::pulse::Pulses;
use crate::telemetry::Instruments;

use announcer::Announcer;
use text::Verb;

/// What the front door of one cache has done.
#[derive(Debug)]
pub struct DoorCounts {
    /// Commands that clients sent, by [`Verb`]; binary ones count as what they are in text.
    pub commands: [AtomicU64; Verb::COUNT],
    /// Events that were made of them, or of writes that may have happened.
    pub events: AtomicU64,
    /// `flush_all`, which no peer hears of.
    pub flushes: AtomicU64,
    /// Commands that ended with `SERVER_ERROR` because a server could not be reached.
    pub unreachable: AtomicU64,
    /// Writes that were refused because Kafka is away.
    pub refused: AtomicU64,
    /// Clients that were disconnected because they neither read nor sent, and others needed the room.
    pub dropped: AtomicU64,
    /// Connections that clients have now.
    pub connections: AtomicU64,
    /// Connections that clients have made.
    pub accepted: AtomicU64,
}

impl Default for DoorCounts {
    fn default() -> Self {
        DoorCounts {
            commands: std::array::from_fn(|_| AtomicU64::new(0)),
            events: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            unreachable: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            accepted: AtomicU64::new(0),
        }
    }
}

/// Whether a server behind the front door can be reached.
#[derive(Debug, Default)]
pub struct UpstreamView {
    state: AtomicU8,
}

impl UpstreamView {
    /// `idle` until somebody needs it, then `connecting`, `open` or `away`.
    pub fn state(&self) -> &'static str {
        ["idle", "connecting", "open", "away"][usize::from(self.state.load(Relaxed)).min(3)]
    }

    /// Set by its actor.
    pub fn set(&self, state: UpstreamState) {
        self.state.store(state as u8, Relaxed);
    }
}

/// See [`UpstreamView::state`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum UpstreamState {
    /// Nobody has needed it.
    Idle = 0,
    /// It is being connected to.
    Connecting = 1,
    /// It answers.
    Open = 2,
    /// It does not.
    Away = 3,
}

/// What the actors of the front door share.
pub struct DoorShared {
    /// The whole configuration.
    pub config: Arc<Config>,
    /// By cache index.
    pub rings: Vec<Ring>,
    /// Where events go.
    pub announcer: Arc<Announcer>,
    /// By cache index.
    pub counts: Vec<DoorCounts>,
    /// Every instrument.
    pub instruments: Arc<Instruments>,
    /// The pulses of its threads.
    pub pulses: Pulses,
    /// No more connections, and those that there are end when they have their answers.
    pub draining: AtomicBool,
    connections: AtomicUsize,
    buffered: AtomicUsize,
    unread: AtomicUsize,
    /// How often its threads were made anew: what an abandoned one holds is in no count.
    generation: AtomicU64,
    doubtful: AtomicUsize,
    sessions: Mutex<Sessions>,
}

#[derive(Default)]
struct Sessions {
    last: u64,
    live: BTreeMap<u64, Addr<FrontDoorSession>>,
}

impl DoorShared {
    /// Of a region's front door.
    pub fn new(
        config: Arc<Config>,
        rings: Vec<Ring>,
        announcer: Arc<Announcer>,
        instruments: Arc<Instruments>,
    ) -> Self {
        DoorShared {
            counts: config.caches.iter().map(|_| DoorCounts::default()).collect(),
            config,
            rings,
            announcer,
            instruments,
            pulses: Pulses::default(),
            draining: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
            buffered: AtomicUsize::new(0),
            unread: AtomicUsize::new(0),
            generation: AtomicU64::new(0),
            doubtful: AtomicUsize::new(0),
            sessions: Mutex::default(),
        }
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session begins; its number is for [`DoorShared::leave`].
    pub fn enter(&self, session: Addr<FrontDoorSession>) -> u64 {
        let mut sessions = self.sessions();
        sessions.last += 1;
        let id = sessions.last;
        if self.draining.load(SeqCst) {
            session.do_send(Leave);
        }
        sessions.live.insert(id, session);
        id
    }

    /// A session has ended.
    pub fn leave(&self, id: u64) {
        self.sessions().live.remove(&id);
    }

    /// No more connections; those that there are end when they have their answers.
    pub fn drain(&self) {
        let sessions = self.sessions();
        self.draining.store(true, SeqCst);
        for session in sessions.live.values() {
            session.do_send(Leave);
        }
    }

    /// Has clients leave that move nothing, if there is no room for others: called some times a second.
    pub fn make_room(&self) {
        let pressing = !self.takes_answers();
        if self.has_room() && !pressing {
            return;
        }
        let sessions = self.sessions();
        let usual = self.unread.load(Relaxed) / sessions.live.len().max(1);
        let pressing = pressing.then_some(usual);
        for session in sessions.live.values() {
            session.do_send(MakeRoom { pressing });
        }
    }

    /// The sessions of an arbiter that has ended never said so, and one that hangs holds what it has for ever.
    pub fn forget_sessions(&self) {
        self.sessions().live.clear();
        self.generation.fetch_add(1, SeqCst);
        self.buffered.store(0, SeqCst);
        self.unread.store(0, SeqCst);
    }

    /// Bytes that are held for clients: commands under way, answers that they have not read.
    pub fn buffered(&self) -> usize {
        self.buffered.load(Relaxed)
    }

    /// Whether more answers may be read from servers. What they will come to is known only when they come, so that there can be
    /// more of them than was expected; what is beyond this stays in the servers' sockets, and delays all clients.
    pub fn takes_answers(&self) -> bool {
        let most = self.config.front_door.max_buffered_bytes;
        self.unread.load(Relaxed) < most - most / 4
    }

    /// So many more writes may have happened, on connections that were lost; their events are still to be produced.
    pub fn doubt(&self, writes: usize) {
        self.doubtful.fetch_add(writes, SeqCst);
    }

    /// The events of so many of them were.
    pub fn settle(&self, writes: usize) {
        self.doubtful.fetch_sub(writes, SeqCst);
    }

    /// Writes of which it is not known whether they have happened, and whose events are still to be produced.
    pub fn doubtful(&self) -> usize {
        self.doubtful.load(SeqCst)
    }

    /// Whether writes to this cache are refused now, since their events could not be produced.
    pub fn refuses(&self, cache: usize) -> bool {
        self.config.front_door.on_kafka_down == OnKafkaDown::Refuse && !self.announcer.takes(cache)
    }

    /// Whether this one write must be.
    pub fn refuses_one(&self, cache: usize) -> bool {
        self.refuses(cache) && !self.announcer.lets_in(cache)
    }

    /// Whether clients may send more.
    pub fn has_room(&self) -> bool {
        self.buffered() < self.config.front_door.max_buffered_bytes
    }

    /// Connections of all clients.
    pub fn connections(&self) -> usize {
        self.connections.load(Relaxed)
    }

    /// A place for one more connection; `None` when there are as many as may be.
    pub fn place(self: &Arc<Self>, cache: usize) -> Option<Place> {
        let before = self.connections.fetch_add(1, SeqCst);
        // From here on it is counted down again, whatever happens.
        let place = Place {
            shared: self.clone(),
            cache,
        };
        self.counts[cache].connections.fetch_add(1, Relaxed);
        (before < self.config.front_door.max_connections).then_some(place)
    }
}

/// The right to be connected.
pub struct Place {
    shared: Arc<DoorShared>,
    cache: usize,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.counts[self.cache].connections.fetch_sub(1, Relaxed);
        self.shared.connections.fetch_sub(1, SeqCst);
    }
}

/// Bytes that are held; given back when dropped.
pub struct Charge {
    shared: Arc<DoorShared>,
    bytes: usize,
    /// Of them, answers that are there and that a client has not read.
    unread: usize,
    generation: u64,
}

/// From so many to so many.
fn change(of: &AtomicUsize, before: usize, after: usize) {
    if after > before {
        of.fetch_add(after - before, Relaxed);
    } else if after < before {
        of.fetch_sub(before - after, Relaxed);
    }
}

impl Charge {
    /// Of so many bytes.
    pub fn new(shared: &Arc<DoorShared>, bytes: usize) -> Charge {
        let mut charge = Charge {
            shared: shared.clone(),
            bytes: 0,
            unread: 0,
            generation: shared.generation.load(Relaxed),
        };
        charge.set(0, bytes);
        charge
    }

    /// From now on of so many answers that are not read, and of so many other bytes.
    pub fn set(&mut self, unread: usize, other: usize) {
        if self.generation != self.shared.generation.load(Relaxed) {
            return;
        }
        change(&self.shared.buffered, self.bytes, unread + other);
        change(&self.shared.unread, self.unread, unread);
        (self.bytes, self.unread) = (unread + other, unread);
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.set(0, 0);
    }
}
