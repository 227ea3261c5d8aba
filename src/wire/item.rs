//! Items: what a look saw of a key, as it crosses the network.
//!
//! One item is the array `[cache, op, flags, expiry, ver, origin, looked_at, age_us, produced_at_ms, trace, key, value]`. The
//! fixed part comes first, so that it is appended at once. Absent expiry (never), origin and trace are nil; the trace is a bin
//! of 25 bytes; a key and a value are bins, the value empty unless the op is set.
//!
//! `ver`, `looked_at`, `age_us` and `produced_at_ms` are nearly the same in all items of a batch. Each stands there as the
//! difference to that of the item before it (to 0 in the first), modulo 2^64 and zig-zag coded (0, -1, 1, -2, ... as 0, 1, 2,
//! 3, ...): an item is a fifth smaller by it, and LZ4, which would find the same, need not look.

use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};

use super::pack::{self, Fixed, Reader};
use super::{BatchFrame, Limits, WireError};
use crate::event::TraceContext;

/// Elements of an item's array.
const FIELDS: u32 = 12;

/// The shortest item: array header, ten elements of a byte, and two empty bins of two.
pub(super) const MIN_ITEM_BYTES: u64 = 1 + 10 + 2 + 2;

/// Trace id (16), span id (8) and flags (1), as in a W3C `traceparent`.
const TRACE_BYTES: usize = 25;

/// What the agent does with the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ItemOp {
    /// Store value, flags and expiry.
    Set = 0,
    /// Bring the expiry only.
    Touch = 1,
    /// Delete the copy.
    Remove = 2,
}

impl ItemOp {
    fn from_wire(code: u8) -> Option<ItemOp> {
        [ItemOp::Set, ItemOp::Touch, ItemOp::Remove]
            .into_iter()
            .find(|op| *op as u8 == code)
    }
}

/// When the source's copy ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Expiry {
    /// It does not end by itself.
    Never,
    /// So many seconds after the look, rounded down.
    Seconds(u32),
}

/// An item; `Part` is what its key and value are held as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item<Part = Bytes> {
    /// Index into the session's [`super::Hello::caches`]. Not checked here.
    pub cache: u16,
    /// What to do.
    pub op: ItemOp,
    /// The key as memcached sees it. Not checked here.
    pub key: Part,
    /// The value; empty unless `op` is [`ItemOp::Set`].
    pub value: Part,
    /// memcached's client flags.
    pub flags: u32,
    /// What was left at the look.
    pub expiry: Expiry,
    /// The event's version: a hybrid logical clock (milliseconds << 16, plus a counter).
    pub ver: u64,
    /// Index into the session's [`super::Hello::regions`] of the region that wrote; none: the relay's own. Not checked here.
    pub origin: Option<u16>,
    /// The last tick that the session had heard before the look.
    pub looked_at: u64,
    /// Microseconds from the look to the encoding of the batch, by the relay's monotonic clock.
    pub age_us: u64,
    /// The event's produced-at, in milliseconds since the Unix epoch, by the clock of Kafka or the writer.
    pub produced_at_ms: u64,
    /// The event's trace, if it is sampled.
    pub trace: Option<TraceContext>,
}

/// An item as received, with ranges of the batch's bytes ([`Items::raw`]), so that it costs no reference count.
pub type PlacedItem = Item<Range<u32>>;

/// An item to be encoded.
pub type ItemRef<'a> = Item<&'a [u8]>;

impl<Part> Item<Part> {
    /// The same item with other forms of its key and value.
    fn map<'a, Other>(&'a self, part: impl Fn(&'a Part) -> Other) -> Item<Other> {
        Item {
            cache: self.cache,
            op: self.op,
            key: part(&self.key),
            value: part(&self.value),
            flags: self.flags,
            expiry: self.expiry,
            ver: self.ver,
            origin: self.origin,
            looked_at: self.looked_at,
            age_us: self.age_us,
            produced_at_ms: self.produced_at_ms,
            trace: self.trace,
        }
    }
}

impl Item {
    /// The same item, borrowed, as [`super::ItemEncoder::push`] takes it.
    pub fn as_ref(&self) -> ItemRef<'_> {
        self.map(|bytes| &bytes[..])
    }
}

impl PlacedItem {
    /// The key, out of the batch's bytes.
    pub fn key_of<'a>(&self, raw: &'a [u8]) -> &'a [u8] {
        &raw[self.key.start as usize..self.key.end as usize]
    }

    /// The item with slices of the batch's bytes: holding one of them holds all of the bytes.
    pub fn item(&self, raw: &Bytes) -> Item {
        self.map(|range| raw.slice(range.start as usize..range.end as usize))
    }
}

