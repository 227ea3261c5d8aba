//! An application of one region: sets, touches and deletes at a fixed rate, whatever becomes of them, through the library's
//! public [`Writer`].

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use evrepl::writer::{Writer, WriterError};
use tokio::task::JoinHandle;
use tokio::time::sleep_until;

use super::ledger::{HOT, Held, Ledger, ONCE, PROBES, flags, value};
use super::world::CACHE;
use crate::pace::due;
use crate::values::Mixer;

/// Writes a second that one task makes: each waits for Kafka's acknowledgement, which may take 40 ms before it is late.
const RATE_OF_A_TASK: u64 = 25;

/// The most that can be asked for: above it the embedded Kafka would be what is shown. There are fewer tasks than hot keys.
pub const MAX_RATE: u64 = 20_000;

/// A probe is written so often: 50 samples a second are 1 500 in a demo of the usual length.
const PROBE_EVERY: Duration = Duration::from_millis(20);

/// Seconds that expiring values live: no key expires while the demo looks.
const TTL: u32 = 86_400;

/// What a touch sets: long enough too, and different from what a set gives.
const TOUCHED_TTL: u32 = 172_800;

/// A write is repeated so often, with this pause, before it has failed.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(100);

/// A probe on its way: readable in the other region as this sequence number or a later one.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    pub number: u64,
    pub sequence: u64,
    /// Just before the write.
    pub since: Instant,
}

/// What the application and the watcher of its writes share.
pub struct Shared {
    pub ledger: Ledger,
    probes: Mutex<Vec<Probe>>,
}

impl Shared {
    pub fn new(region: &str) -> Shared {
        Shared {
            ledger: Ledger::new(region),
            probes: Mutex::default(),
        }
    }

    fn add_probe(&self, probe: Probe) {
        self.probes.lock().unwrap_or_else(PoisonError::into_inner).push(probe);
    }

