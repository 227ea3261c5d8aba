//! The event as MessagePack, read and written by hand: a million a second pass here, so nothing is allocated but what
//! an error quotes, and each thing that can be wrong has a reason of its own.

use std::borrow::Cow;

use rmp::Marker;

use super::{Event, EventError, EventRef, Fields, Op, VERSION};

pub(super) fn decode(value: &[u8]) -> Result<EventRef<'_>, EventError> {
    match usual(value) {
        Some(event) => Ok(event),
        None => decode_any(value),
    }
}

/// An event in the form that [`encode`] gives it, without `origin` and `fill`: nearly every one that a Writer has written, in
/// a quarter of the time. `None` for all others.
fn usual(value: &[u8]) -> Option<EventRef<'static>> {
    let (entries, rest) = value.split_first()?;
    let mut rest = rest.strip_prefix(b"\xa1v\x01\xa2op")?;
    const _: () = assert!(VERSION == 1);
    let op = Op::ALL.into_iter().find_map(|op| {
        let name = op.name().as_bytes();
        let (length, after) = rest.split_first()?;
        let after = after
            .strip_prefix(name)
            .filter(|_| *length == 0xa0 | name.len() as u8)?;
        rest = after;
        Some(op)
    })?;
    let mut entries = entries.checked_sub(0x80 + 2)?;
    let mut ttl = None;
    if let Some(after) = rest.strip_prefix(b"\xa3ttl").filter(|_| entries > 0) {
        let (number, after) = usual_uint(after)?;
        (ttl, rest) = (Some(u32::try_from(number).ok()?), after);
        entries -= 1;
    }
    let mut ver = None;
    if let Some(after) = rest.strip_prefix(b"\xa3ver").filter(|_| entries > 0) {
        let (number, after) = usual_uint(after)?;
        (ver, rest) = (Some(number), after);
        entries -= 1;
    }
    let (origin, fill) = (None, false);
    (entries == 0 && rest.is_empty()).then_some(EventRef {
        op,
        ttl,
        ver,
        origin,
        fill,
    })
}

/// An unsigned number, and what follows it.
fn usual_uint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (marker, rest) = bytes.split_first()?;
    Some(match marker {
        0..=0x7f => (u64::from(*marker), rest),
        0xcc => rest.split_first().map(|(byte, rest)| (u64::from(*byte), rest))?,
        0xcd => rest
            .split_first_chunk()
            .map(|(bytes, rest)| (u64::from(u16::from_be_bytes(*bytes)), rest))?,
        0xce => rest
            .split_first_chunk()
            .map(|(bytes, rest)| (u64::from(u32::from_be_bytes(*bytes)), rest))?,
        0xcf => rest
            .split_first_chunk()
            .map(|(bytes, rest)| (u64::from_be_bytes(*bytes), rest))?,
        _ => return None,
    })
}

fn decode_any(value: &[u8]) -> Result<EventRef<'_>, EventError> {
    let mut cursor = Cursor { bytes: value, at: 0 };
    let entries = match cursor.marker()? {
        Marker::FixMap(entries) => u64::from(entries),
        Marker::Map16 => cursor.uint(2)?,
        Marker::Map32 => cursor.uint(4)?,
        _ => return Err(EventError::NotMessagePack { at: 0 }),
    };
    let mut fields = Fields::default();
    let mut seen = 0u8;
    // Nothing is reserved for `entries`: a false one runs out of bytes.
    for _ in 0..entries {
        let Some(name) = cursor.name()? else {
            cursor.skip(1)?;
            continue;
        };
        let bit = match name {
            b"v" => 1,
            b"op" => 2,
            b"ttl" => 4,
            b"ver" => 8,
            b"origin" => 16,
            b"fill" => 32,
            _ => {
                cursor.skip(1)?;
                continue;
            }
        };
        if seen & bit != 0 {
            fields.fault.get_or_insert(EventError::DuplicateField);
        }
        seen |= bit;
        let scalar = cursor.scalar()?;
        match bit {
            1 => fields.version = fields.keep(scalar.integer("v")),
            2 => fields.op = fields.keep(scalar.op()),
            4 => {
                let ttl = scalar
                    .integer("ttl")
                    .and_then(|ttl| match ttl.map(u32::try_from).transpose() {
                        Ok(ttl) => Ok(ttl),
                        Err(_) => Err(EventError::OutOfRange { field: "ttl" }),
                    });
                fields.ttl = fields.keep(ttl);
            }
            8 => fields.ver = fields.keep(scalar.integer("ver")),
            16 => fields.origin = fields.keep(scalar.text("origin")),
            _ => fields.fill = fields.keep(scalar.boolean("fill")).unwrap_or(false),
        }
    }
    match value.len() - cursor.at {
        0 => fields.finish(),
        count => Err(EventError::TrailingBytes { count }),
    }
}

/// What a known field may hold; everything else is skipped whole and is `Other`.
enum Scalar<'a> {
    Nil,
    Boolean(bool),
    Integer(u64),
    Negative,
    Text(&'a [u8]),
    Other,
}

