//! What is said when the collector does not take metrics: once, and again each minute while it lasts, instead of the SDK's
//! error line at each export. A collector for traces alone, such as Jaeger, is told nothing any more.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::metrics::Temporality;
use opentelemetry_sdk::metrics::data::ResourceMetrics;
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use tokio::time::Instant;

use super::export::SAID_EVERY;

/// gRPC's name for a service that is not there, as it stands in the exporter's errors.
const NO_SUCH_SERVICE: &str = "Unimplemented";

/// Whether the collector has no service for what was exported, and never will.
pub(super) fn is_unwanted(error: &OTelSdkError) -> bool {
    error.to_string().contains(NO_SUCH_SERVICE)
}

/// An exporter whose failures are states with a beginning and an end. Metrics are totals: the next export makes up for one
/// that failed, so nothing is counted as lost.
#[derive(Debug)]
pub struct SteadyExporter<E> {
    inner: E,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    said: Option<Instant>,
    unwanted: bool,
}

impl<E> SteadyExporter<E> {
    /// Exports through this one.
    pub fn new(inner: E) -> SteadyExporter<E> {
        let state = Mutex::default();
        SteadyExporter { inner, state }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn heard(&self, result: OTelSdkResult) {
        let mut state = self.state();
        match result {
            Ok(()) => {
                if state.said.take().is_some() {
                    tracing::info!("the collector takes metrics again");
                }
            }
            Err(error) if is_unwanted(&error) => {
                state.unwanted = true;
                tracing::warn!(
                    %error,
                    "the collector takes no metrics, it gets none until evrepl is started again; they are at /metrics"
                );
            }
            Err(error) if state.said.is_none_or(|at| at.elapsed() >= SAID_EVERY) => {
                state.said = Some(Instant::now());
                tracing::warn!(%error, "the collector does not take metrics, trying on");
            }
            Err(_) => {}
        }
    }
}

impl<E: PushMetricExporter> PushMetricExporter for SteadyExporter<E> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        if !self.state().unwanted {
            let result = self.inner.export(metrics).await;
            self.heard(result);
        }
        Ok(())
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.inner.temporality()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    /// Fails with this text, and counts how often it was asked.
    struct Failing(&'static str, Arc<AtomicUsize>);

    impl PushMetricExporter for Failing {
        async fn export(&self, _: &ResourceMetrics) -> OTelSdkResult {
            self.1.fetch_add(1, Relaxed);
            Err(OTelSdkError::InternalFailure(self.0.to_owned()))
        }

        fn force_flush(&self) -> OTelSdkResult {
            Ok(())
        }

        fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
            Ok(())
        }

        fn temporality(&self) -> Temporality {
            Temporality::Cumulative
        }
    }

    #[tokio::test]
    async fn a_collector_that_takes_no_metrics_is_asked_once_and_one_that_is_away_each_time() {
        for (error, asked) in [
            ("code: 'Operation is not implemented', Unimplemented", 1),
            ("transport error", 3),
        ] {
            let count = Arc::default();
            let exporter = SteadyExporter::new(Failing(error, Arc::clone(&count)));
            for _ in 0..3 {
                // The SDK would log each error that it is given.
                assert!(exporter.export(&ResourceMetrics::default()).await.is_ok());
            }
            assert_eq!(count.load(Relaxed), asked, "{error}");
        }
    }
}
