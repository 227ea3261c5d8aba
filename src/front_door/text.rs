//! Commands as clients send them: memcached's classic text protocol and its meta commands.
//!
//! Only what must be known here is read: where a command ends, its key, whether the client wants an answer, and its time to
//! live. Everything else is memcached's to judge: a command whose *extent* is clear is forwarded as it is, also when it is
//! wrong, so that the answer is memcached's own. Answered here is only what memcached answers without taking a value that may
//! follow, for a command that is forwarded must take the same bytes there as here. The rules are those of memcached 1.6.18
//! (proto_text.c), and where a later version differs only in what it answers, its answer is what the client gets.

use memchr::{memchr, memrchr};

use super::base64;

/// The longest key, as sent.
pub const MAX_KEY_BYTES: usize = 250;
/// A line without an end that is longer than this is no command (memcached's own limit), but for lists of keys.
pub const MAX_LINE_BYTES: usize = 2048;
/// memcached looks at so many words of a line at once, the end of the line included.
const MAX_WORDS: usize = 24;
/// And takes so many of a meta command, the end of the line included.
const MAX_META_WORDS: usize = 20;

/// The longest opaque, with its letter.
const MAX_OPAQUE_BYTES: usize = 32;

const ERROR: &[u8] = b"ERROR\r\n";
const BAD_FORMAT: &[u8] = b"CLIENT_ERROR bad command line format\r\n";
const BAD_DELETE: &[u8] = b"CLIENT_ERROR bad command line format.  Usage: delete <key> [noreply]\r\n";
const BAD_EXPIRY: &[u8] = b"CLIENT_ERROR invalid exptime argument\r\n";
const TOO_MANY_FLAGS_GET: &[u8] = b"CLIENT_ERROR options flags are too long\r\n";
const LINE_BREAK: &[u8] = b"CLIENT_ERROR a key with a line break cannot be in an answer\r\n";
const NOT_DUMPED: &[u8] = b"CLIENT_ERROR keys are not listed at the front door\r\n";
const TOO_MANY_FLAGS: &[u8] = b"CLIENT_ERROR options flags too long\r\n";

/// What a command asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Verb {
    /// `get`, and `bget`, which is the same.
    Get,
    /// `gets`.
    Gets,
    /// `gat`.
    Gat,
    /// `gats`.
    Gats,
    /// `set`.
    Set,
    /// `add`.
    Add,
    /// `replace`.
    Replace,
    /// `append`.
    Append,
    /// `prepend`.
    Prepend,
    /// `cas`.
    Cas,
    /// `incr`.
    Incr,
    /// `decr`.
    Decr,
    /// `touch`.
    Touch,
    /// `delete`.
    Delete,
    /// `flush_all`.
    FlushAll,
    /// `version`.
    Version,
    /// `verbosity`.
    Verbosity,
    /// `stats`.
    Stats,
    /// `mg`.
    MetaGet,
    /// `ms`.
    MetaSet,
    /// `md`.
    MetaDelete,
    /// `ma`.
    MetaArithmetic,
    /// `me`.
    MetaDebug,
}

impl Verb {
    /// How many there are.
    pub const COUNT: usize = Verb::MetaDebug as usize + 1;

    /// Every verb.
    pub const ALL: [Verb; Verb::COUNT] = [
        Verb::Get,
        Verb::Gets,
        Verb::Gat,
        Verb::Gats,
        Verb::Set,
        Verb::Add,
        Verb::Replace,
        Verb::Append,
        Verb::Prepend,
        Verb::Cas,
        Verb::Incr,
        Verb::Decr,
        Verb::Touch,
        Verb::Delete,
        Verb::FlushAll,
        Verb::Version,
        Verb::Verbosity,
        Verb::Stats,
        Verb::MetaGet,
        Verb::MetaSet,
        Verb::MetaDelete,
        Verb::MetaArithmetic,
        Verb::MetaDebug,
    ];

