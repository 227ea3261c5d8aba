//! Logs, metrics and the threads they live on.
//!
//! The gRPC exporter needs a tokio runtime and can deadlock a current-thread one, as actix's is, when it shuts down
//! (DESIGN section 8). So telemetry and the admin interface have a multi-thread runtime of their own, with one worker.

mod collector;
pub mod event_trace;
mod export;
mod instruments;
pub mod log_level;
mod metric_export;
pub mod metrics;
pub mod names;
mod rate_limit;
mod sampler;
mod stderr;
pub mod tap;
mod traces;
mod write_trace;

use std::env;
use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use opentelemetry::metrics::MeterProvider;
use opentelemetry::trace::TracerProvider;
use opentelemetry::{KeyValue, Value};
use opentelemetry_otlp::ExporterBuildError;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkError;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, SpanExporter as _};
use prometheus::Registry;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::Subscriber;
use tracing_opentelemetry::OpenTelemetryLayer;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};
use tracing_subscriber::{EnvFilter, reload};

use metric_export::SteadyExporter;
use stderr::STDERR;

use crate::admin::{self, AdminError, Offers, StatusSource};
use crate::config::{Config, LogFormat};

use export::SpanQueue;

pub use collector::{CollectorTakes, ask_collector};
pub use event_trace::{EventTrace, Note, PathStage};
pub use export::SpanCounts;
pub use instruments::{BatchClosed, FlowInstruments, Instruments, MemcachedInstruments};
pub use log_level::LogLevelError;
pub use rate_limit::RateLimit;
pub use sampler::Sampler;
pub use tap::{PassedEvent, Taps};
pub use traces::{AnsweredItem, DoorWrite, KeptFor, TraceOptions, TracedBatch, TracedEvent, Traces};
pub use write_trace::{Exported, WriteTrace};

/// What is logged, in `tracing-subscriber`'s filter language: `info`, `evrepl=debug,rdkafka=warn`.
pub const LOG_VARIABLE: &str = "EVREPL_LOG";

/// Who evrepl says that it is in what it exports, as OpenTelemetry has it: `evrepl` unless it is set. With a name per region
/// Jaeger tells the regions of a trace apart by colour, and draws the graph between them.
pub const SERVICE_VARIABLE: &str = "OTEL_SERVICE_NAME";

/// How often metrics are exported: often enough for a dashboard to follow an incident, cheap at any rate.
const EXPORT_EVERY: Duration = Duration::from_secs(10);

