//! The private codec, for `benches/`: nothing else has a use for requests that nobody sends.

use bytes::{Bytes, BytesMut};

use super::codec::{self, Decoded};

/// Appends a look at each key.
pub fn put_looks(keys: &[Bytes], out: &mut Vec<u8>) {
    for (opaque, key) in (0..).zip(keys) {
        codec::put_look(out, key, true, opaque);
    }
}

/// Appends a quiet set of each key, with its value copied.
pub fn put_sets(keys: &[Bytes], values: &[Bytes], out: &mut Vec<u8>) {
    for (key, value) in keys.iter().zip(values) {
        codec::put_set(out, key, value.len(), 7, 0, None);
        out.extend_from_slice(value);
        out.extend_from_slice(b"\r\n");
    }
}

/// Takes all replies off the buffer: how many there were, and how long their values are together.
pub fn take_replies(buffer: &mut BytesMut) -> (usize, usize) {
    let (mut count, mut bytes) = (0, 0);
    while let Ok(Decoded::Reply(reply)) = codec::decode(buffer) {
        count += 1;
        bytes += reply.value.len();
    }
    (count, bytes)
}
