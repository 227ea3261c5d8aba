//! An application that writes at a steady pace and keeps a history of what it wrote.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::Sender;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::history::{History, Key, Write, value_of};
use crate::writer::{Format, Op, Writer};

/// Between two pieces of writes; short enough that the destination sees a stream, not bursts.
const TICK: Duration = Duration::from_millis(5);

/// What is written, and how fast.
#[derive(Clone, Copy, Debug)]
pub struct LoadSpec {
    /// Writes a second: half to hot keys, half to keys of their own.
    pub rate: u32,
    pub hot_keys: u32,
    pub value_bytes: usize,
    /// Of a thousand writes to hot keys, how many are deletes.
    pub deletes: u32,
    /// Of a thousand writes, how many are followed by a record that is no event.
    pub poison: u32,
    /// How long a reader of the destination rests between two looks.
    pub look_every: Duration,
}

impl Default for LoadSpec {
    fn default() -> LoadSpec {
        LoadSpec {
            // Two cores carry two evrepl processes, Kafka, memcacheds, writer and readers at this rate without queueing.
            rate: 2_000,
            // Each is written about five times a second: a step back is seen before the next write heals it.
            hot_keys: 200,
            value_bytes: 100,
            deletes: 50,
            poison: 0,
            look_every: TICK,
        }
    }
}

/// What the writer tells while it runs, and what it is told.
#[derive(Debug, Default)]
pub struct LoadControl {
    stop: AtomicBool,
    pub writes: AtomicU64,
    pub poison: AtomicU64,
    /// How often it went on with a new producer and said some events again.
    pub renewals: AtomicU64,
    /// Added to the timestamps of its records: the clock of its region is wrong by this.
    pub clock_ms: AtomicI64,
}

/// A running writer.
#[derive(Debug)]
pub struct Load {
    control: Arc<LoadControl>,
    thread: Option<JoinHandle<History>>,
}

/// Tells the reader of a key's destination server of a key written once.
pub type OnceWritten = Box<dyn Fn(u32, Instant) + Send>;

impl Load {
    /// Begins to write; `tell` hears of each key written once.
    pub fn start(spec: LoadSpec, seed: u64, control: Arc<LoadControl>, writer: Writer, tell: OnceWritten) -> Load {
        let shared = Arc::clone(&control);
        let thread = thread::Builder::new()
            .name("lab-load".into())
            .spawn(move || Pen::new(spec, seed, writer, shared, tell).write())
            .expect("a thread for the load");
        Load {
            control,
            thread: Some(thread),
        }
    }

