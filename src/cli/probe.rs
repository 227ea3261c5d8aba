//! What `evrepl check --connect` asks the world. Nothing is changed there, everything is asked at the same time, and every
//! question has a time limit.

mod sample;

use std::collections::BTreeSet;
use std::io;
use std::time::{Duration, SystemTime};

use bytes::BytesMut;
use futures_util::future::{BoxFuture, FutureExt as _, join_all};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::status;
use crate::admin::Status;
use crate::config::{Cache, Config, Peer};
use crate::kafka::{KafkaError, TopicCounts, Topics};
use crate::listening::{self, Found};
use crate::memcached::{Connection, MemcachedError};
use crate::telemetry::{CollectorTakes, ask_collector};
use crate::tls::{EXPIRES_SOON, TlsError, TlsMaterial, server_name};
use crate::topics::companions;
use crate::wire::{Decoder, Frame, Limits};

/// For one question. Longer than any healthy answer, even from the other side of the world.
const ASK: Duration = Duration::from_secs(3);
/// What a peer gets to refuse us, beside a round trip: TLS 1.3 says only after the handshake that it was refused.
const SECOND_THOUGHTS: Duration = Duration::from_millis(250);
/// The first memcached whose meta commands are those that evrepl speaks.
const MEMCACHED_SINCE: (u32, u32) = (1, 6);

/// How a question was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// As it should be.
    Ok,
    /// Not there, but evrepl makes it or waits for it.
    Missing,
    /// evrepl could not work like this.
    Failed,
}

impl Verdict {
    pub(super) fn name(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Missing => "missing",
            Verdict::Failed => "failed",
        }
    }
}

/// One line of the answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Finding {
    pub verdict: Verdict,
    pub what: String,
    pub detail: String,
}

impl Finding {
    fn new(verdict: Verdict, what: impl Into<String>, detail: impl Into<String>) -> Finding {
        Finding {
            verdict,
            what: what.into(),
            detail: detail.into(),
        }
    }

    /// `Ok` with what was found, `Failed` with why not.
    fn of(what: impl Into<String>, result: Result<String, String>) -> Finding {
        match result {
            Ok(detail) => Finding::new(Verdict::Ok, what, detail),
            Err(detail) => Finding::new(Verdict::Failed, what, detail),
        }
    }
}

/// Asks everything that the configuration names; the answers in the order of the configuration.
pub(super) async fn everything(config: &Config) -> Vec<Finding> {
    let tls = TlsMaterial::load(&config.tls.certificate, &config.tls.private_key, &config.tls.ca);
    let rings = crate::run::rings(config);
    let mut questions: Vec<BoxFuture<'_, Vec<Finding>>> = vec![kafka(config).boxed()];
    let mut asked = Vec::new();
    for server in config.caches.iter().flat_map(|cache| &cache.servers) {
        // Caches may share servers.
        if !asked.contains(&server.address.as_str()) {
            asked.push(&server.address);
            questions.push(memcached(&server.address).map(|found| vec![found]).boxed());
        }
    }
    for (cache, ring) in config.caches.iter().zip(&rings) {
        let weights: f64 = cache.servers.iter().map(|server| f64::from(server.weight)).sum();
        // With one server there is nothing to compare: every key belongs there.
        let several = cache.servers.iter().enumerate().filter(|_| cache.servers.len() > 1);
        for (n, server) in several {
            let share = f64::from(server.weight) / weights;
            let compared = sample::compare(&cache.name, &server.address, ring, n, share);
            questions.push(compared.map(|found| found.into_iter().collect()).boxed());
        }
    }
    questions.push(certificate(&tls, &config.region).map(|found| vec![found]).boxed());
    if let Ok(tls) = &tls {
        for peer in &config.peers {
            questions.push(peer_answers(tls, peer).map(|found| vec![found]).boxed());
        }
    }
    questions.push(
        agent_address(config, tls.as_ref().ok())
            .map(|found| vec![found])
            .boxed(),
    );
    questions.push(admin_address(config).map(|found| vec![found]).boxed());
    questions.push(front_doors(config).boxed());
    if let Some(endpoint) = &config.telemetry.otlp_endpoint {
        questions.push(collector(endpoint).map(|found| vec![found]).boxed());
    }
    join_all(questions).await.into_iter().flatten().collect()
}

