use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use super::*;
use crate::outcome::Outcome;
use crate::telemetry::metrics::{Kind, METRICS, Metric};
use crate::telemetry::{BatchClosed, Instruments, PassedEvent, TelemetryHandle, TelemetryOptions, TraceOptions};

/// Long enough for anything that comes, short enough for a test that hangs.
const LIMIT: Duration = Duration::from_secs(20);

/// A source that tests write to. Each status it gives is one event further, with its sums in order.
#[derive(Default)]
struct Source {
    status: Mutex<Status>,
    ready: Mutex<Readiness>,
    alive: Mutex<Vec<Check>>,
    given: AtomicUsize,
}

impl Source {
    fn with(status: Status, checks: Vec<Check>) -> Arc<Source> {
        let ready = Mutex::new(Readiness::of(checks));
        Arc::new(Source {
            status: Mutex::new(status),
            ready,
            ..Source::default()
        })
    }
}

impl StatusSource for Source {
    fn status(&self) -> Status {
        self.given.fetch_add(1, SeqCst);
        let mut status = self.status.lock().unwrap();
        for flow in &mut status.flows {
            flow.consumed += 1;
            flow.outcomes[Outcome::Applied] += 1;
        }
        status.clone()
    }

    fn alive(&self) -> Vec<Check> {
        self.alive.lock().unwrap().clone()
    }

    fn caches(&self) -> Vec<String> {
        ["sessions", "pages"].map(str::to_owned).into()
    }

    fn ready(&self) -> Readiness {
        self.ready.lock().unwrap().clone()
    }
}

fn check(name: &str, ok: bool, gates: bool, detail: &str) -> Check {
    Check {
        name: name.to_owned(),
        ok,
        gates,
        detail: detail.to_owned(),
    }
}

fn one_flow() -> Status {
    let mut outcomes = Outcomes::default();
    outcomes[Outcome::Applied] = 40;
    outcomes[Outcome::Superseded] = 2;
    Status {
        region: "us-east-1".to_owned(),
        version: "0.1.0".to_owned(),
        flows: vec![FlowStatus {
            peer: "eu-west-1".to_owned(),
            state: "running".to_owned(),
            consumed: 48,
            in_flight: 6,
            waiting: 1,
            with_permit: 2,
            dirty: 3,
            in_flight_bytes: 512,
            outcomes,
            offset_lag: Some(9),
            lag_seconds: [("acked".to_owned(), 0.25)].into(),
            links: vec![LinkStatus {
                state: "open".to_owned(),
                rtt_ms: Some(70.5),
                clock_offset_ms: Some(-250.0),
                ..LinkStatus::default()
            }],
            reconnects: 1,
            permits: 100,
            permits_free: 65,
            in_flight_bytes_limit: 4_096,
            commit_age_seconds: 12.5,
            rebalances: 2,
            breakers: vec![BreakerStatus {
                cache: "sessions".to_owned(),
                server: "10.0.0.1:11211".to_owned(),
                state: "open".to_owned(),
            }],
            waiting_for: vec![WaitingFor {
                server: "10.0.0.5:11211".to_owned(),
                keys: 3,
                since_seconds: 1.5,
                next: "probe under way".to_owned(),
            }],
            retention_gaps: 1,
            retention_gap_events: 300,
            last_retention_gap: Some(RetentionGap {
                topic: "s".to_owned(),
                partition: 2,
                from: 1_000,
                to: 1_300,
                seconds_ago: 2.5,
                spans_seconds: Some(60.0),
            }),
            mass_misses: vec![MassMisses {
                cache: "sessions".to_owned(),
                server: "10.0.0.1:11211".to_owned(),
                looks: 200,
                missing: 150,
                since_seconds: 3.0,
                likely_causes: "evictions".to_owned(),
            }],
            mailboxes: mailbox("cache_reader", 2_500_000),
            canaries: vec![CanaryStatus {
                cache: "sessions".to_owned(),
                age_seconds: Some(0.75),
                written: 5,
                arrived: 4,
                failed: [("kafka".to_owned(), 1)].into(),
                ..CanaryStatus::default()
            }],
            ..FlowStatus::default()
        }],
        agent: AgentStatus {
            sessions: vec![SessionStatus {
                peer: "eu-west-1".to_owned(),
                ..SessionStatus::default()
            }],
            applied: 7,
            items: [("applied".to_owned(), 7), ("look_again".to_owned(), 1)].into(),
            servers: vec![ServerStatus {
                cache: "sessions".to_owned(),
                address: "10.0.0.1:11211".to_owned(),
                state: "answers".to_owned(),
                breaker: "closed".to_owned(),
                away_seconds: None,
            }],
            mailboxes: mailbox("cache_writer", 0),
            ..AgentStatus::default()
        },
        stalls: vec![StallStatus {
            stage: "cache_reader".to_owned(),
            work: 3,
            ..StallStatus::default()
        }],
        late_outcomes: 1,
        front_doors: vec![FrontDoorStatus {
            cache: "sessions".to_owned(),
            commands: [("set".to_owned(), 1)].into(),
            ..FrontDoorStatus::default()
        }],
        certificates: vec![CertificateStatus {
            name: "own".to_owned(),
            expires_in_seconds: -5.5,
        }],
        ..Status::default()
    }
}

