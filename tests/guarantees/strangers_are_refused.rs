//! Whoever is not a peer is refused on the agent's port, with one clear log line, and harms nobody; a peer writes the caches
//! configured for it and no other, and what it may not write (yet) waits.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use evrepl::outcome::Outcome;
use evrepl::wire::{
    self, CacheStatus, Codec, Decoder, Expiry, Frame, Hello, ItemEncoder, ItemOp, ItemRef, Limits, Ping,
};
use evrepl_lab::{
    CacheSpec, Certs, Memcached, PeerSpec, Region, RegionBuilder, Sampler, TwoRegions, accounted, assert_same, settle,
    shared, two_regions, wait_until,
};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;

const US: &str = "us-east-1";
const EU: &str = "eu-west-1";

/// For what must happen at once, on a busy machine. Longer than the five seconds a caller has for its greeting.
const SOON: Duration = Duration::from_secs(15);

/// A certificate chain and its key, as a caller shows them.
type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn identity(folder: &Path, name: &str) -> Identity {
    let file = |suffix: &str| fs::read(folder.join(format!("{name}.{suffix}"))).unwrap();
    let chain = CertificateDer::pem_slice_iter(&file("pem"))
        .map(Result::unwrap)
        .collect();
    (chain, PrivateKeyDer::from_pem_slice(&file("key")).unwrap())
}

/// A CA of this name with a key that it has already, or a new one.
fn authority(name: &str, key: Option<&Path>) -> Issuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let read = |path: &Path| KeyPair::from_pem(&fs::read_to_string(path).unwrap()).unwrap();
    Issuer::new(params, key.map_or_else(|| KeyPair::generate().unwrap(), read))
}

/// A certificate for `name` that is valid from and until these days from now.
fn issued(ca: &Issuer<'static, KeyPair>, name: &str, days: std::ops::Range<i64>) -> Identity {
    let mut params = CertificateParams::new([name.to_string()]).unwrap();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let now = OffsetDateTime::now_utc();
    params.not_before = now + time::Duration::days(days.start);
    params.not_after = now + time::Duration::days(days.end);
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, ca).unwrap();
    (
        vec![certificate.der().clone()],
        PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
    )
}

/// Who calls, and what it says it speaks.
struct Caller {
    identity: Option<Identity>,
    protocols: Vec<Vec<u8>>,
}

impl Caller {
    fn with(identity: Identity) -> Caller {
        Caller {
            identity: Some(identity),
            protocols: vec![b"evrepl/1".to_vec()],
        }
    }

    fn speaking(mut self, protocols: &[&[u8]]) -> Caller {
        self.protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        self
    }

    fn connector(&self, certs: &Certs) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        let ca = fs::read(certs.path().join("ca.pem")).unwrap();
        roots.add(CertificateDer::from_pem_slice(&ca).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.unwrap().with_root_certificates(roots);
        let mut config = match &self.identity {
            Some((chain, key)) => config.with_client_auth_cert(chain.clone(), key.clone_key()).unwrap(),
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = self.protocols.clone();
        TlsConnector::from(Arc::new(config))
    }

    /// Shakes hands with the agent of `region` as far as that goes, says `words`, and listens until the agent closes or
    /// `until` is satisfied. Returns from where it called, and what it heard.
    fn say(&self, region: &Region, words: &[u8], until: impl Fn(&[u8]) -> bool) -> (SocketAddr, Vec<u8>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let tcp = tokio::net::TcpStream::connect(region.agent_address()).await.unwrap();
            let from = tcp.local_addr().unwrap();
            let name = ServerName::try_from(region.name().to_string()).unwrap();
            let mut heard = Vec::new();
            let Ok(mut stream) = self.connector(region.certs()).connect(name, tcp).await else {
                return (from, heard);
            };
            // Both may fail when the agent has refused by now: in TLS 1.3 the caller's handshake is over first.
            if stream.write_all(words).await.is_ok() && stream.flush().await.is_ok() {
                let listening = async {
                    while !until(&heard) {
                        match stream.read_buf(&mut heard).await {
                            Ok(0) | Err(_) => break,
                            Ok(_) => {}
                        }
                    }
                };
                let answered = tokio::time::timeout(SOON, listening).await;
                assert!(answered.is_ok(), "the agent neither answers nor closes: {heard:?}");
            }
            (from, heard)
        })
    }
}

