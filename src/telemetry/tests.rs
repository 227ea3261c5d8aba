use std::io::Read;
use std::net::TcpListener;

use super::*;

/// Long enough for anything that comes, short enough for a test that hangs.
const LIMIT: Duration = Duration::from_secs(20);

fn options(otlp_endpoint: Option<String>) -> TelemetryOptions {
    TelemetryOptions {
        region: "us-east-1".into(),
        node: "relay-1".into(),
        otlp_endpoint,
        traces: TraceOptions::default(),
    }
}

#[test]
fn telemetry_without_a_source_or_an_endpoint_starts_and_ends() {
    let telemetry = start(&options(None)).unwrap();
    telemetry.instruments().count_restart("cache_writer");
    let gathered = telemetry.registry().gather();
    assert!(gathered.iter().any(|family| family.name() == "evrepl_restarts_total"));
    // There is nothing to say of flows that nobody knows of.
    assert!(gathered.iter().all(|family| family.name() != "evrepl_events_total"));
    telemetry.shutdown(LIMIT).unwrap();
}

#[test]
fn the_end_exports_once_more() {
    let receiver = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", receiver.local_addr().unwrap());
    let telemetry = start(&options(Some(endpoint))).unwrap();
    telemetry.instruments().count_restart("cache_writer");
    let heard = std::thread::spawn(move || {
        let (mut stream, _) = receiver.accept().unwrap();
        let mut preface = [0; 24];
        stream.read_exact(&mut preface).unwrap();
        // Gone before it answers: the export fails, and the end does not wait for it.
        preface
    });
    telemetry.shutdown(LIMIT).unwrap();
    assert_eq!(&heard.join().unwrap(), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
}

#[test]
fn a_receiver_that_never_answers_does_not_hold_up_the_end() {
    let receiver = TcpListener::bind("127.0.0.1:0").unwrap();
    let telemetry = start(&options(Some(format!("http://{}", receiver.local_addr().unwrap())))).unwrap();
    telemetry.instruments().count_restart("cache_writer");
    let limit = Duration::from_millis(1);
    assert!(matches!(telemetry.shutdown(limit), Err(TelemetryError::Unfinished { limit: said }) if said == limit));
}

#[test]
fn a_receiver_that_is_not_there_is_no_reason_not_to_start() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    start(&options(Some(format!("http://{address}"))))
        .unwrap()
        .shutdown(LIMIT)
        .unwrap();
}

#[test]
fn an_endpoint_that_is_no_url_is_named() {
    let error = start(&options(Some("http://[oops".into()))).err().unwrap().to_string();
    assert!(error.starts_with("cannot export to http://[oops: "), "{error}");
}

#[test]
fn telemetry_may_end_inside_another_runtime() {
    let other = tokio::runtime::Builder::new_current_thread().build().unwrap();
    other.block_on(async {
        start(&options(None)).unwrap().shutdown(LIMIT).unwrap();
        drop(start(&options(None)).unwrap());
    });
}

#[test]
fn the_log_says_info_unless_told_otherwise() {
    assert_eq!(log_filter(None).unwrap().to_string(), "info");
    assert_eq!(log_filter(Some("".into())).unwrap().to_string(), "info");
    assert_eq!(log_filter(Some("warn".into())).unwrap().to_string(), "warn");
    let error = log_filter(Some("evrepl=loud".into())).unwrap_err().to_string();
    assert!(error.starts_with("EVREPL_LOG: "), "{error}");
    let error = log_filter(Some("verbose".into())).unwrap_err().to_string();
    assert!(error.contains("\"verbose\" is no level"), "{error}");
}

#[test]
fn exported_spans_make_nobody_ask_for_what_is_not_logged() {
    for (filter, most) in [("info", LevelFilter::INFO), ("debug", LevelFilter::DEBUG)] {
        let tracer = SdkTracerProvider::builder().build().tracer(names::SCOPE);
        let (filter, _handle) = reload::Layer::new(EnvFilter::new(filter));
        let subscriber = subscriber(LogFormat::Text, filter, Some(tracer));
        assert_eq!(subscriber.max_level_hint(), Some(most));
    }
}

#[test]
fn more_names_than_foreseen_are_counted_together() {
    const NAMES: [&str; 20] = [
        "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p", "q", "r", "s", "t",
    ];
    let instruments = Instruments::detached();
    for name in NAMES.into_iter().chain(["a", "t"]) {
        instruments.count_restart(name);
    }
    let restarts = instruments.restarts();
    assert_eq!(restarts.values().sum::<u64>(), 22);
    assert_eq!((restarts["a"], restarts["other"]), (2, 6));
}

#[test]
fn a_flow_has_one_set_of_instruments_whoever_asks() {
    let instruments = Instruments::detached();
    instruments.flow("a->b").count_look_again("later");
    instruments.count_look_again("a->b", "later");
    instruments.count_look_again("a->c", "later");
    assert_eq!(instruments.flow("a->b").looks_again()["later"], 2);
}

#[test]
fn the_environment_may_give_the_service_another_name() {
    assert_eq!(service_name(None), "evrepl");
    assert_eq!(service_name(Some(String::new())), "evrepl");
    assert_eq!(service_name(Some("evrepl-us-east-1".into())), "evrepl-us-east-1");
}
