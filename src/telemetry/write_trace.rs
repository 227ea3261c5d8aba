//! The trace of one write by hand, `evrepl write --trace`: what an application that is instrumented does for each of its writes.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use opentelemetry::trace::{TraceContextExt, TracerProvider};
use opentelemetry_sdk::trace::SdkTracerProvider;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tracing::Instrument;
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::layer::SubscriberExt;

use super::export::SpanCounts;
use super::{TelemetryError, names, resource, runtime, span_export, span_layer, tracer_provider};
use crate::config::Config;
use crate::event::TraceContext;
use crate::telemetry::event_trace::random_id;

/// How long the collector may take for the one span.
const EXPORTED_WITHIN: Duration = Duration::from_secs(3);

/// What became of the write's own span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exported {
    /// The collector has it.
    Taken,
    /// The collector refused it, or did not answer.
    NotTaken,
    /// There is no collector.
    Nowhere,
}

/// A trace that begins with one write.
pub struct WriteTrace {
    export: Option<Export>,
}

struct Export {
    provider: SdkTracerProvider,
    stop: watch::Sender<()>,
    ended: Receiver<()>,
    counts: Arc<SpanCounts>,
    runtime: Runtime,
}

impl WriteTrace {
    /// Exports to `telemetry.otlp_endpoint`; without one the write's own span goes nowhere, and the relay's begin the trace.
    ///
    /// # Errors
    ///
    /// [`TelemetryError::Runtime`] or [`TelemetryError::Exporter`].
    pub fn start(config: &Config) -> Result<WriteTrace, TelemetryError> {
        let Some(endpoint) = &config.telemetry.otlp_endpoint else {
            return Ok(WriteTrace { export: None });
        };
        let runtime = runtime()?;
        let (stop, stopped) = watch::channel(());
        let resource = resource("evrepl write", &config.region, "cli");
        let (queue, ended) = span_export(&runtime, endpoint, &resource, stopped)?;
        let counts = queue.counts();
        let provider = tracer_provider(resource, &queue);
        let export = Export {
            provider,
            stop,
            ended,
            counts,
            runtime,
        };
        Ok(WriteTrace { export: Some(export) })
    }

    /// Runs a write inside the span of its trace, which it is given. Gives the trace id, and what became of the span, beside
    /// what the write gives.
    pub async fn trace<T, F: Future<Output = T>>(
        self,
        (op, cache, topic): (&'static str, &str, &str),
        write: impl FnOnce(TraceContext) -> F,
    ) -> (T, TraceContext, Exported) {
        let Some(export) = self.export else {
            let context = TraceContext {
                trace_id: random_id(),
                span_id: random_id(),
                flags: TraceContext::SAMPLED,
            };
            return (write(context).await, context, Exported::Nowhere);
        };
        let layer = span_layer(export.provider.tracer(names::SCOPE));
        let subscriber = tracing_subscriber::registry().with(layer);
        let (context, span) = {
            let _inside = tracing::subscriber::set_default(subscriber);
            let span = tracing::info_span!(
                target: names::SPAN_TARGET,
                "write",
                otel.name = format!("{op} {cache}"),
                otel.kind = "producer",
                messaging.system = "kafka",
                messaging.destination.name = topic,
                messaging.operation.r#type = "send",
                evrepl.cache = cache,
                evrepl.op = op,
            );
            let about = span.context().span().span_context().clone();
            let context = TraceContext {
                trace_id: about.trace_id().to_bytes(),
                span_id: about.span_id().to_bytes(),
                flags: TraceContext::SAMPLED,
            };
            (context, span)
        };
        let result = write(context).instrument(span).await;
        drop(export.stop);
        let ended = export.ended.recv_timeout(EXPORTED_WITHIN) == Err(RecvTimeoutError::Disconnected);
        let exported = match ended && export.counts.exported.load(Relaxed) > 0 {
            true => Exported::Taken,
            false => Exported::NotTaken,
        };
        export.runtime.shutdown_background();
        (result, context, exported)
    }
}
