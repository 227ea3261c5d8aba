//! `evrepl run`: one region's relay and agent in one process, from configuration to exit code.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use actix::prelude::*;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use crate::actors::flow_supervisor::FlowParts;
use crate::actors::front_door_listener::{DoorEntry, DoorSocket};
use crate::actors::region_supervisor::{DoorParts, EXIT_GAVE_UP, RegionSupervisor, Terminate};
use crate::admin::AdminError;
use crate::agent::AgentShared;
use crate::canary;
use crate::config::{self, Config};
use crate::front_door::DoorShared;
use crate::front_door::announcer::Announcer;
use crate::hashing::{HashKind, Ring, RingServer};
use crate::kafka::{self, KafkaError, Producer, Refused};
use crate::listening::{self, SocketFile};
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
    #[error("{options}: {source}; {remedy}")]
    Tls {
        /// Which options name it.
        options: &'static str,
        /// What is wrong with the file.
        source: Box<TlsError>,
        /// What to do.
        remedy: &'static str,
    },
    /// A listen address is taken or not ours.
    #[error(
        "{option} is \"{address}\": cannot listen: {source}; {}",
        listening::remedy(address, source)
    )]
    Listen {
        /// Which option names it, of which cache if it is one's.
        option: String,
        /// The address.
        address: String,
        /// What the system says.
        source: io::Error,
    },
    /// librdkafka refuses the settings.
    #[error("{}", one_a_line(.0))]
    Settings(Vec<Refused>),
    /// Kafka's client cannot be made.
    #[error("[kafka]: {0}")]
    Kafka(KafkaError),
    /// Logging or metrics could not start.
    #[error("{0}")]
    Telemetry(#[from] TelemetryError),
}

fn one_a_line(refused: &[Refused]) -> String {
    let lines: Vec<_> = refused.iter().map(ToString::to_string).collect();
    lines.join("\n")
}