    /// As the protocol spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Verb::Get => "get",
            Verb::Gets => "gets",
            Verb::Gat => "gat",
            Verb::Gats => "gats",
            Verb::Set => "set",
            Verb::Add => "add",
            Verb::Replace => "replace",
            Verb::Append => "append",
            Verb::Prepend => "prepend",
            Verb::Cas => "cas",
            Verb::Incr => "incr",
            Verb::Decr => "decr",
            Verb::Touch => "touch",
            Verb::Delete => "delete",
            Verb::FlushAll => "flush_all",
            Verb::Version => "version",
            Verb::Verbosity => "verbosity",
            Verb::Stats => "stats",
            Verb::MetaGet => "mg",
            Verb::MetaSet => "ms",
            Verb::MetaDelete => "md",
            Verb::MetaArithmetic => "ma",
            Verb::MetaDebug => "me",
        }
    }

    /// Whether it may name several keys.
    pub const fn takes_keys(self) -> bool {
        matches!(self, Verb::Get | Verb::Gets | Verb::Gat | Verb::Gats)
    }

    /// Whether it may change what memcached holds of its key, so that there may be an event.
    pub const fn writes(self) -> bool {
        !matches!(
            self,
            Verb::Get | Verb::Gets | Verb::FlushAll | Verb::Version | Verb::Verbosity | Verb::Stats | Verb::MetaDebug
        )
    }

    /// Whether memcached drops what it holds of the key when it cannot store the new value (measured).
    pub const fn drops_when_refused(self) -> bool {
        matches!(self, Verb::Set | Verb::MetaSet)
    }
}

/// A part of the bytes that were read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Where it begins.
    pub at: u32,
    /// How long it is.
    pub length: u32,
}

impl Span {
    fn of(start: usize, end: usize) -> Span {
        Span {
            at: start as u32,
            length: (end - start) as u32,
        }
    }

    /// As indices.
    pub fn range(self) -> std::ops::Range<usize> {
        self.at as usize..(self.at + self.length) as usize
    }

    /// The bytes themselves.
    pub fn of_bytes(self, bytes: &[u8]) -> &[u8] {
        &bytes[self.range()]
    }

    /// Whether there is nothing in it.
    pub fn is_empty(self) -> bool {
        self.length == 0
    }
}

/// What the client does not want to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hush {
    /// It wants every answer.
    Nothing,
    /// `noreply`: it wants none.
    Everything,
    /// The flag `q` of a meta command: not what is usual.
    Usual,
}

/// A command that is forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// What it asks for.
    pub verb: Verb,
    /// Bytes that it takes, its value included.
    pub length: usize,
    /// Its line, without the end of it, up to a NUL at most, where memcached stops reading.
    pub line: Span,
    /// Its key as sent; the first of several; empty if it has none.
    pub key: Span,
    /// The key is in base64.
    pub base64: bool,
    /// What is left out when it is forwarded, so that there always is an answer.
    pub cut: Option<Span>,
    /// What the client does not want to be told.
    pub hush: Hush,
    /// Its expiry, if it names one that an event can carry.
    pub ttl: Option<u32>,
    /// The token `O` of a meta command, without its letter.
    pub opaque: Span,
    /// A meta command that gives the item a new expiry.
    pub touches: bool,
    /// A meta command that makes the item if there is none (`N`).
    pub creates: bool,
    /// A meta set that stores only what is not there (`ME`).
    pub adds: bool,
    /// The answer of a meta command names the key (`k`).
    pub names_key: bool,
    /// It is not as clients write it. memcached may take it in another way than it is taken here, so that its answer is looked for
    /// up to a barrier behind it.
    pub odd: bool,
    /// Bytes of its line with the end of it.
    pub head: usize,
}

impl Command {
    /// Whether it is a `get` of one key and nothing else.
    pub fn gets_one(&self) -> bool {
        self.verb == Verb::Get && !self.odd && !self.key.is_empty() && self.key.range().end == self.line.range().end
    }
}

/// What is at the beginning of the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// The beginning of a command: it takes so many bytes more at least.
    Incomplete {
        /// At least 1.
        missing: usize,
    },
    /// A command that is answered here, with this, which may be nothing.
    Answer {
        /// Bytes that it takes.
        length: usize,
        /// What is answered.
        answer: &'static [u8],
    },
    /// A command for memcached.
    Forward(Command),
    /// A command whose value is beyond the limit. Its line is whole; its `length` counts the value, all of which is still to
    /// be thrown away.
    TooLarge(Command),
    /// The client wants to leave: its connection is closed behind the answers to what it sent before.
    Quit,
    /// This is no memcached client: the same, at once.
    Nonsense,
}

/// What a client may send.
#[derive(Clone, Copy, Debug)]
pub struct TextLimits {
    /// The longest list of keys, in bytes.
    pub line_bytes: usize,
    /// The largest value.
    pub value_bytes: usize,
}

