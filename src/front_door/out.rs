//! Bytes on their way to a socket: small ones in one buffer, large ones where they are, uncopied.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::task::{Poll, ready};

use bytes::{Buf, Bytes, BytesMut};

/// Up to this size bytes are copied: cheaper than a slice more in a vectored write, and a small answer does not keep the whole
/// buffer that it came in.
pub(super) const COPIED_BYTES: usize = 1024;
/// Slices in one vectored write; they live on the stack.
const SLICES: usize = 32;

/// See the module.
#[derive(Default)]
pub struct Out {
    whole: VecDeque<Bytes>,
    /// Behind all of `whole`.
    tail: BytesMut,
    bytes: usize,
}

impl Out {
    /// How much is on its way.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether everything was written.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Adds these.
    pub fn push(&mut self, bytes: Bytes) {
        self.bytes += bytes.len();
        if bytes.len() <= COPIED_BYTES {
            self.tail.extend_from_slice(&bytes);
            return;
        }
        self.close();
        self.whole.push_back(bytes);
    }

    /// Adds a copy of these.
    pub fn copy(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len();
        self.tail.extend_from_slice(bytes);
    }

    fn close(&mut self) {
        if !self.tail.is_empty() {
            self.whole.push_back(self.tail.split().freeze());
        }
    }

    /// Writes once: `write` is given what comes next, and says how many bytes it took.
    pub fn poll_write(
        &mut self,
        write: impl FnOnce(&[IoSlice<'_>]) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<()>> {
        let tail = (!self.tail.is_empty()).then_some(&self.tail[..]);
        let next = self.whole.iter().map(|bytes| &bytes[..]).chain(tail);
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut filled = 0;
        for (slice, bytes) in slices.iter_mut().zip(next) {
            *slice = IoSlice::new(bytes);
            filled += 1;
        }
        match ready!(write(&slices[..filled]))? {
            0 => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            count => {
                self.advance(count);
                Poll::Ready(Ok(()))
            }
        }
    }

    /// Takes note that so many bytes were written.
    fn advance(&mut self, mut count: usize) {
        self.bytes -= count;
        while let Some(first) = self.whole.front_mut() {
            if count < first.len() {
                first.advance(count);
                return;
            }
            count -= first.len();
            self.whole.pop_front();
        }
        self.tail.advance(count);
        if self.tail.is_empty() {
            // Nothing is kept for a connection that is quiet.
            self.tail = BytesMut::new();
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Out::default();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_put_in_comes_out_in_order(
            lengths in proptest::collection::vec(0usize..3000, 0..80), takes in proptest::collection::vec(1usize..5000, 1..40),
        ) {
            let (mut out, mut expected, mut written) = (Out::default(), Vec::new(), Vec::new());
            for (n, &length) in lengths.iter().enumerate() {
                let bytes = vec![n as u8; length];
                expected.extend_from_slice(&bytes);
                match n % 2 {
                    0 => out.push(bytes.into()),
                    _ => out.copy(&bytes),
                }
            }
            for take in takes.iter().cycle() {
                if out.is_empty() {
                    break;
                }
                let wrote = out.poll_write(|slices| {
                    let some = slices.iter().flat_map(|slice| slice.iter().copied()).take(*take);
                    let before = written.len();
                    written.extend(some);
                    Poll::Ready(Ok(written.len() - before))
                });
                // Nothing would be an error.
                prop_assert!(matches!(wrote, Poll::Ready(Ok(()))));
            }
            prop_assert_eq!(written, expected);
        }
    }
}
