//! `evrepl run`: one region's relay and agent in one process, from configuration to exit code.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use actix::prelude::*;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use crate::actors::flow_supervisor::FlowParts;
use crate::actors::front_door_listener::{DoorEntry, DoorSocket};
use crate::actors::region_supervisor::{DoorParts, EXIT_GAVE_UP, RegionSupervisor, Terminate};
use crate::admin::AdminError;
use crate::agent::AgentShared;
use crate::canary;
use crate::config::Config;
use crate::front_door::DoorShared;
use crate::front_door::announcer::Announcer;
use crate::hashing::{HashKind, Ring, RingServer};
use crate::kafka::{KafkaError, Producer};
use crate::pulse::Pulses;
use crate::region::{DoorView, Region};
use crate::relay::FlowView;
use crate::telemetry::{self, Instruments, TelemetryError, TelemetryOptions};
use crate::tls::{TlsError, TlsMaterial};
use crate::topics;
use crate::vitals::Vitals;

/// The configuration is right in itself but cannot be run here.
pub const EXIT_CONFIG: i32 = 78;

/// How often it is asked whether the root of the tree still runs.
const ROOT_WATCH: Duration = Duration::from_millis(500);
/// The root is given up after so many times `supervision.stalled_after`: everything below it can be restarted, it cannot.
const ROOT_PATIENCE: u32 = 2;
/// How long the last export may keep the process.
const TELEMETRY_LIMIT: Duration = Duration::from_secs(2);

