//! An OTLP/gRPC receiver of the tests' own: what evrepl exports, as a collector would see it; and a collector that is slow,
//! refuses or is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{ExportMetricsServiceRequest, ExportMetricsServiceResponse};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1::{Metric, metric, number_data_point};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{Span, span};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status};

use crate::Certs;
use crate::wait::holds_within;

pub use opentelemetry_proto::tonic::trace::v1::span::SpanKind;

/// Attributes by name. Numbers, truths and texts are JSON's own; bytes are an array of numbers.
pub type Attributes = BTreeMap<String, Value>;

/// How long the sink's own threads may take to end.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// A span as it arrived; ids in lower-case hex.
#[derive(Clone, Debug, PartialEq)]
pub struct SinkSpan {
    pub trace_id: String,
    pub span_id: String,
    /// `None`: a root.
    pub parent_span_id: Option<String>,
    pub name: String,
    pub kind: SpanKind,
    /// Since the Unix epoch.
    pub start_unix_nanos: u64,
    pub end_unix_nanos: u64,
    pub attributes: Attributes,
    pub events: Vec<SinkEvent>,
    pub links: Vec<SinkLink>,
    pub status: SinkStatus,
    /// What sent it: `service.name`, `service.instance.id`, `cloud.region`.
    pub resource: Attributes,
}

impl SinkSpan {
    /// The region it is from, as its resource says; empty when that says nothing.
    pub fn region(&self) -> &str {
        text(&self.resource, "cloud.region")
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct SinkEvent {
    pub name: String,
    pub unix_nanos: u64,
    pub attributes: Attributes,
}

#[derive(Clone, Debug, PartialEq)]
pub struct SinkLink {
    pub trace_id: String,
    pub span_id: String,
    pub attributes: Attributes,
}

/// How a span says it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SinkStatus {
    Unset,
    Ok,
    /// With its description.
    Error(String),
}

/// The newest point of one instrument with one set of attributes, from one process.
#[derive(Clone, Debug, PartialEq)]
pub struct SinkPoint {
    pub name: String,
    pub unit: String,
    pub attributes: Attributes,
    /// The value of a counter or gauge; the sum of a histogram.
    pub value: f64,
    /// How many values a histogram has; 1 for the others.
    pub count: u64,
    pub resource: Attributes,
}

/// What the sink does with a request, once it has arrived whole.
#[derive(Clone, Debug, Default)]
enum Manner {
    #[default]
    Takes,
    /// Takes it, and answers late.
    Slow(Duration),
    /// Answers with this, and takes nothing.
    Refuses(Status),
}

#[derive(Debug, Default)]
struct Shared {
    manner: Mutex<Manner>,
    requests: AtomicU64,
    /// Spans that have come, kept or not.
    count: AtomicU64,
    spans: Mutex<Vec<SinkSpan>>,
    /// By process, name and attributes.
    points: Mutex<BTreeMap<[String; 3], SinkPoint>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a sink is.
#[derive(Debug)]
enum Kind {
    /// It takes traces and metrics.
    Both,
    /// It has no service for metrics, like Jaeger.
    TracesOnly,
    /// It takes both, behind TLS as `localhost`.
    Tls(Identity),
    /// It takes both, and only counts.
    Counting,
}

/// A running sink on 127.0.0.1, with a runtime of its own. It ends with its handle.
#[derive(Debug)]
pub struct OtlpSink {
    kind: Kind,
    port: u16,
    shared: Arc<Shared>,
    /// `None` while it is gone.
    server: Mutex<Option<Runtime>>,
}

impl OtlpSink {
    /// A sink that takes everything, on a port of its own.
    ///
    /// # Panics
    /// When it gets no port or no threads.
    pub fn start() -> OtlpSink {
        OtlpSink::start_as(Kind::Both)
    }

    /// A sink that knows traces alone, like Jaeger.
    ///
    /// # Panics
    /// As [`OtlpSink::start`].
    pub fn start_for_traces() -> OtlpSink {
        OtlpSink::start_as(Kind::TracesOnly)
    }

