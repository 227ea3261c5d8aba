//! What is on the screen, drawn to a buffer.

use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::style::Color;

use super::draw::{Around, draw};
use super::model::{Mark, View};
use crate::admin::{
    AgentStatus, CanaryStatus, FlowStatus, LinkStatus, MailboxStatus, ServerStatus, SessionStatus, StageStatus, Status,
    Trouble, WaitingFor,
};
use crate::outcome::Outcome;

const SECOND: Duration = Duration::from_secs(1);

fn stage(name: &str, seconds_total: f64, count: u64) -> (String, StageStatus) {
    let status = StageStatus {
        seconds_total,
        count,
        last_seconds: seconds_total / count as f64,
    };
    (name.to_owned(), status)
}

fn mailbox(actor: &str, fullest: u64, capacity: u64, high_water: u64) -> (String, MailboxStatus) {
    let status = MailboxStatus {
        depth: 3 * fullest,
        fullest,
        capacity,
        high_water,
        ..MailboxStatus::default()
    };
    (actor.to_owned(), status)
}

/// A region that has carried so many thousand events, each of which took so many milliseconds on the link.
fn status(thousands: u64, link_ms: f64) -> Status {
    let count = thousands * 1000;
    let events = count as f64;
    let mut flow = FlowStatus {
        peer: "eu".to_owned(),
        state: "running".to_owned(),
        consumed: count,
        in_flight: 6,
        offset_lag: Some(9),
        lag_seconds: [("acked".to_owned(), 0.25)].into(),
        stages: [
            stage("kafka", 0.002 * events, count),
            stage("queue", 0.0005 * events, count),
            stage("link", link_ms / 1e3 * events, count),
        ]
        .into(),
        mailboxes: [
            mailbox("partition_consumer", 1, 4, 3),
            mailbox("cache_reader", 4, 4, 4),
            mailbox("batch_coalescer", 1, 8, 8),
            mailbox("remote_link", 1, 16, 9),
        ]
        .into(),
        permits: 1000,
        permits_free: 900,
        links: vec![LinkStatus {
            state: "open".to_owned(),
            since_seconds: 61.0,
            rtt_ms: Some(70.5),
            ..LinkStatus::default()
        }],
        ..FlowStatus::default()
    };
    flow.outcomes[Outcome::Applied] = count - 100 * thousands;
    flow.outcomes[Outcome::Superseded] = 100 * thousands;
    Status {
        region: "us".to_owned(),
        version: "0.1.0".to_owned(),
        flows: vec![flow],
        agent: AgentStatus {
            listening: true,
            items: [("applied".to_owned(), 500 * thousands)].into(),
            sessions: vec![SessionStatus {
                peer: "eu".to_owned(),
                remote: "10.1.0.9:4000".to_owned(),
                since_seconds: 5.0,
                window: 1,
            }],
            servers: vec![ServerStatus {
                address: "10.0.0.1:11211".to_owned(),
                state: "answers".to_owned(),
                ..ServerStatus::default()
            }],
            mailboxes: [mailbox("cache_writer", 0, 16, 2)].into(),
            ..AgentStatus::default()
        },
        ..Status::default()
    }
}

fn viewed(now: &Status, before: Option<(&Status, Duration)>) -> View {
    View::of(now, before, SECOND)
}

fn around() -> Around {
    Around {
        every: SECOND,
        ..Around::default()
    }
}

fn terminal(view: &View, around: &Around, width: u16, height: u16) -> (Terminal<TestBackend>, u16) {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    let mut hidden = 0;
    terminal.draw(|frame| hidden = draw(frame, view, around)).unwrap();
    (terminal, hidden)
}

/// The lines on a screen of this size, without what is blank at their ends.
fn drawn(view: &View, around: &Around, width: u16, height: u16) -> Vec<String> {
    let (terminal, _) = terminal(view, around, width, height);
    let buffer = terminal.backend().buffer();
    let rows = buffer.content.chunks(usize::from(width));
    rows.map(|row| {
        row.iter()
            .map(|cell| cell.symbol())
            .collect::<String>()
            .trim_end()
            .to_owned()
    })
    .collect()
}

