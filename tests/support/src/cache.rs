//! A cache of a region: its memcached servers, its topic, and an application's view of it.

use std::io;
use std::sync::Arc;

use crate::memcached::{Memcached, MetaClient, Put, Ring, Value};
use crate::place::free_port;
use crate::proxy::FaultProxy;

/// What a test wants of a cache.
#[derive(Clone, Debug)]
pub struct CacheSpec {
    pub(crate) name: String,
    pub(crate) topic: Option<String>,
    pub(crate) partitions: i32,
    pub(crate) servers: usize,
    pub(crate) given: Vec<Arc<Memcached>>,
    pub(crate) arguments: Vec<String>,
    pub(crate) proxied: bool,
    pub(crate) options: Vec<(String, String)>,
}

impl CacheSpec {
    /// A cache on one memcached of its own, with a new topic of four partitions.
    pub fn new(name: &str) -> CacheSpec {
        CacheSpec {
            name: name.into(),
            topic: None,
            partitions: 4,
            servers: 1,
            given: Vec::new(),
            arguments: Vec::new(),
            proxied: false,
            options: Vec::new(),
        }
    }

    /// On this many memcached servers.
    pub fn servers(mut self, servers: usize) -> CacheSpec {
        self.servers = servers;
        self
    }

    /// On these memcacheds, instead of new ones.
    pub fn given(mut self, memcacheds: &[Arc<Memcached>]) -> CacheSpec {
        self.given = memcacheds.to_vec();
        self
    }

    /// Arguments for the new memcacheds: `&["-m", "1024"]`.
    pub fn memcached_args(mut self, arguments: &[&str]) -> CacheSpec {
        self.arguments = arguments.iter().map(|argument| argument.to_string()).collect();
        self
    }

    /// How many partitions its topic gets.
    pub fn partitions(mut self, partitions: i32) -> CacheSpec {
        self.partitions = partitions;
        self
    }

    /// An existing topic, instead of a new one.
    pub fn topic(mut self, topic: &str) -> CacheSpec {
        self.topic = Some(topic.into());
        self
    }

    /// evrepl reaches each server through a [`FaultProxy`]; the test's own clients go straight to it.
    pub fn proxied(mut self) -> CacheSpec {
        self.proxied = true;
        self
    }

    /// Another key of its `[[cache]]` table, with a TOML literal: `("on_set", "\"invalidate\"")`.
    pub fn option(mut self, key: &str, literal: &str) -> CacheSpec {
        self.options.push((key.into(), literal.into()));
        self
    }
}

impl CacheSpec {
    /// With a front door on a port of 127.0.0.1; [`Cache::front_door`] says where.
    pub fn front_door(self) -> CacheSpec {
        let listen = format!("\"127.0.0.1:{}\"", free_port());
        self.option("listen", &listen)
    }
}

/// One memcached of a cache.
#[derive(Debug)]
pub struct Server {
    pub memcached: Arc<Memcached>,
    /// What stands between evrepl and it, when the spec asked for it.
    pub proxy: Option<FaultProxy>,
    /// As the configuration names it: the proxy's or its own. The ring hashes this string.
    pub address: String,
}

impl Server {
    /// What stands between evrepl and it.
    ///
    /// # Panics
    /// When the spec asked for no proxies.
    pub fn proxy(&self) -> &FaultProxy {
        self.proxy.as_ref().expect("a cache with proxies")
    }
}

/// A running cache of one region.
#[derive(Debug)]
pub struct Cache {
    pub name: String,
    pub topic: String,
    pub servers: Vec<Server>,
    pub(crate) options: Vec<(String, String)>,
    ring: Ring,
}

impl Cache {
    /// Where its front door listens.
    ///
    /// # Panics
    /// When the spec asked for none.
    pub fn front_door(&self) -> String {
        let listen = self.options.iter().find(|(key, _)| key == "listen");
        let (_, listen) = listen.expect("a cache with a front door");
        listen.trim_matches('"').to_owned()
    }

