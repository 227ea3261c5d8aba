//! The meta protocol's text: requests into a buffer, replies out of one.

use bytes::{Bytes, BytesMut};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use evrepl::memcached::bench::{put_looks, put_sets, take_replies};

/// What memcached answers to [`put_looks`] of keys that are all there, or to touches of them.
fn replies(values: Option<&[Bytes]>) -> BytesMut {
    let mut text = BytesMut::new();
    for number in 0..super::BATCH {
        let value = values.map(|values| &values[number]);
        match value {
            Some(value) => {
                let line = format!("VA {} f7 t-1 c{} O{number}\r\n", value.len(), 1_000_000 + number);
                text.extend_from_slice(line.as_bytes());
                text.extend_from_slice(value);
                text.extend_from_slice(b"\r\n");
            }
            None => text.extend_from_slice(format!("HD O{number}\r\n").as_bytes()),
        }
    }
    text
}

pub fn benches(criterion: &mut Criterion) {
    let keys = super::keys(super::BATCH);
    let mut group = criterion.benchmark_group("memcached");
    group.throughput(Throughput::Elements(super::BATCH as u64));
    let mut out = Vec::new();
    group.bench_function("put looks", |bencher| {
        bencher.iter(|| {
            out.clear();
            put_looks(&keys, &mut out);
            out.len()
        })
    });
    for bytes in super::VALUES {
        let values = super::values(super::BATCH, bytes);
        group.bench_function(BenchmarkId::new("put sets", bytes), |bencher| {
            bencher.iter(|| {
                out.clear();
                put_sets(&keys, &values, &mut out);
                out.len()
            })
        });
        let text = replies(Some(&values));
        group.bench_function(BenchmarkId::new("take values", bytes), |bencher| {
            bencher.iter_batched_ref(|| text.clone(), take_replies, BatchSize::LargeInput)
        });
    }
    let text = replies(None);
    group.bench_function("take done", |bencher| {
        bencher.iter_batched_ref(|| text.clone(), take_replies, BatchSize::LargeInput)
    });
    group.finish();
}
