//! A small blocking client of memcached's meta protocol: the tests' own eyes, sharing no code with evrepl's client.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// How many requests are sent before their answers are read. Small enough that the requests fit the kernel's buffers
/// (otherwise both ends could wait for the other to read), large enough that round trips don't count.
const PIPELINE: usize = 512;

/// Quiet writes are sent in pieces of about this many bytes.
const WRITE_BYTES: usize = 256 << 10;

/// A value and its flags.
pub type Value = (Vec<u8>, u32);

/// One write of [`MetaClient::set_many`].
#[derive(Clone, Copy, Debug)]
pub struct Put<'a> {
    pub key: &'a [u8],
    pub value: &'a [u8],
    pub flags: u32,
    /// memcached's: 0 never, up to 2 592 000 seconds from now, above that Unix time.
    pub exptime: u32,
}

/// One connection to one memcached; connects when needed, also again after an error.
///
/// Keys are any 1 to 250 bytes, those with blanks or control bytes up to 186 (they travel as base64).
#[derive(Debug)]
pub struct MetaClient {
    address: String,
    timeout: Duration,
    stream: Option<BufReader<TcpStream>>,
}

/// An answer's first line, split at blanks, and its value.
struct Answer {
    words: Vec<String>,
    value: Option<Vec<u8>>,
}

impl Answer {
    fn code(&self) -> &str {
        self.words.first().map_or("", String::as_str)
    }

    /// The text after a one-letter flag, such as `t` in `HD t-1`.
    fn flag(&self, letter: char) -> Option<&str> {
        self.words.iter().skip(1).find_map(|word| word.strip_prefix(letter))
    }

    fn unexpected(&self) -> io::Error {
        io::Error::other(format!("memcached answered {:?}", self.words.join(" ")))
    }
}

impl MetaClient {
    /// A client of the memcached at `address`; calls give up after ten seconds.
    pub fn new(address: &str) -> MetaClient {
        MetaClient {
            address: address.into(),
            timeout: Duration::from_secs(10),
            stream: None,
        }
    }

    /// How long one answer may take; forgets the connection.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
        self.stream = None;
    }

    /// Value and flags; `None` when there is none. A stale-marked value counts as a value.
    pub fn get(&mut self, key: &[u8]) -> io::Result<Option<Value>> {
        Ok(self.get_many([key])?.pop().flatten())
    }

    /// Values and flags in the order of the keys, pipelined.
    pub fn get_many<'a>(&mut self, keys: impl IntoIterator<Item = &'a [u8]>) -> io::Result<Vec<Option<Value>>> {
        let mut keys = keys.into_iter().peekable();
        let mut found = Vec::new();
        while keys.peek().is_some() {
            let mut request = Vec::new();
            let mut count = 0;
            for key in keys.by_ref().take(PIPELINE) {
                command(&mut request, "mg", key, "", " v f");
                count += 1;
            }
            self.call(&request, |stream| {
                for _ in 0..count {
                    let answer = read_answer(stream)?;
                    found.push(match (answer.code(), &answer.value) {
                        ("EN", _) => None,
                        ("VA", Some(value)) => {
                            let flags = answer.flag('f').and_then(|flags| flags.parse().ok());
                            Some((value.clone(), flags.ok_or_else(|| answer.unexpected())?))
                        }
                        _ => return Err(answer.unexpected()),
                    });
                }
                Ok(())
            })?;
        }
        Ok(found)
    }

    /// Seconds left, -1 when it never expires; `None` when there is no value.
    pub fn ttl(&mut self, key: &[u8]) -> io::Result<Option<i64>> {
        let answer = self.one("mg", key, " t")?;
        match answer.code() {
            "EN" => Ok(None),
            "HD" => answer
                .flag('t')
                .and_then(|ttl| ttl.parse().ok())
                .map(Some)
                .ok_or_else(|| answer.unexpected()),
            _ => Err(answer.unexpected()),
        }
    }

    /// Stores a value; an error when memcached refuses it.
    pub fn set(&mut self, key: &[u8], value: &[u8], flags: u32, exptime: u32) -> io::Result<()> {
        self.set_many(&[Put {
            key,
            value,
            flags,
            exptime,
        }])
    }

    /// Stores values, pipelined, and returns when memcached has answered for all of them; an error when one was refused.
    pub fn set_many(&mut self, puts: &[Put<'_>]) -> io::Result<()> {
        let mut rest = puts;
        while !rest.is_empty() {
            let mut request = Vec::new();
            let mut taken = 0;
            // A frame's worth: memcached answers nothing but refusals, so nobody waits for us to read.
            while taken < rest.len() && taken < PIPELINE && (taken == 0 || request.len() < WRITE_BYTES) {
                let Put {
                    key,
                    value,
                    flags,
                    exptime,
                } = rest[taken];
                command(
                    &mut request,
                    "ms",
                    key,
                    &format!(" {}", value.len()),
                    &format!(" F{flags} T{exptime} q"),
                );
                request.extend_from_slice(value);
                request.extend_from_slice(b"\r\n");
                taken += 1;
            }
            rest = &rest[taken..];
            request.extend_from_slice(b"mn\r\n");
            self.call(&request, |stream| {
                let answer = read_answer(stream)?;
                if answer.code() == "MN" {
                    Ok(())
                } else {
                    Err(answer.unexpected())
                }
            })?;
        }
        Ok(())
    }

    /// Deletes; whether there was something.
    pub fn delete(&mut self, key: &[u8]) -> io::Result<bool> {
        self.found("md", key, "")
    }

    /// Changes the expiry; whether there was something.
    pub fn touch(&mut self, key: &[u8], exptime: u32) -> io::Result<bool> {
        self.found("mg", key, &format!(" T{exptime}"))
    }

    /// Marks a value stale, as clients do that want one of them to recompute it; whether there was something.
    pub fn mark_stale(&mut self, key: &[u8]) -> io::Result<bool> {
        self.found("md", key, " I")
    }

    /// `stats`, by name.
    pub fn stats(&mut self) -> io::Result<HashMap<String, String>> {
        self.call(b"stats\r\n", |stream| {
            let mut stats = HashMap::new();
            loop {
                let line = read_line(stream)?;
                let mut words = line.splitn(3, ' ');
                match (words.next(), words.next(), words.next()) {
                    (Some("END"), ..) => return Ok(stats),
                    (Some("STAT"), Some(name), value) => stats.insert(name.into(), value.unwrap_or_default().into()),
                    _ => return Err(io::Error::other(format!("memcached answered {line:?}"))),
                };
            }
        })
    }

    /// How many values it holds (expired ones that nobody has touched since are still counted).
    pub fn items(&mut self) -> io::Result<u64> {
        let stats = self.stats()?;
        stats
            .get("curr_items")
            .and_then(|items| items.parse().ok())
            .ok_or_else(|| io::Error::other("no curr_items"))
    }

    /// `flush_all`: every value is gone.
    pub fn flush(&mut self) -> io::Result<()> {
        self.line("flush_all").map(drop)
    }

    /// Whether it answers.
    pub fn ping(&mut self) -> io::Result<()> {
        self.line("mn").map(drop)
    }

    /// Sends one line as it is and returns the answer's first line: for what this client has no method for.
    pub fn line(&mut self, line: &str) -> io::Result<String> {
        self.call(format!("{line}\r\n").as_bytes(), |stream| {
            Ok(read_answer(stream)?.words.join(" "))
        })
    }

    fn found(&mut self, verb: &str, key: &[u8], flags: &str) -> io::Result<bool> {
        let answer = self.one(verb, key, flags)?;
        match answer.code() {
            "HD" => Ok(true),
            "NF" | "EN" => Ok(false),
            _ => Err(answer.unexpected()),
        }
    }

    fn one(&mut self, verb: &str, key: &[u8], flags: &str) -> io::Result<Answer> {
        let mut request = Vec::new();
        command(&mut request, verb, key, "", flags);
        self.call(&request, read_answer)
    }

    /// Sends and reads; after any error the connection is forgotten, since answers could be off by one.
    fn call<T>(
        &mut self,
        request: &[u8],
        read: impl FnOnce(&mut BufReader<TcpStream>) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => self.connect()?,
        };
        stream.get_mut().write_all(request)?;
        let result = read(&mut stream)?;
        self.stream = Some(stream);
        Ok(result)
    }

    fn connect(&self) -> io::Result<BufReader<TcpStream>> {
        let address = self.address.parse().map_err(io::Error::other)?;
        let stream = TcpStream::connect_timeout(&address, self.timeout)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(self.timeout))?;
        stream.set_write_timeout(Some(self.timeout))?;
        Ok(BufReader::with_capacity(64 << 10, stream))
    }
}