/// Why a region could not start. None of it is retried: somebody has to change something.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A certificate or key is not usable.
    #[error("[tls]: {0}")]
    Tls(#[from] TlsError),
    /// A listen address is taken or not ours.
    #[error("{option} = \"{address}\": cannot listen: {source}")]
    Listen {
        /// Which option names it.
        option: &'static str,
        /// The address.
        address: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// librdkafka refuses the settings.
    #[error("[kafka]: {0}")]
    Kafka(#[from] KafkaError),
    /// The admin interface cannot listen.
    #[error("[admin]: {0}")]
    Admin(#[from] AdminError),
    /// Logging or metrics could not start.
    #[error("{0}")]
    Telemetry(#[from] TelemetryError),
}

/// Runs until drained, given up or told to end; gives the exit code.
pub fn run(config: Config) -> i32 {
    // `FAILPOINTS` in the environment; without the feature there are no failpoints to set.
    #[cfg(feature = "failpoints")]
    let _failpoints = fail::FailScenario::setup();
    match start(Arc::new(config)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("evrepl: {error}");
            EXIT_CONFIG
        }
    }
}

/// The rings of every cache, by cache index.
pub fn rings(config: &Config) -> Vec<Ring> {
    config.caches.iter().map(ring).collect()
}

/// The ring of one cache.
pub fn ring(cache: &crate::config::Cache) -> Ring {
    let kind = match cache.hash {
        crate::config::HashKind::Ketama => HashKind::Ketama,
        crate::config::HashKind::Consistent => HashKind::Consistent,
    };
    let servers: Vec<RingServer> = cache
        .servers
        .iter()
        .map(|server| RingServer {
            address: server.address.clone(),
            ring_name: server.ring_name.clone(),
            weight: server.weight,
        })
        .collect();
    Ring::new(kind, &servers)
}

fn start(config: Arc<Config>) -> Result<i32, StartError> {
    let tls = Arc::new(TlsMaterial::load(
        &config.tls.certificate,
        &config.tls.private_key,
        &config.tls.ca,
    )?);
    let socket = listen("agent.listen", &config.agent.listen)?;
    let mut telemetry = telemetry::start(&TelemetryOptions::of(&config))?;
    telemetry::start_logging(config.telemetry.log_format, telemetry.tracer())?;
    let instruments = telemetry.instruments();
    let rings = rings(&config);
    let agent = Arc::new(AgentShared::new(
        config.clone(),
        tls.clone(),
        rings.clone(),
        instruments.clone(),
    ));
    let peers = || {
        config
            .peers
            .iter()
            .enumerate()
            .filter_map(|(n, peer)| Some((n, peer.address.clone()?)))
    };
    let views: Vec<Arc<FlowView>> = peers().map(|(n, _)| Arc::new(FlowView::new(&config, n))).collect();
    let door = front_door(&config, &rings, &instruments, &tls)?;
    let vitals = Arc::new(Vitals::new(config.supervision.stalled_after, Instant::now()));
    let region = Arc::new(Region {
        config: config.clone(),
        flows: views.clone(),
        agent: agent.clone(),
        instruments: instruments.clone(),
        vitals: vitals.clone(),
        door: door.as_ref().map(|door| DoorView {
            shared: door.shared.clone(),
            upstreams: door.views.clone(),
        }),
    });
    telemetry.serve_admin(&config.admin.listen, region.clone())?;
    instruments.register_source(region);
    // Their failures begin at zero now, not when an actor first calls them: no alert sees a counter rise from nothing.
    let calls: &[&'static str] = if views.is_empty() {
        &["write"]
    } else {
        &["look", "write"]
    };
    for cache in &config.caches {
        for (server, call) in cache
            .servers
            .iter()
            .flat_map(|server| calls.iter().map(move |call| (server, call)))
        {
            instruments.memcached(&cache.name, &server.address, call);
        }
    }
    let producer = Producer::new(&config.kafka, &config.node)?;
    let topics = topics::keep(config.clone());
    let canaries = canary::keep(config.clone(), views.clone(), producer.clone());

    let exit = Arc::new(AtomicI32::new(0));
    let consumer_ids = Arc::new(AtomicU32::new(0));
    let addresses: Vec<String> = peers().map(|(_, address)| address).collect();
    let make_flows = {
        let config = config.clone();
        Box::new(move |failed: Recipient<_>, drained: Recipient<_>| {
            let parts = views.into_iter().zip(addresses).map(|(view, address)| {
                let parts = FlowParts {
                    config: config.clone(),
                    rings: rings.clone(),
                    view,
                    tls: tls.clone(),
                    producer: producer.clone(),
                    instruments: instruments.clone(),
                    consumer_ids: consumer_ids.clone(),
                    failed: failed.clone(),
                    drained: drained.clone(),
                };
                (parts, address)
            });
            parts.collect()
        })
    };
    tracing::info!(
        region = config.region,
        node = config.node,
        version = env!("CARGO_PKG_VERSION"),
        "starting"
    );
    let pulses = Arc::new(Pulses::default());
    let pulse = pulses.register("region_supervisor", config.region.clone());
    pulse.holds(1, None);
    let watchdog = watch_root(pulses, config.supervision.stalled_after * ROOT_PATIENCE);
    let system = System::new();
    let (code, exit_code) = (exit.clone(), exit.clone());
    system.block_on(async move {
        let root = RegionSupervisor::new(make_flows, agent, socket, door, code, vitals.clone()).start();
        let its_vitals = vitals.clone();
        actix_rt::spawn(async move {
            loop {
                pulse.moved("turned");
                its_vitals.turned(Instant::now());
                tokio::time::sleep(ROOT_WATCH).await;
            }
        });
        let (watched, its_code) = (root.clone(), exit_code);
        actix_rt::spawn(async move {
            // The root has nobody above it: without it the process would neither heal nor drain.
            while watched.connected() {
                tokio::time::sleep(ROOT_WATCH).await;
            }
            tracing::error!("region supervisor is gone, giving up");
            vitals.give_up("the region supervisor is gone");
            its_code.store(EXIT_GAVE_UP, SeqCst);
            System::current().stop();
        });
        for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
            // Fails only where the process may not handle signals at all; it then ends the hard way, which is safe.
            let Ok(mut signals) = signal(kind) else { continue };
            let root = root.clone();
            actix_rt::spawn(async move {
                while signals.recv().await.is_some() {
                    root.do_send(Terminate);
                }
            });
        }
    });
    if let Err(error) = system.run() {
        tracing::error!(%error, "system ended with an error");
    }
    drop((topics, canaries, watchdog));
    if let Err(error) = telemetry.shutdown(TELEMETRY_LIMIT) {
        tracing::warn!(%error, "telemetry");
    }
    Ok(exit.load(SeqCst))
}

/// The front door of the caches that have one, with its sockets bound.
fn front_door(
    config: &Arc<Config>,
    rings: &[Ring],
    instruments: &Arc<Instruments>,
    tls: &Arc<TlsMaterial>,
) -> Result<Option<DoorParts>, StartError> {
    let mut entries = Vec::new();
    for (number, cache) in config.caches.iter().enumerate() {
        let doors = [
            ("cache.listen", &cache.listen, false),
            ("cache.listen_fills", &cache.listen_fills, true),
        ];
        for (option, listens, fills) in doors {
            let Some(address) = listens else { continue };
            let socket = match address.strip_prefix("unix:") {
                Some(path) => DoorSocket::Unix(listen_unix(option, path)?),
                None => DoorSocket::Tcp(listen(option, address)?),
            };
            entries.push(DoorEntry {
                cache: number,
                fills,
                socket,
            });
        }
    }
    if entries.is_empty() {
        return Ok(None);
    }
    let views = config
        .caches
        .iter()
        .map(|cache| cache.servers.iter().map(|_| Arc::default()).collect());
    raise_open_files(config.front_door.max_connections);
    let announcer = Announcer::new(config)?;
    let shared = DoorShared::new(config.clone(), rings.to_vec(), announcer, instruments.clone());
    Ok(Some(DoorParts {
        shared: Arc::new(shared),
        tls: tls.clone(),
        entries,
        views: views.collect(),
    }))
}

/// Files that are open besides the clients' connections: some for each peer, server and broker.
const OTHER_FILES: u64 = 500;

/// Lets this process have as many files open as it may: a client is one, and the usual limit is 1024.
fn raise_open_files(clients: usize) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    // Where it cannot be raised it stays as it is.
    let _ = setrlimit(Resource::Nofile, raised);
    if let Some(files) = getrlimit(Resource::Nofile).current
        && files < clients as u64 + OTHER_FILES
    {
        tracing::warn!(
            files,
            clients,
            "fewer files may be open than front_door.max_connections needs; raise the limit (ulimit -n, LimitNOFILE=)"
        );
    }
}

/// A socket in the file system. One that a process left behind is removed; one that somebody listens on is not, and nothing that
/// is no socket: connecting to a file is refused just so.
fn listen_unix(option: &'static str, path: &str) -> Result<UnixListener, StartError> {
    let failed = |source| StartError::Listen {
        option,
        address: format!("unix:{path}"),
        source,
    };
    let socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if socket
        && let Err(error) = UnixStream::connect(path)
        && error.kind() == std::io::ErrorKind::ConnectionRefused
    {
        std::fs::remove_file(path).map_err(failed)?;
    }
    let socket = UnixListener::bind(path).map_err(failed)?;
    socket.set_nonblocking(true).map_err(failed)?;
    Ok(socket)
}

/// The root has nobody above it: a thread of its own looks whether the root's thread turns, and ends the process when it does
/// not. Ends when dropped.
fn watch_root(pulses: Arc<Pulses>, limit: Duration) -> Option<mpsc::Sender<()>> {
    let (stop, stopped) = mpsc::channel();
    let watch = move || {
        while stopped.recv_timeout(ROOT_WATCH) == Err(mpsc::RecvTimeoutError::Timeout) {
            if let Some(stall) = pulses.stalled(Instant::now(), limit) {
                tracing::error!(stage = stall.actor, since = ?stall.since, "the root's thread does not turn, giving up");
                std::process::exit(EXIT_GAVE_UP);
            }
        }
    };
    match std::thread::Builder::new().name("watchdog".to_owned()).spawn(watch) {
        Ok(_) => Some(stop),
        Err(error) => {
            tracing::warn!(%error, "no thread to watch the root with");
            None
        }
    }
}

/// A bound, non-blocking socket; an address that was in use a moment ago may be used again.
fn listen(option: &'static str, address: &str) -> Result<TcpListener, StartError> {
    let failed = |source| StartError::Listen {
        option,
        address: address.to_owned(),
        source,
    };
    let mut last = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
    for at in address.to_socket_addrs().map_err(failed)? {
        match bind(at) {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

fn bind(at: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&at.into())?;
    // More than the greetings that run at once: callers wait here.
    socket.listen(256)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_left_behind_is_taken_over_and_no_other_file_is_touched() {
        let folder = std::env::temp_dir().join(format!("evrepl-run-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let place = |name: &str| folder.join(name).to_str().unwrap().to_owned();
        let (left, file, link) = (place("left"), place("file"), place("link"));
        drop(listen_unix("cache.listen", &left).unwrap());
        let taken = listen_unix("cache.listen", &left).unwrap();
        // Somebody listens there.
        assert!(listen_unix("cache.listen", &left).is_err());
        drop(taken);
        std::fs::write(&file, "precious").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [&file, &link] {
            assert!(listen_unix("cache.listen", path).is_err());
            assert_eq!(std::fs::read_to_string(path).unwrap(), "precious");
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
