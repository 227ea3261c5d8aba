//! Jaeger's own page inside the demo: what both regions export, without anything to install.
//!
//! `otlp-embedded` keeps the newest traces in memory, takes them by OTLP/gRPC and carries Jaeger's page and the HTTP API
//! that the page asks. Whether it starts or not, and whatever it is asked, is nothing to the regions: they would export to
//! any collector.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use axum::http::StatusCode;
use axum::middleware::map_response;
use axum::response::Response;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{ExportMetricsServiceRequest, ExportMetricsServiceResponse};
use otlp_embedded::{Config, State, TraceServiceImpl, TraceServiceServer, ui_app};
use serde::Deserialize;
use tokio::runtime::Runtime;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Status};

/// Where Jaeger's page always is; another port when somebody has it, Jaeger itself above all.
const PAGE_PORT: u16 = 16_686;

/// What is kept: the oldest traces go first. A trace is about seven spans and 10 KB.
const MAX_TRACES: u32 = 4_000;
const MAX_BYTES: usize = 64 << 20;

/// Traces a second that a region's writes should give: many to choose from, and no load to speak of.
const TRACES_A_SECOND: f64 = 20.0;

/// How many of the newest traces are looked through for one to show: batches and rebalances are traces too.
const LOOKED_THROUGH: usize = 200;

/// The page answers from memory; what takes longer has gone wrong.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// A running page. It ends with its handle.
#[derive(Debug)]
pub struct Jaeger {
    page: SocketAddr,
    otlp: SocketAddr,
    runtime: Option<Runtime>,
}

impl Jaeger {
    /// Starts it, with two ports on 127.0.0.1.
    ///
    /// # Errors
    /// What it didn't get, in words.
    pub fn start() -> Result<Jaeger, String> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("jaeger")
            .enable_all()
            .build()
            .map_err(|error| format!("no runtime: {error}"))?;
        let (page, otlp) = {
            let _inside = runtime.enter();
            let otlp = listen(0).map_err(|error| format!("no port for OTLP: {error}"))?;
            let page = listen(PAGE_PORT).or_else(|_| listen(0));
            (page.map_err(|error| format!("no port for the page: {error}"))?, otlp)
        };
        let address = |listener: &tokio::net::TcpListener| listener.local_addr().map_err(|error| error.to_string());
        let jaeger = Jaeger {
            page: address(&page)?,
            otlp: address(&otlp)?,
            runtime: None,
        };
        let traces = State::new(Config {
            max_length: MAX_TRACES,
            max_memory_usage: MAX_BYTES,
        });
        let receiver = Server::builder()
            .add_service(TraceServiceServer::new(TraceServiceImpl::new(traces.clone())))
            .add_service(MetricsServiceServer::new(NoMetrics))
            .serve_with_incoming(TcpIncoming::from(otlp));
        runtime.spawn(async move {
            if let Err(error) = receiver.await {
                eprintln!("Jaeger no longer takes traces: {error}");
            }
        });
        let app = ui_app(traces, "/").layer(map_response(as_found));
        runtime.spawn(async move {
            if let Err(error) = axum::serve(page, app).await {
                eprintln!("Jaeger's page has ended: {error}");
            }
        });
        Ok(Jaeger {
            runtime: Some(runtime),
            ..jaeger
        })
    }

    /// Where a browser finds it.
    pub fn page(&self) -> String {
        format!("http://{}", self.page)
    }

    /// For `telemetry.otlp_endpoint`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.otlp)
    }

    /// The page of one trace.
    pub fn page_of(&self, trace: &Crossing) -> String {
        format!("{}/trace/{}", self.page(), trace.id)
    }

    /// The fullest of the newest traces that have spans of more than one region; `None`: there is none (yet).
    ///
    /// # Errors
    /// When Jaeger's API doesn't answer, or something else than traces, in words.
    pub fn crossing(&self) -> Result<Option<Crossing>, String> {
        let url = format!("{}/api/traces?limit={LOOKED_THROUGH}", self.page());
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(ANSWER_WITHIN))
            .proxy(None);
        let agent: ureq::Agent = config.build().into();
        let answer = agent.get(&url).call().and_then(|mut answer| {
            let body = answer.body_mut().with_config().limit(MAX_BYTES as u64);
            body.read_json::<Answer>()
        });
        Ok(fullest(&answer.map_err(|error| format!("{url}: {error}"))?))
    }
}

