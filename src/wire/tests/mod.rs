//! What the codec promises, whatever the peer sends: the frames and items that the tests draw.

mod hostile;
mod round_trip;

use bytes::{BufMut, Bytes, BytesMut};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;
use crate::event::TraceContext;

const LIMITS: Limits = Limits {
    max_frame_bytes: 64 << 10,
    max_batch_raw_bytes: 128 << 10,
    max_batch_items: 1000,
};

fn bytes_of(frame: &Frame) -> BytesMut {
    let mut out = BytesMut::new();
    encode(frame, &mut out);
    out
}

fn decode_one(mut bytes: BytesMut) -> Result<Option<Frame>, WireError> {
    Decoder::new(LIMITS).decode(&mut bytes)
}

/// A frame of any kind with a payload of our own.
fn raw_frame(kind: u8, flags: u8, payload: &[u8]) -> BytesMut {
    let mut out = BytesMut::new();
    out.put_u32(2 + payload.len() as u32);
    out.put_u8(kind);
    out.put_u8(flags);
    out.put_slice(payload);
    out
}

fn item(key: &str, value: &[u8]) -> Item {
    Item {
        cache: 0,
        op: ItemOp::Set,
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: Bytes::copy_from_slice(value),
        flags: 0,
        expiry: Expiry::Never,
        ver: 1 << 60,
        origin: None,
        looked_at: 7,
        age_us: 300,
        produced_at_ms: 1_700_000_000_000,
        trace: None,
    }
}

fn batch_of(items: &[Item], codec: Codec) -> BatchFrame {
    let mut encoder = ItemEncoder::default();
    items.iter().for_each(|item| encoder.push(&item.as_ref()));
    encoder.finish(codec).into_frame(1, 0)
}

fn items_of(frame: &BatchFrame) -> Result<Vec<Item>, WireError> {
    let items = decode_items(frame, &LIMITS)?;
    let raw = items.raw().clone();
    items.map(|item| Ok(item?.item(&raw))).collect()
}

fn any_bytes(longest: usize) -> impl Strategy<Value = Bytes> {
    // Half of them repeat themselves, so that compression has something to find.
    prop_oneof![
        vec(any::<u8>(), 0..longest),
        (any::<u8>(), 0..longest).prop_map(|(byte, len)| std::vec::from_elem(byte, len)),
    ]
    .prop_map(Bytes::from)
}

/// Numbers of every encoded length.
fn any_number() -> impl Strategy<Value = u64> {
    (any::<u64>(), 0u32..64).prop_map(|(number, shift)| number >> shift)
}

fn any_trace() -> impl Strategy<Value = TraceContext> {
    (any::<[u8; 16]>(), any::<[u8; 8]>(), any::<u8>()).prop_map(|(trace_id, span_id, flags)| TraceContext {
        trace_id,
        span_id,
        flags,
    })
}

fn any_item() -> impl Strategy<Value = Item> {
    let op = prop_oneof![Just(ItemOp::Set), Just(ItemOp::Touch), Just(ItemOp::Remove)];
    let expiry = prop_oneof![Just(Expiry::Never), any::<u32>().prop_map(Expiry::Seconds)];
    let what = (any::<u16>(), op, any_bytes(250), any_bytes(600), any::<u32>(), expiry);
    let when = (
        any_number(),
        option::of(any::<u16>()),
        any_number(),
        any_number(),
        any_number(),
    );
    (what, when, option::of(any_trace())).prop_map(|((cache, op, key, value, flags, expiry), when, trace)| {
        let (ver, origin, looked_at, age_us, produced_at_ms) = when;
        Item {
            cache,
            op,
            key,
            value,
            flags,
            expiry,
            ver,
            origin,
            looked_at,
            age_us,
            produced_at_ms,
            trace,
        }
    })
}

fn any_codec() -> impl Strategy<Value = Codec> {
    prop_oneof![Just(Codec::Raw), Just(Codec::Lz4)]
}

fn any_batch() -> impl Strategy<Value = Frame> {
    (vec(any_item(), 0..20), any_codec(), any_number(), any_number()).prop_map(|(items, codec, id, held_us)| {
        Frame::Batch(BatchFrame {
            id,
            held_us,
            ..batch_of(&items, codec)
        })
    })
}

fn any_ack() -> impl Strategy<Value = Frame> {
    let statuses = [
        Status::LookAgain,
        Status::Later,
        Status::Expired,
        Status::TooLarge,
        Status::Refused,
    ];
    let exception = (any::<u32>(), proptest::sample::select(statuses.to_vec()), any::<u16>());
    let lists = (
        vec(any::<(u32, u32)>(), 0..40),
        vec(exception, 0..40),
        vec(".{0,30}", 0..4),
    );
    (any::<[u64; 4]>(), lists).prop_map(
        |([batch, tick, queued_us, applied_us], (ranges, exceptions, servers))| {
            let exceptions = exceptions
                .into_iter()
                .map(|(index, status, server)| match (status, servers.len()) {
                    (Status::Later, 0) => Exception {
                        index,
                        status: Status::LookAgain,
                        server: 0,
                    },
                    (Status::Later, count) => Exception {
                        index,
                        status,
                        server: server % count as u16,
                    },
                    _ => Exception { index, status, server },
                })
                .collect();
            Frame::Ack(Ack {
                batch,
                tick,
                queued_us,
                applied_us,
                ranges,
                exceptions,
                servers,
            })
        },
    )
}

fn any_control() -> impl Strategy<Value = Frame> {
    let names = || vec("[a-z0-9-]{0,20}", 0..5);
    let statuses = [CacheStatus::Accepted, CacheStatus::Forbidden, CacheStatus::Unknown];
    let hello = (
        any::<u16>(),
        any::<u16>(),
        ".{0,20}",
        names(),
        names(),
        names(),
        any::<u32>(),
    )
        .prop_map(
            |(min_version, max_version, software, caches, regions, features, max_frame_bytes)| {
                Frame::Hello(Hello {
                    min_version,
                    max_version,
                    software,
                    caches,
                    regions,
                    features,
                    max_frame_bytes,
                })
            },
        );
    let lists = (
        names(),
        vec(proptest::sample::select(statuses.to_vec()), 0..5),
        ".{0,20}",
    );
    let hello_ack = (any::<u16>(), any::<[u64; 3]>(), any::<[u32; 3]>(), lists).prop_map(
        |(version, [session, tick, window_bytes], limits, (features, caches, software))| {
            let [max_frame_bytes, max_batch_items, max_batch_raw_bytes] = limits;
            Frame::HelloAck(HelloAck {
                version,
                software,
                session,
                tick,
                window_bytes,
                features,
                max_frame_bytes,
                max_batch_items,
                max_batch_raw_bytes,
                caches,
            })
        },
    );
    let ping = (any::<[u64; 2]>(), any::<Option<i64>>())
        .prop_map(|([id, sent_us], offset_us)| Frame::Ping(Ping { id, sent_us, offset_us }));
    let pong = any::<[u64; 5]>().prop_map(|[id, sent_us, received_us, answered_us, tick]| {
        Frame::Pong(Pong {
            id,
            sent_us,
            received_us,
            answered_us,
            tick,
        })
    });
    let go_away = ".{0,40}".prop_map(|reason| Frame::GoAway(GoAway { reason }));
    prop_oneof![hello, hello_ack, ping, pong, go_away]
}

fn any_frame() -> impl Strategy<Value = Frame> {
    prop_oneof![any_batch(), any_ack(), any_control()]
}