/// The one log line of `region` about the caller from this address.
#[track_caller]
fn refusal(region: &Region, from: SocketAddr) -> String {
    let mark = format!("remote=\"{from}\"");
    let lines = || -> Vec<String> {
        let log = region.log();
        log.lines()
            .filter(|line| line.contains(&mark))
            .map(str::to_string)
            .collect()
    };
    wait_until(&format!("a log line about {from}"), SOON, || !lines().is_empty());
    let lines = lines();
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(
        lines[0].contains("WARN") && lines[0].contains("caller refused"),
        "{}",
        lines[0]
    );
    lines[0].clone()
}

fn hello(caches: &[&str]) -> Hello {
    Hello {
        min_version: wire::VERSION,
        max_version: wire::VERSION,
        software: "a test".into(),
        caches: caches.iter().map(|cache| cache.to_string()).collect(),
        regions: vec![US.into()],
        features: Vec::new(),
        max_frame_bytes: Limits::default().max_frame_bytes,
    }
}

fn frame(frame: &Frame) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    wire::encode(frame, &mut bytes);
    bytes.to_vec()
}

/// The frames of what was heard.
fn frames(heard: &[u8]) -> Vec<Frame> {
    let mut decoder = Decoder::new(Limits::default());
    let mut buffer = BytesMut::from(heard);
    std::iter::from_fn(|| decoder.decode(&mut buffer).unwrap()).collect()
}

fn went_away(heard: &[u8]) -> bool {
    frames(heard).iter().any(|frame| matches!(frame, Frame::GoAway(_)))
}

/// Both flows bring what is written now.
fn replicates(pair: &TwoRegions, generation: &str) -> Vec<String> {
    let mut keys = Vec::new();
    for region in pair.both() {
        let own: Vec<String> = (0..100)
            .map(|n| format!("{}:{generation}:{n}", region.name()))
            .collect();
        region
            .writer("sessions")
            .set_all(own.iter().map(|key| (key, generation)));
        keys.extend(own);
    }
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    let mut there = pair.eu.cache("sessions").client();
    assert!(there.get_many(&keys).unwrap().iter().all(Option::is_some));
    keys
}

#[test]
fn callers_without_a_peers_certificate_are_refused_with_one_clear_line_each_and_harm_nobody() {
    let _gate = shared();
    let pair = two_regions();
    let sampler = Sampler::start(&pair.both());
    replicates(&pair, "before");
    let session = pair.eu.status()["agent"]["sessions"].clone();
    assert_eq!(session.as_array().unwrap().len(), 1);

    let certs = pair.eu.certs();
    certs.add(&["ap-south-1"]);
    // Its subject as `evrepl certs` spells it; that it is the right one is shown by a valid certificate being taken.
    let ca = authority("evrepl development CA", Some(&certs.path().join("ca.key")));
    let namesake = Certs::issue(&[US]);
    let other = authority("somebody else's", None);
    let own = || identity(certs.path(), US);
    let greeting = frame(&Frame::Hello(hello(&["sessions"])));
    // A caller, and the words that its line must have.
    let strangers = [
        (
            "another ca's",
            Caller::with(issued(&other, US, -1..1)),
            ["tls", "UnknownIssuer"],
        ),
        (
            "a ca's of the same name",
            Caller::with(identity(namesake.path(), US)),
            ["tls", "BadSignature"],
        ),
        ("expired", Caller::with(issued(&ca, US, -30..-1)), ["tls", "expired"]),
        (
            "not valid yet",
            Caller::with(issued(&ca, US, 2..30)),
            ["tls", "not valid yet"],
        ),
        (
            "unknown identity",
            Caller::with(identity(certs.path(), "ap-south-1")),
            ["no [[peer]]", "ap-south-1"],
        ),
        (
            "own region's",
            Caller::with(identity(certs.path(), EU)),
            ["this region itself", EU],
        ),
        (
            "another protocol",
            Caller::with(own()).speaking(&[b"http/1.1"]),
            ["tls", "rotocol"],
        ),
        (
            "no protocol",
            Caller::with(own()).speaking(&[]),
            ["evrepl/1", "no protocol"],
        ),
        (
            "no certificate",
            Caller {
                identity: None,
                ..Caller::with(own())
            },
            ["tls", "ertificate"],
        ),
    ];
    let mut callers = Vec::new();
    for (name, caller, words) in &strangers {
        let (from, heard) = caller.say(&pair.eu, &greeting, |_| false);
        let accepted = frames(&heard).iter().any(|frame| matches!(frame, Frame::HelloAck(_)));
        assert!(!accepted, "{name} was let in");
        let line = refusal(&pair.eu, from);
        assert!(words.iter().all(|word| line.contains(word)), "{name}: {line}");
        callers.push(from);
    }
    // A valid certificate of the same making is taken: it is the dates that were refused, and nothing else of it.
    let peer = Caller::with(issued(&ca, US, -1..1));
    let (from, heard) = peer.say(&pair.eu, &greeting, |heard| !frames(heard).is_empty());
    assert!(matches!(&frames(&heard)[..], [Frame::HelloAck(ack)] if ack.caches == [CacheStatus::Accepted]));
    wait_until("its session is logged", SOON, || {
        pair.eu
            .log()
            .contains(&format!("session accepted peer=\"{US}\" remote=\"{from}\""))
    });

    replicates(&pair, "after");
    // One line each, even now; and the peer's link never noticed.
    callers.iter().for_each(|from| drop(refusal(&pair.eu, *from)));
    let now = pair.eu.status()["agent"]["sessions"].clone();
    assert_eq!(now[0]["remote"], session[0]["remote"]);
    assert_eq!(pair.us.flow(EU).json["reconnects"], 0);
    accounted(&pair.both());
    sampler.finish();
}

