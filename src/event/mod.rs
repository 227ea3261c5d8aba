//! The event, version 1: the key-only Kafka record that says "this key changed" (DESIGN section 6).
//!
//! The record's key is the cache key; this module reads and writes the record's *value*. It is the public way in, so
//! whatever a client may write is met here: MessagePack in any field order and integer width, or JSON. Everything is a
//! pure function of its bytes. Decoding MessagePack allocates nothing ([`decode_ref`]), and no length read from the
//! input is ever trusted with memory.

mod json;
mod msgpack;
mod trace_context;

use std::borrow::Cow;

pub use trace_context::TraceContext;

/// The only version of the event there is so far: the value of its field `v`.
pub const VERSION: u8 = 1;

/// How much of an unknown `op` an error quotes, in bytes: enough to recognise it, too little to carry a payload.
const QUOTED_BYTES: usize = 32;

/// What the writer did to the key. Add, replace, append, prepend, incr and decr are all `Set`: the relay looks at the
/// key anyway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// The key has a new value.
    Set,
    /// The key was removed.
    Delete,
    /// The key has a new expiry and its old value.
    Touch,
}

impl Op {
    /// Every op.
    pub const ALL: [Op; 3] = [Op::Set, Op::Delete, Op::Touch];

    /// The public name, as the event's field `op` spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Op::Set => "set",
            Op::Delete => "delete",
            Op::Touch => "touch",
        }
    }

    /// Two events of one key as one: a touch only if both are, for it says that the value is the old one; else a full look, with
    /// the newer one's operation otherwise.
    pub const fn merged(older: Op, newer: Op) -> Op {
        match (older, newer) {
            (Op::Touch, Op::Touch) => Op::Touch,
            (_, Op::Touch) => Op::Set,
            (_, newer) => newer,
        }
    }

    fn from_bytes(name: &[u8]) -> Option<Op> {
        match name {
            b"set" => Some(Op::Set),
            b"delete" => Some(Op::Delete),
            b"touch" => Some(Op::Touch),
            _ => None,
        }
    }
}

/// A decoded event that owns its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What the writer did.
    pub op: Op,
    /// A hint in memcached's meaning: 0 never, up to 2 592 000 seconds from the write, above that Unix time in seconds.
    pub ttl: Option<u32>,
    /// Hybrid logical clock (see [`crate::hlc`]); absent: the record's timestamp in milliseconds << 16.
    pub ver: Option<u64>,
    /// The region that wrote; absent: this one.
    pub origin: Option<Box<str>>,
    /// The write only filled the cache from a database.
    pub fill: bool,
}

impl Event {
    /// An event with every default: what `{"v":1,"op":…}` says.
    pub const fn new(op: Op) -> Event {
        Event {
            op,
            ttl: None,
            ver: None,
            origin: None,
            fill: false,
        }
    }
}

/// A decoded event that borrows from the record: the hot path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventRef<'a> {
    /// What the writer did.
    pub op: Op,
    /// See [`Event::ttl`].
    pub ttl: Option<u32>,
    /// See [`Event::ver`].
    pub ver: Option<u64>,
    /// See [`Event::origin`]. Borrowed, but for a JSON string written with escapes.
    pub origin: Option<Cow<'a, str>>,
    /// See [`Event::fill`].
    pub fill: bool,
}

impl EventRef<'_> {
    /// The region that wrote, to be compared; `None`: this one.
    pub fn origin(&self) -> Option<&str> {
        self.origin.as_deref()
    }

    /// The same event, independent of the record's bytes. Allocates only when there is an origin.
    pub fn into_event(self) -> Event {
        let origin = self.origin.map(|origin| origin.into_owned().into_boxed_str());
        Event {
            op: self.op,
            ttl: self.ttl,
            ver: self.ver,
            origin,
            fill: self.fill,
        }
    }
}

