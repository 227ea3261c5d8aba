//! The connections to the collector: OTLP over gRPC, with TLS where the URL says `https`. Nothing is dialled before the first
//! export.

use std::time::Duration;

use opentelemetry_otlp::tonic_types::transport::ClientTlsConfig;
use opentelemetry_otlp::{ExporterBuildError, MetricExporter, SpanExporter, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::error::OTelSdkError;
use opentelemetry_sdk::metrics::data::ResourceMetrics;
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::trace::SpanExporter as _;

use super::TelemetryError;
use super::metric_export::is_unwanted;

/// How long one export may take; below the interval of metrics, so that exports never queue.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where spans go. To be made inside the runtime that its connection is to belong to.
///
/// # Errors
///
/// [`TelemetryError::Exporter`].
pub(super) fn spans_to(endpoint: &str) -> Result<SpanExporter, TelemetryError> {
    let exporter = connect(SpanExporter::builder().with_tonic(), endpoint);
    exporter.build().map_err(|source| unusable(endpoint, source))
}

/// Where metrics go; as [`spans_to`].
///
/// # Errors
///
/// [`TelemetryError::Exporter`].
pub(super) fn metrics_to(endpoint: &str) -> Result<MetricExporter, TelemetryError> {
    let exporter = connect(MetricExporter::builder().with_tonic(), endpoint);
    exporter.build().map_err(|source| unusable(endpoint, source))
}

fn connect<B: WithExportConfig + WithTonicConfig>(exporter: B, endpoint: &str) -> B {
    let exporter = exporter.with_endpoint(endpoint).with_timeout(EXPORT_TIMEOUT);
    match endpoint.starts_with("https://") {
        true => exporter.with_tls_config(ClientTlsConfig::new().with_enabled_roots()),
        false => exporter,
    }
}

fn unusable(endpoint: &str, source: ExporterBuildError) -> TelemetryError {
    TelemetryError::Exporter {
        endpoint: endpoint.to_owned(),
        source,
    }
}

/// What a collector takes, asked with exports of nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CollectorTakes {
    /// Traces and metrics.
    Both,
    /// It is for traces alone.
    TracesOnly,
}

/// Asks the collector at a URL what it takes. Within a runtime.
///
/// # Errors
///
/// Why it takes nothing, in words.
pub async fn ask_collector(endpoint: &str) -> Result<CollectorTakes, String> {
    let (spans, metrics) = (spans_to(endpoint), metrics_to(endpoint));
    let (spans, metrics) = (
        spans.map_err(|error| error.to_string())?,
        metrics.map_err(|error| error.to_string())?,
    );
    spans.export(Vec::new()).await.map_err(in_words)?;
    match metrics.export(&ResourceMetrics::default()).await {
        Ok(()) => Ok(CollectorTakes::Both),
        Err(error) if is_unwanted(&error) => Ok(CollectorTakes::TracesOnly),
        Err(error) => Err(format!("takes traces, but no metrics: {error}")),
    }
}

fn in_words(error: OTelSdkError) -> String {
    match is_unwanted(&error) {
        true => format!("takes no traces, it may be for something else: {error}"),
        false => error.to_string(),
    }
}
