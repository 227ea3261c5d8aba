//! What a fault happens to: two regions under load, and handles to break each part of them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::history::Wipe;
use super::load::{LoadControl, LoadSpec};
use crate::cache::{CacheSpec, Server};
use crate::kafka::{Broker, KafkaClient};
use crate::place::Dir;
use crate::proxy::FaultProxy;
use crate::region::{Region, TwoRegions, TwoRegionsSpec, flow_sums};

/// The cache that the load writes.
pub const CACHE: &str = "sessions";

/// Kafka takes a member for dead after this.
const SESSION_TIMEOUT: &str = "6s";

/// What a fault needs; two faults that happen together need what each of them needs.
#[derive(Clone, Debug)]
pub struct Setup {
    pub source_servers: usize,
    pub destination_servers: usize,
    /// A second relay of the source region, running from the start; otherwise it is there to be started.
    pub second_relay: bool,
    /// A Kafka that nobody else uses.
    pub own_broker: bool,
    /// Processes whose clock can be set: the first relay's, or with it everything else of its region.
    pub clock: bool,
    pub memcached: Vec<String>,
    pub destination_memcached: Vec<String>,
    /// Settings of all processes, as TOML.
    pub settings: String,
    /// Environment of the source's and of the destination's process.
    pub environment: [Vec<(String, String)>; 2],
    pub load: LoadSpec,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            source_servers: 1,
            destination_servers: 1,
            second_relay: false,
            own_broker: false,
            clock: false,
            memcached: Vec::new(),
            destination_memcached: Vec::new(),
            // Two lanes: keys of one flow that travel beside each other.
            settings: format!("[kafka]\nsession_timeout = \"{SESSION_TIMEOUT}\"\n[flow]\nlanes = 2\n"),
            environment: [Vec::new(), Vec::new()],
            load: LoadSpec::default(),
        }
    }
}

/// Everything that runs, and what was done to it.
#[derive(Debug)]
pub struct World {
    // Processes end before what they use.
    pub pair: TwoRegions,
    /// Another relay of the source region; it may run or not.
    pub second: Region,
    pub broker: Option<Broker>,
    pub load: Arc<LoadControl>,
    clocks: Option<Clocks>,
    notes: Mutex<Notes>,
}

#[derive(Debug, Default)]
struct Notes {
    /// Times in which values of a destination server may have vanished, by its index.
    wipes: Vec<(usize, Instant, Option<Instant>)>,
    /// What flows had committed when their process was replaced: where its successor begins.
    began_at: BTreeMap<String, u64>,
    /// Whether one was replaced while Kafka could not be asked, or beside another process of its region.
    sums_are_lost: bool,
}

/// Files that libfaketime reads at every look at a clock.
#[derive(Debug)]
struct Clocks {
    dir: Dir,
}

impl Clocks {
    fn file(&self, which: &str) -> PathBuf {
        self.dir.path().join(which)
    }

    fn set(&self, which: &str, offset: &str) {
        // Written beside and moved: a reader never meets half a file.
        let part = self.file(&format!("{which}.part"));
        let moved =
            std::fs::write(&part, format!("{offset}\n")).and_then(|()| std::fs::rename(&part, self.file(which)));
        moved.unwrap_or_else(|error| panic!("the clock of {which}: {error}"));
    }
}

/// The library that lies to a process about the time of day (and, told so, not about the monotonic clock).
///
/// librdkafka computes the end of its waits from the time of day and waits with `cnd_timedwait`, which the library doesn't
/// know: while the clock is behind, its waits end at once, and while it is ahead, only when somebody wakes them. A real jump
/// does that to the waits of one moment, this to all of them.
pub fn faketime() -> PathBuf {
    let found = ["x86_64", "aarch64"]
        .map(|machine| PathBuf::from(format!("/usr/lib/{machine}-linux-gnu/faketime/libfaketimeMT.so.1")));
    found
        .into_iter()
        .find(|path| path.is_file())
        .expect("libfaketime is installed (`make setup`)")
}

impl World {
    /// Starts everything.
    ///
    /// # Panics
    /// When something doesn't start.
    pub fn start(setup: &Setup) -> World {
        let broker = setup.own_broker.then(Broker::start);
        let arguments = |more: &[String]| setup.memcached.iter().chain(more).cloned().collect::<Vec<_>>();
        let cache = |servers: usize, arguments: Vec<String>| {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            CacheSpec::new(CACHE)
                .servers(servers)
                .memcached_args(&arguments)
                .proxied()
        };
        let source = cache(setup.source_servers, arguments(&[]));
        let destination = cache(setup.destination_servers, arguments(&setup.destination_memcached));
        let clocks = setup.clock.then(|| Clocks {
            dir: Dir::new("clocks"),
        });
        let [us_env, eu_env] = setup.environment.clone();
        let kafka: Option<Arc<KafkaClient>> = broker.as_ref().map(Broker::client);
        let theirs = kafka.clone();
        let pair = TwoRegionsSpec::new()
            .proxied()
            .extra(&setup.settings)
            .us(move |us| {
                let us = us_env
                    .iter()
                    .fold(us.cache(source), |us, (name, value)| us.env(name, value));
                kafka.iter().fold(us, |us, kafka| us.kafka(kafka))
            })
            .eu(move |eu| {
                let eu = eu_env
                    .iter()
                    .fold(eu.cache(destination), |eu, (name, value)| eu.env(name, value));
                theirs.iter().fold(eu, |eu, kafka| eu.kafka(kafka))
            })
            .build();
        let second = pair.us.another_node("relay-2");
        for region in [&pair.us, &second] {
            let (Some(clocks), which) = (&clocks, region.node()) else {
                continue;
            };
            clocks.set(which, "+0");
            region.set_env("LD_PRELOAD", Some(&faketime().to_string_lossy()));
            region.set_env("FAKETIME_TIMESTAMP_FILE", Some(&clocks.file(which).to_string_lossy()));
            region.set_env("FAKETIME_NO_CACHE", Some("1"));
            region.set_env("FAKETIME_DONT_FAKE_MONOTONIC", Some("1"));
        }
        let world = World {
            pair,
            second,
            broker,
            load: Arc::default(),
            clocks,
            notes: Mutex::default(),
        };
        world.pair.us.spawn();
        world.pair.eu.start();
        if setup.second_relay {
            world.second.start();
        }
        world
    }

