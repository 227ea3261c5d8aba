//! Batches: encoding items one by one into a buffer that is used again, and compressing it when that pays.

use bytes::{Bytes, BytesMut};
use lz4_flex::block::CompressTable;

use super::item::{Before, MIN_ITEM_BYTES};
use super::pack::{self, Fixed, Reader};
use super::{ItemRef, Limits, WireError};

/// Elements of a batch's array.
const FIELDS: u32 = 6;

/// An LZ4 block cannot hold more than 255 times its length: a match costs three bytes for its first 19 and one for each further
/// 255.
const LZ4_MAX_RATIO: u64 = 255;

/// Below this, even half the size saves less than a network packet has room for.
const MIN_COMPRESS_BYTES: usize = 512;

/// After so many batches in a row that did not pay, the next ones are not tried ...
const MISSES_UNTIL_REST: u32 = 4;

/// ... so many of them. Values that do not compress then cost 3 % of the trying.
const REST_BATCHES: u32 = 31;

/// How a batch's payload is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Codec {
    /// It is not.
    Raw = 0,
    /// One LZ4 block, without a size in front.
    Lz4 = 1,
}

impl Codec {
    fn from_wire(code: u8) -> Option<Codec> {
        [Codec::Raw, Codec::Lz4].into_iter().find(|codec| *codec as u8 == code)
    }
}

/// Items that cross the network together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchFrame {
    /// Names the batch within its session; the [`super::Ack`] repeats it.
    pub id: u64,
    /// Microseconds from encoding to sending, by the relay's monotonic clock: to be added to each item's `age_us`.
    pub held_us: u64,
    /// How the payload is compressed.
    pub codec: Codec,
    /// Bytes of the payload once decompressed.
    pub raw_len: u32,
    /// Items in the payload.
    pub items: u32,
    /// The items, one after the other.
    pub payload: Bytes,
}

impl BatchFrame {
    /// All but the payload, which comes last.
    pub(super) fn encode_head(&self, head: &mut Fixed) {
        head.array_len(FIELDS);
        head.uint(self.id);
        head.uint(self.held_us);
        head.uint(self.codec as u64);
        head.uint(self.raw_len.into());
        head.uint(self.items.into());
        head.bin_len(pack::len32(self.payload.len()));
    }

    pub(super) fn decode(body: &Bytes, limits: &Limits) -> Result<BatchFrame, WireError> {
        let mut reader = Reader::new("batch", body);
        reader.array_of(FIELDS, "array length")?;
        let id = reader.uint("id")?;
        let held_us = reader.uint("held_us")?;
        let codec = Codec::from_wire(reader.uint("codec")?).ok_or_else(|| reader.malformed("codec"))?;
        let raw_len = reader.uint("raw_len")?;
        let items = reader.uint("items")?;
        let payload = reader.bin("payload")?;
        reader.end()?;
        let frame = BatchFrame {
            id,
            held_us,
            codec,
            raw_len,
            items,
            payload: body.slice(payload),
        };
        frame.check(limits)?;
        Ok(frame)
    }

    /// Whether what the frame declares is allowed and possible. Allocates nothing.
    pub(super) fn check(&self, limits: &Limits) -> Result<(), WireError> {
        if self.raw_len > limits.max_batch_raw_bytes {
            return Err(WireError::BatchTooLarge {
                raw_len: self.raw_len,
                limit: limits.max_batch_raw_bytes,
            });
        }
        if self.items > limits.max_batch_items {
            return Err(WireError::TooManyItems {
                items: self.items,
                limit: limits.max_batch_items,
            });
        }
        if u64::from(self.items) * MIN_ITEM_BYTES > u64::from(self.raw_len) {
            return Err(WireError::Malformed {
                frame: "batch",
                part: "more items than its bytes can hold",
            });
        }
        let (raw_len, payload) = (u64::from(self.raw_len), self.payload.len() as u64);
        let possible = match self.codec {
            Codec::Raw => raw_len == payload,
            Codec::Lz4 => raw_len <= payload.saturating_mul(LZ4_MAX_RATIO),
        };
        if possible { Ok(()) } else { Err(self.raw_length()) }
    }

    /// The payload, decompressed. To be checked first: it allocates `raw_len` bytes.
    pub(super) fn raw(&self) -> Result<Bytes, WireError> {
        match self.codec {
            Codec::Raw => Ok(self.payload.clone()),
            Codec::Lz4 => {
                let raw = lz4_flex::block::decompress(&self.payload, self.raw_len as usize)
                    .map_err(|source| WireError::Compression { source })?;
                if raw.len() == self.raw_len as usize {
                    Ok(Bytes::from(raw))
                } else {
                    Err(self.raw_length())
                }
            }
        }
    }

    fn raw_length(&self) -> WireError {
        WireError::RawLength {
            declared: self.raw_len,
            payload: self.payload.len(),
        }
    }
}

/// Encoded items that wait to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedBatch {
    /// How the payload is compressed.
    pub codec: Codec,
    /// Bytes of the payload once decompressed.
    pub raw_len: u32,
    /// Items in the payload.
    pub items: u32,
    /// The items, one after the other.
    pub payload: Bytes,
}

impl EncodedBatch {
    /// The frame to send, under the session's next batch id and with the microseconds that have gone by since the encoding.
    pub fn into_frame(self, id: u64, held_us: u64) -> BatchFrame {
        let EncodedBatch {
            codec,
            raw_len,
            items,
            payload,
        } = self;
        BatchFrame {
            id,
            held_us,
            codec,
            raw_len,
            items,
            payload,
        }
    }
}