/// The colour of the first letter of `text` on the screen.
fn colour_of(text: &str, view: &View) -> Color {
    let (terminal, _) = terminal(view, &around(), 110, 40);
    let buffer = terminal.backend().buffer();
    let (row, line) = drawn(view, &around(), 110, 40)
        .into_iter()
        .enumerate()
        .find(|(_, line)| line.contains(text))
        .unwrap_or_else(|| panic!("no {text}"));
    let column = line[..line.find(text).unwrap()].chars().count();
    buffer[(column as u16, row as u16)].fg
}

#[test]
fn a_region_at_work_shows_what_each_stage_takes() {
    let (before, now) = (status(1, 1.0), status(3, 1.0));
    let view = viewed(&now, Some((&before, SECOND * 2)));
    let lines = drawn(&view, &around(), 104, 22);
    let expected = [
        "evrepl 0.1.0  us  every 1s  q quits, arrows scroll",
        "",
        "us->eu  running  1000/s  lag 250.0 ms  offset lag 9  in flight 6  dirty 0",
        "  kafka           2.0 ms █████████████████████████████████ partition_consumer 1/4 (most 3)",
        "  queue           500 µs ████████▎                         cache_reader 4/4 (most 4)",
        "  wait                 -",
        "  look                 -",
        "  coalesce             -                                   batch_coalescer 1/8 (most 8)",
        "  link            1.0 ms ████████████████▌                 remote_link 1/16 (most 9)",
        "  agent_queue          -",
        "  apply                -",
        "  outcomes/s  applied 900  superseded 100",
        "  link 0: open since 1m 1s, round trip 70.5 ms",
        "",
        "agent  listening  cache_writer 0/16 (most 2)",
        "  items/s  applied 500",
        "  session eu from 10.1.0.9:4000 since 5s",
        "  memcached 10.0.0.1:11211 answers",
        "",
        "",
        "",
        "",
    ];
    assert_eq!(lines, expected, "{}", lines.join("\n"));
}

/// The stage that is marked, and how, after a second in which each event took so many seconds more in these stages, and in
/// which `full` happened to the flow.
fn marked(took: &[(&str, f64)], full: impl FnOnce(&mut FlowStatus)) -> Option<(&'static str, Mark)> {
    let before = status(1, 1.0);
    let mut now = status(2, 1.0);
    for (name, seconds) in took {
        let stage = now.flows[0]
            .stages
            .entry((*name).to_owned())
            .or_insert_with(|| StageStatus {
                count: 1000,
                ..StageStatus::default()
            });
        // Slow since the last look only: the mean of all that ever passed would hide it.
        stage.seconds_total += seconds * 1000.0;
    }
    full(&mut now.flows[0]);
    let view = viewed(&now, Some((&before, SECOND)));
    let mut marked = view.flows[0].stages.iter().filter(|stage| stage.mark != Mark::None);
    let first = marked.next().map(|stage| (stage.name, stage.mark));
    assert_eq!(marked.next(), None, "one at most");
    first
}

#[test]
fn a_stage_is_called_slow_when_it_is_and_nothing_is_marked_while_all_is_fast() {
    assert_eq!(marked(&[], |_| ()), None, "the longest takes 2 ms");
    assert_eq!(
        marked(&[("link", 0.15)], |_| ()),
        Some(("link", Mark::Longest)),
        "a distance is no fault"
    );
    assert_eq!(marked(&[("link", 1.5)], |_| ()), Some(("link", Mark::Slow)));
    // A key that waited is marked as such, whatever else is full.
    assert_eq!(
        marked(&[("wait", 35.0)], |flow| flow.permits_free = 250),
        Some(("wait", Mark::Slow))
    );
}

