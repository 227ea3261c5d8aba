//! `evrepl status`.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use clap::Args;

use super::{CliError, ConfigArg, Done, table};
use crate::admin::{AgentStatus, CanaryStatus, FlowStatus, FrontDoorStatus, LinkStatus, Status, Trouble};
use crate::relay::Stage;

/// For the whole answer: it is made from memory, on a thread that does nothing else.
const ANSWERS_WITHIN: Duration = Duration::from_secs(3);
/// For the connection alone, so that a machine that is not there is told from a process that does not answer.
const CONNECTS_WITHIN: Duration = Duration::from_secs(2);

/// Show how a running evrepl fares
///
/// Asks the evrepl that runs with this configuration, at admin.listen, and shows what is wrong,
/// since when and what happens next; a table of its peers; then for each flow its state, the events
/// consumed, in flight and ended by outcome, its lag, its links and what it waits for; then what
/// the agent receives. Shows this node only: other nodes of the region have their own partitions,
/// and numbers. Exits with 1 when nothing answers.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    config: ConfigArg,
    /// Print the JSON of /status as it is
    #[arg(long)]
    json: bool,
    /// Look twice, so long apart, to show events per second too
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with = "json")]
    over: Option<Duration>,
}

/// Why there is no status. Trying again helps once an evrepl runs there.
#[derive(Debug, thiserror::Error)]
pub(super) enum StatusError {
    #[error("no evrepl answers at {address} (admin.listen): {reason}")]
    NoAnswer { address: String, reason: String },
    #[error("no answer from {address} (admin.listen) within {} s: evrepl hangs or is stopped there", .within.as_secs())]
    Hangs { address: String, within: Duration },
    #[error("what answers at {address} (admin.listen) is not evrepl: {reason}")]
    NotEvrepl { address: String, reason: String },
}

impl StatusError {
    /// What the failure of a request to `address`, which had so long for its answer, means.
    pub(super) fn of(address: &str, error: &ureq::Error, within: Duration) -> StatusError {
        let (address, reason) = (address.to_owned(), error.to_string());
        match error {
            ureq::Error::StatusCode(_) | ureq::Error::Protocol(_) => StatusError::NotEvrepl { address, reason },
            // The system takes connections for a process that is frozen; one that is not there refuses them.
            ureq::Error::Timeout(which) if *which != ureq::Timeout::Connect && *which != ureq::Timeout::Resolve => {
                StatusError::Hangs { address, within }
            }
            _ => StatusError::NoAnswer { address, reason },
        }
    }
}

/// A client of admin interfaces, with these limits.
pub(super) fn admin_agent(limits: impl FnOnce(Limits) -> Limits) -> ureq::Agent {
    // Asked on this machine or in this network: a proxy of the environment is for other things.
    let config = ureq::Agent::config_builder().proxy(None).max_redirects(0);
    limits(config).build().into()
}

type Limits = ureq::config::ConfigBuilder<ureq::typestate::AgentScope>;

impl StatusArgs {
    pub(super) fn execute(self) -> Result<Done, CliError> {
        let config = self.config.load()?;
        let (mut json, status) = fetch(&config.admin.listen)?;
        if self.json {
            if !json.ends_with('\n') {
                json.push('\n');
            }
            return Ok(Done::ok(json));
        }
        let Some(over) = self.over else {
            return Ok(Done::ok(render(&status, None)));
        };
        // Made inside the runtime, which has the clock.
        super::runtime()?.block_on(async { tokio::time::sleep(over).await });
        let (_, later) = fetch(&config.admin.listen)?;
        Ok(Done::ok(render(&later, Some((&status, over)))))
    }
}

/// `GET /status` from whoever listens on `listen`: the answer as it is, and as it is meant. Blocks.
pub(super) fn fetch(listen: &str) -> Result<(String, Status), StatusError> {
    let address = reachable(listen);
    let agent = admin_agent(|config| {
        config
            .timeout_connect(Some(CONNECTS_WITHIN))
            .timeout_global(Some(ANSWERS_WITHIN))
    });
    let answer = agent.get(format!("http://{address}/status")).call();
    let answer = answer.and_then(|mut response| response.body_mut().read_to_string());
    let json = match answer {
        Ok(json) => json,
        Err(error) => return Err(StatusError::of(&address, &error, ANSWERS_WITHIN)),
    };
    match serde_json::from_str::<Status>(&json) {
        // Every field has a default: what has not even a region is some other JSON.
        Ok(status) if !status.region.is_empty() => Ok((json, status)),
        Ok(_) => Err(StatusError::NotEvrepl {
            address,
            reason: "its answer names no region".to_owned(),
        }),
        Err(error) => Err(StatusError::NotEvrepl {
            address,
            reason: error.to_string(),
        }),
    }
}

