//! What the pure cores cost by themselves, one element at a time: `make bench`, or `make bench ARGS=offsets` for some of them.
//!
//! The sizes are those of a drain: keys of 15 bytes, values of 100 bytes and 1 KiB, chunks of 4096 and 16 384 events, batches
//! of 1024 items. Throughput is in elements (events, items, keys, replies), so the cores' costs can be added up. What all of
//! them cost together, in their actors and with what is around them, `make profile` counts.

mod coalesce;
mod event;
mod hashing;
mod memcached;
mod offsets;
mod stamps;
mod wire;

use bytes::Bytes;
use criterion::{criterion_group, criterion_main};

/// Events of a chunk: usual, and the most there are.
const CHUNKS: [usize; 2] = [4_096, 16_384];

/// Items of a full batch.
const BATCH: usize = 1_024;

/// Bytes of a value.
const VALUES: [usize; 2] = [100, 1_024];

/// Keys of 15 bytes, as in the load runs, slices of one buffer as in a chunk.
fn keys(count: usize) -> Vec<Bytes> {
    let all: String = (0..count).map(|number| format!("load:{number:010}")).collect();
    let all = Bytes::from(all);
    (0..count).map(|at| all.slice(at * 15..at * 15 + 15)).collect()
}

/// Values that don't compress, as most that are worth caching don't any more; slices of one buffer, as of a read.
fn values(count: usize, bytes: usize) -> Vec<Bytes> {
    let mut state = 1_u64;
    let words = (count * bytes).div_ceil(8);
    let mut all = Vec::with_capacity(words * 8);
    for _ in 0..words {
        // Xorshift: what matters is only that no bytes repeat.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        all.extend_from_slice(&state.to_le_bytes());
    }
    let all = Bytes::from(all);
    (0..count).map(|at| all.slice(at * bytes..(at + 1) * bytes)).collect()
}

criterion_group!(
    cores,
    event::benches,
    offsets::benches,
    hashing::benches,
    coalesce::benches,
    wire::benches,
    stamps::benches,
    memcached::benches
);
criterion_main!(cores);
