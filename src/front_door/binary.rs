//! Commands as clients send them: memcached's binary protocol, which some clients still speak.
//!
//! As with text, what has a clear extent is memcached's to judge. Quiet commands are forwarded as what they are quiet forms
//! of, so that there always is one answer. Facts from memcached 1.6.18's proto_bin.c.

/// Bytes of every header.
pub const HEADER_BYTES: usize = 24;
/// What a request begins with; text never does.
pub const REQUEST: u8 = 0x80;
const RESPONSE: u8 = 0x81;
const MAX_KEY_BYTES: usize = 250;

/// It is done.
pub const OK: u16 = 0;
/// There is no such item.
pub const NOT_FOUND: u16 = 1;
/// The value is too large.
pub const TOO_LARGE: u16 = 3;
const INVALID: u16 = 4;
const UNKNOWN: u16 = 0x81;
/// There is no memory for it.
pub const NO_MEMORY: u16 = 0x82;
/// "Temporary failure": memcached cannot be reached, or Kafka, where that is asked for.
pub const TEMPORARY_FAILURE: u16 = 0x86;

/// Operations of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Opcode {
    /// Reads.
    Get = 0x00,
    /// Stores.
    Set = 0x01,
    /// Stores what is not there.
    Add = 0x02,
    /// Stores over what is there.
    Replace = 0x03,
    /// Removes.
    Delete = 0x04,
    /// Adds to a number.
    Increment = 0x05,
    /// Takes from a number.
    Decrement = 0x06,
    /// Ends the connection.
    Quit = 0x07,
    /// Removes everything.
    Flush = 0x08,
    /// Does nothing.
    Noop = 0x0a,
    /// Says the server's version.
    Version = 0x0b,
    /// Reads; the answer has the key.
    GetKey = 0x0c,
    /// Adds behind.
    Append = 0x0e,
    /// Adds in front.
    Prepend = 0x0f,
    /// Says the server's counters.
    Stat = 0x10,
    /// Gives a new expiry.
    Touch = 0x1c,
    /// Reads, and gives a new expiry.
    GetAndTouch = 0x1d,
    /// The same; the answer has the key.
    GetKeyAndTouch = 0x23,
    /// Which ways of logging in there are.
    SaslList = 0x20,
    /// Logs in.
    SaslAuth = 0x21,
    /// Goes on logging in.
    SaslStep = 0x22,
}

impl Opcode {
    /// The operation of this number, and whether it is the quiet form of it.
    fn of(number: u8) -> Option<(Opcode, bool)> {
        use Opcode::*;
        let loud = |opcode| Some((opcode, false));
        let quiet = |opcode| Some((opcode, true));
        match number {
            0x00 => loud(Get),
            0x01 => loud(Set),
            0x02 => loud(Add),
            0x03 => loud(Replace),
            0x04 => loud(Delete),
            0x05 => loud(Increment),
            0x06 => loud(Decrement),
            0x07 => loud(Quit),
            0x08 => loud(Flush),
            0x09 => quiet(Get),
            0x0a => loud(Noop),
            0x0b => loud(Version),
            0x0c => loud(GetKey),
            0x0d => quiet(GetKey),
            0x0e => loud(Append),
            0x0f => loud(Prepend),
            0x10 => loud(Stat),
            0x11 => quiet(Set),
            0x12 => quiet(Add),
            0x13 => quiet(Replace),
            0x14 => quiet(Delete),
            0x15 => quiet(Increment),
            0x16 => quiet(Decrement),
            0x17 => quiet(Quit),
            0x18 => quiet(Flush),
            0x19 => quiet(Append),
            0x1a => quiet(Prepend),
            0x1c => loud(Touch),
            0x1d => loud(GetAndTouch),
            0x1e => quiet(GetAndTouch),
            0x20 => loud(SaslList),
            0x21 => loud(SaslAuth),
            0x22 => loud(SaslStep),
            0x23 => loud(GetKeyAndTouch),
            0x24 => quiet(GetKeyAndTouch),
            _ => None,
        }
    }

    /// Whether it may change what memcached holds of its key, so that there may be an event.
    pub const fn writes(self) -> bool {
        !matches!(
            self,
            Opcode::Get | Opcode::GetKey | Opcode::Flush | Opcode::Version | Opcode::Stat
        )
    }

    /// Whether it reads a value: its quiet form is silent about a miss, the others' about a success.
    pub const fn reads(self) -> bool {
        matches!(
            self,
            Opcode::Get | Opcode::GetKey | Opcode::GetAndTouch | Opcode::GetKeyAndTouch
        )
    }
}

/// A command that is forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// What it asks for, said aloud.
    pub opcode: Opcode,
    /// The number that the client sent, which its answer carries.
    pub sent: u8,
    /// It is the quiet form.
    pub quiet: bool,
    /// Bytes that it takes, its value included.
    pub length: usize,
    /// Where its key begins and ends; it may be empty.
    pub key: (usize, usize),
    /// Its expiry, if it has one.
    pub ttl: Option<u32>,
    /// What the client tells its answers apart by.
    pub opaque: [u8; 4],
}

