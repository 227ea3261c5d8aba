//! `get`s of one key each, of whichever clients, sent to memcached as one command.
//!
//! memcached writes what answers a `get` before it reads the next one: a system call for each, which is most of what a small value
//! costs it (1.6.18: `process_get_command` ends in `conn_mwrite`, meta commands and writes do not). A `get` of many keys is
//! answered at once. So those that are sent at the same moment travel together, and each client gets the answer that it would
//! have had alone.

use std::collections::VecDeque;

use memchr::memchr;

use super::answers::{is_error, value_line};
use super::out::Out;

/// Keys in one command; more gain nothing, and are looked through for each.
const MOST: usize = 64;
/// Bytes of one command: memcached looks at a longer line twice.
const LINE_BYTES: usize = 2000;
/// What ends a list of values.
pub(super) const END: &[u8] = b"END\r\n";

/// The `get`s of one connection that are on their way. See the module.
pub struct Gets {
    most: usize,
    /// Keys of the command that is being written: it has no end yet.
    open: Vec<u64>,
    open_bytes: usize,
    /// How many keys each whole command has, first come first.
    sent: VecDeque<usize>,
    /// Keys of the command that is being answered whose answers are not there yet.
    left: usize,
    hasher: foldhash::fast::RandomState,
}

/// What memcached has said to one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Got {
    /// So many bytes are its value, the line above it included; so many more end the command.
    Value {
        /// Without the end.
        value: usize,
        /// `END`, if the command has no key behind this one.
        end: usize,
    },
    /// It is not there. So many bytes end the command.
    Nothing {
        /// `END`, or none.
        end: usize,
    },
    /// An error, so long, for this key and all behind it; it is kept for them as long as there are some.
    Failed {
        /// Of the line.
        line: usize,
        /// Whether it has served its last.
        last: bool,
    },
    /// So many bytes more are needed at least.
    Missing(usize),
}

impl Gets {
    /// None on their way. `merges`: several may be one command.
    pub fn new(merges: bool) -> Gets {
        Gets {
            most: if merges { MOST } else { 1 },
            open: Vec::new(),
            open_bytes: 0,
            sent: VecDeque::new(),
            left: 0,
            hasher: foldhash::fast::RandomState::default(),
        }
    }

    /// Writes a `get` of this key.
    pub fn add(&mut self, key: &[u8], out: &mut Out) {
        use std::hash::BuildHasher as _;
        let hash = self.hasher.hash_one(key);
        // A key that stood there twice could be answered with a value, and then with nothing, although it was only ever made.
        let full = self.open.len() == self.most || self.open_bytes + key.len() > LINE_BYTES;
        if full || self.open.contains(&hash) {
            self.close(out);
        }
        if self.open.is_empty() {
            out.copy(b"get");
        }
        self.open.push(hash);
        self.open_bytes += key.len() + 1;
        out.copy(b" ");
        out.copy(key);
    }

    /// Ends the command that is being written: something else follows, or it is sent.
    pub fn close(&mut self, out: &mut Out) {
        if self.open.is_empty() {
            return;
        }
        out.copy(b"\r\n");
        self.sent.push_back(self.open.len());
        self.open.clear();
        self.open_bytes = 0;
    }

    /// Forgets everything: the connection is lost.
    pub fn clear(&mut self) {
        self.open.clear();
        self.open_bytes = 0;
        self.sent.clear();
        self.left = 0;
    }

    /// Looks for the answer to the first `get` without one, of this key, at the beginning of `bytes`. Once for each answer,
    /// besides those that are [`Got::Missing`].
    ///
    /// # Errors
    /// What memcached says cannot be an answer to it.
    pub fn answer(&mut self, key: &[u8], bytes: &[u8]) -> Result<Got, String> {
        let Some(newline) = memchr(b'\n', bytes) else {
            return Ok(Got::Missing(1));
        };
        if self.left == 0 {
            self.left = self.sent.pop_front().ok_or("it answers a get that was not sent")?;
        }
        let last = self.left == 1;
        let got = read(key, last, bytes, newline)?;
        if !matches!(got, Got::Missing(_)) {
            self.left -= 1;
        }
        Ok(got)
    }
}

fn read(key: &[u8], last: bool, bytes: &[u8], newline: usize) -> Result<Got, String> {
    let line = &bytes[..newline];
    let end = if last { END.len() } else { 0 };
    if let Some((named, length)) = value_line(line)? {
        if named != key {
            return match last {
                true => Err(format!(
                    "it has a value of {:?} too many",
                    String::from_utf8_lossy(named)
                )),
                false => Ok(Got::Nothing { end: 0 }),
            };
        }
        let value = newline + 1 + length + 2;
        if bytes.len() < value + end {
            return Ok(Got::Missing(value + end - bytes.len()));
        }
        if last && &bytes[value..value + end] != END {
            let rest = &bytes[value..bytes.len().min(value + 40)];
            return Err(format!(
                "no END, but {:?}, behind values",
                String::from_utf8_lossy(rest)
            ));
        }
        return Ok(Got::Value { value, end });
    }
    if line == b"END\r" {
        return Ok(Got::Nothing { end });
    }
    match is_error(line) {
        true => Ok(Got::Failed {
            line: newline + 1,
            last,
        }),
        false => Err(format!("it answers {:?} to a get", String::from_utf8_lossy(line))),
    }
}

