//! The meta protocol's text, without any I/O: requests into a buffer, replies out of one.
//!
//! A request that is not quiet carries an opaque number that memcached echoes, so a reply that is not the next one is noticed.
//! Only error lines come without it; they keep their place in the order (measured: also for a refused `ms`, whose value is
//! read and thrown away).

use bytes::{Buf, Bytes, BytesMut};

use super::RemainingTtl;

/// memcached's limit for a key as it is sent.
pub const MAX_KEY_BYTES: usize = 250;
/// A key with white space or control characters is sent in base64, and memcached limits the *encoded* key: 186 bytes
/// become 248, 187 would become 252.
pub const MAX_BINARY_KEY_BYTES: usize = 186;
/// memcached answers `CLIENT_ERROR` to an `ms` it cannot read and takes the value for *commands*, so what it would not
/// read must not be sent. It knows no item above 1 GiB (`-I`), far below where its length field overflows.
pub(super) const MAX_VALUE_BYTES: usize = 1 << 30;
/// Longest line that can be a reply; memcached's own buffers end at 2048.
const MAX_LINE_BYTES: usize = 2048;
/// Expiries are 32-bit *signed* in memcached: one above is taken as long past (measured). 2038 is the latest there is.
const MAX_EXPIRY: u32 = i32::MAX as u32;

/// Why memcached cannot hold this key, if it cannot.
pub fn key_problem(key: &[u8]) -> Option<&'static str> {
    match key.len() {
        0 => Some("key is empty"),
        1..=MAX_BINARY_KEY_BYTES => None,
        length if length > MAX_KEY_BYTES => Some("key is longer than 250 bytes"),
        _ if is_plain(key) => None,
        _ => Some("key is longer than 186 bytes and has white space or control characters"),
    }
}

/// Whether a key may be sent as it is. memcached's commands end at white space; clients of the old protocol also refuse
/// control characters, so those go in base64 (the same item is found either way).
fn is_plain(key: &[u8]) -> bool {
    // No early exit: this way the compiler makes vector code of it.
    key.iter()
        .fold(true, |plain, &byte| plain & (byte > 0x20) & (byte != 0x7f))
}

/// `mg` for a value (with flags) or for the TTL only. `u` leaves the item's place in the LRU, its access time and its
/// fetched mark alone (measured with `me`; without it the fetched mark is set at once, the access time after a minute).
/// `c` is needed to give back the token that a stale item hands out, `s` to know a placeholder without its value.
pub(super) fn put_look(out: &mut Vec<u8>, key: &[u8], value: bool, opaque: u32) {
    out.extend_from_slice(b"mg ");
    let base64 = put_key(out, key);
    let mut line = Line::default();
    line.put(if value { b" v f t c u" } else { b" s t c u" });
    line.end(base64, Some(opaque));
    out.extend_from_slice(line.bytes());
}

/// `ms` up to the value: `length` bytes and `\r\n` must follow. Without a number it is quiet: answered only unless it is done.
pub(super) fn put_set(out: &mut Vec<u8>, key: &[u8], length: usize, flags: u32, expiry: u32, opaque: Option<u32>) {
    out.reserve(key.len() * 2 + length.min(MAX_LINE_BYTES) + LINE_BYTES);
    out.extend_from_slice(b"ms ");
    let base64 = put_key(out, key);
    let mut line = Line::default();
    line.number(b" ", length as u64);
    if flags != 0 {
        line.number(b" F", flags.into());
    }
    if expiry != 0 {
        line.number(b" T", sendable_expiry(expiry).into());
    }
    line.end(base64, opaque);
    out.extend_from_slice(line.bytes());
}

/// `mg` with a new expiry. It counts as an access, as an application's touch does.
pub(super) fn put_touch(out: &mut Vec<u8>, key: &[u8], expiry: u32, opaque: Option<u32>) {
    out.extend_from_slice(b"mg ");
    let base64 = put_key(out, key);
    let mut line = Line::default();
    line.number(b" s c T", sendable_expiry(expiry).into());
    line.end(base64, opaque);
    out.extend_from_slice(line.bytes());
}

/// `md`. Without a number it is quiet.
pub(super) fn put_delete(out: &mut Vec<u8>, key: &[u8], opaque: Option<u32>) {
    out.extend_from_slice(b"md ");
    let base64 = put_key(out, key);
    put_end(out, base64, opaque);
}

