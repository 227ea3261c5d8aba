//! A running region as status and metrics see it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::SystemTime;

use tokio::time::Instant;

use crate::admin::{
    AgentStatus, BreakerStatus, CanaryStatus, CertificateStatus, Check, FlowStatus, FrontDoorStatus, KafkaTrouble,
    LinkStatus, MailboxStatus, MassMisses, Outcomes, Readiness, RetentionGap, ServerStatus, SessionStatus, StageStatus,
    StallStatus, Status, StatusSource, WaitingFor,
};
use crate::agent::{AgentShared, ServerState};
use crate::breaker::ShownBreaker;
use crate::canary::PathView;
use crate::config::Config;
use crate::front_door::text::Verb;
use crate::front_door::{DoorShared, UpstreamView};
use crate::handoff::MailboxGauge;
use crate::misses::LIKELY_CAUSES;
use crate::outcome::Outcome;
use crate::relay::{FlowView, Stage, StageTimes, wall_ms};
use crate::telemetry::{Instruments, PathStage};
use crate::vitals::Vitals;

/// How long a gap that retention made fails its check.
const GAP_SHOWS: std::time::Duration = std::time::Duration::from_secs(60 * 60);

/// What is read when somebody asks: nothing here is kept for the asking.
pub struct Region {
    /// The whole configuration.
    pub config: Arc<Config>,
    /// One per peer that events are sent to.
    pub flows: Vec<Arc<FlowView>>,
    /// The receiving half.
    pub agent: Arc<AgentShared>,
    /// Every instrument.
    pub instruments: Arc<Instruments>,
    /// Whether the process works.
    pub vitals: Arc<Vitals>,
    /// The front door, where a cache has one.
    pub door: Option<DoorView>,
}

/// The front door as status sees it.
pub struct DoorView {
    /// What its actors share.
    pub shared: Arc<DoorShared>,
    /// The servers behind it, by cache and number.
    pub upstreams: Vec<Vec<Arc<UpstreamView>>>,
}

impl DoorView {
    fn status(&self) -> Vec<FrontDoorStatus> {
        let doors = self.shared.config.caches.iter().enumerate();
        let doors = doors.filter(|(_, cache)| cache.has_front_door());
        doors
            .map(|(number, cache)| {
                let (counts, events) = (&self.shared.counts[number], self.shared.announcer.counts(number));
                let (queued, unsent) = self.shared.announcer.waiting(number);
                let commands = Verb::ALL.into_iter().zip(&counts.commands);
                let servers = cache.servers.iter().zip(&self.upstreams[number]);
                FrontDoorStatus {
                    cache: cache.name.clone(),
                    connections: counts.connections.load(Relaxed),
                    accepted: counts.accepted.load(Relaxed),
                    commands: commands
                        .map(|(verb, count)| (verb.name().to_owned(), count.load(Relaxed)))
                        .collect(),
                    events: counts.events.load(Relaxed),
                    acknowledged: events.acknowledged.load(Relaxed),
                    remembered: events.remembered.load(Relaxed),
                    lost: events.lost.load(Relaxed),
                    flushes: counts.flushes.load(Relaxed),
                    unreachable: counts.unreachable.load(Relaxed),
                    refused: counts.refused.load(Relaxed),
                    dropped: counts.dropped.load(Relaxed),
                    servers: servers
                        .map(|(server, view)| (server.address.clone(), view.state().to_owned()))
                        .collect(),
                    queued_events: queued,
                    unsent_keys: unsent,
                    kafka_away: self.shared.announcer.is_away(number),
                    refuses: self.shared.refuses(number),
                    buffered_bytes: self.shared.buffered() as u64,
                    full: !self.shared.has_room() || !self.shared.takes_answers(),
                }
            })
            .collect()
    }
}

