//! What a session makes of its client's bytes: commands for the servers, and answers given here.

use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;

use crate::actors::front_door_upstream::{Expect, Sent, failure};
use crate::event::TraceContext;
use crate::front_door::answers::{Asked, Piece};
use crate::front_door::base64;
use crate::front_door::binary::{self, Opcode};
use crate::front_door::text::{self, Hush, Parsed, Span, TextLimits, Verb};
use crate::telemetry::RateLimit;
use crate::telemetry::event_trace::random_id;

use super::FrontDoorSession;

/// The longest list of keys.
const MAX_LIST_BYTES: usize = 1 << 20;
/// A list of keys that is longer is sent in pieces, if the server would not wait for it.
const PIECE_BYTES: usize = text::MAX_LINE_BYTES - 64;
/// Behind what is not as clients write it.
const BARRIER: &[u8] = b"mn\r\n";
const TOO_LARGE: &[u8] = b"SERVER_ERROR object too large for cache\r\n";
const KAFKA_AWAY: &str = "kafka is away, the write was not made";
static FLUSHED: RateLimit = RateLimit::new();

/// Commands for one server, from one read.
#[derive(Default)]
pub(super) struct Building {
    pub parts: Vec<Sent>,
    pub asked: Vec<Expect>,
    pub keys: Vec<u8>,
    pub traces: Vec<(u32, TraceContext)>,
    /// What is sent as it was read, and is not among the parts yet.
    run: Option<(usize, usize)>,
    pub bytes: usize,
}

impl Building {
    fn as_is(&mut self, data: &Bytes, start: usize, end: usize) {
        self.bytes += end - start;
        match &mut self.run {
            Some((_, last)) if *last == start => *last = end,
            _ => {
                self.close(data);
                self.run = Some((start, end));
            }
        }
    }

    fn own(&mut self, data: &Bytes, bytes: Vec<u8>) {
        self.close(data);
        self.bytes += bytes.len();
        self.parts.push(Sent::Bytes(bytes.into()));
    }

    pub fn close(&mut self, data: &Bytes) {
        if let Some((start, end)) = self.run.take() {
            self.parts.push(Sent::Bytes(data.slice(start..end)));
        }
    }

    /// Asks for one key with `get`, perhaps together with others.
    fn get(&mut self, data: &Bytes, key: &[u8], mut expect: Expect) {
        self.close(data);
        self.bytes += key.len();
        (expect.single, expect.key) = (true, self.key(key, false));
        let at = self.asked.len() as u32;
        self.asked.push(expect);
        match self.parts.last_mut() {
            Some(Sent::Gets(places)) if places.end == at => places.end += 1,
            _ => self.parts.push(Sent::Gets(at..at + 1)),
        }
    }

    /// The command that is asked next begins a trace.
    fn trace(&mut self) {
        let context = TraceContext {
            trace_id: random_id(),
            span_id: random_id(),
            flags: TraceContext::SAMPLED,
        };
        self.traces.push((self.asked.len() as u32, context));
    }

    /// Takes a copy of a key.
    fn key(&mut self, key: &[u8], is_base64: bool) -> Span {
        let at = self.keys.len();
        // One that is not base64 is refused by memcached.
        if !is_base64 || !base64::decode(key, &mut self.keys) {
            self.keys.extend_from_slice(key);
        }
        Span {
            at: at as u32,
            length: (self.keys.len() - at) as u32,
        }
    }
}

impl FrontDoorSession {
    fn count(&self, verb: Verb) {
        self.parts.shared.counts[self.parts.cache].commands[verb as usize].fetch_add(1, Relaxed);
    }

    /// Whether a write must be refused now, since its event could not be produced.
    fn refuses(&self) -> bool {
        let shared = &self.parts.shared;
        let refuses = shared.refuses_one(self.parts.cache);
        if refuses {
            shared.counts[self.parts.cache].refused.fetch_add(1, Relaxed);
        }
        refuses
    }

    /// Whether a trace begins with this write.
    fn traces(&mut self, opaque: &[u8]) -> bool {
        let prefix = self.parts.shared.config.front_door.trace_opaque.as_ref();
        self.sampler.draw() || prefix.is_some_and(|prefix| opaque.starts_with(prefix.as_bytes()))
    }

    fn fills(&self, verb: Verb, adds: bool) -> bool {
        let cache = &self.parts.shared.config.caches[self.parts.cache];
        self.parts.fills || cache.fills(verb.name()) || (adds && cache.fills(Verb::Add.name()))
    }

    fn server_of(&self, key: &[u8]) -> usize {
        match self.parts.text.len() {
            1 => 0,
            _ => self.parts.shared.rings[self.parts.cache].server_of(key),
        }
    }

