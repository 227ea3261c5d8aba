//! A region: its memcacheds, its topics, and a real `evrepl run` process with a configuration file of its own.

mod builder;
mod certs;
mod pair;
mod settings;
mod settle;
mod status;

pub use builder::{PeerSpec, RegionBuilder};
pub use certs::{Certs, evrepl};
pub use pair::{TwoRegions, TwoRegionsSpec, two_regions};
pub use settle::{
    FlowSums, Mismatch, accounted, assert_same, compare, flow_sums, settle, settle_within, settled_within,
};
pub(crate) use status::get;
pub use status::{FlowStatus, Sampler, balanced, flows};

use std::fmt::Write;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;

use crate::cache::Cache;
use crate::kafka::KafkaClient;
use crate::place::{Dir, free_port};
use crate::process::{Process, Signal, tail};
use crate::wait::holds_within;
use crate::writer::Writer;
use settings::{Settings, quoted};

/// How long `evrepl run` may take until it answers, on a machine where everything starts at once.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// How long it may take to end after SIGTERM: the default grace period of 25 s and some.
const DRAINED_WITHIN: Duration = Duration::from_secs(40);

/// What a region's configuration and process are made from; may change between two starts.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) peers: Vec<PeerSpec>,
    pub(crate) settings: Settings,
    pub(crate) environment: Vec<(String, String)>,
    /// Program and arguments in front of evrepl's own command line; mostly none.
    pub(crate) under: Vec<String>,
    /// `None`: the usual one.
    pub(crate) binary: Option<PathBuf>,
}

/// One evrepl process and what it serves. Dropping it ends everything it started.
#[derive(Debug)]
pub struct Region {
    name: String,
    node: String,
    agent_port: u16,
    admin_port: u16,
    kafka: Arc<KafkaClient>,
    group_prefix: String,
    caches: Vec<Arc<Cache>>,
    certs: Arc<Certs>,
    plan: Mutex<Plan>,
    process: Mutex<Option<Process>>,
    idle_rss: AtomicU64,
    dir: Dir,
}

impl Region {
    pub(crate) fn new(
        name: String,
        node: String,
        (agent_port, admin_port): (u16, u16),
        (kafka, group_prefix): (Arc<KafkaClient>, String),
        caches: Vec<Arc<Cache>>,
        certs: Arc<Certs>,
        plan: Plan,
    ) -> Region {
        let dir = Dir::new(&name);
        let (plan, process, idle_rss) = (Mutex::new(plan), Mutex::new(None), AtomicU64::new(0));
        let region = Region {
            name,
            node,
            agent_port,
            admin_port,
            kafka,
            group_prefix,
            caches,
            certs,
            plan,
            process,
            idle_rss,
            dir,
        };
        region.write_config();
        region
    }

