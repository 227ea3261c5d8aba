//! What each question makes of the answers it may get.

use std::path::{Path, PathBuf};

use bytes::BytesMut;
use tokio::io::AsyncWriteExt as _;

use super::*;
use crate::wire::{self, GoAway};

/// Certificates of one CA for the regions of these tests, gone with the test.
struct Certificates(PathBuf);

impl Certificates {
    fn new() -> Certificates {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("evrepl-probe-{}-{n}", std::process::id()));
        crate::certs::issue(&folder, &["us-east-1".to_owned(), "eu-west-1".to_owned()]).unwrap();
        Certificates(folder)
    }

    fn load(&self, region: &str, ca: &Path) -> Result<TlsMaterial, TlsError> {
        let file = |kind| self.0.join(format!("{region}.{kind}"));
        TlsMaterial::load(&file("pem"), &file("key"), &ca.join("ca.pem"))
    }

    fn of(&self, region: &str) -> TlsMaterial {
        self.load(region, &self.0).unwrap()
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn config(more: &str) -> Config {
    let rest = format!(
        r#"kafka = {{ brokers = ["127.0.0.1:9"] }}
        cache = [{{ name = "sessions", topic = "s", servers = ["127.0.0.1:9"] }}]
        {more}"#
    );
    crate::config::for_tests(&rest)
}

fn peer(address: &str) -> Peer {
    config(&format!(
        r#"peer = [{{ region = "eu-west-1", address = "{address}" }}]"#
    ))
    .peers
    .remove(0)
}

async fn listening() -> (tokio::net::TcpListener, String) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

#[test]
fn a_memcached_without_todays_meta_commands_is_too_old() {
    for good in ["1.6.0", "1.6.18", "1.6.38-debian", "1.10", "2.0.1"] {
        assert!(is_new_enough(good), "{good}");
    }
    for bad in ["1.5.22", "1.4.39", "0.9", "1", "", "devel", "-1.6"] {
        assert!(!is_new_enough(bad), "{bad}");
    }
}

#[test]
fn a_missing_topic_is_no_failure() {
    let config = config(r#"peer = [{ region = "eu-west-1", address = "127.0.0.1:9" }, { region = "ap-south-1" }]"#);
    let counts = TopicCounts::from([("s".to_owned(), None), ("s.retry.eu-west-1".to_owned(), Some(3))]);
    let found = topics_found(&config, &counts);
    let lines: Vec<_> = found
        .iter()
        .map(|found| (found.verdict.name(), found.what.as_str(), found.detail.as_str()))
        .collect();
    assert_eq!(
        lines,
        [
            (
                "missing",
                "topic s",
                "create it: evrepl waits for the events of cache sessions"
            ),
            ("ok", "topic s.retry.eu-west-1", "3 partitions"),
            ("missing", "topic s.dead-letter", "evrepl creates it itself"),
        ]
    );
}

#[test]
fn a_topic_that_a_peer_reads_as_its_own_fails() {
    let config = config(r#"peer = [{ region = "ap-south-1" }, { region = "eu-west-1", address = "127.0.0.1:9" }]"#);
    let of = |topic: &str| BTreeSet::from([topic.to_owned()]);
    assert_eq!(shared_topics(&config, &[of("another"), BTreeSet::new()]).len(), 0);
    let found = shared_topics(&config, &[of("another"), of("s")]).remove(0);
    assert_eq!((found.verdict, found.what.as_str()), (Verdict::Failed, "topic s"));
    assert!(found.detail.starts_with("eu-west-1 reads it too"), "{found:?}");
}

#[tokio::test]
async fn what_is_not_memcached_fails_with_its_address() {
    let (listener, address) = listening().await;
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await.unwrap();
        stream
    };
    let (found, _stream) = tokio::join!(memcached(&address), server);
    assert_eq!(
        (found.verdict, found.what),
        (Verdict::Failed, format!("memcached {address}"))
    );
}

#[test]
fn a_certificate_expires_soon_where_status_says_so_too() {
    let said = |left: Duration| described(&["eu".to_owned()], "eu", Some(SystemTime::now() + left));
    let hour = Duration::from_secs(3600);
    assert_eq!(said(EXPIRES_SOON + hour), "identity eu; expires in 14 days");
    assert_eq!(said(EXPIRES_SOON - hour), "identity eu; expires in 13 days: soon");
}

#[tokio::test]
async fn a_certificate_is_ok_only_if_its_own_ca_vouches_for_it() {
    let (ours, others) = (Certificates::new(), Certificates::new());
    let good = certificate(&ours.load("us-east-1", &ours.0), "us-east-1").await;
    assert_eq!(good.verdict, Verdict::Ok, "{}", good.detail);
    assert!(
        good.detail.starts_with("identity us-east-1; expires in 36"),
        "{}",
        good.detail
    );
    let foreign = certificate(&ours.load("us-east-1", &others.0), "us-east-1").await;
    assert_eq!(foreign.verdict, Verdict::Failed);
    assert!(
        foreign.detail.starts_with("refused even by ourselves: "),
        "{}",
        foreign.detail
    );
    let absent = certificate(&ours.load("sa-east-1", &ours.0), "sa-east-1").await;
    assert_eq!(absent.verdict, Verdict::Failed);
}

#[tokio::test]
async fn a_certificate_of_another_name_says_what_peers_must_write() {
    let ours = Certificates::new();
    let found = certificate(&ours.load("eu-west-1", &ours.0), "us-east-1").await;
    assert_eq!(found.verdict, Verdict::Ok);
    assert!(
        found.detail.contains("peers must say so: identity = \"eu-west-1\""),
        "{}",
        found.detail
    );
}

#[tokio::test]
async fn a_peer_that_waits_for_our_hello_knows_us() {
    let ours = Certificates::new();
    let (listener, address) = listening().await;
    let (us, them, peer) = (ours.of("us-east-1"), ours.of("eu-west-1"), peer(&address));
    let server = async { them.accept(listener.accept().await.unwrap().0).await.unwrap() };
    let (found, (_stream, identities)) = tokio::join!(peer_answers(&us, &peer), server);
    assert_eq!(
        (found.verdict, found.detail.as_str()),
        (Verdict::Ok, "is eu-west-1, and knows us")
    );
    assert_eq!(identities, ["us-east-1"]);
}

#[tokio::test]
async fn a_peer_that_refuses_us_fails_with_its_reason() {
    let ours = Certificates::new();
    let (listener, address) = listening().await;
    let (us, them, peer) = (ours.of("us-east-1"), ours.of("eu-west-1"), peer(&address));
    let server = async {
        let (mut stream, _) = them.accept(listener.accept().await.unwrap().0).await.unwrap();
        let mut out = BytesMut::new();
        wire::encode(
            &Frame::GoAway(GoAway {
                reason: "no [[peer]] has that identity".to_owned(),
            }),
            &mut out,
        );
        stream.write_all(&out).await.unwrap();
        stream.shutdown().await.unwrap();
    };
    let (found, ()) = tokio::join!(peer_answers(&us, &peer), server);
    assert_eq!(found.verdict, Verdict::Failed);
    assert_eq!(found.detail, "refuses us: no [[peer]] has that identity");
}

#[tokio::test]
async fn a_peer_that_does_not_take_our_certificate_fails_although_the_handshake_is_done() {
    let (ours, others) = (Certificates::new(), Certificates::new());
    let (listener, address) = listening().await;
    // It is who we expect, by our CA; but it trusts another one.
    let (us, them, peer) = (
        ours.of("us-east-1"),
        ours.load("eu-west-1", &others.0).unwrap(),
        peer(&address),
    );
    let server = async { them.accept(listener.accept().await.unwrap().0).await.map(|_| ()) };
    let (found, accepted) = tokio::join!(peer_answers(&us, &peer), server);
    assert!(accepted.is_err());
    assert_eq!(found.verdict, Verdict::Failed);
    assert!(found.detail.starts_with("refuses us: "), "{}", found.detail);
}

#[tokio::test]
async fn a_peer_that_is_someone_else_fails() {
    let ours = Certificates::new();
    let (listener, address) = listening().await;
    let (us, peer) = (ours.of("us-east-1"), peer(&address));
    let server = async { us.accept(listener.accept().await.unwrap().0).await.map(|_| ()) };
    let (found, _) = tokio::join!(peer_answers(&us, &peer), server);
    assert_eq!(found.verdict, Verdict::Failed, "{}", found.detail);
}

#[tokio::test]
async fn an_address_that_something_else_has_taken_fails() {
    let ours = Certificates::new();
    let ((first, agent), (second, admin)) = (listening().await, listening().await);
    let taken = config(&format!(
        "agent = {{ listen = \"{agent}\" }}\nadmin = {{ listen = \"{admin}\" }}"
    ));
    let us = ours.of("us-east-1");
    // Whoever calls is hung up on.
    let server = async {
        drop(first.accept().await.unwrap());
        drop(second.accept().await.unwrap());
    };
    let ask = async { (agent_address(&taken, Some(&us)).await, admin_address(&taken).await) };
    let ((agent, admin), ()) = tokio::join!(ask, server);
    for found in [agent, admin] {
        assert_eq!(found.verdict, Verdict::Failed);
        assert!(found.detail.starts_with("taken by something else: "), "{found:?}");
    }
}

#[tokio::test]
async fn an_address_that_nobody_has_taken_is_free() {
    let (listener, address) = listening().await;
    drop(listener);
    let config = config(&format!("admin = {{ listen = \"{address}\" }}"));
    assert_eq!(admin_address(&config).await.detail, "free");
}

#[tokio::test]
async fn this_regions_own_agent_is_no_conflict() {
    let ours = Certificates::new();
    let (listener, address) = listening().await;
    let config = config(&format!("agent = {{ listen = \"{address}\" }}"));
    let us = ours.of("us-east-1");
    let server = async { us.accept(listener.accept().await.unwrap().0).await.unwrap() };
    let (found, _stream) = tokio::join!(agent_address(&config, Some(&us)), server);
    assert_eq!(
        (found.verdict, found.detail.as_str()),
        (Verdict::Ok, "this region's evrepl answers")
    );
}

/// The one cache with this door; `evrepl status` is asked at `admin`.
fn door(key: &str, listen: &str, admin: &str) -> Config {
    let mut config = config(&format!("admin = {{ listen = {admin:?} }}"));
    let cache = &mut config.caches[0];
    match key {
        "listen" => cache.listen = Some(listen.to_owned()),
        _ => cache.listen_fills = Some(listen.to_owned()),
    }
    config
}

async fn only_door(config: &Config) -> Finding {
    let mut found = front_doors(config).await;
    assert_eq!(found.len(), 1, "{found:?}");
    found.remove(0)
}

/// What `/status` of a region says that has front doors of these caches.
fn status_of(region: &str, caches: &[&str]) -> String {
    let front_doors = caches.iter().map(|cache| crate::admin::FrontDoorStatus {
        cache: (*cache).to_owned(),
        ..Default::default()
    });
    let status = Status {
        region: region.to_owned(),
        version: "1.2.3".to_owned(),
        front_doors: front_doors.collect(),
        ..Default::default()
    };
    serde_json::to_string(&status).unwrap()
}

#[tokio::test]
async fn a_front_door_is_free_or_taken_by_this_regions_evrepl_or_by_something_else() {
    let (listener, address) = listening().await;
    for key in ["listen", "listen_fills"] {
        for (region, caches, verdict, part) in [
            (
                "us-east-1",
                &["sessions"][..],
                Verdict::Ok,
                "evrepl 1.2.3 of this region is there",
            ),
            ("us-east-1", &["pages"], Verdict::Failed, "no front door of this cache"),
            ("eu-west-1", &["sessions"], Verdict::Failed, "of region eu-west-1"),
        ] {
            let admin = super::super::tests::answering(vec![("HTTP/1.1 200 OK", status_of(region, caches))]);
            let found = only_door(&door(key, &address, &admin)).await;
            assert_eq!(found.what, format!("cache sessions {key} {address}"));
            assert_eq!(found.verdict, verdict, "{found:?}");
            assert!(found.detail.contains(part), "{found:?}");
        }
    }
    let found = only_door(&door("listen", &address, "127.0.0.1:9")).await;
    assert_eq!(found.verdict, Verdict::Failed);
    assert!(found.detail.contains("`ss -tanp 'sport = :"), "{found:?}");
    drop(listener);
    let found = only_door(&door("listen", &address, "127.0.0.1:9")).await;
    assert_eq!((found.verdict, found.detail.as_str()), (Verdict::Ok, "free"));
    let found = only_door(&door("listen", "192.0.2.1:0", "127.0.0.1:9")).await;
    assert_eq!(found.verdict, Verdict::Failed);
    assert!(found.detail.contains("no address of this machine"), "{found:?}");
}

#[tokio::test]
async fn a_sockets_place_is_looked_at_and_left_as_it_is() {
    let folder = std::env::temp_dir().join(format!("evrepl-probe-sockets-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("socket");
    let look = async |path: &Path| {
        let config = door("listen", &format!("unix:{}", path.display()), "127.0.0.1:9");
        let found = only_door(&config).await;
        (found.verdict, found.detail)
    };
    assert_eq!(look(&path).await, (Verdict::Ok, "free".to_owned()));
    assert!(!path.exists());
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let (verdict, detail) = look(&path).await;
    assert!(
        verdict == Verdict::Failed && detail.contains("taken by something else"),
        "{detail}"
    );
    drop(listener);
    let (verdict, detail) = look(&path).await;
    assert!(verdict == Verdict::Ok && detail.contains("nobody listens"), "{detail}");
    assert!(path.exists());
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    let (verdict, detail) = look(&path).await;
    assert!(
        verdict == Verdict::Failed && detail.contains("it was left alone"),
        "{detail}"
    );
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    // A folder that is not there, and one that is a file.
    for within in [folder.join("none/socket"), path.join("socket")] {
        let (verdict, detail) = look(&within).await;
        assert!(
            verdict == Verdict::Failed && detail.contains("make the folder"),
            "{detail}"
        );
    }
    std::fs::remove_dir_all(&folder).unwrap();
}
