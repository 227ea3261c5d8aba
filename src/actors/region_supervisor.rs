//! RegionSupervisor: the root of the tree. One flow per peer that has an address, one agent, and the front door where a cache
//! has one.
//!
//! It rebuilds a flow, the agent or the front door when it went down, counts these restarts, and gives up when there are too many: the exit
//! code is then 70 and the next process starts fresh. A failed dial, a lost connection or a memcached error never counts.
//! On SIGTERM it drains: flows finish what is in flight and commit, sessions are told to go, and then the system stops.

use std::net::TcpListener as StdListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::time::Duration;

use actix::prelude::*;
use actix_rt::{Arbiter, ArbiterHandle};
use tokio::time::Instant;

use crate::agent::{AgentShared, Fence};
use crate::front_door::{DoorShared, UpstreamView, announcer};
use crate::handoff::Handoff;
use crate::intensity::Intensity;
use crate::pulse::Stall;
use crate::threads::{join_arbiter, named_arbiter};
use crate::tls::TlsMaterial;
use crate::vitals::Vitals;

use super::agent_listener::{AgentListener, AgentListenerParts, Threads};
use super::cache_writer::CacheWriter;
use super::flow_supervisor::{DrainFlow, FailFlow, FlowDrained, FlowFailed, FlowParts, FlowSupervisor};
use super::front_door_listener::{DoorEntry, FrontDoor};

/// How often the children are counted.
const WATCH_EVERY: Duration = Duration::from_millis(100);
/// How long after the deadline a flow may take to commit and end.
const DRAIN_PATIENCE: Duration = Duration::from_secs(3);
/// Everything is done, or was drained.
pub const EXIT_DONE: i32 = 0;
/// Gave up after too many restarts.
pub const EXIT_GAVE_UP: i32 = 70;
/// The grace period ran out, or a second signal came, with work left: that of flows will be replayed, events that the front door
/// could not produce are lost.
pub const EXIT_WORK_LEFT: i32 = 75;

/// Drain and end; a second one ends at once.
#[derive(Message, Clone, Copy)]
#[rtype(result = "()")]
pub struct Terminate;

/// One flow as the root sees it.
struct Flow {
    parts: FlowParts,
    address: String,
    running: Option<(Arbiter, Addr<FlowSupervisor>)>,
    drained: Option<u64>,
}

struct Agent {
    arbiters: Vec<Arbiter>,
    fence: Arc<Fence>,
    listener: Addr<AgentListener>,
    writers: Vec<Addr<CacheWriter>>,
}

/// What the front door is made of; the same parts make the next one after a restart.
pub struct DoorParts {
    /// What its actors share.
    pub shared: Arc<DoorShared>,
    /// Our certificate and the CA.
    pub tls: Arc<TlsMaterial>,
    /// Where it listens.
    pub entries: Vec<DoorEntry>,
    /// The servers behind it, by cache and number.
    pub views: Vec<Vec<Arc<UpstreamView>>>,
}

/// Makes the parts of a flow, given whom to tell.
pub type FlowMaker = Box<dyn FnOnce(Recipient<FlowFailed>, Recipient<FlowDrained>) -> Vec<(FlowParts, String)>>;

/// See the module.
pub struct RegionSupervisor {
    make_flows: Option<FlowMaker>,
    flows: Vec<Flow>,
    agent_shared: Arc<AgentShared>,
    socket: StdListener,
    agent: Option<Agent>,
    door_parts: Option<DoorParts>,
    door: Option<FrontDoor>,
    /// Remembered events are about to be produced, out of turn.
    resends_soon: bool,
    intensity: Intensity,
    /// Panics while suspects were on trial.
    trials: u32,
    exit: Arc<AtomicI32>,
    deadline: Option<Instant>,
    vitals: Arc<Vitals>,
}

impl RegionSupervisor {
    /// The root of a region. `exit` gets the exit code before the system stops.
    pub fn new(
        make_flows: FlowMaker,
        agent_shared: Arc<AgentShared>,
        socket: StdListener,
        door: Option<DoorParts>,
        exit: Arc<AtomicI32>,
        vitals: Arc<Vitals>,
    ) -> Self {
        let supervision = &agent_shared.config.supervision;
        RegionSupervisor {
            make_flows: Some(make_flows),
            flows: Vec::new(),
            intensity: Intensity::new(supervision.max_restarts, supervision.within),
            trials: 0,
            agent_shared,
            socket,
            agent: None,
            door_parts: door,
            door: None,
            resends_soon: false,
            exit,
            deadline: None,
            vitals,
        }
    }