impl Drop for Jaeger {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // A browser may hold a connection open: nobody waits for it.
            runtime.shutdown_background();
        }
    }
}

fn listen(port: u16) -> std::io::Result<tokio::net::TcpListener> {
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    listener.set_nonblocking(true)?;
    tokio::net::TcpListener::from_std(listener)
}

/// The share of events that the regions trace at `rate` writes a second.
pub fn ratio(rate: u64) -> f64 {
    (TRACES_A_SECOND / rate.max(1) as f64).min(1.0)
}

/// otlp-embedded answers the page's own routes (`/trace/...`) with the page and a redirect to nowhere, which Chromium shows
/// and others may not.
async fn as_found(mut response: Response) -> Response {
    if response.status() == StatusCode::TEMPORARY_REDIRECT {
        *response.status_mut() = StatusCode::OK;
    }
    response
}

/// Takes the regions' metrics and forgets them: Jaeger shows traces, and a region whose metrics nobody takes would say so in
/// its log every ten seconds.
struct NoMetrics;

#[tonic::async_trait]
impl MetricsService for NoMetrics {
    async fn export(
        &self,
        _: Request<ExportMetricsServiceRequest>,
    ) -> Result<tonic::Response<ExportMetricsServiceResponse>, Status> {
        Ok(tonic::Response::new(ExportMetricsServiceResponse::default()))
    }
}

/// A trace with spans of more than one region.
#[derive(Clone, Debug, PartialEq)]
pub struct Crossing {
    pub id: String,
    pub spans: usize,
    /// In the order in which the trace came to them.
    pub regions: Vec<String>,
    pub took: Duration,
}

