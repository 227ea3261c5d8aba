//! What `evrepl top` shows, worked out of two looks at `/status`. Pure: no clock, no terminal.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::admin::{AgentStatus, FlowStatus, LinkStatus, MailboxStatus, Status};
use crate::cli::status::{in_words, seconds};

/// The stages of an event's path in its order, and the mailbox that fills up when one is too slow, if it is on this side.
const PATH: [(&str, Option<&str>); 8] = [
    ("kafka", Some("partition_consumer")),
    ("queue", Some("cache_reader")),
    ("wait", None),
    ("look", None),
    ("coalesce", Some("batch_coalescer")),
    ("link", Some("remote_link")),
    ("agent_queue", None),
    ("apply", None),
];

/// The mailboxes of the receiving half.
const AGENT_MAILBOXES: [&str; 2] = ["agent_session", "cache_writer"];

/// Everything on the screen.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    pub title: String,
    pub troubles: Vec<String>,
    pub flows: Vec<FlowView>,
    pub agent: AgentView,
    /// Kind of actor, how often since the process began, how often since the last look.
    pub restarts: Vec<(String, u64, u64)>,
}

/// One flow.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FlowView {
    pub name: String,
    pub running: bool,
    pub state: String,
    /// Events taken in a second.
    pub rate: f64,
    pub lag: Option<f64>,
    pub offset_lag: Option<u64>,
    pub in_flight: u64,
    pub dirty: u64,
    pub stages: Vec<StageView>,
    /// Outcomes in a second, those that there were.
    pub outcomes: Vec<(String, f64)>,
    pub links: Vec<LinkView>,
    pub waits: Vec<String>,
}

/// One stage of a flow's path.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StageView {
    pub name: &'static str,
    /// The mean time of an event since the last look, or what the last one took when none has passed.
    pub seconds: Option<f64>,
    /// Events have passed since the last look.
    pub fresh: bool,
    /// It takes longer than every other.
    pub slowest: bool,
    pub mailbox: Option<MailboxView>,
}

/// What waits in front of actors of one kind, all flows together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MailboxView {
    pub actor: &'static str,
    pub depth: u64,
    pub capacity: u64,
    pub high_water: u64,
}

impl MailboxView {
    fn of(status: &Status, actor: &'static str) -> Option<MailboxView> {
        let MailboxStatus {
            depth,
            capacity,
            high_water,
            ..
        } = *status.mailboxes.get(actor)?;
        Some(MailboxView {
            actor,
            depth,
            capacity,
            high_water,
        })
    }

    /// Whoever sends into it waits, or soon will.
    pub fn full(&self) -> bool {
        self.capacity > 0 && self.depth >= self.capacity
    }
}

/// One link.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LinkView {
    pub open: bool,
    pub text: String,
}

/// The receiving half.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AgentView {
    pub listening: bool,
    /// Items in a second by how they were answered, those that there were.
    pub items: Vec<(String, f64)>,
    pub mailboxes: Vec<MailboxView>,
    pub sessions: Vec<String>,
    /// Address and state, and whether it answers.
    pub servers: Vec<(String, bool)>,
}

impl View {
    /// `now`, and how it differs from a look so long before, if there was one.
    pub fn of(now: &Status, before: Option<(&Status, Duration)>) -> View {
        let flows = now.flows.iter().map(|flow| {
            let earlier = before.and_then(|(before, time)| {
                let earlier = before.flows.iter().find(|one| one.peer == flow.peer)?;
                // A process that was started anew in between counts from zero again.
                (earlier.consumed <= flow.consumed).then_some((earlier, time))
            });
            FlowView::of(now, flow, earlier)
        });
        let restarts = now.restarts.iter().map(|(actor, count)| {
            let earlier = before.map(|(before, _)| before.restarts.get(actor).copied().unwrap_or(0));
            (actor.clone(), *count, count.saturating_sub(earlier.unwrap_or(*count)))
        });
        View {
            title: format!("evrepl {}  {}", now.version, now.region),
            troubles: now.troubles.iter().map(in_words).collect(),
            flows: flows.collect(),
            agent: AgentView::of(now, before),
            restarts: restarts.filter(|(_, count, _)| *count > 0).collect(),
        }
    }
}