#[test]
fn what_waits_in_front_of_a_full_place_is_not_called_slow_but_what_is_behind_it() {
    let long = [
        ("kafka", 30.0),
        ("queue", 2.0),
        ("look", 0.2),
        ("coalesce", 0.1),
        ("link", 0.05),
    ];
    assert_eq!(marked(&long, |_| ()), Some(("kafka", Mark::Slow)), "nothing is full");
    let holds_up =
        |actor: &'static str| move |flow: &mut FlowStatus| flow.mailboxes.get_mut(actor).unwrap().waited_us += 900_000;
    for (actor, stage) in [
        ("cache_reader", "look"),
        ("batch_coalescer", "coalesce"),
        ("remote_link", "link"),
    ] {
        assert_eq!(marked(&long, holds_up(actor)), Some((stage, Mark::Slow)), "{actor}");
    }
    let both = |flow: &mut FlowStatus| {
        holds_up("cache_reader")(flow);
        holds_up("remote_link")(flow);
    };
    assert_eq!(marked(&long, both), Some(("link", Mark::Slow)), "the last one");
    assert_eq!(
        marked(&long, |flow| flow.paused_partitions = 1),
        Some(("queue", Mark::Slow))
    );
    // A quarter of all permits is kept for dirty keys: chunks get none although some are free.
    assert_eq!(
        marked(&long, |flow| flow.permits_free = 250),
        Some(("look", Mark::Slow))
    );
    assert_eq!(
        marked(&long, |flow| flow.permits_free = 251),
        Some(("kafka", Mark::Slow))
    );
    let bytes = |flow: &mut FlowStatus| (flow.in_flight_bytes, flow.in_flight_bytes_limit) = (64, 64);
    assert_eq!(marked(&long, bytes), Some(("look", Mark::Slow)));
}

#[test]
fn a_mailbox_is_red_when_somebody_waits_for_room_not_when_it_is_full() {
    let before = status(1, 1.0);
    let mut now = status(2, 1.0);
    now.flows[0].stages.get_mut("link").unwrap().seconds_total += 1500.0;
    let quiet = viewed(&now, Some((&before, SECOND)));
    assert_eq!(colour_of("1.5 s", &quiet), Color::Red);
    assert_eq!(colour_of("2.0 ms", &quiet), Color::Green);
    assert_eq!(
        colour_of("cache_reader 4/4", &quiet),
        Color::Reset,
        "full, and nobody waits"
    );
    // For some hundredths of the time is how neighbours go.
    now.flows[0].mailboxes.get_mut("cache_reader").unwrap().waited_us += 40_000;
    now.flows[0].mailboxes.get_mut("remote_link").unwrap().waited_us += 60_000;
    now.agent.mailboxes.get_mut("cache_writer").unwrap().waited_us += 60_000;
    let waits = viewed(&now, Some((&before, SECOND)));
    assert_eq!(colour_of("cache_reader 4/4", &waits), Color::Reset);
    assert_eq!(colour_of("remote_link 1/16", &waits), Color::Red);
    assert_eq!(colour_of("cache_writer 0/16", &waits), Color::Red);
    // Who waits all the time has not waited yet, as waits are counted.
    now.flows[0].mailboxes.get_mut("cache_reader").unwrap().senders_waiting = 1;
    assert_eq!(
        colour_of("cache_reader 4/4", &viewed(&now, Some((&now.clone(), SECOND)))),
        Color::Red
    );
}

#[test]
fn a_stage_that_nothing_passes_shows_what_the_last_event_took_and_is_not_called_slow() {
    let view = viewed(&status(1, 1.0), Some((&status(1, 1.0), SECOND)));
    assert!(
        view.flows[0]
            .stages
            .iter()
            .all(|stage| !stage.fresh && stage.mark == Mark::None)
    );
    assert_eq!(view.flows[0].stages[0].seconds, Some(0.002));
    // So is the first look of all, and one at a process that was started anew.
    let first = viewed(&status(1, 1.0), None);
    assert_eq!(first.flows[0].rate, 0.0);
    let anew = viewed(&status(1, 1.0), Some((&status(9, 1.0), SECOND)));
    assert_eq!((anew.flows[0].rate, anew.flows[0].outcomes.len()), (0.0, 0));
}

