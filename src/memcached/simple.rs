//! `memcache::exp` with our ring: one key per call, for the Writer, the command line and tests.

use std::time::Duration;

use bytes::Bytes;
use memcache::exp::{AsyncMetaClient, Delete, Error, Get, GetStatus, Meta, MutationStatus, Router};

use super::answers::is_too_large;
use super::codec::sendable_expiry;
use super::{Looked, MemcachedError, RemainingTtl, key_problem};
use crate::hashing::{HashKind, Ring, RingServer};

/// A client of all servers of a cache, with at most one connection to each; calls to a server wait for each other.
#[derive(Clone)]
pub struct SimpleClient {
    client: AsyncMetaClient,
}

struct RingRouter(Ring);

impl Router for RingRouter {
    fn route(&self, key: &[u8], _servers: &[String]) -> usize {
        self.0.server_of(key)
    }
}

impl SimpleClient {
    /// Resolves the addresses; connections are made by the first call to a server. `timeout` limits each dial and each
    /// call.
    pub async fn connect(
        kind: HashKind,
        servers: &[RingServer],
        timeout: Duration,
    ) -> Result<SimpleClient, MemcachedError> {
        let client = AsyncMetaClient::builder()
            .router(RingRouter(Ring::new(kind, servers)))
            .max_connections(Some(1))
            .max_idle(1)
            .connect_timeout(Some(timeout))
            .io_timeout(Some(timeout))
            .connect_multiple_async(servers.iter().map(|server| server.address.as_str()))
            .await
            .map_err(convert)?;
        Ok(SimpleClient { client })
    }

    /// Stores a value. `expiry` is memcached's exptime (see [`super::WriteOp`]).
    pub async fn set(&self, key: &[u8], value: &[u8], flags: u32, expiry: u32) -> Result<(), MemcachedError> {
        check(key)?;
        let set = self
            .client
            .set(key, value)
            .client_flags(flags)
            .ttl_raw(sendable_expiry(expiry));
        match set.send().await.map_err(convert)?.status {
            MutationStatus::Applied => Ok(()),
            other => Err(MemcachedError::Refused {
                reason: format!("not stored: {other:?}"),
            }),
        }
    }

    /// Removes an item; says whether there was one.
    pub async fn delete(&self, key: &[u8]) -> Result<bool, MemcachedError> {
        check(key)?;
        let result = self.client.delete(key).send().await.map_err(convert)?;
        Ok(result.status == MutationStatus::Applied)
    }

    /// Gives an item a new expiry; says whether there was one with a value to keep alive.
    pub async fn touch(&self, key: &[u8], expiry: u32) -> Result<bool, MemcachedError> {
        let get = Get::new(key)
            .without_value()
            .touch_raw(sendable_expiry(expiry))
            .meta(Meta::NONE.cas().size());
        Ok(matches!(self.read(key, get).await?, Looked::Hit { .. }))
    }

    /// Looks at an item, without bumping it in the LRU.
    pub async fn get(&self, key: &[u8]) -> Result<Looked, MemcachedError> {
        self.read(key, Get::new(key).no_lru_bump().meta(Meta::NONE.cas().ttl()))
            .await
    }

    async fn read(&self, key: &[u8], get: Get) -> Result<Looked, MemcachedError> {
        check(key)?;
        let result = self.client.run(get).await.map_err(convert)?;
        let cas = result.item.cas.unwrap_or(0);
        let placeholder = result.lease_busy() && result.item.size == Some(0);
        Ok(match result.status {
            GetStatus::Hit if result.won_lease() => {
                // The token is not ours to keep (see `Connection::look`).
                self.client
                    .run(Delete::new(key).invalidate().compare_cas(cas))
                    .await
                    .map_err(convert)?;
                Looked::Stale { cas, won: true }
            }
            GetStatus::Hit if result.is_stale() || placeholder => Looked::Stale { cas, won: false },
            GetStatus::Pending => Looked::Stale { cas, won: false },
            GetStatus::Hit => Looked::Hit {
                value: Bytes::from(result.value.unwrap_or_default()),
                flags: result.client_flags.unwrap_or(0),
                ttl: match result.item.ttl {
                    None | Some(..0) => RemainingTtl::Never,
                    Some(seconds) => RemainingTtl::Seconds(seconds.try_into().unwrap_or(u32::MAX)),
                },
            },
            _ => Looked::Miss,
        })
    }
}

fn check(key: &[u8]) -> Result<(), MemcachedError> {
    match key_problem(key) {
        Some(problem) => Err(MemcachedError::Refused {
            reason: problem.to_owned(),
        }),
        None => Ok(()),
    }
}

fn convert(error: Error) -> MemcachedError {
    match error {
        Error::Server(text) if is_too_large(&text) => MemcachedError::TooLarge,
        Error::Server(text) | Error::Rejected(text) => MemcachedError::Refused { reason: text },
        Error::Usage(text) => MemcachedError::Refused {
            reason: text.to_owned(),
        },
        Error::Ambiguous { source, .. } => match *source {
            // The crate calls every failure of a written request ambiguous, but these are the server's answer to it.
            answer @ (Error::Server(_) | Error::Rejected(_)) => convert(answer),
            other => MemcachedError::OutcomeUnknown {
                detail: other.to_string(),
            },
        },
        other => MemcachedError::Unavailable {
            detail: other.to_string(),
        },
    }
}