/// What is at the beginning of the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// The beginning of a command: it takes so many bytes more at least.
    Incomplete {
        /// At least 1.
        missing: usize,
    },
    /// A command that is answered here.
    Answer {
        /// Bytes that it takes; they need not all be there yet.
        length: usize,
        /// What is answered; `None`: nothing.
        answer: Option<Answer>,
        /// The connection is closed behind it.
        close: bool,
    },
    /// A command for memcached.
    Forward(Command),
    /// A command whose value is beyond the limit; its header and key are there, and all of its value is to be thrown away.
    TooLarge(Command),
    /// This is no memcached client: its connection is closed at once.
    Nonsense,
}

/// A response that is made here: a header, and a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The request's number.
    pub opcode: u8,
    /// How it ended.
    pub status: u16,
    /// The request's.
    pub opaque: [u8; 4],
    /// Why.
    pub text: &'static str,
}

impl Answer {
    /// Adds it to `out`.
    pub fn put(&self, out: &mut Vec<u8>) {
        put_response(out, self.opcode, self.status, self.opaque, self.text.as_bytes());
    }
}

/// Adds a response that has nothing but a text.
pub fn put_response(out: &mut Vec<u8>, opcode: u8, status: u16, opaque: [u8; 4], text: &[u8]) {
    let mut header = [0; HEADER_BYTES];
    (header[0], header[1]) = (RESPONSE, opcode);
    header[6..8].copy_from_slice(&status.to_be_bytes());
    header[8..12].copy_from_slice(&(text.len() as u32).to_be_bytes());
    header[12..16].copy_from_slice(&opaque);
    out.extend_from_slice(&header);
    out.extend_from_slice(text);
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Reads one command from the beginning of what a client has sent. `value_bytes` is the largest value.
pub fn parse(bytes: &[u8], value_bytes: usize) -> Parsed {
    if bytes.len() < HEADER_BYTES {
        // A first byte that no request begins with will not become one.
        return match bytes.first() {
            Some(&first) if first != REQUEST => Parsed::Nonsense,
            _ => Parsed::Incomplete {
                missing: HEADER_BYTES - bytes.len(),
            },
        };
    }
    if bytes[0] != REQUEST {
        return Parsed::Nonsense;
    }
    let (number, extras) = (bytes[1], usize::from(bytes[4]));
    let (key, body) = (usize::from(u16_at(bytes, 2)), u32_at(bytes, 8) as usize);
    let opaque = [bytes[12], bytes[13], bytes[14], bytes[15]];
    let front = HEADER_BYTES + extras + key;
    if bytes.len() < front {
        return Parsed::Incomplete {
            missing: front - bytes.len(),
        };
    }
    let answer = |status, text| Answer {
        opcode: number,
        status,
        opaque,
        text,
    };
    let refuse = |status, text, length, close| Parsed::Answer {
        length,
        answer: Some(answer(status, text)),
        close,
    };
    if key + extras > body {
        return refuse(UNKNOWN, "Unknown command", front, true);
    }
    let invalid = refuse(INVALID, "Invalid arguments", front, true);
    if key > MAX_KEY_BYTES {
        return invalid;
    }
    let Some((opcode, quiet)) = Opcode::of(number) else {
        // memcached throws the whole body away, and what it has read of it before comes on top.
        return refuse(UNKNOWN, "Unknown command", front + body, false);
    };
    let value = body - key - extras;
    let (bare, keyed) = (body == 0, key > 0);
    let valid = match opcode {
        Opcode::Version | Opcode::Noop | Opcode::Quit | Opcode::SaslList => bare,
        Opcode::Flush => key == 0 && value == 0 && (extras == 0 || extras == 4),
        Opcode::Set | Opcode::Add | Opcode::Replace => extras == 8 && keyed,
        Opcode::Get | Opcode::GetKey | Opcode::Delete => extras == 0 && keyed && value == 0,
        Opcode::Increment | Opcode::Decrement => extras == 20 && keyed && value == 0,
        Opcode::Append | Opcode::Prepend => extras == 0 && keyed,
        // memcached would read what follows the key here as the next command, and nobody else's commands may stand there.
        Opcode::Stat => extras == 0 && value == 0,
        Opcode::Touch | Opcode::GetAndTouch | Opcode::GetKeyAndTouch => extras == 4 && keyed && value == 0,
        Opcode::SaslAuth | Opcode::SaslStep => extras == 0 && keyed,
    };
    if !valid {
        return invalid;
    }
    match opcode {
        Opcode::Noop => return refuse(OK, "", front, false),
        Opcode::Quit => {
            return Parsed::Answer {
                length: front,
                answer: (!quiet).then(|| answer(OK, "")),
                close: true,
            };
        }
        // As memcached does that nobody has to log in to.
        Opcode::SaslList | Opcode::SaslAuth | Opcode::SaslStep => {
            return refuse(UNKNOWN, "Unknown command", front + value, false);
        }
        _ => {}
    }
    let expiry_at = match opcode {
        Opcode::Set | Opcode::Add | Opcode::Replace => Some(HEADER_BYTES + 4),
        Opcode::Touch | Opcode::GetAndTouch | Opcode::GetKeyAndTouch => Some(HEADER_BYTES),
        _ => None,
    };
    let command = Command {
        opcode,
        sent: number,
        quiet,
        length: front + value,
        key: (HEADER_BYTES + extras, front),
        ttl: expiry_at.map(|at| u32_at(bytes, at)),
        opaque,
    };
    if value > value_bytes {
        return Parsed::TooLarge(command);
    }
    match command.length.checked_sub(bytes.len()) {
        None | Some(0) => Parsed::Forward(command),
        Some(missing) => Parsed::Incomplete { missing },
    }
}

/// How long a response is, once its header is there.
pub fn response_length(bytes: &[u8]) -> Result<Option<usize>, String> {
    if bytes.len() < HEADER_BYTES {
        return Ok(None);
    }
    if bytes[0] != RESPONSE {
        return Err(format!("a response begins with {:#04x}", bytes[0]));
    }
    Ok(Some(HEADER_BYTES + u32_at(bytes, 8) as usize))
}

/// Whether a response is to a request with this operation and this opaque.
pub fn answers(response: &[u8], opcode: Opcode, opaque: [u8; 4]) -> bool {
    response[1] == opcode as u8 && response[12..16] == opaque
}

/// How a request ended, by the header of its response.
pub fn status(response: &[u8]) -> u16 {
    u16_at(response, 6)
}

/// Whether this is the last response to a `stat`.
pub fn ends_stats(response: &[u8]) -> bool {
    u16_at(response, 2) == 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(number: u8, extras: &[u8], key: &[u8], value: &[u8]) -> Vec<u8> {
        let mut out = vec![0; HEADER_BYTES];
        (out[0], out[1], out[4]) = (REQUEST, number, extras.len() as u8);
        out[2..4].copy_from_slice(&(key.len() as u16).to_be_bytes());
        out[8..12].copy_from_slice(&((extras.len() + key.len() + value.len()) as u32).to_be_bytes());
        out[12..16].copy_from_slice(b"mine");
        [out, extras.to_vec(), key.to_vec(), value.to_vec()].concat()
    }

    #[test]
    fn a_quiet_set_is_a_set_with_its_expiry() {
        let bytes = request(0x11, &[0, 0, 0, 7, 0, 0, 0, 60], b"key", b"value");
        let Parsed::Forward(command) = parse(&bytes, 1024) else {
            panic!()
        };
        assert_eq!(
            (command.opcode, command.sent, command.quiet, command.length),
            (Opcode::Set, 0x11, true, bytes.len())
        );
        assert_eq!(
            (&bytes[command.key.0..command.key.1], command.ttl),
            (&b"key"[..], Some(60))
        );
        assert!(matches!(parse(&bytes, 4), Parsed::TooLarge(_)));
    }

    #[test]
    fn what_memcached_would_misread_never_gets_there() {
        for wrong in [
            request(0x10, b"", b"reset", b"x"),
            request(0x1c, &[0; 4], b"k", b"x"),
            request(0x00, b"", b"", b""),
            request(0x01, b"", b"k", b"v"),
            request(0x00, b"", &[b'k'; 251], b""),
        ] {
            assert!(
                matches!(parse(&wrong, 1024), Parsed::Answer { close: true, answer: Some(answer), .. } if answer.status == INVALID)
            );
        }
    }

    #[test]
    fn nobody_logs_in() {
        let bytes = request(0x21, b"", b"PLAIN", b"\0user\0secret");
        let Parsed::Answer {
            length,
            answer: Some(answer),
            close: false,
        } = parse(&bytes, 1024)
        else {
            panic!()
        };
        assert_eq!(
            (length, answer.status, answer.text),
            (bytes.len(), UNKNOWN, "Unknown command")
        );
        let mut out = Vec::new();
        answer.put(&mut out);
        assert_eq!((response_length(&out), status(&out)), (Ok(Some(out.len())), UNKNOWN));
        assert_eq!(&out[12..16], b"mine");
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic_and_what_is_missing_is_missing(mut bytes in proptest::collection::vec(any::<u8>(), 0..80), number: u8) {
            if let Some(first) = bytes.first_mut() {
                *first = REQUEST;
            }
            if let Some(second) = bytes.get_mut(1) {
                *second = number;
            }
            match parse(&bytes, 40) {
                Parsed::Incomplete { missing } => prop_assert!(missing > 0),
                Parsed::Forward(command) => prop_assert!(command.length <= bytes.len() && command.key.1 <= command.length),
                _ => {}
            }
        }
    }
}