    /// Ends it and returns when every event is in Kafka.
    ///
    /// # Errors
    /// When memcached or Kafka refused a write: the run says nothing then.
    pub fn finish(mut self) -> Result<History, String> {
        self.control.stop.store(true, Relaxed);
        let thread = self.thread.take().expect("a load ends once");
        thread
            .join()
            .map_err(|panic| format!("the writer failed: {}", super::said(&*panic)))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.control.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A producer that delivers nothing for this long has lost its brokers, if Kafka answers others.
const STUCK: Duration = Duration::from_secs(10);

/// Of records under way, none is this much older than the oldest would be if they were delivered one by one.
const REPEATED: Duration = Duration::from_secs(5);

/// An event that may have to be said again.
struct Said {
    at: Instant,
    key: String,
    event: &'static [u8],
    timestamp: Option<i64>,
}

/// The writing thread.
struct Pen {
    spec: LoadSpec,
    state: u64,
    writer: Writer,
    control: Arc<LoadControl>,
    tell: OnceWritten,
    history: History,
    /// Events that may not be in Kafka, how many are known to be under way, and since when none was delivered.
    said: VecDeque<Said>,
    under_way: u64,
    stuck_since: Instant,
}

impl Pen {
    fn new(spec: LoadSpec, seed: u64, writer: Writer, control: Arc<LoadControl>, tell: OnceWritten) -> Pen {
        let history = History {
            hot: vec![Vec::new(); spec.hot_keys as usize],
            once: Vec::new(),
        };
        Pen {
            spec,
            state: seed,
            writer,
            control,
            tell,
            history,
            said: VecDeque::new(),
            under_way: 0,
            stuck_since: Instant::now(),
        }
    }

    fn write(mut self) -> History {
        let began = Instant::now();
        let mut written: u64 = 0;
        while !self.control.stop.load(Relaxed) {
            // What a slow moment has delayed is caught up: the pace is kept on average.
            let due = (began.elapsed().as_secs_f64() * f64::from(self.spec.rate)) as u64;
            while written < due && !self.control.stop.load(Relaxed) {
                self.one(written);
                written += 1;
                self.control.writes.store(written, Relaxed);
            }
            self.look_after_delivery();
            thread::sleep(TICK);
        }
        while self.writer.under_way() > 0 {
            self.look_after_delivery();
            thread::sleep(TICK);
        }
        // Fails if one was given up.
        self.writer.flush();
        self.history
    }

    fn say(&mut self, key: String, event: &'static [u8]) {
        let clock = self.control.clock_ms.load(Relaxed);
        let timestamp = (clock != 0).then(|| now_ms() + clock);
        self.writer.produce_at(key.as_bytes(), event, timestamp);
        self.under_way += 1;
        self.said.push_back(Said {
            at: Instant::now(),
            key,
            event,
            timestamp,
        });
    }

    /// Says again what may be lost in a producer that delivers nothing more. An event twice does no harm.
    fn look_after_delivery(&mut self) {
        let under_way = self.writer.under_way();
        if under_way < self.under_way || under_way == 0 {
            self.stuck_since = Instant::now();
            self.forget_delivered(under_way);
        }
        self.under_way = under_way;
        if self.stuck_since.elapsed() < STUCK {
            return;
        }
        self.stuck_since = Instant::now();
        if !self.writer.renew() {
            return;
        }
        self.control.renewals.fetch_add(1, Relaxed);
        for said in &self.said {
            self.writer.produce_at(said.key.as_bytes(), said.event, said.timestamp);
        }
        self.under_way = self.writer.under_way();
    }

    fn forget_delivered(&mut self, under_way: u64) {
        let delivered = self.said.len().saturating_sub(under_way as usize);
        let oldest = self.said.get(delivered).map_or_else(Instant::now, |said| said.at);
        let known = |said: &Said| said.at + REPEATED < oldest;
        while self.said.front().is_some_and(known) {
            self.said.pop_front();
        }
    }

    fn one(&mut self, number: u64) {
        if number.is_multiple_of(2) || self.spec.hot_keys == 0 {
            let key = self.history.once.len() as u32;
            let write = self.put(Key::Once(key), 1, false);
            self.history.once.push(write);
            (self.tell)(key, write.answered);
        } else {
            let key = self.draw(self.spec.hot_keys);
            let delete = self.draw(1_000) < self.spec.deletes;
            let version = self.history.hot[key as usize].len() as u64 + 1;
            let write = self.put(Key::Hot(key), version, delete);
            self.history.hot[key as usize].push(write);
        }
        if self.draw(1_000) < self.spec.poison {
            let poison = self.control.poison.fetch_add(1, Relaxed);
            self.writer
                .produce(format!("poison:{poison}").as_bytes(), b"no event", &[]);
        }
    }

    fn put(&mut self, key: Key, version: u64, delete: bool) -> Write {
        let name = key.to_string();
        let value = value_of(key, version, self.spec.value_bytes);
        let began = Instant::now();
        let client = self.writer.client();
        let done = match delete {
            true => client.delete(name.as_bytes()).map(drop),
            false => client.set(name.as_bytes(), &value, 0, 0),
        };
        done.unwrap_or_else(|error| panic!("writing {key} in the source memcached: {error}"));
        let answered = Instant::now();
        let op = if delete { Op::Delete } else { Op::Set };
        self.say(name, op.event(Format::MessagePack));
        Write {
            version,
            delete,
            began,
            answered,
        }
    }

    /// A number below `bound`; xorshift is enough to choose keys.
    fn draw(&mut self, bound: u32) -> u32 {
        super::random::draw(&mut self.state, bound)
    }
}

fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as i64)
}

/// What tells each server's reader of the keys that it shall wait for.
pub(super) fn tell_servers(cache: Arc<crate::cache::Cache>, readers: Vec<Sender<(u32, Instant)>>) -> OnceWritten {
    Box::new(move |key, at| {
        let server = cache.server_of(Key::Once(key).to_string().as_bytes());
        // A reader that is gone waits for nothing.
        let _ = readers[server].send((key, at));
    })
}
