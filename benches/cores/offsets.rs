//! The accounts of a partition's events: opened, in flight, finished, the watermark moved.

use std::ops::Range;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use evrepl::offsets::{Hold, Seq, Tracker};
use evrepl::outcome::Outcome;

/// Events that follow one another in an ack when no key was merged: a batch's.
const RUN: usize = super::BATCH;

/// How the events of a chunk are finished.
type Finish = fn(&mut Tracker, Range<Seq>);

/// Opens a chunk's events and gives them their permits, as they are before the first ack.
fn opened(tracker: &mut Tracker, first: i64, events: usize) -> Range<Seq> {
    let end = (first..first + events as i64).map(|offset| tracker.open(offset)).last();
    let seqs = end.map_or(0..0, |last| last + 1 - events as Seq..last + 1);
    tracker.hold_run(seqs.start, events as u64, Hold::InFlight);
    seqs
}

pub fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("offsets");
    for events in super::CHUNKS {
        group.throughput(Throughput::Elements(events as u64));
        group.bench_with_input(BenchmarkId::new("open", events), &events, |bencher, &events| {
            bencher.iter_batched_ref(
                || Tracker::new(1),
                |tracker| opened(tracker, 0, events),
                BatchSize::LargeInput,
            )
        });
        let finish: [(&str, Finish); 3] = [
            ("in runs", |tracker, seqs| {
                for first in seqs.step_by(RUN) {
                    tracker.finish_run(first, RUN as u64, Outcome::Applied);
                }
            }),
            ("one by one", |tracker, seqs| {
                for seq in seqs {
                    tracker.finish(seq, Outcome::Applied);
                }
            }),
            ("backwards", |tracker, seqs| {
                for seq in seqs.rev() {
                    tracker.finish(seq, Outcome::Applied);
                }
            }),
        ];
        for (name, finish) in finish {
            let id = BenchmarkId::new(format!("open to commit, finished {name}"), events);
            group.bench_with_input(id, &events, |bencher, &events| {
                let (mut tracker, mut next) = (Tracker::new(1), 0);
                bencher.iter(|| {
                    let seqs = opened(&mut tracker, next, events);
                    finish(&mut tracker, seqs);
                    next += events as i64;
                    tracker.commit_due()
                })
            });
        }
    }
    group.finish();
}
