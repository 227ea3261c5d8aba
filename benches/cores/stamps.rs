//! The stamp rule: a batch admitted and written, of one session and of two that write the same keys.

use criterion::{BenchmarkId, Criterion, Throughput};
use evrepl::hashing::slot_hash;
use evrepl::stamps::{DEFAULT_SLOTS_LOG2, SessionId, StampTable, Verdict};
use tokio::time::Instant;

pub fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("stamps");
    group.throughput(Throughput::Elements(super::BATCH as u64));
    // Far more keys than one batch has, or the table would always be in the processor's cache.
    let slots: Vec<u64> = super::keys(1 << 20).iter().map(|key| slot_hash(key)).collect();
    for (name, sessions) in [("one session", 1), ("two sessions in turn", 2)] {
        group.bench_function(BenchmarkId::new(name, super::BATCH), |bencher| {
            let mut table = StampTable::new(DEFAULT_SLOTS_LOG2);
            let now = Instant::now();
            let mut batches = slots.chunks_exact(super::BATCH).cycle();
            let mut tick = 0;
            bencher.iter(|| {
                let session = (tick % sessions) as SessionId + 1;
                let batch = batches.next().expect("it begins again");
                let admitted = batch
                    .iter()
                    .filter(|slot| table.admit(**slot, session, tick, now) == Verdict::Apply)
                    .count();
                tick += 1;
                table.written(tick);
                admitted
            })
        });
    }
    group.finish();
}
