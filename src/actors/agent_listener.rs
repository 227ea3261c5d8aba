//! AgentListener: accepts connections from peers, checks who calls, greets, and starts a session for each.
//!
//! In: TCP connections. Out: an [`AgentSession`] per accepted caller, on the agent's thread that has the fewest;
//! one log line per refused one.
//! The caller's region comes from its certificate, never from what it says. Restarts alone: sessions go on without it.
//! Bounded by: [`MAX_GREETINGS`] at once, each within [`GREETING_TIMEOUT`].

use std::net::TcpListener as StdListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use actix::prelude::*;
use actix_rt::ArbiterHandle;
use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::server::TlsStream;

use crate::agent::AgentShared;
use crate::config::Peer;
use crate::handoff::Handoff;
use crate::telemetry::RateLimit;
use crate::wire::{self, CacheStatus, Decoder, FEATURE_LZ4, Frame, GoAway, Hello, HelloAck, Limits, WireError};

use super::agent_session::{AgentSession, AgentSessionParts, SOCKET_READ_BYTES};
use super::cache_writer::ApplyItems;

/// Callers that may be proving who they are at once; more wait in the kernel's queue.
const MAX_GREETINGS: usize = 64;
/// How long a caller has for TLS and greeting together.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after an accept that failed for want of something on this machine, such as file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Items a batch may have, whatever the relay's own limit.
const MAX_BATCH_ITEMS: u32 = 65_536;

