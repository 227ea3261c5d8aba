//! FrontDoorListener: accepts the clients of one cache's front door and starts a session for each.
//!
//! In: connections. Out: a [`FrontDoorSession`] each, on the front door's threads in turn; past
//! `front_door.max_connections` what memcached says, and the end.
//! Restarts alone: sessions go on without it. Bounded by: `front_door.max_connections`, [`MAX_GREETINGS`] TLS handshakes at
//! once, each within [`GREETING_TIMEOUT`].

use std::io;
use std::net::{SocketAddr, TcpListener as StdTcp};
use std::os::unix::net::UnixListener as StdUnix;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::time::Duration;

use actix::prelude::*;
use actix_rt::{Arbiter, ArbiterHandle};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;

use crate::config::DoorTls;
use crate::front_door::{DoorShared, Place, UpstreamView};
use crate::telemetry::RateLimit;
use crate::threads::named_arbiter;
use crate::tls::TlsMaterial;

use super::front_door_session::{ClientStream, FrontDoorSession, SessionParts};
use super::front_door_upstream::{FrontDoorUpstream, UpstreamParts};

/// Clients that may be shaking hands at once, of one listener.
const MAX_GREETINGS: usize = 256;
/// How long a handshake may take.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after an accept that failed for want of something on this machine, such as file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// memcached's own words.
const TOO_MANY: &[u8] = b"ERROR Too many open connections\r\n";

/// As many clients as may be.
static FULL: RateLimit = RateLimit::new();
/// Handshakes that fail.
static REFUSED: RateLimit = RateLimit::new();
/// No descriptor left: each try fails.
static NOT_ACCEPTED: RateLimit = RateLimit::new();

/// A bound, non-blocking socket.
#[derive(Debug)]
pub enum DoorSocket {
    /// `host:port`.
    Tcp(StdTcp),
    /// A path.
    Unix(StdUnix),
}

impl DoorSocket {
    fn try_clone(&self) -> io::Result<DoorSocket> {
        Ok(match self {
            DoorSocket::Tcp(socket) => DoorSocket::Tcp(socket.try_clone()?),
            DoorSocket::Unix(socket) => DoorSocket::Unix(socket.try_clone()?),
        })
    }
}

/// Where one front door listens.
#[derive(Debug)]
pub struct DoorEntry {
    /// The cache, by its number in the configuration.
    pub cache: usize,
    /// Its clients only fill the cache.
    pub fills: bool,
    /// The socket, which outlives every listener on it.
    pub socket: DoorSocket,
}

/// The connections of one thread to the servers of one cache.
#[derive(Clone)]
struct Upstreams {
    text: Arc<[Addr<FrontDoorUpstream>]>,
    binary: Arc<[Addr<FrontDoorUpstream>]>,
}

/// One thread of the front door, as listeners see it.
#[derive(Clone)]
struct Thread {
    handle: ArbiterHandle,
    /// By cache.
    upstreams: Vec<Upstreams>,
}

/// What the actors of a front door that runs are known by.
pub struct FrontDoor {
    arbiters: Vec<Arbiter>,
    upstreams: Vec<Addr<FrontDoorUpstream>>,
    listeners: Vec<Addr<FrontDoorListener>>,
}

