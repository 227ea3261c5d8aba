//! A partition consumer after panics: what was in flight in two of them is handed on in groups, with nothing else in flight
//! beside one, until the event that causes them stands alone ([`crate::suspects`]).

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::SeqCst;

use super::*;
use crate::suspects::{Care, Span, care};

/// Why a dead letter that panicked whoever had it in hand is one.
const PANICKED: &str = "panicked";

/// Events that are handed on together.
pub(super) struct Group {
    pub events: Vec<HeldEvent>,
    /// The offset of each when they are on trial; empty when they are not.
    pub offsets: Vec<(Seq, i64)>,
}

/// Events that are in flight with nothing beside them.
pub(super) struct Trial {
    /// All permits that chunks may have; dropped, others are in flight again.
    pub _permits: TakenPermits,
    pub offsets: Vec<(Seq, i64)>,
    /// One of the events waits as a dirty key: it may still be the cause.
    pub dirty: bool,
}

/// What a partition consumer knows of the panics before it, and what its own would leave.
#[derive(Default)]
pub(super) struct Careful {
    spans: Vec<Span>,
    /// The rest of a chunk that is handed on group by group.
    pub groups: VecDeque<Group>,
    /// Sequence numbers and offsets of the chunk at hand.
    opened: Vec<(Seq, i64)>,
    pub trial: Option<Trial>,
    /// What is being read: to be blamed if this consumer panics.
    at_hand: Option<(i64, i64)>,
}

impl Careful {
    pub fn new(parts: &PartitionConsumerParts) -> Self {
        let at = &parts.queue.at;
        let spans = parts.shared.view.suspects().of(at, Instant::now());
        if let (Some(first), Some(last)) = (spans.first(), spans.last()) {
            tracing::warn!(
                flow = parts.shared.view.name,
                topic = at.topic,
                partition = at.partition,
                from = first.from,
                to = last.to,
                "these events were in hand in two panics, they are tried apart"
            );
        }
        Careful {
            spans,
            ..Careful::default()
        }
    }

    /// A chunk is about to be read; true when some of it needs care.
    pub fn begin(&mut self, chunk: &Chunk) -> bool {
        let (Some(first), Some(last)) = (chunk.records.first(), chunk.records.last()) else {
            return false;
        };
        self.at_hand = Some((first.offset, last.offset + 1));
        self.spans.retain(|span| span.to > first.offset);
        self.opened.clear();
        self.spans.first().is_some_and(|span| span.from <= last.offset)
    }

    /// The chunk is read: its events in the groups in which they are to be handed on, those that are not suspected first.
    pub fn group(&mut self, events: Vec<HeldEvent>, most: usize) {
        self.at_hand = None;
        if self.opened.is_empty() {
            self.push(events, Vec::new());
            return;
        }
        let mut others = Vec::new();
        let (mut group, mut offsets) = (Vec::new(), Vec::new());
        for event in events {
            let found = self.opened.binary_search_by_key(&event.ticket.seq, |(seq, _)| *seq);
            let offset = found.map_or(i64::MIN, |at| self.opened[at].1);
            let Care::Trial(size) = care(&self.spans, offset) else {
                others.push(event);
                continue;
            };
            if group.len() >= size.min(most) {
                self.push(std::mem::take(&mut group), std::mem::take(&mut offsets));
            }
            offsets.push((event.ticket.seq, offset));
            group.push(event);
        }
        self.push(group, offsets);
        if !others.is_empty() {
            self.groups.push_front(Group {
                events: others,
                offsets: Vec::new(),
            });
        }
        self.opened = Vec::new();
    }

    fn push(&mut self, events: Vec<HeldEvent>, offsets: Vec<(Seq, i64)>) {
        if !events.is_empty() {
            self.groups.push_back(Group { events, offsets });
        }
    }
}

impl PartitionConsumer {
    /// [`read`](Self::read) for a record that may be what panics.
    pub(super) fn read_carefully(
        &mut self,
        chunk: &Chunk,
        record: &RecordEntry,
        seq: Seq,
    ) -> Result<Option<HeldEvent>, &'static str> {
        self.careful.opened.push((seq, record.offset));
        if care(&self.careful.spans, record.offset) == Care::Culprit {
            return Err(PANICKED);
        }
        // Reading changes nothing here, so nothing is left half done.
        catch_unwind(AssertUnwindSafe(|| self.read(chunk, record, seq))).unwrap_or(Err(PANICKED))
    }

    /// Nothing is in flight any more: the next group may go.
    pub(super) fn end_trial(&mut self) {
        if self.careful.trial.is_none() || self.tracker.accounts().in_flight > 0 {
            return;
        }
        self.working = false;
        if let Some(trial) = self.careful.trial.take()
            && !trial.dirty
        {
            let mut suspects = self.parts.shared.view.suspects();
            for (_, offset) in trial.offsets {
                suspects.finished(&self.parts.queue.at, offset, offset + 1);
            }
        }
        // At once: what is committed need not be tried again after the next panic.
        self.commit();
    }

    /// Leaves word of what was in hand, for the case that one of it takes the flow down.
    pub(super) fn note_suspects(&self) {
        let at = &self.parts.queue.at;
        let mut suspects = self.parts.shared.view.suspects();
        if let Some(span) = self.careful.at_hand {
            suspects.in_hand(at, span);
            return;
        }
        let events = self.tracker.accounts().in_flight;
        let on_trial = self.careful.trial.iter().flat_map(|trial| &trial.offsets);
        let on_trial: Vec<(i64, i64)> = on_trial
            .filter(|(seq, _)| self.tracker.is_in_flight(*seq))
            .map(|(_, offset)| (*offset, offset + 1))
            .collect();
        if on_trial.len() as u64 == events {
            suspects.in_flight(at, on_trial, events);
            return;
        }
        let mut spans = self.tracker.in_flight_spans();
        if let (Some(span), Some(first)) = (spans.first_mut(), self.first) {
            span.0 = span.0.max(first);
            span.1 = span.1.max(first + 1);
        }
        suspects.in_flight(at, spans, events);
    }

    /// What is in flight when the partition goes: suspect if the flow goes down, somebody else's if it was revoked.
    pub(super) fn leave_suspects(&self) {
        if self.parts.shared.going_down.load(SeqCst) {
            self.note_suspects();
        } else {
            self.parts.shared.view.suspects().forget(&self.parts.queue.at);
        }
    }
}

impl Drop for PartitionConsumer {
    fn drop(&mut self) {
        // Ended otherwise than in order: by a panic of its own, or with its supervisor.
        if !self.ended {
            self.note_suspects();
        }
    }
}