#[test]
fn callers_that_speak_nonsense_or_fall_silent_are_refused_and_harm_nobody() {
    let _gate = shared();
    let pair = two_regions();
    let sampler = Sampler::start(&pair.both());
    replicates(&pair, "before");
    let certs = pair.eu.certs();
    let peer = || Caller::with(identity(certs.path(), US));

    // Those that fall silent hold their places until the agent gives them up, while the others are tried.
    let dial = || TcpStream::connect(pair.eu.agent_address()).unwrap();
    let silent = dial();
    let mut half = dial();
    // A TLS record of 512 bytes that begins a ClientHello, and stops.
    half.write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03half of a greeting")
        .unwrap();
    let mut drip = dial();
    drip.write_all(b"\x16").unwrap();
    replicates(&pair, "beside silent callers");

    let mut garbage = dial();
    garbage.write_all(&[0xA5; 3_000]).unwrap();
    let mut http = dial();
    http.write_all(b"GET /metrics HTTP/1.1\r\nHost: evrepl\r\n\r\n")
        .unwrap();
    let mut gone = dial();
    gone.write_all(b"\x16\x03\x01").unwrap();
    for (name, stream, word) in [
        ("garbage", &garbage, "tls"),
        ("http", &http, "tls"),
        ("gone", &gone, "tls"),
    ] {
        if name == "gone" {
            stream.shutdown(std::net::Shutdown::Both).unwrap();
        }
        let line = refusal(&pair.eu, stream.local_addr().unwrap());
        assert!(line.contains(word), "{name}: {line}");
    }
    // Through TLS with a peer's certificate, and then no greeting.
    let ping = frame(&Frame::Ping(Ping {
        id: 1,
        sent_us: 1,
        offset_us: None,
    }));
    let no_version = frame(&Frame::Hello(Hello {
        min_version: 7,
        max_version: 9,
        ..hello(&["sessions"])
    }));
    let inside: [(&str, Vec<u8>, &str); 4] = [
        ("ping first", ping, "not a hello"),
        ("a frame of 4 GiB", vec![0xFF; 64], "exceeds the limit"),
        (
            "a frame that is no map",
            b"\x00\x00\x00\x06\x01\x01junk".to_vec(),
            "malformed hello",
        ),
        (
            "another version",
            no_version,
            "no common wire version, caller has 7 to 9",
        ),
    ];
    for (name, words, word) in &inside {
        let (from, heard) = peer().say(&pair.eu, words, went_away);
        let accepted = frames(&heard).iter().any(|frame| matches!(frame, Frame::HelloAck(_)));
        assert!(!accepted, "{name} was let in");
        let line = refusal(&pair.eu, from);
        assert!(line.contains(word), "{name}: {line}");
    }
    let (from, _) = peer().say(&pair.eu, b"", |_| false);
    assert!(refusal(&pair.eu, from).contains("no greeting within 5s"));
    for mut stream in [silent, half, drip] {
        let line = refusal(&pair.eu, stream.local_addr().unwrap());
        assert!(line.contains("no greeting within 5s"), "{line}");
        // Closed, not only logged.
        stream.set_read_timeout(Some(SOON)).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    }

    replicates(&pair, "after");
    assert_eq!(pair.us.flow(EU).json["reconnects"], 0);
    accounted(&pair.both());
    sampler.finish();
}