    /// Takes the probes that were written since the last call.
    pub fn take_probes(&self) -> Vec<Probe> {
        std::mem::take(&mut *self.probes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The tasks of one region's application.
pub struct Application {
    over: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Application {
    /// Starts to write `rate` a second, at most [`MAX_RATE`], and the probes. In a tokio runtime.
    pub fn start(shared: &Arc<Shared>, writer: &Writer, rate: u64) -> Application {
        let over = Arc::<AtomicBool>::default();
        let start = Instant::now();
        let count = rate.div_ceil(RATE_OF_A_TASK);
        let mut tasks: Vec<JoinHandle<()>> = (0..count)
            .map(|task| {
                let hand = Hand::new(shared, writer);
                tokio::spawn(hand.write_all(task, count, rate, start, Arc::clone(&over)))
            })
            .collect();
        let hand = Hand::new(shared, writer);
        tasks.push(tokio::spawn(hand.probe_all(start, Arc::clone(&over))));
        Application { over, tasks }
    }

    /// Ends it, and returns when every write that has begun is done.
    ///
    /// # Panics
    /// When one of its tasks has.
    pub async fn end(self) {
        self.over.store(true, Ordering::Relaxed);
        for task in self.tasks {
            if let Err(error) = task.await {
                panic!("the application has broken: {error}");
            }
        }
    }
}

/// Writes one key that is not timed, and returns its number and sequence number once Kafka holds the event: for finding out
/// whether the regions are connected.
pub async fn write_first(shared: &Arc<Shared>, writer: &Writer) -> (u64, u64) {
    let (number, sequence) = (HOT + ONCE, shared.ledger.next_sequence());
    Hand::new(shared, writer)
        .write(number, Act::Set { sequence, ttl: 0 })
        .await;
    (number, sequence)
}

/// What a write does.
#[derive(Clone, Copy)]
enum Act {
    Set {
        sequence: u64,
        ttl: u32,
    },
    Delete,
    /// Of a key that holds the value of this number.
    Touch {
        sequence: u64,
    },
}

/// One that writes, a key at a time.
struct Hand {
    shared: Arc<Shared>,
    writer: Writer,
}

impl Hand {
    fn new(shared: &Arc<Shared>, writer: &Writer) -> Hand {
        Hand {
            shared: Arc::clone(shared),
            writer: writer.clone(),
        }
    }

    /// The `task`-th of `tasks` makes every `tasks`-th write, to keys that are its own.
    async fn write_all(self, task: u64, tasks: u64, rate: u64, start: Instant, over: Arc<AtomicBool>) {
        let mut mixer = Mixer::new(task);
        for turn in 0.. {
            sleep_until((start + due(turn * tasks + task, rate)).into()).await;
            if over.load(Ordering::Relaxed) {
                return;
            }
            let (number, act) = self.choose(&mut mixer, task, tasks, turn);
            self.write(number, act).await;
        }
    }

    /// Every other write is of a key that is written once. Of the rest 15 in 100 delete, and 15 touch.
    fn choose(&self, mixer: &mut Mixer, task: u64, tasks: u64, turn: u64) -> (u64, Act) {
        let ledger = &self.shared.ledger;
        let set = |ttl| Act::Set {
            sequence: ledger.next_sequence(),
            ttl,
        };
        if turn.is_multiple_of(2) {
            return (HOT + (turn / 2 % (ONCE / tasks)) * tasks + task, set(0));
        }
        let number = mixer.below(HOT / tasks) * tasks + task;
        let act = match (mixer.below(100), ledger.entry(number).held) {
            (0..15, _) => Act::Delete,
            (15..30, Held::Value(sequence)) => Act::Touch { sequence },
            (even, _) if even % 2 == 0 => set(TTL),
            _ => set(0),
        };
        (number, act)
    }

    async fn probe_all(self, start: Instant, over: Arc<AtomicBool>) {
        for turn in 0_u32.. {
            sleep_until((start + PROBE_EVERY * turn).into()).await;
            if over.load(Ordering::Relaxed) {
                return;
            }
            let (number, sequence) = (
                HOT + ONCE + u64::from(turn) % PROBES,
                self.shared.ledger.next_sequence(),
            );
            // Before the write: it may be readable over there before Kafka's acknowledgement is here.
            self.shared.add_probe(Probe {
                number,
                sequence,
                since: Instant::now(),
            });
            self.write(number, Act::Set { sequence, ttl: 0 }).await;
        }
    }

    /// Makes a write, again when that may help, and notes how it ended.
    async fn write(&self, number: u64, act: Act) {
        let ledger = &self.shared.ledger;
        let key = ledger.key(number);
        ledger.begin(number);
        let mut why = String::new();
        for _ in 0..TRIES {
            match self.try_once(&key, act).await {
                Ok(Some(held)) => {
                    let touched = matches!(act, Act::Touch { .. });
                    return ledger.done(number, held, touched, Instant::now());
                }
                Ok(None) => {
                    why = "memcached has lost a key that was to be touched".into();
                    break;
                }
                Err(error) => {
                    why = error.to_string();
                    if !error.may_be_retried() {
                        break;
                    }
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
        ledger.failed(number, why);
    }

    /// What the key holds then; `None` when a touch has found nothing.
    async fn try_once(&self, key: &[u8], act: Act) -> Result<Option<Held>, WriterError> {
        Ok(match act {
            Act::Set { sequence, ttl } => {
                let (value, flags) = (value(sequence), flags(sequence));
                self.writer.set(CACHE, key, &value, flags, ttl).await?;
                Some(Held::Value(sequence))
            }
            Act::Delete => {
                self.writer.delete(CACHE, key).await?;
                Some(Held::Nothing)
            }
            Act::Touch { sequence } => {
                let touched = self.writer.touch(CACHE, key, TOUCHED_TTL).await?;
                touched.map(|_| Held::Value(sequence))
            }
        })
    }
}
