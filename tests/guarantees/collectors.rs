//! Collectors as they are: behind TLS, for traces alone, or not there.

use std::process::Command;
use std::time::Duration;

use evrepl_lab::{Certs, OtlpSink, Region, TwoRegionsSpec, evrepl, settle, shared, wait_until};

const LIMIT: Duration = Duration::from_secs(30);

/// What `evrepl` says with these arguments and this region's configuration.
fn says(region: &Region, arguments: &[&str], ca: &std::path::Path) -> String {
    let mut command = Command::new(evrepl());
    let command = command.args(arguments).arg("--config").arg(region.config_path());
    let output = command
        .env("SSL_CERT_FILE", ca)
        .output()
        .expect("evrepl can be started");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn one_behind_tls_gets_everything_and_one_for_traces_alone_is_not_bothered_with_metrics() {
    let _gate = shared();
    let certs = Certs::issue(&["localhost"]);
    let ca = certs.path().join("ca.pem");
    let (behind_tls, for_traces) = (OtlpSink::start_tls(&certs), OtlpSink::start_for_traces());
    let (us, eu) = (behind_tls.endpoint(), for_traces.endpoint());
    let pair = TwoRegionsSpec::new()
        .us(move |builder| builder.telemetry(&us, 1.0))
        .eu(move |builder| builder.telemetry(&eu, 1.0))
        .one_way()
        .build();
    pair.us.set_env("SSL_CERT_FILE", Some(&ca.to_string_lossy()));
    pair.eu.start();
    pair.us.start();
    wait_until("the relay is ready", LIMIT, || {
        matches!(pair.us.get("/readyz"), Ok((200, _)))
    });
    pair.us.writer("sessions").set_all([("key", "value")]);
    settle(&pair.both());
    for (sink, what) in [(&behind_tls, "behind tls"), (&for_traces, "for traces")] {
        wait_until(what, LIMIT, || !sink.spans().is_empty());
    }
    wait_until("metrics came through tls", LIMIT, || {
        behind_tls
            .metric_names()
            .iter()
            .any(|name| name == "evrepl_events_total")
    });
    let declined = || pair.eu.log().matches("the collector takes no metrics").count();
    wait_until("it was told that it takes no metrics", LIMIT, || declined() == 1);

    let collector = |region: &Region| {
        let said = says(region, &["check", "--connect"], &ca);
        let line = said.lines().find(|line| line.contains("otlp "));
        line.unwrap_or_else(|| panic!("{said}")).to_owned()
    };
    assert!(
        collector(&pair.us).contains("takes traces and metrics"),
        "{}",
        collector(&pair.us)
    );
    assert!(
        collector(&pair.eu).contains("takes traces; metrics are at /metrics only"),
        "{}",
        collector(&pair.eu)
    );
    let written = |region: &Region| says(region, &["write", "set", "sessions", "key", "value", "--trace"], &ca);
    let traced = written(&pair.us);
    assert!(
        traced.contains("\ntrace ") && !traced.contains("but telemetry"),
        "{traced}"
    );

    behind_tls.vanish();
    let line = collector(&pair.us);
    assert!(line.starts_with("missing"), "{line}");
    let traced = written(&pair.us);
    assert!(traced.contains("but telemetry.otlp_endpoint does not take"), "{traced}");

    // Its last export of metrics is not tried either, and the SDK itself has complained of nothing.
    assert_eq!(pair.eu.terminate(), 0);
    let log = pair.eu.log();
    assert_eq!(declined(), 1, "{log}");
    assert!(
        !log.contains("PeriodicReader") && !log.contains("not exported"),
        "{log}"
    );
}

#[test]
fn one_that_hangs_does_not_hold_up_the_end() {
    let _gate = shared();
    let sink = OtlpSink::start();
    sink.slow(Duration::from_secs(600));
    let pair = TwoRegionsSpec::new().one_way().telemetry(&sink.endpoint(), 1.0).start();
    pair.us.writer("sessions").set_all([("key", "value")]);
    settle(&pair.both());
    wait_until("the first export hangs", LIMIT, || sink.requests() > 0);
    for region in pair.both() {
        assert_eq!(region.terminate(), 0);
        let log = region.log();
        // Its own limit ended it, not the collector's 600 seconds or an export's five.
        let ends: Vec<&str> = log.lines().rev().take(3).collect();
        assert!(
            ends.iter().any(|line| line.contains("telemetry did not end within 2s")),
            "{ends:#?}"
        );
    }
}
