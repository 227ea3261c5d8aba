//! Acks: which items of a batch are finished, and which of them did not simply apply.

use bytes::BytesMut;
use bytes::buf::BufMut;

use super::pack::{self, Reader};
use super::{Limits, WireError};

/// Elements of an ack's array.
const FIELDS: u32 = 7;

/// How an item ended that did not simply apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// Not applied: another session wrote the slot after the look, or a touch missed. The key is to be looked at again.
    LookAgain = 0,
    /// Not applied: the server cannot take it now. The key waits, dirty, for that server.
    Later = 1,
    /// Nothing was left of its time; the copy was removed.
    Expired = 2,
    /// The destination does not take values of this size; the copy was removed.
    TooLarge = 3,
    /// Refused for good: no look will help.
    Refused = 4,
}

impl Status {
    /// The public name, in metrics and traces.
    pub const fn name(self) -> &'static str {
        match self {
            Status::LookAgain => "look_again",
            Status::Later => "later",
            Status::Expired => "expired",
            Status::TooLarge => "too_large",
            Status::Refused => "refused",
        }
    }

    fn from_wire(code: u8) -> Option<Status> {
        [
            Status::LookAgain,
            Status::Later,
            Status::Expired,
            Status::TooLarge,
            Status::Refused,
        ]
        .into_iter()
        .find(|status| *status as u8 == code)
    }
}

/// A finished item that did not simply apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// The item's place in its batch, from 0.
    pub index: u32,
    /// How it ended.
    pub status: Status,
    /// With [`Status::Later`], an index into [`Ack::servers`]; otherwise 0.
    pub server: u16,
}

/// The agent's answer to a batch, or to a part of it: a batch may be finished by several acks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ack {
    /// The batch's id.
    pub batch: u64,
    /// The agent's tick after the writes that this ack reports.
    pub tick: u64,
    /// Microseconds that the batch waited in the agent, by its monotonic clock.
    pub queued_us: u64,
    /// Microseconds that memcached took, by the agent's monotonic clock.
    pub applied_us: u64,
    /// Finished items, as (start, length). Items without an exception were applied.
    pub ranges: Vec<(u32, u32)>,
    /// Those among the finished that did not simply apply.
    pub exceptions: Vec<Exception>,
    /// Names of the servers that exceptions refer to.
    pub servers: Vec<String>,
}

impl Ack {
    /// Brings the ack into the form that [`Ack::check`] asks for: ranges in order, merged, none of them empty; exceptions in
    /// order. For an agent that gathers results from several servers.
    pub fn normalize(&mut self) {
        self.ranges.sort_unstable();
        let mut merged: usize = 0;
        for at in 0..self.ranges.len() {
            let (start, len) = self.ranges[at];
            if len == 0 {
                continue;
            }
            match merged.checked_sub(1).map(|last| &mut self.ranges[last]) {
                Some(last) if start <= last.0.saturating_add(last.1) => {
                    last.1 = last.1.max(start.saturating_add(len) - last.0);
                }
                _ => {
                    self.ranges[merged] = (start, len);
                    merged += 1;
                }
            }
        }
        self.ranges.truncate(merged);
        self.exceptions.sort_unstable_by_key(|exception| exception.index);
    }

    /// Whether the ack makes sense for a batch of so many items: ranges within it, in order and apart; exceptions in order, one
    /// per item, each of a finished item. Linear in the ack's own length.
    ///
    /// # Errors
    ///
    /// [`WireError::Malformed`], naming what is wrong.
    pub fn check(&self, items: u32) -> Result<(), WireError> {
        let wrong = |part| Err(WireError::Malformed { frame: "ack", part });
        let mut end = 0;
        for &(start, len) in &self.ranges {
            match start.checked_add(len) {
                Some(next) if start >= end && len > 0 && next <= items => end = next,
                _ => return wrong("ranges not in order or beyond the batch"),
            }
        }
        let mut ranges = self.ranges.iter();
        let mut range = ranges.next();
        let mut lowest = 0;
        for exception in &self.exceptions {
            while range.is_some_and(|&(start, len)| exception.index >= start + len) {
                range = ranges.next();
            }
            if exception.index < lowest || range.is_none_or(|&(start, _)| exception.index < start) {
                return wrong("exceptions not in order or of items that are not finished");
            }
            lowest = exception.index + 1;
        }
        Ok(())
    }

    /// Every finished item's index, in order, with its exception if it did not simply apply. For an ack that
    /// [`Ack::check`] has passed.
    pub fn finished(&self) -> impl Iterator<Item = (u32, Option<&Exception>)> {
        let mut exceptions = self.exceptions.iter().peekable();
        let indexes = self
            .ranges
            .iter()
            .flat_map(|&(start, len)| start..start.saturating_add(len));
        indexes.map(move |index| (index, exceptions.next_if(|exception| exception.index == index)))
    }

    pub(super) fn encode(&self, out: &mut BytesMut) {
        let out = &mut out.writer();
        pack::put_array_len(out, FIELDS);
        pack::put_uint(out, self.batch);
        pack::put_uint(out, self.tick);
        pack::put_uint(out, self.queued_us);
        pack::put_uint(out, self.applied_us);
        // Flat arrays of numbers: a header per range would be a quarter of the ack.
        pack::put_array_len(out, pack::len32(self.ranges.len() * 2));
        for &(start, len) in &self.ranges {
            pack::put_uint(out, start.into());
            pack::put_uint(out, len.into());
        }
        pack::put_array_len(out, pack::len32(self.exceptions.len() * 3));
        for exception in &self.exceptions {
            pack::put_uint(out, exception.index.into());
            pack::put_uint(out, exception.status as u64);
            pack::put_uint(out, exception.server.into());
        }
        pack::put_array_len(out, pack::len32(self.servers.len()));
        for server in &self.servers {
            pack::put_str(out, server);
        }
    }