impl Region {
    fn flow(&self, view: &FlowView) -> FlowStatus {
        // One snapshot: the identity of the accounts holds in every answer.
        let (accounts, offset_lag, paused) = view.accounts.total();
        let now = Instant::now();
        let (retry_partitions, retry_next) = view.retry_waits();
        let links = view.links();
        let open = links.iter().flatten().filter(|link| link.state == "open").count();
        let state = if view.draining.load(Relaxed) {
            "draining"
        } else if open == links.len() {
            "running"
        } else {
            "waiting_for_peer"
        };
        let outcomes: [u64; Outcome::COUNT] = Outcome::ALL.map(|outcome| accounts.ended(outcome));
        let lags = Stage::ALL
            .iter()
            .filter_map(|stage| Some((stage.name().to_owned(), view.lag_seconds(*stage)?)));
        let instruments = self.instruments.flow(&view.name);
        let retention = view.retention();
        FlowStatus {
            peer: self.config.peers[view.peer].region.clone(),
            state: state.to_owned(),
            consumed: accounts.consumed,
            in_flight: accounts.in_flight_total(),
            waiting: accounts.waiting,
            with_permit: accounts.in_flight,
            dirty: accounts.dirty,
            permits: self.config.flow.max_in_flight_events as u64,
            permits_free: view.free_permits().unwrap_or(self.config.flow.max_in_flight_events) as u64,
            in_flight_bytes: view.in_flight_bytes.load(Relaxed),
            in_flight_bytes_limit: self.config.flow.max_in_flight_bytes as u64,
            outcomes: Outcomes::from(outcomes),
            offset_lag: offset_lag.map(|lag| lag as u64),
            commit_age_seconds: (view.accounts.uncommitted_since_ms())
                .map_or(0.0, |since| (wall_ms() - since).max(0) as f64 / 1e3),
            mailboxes: mailboxes(view.mailboxes.all()),
            rebalances: view.rebalances.load(Relaxed),
            lag_seconds: lags.collect(),
            stages: view.stage_times().map(stage).collect(),
            paused_partitions: paused as u64,
            retry_partitions_waiting: retry_partitions as u64,
            retry_next_seconds: retry_next.map(|at| at.saturating_duration_since(now).as_secs_f64()),
            kafka_trouble: view.kafka_trouble().map(|(reason, since)| KafkaTrouble {
                reason,
                since_seconds: (now - since).as_secs_f64(),
            }),
            links: links
                .into_iter()
                .zip(view.away_since())
                .filter_map(|(link, away)| Some((link?, away)))
                .map(|(link, away)| LinkStatus {
                    away_seconds: away.map(|since| (now - since).as_secs_f64()),
                    state: link.state.to_owned(),
                    since_seconds: (now - link.since).as_secs_f64(),
                    attempts: link.attempts,
                    last_error: link.last_error,
                    rtt_ms: link.rtt_us.map(|us| us as f64 / 1e3),
                    clock_offset_ms: link.clock_offset_us.map(|us| us as f64 / 1e3),
                })
                .collect(),
            reconnects: view.reconnects.load(Relaxed),
            breakers: self.breakers(view),
            waiting_for: view
                .waits()
                .into_iter()
                .map(|w| WaitingFor {
                    server: w.server,
                    keys: w.keys as u64,
                    since_seconds: (now - w.since).as_secs_f64(),
                    next: w.next.describe(now),
                })
                .collect(),
            looks_again: instruments.looks_again(),
            mass_misses: view
                .mass_misses()
                .into_iter()
                .map(|(looks, raised)| MassMisses {
                    cache: looks.cache,
                    server: looks.server,
                    looks: raised.worst.looks,
                    missing: raised.worst.missing,
                    since_seconds: (now - raised.since).as_secs_f64(),
                    likely_causes: LIKELY_CAUSES.to_owned(),
                })
                .collect(),
            retention_gaps: retention.gaps,
            retention_gap_events: retention.events,
            last_retention_gap: retention.last.map(|last| RetentionGap {
                topic: last.at.topic,
                partition: last.at.partition,
                from: last.gap.from,
                to: last.gap.to,
                seconds_ago: (now - last.found).as_secs_f64(),
                spans_seconds: last.spans.map(|spans| spans.as_secs_f64()),
            }),
            canaries: view
                .canaries
                .views()
                .into_iter()
                .map(|(cache, path)| self.canary(cache, path, now))
                .collect(),
        }
    }

    /// Of the servers whose caches the peer gets; of several lanes the worst.
    fn breakers(&self, view: &FlowView) -> Vec<BreakerStatus> {
        let names = || {
            let caches = self.config.caches.iter();
            caches.flat_map(|cache| cache.servers.iter().map(move |server| (&cache.name, &server.address)))
        };
        let servers = names().count();
        let sent = &self.config.peers[view.peer].caches;
        let worst = |server| {
            view.breakers()
                .iter()
                .skip(server)
                .step_by(servers)
                .map(ShownBreaker::seen)
                .max()
        };
        names()
            .enumerate()
            .filter(|(_, (cache, _))| sent.contains(*cache))
            .map(|(number, (cache, server))| BreakerStatus {
                cache: cache.clone(),
                server: server.clone(),
                state: worst(number).map_or("closed", |(_, name)| name).to_owned(),
            })
            .collect()
    }