    /// One more evrepl process of this region: same caches, topics and groups, its own node name and ports. Not started.
    /// A memcached has one writing agent, so peers go on dialling the first process.
    pub fn another_node(&self, node: &str) -> Region {
        Region::new(
            self.name.clone(),
            node.into(),
            (free_port(), free_port()),
            (Arc::clone(&self.kafka), self.group_prefix.clone()),
            self.caches.clone(),
            Arc::clone(&self.certs),
            self.plan().clone(),
        )
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn node(&self) -> &str {
        &self.node
    }

    /// Where its agent listens: what peers dial.
    pub fn agent_address(&self) -> String {
        format!("127.0.0.1:{}", self.agent_port)
    }

    /// `http://127.0.0.1:<port>`, in front of `/status` and its like.
    pub fn admin_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.admin_port)
    }

    pub fn kafka(&self) -> &Arc<KafkaClient> {
        &self.kafka
    }

    /// The consumer group of its flow to `peer`.
    pub fn group(&self, peer: &str) -> String {
        format!("{}.{}.{peer}", self.group_prefix, self.name)
    }

    pub fn config_path(&self) -> PathBuf {
        self.dir.path().join("evrepl.toml")
    }

    pub fn certs(&self) -> &Arc<Certs> {
        &self.certs
    }

    pub fn caches(&self) -> &[Arc<Cache>] {
        &self.caches
    }

    /// # Panics
    /// When it has no cache of this name.
    pub fn cache(&self, name: &str) -> &Arc<Cache> {
        let found = self.caches.iter().find(|cache| cache.name == name);
        found.unwrap_or_else(|| panic!("{} has no cache {name}", self.name))
    }

    /// An application in this region that writes `cache`.
    pub fn writer(&self, cache: &str) -> Writer {
        self.writer_with(cache, &[])
    }

    /// The same with librdkafka properties, such as `("partitioner", "murmur2_random")`.
    pub fn writer_with(&self, cache: &str, properties: &[(&str, &str)]) -> Writer {
        Writer::new(Arc::clone(self.cache(cache)), &self.kafka, properties)
    }

    /// The topics of its flow to `peer`; empty when it doesn't send there.
    pub fn topics_to(&self, peer: &str) -> Vec<String> {
        let plan = self.plan();
        let Some(peer) = plan
            .peers
            .iter()
            .find(|one| one.region == peer && one.address.is_some())
        else {
            return Vec::new();
        };
        let taken = |cache: &&Arc<Cache>| peer.caches.as_ref().is_none_or(|names| names.contains(&cache.name));
        self.caches
            .iter()
            .filter(taken)
            .map(|cache| cache.topic.clone())
            .collect()
    }

    /// The peers it sends to.
    pub fn destinations(&self) -> Vec<String> {
        self.plan()
            .peers
            .iter()
            .filter(|peer| peer.address.is_some())
            .map(|peer| peer.region.clone())
            .collect()
    }

    /// Changes a setting for the next start, with a TOML literal: `("flow.lanes", "4")`.
    pub fn set(&self, path: &str, literal: &str) {
        self.plan().settings.set(path, literal);
        self.write_config();
    }

    /// Changes an environment variable for the next start; `None` removes it.
    pub fn set_env(&self, name: &str, value: Option<&str>) {
        let environment = &mut self.plan().environment;
        environment.retain(|(key, _)| key != name);
        environment.extend(value.map(|value| (name.to_string(), value.to_string())));
    }

    /// Starts the process and returns when it answers `/livez`.
    ///
    /// # Panics
    /// When it ends or stays silent; its log is printed.
    pub fn start(&self) {
        self.spawn();
        let live = || matches!(self.get("/livez"), Ok((200, _)));
        let answered = holds_within(READY_WITHIN, || !self.is_running() || live());
        assert!(
            self.is_running(),
            "evrepl of {} ended while starting:\n{}",
            self.name,
            self.log_tail(60)
        );
        assert!(
            answered,
            "evrepl of {} does not answer after {READY_WITHIN:?}",
            self.name
        );
        self.note_idle();
    }

    fn note_idle(&self) {
        self.idle_rss.store(self.rss_bytes(), Ordering::Relaxed);
    }

    /// Starts the process and waits for nothing: for configurations it should refuse.
    pub fn spawn(&self) {
        let mut slot = self.slot();
        assert!(
            slot.as_ref().is_none_or(|old| !old.is_running()),
            "{} runs already",
            self.name
        );
        let words = self.plan().under.clone().into_iter().map(Into::into);
        let binary = self.plan().binary.clone().unwrap_or_else(evrepl);
        let mut words = words.chain([binary.into_os_string()]);
        let mut command = Command::new(words.next().expect("evrepl itself at least"));
        command
            .args(words)
            .arg("run")
            .arg("--config")
            .arg(self.config_path())
            .current_dir(self.dir.path());
        // Settings of whoever runs the tests are not ours.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("EVREPL_")) {
            command.env_remove(name);
        }
        command
            .env_remove("FAILPOINTS")
            .env("RUST_BACKTRACE", "1")
            .envs(self.plan().environment.clone());
        *slot = Some(Process::spawn(
            &format!("evrepl {} ({})", self.name, self.node),
            command,
            &self.log_path(),
        ));
    }

    /// SIGKILL: what it had in flight is replayed by whoever continues.
    pub fn kill(&self) {
        if let Some(process) = self.slot().take() {
            process.kill();
        }
    }

    /// SIGTERM, and waits until it has drained: the exit code (0 drained, 75 work left).
    ///
    /// # Panics
    /// When it doesn't run, or doesn't end in 40 s.
    pub fn terminate(&self) -> i32 {
        self.signal(Signal::Terminate);
        let code = self.exit_code(DRAINED_WITHIN);
        code.unwrap_or_else(|| panic!("evrepl of {} runs on {DRAINED_WITHIN:?} after SIGTERM", self.name))
    }

    /// The exit code once it ends by itself within `limit` (128 + n for signal n).
    pub fn exit_code(&self, limit: Duration) -> Option<i32> {
        let process = self.slot().take()?;
        let code = process.exit_code(limit);
        if code.is_none() {
            *self.slot() = Some(process);
        }
        code
    }

    /// Kills it if it still runs and starts it again with the settings of now.
    pub fn restart(&self) {
        self.kill();
        self.start();
    }

    /// Freezes the process: its connections stay open and nothing answers.
    pub fn freeze(&self) {
        self.signal(Signal::Stop);
    }

    /// Goes on after [`Region::freeze`].
    pub fn thaw(&self) {
        self.signal(Signal::Continue);
    }

    /// # Panics
    /// When it doesn't run.
    pub fn signal(&self, signal: Signal) {
        let slot = self.slot();
        slot.as_ref()
            .unwrap_or_else(|| panic!("evrepl of {} does not run", self.name))
            .signal(signal);
    }

    pub fn is_running(&self) -> bool {
        self.slot().as_ref().is_some_and(Process::is_running)
    }

    /// Resident memory in bytes; 0 when it doesn't run.
    pub fn rss_bytes(&self) -> u64 {
        self.slot().as_ref().map_or(0, Process::rss_bytes)
    }

    /// The most memory that its process ever had resident, in bytes, and the process's id; `None` when it doesn't run.
    pub fn peak_rss_bytes(&self) -> Option<(u32, u64)> {
        self.slot()
            .as_ref()
            .map(|process| (process.pid(), process.peak_rss_bytes()))
            .filter(|(_, bytes)| *bytes > 0)
    }

    /// Resident memory in bytes right after the last start: what to compare a loaded process with.
    pub fn idle_rss_bytes(&self) -> u64 {
        self.idle_rss.load(Ordering::Relaxed)
    }

    /// CPU time the process has used, user and system, in seconds.
    pub fn cpu_seconds(&self) -> f64 {
        self.slot().as_ref().map_or(0.0, Process::cpu_seconds)
    }

    /// HTTP status and body of a path of its admin port, such as `/readyz?verbose`.
    ///
    /// # Errors
    /// When it doesn't answer within two seconds, in words.
    pub fn get(&self, path: &str) -> Result<(u16, String), String> {
        status::get(&format!("{}{path}", self.admin_url()))
    }

    /// `GET /status`, if it answers.
    pub fn try_status(&self) -> Option<Value> {
        status::fetch(&self.admin_url()).ok()
    }

    /// `GET /status`.
    ///
    /// # Panics
    /// When it doesn't answer.
    pub fn status(&self) -> Value {
        status::fetch(&self.admin_url()).unwrap_or_else(|error| panic!("the status of {}: {error}", self.name))
    }

    /// Its flow to `peer` in `/status`.
    ///
    /// # Panics
    /// When it doesn't answer, or has no such flow.
    pub fn flow(&self, peer: &str) -> FlowStatus {
        let status = self.status();
        let found = flows(&status).unwrap_or_else(|error| panic!("the status of {}: {error}", self.name));
        let found = found.into_iter().find(|flow| flow.peer == peer);
        found.unwrap_or_else(|| panic!("{} has no flow to {peer}: {status:#}", self.name))
    }

    /// Waits until its `/status` satisfies `condition`.
    ///
    /// # Panics
    /// When it doesn't within `limit`; the last status is in the message.
    #[track_caller]
    pub fn wait_until(&self, what: &str, limit: Duration, condition: impl Fn(&Value) -> bool) {
        let mut last = Value::Null;
        let came = holds_within(limit, || match self.try_status() {
            Some(status) => {
                last = status;
                condition(&last)
            }
            None => false,
        });
        assert!(
            came,
            "waited {limit:?} in vain for {}: {what}; its last status:\n{last:#}",
            self.name
        );
    }

    /// The text of `/metrics`.
    ///
    /// # Panics
    /// When it doesn't answer.
    pub fn metrics(&self) -> String {
        self.get("/metrics")
            .unwrap_or_else(|error| panic!("the metrics of {}: {error}", self.name))
            .1
    }

    /// The sum of all samples of a metric whose labels include these; `None` when there is none.
    pub fn metric(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        status::metric(&self.metrics(), name, labels)
    }

    /// The last lines of its log, of all its starts.
    pub fn log_tail(&self, lines: usize) -> String {
        tail(&self.log_path(), lines)
    }

    /// Its whole log.
    pub fn log(&self) -> String {
        self.log_tail(usize::MAX)
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("evrepl.log")
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self) -> MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_config(&self) {
        let plan = self.plan();
        let mut settings = Settings::default();
        settings.set("node", &quoted(&self.node));
        settings.set("agent.listen", &quoted(&self.agent_address()));
        settings.set("admin.listen", &quoted(&format!("127.0.0.1:{}", self.admin_port)));
        let file = |name: String| quoted(&self.certs.path().join(name).to_string_lossy());
        settings.set("tls.certificate", &file(format!("{}.pem", self.name)));
        settings.set("tls.private_key", &file(format!("{}.key", self.name)));
        settings.set("tls.ca", &file("ca.pem".into()));
        settings.absorb(plan.settings.clone());
        let text = settings.render(&self.arrays(&plan.peers));
        let path = self.config_path();
        fs::write(&path, text).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    }

    fn arrays(&self, peers: &[PeerSpec]) -> String {
        let list =
            |items: &mut dyn Iterator<Item = &String>| items.map(|item| quoted(item)).collect::<Vec<_>>().join(", ");
        let mut text = String::new();
        for cache in &self.caches {
            let servers = list(&mut cache.servers.iter().map(|server| &server.address));
            let (name, topic) = (quoted(&cache.name), quoted(&cache.topic));
            let _ = writeln!(text, "[[cache]]\nname = {name}\ntopic = {topic}\nservers = [{servers}]");
            options(&mut text, &cache.options);
        }
        for peer in peers {
            let _ = writeln!(text, "[[peer]]\nregion = {}", quoted(&peer.region));
            if let Some(address) = &peer.address {
                let _ = writeln!(text, "address = {}", quoted(address));
            }
            if let Some(caches) = &peer.caches {
                let _ = writeln!(text, "caches = [{}]", list(&mut caches.iter()));
            }
            options(&mut text, &peer.options);
        }
        text
    }
}

fn options(text: &mut String, options: &[(String, String)]) {
    for (key, literal) in options {
        let _ = writeln!(text, "{key} = {literal}");
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // A process that still runs prints its log itself, when it is dropped.
        if std::thread::panicking() {
            match self.slot().as_ref() {
                Some(_) => println!(
                    "--- the last status of {}\n{:#}",
                    self.name,
                    self.try_status().unwrap_or_default()
                ),
                None => println!(
                    "--- the end of the log of {}, which runs no more\n{}",
                    self.name,
                    self.log_tail(80)
                ),
            }
        }
    }
}
