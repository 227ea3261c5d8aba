//! Permits: the right to be in flight, one per event, and the budget of bytes that goes with it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, oneshot};

/// Who is served first when permits are short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// A dirty key that is due: it holds the watermark, so it goes before new chunks.
    Dirty,
    /// The events of a new chunk.
    Chunk,
}

/// The permits of one flow. A request is all or nothing and first come, first served within its urgency.
///
/// A request that waits takes nothing, so what is in flight always finishes and returns what it holds: no cycle.
#[derive(Debug)]
pub struct Permits {
    total: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    available: usize,
    /// What chunks leave for dirty keys, or a key that holds the watermark could wait for ever behind new work.
    reserve: usize,
    dirty: VecDeque<(usize, oneshot::Sender<()>)>,
    chunks: VecDeque<(usize, oneshot::Sender<()>)>,
}

impl Permits {
    /// A pool of `total` permits.
    pub fn new(total: usize) -> Self {
        let inner = Inner {
            available: total,
            reserve: total / 4,
            dirty: VecDeque::new(),
            chunks: VecDeque::new(),
        };
        Permits {
            total,
            inner: Mutex::new(inner),
        }
    }

    /// All permits there are.
    pub fn total(&self) -> usize {
        self.total
    }

    /// The most that chunks may hold together: all but what is left to dirty keys.
    pub fn most_for_chunks(&self) -> usize {
        self.total - self.total / 4
    }

    /// Permits that nobody holds.
    pub fn available(&self) -> usize {
        self.lock().available
    }

    /// Takes `n` permits at once, waiting for them when there are fewer. A quarter of all is left to dirty keys: `n` must not
    /// exceed three quarters of the total for a chunk, the total for dirty keys, or it waits for ever.
    /// Dropping the future gives the place in the queue, or the permits, back.
    pub async fn take(&self, n: usize, urgency: Urgency) {
        debug_assert!(n <= self.total);
        let granted = {
            let mut inner = self.lock();
            let first = match urgency {
                Urgency::Dirty => inner.dirty.is_empty(),
                Urgency::Chunk => inner.dirty.is_empty() && inner.chunks.is_empty(),
            };
            let reserve = match urgency {
                Urgency::Dirty => 0,
                Urgency::Chunk => inner.reserve,
            };
            if first && inner.available >= n + reserve {
                inner.available -= n;
                return;
            }
            let (sender, receiver) = oneshot::channel();
            match urgency {
                Urgency::Dirty => inner.dirty.push_back((n, sender)),
                Urgency::Chunk => inner.chunks.push_back((n, sender)),
            }
            receiver
        };
        let mut wait = Waiting {
            permits: self,
            n,
            granted,
        };
        // The sender lives in the queue until it is used; it is never dropped before.
        let _ = (&mut wait.granted).await;
        std::mem::forget(wait);
    }

    /// Returns `n` permits and serves who waits.
    pub fn give(&self, n: usize) {
        if n == 0 {
            return;
        }
        let mut inner = self.lock();
        inner.available += n;
        debug_assert!(inner.available <= self.total);
        inner.serve();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn serve(&mut self) {
        loop {
            let (queue, reserve) = match self.dirty.is_empty() {
                true => (&mut self.chunks, self.reserve),
                false => (&mut self.dirty, 0),
            };
            let Some((n, sender)) = queue.front() else { return };
            // Nobody waits for it any more: it must not keep those behind it.
            if !sender.is_closed() && *n + reserve > self.available {
                return;
            }
            if let Some((n, sender)) = queue.pop_front()
                && sender.send(()).is_ok()
            {
                self.available -= n;
            }
        }
    }
}

/// A request in the queue; dropped before it was served, it returns what it may have been granted meanwhile.
struct Waiting<'a> {
    permits: &'a Permits,
    n: usize,
    granted: oneshot::Receiver<()>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.granted.close();
        if self.granted.try_recv().is_ok() {
            self.permits.give(self.n);
        } else {
            self.permits.lock().serve();
        }
    }
}

/// Bytes of values that a flow holds: read and not yet acked. It may be overdrawn by one read, because sizes are known only
/// afterwards; while it is, nobody reads.
#[derive(Debug)]
pub struct ByteBudget {
    limit: i64,
    used: AtomicI64,
    room: Notify,
}

impl ByteBudget {
    /// A budget of `limit` bytes.
    pub fn new(limit: usize) -> Self {
        ByteBudget {
            limit: limit as i64,
            used: AtomicI64::new(0),
            room: Notify::new(),
        }
    }

    /// Bytes held now.
    pub fn used(&self) -> usize {
        self.used.load(Relaxed).max(0) as usize
    }