/// Why telemetry cannot start or did not end in order. None is worth a retry: what helps is another configuration.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// `EVREPL_LOG` is no filter.
    #[error("{LOG_VARIABLE}: {0}")]
    Filter(#[from] LogLevelError),
    /// `EVREPL_LOG` is not UTF-8.
    #[error("{LOG_VARIABLE} is not utf-8")]
    FilterNotUtf8,
    /// The process logs already.
    #[error("logging was started twice")]
    Twice(#[source] TryInitError),
    /// No threads.
    #[error("cannot start the telemetry runtime: {0}")]
    Runtime(#[source] io::Error),
    /// `telemetry.otlp_endpoint` cannot be used.
    #[error("cannot export to {endpoint}: {source}")]
    Exporter {
        endpoint: String,
        source: ExporterBuildError,
    },
    /// The metrics cannot be offered on `/metrics`.
    #[error("cannot offer metrics: {0}")]
    Registry(#[source] OTelSdkError),
    /// The last export, or the last request, did not end within the limit. Nothing but numbers is lost.
    #[error("telemetry did not end within {limit:?}")]
    Unfinished { limit: Duration },
}

/// Starts logging, to standard error: `EVREPL_LOG` says what, `info` unless it is set, until [`log_level::set`] does. Spans of
/// [`names::SPAN_TARGET`] go to the tracer, if there is one.
///
/// # Errors
///
/// [`TelemetryError::Filter`], or [`TelemetryError::Twice`]: there is one logger a process.
pub fn start_logging(format: LogFormat, tracer: Option<SdkTracer>) -> Result<(), TelemetryError> {
    let filter = log_level::reloadable(log_filter(env::var_os(LOG_VARIABLE))?);
    subscriber(format, filter, tracer)
        .try_init()
        .map_err(TelemetryError::Twice)
}

fn subscriber(
    format: LogFormat,
    filter: reload::Layer<EnvFilter, tracing_subscriber::Registry>,
    tracer: Option<SdkTracer>,
) -> impl Subscriber + Send + Sync + 'static {
    let lines = tracing_subscriber::fmt::layer().with_writer(&STDERR);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    // Spans that are exported whatever is logged; log lines are no span events.
    let spans = tracer.map(|tracer| {
        // Without the hint each line that a library would log at `trace` is asked for, in librdkafka's wrapper per record.
        let exported = filter_fn(|metadata| metadata.is_span() && metadata.target() == names::SPAN_TARGET)
            .with_max_level_hint(LevelFilter::INFO);
        span_layer(tracer).with_filter(exported)
    });
    tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .with(spans)
}

/// What makes the tracer's spans of `tracing`'s: with what they say themselves, and nothing about threads and source lines.
fn span_layer<S>(tracer: SdkTracer) -> OpenTelemetryLayer<S, SdkTracer>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    tracing_opentelemetry::layer()
        .with_tracer(tracer)
        .with_threads(false)
        .with_location(false)
        .with_target(false)
}

/// Whose tracers' spans end in the queue.
fn tracer_provider(resource: Resource, queue: &SpanQueue) -> SdkTracerProvider {
    SdkTracerProvider::builder()
        .with_resource(resource)
        .with_span_processor(queue.clone())
        .build()
}

fn log_filter(set: Option<OsString>) -> Result<EnvFilter, TelemetryError> {
    let set = set.unwrap_or_default();
    match set.to_str().map(str::trim) {
        None => Err(TelemetryError::FilterNotUtf8),
        Some("") => Ok(EnvFilter::new("info")),
        Some(filter) => Ok(log_level::parse(filter)?),
    }
}

/// Who the metrics are about, and where they go.
#[derive(Clone, Debug)]
pub struct TelemetryOptions {
    /// This region.
    pub region: String,
    /// This process in the region.
    pub node: String,
    /// An OTLP/gRPC receiver, `http://host:4317`; `None`: nothing is exported.
    pub otlp_endpoint: Option<String>,
    /// Which events are traced.
    pub traces: TraceOptions,
}

impl TelemetryOptions {
    /// What the configuration says.
    pub fn of(config: &Config) -> TelemetryOptions {
        let telemetry = &config.telemetry;
        TelemetryOptions {
            region: config.region.clone(),
            node: config.node.clone(),
            otlp_endpoint: telemetry.otlp_endpoint.clone(),
            traces: TraceOptions {
                ratio: telemetry.trace_ratio,
                keys: telemetry.trace_keys,
                slow_after: telemetry.slow_after,
                kept_per_second: telemetry.slow_traces_per_second,
            },
        }
    }
}

/// Starts the telemetry runtime and the instruments. An endpoint that cannot be reached is no error: exports are tried
/// again, and their failures are logged.
///
/// # Errors
///
/// [`TelemetryError::Runtime`], [`TelemetryError::Exporter`] or [`TelemetryError::Registry`].
pub fn start(options: &TelemetryOptions) -> Result<TelemetryHandle, TelemetryError> {
    let runtime = runtime()?;
    let registry = Registry::new();
    let exposed = opentelemetry_prometheus::exporter()
        .with_registry(registry.clone())
        // The names are public as they stand in `Instruments`: nothing is appended to them.
        .without_units()
        .without_counter_suffixes()
        .without_target_info()
        .scope_info_enabled(false)
        .build()
        .map_err(TelemetryError::Registry)?;
    let service = service_name(env::var(SERVICE_VARIABLE).ok());
    let resource = resource(service, &options.region, &options.node);
    let mut provider = SdkMeterProvider::builder()
        .with_resource(resource.clone())
        .with_reader(exposed);
    let (stop, stopped) = watch::channel(());
    let (mut served, mut tracer) = (Vec::new(), None);
    let mut traces = Traces::off();
    if let Some(endpoint) = &options.otlp_endpoint {
        // The exporters' connections belong to the runtime they are made in.
        let _inside = runtime.enter();
        let (queue, ended) = span_export(&runtime, endpoint, &resource, stopped)?;
        served.push(ended);
        tracer = Some(tracer_provider(resource, &queue));
        traces = Traces::new(queue, options.traces.clone());
        let exporter = SteadyExporter::new(collector::metrics_to(endpoint)?);
        provider = provider.with_reader(PeriodicReader::builder(exporter).with_interval(EXPORT_EVERY).build());
    }
    let provider = provider.build();
    let instruments = Instruments::new(&provider.meter(names::SCOPE), Arc::new(traces));
    Ok(TelemetryHandle {
        runtime: Some(runtime),
        provider,
        registry,
        instruments,
        stop: Some(stop),
        served,
        tracer,
    })
}

fn runtime() -> Result<Runtime, TelemetryError> {
    Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("telemetry")
        .enable_all()
        .build()
        .map_err(TelemetryError::Runtime)
}

/// Who spans and metrics are from.
fn resource(service: impl Into<Value>, region: &str, node: &str) -> Resource {
    Resource::builder()
        .with_service_name(service)
        .with_attributes([
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            // The node's name alone may be the same in every region.
            KeyValue::new("service.instance.id", format!("{region}/{node}")),
            KeyValue::new("cloud.region", region.to_owned()),
        ])
        .build()
}

/// Starts the export of spans on `runtime`: the queue to give them to, and what hears when the last one was exported.
fn span_export(
    runtime: &Runtime,
    endpoint: &str,
    resource: &Resource,
    stopped: watch::Receiver<()>,
) -> Result<(SpanQueue, Receiver<()>), TelemetryError> {
    // The exporter's connection belongs to the runtime it is made in.
    let _inside = runtime.enter();
    let (queue, spans) = SpanQueue::new();
    let mut exporter = collector::spans_to(endpoint)?;
    exporter.set_resource(resource);
    let (ended, end) = channel();
    let counts = queue.counts();
    runtime.spawn(async move {
        export::export(spans, counts, exporter, stopped).await;
        drop::<Sender<()>>(ended);
    });
    Ok((queue, end))
}

/// Running telemetry. Dropped, it ends at once; [`TelemetryHandle::shutdown`] lets it finish.
pub struct TelemetryHandle {
    /// Taken when it ends: a runtime must not be dropped inside another one.
    runtime: Option<Runtime>,
    provider: SdkMeterProvider,
    registry: Registry,
    instruments: Arc<Instruments>,
    /// Dropped, it ends what is served.
    stop: Option<watch::Sender<()>>,
    /// Each hears when one server, or the export of spans, has ended.
    served: Vec<Receiver<()>>,
    /// Of `tracing` spans.
    tracer: Option<SdkTracerProvider>,
}

impl TelemetryHandle {
    /// The instruments.
    pub fn instruments(&self) -> Arc<Instruments> {
        self.instruments.clone()
    }

    /// Who exports `tracing` spans of the target [`names::SPAN_TARGET`]; none without an endpoint.
    pub fn tracer(&self) -> Option<SdkTracer> {
        self.tracer.as_ref().map(|provider| provider.tracer(names::SCOPE))
    }

    /// The same instruments as Prometheus reads them.
    pub fn registry(&self) -> Registry {
        self.registry.clone()
    }

    /// Serves the admin interface on `host:port` and returns the address it got. Callable from any thread, also inside
    /// another runtime.
    ///
    /// # Errors
    ///
    /// [`AdminError::Bind`].
    pub fn serve_admin(&mut self, listen: &str, source: Arc<dyn StatusSource>) -> Result<SocketAddr, AdminError> {
        let failed = |source| AdminError::Bind {
            listen: listen.to_owned(),
            source,
        };
        let listener = admin::bind(listen)?;
        let address = listener.local_addr().map_err(failed)?;
        let (Some(runtime), Some(stop)) = (&self.runtime, &self.stop) else {
            return Err(failed(io::ErrorKind::NotConnected.into()));
        };
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener).map_err(failed)?
        };
        let mut stopped = stop.subscribe();
        let offers = Offers {
            source,
            registry: self.registry.clone(),
            taps: self.instruments.taps(),
        };
        let (ended, served) = channel();
        self.served.push(served);
        runtime.spawn(async move {
            let stop = async move {
                // Nothing is ever sent: it ends when the sender goes.
                let _ = stopped.changed().await;
            };
            admin::serve(listener, offers, stop).await;
            drop(ended);
        });
        Ok(address)
    }

    /// Answers the requests at hand, exports once more, and ends; blocks for `limit` at most.
    ///
    /// # Errors
    ///
    /// [`TelemetryError::Unfinished`] when the limit came first. Everything is ended all the same.
    pub fn shutdown(mut self, limit: Duration) -> Result<(), TelemetryError> {
        let deadline = Instant::now() + limit;
        drop(self.stop.take());
        let (exported, export) = channel::<()>();
        let provider = self.provider.clone();
        // On a thread of its own, because its limit is not ours to set.
        let exporting = std::thread::Builder::new()
            .name("telemetry-end".to_owned())
            .spawn(move || {
                if let Err(error) = provider.shutdown() {
                    tracing::warn!(%error, "the last metrics were not exported");
                }
                drop(exported);
            });
        let mut waits = std::mem::take(&mut self.served);
        if exporting.is_ok() {
            waits.push(export);
        }
        let in_time = waits.iter().all(|end| {
            let left = deadline.saturating_duration_since(Instant::now());
            end.recv_timeout(left) == Err(RecvTimeoutError::Disconnected)
        });
        if in_time {
            Ok(())
        } else {
            Err(TelemetryError::Unfinished { limit })
        }
    }
}

impl Drop for TelemetryHandle {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Waiting for it could block an actor's thread, or panic there.
            runtime.shutdown_background();
        }
    }
}

fn service_name(set: Option<String>) -> String {
    // Empty counts as unset: OpenTelemetry's rule for its variables.
    set.filter(|name| !name.is_empty())
        .unwrap_or_else(|| "evrepl".to_owned())
}

#[cfg(test)]
mod tests;
