//! What is sent arrives.

use bytes::{BufMut, BytesMut};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn any_frame_arrives_as_it_was_sent(frame in any_frame()) {
        let mut bytes = bytes_of(&frame);
        prop_assert_eq!(Decoder::new(LIMITS).decode(&mut bytes).unwrap(), Some(frame));
        prop_assert!(bytes.is_empty());
    }

    #[test]
    fn any_batch_of_items_arrives_as_it_was_sent(items in vec(any_item(), 0..60), codec in any_codec()) {
        let frame = batch_of(&items, codec);
        prop_assert_eq!(frame.items as usize, items.len());
        prop_assert_eq!(items_of(&frame).unwrap(), items);
    }

    #[test]
    fn no_item_and_no_batch_is_longer_than_announced(item in any_item(), id: u64, held_us: u64) {
        let mut encoder = ItemEncoder::default();
        encoder.push(&item.as_ref());
        prop_assert!(encoder.bytes() <= item.key.len() + item.value.len() + ITEM_OVERHEAD);
        let batch = encoder.finish(Codec::Raw).into_frame(id, held_us);
        let payload = batch.payload.len();
        prop_assert!(bytes_of(&Frame::Batch(batch)).len() <= payload + BATCH_OVERHEAD);
    }

    #[test]
    fn one_encoder_serves_many_batches(batches in vec((vec(any_item(), 0..8), any_codec()), 1..20)) {
        let mut encoder = ItemEncoder::default();
        let mut kept = Vec::new();
        for (items, codec) in &batches {
            items.iter().for_each(|item| encoder.push(&item.as_ref()));
            kept.push(encoder.finish(*codec).into_frame(0, 0));
            prop_assert_eq!((encoder.bytes(), encoder.len()), (0, 0));
        }
        // Batches still held were not overwritten by later ones.
        for ((items, _), frame) in batches.iter().zip(&kept) {
            prop_assert_eq!(&items_of(frame).unwrap(), items);
        }
    }

    #[test]
    fn a_stream_cut_at_every_byte_gives_the_same_frames(frames in vec(any_frame(), 1..4)) {
        let mut stream = BytesMut::new();
        frames.iter().for_each(|frame| encode(frame, &mut stream));
        let mut decoder = Decoder::new(LIMITS);
        let (mut buf, mut got) = (BytesMut::new(), Vec::new());
        for byte in &stream {
            buf.put_u8(*byte);
            got.extend(decoder.decode(&mut buf).unwrap());
        }
        prop_assert_eq!(got, frames);
    }
}

#[test]
fn a_batch_is_decoded_without_copying() {
    let value = [5; 4000];
    let mut bytes = bytes_of(&Frame::Batch(batch_of(
        &[item("a", &value), item("b", &value)],
        Codec::Raw,
    )));
    let memory = bytes.as_ptr_range();
    let Ok(Some(Frame::Batch(batch))) = Decoder::new(LIMITS).decode(&mut bytes) else {
        panic!("no batch")
    };
    for item in items_of(&batch).unwrap() {
        assert!(memory.contains(&item.key.as_ptr()) && memory.contains(&item.value.as_ptr()));
    }
}

#[test]
fn an_unknown_kind_is_skipped_unless_it_is_critical() {
    let ping = Frame::Ping(Ping {
        id: 1,
        sent_us: 2,
        offset_us: None,
    });
    let mut stream = raw_frame(99, 0b10, b"from the future");
    stream.extend_from_slice(&raw_frame(0, 0, b""));
    encode(&ping, &mut stream);
    let mut decoder = Decoder::new(LIMITS);
    assert_eq!(decoder.decode(&mut stream).unwrap(), Some(ping));
    assert_eq!(decoder.skipped(), 2);
    let error = decoder
        .decode(&mut raw_frame(99, 0b11, b"from the future"))
        .unwrap_err();
    assert!(matches!(error, WireError::UnknownKind { kind: 99 }));
}