    fn start_flow(flow: &mut Flow, vitals: &Vitals) {
        vitals.up(&part_of(&flow.parts.view.name));
        let peer = &flow.parts.config.peers[flow.parts.view.peer].region;
        let arbiter = named_arbiter(&format!("flow {peer}"));
        let (parts, address) = (flow.parts.clone(), flow.address.clone());
        let supervisor =
            FlowSupervisor::start_in_arbiter(&arbiter.handle(), move |_| FlowSupervisor::new(parts, address));
        flow.running = Some((arbiter, supervisor));
    }

    /// Builds the agent, downstream first, on arbiters of its own.
    fn start_agent(&mut self) -> std::io::Result<()> {
        let socket = self.socket.try_clone()?;
        // Ticks and stamps begin anew together: a look stamped by the old ones has no session left to come in.
        let tick = Arc::new(AtomicU64::new(0));
        let shared = &self.agent_shared;
        let fence = Arc::new(Fence::new(shared.servers.len()));
        let (region, limit) = (&shared.config.region, shared.config.supervision.stalled_after);
        let threads = 0..shared.config.agent.threads;
        let arbiters: Vec<Arbiter> = threads.map(|n| named_arbiter(&format!("agent {n}"))).collect();
        let handles: Vec<ArbiterHandle> = arbiters.iter().map(Arbiter::handle).collect();
        for handle in &handles {
            shared.pulses.watch_thread(handle, "agent", region.clone(), limit);
        }
        let slots = shared.config.mailbox.cache_writer;
        let mut writers = Vec::new();
        let mut handoffs = Vec::new();
        for server in 0..shared.servers.len() {
            let (its_shared, its_tick, its_fence) = (shared.clone(), tick.clone(), fence.clone());
            let writer = CacheWriter::start_in_arbiter(&handles[server % handles.len()], move |_| {
                CacheWriter::new(its_shared, its_tick, its_fence, server)
            });
            handoffs.push(Handoff::new(
                writer.clone().recipient(),
                slots,
                &shared.mailboxes.cache_writer,
            ));
            writers.push(writer);
        }
        let parts = AgentListenerParts {
            shared: shared.clone(),
            tick,
            writers: handoffs,
            threads: Threads::new(handles.clone()),
        };
        let listener = Supervisor::start_in_arbiter(&handles[0], move |_| AgentListener::new(parts, socket));
        self.vitals.up(AGENT);
        self.agent = Some(Agent {
            arbiters,
            fence,
            listener,
            writers,
        });
        Ok(())
    }

    /// Builds the front door, where there is one.
    fn start_door(&mut self) -> std::io::Result<()> {
        if let Some(parts) = &self.door_parts {
            self.door = Some(FrontDoor::start(
                &parts.shared,
                &parts.tls,
                &parts.entries,
                &parts.views,
            )?);
            self.vitals.up(FRONT_DOOR);
        }
        Ok(())
    }

    fn rebuild_door(&mut self, actor: &'static str, ctx: &mut Context<Self>) {
        let (Some(door), Some(parts)) = (self.door.take(), &self.door_parts) else {
            return;
        };
        let shared = parts.shared.clone();
        self.vitals.down(FRONT_DOOR, Instant::now());
        let arbiters = door.stop();
        if !self.restart(actor, "front door", true, ctx) {
            return;
        }
        let join = tokio::task::spawn_blocking(move || {
            for arbiter in arbiters {
                join_arbiter("front door", arbiter);
            }
            shared.forget_sessions();
            shared.pulses.clear();
        });
        ctx.spawn(join.into_actor(self).map(|_, act, _| {
            if act.deadline.is_none()
                && let Err(error) = act.start_door()
            {
                tracing::error!(%error, "front door could not be rebuilt");
                act.give_up(&format!("the front door could not be rebuilt: {error}"));
            }
        }));
    }

