//! TLS between regions: version 1.3 only, certificates at both ends, ALPN `evrepl/1`.
//!
//! A certificate carries its owner's *identity* as a DNS SAN, by default the region's name. The dialling end verifies the
//! identity that it expects, whatever the address; the accepting end takes the caller's identity from the certificate, never
//! from what the caller says. Both trust the CA of the configuration and no other.
//!
//! Sessions are never resumed: links are few and last, and a resumed one would outlive its certificate.
//!
//! In TLS 1.3 the dialling end finishes its handshake before the other has seen its certificate: that it was refused shows as
//! an error of its first read.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::client::Resumption;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoClientAuth, WebPkiClientVerifier};
use rustls::{ClientConfig, CommonState, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

mod validity;

/// The protocol both ends must name. It changes when frames can no longer say what version they are of.
pub const ALPN: &[u8] = b"evrepl/1";

/// A certificate that expires sooner should have been replaced: `check`, `status` and the alerts say so from then on.
pub const EXPIRES_SOON: Duration = Duration::from_secs(14 * 86_400);

/// Why there is no TLS. The first five are found at start and need the operator; the others are of one connection, and the link
/// dials again, since certificates are replaced while it runs.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file is not PEM.
    #[error("{} is not PEM: {source}", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        source: pem::Error,
    },
    /// A file has no section of the kind that is wanted of it.
    #[error("{} holds no {wanted}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        wanted: &'static str,
    },
    /// A certificate of the CA file is not usable.
    #[error("{} holds a certificate that is not usable: {reason}", path.display())]
    Authority {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Certificate and key are not usable, or not a pair.
    #[error("{} and {} are not usable together: {source}", certificate.display(), private_key.display())]
    Pair {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        private_key: PathBuf,
        /// What rustls says.
        source: rustls::Error,
    },
    /// An identity that no certificate can carry.
    #[error("identity {identity:?} is not a DNS name")]
    Identity {
        /// The identity as given.
        identity: String,
    },
    /// The handshake failed: the peer's certificate was refused, ours was, or the connection was lost.
    #[error("tls handshake failed: {source}")]
    Handshake {
        /// What rustls or the connection says.
        source: io::Error,
    },
    /// The peer speaks TLS, but names another protocol or none.
    #[error("peer does not speak evrepl/1: it named {}", named.as_deref().unwrap_or("no protocol"))]
    Protocol {
        /// What it named.
        named: Option<String>,
    },
    /// The peer's certificate carries no identity.
    #[error("peer's certificate has no DNS name")]
    Anonymous,
    /// The peer showed no certificate, or one that cannot be read.
    #[error("peer's certificate cannot be read")]
    Certificate,
}

/// What this region needs for both ends of TLS. Cheap to clone.
#[derive(Clone, Debug)]
pub struct TlsMaterial {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    /// For clients of a front door, without and with a certificate of theirs.
    doors: [Arc<ServerConfig>; 2],
    identities: Vec<String>,
    not_after: Option<SystemTime>,
    ca_not_after: Option<SystemTime>,
}

impl TlsMaterial {
    /// Reads PEM files: the region's certificate (with intermediates, if any, behind it), its unencrypted private key, and the
    /// CA's certificate, or several.
    ///
    /// # Errors
    ///
    /// Names the file and what is wrong with it. Certificates that have expired or come from another CA are no error here: the
    /// peer decides, and says so in the handshake.
    pub fn load(certificate: &Path, private_key: &Path, ca: &Path) -> Result<TlsMaterial, TlsError> {
        let chain = read_certificates(certificate)?;
        let key = read_key(private_key)?;
        let (roots, ca_not_after) = read_roots(ca)?;
        let not_after = validity::not_after(&chain[0]);
        let identities = dns_names(&chain[0]).unwrap_or_default();
        let pair = |source| TlsError::Pair {
            certificate: certificate.to_owned(),
            private_key: private_key.to_owned(),
            source,
        };

        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(pair)?
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(pair)?;
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.resumption = Resumption::disabled();

        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|error| TlsError::Authority {
                path: ca.to_owned(),
                reason: error.to_string(),
            })?;
        let accepting = |verifier: Arc<dyn ClientCertVerifier>| {
            ServerConfig::builder_with_provider(provider.clone())
                .with_protocol_versions(&[&rustls::version::TLS13])
                .and_then(|config| {
                    config
                        .with_client_cert_verifier(verifier)
                        .with_single_cert(chain.clone(), key.clone_key())
                })
                .map_err(pair)
        };
        let doors = [
            Arc::new(accepting(Arc::new(NoClientAuth))?),
            Arc::new(accepting(verifier.clone())?),
        ];
        let mut server = accepting(verifier)?;
        server.alpn_protocols = vec![ALPN.to_vec()];
        server.send_tls13_tickets = 0;