fn mailbox(actor: &str, waited_us: u64) -> BTreeMap<String, MailboxStatus> {
    let status = MailboxStatus {
        depth: 12,
        fullest: 2,
        high_water: 3,
        capacity: 4,
        senders_waiting: 1,
        waits: 9,
        waited_us,
    };
    [(actor.to_owned(), status)].into()
}

struct Served {
    telemetry: TelemetryHandle,
    address: String,
}

fn serve_source(source: Arc<Source>) -> Served {
    let options = TelemetryOptions {
        region: "us-east-1".into(),
        node: "relay-1".into(),
        otlp_endpoint: None,
        traces: TraceOptions::default(),
    };
    let mut telemetry = crate::telemetry::start(&options).unwrap();
    telemetry.instruments().register_source(source.clone());
    let address = telemetry.serve_admin("127.0.0.1:0", source).unwrap().to_string();
    Served { telemetry, address }
}

impl Served {
    fn get(&self, path: &str) -> (u16, String) {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(LIMIT))
            .build()
            .into();
        let mut answer = agent.get(format!("http://{}{path}", self.address)).call().unwrap();
        (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap())
    }

    /// The samples of one metric, as text lines.
    fn samples(&self, name: &str) -> Vec<String> {
        let (_, text) = self.get("/metrics");
        let ours = |line: &&str| line.split(['{', ' ']).next() == Some(name);
        text.lines().filter(ours).map(str::to_owned).collect()
    }
}

#[test]
fn a_process_that_is_not_ready_is_alive() {
    let served = serve_source(Source::with(Status::default(), vec![check("agent", false, true, "")]));
    assert_eq!(served.get("/livez"), (200, "ok\n".to_owned()));
    assert_eq!(served.get("/readyz"), (503, "not ready\n".to_owned()));
    assert_eq!(served.get("/nothing").0, 404);
}

#[test]
fn a_process_that_does_not_work_says_why() {
    let source = Source::with(Status::default(), Vec::new());
    let served = serve_source(source.clone());
    *source.alive.lock().unwrap() = vec![
        check("root thread", true, true, "turns"),
        check("agent", true, true, ""),
    ];
    assert_eq!(served.get("/livez"), (200, "ok\n".to_owned()));
    let listed = "ok\n[ok] root thread: turns\n[ok] agent\n";
    assert_eq!(served.get("/livez?verbose"), (200, listed.to_owned()));

    source.alive.lock().unwrap()[0] = check("root thread", false, true, "has not turned for 30 s");
    let why = "not working\n[failed] root thread: has not turned for 30 s\n";
    assert_eq!(served.get("/livez"), (503, why.to_owned()));
    assert_eq!(served.get("/livez?verbose"), (503, format!("{why}[ok] agent\n")));
}

/// The lines of a tap, as they come.
fn tapped(served: &Served, query: &str) -> impl Iterator<Item = String> + use<> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_per_read(Some(LIMIT))
        .build()
        .into();
    let answer = agent
        .get(format!("http://{}/tap?{query}", served.address))
        .call()
        .unwrap();
    let lines = io::BufReader::new(answer.into_body().into_reader());
    io::BufRead::lines(lines).map(Result::unwrap)
}

fn passed(key: &'static str) -> PassedEvent {
    PassedEvent {
        flow: "a->b".to_owned(),
        cache: "sessions".to_owned(),
        key: key.into(),
        op: "set",
        outcome: "applied",
        produced_at_ms: 7,
        total_us: 1_500,
        stages: vec![("look", 600)],
        notes: Vec::new(),
        trace_id: None,
    }
}

