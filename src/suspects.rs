//! Which events were being worked on when a flow went down, and how often: how the one event that panics an actor is found
//! among all that were in flight with it.
//!
//! A flow that panics is rebuilt from its committed offsets, so the same events come again, and the same panic. What was in
//! flight then is noted here, by partition and offset. Events that were in flight in [`CAREFUL_AFTER`] panics are handed on
//! in groups, nothing else in flight beside one: with each panic the group that was on trial becomes the suspects, and the
//! next groups are the root of its size, so that a full flow's culprit is alone after one more panic, not after sixteen. An
//! event that was alone in flight in [`CULPRIT_AFTER`] panics, once of them on trial, is the culprit.
//!
//! A plain type; it outlives the flow's incarnations and holds at most [`MAX_SPANS`] spans per partition.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::kafka::TopicPartition;

/// So many panics with the same events in hand are no accident.
pub const CAREFUL_AFTER: u8 = 2;
/// So many panics with nothing else in flight are proof: the first may have been something else's.
pub const CULPRIT_AFTER: u8 = 2;
/// Suspects as few as these are tried one by one, more of them in groups of the root of their number: at 80 ms a round trip
/// 49 152 suspects take 444 trials, half a minute, and not an hour.
const ONE_BY_ONE: u64 = 256;
/// Spans of one partition; those of the fewest panics are forgotten beyond it.
pub const MAX_SPANS: usize = 256;
/// Suspects that have not come again for so long are some other node's, or finished.
const SUSPECT_FOR: Duration = Duration::from_secs(600);

/// How an event is to be treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Care {
    /// Like any other.
    None,
    /// In a group of so many, with nothing else in flight.
    Trial(usize),
    /// It is the one that panics: it is not to be handed on.
    Culprit,
}

/// Neighbouring offsets with the same history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First offset.
    pub from: i64,
    /// One above the last.
    pub to: i64,
    /// Panics in which they were in flight.
    flying: u8,
    /// Panics in which one of them was all that was in flight.
    alone: u8,
    /// Panics of the partition consumer itself while it had them in hand.
    read: u8,
    /// How many events were in flight in the last of these panics.
    suspects: u64,
    /// When the last of these panics was.
    at: Instant,
}

impl Span {
    fn new(from: i64, to: i64, at: Instant) -> Self {
        Span {
            from,
            to,
            flying: 0,
            alone: 0,
            read: 0,
            suspects: 0,
            at,
        }
    }

    fn same_history(&self, other: &Span) -> bool {
        let history = |span: &Span| (span.flying, span.alone, span.read, span.suspects, span.at);
        // One that was alone is one event: it must not lend its history to a neighbour.
        self.alone == 0 && history(self) == history(other)
    }

    fn panics(&self) -> u8 {
        self.flying.max(self.read)
    }

    fn care(&self) -> Care {
        // Once by trial at least: that one happened to be the only event of a quiet flow proves nothing.
        if self.alone >= CULPRIT_AFTER && self.flying > CAREFUL_AFTER {
            Care::Culprit
        } else if self.flying < CAREFUL_AFTER {
            Care::None
        } else if self.suspects <= ONE_BY_ONE {
            Care::Trial(1)
        } else {
            Care::Trial(self.suspects.isqrt() as usize)
        }
    }
}

/// What one partition consumer had in its hands when it ended with its flow.
#[derive(Debug)]
struct Held {
    at: TopicPartition,
    spans: Vec<(i64, i64)>,
    /// In flight; 0 when the consumer panicked over these itself.
    events: u64,
}

/// The suspects of one flow.
#[derive(Debug, Default)]
pub struct Suspects {
    partitions: HashMap<TopicPartition, Vec<Span>>,
    held: Vec<Held>,
}

impl Suspects {
    /// A partition consumer ended with its flow: `events` of its events, within these offsets, were in flight.
    pub fn in_flight(&mut self, at: &TopicPartition, spans: Vec<(i64, i64)>, events: u64) {
        if events > 0 {
            let (at, spans) = (at.clone(), coarser(spans, MAX_SPANS / 4));
            self.held.push(Held { at, spans, events });
        }
    }

    /// A partition consumer panicked while it read these offsets.
    pub fn in_hand(&mut self, at: &TopicPartition, span: (i64, i64)) {
        self.held.push(Held {
            at: at.clone(),
            spans: vec![span],
            events: 0,
        });
    }

