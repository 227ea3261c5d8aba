//! Canaries: small writes of evrepl's own that go the whole way to each peer, so that lag is known without traffic and a dead
//! path is noticed within seconds, whichever part of it is dead.
//!
//! Every `canary.interval`, for each cache and peer: a value is set in this region's memcached and, once that has answered, its
//! event is produced with the header [`HEADER`] that names the peer. The flow to that peer takes it from Kafka, looks, ships,
//! and hears the ack; all others pass it over. It has a permit while it is in flight and is in no account: what would make an
//! event wait as a dirty key drops a canary, and that is counted with the reason.
//!
//! With several nodes in a region each writes canaries of its own, to partitions that it has itself, so that their acks are
//! heard where they are written. A node to which the group has given no partition expects none, and its path is dead only if it
//! cannot write (see [`Path`]).
//!
//! They are written on a thread of their own, one at a time for each path: whatever hangs holds up nothing else, nothing piles
//! up, and nobody waits for it when the process ends.

mod path;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior};

use crate::config::{Cache, Config};
use crate::event::{self, Event, Op};
use crate::hashing;
use crate::hlc;
use crate::kafka::{Produce, Producer};
use crate::memcached::{MAX_BINARY_KEY_BYTES, SimpleClient};
use crate::outcome::Outcome;
use crate::relay::{FlowView, HeldEvent, wall_ms};
use crate::run::ring;
use crate::writer::{hash_kind, ring_servers};

pub use path::{Ended, Path, PathView, Step, Target, Turn};

/// The header of a canary's event; its value is the peer that it goes to.
pub const HEADER: &str = "evrepl-canary";

/// A path is dead when nothing has arrived for so many intervals, and this: noticed within five seconds of the fault when one
/// is written each second, and not for one that was slow.
const MISSED: u32 = 3;
const MISSED_BY: Duration = Duration::from_millis(500);
/// How often the paths are looked at, at least.
const JUDGED_EVERY: Duration = Duration::from_millis(250);
/// How long one set and one acknowledgement may take: whoever does not answer by then is asked again with the next canary.
const WRITTEN_WITHIN: Duration = Duration::from_secs(2);
/// A canary is gone from memcached so long after the last one was written: far longer than a backlog takes to be read.
const LIVES_SECONDS: u32 = 120;

/// The paths of one flow, by cache. Read and written from any thread.
#[derive(Debug)]
pub struct Paths {
    /// By cache index; `None` for a cache that the peer does not get.
    inner: Mutex<Vec<Option<Path>>>,
}

