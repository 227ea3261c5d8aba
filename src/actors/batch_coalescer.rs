//! BatchCoalescer: one per lane.
//!
//! In: items from the lane's cache readers ([`TakeItems`]). Out: encoded, compressed batches to the lane's link.
//! The newest item per key stays; a batch leaves on bytes, count or linger, which is shorter while nothing is under way to the
//! peer: waiting for company pays while there is something to wait behind. While the link's mailbox is full it takes
//! nothing more, so its own fills and the readers wait.
//! Bounded by: `mailbox.batch_coalescer`, `batch.max_items`, `batch.max_bytes`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use bytes::Bytes;
use tokio::time::Instant;

use crate::coalesce::{OpenBatch, Trigger};
use crate::config::Compression;
use crate::event::TraceContext;
use crate::failpoint;
use crate::handoff::{Carried, Handoff};
use crate::outcome::Outcome;
use crate::pulse::{PULSE_EVERY, Pulse};
use crate::relay::{FlowShared, HeldItem, LaneClock, ORIGIN_OTHER, Reports, Seen, UnderWay};
use crate::telemetry::BatchClosed;
use crate::telemetry::PathStage;
use crate::wire::{Codec, EncodedBatch, Expiry, ItemEncoder, ItemOp, ItemRef};

/// Items from one reader, in look order. Travels by hand-off.
#[derive(Debug)]
pub struct TakeItems {
    /// Each event holds a permit, each item its bytes.
    pub items: Vec<HeldItem>,
}

/// A batch for the link, with what it needs to know of each item once it is acked. Travels by hand-off.
#[derive(Debug)]
pub struct ShipBatch {
    /// What crosses the network.
    pub encoded: EncodedBatch,
    /// When the items' ages were written.
    pub encoded_at: Instant,
    /// By index in the batch; their values are let go of.
    pub items: Vec<HeldItem>,
    /// Bytes of the flow's budget that the batch holds until it is acked.
    pub bytes: usize,
    /// The session all its looks were made in.
    pub session: u64,
    /// Why it left.
    pub trigger: Trigger,
    /// The spans of those of its items that are traced.
    pub members: Vec<TraceContext>,
    /// It is on its way, until this is dropped.
    pub under_way: UnderWay,
}

/// Nothing is under way to the peer any more. A fact; sent when it was asked for with [`LaneClock::await_idle`].
#[derive(Message, Clone, Copy, Debug)]
#[rtype(result = "()")]
pub struct LinkIdle;

/// See the module.
pub struct BatchCoalescer {
    shared: Arc<FlowShared>,
    clock: Arc<LaneClock>,
    link: Handoff<ShipBatch>,
    open: OpenBatch,
    encoder: ItemEncoder,
    inbox: VecDeque<Carried<TakeItems>>,
    outbox: Option<ShipBatch>,
    sending: bool,
    /// When the open batch is looked at again.
    linger: Option<(Instant, SpawnHandle)>,
    pulse: Arc<Pulse>,
}

impl BatchCoalescer {
    /// A coalescer with an empty batch.
    pub fn new(shared: Arc<FlowShared>, lane: usize, clock: Arc<LaneClock>, link: Handoff<ShipBatch>) -> Self {
        let batch = &shared.config.batch;
        BatchCoalescer {
            open: OpenBatch::new(batch.max_items, batch.max_bytes),
            encoder: ItemEncoder::new(batch.min_saving),
            inbox: VecDeque::new(),
            outbox: None,
            sending: false,
            linger: None,
            pulse: shared.view.pulses.register("batch_coalescer", format!("lane {lane}")),
            shared,
            clock,
            link,
        }
    }
}

impl Actor for BatchCoalescer {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.run_interval(PULSE_EVERY, |act, _| {
            let work = act.inbox.len() + act.open.len() + usize::from(act.outbox.is_some());
            let waits_for = act.sending.then_some("room at the link");
            act.pulse.holds(work as u64, waits_for);
        });
    }
}

impl Handler<Carried<TakeItems>> for BatchCoalescer {
    type Result = ();

    fn handle(&mut self, carried: Carried<TakeItems>, ctx: &mut Self::Context) {
        self.inbox.push_back(carried);
        self.advance(ctx);
    }
}

impl Handler<LinkIdle> for BatchCoalescer {
    type Result = ();

    fn handle(&mut self, LinkIdle: LinkIdle, ctx: &mut Self::Context) {
        self.ship_if_due(ctx);
    }
}

impl BatchCoalescer {
    /// Takes items while there is a way out for the batch they may fill.
    fn advance(&mut self, ctx: &mut Context<Self>) {
        let _inside = self.pulse.enter("took items");
        fail::fail_point!("batch_coalescer_advance");
        let mut reports = Reports::default();
        while self.outbox.is_none() {
            let Some(Carried { message, slot }) = self.inbox.pop_front() else {
                break;
            };
            let now = Instant::now();
            let mut items = message.items.into_iter();
            while let Some(item) = items.next() {
                failpoint::at_keys("batch_coalescer_event", std::iter::once(&item.event.key));
                // What the peer takes in one batch may be less than what is configured here.
                if !self.open.is_empty() && self.open.bytes() + item.bytes() > self.clock.max_batch() {
                    self.close(Trigger::Bytes, ctx);
                    let rest = std::iter::once(item).chain(items).collect::<Vec<_>>();
                    items = rest.into_iter();
                    break;
                }
                let shared = &self.shared;
                if let Some(replaced) = self.open.push(item, now, |comes, held| shared.survives(comes, held)) {
                    reports.finished(&replaced.event, Outcome::Superseded);
                    self.shared.give_bytes(replaced.bytes);
                }
                if let Some(trigger) = self.open.full() {
                    self.close(trigger, ctx);
                    break;
                }
            }
            if items.len() > 0 {
                // The rest keeps its slot: its contents are not taken over yet.
                self.inbox.push_front(Carried {
                    message: TakeItems { items: items.collect() },
                    slot,
                });
            }
        }
        self.shared.report(&mut reports);
        self.ship_if_due(ctx);
    }

