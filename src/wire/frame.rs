//! Frames: the envelope, the control frames, and a decoder that takes bytes as they come.

use bytes::{Buf, BufMut, BytesMut};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::pack;
use super::{Ack, BatchFrame, Limits, MAX_CONTROL_BYTES, VERSION, WireError};

const HELLO: u8 = 1;
const HELLO_ACK: u8 = 2;
const BATCH: u8 = 3;
const ACK: u8 = 4;
const PING: u8 = 5;
const PONG: u8 = 6;
const GO_AWAY: u8 = 7;

/// Flag bit 0: who does not know the kind must not go on.
const CRITICAL: u8 = 1;

/// Length, kind and flags.
const ENVELOPE: usize = 6;

/// The buffer grows by so much at a time towards a long frame: what a peer declares costs memory only as it arrives.
const GROWTH: usize = 256 * 1024;

/// Control frames are a map of scalars, strings and lists: deeper unknown fields are not worth the stack.
const MAX_DEPTH: usize = 32;

/// All that is sent between a relay and an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The relay's first frame.
    Hello(Hello),
    /// The agent's first frame.
    HelloAck(HelloAck),
    /// Items.
    Batch(BatchFrame),
    /// Items finished.
    Ack(Ack),
    /// Asks for a sign of life.
    Ping(Ping),
    /// A sign of life.
    Pong(Pong),
    /// The sender is about to close and takes no more.
    GoAway(GoAway),
}

/// What the relay offers and intends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The oldest protocol version that the relay speaks.
    pub min_version: u16,
    /// The newest.
    pub max_version: u16,
    /// Name and version of the software, for logs.
    #[serde(default)]
    pub software: String,
    /// The caches it will write. Items name a cache by its place in this list.
    pub caches: Vec<String>,
    /// The regions that items may originate from. Items name one by its place in this list.
    #[serde(default)]
    pub regions: Vec<String>,
    /// What else it can do, e.g. [`super::FEATURE_LZ4`].
    #[serde(default)]
    pub features: Vec<String>,
    /// The largest frame that it takes, in bytes after the length.
    pub max_frame_bytes: u32,
}

impl Hello {
    /// The newest version that both ends speak, if there is one.
    pub fn agreed_version(&self) -> Option<u16> {
        (self.min_version..=self.max_version)
            .contains(&VERSION)
            .then_some(VERSION)
    }
}

/// What the agent accepts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloAck {
    /// The protocol version of the session.
    pub version: u16,
    /// Name and version of the software, for logs.
    #[serde(default)]
    pub software: String,
    /// Names the session in the agent's stamps and logs.
    pub session: u64,
    /// The agent's tick when the session began. No look made before it may be sent.
    pub tick: u64,
    /// Bytes of unacknowledged batch payload, as sent, that the relay may have under way.
    pub window_bytes: u64,
    /// Those of the relay's features that the agent agrees to.
    #[serde(default)]
    pub features: Vec<String>,
    /// The agent's limits: see [`Limits`].
    pub max_frame_bytes: u32,
    /// The most items in a batch.
    pub max_batch_items: u32,
    /// The largest batch, decompressed.
    pub max_batch_raw_bytes: u32,
    /// One status per cache of the Hello, in its order.
    pub caches: Vec<CacheStatus>,
}

/// Whether the caller may write a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheStatus {
    /// It may.
    Accepted,
    /// The agent has it, but not for this caller.
    Forbidden,
    /// The agent does not know it (yet): the relay pauses it. A status of a later version reads as this one, which drops nothing.
    #[serde(other)]
    Unknown,
}

/// Asks for a [`Pong`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping {
    /// Repeated by the Pong.
    pub id: u64,
    /// The relay's wall clock, in microseconds since the Unix epoch; repeated by the Pong.
    pub sent_us: u64,
    /// The agent's wall clock minus the relay's, in microseconds, as the pings before this one measured it; absent before the
    /// first answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset_us: Option<i64>,
}

/// The answer to a [`Ping`]: with the time it arrives, it gives round-trip time and clock offset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// The Ping's.
    pub id: u64,
    /// The Ping's.
    pub sent_us: u64,
    /// When the Ping arrived, by the agent's wall clock, in microseconds since the Unix epoch.
    pub received_us: u64,
    /// When the Pong left, by the same clock.
    pub answered_us: u64,
    /// The agent's tick.
    pub tick: u64,
}

/// The sender's last words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoAway {
    /// Why, for logs.
    #[serde(default)]
    pub reason: String,
}

/// Appends a frame to `out`.
///
/// The peer's limits are the caller's business: a batch's payload plus [`super::BATCH_OVERHEAD`] is at least its frame's size.
pub fn encode(frame: &Frame, out: &mut BytesMut) {
    match frame {
        Frame::Hello(hello) => encode_map(HELLO, CRITICAL, hello, out),
        Frame::HelloAck(ack) => encode_map(HELLO_ACK, CRITICAL, ack, out),
        Frame::Batch(batch) => {
            encode_batch_head(batch, out);
            out.extend_from_slice(&batch.payload);
        }
        Frame::Ack(ack) => envelope(ACK, CRITICAL, out, |out| ack.encode(out)),
        // Who does not know these loses nothing by skipping them.
        Frame::Ping(ping) => encode_map(PING, 0, ping, out),
        Frame::Pong(pong) => encode_map(PONG, 0, pong, out),
        Frame::GoAway(away) => encode_map(GO_AWAY, 0, away, out),
    }
}