/// Why a caller was refused.
#[derive(Debug, thiserror::Error)]
pub enum GreetingError {
    /// Not TLS, not our CA, expired, or no certificate.
    #[error("tls: {0}")]
    Tls(#[from] crate::tls::TlsError),
    /// The connection broke.
    #[error("connection: {0}")]
    Io(#[from] std::io::Error),
    /// The caller does not speak the protocol.
    #[error("protocol: {0}")]
    Wire(#[from] WireError),
    /// The caller did not greet in time.
    #[error("no greeting within {GREETING_TIMEOUT:?}")]
    Timeout,
    /// The caller closed before greeting.
    #[error("closed before greeting")]
    Closed,
    /// The first frame was not a hello.
    #[error("first frame is not a hello")]
    NotHello,
    /// The certificate is this region's own: a region does not replicate to itself.
    #[error("certificate of this region itself, identities {0:?}")]
    OwnRegion(Vec<String>),
    /// The certificate names no configured peer.
    #[error("no [[peer]] has one of the identities {0:?}")]
    UnknownIdentity(Vec<String>),
    /// No common version of the wire.
    #[error("no common wire version, caller has {0} to {1}")]
    Version(u16, u16),
    /// Every byte of `agent.max_in_flight_bytes` is granted to other sessions.
    #[error("agent.max_in_flight_bytes is used up by other sessions")]
    Full,
    /// This agent is leaving.
    #[error("draining")]
    Draining,
}

/// Whoever is refused dials again, and again.
static REFUSED: RateLimit = RateLimit::new();
/// A peer whose sessions end again and again.
static ACCEPTED: RateLimit = RateLimit::new();
/// No descriptor left: each try fails.
static NOT_ACCEPTED: RateLimit = RateLimit::new();
/// A cache of a session, in each session.
static FORBIDDEN: RateLimit = RateLimit::new();

/// What a listener is made of; the same parts make the next one after a restart.
#[derive(Clone)]
pub struct AgentListenerParts {
    /// What the agent's actors share.
    pub shared: Arc<AgentShared>,
    /// The agent's counter of answered write batches.
    pub tick: Arc<AtomicU64>,
    /// Where sessions send items, by server number.
    pub writers: Vec<Handoff<ApplyItems>>,
    /// Where sessions run.
    pub threads: Threads,
}

/// The threads of an agent, `agent.threads`. Writers are on them by server number, the first server's on the first; a session on
/// the one with the fewest, of several the last, so that a writer and a session that are alone have a thread each.
#[derive(Clone)]
pub struct Threads {
    handles: Vec<ArbiterHandle>,
    sessions: Arc<[AtomicUsize]>,
}

/// A session's place on its thread, until it is dropped.
pub struct ThreadPlace {
    sessions: Arc<[AtomicUsize]>,
    thread: usize,
}

impl Drop for ThreadPlace {
    fn drop(&mut self) {
        self.sessions[self.thread].fetch_sub(1, Relaxed);
    }
}

impl Threads {
    /// No session runs on them yet.
    pub fn new(handles: Vec<ArbiterHandle>) -> Threads {
        Threads {
            sessions: handles.iter().map(|_| AtomicUsize::new(0)).collect(),
            handles,
        }
    }

    /// The one for the next session.
    fn next(&self) -> (&ArbiterHandle, ThreadPlace) {
        let count = |thread: &usize| self.sessions[*thread].load(Relaxed);
        // The first of the fewest, from the last thread on.
        let thread = (0..self.handles.len()).rev().min_by_key(count).unwrap_or(0);
        self.sessions[thread].fetch_add(1, Relaxed);
        let place = ThreadPlace {
            sessions: self.sessions.clone(),
            thread,
        };
        (&self.handles[thread], place)
    }
}

/// See the module.
pub struct AgentListener {
    parts: AgentListenerParts,
    socket: StdListener,
}

impl AgentListener {
    /// A listener on a bound, non-blocking socket.
    pub fn new(parts: AgentListenerParts, socket: StdListener) -> Self {
        AgentListener { parts, socket }
    }
}

impl Actor for AgentListener {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        let parts = self.parts.clone();
        // A clone: the socket itself is kept for the next start.
        let listener = match self.socket.try_clone().and_then(TcpListener::from_std) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(%error, "agent cannot listen, trying again");
                ctx.run_later(ACCEPT_PAUSE, |_, ctx| ctx.stop());
                return;
            }
        };
        let places = Arc::new(Semaphore::new(MAX_GREETINGS));
        self.parts.shared.listening.store(true, Relaxed);
        let accept = async move {
            loop {
                let Ok(place) = places.clone().acquire_owned().await else {
                    return;
                };
                match listener.accept().await {
                    Ok((tcp, remote)) => {
                        fail::fail_point!("agent_listener_accept");
                        // What reads a socket must be the thread that it is registered with.
                        let Ok(tcp) = tcp.into_std() else { continue };
                        let greeting = parts.clone();
                        let (thread, on_thread) = parts.threads.next();
                        thread.spawn(async move {
                            greet_or_refuse(greeting, tcp, remote.to_string(), on_thread).await;
                            drop(place);
                        });
                    }
                    Err(error) => {
                        if let Some(unsaid) = NOT_ACCEPTED.due(&error.to_string()) {
                            tracing::warn!(%error, unsaid, "could not accept a connection");
                        }
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        };
        ctx.spawn(accept.into_actor(self));
    }
}

impl Supervised for AgentListener {
    fn restarting(&mut self, _: &mut Context<Self>) {
        self.parts.shared.instruments.count_restart("agent_listener");
    }
}

async fn greet_or_refuse(parts: AgentListenerParts, tcp: std::net::TcpStream, remote: String, on_thread: ThreadPlace) {
    let refused = match tokio::time::timeout(GREETING_TIMEOUT, greet(&parts, tcp, &remote, on_thread)).await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error,
        Err(_) => GreetingError::Timeout,
    };
    // Without the port, which is another one each time.
    let host = remote.rsplit_once(':').map_or(remote.as_str(), |(host, _)| host);
    if let Some(unsaid) = REFUSED.due(&format!("{host} {refused}")) {
        tracing::warn!(remote, error = %refused, unsaid, "caller refused");
    }
}

async fn greet(
    parts: &AgentListenerParts,
    tcp: std::net::TcpStream,
    remote: &str,
    on_thread: ThreadPlace,
) -> Result<(), GreetingError> {
    let shared = &parts.shared;
    let tcp = TcpStream::from_std(tcp)?;
    tcp.set_nodelay(true)?;
    let tcp = BufReader::with_capacity(SOCKET_READ_BYTES, tcp);
    let (mut stream, identities) = shared.tls.accept(tcp).await?;
    let limits = limits(shared);
    let mut buffer = BytesMut::with_capacity(4096);
    let answer = match caller(shared, &identities) {
        Ok(peer) => {
            let hello = read_hello(&mut stream, &mut buffer, limits).await?;
            accept(parts, peer, &hello, limits, remote).map(|accepted| (peer, hello, accepted))
        }
        Err(error) => Err(error),
    };
    let mut out = BytesMut::new();
    let (peer, hello, (guard, ack, caches)) = match answer {
        Ok(accepted) => accepted,
        Err(error) => {
            // Said to the caller too, so that its operator need not look here.
            wire::encode(
                &Frame::GoAway(GoAway {
                    reason: error.to_string(),
                }),
                &mut out,
            );
            stream.write_all(&out).await?;
            stream.shutdown().await?;
            return Err(error);
        }
    };
    wire::encode(&Frame::HelloAck(ack), &mut out);
    stream.write_all(&out).await?;
    stream.flush().await?;
    if let Some(unsaid) = ACCEPTED.due(&peer.region) {
        tracing::info!(
            peer = peer.region,
            remote,
            session = guard.id,
            software = hello.software,
            unsaid,
            "session accepted"
        );
    }
    AgentSession::begin(AgentSessionParts {
        shared: shared.clone(),
        tick: parts.tick.clone(),
        writers: parts.writers.clone(),
        peer: peer.region.as_str().into(),
        guard,
        on_thread,
        caches,
        limits,
        stream,
        buffered: buffer,
    });
    Ok(())
}

/// Which peer the certificate names.
fn caller<'a>(shared: &'a AgentShared, identities: &[String]) -> Result<&'a Peer, GreetingError> {
    let named = |peer: &&Peer| identities.contains(&peer.identity);
    match shared.config.peers.iter().find(named) {
        Some(peer) => Ok(peer),
        None if shared.tls.identities().iter().any(|own| identities.contains(own)) => {
            Err(GreetingError::OwnRegion(identities.to_vec()))
        }
        None => Err(GreetingError::UnknownIdentity(identities.to_vec())),
    }
}

