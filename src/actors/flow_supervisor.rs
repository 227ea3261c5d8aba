//! FlowSupervisor: everything that carries events from this region to one peer.
//!
//! It builds the flow downstream first, starts a PartitionConsumer for each assigned partition, watches its children, and
//! drains. When an inner actor is gone (a panic, an unexpected stop) or nothing moves although there is work, it takes the
//! flow down and says so; its supervisor builds a new one, which starts at the last committed offsets.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, RwLock, mpsc};
use std::time::Duration;

use actix::prelude::*;
use actix_rt::Arbiter;
use tokio::time::Instant;

use crate::config::Config;
use crate::handoff::Handoff;
use crate::hashing::Ring;
use crate::kafka::{FlowConsumer, Prefetch, Producer};
use crate::outcome::Outcome;
use crate::permits::{ByteBudget, Permits};
use crate::poll_thread::{PartitionsAssigned, PollCommand, PollSettings, PollThread, PollThreadEnded};
use crate::pulse::Pulse;
use crate::relay::{FlowShared, FlowView, LaneClock, RelayCache, StopFlow};
use crate::telemetry::Instruments;
use crate::threads::{join_arbiter, join_or_abandon, named_arbiter};
use crate::tls::TlsMaterial;

use super::batch_coalescer::BatchCoalescer;
use super::cache_reader::{CacheReader, CacheReaderParts};
use super::partition_consumer::{Parkers, PartitionConsumer, PartitionConsumerParts, PartitionEnded, Readers};
use super::remote_link::{MeetLane, RemoteLink, RemoteLinkParts, SayGoodbye};

/// How often the children are counted.
const WATCH_EVERY: Duration = Duration::from_millis(100);
/// In flight but no outcome for so many times `supervision.stalled_after`, with every session open: something is lost between
/// two stages that each believe the other has it. Longer than a link waits for an ack.
const LOST_AFTER: u32 = 3;
/// What a poll thread may take between two polls: Kafka is asked for offsets in a rebalance, which also waits for partitions
/// that are taken away.
const POLL_PATIENCE: Duration = Duration::from_secs(20);
/// What saying goodbye may take: a peer that does not read hears of it by the closed connection.
const GOODBYE_WITHIN: Duration = Duration::from_millis(500);

/// The flow went down by itself and wants to be built anew. A fact, to the region's supervisor.
#[derive(Message, Debug)]
#[rtype(result = "()")]
pub struct FlowFailed {
    /// Index of the peer.
    pub peer: usize,
    /// Which kind of actor was gone.
    pub actor: &'static str,
}

