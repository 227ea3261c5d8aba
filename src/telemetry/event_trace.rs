//! What a traced event carries with it: when it reached each stage of its path, and what happened to it on the way. Spans are
//! made of it once, when the event has ended, with the times it really had. A plain type: the caller brings the clock.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{Event, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};
use tokio::time::Instant;

use super::names::events;
use super::traces::KeptFor;
use crate::event::TraceContext;

/// Stages that one trace keeps: a key that is looked at again for minutes must not grow without end.
const MAX_STAGES: usize = 64;
/// Span events that one trace keeps.
const MAX_NOTES: usize = 64;

/// The stages of an event's path inside the relay, and of an item's in the agent, in the order of the path. Each begins where
/// the one before it ends, so that their times add up to the event's lag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathStage {
    /// From produced-at until it was taken.
    Kafka,
    /// Until its look is sent: the chunk's queue, decoding, permits, the reader's mailbox.
    Queue,
    /// Until it is looked at again: as a dirty key, on the retry topic, or because there was no value yet.
    Wait,
    /// Until memcached has answered.
    Look,
    /// Until its batch is closed: the coalescer's mailbox and linger.
    Coalesce,
    /// Until the ack is heard, less the time in the agent: the link's mailbox and window, the network there and back.
    Link,
    /// In the agent, until its write is sent.
    AgentQueue,
    /// Until the peer's memcached has answered.
    Apply,
}

impl PathStage {
    /// All of them, in the order of the path; most events pass [`PathStage::Wait`] in no time.
    pub const ALL: [PathStage; 8] = [
        PathStage::Kafka,
        PathStage::Queue,
        PathStage::Wait,
        PathStage::Look,
        PathStage::Coalesce,
        PathStage::Link,
        PathStage::AgentQueue,
        PathStage::Apply,
    ];

    /// The public name, in metrics, `/status` and spans.
    pub const fn name(self) -> &'static str {
        match self {
            PathStage::Kafka => "kafka",
            PathStage::Queue => "queue",
            PathStage::Wait => "wait",
            PathStage::Look => "look",
            PathStage::Coalesce => "coalesce",
            PathStage::Link => "link",
            PathStage::AgentQueue => "agent_queue",
            PathStage::Apply => "apply",
        }
    }
}

/// Something that happened to an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// Its key became dirty, for this reason.
    LookAgain(&'static str),
    /// A memcached server's circuit breaker is open: its key waits for that server.
    BreakerOpen(Arc<str>),
    /// There was no value yet.
    NotThereYet,
    /// A newer event of the key took its place.
    Superseded,
    /// It went to the retry topic.
    Parked,
}

/// A stage that began.
#[derive(Clone, Copy, Debug)]
pub struct StageSpan {
    /// Its span.
    pub id: [u8; 8],
    /// Which one.
    pub stage: PathStage,
    /// When it began; it ends with the next one.
    pub from: Instant,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct EventTrace {
    /// The trace.
    pub trace_id: [u8; 16],
    /// The writer's span, when it has one.
    pub parent: Option<[u8; 8]>,
    /// The span of the event's whole way.
    pub root: [u8; 8],
    /// Spans are made of it.
    pub exported: bool,
    /// Somebody looks at it through a tap.
    pub tapped: bool,
    /// Why it is traced although it was not sampled.
    pub kept_for: Option<KeptFor>,
    /// When the event was taken from Kafka.
    pub taken: Instant,
    /// Partition and offset, where they are known.
    pub record: Option<(i32, i64)>,
    /// Bytes of the last value seen; `None`: there was none.
    pub value_bytes: Option<usize>,
    /// What the peer's agent reported of its part, when its spans are not its own: microseconds in its queue, and in its
    /// memcached.
    pub agent_us: Option<(u64, u64)>,
    stages: Vec<StageSpan>,
    notes: Vec<(Instant, Note)>,
    shortened: bool,
}

impl EventTrace {
    /// The trace of an event that was taken then. With the writer's context it belongs to the writer's trace.
    pub fn begin(context: Option<TraceContext>, taken: Instant) -> EventTrace {
        let mut trace = EventTrace {
            trace_id: context.map_or_else(random_id, |context| context.trace_id),
            parent: context.map(|context| context.span_id),
            root: random_id(),
            exported: true,
            tapped: false,
            kept_for: None,
            taken,
            record: None,
            value_bytes: None,
            agent_us: None,
            stages: Vec::with_capacity(8),
            notes: Vec::new(),
            shortened: false,
        };
        trace.enter(PathStage::Queue, taken);
        trace
    }

