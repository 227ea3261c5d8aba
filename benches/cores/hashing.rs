//! Whose a key is: its server, its lane, its slot of stamps.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use evrepl::hashing::{HashKind, Ring, RingServer, lane_of, slot_hash};

fn ring(kind: HashKind, servers: usize) -> Ring {
    let server = |number| RingServer {
        address: format!("10.0.0.{number}:11211"),
        ring_name: None,
        weight: 1,
    };
    Ring::new(kind, &(0..servers).map(server).collect::<Vec<_>>())
}

pub fn benches(criterion: &mut Criterion) {
    let keys = super::keys(super::BATCH);
    let mut group = criterion.benchmark_group("hashing");
    group.throughput(Throughput::Elements(keys.len() as u64));
    for servers in [1, 3, 100] {
        for (name, kind) in [("ketama", HashKind::Ketama), ("consistent", HashKind::Consistent)] {
            let ring = ring(kind, servers);
            group.bench_function(BenchmarkId::new(format!("server, {name}"), servers), |bencher| {
                bencher.iter(|| keys.iter().map(|key| ring.server_of(black_box(key))).sum::<usize>())
            });
        }
    }
    group.bench_function("lane of 4", |bencher| {
        bencher.iter(|| keys.iter().map(|key| lane_of(0, black_box(key), 4)).sum::<usize>())
    });
    group.bench_function("slot", |bencher| {
        bencher.iter(|| keys.iter().fold(0, |sum, key| sum ^ slot_hash(black_box(key))))
    });
    group.finish();
}