/// Take the flow down: this kind of actor does not move.
#[derive(Message, Clone, Copy, Debug)]
#[rtype(result = "()")]
pub struct FailFlow(pub &'static str);

/// Finish what is in flight until `deadline`, commit, and end.
#[derive(Message, Clone, Copy)]
#[rtype(result = "()")]
pub struct DrainFlow {
    /// When to stop waiting.
    pub deadline: Instant,
}

/// The flow has drained. A fact, to the region's supervisor.
#[derive(Message, Debug)]
#[rtype(result = "()")]
pub struct FlowDrained {
    /// Index of the peer.
    pub peer: usize,
    /// Events that were in flight at the deadline.
    pub unfinished: u64,
}

/// What a flow is made of.
#[derive(Clone)]
pub struct FlowParts {
    /// The whole configuration.
    pub config: Arc<Config>,
    /// By cache index.
    pub rings: Vec<Ring>,
    /// Accounts and state that outlive rebuilds.
    pub view: Arc<FlowView>,
    /// Our certificate and the CA.
    pub tls: Arc<TlsMaterial>,
    /// Writes dead letters and parks events.
    pub producer: Producer,
    /// Every instrument.
    pub instruments: Arc<Instruments>,
    /// Numbers for partition consumers, through all incarnations.
    pub consumer_ids: Arc<std::sync::atomic::AtomicU32>,
    /// Told when the flow fails.
    pub failed: Recipient<FlowFailed>,
    /// Told when the flow has drained.
    pub drained: Recipient<FlowDrained>,
}

/// One ordered pipeline: readers, coalescer and link on one arbiter.
struct Lane {
    /// Taken when the lane is stopped.
    arbiter: Option<Arbiter>,
    link: Addr<RemoteLink>,
    coalescer: Addr<BatchCoalescer>,
    readers: Vec<Addr<CacheReader>>,
}

impl Lane {
    /// Stops the lane's arbiter; gives it to be joined.
    fn stop(&mut self) -> Option<Arbiter> {
        let arbiter = self.arbiter.take()?;
        arbiter.stop();
        Some(arbiter)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // Also when the supervisor panics: a lane without a flow would go on writing to the peer.
        self.stop();
    }
}

/// See the module.
pub struct FlowSupervisor {
    parts: FlowParts,
    address: String,
    shared: Arc<FlowShared>,
    lanes: Vec<Lane>,
    readers: Readers,
    parkers: Parkers,
    /// Of the source topics, and of the retry topics; empty while the flow is down.
    poll: Vec<PollThread>,
    commands: Vec<mpsc::Sender<PollCommand>>,
    consumers: HashMap<u32, Addr<PartitionConsumer>>,
    draining: bool,
    progress: (u64, Instant),
    pulse: Arc<Pulse>,
}

impl FlowSupervisor {
    /// A flow that is built when the actor starts. `address` is where the peer's agent listens.
    pub fn new(parts: FlowParts, address: String) -> Self {
        let mut first_server = 0;
        let mut caches = Vec::with_capacity(parts.rings.len());
        for ring in &parts.rings {
            caches.push(RelayCache {
                ring: ring.clone(),
                first_server,
            });
            first_server += ring.servers();
        }
        let config = &parts.config;
        let peer = &config.peers[parts.view.peer];
        let place = |name: &String| peer.caches.iter().position(|cache| cache == name).unwrap_or(0) as u16;
        let shared = Arc::new(FlowShared {
            wire_caches: config.caches.iter().map(|cache| place(&cache.name)).collect(),
            config: config.clone(),
            caches,
            view: parts.view.clone(),
            permits: Permits::new(config.flow.max_in_flight_events, first_server),
            bytes: ByteBudget::new(config.flow.max_in_flight_bytes),
            crowded: Default::default(),
            consumers: RwLock::default(),
            metrics: parts.instruments.flow(&parts.view.name),
            instruments: parts.instruments.clone(),
            going_down: AtomicBool::new(false),
            incarnation: parts.view.begin_incarnation(),
        });
        parts.view.set_shared(&shared);
        let limit = config.supervision.stalled_after;
        let pulse = (parts.view.pulses).register_thread("flow_supervisor", parts.view.name.clone(), limit);
        FlowSupervisor {
            parts,
            address,
            shared,
            lanes: Vec::new(),
            readers: Arc::default(),
            parkers: Arc::default(),
            poll: Vec::new(),
            commands: Vec::new(),
            consumers: HashMap::new(),
            draining: false,
            progress: (0, Instant::now()),
            pulse,
        }
    }

    /// Builds the tree, downstream first: read bottom-up, it is the data flow.
    fn build(&mut self, ctx: &mut Context<Self>) -> std::io::Result<()> {
        for lane in 0..self.shared.config.flow.lanes {
            let lane = self.build_lane(lane);
            self.lanes.push(lane);
        }
        let slots = self.shared.config.mailbox.cache_reader;
        let gauge = &self.shared.view.mailboxes.cache_reader;
        let handoffs = |lane: &Lane| {
            let of = |reader: &Addr<CacheReader>| Handoff::new(reader.clone().recipient(), slots, gauge);
            lane.readers.iter().map(of).collect()
        };
        self.readers = Arc::new(self.lanes.iter().map(handoffs).collect());
        let all = self.lanes.iter().flat_map(|lane| &lane.readers);
        self.parkers = Arc::new(all.map(|reader| reader.clone().recipient()).collect());
        for retry in [false, true] {
            let poll = self.start_poll_thread(retry, ctx)?;
            self.commands.push(poll.commands());
            self.poll.push(poll);
        }
        let arbiters = self.lanes.iter().filter_map(|lane| lane.arbiter.as_ref());
        self.shared.view.set_stop(StopFlow {
            lanes: arbiters.map(Arbiter::handle).collect(),
            polls: self.commands.clone(),
        });
        Ok(())
    }

    fn build_lane(&self, lane: usize) -> Lane {
        let shared = self.shared.clone();
        let peer = &shared.config.peers[shared.view.peer].region;
        let arbiter = named_arbiter(&format!("lane{lane} {peer}"));
        let handle = arbiter.handle();
        let clock = Arc::new(LaneClock::new(shared.config.caches.len()));
        let limit = shared.config.supervision.stalled_after;
        (shared.view.pulses).watch_thread(&handle, "lane", format!("lane {lane}"), limit);
        let (mailbox, gauges) = (&shared.config.mailbox, &shared.view.mailboxes);

        let link_parts = RemoteLinkParts {
            shared: shared.clone(),
            lane,
            clock: clock.clone(),
            tls: self.parts.tls.clone(),
            address: self.address.clone(),
        };
        let link = Supervisor::start_in_arbiter(&handle, move |_| RemoteLink::new(link_parts));
        let to_link = Handoff::new(link.clone().recipient(), mailbox.remote_link, &gauges.remote_link);

        let (its_shared, its_clock) = (shared.clone(), clock.clone());
        let coalescer = BatchCoalescer::start_in_arbiter(&handle, move |_| {
            BatchCoalescer::new(its_shared, lane, its_clock, to_link)
        });
        let to_coalescer = Handoff::new(
            coalescer.clone().recipient(),
            mailbox.batch_coalescer,
            &gauges.batch_coalescer,
        );

        let mut readers = Vec::new();
        for (cache, policy) in shared.config.caches.iter().enumerate() {
            for server in &policy.servers {
                let parts = CacheReaderParts {
                    shared: shared.clone(),
                    lane,
                    number: readers.len(),
                    cache,
                    address: server.address.clone(),
                    clock: clock.clone(),
                    coalescer: to_coalescer.clone(),
                    producer: self.parts.producer.clone(),
                };
                readers.push(CacheReader::start_in_arbiter(&handle, move |_| CacheReader::new(parts)));
            }
        }
        link.do_send(MeetLane {
            readers: readers.clone(),
            coalescer: coalescer.clone(),
        });
        Lane {
            arbiter: Some(arbiter),
            link,
            coalescer,
            readers,
        }
    }

    fn start_poll_thread(&self, retry: bool, ctx: &mut Context<Self>) -> std::io::Result<PollThread> {
        let config = self.shared.config.clone();
        let peer = self.shared.peer().clone();
        let sent = config.caches.iter().filter(|cache| peer.caches.contains(&cache.name));
        let topic = |cache: &crate::config::Cache| match retry {
            false => cache.topic.clone(),
            true => config.kafka.retry_topic_for(&cache.topic, &peer.region),
        };
        let topics: Vec<String> = sent.map(topic).collect();
        let settings = PollSettings {
            retry,
            retry_wait_max: config.flow.retry_backoff_max,
            queue_chunks: config.mailbox.partition_consumer,
            queue_events: config.flow.max_in_flight_events / if retry { 4 } else { 1 },
            // Nobody waits for milliseconds at a retry topic, and its records come one by one.
            gather: if retry { Duration::ZERO } else { config.flow.gather },
            revoke_timeout: config.flow.revoke_timeout,
            gauge: self.shared.view.mailboxes.partition_consumer.clone(),
            view: self.shared.view.clone(),
            flow: ctx.address().recipient(),
            ended: ctx.address().recipient(),
            pulse: self.shared.view.pulses.register_patient(
                "poll_thread",
                self.shared.view.name.clone(),
                POLL_PATIENCE + config.flow.revoke_timeout,
            ),
        };
        settings.pulse.holds(1, None);
        let (group, name) = match retry {
            false => (
                config.kafka.group_for(&config.region, &peer.region),
                format!("poll {}", peer.region),
            ),
            true => (
                config.kafka.retry_group_for(&config.region, &peer.region),
                format!("retry {}", peer.region),
            ),
        };
        PollThread::start(&name, settings, move |listener| {
            let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
            let prefetch = Prefetch::of(&config.kafka, config.flow.max_in_flight_bytes, retry);
            FlowConsumer::new(&config.kafka, &group, &config.node, &topics, retry, prefetch, listener)
        })
    }

    /// Counts the children; one that is gone without having said so takes the flow down.
    fn watch(&mut self, ctx: &mut Context<Self>) {
        let gone = self.lanes.iter().find_map(|lane| {
            let readers = lane.readers.iter().all(|reader| reader.connected());
            match (lane.link.connected(), lane.coalescer.connected(), readers) {
                (false, _, _) => Some("remote_link"),
                (_, false, _) => Some("batch_coalescer"),
                (_, _, false) => Some("cache_reader"),
                _ => None,
            }
        });
        let consumer = || {
            self.consumers
                .values()
                .any(|consumer| !consumer.connected())
                .then_some("partition_consumer")
        };
        let poll = || self.poll.iter().any(PollThread::is_finished).then_some("poll_thread");
        if let Some(actor) = gone.or_else(consumer).or_else(poll).or_else(|| self.lost()) {
            self.fail(actor, ctx);
        }
    }

    /// The pulses show every stage that hangs; this is for what none of them has: events with a permit that never end.
    fn lost(&mut self) -> Option<&'static str> {
        let (accounts, _, _) = self.shared.view.accounts.total();
        // A key that becomes dirty has moved as well.
        let ended: u64 = Outcome::ALL.iter().map(|outcome| accounts.ended(*outcome)).sum();
        let ended = ended + accounts.dirty + accounts.ended(Outcome::Parked);
        let limit = self.shared.config.supervision.stalled_after * LOST_AFTER;
        let links = self.shared.view.links();
        let open = links
            .iter()
            .all(|link| link.as_ref().is_some_and(|link| link.state == "open"));
        let now = Instant::now();
        if ended != self.progress.0 || accounts.in_flight == 0 || !open {
            self.progress = (ended, now);
            return None;
        }
        if now - self.progress.1 < limit {
            return None;
        }
        tracing::error!(
            flow = self.shared.view.name,
            in_flight = accounts.in_flight,
            dirty = accounts.dirty,
            ?limit,
            "events in flight and sessions open, but nothing ends: restarting the flow"
        );
        Some("watchdog")
    }

    fn fail(&mut self, actor: &'static str, ctx: &mut Context<Self>) {
        let peer = self.shared.view.peer;
        self.take_down(ctx, move |act| act.parts.failed.do_send(FlowFailed { peer, actor }));
    }

    /// Stops every child, waits for the poll thread off this thread, and then tells.
    fn take_down(&mut self, ctx: &mut Context<Self>, tell: impl FnOnce(&Self) + 'static) {
        self.shared.going_down.store(true, SeqCst);
        let arbiters: Vec<Arbiter> = self.lanes.iter_mut().filter_map(Lane::stop).collect();
        self.lanes.clear();
        self.commands.clear();
        self.consumers.clear();
        let poll = std::mem::take(&mut self.poll);
        let name = self.shared.view.name.clone();
        let join = tokio::task::spawn_blocking(move || {
            for poll in &poll {
                let _ = poll.commands().send(PollCommand::Stop);
            }
            for poll in poll {
                join_or_abandon(&format!("poll thread of {name}"), move || poll.join());
            }
            for (n, arbiter) in arbiters.into_iter().enumerate() {
                join_arbiter(&format!("lane {n} of {name}"), arbiter);
            }
        });
        ctx.spawn(join.into_actor(self).map(move |_, act, ctx| {
            tell(act);
            ctx.stop();
        }));
    }
}