    /// A sink behind TLS, with the certificate for `localhost` among these.
    ///
    /// # Panics
    /// As [`OtlpSink::start`], or when there is no such certificate.
    pub fn start_tls(certs: &Certs) -> OtlpSink {
        let read = |name: &str| {
            let path = certs.path().join(name);
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        let identity = Identity::from_pem(read("localhost.pem"), read("localhost.key"));
        OtlpSink::start_as(Kind::Tls(identity))
    }

    /// A sink that counts spans and keeps nothing, for load runs: its memory doesn't grow, and it costs little.
    ///
    /// # Panics
    /// As [`OtlpSink::start`].
    pub fn start_counting() -> OtlpSink {
        OtlpSink::start_as(Kind::Counting)
    }

    fn start_as(kind: Kind) -> OtlpSink {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap_or_else(|error| panic!("no port for the sink: {error}"));
        let port = listener.local_addr().expect("a bound port").port();
        let shared = Arc::<Shared>::default();
        let server = serve(listener, &shared, &kind);
        OtlpSink {
            kind,
            port,
            shared,
            server: Mutex::new(Some(server)),
        }
    }

    /// For `telemetry.otlp_endpoint`.
    pub fn endpoint(&self) -> String {
        match self.kind {
            Kind::Tls(_) => format!("https://localhost:{}", self.port),
            _ => format!("http://127.0.0.1:{}", self.port),
        }
    }

    /// Takes everything at once: how it starts.
    pub fn take(&self) {
        *locked(&self.shared.manner) = Manner::Takes;
    }

    /// From now on answers each request only after `delay`.
    pub fn slow(&self, delay: Duration) {
        *locked(&self.shared.manner) = Manner::Slow(delay);
    }

    /// From now on refuses each request, in a way that asks for another try.
    pub fn refuse(&self) {
        *locked(&self.shared.manner) = Manner::Refuses(Status::unavailable("the sink refuses"));
    }

    /// Closes the port and every connection.
    pub fn vanish(&self) {
        if let Some(server) = locked(&self.server).take() {
            server.shutdown_timeout(GONE_WITHIN);
        }
    }

    /// Listens again, on the same port, after [`OtlpSink::vanish`].
    ///
    /// # Panics
    /// When somebody else has the port.
    pub fn come_back(&self) {
        let mut server = locked(&self.server);
        if server.is_none() {
            let listener = TcpListener::bind(("127.0.0.1", self.port))
                .unwrap_or_else(|error| panic!("the sink's port {}: {error}", self.port));
            *server = Some(serve(listener, &self.shared, &self.kind));
        }
    }

    /// Requests that have arrived whole, whatever became of them.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// How many spans were taken so far.
    pub fn span_count(&self) -> u64 {
        self.shared.count.load(Ordering::Relaxed)
    }

    /// Every span taken so far, in the order in which they came.
    pub fn spans(&self) -> Vec<SinkSpan> {
        locked(&self.shared.spans).clone()
    }

    /// Names of the instruments that had a point so far.
    pub fn metric_names(&self) -> BTreeSet<String> {
        let points = locked(&self.shared.points);
        points.values().map(|point| point.name.clone()).collect()
    }

    /// The newest points of one instrument, of all processes and attributes.
    pub fn points(&self, name: &str) -> Vec<SinkPoint> {
        let points = locked(&self.shared.points);
        points.values().filter(|point| point.name == name).cloned().collect()
    }

    /// Waits until `found` finds what it looks for among the spans.
    ///
    /// # Panics
    /// When it doesn't within `limit`, naming `what` was waited for and the spans that came.
    #[track_caller]
    pub fn wait_for<T>(&self, what: &str, limit: Duration, mut found: impl FnMut(&[SinkSpan]) -> Option<T>) -> T {
        let mut answer = None;
        // Looked at without the lock: spans go on coming.
        holds_within(limit, || {
            answer = found(&self.spans());
            answer.is_some()
        });
        answer.unwrap_or_else(|| panic!("waited {limit:?} in vain: {what}; {}", summary(&self.spans())))
    }
}

impl Drop for OtlpSink {
    fn drop(&mut self) {
        if let Some(server) = locked(&self.server).take() {
            // Not the blocking way: a handle may drop inside another runtime.
            server.shutdown_background();
        }
    }
}

/// How often each name came, for a failed test's message.
fn summary(spans: &[SinkSpan]) -> String {
    let mut counts = BTreeMap::<String, u64>::new();
    for span in spans {
        *counts
            .entry(format!("{:?} {} ({})", span.kind, span.name, span.region()))
            .or_default() += 1;
    }
    let counts: Vec<String> = counts.iter().map(|(name, count)| format!("{count} × {name}")).collect();
    match counts.is_empty() {
        true => "no span came".into(),
        false => format!("{} spans came: {}", spans.len(), counts.join(", ")),
    }
}

fn serve(listener: TcpListener, shared: &Arc<Shared>, kind: &Kind) -> Runtime {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("otlp-sink")
        .enable_all()
        .build()
        .expect("a runtime for the sink");
    listener.set_nonblocking(true).expect("a listener that doesn't block");
    let keeps = !matches!(kind, Kind::Counting);
    let receiver = Receiver {
        shared: Arc::clone(shared),
        keeps,
    };
    let metrics = !matches!(kind, Kind::TracesOnly);
    let mut server = Server::builder();
    if let Kind::Tls(identity) = kind {
        let tls = ServerTlsConfig::new().identity(identity.clone());
        server = server.tls_config(tls).expect("a certificate and its key");
    }
    let listener = {
        let _inside = runtime.enter();
        tokio::net::TcpListener::from_std(listener).expect("a listener")
    };
    runtime.spawn(async move {
        let served = server
            .add_service(TraceServiceServer::new(receiver.clone()))
            .add_optional_service(metrics.then(|| MetricsServiceServer::new(receiver)))
            .serve_with_incoming(TcpIncoming::from(listener));
        if let Err(error) = served.await {
            panic!("the sink has broken: {error}");
        }
    });
    runtime
}

#[derive(Clone)]
struct Receiver {
    shared: Arc<Shared>,
    keeps: bool,
}

impl Receiver {
    /// As the sink's manner is: late, refused, or at once.
    async fn receive(&self, take: impl FnOnce(&Shared)) -> Result<(), Status> {
        self.shared.requests.fetch_add(1, Ordering::Relaxed);
        let manner = locked(&self.shared.manner).clone();
        match manner {
            Manner::Refuses(status) => return Err(status),
            Manner::Slow(delay) => tokio::time::sleep(delay).await,
            Manner::Takes => {}
        }
        take(&self.shared);
        Ok(())
    }
}

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.receive(|shared| {
            let request = request.into_inner();
            let scopes = request.resource_spans.iter().flat_map(|sent| &sent.scope_spans);
            let count: usize = scopes.map(|scope| scope.spans.len()).sum();
            shared.count.fetch_add(count as u64, Ordering::Relaxed);
            if !self.keeps {
                return;
            }
            let spans = request.resource_spans.into_iter().flat_map(|sent| {
                let resource = resource(sent.resource);
                let spans = sent.scope_spans.into_iter().flat_map(|scope| scope.spans);
                spans.map(move |span| sink_span(span, &resource))
            });
            locked(&shared.spans).extend(spans);
        })
        .await?;
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Receiver {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        self.receive(|shared| {
            if !self.keeps {
                return;
            }
            let mut points = locked(&shared.points);
            for sent in request.into_inner().resource_metrics {
                let resource = resource(sent.resource);
                for metric in sent.scope_metrics.into_iter().flat_map(|scope| scope.metrics) {
                    for point in sink_points(metric, &resource) {
                        let key = [
                            json!(point.resource).to_string(),
                            point.name.clone(),
                            json!(point.attributes).to_string(),
                        ];
                        points.insert(key, point);
                    }
                }
            }
        })
        .await?;
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

fn sink_span(span: Span, resource: &Attributes) -> SinkSpan {
    let status = span.status.clone().unwrap_or_default();
    SinkSpan {
        trace_id: hex(&span.trace_id),
        span_id: hex(&span.span_id),
        parent_span_id: (!span.parent_span_id.is_empty()).then(|| hex(&span.parent_span_id)),
        kind: span.kind(),
        name: span.name,
        start_unix_nanos: span.start_time_unix_nano,
        end_unix_nanos: span.end_time_unix_nano,
        attributes: attributes(span.attributes),
        events: span.events.into_iter().map(sink_event).collect(),
        links: span.links.into_iter().map(sink_link).collect(),
        status: match status.code() {
            StatusCode::Unset => SinkStatus::Unset,
            StatusCode::Ok => SinkStatus::Ok,
            StatusCode::Error => SinkStatus::Error(status.message),
        },
        resource: resource.clone(),
    }
}

fn sink_event(event: span::Event) -> SinkEvent {
    SinkEvent {
        name: event.name,
        unix_nanos: event.time_unix_nano,
        attributes: attributes(event.attributes),
    }
}

fn sink_link(link: span::Link) -> SinkLink {
    SinkLink {
        trace_id: hex(&link.trace_id),
        span_id: hex(&link.span_id),
        attributes: attributes(link.attributes),
    }
}

fn sink_points(metric: Metric, resource: &Attributes) -> Vec<SinkPoint> {
    let (name, unit) = (metric.name, metric.unit);
    let point = |labels: Vec<KeyValue>, value: f64, count: u64| SinkPoint {
        name: name.clone(),
        unit: unit.clone(),
        attributes: attributes(labels),
        value,
        count,
        resource: resource.clone(),
    };
    let numbers = match metric.data {
        Some(metric::Data::Gauge(gauge)) => gauge.data_points,
        Some(metric::Data::Sum(sum)) => sum.data_points,
        Some(metric::Data::Histogram(histogram)) => {
            let points = histogram.data_points.into_iter();
            return points
                .map(|one| point(one.attributes, one.sum.unwrap_or(0.0), one.count))
                .collect();
        }
        // Nothing else is exported by evrepl's instruments.
        _ => return Vec::new(),
    };
    let value = |value: Option<number_data_point::Value>| match value {
        Some(number_data_point::Value::AsDouble(value)) => value,
        Some(number_data_point::Value::AsInt(value)) => value as f64,
        None => 0.0,
    };
    numbers
        .into_iter()
        .map(|one| point(one.attributes, value(one.value), 1))
        .collect()
}

fn resource(resource: Option<Resource>) -> Attributes {
    attributes(resource.unwrap_or_default().attributes)
}

fn attributes(list: Vec<KeyValue>) -> Attributes {
    list.into_iter().map(|one| (one.key, json_value(one.value))).collect()
}

fn json_value(value: Option<AnyValue>) -> Value {
    match value.and_then(|value| value.value) {
        Some(any_value::Value::StringValue(text)) => json!(text),
        Some(any_value::Value::BoolValue(truth)) => json!(truth),
        Some(any_value::Value::IntValue(number)) => json!(number),
        Some(any_value::Value::DoubleValue(number)) => json!(number),
        Some(any_value::Value::BytesValue(bytes)) => json!(bytes),
        Some(any_value::Value::ArrayValue(array)) => {
            Value::Array(array.values.into_iter().map(|one| json_value(Some(one))).collect())
        }
        Some(any_value::Value::KvlistValue(list)) => json!(attributes(list.values)),
        Some(any_value::Value::StringValueStrindex(_)) | None => Value::Null,
    }
}

fn text<'a>(attributes: &'a Attributes, name: &str) -> &'a str {
    attributes.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
    use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
    use opentelemetry_proto::tonic::metrics::v1::{
        Histogram, HistogramDataPoint, NumberDataPoint, ResourceMetrics, ScopeMetrics, Sum,
    };
    use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans};
    use tokio::time::Instant;
    use tonic::Code;