impl FrontDoor {
    /// Starts the threads, the connections and the listeners, downstream first.
    ///
    /// # Errors
    /// When a socket cannot be cloned.
    pub fn start(
        shared: &Arc<DoorShared>,
        tls: &Arc<TlsMaterial>,
        entries: &[DoorEntry],
        views: &[Vec<Arc<UpstreamView>>],
    ) -> io::Result<FrontDoor> {
        let (region, limit) = (&shared.config.region, shared.config.supervision.stalled_after);
        let mut door = FrontDoor {
            arbiters: Vec::new(),
            upstreams: Vec::new(),
            listeners: Vec::new(),
        };
        let mut threads = Vec::new();
        for thread in 0..shared.config.front_door.threads {
            let arbiter = named_arbiter(&format!("front door {thread}"));
            let handle = arbiter.handle();
            shared.pulses.watch_thread(&handle, "front_door", region.clone(), limit);
            let caches = 0..shared.config.caches.len();
            let upstreams = caches
                .map(|cache| door.connections(shared, cache, &handle, &views[cache]))
                .collect();
            threads.push(Thread { handle, upstreams });
            door.arbiters.push(arbiter);
        }
        let next = Arc::new(AtomicUsize::new(0));
        for entry in entries {
            let parts = ListenerParts {
                shared: shared.clone(),
                tls: tls.clone(),
                cache: entry.cache,
                fills: entry.fills,
                threads: threads.clone(),
                next: next.clone(),
            };
            let cache = &shared.config.caches[entry.cache];
            let address = if entry.fills {
                &cache.listen_fills
            } else {
                &cache.listen
            };
            tracing::info!(
                cache = cache.name,
                address,
                fills = entry.fills,
                tls = cache.listen_tls.as_str(),
                "front door listens"
            );
            let socket = entry.socket.try_clone()?;
            let listener =
                Supervisor::start_in_arbiter(&threads[0].handle, move |_| FrontDoorListener { parts, socket });
            door.listeners.push(listener);
        }
        Ok(door)
    }

    fn connections(
        &mut self,
        shared: &Arc<DoorShared>,
        cache: usize,
        handle: &ArbiterHandle,
        views: &[Arc<UpstreamView>],
    ) -> Upstreams {
        let mut of = |binary: bool| -> Arc<[Addr<FrontDoorUpstream>]> {
            let servers = 0..shared.config.caches[cache].servers.len();
            let each = servers.map(|server| {
                let parts = UpstreamParts {
                    shared: shared.clone(),
                    cache,
                    server,
                    binary,
                    view: views[server].clone(),
                };
                let upstream = FrontDoorUpstream::start_in_arbiter(handle, move |_| FrontDoorUpstream::new(parts));
                self.upstreams.push(upstream.clone());
                upstream
            });
            each.collect()
        };
        Upstreams {
            text: of(false),
            binary: of(true),
        }
    }

    /// Which kind of actor is gone, if one is.
    pub fn gone(&self) -> Option<&'static str> {
        if !self.upstreams.iter().all(Addr::connected) {
            return Some("front_door_upstream");
        }
        (!self.listeners.iter().all(Addr::connected)).then_some("front_door_listener")
    }

    /// Tells its threads to end, and gives them to be joined.
    pub fn stop(self) -> Vec<Arbiter> {
        self.arbiters.iter().for_each(|arbiter| _ = arbiter.stop());
        self.arbiters
    }
}

#[derive(Clone)]
struct ListenerParts {
    shared: Arc<DoorShared>,
    tls: Arc<TlsMaterial>,
    cache: usize,
    fills: bool,
    threads: Vec<Thread>,
    /// Whose turn it is.
    next: Arc<AtomicUsize>,
}

/// See the module.
pub struct FrontDoorListener {
    parts: ListenerParts,
    socket: DoorSocket,
}

enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// An accepted connection between two threads.
enum Accepted {
    Tcp(std::net::TcpStream, SocketAddr),
    Unix(std::os::unix::net::UnixStream),
}

impl Listening {
    fn of(socket: DoorSocket) -> io::Result<Listening> {
        Ok(match socket {
            DoorSocket::Tcp(socket) => Listening::Tcp(TcpListener::from_std(socket)?),
            DoorSocket::Unix(socket) => Listening::Unix(UnixListener::from_std(socket)?),
        })
    }

    async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Listening::Tcp(listener) => {
                let (stream, client) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Accepted::Tcp(stream.into_std()?, client))
            }
            Listening::Unix(listener) => Ok(Accepted::Unix(listener.accept().await?.0.into_std()?)),
        }
    }
}

