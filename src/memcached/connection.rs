//! One TCP connection to one memcached server, one batch at a time.

use std::io::{self, ErrorKind, IoSlice};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use socket2::{SockRef, Socket, TcpKeepalive};
use tokio::io::Interest;
use tokio::net::{TcpStream, lookup_host};

use super::codec::{self, Code, Decoded, Reply};
use super::outbox::{Outbox, SLICES};
use super::{Applied, Look, Looked, MemcachedError, Write, WriteOp, key_problem};

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
        self.exchange(1, |_, reply| {
            if reply.code == Code::Noop {
                Ok(())
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
        self.exchange(1, |_, reply| match reply.code {
            Code::Version(text) => {
                version = text;
                Ok(())
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
        self.exchange(self.opaque.wrapping_sub(first) as usize, |n, reply| {
            refuse(out);
            check_order(&reply, first, n)?;
            let read = &reads[out.len()];
            let looked = looked(reply, read.value())?;
            if let Looked::Stale { cas, won: true } = looked {
                tokens.push((read.key(), cas));
            }
            out.push(looked);
            Ok(())
        })
        .await?;
        refuse(out);
        self.give_back(&tokens).await
    }

    /// Applies every write, in order. `out` is emptied, then gets one result per write, in order.
    ///
    /// On an error `out` has the results of the first writes, as many as were answered; of the others it is unknown
    /// whether they ran or will run: look at their keys again.
    pub async fn apply(&mut self, writes: &[Write], out: &mut Vec<Applied>) -> Result<(), MemcachedError> {
        out.clear();
        self.outbox.clear();
        let first = self.opaque;
        for Write { key, op } in writes.iter().filter(|write| key_problem(&write.key).is_none()) {
            let opaque = next(&mut self.opaque);
            match op {
                // Never sent, see MAX_VALUE_BYTES; the old item goes as memcached would have let it go.
                WriteOp::Set { value, .. } if value.len() > codec::MAX_VALUE_BYTES => {
                    codec::put_delete(self.outbox.text(), key, opaque)
                }
                WriteOp::Set { value, flags, expiry } => {
                    codec::put_set(self.outbox.text(), key, value.len(), *flags, *expiry, opaque);
                    self.outbox.put_value(value);
                }
                WriteOp::Touch { expiry } => codec::put_touch(self.outbox.text(), key, *expiry, opaque),
                WriteOp::Delete => codec::put_delete(self.outbox.text(), key, opaque),
            }
        }
        let mut tokens = Vec::new();
        let refuse = |out: &mut Vec<Applied>| {
            while let Some(problem) = writes.get(out.len()).and_then(|write| key_problem(&write.key)) {
                out.push(Applied::Refused(problem.to_owned()));
            }
        };
        self.exchange(self.opaque.wrapping_sub(first) as usize, |n, reply| {
            refuse(out);
            check_order(&reply, first, n)?;
            let Write { key, op } = &writes[out.len()];
            if reply.won {
                tokens.push((&key[..], reply.cas));
            }
            out.push(applied(reply, op)?);
            Ok(())
        })
        .await?;
        refuse(out);
        self.give_back(&tokens).await
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
        self.exchange(tokens.len(), |n, reply| {
            check_order(&reply, first, n)?;
            match reply.code {
                Code::Value | Code::Noop | Code::Version(_) => Err(unexpected(&reply)),
                _ => Ok(()),
            }
        })
        .await
    }

    /// Sends the outbox and reads `replies` replies, both at once: a server whose replies nobody reads stops reading
    /// requests.
    async fn exchange(
        &mut self,
        replies: usize,
        take: impl FnMut(usize, Reply) -> Result<(), String>,
    ) -> Result<(), MemcachedError> {
        let address = || self.address.clone();
        if !self.usable {
            return Err(MemcachedError::Unusable { address: address() });
        }
        // Until the end is reached nobody knows which reply is next, be it that we fail or that we are dropped.
        self.usable = false;
        let result = transfer(&self.stream, &mut self.outbox, &mut self.inbox, replies, take).await;
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

async fn dial(address: &str) -> io::Result<TcpStream> {
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
    outbox: &mut Outbox,
    inbox: &mut BytesMut,
    replies: usize,
    mut take: impl FnMut(usize, Reply) -> Result<(), String>,
) -> Result<(), Failure> {
    outbox.close();
    let mut taken = 0;
    // Bytes that must come before another look into the inbox can be of use.
    let mut missing = 1;
    while taken < replies {
        let written = write_some(stream, outbox)?;
        let read = read_some(stream, inbox, missing)?;
        missing = missing.saturating_sub(read);
        while missing == 0 && taken < replies {
            match codec::decode(inbox).map_err(Failure::Protocol)? {
                Decoded::Reply(reply) => {
                    take(taken, reply).map_err(Failure::Protocol)?;
                    taken += 1;
                    missing = usize::from(inbox.is_empty());
                }
                Decoded::Missing(more) => missing = more,
            }
        }
        if taken == replies {
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
fn write_some(stream: &TcpStream, outbox: &mut Outbox) -> Result<usize, Failure> {
    if outbox.is_sent() {
        return Ok(0);
    }
    let mut slices = [IoSlice::new(&[]); SLICES];
    let count = outbox.slices(&mut slices);
    match stream.try_write_vectored(&slices[..count]) {
        Ok(written) => {
            outbox.advance(written);
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

fn unexpected(reply: &Reply) -> String {
    match &reply.code {
        Code::ServerError(text) | Code::ClientError(text) => text.clone(),
        code => format!("unexpected {code:?}"),
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

fn applied(reply: Reply, op: &WriteOp) -> Result<Applied, String> {
    match (&reply.code, op) {
        (Code::Done | Code::NotFound, WriteOp::Set { value, .. }) if value.len() > codec::MAX_VALUE_BYTES => {
            Ok(Applied::TooLarge)
        }
        (Code::Done, WriteOp::Touch { .. }) if reply.is_stale() => Ok(Applied::NotFound),
        (Code::Done, _) => Ok(Applied::Done),
        (Code::NotFound, WriteOp::Touch { .. } | WriteOp::Delete) => Ok(Applied::NotFound),
        (Code::NotStored, _) => Ok(Applied::Refused("not stored".into())),
        (Code::ServerError(text), WriteOp::Set { .. }) if is_too_large(text) => Ok(Applied::TooLarge),
        (Code::ServerError(text), _) => Ok(Applied::Refused(text.clone())),
        // After a refused `ms` the server may be taking the value for commands.
        (Code::ClientError(text), WriteOp::Touch { .. } | WriteOp::Delete) if text != "ERROR" => {
            Ok(Applied::Refused(text.clone()))
        }
        _ => Err(unexpected(&reply)),
    }
}

/// memcached says `object too large for cache`.
pub(super) fn is_too_large(text: &str) -> bool {
    text.contains("too large")
}