/// The words of a line: where each begins and ends.
struct Words {
    spans: [(u32, u32); MAX_WORDS],
    count: usize,
    /// Where what was not looked at begins, of a line with more words.
    rest: Option<usize>,
}

impl Words {
    /// Cuts at blanks, as memcached does: 23 words at most.
    fn of(line: &[u8]) -> Words {
        let mut words = Words {
            spans: [(0, 0); MAX_WORDS],
            count: 0,
            rest: None,
        };
        let mut start = 0;
        for (at, &byte) in line.iter().enumerate() {
            if byte != b' ' {
                continue;
            }
            if start < at {
                words.spans[words.count] = (start as u32, at as u32);
                words.count += 1;
                if words.count == MAX_WORDS - 1 {
                    words.rest = (at + 1 < line.len()).then_some(at + 1);
                    return words;
                }
            }
            start = at + 1;
        }
        if start < line.len() {
            words.spans[words.count] = (start as u32, line.len() as u32);
            words.count += 1;
        }
        words
    }

    fn get<'a>(&self, line: &'a [u8], n: usize) -> &'a [u8] {
        let (start, end) = self.spans[n];
        &line[start as usize..end as usize]
    }

    fn span(&self, n: usize) -> Span {
        let (start, end) = self.spans[n];
        Span::of(start as usize, end as usize)
    }

    /// The number of words as memcached counts them, with the end of the line.
    fn with_end(&self) -> usize {
        self.count + 1
    }

    /// The last word, which may be `noreply`, and the blank before it.
    fn noreply(&self, line: &[u8]) -> Option<Span> {
        let last = self.count - 1;
        (self.get(line, last) == b"noreply").then(|| {
            let (start, end) = self.spans[last];
            Span::of(start as usize - 1, end as usize)
        })
    }
}

/// Whether C's `isspace` says so.
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | 0x0b | 0x0c | b'\r')
}

/// Sign and magnitude of a word, as `strtoull` and its like read it: blanks and a sign may stand before the digits, and
/// anything behind a blank does not count.
fn number(word: &[u8]) -> Option<(bool, u64)> {
    let start = word.iter().position(|&byte| !is_space(byte))?;
    let (negative, digits) = match word[start] {
        b'-' => (true, &word[start + 1..]),
        b'+' => (false, &word[start + 1..]),
        _ => (false, &word[start..]),
    };
    let length = digits
        .iter()
        .position(|byte| !byte.is_ascii_digit())
        .unwrap_or(digits.len());
    if length == 0 || digits.get(length).is_some_and(|&byte| !is_space(byte)) {
        return None;
    }
    let value = digits[..length].iter().try_fold(0u64, |value, digit| {
        value.checked_mul(10)?.checked_add(u64::from(digit - b'0'))
    })?;
    Some((negative, value))
}

/// As memcached's `safe_strtoul` and `safe_strtoull` accept a number; the first then keeps the lower 32 bits.
fn unsigned(word: &[u8]) -> Option<u64> {
    let (negative, magnitude) = number(word)?;
    let value = if negative {
        0u64.wrapping_sub(magnitude)
    } else {
        magnitude
    };
    let refused = (value as i64) < 0 && word.contains(&b'-');
    (!refused).then_some(value)
}

/// As memcached's `safe_strtol` reads a number: the lower 32 bits of what `strtol` takes.
fn signed(word: &[u8]) -> Option<i32> {
    let (negative, magnitude) = number(word)?;
    let value = if negative {
        -i128::from(magnitude)
    } else {
        i128::from(magnitude)
    };
    i64::try_from(value).ok().map(|value| value as i32)
}

/// An expiry as an event carries it: none where it lies before the beginning of time.
fn ttl(word: &[u8]) -> Option<u32> {
    signed(word).and_then(|ttl| u32::try_from(ttl).ok())
}

/// Reads one command from the beginning of what a client has sent.
pub fn parse(bytes: &[u8], limits: TextLimits) -> Parsed {
    match read(bytes, limits) {
        Parsed::Forward(command) if breaks_lines(bytes, &command) => Parsed::Answer {
            length: command.length,
            answer: LINE_BREAK,
        },
        parsed => parsed,
    }
}

