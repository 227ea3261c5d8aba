//! Bounded mailboxes: a hand-off is the only way onto the data path's actors.
//!
//! actix lets every sender but a never-cloned handle ignore a mailbox's capacity, and wakes nobody when room appears. So the
//! bound is ours: a [`Handoff`] holds the recipient and as many slots as `[mailbox]` says; a message travels with its slot and
//! the receiver gives the slot up once it has taken the contents over. Waiting senders are woken in order. Facts that flow
//! upstream (acks, outcomes, session ends) never come this way: a slot on both directions would close a cycle.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use actix::prelude::*;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The mailboxes of one kind of actor, in one flow or in the agent.
#[derive(Debug, Default)]
pub struct MailboxGauge {
    /// Those that there are; looked through when somebody asks.
    each: Mutex<Vec<Weak<Mailbox>>>,
    capacity: AtomicUsize,
    high_water: AtomicUsize,
    senders_waiting: AtomicUsize,
    waits: AtomicU64,
    waited_us: AtomicU64,
}

/// How many messages one mailbox holds.
#[derive(Debug)]
pub struct Mailbox {
    depth: AtomicUsize,
    gauge: Arc<MailboxGauge>,
}

impl Mailbox {
    /// A mailbox of this kind with so many slots, which is in its gauge for as long as anybody has it.
    pub fn new(gauge: &Arc<MailboxGauge>, slots: usize) -> Arc<Mailbox> {
        gauge.capacity.store(slots, Relaxed);
        let mailbox = Arc::new(Mailbox {
            depth: AtomicUsize::new(0),
            gauge: gauge.clone(),
        });
        let mut each = gauge.each();
        each.retain(|one| one.strong_count() > 0);
        each.push(Arc::downgrade(&mailbox));
        mailbox
    }

    /// A message took a slot.
    pub fn entered(&self) {
        let depth = self.depth.fetch_add(1, Relaxed) + 1;
        self.gauge.high_water.fetch_max(depth, Relaxed);
    }

    /// A message gave its slot up.
    pub fn left(&self) {
        self.depth.fetch_sub(1, Relaxed);
    }
}

impl MailboxGauge {
    fn each(&self) -> MutexGuard<'_, Vec<Weak<Mailbox>>> {
        self.each.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Messages that hold a slot now, in all mailboxes together, and in the fullest one.
    pub fn depths(&self) -> (usize, usize) {
        let each = self.each();
        let depths = each.iter().filter_map(|one| Some(one.upgrade()?.depth.load(Relaxed)));
        depths.fold((0, 0), |(all, most), depth| (all + depth, most.max(depth)))
    }

    /// The most messages that one mailbox ever held.
    pub fn high_water(&self) -> usize {
        self.high_water.load(Relaxed)
    }

    /// Slots of one mailbox of this kind, as configured.
    pub fn capacity(&self) -> usize {
        self.capacity.load(Relaxed)
    }

    /// Senders that wait for a slot now.
    pub fn senders_waiting(&self) -> usize {
        self.senders_waiting.load(Relaxed)
    }

    /// Messages that had to wait for a slot, since the start.
    pub fn waits(&self) -> u64 {
        self.waits.load(Relaxed)
    }

    /// How long senders waited for a slot, since the start; those that wait still are not in it.
    pub fn waited(&self) -> Duration {
        Duration::from_micros(self.waited_us.load(Relaxed))
    }

    /// A sender waits for a slot, until this is dropped: also one that gives up has waited.
    fn waits_for_room(&self) -> WaitsForRoom<'_> {
        self.senders_waiting.fetch_add(1, Relaxed);
        self.waits.fetch_add(1, Relaxed);
        WaitsForRoom {
            gauge: self,
            since: tokio::time::Instant::now(),
        }
    }
}

struct WaitsForRoom<'a> {
    gauge: &'a MailboxGauge,
    since: tokio::time::Instant,
}

impl Drop for WaitsForRoom<'_> {
    fn drop(&mut self) {
        let waited = self.since.elapsed().as_micros() as u64;
        self.gauge.waited_us.fetch_add(waited, Relaxed);
        self.gauge.senders_waiting.fetch_sub(1, Relaxed);
    }
}