/// What Jaeger's `/api/traces` answers, as far as it is asked here; newest first.
#[derive(Debug, Deserialize)]
struct Answer {
    data: Vec<Trace>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Trace {
    #[serde(rename = "traceID")]
    id: String,
    spans: Vec<Span>,
    processes: BTreeMap<String, Sender>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Span {
    operation_name: String,
    #[serde(rename = "processID")]
    process: String,
    /// Microseconds, since the Unix epoch.
    start_time: u64,
    duration: u64,
}

#[derive(Debug, Deserialize)]
struct Sender {
    tags: Vec<Tag>,
}

#[derive(Debug, Deserialize)]
struct Tag {
    key: String,
    value: serde_json::Value,
}

impl Trace {
    fn region(&self, span: &Span) -> Option<&str> {
        let sender = self.processes.get(&span.process)?;
        let tag = sender.tags.iter().find(|tag| tag.key == "cloud.region")?;
        tag.value.as_str()
    }

    fn crossing(&self) -> Option<Crossing> {
        let mut spans: Vec<&Span> = self.spans.iter().collect();
        spans.sort_by_key(|span| span.start_time);
        let mut regions: Vec<String> = Vec::new();
        for region in spans.iter().filter_map(|span| self.region(span)) {
            if !regions.iter().any(|known| known == region) {
                regions.push(region.to_owned());
            }
        }
        let end = spans.iter().map(|span| span.start_time + span.duration).max()?;
        (regions.len() > 1).then(|| Crossing {
            id: self.id.clone(),
            spans: spans.len(),
            regions,
            took: Duration::from_micros(end - spans[0].start_time),
        })
    }

    fn kinds(&self) -> usize {
        let names: BTreeSet<&str> = self.spans.iter().map(|span| span.operation_name.as_str()).collect();
        names.len()
    }
}

/// By kinds of spans, not by spans: one that was looked at five times tells no more. Of equals the newest.
fn fullest(answer: &Answer) -> Option<Crossing> {
    let crossing = answer
        .data
        .iter()
        .filter_map(|trace| Some((trace.kinds(), trace.crossing()?)));
    let best = crossing.reduce(|best, next| if next.0 > best.0 { next } else { best });
    best.map(|(_, crossing)| crossing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
    use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
    use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
    use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
    use opentelemetry_proto::tonic::resource::v1::Resource;
    use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span as Sent};

    /// Microseconds.
    const BEGIN: u64 = 1_700_000_000_000_000;

    fn string(key: &str, value: &str) -> KeyValue {
        KeyValue {
            key: key.into(),
            value: Some(AnyValue {
                value: Some(any_value::Value::StringValue(value.into())),
            }),
            ..KeyValue::default()
        }
    }

    /// A span of `region` that begins `at` microseconds after [`BEGIN`] and takes 10; number 1 is the root.
    fn span(region: &str, trace: u8, number: u8, name: &str, at: u64) -> ResourceSpans {
        let start = (BEGIN + at) * 1_000;
        let span = Sent {
            trace_id: vec![trace; 16],
            span_id: vec![number; 8],
            parent_span_id: if number == 1 { Vec::new() } else { vec![1; 8] },
            name: name.into(),
            start_time_unix_nano: start,
            end_time_unix_nano: start + 10_000,
            ..Sent::default()
        };
        ResourceSpans {
            resource: Some(Resource {
                attributes: vec![
                    string("service.name", "evrepl"),
                    string("service.instance.id", &format!("{region}/relay-1")),
                    string("cloud.region", region),
                ],
                ..Resource::default()
            }),
            scope_spans: vec![ScopeSpans {
                spans: vec![span],
                ..ScopeSpans::default()
            }],
            ..ResourceSpans::default()
        }
    }

    fn send(jaeger: &Jaeger, resource_spans: Vec<ResourceSpans>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.unwrap().block_on(async {
            let mut client = TraceServiceClient::connect(jaeger.endpoint()).await.unwrap();
            client
                .export(ExportTraceServiceRequest { resource_spans })
                .await
                .unwrap();
            // As evrepl does, to the same endpoint.
            let mut client = MetricsServiceClient::connect(jaeger.endpoint()).await.unwrap();
            client.export(ExportMetricsServiceRequest::default()).await.unwrap();
        });
    }

    #[test]
    fn the_fullest_of_the_newest_traces_that_crossed_is_found_through_jaegers_own_api() {
        let jaeger = Jaeger::start().unwrap();
        assert_eq!(jaeger.crossing().unwrap(), None);
        let (us, eu) = ("us-east-1", "eu-west-1");
        // In one region only, and of as many kinds.
        send(
            &jaeger,
            vec![
                span(us, 1, 1, "process", 0),
                span(us, 1, 2, "look", 5),
                span(us, 1, 3, "ship", 9),
            ],
        );
        assert_eq!(jaeger.crossing().unwrap(), None);
        // The agent's span may come first.
        send(
            &jaeger,
            vec![
                span(eu, 2, 3, "apply", 40),
                span(us, 2, 1, "process", 0),
                span(us, 2, 2, "look", 5),
            ],
        );
        // Newer, but of fewer kinds; and one that is not complete yet.
        send(
            &jaeger,
            vec![
                span(us, 3, 1, "process", 100),
                span(eu, 3, 2, "apply", 120),
                span(eu, 3, 4, "apply", 130),
            ],
        );
        send(
            &jaeger,
            vec![
                span(eu, 4, 2, "apply", 200),
                span(us, 4, 3, "look", 190),
                span(us, 4, 4, "ship", 191),
            ],
        );
        let found = jaeger.crossing().unwrap().unwrap();
        assert_eq!(found.id, "02".repeat(16));
        assert_eq!((found.spans, found.regions), (3, vec![us.to_owned(), eu.to_owned()]));
        assert_eq!(found.took, Duration::from_micros(50));
    }

    #[test]
    fn the_page_of_a_trace_is_jaegers_own_and_two_demos_have_two_of_them() {
        let (one, two) = (Jaeger::start().unwrap(), Jaeger::start().unwrap());
        assert_ne!(one.page(), two.page());
        for jaeger in [&one, &two] {
            let mut answer = ureq::get(format!("{}/trace/0123", jaeger.page())).call().unwrap();
            assert_eq!(answer.status(), 200);
            let page = answer.body_mut().read_to_string().unwrap();
            assert!(page.contains("<title>Jaeger UI</title>"), "{page}");
        }
    }

    #[test]
    fn few_writes_are_all_traced_and_of_many_few() {
        assert_eq!((ratio(0), ratio(10), ratio(2_000)), (1.0, 1.0, 0.01));
    }
}
