//! Traces of single events: which of them are traced, and the spans that are made of them when they have ended.
//!
//! Sampling is decided when an event is read, from the writer's `traceparent` or by the ratio: an event that is not traced
//! costs a comparison at each stage and nothing else. One that turns out to be slow, or fails, gets its trace all the same, out
//! of the times that its chunk and its batch have anyway, a few in a second.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use md5::{Digest, Md5};
use opentelemetry::trace::{Event, Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_sdk::trace::SpanData;
use tokio::time::Instant;

use super::event_trace::{BothClocks, EventTrace, PathStage, SpanDraft, before_next, end_of_ms, random_id};
use super::export::{SpanCounts, SpanQueue};
use super::names::{SCOPE, db, events, general, messaging, own};
use super::sampler::{PerSecond, Sampler};
use crate::event::TraceContext;
use crate::outcome::Outcome;

/// What of the configuration concerns traces. By default none is made.
#[derive(Clone, Debug, Default)]
pub struct TraceOptions {
    /// The part that is traced of the events that carry no decision of their own.
    pub ratio: f64,
    /// Keys are shown as they are.
    pub keys: bool,
    /// An event that took longer is traced although it was not sampled; zero: none is.
    pub slow_after: Duration,
    /// So many such traces in a second, and as many of failed events, at most.
    pub kept_per_second: u32,
}

/// Why an event is traced that was not sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptFor {
    /// It took longer than `telemetry.slow_after`.
    Slow = 0,
    /// It did not reach the peer as it was.
    Failed = 1,
}

impl KeptFor {
    /// The public name, an attribute of its root span.
    pub const fn name(self) -> &'static str {
        match self {
            KeptFor::Slow => "slow",
            KeptFor::Failed => "failed",
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Traces {
    queue: Option<SpanQueue>,
    counts: Arc<SpanCounts>,
    options: TraceOptions,
    /// Slow ones, and failed ones: neither takes the other's room.
    kept: [PerSecond; 2],
    scope: InstrumentationScope,
}

/// What an event was, for the spans of its trace.
pub struct TracedEvent<'a> {
    /// `us-east-1->eu-west-1`.
    pub flow: &'a str,
    /// The peer's region.
    pub peer: &'a str,
    /// The consumer group.
    pub group: &'a str,
    /// The topic.
    pub topic: &'a str,
    /// The cache's name.
    pub cache: &'a str,
    /// `host:port` of its memcached server here.
    pub server: &'a str,
    /// The key.
    pub key: &'a [u8],
    /// The event's op.
    pub op: &'static str,
    /// Produced-at, milliseconds since the epoch.
    pub produced_at_ms: i64,
    /// Why it failed, if it did.
    pub error: Option<&'a str>,
}

/// An item that the agent has answered.
pub struct AnsweredItem<'a> {
    /// Its trace, as the relay sent it.
    pub context: TraceContext,
    /// The calling region.
    pub peer: &'a str,
    /// The cache's name.
    pub cache: &'a str,
    /// `host:port` of its memcached server.
    pub server: &'a str,
    /// The key.
    pub key: &'a [u8],
    /// What memcached was told: `set`, `touch` or `delete`.
    pub op: &'static str,
    /// When the batch came.
    pub received: Instant,
    /// When the call to memcached was begun; `None`: there was none.
    pub called: Option<Instant>,
    /// When it was answered.
    pub answered: Instant,
    /// `applied`, or how else it ended.
    pub answer: &'static str,
}

/// A write at the front door, with which a trace begins.
pub struct DoorWrite<'a> {
    /// The trace, and the span that the event names as its parent.
    pub context: TraceContext,
    /// The cache's name.
    pub cache: &'a str,
    /// Its topic.
    pub topic: &'a str,
    /// `host:port` of its memcached server.
    pub server: &'a str,
    /// The key.
    pub key: &'a [u8],
    /// The event's op.
    pub op: &'static str,
    /// When the command was there, and when memcached had answered it.
    pub times: [Instant; 2],
}

