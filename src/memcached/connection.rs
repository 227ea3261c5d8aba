//! One TCP connection to one memcached server, one batch at a time.

use std::io::{self, ErrorKind, IoSlice};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use socket2::{SockRef, Socket, TcpKeepalive};
use tokio::io::Interest;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::Instant;

use super::answers::{Answers, is_spoken, unexpected};
use super::codec::{self, Code, Decoded, Reply};
use super::outbox::{Outbox, SLICES};
use super::{Look, Looked, MemcachedError, NotDone, Write, WriteOp, Writes, key_problem};

/// An idle connection is probed after this long, so that a host that vanished is noticed; every `KEEPALIVE_INTERVAL`
/// after that, and given up after `KEEPALIVE_RETRIES`: 25 seconds in all.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_RETRIES: u32 = 3;
/// Keep-alive probes stay away while sent bytes are unacknowledged; without this limit the kernel then resends for a
/// quarter of an hour. A frozen process is not given up by it until its socket's buffer is full.
const UNACKNOWLEDGED_LIMIT: Duration = Duration::from_secs(30);
/// One read's room: a few hundred small values share one allocation, and it stays below the size (128 KiB) from which
/// malloc goes to the kernel.
const READ_CHUNK: usize = 64 * 1024;
/// With less room than this a read is not worth its system call.
const SMALL_READ: usize = 4 * 1024;
/// After a write was refused, so long every write is spoken: what is refused again is then known by name. Keys that are looked
/// at again because it was not known come back long before.
const SPOKEN_FOR: Duration = Duration::from_secs(5);

/// For calls that write no values.
static NOTHING: Writes = Writes::none();

/// One TCP connection to one server.
///
/// A call sends its whole batch and returns when every reply is there; there is no limit on the time that takes (the
/// caller decides; a write that did not answer in time is *kept*, not dropped). A call that fails, or whose future is
/// dropped before its end, leaves the connection unusable: every later call says [`MemcachedError::Unusable`].
pub struct Connection {
    stream: TcpStream,
    address: String,
    inbox: BytesMut,
    outbox: Outbox,
    /// Number of the next request. It wraps, after four billion; no batch is that long.
    opaque: u32,
    usable: bool,
    /// Until then no write is quiet.
    spoken_until: Option<Instant>,
}

