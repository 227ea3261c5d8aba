//! memcached as cheaply as it can be had: one connection, commands of one shape in one buffer, answers read in place.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::keys::{digits, flags, key};
use crate::values::Values;

/// A memcached that is silent for so long is not there any more.
const ANSWERS_WITHIN: Duration = Duration::from_secs(20);

/// Writes leave in pieces of about this size, so that memcached works on one while the next is made.
const PIECE: usize = 256 << 10;

/// How many questions are asked before their answers are read: they, not the answers, must fit the kernel's buffers.
const QUESTIONS: usize = 512;

/// Where the digits of the key stand in a set, behind `ms load:`.
const KEY_AT: usize = 8;

/// A connection that sets and looks at numbered keys, and knows nothing else.
#[derive(Debug)]
pub struct Pipe {
    stream: TcpStream,
    out: Vec<u8>,
    input: Vec<u8>,
    /// What of `input` has arrived and is not yet read.
    unread: std::ops::Range<usize>,
    values: Values,
    /// A set's first line, with zeros where its numbers go.
    set: Vec<u8>,
    flags_at: usize,
}

impl Pipe {
    /// Connects to `address`; what it writes are `values`.
    ///
    /// # Errors
    /// When nobody is there.
    pub fn connect(address: &str, values: Values) -> io::Result<Pipe> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWERS_WITHIN))?;
        stream.set_write_timeout(Some(ANSWERS_WITHIN))?;
        let start = format!("ms load:0000000000 {} F", values.len());
        Ok(Pipe {
            stream,
            out: Vec::new(),
            input: vec![0; 64 << 10],
            unread: 0..0,
            set: format!("{start}0000000000 q\r\n").into_bytes(),
            flags_at: start.len(),
            values,
        })
    }

    /// Sets `key` to the value of write `number`, at the latest at the next [`Pipe::barrier`].
    ///
    /// # Errors
    /// When memcached takes nothing any more.
    pub fn set(&mut self, key: u64, number: u64) -> io::Result<()> {
        let at = self.out.len();
        self.out.extend_from_slice(&self.set);
        digits(&mut self.out[at + KEY_AT..][..10], key);
        digits(&mut self.out[at + self.flags_at..][..10], flags(number).into());
        self.values.append(&mut self.out, number);
        self.out.extend_from_slice(b"\r\n");
        match self.out.len() >= PIECE {
            true => self.send(),
            false => Ok(()),
        }
    }

    /// Returns when memcached has done everything so far.
    ///
    /// # Errors
    /// When it is gone, or has refused something: then what it said.
    pub fn barrier(&mut self) -> io::Result<()> {
        self.out.extend_from_slice(b"mn\r\n");
        self.send()?;
        match self.line()? {
            b"MN" => Ok(()),
            other => Err(said(other)),
        }
    }

    /// Tells `found` of each key, in order, which write it holds (the low half of its number), if any.
    ///
    /// # Errors
    /// When memcached is gone or says anything else.
    pub fn flags(&mut self, keys: &[u64], mut found: impl FnMut(usize, Option<u32>)) -> io::Result<()> {
        self.ask(keys, b" f\r\n", |pipe, index| {
            let line = pipe.line()?;
            let held = match line {
                b"EN" => None,
                _ => Some(flag(line).ok_or_else(|| said(line))?),
            };
            found(index, held);
            Ok(())
        })
    }

    /// Whether the keys hold exactly these writes: how many do not. `keys` are (key, number of the write).
    ///
    /// # Errors
    /// When memcached is gone or says anything else.
    pub fn differ(&mut self, keys: &[(u64, u64)]) -> io::Result<u64> {
        let mut differ = 0;
        let names: Vec<u64> = keys.iter().map(|(key, _)| *key).collect();
        self.ask(&names, b" f v\r\n", |pipe, index| {
            let number = keys[index].1;
            let line = pipe.line()?;
            let Some(rest) = line.strip_prefix(b"VA ") else {
                differ += 1;
                return if line == b"EN" { Ok(()) } else { Err(said(line)) };
            };
            let held = flag(line);
            let len = rest.split(|byte| *byte == b' ').next().and_then(number_of);
            let len = len.ok_or_else(|| said(line))? as usize;
            let right = held == Some(flags(number));
            let at = pipe.bytes(len + 2)?;
            differ += u64::from(!right || !pipe.values.is(&pipe.input[at..at + len], number));
            Ok(())
        })?;
        Ok(differ)
    }

    fn ask(
        &mut self,
        keys: &[u64],
        end: &[u8],
        mut answer: impl FnMut(&mut Pipe, usize) -> io::Result<()>,
    ) -> io::Result<()> {
        for (piece, some) in keys.chunks(QUESTIONS).enumerate() {
            for number in some {
                self.out.extend_from_slice(b"mg ");
                self.out.extend_from_slice(&key(*number));
                self.out.extend_from_slice(end);
            }
            self.send()?;
            for index in 0..some.len() {
                answer(self, piece * QUESTIONS + index)?;
            }
        }
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.out)?;
        self.out.clear();
        Ok(())
    }

    /// The next line, without its end.
    fn line(&mut self) -> io::Result<&[u8]> {
        loop {
            let unread = &self.input[self.unread.clone()];
            if let Some(length) = unread.windows(2).position(|two| two == b"\r\n") {
                let from = self.unread.start;
                self.unread.start += length + 2;
                return Ok(&self.input[from..from + length]);
            }
            self.more()?;
        }
    }

    /// Takes so many bytes: where they are.
    fn bytes(&mut self, count: usize) -> io::Result<usize> {
        while self.unread.len() < count {
            self.more()?;
        }
        let from = self.unread.start;
        self.unread.start += count;
        Ok(from)
    }

    fn more(&mut self) -> io::Result<()> {
        if self.unread.is_empty() {
            self.unread = 0..0;
        }
        if self.unread.end == self.input.len() {
            self.input.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
        }
        if self.unread.end == self.input.len() {
            self.input.resize(self.input.len() * 2, 0);
        }
        match self.stream.read(&mut self.input[self.unread.end..])? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                self.unread.end += count;
                Ok(())
            }
        }
    }
}