impl ItemRef<'_> {
    /// Appends the item; `before` is of the item before it in the batch.
    pub(super) fn encode(&self, out: &mut BytesMut, fixed: &mut Fixed, before: &mut Before) {
        fixed.clear();
        fixed.array_len(FIELDS);
        fixed.uint(self.cache.into());
        fixed.uint(self.op as u64);
        fixed.uint(self.flags.into());
        match self.expiry {
            Expiry::Never => fixed.nil(),
            Expiry::Seconds(seconds) => fixed.uint(seconds.into()),
        }
        fixed.uint(difference(self.ver, &mut before.ver));
        match self.origin {
            None => fixed.nil(),
            Some(origin) => fixed.uint(origin.into()),
        }
        fixed.uint(difference(self.looked_at, &mut before.looked_at));
        fixed.uint(difference(self.age_us, &mut before.age_us));
        fixed.uint(difference(self.produced_at_ms, &mut before.produced_at_ms));
        match &self.trace {
            None => fixed.nil(),
            Some(trace) => {
                fixed.bin_len(TRACE_BYTES as u32);
                fixed.bytes(&trace.trace_id);
                fixed.bytes(&trace.span_id);
                fixed.byte(trace.flags);
            }
        }
        fixed.bin_len(pack::len32(self.key.len()));
        let key_at = fixed.len();
        fixed.bin_len(pack::len32(self.value.len()));

        let (head, value_head) = fixed.written().split_at(key_at);
        out.reserve(head.len() + self.key.len() + value_head.len() + self.value.len());
        out.put_slice(head);
        out.put_slice(self.key);
        out.put_slice(value_head);
        out.put_slice(self.value);
    }
}

/// What the item before had, of the numbers that are written as differences.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Before {
    ver: u64,
    looked_at: u64,
    age_us: u64,
    produced_at_ms: u64,
}

/// `number` as it is written behind `before`, which becomes it.
fn difference(number: u64, before: &mut u64) -> u64 {
    let signed = number.wrapping_sub(std::mem::replace(before, number)) as i64;
    ((signed << 1) ^ (signed >> 63)) as u64
}

/// The number that was written so; `before` becomes it.
fn number(written: u64, before: &mut u64) -> u64 {
    let signed = (written >> 1) as i64 ^ -((written & 1) as i64);
    *before = before.wrapping_add(signed as u64);
    *before
}

fn read_trace(reader: &mut Reader<'_>) -> Result<TraceContext, WireError> {
    let bytes: [u8; TRACE_BYTES] = reader.bin_array("trace")?;
    let mut trace = TraceContext {
        trace_id: [0; 16],
        span_id: [0; 8],
        flags: bytes[24],
    };
    trace.trace_id.copy_from_slice(&bytes[..16]);
    trace.span_id.copy_from_slice(&bytes[16..24]);
    Ok(trace)
}

/// The items of a batch, decompressed if need be.
///
/// A compressed batch costs one buffer of `raw_len` bytes, which is checked first; nothing else is allocated, and no key or
/// value is copied: items come with the ranges of theirs. The iterator ends after its first error, which it also yields when bytes are left behind the last item: to
/// apply all of a batch or nothing, collect into a `Result<Vec<_>, _>` first.
///
/// # Errors
///
/// A batch that exceeds `limits`, or whose payload does not decompress to exactly `raw_len` bytes.
pub fn decode_items(frame: &BatchFrame, limits: &Limits) -> Result<Items, WireError> {
    frame.check(limits)?;
    Ok(Items {
        raw: frame.raw()?,
        at: 0,
        left: frame.items,
        before: Before::default(),
    })
}

/// The iterator made by [`decode_items`].
#[derive(Debug)]
pub struct Items {
    raw: Bytes,
    at: usize,
    left: u32,
    before: Before,
}

impl Items {
    /// Items that the batch declares and that were not yielded yet. The limits bound it, so it may size a buffer.
    pub fn declared(&self) -> usize {
        self.left as usize
    }

    /// The batch's bytes, decompressed: what the ranges of the items are of.
    pub fn raw(&self) -> &Bytes {
        &self.raw
    }

    fn read(&mut self) -> Result<PlacedItem, WireError> {
        let mut reader = Reader::at("item", &self.raw, self.at);
        reader.array_of(FIELDS, "array length")?;
        let cache = reader.uint("cache")?;
        let op = ItemOp::from_wire(reader.uint("op")?).ok_or_else(|| reader.malformed("op"))?;
        let flags = reader.uint("flags")?;
        let expiry = if reader.nil() {
            Expiry::Never
        } else {
            Expiry::Seconds(reader.uint("expiry")?)
        };
        let ver = number(reader.uint("ver")?, &mut self.before.ver);
        let origin = if reader.nil() {
            None
        } else {
            Some(reader.uint("origin")?)
        };
        let looked_at = number(reader.uint("looked_at")?, &mut self.before.looked_at);
        let age_us = number(reader.uint("age_us")?, &mut self.before.age_us);
        let produced_at_ms = number(reader.uint("produced_at_ms")?, &mut self.before.produced_at_ms);
        let trace = if reader.nil() {
            None
        } else {
            Some(read_trace(&mut reader)?)
        };
        let key = reader.bin("key")?;
        let value = reader.bin("value")?;
        self.at = reader.position();
        // A batch is shorter than 4 GiB: its length has four bytes.
        let short = |range: Range<usize>| range.start as u32..range.end as u32;
        Ok(PlacedItem {
            cache,
            op,
            key: short(key),
            value: short(value),
            flags,
            expiry,
            ver,
            origin,
            looked_at,
            age_us,
            produced_at_ms,
            trace,
        })
    }
}

impl Iterator for Items {
    type Item = Result<PlacedItem, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        let result = if self.left > 0 {
            self.left -= 1;
            self.read()
        } else if self.at < self.raw.len() {
            Err(WireError::Malformed {
                frame: "batch",
                part: "bytes after the last item",
            })
        } else {
            return None;
        };
        if result.is_err() {
            self.left = 0;
            self.at = self.raw.len();
        }
        Some(result)
    }
}