/// Marks the item stale once more, if nobody changed it: whoever reads it next gets the token that we got.
pub(super) fn put_give_back(out: &mut Vec<u8>, key: &[u8], cas: u64, opaque: u32) {
    out.extend_from_slice(b"md ");
    let base64 = put_key(out, key);
    let mut line = Line::default();
    line.number(b" I C", cas);
    line.end(base64, Some(opaque));
    out.extend_from_slice(line.bytes());
}

/// What [`put_expiry`] sends for an expiry.
pub(super) fn sendable_expiry(expiry: u32) -> u32 {
    expiry.min(MAX_EXPIRY)
}

/// The longest line behind a key, and more: a length, flags, an expiry and an opaque number of ten digits each, or a CAS of
/// twenty.
const LINE_BYTES: usize = 64;

/// What follows a key, built on the stack and appended at once: each small append to a growing buffer is a call and a check.
struct Line {
    bytes: [u8; LINE_BYTES],
    length: usize,
}

impl Default for Line {
    fn default() -> Line {
        Line {
            bytes: [0; LINE_BYTES],
            length: 0,
        }
    }
}

impl Line {
    #[inline]
    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.length..self.length + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
    }

    /// A flag and its number, in decimal digits without the formatting machinery.
    #[inline]
    fn number(&mut self, flag: &[u8], mut number: u64) {
        self.put(flag);
        let digits = number.checked_ilog10().map_or(1, |tens| tens as usize + 1);
        self.length += digits;
        for digit in self.bytes[self.length - digits..self.length].iter_mut().rev() {
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
        }
    }

    #[inline]
    fn end(&mut self, base64: bool, opaque: Option<u32>) {
        if base64 {
            self.put(b" b");
        }
        match opaque {
            None => self.put(b" q"),
            Some(opaque) => self.number(b" O", opaque.into()),
        }
        self.put(b"\r\n");
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

fn put_end(out: &mut Vec<u8>, base64: bool, opaque: Option<u32>) {
    let mut line = Line::default();
    line.end(base64, opaque);
    out.extend_from_slice(line.bytes());
}

/// Appends the key as it travels; says whether that is base64.
fn put_key(out: &mut Vec<u8>, key: &[u8]) -> bool {
    if is_plain(key) {
        out.extend_from_slice(key);
        return false;
    }
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for three in key.chunks(3) {
        let byte = |at: usize| u32::from(three.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        let digit = |shift: u32| ALPHABET[(bits >> shift & 63) as usize];
        let mut four = [digit(18), digit(12), digit(6), digit(0)];
        four[three.len() + 1..].fill(b'=');
        out.extend_from_slice(&four);
    }
    true
}

/// How a reply begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Code {
    /// `VA`: a value follows.
    Value,
    /// `HD`: done, or found when no value was asked for.
    Done,
    /// `EN` or `NF`: no such item.
    NotFound,
    /// `NS` or `EX`: not stored, or changed meanwhile.
    NotStored,
    /// `MN`: everything before has been answered.
    Noop,
    /// `VERSION`, and which.
    Version(String),
    /// `SERVER_ERROR`, with its text.
    ServerError(String),
    /// `CLIENT_ERROR` or `ERROR`, with its text.
    ClientError(String),
}

/// One reply with what came in its line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reply {
    pub code: Code,
    /// Echo of the request's number; never on error lines.
    pub opaque: Option<u32>,
    pub flags: u32,
    pub ttl: Option<RemainingTtl>,
    pub cas: u64,
    pub size: Option<u64>,
    /// `W`: the right to refresh the item is now ours.
    pub won: bool,
    /// `X`: marked stale.
    pub stale: bool,
    /// `Z`: somebody else has that right.
    pub awaited: bool,
    pub value: Bytes,
}

impl Reply {
    fn new(code: Code) -> Reply {
        Reply {
            code,
            opaque: None,
            flags: 0,
            ttl: None,
            cas: 0,
            size: None,
            won: false,
            stale: false,
            awaited: false,
            value: Bytes::new(),
        }
    }

    /// Whether the item's value is not to be used: marked stale, the token of a refresh is in our hands, or it is the
    /// empty placeholder of somebody who is computing the value. `Z` alone is a good item refreshed ahead of time.
    pub fn is_stale(&self) -> bool {
        self.stale || self.won || self.awaited && self.size == Some(0)
    }
}