/// A batch with items whose traces are sampled.
pub struct TracedBatch<'a> {
    /// `us-east-1->eu-west-1`.
    pub flow: &'a str,
    /// The peer's region.
    pub peer: &'a str,
    /// When it was closed, sent, and acked as a whole.
    pub closed: Instant,
    /// See above.
    pub acked: Instant,
    /// Items in it.
    pub items: usize,
    /// Bytes on the wire, and before compression.
    pub bytes: (usize, usize),
    /// What made it leave.
    pub trigger: &'static str,
    /// The spans of its sampled items.
    pub members: &'a [TraceContext],
}

impl Traces {
    /// Traces that go into this queue.
    pub fn new(queue: SpanQueue, options: TraceOptions) -> Traces {
        Traces {
            kept: [options.kept_per_second; 2].map(PerSecond::new),
            counts: queue.counts(),
            queue: Some(queue),
            options,
            scope: InstrumentationScope::builder(SCOPE)
                .with_version(env!("CARGO_PKG_VERSION"))
                .build(),
        }
    }

    /// None at all: there is no collector.
    pub fn off() -> Traces {
        Traces {
            queue: None,
            counts: Arc::default(),
            kept: [0; 2].map(PerSecond::new),
            options: TraceOptions::default(),
            scope: InstrumentationScope::default(),
        }
    }

    /// Whether anything is traced.
    pub fn enabled(&self) -> bool {
        self.queue.is_some()
    }

    /// Who decides for events without a decision of their own; one for each partition.
    pub fn sampler(&self) -> Sampler {
        let ratio = if self.enabled() { self.options.ratio } else { 0.0 };
        Sampler::new(ratio)
    }

    /// What became of spans so far.
    pub fn counts(&self) -> &SpanCounts {
        &self.counts
    }

    /// An event produced before this time, in milliseconds since the epoch, that ends now is slow.
    pub fn slow_before(&self, now_ms: i64) -> i64 {
        match self.enabled() && !self.options.slow_after.is_zero() {
            true => now_ms.saturating_sub(self.options.slow_after.as_millis() as i64),
            false => i64::MIN,
        }
    }

    /// Whether one more event may be traced for this reason that was not sampled.
    pub fn keeps_one_more(&self, why: KeptFor, now_ms: i64) -> bool {
        self.enabled() && self.kept[why as usize].take(now_ms)
    }

    /// An event has ended: makes its spans.
    pub fn ended(&self, event: &TracedEvent<'_>, trace: &EventTrace, outcome: Outcome) {
        let Some(queue) = self.queue.as_ref().filter(|_| trace.exported) else {
            return;
        };
        let clocks = BothClocks::now();
        let ended = Instant::now();
        tracing::debug!(
            flow = event.flow,
            trace_id = %TraceId::from_bytes(trace.trace_id),
            outcome = outcome.name(),
            "traced event ended"
        );
        let taken = clocks.wall(trace.taken);
        let produced = end_of_ms(event.produced_at_ms).min(taken);
        let mut stages: Vec<SpanData> = vec![self.stage(
            trace,
            event,
            PathStage::Kafka,
            random_id(),
            (produced, before_next(taken)),
        )];
        for (stage, end) in trace.stages(ended) {
            let last = end == ended;
            let end = clocks.wall(end);
            let times = (clocks.wall(stage.from), if last { end } else { before_next(end) });
            let span = self.stage(trace, event, stage.stage, stage.id, times);
            stages.push(span);
        }
        let mut root = self.root(trace, event, outcome, (produced, clocks.wall(ended)));
        let mut happened: Vec<Event> = trace
            .notes()
            .iter()
            .map(|(at, note)| note.as_event(clocks.wall(*at)))
            .collect();
        if trace.shortened() {
            happened.push(Event::new(events::SHORTENED, clocks.wall(ended), Vec::new(), 0));
        }
        root.events.events = happened;
        // Of one that was sampled the agent has made its own.
        if let (Some(_), Some(us), Some((link, _))) = (trace.kept_for, trace.agent_us, trace.stages(ended).last())
            && link.stage == PathStage::Link
        {
            self.reported(
                event,
                trace,
                &link.id,
                us,
                (clocks.wall(link.from), clocks.wall(ended)),
                queue,
            );
        }
        queue.give(root);
        stages.into_iter().for_each(|span| queue.give(span));
    }

