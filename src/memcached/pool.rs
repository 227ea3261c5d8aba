//! Many callers, few connections: whatever is asked while a server answers goes to it together, when it has.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};

use super::{Connection, LookRequest, Looked, MemcachedError, NotDone, Write, WriteOp, Writes, key_problem};
use crate::backoff::Backoff;
use crate::hashing::{HashKind, Ring, RingServer, slot_hash};

/// Calls that may wait for one connection; more callers wait for room.
const WAITING: usize = 1024;
/// Calls that go to the server together.
const TOGETHER: usize = 256;
/// Between dials of a server that does not answer, in which calls fail at once.
const DIAL_AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// A client of all servers of a cache, for many callers at once. A key always goes through the same connection, so that calls
/// for it run in the order in which they were made.
pub struct PooledClient {
    ring: Ring,
    /// By server, then the connections to it.
    servers: Vec<Vec<mpsc::Sender<Call>>>,
}

struct Call {
    key: Bytes,
    what: What,
    answer: oneshot::Sender<Result<Done, MemcachedError>>,
}

enum What {
    Set { value: Bytes, flags: u32, expiry: u32 },
    Touch(u32),
    Delete,
    Look,
}

enum Done {
    /// Whether there was anything to be done it to.
    Written(bool),
    Found(Looked),
}

impl PooledClient {
    /// A client with so many connections to each server, which are made when they are needed, in a tokio runtime. `limit` is for
    /// each dial and for the answers to what went together.
    pub fn new(kind: HashKind, servers: &[RingServer], limit: Duration, connections: usize) -> PooledClient {
        let each = |server: &RingServer| {
            let connections = 0..connections.max(1);
            connections
                .map(|_| {
                    let (calls, called) = mpsc::channel(WAITING);
                    tokio::spawn(Line::new(server.address.clone(), limit).serve(called));
                    calls
                })
                .collect()
        };
        PooledClient {
            ring: Ring::new(kind, servers),
            servers: servers.iter().map(each).collect(),
        }
    }

    /// Stores a value. `expiry` is memcached's exptime (see [`WriteOp`]).
    ///
    /// # Errors
    /// See [`MemcachedError`].
    pub async fn set(&self, key: &[u8], value: &[u8], flags: u32, expiry: u32) -> Result<(), MemcachedError> {
        let value = Bytes::copy_from_slice(value);
        self.call(key, What::Set { value, flags, expiry }).await.map(|_| ())
    }

    /// Removes an item, if there is one.
    ///
    /// # Errors
    /// See [`MemcachedError`].
    pub async fn delete(&self, key: &[u8]) -> Result<(), MemcachedError> {
        self.call(key, What::Delete).await.map(|_| ())
    }

    /// Gives an item a new expiry; says whether there was one with a value to keep alive.
    ///
    /// # Errors
    /// See [`MemcachedError`].
    pub async fn touch(&self, key: &[u8], expiry: u32) -> Result<bool, MemcachedError> {
        let done = self.call(key, What::Touch(expiry)).await?;
        Ok(matches!(done, Done::Written(true)))
    }

    /// Looks at an item, without bumping it in the LRU.
    ///
    /// # Errors
    /// See [`MemcachedError`].
    pub async fn get(&self, key: &[u8]) -> Result<Looked, MemcachedError> {
        match self.call(key, What::Look).await? {
            Done::Found(found) => Ok(found),
            Done::Written(_) => Ok(Looked::Miss),
        }
    }

    async fn call(&self, key: &[u8], what: What) -> Result<Done, MemcachedError> {
        if let Some(problem) = key_problem(key) {
            return Err(MemcachedError::Refused {
                reason: problem.to_owned(),
            });
        }
        let lines = &self.servers[self.ring.server_of(key)];
        let line = &lines[slot_hash(key) as usize % lines.len()];
        let (answer, answered) = oneshot::channel();
        let call = Call {
            key: Bytes::copy_from_slice(key),
            what,
            answer,
        };
        // Neither fails before the runtime ends.
        let gone = || MemcachedError::OutcomeUnknown {
            detail: "the runtime ends".to_owned(),
        };
        line.send(call).await.map_err(|_| MemcachedError::Unavailable {
            detail: "the runtime ends".to_owned(),
        })?;
        answered.await.map_err(|_| gone())?
    }
}

