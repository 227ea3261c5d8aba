//! What `evrepl top` shows, worked out of two looks at `/status`. Pure: no clock, no terminal.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::admin::{AgentStatus, FlowStatus, LinkStatus, MailboxStatus, Status};
use crate::cli::status::{canary_text, in_words, seconds};

/// The stages of an event's path in its order, and the mailbox on this side whose time is in them.
const PATH: [(&str, Option<&str>); 8] = [
    ("kafka", Some(CONSUMER)),
    ("queue", Some("cache_reader")),
    ("wait", None),
    ("look", None),
    ("coalesce", Some("batch_coalescer")),
    ("link", Some("remote_link")),
    ("agent_queue", None),
    ("apply", None),
];

/// Nobody waits in front of it: its partition is paused instead.
const CONSUMER: &str = "partition_consumer";

/// The first stage that may be what an actor waits for in front of whose mailbox senders wait.
const BEHIND: [(&str, &str); 4] = [
    (CONSUMER, "queue"),
    ("cache_reader", "look"),
    ("batch_coalescer", "coalesce"),
    ("remote_link", "link"),
];

/// Senders that wait for a larger share of the time than this are held up; less is the difference in pace of neighbours.
const WAITS_SHARE: f64 = 0.05;

/// A stage that takes less is not worth a word while nobody waits for it: a round trip around half the world takes longer.
const SHORT: Duration = Duration::from_millis(100);

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
    /// What canaries say of each cache's path, and whether it lives.
    pub canaries: Vec<(String, bool)>,
}

/// One stage of a flow's path.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StageView {
    pub name: &'static str,
    /// The mean time of an event since the last look, or what the last one took when none has passed.
    pub seconds: Option<f64>,
    /// Events have passed since the last look.
    pub fresh: bool,
    /// What is said of it.
    pub mark: Mark,
    pub mailbox: Option<MailboxView>,
}

/// Whether a stage is the one to look at, by the rule of docs/tuning.md.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mark {
    /// It is not, or all is fast.
    #[default]
    None,
    /// It is the longest, and that may be as it should.
    Longest,
    /// What is in front of it waits for it, or it takes as long as the configuration calls slow.
    Slow,
}

/// What waits in front of actors of one kind.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MailboxView {
    pub actor: &'static str,
    /// Messages in the fullest one.
    pub fullest: u64,
    pub capacity: u64,
    pub high_water: u64,
    /// Whoever sends into it is held up.
    pub holds_up: bool,
}

type Mailboxes = BTreeMap<String, MailboxStatus>;