/// `<verb> <key><size>[ b]<flags>\r\n`, with the key as base64 where memcached's text protocol couldn't carry it.
fn command(out: &mut Vec<u8>, verb: &str, key: &[u8], size: &str, flags: &str) {
    out.extend_from_slice(verb.as_bytes());
    out.push(b' ');
    let plain = key.iter().all(|&byte| byte > b' ' && byte != 0x7f);
    if plain {
        out.extend_from_slice(key);
    } else {
        base64(key, out);
    }
    out.extend_from_slice(size.as_bytes());
    if !plain {
        out.extend_from_slice(b" b");
    }
    out.extend_from_slice(flags.as_bytes());
    out.extend_from_slice(b"\r\n");
}

fn base64(bytes: &[u8], out: &mut Vec<u8>) {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for group in bytes.chunks(3) {
        let at = |index: usize| u32::from(group.get(index).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for letter in 0..4 {
            // n bytes give n + 1 letters; the rest of the four is padding.
            let sextet = (bits >> (18 - 6 * letter) & 63) as usize;
            out.push(if letter <= group.len() { LETTERS[sextet] } else { b'=' });
        }
    }
}

fn read_line(stream: &mut impl BufRead) -> io::Result<String> {
    let mut line = Vec::new();
    stream.read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    Ok(String::from_utf8_lossy(&line).into_owned())
}

fn read_answer(stream: &mut BufReader<TcpStream>) -> io::Result<Answer> {
    let words: Vec<String> = read_line(stream)?.split(' ').map(str::to_string).collect();
    let mut answer = Answer { words, value: None };
    match answer.code() {
        "VA" => {
            let size: usize = answer
                .words
                .get(1)
                .and_then(|size| size.parse().ok())
                .ok_or_else(|| answer.unexpected())?;
            let mut value = vec![0; size + 2];
            stream.read_exact(&mut value)?;
            value.truncate(size);
            answer.value = Some(value);
        }
        // Off by one from here on; the caller forgets the connection.
        "SERVER_ERROR" | "CLIENT_ERROR" | "ERROR" => return Err(answer.unexpected()),
        _ => {}
    }
    Ok(answer)
}
