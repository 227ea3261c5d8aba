//! The way of spans out of the process: a bounded queue, and a task on the telemetry runtime that sends what is in it to the
//! collector. Whoever has a span to give never waits: when the collector is slow, gone or wrong, spans are dropped and counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use opentelemetry::Context;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Span, SpanData, SpanExporter, SpanProcessor};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Spans that wait for the collector: some seconds' worth of a thousand traces a second, and a few MiB.
const QUEUE: usize = 16 * 1024;
/// Spans of one export.
const EXPORT_SPANS: usize = 512;
/// How long the first span of an export waits for others.
const LINGER: Duration = Duration::from_millis(200);
/// Between two log lines of the same trouble.
pub(super) const SAID_EVERY: Duration = Duration::from_secs(60);

/// What became of spans, since the process began.
#[derive(Debug, Default)]
pub struct SpanCounts {
    /// The collector has them.
    pub exported: AtomicU64,
    /// There was no room in the queue.
    pub queue_full: AtomicU64,
    /// The collector did not take them.
    pub refused: AtomicU64,
}

/// The giving end of the queue.
#[derive(Clone, Debug)]
pub struct SpanQueue {
    sender: mpsc::Sender<SpanData>,
    counts: Arc<SpanCounts>,
}

impl SpanQueue {
    /// A queue, and the end that [`export`] reads.
    pub fn new() -> (SpanQueue, mpsc::Receiver<SpanData>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let counts = Arc::default();
        (SpanQueue { sender, counts }, receiver)
    }

    /// Gives a span away, or drops and counts it.
    pub fn give(&self, span: SpanData) {
        if self.sender.try_send(span).is_err() {
            self.counts.queue_full.fetch_add(1, Relaxed);
        }
    }

    /// What became of spans.
    pub fn counts(&self) -> Arc<SpanCounts> {
        self.counts.clone()
    }
}

/// Spans of the SDK's tracer take the same way.
impl SpanProcessor for SpanQueue {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        self.give(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }

    fn set_resource(&mut self, _: &Resource) {}
}

/// Exports until `stop` is told, and then what is left in the queue.
pub async fn export(
    mut spans: mpsc::Receiver<SpanData>,
    counts: Arc<SpanCounts>,
    exporter: impl SpanExporter,
    mut stop: tokio::sync::watch::Receiver<()>,
) {
    let mut batch = Vec::with_capacity(EXPORT_SPANS);
    let mut said: Option<Instant> = None;
    let mut stopped = false;
    loop {
        // One span, and after it some time in which nobody waits for the next one: giving a span then wakes no thread, which
        // would cost the giver more than the span does.
        if spans.len() < EXPORT_SPANS && !stopped {
            tokio::select! {
                // Nothing is ever sent: it ends when the sender goes.
                _ = stop.changed() => {}
                _ = spans.recv_many(&mut batch, EXPORT_SPANS) => tokio::select! {
                    _ = stop.changed() => {}
                    () = tokio::time::sleep(LINGER) => {}
                },
            }
        }
        if stop.has_changed().is_err() {
            stopped = true;
            spans.close();
        }
        while batch.len() < EXPORT_SPANS && !spans.is_empty() {
            let room = EXPORT_SPANS - batch.len();
            spans.recv_many(&mut batch, room).await;
        }
        if batch.is_empty() {
            if spans.is_closed() {
                return;
            }
            continue;
        }
        let count = batch.len() as u64;
        let next = Vec::with_capacity(EXPORT_SPANS);
        match exporter.export(std::mem::replace(&mut batch, next)).await {
            Ok(()) => {
                counts.exported.fetch_add(count, Relaxed);
                if said.take().is_some() {
                    tracing::info!("the collector takes spans again");
                }
            }
            Err(error) => {
                counts.refused.fetch_add(count, Relaxed);
                if said.is_none_or(|at| at.elapsed() >= SAID_EVERY) {
                    said = Some(Instant::now());
                    tracing::warn!(%error, spans = count, "the collector does not take spans, they are dropped");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use opentelemetry::InstrumentationScope;
    use opentelemetry::trace::{SpanKind, Status};
    use tokio::sync::watch;

    use super::*;
    use crate::telemetry::event_trace::SpanDraft;

    /// How many spans each export had.
    #[derive(Clone, Debug, Default)]
    struct Exports(Arc<Mutex<Vec<usize>>>);

    impl SpanExporter for Exports {
        async fn export(&self, spans: Vec<SpanData>) -> OTelSdkResult {
            self.0.lock().unwrap().push(spans.len());
            Ok(())
        }
    }

    fn span(n: u64) -> SpanData {
        let draft = SpanDraft {
            trace_id: [1; 16],
            id: (n + 1).to_be_bytes(),
            parent: None,
            remote_parent: false,
            name: "test".into(),
            kind: SpanKind::Internal,
            times: [std::time::SystemTime::UNIX_EPOCH; 2].into(),
            attributes: Vec::new(),
            status: Status::Unset,
        };
        draft.span(&InstrumentationScope::default())
    }

    #[tokio::test]
    async fn spans_leave_in_full_exports_and_at_the_end_all_that_are_left() {
        let (queue, spans) = SpanQueue::new();
        (0..1_300).for_each(|n| queue.give(span(n)));
        let (exports, counts) = (Exports::default(), queue.counts());
        let (stop, stopped) = watch::channel(());
        let exporting = tokio::spawn(export(spans, counts.clone(), exports.clone(), stopped));
        while counts.exported.load(Relaxed) < 1_300 {
            tokio::task::yield_now().await;
        }
        assert_eq!(*exports.0.lock().unwrap(), [512, 512, 276]);

        (0..600).for_each(|n| queue.give(span(n)));
        drop(stop);
        exporting.await.unwrap();
        assert_eq!(exports.0.lock().unwrap()[3..], [512, 88]);
        queue.give(span(0));
        let queue_full = counts.queue_full.load(Relaxed);
        assert_eq!((counts.exported.load(Relaxed), queue_full), (1_900, 1));
    }

    #[tokio::test]
    async fn more_spans_than_the_queue_holds_are_dropped_and_counted() {
        let (queue, spans) = SpanQueue::new();
        (0..QUEUE as u64 + 7).for_each(|n| queue.give(span(n)));
        assert_eq!(queue.counts().queue_full.load(Relaxed), 7);
        drop(spans);
    }
}