impl Actor for FrontDoorListener {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        let parts = self.parts.clone();
        // A clone: the socket itself is kept for the next start.
        let listener = match self.socket.try_clone().and_then(Listening::of) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!(%error, "front door cannot listen, trying again");
                ctx.run_later(ACCEPT_PAUSE, |_, ctx| ctx.stop());
                return;
            }
        };
        let greetings = Arc::new(Semaphore::new(MAX_GREETINGS));
        let accept = async move {
            loop {
                match listener.accept().await {
                    // Who comes now hears at once that this is the wrong place, and does not wait for the end.
                    Ok(_) if parts.shared.draining.load(SeqCst) => {}
                    Ok(accepted) => parts.begin(accepted, &greetings),
                    Err(error) => {
                        if let Some(unsaid) = NOT_ACCEPTED.due(&error.to_string()) {
                            tracing::warn!(%error, unsaid, "could not accept a client");
                        }
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        };
        ctx.spawn(accept.into_actor(self));
    }
}

impl Supervised for FrontDoorListener {
    fn restarting(&mut self, _: &mut Context<Self>) {
        self.parts.shared.instruments.count_restart("front_door_listener");
    }
}

impl ListenerParts {
    fn begin(&self, accepted: Accepted, greetings: &Arc<Semaphore>) {
        fail::fail_point!("front_door_listener_accept");
        let cache = &self.shared.config.caches[self.cache];
        let thread = &self.threads[self.next.fetch_add(1, Relaxed) % self.threads.len()];
        let place = self.shared.place(self.cache);
        if place.is_none()
            && let Some(unsaid) = FULL.due(&cache.name)
        {
            let limit = self.shared.config.front_door.max_connections;
            tracing::warn!(
                cache = cache.name,
                limit,
                unsaid,
                "client refused: front_door.max_connections are there"
            );
        }
        let acceptor = match cache.listen_tls {
            DoorTls::Off => None,
            DoorTls::Server => Some(self.tls.door_acceptor(false)),
            DoorTls::Mutual => Some(self.tls.door_acceptor(true)),
        };
        // One that asks for more than may greet at once is not waited for.
        let greeting = match acceptor.is_some() || place.is_none() {
            true => match greetings.clone().try_acquire_owned() {
                Ok(greeting) => Some(greeting),
                Err(_) => return,
            },
            // Without TLS there is nothing to wait for.
            false => None,
        };
        let (shared, upstreams) = (self.shared.clone(), thread.upstreams[self.cache].clone());
        let (number, fills) = (self.cache, self.fills);
        let client = match &accepted {
            Accepted::Tcp(_, client) => Some(*client),
            Accepted::Unix(_) => None,
        };
        thread.handle.spawn(async move {
            let begun = tokio::time::timeout(GREETING_TIMEOUT, async {
                let mut stream = match (accepted, acceptor) {
                    (Accepted::Unix(stream), _) => ClientStream::Unix(UnixStream::from_std(stream)?),
                    (Accepted::Tcp(stream, _), None) => ClientStream::Tcp(TcpStream::from_std(stream)?),
                    (Accepted::Tcp(stream, _), Some(acceptor)) => {
                        ClientStream::Tls(Box::new(acceptor.accept(TcpStream::from_std(stream)?).await?))
                    }
                };
                if place.is_none() {
                    refuse(&mut stream).await?;
                }
                Ok::<_, io::Error>((stream, place))
            });
            let begun: io::Result<(ClientStream, Option<Place>)> =
                begun.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            drop(greeting);
            match begun {
                Ok((stream, Some(place))) => {
                    let session = FrontDoorSession::new(SessionParts {
                        shared,
                        cache: number,
                        fills,
                        text: upstreams.text,
                        binary: upstreams.binary,
                        stream,
                        place,
                    });
                    session.start();
                }
                Ok((_, None)) => {}
                Err(error) => {
                    if let Some(unsaid) = REFUSED.due(&error.to_string()) {
                        let cache = &shared.config.caches[number].name;
                        tracing::warn!(cache, client = client.map(tracing::field::display), %error, unsaid, "client at the front door did not come in");
                    }
                }
            }
        });
    }
}

async fn refuse(stream: &mut ClientStream) -> io::Result<()> {
    match stream {
        ClientStream::Tcp(stream) => stream.write_all(TOO_MANY).await,
        ClientStream::Unix(stream) => stream.write_all(TOO_MANY).await,
        ClientStream::Tls(stream) => stream.write_all(TOO_MANY).await,
    }
}
