//! What the actors of the receiving half share: the tick, the window budget, the sessions, and the memcached servers.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use socket2::Socket;
use tokio::time::Instant;

use crate::breaker::ShownBreaker;
use crate::config::Config;
use crate::handoff::AgentMailboxes;
use crate::hashing::Ring;
use crate::pulse::Pulses;
use crate::stamps::SessionId;
use crate::telemetry::Instruments;
use crate::tls::TlsMaterial;

/// Whether a memcached server of this region takes writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ServerState {
    /// Not yet connected, or settling after it.
    Connecting = 0,
    /// It answers.
    Answers = 1,
    /// It failed or is slow: nothing is sent to it but probes.
    Away = 2,
}

/// A memcached server as sessions and status see it.
#[derive(Debug)]
pub struct ServerView {
    /// The cache that it belongs to.
    pub cache: String,
    /// `host:port`.
    pub address: String,
    /// Its writer's circuit breaker.
    pub breaker: ShownBreaker,
    state: AtomicU8,
    /// Since when it takes no writes.
    away: Mutex<Option<Instant>>,
}

impl ServerView {
    /// A server that is not connected yet.
    pub fn new(cache: String, address: String) -> Self {
        ServerView {
            cache,
            address,
            breaker: ShownBreaker::default(),
            state: AtomicU8::new(ServerState::Connecting as u8),
            away: Mutex::new(Some(Instant::now())),
        }
    }

    /// The state as its writer last set it.
    pub fn state(&self) -> ServerState {
        match self.state.load(Relaxed) {
            0 => ServerState::Connecting,
            1 => ServerState::Answers,
            _ => ServerState::Away,
        }
    }

    /// Set by its writer.
    pub fn set(&self, state: ServerState) {
        if self.state.swap(state as u8, Relaxed) != state as u8 {
            let mut away = self.away.lock().unwrap_or_else(PoisonError::into_inner);
            match state {
                ServerState::Answers => *away = None,
                _ => _ = away.get_or_insert_with(Instant::now),
            }
        }
    }