    fn root(
        &self,
        trace: &EventTrace,
        event: &TracedEvent<'_>,
        outcome: Outcome,
        times: (SystemTime, SystemTime),
    ) -> SpanData {
        let lag = times.1.duration_since(times.0).unwrap_or_default().as_secs_f64();
        let mut attributes = vec![
            KeyValue::new(messaging::SYSTEM, "kafka"),
            KeyValue::new(messaging::DESTINATION, event.topic.to_owned()),
            KeyValue::new(messaging::OPERATION_NAME, "process"),
            KeyValue::new(messaging::OPERATION_TYPE, "process"),
            KeyValue::new(messaging::GROUP, event.group.to_owned()),
            KeyValue::new(own::FLOW, event.flow.to_owned()),
            KeyValue::new(own::CACHE, event.cache.to_owned()),
            KeyValue::new(own::OP, event.op),
            KeyValue::new(own::OUTCOME, outcome.name()),
            KeyValue::new(own::LAG, lag),
        ];
        attributes.extend(self.key(event.key));
        if let Some((partition, offset)) = trace.record {
            attributes.push(KeyValue::new(messaging::PARTITION, partition.to_string()));
            attributes.push(KeyValue::new(messaging::OFFSET, offset));
        }
        if let Some(why) = trace.kept_for {
            attributes.push(KeyValue::new(own::KEPT_FOR, why.name()));
        }
        let status = match (event.error, outcome) {
            (Some(error), _) => Status::error(error.to_owned()),
            (None, Outcome::TooLarge) => Status::error("the value is larger than the peer takes"),
            (None, Outcome::DeadLettered) => Status::error("not an event"),
            _ => Status::Unset,
        };
        if let Status::Error { .. } = status {
            attributes.push(KeyValue::new(general::ERROR_TYPE, outcome.name()));
        }
        let draft = SpanDraft {
            trace_id: trace.trace_id,
            id: trace.root,
            parent: trace.parent,
            remote_parent: trace.parent.is_some(),
            name: format!("process {}", event.cache).into(),
            kind: SpanKind::Consumer,
            times,
            attributes,
            status,
        };
        draft.span(&self.scope)
    }

    fn stage(
        &self,
        trace: &EventTrace,
        event: &TracedEvent<'_>,
        stage: PathStage,
        id: [u8; 8],
        times: (SystemTime, SystemTime),
    ) -> SpanData {
        let mut attributes = vec![KeyValue::new(own::STAGE, stage.name())];
        let (name, kind): (Cow<'static, str>, _) = match stage {
            PathStage::Look => {
                attributes.extend(memcached(event.cache, event.server, "get"));
                let bytes = trace
                    .value_bytes
                    .map(|bytes| KeyValue::new(own::VALUE_BYTES, bytes as i64));
                attributes.extend(bytes);
                ("look".into(), SpanKind::Client)
            }
            PathStage::Link => {
                attributes.push(KeyValue::new(general::PEER, event.peer.to_owned()));
                (format!("ship to {}", event.peer).into(), SpanKind::Client)
            }
            PathStage::Kafka => {
                attributes.push(KeyValue::new(messaging::SYSTEM, "kafka"));
                attributes.push(KeyValue::new(messaging::DESTINATION, event.topic.to_owned()));
                ("in kafka".into(), SpanKind::Internal)
            }
            other => (other.name().into(), SpanKind::Internal),
        };
        let draft = SpanDraft {
            trace_id: trace.trace_id,
            id,
            parent: Some(trace.root),
            remote_parent: false,
            name,
            kind,
            times,
            attributes,
            status: Status::Unset,
        };
        draft.span(&self.scope)
    }