    /// The server of a key as a text client sends it; without a key, the first one.
    fn server_of_text(&self, key: &[u8], is_base64: bool) -> usize {
        match (key.is_empty(), is_base64) {
            (true, _) => 0,
            (false, false) => self.server_of(key),
            // As memcached sees it.
            (false, true) => {
                let mut plain = Vec::new();
                match base64::decode(key, &mut plain) {
                    true => self.server_of(&plain),
                    false => 0,
                }
            }
        }
    }

    /// Takes one command of a text client; gives the bytes that it takes, or nothing if it is not whole.
    pub(super) fn take_text(&mut self, data: &Bytes, at: usize, building: &mut [Building]) -> Option<usize> {
        let limits = TextLimits {
            line_bytes: MAX_LIST_BYTES,
            value_bytes: self.parts.shared.config.caches[self.parts.cache].max_value_bytes,
        };
        let bytes = &data[at..];
        let command = match text::parse(bytes, limits) {
            Parsed::Forward(command) => command,
            Parsed::Incomplete { missing } => {
                self.missing = missing;
                return None;
            }
            Parsed::Answer { length, answer } => {
                self.order.answer(Bytes::from_static(answer));
                return Some(length);
            }
            Parsed::TooLarge(command) => {
                self.text_too_large(data, bytes, &command, building);
                return Some(command.length);
            }
            Parsed::Quit | Parsed::Nonsense => {
                self.leaving = true;
                return Some(bytes.len());
            }
        };
        self.count(command.verb);
        let writes = command.verb.writes() && (command.verb != Verb::MetaGet || command.touches);
        if writes && self.refuses() {
            if command.hush != Hush::Everything {
                self.order.answer(format!("SERVER_ERROR {KAFKA_AWAY}\r\n").into());
            }
            return Some(command.length);
        }
        match command.verb {
            Verb::FlushAll | Verb::Verbosity => self.text_to_all(data, at, &command, building),
            verb if verb.takes_keys() => self.text_list(data, at, &command, building),
            _ => self.text_keyed(data, at, &command, writes, building),
        }
        Some(command.length)
    }

    fn expect(&self, command: &text::Command, piece: Piece, together: bool) -> Expect {
        Expect {
            asked: Asked::Text(command.verb),
            sent: 0,
            opaque: [0; 4],
            hush: command.hush,
            piece,
            together,
            barrier: false,
            touches: command.touches,
            fill: self.fills(command.verb, command.adds),
            silent: false,
            single: false,
            key: Span::default(),
            ttl: command.ttl,
        }
    }

    /// A command of one key, or of none: then the first server answers it.
    fn text_keyed(
        &mut self,
        data: &Bytes,
        at: usize,
        command: &text::Command,
        writes: bool,
        building: &mut [Building],
    ) {
        let bytes = &data[at..];
        let key = command.key.of_bytes(bytes);
        let server = self.server_of_text(key, command.base64);
        let together = self.order.ask(server as u32);
        let mut expect = self.expect(command, Piece::Whole, together);
        // Whether a counter was made cannot be told from the answer: with both flags memcached itself decides what it says.
        let own = command.verb == Verb::MetaArithmetic && command.hush == Hush::Usual && command.creates;
        expect.barrier = own || command.odd;
        if own {
            expect.hush = Hush::Nothing;
        }
        let building = &mut building[server];
        if writes {
            expect.key = building.key(key, command.base64);
            if self.traces(command.opaque.of_bytes(bytes)) {
                building.trace();
            }
        }
        match command.cut.filter(|_| !own) {
            None => building.as_is(data, at, at + command.length),
            Some(cut) => {
                let cut = cut.range();
                let value = command.head;
                let mut line = Vec::with_capacity(value);
                line.extend_from_slice(&bytes[..cut.start]);
                line.extend_from_slice(&bytes[cut.end..value]);
                building.own(data, line);
                if value < command.length {
                    building.as_is(data, at + value, at + command.length);
                }
            }
        }
        if expect.barrier {
            building.own(data, BARRIER.to_vec());
        }
        building.asked.push(expect);
    }

    fn text_to_all(&mut self, data: &Bytes, at: usize, command: &text::Command, building: &mut [Building]) {
        let bytes = &data[at..];
        if command.verb == Verb::FlushAll {
            self.flushed();
        }
        let mut line = command.line.of_bytes(bytes).to_vec();
        if let Some(cut) = command.cut {
            line.drain(cut.range());
        }
        line.extend_from_slice(b"\r\n");
        line.extend_from_slice(BARRIER);
        let servers = building.len();
        for (server, building) in building.iter_mut().enumerate() {
            let together = self.order.ask(server as u32);
            building.own(data, line.clone());
            building.asked.push(Expect {
                barrier: true,
                ..self.expect(command, piece(server, servers), together)
            });
        }
    }