async fn kafka(config: &Config) -> Vec<Finding> {
    let what = format!("kafka {}", config.kafka.brokers.join(", "));
    let kafka = config.kafka.clone();
    let mut topics: Vec<String> = config.caches.iter().map(|cache| cache.topic.clone()).collect();
    for cache in 0..config.caches.len() {
        topics.extend(companions(config, cache));
    }
    let groups: Vec<String> = (config.peers.iter())
        .map(|peer| config.kafka.group_for(&peer.region, &config.region))
        .collect();
    // librdkafka's calls block.
    let asked = tokio::task::spawn_blocking(move || {
        let client = Topics::new(&kafka, "evrepl-check")?;
        let counts = client.partitions(&topics, ASK)?;
        // Nobody knows the groups of a Kafka that is ours alone.
        let read = groups
            .iter()
            .map(|group| client.read_by(group, ASK).unwrap_or_default());
        Ok((counts, read.collect::<Vec<_>>()))
    })
    .await;
    let asked = asked.unwrap_or_else(|error| Err(KafkaError::Broker(error.to_string())));
    match asked {
        Err(error) => vec![Finding::new(Verdict::Failed, what, error.to_string())],
        Ok((counts, read)) => {
            let mut found = vec![Finding::new(Verdict::Ok, what, "answers")];
            found.extend(topics_found(config, &counts));
            found.extend(shared_topics(config, &read));
            found
        }
    }
}

/// Topics that a peer's relay reads as its own. `read`: by peer, what the group of its flow to us reads.
fn shared_topics(config: &Config, read: &[BTreeSet<String>]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (peer, read) in config.peers.iter().zip(read) {
        for cache in config.caches.iter().filter(|cache| read.contains(&cache.topic)) {
            let region = &peer.region;
            let reason = format!(
                "{region} reads it too: each region would look for the other's keys in its own memcached, not find them, and remove \
                 them there; give each region a topic of its own for cache {}, such as {}.{}",
                cache.name, config.region, cache.name
            );
            findings.push(Finding::new(Verdict::Failed, format!("topic {}", cache.topic), reason));
        }
    }
    findings
}

fn topics_found(config: &Config, counts: &TopicCounts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut judge = |topic: &str, absent: String| {
        findings.push(match counts.get(topic).copied().flatten() {
            Some(1) => Finding::new(Verdict::Ok, format!("topic {topic}"), "1 partition"),
            Some(count) => Finding::new(Verdict::Ok, format!("topic {topic}"), format!("{count} partitions")),
            None => Finding::new(Verdict::Missing, format!("topic {topic}"), absent),
        });
    };
    for (n, cache) in config.caches.iter().enumerate() {
        judge(
            &cache.topic,
            format!("create it: evrepl waits for the events of cache {}", cache.name),
        );
        for topic in companions(config, n) {
            judge(&topic, "evrepl creates it itself".to_owned());
        }
    }
    findings
}

async fn memcached(address: &str) -> Finding {
    let ask = async {
        let mut connection = Connection::connect(address, ASK).await?;
        let version = connection.version().await?;
        // An older one does not know this command; its version says so better than its reply.
        let meta = connection.noop().await;
        Ok::<_, MemcachedError>((version, meta))
    };
    let answer = match timeout(ASK, ask).await {
        Err(_) => Err(format!("no answer within {ASK:?}")),
        Ok(Err(error)) => Err(error.to_string()),
        Ok(Ok((version, meta))) => match (is_new_enough(&version), meta) {
            (true, Ok(())) => Ok(format!("version {version}")),
            (true, Err(error)) => Err(format!("version {version} does not speak meta commands: {error}")),
            (false, _) => Err(format!("version {version} is too old: evrepl needs 1.6")),
        },
    };
    Finding::of(format!("memcached {address}"), answer)
}

/// Versions look like `1.6.18`, `1.6.18-debian` or `1.7`.
fn is_new_enough(version: &str) -> bool {
    let mut numbers = version
        .split(|letter: char| !letter.is_ascii_digit())
        .map_while(|part| part.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => (major, minor) >= MEMCACHED_SINCE,
        _ => false,
    }
}

/// Shakes hands with ourselves: a certificate that its own CA does not vouch for is refused here as it would be there.
async fn certificate(tls: &Result<TlsMaterial, TlsError>, region: &str) -> Finding {
    let answer = match tls {
        Err(error) => Err(error.to_string()),
        Ok(tls) => match tls.identities().first() {
            None => Err("it carries no DNS name: no peer would know whom it speaks to".to_owned()),
            Some(identity) => with_ourselves(tls, identity).await.map(|()| tls.identities()),
        }
        .map(|identities| described(identities, region, tls.not_after())),
    };
    Finding::of("certificate", answer)
}

async fn with_ourselves(tls: &TlsMaterial, identity: &str) -> Result<(), String> {
    let name = server_name(identity).map_err(|error| error.to_string())?;
    // More than a handshake's bytes: both ends are on one task.
    let (here, there) = tokio::io::duplex(64 << 10);
    let (dialled, accepted) = tokio::join!(tls.connect(name, here), tls.accept(there));
    match (dialled, accepted) {
        (Ok(_), Ok(_)) => Ok(()),
        (Err(error), _) | (_, Err(error)) => Err(format!("refused even by ourselves: {error}")),
    }
}