/// One connection, and those who wait for it.
struct Line {
    address: String,
    limit: Duration,
    connection: Option<Connection>,
    backoff: Backoff,
    /// It is not dialled before.
    dial_at: Option<Instant>,
}

impl Line {
    fn new(address: String, limit: Duration) -> Line {
        Line {
            address,
            limit,
            connection: None,
            backoff: Backoff::clamped(DIAL_AGAIN.0, DIAL_AGAIN.1),
            dial_at: None,
        }
    }

    async fn serve(mut self, mut called: mpsc::Receiver<Call>) {
        let mut calls = Vec::new();
        while called.recv_many(&mut calls, TOGETHER).await > 0 {
            // In their order: neither a look nor a write overtakes the other.
            let mut rest = std::mem::take(&mut calls);
            while !rest.is_empty() {
                let looks = matches!(rest[0].what, What::Look);
                let same = rest
                    .iter()
                    .take_while(|call| matches!(call.what, What::Look) == looks)
                    .count();
                let later = rest.split_off(same);
                match looks {
                    true => self.look(rest).await,
                    false => self.write(rest).await,
                }
                rest = later;
            }
        }
    }

    /// The connection, or why there is none.
    async fn connected(&mut self) -> Result<&mut Connection, String> {
        if self.connection.is_none() {
            if self.dial_at.is_some_and(|at| Instant::now() < at) {
                return Err(format!("memcached at {} was not there a moment ago", self.address));
            }
            match Connection::connect(&self.address, self.limit).await {
                Ok(connection) => {
                    self.backoff.reset();
                    self.dial_at = None;
                    self.connection = Some(connection);
                }
                Err(error) => {
                    self.dial_at = Some(Instant::now() + self.backoff.next(rand::random()));
                    return Err(error.to_string());
                }
            }
        }
        self.connection.as_mut().ok_or_else(|| "no connection".to_owned())
    }

    async fn write(&mut self, calls: Vec<Call>) {
        let mut writes = Writes::none();
        for call in &calls {
            let op = match &call.what {
                What::Set { value, flags, expiry } => WriteOp::Set {
                    value,
                    flags: *flags,
                    expiry: *expiry,
                },
                What::Touch(expiry) => WriteOp::Touch { expiry: *expiry },
                What::Delete | What::Look => WriteOp::Delete,
            };
            writes.push(Write { key: &call.key, op });
        }
        let limit = self.limit;
        let not_done = match self.connected().await {
            Err(why) => return unavailable(calls, &why),
            Ok(connection) => match timeout(limit, connection.apply(&writes)).await {
                Ok(Ok(not_done)) => not_done,
                Ok(Err(error)) => return self.unknown(calls, &error.to_string()),
                Err(_) => return self.unknown(calls, &format!("no answer within {limit:?}")),
            },
        };
        let mut not_done = not_done.into_iter().peekable();
        for (call, place) in calls.into_iter().zip(0..) {
            let result = match not_done.next_if(|(at, _)| *at == place) {
                None => Ok(Done::Written(true)),
                Some((_, NotDone::NotFound)) => Ok(Done::Written(false)),
                Some((_, NotDone::TooLarge)) => Err(MemcachedError::TooLarge),
                Some((_, NotDone::Refused(reason))) => Err(MemcachedError::Refused { reason }),
                Some((_, NotDone::Unknown)) => Err(MemcachedError::OutcomeUnknown {
                    detail: "memcached refused one of several writes, it may be this one".to_owned(),
                }),
            };
            // Who does not wait any more is not told.
            let _ = call.answer.send(result);
        }
    }