    const SOON: Duration = Duration::from_secs(10);

    fn label(key: &str, value: any_value::Value) -> KeyValue {
        KeyValue {
            key: key.into(),
            value: Some(AnyValue { value: Some(value) }),
            ..KeyValue::default()
        }
    }

    fn string(key: &str, value: &str) -> KeyValue {
        label(key, any_value::Value::StringValue(value.into()))
    }

    fn from_here() -> Option<Resource> {
        Some(Resource {
            attributes: vec![string("cloud.region", "us-east-1")],
            ..Resource::default()
        })
    }

    fn one_span() -> ExportTraceServiceRequest {
        let span = Span {
            trace_id: vec![0xab; 16],
            span_id: vec![1; 8],
            name: "process sessions".into(),
            kind: SpanKind::Consumer as i32,
            start_time_unix_nano: 5,
            end_time_unix_nano: 9,
            attributes: vec![label("n", any_value::Value::IntValue(3))],
            events: vec![span::Event {
                time_unix_nano: 6,
                name: "looked again".into(),
                ..span::Event::default()
            }],
            status: Some(opentelemetry_proto::tonic::trace::v1::Status {
                message: "why".into(),
                code: StatusCode::Error as i32,
            }),
            ..Span::default()
        };
        let child = Span {
            parent_span_id: vec![1; 8],
            span_id: vec![2; 8],
            ..span.clone()
        };
        ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                resource: from_here(),
                scope_spans: vec![ScopeSpans {
                    spans: vec![span, child],
                    ..ScopeSpans::default()
                }],
                ..ResourceSpans::default()
            }],
        }
    }

    fn metrics(total: i64) -> ExportMetricsServiceRequest {
        let metric = |name: &str, data| Metric {
            name: name.into(),
            unit: "s".into(),
            data: Some(data),
            ..Metric::default()
        };
        let sum = Sum {
            data_points: vec![NumberDataPoint {
                attributes: vec![string("flow", "a->b")],
                value: Some(number_data_point::Value::AsInt(total)),
                ..NumberDataPoint::default()
            }],
            ..Sum::default()
        };
        let histogram = Histogram {
            data_points: vec![HistogramDataPoint {
                count: 4,
                sum: Some(2.5),
                ..HistogramDataPoint::default()
            }],
            ..Histogram::default()
        };
        ExportMetricsServiceRequest {
            resource_metrics: vec![ResourceMetrics {
                resource: from_here(),
                scope_metrics: vec![ScopeMetrics {
                    metrics: vec![
                        metric("total", metric::Data::Sum(sum)),
                        metric("seconds", metric::Data::Histogram(histogram)),
                    ],
                    ..ScopeMetrics::default()
                }],
                ..ResourceMetrics::default()
            }],
        }
    }

    fn in_a_runtime<T>(work: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.unwrap().block_on(work)
    }

    async fn send(sink: &OtlpSink) -> Result<(), Status> {
        let client = TraceServiceClient::connect(sink.endpoint()).await;
        let mut client = client.map_err(|error| Status::aborted(error.to_string()))?;
        client.export(one_span()).await.map(|_| ())
    }

    #[test]
    fn spans_are_kept_as_they_were_sent() {
        let sink = OtlpSink::start();
        in_a_runtime(send(&sink)).unwrap();
        let [root, child] = sink.wait_for("both", SOON, |spans| spans.to_vec().try_into().ok());
        assert_eq!(root.parent_span_id, None);
        assert_eq!((root.trace_id.len(), root.span_id.as_str()), (32, "0101010101010101"));
        assert_eq!(
            (root.name.as_str(), root.kind),
            ("process sessions", SpanKind::Consumer)
        );
        assert_eq!(
            (root.start_unix_nanos, root.end_unix_nanos, root.region()),
            (5, 9, "us-east-1")
        );
        assert_eq!(root.attributes["n"], 3);
        assert_eq!(
            (root.events[0].name.as_str(), root.events[0].unix_nanos),
            ("looked again", 6)
        );
        assert_eq!(root.status, SinkStatus::Error("why".into()));
        assert_eq!(child.parent_span_id, Some(root.span_id));
    }

    #[test]
    fn of_each_metric_the_newest_points_are_kept() {
        let sink = OtlpSink::start();
        in_a_runtime(async {
            let mut client = MetricsServiceClient::connect(sink.endpoint()).await.unwrap();
            client.export(metrics(3)).await.unwrap();
            client.export(metrics(5)).await.unwrap();
        });
        assert_eq!(sink.metric_names(), BTreeSet::from(["total".into(), "seconds".into()]));
        let [total] = sink.points("total").try_into().unwrap();
        assert_eq!((total.value, total.count, total.unit.as_str()), (5.0, 1, "s"));
        assert_eq!(total.attributes["flow"], "a->b");
        let [seconds] = sink.points("seconds").try_into().unwrap();
        assert_eq!((seconds.value, seconds.count), (2.5, 4));
        assert_eq!(sink.requests(), 2);
    }

    #[test]
    fn it_is_slow_refuses_and_vanishes_on_demand() {
        let sink = OtlpSink::start();
        in_a_runtime(async {
            sink.refuse();
            assert_eq!(send(&sink).await.unwrap_err().code(), Code::Unavailable);
            sink.slow(Duration::from_millis(200));
            let since = Instant::now();
            send(&sink).await.unwrap();
            assert!(since.elapsed() >= Duration::from_millis(200), "{:?}", since.elapsed());
            sink.take();
            send(&sink).await.unwrap();
        });
        assert_eq!((sink.requests(), sink.spans().len()), (3, 4));
        sink.vanish();
        assert_eq!(in_a_runtime(send(&sink)).unwrap_err().code(), Code::Aborted);
        sink.come_back();
        in_a_runtime(send(&sink)).unwrap();
        assert_eq!(sink.spans().len(), 6);
    }

    #[test]
    #[should_panic(expected = "waited 0ns in vain: a third; 2 spans came: 2 × Consumer process sessions (us-east-1)")]
    fn who_waits_in_vain_is_told_what_came() {
        let sink = OtlpSink::start();
        in_a_runtime(send(&sink)).unwrap();
        sink.wait_for("a third", Duration::ZERO, |spans| spans.get(2).cloned());
    }
}