/// Runs until drained, given up or told to end; gives the exit code. `file` is where the configuration was read.
pub fn run(config: Config, file: &Path) -> i32 {
    // `FAILPOINTS` in the environment; without the feature there are no failpoints to set.
    #[cfg(feature = "failpoints")]
    let _failpoints = fail::FailScenario::setup();
    match start(Arc::new(config)) {
        Ok(code) => code,
        Err(error) => {
            for line in error.to_string().lines() {
                eprintln!("evrepl: {}: {line}", file.display());
            }
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
    kafka::try_settings(&config).map_err(StartError::Settings)?;
    let config::Tls {
        certificate,
        private_key,
        ca,
    } = &config.tls;
    let tls = TlsMaterial::load(certificate, private_key, ca).map_err(|error| tls_refused(&config.tls, error))?;
    let tls = Arc::new(tls);
    let socket = listen("`agent.listen`", &config.agent.listen, listening::tcp)?;
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
    let (door, socket_files) = front_door(&config, &rings, &instruments, &tls)?;
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
    telemetry
        .serve_admin(&config.admin.listen, region.clone())
        .map_err(|AdminError::Bind { listen, source }| StartError::Listen {
            option: "`admin.listen`".to_owned(),
            address: listen,
            source,
        })?;
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
    let producer = Producer::new(&config.kafka, &config.node).map_err(|error| kafka_refused(&config, error))?;
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
    // Before the sockets are closed: nobody finds a file that was left behind.
    drop(socket_files);
    drop((topics, canaries, watchdog));
    if let Err(error) = telemetry.shutdown(TELEMETRY_LIMIT) {
        tracing::warn!(%error, "telemetry");
    }
    Ok(exit.load(SeqCst))
}

/// The front door of the caches that have one, with its sockets bound, and the files of these that are in the file system.
fn front_door(
    config: &Arc<Config>,
    rings: &[Ring],
    instruments: &Arc<Instruments>,
    tls: &Arc<TlsMaterial>,
) -> Result<(Option<DoorParts>, Vec<SocketFile>), StartError> {
    let (mut entries, mut files) = (Vec::new(), Vec::new());
    for (number, cache) in config.caches.iter().enumerate() {
        for (key, address, fills) in cache.doors() {
            let option = format!("`cache[{number}].{key}` of cache {:?}", cache.name);
            let socket = match address.strip_prefix("unix:") {
                Some(path) => {
                    let (socket, file) = listen(&option, address, |_| listening::unix(path))?;
                    files.push(file);
                    DoorSocket::Unix(socket)
                }
                None => DoorSocket::Tcp(listen(&option, address, listening::tcp)?),
            };
            entries.push(DoorEntry {
                cache: number,
                fills,
                socket,
            });
        }
    }
    if entries.is_empty() {
        return Ok((None, files));
    }
    let views = config
        .caches
        .iter()
        .map(|cache| cache.servers.iter().map(|_| Arc::default()).collect());
    raise_open_files(config.front_door.max_connections);
    let announcer = Announcer::new(config).map_err(|error| kafka_refused(config, error))?;
    let shared = DoorShared::new(config.clone(), rings.to_vec(), announcer, instruments.clone());
    let parts = DoorParts {
        shared: Arc::new(shared),
        tls: tls.clone(),
        entries,
        views: views.collect(),
    };
    Ok((Some(parts), files))
}

fn listen<T>(option: &str, address: &str, bind: impl FnOnce(&str) -> io::Result<T>) -> Result<T, StartError> {
    bind(address).map_err(|source| StartError::Listen {
        option: option.to_owned(),
        address: address.to_owned(),
        source,
    })
}

/// Says which options are about what librdkafka refuses.
fn kafka_refused(config: &Config, error: KafkaError) -> StartError {
    match error {
        KafkaError::Settings(said) => StartError::Settings(vec![kafka::explain(config, &said)]),
        other => StartError::Kafka(other),
    }
}

/// Says which option names what is wrong, and what to do.
fn tls_refused(tls: &config::Tls, source: TlsError) -> StartError {
    let option = |path: &Path| match path {
        path if path == tls.certificate => "`tls.certificate`",
        path if path == tls.private_key => "`tls.private_key`",
        _ => "`tls.ca`",
    };
    let (options, remedy) = match &source {
        TlsError::Read { path, source } => {
            let remedy = match source.kind() {
                io::ErrorKind::NotFound => "write where the file is (`evrepl certs` makes some to try with)",
                io::ErrorKind::PermissionDenied => "let evrepl's user read it",
                _ => "write a file that can be read",
            };
            (option(path), remedy)
        }
        TlsError::Pem { path, .. } | TlsError::Empty { path, .. } | TlsError::Authority { path, .. } => {
            let remedy = match option(path) {
                "`tls.private_key`" => "write a file in PEM with an unencrypted private key",
                "`tls.ca`" => "write a file in PEM with the CA's certificate",
                _ => "write a file in PEM with a certificate",
            };
            (option(path), remedy)
        }
        TlsError::Pair { .. } => (
            "`tls.certificate` and `tls.private_key`",
            "write a certificate and the key that it was made for",
        ),
        _ => ("[tls]", "change it"),
    };
    StartError::Tls {
        options,
        remedy,
        source: Box::new(source),
    }
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn config(door: &str, more: &str) -> Arc<Config> {
        let rest = format!(
            r#"kafka = {{ brokers = ["127.0.0.1:9"], {more} }}
            cache = [
                {{ name = "pages", topic = "p", servers = ["127.0.0.1:8"] }},
                {{ name = "sessions", topic = "s", servers = ["127.0.0.1:9"], {door} }},
            ]"#
        );
        Arc::new(config::for_tests(&rest))
    }

    /// A folder of its own with certificates, gone with the test.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let folder = std::env::temp_dir().join(format!("evrepl-run-{name}-{}", std::process::id()));
            crate::certs::issue(&folder, &["us-east-1".to_owned(), "eu-west-1".to_owned()]).unwrap();
            Folder(folder)
        }

        fn tls(&self) -> config::Tls {
            config::Tls {
                certificate: self.0.join("us-east-1.pem"),
                private_key: self.0.join("us-east-1.key"),
                ca: self.0.join("ca.pem"),
            }
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    type Doors = Result<(Option<DoorParts>, Vec<SocketFile>), StartError>;

    fn doors_of(config: &Arc<Config>, folder: &Folder) -> Doors {
        let tls = folder.tls();
        let tls = Arc::new(TlsMaterial::load(&tls.certificate, &tls.private_key, &tls.ca).unwrap());
        let telemetry = telemetry::start(&TelemetryOptions::of(config)).unwrap();
        front_door(config, &rings(config), &telemetry.instruments(), &tls)
    }

    fn said(doors: Doors) -> String {
        doors.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn a_door_that_cannot_listen_is_said_with_its_cache_its_option_and_what_to_do() {
        let folder = Folder::new("doors");
        let held = listening::tcp("127.0.0.1:0").unwrap();
        let address = held.local_addr().unwrap();
        let text = said(doors_of(&config(&format!("listen = \"{address}\""), ""), &folder));
        let begins =
            format!("`cache[1].listen` of cache \"sessions\" is \"{address}\": cannot listen: Address already in use");
        assert!(text.starts_with(&begins), "{text}");
        let port = address.port();
        assert!(
            text.contains(&format!(
                "; `ss -tanp 'sport = :{port}'` says who holds it: end that, or"
            )),
            "{text}"
        );
        let file = folder.0.join("file");
        std::fs::write(&file, "precious").unwrap();
        let text = said(doors_of(
            &config(&format!("listen_fills = \"unix:{}\"", file.display()), ""),
            &folder,
        ));
        assert!(
            text.starts_with("`cache[1].listen_fills` of cache \"sessions\" is \"unix:/"),
            "{text}"
        );
        assert!(
            text.contains("a file is there that is no socket; it was left alone: move it away, or"),
            "{text}"
        );
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
        let agent = listen("`agent.listen`", &address.to_string(), listening::tcp)
            .unwrap_err()
            .to_string();
        assert!(
            agent.starts_with("`agent.listen` is \"127.0.0.1:") && agent.contains("`ss -tanp"),
            "{agent}"
        );
    }

    #[test]
    fn the_socket_of_a_door_goes_with_what_was_started() {
        let folder = Folder::new("ends");
        let path = folder.0.join("socket");
        let config = config(&format!("listen = \"unix:{}\"", path.display()), "");
        let (door, files) = doors_of(&config, &folder).unwrap_or_else(|error| panic!("{error}"));
        assert!(path.exists() && door.is_some());
        drop(files);
        assert!(!path.exists());
        // Also where something else could not be started.
        let refused = config_with_a_file_that_is_not_there(&path);
        assert!(doors_of(&refused, &folder).is_err() && !path.exists());
    }

    fn config_with_a_file_that_is_not_there(path: &Path) -> Arc<Config> {
        let listen = format!("listen = \"unix:{}\"", path.display());
        let properties = "properties = { \"security.protocol\" = \"ssl\", \"ssl.ca.location\" = \"nowhere.pem\" }";
        config(&listen, properties)
    }

    #[test]
    fn what_librdkafka_refuses_is_said_with_the_option() {
        // Before anything is begun: without certificates too.
        let wrong = config(
            "listen = \"127.0.0.1:0\"",
            "properties = { \"linger.mss\" = 1, \"fetch.wait.max.ms\" = \"x\" }",
        );
        let text = start(wrong).err().map(|error| error.to_string()).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(
            lines[1].starts_with("librdkafka refuses `kafka.properties.linger.mss`: "),
            "{text}"
        );
        let folder = Folder::new("kafka");
        let text = said(doors_of(
            &config_with_a_file_that_is_not_there(&folder.0.join("socket")),
            &folder,
        ));
        assert!(
            text.starts_with("librdkafka refuses `kafka.properties.ssl.ca.location`: "),
            "{text}"
        );
        assert!(text.ends_with("; change or remove it"), "{text}");
    }

    #[test]
    fn a_tls_file_that_is_not_usable_is_said_with_its_option_and_what_to_do() {
        let folder = Folder::new("tls");
        let good = folder.tls();
        let other = folder.0.join("eu-west-1.key");
        let missing = folder.0.join("missing.pem");
        let refused = |tls: config::Tls| {
            let error = TlsMaterial::load(&tls.certificate, &tls.private_key, &tls.ca).unwrap_err();
            tls_refused(&tls, error).to_string()
        };
        for (tls, begins, then) in [
            (
                config::Tls {
                    certificate: missing.clone(),
                    ..good.clone()
                },
                "`tls.certificate`: cannot read /",
                "where the file is",
            ),
            (
                config::Tls {
                    private_key: missing.clone(),
                    ..good.clone()
                },
                "`tls.private_key`: cannot read /",
                "`evrepl certs`",
            ),
            (
                config::Tls {
                    ca: missing.clone(),
                    ..good.clone()
                },
                "`tls.ca`: cannot read /",
                "where the file is",
            ),
            (
                config::Tls {
                    ca: folder.0.clone(),
                    ..good.clone()
                },
                "`tls.ca`: cannot read /",
                "that can be read",
            ),
            (
                config::Tls {
                    private_key: good.ca.clone(),
                    ..good.clone()
                },
                "`tls.private_key`: /",
                "an unencrypted private key",
            ),
            (
                config::Tls {
                    ca: other.clone(),
                    ..good.clone()
                },
                "`tls.ca`: /",
                "with the CA's certificate",
            ),
            (
                config::Tls {
                    private_key: other.clone(),
                    ..good.clone()
                },
                "`tls.certificate` and `tls.private_key`: /",
                "the key that it was made for",
            ),
        ] {
            let text = refused(tls);
            assert!(text.starts_with(begins) && text.contains(then), "{text}");
        }
    }
}
