//! Who may connect, over real connections.

use std::time::Duration;

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::HandshakeKind;
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::certs::{self, tests::Scratch};

const CALLER: &str = "us-east-1";
const AGENT: &str = "eu-west-1";

/// Certificates of one CA, in files.
struct Pki {
    dir: Scratch,
    ca: CertificateParams,
    key: KeyPair,
}

impl Pki {
    fn new() -> Pki {
        let dir = Scratch::new();
        fs::create_dir_all(dir.path()).unwrap();
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        fs::write(dir.path().join("ca.pem"), ca.self_signed(&key).unwrap().pem()).unwrap();
        Pki { dir, ca, key }
    }

    fn issue(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> TlsMaterial {
        let mut params = CertificateParams::new(names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>()).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params
            .signed_by(&key, &Issuer::from_params(&self.ca, &self.key))
            .unwrap();
        let file = |name: &str| self.dir.path().join(name);
        fs::write(file("own.pem"), certificate.pem()).unwrap();
        fs::write(file("own.key"), key.serialize_pem()).unwrap();
        TlsMaterial::load(&file("own.pem"), &file("own.key"), &file("ca.pem")).unwrap()
    }

    fn good(&self, name: &str) -> TlsMaterial {
        self.issue(&[name], |_| {})
    }
}

fn client_with(material: &TlsMaterial, change: impl FnOnce(&mut ClientConfig)) -> TlsMaterial {
    let mut client = (*material.client).clone();
    change(&mut client);
    TlsMaterial {
        client: Arc::new(client),
        ..material.clone()
    }
}

fn server_with(material: &TlsMaterial, change: impl FnOnce(&mut ServerConfig)) -> TlsMaterial {
    let mut server = (*material.server).clone();
    change(&mut server);
    TlsMaterial {
        server: Arc::new(server),
        ..material.clone()
    }
}

/// What each end says. The caller only reads, a byte that the agent sends once it has accepted: bytes on their way to an agent
/// that refuses would make its system reset the connection, and the alert with the reason could be lost.
async fn meet(
    caller: &TlsMaterial,
    agent: &TlsMaterial,
    expected: &str,
) -> (Result<(), String>, Result<Vec<String>, String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let dial = async {
        let tcp = TcpStream::connect(address).await.unwrap();
        let mut stream = caller
            .connect(server_name(expected).unwrap(), tcp)
            .await
            .map_err(|error| error.to_string())?;
        assert_eq!(stream.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
        stream.read_u8().await.map_err(|error| error.to_string())?;
        Ok(())
    };
    let answer = async {
        let (tcp, _) = listener.accept().await.unwrap();
        let (mut stream, identities) = agent.accept(tcp).await.map_err(|error| error.to_string())?;
        stream.write_u8(b'x').await.map_err(|error| error.to_string())?;
        stream.shutdown().await.map_err(|error| error.to_string())?;
        Ok(identities)
    };
    tokio::join!(dial, answer)
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, String>, words: &str) {
    let error = result.expect_err("was let in");
    assert!(error.contains(words), "{error:?} does not say {words:?}");
}

#[tokio::test]
async fn two_regions_of_one_authority_meet_and_know_each_other() {
    let dir = Scratch::new();
    certs::issue(dir.path(), &[CALLER.to_owned(), AGENT.to_owned()]).unwrap();
    let file = |name: &str, kind: &str| dir.path().join(format!("{name}.{kind}"));
    let load = |region| TlsMaterial::load(&file(region, "pem"), &file(region, "key"), &file("ca", "pem")).unwrap();
    let (caller, agent) = (load(CALLER), load(AGENT));
    let (dialled, accepted) = meet(&caller, &agent, AGENT).await;
    assert_eq!((dialled, accepted), (Ok(()), Ok(vec![CALLER.to_owned()])));

    assert_eq!(caller.identities(), [CALLER]);
    let left = caller.not_after().unwrap().duration_since(SystemTime::now()).unwrap();
    assert!(
        left > Duration::from_secs(364 * 86_400) && left <= Duration::from_secs(365 * 86_400),
        "{left:?}"
    );
}

#[tokio::test]
async fn a_caller_is_known_by_every_name_of_its_certificate_but_no_wildcard() {
    let pki = Pki::new();
    let caller = pki.issue(&["Staging-US.example", "us-east-1", "*.eu.example.com"], |_| {});
    let (dialled, accepted) = meet(&caller, &pki.good(AGENT), AGENT).await;
    assert_eq!(dialled, Ok(()));
    assert_eq!(accepted.unwrap(), ["staging-us.example", "us-east-1"]);
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused_by_both_ends() {
    let (ours, theirs) = (Pki::new(), Pki::new());
    let (dialled, accepted) = meet(&theirs.good(CALLER), &ours.good(AGENT), AGENT).await;
    refused(dialled, "invalid peer certificate");
    refused(accepted, "fatal alert");

    // A caller that trusts us, with a certificate that we don't trust.
    let client = ours.good(CALLER).client;
    let mut config = ClientConfig::builder_with_provider(client.crypto_provider().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(read_roots(&ours.dir.path().join("ca.pem")).unwrap().0)
        .with_client_cert_resolver(theirs.good(CALLER).client.client_auth_cert_resolver.clone());
    config.alpn_protocols = vec![ALPN.to_vec()];
    let caller = TlsMaterial {
        client: Arc::new(config),
        ..ours.good(CALLER)
    };
    let (dialled, accepted) = meet(&caller, &ours.good(AGENT), AGENT).await;
    refused(accepted, "invalid peer certificate");
    refused(dialled, "fatal alert");
}

#[tokio::test]
async fn an_expired_certificate_is_refused_by_both_ends() {
    let pki = Pki::new();
    let expired = |name| {
        pki.issue(&[name], |params| {
            params.not_after = OffsetDateTime::now_utc() - Duration::from_secs(86_400)
        })
    };
    let (dialled, _) = meet(&pki.good(CALLER), &expired(AGENT), AGENT).await;
    refused(dialled, "certificate expired");
    let (dialled, accepted) = meet(&expired(CALLER), &pki.good(AGENT), AGENT).await;
    refused(accepted, "certificate expired");
    refused(dialled, "CertificateExpired");
}

#[tokio::test]
async fn a_certificate_that_is_not_valid_yet_is_refused_by_both_ends() {
    let pki = Pki::new();
    let early = |name| {
        pki.issue(&[name], |params| {
            params.not_before = OffsetDateTime::now_utc() + Duration::from_secs(86_400)
        })
    };
    let (dialled, _) = meet(&pki.good(CALLER), &early(AGENT), AGENT).await;
    refused(dialled, "certificate not valid yet");
    let (_, accepted) = meet(&early(CALLER), &pki.good(AGENT), AGENT).await;
    refused(accepted, "certificate not valid yet");
}

#[tokio::test]
async fn a_caller_without_a_certificate_is_refused() {
    let pki = Pki::new();
    let good = pki.good(CALLER);
    let mut config = ClientConfig::builder_with_provider(good.client.crypto_provider().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(read_roots(&pki.dir.path().join("ca.pem")).unwrap().0)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    let caller = TlsMaterial {
        client: Arc::new(config),
        ..good
    };
    let (dialled, accepted) = meet(&caller, &pki.good(AGENT), AGENT).await;
    refused(accepted, "peer sent no certificates");
    refused(dialled, "CertificateRequired");
}

#[tokio::test]
async fn a_caller_whose_certificate_names_no_one_is_refused() {
    let pki = Pki::new();
    for names in [&[][..], &["*.eu.example.com"][..], &["10.0.0.1"][..]] {
        let (_, accepted) = meet(&pki.issue(names, |_| {}), &pki.good(AGENT), AGENT).await;
        refused(accepted, "no DNS name");
    }
}

#[tokio::test]
async fn a_certificate_for_other_purposes_is_refused() {
    let pki = Pki::new();
    let only = |name, purpose| pki.issue(&[name], |params| params.extended_key_usages = vec![purpose]);
    let (dialled, _) = meet(
        &pki.good(CALLER),
        &only(AGENT, ExtendedKeyUsagePurpose::ClientAuth),
        AGENT,
    )
    .await;
    refused(dialled, "invalid peer certificate");
    let (_, accepted) = meet(
        &only(CALLER, ExtendedKeyUsagePurpose::ServerAuth),
        &pki.good(AGENT),
        AGENT,
    )
    .await;
    refused(accepted, "invalid peer certificate");
}

#[tokio::test]
async fn a_server_that_is_not_whom_we_dialled_is_refused_whatever_its_address() {
    let pki = Pki::new();
    let (dialled, _) = meet(&pki.good(CALLER), &pki.good("ap-south-1"), AGENT).await;
    refused(dialled, "not valid for name \"eu-west-1\"");
}

#[tokio::test]
async fn another_protocol_is_refused_and_so_is_none() {
    let pki = Pki::new();
    let (caller, agent) = (pki.good(CALLER), pki.good(AGENT));
    for (protocols, caller_hears, agent_hears) in [
        (
            vec![b"h2".to_vec()],
            "NoApplicationProtocol",
            "support any known protocol",
        ),
        (vec![], "no protocol", "no protocol"),
    ] {
        let stranger = client_with(&caller, |config| config.alpn_protocols = protocols.clone());
        let (dialled, accepted) = meet(&stranger, &agent, AGENT).await;
        refused(dialled, caller_hears);
        refused(accepted, agent_hears);
    }
    let stranger = server_with(&agent, |config| config.alpn_protocols = vec![]);
    let (dialled, _) = meet(&caller, &stranger, AGENT).await;
    refused(dialled, "does not speak evrepl/1: it named no protocol");
}

#[tokio::test]
async fn every_connection_shows_certificates_anew() {
    let pki = Pki::new();
    let caller = client_with(&pki.good(CALLER), |config| {
        config.resumption = Resumption::in_memory_sessions(8)
    });
    let agent = pki.good(AGENT);
    for _ in 0..2 {
        // That the handshake was a full one is asserted there.
        let (dialled, _) = meet(&caller, &agent, AGENT).await;
        assert_eq!(dialled, Ok(()));
    }
}

#[test]
fn an_identity_is_a_dns_name() {
    assert!(server_name("us-east-1").is_ok());
    assert!(server_name("us-east-1.staging").is_ok());
    for identity in ["", "127.0.0.1", "::1", "a b", "-"] {
        assert!(
            matches!(server_name(identity), Err(TlsError::Identity { .. })),
            "{identity:?}"
        );
    }
}

#[test]
fn a_file_that_cannot_be_used_is_named_with_its_fault() {
    let pki = Pki::new();
    pki.good(CALLER);
    let file = |name: &str| pki.dir.path().join(name);
    let load = |certificate: &str, key: &str, ca: &str| {
        TlsMaterial::load(&file(certificate), &file(key), &file(ca))
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    fs::write(file("empty.pem"), "").unwrap();
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    fs::write(file("broken.pem"), broken).unwrap();
    fs::write(file("cut.pem"), &broken[..40]).unwrap();
    fs::write(file("other.key"), KeyPair::generate().unwrap().serialize_pem()).unwrap();

    assert_eq!(load("own.pem", "own.key", "ca.pem"), Ok(()));
    refused(load("none.pem", "own.key", "ca.pem"), "cannot read");
    refused(load("none.pem", "own.key", "ca.pem"), "none.pem");
    refused(load("empty.pem", "own.key", "ca.pem"), "empty.pem holds no certificate");
    refused(load("cut.pem", "own.key", "ca.pem"), "cut.pem is not PEM");
    refused(
        load("own.pem", "own.pem", "ca.pem"),
        "own.pem holds no unencrypted private key",
    );
    refused(load("own.pem", "own.key", "own.key"), "own.key holds no certificate");
    refused(
        load("own.pem", "own.key", "broken.pem"),
        "broken.pem holds a certificate that is not usable",
    );
    refused(
        load("own.pem", "other.key", "ca.pem"),
        "other.key are not usable together",
    );
    refused(load("broken.pem", "own.key", "ca.pem"), "broken.pem and");
}
