//! Certificates for trying evrepl out: a development CA, and one certificate per region.
//!
//! In production the certificates come from the operator's own CA; what evrepl asks of them is in [`crate::tls`].

use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use time::{Duration, OffsetDateTime};

/// The subject of every development CA. A CA found in the directory is used again under this name, so that its certificate need
/// not be taken apart.
const CA_NAME: &str = "evrepl development CA";

/// The CA outlives the certificates of regions that are added later.
const CA_DAYS: i64 = 3650;

const REGION_DAYS: i64 = 365;

/// Readable by all: certificates are public.
const CERTIFICATE_MODE: u32 = 0o644;

/// Readable by the owner only.
const KEY_MODE: u32 = 0o600;

/// Why certificates were not made. Nothing was written unless it is [`CertsError::Write`]; none is worth a retry as it is.
#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    /// A region's name becomes a DNS name in its certificate, and a file name.
    #[error("region {region:?} is not a DNS label: 1 to 63 of a-z, 0-9 and -, with no - at either end")]
    NotALabel {
        /// The name as given.
        region: String,
    },
    /// Its files would be the CA's.
    #[error("region \"ca\" would take the file names of the certificate authority")]
    Reserved,
    /// The same region was given twice.
    #[error("region {region} is named twice")]
    Twice {
        /// The name.
        region: String,
    },
    /// A file is there already, and is left as it is.
    #[error("{} exists already, and is not overwritten", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Of the CA's two files only one is there.
    #[error("{} is there without {}: both make a certificate authority, neither has a new one made", present.display(), missing.display())]
    HalfAnAuthority {
        /// The file that is there.
        present: PathBuf,
        /// The file that is not.
        missing: PathBuf,
    },
    /// The CA's files cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The CA's key or certificate is not what it should be.
    #[error("{} is not usable: {reason}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// What the key signs, the certificate does not vouch for.
    #[error("{} was not made by evrepl, does not belong to {}, or has expired: {source}", certificate.display(), private_key.display())]
    Foreign {
        /// The CA's certificate.
        certificate: PathBuf,
        /// The CA's key.
        private_key: PathBuf,
        /// What the verifier says.
        source: rustls::Error,
    },
    /// A file or the directory cannot be written. Files written before it stay.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Making a key or certificate failed.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// Makes a development CA in `out` (`ca.pem`, `ca.key`), unless one is there, and for each region `<region>.pem` and
/// `<region>.key`. A certificate has the region as its DNS SAN, serves both ends of a connection, and is valid from yesterday
/// (clocks differ) for a year. Keys are ECDSA P-256 and readable by their owner only. Returns the files written.
///
/// # Errors
///
/// See [`CertsError`]. All is checked and made before the first file is written.
pub fn issue(out: &Path, regions: &[String]) -> Result<Vec<PathBuf>, CertsError> {
    check_names(regions)?;
    let now = OffsetDateTime::now_utc();
    let ca_pem = out.join("ca.pem");
    let ca_key = out.join("ca.key");
    let authority = Authority::open_or_make(&ca_pem, &ca_key, now)?;

    let mut files = Vec::new();
    if authority.new {
        files.push((ca_key.clone(), authority.issuer.key().serialize_pem(), KEY_MODE));
        files.push((ca_pem.clone(), authority.pem.clone(), CERTIFICATE_MODE));
    }
    for region in regions {
        let (certificate, key) = authority.issue(region, now)?;
        authority
            .verify(certificate.der())
            .map_err(|source| CertsError::Foreign {
                certificate: ca_pem.clone(),
                private_key: ca_key.clone(),
                source,
            })?;
        files.push((out.join(format!("{region}.key")), key.serialize_pem(), KEY_MODE));
        files.push((out.join(format!("{region}.pem")), certificate.pem(), CERTIFICATE_MODE));
    }
    if let Some((path, ..)) = files.iter().find(|(path, ..)| path.exists()) {
        return Err(CertsError::Exists { path: path.clone() });
    }

    fs::create_dir_all(out).map_err(|source| CertsError::Write {
        path: out.to_owned(),
        source,
    })?;
    for (path, text, mode) in &files {
        write_new(path, text, *mode)?;
    }
    Ok(files.into_iter().map(|(path, ..)| path).collect())
}