fn read(bytes: &[u8], limits: TextLimits) -> Parsed {
    let Some(newline) = memchr(b'\n', bytes) else {
        return unfinished(bytes, limits);
    };
    let end = if newline > 1 && bytes[newline - 1] == b'\r' {
        newline - 1
    } else {
        newline
    };
    let line = &bytes[..end];
    // memcached reads its line as a C string.
    let line = memchr(0, line).map_or(line, |nul| &line[..nul]);
    let length = newline + 1;
    let words = Words::of(line);
    let answer = |answer| Parsed::Answer { length, answer };
    if words.count == 0 || words.get(line, 0).len() < 2 {
        return answer(ERROR);
    }
    if newline > limits.line_bytes {
        return Parsed::Nonsense;
    }
    let word = words.get(line, 0);
    let verb = match word {
        b"get" | b"bget" => Verb::Get,
        b"set" => Verb::Set,
        b"mg" => Verb::MetaGet,
        b"ms" => Verb::MetaSet,
        b"gets" => Verb::Gets,
        b"gat" => Verb::Gat,
        b"gats" => Verb::Gats,
        b"add" => Verb::Add,
        b"replace" => Verb::Replace,
        b"append" => Verb::Append,
        b"prepend" => Verb::Prepend,
        b"cas" => Verb::Cas,
        b"incr" => Verb::Incr,
        b"decr" => Verb::Decr,
        b"touch" => Verb::Touch,
        b"delete" => Verb::Delete,
        b"md" => Verb::MetaDelete,
        b"ma" => Verb::MetaArithmetic,
        b"me" => Verb::MetaDebug,
        b"mn" => return answer(b"MN\r\n"),
        b"flush_all" => Verb::FlushAll,
        b"version" => Verb::Version,
        b"verbosity" => Verb::Verbosity,
        b"stats" => Verb::Stats,
        b"quit" => return Parsed::Quit,
        _ => return unknown(line, &words, length),
    };
    let command = Command {
        verb,
        length,
        line: Span::of(0, line.len()),
        key: if words.count > 1 {
            words.span(1)
        } else {
            Span::default()
        },
        base64: false,
        cut: None,
        hush: Hush::Nothing,
        ttl: None,
        opaque: Span::default(),
        touches: false,
        creates: false,
        adds: false,
        names_key: false,
        odd: line.iter().any(|byte| *byte < b' ') || line.len() != end,
        head: length,
    };
    // A list of keys may be long; of anything else memcached would not wait for the end of such a line.
    if newline > MAX_LINE_BYTES && !is_list(bytes) {
        return Parsed::Nonsense;
    }
    match verb {
        Verb::Get | Verb::Gets | Verb::Gat | Verb::Gats => list(line, &words, command),
        Verb::Set | Verb::Add | Verb::Replace | Verb::Append | Verb::Prepend | Verb::Cas => {
            storage(bytes, line, &words, command, limits)
        }
        Verb::Incr | Verb::Decr | Verb::Touch => match words.with_end() {
            4 | 5 => keyed(line, &words, command),
            _ => answer(ERROR),
        },
        Verb::Delete => delete(line, &words, command),
        Verb::FlushAll if !(2..=4).contains(&words.with_end()) => answer(ERROR),
        Verb::Verbosity if !(3..=4).contains(&words.with_end()) => answer(ERROR),
        Verb::FlushAll | Verb::Verbosity => {
            let mut command = command;
            command.key = Span::default();
            command.odd = true;
            match hush(line, &words, &mut command) {
                true => Parsed::Forward(command),
                false => answer(b""),
            }
        }
        Verb::Stats if lists_keys(line, &words) => answer(NOT_DUMPED),
        Verb::Version | Verb::Stats => Parsed::Forward(Command {
            key: Span::default(),
            ..command
        }),
        Verb::MetaGet | Verb::MetaDelete | Verb::MetaArithmetic => {
            if words.with_end() < 3 {
                return answer(ERROR);
            }
            if words.get(line, 1).len() > MAX_KEY_BYTES {
                return answer(BAD_FORMAT);
            }
            if words.with_end() > MAX_META_WORDS {
                return answer(match verb {
                    Verb::MetaGet => TOO_MANY_FLAGS_GET,
                    _ => TOO_MANY_FLAGS,
                });
            }
            let mut command = command;
            flags(line, &words, 2, &mut command);
            Parsed::Forward(command)
        }
        Verb::MetaSet => meta_set(bytes, line, &words, command, limits),
        Verb::MetaDebug => {
            if words.with_end() < 3 || words.get(line, 1).len() > MAX_KEY_BYTES {
                return answer(BAD_FORMAT);
            }
            let base64 = words.count > 2 && words.get(line, 2) == b"b";
            Parsed::Forward(Command {
                base64,
                names_key: true,
                ..command
            })
        }
    }
}