    /// The agent's spans as its ack describes them, for an event that it did not know to be traced: in the middle of the way
    /// there and back.
    fn reported(
        &self,
        event: &TracedEvent<'_>,
        trace: &EventTrace,
        link: &[u8; 8],
        (queued_us, applied_us): (u64, u64),
        (sent, acked): (SystemTime, SystemTime),
        queue: &SpanQueue,
    ) {
        let (queued, applied) = (Duration::from_micros(queued_us), Duration::from_micros(applied_us));
        let there = acked.duration_since(sent).unwrap_or_default();
        let received = sent + there.saturating_sub(queued + applied) / 2;
        let times = [
            received,
            (received + queued).min(acked),
            (received + queued + applied).min(acked),
        ];
        let context = TraceContext {
            trace_id: trace.trace_id,
            span_id: *link,
            flags: TraceContext::SAMPLED,
        };
        let about = About {
            context,
            cache: event.cache,
            server: None,
            key: event.key,
            op: event.op,
            answer: "applied",
        };
        let mut attributes = vec![KeyValue::new(own::REPORTED, true)];
        attributes.push(KeyValue::new(own::REGION, event.peer.to_owned()));
        self.agent_spans(&about, times, true, attributes, queue);
    }

    /// The agent has answered a traced item: makes its spans.
    pub fn answered(&self, item: &AnsweredItem<'_>) {
        let Some(queue) = &self.queue else { return };
        let clocks = BothClocks::now();
        let called = item.called.unwrap_or(item.answered);
        let times = [item.received, called, item.answered].map(|at| clocks.wall(at));
        let about = About {
            context: item.context,
            cache: item.cache,
            server: Some(item.server),
            key: item.key,
            op: item.op,
            answer: item.answer,
        };
        let peer = vec![KeyValue::new(general::PEER, item.peer.to_owned())];
        self.agent_spans(&about, times, item.called.is_some(), peer, queue);
    }

    /// The front door has made an event of a traced write: makes its spans.
    pub fn written(&self, write: &DoorWrite<'_>) {
        let Some(queue) = &self.queue else { return };
        let clocks = BothClocks::now();
        let [received, answered] = write.times.map(|at| clocks.wall(at));
        let attributes = vec![
            KeyValue::new(own::STAGE, "front_door"),
            KeyValue::new(own::CACHE, write.cache.to_owned()),
            KeyValue::new(own::OP, write.op),
            KeyValue::new(messaging::SYSTEM, "kafka"),
            KeyValue::new(messaging::DESTINATION, write.topic.to_owned()),
            KeyValue::new(messaging::OPERATION_TYPE, "send"),
        ];
        let root = SpanDraft {
            trace_id: write.context.trace_id,
            id: write.context.span_id,
            parent: None,
            remote_parent: false,
            name: format!("{} {}", write.op, write.cache).into(),
            kind: SpanKind::Producer,
            times: (received, clocks.wall(Instant::now())),
            attributes: attributes.into_iter().chain(self.key(write.key)).collect(),
            status: Status::Unset,
        };
        queue.give(root.span(&self.scope));
        let call = SpanDraft {
            trace_id: write.context.trace_id,
            id: random_id(),
            parent: Some(write.context.span_id),
            remote_parent: false,
            name: write.op.into(),
            kind: SpanKind::Client,
            times: (received, answered),
            attributes: memcached(write.cache, write.server, write.op).collect(),
            status: Status::Unset,
        };
        queue.give(call.span(&self.scope));
    }

