//! A batch on the wire: encoded by the relay, decoded by the agent; and the ack that answers it.

use bytes::{Bytes, BytesMut};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use evrepl::wire::{
    Ack, Codec, Decoder, Expiry, Frame, ItemEncoder, ItemOp, ItemRef, Limits, decode_items, encode, encode_batch_head,
};

fn item<'a>(key: &'a Bytes, value: &'a Bytes) -> ItemRef<'a> {
    ItemRef {
        cache: 0,
        op: ItemOp::Set,
        key,
        value,
        flags: 7,
        expiry: Expiry::Never,
        ver: 1_700_000_000_000 << 16,
        origin: None,
        looked_at: 123_456,
        age_us: 1_800,
        produced_at_ms: 1_700_000_000_000,
        trace: None,
    }
}

/// The bytes of a batch's frame, as they leave the link.
fn framed(keys: &[Bytes], values: &[Bytes], codec: Codec) -> BytesMut {
    let mut encoder = ItemEncoder::default();
    keys.iter()
        .zip(values)
        .for_each(|(key, value)| encoder.push(&item(key, value)));
    let frame = encoder.finish(codec).into_frame(1, 50);
    let mut out = BytesMut::new();
    encode_batch_head(&frame, &mut out);
    out.extend_from_slice(&frame.payload);
    out
}

/// Values of which half repeats what stands before: what LZ4 halves.
fn compressible(bytes: usize) -> Vec<Bytes> {
    let halves = super::values(super::BATCH, bytes / 2);
    halves
        .iter()
        .map(|half| [half.as_ref(), half.as_ref()].concat().into())
        .collect()
}

pub fn benches(criterion: &mut Criterion) {
    let keys = super::keys(super::BATCH);
    let mut group = criterion.benchmark_group("wire");
    group.throughput(Throughput::Elements(super::BATCH as u64));
    for bytes in super::VALUES {
        let kinds = [
            ("raw", Codec::Raw, super::values(super::BATCH, bytes)),
            ("lz4", Codec::Lz4, compressible(bytes)),
        ];
        for (name, codec, values) in kinds {
            group.bench_function(BenchmarkId::new(format!("encode, {name}"), bytes), |bencher| {
                let mut encoder = ItemEncoder::default();
                bencher.iter(|| {
                    keys.iter()
                        .zip(&values)
                        .for_each(|(key, value)| encoder.push(&item(key, value)));
                    encoder.finish(codec)
                })
            });
            let frame = framed(&keys, &values, codec);
            group.bench_function(BenchmarkId::new(format!("decode, {name}"), bytes), |bencher| {
                let limits = Limits::default();
                bencher.iter_batched(
                    || frame.clone(),
                    |mut bytes| {
                        let Ok(Some(Frame::Batch(batch))) = Decoder::new(limits).decode(&mut bytes) else {
                            unreachable!("a frame of our own");
                        };
                        let items = decode_items(&batch, &limits).into_iter().flatten();
                        let values: usize = items.flatten().map(|item| item.value.len()).sum();
                        (values, batch)
                    },
                    BatchSize::LargeInput,
                )
            });
        }
    }
    let ack = Frame::Ack(Ack {
        batch: 1,
        tick: 123_456,
        ranges: vec![(0, super::BATCH as u32)],
        ..Ack::default()
    });
    let mut out = BytesMut::new();
    group.bench_function("ack, encode and decode", |bencher| {
        let mut decoder = Decoder::new(Limits::default());
        bencher.iter(|| {
            out.clear();
            encode(&ack, &mut out);
            decoder.decode(&mut out)
        })
    });
    group.finish();
}