    /// How long the open batch waits for company: less when there is nothing to wait behind.
    fn patience(&self) -> (Duration, Trigger) {
        let batch = &self.shared.config.batch;
        match self.clock.is_idle() {
            true if batch.idle_linger < batch.linger => (batch.idle_linger, Trigger::Idle),
            _ => (batch.linger, Trigger::Linger),
        }
    }

    /// The open batch leaves if it has waited for long enough; else it is looked at again when it has.
    fn ship_if_due(&mut self, ctx: &mut Context<Self>) {
        let Some(opened) = self.open.opened().filter(|_| self.outbox.is_none() && !self.sending) else {
            // It leaves as soon as the one before it has left.
            return;
        };
        let (patience, trigger) = self.patience();
        let left = patience.saturating_sub(opened.elapsed());
        if left.is_zero() {
            self.close(trigger, ctx);
            return;
        }
        if trigger == Trigger::Linger {
            self.clock.await_idle();
        }
        let at = opened + patience;
        match self.linger {
            Some((set, _)) if set <= at => return,
            Some((_, later)) => _ = ctx.cancel_future(later),
            None => {}
        }
        let timer = ctx.run_later(left, |act, ctx| {
            act.linger = None;
            act.ship_if_due(ctx);
        });
        self.linger = Some((at, timer));
    }

    /// Encodes the open batch and hands it to the link.
    fn close(&mut self, trigger: Trigger, ctx: &mut Context<Self>) {
        if let Some((_, timer)) = self.linger.take() {
            ctx.cancel_future(timer);
        }
        self.pulse.moved("closed a batch");
        // They stay where they are: an item is large beside what is read of it from here on.
        let mut items = self.open.take();
        let now = Instant::now();
        // All looks of a session or none: one that was made in another is for the link to refuse.
        let session = items.first().map_or(0, |item| item.session);
        let session = if items.iter().all(|item| item.session == session) {
            session
        } else {
            0
        };
        let mut bytes = 0;
        let mut members = Vec::new();
        for item in &mut items {
            bytes += item.bytes();
            if let Some(trace) = &mut item.event.trace {
                trace.enter(PathStage::Link, now);
                members.extend(trace.exported.then(|| trace.context()));
            }
            self.encoder
                .push(&encodable(item, self.shared.wire_cache(item.event.cache), now));
            if let Seen::Value { value, .. } = &mut item.seen {
                *value = Bytes::new();
            }
        }
        let codec = match self.shared.config.batch.compression {
            Compression::Lz4 if self.clock.lz4() => Codec::Lz4,
            _ => Codec::Raw,
        };
        let encoded = self.encoder.finish(codec);
        self.shared.metrics.batch_closed(BatchClosed {
            trigger: trigger.name(),
            items: items.len(),
            raw: encoded.raw_len as usize,
            wire: encoded.payload.len(),
        });
        self.outbox = Some(ShipBatch {
            encoded,
            encoded_at: now,
            items,
            bytes,
            session,
            trigger,
            members,
            under_way: UnderWay::new(&self.clock),
        });
        self.send(ctx);
    }

    fn send(&mut self, ctx: &mut Context<Self>) {
        if self.sending {
            return;
        }
        fail::fail_point!("batch_coalescer_send", |_| ());
        let Some(batch) = self.outbox.take() else { return };
        self.sending = true;
        let link = self.link.clone();
        let send = async move { link.send(batch).await.is_ok() };
        ctx.spawn(send.into_actor(self).map(|sent, act, ctx| {
            act.sending = false;
            act.pulse.moved("handed a batch on");
            if sent {
                act.send(ctx);
                act.advance(ctx);
            }
            // Else the link is gone and the flow is about to be rebuilt from its committed offsets.
        }));
    }
}

/// An item as the wire wants it; its age is from the look to now.
fn encodable(item: &HeldItem, cache: u16, now: Instant) -> ItemRef<'_> {
    let (op, value, flags, expiry) = match &item.seen {
        Seen::Value { value, flags, expiry } => (ItemOp::Set, &value[..], *flags, *expiry),
        Seen::Touch(expiry) => (ItemOp::Touch, &[][..], 0, *expiry),
        Seen::Nothing(_) => (ItemOp::Remove, &[][..], 0, Expiry::Never),
    };
    ItemRef {
        cache,
        op,
        key: &item.event.key,
        value,
        flags,
        expiry,
        ver: item.event.ver,
        origin: (item.event.origin != ORIGIN_OTHER).then_some(item.event.origin),
        looked_at: item.looked_at,
        age_us: now.saturating_duration_since(item.looked).as_micros() as u64,
        produced_at_ms: item.event.produced_at_ms.max(0) as u64,
        trace: item.event.trace_context(),
    }
}