/// What could be read from a buffer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Decoded {
    Reply(Reply),
    /// At least this many bytes more are needed; for a value it is exactly what is missing.
    Missing(usize),
}

/// Takes the next reply off the front of `buffer`. The value is a slice of it, not a copy. An incomplete reply is left
/// where it is. The error says what is malformed.
pub(super) fn decode(buffer: &mut BytesMut) -> Result<Decoded, String> {
    if let Some((reply, length, head)) = value_head(buffer) {
        return take_value(buffer, reply, head, length);
    }
    let window = &buffer[..buffer.len().min(MAX_LINE_BYTES)];
    let Some(newline) = window.iter().position(|&byte| byte == b'\n') else {
        return if window.len() == MAX_LINE_BYTES {
            Err("line without an end".into())
        } else {
            Ok(Decoded::Missing(1))
        };
    };
    let Some(line) = window[..newline].strip_suffix(b"\r") else {
        return Err(format!("line without a carriage return: {}", show(&window[..newline])));
    };
    let (reply, length) = parse_line(line)?;
    let Some(length) = length else {
        buffer.advance(newline + 1);
        return Ok(Decoded::Reply(reply));
    };
    take_value(buffer, reply, newline + 1, length)
}

/// Takes a reply off whose value begins at `head`.
fn take_value(buffer: &mut BytesMut, mut reply: Reply, head: usize, length: usize) -> Result<Decoded, String> {
    let end = head + length;
    if buffer.len() < end + 2 {
        return Ok(Decoded::Missing(end + 2 - buffer.len()));
    }
    if &buffer[end..end + 2] != b"\r\n" {
        return Err("value does not end where its length says".into());
    }
    buffer.advance(head);
    if length > 0 {
        reply.value = buffer.split_to(length).freeze();
    }
    reply.size = Some(length as u64);
    buffer.advance(2);
    Ok(Decoded::Reply(reply))
}

/// What a look at an ordinary item answers, read in one pass, with how long its value is and where it begins: nearly every
/// reply there is, and the general way is four times as long. `None` for all others, and for what is not all there.
fn value_head(buffer: &[u8]) -> Option<(Reply, usize, usize)> {
    let mut at = buffer.strip_prefix(b"VA ")?;
    let length = digits(&mut at)?;
    let flags = skip(&mut at, b" f").and_then(|()| digits(&mut at))?;
    skip(&mut at, b" t")?;
    let ttl = match skip(&mut at, b"-1") {
        Some(()) => RemainingTtl::Never,
        None => RemainingTtl::Seconds(digits(&mut at)?.try_into().ok()?),
    };
    let cas = skip(&mut at, b" c").and_then(|()| digits(&mut at))?;
    let opaque = skip(&mut at, b" O").and_then(|()| digits(&mut at))?;
    skip(&mut at, b"\r\n")?;
    let reply = Reply {
        opaque: Some(opaque.try_into().ok()?),
        flags: flags.try_into().ok()?,
        ttl: Some(ttl),
        cas,
        ..Reply::new(Code::Value)
    };
    (length <= MAX_VALUE_BYTES as u64).then(|| (reply, length as usize, buffer.len() - at.len()))
}

fn skip(at: &mut &[u8], text: &[u8]) -> Option<()> {
    *at = at.strip_prefix(text)?;
    Some(())
}

/// A number in front, and past it; `None` for none and for one that could be too large.
fn digits(at: &mut &[u8]) -> Option<u64> {
    let (mut number, mut count) = (0u64, 0);
    while let Some(digit) = at
        .get(count)
        .map(|byte| byte.wrapping_sub(b'0'))
        .filter(|digit| *digit < 10)
    {
        number = number.wrapping_mul(10).wrapping_add(digit.into());
        count += 1;
    }
    *at = &at[count..];
    // u64::MAX has 20 digits; the general way knows what to make of one so large.
    (1..=19).contains(&count).then_some(number)
}