    fn watch(&mut self, ctx: &mut Context<Self>) {
        fail::fail_point!("region_supervisor_watch");
        if let Some(parts) = &self.door_parts {
            parts.shared.make_room();
            self.resend(ctx);
        }
        if let Some(deadline) = self.deadline {
            self.finish_drain(deadline, ctx);
            return;
        }
        let gone = self.agent.as_ref().and_then(|agent| {
            let writers = agent.writers.iter().all(|writer| writer.connected());
            match (agent.listener.connected(), writers) {
                (_, false) => Some("cache_writer"),
                (false, _) => Some("agent_listener"),
                _ => None,
            }
        });
        if let Some(actor) = gone {
            self.rebuild_agent(actor, ctx);
        }
        if let Some(actor) = self.door.as_ref().and_then(FrontDoor::gone) {
            self.rebuild_door(actor, ctx);
        }
        self.watch_pulses(ctx);
        let dead: Vec<usize> = self
            .flows
            .iter()
            .enumerate()
            .filter(|(_, flow)| {
                flow.running
                    .as_ref()
                    .is_some_and(|(_, supervisor)| !supervisor.connected())
            })
            .map(|(n, _)| n)
            .collect();
        for n in dead {
            self.rebuild_flow(n, "flow_supervisor", ctx);
        }
    }

    /// Looks whether every stage moves; one that does not is restarted with what it belongs to.
    fn watch_pulses(&mut self, ctx: &mut Context<Self>) {
        let (now, limit) = (Instant::now(), self.agent_shared.config.supervision.stalled_after);
        for n in 0..self.flows.len() {
            let Some((_, supervisor)) = &self.flows[n].running else {
                continue;
            };
            let view = &self.flows[n].parts.view;
            let Some(stall) = view.pulses.stalled(now, limit) else {
                continue;
            };
            say_stalled(&view.name, &stall);
            // A flow's supervisor shares its thread with the partition consumers.
            let hangs = stall.inside.is_some() && stall.actor == "partition_consumer";
            if hangs || stall.actor == "flow_supervisor" {
                self.rebuild_flow(n, stall.actor, ctx);
            } else {
                // Once: until it has gone down, or has shown that it cannot.
                view.pulses.forgive(now);
                supervisor.do_send(FailFlow(stall.actor));
            }
        }
        if let Some(stall) = self.agent_shared.pulses.stalled(now, limit)
            && self.agent.is_some()
        {
            say_stalled("agent", &stall);
            self.rebuild_agent(stall.actor, ctx);
        }
        if let Some(parts) = &self.door_parts
            && let Some(stall) = parts.shared.pulses.stalled(now, limit)
            && self.door.is_some()
        {
            say_stalled("front door", &stall);
            self.rebuild_door(stall.actor, ctx);
        }
    }

    /// Counts a restart; false when it was one too many and the process ends.
    fn restart(&mut self, actor: &'static str, what: &str, counts: bool, _: &mut Context<Self>) -> bool {
        tracing::error!(actor, what, "actor is gone, rebuilding");
        self.agent_shared.instruments.count_restart(actor);
        if !counts || !self.intensity.exceeded(Instant::now()) {
            return true;
        }
        let supervision = &self.agent_shared.config.supervision;
        tracing::error!(
            max_restarts = supervision.max_restarts, within = ?supervision.within,
            "too many restarts, giving up: see the errors above for the cause"
        );
        let within = supervision.within;
        self.give_up(&format!(
            "more than {} restarts within {within:?}",
            supervision.max_restarts
        ));
        false
    }

    fn rebuild_agent(&mut self, actor: &'static str, ctx: &mut Context<Self>) {
        let Some(agent) = self.agent.take() else { return };
        self.vitals.down(AGENT, Instant::now());
        self.agent_shared.listening.store(false, Relaxed);
        agent.arbiters.iter().for_each(|arbiter| _ = arbiter.stop());
        if !self.restart(actor, "agent", true, ctx) {
            return;
        }
        // Joined first: an old writer that still began a call could do so after a new writer has settled. One that cannot be
        // joined gets no call through.
        let shared = self.agent_shared.clone();
        let join = tokio::task::spawn_blocking(move || {
            let mut all = true;
            for arbiter in agent.arbiters {
                if !join_arbiter("agent", arbiter) {
                    all = false;
                    // Before the next one is waited for.
                    agent.fence.close();
                }
            }
            if !all {
                shared.abandon_sessions();
            }
            shared.pulses.clear();
        });
        ctx.spawn(join.into_actor(self).map(|_, act, _| {
            if let Err(error) = act.start_agent() {
                tracing::error!(%error, "agent could not be rebuilt");
                act.give_up(&format!("the agent could not be rebuilt: {error}"));
            }
        }));
    }