fn described(identities: &[String], region: &str, not_after: Option<SystemTime>) -> String {
    let mut detail = format!("identity {}", identities.join(", "));
    if !identities.iter().any(|identity| identity == region) {
        detail.push_str(&format!("; peers must say so: identity = \"{}\"", identities[0]));
    }
    // Expired ones do not come here.
    if let Some(left) = not_after.and_then(|end| end.duration_since(SystemTime::now()).ok()) {
        let days = left.as_secs() / (24 * 60 * 60);
        let soon = if left < EXPIRES_SOON { ": soon" } else { "" };
        detail.push_str(&format!("; expires in {days} days{soon}"));
    }
    detail
}

async fn peer_answers(tls: &TlsMaterial, peer: &Peer) -> Finding {
    let Some(address) = &peer.address else {
        let what = format!("peer {}", peer.region);
        return Finding::new(Verdict::Ok, what, "not asked: this region only receives from it");
    };
    let answer = match greet(tls, address, &peer.identity).await {
        Ok(Greeted::Welcome) => Ok(format!("is {}, and knows us", peer.identity)),
        Ok(Greeted::Refused(reason)) => Err(format!("refuses us: {reason}")),
        Err(reason) => Err(reason),
    };
    Finding::of(format!("peer {} {address}", peer.region), answer)
}

/// What an agent makes of our certificate.
enum Greeted {
    /// It waits for our hello.
    Welcome,
    /// It said why not, or just closed.
    Refused(String),
}

/// Dials an agent, checks its identity, and hears whether it wants us. Says no hello: no session begins.
async fn greet(tls: &TlsMaterial, address: &str, identity: &str) -> Result<Greeted, String> {
    let name = server_name(identity).map_err(|error| error.to_string())?;
    let began = Instant::now();
    let dial = async {
        let tcp = TcpStream::connect(address)
            .await
            .map_err(|error| format!("cannot connect: {error}"))?;
        tls.connect(name, tcp).await.map_err(|error| error.to_string())
    };
    let dialled = timeout(ASK, dial)
        .await
        .map_err(|_| format!("no connection within {ASK:?}"))?;
    let mut stream = dialled?;
    // Dialling took two round trips, and a refusal takes one.
    let wait = (began.elapsed() + SECOND_THOUGHTS).min(ASK);
    let mut decoder = Decoder::new(Limits::default());
    let mut buffer = BytesMut::new();
    let hear = async {
        loop {
            match decoder.decode(&mut buffer) {
                Ok(Some(Frame::GoAway(goodbye))) => return goodbye.reason,
                Ok(_) => {}
                Err(error) => return error.to_string(),
            }
            match stream.read_buf(&mut buffer).await {
                Ok(0) => return "it closes the connection".to_owned(),
                Ok(_) => {}
                Err(error) => return error.to_string(),
            }
        }
    };
    Ok(match timeout(wait, hear).await {
        Ok(reason) => Greeted::Refused(reason),
        Err(_) => Greeted::Welcome,
    })
}

/// Without its collector evrepl replicates as ever, so nothing here is a failure.
async fn collector(endpoint: &str) -> Finding {
    let answer = timeout(ASK, ask_collector(endpoint)).await;
    let (verdict, detail) = match answer {
        Ok(Ok(CollectorTakes::Both)) => (Verdict::Ok, "takes traces and metrics".to_owned()),
        Ok(Ok(CollectorTakes::TracesOnly)) => (Verdict::Ok, "takes traces; metrics are at /metrics only".to_owned()),
        Ok(Err(why)) => (Verdict::Missing, why),
        Err(_) => (Verdict::Missing, format!("no answer within {ASK:?}")),
    };
    Finding::new(verdict, format!("otlp {endpoint}"), detail)
}

/// Whether an address can be listened on.
enum Place {
    Free,
    Taken,
    Unusable(String),
}

/// Takes the address for a moment, as [`crate::run`] would.
async fn place(listen: &str) -> Place {
    let (listen, address) = (listen.to_owned(), listen.to_owned());
    // Looking a name up blocks.
    let bound = tokio::task::spawn_blocking(move || listening::tcp(&listen).map(drop));
    match timeout(ASK, bound).await {
        Ok(Ok(Ok(()))) => Place::Free,
        Ok(Ok(Err(error))) if error.kind() == io::ErrorKind::AddrInUse => Place::Taken,
        Ok(Ok(Err(error))) => {
            let then = listening::remedy(&address, &error);
            Place::Unusable(format!("cannot listen: {error}; {then}"))
        }
        Ok(Err(error)) => Place::Unusable(error.to_string()),
        Err(_) => Place::Unusable(format!("name not found within {ASK:?}")),
    }
}