    /// Since when it takes no writes, if it does not.
    pub fn away_since(&self) -> Option<Instant> {
        *self.away.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What status shows of a session.
#[derive(Clone, Debug)]
pub struct SessionView {
    /// The calling region, from its certificate.
    pub peer: String,
    /// Its address.
    pub remote: String,
    /// When it began.
    pub since: Instant,
    /// Bytes it may have unacknowledged.
    pub window: u64,
}

/// Counts of items by how they ended here, for `/status` and `/metrics`.
#[derive(Debug, Default)]
pub struct AgentCounts {
    /// Stored, touched or deleted as asked.
    pub applied: AtomicU64,
    /// Answered `look_again`.
    pub look_again: AtomicU64,
    /// Answered `later`.
    pub later: AtomicU64,
    /// Removed because nothing was left of their time.
    pub expired: AtomicU64,
    /// Removed because they are too large.
    pub too_large: AtomicU64,
}

/// A cache as the agent uses it.
#[derive(Debug)]
pub struct AgentCache {
    /// Which servers its keys live on.
    pub ring: Ring,
    /// Number of its first server among all servers of all caches; its servers follow one another.
    pub first_server: usize,
}

/// See the module. It outlives rebuilds of the agent, but for the tick, which each incarnation starts anew with the stamps.
pub struct AgentShared {
    /// The whole configuration.
    pub config: Arc<Config>,
    /// Our certificate and the CA.
    pub tls: Arc<TlsMaterial>,
    /// Rings and server numbers, by cache index.
    pub caches: Vec<AgentCache>,
    /// By server number.
    pub servers: Vec<ServerView>,
    /// Counts.
    pub counts: AgentCounts,
    /// Depths of the mailboxes, by kind of actor.
    pub mailboxes: AgentMailboxes,
    /// Every instrument.
    pub instruments: Arc<Instruments>,
    /// The agent is leaving: no new sessions.
    pub draining: AtomicBool,
    /// The listener accepts.
    pub listening: AtomicBool,
    /// The pulses of the agent's actors.
    pub pulses: Pulses,
    sessions: Mutex<Sessions>,
}

/// What keeps the writers of one incarnation of the agent from memcached when their thread is abandoned: one that wakes up
/// later would write old items behind new ones, and its stamps are not the new agent's.
#[derive(Debug)]
pub struct Fence {
    closed: AtomicBool,
    /// A second handle on each writer's socket, by server number.
    sockets: Mutex<Vec<Option<Socket>>>,
}

impl Fence {
    /// An open fence for so many servers.
    pub fn new(servers: usize) -> Self {
        Fence {
            closed: AtomicBool::new(false),
            sockets: Mutex::new((0..servers).map(|_| None).collect()),
        }
    }

    /// A writer has this connection now, or none. False when it may not write any more.
    pub fn passes(&self, server: usize, socket: Option<Socket>) -> bool {
        let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock: a connection is either seen by `close`, or sees that it came too late.
        sockets[server] = socket;
        self.is_open()
    }

    /// Whether its writers still are the agent's.
    pub fn is_open(&self) -> bool {
        !self.closed.load(SeqCst)
    }

    /// Nothing more reaches memcached from these writers, whatever they do.
    pub fn close(&self) {
        let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        self.closed.store(true, SeqCst);
        for socket in sockets.iter_mut().filter_map(Option::take) {
            // Of both ways at once; a socket that is not connected any more is as good.
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// The wall clock of the region that a session comes from: what its relay last measured.
#[derive(Debug)]
pub struct PeerClock {
    /// Ours minus theirs, in microseconds; [`i64::MIN`] until it is known.
    offset_us: AtomicI64,
}

impl Default for PeerClock {
    fn default() -> Self {
        PeerClock {
            offset_us: AtomicI64::new(i64::MIN),
        }
    }
}

impl PeerClock {
    /// Our clock is ahead of the peer's by this, in microseconds.
    pub fn set(&self, offset_us: i64) {
        self.offset_us.store(offset_us, Relaxed);
    }

    /// Seconds from a time by the peer's clock, in milliseconds, to a time by ours, in microseconds; `None` while it is not
    /// known how the two compare.
    pub fn seconds_since(&self, theirs_ms: u64, ours_us: u64) -> Option<f64> {
        let offset_us = Some(self.offset_us.load(Relaxed)).filter(|offset| *offset != i64::MIN)?;
        let us = i128::from(ours_us) - i128::from(offset_us) - i128::from(theirs_ms) * 1000;
        Some(us.max(0) as f64 / 1e6)
    }
}

#[derive(Default)]
struct Sessions {
    last: SessionId,
    granted: u64,
    live: BTreeMap<SessionId, SessionView>,
}

impl AgentShared {
    /// The shared part of this region's agent.
    pub fn new(config: Arc<Config>, tls: Arc<TlsMaterial>, rings: Vec<Ring>, instruments: Arc<Instruments>) -> Self {
        let mut servers = Vec::new();
        let mut caches = Vec::new();
        for (cache, ring) in config.caches.iter().zip(rings) {
            caches.push(AgentCache {
                ring,
                first_server: servers.len(),
            });
            servers.extend(
                cache
                    .servers
                    .iter()
                    .map(|server| ServerView::new(cache.name.clone(), server.address.clone())),
            );
        }
        AgentShared {
            config,
            tls,
            caches,
            servers,
            counts: AgentCounts::default(),
            mailboxes: AgentMailboxes::default(),
            instruments,
            draining: AtomicBool::new(false),
            listening: AtomicBool::new(false),
            pulses: Pulses::default(),
            sessions: Mutex::default(),
        }
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a session and grants its window out of the peer's share of `agent.max_in_flight_bytes`; `None` when too
    /// little is left for one.
    pub fn open_session(self: &Arc<Self>, peer: &str, remote: &str) -> Option<SessionGuard> {
        let agent = &self.config.agent;
        let mut sessions = self.sessions();
        let all = agent.max_in_flight_bytes as u64;
        // Each peer has its share, or the sessions of one could shut the others out.
        let share = all / self.config.peers.len().max(1) as u64;
        let its: u64 = sessions
            .live
            .values()
            .filter(|live| live.peer == peer)
            .map(|live| live.window)
            .sum();
        let left = share.saturating_sub(its).min(all.saturating_sub(sessions.granted));
        let window = (agent.session_window as u64).min(left);
        // A window smaller than this would make every batch wait for the one before it.
        if window < (self.config.batch.max_bytes as u64).min(agent.session_window as u64) {
            return None;
        }
        // Session numbers are reused only after 65 534 others: what an old one wrote is then older than any look.
        let mut id = sessions.last;
        loop {
            id = if id == SessionId::MAX { 1 } else { id + 1 };
            if !sessions.live.contains_key(&id) {
                break;
            }
        }
        sessions.last = id;
        sessions.granted += window;
        let view = SessionView {
            peer: peer.to_owned(),
            remote: remote.to_owned(),
            since: Instant::now(),
            window,
        };
        sessions.live.insert(id, view);
        Some(SessionGuard {
            shared: self.clone(),
            id,
            window,
            live: Arc::new(AtomicBool::new(true)),
        })
    }

    /// Takes back what the sessions of an abandoned thread were granted: they never will.
    pub fn abandon_sessions(&self) {
        let mut sessions = self.sessions();
        sessions.granted = 0;
        sessions.live.clear();
    }

    /// The sessions that are open.
    pub fn session_views(&self) -> Vec<SessionView> {
        self.sessions().live.values().cloned().collect()
    }

    /// Whether batches can be taken: listening, and at least one memcached server answers.
    pub fn can_take_batches(&self) -> bool {
        self.listening.load(Relaxed) && self.servers.iter().any(|s| s.state() == ServerState::Answers)
    }
}

/// An open session; dropped, its window and number are free again and what it still has queued is not applied.
pub struct SessionGuard {
    shared: Arc<AgentShared>,
    /// Its number, for the stamps.
    pub id: SessionId,
    /// Bytes, decompressed, that it may have unacknowledged.
    pub window: u64,
    /// False once the session has ended.
    pub live: Arc<AtomicBool>,
}

impl Drop for SessionGuard {
    fn drop(&mut self) {
        self.live.store(false, SeqCst);
        let mut sessions = self.shared.sessions();
        // Not there: its thread was abandoned and has woken up.
        if sessions.live.remove(&self.id).is_some() {
            sessions.granted -= self.window;
        }
    }
}