/// The reply in a line, and how long a value follows.
fn parse_line(line: &[u8]) -> Result<(Reply, Option<usize>), String> {
    let bad = || format!("unknown reply: {}", show(line));
    let (word, rest) = match line.iter().position(|&byte| byte == b' ') {
        Some(space) => (&line[..space], &line[space + 1..]),
        None => (line, &line[line.len()..]),
    };
    let code = match word {
        b"VA" => Code::Value,
        b"HD" => Code::Done,
        b"EN" | b"NF" => Code::NotFound,
        b"NS" | b"EX" => Code::NotStored,
        b"MN" => return Ok((Reply::new(Code::Noop), None)),
        b"VERSION" => return Ok((Reply::new(Code::Version(show(rest))), None)),
        b"SERVER_ERROR" => return Ok((Reply::new(Code::ServerError(show(rest))), None)),
        b"CLIENT_ERROR" | b"ERROR" => return Ok((Reply::new(Code::ClientError(show(line))), None)),
        _ => return Err(bad()),
    };
    let mut words = rest.split(|&byte| byte == b' ').filter(|word| !word.is_empty());
    let mut length = None;
    if code == Code::Value {
        let value_bytes = words.next().and_then(number).ok_or_else(bad)?;
        if value_bytes > MAX_VALUE_BYTES as u64 {
            return Err(format!("value of {value_bytes} bytes"));
        }
        length = Some(value_bytes as usize);
    }
    let mut reply = Reply::new(code);
    for word in words {
        let rest = &word[1..];
        match word[0] {
            b'O' => reply.opaque = Some(narrow(rest).ok_or_else(bad)?),
            b'f' => reply.flags = narrow(rest).ok_or_else(bad)?,
            b't' if rest == b"-1" => reply.ttl = Some(RemainingTtl::Never),
            b't' => reply.ttl = Some(RemainingTtl::Seconds(narrow(rest).ok_or_else(bad)?)),
            b'c' => reply.cas = number(rest).ok_or_else(bad)?,
            b's' => reply.size = Some(number(rest).ok_or_else(bad)?),
            b'W' => reply.won = true,
            b'X' => reply.stale = true,
            b'Z' => reply.awaited = true,
            // Newer servers may say more than was asked for.
            _ => {}
        }
    }
    Ok((reply, length))
}