    fn certificates(&self) -> Vec<CertificateStatus> {
        let now = SystemTime::now();
        let left = |until: SystemTime| match until.duration_since(now) {
            Ok(left) => left.as_secs_f64(),
            Err(ago) => -ago.duration().as_secs_f64(),
        };
        let tls = &self.agent.tls;
        let all = [("own", tls.not_after()), ("ca", tls.ca_not_after())];
        let known = all.into_iter().filter_map(|(name, until)| Some((name, until?)));
        known
            .map(|(name, until)| CertificateStatus {
                name: name.to_owned(),
                expires_in_seconds: left(until),
            })
            .collect()
    }

    fn canary(&self, cache: usize, path: PathView, now: Instant) -> CanaryStatus {
        let named = |counts: BTreeMap<&'static str, u64>| {
            let named = counts.into_iter().map(|(reason, count)| (reason.to_owned(), count));
            named.collect()
        };
        CanaryStatus {
            cache: self.config.caches[cache].name.clone(),
            dead: path.dead.is_some(),
            dead_seconds: path
                .dead
                .map(|since| now.saturating_duration_since(since).as_secs_f64()),
            why: path.why,
            expected: path.expected,
            age_seconds: path.age.map(|age| age.as_secs_f64()),
            lag_seconds: path.lag.map(|lag| lag.as_secs_f64()),
            written: path.written,
            failed: named(path.failed),
            arrived: path.arrived,
            lost: named(path.lost),
        }
    }

    fn agent(&self, now: Instant) -> AgentStatus {
        let counts = &self.agent.counts;
        let items = [
            ("applied", &counts.applied),
            ("look_again", &counts.look_again),
            ("later", &counts.later),
            ("expired", &counts.expired),
            ("too_large", &counts.too_large),
        ];
        let sessions = self.agent.session_views().into_iter().map(|session| SessionStatus {
            peer: session.peer,
            remote: session.remote,
            since_seconds: (now - session.since).as_secs_f64(),
            window: session.window,
        });
        let servers = self.agent.servers.iter().map(|server| ServerStatus {
            cache: server.cache.clone(),
            address: server.address.clone(),
            breaker: server.breaker.seen().1.to_owned(),
            away_seconds: server.away_since().map(|since| (now - since).as_secs_f64()),
            state: match server.state() {
                ServerState::Connecting => "connecting",
                ServerState::Answers => "answers",
                ServerState::Away => "away",
            }
            .to_owned(),
        });
        AgentStatus {
            sessions: sessions.collect(),
            applied: counts.applied.load(Relaxed),
            items: items
                .into_iter()
                .map(|(name, count)| (name.to_owned(), count.load(Relaxed)))
                .collect(),
            servers: servers.collect(),
            mailboxes: mailboxes(self.agent.mailboxes.all()),
            listening: self.agent.listening.load(Relaxed),
        }
    }
}

