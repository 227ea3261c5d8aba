//! A running region as status and metrics see it.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use tokio::time::Instant;

use crate::admin::{AgentStatus, Check, FlowStatus, LinkStatus, Readiness, SessionStatus, Status, StatusSource, Waiting};
use crate::agent::{AgentShared, ServerState};
use crate::config::Config;
use crate::handoff::Mailboxes;
use crate::outcome::Outcome;
use crate::relay::{FlowView, Stage};

/// What is read when somebody asks: nothing here is kept for the asking.
pub struct Region {
    /// The whole configuration.
    pub config: Arc<Config>,
    /// One per peer that events are sent to.
    pub flows: Vec<Arc<FlowView>>,
    /// The receiving half.
    pub agent: Arc<AgentShared>,
    /// Depths of the mailboxes, by kind of actor.
    pub mailboxes: Arc<Mailboxes>,
}

impl Region {
    fn flow(&self, view: &FlowView) -> FlowStatus {
        // One snapshot: the identity of the accounts holds in every answer.
        let (accounts, offset_lag, paused) = view.accounts.total();
        let now = Instant::now();
        let links = view.links();
        let open = links.iter().flatten().filter(|link| link.state == "open").count();
        let state = if view.draining.load(Relaxed) {
            "draining"
        } else if open == links.len() {
            "running"
        } else {
            "waiting_for_peer"
        };
        let link = links.into_iter().flatten().min_by_key(|link| link.state == "open");
        FlowStatus {
            peer: self.config.peers[view.peer].region.clone(),
            state: state.to_owned(),
            consumed: accounts.consumed,
            in_flight: accounts.in_flight_total(),
            waiting: accounts.waiting,
            with_permit: accounts.in_flight,
            dirty: accounts.dirty,
            outcomes: Outcome::ALL.iter().map(|o| (o.name().to_owned(), accounts.ended(*o))).collect(),
            offset_lag: offset_lag.max(0) as u64,
            lag_seconds: Stage::ALL.iter().map(|s| (s.name().to_owned(), view.lag_seconds(*s))).collect(),
            in_flight_bytes: view.in_flight_bytes.load(Relaxed),
            paused_partitions: paused,
            late_outcomes: view.accounts.late.load(Relaxed),
            reconnects: view.reconnects.load(Relaxed),
            link: link.map(|link| LinkStatus {
                state: link.state.to_owned(),
                since_seconds: (now - link.since).as_secs_f64(),
                attempts: link.attempts,
                last_error: link.last_error,
                rtt_ms: link.rtt_us.map(|us| us as f64 / 1e3),
                clock_offset_ms: link.clock_offset_us.map(|us| us as f64 / 1e3),
            }),
            waiting_for: view
                .waits()
                .into_iter()
                .map(|w| Waiting { server: w.server, keys: w.keys as u64, since_seconds: (now - w.since).as_secs_f64() })
                .collect(),
        }
    }
}

impl StatusSource for Region {
    fn status(&self) -> Status {
        let now = Instant::now();
        let counts = &self.agent.counts;
        Status {
            region: self.config.region.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            flows: self.flows.iter().map(|view| self.flow(view)).collect(),
            agent: AgentStatus {
                sessions: self
                    .agent
                    .session_views()
                    .into_iter()
                    .map(|s| SessionStatus {
                        peer: s.peer,
                        remote: s.remote,
                        since_seconds: (now - s.since).as_secs_f64(),
                        window_bytes: s.window,
                    })
                    .collect(),
                applied: counts.applied.load(Relaxed),
                look_again: counts.look_again.load(Relaxed),
                later: counts.later.load(Relaxed),
                expired: counts.expired.load(Relaxed),
                too_large: counts.too_large.load(Relaxed),
            },
        }
    }

    fn ready(&self) -> Readiness {
        let mut checks = Vec::new();
        let listening = self.agent.listening.load(Relaxed);
        checks.push(Check::gate("agent", listening, format!("listening on {}", self.config.agent.listen)));
        let answers = self.agent.servers.iter().filter(|s| s.state() == ServerState::Answers).count();
        let servers = self.agent.servers.len();
        let ready = self.agent.can_take_batches() && !self.agent.draining.load(Relaxed);
        checks.push(Check::gate("memcached", answers > 0, format!("{answers} of {servers} servers answer")));
        for server in &self.agent.servers {
            let ok = server.state() == ServerState::Answers;
            let detail = if ok { "answers" } else { "does not answer, retrying" };
            checks.push(Check::info(&format!("memcached {}", server.address), ok, detail.to_owned()));
        }
        for view in &self.flows {
            let peer = &self.config.peers[view.peer].region;
            for link in view.links().into_iter().flatten() {
                let ok = link.state == "open";
                let detail = link.last_error.unwrap_or_else(|| link.state.to_owned());
                checks.push(Check::info(&format!("peer {peer}"), ok, if ok { "session open".to_owned() } else { detail }));
            }
            let kafka = view.kafka_trouble();
            let ok = kafka.is_none();
            checks.push(Check::info(&format!("kafka {}", view.name), ok, kafka.unwrap_or_else(|| "answers".to_owned())));
        }
        let degraded = checks.iter().any(|check| !check.ok);
        Readiness { ready, degraded, checks }
    }
}