fn unfinished(bytes: &[u8], limits: TextLimits) -> Parsed {
    let more = Parsed::Incomplete { missing: 1 };
    if bytes.len() <= MAX_LINE_BYTES {
        return more;
    }
    if is_list(bytes) && bytes.len() <= limits.line_bytes {
        more
    } else {
        Parsed::Nonsense
    }
}

/// Whether this begins with a list of keys, which may be long.
fn is_list(bytes: &[u8]) -> bool {
    let blanks = bytes.iter().take_while(|&&byte| byte == b' ').count();
    let verbs = [&b"get "[..], b"gets ", b"gat ", b"gats "];
    blanks <= 100 && verbs.iter().any(|verb| bytes[blanks..].starts_with(verb))
}

fn unknown(line: &[u8], words: &Words, length: usize) -> Parsed {
    // As memcached: whoever speaks HTTP is not answered.
    match words.get(line, words.count - 1).starts_with(b"HTTP/") {
        true => Parsed::Nonsense,
        false => Parsed::Answer { length, answer: ERROR },
    }
}

/// Takes note of `noreply`. False when it stands there twice: then the other one is no number, the command is wrong, and nobody
/// wants to hear it. (A key may have this name.)
fn hush(line: &[u8], words: &Words, command: &mut Command) -> bool {
    let last = words.count - 1;
    if last == 0 {
        return true;
    }
    if let Some(noreply) = words.noreply(line) {
        command.cut = Some(noreply);
        command.hush = Hush::Everything;
        let other = last - 1;
        return words.get(line, other) != b"noreply" || other == 0 || (other == 1 && command.verb == Verb::Delete);
    }
    true
}

/// An answer given here, unless the client wants none.
fn say(command: &Command, answer: &'static [u8]) -> Parsed {
    Parsed::Answer {
        length: command.length,
        answer: if command.hush == Hush::Everything { b"" } else { answer },
    }
}

/// Reads `get` and what is like it. Every key is looked at: one that is too long makes memcached drop what it has not yet
/// sent of *earlier* answers of the connection, which are not only this client's.
fn list(line: &[u8], words: &Words, mut command: Command) -> Parsed {
    if words.with_end() < 3 {
        return say(&command, ERROR);
    }
    let first = match command.verb {
        Verb::Gat | Verb::Gats => {
            let word = words.get(line, 1);
            if signed(word).is_none() {
                return say(&command, BAD_EXPIRY);
            }
            command.ttl = ttl(word);
            2
        }
        _ => 1,
    };
    command.key = match words.count > first {
        true => words.span(first),
        // `gat 10`: memcached looks for nothing, and says END.
        false => Span::default(),
    };
    let keys = line[command.key.at as usize..].split(|&byte| byte == b' ');
    match command.key.is_empty() || keys.map(<[u8]>::len).all(|length| length <= MAX_KEY_BYTES) {
        true => Parsed::Forward(command),
        false => say(&command, BAD_FORMAT),
    }
}

/// Reads `incr`, `decr` and `touch`.
fn keyed(line: &[u8], words: &Words, mut command: Command) -> Parsed {
    if !hush(line, words, &mut command) {
        return say(&command, b"");
    }
    if words.get(line, 1).len() > MAX_KEY_BYTES {
        return say(&command, BAD_FORMAT);
    }
    if command.verb == Verb::Touch {
        command.ttl = ttl(words.get(line, 2));
    }
    Parsed::Forward(command)
}

fn delete(line: &[u8], words: &Words, mut command: Command) -> Parsed {
    let count = words.with_end();
    if !(3..=5).contains(&count) {
        return say(&command, ERROR);
    }
    if count > 3 {
        let zero = words.get(line, 2) == b"0";
        let _ = hush(line, words, &mut command);
        let quiet = command.hush == Hush::Everything;
        if !((count == 4 && (zero || quiet)) || (count == 5 && zero && quiet)) {
            return say(&command, BAD_DELETE);
        }
    }
    match words.get(line, 1).len() > MAX_KEY_BYTES {
        true => say(&command, BAD_FORMAT),
        false => Parsed::Forward(command),
    }
}