impl FlowView {
    fn of(status: &Status, flow: &FlowStatus, before: Option<(&FlowStatus, Duration)>) -> FlowView {
        let outcomes = flow.outcomes.iter().filter_map(|(outcome, count)| {
            let (earlier, time) = before?;
            let rate = per_second(earlier.outcomes[outcome], count, time);
            (rate > 0.0).then(|| (outcome.name().to_owned(), rate))
        });
        let open = flow.links.iter().any(|link| link.state == "open");
        let waits = flow.waiting_for.iter().map(|wait| {
            let since = seconds(wait.since_seconds);
            format!("{} keys for {} since {since}: {}", wait.keys, wait.server, wait.next)
        });
        let mut view = FlowView {
            name: format!("{}->{}", status.region, flow.peer),
            running: flow.state == "running",
            state: flow.state.clone(),
            rate: before.map_or(0.0, |(earlier, time)| per_second(earlier.consumed, flow.consumed, time)),
            lag: flow.lag_seconds.get("acked").copied().filter(|_| open),
            offset_lag: flow.offset_lag,
            in_flight: flow.in_flight,
            dirty: flow.dirty,
            stages: stages(status, flow, before.map(|(earlier, _)| earlier)),
            outcomes: outcomes.collect(),
            links: flow.links.iter().enumerate().map(link).collect(),
            waits: waits.collect(),
        };
        mark_slowest(&mut view.stages);
        view
    }
}

fn stages(status: &Status, flow: &FlowStatus, before: Option<&FlowStatus>) -> Vec<StageView> {
    let none = BTreeMap::new();
    let earlier = before.map_or(&none, |before| &before.stages);
    let stage = |(name, mailbox): (&'static str, Option<&'static str>)| {
        let now = flow.stages.get(name).copied().unwrap_or_default();
        let then = earlier.get(name).copied().unwrap_or_default();
        let passed = now.count.saturating_sub(then.count);
        let fresh = before.is_some() && passed > 0;
        let seconds = match fresh {
            true => Some((now.seconds_total - then.seconds_total).max(0.0) / passed as f64),
            false => (now.count > 0).then_some(now.last_seconds),
        };
        StageView {
            name,
            seconds,
            fresh,
            slowest: false,
            mailbox: mailbox.and_then(|actor| MailboxView::of(status, actor)),
        }
    };
    PATH.into_iter().map(stage).collect()
}

fn mark_slowest(stages: &mut [StageView]) {
    let fresh = stages
        .iter_mut()
        .filter(|stage| stage.fresh && stage.seconds > Some(0.0));
    if let Some(slowest) =
        fresh.max_by(|one, other| one.seconds.unwrap_or(0.0).total_cmp(&other.seconds.unwrap_or(0.0)))
    {
        slowest.slowest = true;
    }
}

fn link((lane, link): (usize, &LinkStatus)) -> LinkView {
    let open = link.state == "open";
    let mut text = format!("link {lane}: {} since {}", link.state, seconds(link.since_seconds));
    if let Some(rtt) = link.rtt_ms.filter(|_| open) {
        text.push_str(&format!(", round trip {rtt:.1} ms"));
    }
    if let Some(away) = link.away_seconds {
        text.push_str(&format!(", no session for {}", seconds(away)));
    }
    if let Some(error) = link.last_error.as_ref().filter(|_| !open) {
        text.push_str(&format!(": {error}"));
    }
    LinkView { open, text }
}

impl AgentView {
    fn of(status: &Status, before: Option<(&Status, Duration)>) -> AgentView {
        let AgentStatus {
            items,
            sessions,
            servers,
            listening,
            ..
        } = &status.agent;
        let rates = items.iter().filter_map(|(name, count)| {
            let (before, time) = before?;
            let earlier = before.agent.items.get(name).copied().unwrap_or(0);
            let rate = per_second(earlier, *count, time);
            (rate > 0.0).then(|| (name.clone(), rate))
        });
        let sessions = sessions.iter().map(|session| {
            let since = seconds(session.since_seconds);
            format!("{} from {} since {since}", session.peer, session.remote)
        });
        let servers = servers.iter().map(|server| {
            let away = server.away_seconds.map(|away| format!(" for {}", seconds(away)));
            let text = format!("{} {}{}", server.address, server.state, away.unwrap_or_default());
            (text, server.state == "answers")
        });
        AgentView {
            listening: *listening,
            items: rates.collect(),
            mailboxes: AGENT_MAILBOXES
                .iter()
                .filter_map(|actor| MailboxView::of(status, actor))
                .collect(),
            sessions: sessions.collect(),
            servers: servers.collect(),
        }
    }
}

/// Of a count that may have begun anew in between.
fn per_second(before: u64, now: u64, time: Duration) -> f64 {
    now.saturating_sub(before) as f64 / time.as_secs_f64().max(0.001)
}