    fn flushed(&self) {
        let cache = &self.parts.shared.config.caches[self.parts.cache].name;
        self.parts.shared.counts[self.parts.cache].flushes.fetch_add(1, Relaxed);
        if let Some(unsaid) = FLUSHED.due(cache) {
            tracing::warn!(
                cache,
                unsaid,
                "flush_all at the front door: this region's servers are emptied, no peer's are"
            );
        }
    }

    fn text_list(&mut self, data: &Bytes, at: usize, command: &text::Command, building: &mut [Building]) {
        let bytes = &data[at..];
        if command.gets_one() {
            let key = command.key.of_bytes(bytes);
            let server = self.server_of(key);
            let together = self.order.ask(server as u32);
            building[server].get(data, key, self.expect(command, Piece::Whole, together));
            return;
        }
        let waits = matches!(command.verb, Verb::Get | Verb::Gets);
        let gives = command.verb.writes();
        let one = building.len() == 1 && (waits || command.length <= text::MAX_LINE_BYTES);
        if one || command.key.is_empty() {
            let together = self.order.ask(0);
            let mut expect = self.expect(command, Piece::Whole, together);
            if gives && !command.key.is_empty() {
                let keys = &command.line.of_bytes(bytes)[command.key.at as usize..];
                expect.key = building[0].key(keys, false);
            }
            building[0].as_is(data, at, at + command.length);
            if command.odd {
                expect.barrier = true;
                building[0].own(data, BARRIER.to_vec());
            }
            building[0].asked.push(expect);
            return;
        }
        // Pieces of keys that follow one another and have the same server.
        let head = text::head(bytes, command);
        let mut pieces: Vec<(usize, Vec<u8>)> = Vec::new();
        for key in text::keys(bytes, command) {
            let server = self.server_of(key);
            match pieces.last_mut() {
                Some((last, piece)) if *last == server && piece.len() + key.len() < PIECE_BYTES => {
                    piece.push(b' ');
                    piece.extend_from_slice(key);
                }
                _ => pieces.push((server, [head, key].concat())),
            }
        }
        let count = pieces.len();
        for (n, (server, mut line)) in pieces.into_iter().enumerate() {
            let together = self.order.ask(server as u32);
            let mut expect = self.expect(command, piece(n, count), together);
            let building = &mut building[server];
            if gives {
                expect.key = building.key(&line[head.len()..], false);
            }
            line.extend_from_slice(b"\r\n");
            building.own(data, line);
            building.asked.push(expect);
        }
    }

    /// memcached says so too, and drops the old value for a set: so it is deleted.
    fn text_too_large(&mut self, data: &Bytes, bytes: &[u8], command: &text::Command, building: &mut [Building]) {
        self.count(command.verb);
        if command.verb.drops_when_refused() && !self.refuses() {
            let key = command.key.of_bytes(bytes);
            let (verb, line) = match command.base64 {
                true => (Verb::MetaDelete, [b"md ", key, b" b\r\n"].concat()),
                false => (Verb::Delete, [b"delete ", key, b"\r\n"].concat()),
            };
            let server = self.server_of_text(key, command.base64);
            let together = self.order.ask(server as u32);
            let building = &mut building[server];
            let expect = Expect {
                asked: Asked::Text(verb),
                silent: true,
                hush: Hush::Everything,
                key: building.key(key, command.base64),
                ttl: None,
                ..self.expect(command, Piece::Whole, together)
            };
            building.own(data, line);
            building.asked.push(expect);
        }
        if command.hush != Hush::Everything {
            self.order.answer(Bytes::from_static(TOO_LARGE));
        }
    }