#[test]
fn an_item_takes_few_bytes_beside_its_key_and_value() {
    let mut encoder = ItemEncoder::default();
    let of = |n: u64| Item {
        op: ItemOp::Set,
        flags: 0,
        expiry: Expiry::Never,
        // 100 events a millisecond.
        ver: ((1_800_000_000_000 + n / 100) << 16) + n % 100,
        origin: None,
        looked_at: 1_000_000,
        age_us: 90_000,
        produced_at_ms: 1_800_000_000_000 + n / 100,
        trace: None,
        cache: 0,
        key: "key:0123456789".into(),
        value: vec![7; 100].into(),
    };
    for n in 0..1_000 {
        encoder.push(&of(n).as_ref());
    }
    let each = encoder.bytes() / 1_000 - 114;
    assert!(each < 18, "{each}");
}

#[test]
fn a_control_frame_of_a_later_version_is_understood() {
    #[derive(serde::Serialize)]
    struct LaterHello {
        min_version: u16,
        zones: Vec<Vec<Option<f64>>>,
        max_version: u16,
        caches: Vec<String>,
        max_frame_bytes: u32,
    }
    let later = LaterHello {
        min_version: 1,
        zones: vec![vec![None, Some(0.5)]],
        max_version: 4,
        caches: vec!["sessions".into()],
        max_frame_bytes: 9,
    };
    let Ok(Some(Frame::Hello(hello))) = decode_one(raw_frame(1, 1, &rmp_serde::to_vec_named(&later).unwrap())) else {
        panic!("no hello")
    };
    assert_eq!(hello.caches, ["sessions"]);
    assert_eq!(hello.agreed_version(), Some(VERSION));
    assert_eq!(
        Hello {
            min_version: VERSION + 1,
            ..hello
        }
        .agreed_version(),
        None
    );
}

#[test]
fn a_cache_status_of_a_later_version_pauses_the_cache() {
    let status: CacheStatus = rmp_serde::from_slice(&rmp_serde::to_vec("read_only").unwrap()).unwrap();
    assert_eq!(status, CacheStatus::Unknown);
    assert_eq!(
        rmp_serde::to_vec(&CacheStatus::Unknown).unwrap(),
        rmp_serde::to_vec("unknown").unwrap()
    );
}

#[test]
fn an_empty_value_is_not_a_missing_one() {
    let sent = [
        item("empty", b""),
        Item {
            op: ItemOp::Remove,
            ..item("gone", b"")
        },
    ];
    assert_eq!(items_of(&batch_of(&sent, Codec::Raw)).unwrap(), sent);
}

#[test]
fn a_value_is_a_bin_and_costs_its_own_length() {
    let mut encoder = ItemEncoder::default();
    encoder.push(&item("a", &[0xff; 1000]).as_ref());
    assert!(encoder.bytes() < 1000 + ITEM_OVERHEAD);
    let batch = encoder.finish(Codec::Raw);
    let header = [0xc5, 0x03, 0xe8];
    assert!(
        batch.payload.windows(3).any(|window| window == header),
        "bin 16 of 1000 bytes"
    );
}

#[test]
fn compression_is_skipped_when_it_does_not_pay() {
    let zeros = item("a", &[0; 5000]);
    assert_eq!(batch_of(std::slice::from_ref(&zeros), Codec::Lz4).codec, Codec::Lz4);
    assert_eq!(batch_of(&[zeros], Codec::Raw).codec, Codec::Raw, "not agreed on");
    assert_eq!(batch_of(&[item("a", &[0; 100])], Codec::Lz4).codec, Codec::Raw, "small");

    let mut state = 1u32;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    })
    .take(5000)
    .collect();
    assert_eq!(batch_of(&[item("a", &noise)], Codec::Lz4).codec, Codec::Raw, "noise");
    // A third of it is zeros.
    let third = item("a", &[&noise[..], &[0; 2500]].concat());
    for (min_saving, codec) in [(0.2, Codec::Lz4), (0.5, Codec::Raw)] {
        let mut encoder = ItemEncoder::new(min_saving);
        encoder.push(&third.as_ref());
        assert_eq!(encoder.finish(Codec::Lz4).codec, codec, "{min_saving}");
    }
}