/// Where to dial what listens on `listen`: every address of this machine is also its loopback address.
pub(super) fn reachable(listen: &str) -> String {
    match listen.parse::<SocketAddr>() {
        Ok(SocketAddr::V4(all)) if all.ip().is_unspecified() => format!("{}:{}", Ipv4Addr::LOCALHOST, all.port()),
        Ok(SocketAddr::V6(all)) if all.ip().is_unspecified() => format!("[{}]:{}", Ipv6Addr::LOCALHOST, all.port()),
        _ => listen.to_owned(),
    }
}

/// With what it was a while ago, if that is known.
fn render(status: &Status, before: Option<(&Status, Duration)>) -> String {
    let wrong = match status.troubles.len() {
        0 => "all is well".to_owned(),
        1 => "one thing is wrong".to_owned(),
        many => format!("{many} things are wrong"),
    };
    let mut out = format!("evrepl {}, region {}: {wrong}\n", status.version, status.region);
    // Writing to a String cannot fail.
    for trouble in &status.troubles {
        let _ = writeln!(out, "! {}", in_words(trouble));
    }
    if !status.flows.is_empty() {
        out.push('\n');
        table(&peer_rows(status, before), &mut out);
    }
    for flow in &status.flows {
        let _ = write!(out, "\nflow {}->{}: {}\n", status.region, flow.peer, flow.state);
        table(&flow_rows(flow), &mut out);
    }
    if status.flows.is_empty() {
        out.push_str("\nno flows: this region only receives\n");
    }
    let listening = if status.agent.listening {
        "listening"
    } else {
        "not listening"
    };
    let _ = write!(out, "\nagent: {listening}\n");
    table(&agent_rows(&status.agent), &mut out);
    for door in &status.front_doors {
        let _ = write!(out, "\nfront door of {}: {} clients\n", door.cache, door.connections);
        table(&door_rows(door), &mut out);
    }
    let restarts = listed(status.restarts.iter().map(|(actor, count)| (actor.as_str(), *count)));
    if !restarts.is_empty() {
        let _ = write!(out, "\nrestarts: {restarts}\n");
    }
    out
}

/// `peer eu-west-1 is away: connection refused, for 12s; events wait in Kafka, it is dialled without end`
pub(super) fn in_words(trouble: &Trouble) -> String {
    let since = trouble.since_seconds.map(|since| format!(", for {}", seconds(since)));
    format!("{}{}; {}", trouble.what, since.unwrap_or_default(), trouble.next)
}

