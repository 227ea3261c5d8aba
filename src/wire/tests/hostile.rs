//! What a broken or hostile peer sends harms nothing and costs no more than the limits.

use bytes::BytesMut;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Decodes all it can, and any items in it, and checks that no more is held than allowed.
fn decode_all(bytes: &[u8]) {
    let mut decoder = Decoder::new(LIMITS);
    let mut buf = BytesMut::from(bytes);
    while let Ok(Some(frame)) = decoder.decode(&mut buf) {
        if let Frame::Batch(batch) = frame
            && let Ok(items) = decode_items(&batch, &LIMITS)
        {
            assert!(items.declared() <= LIMITS.max_batch_items as usize);
            let held: usize = items.flatten().map(|item| item.key.len() + item.value.len()).sum();
            assert!(held <= LIMITS.max_batch_raw_bytes as usize);
        }
    }
    // What was there, doubled by the buffer's own growth at worst, and one step towards the next frame.
    let most = 2 * (bytes.len() + LIMITS.max_frame_bytes as usize + 4);
    assert!(
        buf.capacity() <= most,
        "{} bytes reserved for {}",
        buf.capacity(),
        bytes.len()
    );
}

proptest! {
    #[test]
    fn a_truncated_frame_is_never_taken_for_a_whole_one(frame in any_frame(), cut: proptest::sample::Index) {
        let mut bytes = bytes_of(&frame);
        bytes.truncate(cut.index(bytes.len()));
        prop_assert_eq!(decode_one(bytes).unwrap(), None);
    }

    #[test]
    fn random_bytes_harm_nothing(bytes in vec(any::<u8>(), 0..300)) {
        decode_all(&bytes);
    }

    #[test]
    fn random_payloads_harm_nothing(kind in 0u8..10, flags: u8, payload in vec(any::<u8>(), 0..300)) {
        decode_all(&raw_frame(kind, flags, &payload));
    }

    #[test]
    fn random_compressed_payloads_harm_nothing(payload in vec(any::<u8>(), 0..200), raw_len in 0u32..4000, items in 0u32..20) {
        let batch = BatchFrame { id: 0, held_us: 0, codec: Codec::Lz4, raw_len, items, payload: payload.into() };
        decode_all(&bytes_of(&Frame::Batch(batch)));
    }

    #[test]
    fn mutated_frames_harm_nothing(
        frame in any_frame(),
        changes in vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = bytes_of(&frame);
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        decode_all(&bytes);
    }

    #[test]
    fn mutated_items_harm_nothing(
        items in vec(any_item(), 1..10),
        changes in vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let frame = batch_of(&items, Codec::Raw);
        let mut payload = frame.payload.to_vec();
        for (at, byte) in changes {
            let at = at.index(payload.len());
            payload[at] = byte;
        }
        decode_all(&bytes_of(&Frame::Batch(BatchFrame { payload: payload.into(), ..frame })));
    }
}

#[test]
fn a_declared_length_beyond_the_limit_is_refused_before_anything_is_allocated() {
    for length in [LIMITS.max_frame_bytes + 1, u32::MAX] {
        let mut buf = BytesMut::from(&length.to_be_bytes()[..]);
        let before = buf.capacity();
        let error = Decoder::new(LIMITS).decode(&mut buf).unwrap_err();
        assert!(
            matches!(error, WireError::FrameTooLong { length: l, limit } if l == length && limit == LIMITS.max_frame_bytes)
        );
        assert_eq!(buf.capacity(), before);
    }
}

#[test]
fn a_long_frame_costs_memory_only_as_it_arrives() {
    let mut buf = BytesMut::from(&raw_frame(3, 1, &[])[..]);
    buf[..4].copy_from_slice(&(1u32 << 30).to_be_bytes());
    let mut decoder = Decoder::new(Limits {
        max_frame_bytes: u32::MAX,
        ..LIMITS
    });
    assert!(matches!(decoder.decode(&mut buf), Ok(None)));
    assert!(buf.capacity() <= 512 << 10, "{} bytes", buf.capacity());
}

#[test]
fn control_frames_have_a_limit_of_their_own() {
    let mut decoder = Decoder::new(Limits {
        max_frame_bytes: u32::MAX,
        ..LIMITS
    });
    for kind in [1, 2, 5, 6, 7] {
        let mut buf = raw_frame(kind, 0, &[]);
        buf[..4].copy_from_slice(&(MAX_CONTROL_BYTES + 1).to_be_bytes());
        assert!(matches!(
            decoder.decode(&mut buf),
            Err(WireError::FrameTooLong {
                limit: MAX_CONTROL_BYTES,
                ..
            })
        ));
    }
}

#[test]
fn a_frame_without_kind_and_flags_is_refused() {
    for length in 0..2u32 {
        let error = decode_one(BytesMut::from(&length.to_be_bytes()[..])).unwrap_err();
        assert!(matches!(error, WireError::FrameTooShort { .. }));
    }
}

#[test]
fn a_deeply_nested_unknown_field_is_refused() {
    let mut payload = vec![0x81, 0xa1, b'x'];
    payload.extend(std::iter::repeat_n(0x91, 100_000));
    payload.push(0xc0);
    assert!(matches!(
        decode_one(raw_frame(7, 0, &payload)),
        Err(WireError::FrameTooLong { .. } | WireError::MalformedControl { .. })
    ));
    payload.drain(1000..);
    assert!(matches!(
        decode_one(raw_frame(7, 0, &payload)),
        Err(WireError::MalformedControl { .. })
    ));
}

