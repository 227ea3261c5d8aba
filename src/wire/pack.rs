//! MessagePack by hand, where serde would copy keys and values or trust a declared length.

use std::ops::Range;

use rmp::encode::RmpWrite;

use super::WireError;

/// More than the fixed part of any item or batch frame: see `ITEM_OVERHEAD` and `BATCH_OVERHEAD`.
pub(super) const HEAD_BYTES: usize = 128;

// A `BytesMut` grows: writing to it cannot fail.

pub(super) fn put_uint<W: RmpWrite>(out: &mut W, value: u64) {
    let result = rmp::encode::write_uint(out, value);
    debug_assert!(result.is_ok());
}

pub(super) fn put_array_len<W: RmpWrite>(out: &mut W, len: u32) {
    let result = rmp::encode::write_array_len(out, len);
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

/// The fixed part of an item or batch frame, built here and appended at once: a dozen small appends to a growing buffer would
/// each check its capacity. Without rmp's generic machinery, and kept from item to item, for there are thousands of them in a
/// batch. It has room for the longest of its kind.
pub(super) struct Fixed {
    bytes: [u8; HEAD_BYTES],
    len: usize,
}

impl Fixed {
    pub(super) fn new() -> Fixed {
        Fixed {
            bytes: [0; HEAD_BYTES],
            len: 0,
        }
    }

    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn written(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    #[inline]
    pub(super) fn byte(&mut self, byte: u8) {
        self.bytes[self.len] = byte;
        self.len += 1;
    }

    #[inline]
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    #[inline]
    fn marked<const N: usize>(&mut self, marker: u8, bytes: [u8; N]) {
        self.byte(marker);
        self.bytes(&bytes);
    }

    /// The shortest form, as MessagePack asks of writers.
    #[inline]
    pub(super) fn uint(&mut self, value: u64) {
        match value {
            0..=0x7f => self.byte(value as u8),
            0x80..=0xff => self.marked(0xcc, [value as u8]),
            0x100..=0xffff => self.marked(0xcd, (value as u16).to_be_bytes()),
            0x1_0000..=0xffff_ffff => self.marked(0xce, (value as u32).to_be_bytes()),
            _ => self.marked(0xcf, value.to_be_bytes()),
        }
    }

    /// Of fifteen elements at most.
    #[inline]
    pub(super) fn array_len(&mut self, len: u32) {
        debug_assert!(len < 16);
        self.byte(0x90 | len as u8);
    }

    #[inline]
    pub(super) fn nil(&mut self) {
        self.byte(0xc0);
    }

    #[inline]
    pub(super) fn bin_len(&mut self, len: u32) {
        match len {
            0..=0xff => self.marked(0xc4, [len as u8]),
            0x100..=0xffff => self.marked(0xc5, (len as u16).to_be_bytes()),
            _ => self.marked(0xc6, len.to_be_bytes()),
        }
    }
}

/// Reads values one after the other out of a slice and remembers where it is, so that keys and values can be taken as ranges
/// of the buffer behind the slice.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    frame: &'static str,
}

impl<'a> Reader<'a> {
    pub(super) fn new(frame: &'static str, bytes: &'a [u8]) -> Reader<'a> {
        Reader::at(frame, bytes, 0)
    }

    /// Begins so many bytes behind the start.
    pub(super) fn at(frame: &'static str, bytes: &'a [u8], at: usize) -> Reader<'a> {
        Reader { bytes, at, frame }
    }

    #[cold]
    pub(super) fn malformed(&self, part: &'static str) -> WireError {
        WireError::Malformed {
            frame: self.frame,
            part,
        }
    }

    /// Where the next value begins in the bytes.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// Bytes left. Every value takes one at least, so this also bounds how many there can be.
    pub(super) fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    pub(super) fn end(&self) -> Result<(), WireError> {
        if self.left() == 0 {
            Ok(())
        } else {
            Err(self.malformed("trailing bytes"))
        }
    }

    /// The next bytes, big-endian, behind a marker byte.
    #[inline]
    fn behind_marker<const N: usize>(&mut self) -> Option<[u8; N]> {
        let bytes = *self.bytes.get(self.at + 1..)?.first_chunk::<N>()?;
        self.at += 1 + N;
        Some(bytes)
    }

    #[inline]
    pub(super) fn uint<T: TryFrom<u64>>(&mut self, part: &'static str) -> Result<T, WireError> {
        // The five forms that an encoder chooses for what is not negative; a dozen of them make an item.
        let value = match self.bytes.get(self.at) {
            Some(&small @ 0..0x80) => {
                self.at += 1;
                Some(small.into())
            }
            Some(0xcc) => self.behind_marker::<1>().map(|[byte]| byte.into()),
            Some(0xcd) => self.behind_marker().map(|bytes| u16::from_be_bytes(bytes).into()),
            Some(0xce) => self.behind_marker().map(|bytes| u32::from_be_bytes(bytes).into()),
            Some(0xcf) => self.behind_marker().map(u64::from_be_bytes),
            _ => self.signed(),
        };
        value
            .and_then(|value| T::try_from(value).ok())
            .ok_or_else(|| self.malformed(part))
    }

    /// A number in one of the forms that could be negative, if it is not.
    #[cold]
    fn signed(&mut self) -> Option<u64> {
        let mut rest = self.rest();
        let value = rmp::decode::read_int(&mut rest).ok()?;
        self.at = self.bytes.len() - rest.len();
        Some(value)
    }

    /// True, and past it, if nil is next.
    #[inline]
    pub(super) fn nil(&mut self) -> bool {
        let nil = self.bytes.get(self.at) == Some(&0xc0);
        self.at += usize::from(nil);
        nil
    }

    /// What one of rmp's functions reads.
    fn by<T, E>(
        &mut self,
        part: &'static str,
        read: impl FnOnce(&mut &'a [u8]) -> Result<T, E>,
    ) -> Result<T, WireError> {
        let mut rest = self.rest();
        let value = read(&mut rest).map_err(|_| self.malformed(part))?;
        self.at = self.bytes.len() - rest.len();
        Ok(value)
    }

    pub(super) fn array_len(&mut self, part: &'static str) -> Result<u32, WireError> {
        self.by(part, rmp::decode::read_array_len)
    }

    #[inline]
    pub(super) fn array_of(&mut self, len: u32, part: &'static str) -> Result<(), WireError> {
        // The short form, of fifteen elements at most.
        if len < 16 && self.bytes.get(self.at) == Some(&(0x90 | len as u8)) {
            self.at += 1;
            return Ok(());
        }
        if self.array_len(part)? == len {
            Ok(())
        } else {
            Err(self.malformed(part))
        }
    }

    #[inline]
    fn bin_len(&mut self, part: &'static str) -> Result<u32, WireError> {
        let len = match self.bytes.get(self.at) {
            Some(0xc4) => self.behind_marker::<1>().map(|[byte]| byte.into()),
            Some(0xc5) => self.behind_marker().map(|bytes| u16::from_be_bytes(bytes).into()),
            Some(0xc6) => self.behind_marker().map(u32::from_be_bytes),
            _ => None,
        };
        len.ok_or_else(|| self.malformed(part))
    }

    /// A bin, as a range of the bytes given to [`Reader::new`].
    #[inline]
    pub(super) fn bin(&mut self, part: &'static str) -> Result<Range<usize>, WireError> {
        let len = self.bin_len(part)?;
        let start = self.at;
        self.take(len, part)?;
        Ok(start..self.at)
    }

    pub(super) fn bin_array<const N: usize>(&mut self, part: &'static str) -> Result<[u8; N], WireError> {
        let len = self.bin_len(part)?;
        self.take(len, part)?.try_into().map_err(|_| self.malformed(part))
    }

    pub(super) fn str(&mut self, part: &'static str) -> Result<&'a str, WireError> {
        let len = self.by(part, rmp::decode::read_str_len)?;
        std::str::from_utf8(self.take(len, part)?).map_err(|_| self.malformed(part))
    }

    #[inline]
    fn take(&mut self, len: u32, part: &'static str) -> Result<&'a [u8], WireError> {
        let taken = self.rest().get(..len as usize).ok_or_else(|| self.malformed(part))?;
        self.at += taken.len();
        Ok(taken)
    }
}