    /// The event is at another stage from now on. Gives that stage's span.
    pub fn enter(&mut self, stage: PathStage, now: Instant) -> [u8; 8] {
        let id = random_id();
        if self.stages.len() < MAX_STAGES {
            self.stages.push(StageSpan { id, stage, from: now });
        } else {
            self.shortened = true;
        }
        id
    }

    /// Something happened to it.
    pub fn note(&mut self, note: Note, now: Instant) {
        if self.notes.len() < MAX_NOTES {
            self.notes.push((now, note));
        } else {
            self.shortened = true;
        }
    }

    /// What goes to the peer: its spans hang below the stage at hand.
    pub fn context(&self) -> TraceContext {
        TraceContext {
            trace_id: self.trace_id,
            span_id: self.stages.last().map_or(self.root, |last| last.id),
            flags: TraceContext::SAMPLED,
        }
    }

    /// What a later attempt at the same event hangs below.
    pub fn root_context(&self) -> TraceContext {
        TraceContext {
            span_id: self.root,
            ..self.context()
        }
    }

    /// The stages with their ends, the last of which is `ended`.
    pub fn stages(&self, ended: Instant) -> impl Iterator<Item = (StageSpan, Instant)> {
        let ends = self.stages.iter().skip(1).map(|next| next.from);
        self.stages.iter().copied().zip(ends.chain([ended]))
    }

    /// Microseconds in each stage, in the order of the path, those of a stage that it passed more than once together. The
    /// agent's part is taken out of the link's, where it is known.
    pub fn stage_times(&self, in_kafka: Duration, ended: Instant) -> Vec<(&'static str, u64)> {
        let mut times = vec![(PathStage::Kafka.name(), in_kafka.as_micros() as u64)];
        let mut add = |stage: PathStage, us: u64| match times.iter_mut().find(|(name, _)| *name == stage.name()) {
            Some((_, known)) => *known += us,
            None => times.push((stage.name(), us)),
        };
        for (stage, end) in self.stages(ended) {
            add(
                stage.stage,
                end.saturating_duration_since(stage.from).as_micros() as u64,
            );
        }
        if let Some((queued, applied)) = self.agent_us {
            add(PathStage::AgentQueue, queued);
            add(PathStage::Apply, applied);
            if let Some((_, link)) = times.iter_mut().find(|(name, _)| *name == PathStage::Link.name()) {
                *link = link.saturating_sub(queued.saturating_add(applied));
            }
        }
        times
    }

    /// What happened, and when.
    pub fn notes(&self) -> &[(Instant, Note)] {
        &self.notes
    }

    /// Not all of its stages or notes were kept.
    pub fn shortened(&self) -> bool {
        self.shortened
    }
}

impl Note {
    /// In words.
    pub fn describe(&self) -> String {
        match self {
            Note::LookAgain(reason) => format!("{}: {reason}", events::LOOK_AGAIN),
            Note::BreakerOpen(server) => format!("{}: {server}", events::BREAKER_OPEN),
            Note::NotThereYet => events::NOT_THERE_YET.to_owned(),
            Note::Superseded => events::SUPERSEDED.to_owned(),
            Note::Parked => events::PARKED.to_owned(),
        }
    }

    /// As a span event.
    pub fn as_event(&self, at: SystemTime) -> Event {
        let (name, attributes) = match self {
            Note::LookAgain(reason) => (
                events::LOOK_AGAIN,
                vec![KeyValue::new(super::names::own::REASON, *reason)],
            ),
            Note::BreakerOpen(server) => {
                let waits_for = KeyValue::new(super::names::own::WAITS_FOR, server.to_string());
                (events::BREAKER_OPEN, vec![waits_for])
            }
            Note::NotThereYet => (events::NOT_THERE_YET, Vec::new()),
            Note::Superseded => (events::SUPERSEDED, Vec::new()),
            Note::Parked => (events::PARKED, Vec::new()),
        };
        Event::new(name, at, attributes, 0)
    }
}

/// One moment on both clocks, for times that were taken by the monotonic one.
#[derive(Clone, Copy, Debug)]
pub struct BothClocks {
    wall: SystemTime,
    monotonic: Instant,
}

impl BothClocks {
    /// This moment.
    pub fn now() -> BothClocks {
        BothClocks {
            wall: SystemTime::now(),
            monotonic: Instant::now(),
        }
    }