#[test]
fn a_batch_beyond_the_limits_is_refused_before_it_is_decompressed() {
    let frame = batch_of(&[item("a", &[0; 5000])], Codec::Lz4);
    assert_eq!(frame.codec, Codec::Lz4);
    let cases = [
        BatchFrame {
            raw_len: LIMITS.max_batch_raw_bytes + 1,
            ..frame.clone()
        },
        BatchFrame {
            raw_len: u32::MAX,
            ..frame.clone()
        },
    ];
    for frame in cases {
        assert!(matches!(items_of(&frame), Err(WireError::BatchTooLarge { .. })));
        assert!(matches!(
            decode_one(bytes_of(&Frame::Batch(frame))),
            Err(WireError::BatchTooLarge { .. })
        ));
    }
    let many = BatchFrame {
        items: LIMITS.max_batch_items + 1,
        ..frame.clone()
    };
    assert!(matches!(items_of(&many), Err(WireError::TooManyItems { .. })));
    assert!(matches!(
        decode_one(bytes_of(&Frame::Batch(many))),
        Err(WireError::TooManyItems { .. })
    ));
    let impossible = BatchFrame { items: 900, ..frame };
    assert!(matches!(
        items_of(&impossible),
        Err(WireError::Malformed { frame: "batch", .. })
    ));
}

#[test]
fn a_batch_is_exactly_as_long_as_it_declares() {
    let compressed = batch_of(&[item("a", &[0; 5000])], Codec::Lz4);
    let most = compressed.payload.len() as u32 * 255;
    for raw_len in [compressed.raw_len - 1, compressed.raw_len + 1, most] {
        let error = items_of(&BatchFrame {
            raw_len,
            ..compressed.clone()
        })
        .unwrap_err();
        assert!(
            matches!(error, WireError::RawLength { .. } | WireError::Compression { .. }),
            "{error}"
        );
    }
    let amplified = BatchFrame {
        raw_len: most + 1,
        ..compressed.clone()
    };
    assert!(matches!(amplified.check(&LIMITS), Err(WireError::RawLength { .. })));

    let raw = batch_of(&[item("a", &[0; 5000])], Codec::Raw);
    for raw_len in [raw.raw_len - 1, raw.raw_len + 1] {
        assert!(matches!(
            items_of(&BatchFrame { raw_len, ..raw.clone() }),
            Err(WireError::RawLength { .. })
        ));
    }
}

#[test]
fn items_and_bytes_of_a_batch_end_together() {
    let frame = batch_of(&[item("a", b"1"), item("b", b"2")], Codec::Raw);
    let fewer = BatchFrame {
        items: 1,
        ..frame.clone()
    };
    let mut items = decode_items(&fewer, &LIMITS).unwrap();
    assert!(items.next().unwrap().is_ok());
    assert!(matches!(
        items.next(),
        Some(Err(WireError::Malformed { frame: "batch", .. }))
    ));
    assert!(items.next().is_none());
    let more = BatchFrame { items: 3, ..frame };
    assert!(matches!(
        items_of(&more),
        Err(WireError::Malformed { frame: "item", .. })
    ));
}

#[test]
fn an_item_with_an_array_for_a_value_is_refused() {
    let frame = batch_of(&[item("a", b"")], Codec::Raw);
    let mut payload = frame.payload.to_vec();
    payload.truncate(payload.len() - 2);
    payload.extend([0x92, 1]);
    let error = items_of(&BatchFrame {
        payload: payload.into(),
        ..frame
    })
    .unwrap_err();
    assert!(
        matches!(
            error,
            WireError::Malformed {
                frame: "item",
                part: "value"
            }
        ),
        "{error}"
    );
}

#[test]
fn a_numeric_field_out_of_range_is_refused() {
    // [cache = 65536, ...]: one more than an index may be.
    let frame = batch_of(&[item("a", b"")], Codec::Raw);
    let mut payload = vec![0x9c, 0xce, 0, 1, 0, 0];
    payload.extend_from_slice(&frame.payload[2..]);
    let frame = BatchFrame {
        raw_len: payload.len() as u32,
        payload: payload.into(),
        ..frame
    };
    assert!(matches!(
        items_of(&frame),
        Err(WireError::Malformed {
            frame: "item",
            part: "cache"
        })
    ));
}

#[test]
fn an_ack_with_more_entries_than_a_batch_has_items_is_refused() {
    let many = vec![(0, 0); LIMITS.max_batch_items as usize + 1];
    let error = decode_one(bytes_of(&Frame::Ack(Ack {
        ranges: many,
        ..Ack::default()
    })))
    .unwrap_err();
    assert!(matches!(error, WireError::TooManyItems { .. }));
    // Four billion entries in nine bytes.
    let error = decode_one(raw_frame(4, 1, &[0x97, 0, 0, 0, 0, 0xdd, 0xff, 0xff, 0xff, 0xfe])).unwrap_err();
    assert!(matches!(
        error,
        WireError::Malformed {
            frame: "ack",
            part: "ranges"
        }
    ));
}

#[test]
fn a_later_without_a_server_is_refused() {
    let exceptions = vec![Exception {
        index: 0,
        status: Status::Later,
        server: 1,
    }];
    let ack = Ack {
        ranges: vec![(0, 1)],
        exceptions,
        servers: vec!["10.0.0.5:11211".into()],
        ..Ack::default()
    };
    let error = decode_one(bytes_of(&Frame::Ack(ack))).unwrap_err();
    assert!(matches!(error, WireError::Malformed { frame: "ack", .. }));
}