async fn read_hello(
    stream: &mut TlsStream<BufReader<TcpStream>>,
    buffer: &mut BytesMut,
    limits: Limits,
) -> Result<Hello, GreetingError> {
    let mut decoder = Decoder::new(limits);
    loop {
        match decoder.decode(buffer)? {
            Some(Frame::Hello(hello)) => return Ok(hello),
            Some(_) => return Err(GreetingError::NotHello),
            None => {}
        }
        if stream.read_buf(buffer).await? == 0 {
            return Err(GreetingError::Closed);
        }
    }
}

type Accepted = (crate::agent::SessionGuard, HelloAck, Vec<Option<u16>>);

/// The terms of a session: its window, and for each of the caller's caches our own index, if it may write it.
fn accept(
    parts: &AgentListenerParts,
    peer: &Peer,
    hello: &Hello,
    limits: Limits,
    remote: &str,
) -> Result<Accepted, GreetingError> {
    let shared = &parts.shared;
    if shared.draining.load(Relaxed) {
        return Err(GreetingError::Draining);
    }
    let Some(version) = hello.agreed_version() else {
        return Err(GreetingError::Version(hello.min_version, hello.max_version));
    };
    let mut statuses = Vec::with_capacity(hello.caches.len());
    let mut caches = Vec::with_capacity(hello.caches.len());
    for name in &hello.caches {
        let known = shared.config.caches.iter().position(|cache| cache.name == *name);
        let status = match known {
            None => CacheStatus::Unknown,
            Some(_) if !peer.caches.contains(name) => CacheStatus::Forbidden,
            Some(_) => CacheStatus::Accepted,
        };
        if status != CacheStatus::Accepted
            && let Some(unsaid) = FORBIDDEN.due(&format!("{} {name}", peer.region))
        {
            tracing::warn!(
                peer = peer.region,
                cache = name,
                ?status,
                unsaid,
                "caller may not write this cache"
            );
        }
        caches.push(
            known
                .filter(|_| status == CacheStatus::Accepted)
                .map(|cache| cache as u16),
        );
        statuses.push(status);
    }
    let guard = shared.open_session(&peer.region, remote).ok_or(GreetingError::Full)?;
    let ack = HelloAck {
        version,
        software: concat!("evrepl ", env!("CARGO_PKG_VERSION")).to_owned(),
        session: u64::from(guard.id),
        tick: parts.tick.load(std::sync::atomic::Ordering::SeqCst),
        window_bytes: guard.window,
        features: vec![FEATURE_LZ4.to_owned()],
        max_frame_bytes: limits.max_frame_bytes,
        max_batch_items: limits.max_batch_items,
        max_batch_raw_bytes: limits.max_batch_raw_bytes,
        caches: statuses,
    };
    Ok((guard, ack, caches))
}

/// What this agent takes in one frame: the largest value of any cache on top of a generous batch.
fn limits(shared: &AgentShared) -> Limits {
    let largest = shared
        .config
        .caches
        .iter()
        .map(|cache| cache.max_value_bytes)
        .max()
        .unwrap_or(0);
    let usual = Limits::default();
    let bytes = (largest as u64 + u64::from(usual.max_frame_bytes)).min(u64::from(u32::MAX)) as u32;
    Limits {
        max_frame_bytes: bytes,
        max_batch_raw_bytes: bytes.max(usual.max_batch_raw_bytes),
        max_batch_items: MAX_BATCH_ITEMS,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use actix_rt::{Arbiter, ArbiterHandle, System};

    use super::Threads;

    fn name(thread: &ArbiterHandle) -> Option<String> {
        let (tell, told) = mpsc::channel();
        thread.spawn_fn(move || _ = tell.send(std::thread::current().name().map(str::to_owned)));
        told.recv().ok().flatten()
    }

    #[test]
    fn a_session_goes_where_the_fewest_are_and_the_first_one_not_to_the_first_writer() {
        System::new().block_on(async {
            let arbiters: Vec<Arbiter> = (0..3).map(|_| Arbiter::new()).collect();
            let own: Vec<_> = arbiters.iter().map(|arbiter| name(&arbiter.handle())).collect();
            let threads = Threads::new(arbiters.iter().map(Arbiter::handle).collect());
            let mut places = Vec::new();
            for expected in [2, 1, 0, 2] {
                let (thread, place) = threads.next();
                assert_eq!(name(thread), own[expected]);
                places.push(place);
            }
            // The second one ends, as one that only knocks does at once.
            places.remove(1);
            let (thread, _) = threads.next();
            assert_eq!(name(thread), own[1]);
            assert_eq!(name(threads.next().0), own[1]);
            for arbiter in arbiters {
                arbiter.stop();
                let _ = arbiter.join();
            }
        });
    }
}