impl Connection {
    /// Connects to `address` (`host:port`; each address the name resolves to is tried), within `timeout` in all.
    pub async fn connect(address: &str, timeout: Duration) -> Result<Connection, MemcachedError> {
        let stream = match tokio::time::timeout(timeout, dial(address)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(source)) => {
                return Err(MemcachedError::Connect {
                    address: address.to_owned(),
                    source,
                });
            }
            Err(_) => {
                return Err(MemcachedError::ConnectTimeout {
                    address: address.to_owned(),
                    timeout,
                });
            }
        };
        Ok(Connection {
            stream,
            address: address.to_owned(),
            inbox: BytesMut::new(),
            outbox: Outbox::default(),
            opaque: 0,
            usable: true,
            spoken_until: None,
        })
    }

    /// The server's address as given to [`Connection::connect`].
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A second handle on the socket, to shut it down with.
    pub fn socket(&self) -> Result<Socket, MemcachedError> {
        SockRef::from(&self.stream)
            .try_clone()
            .map_err(|source| MemcachedError::Io {
                address: self.address.clone(),
                source,
            })
    }

    /// Whether a call can still succeed on this connection.
    pub fn is_usable(&self) -> bool {
        self.usable
    }

    /// `mn`: returns when the server has answered, that is, when it works and has run everything sent here before.
    pub async fn noop(&mut self) -> Result<(), MemcachedError> {
        self.outbox.clear();
        self.outbox.text().extend_from_slice(b"mn\r\n");
        self.exchange(&NOTHING, |reply| {
            if reply.code == Code::Noop {
                Ok(true)
            } else {
                Err(unexpected(&reply))
            }
        })
        .await
    }

    /// The server's version, like `1.6.18`.
    pub async fn version(&mut self) -> Result<String, MemcachedError> {
        self.outbox.clear();
        self.outbox.text().extend_from_slice(b"version\r\n");
        let mut version = String::new();
        self.exchange(&NOTHING, |reply| match reply.code {
            Code::Version(text) => {
                version = text;
                Ok(true)
            }
            _ => Err(unexpected(&reply)),
        })
        .await?;
        Ok(version)
    }

    /// Looks at every key, without bumping it in the LRU. `out` is emptied, then gets one result per key, in order.
    ///
    /// On an error `out` has the results of the first keys, as many as were answered; the others are unknown. All
    /// values of a batch are in memory at once: bound the batch.
    pub async fn look(&mut self, reads: &[impl Look], out: &mut Vec<Looked>) -> Result<(), MemcachedError> {
        out.clear();
        self.outbox.clear();
        let first = self.opaque;
        let sent = reads.iter().filter(|read| key_problem(read.key()).is_none());
        for read in sent {
            codec::put_look(self.outbox.text(), read.key(), read.value(), next(&mut self.opaque));
        }
        let mut tokens = Vec::new();
        let refuse = |out: &mut Vec<Looked>| {
            while let Some(problem) = reads.get(out.len()).and_then(|read| key_problem(read.key())) {
                out.push(Looked::Refused(problem.to_owned()));
            }
        };
        let count = self.opaque.wrapping_sub(first) as usize;
        let mut n = 0;
        if count > 0 {
            self.exchange(&NOTHING, |reply| {
                refuse(out);
                check_order(&reply, first, n)?;
                let read = &reads[out.len()];
                let looked = looked(reply, read.value())?;
                if let Looked::Stale { cas, won: true } = looked {
                    tokens.push((read.key(), cas));
                }
                out.push(looked);
                n += 1;
                Ok(n == count)
            })
            .await?;
        }
        refuse(out);
        self.give_back(&tokens).await
    }

    /// Applies every write, in order. What comes back are the writes that were not simply done, by their place in `writes`,
    /// in order: none of them, most often.
    ///
    /// On an error it is unknown which writes ran or will run: look at their keys again. So for each write that ended as
    /// [`NotDone::Unknown`]; for some time afterwards each is known by name.
    pub async fn apply(&mut self, writes: &Writes) -> Result<Vec<(u32, NotDone)>, MemcachedError> {
        self.outbox.clear();
        let first = self.opaque;
        // Also of those that are not sent, so that a number tells the place.
        self.opaque = first.wrapping_add(writes.len() as u32);
        let mut answers = Answers::new(writes, first);
        let problem = |write: Write<'_>| key_problem(write.key);
        let last = (0..writes.len()).rfind(|&place| problem(writes.get(place)).is_none());
        let quiet = self.spoken_until.is_none_or(|until| Instant::now() >= until);
        for (place, write) in writes.iter().enumerate() {
            if let Some(problem) = problem(write) {
                answers
                    .not_done
                    .push((place as u32, NotDone::Refused(problem.to_owned())));
                continue;
            }
            // The last one says by its number that these are the answers to this call.
            let spoken = !quiet || is_spoken(&write) || Some(place) == last;
            self.put(place, &write, spoken.then_some(first.wrapping_add(place as u32)));
            answers.sent(place, &write, spoken);
        }
        if last.is_some() {
            self.outbox.text().extend_from_slice(b"mn\r\n");
            self.exchange(writes, |reply| answers.take(reply)).await?;
        }
        let Answers {
            mut not_done, tokens, ..
        } = answers;
        if not_done.iter().any(|(_, how)| *how != NotDone::NotFound) {
            self.spoken_until = Some(Instant::now() + SPOKEN_FOR);
        }
        not_done.sort_unstable_by_key(|(place, _)| *place);
        let key_of = |(place, cas)| (writes.get(place as usize).key, cas);
        self.give_back(&tokens.into_iter().map(key_of).collect::<Vec<_>>())
            .await?;
        Ok(not_done)
    }

    /// Appends one write; with a number it is spoken.
    fn put(&mut self, place: usize, write: &Write<'_>, number: Option<u32>) {
        let key = write.key;
        match write.op {
            // Never sent, see MAX_VALUE_BYTES; the old item goes as memcached would have let it go.
            WriteOp::Set { value, .. } if value.len() > codec::MAX_VALUE_BYTES => {
                codec::put_delete(self.outbox.text(), key, number)
            }
            WriteOp::Set { value, flags, expiry } => {
                codec::put_set(self.outbox.text(), key, value.len(), flags, expiry, number);
                self.outbox.put_value(value, place);
            }
            WriteOp::Touch { expiry } => codec::put_touch(self.outbox.text(), key, expiry, number),
            WriteOp::Delete => codec::put_delete(self.outbox.text(), key, number),
        }
    }

    /// Marks items stale again whose token we were handed, so that the next reader gets it. One that has changed since
    /// is left alone.
    async fn give_back(&mut self, tokens: &[(&[u8], u64)]) -> Result<(), MemcachedError> {
        if tokens.is_empty() {
            return Ok(());
        }
        self.outbox.clear();
        let first = self.opaque;
        for &(key, cas) in tokens {
            codec::put_give_back(self.outbox.text(), key, cas, next(&mut self.opaque));
        }
        let mut n = 0;
        self.exchange(&NOTHING, |reply| {
            check_order(&reply, first, n)?;
            n += 1;
            match reply.code {
                Code::Value | Code::Noop | Code::Version(_) => Err(unexpected(&reply)),
                _ => Ok(n == tokens.len()),
            }
        })
        .await
    }

    /// Sends the outbox, with the values of `writes`, and reads replies until `take` says that it was the last, both at once: a
    /// server whose replies nobody reads stops reading requests.
    async fn exchange(
        &mut self,
        writes: &Writes,
        take: impl FnMut(Reply) -> Result<bool, String>,
    ) -> Result<(), MemcachedError> {
        let address = || self.address.clone();
        if !self.usable {
            return Err(MemcachedError::Unusable { address: address() });
        }
        // Until the end is reached nobody knows which reply is next, be it that we fail or that we are dropped.
        self.usable = false;
        let result = transfer(&self.stream, (&mut self.outbox, writes), &mut self.inbox, take).await;
        self.outbox.clear();
        result.map_err(|failure| match failure {
            Failure::Io(source) => MemcachedError::Io {
                address: address(),
                source,
            },
            Failure::Closed => MemcachedError::Closed { address: address() },
            Failure::Protocol(detail) => MemcachedError::Protocol {
                address: address(),
                detail,
            },
        })?;
        self.usable = true;
        Ok(())
    }
}