/// A line for each peer, and what the columns are.
fn peer_rows(status: &Status, before: Option<(&Status, Duration)>) -> Vec<[String; 8]> {
    let head = [
        "peer",
        "state",
        "lag",
        "offset lag",
        "in flight",
        "dirty",
        "events/s",
        "waits for",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    for flow in &status.flows {
        let unknown = || "-".to_owned();
        // While no session is open the last lag is of the time before.
        let lag = flow
            .lag_seconds
            .get("acked")
            .filter(|_| flow.links.iter().any(|link| link.state == "open"));
        let rate = before.and_then(|(before, time)| {
            let earlier = before.flows.iter().find(|one| one.peer == flow.peer)?;
            let consumed = flow.consumed.checked_sub(earlier.consumed)?;
            Some(format!("{:.0}", consumed as f64 / time.as_secs_f64().max(0.001)))
        });
        let waits = flow.waiting_for.iter();
        let waits = waits.map(|wait| format!("{} ({} keys, {})", wait.server, wait.keys, wait.next));
        rows.push([
            flow.peer.clone(),
            flow.state.clone(),
            lag.map_or_else(unknown, |lag| format!("{lag:.3} s")),
            flow.offset_lag.map_or_else(unknown, |lag| lag.to_string()),
            flow.in_flight.to_string(),
            flow.dirty.to_string(),
            rate.unwrap_or_else(unknown),
            waits.collect::<Vec<_>>().join(", "),
        ]);
    }
    rows
}

fn row(name: &str, text: String) -> [String; 2] {
    [format!("  {name}"), text]
}

fn flow_rows(flow: &FlowStatus) -> Vec<[String; 2]> {
    let mut rows = vec![
        row("consumed", flow.consumed.to_string()),
        row(
            "in flight",
            format!(
                "{} ({} waiting, {} with permit, {} dirty), {} bytes",
                flow.in_flight, flow.waiting, flow.with_permit, flow.dirty, flow.in_flight_bytes
            ),
        ),
    ];
    let outcomes = listed(flow.outcomes.iter().map(|(outcome, count)| (outcome.name(), count)));
    rows.push(row(
        "outcomes",
        if outcomes.is_empty() {
            "none yet".to_owned()
        } else {
            outcomes
        },
    ));
    let offset_lag = flow
        .offset_lag
        .map_or("not known yet".to_owned(), |lag| format!("{lag} events"));
    rows.push(row("offset lag", offset_lag));
    let stages = Stage::ALL
        .iter()
        .filter_map(|stage| Some((stage.name(), flow.lag_seconds.get(stage.name())?)));
    let lag: Vec<_> = stages
        .map(|(stage, seconds)| format!("{stage} {seconds:.3} s"))
        .collect();
    if !lag.is_empty() {
        rows.push(row("lag", lag.join(", ")));
    }
    if flow.paused_partitions > 0 {
        rows.push(row("paused", format!("{} partitions", flow.paused_partitions)));
    }
    if let Some(trouble) = &flow.kafka_trouble {
        let since = seconds(trouble.since_seconds);
        rows.push(row("kafka", format!("{}, since {since}: polled on", trouble.reason)));
    }
    if let Some(next) = flow.retry_next_seconds {
        let partitions = flow.retry_partitions_waiting;
        let next = format!("{partitions} partitions wait for their time, the next for {next:.1} s");
        rows.push(row("retries", next));
    }
    for (lane, link) in flow.links.iter().enumerate() {
        rows.push(row(&format!("link {lane}"), link_text(link)));
    }
    if flow.reconnects > 0 {
        rows.push(row("reconnects", flow.reconnects.to_string()));
    }
    for canary in &flow.canaries {
        rows.push(row("canary", canary_text(canary)));
    }
    for waiting in &flow.waiting_for {
        let since = seconds(waiting.since_seconds);
        rows.push(row(
            "waiting",
            format!(
                "{} keys for {}, since {since}: {}",
                waiting.keys, waiting.server, waiting.next
            ),
        ));
    }
    for misses in &flow.mass_misses {
        rows.push(row(
            "misses",
            format!(
                "{} of {} keys looked at were missing in {} of cache {}, since {}: {}",
                misses.missing,
                misses.looks,
                misses.server,
                misses.cache,
                seconds(misses.since_seconds),
                misses.likely_causes
            ),
        ));
    }
    if let Some(gap) = &flow.last_retention_gap {
        let spans = gap
            .spans_seconds
            .map_or(String::new(), |spans| format!(", which spans {}", seconds(spans)));
        rows.push(row(
            "retention",
            format!(
                "{} events were removed before they were taken, in {} gaps; the last one {} ago: {}[{}] {} to {}{spans}",
                flow.retention_gap_events,
                flow.retention_gaps,
                seconds(gap.seconds_ago),
                gap.topic,
                gap.partition,
                gap.from,
                gap.to
            ),
        ));
    }
    let looks_again = listed(flow.looks_again.iter().map(|(reason, count)| (reason.as_str(), *count)));
    if !looks_again.is_empty() {
        rows.push(row("looks again", looks_again));
    }
    rows
}

fn door_rows(door: &FrontDoorStatus) -> Vec<[String; 2]> {
    let commands = door.commands.iter().map(|(command, count)| (command.as_str(), *count));
    let mut events = vec![format!(
        "{} made, {} acknowledged by kafka",
        door.events, door.acknowledged
    )];
    for (count, what) in [(door.remembered, "remembered"), (door.lost, "LOST")] {
        if count > 0 {
            events.push(format!("{count} {what}"));
        }
    }
    let mut rows = vec![row("commands", listed(commands)), row("events", events.join(", "))];
    for (count, what) in [
        (door.unreachable, "commands failed, a server could not be reached"),
        (door.refused, "writes refused, kafka is away"),
        (door.flushes, "flush_all, of which peers do not hear"),
        (
            door.dropped,
            "clients disconnected for room that they held and did not use",
        ),
    ] {
        if count > 0 {
            rows.push(row("", format!("{count} {what}")));
        }
    }
    let kafka = if door.kafka_away {
        "takes no events"
    } else {
        "takes events"
    };
    rows.push(row(
        "kafka",
        format!(
            "{kafka}; {} queued, {} keys remembered",
            door.queued_events, door.unsent_keys
        ),
    ));
    let full = if door.full {
        ", as many as may be: clients wait"
    } else {
        ""
    };
    rows.push(row(
        "memory",
        format!("{} bytes held for clients{full}", door.buffered_bytes),
    ));
    for (server, state) in &door.servers {
        rows.push(row(server, state.clone()));
    }
    rows
}

/// `sessions: lag 0.081 s, the last one 1s ago`
pub(super) fn canary_text(canary: &CanaryStatus) -> String {
    let CanaryStatus { cache, why, .. } = canary;
    if canary.dead {
        let since = canary.dead_seconds.map(|since| format!(" for {}", seconds(since)));
        return format!("{cache}: the path is dead{}: {why}", since.unwrap_or_default());
    }
    match (canary.lag_seconds, canary.age_seconds) {
        (Some(lag), Some(age)) => format!("{cache}: lag {lag:.3} s, the last one {} ago", seconds(age)),
        _ => format!("{cache}: {why}"),
    }
}

fn link_text(link: &LinkStatus) -> String {
    let mut text = format!("{} since {}", link.state, seconds(link.since_seconds));
    if let Some(rtt) = link.rtt_ms {
        let _ = write!(text, ", round trip {rtt:.1} ms");
    }
    if let Some(offset) = link.clock_offset_ms {
        let _ = write!(text, ", peer's clock {offset:+.1} ms");
    }
    // What ended the last session, and what it took to begin this one, is of interest only while there is none.
    if link.state == "open" {
        return text;
    }
    match link.attempts {
        0 => {}
        1 => text.push_str(", 1 failed attempt"),
        many => _ = write!(text, ", {many} failed attempts"),
    }
    if let Some(error) = &link.last_error {
        let _ = write!(text, ": {error}");
    }
    text
}

fn agent_rows(agent: &AgentStatus) -> Vec<[String; 2]> {
    let mut rows = vec![row("applied", agent.applied.to_string())];
    let others = agent.items.iter().filter(|(status, _)| *status != "applied");
    let others = listed(others.map(|(status, count)| (status.as_str(), *count)));
    if !others.is_empty() {
        rows.push(row("answered", others));
    }
    for session in &agent.sessions {
        let since = seconds(session.since_seconds);
        rows.push(row(
            "session",
            format!("{} from {}, since {since}", session.peer, session.remote),
        ));
    }
    if agent.sessions.is_empty() {
        rows.push(row("session", "none".to_owned()));
    }
    for server in &agent.servers {
        rows.push(row("memcached", format!("{} {}", server.address, server.state)));
    }
    rows
}

/// Those that are not zero: `applied 40, superseded 2`.
fn listed<'a>(counts: impl Iterator<Item = (&'a str, u64)>) -> String {
    let shown = counts
        .filter(|(_, count)| *count > 0)
        .map(|(name, count)| format!("{name} {count}"));
    shown.collect::<Vec<_>>().join(", ")
}