#[test]
fn a_relay_sends_nothing_to_an_agent_with_another_identity() {
    let _gate = shared();
    let certs = Arc::new(Certs::issue(&[US, EU, "ap-south-1"]));
    // It would take what us-east-1 sends, and has a certificate of the same CA; but it isn't who is dialled.
    let impostor = RegionBuilder::new("ap-south-1")
        .certs(&certs)
        .peer(PeerSpec::receive_only(US))
        .start();
    let us = RegionBuilder::new(US)
        .certs(&certs)
        .peer(PeerSpec::at(EU, &impostor.agent_address()))
        .start();
    let sampler = Sampler::start(&[&us, &impostor]);
    us.writer("sessions").set_all([("secret", "for eu-west-1 only")]);
    us.wait_until("its event is taken, and waits", SOON, |status| {
        let flow = &status["flows"][0];
        flow["in_flight"] == 1
            && flow["links"][0]["last_error"]
                .as_str()
                .is_some_and(|error| error.contains("tls"))
    });
    assert!(us.log().contains("certificate not valid for name"), "{}", us.log());
    assert_eq!(impostor.status()["agent"]["sessions"], serde_json::json!([]));
    assert_eq!(impostor.cache("sessions").client().get(b"secret").unwrap(), None);
    sampler.finish();
}

/// Opens a session as `region`'s peer us-east-1 would, for these caches, then sends one item for the cache of this number.
fn rogue(region: &Region, caches: &[&str], cache: u16) -> (SocketAddr, Vec<Frame>) {
    let mut encoder = ItemEncoder::default();
    encoder.push(&ItemRef {
        cache,
        op: ItemOp::Set,
        key: b"key",
        value: b"of a rogue",
        flags: 0,
        expiry: Expiry::Never,
        ver: 1,
        origin: None,
        looked_at: 0,
        age_us: 0,
        produced_at_ms: 1,
        trace: None,
    });
    let mut words = frame(&Frame::Hello(hello(caches)));
    words.extend(frame(&Frame::Batch(encoder.finish(Codec::Raw).into_frame(1, 0))));
    let caller = Caller::with(identity(region.certs().path(), US));
    let acked = |heard: &[u8]| frames(heard).iter().any(|frame| matches!(frame, Frame::Ack(_)));
    let (from, heard) = caller.say(region, &words, acked);
    (from, frames(&heard))
}

/// `eu` as a test wants it: on the port and with the memcacheds of the one before it, with these caches for its peer.
fn eu_with(caches: &[(&str, &Arc<Memcached>)], own: &[&str], certs: &Arc<Certs>, address: Option<&str>) -> Region {
    let peer = PeerSpec::receive_only(US).caches(own);
    let mut builder = RegionBuilder::new(EU).certs(certs).peer(peer);
    for (name, memcached) in caches {
        builder = builder.cache(CacheSpec::new(name).given(&[Arc::clone(memcached)]));
    }
    if let Some(address) = address {
        builder = builder.set("agent.listen", &format!("{address:?}"));
    }
    builder.start()
}

/// `us` that sends sessions and profiles to the agent at `address`.
fn us_with(certs: &Arc<Certs>, address: &str) -> Region {
    let builder = RegionBuilder::new(US).certs(certs).peer(PeerSpec::at(EU, address));
    // What waits for the agent to take its cache is not parked, however long that lasts.
    let builder = builder.set("flow.retry_budget", "\"100ms\"");
    ["sessions", "profiles"]
        .into_iter()
        .fold(builder, |builder, cache| builder.cache(CacheSpec::new(cache)))
        .start()
}

fn write(region: &Region, cache: &str, generation: &str) -> Vec<String> {
    let keys: Vec<String> = (0..100).map(|n| format!("{generation}:{n}")).collect();
    region.writer(cache).set_all(keys.iter().map(|key| (key, cache)));
    keys
}