impl Paths {
    /// The paths to the peer with this index; there are none when canaries are off.
    pub fn new(config: &Config, peer: usize) -> Paths {
        let limit = config.canary.interval * MISSED + MISSED_BY;
        let carried = |cache: &Cache| config.peers[peer].caches.contains(&cache.name);
        let path = |cache| (config.canary.is_on() && carried(cache)).then(|| Path::new(limit));
        Paths {
            inner: Mutex::new(config.caches.iter().map(path).collect()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<Path>>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the path of a cache, if there is one.
    pub fn with<T>(&self, cache: u16, work: impl FnOnce(&mut Path) -> T) -> Option<T> {
        self.lock().get_mut(usize::from(cache))?.as_mut().map(work)
    }

    /// The flow has gone down with all that was in flight.
    pub fn went_down(&self) {
        let now = Instant::now();
        self.lock().iter_mut().flatten().for_each(|path| path.went_down(now));
    }

    /// Each path as it is now, with the index of its cache.
    pub fn views(&self) -> Vec<(usize, PathView)> {
        let now = Instant::now();
        let paths = self.lock();
        let known = paths.iter().enumerate();
        known
            .filter_map(|(cache, path)| Some((cache, path.as_ref()?.view(now))))
            .collect()
    }
}

impl Ended {
    /// A canary that had a permit has ended like this.
    pub fn of(event: &HeldEvent, outcome: Outcome) -> Ended {
        let lost = match outcome {
            // Deleted: of a cache whose policy is to remove copies.
            Outcome::Applied | Outcome::Deleted => None,
            other => Some(other.name()),
        };
        Ended {
            lost,
            ..Ended::lost(event, "")
        }
    }

    /// A canary that had a permit was dropped.
    pub fn lost(event: &HeldEvent, reason: &'static str) -> Ended {
        Ended {
            cache: event.cache,
            produced_at_ms: event.produced_at_ms,
            lost: Some(reason),
        }
    }

    /// From produced-at to now.
    pub fn lag(&self) -> Duration {
        Duration::from_millis(wall_ms().saturating_sub(self.produced_at_ms).max(0) as u64)
    }
}

/// Ends the thread when dropped, whatever that waits for.
pub struct Keeper {
    _stop: oneshot::Sender<()>,
}

/// Writes the canaries of these flows, and judges their paths, for as long as the keeper is there; `None` when canaries are off.
pub fn keep(config: Arc<Config>, flows: Vec<Arc<FlowView>>, producer: Producer) -> Option<Keeper> {
    if !config.canary.is_on() || flows.is_empty() {
        return None;
    }
    let (stop, stopped) = oneshot::channel::<()>();
    let run = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => return tracing::warn!(%error, "no runtime to write canaries in"),
        };
        let tasks = tokio::task::LocalSet::new();
        for view in &flows {
            for (cache, _) in view.canaries.views() {
                let writing = Writing {
                    config: config.clone(),
                    view: view.clone(),
                    cache,
                    producer: producer.clone(),
                    client: None,
                };
                tasks.spawn_local(writing.run());
            }
        }
        tasks.spawn_local(judge(config, flows));
        // Nothing is ever sent: it ends when the keeper goes.
        let _ = tasks.block_on(&runtime, stopped);
        runtime.shutdown_background();
    };
    match std::thread::Builder::new().name("canaries".to_owned()).spawn(run) {
        Ok(_) => Some(Keeper { _stop: stop }),
        Err(error) => {
            tracing::warn!(%error, "no thread to write canaries on");
            None
        }
    }
}

/// Says when a path dies and when it lives again.
async fn judge(config: Arc<Config>, flows: Vec<Arc<FlowView>>) {
    let mut ticks = tokio::time::interval(config.canary.interval.min(JUDGED_EVERY));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        for view in flows.iter().filter(|view| !view.is_draining()) {
            let trouble = view.kafka_trouble();
            for (number, cache) in (0u16..).zip(&config.caches) {
                let turn = |path: &mut Path| path.judge(trouble.clone(), Instant::now());
                match view.canaries.with(number, turn).flatten() {
                    Some(Turn::Died(why)) => {
                        tracing::warn!(
                            flow = view.name,
                            cache = cache.name,
                            why,
                            "path is dead, its canaries do not arrive"
                        );
                    }
                    Some(Turn::Lives(dead_for)) => {
                        tracing::info!(flow = view.name, cache = cache.name, ?dead_for, "path lives again");
                    }
                    None => {}
                }
            }
        }
    }
}

/// One path's canaries: one is written, then the next.
struct Writing {
    config: Arc<Config>,
    view: Arc<FlowView>,
    cache: usize,
    producer: Producer,
    client: Option<SimpleClient>,
}

impl Writing {
    async fn run(mut self) {
        let mut ticks = tokio::time::interval(self.config.canary.interval);
        // After a call that took long the next one goes at once, and then as before.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let key = key(&self.config, self.view.peer);
        loop {
            ticks.tick().await;
            if self.view.is_draining() {
                return;
            }
            let target = self.path(Path::target);
            let partition = match target {
                Some(Target::Own(partition)) => Some(partition),
                Some(Target::Elsewhere) => None,
                Some(Target::Nowhere) => continue,
                None => return,
            };
            match self.write(&key, partition).await {
                Ok(()) => self.path(Path::wrote),
                Err((step, why)) => {
                    tracing::debug!(flow = self.view.name, why, "canary not written");
                    self.path(|path| path.failed(step, why))
                }
            };
        }
    }