/// Reads `set` and what is like it. What is wrong with its line ends it there, and what was meant as its value is read as
/// commands: so does memcached.
fn storage(bytes: &[u8], line: &[u8], words: &Words, mut command: Command, limits: TextLimits) -> Parsed {
    let (count, cas) = (words.with_end(), command.verb == Verb::Cas);
    if !(6 + usize::from(cas)..=7 + usize::from(cas)).contains(&count) {
        return say(&command, ERROR);
    }
    let _ = hush(line, words, &mut command);
    let word = |n| words.get(line, n);
    let length = signed(word(4)).and_then(|length| usize::try_from(length).ok());
    let fine = word(1).len() <= MAX_KEY_BYTES
        && unsigned(word(2)).is_some()
        && signed(word(3)).is_some()
        && (!cas || unsigned(word(5)).is_some());
    let Some(length) = length.filter(|length| fine && *length <= i32::MAX as usize - 2) else {
        return say(&command, BAD_FORMAT);
    };
    command.ttl = ttl(word(3));
    let plain = |word: &[u8]| word.iter().all(u8::is_ascii_digit);
    let needed = 5 + usize::from(cas) + usize::from(command.hush == Hush::Everything);
    command.odd |= words.count != needed || !plain(word(2)) || !plain(word(4)) || (cas && !plain(word(5)));
    with_value(bytes, length, command, limits)
}

fn meta_set(bytes: &[u8], line: &[u8], words: &Words, mut command: Command, limits: TextLimits) -> Parsed {
    let count = words.with_end();
    if count < 3 {
        return say(&command, ERROR);
    }
    if count == 3 || words.get(line, 1).len() > MAX_KEY_BYTES {
        return say(&command, BAD_FORMAT);
    }
    if count > MAX_META_WORDS {
        return say(&command, TOO_MANY_FLAGS);
    }
    let length = signed(words.get(line, 2)).and_then(|length| usize::try_from(length).ok());
    let Some(length) = length.filter(|length| *length <= i32::MAX as usize - 2) else {
        return say(&command, BAD_FORMAT);
    };
    flags(line, words, 3, &mut command);
    if length > limits.value_bytes
        && let Some(answer) = fault(line, words)
    {
        // Of what is wrong with it this comes first, and its value goes the same way.
        command.length += length + 2;
        return Parsed::Answer {
            length: command.length,
            answer,
        };
    }
    command.odd |= !words.get(line, 2).iter().all(u8::is_ascii_digit);
    with_value(bytes, length, command, limits)
}

/// Whether the answer would name a key as it is in which a line ends. memcached does so for a key in base64 whose item was made
/// by a binary client, by `N` or by `ma`, and that ends the answer too early: the rest would be taken for the answers to what other
/// clients have asked.
fn breaks_lines(bytes: &[u8], command: &Command) -> bool {
    let mut key = Vec::new();
    command.names_key
        && command.base64
        && base64::decode(command.key.of_bytes(bytes), &mut key)
        && memchr(b'\n', &key).is_some()
}

/// Whether these statistics name keys, which may be what memcached's own answers look like.
fn lists_keys(line: &[u8], words: &Words) -> bool {
    let word = |n| if n < words.count { words.get(line, n) } else { b"" };
    word(1) == b"cachedump" || (word(1) == b"detail" && word(2) == b"dump")
}

/// A command whose value follows its line. Whatever memcached thinks of it, it takes so many bytes.
fn with_value(bytes: &[u8], value: usize, mut command: Command, limits: TextLimits) -> Parsed {
    command.length += value + 2;
    if value > limits.value_bytes {
        return Parsed::TooLarge(command);
    }
    match command.length.checked_sub(bytes.len()) {
        None | Some(0) => {
            command.odd |= !bytes[..command.length].ends_with(b"\r\n");
            Parsed::Forward(command)
        }
        Some(missing) => Parsed::Incomplete { missing },
    }
}

