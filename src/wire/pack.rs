//! MessagePack by hand, where serde would copy keys and values or trust a declared length.

use std::io::Cursor;
use std::ops::Range;

use rmp::encode::RmpWrite;

use super::WireError;

/// More than the fixed part of any item or batch frame: see `ITEM_OVERHEAD` and `BATCH_OVERHEAD`.
pub(super) const HEAD_BYTES: usize = 128;

/// The fixed part of an item or batch frame, built on the stack and appended at once: a dozen small appends to a growing
/// buffer would each check its capacity.
pub(super) type Head = Cursor<[u8; HEAD_BYTES]>;

pub(super) fn head() -> Head {
    Cursor::new([0; HEAD_BYTES])
}

pub(super) fn written(head: &Head) -> &[u8] {
    let end = usize::try_from(head.position()).unwrap_or(HEAD_BYTES).min(HEAD_BYTES);
    &head.get_ref()[..end]
}

// A head has room for the longest of its kind, and a `BytesMut` grows: writing to either cannot fail.

pub(super) fn put_uint<W: RmpWrite>(out: &mut W, value: u64) {
    let result = rmp::encode::write_uint(out, value);
    debug_assert!(result.is_ok());
}

pub(super) fn put_nil<W: RmpWrite>(out: &mut W) {
    let result = rmp::encode::write_nil(out);
    debug_assert!(result.is_ok());
}

pub(super) fn put_array_len<W: RmpWrite>(out: &mut W, len: u32) {
    let result = rmp::encode::write_array_len(out, len);
    debug_assert!(result.is_ok());
}

pub(super) fn put_bin_len<W: RmpWrite>(out: &mut W, len: u32) {
    let result = rmp::encode::write_bin_len(out, len);
    debug_assert!(result.is_ok());
}

pub(super) fn put_str<W: RmpWrite>(out: &mut W, text: &str) {
    let result = rmp::encode::write_str(out, text);
    debug_assert!(result.is_ok());
}

/// The bytes of a length as the formats here declare it. Nothing that evrepl sends comes near 4 GiB; if it did, the peer
/// would refuse the frame.
pub(super) fn len32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// Reads values one after the other out of a slice and remembers where it is, so that keys and values can be taken as ranges
/// of the buffer behind the slice.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
    len: usize,
    frame: &'static str,
}

impl<'a> Reader<'a> {
    pub(super) fn new(frame: &'static str, bytes: &'a [u8]) -> Reader<'a> {
        Reader {
            rest: bytes,
            len: bytes.len(),
            frame,
        }
    }

    pub(super) fn malformed(&self, part: &'static str) -> WireError {
        WireError::Malformed {
            frame: self.frame,
            part,
        }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> usize {
        self.len - self.rest.len()
    }

    /// Bytes left. Every value takes one at least, so this also bounds how many there can be.
    pub(super) fn left(&self) -> usize {
        self.rest.len()
    }

    pub(super) fn end(&self) -> Result<(), WireError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(self.malformed("trailing bytes"))
        }
    }

    pub(super) fn uint<T: TryFrom<u64>>(&mut self, part: &'static str) -> Result<T, WireError> {
        let value: u64 = rmp::decode::read_int(&mut self.rest).map_err(|_| self.malformed(part))?;
        T::try_from(value).map_err(|_| self.malformed(part))
    }

    /// True, and past it, if nil is next.
    pub(super) fn nil(&mut self) -> bool {
        let nil = self.rest.first() == Some(&rmp::Marker::Null.to_u8());
        if nil {
            self.rest = &self.rest[1..];
        }
        nil
    }

    pub(super) fn array_len(&mut self, part: &'static str) -> Result<u32, WireError> {
        rmp::decode::read_array_len(&mut self.rest).map_err(|_| self.malformed(part))
    }

    pub(super) fn array_of(&mut self, len: u32, part: &'static str) -> Result<(), WireError> {
        if self.array_len(part)? == len {
            Ok(())
        } else {
            Err(self.malformed(part))
        }
    }

    /// A bin, as a range of the bytes given to [`Reader::new`].
    pub(super) fn bin(&mut self, part: &'static str) -> Result<Range<usize>, WireError> {
        let len = rmp::decode::read_bin_len(&mut self.rest).map_err(|_| self.malformed(part))?;
        let start = self.position();
        self.take(len, part)?;
        Ok(start..self.position())
    }

    pub(super) fn bin_array<const N: usize>(&mut self, part: &'static str) -> Result<[u8; N], WireError> {
        let len = rmp::decode::read_bin_len(&mut self.rest).map_err(|_| self.malformed(part))?;
        self.take(len, part)?.try_into().map_err(|_| self.malformed(part))
    }

    pub(super) fn str(&mut self, part: &'static str) -> Result<&'a str, WireError> {
        let len = rmp::decode::read_str_len(&mut self.rest).map_err(|_| self.malformed(part))?;
        std::str::from_utf8(self.take(len, part)?).map_err(|_| self.malformed(part))
    }

    fn take(&mut self, len: u32, part: &'static str) -> Result<&'a [u8], WireError> {
        let split = usize::try_from(len)
            .ok()
            .and_then(|len| self.rest.split_at_checked(len));
        let (taken, rest) = split.ok_or_else(|| self.malformed(part))?;
        self.rest = rest;
        Ok(taken)
    }
}
