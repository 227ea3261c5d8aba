//! Items: what a look saw of a key, as it crosses the network.
//!
//! One item is the array `[cache, op, flags, expiry, ver, origin, looked_at, age_us, produced_at_ms, trace, key, value]`. The
//! fixed part comes first, so that it is appended at once. Absent expiry (never), origin and trace are nil; the trace is a bin
//! of 25 bytes; a key and a value are bins, the value empty unless the op is set.

use bytes::{BufMut, Bytes, BytesMut};

use super::pack::{self, Reader};
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

/// An item as received. Key and value are slices of the batch's buffer: holding one of them holds the whole buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Index into the session's [`super::Hello::caches`]. Not checked here.
    pub cache: u16,
    /// What to do.
    pub op: ItemOp,
    /// The key as memcached sees it. Not checked here.
    pub key: Bytes,
    /// The value; empty unless `op` is [`ItemOp::Set`].
    pub value: Bytes,
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

impl Item {
    /// The same item, borrowed, as [`super::ItemEncoder::push`] takes it.
    pub fn as_ref(&self) -> ItemRef<'_> {
        ItemRef {
            cache: self.cache,
            op: self.op,
            key: &self.key,
            value: &self.value,
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

/// An item to be encoded: the fields of [`Item`], borrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are those of Item")]
pub struct ItemRef<'a> {
    pub cache: u16,
    pub op: ItemOp,
    pub key: &'a [u8],
    pub value: &'a [u8],
    pub flags: u32,
    pub expiry: Expiry,
    pub ver: u64,
    pub origin: Option<u16>,
    pub looked_at: u64,
    pub age_us: u64,
    pub produced_at_ms: u64,
    pub trace: Option<TraceContext>,
}

impl ItemRef<'_> {
    pub(super) fn encode(&self, out: &mut BytesMut) {
        let mut head = pack::head();
        pack::put_array_len(&mut head, FIELDS);
        pack::put_uint(&mut head, self.cache.into());
        pack::put_uint(&mut head, self.op as u64);
        pack::put_uint(&mut head, self.flags.into());
        match self.expiry {
            Expiry::Never => pack::put_nil(&mut head),
            Expiry::Seconds(seconds) => pack::put_uint(&mut head, seconds.into()),
        }
        pack::put_uint(&mut head, self.ver);
        match self.origin {
            None => pack::put_nil(&mut head),
            Some(origin) => pack::put_uint(&mut head, origin.into()),
        }
        pack::put_uint(&mut head, self.looked_at);
        pack::put_uint(&mut head, self.age_us);
        pack::put_uint(&mut head, self.produced_at_ms);
        match &self.trace {
            None => pack::put_nil(&mut head),
            Some(trace) => put_trace(&mut head, trace),
        }
        pack::put_bin_len(&mut head, pack::len32(self.key.len()));

        let mut value_head = pack::head();
        pack::put_bin_len(&mut value_head, pack::len32(self.value.len()));

        let (head, value_head) = (pack::written(&head), pack::written(&value_head));
        out.reserve(head.len() + self.key.len() + value_head.len() + self.value.len());
        out.put_slice(head);
        out.put_slice(self.key);
        out.put_slice(value_head);
        out.put_slice(self.value);
    }
}

fn put_trace(head: &mut pack::Head, trace: &TraceContext) {
    let mut bytes = [0; TRACE_BYTES];
    bytes[..16].copy_from_slice(&trace.trace_id);
    bytes[16..24].copy_from_slice(&trace.span_id);
    bytes[24] = trace.flags;
    let result = rmp::encode::write_bin(head, &bytes);
    debug_assert!(result.is_ok());
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
/// value is copied. The iterator ends after its first error, which it also yields when bytes are left behind the last item: to
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
    })
}

/// The iterator made by [`decode_items`].
#[derive(Debug)]
pub struct Items {
    raw: Bytes,
    at: usize,
    left: u32,
}

impl Items {
    /// Items that the batch declares and that were not yielded yet. The limits bound it, so it may size a buffer.
    pub fn declared(&self) -> usize {
        self.left as usize
    }

    fn read(&mut self) -> Result<Item, WireError> {
        let mut reader = Reader::new("item", &self.raw[self.at..]);
        reader.array_of(FIELDS, "array length")?;
        let cache = reader.uint("cache")?;
        let op = ItemOp::from_wire(reader.uint("op")?).ok_or_else(|| reader.malformed("op"))?;
        let flags = reader.uint("flags")?;
        let expiry = if reader.nil() {
            Expiry::Never
        } else {
            Expiry::Seconds(reader.uint("expiry")?)
        };
        let ver = reader.uint("ver")?;
        let origin = if reader.nil() {
            None
        } else {
            Some(reader.uint("origin")?)
        };
        let looked_at = reader.uint("looked_at")?;
        let age_us = reader.uint("age_us")?;
        let produced_at_ms = reader.uint("produced_at_ms")?;
        let trace = if reader.nil() {
            None
        } else {
            Some(read_trace(&mut reader)?)
        };
        let key = reader.bin("key")?;
        let value = reader.bin("value")?;
        let end = reader.position();
        let item = Item {
            cache,
            op,
            key: self.raw.slice(self.at + key.start..self.at + key.end),
            value: self.raw.slice(self.at + value.start..self.at + value.end),
            flags,
            expiry,
            ver,
            origin,
            looked_at,
            age_us,
            produced_at_ms,
            trace,
        };
        self.at += end;
        Ok(item)
    }
}

impl Iterator for Items {
    type Item = Result<Item, WireError>;

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
