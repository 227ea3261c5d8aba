//! What is wrong, in plain words, since when, and what happens next: read out of a [`Status`], so that `/status`,
//! `evrepl status` and `evrepl top` say the same. Nothing is said of what lasts for a moment only.

use serde::{Deserialize, Serialize};

use super::{Check, FlowStatus, ServerStatus, Status};
use crate::tls::EXPIRES_SOON;

/// What is over sooner is no trouble: a key that is looked at again, a session that is just being opened.
const MOMENT_SECONDS: f64 = 1.0;

/// How long a gap that retention made is spoken of; nothing mends it.
const GAP_SHOWS_SECONDS: f64 = 3600.0;

/// One thing that is wrong.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Trouble {
    /// What it is.
    pub what: String,
    /// For how long, if it is known.
    pub since_seconds: Option<f64>,
    /// What evrepl does about it, or what has to be done.
    pub next: String,
}

/// Everything that is wrong, the worst first.
pub fn of(status: &Status, alive: &[Check]) -> Vec<Trouble> {
    let mut all = Vec::new();
    for check in alive.iter().filter(|check| !check.ok) {
        let what = format!("this process does not work: {} {}", check.name, check.detail);
        all.push(trouble(what, None, "it has to be restarted"));
    }
    for stall in &status.stalls {
        let what = format!(
            "{} ({}) of {} has {} to do and does not move",
            stall.stage, stall.place, stall.of, stall.work
        );
        all.push(trouble(
            what,
            Some(stall.since_seconds),
            "it is restarted when that lasts",
        ));
    }
    for flow in &status.flows {
        retention(flow, &mut all);
        let away = peer_away(flow, &mut all);
        if !away {
            dead_paths(flow, &mut all);
        }
        kafka(flow, &mut all);
        far_servers(flow, &status.agent.servers, &mut all);
        misses(flow, &mut all);
        if flow.paused_partitions > 0 && !away {
            let what = format!("{} partitions to {} are paused", flow.paused_partitions, flow.peer);
            let next = "a limit is reached: they go on when what is in flight has arrived; Kafka holds the rest";
            all.push(trouble(what, None, next));
        }
    }
    front_doors(status, &mut all);
    own_servers(status, &mut all);
    if !status.agent.listening {
        let what = "the agent does not listen".to_owned();
        all.push(trouble(
            what,
            None,
            "no peer can bring anything here; it tries again, the log has the reason",
        ));
    }
    for certificate in &status.certificates {
        let left = certificate.expires_in_seconds;
        if left < EXPIRES_SOON.as_secs_f64() {
            let days = (left / 86_400.0).floor();
            let what = match left > 0.0 {
                true => format!(
                    "the certificate {} expires within {} days",
                    certificate.name,
                    days + 1.0
                ),
                false => format!("the certificate {} has expired", certificate.name),
            };
            all.push(trouble(
                what,
                None,
                "replace it and restart, or no session begins any more",
            ));
        }
    }
    all
}

fn front_doors(status: &Status, all: &mut Vec<Trouble>) {
    for door in status.front_doors.iter().filter(|door| door.kafka_away) {
        let what = format!(
            "kafka takes no events of the front door of {}: {} wait, {} keys are remembered; writes {}",
            door.cache,
            door.queued_events,
            door.unsent_keys,
            if door.refuses {
                "are refused with SERVER_ERROR"
            } else {
                "succeed, and are only here"
            }
        );
        let next = "do not stop this process: it produces them when kafka is back; beyond front_door.max_unsent_keys they are lost";
        all.push(trouble(what, None, next));
    }
    if status.front_doors.iter().any(|door| door.full) {
        let what = "clients of the front door wait to be read: as many bytes are held for clients as may be";
        let next = "look for clients that do not read their answers, or allow more (front_door.max_buffered_bytes)";
        all.push(trouble(what.to_owned(), None, next));
    }
    for door in status.front_doors.iter().filter(|door| door.lost > 0) {
        let what = format!("{} events of the front door of {} are lost", door.lost, door.cache);
        let next = "peers do not hear of these writes, and which they were is recorded nowhere: let the keys expire, or write again what was written meanwhile";
        all.push(trouble(what, None, next));
    }
}

fn trouble(what: String, since_seconds: Option<f64>, next: impl Into<String>) -> Trouble {
    Trouble {
        what,
        since_seconds,
        next: next.into(),
    }
}

