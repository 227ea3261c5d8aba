//! The writes of one call, as little as possible of each.

use std::ops::Range;

use bytes::Bytes;

/// What to do to a key. `expiry` is memcached's exptime: 0 never, up to 2 592 000 (30 days) relative seconds, above that
/// Unix time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteOp<'a> {
    /// Store the value.
    Set {
        /// The value, any bytes; up to the server's item size limit (1 MiB with its overhead by default).
        value: &'a [u8],
        /// The client's 32 flag bits.
        flags: u32,
        /// When it expires.
        expiry: u32,
    },
    /// Give an item that exists a new expiry.
    Touch {
        /// When it expires.
        expiry: u32,
    },
    /// Remove the item.
    Delete,
}

/// One write to one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write<'a> {
    /// The key's raw bytes.
    pub key: &'a [u8],
    /// What to do to it.
    pub op: WriteOp<'a>,
}

/// What to do to a key of a shared buffer: [`WriteOp`] with a range for the value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SharedOp {
    /// Store the value.
    Set {
        /// Where it is in the buffer.
        value: Range<u32>,
        /// The client's 32 flag bits.
        flags: u32,
        /// memcached's exptime.
        expiry: u32,
    },
    /// Give an item that exists a new expiry, which is memcached's exptime.
    Touch {
        /// When it expires.
        expiry: u32,
    },
    /// Remove the item.
    Delete,
}

/// The writes of one call, in order. Keys and values are ranges of buffers that many of them share: a write then costs no
/// reference count and few bytes, from the peer's socket to memcached's.
#[derive(Clone, Debug, Default)]
pub struct Writes {
    buffers: Vec<Bytes>,
    list: Vec<Shared>,
}

#[derive(Clone, Debug)]
struct Shared {
    buffer: u32,
    key: Range<u32>,
    op: SharedOp,
}

impl Writes {
    /// No writes.
    pub const fn none() -> Writes {
        Writes {
            buffers: Vec::new(),
            list: Vec::new(),
        }
    }

    /// Makes room for so many more.
    pub fn reserve(&mut self, more: usize) {
        self.list.reserve(more);
    }

    /// Appends a write by copying its key and value: for the few that are not ranges of a buffer.
    pub fn push(&mut self, write: Write<'_>) {
        let Write { key, op } = write;
        let value = if let WriteOp::Set { value, .. } = op {
            value
        } else {
            &[]
        };
        self.buffers.push([key, value].concat().into());
        let split = key.len() as u32;
        let op = match op {
            WriteOp::Set { value, flags, expiry } => SharedOp::Set {
                value: split..split + value.len() as u32,
                flags,
                expiry,
            },
            WriteOp::Touch { expiry } => SharedOp::Touch { expiry },
            WriteOp::Delete => SharedOp::Delete,
        };
        self.push_shared(0..split, op);
    }

    /// What follows by [`Writes::push_shared`] is in this buffer, of 4 GiB at most.
    pub fn share(&mut self, buffer: Bytes) {
        self.buffers.push(buffer);
    }

    /// Appends a write whose key and value are ranges of the buffer last given to [`Writes::share`].
    ///
    /// # Panics
    ///
    /// Later, when the write is looked at, if there is no such buffer or it has no such range.
    pub fn push_shared(&mut self, key: Range<u32>, op: SharedOp) {
        let buffer = self.buffers.len() as u32 - 1;
        self.list.push(Shared { buffer, key, op });
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = Write<'_>> {
        self.list.iter().map(|shared| self.view(shared))
    }

    /// The write with this place, from 0.
    ///
    /// # Panics
    ///
    /// If there are not so many.
    pub fn get(&self, place: usize) -> Write<'_> {
        self.view(&self.list[place])
    }

    fn view(&self, Shared { buffer, key, op }: &Shared) -> Write<'_> {
        let buffer = &self.buffers[*buffer as usize][..];
        let bytes = |range: &Range<u32>| &buffer[range.start as usize..range.end as usize];
        let key = bytes(key);
        let op = match op {
            SharedOp::Set { value, flags, expiry } => WriteOp::Set {
                value: bytes(value),
                flags: *flags,
                expiry: *expiry,
            },
            SharedOp::Touch { expiry } => WriteOp::Touch { expiry: *expiry },
            SharedOp::Delete => WriteOp::Delete,
        };
        Write { key, op }
    }
}

impl<'a> FromIterator<Write<'a>> for Writes {
    fn from_iter<I: IntoIterator<Item = Write<'a>>>(iter: I) -> Writes {
        let mut writes = Writes::default();
        iter.into_iter().for_each(|write| writes.push(write));
        writes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copied_and_shared_writes_are_seen_in_their_order() {
        let mut writes = Writes::default();
        writes.push(Write {
            key: b"a",
            op: WriteOp::Touch { expiry: 5 },
        });
        writes.share(Bytes::from_static(b"keyvalue"));
        let value = 3..8;
        writes.push_shared(
            0..3,
            SharedOp::Set {
                value,
                flags: 7,
                expiry: 9,
            },
        );
        writes.push_shared(3..8, SharedOp::Delete);
        writes.push(Write {
            key: b"b",
            op: WriteOp::Set {
                value: b"v",
                flags: 1,
                expiry: 2,
            },
        });
        let expected = [
            Write {
                key: b"a",
                op: WriteOp::Touch { expiry: 5 },
            },
            Write {
                key: b"key",
                op: WriteOp::Set {
                    value: b"value",
                    flags: 7,
                    expiry: 9,
                },
            },
            Write {
                key: b"value",
                op: WriteOp::Delete,
            },
            Write {
                key: b"b",
                op: WriteOp::Set {
                    value: b"v",
                    flags: 1,
                    expiry: 2,
                },
            },
        ];
        assert_eq!(writes.iter().collect::<Vec<_>>(), expected);
        assert_eq!(writes.len(), 4);
    }
}