/// Sessions arrive while profiles wait, nothing of them lost or ended, until `open` has made the agent take them; then they
/// arrive too.
fn profiles_wait_until(us: &Region, eu: Region, open: impl FnOnce() -> Region) {
    let sampler = Sampler::start(&[us]);
    let waiting = write(us, "profiles", "early");
    let mut keys = write(us, "sessions", "early");
    us.wait_until(
        "sessions have arrived and profiles wait",
        Duration::from_secs(30),
        |status| {
            let flow = &status["flows"][0];
            flow["outcomes"]["applied"] == 100 && flow["in_flight"] == 100
        },
    );
    assert_same(&[us, &eu], "sessions", &keys);
    us.wait_until("it says what they wait for", SOON, |status| {
        let waits = status["flows"][0]["waiting_for"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        waits
            .iter()
            .any(|wait| wait["server"].as_str().is_some_and(|name| name.contains("profiles")))
    });
    let log = us.log();
    let lines: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("does not take this cache"))
        .collect();
    assert!(lines.len() == 1 && lines[0].contains("profiles"), "{lines:#?}");
    keys.extend(write(us, "sessions", "still going on"));
    us.wait_until("sessions go on", Duration::from_secs(30), |status| {
        status["flows"][0]["outcomes"]["applied"] == 200
    });
    assert_same(&[us, &eu], "sessions", &keys);
    assert_eq!(us.flow(EU).outcome(Outcome::Applied), us.flow(EU).finished());

    assert_eq!(eu.terminate(), 0);
    let eu = open();
    settle(&[us, &eu]);
    assert_same(&[us, &eu], "profiles", &waiting);
    assert_same(&[us, &eu], "sessions", &keys);
    let found = eu.cache("profiles").client().get_many(&waiting).unwrap();
    assert!(found.iter().all(Option::is_some));
    assert_eq!(us.flow(EU).outcome(Outcome::Applied), 300);
    accounted(&[us]);
    sampler.finish();
}

#[test]
fn a_peer_cannot_write_a_cache_that_is_not_its_own_and_its_events_wait_until_it_may() {
    let _gate = shared();
    let certs = Arc::new(Certs::issue(&[US, EU]));
    let (sessions, profiles) = (Arc::new(Memcached::start()), Arc::new(Memcached::start()));
    let caches = [("sessions", &sessions), ("profiles", &profiles)];
    let eu = eu_with(&caches, &["sessions"], &certs, None);
    let address = eu.agent_address();

    // A peer that doesn't care what the greeting said.
    let (from, heard) = rogue(&eu, &["sessions", "profiles"], 1);
    assert!(
        matches!(&heard[..], [Frame::HelloAck(ack)] if ack.caches == [CacheStatus::Accepted, CacheStatus::Forbidden]),
        "{heard:?}"
    );
    assert_eq!(profiles.client().get(b"key").unwrap(), None);
    let log = eu.log();
    let ended: Vec<&str> = log.lines().filter(|line| line.contains("session ended")).collect();
    assert!(
        ended.len() == 1 && ended[0].contains("did not accept"),
        "{from}: {ended:#?}"
    );
    // Nor a number that it never named; while with its own cache it may write.
    rogue(&eu, &["sessions"], 7);
    let (_, heard) = rogue(&eu, &["sessions", "profiles"], 0);
    assert!(matches!(&heard[..], [Frame::HelloAck(_), Frame::Ack(_)]), "{heard:?}");
    assert_eq!(
        sessions.client().get(b"key").unwrap(),
        Some((b"of a rogue".to_vec(), 0))
    );

    let us = us_with(&certs, &address);
    wait_until("the agent says so, once a session", SOON, || {
        let log = eu.log();
        let said = log
            .lines()
            .filter(|line| line.contains("may not write this cache") && line.contains("profiles"));
        said.count() == 3
    });
    profiles_wait_until(&us, eu, || {
        eu_with(&caches, &["sessions", "profiles"], &certs, Some(&address))
    });
}

#[test]
fn a_cache_that_the_agent_does_not_know_waits_until_it_does_while_others_go_on() {
    let _gate = shared();
    let certs = Arc::new(Certs::issue(&[US, EU]));
    let (sessions, profiles) = (Arc::new(Memcached::start()), Arc::new(Memcached::start()));
    let eu = eu_with(&[("sessions", &sessions)], &["sessions"], &certs, None);
    let address = eu.agent_address();
    let us = us_with(&certs, &address);
    let both = [("sessions", &sessions), ("profiles", &profiles)];
    profiles_wait_until(&us, eu, || {
        eu_with(&both, &["sessions", "profiles"], &certs, Some(&address))
    });
}