    pub(crate) fn start(spec: CacheSpec, topic: String) -> Cache {
        let memcacheds = if spec.given.is_empty() {
            let arguments: Vec<&str> = spec.arguments.iter().map(String::as_str).collect();
            (0..spec.servers)
                .map(|_| Arc::new(Memcached::start_with(&arguments)))
                .collect()
        } else {
            spec.given
        };
        let servers: Vec<Server> = memcacheds
            .into_iter()
            .map(|memcached| {
                let proxy = spec.proxied.then(|| FaultProxy::start(&memcached.address()));
                let address = proxy.as_ref().map_or_else(|| memcached.address(), FaultProxy::address);
                Server {
                    memcached,
                    proxy,
                    address,
                }
            })
            .collect();
        let addresses: Vec<String> = servers.iter().map(|server| server.address.clone()).collect();
        Cache {
            name: spec.name,
            topic,
            servers,
            options: spec.options,
            ring: Ring::new(&addresses),
        }
    }

    /// The index of the server that holds `key`.
    pub fn server_of(&self, key: &[u8]) -> usize {
        self.ring.server_of(key)
    }

    /// The memcached at `index`.
    pub fn memcached(&self, index: usize) -> &Memcached {
        &self.servers[index].memcached
    }

    /// An application's client, with connections of its own.
    pub fn client(&self) -> CacheClient {
        let clients = self.servers.iter().map(|server| server.memcached.client()).collect();
        CacheClient {
            clients,
            ring: self.ring.clone(),
        }
    }
}

/// A client of all servers of a cache that finds a key's server as libmemcached would.
#[derive(Debug)]
pub struct CacheClient {
    clients: Vec<MetaClient>,
    ring: Ring,
}

impl CacheClient {
    /// The client of the server that holds `key`, for what has no method here.
    pub fn of(&mut self, key: &[u8]) -> &mut MetaClient {
        &mut self.clients[self.ring.server_of(key)]
    }

    /// Value and flags.
    pub fn get(&mut self, key: &[u8]) -> io::Result<Option<Value>> {
        self.of(key).get(key)
    }

    /// Seconds left, -1 for ever; `None` when there is no value.
    pub fn ttl(&mut self, key: &[u8]) -> io::Result<Option<i64>> {
        self.of(key).ttl(key)
    }

    pub fn set(&mut self, key: &[u8], value: &[u8], flags: u32, exptime: u32) -> io::Result<()> {
        self.of(key).set(key, value, flags, exptime)
    }

    /// Whether there was something to delete.
    pub fn delete(&mut self, key: &[u8]) -> io::Result<bool> {
        self.of(key).delete(key)
    }

    /// Whether there was something to touch.
    pub fn touch(&mut self, key: &[u8], exptime: u32) -> io::Result<bool> {
        self.of(key).touch(key, exptime)
    }

    /// Stores all, pipelined per server.
    pub fn set_many(&mut self, puts: &[Put<'_>]) -> io::Result<()> {
        if let [only] = self.clients.as_mut_slice() {
            return only.set_many(puts);
        }
        let mut shares = vec![Vec::new(); self.clients.len()];
        for put in puts {
            shares[self.ring.server_of(put.key)].push(*put);
        }
        self.clients
            .iter_mut()
            .zip(shares)
            .try_for_each(|(client, share)| client.set_many(&share))
    }

    /// Values in the order of the keys, pipelined per server.
    pub fn get_many(&mut self, keys: &[impl AsRef<[u8]>]) -> io::Result<Vec<Option<Value>>> {
        let mut shares = vec![Vec::new(); self.clients.len()];
        for (index, key) in keys.iter().enumerate() {
            shares[self.ring.server_of(key.as_ref())].push(index);
        }
        let mut found = vec![None; keys.len()];
        for (client, share) in self.clients.iter_mut().zip(shares) {
            let values = client.get_many(share.iter().map(|&index| keys[index].as_ref()))?;
            for (index, value) in share.into_iter().zip(values) {
                found[index] = value;
            }
        }
        Ok(found)
    }
}
