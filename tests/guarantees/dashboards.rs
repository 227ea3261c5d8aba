//! The dashboard and the alerts of `config/` work: every query is answered by a Prometheus that scrapes a pair of regions.

use std::fs;
use std::time::{Duration, Instant};

use evrepl::telemetry::metrics::METRICS;
use evrepl_lab::{
    CacheSpec, Prometheus, RegionBuilder, TwoRegionsSpec, holds_within, promtool, repository, settle, shared,
};
use serde_json::Value;

use crate::front_door::Client;

const RULES: &str = "config/prometheus/evrepl.rules.yml";
const DASHBOARD: &str = "config/grafana/evrepl.json";

/// How long it may take until each query has an answer: rates need two scrapes, the rules one evaluation more.
const ANSWERED_WITHIN: Duration = Duration::from_secs(60);

#[test]
fn promtool_finds_no_fault_in_the_configuration_and_the_alert_rules_and_their_tests_pass() {
    let folder = repository("config/prometheus");
    for arguments in [
        ["check", "rules", "evrepl.rules.yml"],
        ["test", "rules", "evrepl.rules.test.yml"],
        ["check", "config", "prometheus.yml"],
    ] {
        let (content, said) = promtool(&folder, &arguments);
        assert!(content, "promtool {}:\n{said}", arguments.join(" "));
    }
}

#[test]
fn every_alert_has_a_test_that_it_fires() {
    let rules = fs::read_to_string(repository(RULES)).unwrap();
    let tests = fs::read_to_string(repository("config/prometheus/evrepl.rules.test.yml")).unwrap();
    let alerts = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    for alert in alerts {
        let fires = format!("alertname: {alert}\n        exp_alerts:\n");
        assert!(tests.contains(&fires), "no test in which {alert} fires");
        let stays = format!("alertname: {alert}\n        exp_alerts: []\n");
        assert!(tests.contains(&stays), "no test in which {alert} does not fire");
    }
}

/// Every query of the dashboard with the panel it is of.
fn queries(dashboard: &Value) -> Vec<(String, String)> {
    let mut queries = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let query = target["expr"].as_str().unwrap();
            queries.push((panel["title"].as_str().unwrap().to_owned(), as_sent(query)));
        }
    }
    queries
}

/// As Grafana sends it, with everything chosen.
fn as_sent(query: &str) -> String {
    let query = query.replace("$__rate_interval", "10s");
    ["$instance", "$flow"]
        .iter()
        .fold(query, |query, name| query.replace(name, ".*"))
}

/// The operands of an alert's expression without their comparisons: what must exist for the alert ever to fire.
fn operands(expression: &str) -> Vec<String> {
    let flat = expression.split_whitespace().collect::<Vec<_>>().join(" ");
    let parts = [" or ", " unless ", " and "].iter().fold(vec![flat], |parts, by| {
        let split = parts.iter().flat_map(|part| part.split(by));
        split.map(str::to_owned).collect()
    });
    let bare = |part: String| {
        let part = [" > ", " < ", " == ", " != "].iter().fold(part.as_str(), |part, by| {
            part.rsplit_once(by).map_or(part, |(left, _)| left)
        });
        // Parentheses around several operands.
        let (open, close) = (part.matches('(').count(), part.matches(')').count());
        let part = part.strip_prefix('(').filter(|_| open > close).unwrap_or(part);
        // What is absent must have been there.
        let absent = part.strip_prefix("absent(").and_then(|rest| rest.strip_suffix(')'));
        let part = absent.unwrap_or(part);
        part.strip_suffix(')')
            .filter(|_| close > open)
            .unwrap_or(part)
            .to_owned()
    };
    // What was an hour ago is not known of a region that has just begun.
    let parts = parts.into_iter().filter(|part| !part.contains(" offset "));
    parts.map(bare).collect()
}

#[test]
fn every_query_of_the_dashboard_and_every_alert_is_answered_while_two_regions_run() {
    let _gate = shared();
    let doors = |builder: RegionBuilder| builder.cache(CacheSpec::new("sessions").front_door());
    let pair = TwoRegionsSpec::new()
        .extra("[canary]\ninterval = \"1s\"")
        .us(doors)
        .eu(doors)
        .start();
    let admin = |url: String| url.trim_start_matches("http://").to_owned();
    let targets = pair.both().map(|region| admin(region.admin_url()));
    let prometheus = Prometheus::start(&targets, &repository(RULES));
    let dashboard = fs::read_to_string(repository(DASHBOARD)).unwrap();
    let dashboard: Value = serde_json::from_str(&dashboard).unwrap();
    let mut writers = pair.both().map(|region| region.writer("sessions"));
    let mut clients = pair.both().map(Client::at);
    let mut written = 0;
    let mut write = || {
        for client in &mut clients {
            assert_eq!(client.set("key:door", "value"), "STORED");
        }
        for writer in &mut writers {
            for _ in 0..20 {
                written += 1;
                writer.set(format!("key:{}", written % 500).as_bytes(), b"value");
            }
            writer.flush();
        }
    };
    prometheus.wait_for_rules();

    let mut asked = queries(&dashboard);
    assert!(asked.len() >= 30, "only {} queries", asked.len());
    for rule in prometheus.rules() {
        let (name, expression) = (rule["name"].as_str().unwrap(), rule["query"].as_str().unwrap());
        assert_eq!(rule["health"], "ok", "{name}: {}", rule["lastError"]);
        if rule["type"] == "recording" {
            asked.push((name.to_owned(), expression.to_owned()));
        } else {
            // As a whole it is empty as long as all is well.
            prometheus.query(expression).unwrap();
            asked.extend(operands(expression).into_iter().map(|part| (name.to_owned(), part)));
        }
    }
    let began = Instant::now();
    holds_within(ANSWERED_WITHIN, || {
        write();
        asked.retain(|(of, query)| match prometheus.query(query) {
            Ok(series) => series.is_empty(),
            Err(error) => panic!("{of}: {query}: {error}"),
        });
        asked.is_empty()
    });
    assert!(asked.is_empty(), "no answer after {:?} to {asked:#?}", began.elapsed());

    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        // That of the data source names only a kind of it.
        let Some(query) = variable["query"].get("query") else {
            continue;
        };
        let query = query.as_str().unwrap();
        let inside = query
            .strip_prefix("label_values(")
            .and_then(|rest| rest.strip_suffix(')'));
        let (metric, label) = inside.unwrap().rsplit_once(", ").unwrap();
        let values = prometheus.label_values(&as_sent(metric), label).unwrap();
        assert!(!values.is_empty(), "the variable {} has no values", variable["name"]);
    }
    settle(&pair.both());
}

#[test]
fn the_dashboard_and_the_alerts_name_no_metric_that_is_not_declared() {
    let dashboard = fs::read_to_string(repository(DASHBOARD)).unwrap();
    let rules = fs::read_to_string(repository(RULES)).unwrap();
    for (file, text) in [(DASHBOARD, &dashboard), (RULES, &rules)] {
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':' || c == '.'));
        let named = words.filter(|word| word.starts_with("evrepl_") && !word.contains(['.', ':']));
        let bare = |word: &str| {
            let base = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| word.strip_suffix(end));
            base.unwrap_or(word).to_owned()
        };
        for name in named {
            let declared = METRICS
                .iter()
                .any(|metric| metric.name == name || metric.name == bare(name));
            assert!(declared, "{file} asks for {name}, which nobody declares");
        }
    }
}