    /// Takes one command of a binary client; gives the bytes that it takes, or nothing if it is not whole.
    pub(super) fn take_binary(&mut self, data: &Bytes, at: usize, building: &mut [Building]) -> Option<usize> {
        let limit = self.parts.shared.config.caches[self.parts.cache].max_value_bytes;
        let bytes = &data[at..];
        let (command, too_large) = match binary::parse(bytes, limit) {
            binary::Parsed::Forward(command) => (command, false),
            binary::Parsed::TooLarge(command) => (command, true),
            binary::Parsed::Incomplete { missing } => {
                self.missing = missing;
                return None;
            }
            binary::Parsed::Answer { length, answer, close } => {
                if let Some(answer) = answer {
                    let mut out = Vec::new();
                    answer.put(&mut out);
                    self.order.answer(out.into());
                }
                if close {
                    self.leaving = true;
                    return Some(bytes.len());
                }
                return Some(length);
            }
            binary::Parsed::Nonsense => {
                self.leaving = true;
                return Some(bytes.len());
            }
        };
        let verb = verb_of(command.opcode);
        self.count(verb);
        let expect = Expect {
            asked: Asked::Binary(command.opcode),
            sent: command.sent,
            opaque: command.opaque,
            hush: if command.quiet { Hush::Usual } else { Hush::Nothing },
            piece: Piece::Whole,
            together: false,
            barrier: false,
            touches: false,
            fill: self.fills(verb, false),
            silent: false,
            single: false,
            key: Span::default(),
            ttl: command.ttl,
        };
        let writes = command.opcode.writes();
        if writes && self.refuses() {
            self.order.answer(failure(&expect, KAFKA_AWAY));
            return Some(command.length);
        }
        let key = &bytes[command.key.0..command.key.1];
        if too_large {
            if command.opcode == Opcode::Set {
                let server = self.server_of(key);
                let together = self.order.ask(server as u32);
                let building = &mut building[server];
                let mut request = vec![0; binary::HEADER_BYTES];
                (request[0], request[1]) = (binary::REQUEST, Opcode::Delete as u8);
                request[2..4].copy_from_slice(&(key.len() as u16).to_be_bytes());
                request[8..12].copy_from_slice(&(key.len() as u32).to_be_bytes());
                // The answer is known by it.
                request[12..16].copy_from_slice(&command.opaque);
                request.extend_from_slice(key);
                building.own(data, request);
                let key = building.key(key, false);
                building.asked.push(Expect {
                    asked: Asked::Binary(Opcode::Delete),
                    silent: true,
                    together,
                    key,
                    ttl: None,
                    ..expect
                });
            }
            let mut out = Vec::new();
            binary::put_response(&mut out, command.sent, binary::TOO_LARGE, command.opaque, b"Too large.");
            self.order.answer(out.into());
            return Some(command.length);
        }
        if command.opcode == Opcode::Flush {
            self.flushed();
            let servers = building.len();
            let mut request = bytes[..command.length].to_vec();
            request[1] = command.opcode as u8;
            for (server, building) in building.iter_mut().enumerate() {
                let together = self.order.ask(server as u32);
                building.own(data, request.clone());
                building.asked.push(Expect {
                    piece: piece(server, servers),
                    together,
                    ..expect
                });
            }
            return Some(command.length);
        }
        let server = match command.opcode {
            // Not a key.
            Opcode::Stat | Opcode::Version => 0,
            _ => self.server_of(key),
        };
        let together = self.order.ask(server as u32);
        let building = &mut building[server];
        let mut expect = Expect { together, ..expect };
        if writes {
            expect.key = building.key(key, false);
            if self.traces(b"") {
                building.trace();
            }
        }
        if command.quiet {
            let mut header = bytes[..binary::HEADER_BYTES].to_vec();
            header[1] = command.opcode as u8;
            building.own(data, header);
            building.as_is(data, at + binary::HEADER_BYTES, at + command.length);
        } else {
            building.as_is(data, at, at + command.length);
        }
        building.asked.push(expect);
        Some(command.length)
    }
}

/// Which piece of so many this is.
fn piece(n: usize, count: usize) -> Piece {
    match (count, n + 1 == count) {
        (1, _) => Piece::Whole,
        (_, true) => Piece::Last,
        (_, false) => Piece::More,
    }
}

/// What a binary operation counts as.
fn verb_of(opcode: Opcode) -> Verb {
    match opcode {
        Opcode::Get | Opcode::GetKey => Verb::Get,
        Opcode::Set => Verb::Set,
        Opcode::Add => Verb::Add,
        Opcode::Replace => Verb::Replace,
        Opcode::Delete => Verb::Delete,
        Opcode::Increment => Verb::Incr,
        Opcode::Decrement => Verb::Decr,
        Opcode::Flush => Verb::FlushAll,
        Opcode::Append => Verb::Append,
        Opcode::Prepend => Verb::Prepend,
        Opcode::Stat => Verb::Stats,
        Opcode::Touch => Verb::Touch,
        Opcode::GetAndTouch | Opcode::GetKeyAndTouch => Verb::Gat,
        Opcode::Version | Opcode::Quit | Opcode::Noop | Opcode::SaslList | Opcode::SaslAuth | Opcode::SaslStep => {
            Verb::Version
        }
    }
}
