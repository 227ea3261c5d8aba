//! Requests on their way to the socket: their text in one buffer, large values where they are, uncopied.

use std::io::IoSlice;
use std::ops::Range;

use super::{WriteOp, Writes};

/// Up to this size a value is copied among the text: cheaper than two more slices in a vectored write.
const INLINE_VALUE_BYTES: usize = 1024;
/// Room kept between batches: a full batch (1024 items) of inline values. What a larger one grew is given back.
const KEPT_BYTES: usize = 1 << 20;
/// Slices in one vectored write. The kernel takes 1024; these live on the stack, and large values fill the socket's
/// buffer long before.
pub(super) const SLICES: usize = 64;

#[derive(Default)]
pub(super) struct Outbox {
    text: Vec<u8>,
    /// What was put, in order; text behind the last part's end is not among the parts yet.
    parts: Vec<Part>,
    /// Where the text begins that is not among the parts yet.
    open: usize,
    /// The first part that is not sent, and how much of it is.
    next: usize,
    sent: usize,
}

enum Part {
    Text(Range<usize>),
    /// Of the write with this place.
    Value(usize),
}

impl Outbox {
    /// Where requests are written.
    pub fn text(&mut self) -> &mut Vec<u8> {
        &mut self.text
    }

    /// Adds the value of the write with this place, and its `\r\n`.
    pub fn put_value(&mut self, value: &[u8], place: usize) {
        if value.len() <= INLINE_VALUE_BYTES {
            self.text.extend_from_slice(value);
        } else {
            self.close();
            self.parts.push(Part::Value(place));
        }
        self.text.extend_from_slice(b"\r\n");
    }

    /// Says that everything has been put.
    pub fn close(&mut self) {
        if self.open < self.text.len() {
            self.parts.push(Part::Text(self.open..self.text.len()));
            self.open = self.text.len();
        }
    }

    pub fn is_sent(&self) -> bool {
        self.next == self.parts.len()
    }

    /// Fills `slices` with what is to be sent next; says how many it filled. `writes` are those whose values were put.
    pub fn slices<'a>(&'a self, writes: &'a Writes, slices: &mut [IoSlice<'a>; SLICES]) -> usize {
        let mut skip = self.sent;
        let parts = self.parts.get(self.next..).unwrap_or(&[]);
        for (slice, part) in slices.iter_mut().zip(parts) {
            *slice = IoSlice::new(&self.bytes(writes, part)[skip..]);
            skip = 0;
        }
        parts.len().min(SLICES)
    }

    /// Takes note that `count` bytes more are sent.
    pub fn advance(&mut self, writes: &Writes, count: usize) {
        self.sent += count;
        while let Some(part) = self.parts.get(self.next) {
            let length = self.bytes(writes, part).len();
            if self.sent < length {
                break;
            }
            self.sent -= length;
            self.next += 1;
        }
    }

    /// Empties it for the next batch.
    pub fn clear(&mut self) {
        self.text.clear();
        self.text.shrink_to(KEPT_BYTES);
        self.parts.clear();
        (self.open, self.next, self.sent) = (0, 0, 0);
    }

    fn bytes<'a>(&'a self, writes: &'a Writes, part: &Part) -> &'a [u8] {
        match part {
            Part::Text(range) => &self.text[range.clone()],
            Part::Value(place) => match writes.get(*place).op {
                WriteOp::Set { value, .. } => value,
                WriteOp::Touch { .. } | WriteOp::Delete => &[],
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Write;
    use super::*;

    proptest! {
        #[test]
        fn what_was_put_is_sent_in_order_however_it_is_taken(
            values in proptest::collection::vec(0usize..3000, 0..200), takes in proptest::collection::vec(1usize..5000, 1..50),
        ) {
            let mut outbox = Outbox::default();
            let (mut expected, mut writes) = (Vec::new(), Writes::default());
            for (n, &length) in values.iter().enumerate() {
                let value = vec![n as u8; length];
                outbox.text().extend_from_slice(b"head");
                outbox.put_value(&value, n);
                writes.push(Write { key: b"k", op: WriteOp::Set { value: &value, flags: 0, expiry: 0 } });
                expected.extend_from_slice(b"head");
                expected.extend_from_slice(&value);
                expected.extend_from_slice(b"\r\n");
            }
            outbox.close();
            let mut sent = Vec::new();
            for take in takes.iter().cycle() {
                if outbox.is_sent() {
                    break;
                }
                let mut slices = [IoSlice::new(&[]); SLICES];
                let count = outbox.slices(&writes, &mut slices);
                let bytes: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.iter().copied()).take(*take).collect();
                prop_assert!(!bytes.is_empty());
                outbox.advance(&writes, bytes.len());
                sent.extend(bytes);
            }
            prop_assert_eq!(sent, expected);
        }
    }
}