#[cfg(test)]
mod tests {
    use std::task::Poll;

    use proptest::prelude::*;

    use super::*;

    fn written(out: &mut Out) -> String {
        let mut text = String::new();
        while !out.is_empty() {
            let wrote = out.poll_write(|slices| {
                let some: Vec<u8> = slices.iter().flat_map(|slice| slice.to_vec()).collect();
                text.push_str(std::str::from_utf8(&some).unwrap());
                Poll::Ready(Ok(some.len()))
            });
            assert!(matches!(wrote, Poll::Ready(Ok(()))));
        }
        text
    }

    /// What each key is answered, by a connection that gives out these bytes one by one.
    fn answers(gets: &mut Gets, keys: &[&str], said: &str) -> Vec<String> {
        let (mut at, mut shown) = (0, Vec::new());
        for key in keys {
            let mut there = at;
            loop {
                match gets.answer(key.as_bytes(), &said.as_bytes()[at..there]).unwrap() {
                    Got::Missing(missing) => {
                        assert!(missing > 0 && there < said.len(), "{missing} missing of {key}");
                        there += 1;
                    }
                    Got::Value { value, end } => {
                        shown.push(said[at..at + value].to_owned());
                        at += value + end;
                        break;
                    }
                    Got::Nothing { end } => {
                        shown.push(String::new());
                        at += end;
                        break;
                    }
                    Got::Failed { line, last } => {
                        shown.push(said[at..at + line].to_owned());
                        at += if last { line } else { 0 };
                        break;
                    }
                }
            }
        }
        assert_eq!(at, said.len());
        shown
    }

    /// These were asked for.
    fn asked(merges: bool, keys: &[&str]) -> (Gets, Out) {
        let (mut gets, mut out) = (Gets::new(merges), Out::default());
        keys.iter().for_each(|key| gets.add(key.as_bytes(), &mut out));
        gets.close(&mut out);
        (gets, out)
    }

    #[test]
    fn many_become_one_and_each_has_its_answer() {
        let (mut gets, mut out) = asked(true, &["a", "b", "c", "a"]);
        gets.close(&mut out);
        assert_eq!(written(&mut out), "get a b c\r\nget a\r\n");
        let shown = answers(
            &mut gets,
            &["a", "b", "c", "a"],
            "VALUE b 7 5\r\nEND\r\n\r\nEND\r\nVALUE a 0 1\r\nx\r\nEND\r\n",
        );
        assert_eq!(shown, ["", "VALUE b 7 5\r\nEND\r\n\r\n", "", "VALUE a 0 1\r\nx\r\n"]);
    }

    #[test]
    fn each_is_its_own_command_where_that_is_wanted() {
        let (mut gets, mut out) = asked(false, &["a", "b"]);
        assert_eq!(written(&mut out), "get a\r\nget b\r\n");
        let shown = answers(&mut gets, &["a", "b"], "END\r\nVALUE b 0 1\r\nx\r\nEND\r\n");
        assert_eq!(shown, ["", "VALUE b 0 1\r\nx\r\n"]);
    }

    #[test]
    fn an_error_is_everybodys_behind_it() {
        let (mut gets, _) = asked(true, &["a", "b", "c"]);
        let said = "SERVER_ERROR out of memory writing get response\r\n";
        assert_eq!(answers(&mut gets, &["a", "b", "c"], said), [said, said, said]);
    }

    #[test]
    fn what_was_not_asked_for_is_an_error() {
        let asked = |keys: &[&str]| asked(true, keys).0;
        assert!(asked(&["a"]).answer(b"a", b"VALUE b 0 1\r\nx\r\nEND\r\n").is_err());
        assert!(asked(&["a"]).answer(b"a", b"VALUE a 0 1\r\nx\r\nVALUE b 0").is_err());
        assert!(asked(&["a"]).answer(b"a", b"STORED\r\n").is_err());
        assert!(asked(&[]).answer(b"a", b"END\r\n").is_err());
    }

    proptest! {
        #[test]
        fn whatever_is_there(drawn in proptest::collection::vec((0u8..90, 1usize..200, proptest::option::of(0usize..40)), 1..200)) {
            let wanted: Vec<(String, Option<String>)> = drawn
                .iter()
                .map(|(n, length, value)| (format!("{n}{}", "k".repeat(*length)), value.map(|length| "\n".repeat(length))))
                .collect();
            let keys: Vec<&str> = wanted.iter().map(|(key, _)| key.as_str()).collect();
            let (mut gets, mut out) = asked(true, &keys);
            let sent = written(&mut out);
            let (mut said, mut expected, mut all) = (String::new(), Vec::new(), wanted.iter());
            for line in sent.lines() {
                prop_assert!(line.len() < 2048);
                for key in line.split(' ').skip(1) {
                    let (named, value) = all.next().unwrap();
                    prop_assert_eq!(named, key);
                    let block = value.as_ref().map_or(String::new(), |value| format!("VALUE {key} 0 {}\r\n{value}\r\n", value.len()));
                    said.push_str(&block);
                    expected.push(block);
                }
                said.push_str("END\r\n");
            }
            prop_assert!(all.next().is_none());
            prop_assert_eq!(answers(&mut gets, &keys, &said), expected);
        }
    }
}