    fn rebuild_flow(&mut self, n: usize, actor: &'static str, ctx: &mut Context<Self>) {
        let Some((arbiter, _)) = self.flows[n].running.take() else {
            return;
        };
        let flow_stop = self.flows[n].parts.view.clone();
        let name = flow_stop.name.clone();
        self.vitals.down(&part_of(&name), Instant::now());
        // A panic while suspects are handed on apart leaves fewer of them: two such count as one, so that finding a culprit
        // stays far from giving up, and a flow that panics whatever it carries still ends.
        let on_trial = flow_stop.suspects().any_on_trial();
        self.trials += u32::from(on_trial);
        if !self.restart(actor, &name, !on_trial || self.trials % 2 == 1, ctx) {
            return;
        }
        // Joined first: what an old actor still reports belongs to the old accounts.
        arbiter.stop();
        flow_stop.stop_rest();
        let thread = format!("supervisor of {name}");
        let join = tokio::task::spawn_blocking(move || join_arbiter(&thread, arbiter));
        ctx.spawn(join.into_actor(self).map(move |_, act, _| {
            let flow = &mut act.flows[n];
            let left = flow.parts.view.accounts.total().0.in_flight_total();
            // These only move records or look after the others: what events hold cannot end them.
            let by_events = !["poll_thread", "flow_supervisor", "lane", "watchdog"].contains(&actor);
            let in_flight = flow.parts.view.suspects().flow_went_down(by_events, Instant::now());
            tracing::info!(flow = name, in_flight, "flow is down, building it anew");
            flow.parts.view.reset(flow.parts.consumer_ids.load(SeqCst));
            match act.deadline {
                None => Self::start_flow(flow, &act.vitals),
                // Not built again only to be drained: what it held will be replayed.
                Some(_) => flow.drained = Some(left),
            }
        }));
    }

    /// Produces events of the front door that Kafka has not taken before.
    fn resend(&mut self, ctx: &mut Context<Self>) {
        let Some(parts) = &self.door_parts else { return };
        if parts.shared.announcer.tick(Instant::now()) && !self.resends_soon {
            self.resends_soon = true;
            ctx.run_later(announcer::SOON, |act, ctx| {
                act.resends_soon = false;
                act.resend(ctx);
            });
        }
    }

    fn finish_drain(&mut self, deadline: Instant, _: &mut Context<Self>) {
        let flows = self.flows.iter().all(|flow| flow.drained.is_some());
        let sessions = self.agent_shared.session_views().is_empty();
        let now = Instant::now();
        // A flow that has not said so a while after the deadline hangs in Kafka's client: what it held will be replayed.
        let overdue = now >= deadline + DRAIN_PATIENCE;
        let (clients, events) = self.door_holds();
        if !overdue && !(flows && (sessions && clients + events == 0 || now >= deadline)) {
            return;
        }
        if events > 0 {
            // Only they are: what a flow holds is in Kafka.
            tracing::error!(
                events,
                "events of the front door could not be produced, they are lost; let their keys expire, or write again what was written \
                 since kafka was away"
            );
        }
        let left: u64 = self
            .flows
            .iter()
            .map(|flow| {
                flow.drained
                    .unwrap_or_else(|| flow.parts.view.accounts.total().0.in_flight_total())
            })
            .sum();
        if left > 0 {
            tracing::warn!(events = left, "grace period over with work left, it will be replayed");
        } else if !flows {
            tracing::warn!(
                "grace period over before every flow has committed, what it finished since will be replayed"
            );
        }
        if left + events > 0 || !flows {
            self.stop(EXIT_WORK_LEFT);
        } else {
            tracing::info!("drained");
            self.stop(EXIT_DONE);
        }
    }

