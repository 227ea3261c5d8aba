//! What options must be to each other. What an option must be by itself is its form's business ([`super::codec`]).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::options::{Cache, Config, DoorTls, Peer};
use super::problem::{Problem, near_miss};
use super::section::{Reading, listed};
use super::{address, names};

/// A canary is a write to memcached, to Kafka and to the peer; ten a second show a dead path as soon as anyone can act on it.
const SHORTEST_CANARY_INTERVAL: Duration = Duration::from_millis(100);

/// Reports every broken rule, in the place of the option that should change.
pub(super) fn check(config: &Config, reading: &mut Reading) {
    let mut rules = Rules { config, reading };
    rules.kafka();
    rules.caches();
    rules.peers();
    rules.topics();
    rules.bytes();
    rules.times();
    rules.listeners();
    rules.canary();
}

struct Rules<'a> {
    config: &'a Config,
    reading: &'a mut Reading,
}

impl Rules<'_> {
    /// Reports `what` about the first of these options that was written, unless one of them is a stand-in.
    fn refuse(&mut self, about: &[&str], what: String) {
        if about.iter().any(|path| self.reading.has_failed(path)) {
            return;
        }
        let written = about.iter().find_map(|path| self.reading.place(path).cloned());
        let place = written.unwrap_or_else(|| self.reading.place_near(about.first().copied().unwrap_or_default()));
        self.reading.problems.push(Problem { place, what });
    }

    /// Refuses each of `words` that an earlier one equals.
    fn unique<'b>(&mut self, words: impl Iterator<Item = (String, &'b str)>, advice: &str) {
        let mut seen: BTreeMap<&str, String> = BTreeMap::new();
        for (path, word) in words.filter(|(_, word)| !word.is_empty()) {
            match seen.get(word) {
                Some(first) => self.refuse(&[&path], format!("`{path}` is {word:?} as `{first}` is; {advice}")),
                None => drop(seen.insert(word, path)),
            }
        }
    }

    fn kafka(&mut self) {
        if self.config.kafka.brokers.is_empty() {
            let what = "`kafka.brokers` names no broker; write at least one, like `[\"127.0.0.1:9092\"]`";
            self.refuse(&["kafka.brokers"], what.to_owned());
        }
        for name in self.config.kafka.properties.keys() {
            if let Some(why) = names::owned(name) {
                let path = format!("kafka.properties.{name}");
                self.refuse(&[&path], format!("the property `{name}` is evrepl's own: {why}"));
            }
        }
    }

    fn caches(&mut self) {
        let caches = &self.config.caches;
        if caches.is_empty() {
            self.refuse(
                &["cache"],
                "there is no cache; write at least one `[[cache]]`".to_owned(),
            );
        }
        let each = |key: &'static str| move |index: usize| format!("cache[{index}].{key}");
        let names = caches
            .iter()
            .enumerate()
            .map(|(index, cache)| (each("name")(index), cache.name.as_str()));
        self.unique(names, "write another name");
        let topics = caches
            .iter()
            .enumerate()
            .map(|(index, cache)| (each("topic")(index), cache.topic.as_str()));
        self.unique(
            topics,
            "give each cache a topic of its own, for the topic tells the cache of an event",
        );
        for (index, cache) in caches.iter().enumerate() {
            if cache.servers.is_empty() {
                let path = each("servers")(index);
                let what = format!("`{path}` names no server; write at least one, like `[\"127.0.0.1:11211\"]`");
                self.refuse(&[&path], what);
            }
            let rings = cache.servers.iter().enumerate().filter_map(|(server, spec)| {
                Some((format!("cache[{index}].servers[{server}]"), spec.ring_name.as_deref()?))
            });
            self.unique(rings, "give each server of a ring another name");
        }
        let servers = caches.iter().enumerate().flat_map(|(index, cache)| {
            let addresses = cache.servers.iter().enumerate();
            addresses.map(move |(server, spec)| (format!("cache[{index}].servers[{server}]"), spec.address.as_str()))
        });
        self.unique(servers, "a server belongs to one cache, once");
    }

    fn peers(&mut self) {
        let Config {
            peers, region, caches, ..
        } = self.config;
        let regions = peers
            .iter()
            .enumerate()
            .map(|(index, peer)| (format!("peer[{index}].region"), &*peer.region));
        self.unique(regions, "write one `[[peer]]` for a region");
        let identities = peers
            .iter()
            .enumerate()
            .map(|(index, peer)| (format!("peer[{index}].identity"), identity(peer)));
        self.unique(identities, "a peer is known by its identity alone: give each its own");
        let known: Vec<&str> = caches
            .iter()
            .map(|cache| cache.name.as_str())
            .filter(|name| !name.is_empty())
            .collect();
        for (index, peer) in peers.iter().enumerate() {
            let path = format!("peer[{index}].region");
            if peer.region == *region {
                let what = format!("`{path}` is this region itself, {region:?}; write the other region's name");
                self.refuse(&[&path, "region"], what);
            }
            let path = format!("peer[{index}].caches");
            if peer.caches.is_empty() && self.reading.place(&path).is_some() {
                self.refuse(
                    &[&path],
                    format!("`{path}` names no cache; name one, or leave it out for every cache"),
                );
            }
            let names = || {
                peer.caches
                    .iter()
                    .enumerate()
                    .map(|(at, name)| (format!("{path}[{at}]"), name.as_str()))
            };
            self.unique(names(), "name a cache once");
            for (path, name) in names().filter(|(_, name)| !name.is_empty() && !known.contains(name)) {
                let advice = match near_miss(name, known.iter().copied()) {
                    Some(meant) => format!("did you mean `{meant}`?"),
                    None => format!("write one of {}", listed(known.iter().copied())),
                };
                // Without a readable name there is no telling which cache was meant.
                if !(0..caches.len()).any(|cache| self.reading.has_failed(&format!("cache[{cache}].name"))) {
                    self.refuse(
                        &[&path],
                        format!("`{path}` is {name:?}, which is no cache here; {advice}"),
                    );
                }
            }
        }
    }

    /// Topics made from templates are topics, and nobody else's.
    fn topics(&mut self) {
        let Config {
            kafka, caches, peers, ..
        } = self.config;
        let mut taken: BTreeMap<String, String> = BTreeMap::new();
        let mut topics: Vec<(usize, &str)> = Vec::new();
        for (index, Cache { topic, .. }) in caches.iter().enumerate() {
            // What is there twice is reported once.
            let free = !topic.is_empty() && !taken.contains_key(topic);
            if free {
                taken.insert(topic.clone(), format!("`cache[{index}].topic`"));
                topics.push((index, topic));
            }
        }
        let regions: BTreeSet<&str> = peers
            .iter()
            .map(|peer| &*peer.region)
            .filter(|region| !region.is_empty())
            .collect();
        for (index, topic) in topics {
            let dead_letters = std::iter::once(("kafka.dead_letter_topic", kafka.dead_letter_topic_for(topic)));
            let retries = regions
                .iter()
                .map(|region| ("kafka.retry_topic", kafka.retry_topic_for(topic, region)));
            for (template, made) in dead_letters.chain(retries) {
                let of = format!("cache[{index}].topic");
                if !names::is_topic(&made) {
                    let what =
                        format!("`{template}` makes {made:?} of {topic:?}, longer than 249; write shorter names");
                    self.refuse(&[template, &of], what);
                } else if let Some(other) = taken.insert(made.clone(), format!("`{template}`")) {
                    let what = format!("`{template}` makes {made:?} of {topic:?}, which is {other} too; write another");
                    self.refuse(&[template, &of], what);
                }
            }
        }
    }

    /// A value must fit in where it has to go through, or it would wait for room for ever.
    fn bytes(&mut self) {
        let Config {
            flow,
            agent,
            caches,
            front_door,
            ..
        } = self.config;
        for (index, Cache { max_value_bytes, .. }) in caches.iter().enumerate() {
            let value = format!("cache[{index}].max_value_bytes");
            let room = [
                ("flow.max_in_flight_bytes", flow.max_in_flight_bytes),
                ("agent.session_window", agent.session_window),
            ];
            for (path, bytes) in room.into_iter().filter(|(_, bytes)| bytes < max_value_bytes) {
                let what =
                    format!("`{path}` is {bytes} B, less than one value (`{value}`, {max_value_bytes} B); write more");
                self.refuse(&[path, &value], what);
            }
        }
        let largest = caches.iter().enumerate().filter(|(_, cache)| cache.has_front_door());
        if let Some((index, cache)) = largest.max_by_key(|(_, cache)| cache.max_value_bytes)
            && front_door.max_buffered_bytes < cache.max_value_bytes
        {
            let (path, value) = (
                "front_door.max_buffered_bytes",
                format!("cache[{index}].max_value_bytes"),
            );
            let (bytes, most) = (front_door.max_buffered_bytes, cache.max_value_bytes);
            let what = format!("`{path}` is {bytes} B, less than one value (`{value}`, {most} B); write more");
            self.refuse(&[path, &value], what);
        }
        if agent.session_window > agent.max_in_flight_bytes {
            let what =
                "`agent.session_window` is more than `agent.max_in_flight_bytes`, which is of all sessions; write less";
            self.refuse(&["agent.session_window", "agent.max_in_flight_bytes"], what.to_owned());
        }
    }

    fn times(&mut self) {
        let Config {
            kafka,
            agent,
            link,
            memcached,
            flow,
            ..
        } = self.config;
        let session = ("kafka.session_timeout", kafka.session_timeout);
        let moved = "or a frozen process's session outlives the move of its partitions";
        let idle = "or a quiet link is taken for a dead one";
        let growing = "backoff grows from one to the other";
        let rules = [
            (("agent.idle_timeout", agent.idle_timeout), session, true, moved),
            (("link.idle_timeout", link.idle_timeout), session, true, moved),
            (
                ("link.ping_interval", link.ping_interval),
                ("link.idle_timeout", link.idle_timeout),
                true,
                idle,
            ),
            // The peer's agent is another file's business; one configuration for all is the rule.
            (
                ("link.ping_interval", link.ping_interval),
                ("agent.idle_timeout", agent.idle_timeout),
                true,
                idle,
            ),
            (
                ("link.backoff_initial", link.backoff_initial),
                ("link.backoff_max", link.backoff_max),
                false,
                growing,
            ),
            (
                ("flow.retry_backoff_initial", flow.retry_backoff_initial),
                ("flow.retry_backoff_max", flow.retry_backoff_max),
                false,
                growing,
            ),
            (
                ("memcached.backoff_initial", memcached.backoff_initial),
                ("memcached.backoff_max", memcached.backoff_max),
                false,
                growing,
            ),
        ];
        for ((shorter, time), (longer, limit), strictly, why) in rules {
            if time > limit || (strictly && time == limit) {
                let [time, limit] = [time, limit].map(humantime::format_duration);
                let relation = if strictly { "less than" } else { "at most" };
                let what = format!("`{shorter}` is {time}; write {relation} `{longer}`, which is {limit}: {why}");
                self.refuse(&[shorter, longer], what);
            }
        }
    }

    /// Zero is off. More often than this they say no more, and are a load of their own on every cache and every peer.
    fn canary(&mut self) {
        let interval = self.config.canary.interval;
        if !interval.is_zero() && interval < SHORTEST_CANARY_INTERVAL {
            let [interval, least] = [interval, SHORTEST_CANARY_INTERVAL].map(humantime::format_duration);
            let what = format!("`canary.interval` is {interval}; write at least {least}, or \"0s\" for no canaries");
            self.refuse(&["canary.interval"], what);
        }
    }

    /// Clients of a front door come from where they may, as they say that they do, to an address that is nobody else's.
    fn listeners(&mut self) {
        let Config {
            agent,
            admin,
            caches,
            front_door,
            ..
        } = self.config;
        let mut listeners: Vec<(String, &str)> = Vec::new();
        for (index, cache) in caches.iter().enumerate() {
            for (key, listen, _) in cache.doors() {
                let path = format!("cache[{index}].{key}");
                if !names::is_local(listen) && cache.listen_tls == DoorTls::Off && !front_door.allow_plaintext {
                    let what = format!(
                        "`{path}` is {listen:?}, where others than this machine can connect, and its clients speak no TLS; \
                         write `listen_tls = \"server\"`, a loopback address, or `front_door.allow_plaintext = true`"
                    );
                    self.refuse(&[&path], what);
                }
                self.no_server(index, &path, listen);
                listeners.push((path, listen));
            }
            self.doors_are_there(index, cache);
        }
        listeners.push(("agent.listen".to_owned(), &agent.listen));
        listeners.push(("admin.listen".to_owned(), &admin.listen));
        for (n, (path, listen)) in listeners.iter().enumerate() {
            let before = listeners[..n].iter();
            let Some((first, other)) = before.into_iter().find(|(_, other)| address::collide(other, listen)) else {
                continue;
            };
            let kind = if listen.starts_with("unix:") { "path" } else { "port" };
            let both = match listen == other {
                true => format!("`{path}` and `{first}` are the same"),
                false => {
                    format!("`{path}` is {listen:?} and `{first}` is {other:?}, where only one of them can listen")
                }
            };
            self.refuse(&[path, first], format!("{both}; write another {kind} for one of them"));
        }
    }

    /// A front door at a server's address would be its own server, or could not listen.
    fn no_server(&mut self, index: usize, path: &str, listen: &str) {
        for (owner, cache) in self.config.caches.iter().enumerate() {
            let mut servers = cache.servers.iter().enumerate();
            let Some((number, server)) = servers.find(|(_, server)| address::is_in_the_way(listen, &server.address))
            else {
                continue;
            };
            let server_path = format!("cache[{owner}].servers[{number}]");
            let spelled = match server.address == listen {
                true => String::new(),
                false => format!(", {:?}", server.address),
            };
            let whose = if owner == index {
                "one of its servers"
            } else {
                "a server"
            };
            let what =
                format!("`{path}` is {listen:?}, which is {whose} (`{server_path}`{spelled}); write another port");
            self.refuse(&[path, &server_path], what);
            return;
        }
    }

    /// What is said of clients that cannot come is said by mistake.
    fn doors_are_there(&mut self, index: usize, cache: &Cache) {
        let at = |key: &str| format!("cache[{index}].{key}");
        let [listen, fills] = [at("listen"), at("listen_fills")];
        if cache.listen_tls != DoorTls::Off {
            let path = at("listen_tls");
            let why = match cache.has_front_door() {
                false => "the cache has no front door; write where it listens (`listen`)",
                true => "a unix socket never speaks TLS; write a host and a port to listen on",
            };
            if cache.doors().all(|(_, door, _)| door.starts_with("unix:")) {
                let what = format!(
                    "`{path}` is {:?}, but {why}, or leave it out",
                    cache.listen_tls.as_str()
                );
                self.refuse(&[&path, &listen, &fills], what);
            }
        }
        if !cache.fill_commands.is_empty() && cache.listen.is_none() {
            let path = at("fill_commands");
            let what = format!(
                "`{path}` names commands of clients at `{listen}`, which is not there; write it, or leave these out"
            );
            self.refuse(&[&path, &listen], what);
        }
    }
}

/// As it will be once defaults are filled in.
fn identity(peer: &Peer) -> &str {
    if peer.identity.is_empty() {
        &peer.region
    } else {
        &peer.identity
    }
}
