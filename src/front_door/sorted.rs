//! Answers on their way to clients: the answers of one read of a server, sorted by whose they are.

use std::ops::Range;

use bytes::{Bytes, BytesMut};

use super::answers::{Piece, Verdict};
use super::gets::END;
use super::order::{Held, Part};
use super::out::COPIED_BYTES;

/// When a client is told what memcached has answered.
pub enum Told {
    /// Now.
    AtOnce,
    /// When this has come.
    Later(Held),
    /// Now, but this.
    Instead(Bytes),
}

/// Where the bytes of a part are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Read,
    Made,
}

/// See the module. `S` is who a client is.
pub struct Sorted<S> {
    taken: usize,
    /// Answers that do not stand in what was read as the client is shown them.
    made: BytesMut,
    parts: Vec<(Place, Range<usize>, Part)>,
    /// Whether the last part may grow.
    grows: bool,
    clients: Vec<(u32, S, usize)>,
}

impl<S> Default for Sorted<S> {
    fn default() -> Self {
        Sorted {
            taken: 0,
            made: BytesMut::new(),
            parts: Vec::new(),
            grows: false,
            clients: Vec::new(),
        }
    }
}

impl<S> Sorted<S> {
    /// Bytes of the read that are sorted.
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// Adds an answer of `length` bytes. `together`: it follows the one before, for the same client.
    pub fn add(&mut self, length: usize, verdict: Verdict, piece: Piece, told: Told, together: bool) {
        let shown = self.taken..self.taken + verdict.shown;
        self.taken += length;
        if matches!(told, Told::AtOnce) && piece == Piece::Whole {
            self.plain(Place::Read, shown, 1, together);
            return;
        }
        self.grows = false;
        // What is said instead of a piece is said of the whole command.
        let failed = verdict.failed || (matches!(told, Told::Instead(_)) && piece != Piece::Whole);
        let (bytes, held, shown) = match told {
            Told::Instead(bytes) => (bytes, None, 0..0),
            Told::Later(held) => (Bytes::new(), Some(held), shown),
            Told::AtOnce => (Bytes::new(), None, shown),
        };
        let part = Part {
            commands: 1,
            bytes,
            piece,
            failed,
            held,
        };
        self.parts.push((Place::Read, shown, part));
    }

    /// Adds a value that is so long, or nothing, at the beginning of `rest`; `end` bytes behind it end what memcached said.
    pub fn value(&mut self, rest: &[u8], value: usize, end: usize, together: bool) {
        if value <= COPIED_BYTES {
            self.copied(&rest[..value], END, value + end, together);
            return;
        }
        let shown = self.taken..self.taken + value + end;
        self.taken += value + end;
        if end > 0 {
            self.plain(Place::Read, shown, 1, together);
        } else {
            self.plain(Place::Read, shown, 0, together);
            self.copied(&[], END, 0, true);
        }
    }

    /// Adds a line that is also said to those behind, if it is not their `last`.
    pub fn error(&mut self, line: &[u8], last: bool, together: bool) {
        self.copied(line, &[], if last { line.len() } else { 0 }, together);
    }

    /// Adds an answer made of these, for which so many bytes of the read are taken.
    fn copied(&mut self, one: &[u8], other: &[u8], taken: usize, together: bool) {
        let start = self.made.len();
        self.made.extend_from_slice(one);
        self.made.extend_from_slice(other);
        self.taken += taken;
        self.plain(Place::Made, start..self.made.len(), 1, together);
    }

    fn plain(&mut self, place: Place, shown: Range<usize>, commands: u32, together: bool) {
        if self.grows
            && together
            && let Some((last, range, part)) = self.parts.last_mut()
            && (nothing(range) || nothing(&shown) || (*last == place && range.end == shown.start))
        {
            if nothing(range) {
                (*last, *range) = (place, shown);
            } else if !nothing(&shown) {
                range.end = shown.end;
            }
            part.commands += commands;
            return;
        }
        self.grows = true;
        let part = Part {
            commands,
            bytes: Bytes::new(),
            piece: Piece::Whole,
            failed: false,
            held: None,
        };
        self.parts.push((place, shown, part));
    }

    /// What came since the last of these is this client's.
    pub fn finish(&mut self, server: u32, client: S) {
        self.grows = false;
        let already = self.clients.last().map_or(0, |(_, _, end)| *end);
        if self.parts.len() > already {
            self.clients.push((server, client, self.parts.len()));
        }
    }

    /// What each client is told, in order. `read` are the bytes that were taken.
    pub fn parts(self, read: &Bytes) -> impl Iterator<Item = (u32, S, Vec<Part>)> {
        let made = self.made.freeze();
        let mut parts = self.parts.into_iter();
        let mut sent = 0;
        self.clients.into_iter().map(move |(server, client, end)| {
            let some = parts.by_ref().take(end - sent);
            sent = end;
            let parts = some
                .map(|(place, range, mut part)| {
                    if !nothing(&range) {
                        part.bytes = match place {
                            Place::Read => read.slice(range),
                            Place::Made => made.slice(range),
                        };
                    }
                    part
                })
                .collect();
            (server, client, parts)
        })
    }
}

fn nothing(range: &Range<usize>) -> bool {
    range.start == range.end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(sorted: Sorted<char>, read: &Bytes) -> Vec<(char, Vec<(u32, String)>)> {
        sorted
            .parts(read)
            .map(|(_, client, parts)| {
                let text = |part: Part| (part.commands, String::from_utf8_lossy(&part.bytes).into_owned());
                (client, parts.into_iter().map(text).collect())
            })
            .collect()
    }

    #[test]
    fn answers_that_follow_each_other_are_one_part() {
        let read = Bytes::from_static(b"STORED\r\nSTORED\r\nVALUE a 0 1\r\nx\r\nVALUE b 0 1\r\ny\r\nEND\r\n");
        let whole = Verdict {
            shown: 8,
            changed: true,
            failed: false,
        };
        let mut sorted = Sorted::default();
        sorted.add(8, whole, Piece::Whole, Told::AtOnce, false);
        sorted.add(8, whole, Piece::Whole, Told::AtOnce, true);
        sorted.finish(0, 'A');
        sorted.value(&read[16..], 16, 0, false);
        sorted.value(&read[32..], 16, 5, true);
        sorted.value(&[], 0, 0, true);
        sorted.finish(0, 'B');
        assert_eq!(sorted.taken(), read.len());
        let expected = [
            ('A', vec![(2, "STORED\r\nSTORED\r\n".to_owned())]),
            (
                'B',
                vec![(
                    3,
                    "VALUE a 0 1\r\nx\r\nEND\r\nVALUE b 0 1\r\ny\r\nEND\r\nEND\r\n".to_owned(),
                )],
            ),
        ];
        assert_eq!(told(sorted, &read), expected);
    }

    #[test]
    fn a_large_value_stays_where_it_is() {
        let value = format!("VALUE a 0 2000\r\n{}\r\n", "v".repeat(2000));
        let read = Bytes::from(format!("{value}VALUE b 0 1\r\ny\r\nEND\r\n"));
        let mut sorted = Sorted::default();
        sorted.value(&read, value.len(), 0, false);
        sorted.value(&read[value.len()..], 16, 5, true);
        sorted.finish(0, 'A');
        let of_a = vec![(0, value), (2, "END\r\nVALUE b 0 1\r\ny\r\nEND\r\n".to_owned())];
        assert_eq!(told(sorted, &read), [('A', of_a)]);
    }
}