fn peer_away(flow: &FlowStatus, all: &mut Vec<Trouble>) -> bool {
    let away: Vec<_> = flow
        .links
        .iter()
        .filter_map(|link| Some((link, link.away_seconds?)))
        .collect();
    let Some((link, since)) = away.iter().max_by(|one, other| one.1.total_cmp(&other.1)) else {
        return false;
    };
    if *since < MOMENT_SECONDS || flow.state == "draining" {
        return false;
    }
    let why = link.last_error.as_deref().unwrap_or("no answer yet");
    let (away, lanes) = (away.len(), flow.links.len());
    let what = match away == lanes {
        true => format!("peer {} is away: {why}", flow.peer),
        false => format!("peer {} has no session in {away} of {lanes} lanes: {why}", flow.peer),
    };
    let waits = match flow.offset_lag {
        Some(lag) if lag > 0 => format!("{lag} events wait in Kafka"),
        _ => "events wait in Kafka".to_owned(),
    };
    all.push(trouble(
        what,
        Some(*since),
        format!("{waits}, it is dialled without end"),
    ));
    true
}

fn dead_paths(flow: &FlowStatus, all: &mut Vec<Trouble>) {
    for canary in flow.canaries.iter().filter(|canary| canary.dead) {
        let what = format!(
            "writes of cache {} do not arrive in {}: {}",
            canary.cache, flow.peer, canary.why
        );
        let next = "events wait where they are; canaries go on and tell when it is over";
        all.push(trouble(what, canary.dead_seconds, next));
    }
}

fn kafka(flow: &FlowStatus, all: &mut Vec<Trouble>) {
    if let Some(trouble_) = &flow.kafka_trouble {
        let what = format!("Kafka cannot be read for {}: {}", flow.peer, trouble_.reason);
        let next = "polling goes on; nothing is lost while Kafka keeps it";
        all.push(trouble(what, Some(trouble_.since_seconds), next));
    }
}

/// Keys that wait for memcached servers of the peer; those of this region are told once for all flows.
fn far_servers(flow: &FlowStatus, own: &[ServerStatus], all: &mut Vec<Trouble>) {
    for wait in &flow.waiting_for {
        let elsewhere = wait.server != flow.peer && own.iter().all(|server| server.address != wait.server);
        if elsewhere && wait.since_seconds >= MOMENT_SECONDS {
            // The agent names its servers with its region, and what no server answers for in words.
            let fails = if let Some(what) = wait.server.strip_prefix(&format!("{} to accept ", flow.peer)) {
                format!("{} does not accept {what}", flow.peer)
            } else if wait.server.ends_with(&format!(" at {}", flow.peer)) {
                format!("memcached {} takes no writes", wait.server)
            } else {
                format!("memcached {} at {} takes no writes", wait.server, flow.peer)
            };
            let what = format!("{fails}: {} keys wait", wait.keys);
            all.push(trouble(what, Some(wait.since_seconds), wait.next.clone()));
        }
    }
}

fn own_servers(status: &Status, all: &mut Vec<Trouble>) {
    for server in &status.agent.servers {
        let waits = || {
            let flows = status.flows.iter();
            flows.flat_map(|flow| flow.waiting_for.iter().filter(|wait| wait.server == server.address))
        };
        let since = waits().map(|wait| wait.since_seconds).chain(server.away_seconds);
        let since = since.fold(None, |longest: Option<f64>, one| {
            Some(longest.map_or(one, |it| it.max(one)))
        });
        let reads_fail = status.flows.iter().any(|flow| {
            let its =
                |breaker: &&super::BreakerStatus| breaker.server == server.address && breaker.cache == server.cache;
            flow.breakers
                .iter()
                .filter(its)
                .any(|breaker| breaker.state != "closed")
        });
        let writes_fail = server.state != "answers";
        if !(reads_fail || writes_fail) || since.is_some_and(|since| since < MOMENT_SECONDS) {
            continue;
        }
        let how = match (reads_fail, writes_fail) {
            (true, true) => "does not answer",
            (true, false) => "does not answer looks",
            _ => "takes no writes",
        };
        let what = format!("memcached {} of cache {} {how}", server.address, server.cache);
        let keys: u64 = waits().map(|wait| wait.keys).sum();
        let waiting = waits().next().map(|wait| format!("{keys} keys wait, {}; ", wait.next));
        let next = format!("{}it is probed until it answers", waiting.unwrap_or_default());
        all.push(trouble(what, since, next));
    }
}

