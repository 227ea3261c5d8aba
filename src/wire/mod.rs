//! The codec between regions: frames, batches and acks as bytes. It does no I/O and keeps no clock.
//!
//! A frame is a 4-byte big-endian length (of all that follows), 1 byte kind, 1 byte flags and a payload:
//!
//! | kind | frame | sent by | payload |
//! | --- | --- | --- | --- |
//! | 1 | [`Hello`] | relay | named map |
//! | 2 | [`HelloAck`] | agent | named map |
//! | 3 | [`BatchFrame`] | relay | array `[id, held_us, codec, raw_len, items, bin]`, the bin being items one after the other |
//! | 4 | [`Ack`] | agent | array `[batch, tick, queued_us, applied_us, ranges, exceptions, servers]` |
//! | 5 | [`Ping`] | relay | named map |
//! | 6 | [`Pong`] | agent | named map |
//! | 7 | [`GoAway`] | either | named map |
//!
//! Everything is MessagePack. Named maps may gain fields: unknown ones are ignored. The arrays are positional and change only
//! with [`VERSION`]. Flag bit 0 says *critical*: a kind that is not known ends the session if it is critical and is skipped if
//! it is not. The other flag bits are zero when sent and ignored when received.

mod ack;
mod batch;
mod frame;
mod item;
mod pack;
#[cfg(test)]
mod tests;

pub use ack::{Ack, Exception, Status};
pub use batch::{BatchFrame, Codec, EncodedBatch, ItemEncoder};
pub use frame::{CacheStatus, Decoder, Frame, GoAway, Hello, HelloAck, Ping, Pong, encode, encode_batch_head};
pub use item::{Expiry, Item, ItemOp, ItemRef, Items, PlacedItem, decode_items};

/// The version of the positional layouts, and of what the frames mean. Agreed on by [`Hello`] and [`HelloAck`].
pub const VERSION: u16 = 2;

/// The name in `features` of batches compressed as LZ4 blocks.
pub const FEATURE_LZ4: &str = "lz4";

/// The most bytes that a batch's frame adds to its payload: length, kind, flags, array header, `id` and `held_us` (9 each),
/// codec, `raw_len` and `items` (5 each) and the payload's bin header (5).
pub const BATCH_OVERHEAD: usize = 4 + 1 + 1 + 1 + 9 + 9 + 1 + 5 + 5 + 5;

/// The most bytes that an item takes besides its key and value: array header, cache (3), op, flags and expiry (5 each), ver (9),
/// origin (3), `looked_at`, `age_us` and `produced_at_ms` (9 each), trace (27), and the bin headers of key and value (5 each).
pub const ITEM_OVERHEAD: usize = 1 + 3 + 1 + 5 + 5 + 9 + 3 + 9 + 9 + 9 + 27 + 5 + 5;

/// Named maps are small, whatever the frame limit: a peer that sends 256 KiB of empty strings costs 6 MiB, not 24 times the
/// frame limit. A Hello with a thousand caches of the longest names fits.
pub const MAX_CONTROL_BYTES: u32 = 256 * 1024;

/// What a receiving end is willing to hold. Told to the peer in [`Hello`] and [`HelloAck`]; what exceeds it ends the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The largest frame, in bytes, not counting the 4 of its length.
    pub max_frame_bytes: u32,
    /// The largest batch, in bytes, once decompressed.
    pub max_batch_raw_bytes: u32,
    /// The most items in a batch.
    pub max_batch_items: u32,
}

impl Default for Limits {
    /// Room for memcached's largest default value (1 MiB) many times over, and for sixteen default batches in one.
    fn default() -> Limits {
        Limits {
            max_frame_bytes: 4 << 20,
            max_batch_raw_bytes: 8 << 20,
            max_batch_items: 16_384,
        }
    }
}

/// What is wrong with bytes received from a peer. The stream is out of step after any of these: the session ends, and nothing
/// else does. None of them speaks against dialling again, since what was not acked is looked at and sent anew.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The declared length exceeds what this end, or this kind of frame, allows.
    #[error("frame of {length} bytes exceeds the limit of {limit}")]
    FrameTooLong {
        /// Declared bytes after the length.
        length: u32,
        /// The most that is allowed.
        limit: u32,
    },
    /// The declared length has no room for kind and flags.
    #[error("frame of {length} bytes has no room for kind and flags")]
    FrameTooShort {
        /// Declared bytes after the length.
        length: u32,
    },
    /// A frame kind of a later version that must not be skipped.
    #[error("unknown critical frame kind {kind}")]
    UnknownKind {
        /// The frame's kind.
        kind: u8,
    },
    /// A named map that does not decode.
    #[error("malformed {frame} frame: {source}")]
    MalformedControl {
        /// The frame's name.
        frame: &'static str,
        /// What the decoder says.
        source: Box<rmp_serde::decode::Error>,
    },
    /// A positional array that does not decode, or a value in it that makes no sense.
    #[error("malformed {frame}: {part}")]
    Malformed {
        /// What was being decoded: batch, item or ack.
        frame: &'static str,
        /// The part of it that is wrong.
        part: &'static str,
    },
    /// A batch larger than allowed once decompressed.
    #[error("batch of {raw_len} bytes exceeds the limit of {limit}")]
    BatchTooLarge {
        /// Declared bytes, decompressed.
        raw_len: u32,
        /// The most that is allowed.
        limit: u32,
    },
    /// A batch or ack with more entries than a batch may have items.
    #[error("{items} items exceed the limit of {limit}")]
    TooManyItems {
        /// Declared items, ranges or exceptions.
        items: u32,
        /// The most that is allowed.
        limit: u32,
    },
    /// The payload is not, or cannot be, as long as it declares.
    #[error("batch declares {declared} bytes but its payload of {payload} bytes does not hold them")]
    RawLength {
        /// Declared bytes, decompressed.
        declared: u32,
        /// Bytes of the payload as received.
        payload: usize,
    },
    /// The payload is not an LZ4 block.
    #[error("batch does not decompress: {source}")]
    Compression {
        /// What the decompressor says.
        source: lz4_flex::block::DecompressError,
    },
}