/// The gauges of the actors of one flow that have bounded mailboxes, in flow order.
#[derive(Debug, Default)]
pub struct RelayMailboxes {
    /// Chunks in front of partition consumers.
    pub partition_consumer: Arc<MailboxGauge>,
    /// Messages in front of cache readers.
    pub cache_reader: Arc<MailboxGauge>,
    /// Messages in front of batch coalescers.
    pub batch_coalescer: Arc<MailboxGauge>,
    /// Batches in front of remote links.
    pub remote_link: Arc<MailboxGauge>,
}

impl RelayMailboxes {
    /// Name and gauge of each kind.
    pub fn all(&self) -> [(&'static str, &MailboxGauge); 4] {
        [
            ("partition_consumer", &self.partition_consumer),
            ("cache_reader", &self.cache_reader),
            ("batch_coalescer", &self.batch_coalescer),
            ("remote_link", &self.remote_link),
        ]
    }
}

/// Those of the agent.
#[derive(Debug, Default)]
pub struct AgentMailboxes {
    /// Frames in front of agent sessions.
    pub agent_session: Arc<MailboxGauge>,
    /// Parts of batches in front of cache writers.
    pub cache_writer: Arc<MailboxGauge>,
}

impl AgentMailboxes {
    /// Name and gauge of each kind.
    pub fn all(&self) -> [(&'static str, &MailboxGauge); 2] {
        [
            ("agent_session", &self.agent_session),
            ("cache_writer", &self.cache_writer),
        ]
    }
}

/// The right to be in a mailbox; dropping it makes room for the next message.
#[derive(Debug)]
pub struct Slot {
    _permit: OwnedSemaphorePermit,
    mailbox: Arc<Mailbox>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.mailbox.left();
    }
}

/// A message with the slot it occupies.
#[derive(Debug)]
pub struct Carried<M> {
    /// What the sender sent.
    pub message: M,
    /// Held until the contents have been taken over.
    pub slot: Slot,
}

impl<M: 'static> Message for Carried<M> {
    type Result = ();
}

/// The receiving actor is gone; the message comes back.
#[derive(Debug)]
pub struct HandoffClosed<M>(pub M);

/// The sending end of one actor's bounded mailbox. Cheap to clone; all clones share the slots.
pub struct Handoff<M: Send + 'static> {
    recipient: Recipient<Carried<M>>,
    slots: Arc<Semaphore>,
    mailbox: Arc<Mailbox>,
}

impl<M: Send + 'static> Clone for Handoff<M> {
    fn clone(&self) -> Self {
        Handoff {
            recipient: self.recipient.clone(),
            slots: self.slots.clone(),
            mailbox: self.mailbox.clone(),
        }
    }
}

impl<M: Send + 'static> Handoff<M> {
    /// A mailbox of `slots` messages in front of `recipient`, counted in `gauge`.
    pub fn new(recipient: Recipient<Carried<M>>, slots: usize, gauge: &Arc<MailboxGauge>) -> Self {
        Handoff {
            recipient,
            slots: Arc::new(Semaphore::new(slots)),
            mailbox: Mailbox::new(gauge, slots),
        }
    }

    /// Whether the receiving actor still runs.
    pub fn connected(&self) -> bool {
        self.recipient.connected()
    }

    /// Sends as soon as there is a slot. Slots are given in the order they were asked for, so one sender that awaits each
    /// send before the next keeps its order.
    ///
    /// # Errors
    /// [`HandoffClosed`] with the message when the actor is gone.
    pub async fn send(&self, message: M) -> Result<(), HandoffClosed<M>> {
        match self.reserve().await {
            Some(reserved) => reserved.send(message),
            None => Err(HandoffClosed(message)),
        }
    }

    /// Waits for a slot without a message yet, so that nothing else need be held while waiting. `None` when the actor is gone.
    pub async fn reserve(&self) -> Option<Reserved<M>> {
        let permit = match self.slots.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => {
                let _waits = self.mailbox.gauge.waits_for_room();
                self.slots.clone().acquire_owned().await.ok()?
            }
        };
        self.recipient.connected().then(|| Reserved {
            permit,
            handoff: self.clone(),
        })
    }
}