    /// Waits until the stream flows: each relay that runs has brought events to an end. A fault shall break something.
    ///
    /// # Panics
    /// When that takes more than a minute.
    pub fn wait_for_the_stream(&self) {
        let of_the_source = |region: &&Region| region.name() == self.relay().name();
        for region in self.running().into_iter().filter(of_the_source) {
            region.wait_until("events are applied", Duration::from_secs(60), |status| {
                status["flows"][0]["outcomes"]["applied"].as_u64() > Some(0)
            });
        }
    }

    /// The first relay's region, which the load writes.
    pub fn relay(&self) -> &Region {
        &self.pair.us
    }

    /// The region that the load is replicated to.
    pub fn agent(&self) -> &Region {
        &self.pair.eu
    }

    /// All processes that run now.
    pub fn running(&self) -> Vec<&Region> {
        self.all().into_iter().filter(|region| region.is_running()).collect()
    }

    /// All processes that run, or may.
    pub fn all(&self) -> Vec<&Region> {
        vec![&self.pair.us, &self.second, &self.pair.eu]
    }

    /// The network between the relays and the agent.
    pub fn link(&self) -> &FaultProxy {
        self.pair.us_to_eu()
    }

    /// The broker of a fault that asked for one of its own.
    ///
    /// # Panics
    /// When it did not ask.
    pub fn own_broker(&self) -> &Broker {
        self.broker.as_ref().expect("a broker of its own")
    }

    /// A server of the destination's cache.
    pub fn destination(&self, index: usize) -> &Server {
        &self.pair.eu.cache(CACHE).servers[index]
    }

    /// A server of the source's cache.
    pub fn source(&self, index: usize) -> &Server {
        &self.pair.us.cache(CACHE).servers[index]
    }

    /// Lets time pass.
    pub fn hold(&self, time: Duration) {
        thread::sleep(time);
    }

    /// kill -9, a pause, and the next process, which begins where the last one had committed.
    pub fn kill_and_start(&self, region: &Region, pause: Duration) {
        region.kill();
        self.hold(pause);
        self.start_anew(region);
    }

    /// Starts a process that takes the place of a killed one.
    pub fn start_anew(&self, region: &Region) {
        let alone = !(self.second.is_running() && region.name() == self.second.name());
        if alone && region.kafka().answers(Duration::from_secs(1)) {
            let sums = flow_sums(&[region]);
            let committed = sums.into_iter().map(|sums| (sums.flow, sums.committed));
            self.notes().began_at.extend(committed);
        } else {
            self.notes().sums_are_lost = true;
        }
        region.start();
    }

    /// What a flow's processes didn't consume themselves, because the one before them had.
    pub fn began_at(&self, flow: &str) -> u64 {
        self.notes().began_at.get(flow).copied().unwrap_or(0)
    }

    /// Whether any process was replaced.
    pub fn was_replaced(&self) -> bool {
        let notes = self.notes();
        notes.sums_are_lost || !notes.began_at.is_empty()
    }

    /// Whether processes took counts with them that nobody knows.
    pub fn sums_are_lost(&self) -> bool {
        self.notes().sums_are_lost
    }

    /// Sets the clock of a relay ahead, or back, by so many hours.
    pub fn set_clock(&self, region: &Region, hours: i32) {
        let clocks = self.clocks.as_ref().expect("a world with clocks");
        // As libfaketime takes it.
        clocks.set(region.node(), &format!("{hours:+}h"));
    }

    /// The clock of the applications in the source region.
    pub fn set_writers_clock(&self, offset_ms: i64) {
        self.load.clock_ms.store(offset_ms, Relaxed);
    }

    /// From now on values of this destination server may vanish.
    pub fn wiping(&self, server: usize) {
        self.notes().wipes.push((server, Instant::now(), None));
    }

    /// They may no more.
    pub fn wiped(&self, server: usize) {
        let mut notes = self.notes();
        let open = notes
            .wipes
            .iter_mut()
            .filter(|(of, _, until)| *of == server && until.is_none());
        open.for_each(|(_, _, until)| *until = Some(Instant::now()));
    }

    /// When values of a destination server may have vanished.
    pub fn wipes(&self, server: usize) -> Vec<Wipe> {
        let notes = self.notes();
        let of = notes.wipes.iter().filter(|(of, ..)| *of == server);
        let wipe = |(_, from, until): &(usize, Instant, Option<Instant>)| Wipe {
            from: *from,
            until: until.unwrap_or_else(Instant::now),
        };
        of.map(wipe).collect()
    }

    fn notes(&self) -> std::sync::MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