#[test]
fn a_tap_shows_what_passes_until_its_reader_goes() {
    let served = serve_source(Source::with(Status::default(), Vec::new()));
    let taps = served.telemetry.instruments().taps();
    let mut lines = tapped(&served, "key=user:1&cache=sessions");
    assert!(taps.active());
    for key in ["user:2", "user:1"] {
        if taps.wants("sessions", key.as_bytes()) {
            taps.say(passed(key));
        }
    }
    let line = lines.find(|line| !line.is_empty()).unwrap();
    let json: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (&json["key"], &json["stages_us"]["look"]),
        (&"user:1".into(), &600.into())
    );
    drop(lines);
    let gone = tokio::time::Instant::now();
    while taps.active() {
        assert!(gone.elapsed() < LIMIT, "its place is never given back");
        std::thread::yield_now();
    }
}

#[test]
fn a_tap_ends_with_the_process_and_does_not_hold_it_up() {
    let served = serve_source(Source::with(Status::default(), Vec::new()));
    let lines = tapped(&served, "ratio=1");
    served.telemetry.shutdown(LIMIT).unwrap();
    assert!(lines.into_iter().all(|line| line.is_empty()));
}

#[test]
fn too_many_taps_and_wrong_ones_are_refused_with_a_reason() {
    let served = serve_source(Source::with(Status::default(), Vec::new()));
    let (code, why) = served.get("/tap?kye=1");
    assert_eq!((code, why.contains("is none of key")), (400, true), "{why}");
    let taps: Vec<_> = (0..crate::telemetry::tap::MOST_SUBSCRIBERS)
        .map(|_| tapped(&served, "ratio=1"))
        .collect();
    let (code, why) = served.get("/tap?ratio=1");
    assert_eq!((code, why.contains("look already")), (429, true), "{why}");
    drop(taps);
}

#[test]
fn a_lost_peer_degrades_but_never_gates() {
    let checks = vec![
        check("agent", true, true, "listening"),
        check("peer eu-west-1", false, false, "dialling"),
    ];
    let source = Source::with(Status::default(), checks);
    let served = serve_source(source.clone());
    assert_eq!(served.get("/readyz"), (200, "degraded\n".to_owned()));
    let listed = "degraded\n[ok] agent: listening\n[failed] peer eu-west-1 (does not gate): dialling\n";
    assert_eq!(served.get("/readyz?verbose"), (200, listed.to_owned()));
    assert_eq!(served.get("/readyz?verbose=1"), (200, listed.to_owned()));

    *source.ready.lock().unwrap() = Readiness::of(vec![check("agent", true, true, "")]);
    assert_eq!(served.get("/readyz?verbose"), (200, "ready\n[ok] agent\n".to_owned()));
}

#[test]
fn the_status_names_every_outcome_and_can_be_read_back() {
    let source = Source::with(one_flow(), Vec::new());
    let served = serve_source(source.clone());
    let (code, body) = served.get("/status");
    assert_eq!(code, 200);

    let json: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(json["region"], "us-east-1");
    assert_eq!(json["version"], "0.1.0");
    let flow = &json["flows"][0];
    for (name, value) in [("consumed", 49), ("in_flight", 6), ("offset_lag", 9)] {
        assert_eq!(flow[name], value, "{name}");
    }
    assert_eq!(
        (&flow["peer"], &flow["state"]),
        (&"eu-west-1".into(), &"running".into())
    );
    assert_eq!(flow["lag_seconds"]["acked"], 0.25);
    assert_eq!(json["agent"]["applied"], 7);
    assert_eq!(json["agent"]["sessions"][0]["peer"], "eu-west-1");
    let named: BTreeSet<&str> = flow["outcomes"]
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(named, Outcome::ALL.into_iter().map(Outcome::name).collect());
    assert_eq!(
        (&flow["outcomes"]["applied"], &flow["outcomes"]["expired"]),
        (&41.into(), &0.into())
    );

    let mut back: Status = serde_json::from_str(&body).unwrap();
    let wrong: Vec<String> = std::mem::take(&mut back.troubles)
        .into_iter()
        .map(|one| one.what)
        .collect();
    assert!(wrong.contains(&"the agent does not listen".to_owned()), "{wrong:?}");
    assert_eq!(back, *source.status.lock().unwrap());
    assert_eq!(
        back.flows[0].consumed,
        back.flows[0].outcomes.sum() + back.flows[0].in_flight
    );
}