fn check_names(regions: &[String]) -> Result<(), CertsError> {
    let mut seen = HashSet::new();
    for region in regions {
        if !is_dns_label(region) {
            return Err(CertsError::NotALabel { region: region.clone() });
        }
        if region == "ca" {
            return Err(CertsError::Reserved);
        }
        if !seen.insert(region) {
            return Err(CertsError::Twice { region: region.clone() });
        }
    }
    Ok(())
}

/// As in RFC 1123, lower case only: names are compared and become file names.
fn is_dns_label(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&name.len()) && name.bytes().all(allowed) && !name.starts_with('-') && !name.ends_with('-')
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    new: bool,
}

impl Authority {
    fn open_or_make(pem: &Path, key: &Path, now: OffsetDateTime) -> Result<Authority, CertsError> {
        let half = |present: &Path, missing: &Path| {
            Err(CertsError::HalfAnAuthority {
                present: present.to_owned(),
                missing: missing.to_owned(),
            })
        };
        match (pem.exists(), key.exists()) {
            (false, false) => Authority::make(now),
            (true, true) => Authority::open(pem, key, now),
            (true, false) => half(pem, key),
            (false, true) => half(key, pem),
        }
    }

    fn make(now: OffsetDateTime) -> Result<Authority, CertsError> {
        let key = KeyPair::generate()?;
        let params = Authority::params(now);
        let pem = params.self_signed(&key)?.pem();
        Ok(Authority {
            issuer: Issuer::new(params, key),
            pem,
            new: true,
        })
    }

    fn open(pem: &Path, key: &Path, now: OffsetDateTime) -> Result<Authority, CertsError> {
        let read = |path: &Path| {
            fs::read_to_string(path).map_err(|source| CertsError::Read {
                path: path.to_owned(),
                source,
            })
        };
        let certificate = read(pem)?;
        CertificateDer::from_pem_slice(certificate.as_bytes()).map_err(|error| unusable(pem, &error))?;
        let key = KeyPair::from_pem(&read(key)?).map_err(|error| unusable(key, &error))?;
        Ok(Authority {
            issuer: Issuer::new(Authority::params(now), key),
            pem: certificate,
            new: false,
        })
    }

    fn params(now: OffsetDateTime) -> CertificateParams {
        let mut params = params(CA_NAME, now, CA_DAYS);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
    }

    fn issue(&self, region: &str, now: OffsetDateTime) -> Result<(Certificate, KeyPair), CertsError> {
        let mut params = params(region, now, REGION_DAYS);
        params.subject_alt_names = vec![rcgen::SanType::DnsName(region.try_into()?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        Ok((params.signed_by(&key, &self.issuer)?, key))
    }

    /// Whether an agent that trusts this CA's certificate would take the region's: a CA of the directory may be someone else's.
    fn verify(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let general = |error: &dyn std::fmt::Display| rustls::Error::General(error.to_string());
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.pem.as_bytes()).map_err(|error| general(&error))?)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .map_err(|error| general(&error))?;
        verifier
            .verify_client_cert(certificate, &[], UnixTime::now())
            .map(|_| ())
    }
}

fn params(name: &str, now: OffsetDateTime, days: i64) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = now - Duration::DAY;
    params.not_after = now + Duration::days(days);
    params
}