    fn path<T>(&self, work: impl FnOnce(&mut Path) -> T) -> Option<T> {
        self.view.canaries.with(self.cache as u16, work)
    }

    async fn write(&mut self, key: &[u8], partition: Option<i32>) -> Result<(), (Step, String)> {
        let (config, cache) = (self.config.clone(), self.cache);
        let cache = &config.caches[cache];
        self.path(|path| path.writes(Step::Memcached, Instant::now()));
        let set = tokio::time::timeout(WRITTEN_WITHIN, self.set(cache, key));
        let refused = match set.await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error),
            Err(_) => Some(format!("no answer within {WRITTEN_WITHIN:?}")),
        };
        if let Some(error) = refused {
            // The next one resolves the servers' names again: one may have moved.
            self.client = None;
            let server = &cache.servers[ring(cache).server_of(key)].address;
            return Err((Step::Memcached, format!("memcached {server}: {error}")));
        }
        self.path(|path| path.writes(Step::Kafka, Instant::now()));
        let mut value = Vec::new();
        let event = Event {
            ttl: Some(LIVES_SECONDS),
            ver: Some(hlc::from_millis(wall_ms().max(0) as u64)),
            ..Event::new(Op::Set)
        };
        event::encode(&event, &mut value);
        let record = Produce {
            topic: &cache.topic,
            partition,
            key: Some(key),
            value: Some(&value),
            headers: &[(HEADER, config.peers[self.view.peer].region.as_bytes())],
            timestamp_ms: None,
        };
        let sent = self.producer.send(&record, WRITTEN_WITHIN).await;
        sent.map(|_| ())
            .map_err(|error| (Step::Kafka, format!("topic {}: {error}", cache.topic)))
    }

    async fn set(&mut self, cache: &Cache, key: &[u8]) -> Result<(), String> {
        let client = match &self.client {
            Some(client) => client,
            None => {
                let timeout = self.config.memcached.timeout.max(self.config.memcached.connect_timeout);
                let client = SimpleClient::connect(hash_kind(cache.hash), &ring_servers(&cache.servers), timeout).await;
                self.client.insert(client.map_err(|error| error.to_string())?)
            }
        };
        let value = wall_ms().to_string();
        let set = client.set(key, value.as_bytes(), 0, LIVES_SECONDS).await;
        set.map_err(|error| error.to_string())
    }
}

/// The key of this node's canaries to a peer: no other node's, for two sessions that write one key hold each other up.
fn key(config: &Config, peer: usize) -> Vec<u8> {
    let (region, peer) = (&config.region, &config.peers[peer].region);
    let named = format!("evrepl-canary:{region}:{}:{peer}", config.node);
    if named.len() <= MAX_BINARY_KEY_BYTES {
        return named.into_bytes();
    }
    format!(
        "evrepl-canary:{region}:{:016x}:{peer}",
        hashing::slot_hash(config.node.as_bytes())
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_canarys_key_is_one_that_memcached_takes_whatever_the_names() {
        let long = "n".repeat(63);
        let text = format!(
            r#"region = "{long}"
            node = "{}"
            kafka = {{ brokers = ["127.0.0.1:9092"] }}
            tls = {{ certificate = "a.pem", private_key = "a.key", ca = "ca.pem" }}
            cache = [{{ name = "sessions", topic = "t", servers = ["127.0.0.1:11211"] }}]
            peer = [{{ region = "{}" }}]"#,
            "n".repeat(200),
            "p".repeat(63),
        );
        let config = crate::config::parse(&text, "/etc/evrepl.toml".as_ref(), std::iter::empty()).unwrap();
        let key = key(&config, 0);
        assert_eq!(crate::memcached::key_problem(&key), None);
        assert!(key.len() <= MAX_BINARY_KEY_BYTES, "{}", key.len());
    }
}