    /// All partition consumers of the flow have ended. `by_events` is false when the cause cannot have been an event: what
    /// was held is then no more suspect than before. Gives how many events were in flight and are suspects, 0 when it was the
    /// reading of a chunk.
    pub fn flow_went_down(&mut self, by_events: bool, now: Instant) -> u64 {
        let mut held = std::mem::take(&mut self.held);
        if !by_events {
            return 0;
        }
        if held.iter().any(|held| held.events == 0) {
            // It is known who panicked: what was in flight elsewhere had nothing to do with it.
            held.retain(|held| held.events == 0);
        }
        let all: u64 = held.iter().map(|held| held.events).sum();
        for Held { at, spans, .. } in held {
            let known = self.partitions.entry(at).or_default();
            for (from, to) in spans {
                mark(known, from, to, now, |span| {
                    span.at = now;
                    match all {
                        0 => span.read = span.read.saturating_add(1),
                        _ => {
                            span.flying = span.flying.saturating_add(1);
                            span.alone = span.alone.saturating_add(u8::from(all == 1));
                            span.suspects = all;
                        }
                    }
                });
            }
            bound(known);
        }
        all
    }

    /// What of a partition needs care, by offset; for its consumer, which keeps it: only a panic changes it.
    pub fn of(&mut self, at: &TopicPartition, now: Instant) -> Vec<Span> {
        self.partitions.values_mut().for_each(|spans| {
            spans.retain(|span| now.saturating_duration_since(span.at) < SUSPECT_FOR);
        });
        self.partitions.retain(|_, spans| !spans.is_empty());
        let spans = self.partitions.get(at).into_iter().flatten();
        spans.filter(|span| span.panics() >= CAREFUL_AFTER).copied().collect()
    }

    /// These events are finished: they were not the cause.
    pub fn finished(&mut self, at: &TopicPartition, from: i64, to: i64) {
        let Some(spans) = self.partitions.get_mut(at) else {
            return;
        };
        let mut left = Vec::with_capacity(spans.len() + 1);
        for span in spans.drain(..) {
            let (before, after) = (
                Span {
                    to: span.to.min(from),
                    ..span
                },
                Span {
                    from: span.from.max(to),
                    ..span
                },
            );
            left.extend([before, after].into_iter().filter(|part| part.from < part.to));
        }
        *spans = left;
        if spans.is_empty() {
            self.partitions.remove(at);
        }
    }

    /// The partition is somebody else's.
    pub fn forget(&mut self, at: &TopicPartition) {
        self.partitions.remove(at);
    }

    /// Whether there are events that are handed on with care.
    pub fn any_on_trial(&self) -> bool {
        let mut spans = self.partitions.values().flatten();
        spans.any(|span| span.panics() >= CAREFUL_AFTER)
    }

    /// Is nothing suspected?
    pub fn is_empty(&self) -> bool {
        self.partitions.is_empty()
    }
}

/// How the event at this offset is to be treated; `spans` are its partition's.
pub fn care(spans: &[Span], offset: i64) -> Care {
    let at = spans.partition_point(|span| span.to <= offset);
    match spans.get(at) {
        Some(span) if span.from <= offset => span.care(),
        _ => Care::None,
    }
}

/// The same spans as at most `most`, joined over the smallest gaps between them.
fn coarser(spans: Vec<(i64, i64)>, most: usize) -> Vec<(i64, i64)> {
    if spans.len() <= most {
        return spans;
    }
    let mut gaps: Vec<(i64, usize)> = (1..spans.len()).map(|n| (spans[n].0 - spans[n - 1].1, n)).collect();
    gaps.sort_unstable_by(|a, b| b.cmp(a));
    let mut begins: Vec<usize> = gaps[..most - 1].iter().map(|(_, n)| *n).chain([0]).collect();
    begins.sort_unstable();
    let ends = begins[1..].iter().copied().chain([spans.len()]);
    begins
        .iter()
        .zip(ends)
        .map(|(from, to)| (spans[*from].0, spans[to - 1].1))
        .collect()
}