    /// The same moment by the wall clock, as that goes now.
    pub fn wall(&self, at: Instant) -> SystemTime {
        match at.checked_duration_since(self.monotonic) {
            Some(later) => self.wall + later,
            None => self
                .wall
                .checked_sub(self.monotonic - at)
                .unwrap_or(SystemTime::UNIX_EPOCH),
        }
    }
}

/// The last moment that a time in whole milliseconds may mean: a span that begins then begins no earlier than the one of
/// whoever took the time.
pub fn end_of_ms(ms: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_micros(ms.max(0) as u64 * 1000 + 999)
}

/// The end of a stage that another one follows: a microsecond before that one begins, because Jaeger, which counts in
/// microseconds, takes only what ended *before* into its critical path, and would leave out every second stage.
pub fn before_next(begins: SystemTime) -> SystemTime {
    begins.checked_sub(Duration::from_micros(1)).unwrap_or(begins)
}

/// What differs from span to span; [`SpanDraft::span`] adds the rest.
pub struct SpanDraft {
    /// Which trace.
    pub trace_id: [u8; 16],
    /// Its own id.
    pub id: [u8; 8],
    /// Its parent's, if it has one.
    pub parent: Option<[u8; 8]>,
    /// The parent is another process's.
    pub remote_parent: bool,
    /// Its name.
    pub name: Cow<'static, str>,
    /// Its kind.
    pub kind: SpanKind,
    /// When it began and ended.
    pub times: (SystemTime, SystemTime),
    /// Its attributes.
    pub attributes: Vec<KeyValue>,
    /// Its status.
    pub status: Status,
}

impl SpanDraft {
    /// The span.
    pub fn span(self, scope: &InstrumentationScope) -> SpanData {
        let state = TraceState::default();
        let (trace, id) = (TraceId::from_bytes(self.trace_id), SpanId::from_bytes(self.id));
        SpanData {
            span_context: SpanContext::new(trace, id, TraceFlags::SAMPLED, false, state),
            parent_span_id: self.parent.map_or(SpanId::INVALID, SpanId::from_bytes),
            parent_span_is_remote: self.remote_parent,
            span_kind: self.kind,
            name: self.name,
            start_time: self.times.0,
            // A clock that was set back between the two must not make a span of negative length.
            end_time: self.times.1.max(self.times.0),
            attributes: self.attributes,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: self.status,
            instrumentation_scope: scope.clone(),
        }
    }
}

/// An id for a span or a trace; never all zeros, which would be none.
pub fn random_id<const N: usize>() -> [u8; N] {
    loop {
        let mut id = [0; N];
        id.iter_mut().for_each(|byte| *byte = rand::random());
        if id != [0; N] {
            return id;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stages_follow_one_another_without_a_gap_and_add_up_to_the_whole() {
        let taken = Instant::now();
        let at = |ms| taken + Duration::from_millis(ms);
        let mut trace = EventTrace::begin(None, taken);
        trace.enter(PathStage::Look, at(5));
        trace.enter(PathStage::Wait, at(6));
        trace.enter(PathStage::Look, at(16));
        trace.enter(PathStage::Coalesce, at(18));
        trace.enter(PathStage::Link, at(20));
        trace.agent_us = Some((4_000, 6_000));
        let times = trace.stage_times(Duration::from_millis(7), at(50));
        let expected = [
            ("kafka", 7_000),
            ("queue", 5_000),
            ("look", 3_000),
            ("wait", 10_000),
            ("coalesce", 2_000),
            ("link", 20_000),
            ("agent_queue", 4_000),
            ("apply", 6_000),
        ];
        assert_eq!(times, expected);
        assert_eq!(times.iter().map(|(_, us)| us).sum::<u64>(), 57_000);
    }

    #[test]
    fn a_key_that_is_looked_at_again_for_ever_keeps_its_trace_small() {
        let now = Instant::now();
        let mut trace = EventTrace::begin(None, now);
        for _ in 0..10_000 {
            trace.enter(PathStage::Look, now);
            trace.note(Note::LookAgain("later"), now);
        }
        assert_eq!(
            (trace.stages(now).count(), trace.notes().len()),
            (MAX_STAGES, MAX_NOTES)
        );
        assert!(trace.shortened());
    }

    #[test]
    fn the_peers_spans_hang_below_the_stage_at_hand_and_later_attempts_below_the_whole() {
        let writer = TraceContext {
            trace_id: [7; 16],
            span_id: [8; 8],
            flags: TraceContext::SAMPLED,
        };
        let mut trace = EventTrace::begin(Some(writer), Instant::now());
        assert_eq!((trace.trace_id, trace.parent), ([7; 16], Some([8; 8])));
        let link = trace.enter(PathStage::Link, Instant::now());
        assert_eq!(
            (trace.context().span_id, trace.root_context().span_id),
            (link, trace.root)
        );
    }

    #[test]
    fn a_time_in_milliseconds_is_never_before_what_it_cut_off() {
        let whole = SystemTime::UNIX_EPOCH + Duration::from_millis(5);
        assert!(end_of_ms(5) > whole && end_of_ms(5) < whole + Duration::from_millis(1));
        assert!(end_of_ms(i64::MIN) < whole);
    }
}