#[test]
fn a_status_of_another_version_is_read_as_far_as_it_is_known() {
    let other = r#"{"region":"eu","flows":[{"peer":"us","outcomes":{"applied":3,"vanished":9},"mood":"good"}]}"#;
    let status: Status = serde_json::from_str(other).unwrap();
    assert_eq!(
        (
            status.flows[0].outcomes[Outcome::Applied],
            status.flows[0].outcomes.sum()
        ),
        (3, 3)
    );
    assert_eq!(status.agent, AgentStatus::default());
}

/// Everything that is recorded as it happens, once.
fn record_everything(instruments: &Instruments) {
    instruments.record_stage_lag("us-east-1->eu-west-1", "acked", 0.25);
    instruments
        .flow("us-east-1->eu-west-1")
        .record_stage_seconds("look", 0.1);
    instruments.flow("us-east-1->eu-west-1").batch_closed(BatchClosed {
        trigger: "linger",
        items: 10,
        raw: 12_000,
        wire: 4_000,
    });
    instruments.flow("us-east-1->eu-west-1").canary_acked("sessions", 0.05);
    instruments.count_restart("remote_link");
    instruments.count_look_again("us-east-1->eu-west-1", "session_lost");
    let calls = instruments.memcached("sessions", "10.0.0.1:11211", "look");
    calls.call_answered(Duration::from_millis(3));
}

/// Labels by metric, as a scrape has them.
fn labels_of(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut labels: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, rest) = line.split_at(line.find(['{', ' ']).unwrap());
        let of_histogram = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|end| name.strip_suffix(end));
        let name = of_histogram.filter(|base| text.contains(&format!("# TYPE {base} histogram")));
        let its = labels
            .entry(name.unwrap_or(&line[..line.find(['{', ' ']).unwrap()]).to_owned())
            .or_default();
        if let Some((inside, _)) = rest.strip_prefix('{').and_then(|rest| rest.rsplit_once('}')) {
            let pairs = inside.split("\",").map(|pair| pair.split('=').next().unwrap());
            its.extend(pairs.filter(|label| *label != "le").map(str::to_owned));
        }
    }
    labels
}

#[test]
fn series_have_the_labels_that_are_declared() {
    let seen = served_labels(one_flow());
    for metric in METRICS {
        let declared: BTreeSet<String> = metric.labels.iter().map(|label| (*label).to_owned()).collect();
        assert_eq!(seen.get(metric.name), Some(&declared), "{}", metric.name);
    }
}

fn served_labels(status: Status) -> BTreeMap<String, BTreeSet<String>> {
    let served = serve_source(Source::with(status, Vec::new()));
    record_everything(&served.telemetry.instruments());
    labels_of(&served.get("/metrics").1)
}

#[test]
fn docs_metrics_md_lists_every_metric_and_no_other() {
    let row = |metric: &&Metric| {
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        let (kind, labels) = (metric.kind.name(), labels.join(", "));
        format!(
            "| `{}` | {kind} | `{}` | {labels} | {} |",
            metric.name, metric.unit, metric.tells
        )
    };
    let declared: Vec<String> = METRICS.iter().map(row).collect();
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md")).unwrap_or_default();
    let listed: Vec<&str> = page.lines().filter(|line| line.starts_with("| `evrepl_")).collect();
    let missing: Vec<&String> = declared.iter().filter(|row| !listed.contains(&row.as_str())).collect();
    let unknown: Vec<&&str> = listed
        .iter()
        .filter(|row| declared.iter().all(|known| known != **row))
        .collect();
    assert!(
        missing.is_empty() && unknown.is_empty(),
        "docs/metrics.md lacks the rows\n{missing:#?}\nand has these, which nothing declares:\n{unknown:#?}"
    );
    assert_eq!(listed.len(), declared.len(), "a row stands there twice");
}