    pub(super) fn decode(body: &[u8], limits: &Limits) -> Result<Ack, WireError> {
        let mut reader = Reader::new("ack", body);
        reader.array_of(FIELDS, "array length")?;
        let batch = reader.uint("batch")?;
        let tick = reader.uint("tick")?;
        let queued_us = reader.uint("queued_us")?;
        let applied_us = reader.uint("applied_us")?;

        let count = entries(&mut reader, 2, limits, "ranges")?;
        let mut ranges = Vec::with_capacity(count);
        for _ in 0..count {
            ranges.push((reader.uint("range start")?, reader.uint("range length")?));
        }
        let count = entries(&mut reader, 3, limits, "exceptions")?;
        let mut exceptions = Vec::with_capacity(count);
        for _ in 0..count {
            let index = reader.uint("exception index")?;
            let status = Status::from_wire(reader.uint("status")?).ok_or_else(|| reader.malformed("status"))?;
            exceptions.push(Exception {
                index,
                status,
                server: reader.uint("server index")?,
            });
        }
        let count = entries(&mut reader, 1, limits, "servers")?;
        let mut servers = Vec::with_capacity(count);
        for _ in 0..count {
            servers.push(reader.str("server name")?.to_owned());
        }
        reader.end()?;

        let nameless =
            |exception: &Exception| exception.status == Status::Later && usize::from(exception.server) >= servers.len();
        if exceptions.iter().any(nameless) {
            return Err(reader.malformed("later without a server"));
        }
        Ok(Ack {
            batch,
            tick,
            queued_us,
            applied_us,
            ranges,
            exceptions,
            servers,
        })
    }
}

/// The number of entries in a flat array whose entries have `width` numbers each: refused if it exceeds a batch's items or
/// what the bytes left can hold, so that it may size a buffer.
fn entries(reader: &mut Reader<'_>, width: u32, limits: &Limits, part: &'static str) -> Result<usize, WireError> {
    let len = reader.array_len(part)?;
    if !len.is_multiple_of(width) || len as usize > reader.left() {
        return Err(reader.malformed(part));
    }
    let entries = len / width;
    if entries > limits.max_batch_items {
        return Err(WireError::TooManyItems {
            items: entries,
            limit: limits.max_batch_items,
        });
    }
    Ok(entries as usize)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn exception(index: u32, status: Status) -> Exception {
        Exception {
            index,
            status,
            server: 0,
        }
    }

    #[test]
    fn finished_items_come_in_order_with_their_exceptions() {
        let mut ack = Ack {
            ranges: vec![(7, 2), (0, 3)],
            exceptions: vec![exception(8, Status::Expired), exception(0, Status::LookAgain)],
            ..Ack::default()
        };
        ack.normalize();
        ack.check(9).unwrap();
        let finished: Vec<_> = ack
            .finished()
            .map(|(index, exception)| (index, exception.map(|e| e.status)))
            .collect();
        let expected = [
            (0, Some(Status::LookAgain)),
            (1, None),
            (2, None),
            (7, None),
            (8, Some(Status::Expired)),
        ]
        .to_vec();
        assert_eq!(finished, expected);
    }

    #[test]
    fn an_ack_that_does_not_fit_its_batch_is_refused() {
        let ack = |ranges: &[(u32, u32)], exceptions: &[u32]| Ack {
            ranges: ranges.to_vec(),
            exceptions: exceptions
                .iter()
                .map(|&index| exception(index, Status::LookAgain))
                .collect(),
            ..Ack::default()
        };
        assert!(ack(&[(0, 4)], &[0, 3]).check(4).is_ok());
        assert!(ack(&[(0, 5)], &[]).check(4).is_err(), "beyond the batch");
        assert!(ack(&[(u32::MAX, 2)], &[]).check(4).is_err(), "overflow");
        assert!(ack(&[(1, 0)], &[]).check(4).is_err(), "empty range");
        assert!(ack(&[(0, 2), (1, 2)], &[]).check(4).is_err(), "an item finished twice");
        assert!(ack(&[(2, 1), (0, 1)], &[]).check(4).is_err(), "out of order");
        assert!(ack(&[(0, 2)], &[2]).check(4).is_err(), "exception of an open item");
        assert!(ack(&[(2, 2)], &[1]).check(4).is_err(), "exception before the range");
        assert!(ack(&[(0, 4)], &[1, 1]).check(4).is_err(), "two exceptions of an item");
    }

    proptest! {
        #[test]
        fn normalizing_keeps_the_finished_items_and_passes_the_check(
            ranges in proptest::collection::vec((0u32..200, 0u32..20), 0..30)
        ) {
            let expected: std::collections::BTreeSet<u32> =
                ranges.iter().flat_map(|&(start, len)| start..start + len).collect();
            let mut ack = Ack { ranges, ..Ack::default() };
            ack.exceptions = expected.iter().rev().step_by(3).map(|&index| exception(index, Status::Refused)).collect();
            let exceptions = ack.exceptions.len();
            ack.normalize();
            prop_assert!(ack.check(220).is_ok());
            prop_assert_eq!(ack.finished().filter(|(_, exception)| exception.is_some()).count(), exceptions);
            prop_assert_eq!(ack.finished().map(|(index, _)| index).collect::<Vec<_>>(), Vec::from_iter(expected));
        }
    }
}