#[test]
fn a_broken_system_says_what_is_wrong_before_everything_else() {
    let before = status(1, 1.0);
    let mut now = status(1, 1.0);
    now.troubles = vec![Trouble {
        what: "peer eu is away: connection refused".to_owned(),
        since_seconds: Some(61.0),
        next: "9 events wait in Kafka, it is dialled without end".to_owned(),
    }];
    let flow = &mut now.flows[0];
    flow.state = "waiting_for_peer".to_owned();
    flow.links[0] = LinkStatus {
        state: "dialling".to_owned(),
        away_seconds: Some(61.0),
        last_error: Some("connection refused".to_owned()),
        ..LinkStatus::default()
    };
    flow.waiting_for = vec![WaitingFor {
        server: "eu".to_owned(),
        keys: 3,
        since_seconds: 61.0,
        next: "look again when the peer is back".to_owned(),
    }];
    flow.canaries = vec![CanaryStatus {
        cache: "sessions".to_owned(),
        dead: true,
        dead_seconds: Some(61.0),
        why: "none for 66 s".to_owned(),
        ..CanaryStatus::default()
    }];
    now.agent.servers[0].state = "away".to_owned();
    now.agent.servers[0].away_seconds = Some(7.0);
    now.restarts = [("remote_link".to_owned(), 3)].into();
    let view = viewed(&now, Some((&before, SECOND)));
    let lines = drawn(&view, &around(), 70, 30);
    let shows = |text: &str| {
        assert!(
            lines.iter().any(|line| line == text),
            "no {text} in\n{}",
            lines.join("\n")
        )
    };
    assert_eq!(
        lines[1..3],
        [
            "! peer eu is away: connection refused, for 1m 1s; 9 events wait in",
            "  Kafka, it is dialled without end",
        ]
    );
    shows("us->eu  waiting_for_peer  0/s  lag -  offset lag 9  in flight 6  dirty");
    shows("  link 0: dialling since 0s, no session for 1m 1s: connection refused");
    shows("  canary sessions: the path is dead for 1m 1s: none for 66 s");
    shows("  waits: 3 keys for eu since 1m 1s: look again when the peer is back");
    shows("  memcached 10.0.0.1:11211 away for 7s");
    shows("restarts  remote_link 3 +3");
    assert_eq!(colour_of("waiting_for_peer", &view), Color::Red);
    assert_eq!(colour_of("! peer eu", &view), Color::Red);
}

#[test]
fn a_region_that_does_not_answer_is_shown_as_such_with_what_was_seen_last() {
    let silent = |old| Around {
        silent: Some(("no evrepl answers at 127.0.0.1:1".to_owned(), old)),
        ..around()
    };
    let lines = drawn(&View::default(), &silent(Duration::ZERO), 60, 5);
    let expected = [
        "evrepl  every 1s  q quits, arrows scroll",
        "! no evrepl answers at 127.0.0.1:1",
        "  asked again and again",
        "",
        "",
    ];
    assert_eq!(lines, expected);
    let view = viewed(&status(1, 1.0), None);
    let lines = drawn(&view, &silent(SECOND * 9), 60, 30);
    assert_eq!(lines[2], "  asked again and again, what is shown is 9s old");
    assert!(lines.iter().any(|line| line.starts_with("us->eu  running")));
}

#[test]
fn it_fits_on_any_terminal_and_what_is_below_can_be_scrolled_to() {
    let view = viewed(&status(2, 1.0), Some((&status(1, 1.0), SECOND)));
    for (width, height) in [(1, 1), (2, 9), (20, 3), (500, 200)] {
        drawn(&view, &around(), width, height);
    }
    let (_, hidden) = terminal(&view, &around(), 80, 4);
    assert_eq!(hidden, 14);
    let scrolled = Around {
        scrolled: 1000,
        ..around()
    };
    assert_eq!(
        drawn(&view, &scrolled, 80, 3)[1..],
        [
            "  session eu from 10.1.0.9:4000 since 5s",
            "  memcached 10.0.0.1:11211 answers"
        ]
    );
}