fn misses(flow: &FlowStatus, all: &mut Vec<Trouble>) {
    for one in &flow.mass_misses {
        let what = format!(
            "{} of {} keys that were set are missing in memcached {} of cache {}: {}",
            one.missing, one.looks, one.server, one.cache, one.likely_causes
        );
        let next = format!(
            "their copies in {} are removed; see `evrepl check --connect`",
            flow.peer
        );
        all.push(trouble(what, Some(one.since_seconds), next));
    }
}

fn retention(flow: &FlowStatus, all: &mut Vec<Trouble>) {
    let Some(gap) = flow
        .last_retention_gap
        .as_ref()
        .filter(|gap| gap.seconds_ago < GAP_SHOWS_SECONDS)
    else {
        return;
    };
    let what = format!(
        "Kafka removed {} events of {}[{}] before {} had them",
        gap.to.saturating_sub(gap.from),
        gap.topic,
        gap.partition,
        flow.peer
    );
    let next = "write those keys again and lengthen the topic's retention";
    all.push(trouble(what, Some(gap.seconds_ago), next));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::{
        AgentStatus, BreakerStatus, CanaryStatus, CertificateStatus, KafkaTrouble, LinkStatus, MassMisses,
        RetentionGap, StallStatus, WaitingFor,
    };

    fn link(state: &str, away: Option<f64>) -> LinkStatus {
        LinkStatus {
            state: state.to_owned(),
            away_seconds: away,
            last_error: Some("connection refused".to_owned()),
            ..LinkStatus::default()
        }
    }

    fn server(address: &str, state: &str, away: Option<f64>) -> ServerStatus {
        ServerStatus {
            address: address.to_owned(),
            cache: "c".to_owned(),
            state: state.to_owned(),
            away_seconds: away,
            ..ServerStatus::default()
        }
    }

    fn wait(server: &str, keys: u64, since_seconds: f64) -> WaitingFor {
        WaitingFor {
            server: server.to_owned(),
            keys,
            since_seconds,
            next: "probe in 0.5 s".to_owned(),
        }
    }

    /// All is well.
    fn well() -> Status {
        Status {
            flows: vec![FlowStatus {
                peer: "eu".to_owned(),
                state: "running".to_owned(),
                offset_lag: Some(9),
                links: vec![link("open", None)],
                ..FlowStatus::default()
            }],
            agent: AgentStatus {
                listening: true,
                servers: vec![server("own:1", "answers", None)],
                ..AgentStatus::default()
            },
            certificates: vec![CertificateStatus {
                name: "own".to_owned(),
                expires_in_seconds: 90.0 * 86_400.0,
            }],
            ..Status::default()
        }
    }

    fn said(status: &Status) -> Vec<String> {
        let all = of(status, &[]).into_iter();
        all.map(|one| match one.since_seconds {
            Some(since) => format!("{} [{since}] {}", one.what, one.next),
            None => format!("{} {}", one.what, one.next),
        })
        .collect()
    }

    #[test]
    fn a_region_that_works_has_none_and_moments_are_none() {
        assert_eq!(said(&well()), [""; 0]);
        let mut status = well();
        status.flows[0].links = vec![link("dialling", Some(0.5))];
        status.flows[0].waiting_for = vec![wait("far:1", 3, 0.2), wait("own:1", 3, 0.2)];
        status.agent.servers = vec![server("own:1", "connecting", Some(0.1))];
        assert_eq!(said(&status), [""; 0]);
    }

    #[test]
    fn a_peer_that_is_away_is_told_once_with_what_follows_from_it() {
        let mut status = well();
        let flow = &mut status.flows[0];
        flow.links = vec![link("waiting", Some(61.0))];
        flow.waiting_for = vec![wait("eu", 5, 60.0)];
        flow.paused_partitions = 2;
        let away = "peer eu is away: connection refused [61] 9 events wait in Kafka, it is dialled without end";
        assert_eq!(said(&status), [away]);
        status.flows[0].links.push(link("open", None));
        assert!(said(&status)[0].starts_with("peer eu has no session in 1 of 2 lanes: connection refused [61]"));
    }

    #[test]
    fn a_memcached_is_told_once_whoever_misses_it() {
        let mut status = well();
        status.agent.servers = vec![server("own:1", "away", Some(30.0))];
        let mut flow = status.flows[0].clone();
        flow.breakers = vec![BreakerStatus {
            cache: "c".to_owned(),
            server: "own:1".to_owned(),
            state: "open".to_owned(),
        }];
        flow.waiting_for = vec![wait("own:1", 3, 31.0)];
        status.flows = vec![flow.clone(), flow];
        let both = "memcached own:1 of cache c does not answer [31] 6 keys wait, probe in 0.5 s; it is probed until it answers";
        assert_eq!(said(&status), [both]);
        status.agent.servers = vec![server("own:1", "answers", None)];
        assert!(said(&status)[0].starts_with("memcached own:1 of cache c does not answer looks [31]"));
        let mut status = well();
        // The names that agents give their servers, and what readers wait for themselves.
        for (server, what) in [
            ("far:1 at eu", "memcached far:1 at eu takes no writes"),
            ("far:1", "memcached far:1 at eu takes no writes"),
            ("eu to accept cache c", "eu does not accept cache c"),
        ] {
            status.flows[0].waiting_for = vec![wait(server, 3, 4.0)];
            assert_eq!(said(&status), [format!("{what}: 3 keys wait [4] probe in 0.5 s")]);
        }
    }

    #[test]
    fn a_certificate_is_spoken_of_two_weeks_before_it_expires() {
        let mut status = well();
        let hour = 3600.0;
        status.certificates[0].expires_in_seconds = EXPIRES_SOON.as_secs_f64() + hour;
        assert_eq!(said(&status), Vec::<String>::new());
        status.certificates[0].expires_in_seconds -= 2.0 * hour;
        assert!(said(&status)[0].starts_with("the certificate own expires within 14 days"));
    }

    #[test]
    fn everything_else_that_is_wrong_is_said_the_worst_first() {
        let mut status = well();
        status.stalls = vec![StallStatus {
            of: "us->eu".to_owned(),
            stage: "remote_link".to_owned(),
            place: "lane 0".to_owned(),
            work: 3,
            since_seconds: 12.0,
        }];
        status.agent.listening = false;
        status.certificates[0].expires_in_seconds = 86_400.0 * 1.5;
        let flow = &mut status.flows[0];
        flow.paused_partitions = 2;
        flow.canaries = vec![CanaryStatus {
            cache: "c".to_owned(),
            dead: true,
            dead_seconds: Some(6.0),
            why: "none for 6 s".to_owned(),
            ..CanaryStatus::default()
        }];
        flow.kafka_trouble = Some(KafkaTrouble {
            reason: "no broker".to_owned(),
            since_seconds: 3.0,
        });
        flow.mass_misses = vec![MassMisses {
            cache: "c".to_owned(),
            server: "own:1".to_owned(),
            looks: 200,
            missing: 150,
            since_seconds: 8.0,
            likely_causes: "evictions".to_owned(),
        }];
        flow.last_retention_gap = Some(RetentionGap {
            topic: "t".to_owned(),
            partition: 3,
            from: 10,
            to: 30,
            seconds_ago: 60.0,
            ..RetentionGap::default()
        });
        let dead = Check {
            name: "root thread".to_owned(),
            ok: false,
            gates: true,
            detail: "has not turned for 30 s".to_owned(),
        };
        let what: Vec<String> = of(&status, &[dead]).into_iter().map(|one| one.what).collect();
        assert_eq!(
            what,
            [
                "this process does not work: root thread has not turned for 30 s",
                "remote_link (lane 0) of us->eu has 3 to do and does not move",
                "Kafka removed 20 events of t[3] before eu had them",
                "writes of cache c do not arrive in eu: none for 6 s",
                "Kafka cannot be read for eu: no broker",
                "150 of 200 keys that were set are missing in memcached own:1 of cache c: evictions",
                "2 partitions to eu are paused",
                "the agent does not listen",
                "the certificate own expires within 2 days",
            ]
        );
        // It is history some time.
        status.flows[0].last_retention_gap.as_mut().unwrap().seconds_ago = 3_601.0;
        assert!(said(&status).iter().all(|one| !one.contains("Kafka removed")));
    }
}