    /// Clients, and events that Kafka does not have.
    fn door_holds(&self) -> (u64, u64) {
        self.door_parts.as_ref().map_or((0, 0), |parts| {
            let shared = &parts.shared;
            let waiting = (0..shared.config.caches.len()).map(|cache| shared.announcer.waiting(cache));
            let events: u64 = waiting.map(|(queued, unsent)| queued + unsent).sum();
            // A client that is gone may have left commands that are under way.
            let clients = shared.connections() as u64 + u64::from(shared.buffered() > 0);
            (clients, events + shared.doubtful() as u64)
        })
    }

    fn give_up(&self, why: &str) {
        self.vitals.give_up(why);
        self.stop(EXIT_GAVE_UP);
    }

    fn stop(&self, code: i32) {
        if let Some(parts) = &self.door_parts {
            parts.shared.announcer.say_all_lost();
        }
        self.exit.store(code, SeqCst);
        System::current().stop();
    }
}

/// The receiving half, among the parts that are looked after.
const AGENT: &str = "agent";

/// The front door, likewise.
const FRONT_DOOR: &str = "front door";

fn part_of(flow: &str) -> String {
    format!("flow {flow}")
}

fn say_stalled(whose: &str, stall: &Stall) {
    let Stall {
        actor,
        place,
        inside,
        last,
        work,
        since,
    } = stall;
    tracing::error!(
        of = whose,
        stage = actor,
        place,
        inside = inside.unwrap_or("nothing"),
        last = last.unwrap_or("nothing yet"),
        work,
        ?since,
        "stage has work and does not move, restarting it"
    );
}

impl Actor for RegionSupervisor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        if let Err(error) = self.start_agent() {
            tracing::error!(%error, "agent could not be built");
            self.give_up(&format!("the agent could not be built: {error}"));
            return;
        }
        if let Err(error) = self.start_door() {
            tracing::error!(%error, "front door could not be built");
            self.give_up(&format!("the front door could not be built: {error}"));
            return;
        }
        if let Some(make) = self.make_flows.take() {
            for (parts, address) in make(ctx.address().recipient(), ctx.address().recipient()) {
                let mut flow = Flow {
                    parts,
                    address,
                    running: None,
                    drained: None,
                };
                Self::start_flow(&mut flow, &self.vitals);
                self.flows.push(flow);
            }
        }
        ctx.run_interval(WATCH_EVERY, |act, ctx| act.watch(ctx));
    }
}

impl Handler<FlowFailed> for RegionSupervisor {
    type Result = ();

    fn handle(&mut self, FlowFailed { peer, actor }: FlowFailed, ctx: &mut Self::Context) {
        if let Some(n) = self.flows.iter().position(|flow| flow.parts.view.peer == peer) {
            self.rebuild_flow(n, actor, ctx);
        }
    }
}

impl Handler<FlowDrained> for RegionSupervisor {
    type Result = ();

    fn handle(&mut self, FlowDrained { peer, unfinished }: FlowDrained, _: &mut Self::Context) {
        if let Some(flow) = self.flows.iter_mut().find(|flow| flow.parts.view.peer == peer) {
            flow.drained = Some(unfinished);
        }
    }
}

impl Handler<Terminate> for RegionSupervisor {
    type Result = ();

    fn handle(&mut self, _: Terminate, _: &mut Self::Context) {
        if self.deadline.is_some() {
            let left: u64 = self
                .flows
                .iter()
                .map(|flow| flow.parts.view.accounts.total().0.in_flight_total())
                .sum();
            let lost = self.door_holds().1;
            tracing::warn!(
                events = left,
                lost,
                "second signal, ending at once; the flows' events will be replayed, those of the front door are lost"
            );
            self.stop(if left + lost > 0 { EXIT_WORK_LEFT } else { EXIT_DONE });
            return;
        }
        let grace = self.agent_shared.config.drain.grace_period;
        let deadline = Instant::now() + grace;
        tracing::info!(?grace, "draining");
        self.deadline = Some(deadline);
        self.agent_shared.draining.store(true, SeqCst);
        if let Some(parts) = &self.door_parts {
            parts.shared.drain();
        }
        for flow in &self.flows {
            if let Some((_, supervisor)) = &flow.running {
                supervisor.do_send(DrainFlow { deadline });
            }
        }
    }
}