/// Marks everything from `from` to `to`, with new spans where nothing was known.
fn mark(spans: &mut Vec<Span>, from: i64, to: i64, now: Instant, mark: impl Fn(&mut Span)) {
    let mut marked = Vec::with_capacity(spans.len() + 3);
    let mut reached = from;
    let put = |marked: &mut Vec<Span>, from: i64, to: i64, history: Span| {
        if from < to {
            let mut span = Span { from, to, ..history };
            mark(&mut span);
            marked.push(span);
        }
    };
    for span in spans.drain(..) {
        if span.to <= from || span.from >= to {
            if span.from >= to {
                put(&mut marked, reached, to, Span::new(reached, to, now));
                reached = to;
            }
            marked.push(span);
            continue;
        }
        if span.from < from {
            marked.push(Span { to: from, ..span });
        }
        let start = span.from.max(from);
        put(&mut marked, reached, start, Span::new(reached, start, now));
        put(&mut marked, start, span.to.min(to), span);
        reached = span.to.min(to);
        if span.to > to {
            marked.push(Span { from: to, ..span });
        }
    }
    put(&mut marked, reached, to, Span::new(reached, to, now));
    marked.dedup_by(|next, span| {
        let joins = span.to == next.from && span.same_history(next);
        if joins {
            span.to = next.to;
        }
        joins
    });
    *spans = marked;
}