impl<'a> Scalar<'a> {
    fn integer(self, field: &'static str) -> Result<Option<u64>, EventError> {
        match self {
            Scalar::Nil => Ok(None),
            Scalar::Integer(value) => Ok(Some(value)),
            Scalar::Negative => Err(EventError::OutOfRange { field }),
            _ => Err(EventError::WrongType { field }),
        }
    }

    fn boolean(self, field: &'static str) -> Result<Option<bool>, EventError> {
        match self {
            Scalar::Nil => Ok(None),
            Scalar::Boolean(value) => Ok(Some(value)),
            _ => Err(EventError::WrongType { field }),
        }
    }

    fn text(self, field: &'static str) -> Result<Option<Cow<'a, str>>, EventError> {
        match self {
            Scalar::Nil => Ok(None),
            Scalar::Text(bytes) => match std::str::from_utf8(bytes) {
                Ok(text) => Ok(Some(Cow::Borrowed(text))),
                Err(_) => Err(EventError::NotUtf8 { field }),
            },
            _ => Err(EventError::WrongType { field }),
        }
    }

    fn op(self) -> Result<Option<Op>, EventError> {
        match self {
            Scalar::Nil => Ok(None),
            Scalar::Text(name) => Op::from_bytes(name)
                .map(Some)
                .ok_or_else(|| EventError::unknown_op(name)),
            _ => Err(EventError::WrongType { field: "op" }),
        }
    }
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: u64) -> Result<&'a [u8], EventError> {
        let rest = &self.bytes[self.at..];
        match usize::try_from(count) {
            Ok(count) if count <= rest.len() => {
                self.at += count;
                Ok(&rest[..count])
            }
            _ => Err(EventError::Truncated {
                length: self.bytes.len(),
            }),
        }
    }

    fn marker(&mut self) -> Result<Marker, EventError> {
        Ok(Marker::from_u8(self.take(1)?[0]))
    }

    /// A big-endian unsigned integer of 1, 2, 4 or 8 bytes.
    fn uint(&mut self, width: u64) -> Result<u64, EventError> {
        Ok(self
            .take(width)?
            .iter()
            .fold(0, |sum, byte| (sum << 8) | u64::from(*byte)))
    }

    /// A big-endian signed integer of 1, 2, 4 or 8 bytes; only its sign and its positive values matter.
    fn int(&mut self, width: u64) -> Result<Scalar<'a>, EventError> {
        let bits = self.uint(width)?;
        let negative = bits >> (width * 8 - 1) != 0;
        Ok(if negative {
            Scalar::Negative
        } else {
            Scalar::Integer(bits)
        })
    }

    /// The name of a map's entry, or `None` when it is no string: then it is an unknown field, already skipped.
    fn name(&mut self) -> Result<Option<&'a [u8]>, EventError> {
        match self.scalar()? {
            Scalar::Text(name) => Ok(Some(name)),
            _ => Ok(None),
        }
    }

    /// One whole value.
    fn scalar(&mut self) -> Result<Scalar<'a>, EventError> {
        let start = self.at;
        Ok(match self.marker()? {
            Marker::Null => Scalar::Nil,
            Marker::False => Scalar::Boolean(false),
            Marker::True => Scalar::Boolean(true),
            Marker::FixPos(value) => Scalar::Integer(u64::from(value)),
            Marker::FixNeg(_) => Scalar::Negative,
            Marker::U8 => Scalar::Integer(self.uint(1)?),
            Marker::U16 => Scalar::Integer(self.uint(2)?),
            Marker::U32 => Scalar::Integer(self.uint(4)?),
            Marker::U64 => Scalar::Integer(self.uint(8)?),
            Marker::I8 => self.int(1)?,
            Marker::I16 => self.int(2)?,
            Marker::I32 => self.int(4)?,
            Marker::I64 => self.int(8)?,
            Marker::FixStr(length) => Scalar::Text(self.take(u64::from(length))?),
            Marker::Str8 => Scalar::Text(self.sized(1)?),
            Marker::Str16 => Scalar::Text(self.sized(2)?),
            Marker::Str32 => Scalar::Text(self.sized(4)?),
            _ => {
                self.at = start;
                self.skip(1)?;
                Scalar::Other
            }
        })
    }

    /// Bytes behind a length of `width` bytes.
    fn sized(&mut self, width: u64) -> Result<&'a [u8], EventError> {
        let length = self.uint(width)?;
        self.take(length)
    }

    /// Passes over whole values, however deep they nest. A count of values still to come replaces a stack, so depth
    /// costs nothing and needs no cap; every step takes at least one byte, so a false count ends with the input.
    fn skip(&mut self, values: u64) -> Result<(), EventError> {
        let mut left = values;
        while left > 0 {
            let inner = match self.marker()? {
                Marker::Null | Marker::False | Marker::True | Marker::FixPos(_) | Marker::FixNeg(_) => 0,
                Marker::U8 | Marker::I8 => self.leaf(1)?,
                Marker::U16 | Marker::I16 => self.leaf(2)?,
                Marker::U32 | Marker::I32 | Marker::F32 => self.leaf(4)?,
                Marker::U64 | Marker::I64 | Marker::F64 => self.leaf(8)?,
                Marker::FixStr(length) => self.leaf(u64::from(length))?,
                Marker::Str8 | Marker::Bin8 => self.sized(1).map(|_| 0)?,
                Marker::Str16 | Marker::Bin16 => self.sized(2).map(|_| 0)?,
                Marker::Str32 | Marker::Bin32 => self.sized(4).map(|_| 0)?,
                // An extension is a type byte and its data.
                Marker::FixExt1 => self.leaf(1 + 1)?,
                Marker::FixExt2 => self.leaf(1 + 2)?,
                Marker::FixExt4 => self.leaf(1 + 4)?,
                Marker::FixExt8 => self.leaf(1 + 8)?,
                Marker::FixExt16 => self.leaf(1 + 16)?,
                Marker::Ext8 => self.extension(1)?,
                Marker::Ext16 => self.extension(2)?,
                Marker::Ext32 => self.extension(4)?,
                Marker::FixArray(items) => u64::from(items),
                Marker::Array16 => self.uint(2)?,
                Marker::Array32 => self.uint(4)?,
                Marker::FixMap(entries) => 2 * u64::from(entries),
                Marker::Map16 => 2 * self.uint(2)?,
                Marker::Map32 => 2 * self.uint(4)?,
                Marker::Reserved => return Err(EventError::NotMessagePack { at: self.at - 1 }),
            };
            left = (left - 1).saturating_add(inner);
        }
        Ok(())
    }

    /// Passes over a value's bytes; it has no values inside.
    fn leaf(&mut self, count: u64) -> Result<u64, EventError> {
        self.take(count).map(|_| 0)
    }

    fn extension(&mut self, width: u64) -> Result<u64, EventError> {
        let length = self.uint(width)?;
        self.leaf(1 + length)
    }
}