impl Actor for FlowSupervisor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        if let Err(error) = self.build(ctx) {
            tracing::error!(flow = self.shared.view.name, %error, "flow could not be built");
            self.fail("poll_thread", ctx);
            return;
        }
        ctx.run_interval(WATCH_EVERY, |act, ctx| {
            act.pulse.moved("counted its children");
            fail::fail_point!("flow_supervisor_watch");
            if !act.poll.is_empty() && !act.draining {
                act.watch(ctx);
            }
        });
    }
}

impl Handler<PartitionsAssigned> for FlowSupervisor {
    type Result = ();

    fn handle(&mut self, PartitionsAssigned(queues): PartitionsAssigned, ctx: &mut Self::Context) {
        for queue in queues {
            let Some((cache, retry)) = self.shared.cache_of_topic(&queue.at.topic) else {
                continue;
            };
            let Some(commands) = self.commands.get(usize::from(retry)).cloned() else {
                return;
            };
            let id = self.parts.consumer_ids.fetch_add(1, Relaxed);
            let parts = PartitionConsumerParts {
                id,
                shared: self.shared.clone(),
                queue,
                cache,
                retry,
                readers: self.readers.clone(),
                parkers: self.parkers.clone(),
                commands,
                producer: self.parts.producer.clone(),
                ended: ctx.address().recipient(),
            };
            self.consumers.insert(id, PartitionConsumer::new(parts).start());
        }
    }
}