    /// Bytes that may still be read; 0 when the budget is used up or overdrawn.
    pub fn free(&self) -> usize {
        (self.limit - self.used.load(Relaxed)).max(0) as usize
    }

    /// Takes bytes, whether or not they are free.
    pub fn take(&self, bytes: usize) {
        self.used.fetch_add(bytes as i64, Relaxed);
    }

    /// Gives bytes back and wakes who waits for room.
    pub fn give(&self, bytes: usize) {
        if bytes == 0 {
            return;
        }
        let before = self.used.fetch_sub(bytes as i64, Relaxed);
        debug_assert!(before >= bytes as i64);
        if before - (bytes as i64) < self.limit {
            self.room.notify_waiters();
        }
    }

    /// Returns when at least `bytes` (or everything) are free.
    pub async fn wait_for(&self, bytes: usize) {
        let bytes = (bytes as i64).min(self.limit);
        loop {
            let notified = self.room.notified();
            if self.limit - self.used.load(Relaxed) >= bytes {
                return;
            }
            notified.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use futures_util::poll;

    #[tokio::test]
    async fn a_request_is_all_or_nothing_and_the_first_waits_before_the_smaller_second() {
        let permits = Permits::new(8);
        permits.take(6, Urgency::Chunk).await;
        let mut big = Box::pin(permits.take(4, Urgency::Chunk));
        let mut small = Box::pin(permits.take(1, Urgency::Chunk));
        assert!(poll!(big.as_mut()).is_pending());
        assert!(poll!(small.as_mut()).is_pending(), "the small one must not overtake");
        assert_eq!(permits.available(), 2, "who waits holds nothing");
        permits.give(4);
        assert!(poll!(big.as_mut()).is_ready());
        assert!(poll!(small.as_mut()).is_pending());
        permits.give(1);
        assert!(poll!(small.as_mut()).is_ready());
    }

    #[tokio::test]
    async fn chunks_leave_a_quarter_to_dirty_keys() {
        let permits = Permits::new(8);
        permits.take(6, Urgency::Chunk).await;
        let mut chunk = Box::pin(permits.take(1, Urgency::Chunk));
        assert!(poll!(chunk.as_mut()).is_pending());
        let mut dirty = Box::pin(permits.take(2, Urgency::Dirty));
        assert!(poll!(dirty.as_mut()).is_ready());
    }

    #[tokio::test]
    async fn dirty_keys_go_before_chunks() {
        let permits = Permits::new(4);
        permits.take(4, Urgency::Dirty).await;
        let mut chunk = Box::pin(permits.take(1, Urgency::Chunk));
        let mut dirty = Box::pin(permits.take(2, Urgency::Dirty));
        assert!(poll!(chunk.as_mut()).is_pending());
        assert!(poll!(dirty.as_mut()).is_pending());
        permits.give(2);
        assert!(poll!(dirty.as_mut()).is_ready());
        assert!(poll!(chunk.as_mut()).is_pending());
        permits.give(2);
        assert!(poll!(chunk.as_mut()).is_ready());
    }

    #[tokio::test]
    async fn a_dropped_request_leaks_nothing_and_keeps_nobody() {
        let permits = Permits::new(4);
        permits.take(4, Urgency::Dirty).await;
        let mut waiting = Box::pin(permits.take(3, Urgency::Dirty));
        let mut behind = Box::pin(permits.take(1, Urgency::Dirty));
        assert!(poll!(waiting.as_mut()).is_pending());
        assert!(poll!(behind.as_mut()).is_pending());
        permits.give(1);
        assert!(poll!(behind.as_mut()).is_pending());
        drop(waiting);
        assert!(poll!(behind.as_mut()).is_ready());
        permits.give(4);
        assert_eq!(permits.available(), 4);
        // Granted but dropped before it was polled again.
        permits.take(4, Urgency::Dirty).await;
        let mut late = Box::pin(permits.take(2, Urgency::Dirty));
        assert!(poll!(late.as_mut()).is_pending());
        permits.give(4);
        drop(late);
        assert_eq!(permits.available(), 4);
    }

    #[tokio::test]
    async fn bytes_may_be_overdrawn_by_one_read_and_then_nobody_reads_until_there_is_room() {
        let budget = Arc::new(ByteBudget::new(100));
        budget.take(250);
        assert_eq!((budget.free(), budget.used()), (0, 250));
        let b = budget.clone();
        let waiting = tokio::spawn(async move { b.wait_for(1).await });
        tokio::task::yield_now().await;
        budget.give(150);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        budget.give(1);
        waiting.await.unwrap();
    }
}