pub(super) fn encode(event: &Event, out: &mut Vec<u8>) {
    let optional = [
        event.ttl.is_some(),
        event.ver.is_some(),
        event.origin.is_some(),
        event.fill,
    ];
    let entries = 2 + optional.iter().map(|there| u8::from(*there)).sum::<u8>();
    out.push(Marker::FixMap(entries).to_u8());
    put_text(out, "v");
    put_uint(out, u64::from(VERSION));
    put_text(out, "op");
    put_text(out, event.op.name());
    if let Some(ttl) = event.ttl {
        put_text(out, "ttl");
        put_uint(out, u64::from(ttl));
    }
    if let Some(ver) = event.ver {
        put_text(out, "ver");
        put_uint(out, ver);
    }
    if let Some(origin) = &event.origin {
        put_text(out, "origin");
        put_text(out, origin);
    }
    if event.fill {
        put_text(out, "fill");
        out.push(Marker::True.to_u8());
    }
}

/// The shortest form, as MessagePack asks of writers.
fn put_uint(out: &mut Vec<u8>, value: u64) {
    let bytes = value.to_be_bytes();
    match value {
        0..=0x7f => out.push(Marker::FixPos(bytes[7]).to_u8()),
        0x80..=0xff => put(out, Marker::U8, &bytes[7..]),
        0x100..=0xffff => put(out, Marker::U16, &bytes[6..]),
        0x1_0000..=0xffff_ffff => put(out, Marker::U32, &bytes[4..]),
        _ => put(out, Marker::U64, &bytes),
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    let length = text.len().to_be_bytes();
    match text.len() {
        0..=31 => out.push(Marker::FixStr(length[7]).to_u8()),
        32..=0xff => put(out, Marker::Str8, &length[7..]),
        0x100..=0xffff => put(out, Marker::Str16, &length[6..]),
        _ => put(out, Marker::Str32, &length[4..]),
    }
    out.extend_from_slice(text.as_bytes());
}

fn put(out: &mut Vec<u8>, marker: Marker, bytes: &[u8]) {
    out.push(marker.to_u8());
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_usual_form_reads_the_same_either_way(
            op in 0usize..3, ttl in prop::option::of(any::<u32>()), ver in prop::option::of(any::<u64>()), fill in any::<bool>(),
            cut in 0usize..60, changed in prop::option::of((0usize..40, any::<u8>())),
        ) {
            let event = Event { op: Op::ALL[op], ttl, ver, origin: None, fill };
            let mut bytes = Vec::new();
            encode(&event, &mut bytes);
            prop_assert_eq!(usual(&bytes).is_some(), !fill);
            if let Some((at, byte)) = changed && at < bytes.len() {
                bytes[at] = byte;
            }
            bytes.truncate(cut);
            if let Some(usual) = usual(&bytes) {
                prop_assert_eq!(Ok(usual), decode_any(&bytes));
            }
        }
    }
}