/// Appends all of a batch's frame but its payload, which must follow: so that a payload can be written as it is, uncopied.
pub fn encode_batch_head(batch: &BatchFrame, out: &mut BytesMut) {
    let mut head = pack::Fixed::new();
    batch.encode_head(&mut head);
    let head = head.written();
    out.reserve(ENVELOPE + head.len());
    out.put_u32(pack::len32(2 + head.len() + batch.payload.len()));
    out.put_u8(BATCH);
    out.put_u8(CRITICAL);
    out.put_slice(head);
}

fn encode_map<T: Serialize>(kind: u8, flags: u8, map: &T, out: &mut BytesMut) {
    envelope(kind, flags, out, |out| {
        let result = rmp_serde::encode::write_named(&mut out.writer(), map);
        // It fails when the writer does or a length is unknown; `BytesMut` grows and vectors know theirs.
        debug_assert!(result.is_ok());
    });
}

fn envelope(kind: u8, flags: u8, out: &mut BytesMut, body: impl FnOnce(&mut BytesMut)) {
    let start = out.len();
    out.put_u32(0);
    out.put_u8(kind);
    out.put_u8(flags);
    body(out);
    let length = pack::len32(out.len() - start - 4);
    out[start..start + 4].copy_from_slice(&length.to_be_bytes());
}

/// Turns the bytes of one connection into frames.
#[derive(Debug)]
pub struct Decoder {
    limits: Limits,
    skipped: u64,
}

impl Decoder {
    /// A decoder for one connection. The limits are this end's own.
    pub fn new(limits: Limits) -> Decoder {
        Decoder { limits, skipped: 0 }
    }

    /// Frames passed over because their kind is not known and not critical.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Takes one frame off the front of `buf`; `None` if it is not all there yet. A batch's payload is a slice of the buffer.
    ///
    /// A frame's length is checked as soon as its four bytes are there, before anything is allocated. Then room is made for
    /// what is missing, a quarter of a megabyte at a time.
    ///
    /// # Errors
    ///
    /// Any [`WireError`]. The stream is out of step afterwards: close the connection and don't call again.
    pub fn decode(&mut self, buf: &mut BytesMut) -> Result<Option<Frame>, WireError> {
        loop {
            let Some(length) = buf.first_chunk::<4>().copied().map(u32::from_be_bytes) else {
                return Ok(None);
            };
            self.check_length(length, self.limits.max_frame_bytes)?;
            let &[_, _, _, _, kind, flags, ..] = &buf[..] else {
                return Ok(None);
            };
            match kind {
                BATCH | ACK => {}
                HELLO | HELLO_ACK | PING | PONG | GO_AWAY => self.check_length(length, MAX_CONTROL_BYTES)?,
                _ if flags & CRITICAL != 0 => return Err(WireError::UnknownKind { kind }),
                _ => {}
            }
            let end = 4 + length as usize;
            if buf.len() < end {
                buf.reserve((end - buf.len()).min(GROWTH));
                return Ok(None);
            }
            if kind == BATCH {
                let body = buf.split_to(end).freeze().slice(ENVELOPE..);
                return BatchFrame::decode(&body, &self.limits).map(|batch| Some(Frame::Batch(batch)));
            }
            let frame = self.decode_body(kind, &buf[ENVELOPE..end])?;
            buf.advance(end);
            if frame.is_some() {
                return Ok(frame);
            }
            self.skipped += 1;
        }
    }

    fn check_length(&self, length: u32, limit: u32) -> Result<(), WireError> {
        if length > limit {
            return Err(WireError::FrameTooLong { length, limit });
        }
        if (length as usize) < ENVELOPE - 4 {
            return Err(WireError::FrameTooShort { length });
        }
        Ok(())
    }

    fn decode_body(&self, kind: u8, body: &[u8]) -> Result<Option<Frame>, WireError> {
        let frame = match kind {
            HELLO => Frame::Hello(decode_map("hello", body)?),
            HELLO_ACK => Frame::HelloAck(decode_map("hello_ack", body)?),
            ACK => Frame::Ack(Ack::decode(body, &self.limits)?),
            PING => Frame::Ping(decode_map("ping", body)?),
            PONG => Frame::Pong(decode_map("pong", body)?),
            GO_AWAY => Frame::GoAway(decode_map("go_away", body)?),
            _ => return Ok(None),
        };
        Ok(Some(frame))
    }
}

fn decode_map<T: DeserializeOwned>(frame: &'static str, body: &[u8]) -> Result<T, WireError> {
    let mut deserializer = rmp_serde::Deserializer::from_read_ref(body);
    deserializer.set_max_depth(MAX_DEPTH);
    T::deserialize(&mut deserializer).map_err(|source| WireError::MalformedControl {
        frame,
        source: Box::new(source),
    })
}