#[test]
fn metrics_have_exactly_their_names() {
    let served = serve_source(Source::with(one_flow(), Vec::new()));
    let instruments = served.telemetry.instruments();
    record_everything(&instruments);
    let (code, text) = served.get("/metrics");
    assert_eq!(code, 200);
    let exposed: BTreeSet<(&str, &str)> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
        .collect();
    // Both ways: what is declared is exposed, and nothing else is.
    let declared = METRICS.iter().map(|metric| (metric.name, metric.kind.name()));
    assert_eq!(exposed, declared.collect());

    let flow = r#"flow="us-east-1->eu-west-1""#;
    for line in [
        "evrepl_agent_items_total{status=\"look_again\"} 1".to_owned(),
        "evrepl_agent_sessions 1".to_owned(),
        format!("evrepl_breaker_state{{cache=\"sessions\",{flow},server=\"10.0.0.1:11211\",side=\"relay\"}} 2"),
        "evrepl_breaker_state{cache=\"sessions\",server=\"10.0.0.1:11211\",side=\"agent\"} 0".to_owned(),
        format!("evrepl_batches_total{{{flow},trigger=\"bytes\"}} 0"),
        format!("evrepl_batch_compression_ratio_sum{{{flow}}} 3"),
        format!("evrepl_raw_bytes_total{{{flow}}} 12000"),
        format!("evrepl_wire_bytes_total{{{flow}}} 4000"),
        "evrepl_certificate_expires_seconds{certificate=\"own\"} -5.5".to_owned(),
        format!("evrepl_commit_age_seconds{{{flow}}} 12.5"),
        format!("evrepl_dirty_keys{{{flow},server=\"eu-west-1\"}} 0"),
        "evrepl_info{region=\"us-east-1\",version=\"0.1.0\"} 1".to_owned(),
        format!("evrepl_kafka_rebalances_total{{{flow}}} 2"),
        format!("evrepl_kafka_trouble_seconds{{{flow}}} 0"),
        format!("evrepl_link_rtt_seconds{{{flow}}} 0.0705"),
        format!("evrepl_link_clock_offset_seconds{{{flow}}} -0.25"),
        format!("evrepl_looks_again_total{{{flow},reason=\"later\"}} 0"),
        format!("evrepl_mailbox_wait_seconds_total{{actor=\"cache_reader\",{flow}}} 2.5"),
        "evrepl_memcached_failures_total{cache=\"sessions\",call=\"look\",server=\"10.0.0.1:11211\"} 0".to_owned(),
        "evrepl_memcached_call_seconds_count{cache=\"sessions\",call=\"look\",server=\"10.0.0.1:11211\"} 1".to_owned(),
        format!("evrepl_permits_free{{{flow}}} 65"),
        "evrepl_alive 1".to_owned(),
        "evrepl_ready 1".to_owned(),
        "evrepl_stalled_stages{actor=\"cache_reader\"} 1".to_owned(),
        "evrepl_stalled_stages{actor=\"remote_link\"} 0".to_owned(),
        "evrepl_restarts_total{actor=\"cache_writer\"} 0".to_owned(),
        format!("evrepl_retention_gap_events_total{{{flow}}} 300"),
        format!("evrepl_mass_misses{{cache=\"sessions\",{flow},server=\"10.0.0.1:11211\"}} 1"),
        format!("evrepl_batch_items_bucket{{{flow},le=\"8\"}} 0"),
        format!("evrepl_batch_items_bucket{{{flow},le=\"16\"}} 1"),
        format!("evrepl_batch_bytes_sum{{{flow}}} 4000"),
        format!("evrepl_batches_total{{{flow},trigger=\"linger\"}} 1"),
        format!("evrepl_dirty_keys{{{flow},server=\"10.0.0.5:11211\"}} 3"),
        format!("evrepl_dirty_age_seconds{{{flow},server=\"10.0.0.5:11211\"}} 1.5"),
        format!("evrepl_dirty_age_seconds{{{flow},server=\"eu-west-1\"}} 0"),
        format!("evrepl_events_consumed_total{{{flow}}} 49"),
        format!("evrepl_events_in_flight{{{flow},hold=\"with_permit\"}} 2"),
        format!("evrepl_events_total{{{flow},outcome=\"applied\"}} 41"),
        format!("evrepl_events_total{{{flow},outcome=\"too_large\"}} 0"),
        format!("evrepl_in_flight_bytes{{{flow}}} 512"),
        "evrepl_late_outcomes_total 1".to_owned(),
        format!("evrepl_link_reconnects_total{{{flow}}} 1"),
        format!("evrepl_link_state{{{flow}}} 3"),
        format!("evrepl_looks_again_total{{{flow},reason=\"session_lost\"}} 1"),
        format!("evrepl_mailbox_capacity{{actor=\"cache_reader\",{flow}}} 4"),
        format!("evrepl_mailbox_depth{{actor=\"cache_reader\",{flow}}} 12"),
        format!("evrepl_mailbox_fullest{{actor=\"cache_reader\",{flow}}} 2"),
        format!("evrepl_mailbox_high_water{{actor=\"cache_reader\",{flow}}} 3"),
        "evrepl_mailbox_senders_waiting{actor=\"cache_writer\"} 1".to_owned(),
        format!("evrepl_offset_lag{{{flow}}} 9"),
        "evrepl_restarts_total{actor=\"remote_link\"} 1".to_owned(),
        format!("evrepl_stage_lag_seconds_bucket{{{flow},stage=\"acked\",le=\"0.4\"}} 1"),
        format!("evrepl_stage_lag_seconds_bucket{{{flow},stage=\"acked\",le=\"0.2\"}} 0"),
    ] {
        assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
    }
}