impl Handler<PartitionEnded> for FlowSupervisor {
    type Result = ();

    fn handle(&mut self, PartitionEnded(id): PartitionEnded, _: &mut Self::Context) {
        self.consumers.remove(&id);
    }
}

impl Handler<PollThreadEnded> for FlowSupervisor {
    type Result = ();

    fn handle(&mut self, _: PollThreadEnded, ctx: &mut Self::Context) {
        if !self.poll.is_empty() && !self.draining {
            self.fail("poll_thread", ctx);
        }
    }
}

impl Handler<FailFlow> for FlowSupervisor {
    type Result = ();

    fn handle(&mut self, FailFlow(actor): FailFlow, ctx: &mut Self::Context) {
        if !self.poll.is_empty() && !self.draining {
            self.fail(actor, ctx);
        }
    }
}

impl Handler<DrainFlow> for FlowSupervisor {
    type Result = ();

    fn handle(&mut self, DrainFlow { deadline }: DrainFlow, ctx: &mut Self::Context) {
        if self.draining {
            return;
        }
        self.draining = true;
        self.shared.view.draining.store(true, Relaxed);
        let commands = self.commands.clone();
        let drain = tokio::task::spawn_blocking(move || {
            let mut answers = Vec::new();
            for commands in &commands {
                let (reply, answer) = mpsc::sync_channel(1);
                commands.send(PollCommand::Drain { deadline, reply }).ok()?;
                answers.push(answer);
            }
            // Each thread answers by the deadline; a little more for its last commit.
            let patience = || deadline.saturating_duration_since(Instant::now()) + Duration::from_secs(2);
            let unfinished = answers.iter().map(|answer| answer.recv_timeout(patience()).ok());
            unfinished.sum::<Option<u64>>().filter(|_| !answers.is_empty())
        });
        ctx.spawn(drain.into_actor(self).map(|unfinished, act, ctx| {
            let unfinished = match unfinished {
                Ok(Some(unfinished)) => unfinished,
                // No answer: whatever is in flight will be replayed.
                _ => act.shared.view.accounts.total().0.in_flight_total(),
            };
            let peer = act.shared.view.peer;
            let goodbyes = act.lanes.iter().map(|lane| lane.link.send(SayGoodbye));
            let goodbyes = tokio::time::timeout(GOODBYE_WITHIN, futures_util::future::join_all(goodbyes));
            ctx.spawn(goodbyes.into_actor(act).map(move |_, act, ctx| {
                act.take_down(ctx, move |act| {
                    act.parts.drained.do_send(FlowDrained { peer, unfinished })
                });
            }));
        }));
    }
}
