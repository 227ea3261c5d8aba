//! The open batch: items of distinct keys, and of keys that come again.

use bytes::Bytes;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use evrepl::coalesce::OpenBatch;
use evrepl::event::Op;
use evrepl::relay::{HeldEvent, HeldItem, Seen, Ticket};
use evrepl::wire::Expiry;
use tokio::time::Instant;

fn items(keys: &[Bytes], values: &[Bytes]) -> Vec<HeldItem> {
    let now = Instant::now();
    let item = |(seq, (key, value)): (usize, (&Bytes, &Bytes))| HeldItem {
        event: HeldEvent::new(
            key.clone(),
            (0, 0),
            Op::Set,
            0,
            Ticket {
                consumer: 0,
                seq: seq as u64,
            },
            now,
        ),
        seen: Seen::Value {
            value: value.clone(),
            flags: 0,
            expiry: Expiry::Never,
        },
        looked_at: 0,
        session: 1,
        looked: now,
        seen_at: now,
    };
    keys.iter().zip(values).enumerate().map(item).collect()
}

pub fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("coalesce");
    group.throughput(Throughput::Elements(super::BATCH as u64));
    let values = super::values(super::BATCH, 100);
    for (name, distinct) in [
        ("distinct keys", super::BATCH),
        ("each key four times", super::BATCH / 4),
    ] {
        let keys = super::keys(distinct);
        let keys: Vec<Bytes> = keys.iter().cycle().take(super::BATCH).cloned().collect();
        group.bench_function(BenchmarkId::new(name, super::BATCH), |bencher| {
            let mut batch = OpenBatch::new(super::BATCH, usize::MAX);
            let now = Instant::now();
            bencher.iter_batched(
                || items(&keys, &values),
                |items| {
                    let replaced = items.into_iter().filter_map(|item| batch.push(item, now, |_, _| true));
                    let replaced: Vec<_> = replaced.collect();
                    (replaced, batch.take())
                },
                BatchSize::LargeInput,
            )
        });
    }
    group.finish();
}