#[test]
fn a_scrape_says_what_the_probes_say() {
    let source = Source::with(one_flow(), vec![check("peer eu-west-1", false, false, "dialling")]);
    let served = serve_source(source.clone());
    let said = || ["evrepl_alive", "evrepl_ready"].map(|name| served.samples(name).concat());
    // Degraded is ready.
    assert_eq!(said(), ["evrepl_alive 1", "evrepl_ready 1"]);
    *source.ready.lock().unwrap() = Readiness::of(vec![check("agent", false, true, "")]);
    assert_eq!(said(), ["evrepl_alive 1", "evrepl_ready 0"]);
    *source.alive.lock().unwrap() = vec![check("root", false, true, "does not turn")];
    assert_eq!(said(), ["evrepl_alive 0", "evrepl_ready 0"]);
}

#[test]
fn no_gauge_gets_another_name_from_a_collector_that_translates_for_prometheus() {
    // It puts `_ratio` behind gauges of this unit.
    let renamed = METRICS
        .iter()
        .filter(|metric| metric.kind == Kind::Gauge && metric.unit == "1");
    assert_eq!(
        renamed.map(|metric| metric.name).collect::<Vec<_>>(),
        Vec::<&str>::new()
    );
}

#[test]
fn all_numbers_of_a_scrape_are_of_one_moment() {
    let source = Source::with(one_flow(), Vec::new());
    let served = serve_source(source.clone());
    for scrape in 1..=20 {
        let (_, text) = served.get("/metrics");
        let sum = |name: &str| -> f64 {
            let ours = text.lines().filter(|line| line.split('{').next() == Some(name));
            ours.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
                .sum()
        };
        let ended_or_held = sum("evrepl_events_total") + sum("evrepl_events_in_flight");
        assert_eq!(sum("evrepl_events_consumed_total"), ended_or_held);
        assert_eq!(source.given.load(SeqCst), scrape);
    }
}

#[test]
fn what_is_over_is_no_longer_reported() {
    let source = Source::with(one_flow(), Vec::new());
    let served = serve_source(source.clone());
    let waits = |samples: Vec<String>| samples.iter().filter(|line| !line.ends_with(" 0")).count();
    assert_eq!(waits(served.samples("evrepl_dirty_keys")), 1);
    source.status.lock().unwrap().flows[0].waiting_for.clear();
    source.status.lock().unwrap().flows[0].offset_lag = None;
    assert_eq!(waits(served.samples("evrepl_dirty_keys")), 0);
    assert_eq!(served.samples("evrepl_offset_lag"), Vec::<String>::new());
}

#[test]
fn a_flow_with_several_links_is_as_far_as_the_last_of_them() {
    let mut status = one_flow();
    let waiting = LinkStatus {
        state: "dialling".to_owned(),
        ..LinkStatus::default()
    };
    status.flows[0].links.push(waiting);
    let served = serve_source(Source::with(status, Vec::new()));
    assert_eq!(
        served.samples("evrepl_link_state"),
        [r#"evrepl_link_state{flow="us-east-1->eu-west-1"} 1"#]
    );
}

#[test]
fn an_address_that_is_taken_is_named() {
    let served = serve_source(Source::with(Status::default(), Vec::new()));
    let error = bind(&served.address).unwrap_err().to_string();
    assert!(
        error.starts_with(&format!("cannot serve the admin interface on {}: ", served.address)),
        "{error}"
    );
    assert!(bind("no port").is_err());
}

#[test]
fn an_idle_connection_does_not_hold_up_the_end() {
    let served = serve_source(Source::with(Status::default(), Vec::new()));
    let mut idle = std::net::TcpStream::connect(&served.address).unwrap();
    io::Write::write_all(&mut idle, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut first = [0; 15];
    io::Read::read_exact(&mut idle, &mut first).unwrap();
    assert_eq!(&first, b"HTTP/1.1 200 OK");

    served.telemetry.shutdown(LIMIT).unwrap();
    assert!(std::net::TcpStream::connect(&served.address).is_err());
}