fn mailboxes<const N: usize>(all: [(&'static str, &MailboxGauge); N]) -> BTreeMap<String, MailboxStatus> {
    let status = |(actor, gauge): (&str, &MailboxGauge)| {
        let (depth, fullest) = gauge.depths();
        let status = MailboxStatus {
            depth: depth as u64,
            fullest: fullest as u64,
            high_water: gauge.high_water() as u64,
            capacity: gauge.capacity() as u64,
            senders_waiting: gauge.senders_waiting() as u64,
            waits: gauge.waits(),
            waited_us: gauge.waited().as_micros() as u64,
        };
        (actor.to_owned(), status)
    };
    all.into_iter().map(status).collect()
}

fn together<'a>(all: impl Iterator<Item = &'a BTreeMap<String, MailboxStatus>>) -> BTreeMap<String, MailboxStatus> {
    let mut together = BTreeMap::<String, MailboxStatus>::new();
    for (actor, one) in all.flatten() {
        together.entry(actor.clone()).or_default().add(one);
    }
    together
}

impl StatusSource for Region {
    fn status(&self) -> Status {
        // Long before it is restarted, so that whoever looks sees it.
        let limit = self.config.supervision.stalled_after / 3;
        let flows = self.flows.iter().map(|view| (view.name.as_str(), &view.pulses));
        let door = self.door.as_ref().map(|door| ("front door", &door.shared.pulses));
        let stalls = flows
            .chain([("agent", &self.agent.pulses)])
            .chain(door)
            .filter_map(|(of, pulses)| {
                let stall = pulses.stalled(Instant::now(), limit)?;
                Some(StallStatus {
                    of: of.to_owned(),
                    stage: stall.actor.to_owned(),
                    place: stall.place,
                    work: stall.work,
                    since_seconds: stall.since.as_secs_f64(),
                })
            });
        let flows: Vec<_> = self.flows.iter().map(|view| self.flow(view)).collect();
        let agent = self.agent(Instant::now());
        Status {
            mailboxes: together(flows.iter().map(|flow| &flow.mailboxes).chain([&agent.mailboxes])),
            stalls: stalls.collect(),
            troubles: Vec::new(),
            region: self.config.region.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            flows,
            agent,
            late_outcomes: self.flows.iter().map(|view| view.accounts.late.load(Relaxed)).sum(),
            restarts: self.instruments.restarts(),
            certificates: self.certificates(),
            front_doors: self.door.as_ref().map_or_else(Vec::new, DoorView::status),
        }
    }

    fn alive(&self) -> Vec<Check> {
        self.vitals.checks(Instant::now())
    }

    fn caches(&self) -> Vec<String> {
        self.config.caches.iter().map(|cache| cache.name.clone()).collect()
    }

    fn ready(&self) -> Readiness {
        let mut checks = Vec::new();
        let listening = self.agent.listening.load(Relaxed);
        checks.push(check(
            "agent",
            listening,
            true,
            format!("listening on {}", self.config.agent.listen),
        ));
        let answers = self
            .agent
            .servers
            .iter()
            .filter(|s| s.state() == ServerState::Answers)
            .count();
        let servers = self.agent.servers.len();
        checks.push(check(
            "memcached",
            answers > 0,
            true,
            format!("{answers} of {servers} servers answer"),
        ));
        checks.push(check(
            "staying",
            !self.agent.draining.load(Relaxed),
            true,
            String::new(),
        ));
        for server in &self.agent.servers {
            let ok = server.state() == ServerState::Answers;
            let detail = if ok { "answers" } else { "does not answer, retrying" };
            checks.push(check(
                &format!("memcached {}", server.address),
                ok,
                false,
                detail.to_owned(),
            ));
        }
        for view in &self.flows {
            let peer = &self.config.peers[view.peer].region;
            for link in view.links().into_iter().flatten() {
                let ok = link.state == "open";
                let detail = link.last_error.unwrap_or_else(|| link.state.to_owned());
                let detail = if ok { "session open".to_owned() } else { detail };
                checks.push(check(&format!("peer {peer}"), ok, false, detail));
            }
            let kafka = view.kafka_trouble().map(|(trouble, _)| trouble);
            let ok = kafka.is_none();
            let detail = kafka.unwrap_or_else(|| "answers".to_owned());
            checks.push(check(&format!("kafka {}", view.name), ok, false, detail));
            checks.push(retention_check(view));
            for (cache, path) in view.canaries.views() {
                let name = format!("path {} {}", view.name, self.config.caches[cache].name);
                checks.push(check(&name, path.dead.is_none(), false, path.why));
            }
        }
        Readiness::of(checks)
    }
}

fn stage((stage, times): (PathStage, &StageTimes)) -> (String, StageStatus) {
    let seconds = |us: &AtomicU64| us.load(Relaxed) as f64 / 1e6;
    let status = StageStatus {
        seconds_total: seconds(&times.total_us),
        count: times.count.load(Relaxed),
        last_seconds: seconds(&times.last_us),
    };
    (stage.name().to_owned(), status)
}

/// Failed for an hour after the last gap: long enough to be seen, and nothing mends it.
fn retention_check(view: &FlowView) -> Check {
    let last = view.retention().last.filter(|last| last.found.elapsed() < GAP_SHOWS);
    let detail = match &last {
        None => "nothing was removed before it was taken".to_owned(),
        Some(last) => format!(
            "{} events of {}[{}] were removed by retention before they were taken; lengthen it",
            last.gap.events(),
            last.at.topic,
            last.at.partition
        ),
    };
    check(&format!("retention {}", view.name), last.is_none(), false, detail)
}

fn check(name: &str, ok: bool, gates: bool, detail: String) -> Check {
    Check {
        name: name.to_owned(),
        ok,
        gates,
        detail,
    }
}