    fn agent_spans(
        &self,
        about: &About<'_>,
        [received, called, answered]: [SystemTime; 3],
        wrote: bool,
        more: Vec<KeyValue>,
        queue: &SpanQueue,
    ) {
        let mut attributes = vec![
            KeyValue::new(own::STAGE, "agent"),
            KeyValue::new(own::CACHE, about.cache.to_owned()),
            KeyValue::new(own::OP, about.op),
            KeyValue::new(own::ANSWER, about.answer),
        ];
        attributes.extend(more);
        attributes.extend(self.key(about.key));
        let status = match about.answer {
            "applied" | "look_again" | "expired" => Status::Unset,
            other => {
                attributes.push(KeyValue::new(general::ERROR_TYPE, other.to_owned()));
                Status::error(other.to_owned())
            }
        };
        let id = random_id();
        let trace_id = about.context.trace_id;
        let server = SpanDraft {
            trace_id,
            id,
            parent: Some(about.context.span_id),
            remote_parent: true,
            name: format!("apply {}", about.cache).into(),
            kind: SpanKind::Server,
            times: (received, answered),
            attributes,
            status,
        };
        queue.give(server.span(&self.scope));
        let child = |stage: PathStage, name: &'static str, kind, times, more: Vec<KeyValue>| SpanDraft {
            trace_id,
            id: random_id(),
            parent: Some(id),
            remote_parent: false,
            name: name.into(),
            kind,
            times,
            attributes: std::iter::once(KeyValue::new(own::STAGE, stage.name()))
                .chain(more)
                .collect(),
            status: Status::Unset,
        };
        let waited = child(
            PathStage::AgentQueue,
            "agent queue",
            SpanKind::Internal,
            (received, if wrote { before_next(called) } else { called }),
            Vec::new(),
        );
        queue.give(waited.span(&self.scope));
        if wrote {
            let call = memcached(about.cache, about.server.unwrap_or_default(), about.op).collect();
            let wrote = child(PathStage::Apply, about.op, SpanKind::Client, (called, answered), call);
            queue.give(wrote.span(&self.scope));
        }
    }

    /// A batch with traced items was acked as a whole: makes its span, a trace of its own that links to theirs.
    pub fn shipped(&self, batch: &TracedBatch<'_>) {
        let Some(queue) = &self.queue else { return };
        let clocks = BothClocks::now();
        let draft = SpanDraft {
            trace_id: random_id(),
            id: random_id(),
            parent: None,
            remote_parent: false,
            name: format!("ship batch to {}", batch.peer).into(),
            kind: SpanKind::Producer,
            times: (clocks.wall(batch.closed), clocks.wall(batch.acked)),
            attributes: vec![
                KeyValue::new(own::FLOW, batch.flow.to_owned()),
                KeyValue::new(general::PEER, batch.peer.to_owned()),
                KeyValue::new(messaging::BATCH_COUNT, batch.items as i64),
                KeyValue::new(messaging::BODY_SIZE, batch.bytes.0 as i64),
                KeyValue::new(own::RAW_BYTES, batch.bytes.1 as i64),
                KeyValue::new(own::TRIGGER, batch.trigger),
                KeyValue::new(own::TRACED_ITEMS, batch.members.len() as i64),
            ],
            status: Status::Unset,
        };
        let mut span = draft.span(&self.scope);
        let links = batch.members.iter().map(|member| {
            let (trace, id) = (TraceId::from_bytes(member.trace_id), SpanId::from_bytes(member.span_id));
            let context = SpanContext::new(trace, id, TraceFlags::SAMPLED, false, TraceState::default());
            Link::new(context, Vec::new(), 0)
        });
        span.links.links = links.collect();
        queue.give(span);
    }

    /// The key's attributes.
    fn key(&self, key: &[u8]) -> impl Iterator<Item = KeyValue> {
        let hash = KeyValue::new(own::KEY_HASH, key_hash(key));
        let key = self
            .options
            .keys
            .then(|| KeyValue::new(own::KEY, String::from_utf8_lossy(key).into_owned()));
        std::iter::once(hash).chain(key)
    }
}

/// What the agent's spans are about.
struct About<'a> {
    context: TraceContext,
    cache: &'a str,
    server: Option<&'a str>,
    key: &'a [u8],
    op: &'static str,
    answer: &'static str,
}

/// The attributes of a call to memcached.
fn memcached(cache: &str, server: &str, operation: &'static str) -> impl Iterator<Item = KeyValue> {
    let place = server.rsplit_once(':').and_then(|(host, port)| {
        let port = port.parse::<i64>().ok()?;
        let host = KeyValue::new(general::SERVER_ADDRESS, host.to_owned());
        Some([host, KeyValue::new(general::SERVER_PORT, port)])
    });
    let what = [
        KeyValue::new(db::SYSTEM, "memcached"),
        KeyValue::new(db::NAMESPACE, cache.to_owned()),
        KeyValue::new(db::OPERATION, operation),
    ];
    what.into_iter().chain(place.into_iter().flatten())
}

/// The first half of a key's MD5, in hex.
pub fn key_hash(key: &[u8]) -> String {
    use std::fmt::Write as _;
    let digest = Md5::digest(key);
    digest.iter().take(8).fold(String::with_capacity(16), |mut hex, byte| {
        // Writing to a String cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}
