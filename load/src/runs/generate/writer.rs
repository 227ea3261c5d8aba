//! The application: memcached first, then the event.

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::events::Events;
use super::keys::Keys;
use super::pipe::Pipe;
use super::{Spec, Wrote};
use crate::latency::Latencies;
use crate::pace::{due, due_by};
use crate::values::Values;

/// The most writes between two answers of memcached.
const MOST: u64 = 4_096;

/// And the most bytes.
const MOST_BYTES: u64 = 1 << 20;

/// Writes at a rate from a moment on.
#[derive(Clone, Copy, Debug)]
pub struct Paced {
    pub start: Instant,
    pub rate: u64,
    /// The first so many are not counted as late.
    pub warm_up: u64,
    /// With these.
    pub count: u64,
    /// How long it sleeps at least when nothing is due.
    pub tick: Duration,
}

/// Writes numbered keys, each number once.
#[derive(Debug)]
pub struct Writer {
    pipe: Pipe,
    events: Events,
    keys: Keys,
    written: u64,
    /// Between two answers of memcached.
    most: u64,
}

impl Writer {
    /// Connects to memcached; to Kafka with the first events.
    ///
    /// # Errors
    /// When memcached is not there.
    pub fn connect(spec: &Spec) -> io::Result<Writer> {
        Ok(Writer {
            pipe: Pipe::connect(&spec.memcached, Values::new(spec.value_bytes))?,
            events: Events::new(&spec.target),
            keys: Keys::new(spec.keys),
            written: 0,
            most: (MOST_BYTES / (spec.value_bytes as u64 + 1)).clamp(1, MOST),
        })
    }

    /// Writes so many more as fast as it can; `progress` hears how many it has written in all, and says whether to stop.
    ///
    /// # Errors
    /// When memcached is gone or refuses something.
    pub fn fill(&mut self, count: u64, mut progress: impl FnMut(u64) -> bool) -> io::Result<Wrote> {
        let end = self.written + count;
        while self.written < end && !progress(self.written) {
            self.write(self.written..end.min(self.written + self.most))?;
        }
        Ok(self.flushed(&Latencies::default()))
    }

    /// Writes each when it is due or, after a delay, at once.
    ///
    /// # Errors
    /// As [`Writer::fill`].
    pub fn open_loop(&mut self, paced: Paced, mut progress: impl FnMut(u64) -> bool) -> io::Result<Wrote> {
        let Paced {
            start,
            rate,
            warm_up,
            count,
            tick,
        } = paced;
        let mut late = Latencies::default();
        let (first, mut done) = (self.written, 0);
        while done < count && !progress(self.written) {
            let now = Instant::now();
            let wait = (start + due(done, rate)).saturating_duration_since(now);
            if !wait.is_zero() {
                std::thread::sleep(wait.max(tick));
                continue;
            }
            let elapsed = now.duration_since(start);
            let to = due_by(elapsed, rate).min(count).min(done + self.most);
            for index in done.max(warm_up)..to {
                late.record(elapsed.saturating_sub(due(index, rate)));
            }
            self.write(first + done..first + to)?;
            done = to;
        }
        Ok(self.flushed(&late))
    }

    /// How many it has written in its life.
    pub fn written(&self) -> u64 {
        self.written
    }

    fn write(&mut self, numbers: Range<u64>) -> io::Result<()> {
        for number in numbers.clone() {
            self.pipe.set(self.keys.of(number), number)?;
        }
        self.pipe.barrier()?;
        self.written = numbers.end;
        self.events.produce(numbers.map(|number| self.keys.of(number)));
        Ok(())
    }

    fn flushed(&self, late: &Latencies) -> Wrote {
        self.events.flush();
        Wrote {
            written: self.written,
            late_ms: late.quantiles(),
        }
    }
}