/// Encodes items one by one. One encoder serves all batches of a lane: it keeps its buffers, and it remembers whether
/// compression has paid lately.
pub struct ItemEncoder {
    raw: BytesMut,
    items: u32,
    fixed: Fixed,
    before: Before,
    scratch: Vec<u8>,
    table: CompressTable,
    payoff: Payoff,
    min_saving: f64,
    /// Bytes of the last batch, and some more.
    last_bytes: usize,
}

impl Default for ItemEncoder {
    fn default() -> ItemEncoder {
        ItemEncoder::new(0.0)
    }
}

impl std::fmt::Debug for ItemEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ItemEncoder")
            .field("items", &self.items)
            .field("bytes", &self.raw.len())
            .finish_non_exhaustive()
    }
}

impl ItemEncoder {
    /// An encoder without items. Buffers are made when needed. `min_saving` is the share of a batch's bytes, 0 to 1, that
    /// compression must save to be worth it.
    pub fn new(min_saving: f64) -> ItemEncoder {
        ItemEncoder {
            raw: BytesMut::new(),
            items: 0,
            fixed: Fixed::new(),
            before: Before::default(),
            scratch: Vec::new(),
            table: CompressTable::default(),
            payoff: Payoff::default(),
            min_saving,
            last_bytes: 0,
        }
    }

    /// Appends one item. It takes at most [`super::ITEM_OVERHEAD`] bytes more than its key and value.
    pub fn push(&mut self, item: &ItemRef<'_>) {
        if self.items == 0 {
            // As large as the last batch was: grown step by step, each byte would be copied once more.
            self.raw.reserve(self.last_bytes);
        }
        item.encode(&mut self.raw, &mut self.fixed, &mut self.before);
        self.items += 1;
    }

    /// Bytes so far, before compression.
    pub fn bytes(&self) -> usize {
        self.raw.len()
    }

    /// Items so far.
    pub fn len(&self) -> u32 {
        self.items
    }

    /// Whether there are no items yet.
    pub fn is_empty(&self) -> bool {
        self.items == 0
    }

    /// Ends the batch and begins the next. `codec` is what the session agreed on: with [`Codec::Lz4`] the batch is still sent
    /// raw when it is small, when too little would be saved, or when the last ones did not pay.
    pub fn finish(&mut self, codec: Codec) -> EncodedBatch {
        let items = std::mem::take(&mut self.items);
        self.before = Before::default();
        let raw_len = pack::len32(self.raw.len());
        self.last_bytes = self.raw.len() + self.raw.len() / 16;
        if codec == Codec::Lz4
            && self.raw.len() >= MIN_COMPRESS_BYTES
            && self.payoff.try_now()
            && let Some(payload) = self.compress()
        {
            self.raw.clear();
            return EncodedBatch {
                codec: Codec::Lz4,
                raw_len,
                items,
                payload,
            };
        }
        // The buffer is reclaimed by the next `push` if the batch has been sent and dropped by then.
        EncodedBatch {
            codec: Codec::Raw,
            raw_len,
            items,
            payload: self.raw.split().freeze(),
        }
    }

    /// The batch compressed, if that saves enough.
    fn compress(&mut self) -> Option<Bytes> {
        let room = lz4_flex::block::get_maximum_output_size(self.raw.len());
        if self.scratch.len() < room {
            self.scratch.resize(room, 0);
        }
        let compressed = lz4_flex::block::compress_into_with_table(&self.raw, &mut self.scratch, &mut self.table)
            .unwrap_or(usize::MAX);
        let paid = (compressed as f64) < self.raw.len() as f64 * (1.0 - self.min_saving);
        self.payoff.record(paid);
        paid.then(|| Bytes::copy_from_slice(&self.scratch[..compressed]))
    }
}

/// Whether compressing is worth trying, judged by how it went lately.
#[derive(Debug, Default)]
struct Payoff {
    misses: u32,
    rest: u32,
}

impl Payoff {
    fn try_now(&mut self) -> bool {
        let now = self.rest == 0;
        self.rest = self.rest.saturating_sub(1);
        now
    }

    fn record(&mut self, paid: bool) {
        self.misses = if paid { 0 } else { self.misses.saturating_add(1) };
        if self.misses >= MISSES_UNTIL_REST {
            self.rest = REST_BATCHES;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_do_not_compress_are_tried_only_now_and_then() {
        let mut payoff = Payoff::default();
        let mut tries = 0;
        for _ in 0..(MISSES_UNTIL_REST + 10 * (REST_BATCHES + 1)) {
            if payoff.try_now() {
                tries += 1;
                payoff.record(false);
            }
        }
        assert_eq!(tries, MISSES_UNTIL_REST + 10);
    }

    #[test]
    fn one_batch_that_pays_ends_the_rest() {
        let mut payoff = Payoff::default();
        for _ in 0..MISSES_UNTIL_REST {
            assert!(payoff.try_now());
            payoff.record(false);
        }
        for _ in 0..REST_BATCHES {
            assert!(!payoff.try_now());
        }
        assert!(payoff.try_now());
        payoff.record(true);
        for _ in 1..MISSES_UNTIL_REST {
            assert!(payoff.try_now());
            payoff.record(false);
        }
        assert!(payoff.try_now());
    }
}