async fn agent_address(config: &Config, tls: Option<&TlsMaterial>) -> Finding {
    let listen = &config.agent.listen;
    let answer = match place(listen).await {
        Place::Free => Ok("free".to_owned()),
        Place::Unusable(reason) => Err(reason),
        Place::Taken => match tls.and_then(|tls| Some((tls, tls.identities().first()?))) {
            None => Err("taken, and without a certificate nobody can say by whom".to_owned()),
            // Even if it refuses itself: it showed our own identity, so it is us.
            Some((tls, identity)) => match greet(tls, &status::reachable(listen), identity).await {
                Ok(_) => Ok("this region's evrepl answers".to_owned()),
                Err(reason) => Err(format!("taken by something else: {reason}")),
            },
        },
    };
    Finding::of(format!("agent.listen {listen}"), answer)
}

async fn admin_address(config: &Config) -> Finding {
    let listen = &config.admin.listen;
    let answer = match place(listen).await {
        Place::Free => Ok("free".to_owned()),
        Place::Unusable(reason) => Err(reason),
        Place::Taken => match who_runs(config).await {
            Ok(status) if status.region == config.region => {
                Ok(format!("evrepl {} of this region answers", status.version))
            }
            Ok(status) => Err(format!("taken by evrepl of region {}", status.region)),
            Err(error) => Err(format!("taken by something else: {error}")),
        },
    };
    Finding::of(format!("admin.listen {listen}"), answer)
}

/// What answers at `admin.listen`.
async fn who_runs(config: &Config) -> Result<Status, String> {
    let address = config.admin.listen.clone();
    let asked = tokio::task::spawn_blocking(move || status::fetch(&address)).await;
    let (_, status) = asked
        .map_err(|error| error.to_string())?
        .map_err(|error| error.to_string())?;
    Ok(status)
}

/// Whether each front door can listen.
async fn front_doors(config: &Config) -> Vec<Finding> {
    let doors = config.caches.iter().flat_map(|cache| {
        cache
            .doors()
            .map(move |(key, listen, _)| front_door(config, cache, key, listen))
    });
    join_all(doors).await
}

async fn front_door(config: &Config, cache: &Cache, key: &str, listen: &str) -> Finding {
    let (place, free) = match listen.strip_prefix("unix:") {
        Some(path) => socket_place(path).await,
        None => (place(listen).await, "free"),
    };
    let answer = match place {
        Place::Free => Ok(free.to_owned()),
        Place::Unusable(reason) => Err(reason),
        // Whoever connects speaks with the servers behind it: only the evrepl that has it can tell.
        Place::Taken => {
            let has_it = |status: &Status| status.front_doors.iter().any(|door| door.cache == cache.name);
            let then = listening::remedy(listen, &io::ErrorKind::AddrInUse.into());
            match who_runs(config).await {
                Ok(status) if status.region == config.region && has_it(&status) => {
                    Ok(format!("evrepl {} of this region is there", status.version))
                }
                Ok(status) => Err(format!(
                    "taken, and not by evrepl of region {} at admin.listen, which has no front door of this cache here; {then}",
                    status.region
                )),
                Err(_) => Err(format!(
                    "taken by something else, for no evrepl answers at admin.listen; {then}"
                )),
            }
        }
    };
    Finding::of(format!("cache {} {key} {listen}", cache.name), answer)
}

/// Whether a socket can be made at this path, as [`crate::run`] would; nothing is made or removed. With what it is if it can.
async fn socket_place(path: &str) -> (Place, &'static str) {
    let path = path.to_owned();
    let looked = tokio::task::spawn_blocking(move || {
        let unusable = |error: io::Error| {
            let then = listening::remedy(&format!("unix:{path}"), &error);
            Place::Unusable(format!("cannot listen: {error}; {then}"))
        };
        match listening::found_at(&path) {
            Err(error) => (unusable(error), ""),
            Ok(Found::Answers) => (Place::Taken, ""),
            Ok(Found::NoSocket) => (unusable(listening::no_socket()), ""),
            Ok(found) => match listening::can_make(&path) {
                Err(error) => (unusable(error), ""),
                Ok(()) if found == Found::Left => (Place::Free, "free: nobody listens on the socket that is there"),
                Ok(()) => (Place::Free, "free"),
            },
        }
    });
    match timeout(ASK, looked).await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => (Place::Unusable(error.to_string()), ""),
        Err(_) => (
            Place::Unusable(format!("the file system does not answer within {ASK:?}")),
            "",
        ),
    }
}

#[cfg(test)]
mod tests;