fn number(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |number, &digit| match digit {
        b'0'..=b'9' => number.checked_mul(10)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

fn narrow(digits: &[u8]) -> Option<u32> {
    number(digits).and_then(|number| number.try_into().ok())
}

/// A line for an error message: readable, and short enough for a log.
fn show(line: &[u8]) -> String {
    line[..line.len().min(160)].escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(put: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        put(&mut out);
        String::from_utf8(out).unwrap()
    }

    fn decode_all(buffer: &mut BytesMut) -> Vec<Reply> {
        let mut replies = Vec::new();
        while let Decoded::Reply(reply) = decode(buffer).unwrap() {
            replies.push(reply);
        }
        replies
    }

    #[test]
    fn requests_are_what_memcached_reads() {
        assert_eq!(text(|out| put_look(out, b"k", true, 7)), "mg k v f t c u O7\r\n");
        assert_eq!(text(|out| put_look(out, b"k", false, 0)), "mg k s t c u O0\r\n");
        assert_eq!(text(|out| put_set(out, b"k", 3, 0, 0, Some(1))), "ms k 3 O1\r\n");
        assert_eq!(
            text(|out| put_set(out, b"k", 0, u32::MAX, 60, Some(u32::MAX))),
            "ms k 0 F4294967295 T60 O4294967295\r\n"
        );
        assert_eq!(text(|out| put_touch(out, b"k", 60, Some(1))), "mg k s c T60 O1\r\n");
        assert_eq!(text(|out| put_delete(out, b"k", Some(1))), "md k O1\r\n");
        assert_eq!(text(|out| put_set(out, b"k", 3, 1, 9, None)), "ms k 3 F1 T9 q\r\n");
        assert_eq!(text(|out| put_delete(out, b"k", None)), "md k q\r\n");
        assert_eq!(
            text(|out| put_give_back(out, b"k", u64::MAX, 1)),
            "md k I C18446744073709551615 O1\r\n"
        );
    }

    #[test]
    fn keys_that_could_break_a_line_travel_in_base64() {
        for (key, sent) in [
            (&b"a b"[..], "YSBi"),
            (b"\r\n", "DQo="),
            (b"\x7f", "fw=="),
            (b"\0\x01\x02\xff", "AAEC/w=="),
        ] {
            assert_eq!(text(|out| put_delete(out, key, Some(1))), format!("md {sent} b O1\r\n"));
        }
        assert_eq!(
            text(|out| put_delete(out, "größe".as_bytes(), Some(1))),
            "md größe O1\r\n"
        );
    }

    #[test]
    fn an_expiry_beyond_2038_is_not_taken_as_past() {
        assert_eq!(
            text(|out| put_touch(out, b"k", u32::MAX, Some(1))),
            "mg k s c T2147483647 O1\r\n"
        );
    }

    #[test]
    fn keys_are_limited_as_memcached_limits_them() {
        assert!(key_problem(b"").is_some());
        assert_eq!(key_problem(&[b'k'; 250]), None);
        assert!(key_problem(&[b'k'; 251]).is_some());
        assert_eq!(key_problem(&[b' '; 186]), None);
        assert!(key_problem(&[b' '; 187]).is_some());
        let longest = text(|out| {
            put_key(out, &[b' '; 186]);
        });
        assert_eq!(longest.len(), 248);
    }

    #[test]
    fn malformed_replies_are_errors_and_not_waited_for() {
        for bad in [
            "HELLO\r\n",
            "HD O1\n",
            "VA\r\n",
            "VA x\r\n",
            "VA -1\r\n",
            "VA 1073741825 O1\r\n",
            "VA 1 O1\r\nabc",
            "HD O\r\n",
            "HD O4294967296\r\n",
            "HD t1x\r\n",
            "\r\n",
        ] {
            assert!(decode(&mut BytesMut::from(bad)).is_err(), "{bad:?}");
        }
        assert!(decode(&mut BytesMut::from(&[b'x'; MAX_LINE_BYTES][..])).is_err());
        assert_eq!(decode(&mut BytesMut::from("VA 9 O1\r\nabc")), Ok(Decoded::Missing(8)));
    }

    #[test]
    fn an_ordinary_value_reads_the_same_either_way() {
        for head in [
            "VA 3 f0 t-1 c5 O1",
            "VA 3 f4294967295 t3600 c18446744073709551615 O4294967295",
            "VA 3 f0 t0 c1 O0",
            "VA 0 f7 t-1 c9999999999999999999 O2",
        ] {
            let (expected, length) = parse_line(head.as_bytes()).unwrap();
            let whole = format!("{head}\r\nabc\r\n");
            if let Some((reply, value, begin)) = value_head(whole.as_bytes()) {
                assert_eq!(
                    (reply, Some(value), begin),
                    (expected, length, head.len() + 2),
                    "{head}"
                );
            }
            for cut in 0..head.len() + 2 {
                assert!(value_head(&whole.as_bytes()[..cut]).is_none(), "{cut} of {head}");
            }
        }
        assert!(value_head(b"VA 3 f0 t-1 c5 O1\r\n").is_some());
        for other in [
            "VA 3 f0 t-1 c5 O1 W\r\n",
            "VA 3 f0 t-2 c5 O1\r\n",
            "VA 3 f4294967296 t-1 c5 O1\r\n",
            "VA 1073741825 f0 t-1 c5 O1\r\n",
            "VA  3 f0 t-1 c5 O1\r\n",
            "VA 3 f0 t-1 c O1\r\n",
            "HD f0 t-1 c5 O1\r\n",
        ] {
            assert!(value_head(other.as_bytes()).is_none(), "{other:?}");
        }
    }

    #[test]
    fn a_value_is_a_slice_of_the_buffer() {
        let mut buffer = BytesMut::from("VA 3 f1 t-1 c5 O1 W X Z b kZm9v\r\nabc\r\n");
        let range = buffer.as_ptr_range();
        let replies = decode_all(&mut buffer);
        assert_eq!(replies.len(), 1);
        assert_eq!(replies[0].value, "abc");
        assert!(range.contains(&replies[0].value.as_ptr()));
        assert_eq!(replies[0].ttl, Some(RemainingTtl::Never));
        assert!(replies[0].won && replies[0].stale && replies[0].awaited);
    }

    #[test]
    fn only_an_empty_awaited_item_is_a_placeholder() {
        let stale = |line: &str| decode_all(&mut BytesMut::from(line))[0].is_stale();
        assert!(stale("VA 0 t-1 O1 Z\r\n\r\n"));
        assert!(stale("HD s0 t-1 O1 Z\r\n"));
        assert!(stale("HD s3 t-1 O1 X Z\r\n"));
        assert!(!stale("VA 3 t-1 O1 Z\r\nabc\r\n"));
        assert!(!stale("VA 0 t-1 O1\r\n\r\n"));
    }

    prop_compose! {
        fn any_about()(
            opaque: u32, flags: u32, ttl in proptest::option::of(any::<u32>()), cas: u64, won: bool, stale: bool, awaited: bool,
        ) -> Reply {
            let ttl = Some(ttl.map_or(RemainingTtl::Never, RemainingTtl::Seconds));
            Reply { opaque: Some(opaque), flags, ttl, cas, won, stale, awaited, ..Reply::new(Code::Done) }
        }
    }

    fn any_reply() -> impl Strategy<Value = Reply> {
        let value = proptest::collection::vec(any::<u8>(), 0..300);
        prop_oneof![
            4 => (any_about(), value).prop_map(|(reply, value)| Reply {
                code: Code::Value, size: Some(value.len() as u64), value: value.into(), ..reply
            }),
            2 => any_about(),
            1 => any::<u32>().prop_map(|opaque| Reply { opaque: Some(opaque), ..Reply::new(Code::NotFound) }),
            1 => "[a-z ]{0,40}".prop_map(|text| Reply::new(Code::ServerError(text))),
            1 => Just(Reply::new(Code::Noop)),
        ]
    }

    /// The reply as memcached would send it.
    fn put_reply(out: &mut Vec<u8>, reply: &Reply) {
        match &reply.code {
            Code::Value => out.extend(format!("VA {}", reply.value.len()).bytes()),
            Code::Done => out.extend(b"HD"),
            Code::NotFound => out.extend(format!("EN O{}", reply.opaque.unwrap()).bytes()),
            Code::ServerError(text) => out.extend(format!("SERVER_ERROR {text}").bytes()),
            Code::Noop => out.extend(b"MN"),
            other => panic!("{other:?}"),
        }
        if let Some(ttl) = reply.ttl {
            let ttl = match ttl {
                RemainingTtl::Never => "-1".to_owned(),
                RemainingTtl::Seconds(seconds) => seconds.to_string(),
            };
            out.extend(format!(" f{} t{ttl} c{} O{}", reply.flags, reply.cas, reply.opaque.unwrap()).bytes());
            out.extend(
                [(reply.won, " W"), (reply.stale, " X"), (reply.awaited, " Z")]
                    .map(|(on, flag)| if on { flag } else { "" })
                    .concat()
                    .bytes(),
            );
        }
        out.extend(b"\r\n");
        if reply.code == Code::Value {
            out.extend_from_slice(&reply.value);
            out.extend(b"\r\n");
        }
    }

    proptest! {
        #[test]
        fn replies_cut_anywhere_are_read_the_same(
            replies in proptest::collection::vec(any_reply(), 0..12), cuts in proptest::collection::vec(1usize..90, 1..20),
        ) {
            let mut wire = Vec::new();
            replies.iter().for_each(|reply| put_reply(&mut wire, reply));
            let (mut buffer, mut found, mut rest) = (BytesMut::new(), Vec::new(), &wire[..]);
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (some, more) = rest.split_at(*cut.min(&rest.len()));
                buffer.extend_from_slice(some);
                found.extend(decode_all(&mut buffer));
                rest = more;
            }
            prop_assert!(buffer.is_empty());
            prop_assert_eq!(found, replies);
        }

        #[test]
        fn what_is_said_to_be_missing_never_exceeds_what_is(reply in any_reply(), cut: proptest::sample::Index) {
            let mut wire = Vec::new();
            put_reply(&mut wire, &reply);
            let cut = cut.index(wire.len());
            match decode(&mut BytesMut::from(&wire[..cut])) {
                Ok(Decoded::Missing(missing)) => prop_assert!((1..=wire.len() - cut).contains(&missing)),
                other => prop_assert!(false, "{other:?}"),
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), start in "(VA|HD|EN|ERROR)? ?[0-9]{0,3} ?[a-zA-Z]?[0-9]{0,3}(\r\n)?") {
            let mut buffer = BytesMut::from(start.as_bytes());
            buffer.extend_from_slice(&bytes);
            while let Ok(Decoded::Reply(_)) = decode(&mut buffer) {}
        }

        #[test]
        fn a_request_is_one_line_whatever_the_key(key in proptest::collection::vec(any::<u8>(), 1..186)) {
            let mut out = Vec::new();
            put_look(&mut out, &key, true, 1);
            prop_assert_eq!(out.iter().filter(|&&byte| byte == b'\n').count(), 1);
            prop_assert_eq!(out.iter().filter(|&&byte| byte == b' ').count(), if is_plain(&key) { 7 } else { 8 });
        }
    }
}