/// A slot in a mailbox, waiting for its message; dropped, it makes room for another.
pub struct Reserved<M: Send + 'static> {
    permit: OwnedSemaphorePermit,
    handoff: Handoff<M>,
}

impl<M: Send + 'static> Reserved<M> {
    /// Sends at once.
    ///
    /// # Errors
    /// [`HandoffClosed`] with the message when the actor is gone.
    pub fn send(self, message: M) -> Result<(), HandoffClosed<M>> {
        let Reserved { permit, handoff } = self;
        if !handoff.recipient.connected() {
            return Err(HandoffClosed(message));
        }
        handoff.mailbox.entered();
        let slot = Slot {
            _permit: permit,
            mailbox: handoff.mailbox,
        };
        // Ignores actix's own capacity on purpose: the slot is the bound.
        handoff.recipient.do_send(Carried { message, slot });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    struct Sink(Rc<RefCell<Vec<Carried<u32>>>>);

    impl Actor for Sink {
        type Context = Context<Self>;
    }

    impl Handler<Carried<u32>> for Sink {
        type Result = ();
        fn handle(&mut self, carried: Carried<u32>, _: &mut Self::Context) {
            self.0.borrow_mut().push(carried);
        }
    }

    async fn settle() {
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
    }

    #[actix::test]
    async fn a_sender_waits_until_the_receiver_gives_a_slot_up_and_order_is_kept() {
        let held = Rc::new(RefCell::new(Vec::new()));
        let gauge = Arc::new(MailboxGauge::default());
        let handoff = Handoff::new(Sink(held.clone()).start().recipient(), 2, &gauge);
        let other = Handoff::new(Sink(Rc::default()).start().recipient(), 2, &gauge);
        other.send(0).await.unwrap();
        let sender = handoff.clone();
        actix::spawn(async move {
            for n in 0..5 {
                sender.send(n).await.unwrap();
            }
        });
        settle().await;
        assert_eq!(
            held.borrow().len(),
            2,
            "the mailbox holds what it is configured for, although actix would take more"
        );
        assert_eq!((gauge.depths(), gauge.capacity()), ((3, 2), 2));
        drop(other);
        assert_eq!((gauge.senders_waiting(), gauge.waits()), (1, 1));
        let mut seen = Vec::new();
        while seen.len() < 5 {
            let carried = held.borrow_mut().remove(0);
            seen.push(carried.message);
            drop(carried);
            settle().await;
        }
        assert_eq!(seen, [0, 1, 2, 3, 4]);
        assert_eq!(
            (gauge.depths(), gauge.high_water()),
            ((0, 0), 2),
            "and one that is gone is forgotten"
        );
        assert_eq!((gauge.senders_waiting(), gauge.waits()), (0, 3));
    }

    #[actix::test]
    async fn a_sender_that_gives_up_waits_no_more_and_has_waited() {
        let gauge = Arc::new(MailboxGauge::default());
        let handoff = Handoff::new(Sink(Rc::default()).start().recipient(), 1, &gauge);
        handoff.send(1).await.unwrap();
        assert_eq!(gauge.waits(), 0, "with room there is nothing to wait for");
        assert!(tokio::time::timeout(Duration::ZERO, handoff.reserve()).await.is_err());
        assert_eq!((gauge.senders_waiting(), gauge.waits()), (0, 1));
    }

    #[actix::test]
    async fn a_message_to_an_actor_that_is_gone_comes_back() {
        struct Gone;
        impl Actor for Gone {
            type Context = Context<Self>;
            fn started(&mut self, ctx: &mut Self::Context) {
                ctx.stop();
            }
        }
        impl Handler<Carried<u32>> for Gone {
            type Result = ();
            fn handle(&mut self, _: Carried<u32>, _: &mut Self::Context) {}
        }
        let addr = Gone.start();
        let handoff = Handoff::new(addr.clone().recipient(), 1, &Arc::default());
        while addr.connected() {
            tokio::task::yield_now().await;
        }
        assert!(matches!(handoff.send(7).await, Err(HandoffClosed(7))));
    }
}