/// A time that people read: `250ms`, `12s`, `3h 5m`.
pub(super) fn seconds(seconds: f64) -> String {
    // What a peer sends may be anything; a century says enough.
    let bounded = if seconds.is_finite() {
        seconds.clamp(0.0, 3.2e9)
    } else {
        0.0
    };
    let whole = Duration::from_secs_f64(bounded);
    let short = match whole.as_secs() {
        0 => Duration::from_millis(whole.subsec_millis().into()),
        secs @ ..3600 => Duration::from_secs(secs),
        secs => Duration::from_secs(secs / 60 * 60),
    };
    humantime::format_duration(short).to_string()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::admin::{MassMisses, Outcomes, RetentionGap, ServerStatus, SessionStatus, WaitingFor};
    use crate::cli::tests::answering;
    use crate::outcome::Outcome;

    fn status() -> Status {
        let mut outcomes = Outcomes::default();
        outcomes[Outcome::Applied] = 40;
        outcomes[Outcome::Superseded] = 2;
        Status {
            region: "us-east-1".to_owned(),
            version: "0.1.0".to_owned(),
            troubles: vec![Trouble {
                what: "peer eu-west-1 is away: connection refused".to_owned(),
                since_seconds: Some(61.5),
                next: "9 events wait in Kafka".to_owned(),
            }],
            flows: vec![FlowStatus {
                peer: "eu-west-1".to_owned(),
                state: "waiting_for_peer".to_owned(),
                consumed: 48,
                in_flight: 6,
                waiting: 1,
                with_permit: 2,
                dirty: 3,
                in_flight_bytes: 512,
                outcomes,
                offset_lag: Some(9),
                lag_seconds: [("acked".to_owned(), 0.25), ("consumed".to_owned(), 0.01)].into(),
                links: vec![LinkStatus {
                    state: "dialling".to_owned(),
                    since_seconds: 61.9,
                    attempts: 4,
                    last_error: Some("connection refused".to_owned()),
                    ..LinkStatus::default()
                }],
                waiting_for: vec![WaitingFor {
                    server: "10.0.0.5:11211".to_owned(),
                    keys: 3,
                    since_seconds: 0.25,
                    next: "probe in 0.5 s".to_owned(),
                }],
                retention_gaps: 2,
                retention_gap_events: 400,
                last_retention_gap: Some(RetentionGap {
                    topic: "s".to_owned(),
                    partition: 3,
                    from: 1_000,
                    to: 1_300,
                    seconds_ago: 61.0,
                    spans_seconds: Some(7.25),
                }),
                mass_misses: vec![MassMisses {
                    cache: "sessions".to_owned(),
                    server: "10.0.0.1:11211".to_owned(),
                    looks: 200,
                    missing: 150,
                    since_seconds: 3.0,
                    likely_causes: "evictions".to_owned(),
                }],
                canaries: vec![
                    CanaryStatus {
                        cache: "sessions".to_owned(),
                        age_seconds: Some(1.2),
                        lag_seconds: Some(0.081),
                        ..CanaryStatus::default()
                    },
                    CanaryStatus {
                        cache: "pages".to_owned(),
                        dead: true,
                        dead_seconds: Some(61.0),
                        why: "none for 66 s".to_owned(),
                        ..CanaryStatus::default()
                    },
                ],
                ..FlowStatus::default()
            }],
            agent: AgentStatus {
                sessions: vec![SessionStatus {
                    peer: "eu-west-1".to_owned(),
                    remote: "10.1.0.9:40000".to_owned(),
                    since_seconds: 11_130.0,
                    window: 1 << 20,
                }],
                applied: 7,
                items: [
                    ("applied".to_owned(), 7),
                    ("look_again".to_owned(), 1),
                    ("later".to_owned(), 0),
                ]
                .into(),
                servers: vec![ServerStatus {
                    cache: "sessions".to_owned(),
                    breaker: "closed".to_owned(),
                    address: "10.0.0.1:11211".to_owned(),
                    state: "answers".to_owned(),
                    away_seconds: None,
                }],
                listening: true,
                ..AgentStatus::default()
            },
            ..Status::default()
        }
    }

    #[test]
    fn a_status_shows_what_is_not_zero_and_who_waits_for_whom() {
        assert_eq!(
            render(&status(), None),
            "\
evrepl 0.1.0, region us-east-1: one thing is wrong
! peer eu-west-1 is away: connection refused, for 1m 1s; 9 events wait in Kafka

peer       state             lag  offset lag  in flight  dirty  events/s  waits for
eu-west-1  waiting_for_peer  -    9           6          3      -         10.0.0.5:11211 (3 keys, probe in 0.5 s)

flow us-east-1->eu-west-1: waiting_for_peer
  consumed    48
  in flight   6 (1 waiting, 2 with permit, 3 dirty), 512 bytes
  outcomes    applied 40, superseded 2
  offset lag  9 events
  lag         consumed 0.010 s, acked 0.250 s
  link 0      dialling since 1m 1s, 4 failed attempts: connection refused
  canary      sessions: lag 0.081 s, the last one 1s ago
  canary      pages: the path is dead for 1m 1s: none for 66 s
  waiting     3 keys for 10.0.0.5:11211, since 250ms: probe in 0.5 s
  misses      150 of 200 keys looked at were missing in 10.0.0.1:11211 of cache sessions, since 3s: evictions
  retention   400 events were removed before they were taken, in 2 gaps; the last one 1m 1s ago: s[3] 1000 to 1300, which spans 7s

agent: listening
  applied    7
  answered   look_again 1
  session    eu-west-1 from 10.1.0.9:40000, since 3h 5m
  memcached  10.0.0.1:11211 answers
"
        );
    }

    #[test]
    fn a_table_of_peers_comes_first_with_rates_when_they_are_known() {
        let (earlier, mut now) = (status(), status());
        now.troubles.clear();
        now.flows[0].consumed += 500;
        now.flows[0].links[0].state = "open".to_owned();
        let text = render(&now, Some((&earlier, Duration::from_millis(500))));
        let first: Vec<&str> = text.lines().take(4).collect();
        assert_eq!(
            first,
            [
                "evrepl 0.1.0, region us-east-1: all is well",
                "",
                "peer       state             lag      offset lag  in flight  dirty  events/s  waits for",
                "eu-west-1  waiting_for_peer  0.250 s  9           6          3      1000      10.0.0.5:11211 (3 keys, probe in \
                 0.5 s)",
            ]
        );
        // It was started anew in between.
        now.flows[0].consumed = 1;
        assert!(render(&now, Some((&earlier, Duration::from_secs(1)))).contains("  -         10.0.0.5"));
    }

    #[test]
    fn a_status_is_read_back_as_it_was_answered() {
        let json = serde_json::to_string(&status()).unwrap();
        let address = answering(vec![("HTTP/1.1 200 OK", json.clone())]);
        assert_eq!(fetch(&address).unwrap(), (json, status()));
    }

    #[test]
    fn fields_of_a_later_version_do_not_hide_the_rest() {
        let later = r#"{"region":"us-east-1","moods":[1],"flows":[{"peer":"p","outcomes":{"applied":3,"bored":9}}]}"#;
        let (_, status) = fetch(&answering(vec![("HTTP/1.1 200 OK", later.to_owned())])).unwrap();
        assert_eq!(status.flows[0].outcomes[Outcome::Applied], 3);
    }

    #[test]
    fn what_is_no_evrepl_is_said_to_be_none() {
        for (head, body) in [
            ("HTTP/1.1 200 OK", "<html>"),
            ("HTTP/1.1 200 OK", "{}"),
            ("HTTP/1.1 404 Not Found", "{\"region\":\"us-east-1\"}"),
            ("SSH-2.0-OpenSSH_9.2", ""),
        ] {
            let error = fetch(&answering(vec![(head, body.to_owned())])).unwrap_err();
            assert!(matches!(error, StatusError::NotEvrepl { .. }), "{head} {body}: {error}");
        }
    }

    #[test]
    fn when_nothing_answers_the_address_is_named() {
        // Bound and never listened on: connections are refused, and nobody else gets the port.
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        let port = socket.local_addr().unwrap().as_socket().unwrap().port();
        let error = fetch(&format!("0.0.0.0:{port}")).unwrap_err();
        assert!(matches!(error, StatusError::NoAnswer { .. }), "{error}");
        assert!(error.to_string().contains(&format!("127.0.0.1:{port}")), "{error}");
    }

    #[test]
    fn a_process_that_is_frozen_is_told_from_one_that_is_not_there() {
        // The system takes the connection, as it does for a process that is stopped; nobody ever answers.
        let frozen = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = frozen.local_addr().unwrap().to_string();
        assert_eq!(
            fetch(&address).unwrap_err().to_string(),
            format!("no answer from {address} (admin.listen) within 3 s: evrepl hangs or is stopped there")
        );
    }

    #[test]
    fn an_open_link_says_nothing_of_the_attempts_that_it_took() {
        let open = LinkStatus {
            state: "open".to_owned(),
            since_seconds: 8.0,
            attempts: 4,
            rtt_ms: Some(70.25),
            ..LinkStatus::default()
        };
        assert_eq!(link_text(&open), "open since 8s, round trip 70.2 ms");
        let dialling = LinkStatus {
            state: "dialling".to_owned(),
            attempts: 1,
            ..open
        };
        assert_eq!(
            link_text(&dialling),
            "dialling since 8s, round trip 70.2 ms, 1 failed attempt"
        );
    }

    #[test]
    fn a_wildcard_address_is_dialled_at_loopback() {
        assert_eq!(reachable("0.0.0.0:7100"), "127.0.0.1:7100");
        assert_eq!(reachable("[::]:7100"), "[::1]:7100");
        assert_eq!(reachable("10.0.0.1:7100"), "10.0.0.1:7100");
        assert_eq!(reachable("localhost:7100"), "localhost:7100");
    }

    #[test]
    fn absurd_times_are_shown_all_the_same() {
        assert_eq!(seconds(0.0), "0s");
        assert_eq!(seconds(f64::NAN), "0s");
        assert_eq!(seconds(-1.0), "0s");
        assert_eq!(seconds(59.99), "59s");
        assert!(!seconds(f64::MAX).is_empty());
    }
}