        Ok(TlsMaterial {
            client: Arc::new(client),
            server: Arc::new(server),
            doors,
            identities,
            not_after,
            ca_not_after,
        })
    }

    /// The DNS SANs of our own certificate. Empty if there are none: then no peer will take it.
    pub fn identities(&self) -> &[String] {
        &self.identities
    }

    /// When our own certificate expires; none if its date cannot be read.
    pub fn not_after(&self) -> Option<SystemTime> {
        self.not_after
    }

    /// When the first of the CA's certificates expires; none if no date can be read.
    pub fn ca_not_after(&self) -> Option<SystemTime> {
        self.ca_not_after
    }

    /// For the dialling end. [`TlsMaterial::connect`] also checks the protocol.
    pub fn connector(&self) -> TlsConnector {
        TlsConnector::from(self.client.clone())
    }

    /// For the accepting end. [`TlsMaterial::accept`] also checks the protocol and finds the caller's identities.
    pub fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.server.clone())
    }

    /// For the clients of a front door, which speak memcached's protocol: `mutual` asks for a certificate of the CA's.
    pub fn door_acceptor(&self, mutual: bool) -> TlsAcceptor {
        TlsAcceptor::from(self.doors[usize::from(mutual)].clone())
    }

    /// Shakes hands as the dialling end; `peer` is whom to expect, from [`server_name`]. Has no time limit of its own.
    ///
    /// # Errors
    ///
    /// [`TlsError::Handshake`], [`TlsError::Protocol`].
    pub async fn connect<IO>(&self, peer: ServerName<'static>, io: IO) -> Result<client::TlsStream<IO>, TlsError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let stream = self
            .connector()
            .connect(peer, io)
            .await
            .map_err(|source| TlsError::Handshake { source })?;
        check_protocol(stream.get_ref().1)?;
        Ok(stream)
    }

    /// Shakes hands as the accepting end, and tells who called: see [`peer_identities`]. Has no time limit of its own.
    ///
    /// # Errors
    ///
    /// [`TlsError::Handshake`], [`TlsError::Protocol`], [`TlsError::Anonymous`], [`TlsError::Certificate`].
    pub async fn accept<IO>(&self, io: IO) -> Result<(server::TlsStream<IO>, Vec<String>), TlsError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let stream = self
            .acceptor()
            .accept(io)
            .await
            .map_err(|source| TlsError::Handshake { source })?;
        let identities = peer_identities(stream.get_ref().1)?;
        Ok((stream, identities))
    }
}

/// The name to expect in a peer's certificate.
///
/// # Errors
///
/// [`TlsError::Identity`] if it is not a DNS name; an IP address is none.
pub fn server_name(identity: &str) -> Result<ServerName<'static>, TlsError> {
    match ServerName::try_from(identity.to_owned()) {
        Ok(name @ ServerName::DnsName(_)) => Ok(name),
        _ => Err(TlsError::Identity {
            identity: identity.to_owned(),
        }),
    }
}

/// Whether the peer agreed to [`ALPN`]. After the handshake: rustls refuses a different protocol, but lets a peer pass that
/// names none.
///
/// # Errors
///
/// [`TlsError::Protocol`].
pub fn check_protocol(connection: &CommonState) -> Result<(), TlsError> {
    match connection.alpn_protocol() {
        Some(ALPN) => Ok(()),
        named => Err(TlsError::Protocol {
            named: named.map(|name| String::from_utf8_lossy(name).into_owned()),
        }),
    }
}

/// The DNS SANs of the peer's certificate, in lower case and without wildcards, once the handshake is done and the protocol
/// is the right one. There is one at least.
///
/// # Errors
///
/// [`TlsError::Protocol`], [`TlsError::Certificate`], [`TlsError::Anonymous`].
pub fn peer_identities(connection: &CommonState) -> Result<Vec<String>, TlsError> {
    check_protocol(connection)?;
    let certificate = connection
        .peer_certificates()
        .and_then(|chain| chain.first())
        .ok_or(TlsError::Certificate)?;
    let identities = dns_names(certificate).ok_or(TlsError::Certificate)?;
    if identities.is_empty() {
        Err(TlsError::Anonymous)
    } else {
        Ok(identities)
    }
}

fn dns_names(certificate: &CertificateDer<'_>) -> Option<Vec<String>> {
    let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
    // A wildcard names no one in particular, and an identity decides what its owner may write.
    let names = certificate.valid_dns_names().filter(|name| !name.contains('*'));
    Some(names.map(str::to_ascii_lowercase).collect())
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })
}

/// One certificate at least.
fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<_, _>>()
        .map_err(|source| TlsError::Pem {
            path: path.to_owned(),
            source,
        })?;
    if certificates.is_empty() {
        return Err(TlsError::Empty {
            path: path.to_owned(),
            wanted: "certificate",
        });
    }
    Ok(certificates)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|error| match error {
        pem::Error::NoItemsFound => TlsError::Empty {
            path: path.to_owned(),
            wanted: "unencrypted private key",
        },
        source => TlsError::Pem {
            path: path.to_owned(),
            source,
        },
    })
}

/// The CA's certificates, and when the first of them expires.
fn read_roots(path: &Path) -> Result<(Arc<RootCertStore>, Option<SystemTime>), TlsError> {
    let mut roots = RootCertStore::empty();
    let certificates = read_certificates(path)?;
    let not_after = certificates.iter().filter_map(|one| validity::not_after(one)).min();
    for certificate in certificates {
        roots.add(certificate).map_err(|error| TlsError::Authority {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
    }
    Ok((Arc::new(roots), not_after))
}

#[cfg(test)]
mod tests;