impl MailboxView {
    fn of(actor: &'static str, all: &Mailboxes, before: Option<(&Mailboxes, Duration)>) -> Option<MailboxView> {
        let now = all.get(actor)?;
        let holds_up = match before {
            Some((before, time)) => {
                let earlier = before.get(actor).copied().unwrap_or_default();
                let waited = per_second(earlier.waited_us, now.waited_us, time) / 1e6;
                waited > WAITS_SHARE || (earlier.senders_waiting > 0 && now.senders_waiting > 0)
            }
            None => now.senders_waiting > 0,
        };
        Some(MailboxView {
            actor,
            fullest: now.fullest,
            capacity: now.capacity,
            high_water: now.high_water,
            holds_up,
        })
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
    /// `now`, and how it differs from a look so long before, if there was one; `slow` is what the configuration calls so.
    pub fn of(now: &Status, before: Option<(&Status, Duration)>, slow: Duration) -> View {
        let flows = now.flows.iter().map(|flow| {
            let earlier = before.and_then(|(before, time)| {
                let earlier = before.flows.iter().find(|one| one.peer == flow.peer)?;
                // A process that was started anew in between counts from zero again.
                (earlier.consumed <= flow.consumed).then_some((earlier, time))
            });
            FlowView::of(&now.region, flow, earlier, slow)
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
    fn of(region: &str, flow: &FlowStatus, before: Option<(&FlowStatus, Duration)>, slow: Duration) -> FlowView {
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
            name: format!("{region}->{}", flow.peer),
            running: flow.state == "running",
            state: flow.state.clone(),
            rate: before.map_or(0.0, |(earlier, time)| per_second(earlier.consumed, flow.consumed, time)),
            lag: flow.lag_seconds.get("acked").copied().filter(|_| open),
            offset_lag: flow.offset_lag,
            in_flight: flow.in_flight,
            dirty: flow.dirty,
            stages: stages(flow, before),
            outcomes: outcomes.collect(),
            links: flow.links.iter().enumerate().map(link).collect(),
            waits: waits.collect(),
            canaries: flow.canaries.iter().map(|one| (canary_text(one), !one.dead)).collect(),
        };
        mark(flow, &mut view.stages, slow);
        view
    }
}

fn stages(flow: &FlowStatus, before: Option<(&FlowStatus, Duration)>) -> Vec<StageView> {
    let none = BTreeMap::new();
    let earlier = before.map_or(&none, |(before, _)| &before.stages);
    let mailboxes_before = before.map(|(before, time)| (&before.mailboxes, time));
    let stage = |(name, actor): (&'static str, Option<&'static str>)| {
        let now = flow.stages.get(name).copied().unwrap_or_default();
        let then = earlier.get(name).copied().unwrap_or_default();
        let passed = now.count.saturating_sub(then.count);
        let fresh = before.is_some() && passed > 0;
        let seconds = match fresh {
            true => Some((now.seconds_total - then.seconds_total).max(0.0) / passed as f64),
            false => (now.count > 0).then_some(now.last_seconds),
        };
        let mut mailbox = actor.and_then(|actor| MailboxView::of(actor, &flow.mailboxes, mailboxes_before));
        if let Some(consumer) = mailbox.as_mut().filter(|mailbox| mailbox.actor == CONSUMER) {
            consumer.holds_up = flow.paused_partitions > 0;
        }
        StageView {
            name,
            seconds,
            fresh,
            mark: Mark::None,
            mailbox,
        }
    };
    PATH.into_iter().map(stage).collect()
}

/// Chunks get no permits, or readers no bytes, before something that is in flight has ended.
fn in_flight_is_full(flow: &FlowStatus) -> bool {
    // A quarter of all permits is kept for dirty keys.
    let permits = flow.permits > 0 && flow.permits_free <= flow.permits / 4;
    permits || (flow.in_flight_bytes_limit > 0 && flow.in_flight_bytes >= flow.in_flight_bytes_limit)
}

/// Marks the stage to look at: the longest behind the last place of the path that takes nothing more, for what is in front of
/// that waits only because of it; the longest of all where every place takes what comes.
fn mark(flow: &FlowStatus, stages: &mut [StageView], slow: Duration) {
    let held_up = stages.iter().filter_map(|stage| stage.mailbox.as_ref());
    let held_up = held_up.filter(|mailbox| mailbox.holds_up).map(|mailbox| mailbox.actor);
    let behind = BEHIND
        .into_iter()
        .filter(|(actor, _)| held_up.clone().any(|one| one == *actor));
    let behind = behind
        .map(|(_, stage)| stage)
        .chain(in_flight_is_full(flow).then_some("look"));
    let last = behind
        .filter_map(|name| PATH.iter().position(|(stage, _)| *stage == name))
        .max();
    let seconds = |stage: &StageView| stage.seconds.unwrap_or(0.0);
    // Dirty keys wait for a server, whatever else is full.
    let candidates = stages.iter_mut().enumerate().filter(|(at, stage)| {
        stage.fresh && seconds(stage) > 0.0 && (last.is_none_or(|last| *at >= last) || stage.name == "wait")
    });
    let longest = candidates.max_by(|(_, one), (_, other)| seconds(one).total_cmp(&seconds(other)));
    if let Some((_, longest)) = longest {
        longest.mark = match seconds(longest) {
            _ if last.is_some() => Mark::Slow,
            long if long >= slow.as_secs_f64() => Mark::Slow,
            long if long >= SHORT.as_secs_f64() => Mark::Longest,
            _ => Mark::None,
        };
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
        let mailboxes_before = before.map(|(before, time)| (&before.agent.mailboxes, time));
        let mailboxes = AGENT_MAILBOXES
            .into_iter()
            .filter_map(|actor| MailboxView::of(actor, &status.agent.mailboxes, mailboxes_before));
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
            mailboxes: mailboxes.collect(),
            sessions: sessions.collect(),
            servers: servers.collect(),
        }
    }
}

/// Of a count that may have begun anew in between.
fn per_second(before: u64, now: u64, time: Duration) -> f64 {
    now.saturating_sub(before) as f64 / time.as_secs_f64().max(0.001)
}