/// Forgets the least suspected until there are few enough.
fn bound(spans: &mut Vec<Span>) {
    for least in 1..=u8::MAX {
        if spans.len() <= MAX_SPANS {
            return;
        }
        spans.retain(|span| span.panics() > least);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn partition(partition: i32) -> TopicPartition {
        TopicPartition {
            topic: "topic".into(),
            partition,
        }
    }

    fn panic_with(it: &mut Suspects, held: &[(i32, i64, i64)], now: Instant) {
        for &(number, from, to) in held {
            it.in_flight(&partition(number), vec![(from, to)], (to - from) as u64);
        }
        it.flow_went_down(true, now);
    }

    fn care_of(it: &mut Suspects, number: i32, offset: i64, now: Instant) -> Care {
        care(&it.of(&partition(number), now), offset)
    }

    #[test]
    fn what_was_in_flight_in_two_panics_goes_on_trial_and_nothing_else() {
        let (mut it, now) = (Suspects::default(), Instant::now());
        panic_with(&mut it, &[(0, 0, 100), (1, 50, 60)], now);
        assert_eq!(care_of(&mut it, 0, 7, now), Care::None);
        panic_with(&mut it, &[(0, 90, 150)], now);
        assert_eq!(care_of(&mut it, 0, 89, now), Care::None);
        assert_eq!(care_of(&mut it, 0, 90, now), Care::Trial(1));
        assert_eq!(care_of(&mut it, 0, 99, now), Care::Trial(1));
        assert_eq!(care_of(&mut it, 0, 100, now), Care::None);
        assert_eq!(care_of(&mut it, 1, 55, now), Care::None);
    }

    #[test]
    fn an_event_that_was_alone_in_flight_in_two_panics_is_the_culprit_and_its_neighbours_are_not() {
        let (mut it, now) = (Suspects::default(), Instant::now());
        for _ in 0..2 {
            panic_with(&mut it, &[(0, 0, 10)], now);
        }
        panic_with(&mut it, &[(0, 4, 5)], now);
        assert_eq!(care_of(&mut it, 0, 4, now), Care::Trial(1));
        panic_with(&mut it, &[(0, 4, 5)], now);
        assert_eq!(care_of(&mut it, 0, 4, now), Care::Culprit);
        assert_eq!(care_of(&mut it, 0, 3, now), Care::Trial(1));
        assert_eq!(care_of(&mut it, 0, 5, now), Care::Trial(1));
    }

    #[test]
    fn one_event_in_each_of_two_partitions_is_not_alone() {
        let (mut it, now) = (Suspects::default(), Instant::now());
        for _ in 0..9 {
            panic_with(&mut it, &[(0, 4, 5), (1, 4, 5)], now);
        }
        assert_eq!(care_of(&mut it, 0, 4, now), Care::Trial(1));
    }

    #[test]
    fn a_consumer_that_panics_over_its_chunk_makes_nothing_else_suspect() {
        let (mut it, now) = (Suspects::default(), Instant::now());
        for _ in 0..3 {
            it.in_flight(&partition(1), vec![(0, 10)], 10);
            it.in_hand(&partition(0), (20, 30));
            it.flow_went_down(true, now);
        }
        assert!(it.of(&partition(1), now).is_empty());
        // It is read with care, but may be in flight with others.
        assert_eq!(it.of(&partition(0), now).len(), 1);
        assert_eq!(care_of(&mut it, 0, 25, now), Care::None);
    }

    #[test]
    fn a_cause_that_is_no_event_makes_none_suspect() {
        let (mut it, now) = (Suspects::default(), Instant::now());
        it.in_flight(&partition(0), vec![(0, 10)], 10);
        it.flow_went_down(false, now);
        assert!(it.is_empty());
    }

    #[test]
    fn what_is_finished_or_of_another_node_or_long_ago_is_forgotten() {
        let (mut it, now) = (Suspects::default(), Instant::now());
        for _ in 0..2 {
            panic_with(&mut it, &[(0, 0, 10), (1, 0, 10), (2, 0, 10)], now);
        }
        it.finished(&partition(0), 3, 5);
        let left: Vec<_> = it
            .of(&partition(0), now)
            .iter()
            .map(|span| (span.from, span.to))
            .collect();
        assert_eq!(left, [(0, 3), (5, 10)]);
        it.finished(&partition(0), i64::MIN, 10);
        it.forget(&partition(1));
        assert!(it.of(&partition(0), now).is_empty() && it.of(&partition(1), now).is_empty());
        assert!(!it.is_empty());
        assert!(it.of(&partition(2), now + SUSPECT_FOR).is_empty());
        assert!(it.is_empty());
    }

    /// A flow in which one event panics whoever touches it; gives the restarts until it is known, and the trials that took.
    fn restarts_until_found(events: i64, culprit: i64) -> (u32, u32) {
        let (mut it, now) = (Suspects::default(), Instant::now());
        let (mut restarts, mut trials) = (0, 0);
        loop {
            let spans = it.of(&partition(0), now);
            if care(&spans, culprit) == Care::Culprit {
                return (restarts, trials);
            }
            restarts += 1;
            let mut next = 0;
            loop {
                // Everything up to the next suspect is in flight together, then group by group.
                let size = match care(&spans, next) {
                    Care::Trial(size) => size as i64,
                    _ => (next..events)
                        .find(|offset| care(&spans, *offset) != Care::None)
                        .map_or(events - next, |suspect| suspect - next),
                };
                trials += u32::from(!spans.is_empty());
                let to = (next + size).min(events);
                if (next..to).contains(&culprit) {
                    panic_with(&mut it, &[(0, next, to)], now);
                    break;
                }
                it.finished(&partition(0), next, to);
                next = to;
            }
        }
    }

    #[test]
    fn a_culprit_is_found_within_half_of_the_restarts_that_are_borne_by_default() {
        for (events, most) in [(1, 3), (2, 4), (256, 4), (257, 5), (49_152, 5), (1_000_000, 6)] {
            for culprit in [0, events / 3, events - 1] {
                let (restarts, trials) = restarts_until_found(events, culprit);
                assert!(restarts <= most, "{events} events, {culprit}: {restarts} restarts");
                let fair = 4 * (events as f64).sqrt() as u32 + 4 + 2 * ONE_BY_ONE as u32;
                assert!(trials <= fair, "{events} events, {culprit}: {trials} trials");
            }
        }
    }

    #[test]
    fn many_spans_become_few_over_the_smallest_gaps() {
        let spans: Vec<(i64, i64)> = (0..10)
            .map(|n| (n * 10 + n / 5 * 100, n * 10 + n / 5 * 100 + 5))
            .collect();
        assert_eq!(coarser(spans.clone(), 10), spans);
        assert_eq!(coarser(spans, 2), [(0, 45), (150, 195)]);
    }

    proptest! {
        #[test]
        fn spans_stay_sorted_apart_and_few_and_count_what_each_offset_went_through(
            panics in prop::collection::vec(prop::collection::vec((0i64..400, 1i64..30), 1..40), 1..12),
        ) {
            let now = Instant::now();
            let mut it = Suspects::default();
            let mut counts = [0u8; 440];
            for held in panics {
                let mut once = [false; 440];
                let mut spans: Vec<(i64, i64)> = Vec::new();
                for (from, length) in held {
                    // A consumer reports every event once.
                    if (from..from + length).any(|offset| once[offset as usize]) {
                        continue;
                    }
                    (from..from + length).for_each(|offset| once[offset as usize] = true);
                    spans.push((from, from + length));
                }
                once.iter().zip(&mut counts).for_each(|(held, count)| *count += u8::from(*held));
                it.in_flight(&partition(0), spans, 1000);
                it.flow_went_down(true, now);
            }
            let spans = &it.partitions[&partition(0)];
            prop_assert!(spans.len() <= MAX_SPANS);
            prop_assert!(spans.windows(2).all(|two| two[0].to <= two[1].from));
            prop_assert!(spans.iter().all(|span| span.from < span.to));
            let careful = it.of(&partition(0), now);
            for (offset, count) in counts.iter().enumerate() {
                let expected = if *count >= CAREFUL_AFTER { Care::Trial(31) } else { Care::None };
                prop_assert_eq!(care(&careful, offset as i64), expected, "offset {}", offset);
            }
        }
    }
}
