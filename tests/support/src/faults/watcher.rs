//! Readers of the destination: what its keys held during the run, and when each key written once had arrived.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::history::{Held, Key, Sighting};
use super::load::LoadSpec;
use crate::cache::Cache;
use crate::memcached::MetaClient;

/// Keys written once that are looked for at a time, oldest first: more than arrive between two looks.
const LOOKED_FOR: usize = 256;

/// A frozen memcached answers nobody; its reader notices within this, and asks again.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// A key written once that has arrived.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// The number of the key, a [`Key::Once`].
    pub key: u32,
    pub written: Instant,
    pub seen: Instant,
}

/// What one server's reader saw.
#[derive(Debug, Default)]
pub struct Watched {
    /// Of hot keys, in order; only those that differ from the one before.
    pub sightings: Vec<Sighting>,
    pub arrivals: Vec<Arrival>,
    /// Keys written once that never came while it watched.
    pub awaited: usize,
    /// How often all hot keys were looked at.
    pub looks: u64,
}

/// One reader for each server of the destination's cache, so that a frozen one stops no other.
#[derive(Debug)]
pub struct Watchers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Watched>>,
}

impl Watchers {
    /// Begins; the senders tell each server's reader which key was written once, and when.
    pub fn start(cache: &Arc<Cache>, spec: LoadSpec) -> (Watchers, Vec<Sender<(u32, Instant)>>) {
        let stop = Arc::new(AtomicBool::new(false));
        let (mut threads, mut senders) = (Vec::new(), Vec::new());
        for server in 0..cache.servers.len() {
            let (sender, told) = channel();
            senders.push(sender);
            let hot = (0..spec.hot_keys).map(Key::Hot);
            let hot = hot.filter(|key| cache.server_of(key.to_string().as_bytes()) == server);
            let mut client = cache.memcached(server).client();
            client.set_timeout(ANSWER_WITHIN);
            let reader = Reader {
                client,
                hot: hot.map(|key| (key, key.to_string())).collect(),
                last: HashMap::new(),
                told,
                awaited: VecDeque::new(),
                watched: Watched::default(),
            };
            let stop = Arc::clone(&stop);
            let thread = thread::Builder::new().name(format!("lab-watcher-{server}"));
            let thread = thread.spawn(move || reader.watch(&stop, spec.look_every));
            threads.push(thread.expect("a thread for the reader"));
        }
        (Watchers { stop, threads }, senders)
    }

    /// Ends them after one more look at everything: what each server's reader saw.
    pub fn finish(mut self) -> Vec<Watched> {
        self.stop.store(true, Relaxed);
        let threads = std::mem::take(&mut self.threads);
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_default())
            .collect()
    }
}

impl Drop for Watchers {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

struct Reader {
    client: MetaClient,
    hot: Vec<(Key, String)>,
    last: HashMap<Key, Held>,
    told: Receiver<(u32, Instant)>,
    awaited: VecDeque<(u32, Instant)>,
    watched: Watched,
}

impl Reader {
    fn watch(mut self, stop: &AtomicBool, every: Duration) -> Watched {
        loop {
            // Asked before the look, so that the last one is made after the end.
            let last = stop.load(Relaxed);
            self.awaited.extend(self.told.try_iter());
            // A server that is away shows nothing; the next look comes soon enough.
            let _ = self.look();
            for _ in 0..if last {
                self.awaited.len().div_ceil(LOOKED_FOR)
            } else {
                1
            } {
                let _ = self.await_once();
            }
            if last {
                self.watched.awaited = self.awaited.len();
                return self.watched;
            }
            thread::sleep(every);
        }
    }

    fn look(&mut self) -> std::io::Result<()> {
        let found = self.client.get_many(self.hot.iter().map(|(_, name)| name.as_bytes()))?;
        let answered = Instant::now();
        self.watched.looks += 1;
        for ((key, _), found) in self.hot.iter().zip(found) {
            let held = Held::from(*key, found.as_ref().map(|(value, _)| value.as_slice()));
            if self.last.get(key) != Some(&held) {
                self.last.insert(*key, held.clone());
                self.watched.sightings.push(Sighting {
                    key: *key,
                    held,
                    answered,
                });
            }
        }
        Ok(())
    }

    fn await_once(&mut self) -> std::io::Result<()> {
        let count = self.awaited.len().min(LOOKED_FOR);
        if count == 0 {
            return Ok(());
        }
        let names: Vec<String> = self
            .awaited
            .iter()
            .take(count)
            .map(|(key, _)| Key::Once(*key).to_string())
            .collect();
        let found = self.client.get_many(names.iter().map(|name| name.as_bytes()))?;
        let seen = Instant::now();
        for found in found {
            let Some((key, written)) = self.awaited.pop_front() else {
                break;
            };
            match found {
                Some(_) => self.watched.arrivals.push(Arrival { key, written, seen }),
                // To the end: one that never comes must not stand in front of those that do.
                None => self.awaited.push_back((key, written)),
            }
        }
        Ok(())
    }
}