/// Reads the flags of a meta command, from the word `first` on.
fn flags(line: &[u8], words: &Words, first: usize, command: &mut Command) {
    let mut quiet = 0;
    for n in first..words.count {
        let word = words.get(line, n);
        match word[0] {
            b'q' => {
                quiet += 1;
                let span = words.span(n);
                command.cut = Some(Span {
                    at: span.at - 1,
                    length: span.length + 1,
                });
            }
            b'b' => command.base64 = true,
            b'k' => command.names_key = true,
            b'T' => {
                command.ttl = ttl(&word[1..]);
                command.touches = true;
            }
            b'N' => command.creates = true,
            b'M' => command.adds = &word[1..] == b"E",
            b'O' => {
                let span = words.span(n);
                command.opaque = Span {
                    at: span.at + 1,
                    length: span.length - 1,
                };
            }
            _ => {}
        }
    }
    match quiet {
        0 => {}
        1 => command.hush = Hush::Usual,
        // Twice is an error, of which memcached speaks as long as both are there.
        _ => {
            command.cut = None;
            command.odd = true;
        }
    }
}

/// What memcached finds wrong with the flags of a meta set. Asked only where it cannot be asked itself.
fn fault(line: &[u8], words: &Words) -> Option<&'static [u8]> {
    const BAD_TOKEN: &[u8] = b"CLIENT_ERROR bad token in command line format\r\n";
    let mut seen = [false; 127];
    let (mut found, mut mode) = (None, None);
    for n in 3..words.count {
        let word = words.get(line, n);
        let (letter, rest) = (word[0], &word[1..]);
        match seen.get_mut(usize::from(letter)) {
            Some(seen) if !*seen => *seen = true,
            _ => return Some(b"CLIENT_ERROR duplicate flag\r\n"),
        }
        let wrong: Option<&'static [u8]> = match letter {
            b'b' => (!super::base64::decode(words.get(line, 1), &mut Vec::new()))
                .then_some(&b"CLIENT_ERROR error decoding key\r\n"[..]),
            b'N' | b'T' | b'R' => signed(rest).is_none().then_some(BAD_TOKEN),
            b'C' => unsigned(rest).is_none().then_some(BAD_TOKEN),
            b'F' => unsigned(rest).is_none().then(|| found.unwrap_or(BAD_FORMAT)),
            b'J' => unsigned(rest)
                .is_none()
                .then_some(&b"CLIENT_ERROR invalid numeric initial value\r\n"[..]),
            b'D' => unsigned(rest)
                .is_none()
                .then_some(&b"CLIENT_ERROR invalid numeric delta value\r\n"[..]),
            b'M' => match rest {
                [letter] => {
                    mode = Some(*letter);
                    None
                }
                _ => Some(b"CLIENT_ERROR incorrect length for M token\r\n"),
            },
            b'l' | b'O' | b'P' | b'L' | b'k' | b's' | b't' | b'c' | b'f' | b'v' | b'h' | b'u' | b'q' | b'I' => None,
            _ => return Some(b"CLIENT_ERROR invalid flag\r\n"),
        };
        found = wrong.or(found);
    }
    let opaque = (3..words.count).any(|n| words.get(line, n)[0] == b'O' && words.get(line, n).len() > MAX_OPAQUE_BYTES);
    found
        .or_else(|| {
            mode.filter(|mode| !b"EAPRS".contains(mode))
                .map(|_| &b"CLIENT_ERROR invalid mode for ms M token\r\n"[..])
        })
        .or_else(|| opaque.then_some(&b"CLIENT_ERROR opaque token too long\r\n"[..]))
}

/// The keys of a list from its first on, each with the blanks behind it.
pub fn keys<'a>(bytes: &'a [u8], command: &Command) -> impl Iterator<Item = &'a [u8]> + use<'a> {
    let line = command.line.of_bytes(bytes);
    let from = if command.key.is_empty() {
        line.len()
    } else {
        command.key.at as usize
    };
    line[from..].split(|&byte| byte == b' ').filter(|key| !key.is_empty())
}

/// What a list begins with: its verb, and its expiry if it has one, with the blank behind it.
pub fn head<'a>(bytes: &'a [u8], command: &Command) -> &'a [u8] {
    let end = if command.key.is_empty() {
        command.line.length
    } else {
        command.key.at
    };
    &bytes[..end as usize]
}

/// Where the last line of an answer begins.
pub fn last_line(answer: &[u8]) -> usize {
    memrchr(b'\n', &answer[..answer.len().saturating_sub(1)]).map_or(0, |newline| newline + 1)
}

#[cfg(test)]
mod tests;