fn number_of(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// The flag `f` of an answer's line.
fn flag(line: &[u8]) -> Option<u32> {
    let mut words = line.split(|byte| *byte == b' ').skip(1);
    let digits = words.find_map(|word| word.strip_prefix(b"f"))?;
    number_of(digits)?.try_into().ok()
}

fn said(line: &[u8]) -> io::Error {
    io::Error::other(format!("memcached said {:?}", String::from_utf8_lossy(line)))
}

#[cfg(test)]
mod tests {
    use evrepl_lab::Memcached;

    use super::*;

    #[test]
    fn what_was_set_is_seen_whole_and_what_is_not_as_it_was_is_counted() {
        // 64 KiB values too: answers that are larger than what is read at once.
        for len in [0, 100, 1_024, 65_536] {
            let memcached = Memcached::start();
            let mut pipe = Pipe::connect(&memcached.address(), Values::new(len)).unwrap();
            for number in 0..600 {
                pipe.set(number % 300, number).unwrap();
            }
            pipe.barrier().unwrap();
            let right: Vec<(u64, u64)> = (0..300).map(|key| (key, key + 300)).collect();
            assert_eq!(pipe.differ(&right).unwrap(), 0);
            let mut seen = vec![];
            pipe.flags(&[5, 299, 300], |_, held| seen.push(held)).unwrap();
            assert_eq!(seen, [Some(305), Some(599), None]);

            let mut client = memcached.client();
            client.delete(&key(1)).unwrap();
            client.set(&key(2), &vec![7; len], flags(302), 0).unwrap();
            let mut value = Vec::new();
            Values::new(len).append(&mut value, 303);
            client.set(&key(3), &value, 7, 0).unwrap();
            client
                .set(&key(4), &[&value[..], b"x"].concat(), flags(304), 0)
                .unwrap();
            assert_eq!(pipe.differ(&right).unwrap(), if len == 0 { 3 } else { 4 });
        }
    }

    #[test]
    fn a_refusal_is_an_error_with_what_memcached_said() {
        let memcached = Memcached::start();
        let mut pipe = Pipe::connect(&memcached.address(), Values::new(2 << 20)).unwrap();
        pipe.set(1, 1).unwrap();
        let refused = pipe.barrier().unwrap_err().to_string();
        assert!(refused.contains("SERVER_ERROR object too large"), "{refused}");
    }
}
