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

/// Permits by memcached server, by the server's number: what a request asks for, or what is returned. Few, so a list.
pub type PerServer = Vec<(usize, usize)>;

/// Adds `count` permits of a server.
pub fn add(permits: &mut PerServer, server: usize, count: usize) {
    match permits.iter_mut().find(|(of, _)| *of == server) {
        Some((_, known)) => *known += count,
        None => permits.push((server, count)),
    }
}

/// The permits of one flow. A request is all or nothing and first come, first served within its urgency; one that waits for
/// its server's share lets those behind it pass.
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
    /// What one server may hold: half of all, or everything where it is the only one.
    share: usize,
    /// By server.
    held: Vec<usize>,
    dirty: VecDeque<(PerServer, oneshot::Sender<()>)>,
    chunks: VecDeque<(PerServer, oneshot::Sender<()>)>,
}

/// Whether a request may be served now.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fits {
    Yes,
    /// Too few are free: those behind it wait too, or a large request would never be served.
    TooFew,
    /// Its server holds its share: nobody else need wait for that.
    ShareTaken,
}

impl Permits {
    /// A pool of `total` permits for the keys of `servers` servers.
    pub fn new(total: usize, servers: usize) -> Self {
        let inner = Inner {
            available: total,
            reserve: total / 4,
            share: if servers > 1 { total.div_ceil(2) } else { total },
            held: vec![0; servers],
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

    /// The most that chunks may hold together.
    pub fn most_for_chunks(&self) -> usize {
        self.total - self.total / 4
    }

    /// Permits that nobody holds.
    pub fn available(&self) -> usize {
        self.lock().available
    }

    /// Takes permits at once, waiting for them when there are too few or when a server of the request holds its share
    /// already. A quarter of all is left to dirty keys: a request must not exceed three quarters of the total for a chunk, the
    /// total for dirty keys, or it waits for ever. A server that holds nothing may exceed its share.
    /// Dropping the future gives the place in the queue, or the permits, back.
    pub async fn take(&self, wanted: PerServer, urgency: Urgency) {
        debug_assert!(sum(&wanted) <= self.total);
        let (granted, asked) = {
            let mut inner = self.lock();
            let first = match urgency {
                Urgency::Dirty => inner.dirty.is_empty(),
                Urgency::Chunk => inner.dirty.is_empty() && inner.chunks.is_empty(),
            };
            if first && inner.fits(&wanted, urgency) == Fits::Yes {
                inner.grant(&wanted);
                return;
            }
            let (sender, receiver) = oneshot::channel();
            let asked = wanted.clone();
            match urgency {
                Urgency::Dirty => inner.dirty.push_back((wanted, sender)),
                Urgency::Chunk => inner.chunks.push_back((wanted, sender)),
            }
            // It may pass those that wait for another server's share.
            inner.serve();
            (receiver, asked)
        };
        let mut wait = Waiting {
            permits: self,
            asked,
            granted,
        };
        // The sender lives in the queue until it is used; it is never dropped before.
        let _ = (&mut wait.granted).await;
        wait.asked = PerServer::new();
    }

    /// Returns permits and serves who waits.
    pub fn give(&self, returned: &[(usize, usize)]) {
        if sum(returned) == 0 {
            return;
        }
        let mut inner = self.lock();
        for (server, count) in returned {
            inner.available += count;
            debug_assert!(inner.held[*server] >= *count);
            inner.held[*server] -= count;
        }
        debug_assert!(inner.available <= self.total);
        inner.serve();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sum(permits: &[(usize, usize)]) -> usize {
    permits.iter().map(|(_, count)| count).sum()
}

impl Inner {
    fn fits(&self, wanted: &PerServer, urgency: Urgency) -> Fits {
        let reserve = match urgency {
            Urgency::Dirty => 0,
            Urgency::Chunk => self.reserve,
        };
        // A dirty key holds the watermark and few permits: no share keeps it.
        if urgency == Urgency::Chunk && wanted.iter().any(|of| self.over_share(of)) {
            Fits::ShareTaken
        } else if sum(wanted) + reserve > self.available {
            Fits::TooFew
        } else {
            Fits::Yes
        }
    }

    fn over_share(&self, (server, count): &(usize, usize)) -> bool {
        self.held[*server] > 0 && self.held[*server] + count > self.share
    }

    fn grant(&mut self, wanted: &PerServer) {
        for (server, count) in wanted {
            self.available -= count;
            self.held[*server] += count;
        }
    }

    fn serve(&mut self) {
        if self.serve_queue(Urgency::Dirty) {
            self.serve_queue(Urgency::Chunk);
        }
    }

    /// Serves a queue from its front; false when somebody in it waits for more permits than there are.
    fn serve_queue(&mut self, urgency: Urgency) -> bool {
        let mut at = 0;
        // Servers that somebody before waits for: their permits are his, or a large request would never be served.
        let mut waited_for: Vec<usize> = Vec::new();
        loop {
            let queue = match urgency {
                Urgency::Dirty => &self.dirty,
                Urgency::Chunk => &self.chunks,
            };
            let Some((wanted, sender)) = queue.get(at) else {
                return true;
            };
            let fits = if sender.is_closed() {
                // Nobody waits for it any more: it must not keep those behind it.
                Fits::Yes
            } else if wanted.iter().any(|(server, _)| waited_for.contains(server)) {
                Fits::ShareTaken
            } else {
                self.fits(wanted, urgency)
            };
            match fits {
                Fits::TooFew => return false,
                Fits::ShareTaken => {
                    waited_for.extend(wanted.iter().map(|(server, _)| *server));
                    at += 1;
                }
                Fits::Yes => {
                    let queue = match urgency {
                        Urgency::Dirty => &mut self.dirty,
                        Urgency::Chunk => &mut self.chunks,
                    };
                    if let Some((wanted, sender)) = queue.remove(at)
                        && sender.send(()).is_ok()
                    {
                        self.grant(&wanted);
                    }
                }
            }
        }
    }
}

/// A request in the queue; dropped before it was served, it returns what it may have been granted meanwhile.
struct Waiting<'a> {
    permits: &'a Permits,
    asked: PerServer,
    granted: oneshot::Receiver<()>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.asked.is_empty() {
            return;
        }
        self.granted.close();
        if self.granted.try_recv().is_ok() {
            self.permits.give(&self.asked);
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

    /// All bytes there are.
    pub fn limit(&self) -> usize {
        self.limit as usize
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
        let permits = Permits::new(8, 1);
        permits.take(vec![(0, 6)], Urgency::Chunk).await;
        let mut big = Box::pin(permits.take(vec![(0, 4)], Urgency::Chunk));
        let mut small = Box::pin(permits.take(vec![(0, 1)], Urgency::Chunk));
        assert!(poll!(big.as_mut()).is_pending());
        assert!(poll!(small.as_mut()).is_pending(), "the small one must not overtake");
        assert_eq!(permits.available(), 2, "who waits holds nothing");
        permits.give(&[(0, 4)]);
        assert!(poll!(big.as_mut()).is_ready());
        assert!(poll!(small.as_mut()).is_pending());
        permits.give(&[(0, 1)]);
        assert!(poll!(small.as_mut()).is_ready());
    }

    #[tokio::test]
    async fn chunks_leave_a_quarter_to_dirty_keys() {
        let permits = Permits::new(8, 1);
        permits.take(vec![(0, 6)], Urgency::Chunk).await;
        let mut chunk = Box::pin(permits.take(vec![(0, 1)], Urgency::Chunk));
        assert!(poll!(chunk.as_mut()).is_pending());
        let mut dirty = Box::pin(permits.take(vec![(0, 2)], Urgency::Dirty));
        assert!(poll!(dirty.as_mut()).is_ready());
    }

    #[tokio::test]
    async fn one_server_holds_half_at_most_and_keeps_nobody_elses_request_waiting() {
        let permits = Permits::new(16, 2);
        let chunk = |of: PerServer| Box::pin(permits.take(of, Urgency::Chunk));
        assert!(poll!(chunk(vec![(0, 6)])).is_ready());
        let mut more = chunk(vec![(0, 3)]);
        assert!(poll!(more.as_mut()).is_pending(), "that would be more than its half");
        assert!(
            poll!(chunk(vec![(1, 2)])).is_ready(),
            "the other server's need not wait for it"
        );
        let mut both = chunk(vec![(0, 1), (1, 1)]);
        assert!(
            poll!(both.as_mut()).is_pending(),
            "small enough, but it is not its turn"
        );
        assert!(
            poll!(Box::pin(permits.take(vec![(0, 4)], Urgency::Dirty))).is_ready(),
            "no share keeps a dirty key"
        );
        permits.give(&[(0, 5)]);
        assert!(poll!(more.as_mut()).is_ready() && poll!(both.as_mut()).is_pending());
        permits.give(&[(0, 4)]);
        assert!(poll!(both.as_mut()).is_ready());
        permits.give(&[(0, 5), (1, 3)]);
        assert_eq!(permits.available(), 16);
        assert!(
            poll!(chunk(vec![(1, 12)])).is_ready(),
            "one that holds nothing may take more"
        );
    }

    #[tokio::test]
    async fn dirty_keys_go_before_chunks() {
        let permits = Permits::new(4, 1);
        permits.take(vec![(0, 4)], Urgency::Dirty).await;
        let mut chunk = Box::pin(permits.take(vec![(0, 1)], Urgency::Chunk));
        let mut dirty = Box::pin(permits.take(vec![(0, 2)], Urgency::Dirty));
        assert!(poll!(chunk.as_mut()).is_pending());
        assert!(poll!(dirty.as_mut()).is_pending());
        permits.give(&[(0, 2)]);
        assert!(poll!(dirty.as_mut()).is_ready());
        assert!(poll!(chunk.as_mut()).is_pending());
        permits.give(&[(0, 2)]);
        assert!(poll!(chunk.as_mut()).is_ready());
    }

    #[tokio::test]
    async fn a_dropped_request_leaks_nothing_and_keeps_nobody() {
        let permits = Permits::new(4, 1);
        permits.take(vec![(0, 4)], Urgency::Dirty).await;
        let mut waiting = Box::pin(permits.take(vec![(0, 3)], Urgency::Dirty));
        let mut behind = Box::pin(permits.take(vec![(0, 1)], Urgency::Dirty));
        assert!(poll!(waiting.as_mut()).is_pending());
        assert!(poll!(behind.as_mut()).is_pending());
        permits.give(&[(0, 1)]);
        assert!(poll!(behind.as_mut()).is_pending());
        drop(waiting);
        assert!(poll!(behind.as_mut()).is_ready());
        permits.give(&[(0, 4)]);
        assert_eq!(permits.available(), 4);
        // Granted but dropped before it was polled again.
        permits.take(vec![(0, 4)], Urgency::Dirty).await;
        let mut late = Box::pin(permits.take(vec![(0, 2)], Urgency::Dirty));
        assert!(poll!(late.as_mut()).is_pending());
        permits.give(&[(0, 4)]);
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