/// A connection that notices when the other host is gone.
pub(crate) async fn dial(address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(ErrorKind::NotFound, "name has no address");
    for resolved in lookup_host(address).await? {
        match TcpStream::connect(resolved).await {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                let keepalive = TcpKeepalive::new()
                    .with_time(KEEPALIVE_IDLE)
                    .with_interval(KEEPALIVE_INTERVAL)
                    .with_retries(KEEPALIVE_RETRIES);
                let socket = SockRef::from(&stream);
                socket.set_tcp_keepalive(&keepalive)?;
                #[cfg(target_os = "linux")]
                socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_LIMIT))?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

enum Failure {
    Io(io::Error),
    Closed,
    Protocol(String),
}

async fn transfer(
    stream: &TcpStream,
    (outbox, writes): (&mut Outbox, &Writes),
    inbox: &mut BytesMut,
    mut take: impl FnMut(Reply) -> Result<bool, String>,
) -> Result<(), Failure> {
    outbox.close();
    let mut all = false;
    // Bytes that must come before another look into the inbox can be of use.
    let mut missing = 1;
    loop {
        let written = write_some(stream, outbox, writes)?;
        let read = read_some(stream, inbox, missing)?;
        missing = missing.saturating_sub(read);
        while missing == 0 && !all {
            match codec::decode(inbox).map_err(Failure::Protocol)? {
                Decoded::Reply(reply) => {
                    all = take(reply).map_err(Failure::Protocol)?;
                    missing = usize::from(inbox.is_empty());
                }
                Decoded::Missing(more) => missing = more,
            }
        }
        if all {
            break;
        }
        if written == 0 && read == 0 {
            let interest = if outbox.is_sent() {
                Interest::READABLE
            } else {
                Interest::READABLE | Interest::WRITABLE
            };
            stream.ready(interest).await.map_err(Failure::Io)?;
        } else {
            // A server as fast as we are must not keep the other actors of this thread waiting.
            tokio::task::consume_budget().await;
        }
    }
    if !outbox.is_sent() || !inbox.is_empty() {
        return Err(Failure::Protocol("more replies than requests".into()));
    }
    Ok(())
}

/// One write, if the socket takes any; how many bytes it took.
fn write_some(stream: &TcpStream, outbox: &mut Outbox, writes: &Writes) -> Result<usize, Failure> {
    if outbox.is_sent() {
        return Ok(0);
    }
    let mut slices = [IoSlice::new(&[]); SLICES];
    let count = outbox.slices(writes, &mut slices);
    match stream.try_write_vectored(&slices[..count]) {
        Ok(written) => {
            outbox.advance(writes, written);
            Ok(written)
        }
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        Err(error) => Err(Failure::Io(error)),
    }
}

/// One read, if there is anything; how many bytes came.
fn read_some(stream: &TcpStream, inbox: &mut BytesMut, missing: usize) -> Result<usize, Failure> {
    // A partly read value got room for all of itself when its length was known: it is moved once at most.
    let room = if inbox.len() < SMALL_READ {
        missing.max(SMALL_READ)
    } else {
        missing
    };
    if inbox.capacity() - inbox.len() < room {
        inbox.reserve(room.max(READ_CHUNK));
    }
    match stream.try_read_buf(inbox) {
        Ok(0) => Err(Failure::Closed),
        Ok(read) => Ok(read),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        Err(error) => Err(Failure::Io(error)),
    }
}

fn next(opaque: &mut u32) -> u32 {
    let this = *opaque;
    *opaque = opaque.wrapping_add(1);
    this
}

/// The reply to the `n`th request must carry its number, but error lines carry none.
fn check_order(reply: &Reply, first: u32, n: usize) -> Result<(), String> {
    let expected = first.wrapping_add(n as u32);
    match (&reply.code, reply.opaque) {
        (_, Some(opaque)) if opaque == expected => Ok(()),
        (Code::ServerError(_) | Code::ClientError(_), None) => Ok(()),
        (_, opaque) => Err(format!("reply number {opaque:?} where {expected} was due")),
    }
}

fn looked(reply: Reply, value: bool) -> Result<Looked, String> {
    match (&reply.code, reply.ttl) {
        (Code::Value | Code::Done, _) if reply.is_stale() => Ok(Looked::Stale {
            cas: reply.cas,
            won: reply.won,
        }),
        (Code::Value, Some(ttl)) if value => Ok(Looked::Hit {
            value: reply.value,
            flags: reply.flags,
            ttl,
        }),
        (Code::Done, Some(ttl)) if !value => Ok(Looked::Hit {
            value: Bytes::new(),
            flags: 0,
            ttl,
        }),
        (Code::NotFound, _) => Ok(Looked::Miss),
        (Code::ServerError(text), _) => Ok(Looked::Refused(text.clone())),
        // What has no data block is refused by one line, so the others are still in step. A bare `ERROR` says that the
        // server knows no meta commands at all.
        (Code::ClientError(text), _) if text != "ERROR" => Ok(Looked::Refused(text.clone())),
        _ => Err(unexpected(&reply)),
    }
}