fn unusable(path: &Path, reason: &dyn std::fmt::Display) -> CertsError {
    CertsError::Unusable {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), CertsError> {
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => CertsError::Exists { path: path.to_owned() },
        _ => CertsError::Write {
            path: path.to_owned(),
            source,
        },
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// A directory of its own for each test, removed at its end.
    pub(crate) struct Scratch(PathBuf);

    impl Scratch {
        pub(crate) fn new() -> Scratch {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let name = format!(
                "evrepl-certs-{}-{}",
                std::process::id(),
                NEXT.fetch_add(1, Ordering::Relaxed)
            );
            Scratch(std::env::temp_dir().join(name))
        }

        pub(crate) fn path(&self) -> &Path {
            &self.0
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn issue_in(dir: &Scratch, regions: &[&str]) -> Result<Vec<String>, CertsError> {
        let regions: Vec<String> = regions.iter().map(|&region| region.to_owned()).collect();
        let files = issue(dir.path(), &regions)?;
        Ok(files
            .iter()
            .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
            .collect())
    }

    fn listing(dir: &Scratch) -> Vec<(PathBuf, String)> {
        let Ok(entries) = fs::read_dir(dir.path()) else {
            return Vec::new();
        };
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
            .into_iter()
            .map(|path| (path.clone(), fs::read_to_string(path).unwrap()))
            .collect()
    }

    #[test]
    fn a_region_can_be_added_to_an_existing_authority() {
        let dir = Scratch::new();
        let files = issue_in(&dir, &["us-east-1", "eu-west-1"]).unwrap();
        assert_eq!(
            files,
            [
                "ca.key",
                "ca.pem",
                "us-east-1.key",
                "us-east-1.pem",
                "eu-west-1.key",
                "eu-west-1.pem"
            ]
        );
        let before = listing(&dir);
        assert_eq!(
            issue_in(&dir, &["ap-south-1"]).unwrap(),
            ["ap-south-1.key", "ap-south-1.pem"]
        );
        let after = listing(&dir);
        assert!(before.iter().all(|file| after.contains(file)), "files were changed");
    }

    #[test]
    fn keys_are_readable_by_their_owner_only() {
        let dir = Scratch::new();
        issue_in(&dir, &["us-east-1"]).unwrap();
        for (path, text) in listing(&dir) {
            let mode = fs::metadata(&path).unwrap().permissions().mode() & 0o777;
            let key = path.extension().is_some_and(|extension| extension == "key");
            assert_eq!(key, text.contains("PRIVATE KEY"), "{}", path.display());
            assert!(!key || mode == 0o600, "{}: {mode:o}", path.display());
        }
    }

    #[test]
    fn nothing_is_overwritten_and_nothing_is_half_done() {
        let dir = Scratch::new();
        issue_in(&dir, &["us-east-1"]).unwrap();
        let before = listing(&dir);
        let error = issue_in(&dir, &["eu-west-1", "us-east-1"]).unwrap_err();
        assert!(
            matches!(&error, CertsError::Exists { path } if path.ends_with("us-east-1.key")),
            "{error}"
        );
        assert_eq!(listing(&dir), before);
    }

    #[test]
    fn a_region_is_named_by_a_dns_label() {
        for name in ["", "-a", "a-", "US-EAST-1", "a.b", "../a", "a_b", "é", &"a".repeat(64)] {
            let dir = Scratch::new();
            assert!(
                matches!(issue_in(&dir, &["ok", name]), Err(CertsError::NotALabel { .. })),
                "{name:?}"
            );
            assert!(listing(&dir).is_empty());
        }
        assert!(matches!(issue_in(&Scratch::new(), &["ca"]), Err(CertsError::Reserved)));
        assert!(matches!(
            issue_in(&Scratch::new(), &["a", "a"]),
            Err(CertsError::Twice { .. })
        ));
        issue_in(&Scratch::new(), &[&"a".repeat(63), "1"]).unwrap();
    }

    #[test]
    fn an_authority_that_does_not_fit_is_refused_with_its_reason() {
        let dir = Scratch::new();
        issue_in(&dir, &[]).unwrap();
        let (pem, key) = (dir.path().join("ca.pem"), dir.path().join("ca.key"));

        let other = Scratch::new();
        issue_in(&other, &[]).unwrap();
        fs::copy(other.path().join("ca.key"), &key).unwrap();
        let error = issue_in(&dir, &["us-east-1"]).unwrap_err();
        assert!(matches!(error, CertsError::Foreign { .. }), "{error}");

        fs::write(&key, "not a key").unwrap();
        let error = issue_in(&dir, &["us-east-1"]).unwrap_err();
        assert!(
            matches!(&error, CertsError::Unusable { path, .. } if *path == key),
            "{error}"
        );

        fs::remove_file(&key).unwrap();
        let error = issue_in(&dir, &["us-east-1"]).unwrap_err();
        assert!(
            matches!(&error, CertsError::HalfAnAuthority { missing, .. } if *missing == key),
            "{error}"
        );

        fs::remove_file(&pem).unwrap();
        assert!(issue_in(&dir, &["us-east-1"]).is_ok());
    }
}
