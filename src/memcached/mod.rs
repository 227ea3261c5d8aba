//! memcached as evrepl needs it: the only place that knows its protocol, and the only one that names `memcache`.
//!
//! - [`Connection`]: the data path. One TCP connection, one pipelined batch of meta commands at a time, one result per
//!   key. It is our own because a batch must survive an error line for one key, must read while it writes, and must
//!   not allocate per key; `memcache::exp` does none of these.
//! - [`PooledClient`]: few such connections for many callers, one key per call, for the Writer.
//! - [`SimpleClient`]: `memcache::exp` with our ring, one key per call, for canaries and tools.
//!
//! The pure codec is in `codec`, the socket in `connection`. Facts named *measured* come from memcached 1.6.18.

mod answers;
#[doc(hidden)]
pub mod bench;
mod codec;
mod connection;
mod outbox;
mod pool;
mod simple;
#[cfg(test)]
mod test_server;
#[cfg(test)]
mod tests;
mod writes;

use std::io;
use std::time::Duration;

use bytes::Bytes;

pub use codec::{MAX_BINARY_KEY_BYTES, MAX_KEY_BYTES, key_problem};
pub use connection::Connection;
pub(crate) use connection::dial;
pub use pool::PooledClient;
pub use simple::SimpleClient;
pub use writes::{SharedOp, Write, WriteOp, Writes};

/// One key to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LookRequest {
    /// The key's raw bytes; see [`key_problem`] for what memcached takes.
    pub key: Bytes,
    /// `false` asks for the remaining TTL only, for touches.
    pub value: bool,
}

/// What asks for a look at a key.
pub trait Look {
    /// The key's raw bytes; see [`key_problem`] for what memcached takes.
    fn key(&self) -> &[u8];
    /// `false` asks for the remaining TTL only, for touches.
    fn value(&self) -> bool;
}

impl Look for LookRequest {
    fn key(&self) -> &[u8] {
        &self.key
    }
    fn value(&self) -> bool {
        self.value
    }
}

/// What a look found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Looked {
    /// The item is there. Without a value asked for, `value` is empty and `flags` are 0.
    Hit {
        /// A slice of the read buffer (about 64 KiB, shared with its neighbours): to keep one small value for long,
        /// copy it.
        value: Bytes,
        /// The client's 32 flag bits, unchanged.
        flags: u32,
        /// What is left of its life, rounded down to seconds by memcached.
        ttl: RemainingTtl,
    },
    /// There is no such item.
    Miss,
    /// There is an item, but its value is not to be trusted: marked stale, or a placeholder whose value somebody is
    /// computing. Treat it as missing.
    Stale {
        /// The CAS of the item as seen.
        cas: u64,
        /// memcached had handed the right to refresh the item to this look; it has been given back.
        won: bool,
    },
    /// This key was refused, by memcached (its words) or because it is no key; the other keys are not affected.
    Refused(String),
}

/// What is left of an item's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemainingTtl {
    /// It does not expire.
    Never,
    /// It expires in this many seconds; 0 means within the second.
    Seconds(u32),
}

/// How a write ended that was not simply done: stored, touched, or removed, be it that there was nothing to remove.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotDone {
    /// Nothing to touch. A touch of an item that is stale, or a placeholder, ends like this too: it has no value that a new
    /// expiry could keep alive.
    NotFound,
    /// The server takes no item of this size. The key's old item is gone (measured).
    TooLarge,
    /// This write was refused: memcached's words, or why the key is no key. After `out of memory` the key's old item is
    /// gone too, in other cases it may still be there.
    Refused(String),
    /// Some write of the call was refused, and memcached did not say which: it may have been this one.
    Unknown,
}

/// Why memcached could not be reached, or what it said to a whole call.
#[derive(Debug, thiserror::Error)]
pub enum MemcachedError {
    /// No connection came about.
    #[error("cannot connect to memcached at {address}: {source}")]
    Connect {
        /// The server's address as configured.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// No connection came about in time.
    #[error("no connection to memcached at {address} within {timeout:?}")]
    ConnectTimeout {
        /// The server's address as configured.
        address: String,
        /// The limit that was given.
        timeout: Duration,
    },
    /// The connection broke. What was sent may or may not have run.
    #[error("connection to memcached at {address} broke: {source}")]
    Io {
        /// The server's address as configured.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// The server closed the connection. What was sent may or may not have run.
    #[error("memcached at {address} closed the connection")]
    Closed {
        /// The server's address as configured.
        address: String,
    },
    /// A reply that is malformed or out of step with the requests.
    #[error("memcached at {address} replied out of protocol: {detail}")]
    Protocol {
        /// The server's address as configured.
        address: String,
        /// What was wrong.
        detail: String,
    },
    /// A call before this one failed or was dropped half way: nobody knows which reply belongs to whom.
    #[error("connection to memcached at {address} was left in the middle of a batch")]
    Unusable {
        /// The server's address as configured.
        address: String,
    },
    /// Only [`SimpleClient`] and [`PooledClient`]: the answer did not come in time, and the write may have run or may yet run.
    #[error("outcome of a write to memcached is unknown: {detail}")]
    OutcomeUnknown {
        /// What happened instead of the answer.
        detail: String,
    },
    /// Only [`SimpleClient`] and [`PooledClient`]: not done, the server could not be asked.
    #[error("memcached could not be asked: {detail}")]
    Unavailable {
        /// What stood in the way.
        detail: String,
    },
    /// Only [`SimpleClient`] and [`PooledClient`]: the server takes no item of this size; the key's old item is gone.
    #[error("value is too large for memcached")]
    TooLarge,
    /// Only [`SimpleClient`] and [`PooledClient`]: memcached's words, or why the key is no key.
    #[error("memcached refused: {reason}")]
    Refused {
        /// The reason.
        reason: String,
    },
}

impl MemcachedError {
    /// Whether the same call may succeed later, on a new connection. A write may then have run twice: look again, don't
    /// resend.
    pub fn is_retryable(&self) -> bool {
        !matches!(self, MemcachedError::TooLarge | MemcachedError::Refused { .. })
    }
}