    async fn look(&mut self, calls: Vec<Call>) {
        let looks: Vec<LookRequest> = calls
            .iter()
            .map(|call| LookRequest {
                key: call.key.clone(),
                value: true,
            })
            .collect();
        let (limit, mut found) = (self.limit, Vec::new());
        match self.connected().await {
            Err(why) => return unavailable(calls, &why),
            Ok(connection) => match timeout(limit, connection.look(&looks, &mut found)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return self.unknown(calls, &error.to_string()),
                Err(_) => return self.unknown(calls, &format!("no answer within {limit:?}")),
            },
        }
        for (call, found) in calls.into_iter().zip(found) {
            let _ = call.answer.send(match found {
                Looked::Refused(reason) => Err(MemcachedError::Refused { reason }),
                found => Ok(Done::Found(found)),
            });
        }
    }

    /// What was sent may have run, or may yet run.
    fn unknown(&mut self, calls: Vec<Call>, detail: &str) {
        self.connection = None;
        for call in calls {
            let _ = call.answer.send(Err(MemcachedError::OutcomeUnknown {
                detail: detail.to_owned(),
            }));
        }
    }
}

fn unavailable(calls: Vec<Call>, why: &str) {
    for call in calls {
        let _ = call
            .answer
            .send(Err(MemcachedError::Unavailable { detail: why.to_owned() }));
    }
}

#[cfg(test)]
mod tests {
    use evrepl_lab::memcached::Memcached;

    use super::*;

    fn client(memcached: &Memcached, connections: usize) -> PooledClient {
        let server = RingServer {
            address: memcached.address(),
            ring_name: None,
            weight: 1,
        };
        PooledClient::new(HashKind::Ketama, &[server], Duration::from_secs(5), connections)
    }

    #[tokio::test]
    async fn many_callers_share_few_connections_and_each_gets_its_own_answer() {
        let memcached = Memcached::start();
        let client = client(&memcached, 2);
        let calls = (0..500u32).map(|n| {
            let client = &client;
            async move {
                let key = format!("key:{n}");
                client.set(key.as_bytes(), key.as_bytes(), n, 0).await.unwrap();
                assert!(client.touch(key.as_bytes(), 60).await.unwrap());
                assert!(!client.touch(b"nothing", 60).await.unwrap());
                let found = client.get(key.as_bytes()).await.unwrap();
                assert!(
                    matches!(found, Looked::Hit { ref value, flags, .. } if *value == key && flags == n),
                    "{found:?}"
                );
                client.delete(key.as_bytes()).await.unwrap();
                assert_eq!(client.get(key.as_bytes()).await.unwrap(), Looked::Miss);
            }
        });
        futures_util::future::join_all(calls).await;
        let connections = memcached.client().stats().unwrap()["total_connections"]
            .parse::<u32>()
            .unwrap();
        assert!(connections <= 6, "{connections}");
    }

    #[tokio::test]
    async fn one_that_is_refused_harms_no_other() {
        let memcached = Memcached::start();
        let client = client(&memcached, 1);
        let large = vec![0; 2 << 20];
        let (a, b, c) = tokio::join!(
            client.set(b"a", b"1", 0, 0),
            client.set(b"large", &large, 0, 0),
            client.set(b"c", b"3", 0, 0)
        );
        assert!(
            matches!(b, Err(MemcachedError::TooLarge | MemcachedError::OutcomeUnknown { .. })),
            "{b:?}"
        );
        for (key, result) in [(b"a", a), (b"c", c)] {
            let known = result.is_ok() || matches!(result, Err(MemcachedError::OutcomeUnknown { .. }));
            assert!(known && matches!(client.get(key).await.unwrap(), Looked::Hit { .. }));
        }
    }

    #[tokio::test]
    async fn a_server_that_dies_fails_its_calls_and_is_used_again_when_it_is_back() {
        let memcached = Memcached::start();
        let client = client(&memcached, 1);
        client.set(b"k", b"1", 0, 0).await.unwrap();
        memcached.kill();
        assert!(client.set(b"k", b"2", 0, 0).await.is_err());
        memcached.restart();
        let began = Instant::now();
        while client.set(b"k", b"3", 0, 0).await.is_err() {
            assert!(began.elapsed() < Duration::from_secs(30));
            tokio::task::yield_now().await;
        }
    }
}