/// Why a record's value is not an event that this version understands.
///
/// None of these may be retried: the bytes never change, so the record is dead-lettered with [`EventError::reason`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EventError {
    /// The record has no value, or one of no bytes.
    #[error("the event has no value")]
    Empty,
    /// Neither a MessagePack map nor JSON; `at` is the offset in bytes of the first byte that cannot be.
    #[error("the event is neither a messagepack map nor json: byte {at}")]
    NotMessagePack { at: usize },
    /// The MessagePack ends before its map does.
    #[error("the event ends in the middle of its map, after {length} bytes")]
    Truncated { length: usize },
    /// There are bytes behind the map: whoever framed this meant something else.
    #[error("the event is followed by {count} more bytes")]
    TrailingBytes { count: usize },
    /// The first byte is `{`, but the rest is not a JSON object. Columns count from 1.
    #[error("the event is not json: line {line}, column {column}")]
    NotJson { line: usize, column: usize },
    /// `v` says a version that this code does not read.
    #[error("unknown event version {0}")]
    UnknownVersion(u64),
    /// `op` is a string, but none that is known; quoted up to 32 bytes.
    #[error("unknown op {op:?}")]
    UnknownOp { op: String },
    /// A field without default is absent.
    #[error("field {field} is missing")]
    MissingField { field: &'static str },
    /// A known field is there twice: which one was meant cannot be known.
    #[error("a field is there twice")]
    DuplicateField,
    /// A known field holds a value of another type.
    #[error("field {field} has a value of the wrong type")]
    WrongType { field: &'static str },
    /// A known field holds an integer that is negative or too large for it.
    #[error("field {field} is out of range")]
    OutOfRange { field: &'static str },
    /// A known field holds a string that is not UTF-8.
    #[error("field {field} is not utf-8")]
    NotUtf8 { field: &'static str },
}

impl EventError {
    /// The stable name for a dead-letter record's header and for counters: never carries data of the event.
    pub const fn reason(&self) -> &'static str {
        match self {
            EventError::Empty => "empty",
            EventError::NotMessagePack { .. } => "not_messagepack",
            EventError::Truncated { .. } => "truncated",
            EventError::TrailingBytes { .. } => "trailing_bytes",
            EventError::NotJson { .. } => "not_json",
            EventError::UnknownVersion(_) => "unknown_version",
            EventError::UnknownOp { .. } => "unknown_op",
            EventError::MissingField { .. } => "missing_field",
            EventError::DuplicateField => "duplicate_field",
            EventError::WrongType { .. } => "wrong_type",
            EventError::OutOfRange { .. } => "out_of_range",
            EventError::NotUtf8 { .. } => "not_utf8",
        }
    }

    fn unknown_op(op: &[u8]) -> EventError {
        let quoted = &op[..op.len().min(QUOTED_BYTES)];
        EventError::UnknownOp {
            op: String::from_utf8_lossy(quoted).into_owned(),
        }
    }
}

/// Decodes the value of a record without copying it: MessagePack (a map with string keys), or JSON when the first byte
/// is `{`.
///
/// Unknown fields are ignored whatever they hold, null counts as absent, and an unknown version is reported as such even
/// when other fields make no sense in version 1.
///
/// # Errors
///
/// See [`EventError`]; none may be retried.
pub fn decode_ref(value: &[u8]) -> Result<EventRef<'_>, EventError> {
    match value.first() {
        None => Err(EventError::Empty),
        Some(b'{') => json::decode(value),
        Some(_) => msgpack::decode(value),
    }
}

/// [`decode_ref`], owned.
///
/// # Errors
///
/// See [`EventError`]; none may be retried.
pub fn decode(value: &[u8]) -> Result<Event, EventError> {
    decode_ref(value).map(EventRef::into_event)
}

/// Appends the event to `out` as a MessagePack map with named fields; what has its default is left out.
pub fn encode(event: &Event, out: &mut Vec<u8>) {
    msgpack::encode(event, out);
}

/// What the decoders have found so far. Faults of single fields wait until the whole map is read, because the version,
/// wherever it stands, decides whether they are faults.
#[derive(Default)]
struct Fields<'a> {
    version: Option<u64>,
    op: Option<Op>,
    ttl: Option<u32>,
    ver: Option<u64>,
    origin: Option<Cow<'a, str>>,
    fill: bool,
    fault: Option<EventError>,
}

impl<'a> Fields<'a> {
    /// Takes the field's value over, or remembers the first fault.
    fn keep<T>(&mut self, found: Result<Option<T>, EventError>) -> Option<T> {
        match found {
            Ok(value) => value,
            Err(fault) => {
                self.fault.get_or_insert(fault);
                None
            }
        }
    }

    fn finish(self) -> Result<EventRef<'a>, EventError> {
        match (self.version, self.fault) {
            (Some(version), _) if version != u64::from(VERSION) => return Err(EventError::UnknownVersion(version)),
            (_, Some(fault)) => return Err(fault),
            (None, None) => return Err(EventError::MissingField { field: "v" }),
            (Some(_), None) => {}
        }
        let op = self.op.ok_or(EventError::MissingField { field: "op" })?;
        Ok(EventRef {
            op,
            ttl: self.ttl,
            ver: self.ver,
            origin: self.origin,
            fill: self.fill,
        })
    }
}

#[cfg(test)]
mod tests;
