//! The server's certificate and whom it trusts, read again when the files change.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Between two looks at the files.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// A certificate that ends so soon is warned of, once a day.
const WARN_BEFORE: Duration = Duration::from_secs(30 * 24 * 3600);
/// Between two such warnings.
const WARN_AGAIN: Duration = Duration::from_secs(24 * 3600);
/// gRPC is HTTP/2.
const PROTOCOL: &[u8] = b"h2";
/// Of browsers that speak no other.
const HTTP_1: &[u8] = b"http/1.1";

/// Which files.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// Certificate of this server, and those between it and its authority (PEM).
    pub cert: PathBuf,
    /// Its private key (PEM).
    pub key: PathBuf,
    /// Who may have signed the certificates of workers (PEM); without it they are not asked for one.
    pub client_ca: Option<PathBuf>,
}

/// Why TLS cannot be spoken.
#[derive(Debug, thiserror::Error)]
#[error("{}: {cause}", .path.display())]
pub struct TlsError {
    path: PathBuf,
    cause: String,
}

fn at(path: &Path) -> impl Fn(&dyn std::error::Error) -> TlsError + use<> {
    let path = path.to_owned();
    move |cause| TlsError { path: path.clone(), cause: tunefleet_proto::dial::chain(cause) }
}

impl TlsFiles {
    /// What they say now.
    ///
    /// # Errors
    /// Which file is wrong, and how.
    pub fn read(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let chain = certificates(&self.cert)?;
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|error| at(&self.key)(&error))?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| at(&self.cert)(&error))?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for root in certificates(path)? {
                    roots.add(root).map_err(|error| at(path)(&error))?;
                }
                // Users have tokens: who shows no certificate is let in, but not as a worker.
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                    .allow_unauthenticated()
                    .build()
                    .map_err(|error| at(path)(&error))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|error| at(&self.cert)(&error))?;
        config.alpn_protocols = vec![PROTOCOL.to_vec(), HTTP_1.to_vec()];
        Ok(Arc::new(config))
    }

    /// What they say now, and then whenever they change. Files that are wrong change nothing.
    ///
    /// # Errors
    /// When they are wrong at the beginning.
    pub fn follow(self) -> Result<watch::Receiver<Arc<ServerConfig>>, TlsError> {
        let mut stamp = self.stamp();
        let (sender, receiver) = watch::channel(self.read()?);
        tokio::spawn(async move {
            let mut warned: Option<tokio::time::Instant> = None;
            while !sender.is_closed() {
                if warned.is_none_or(|warned| warned.elapsed() > WARN_AGAIN)
                    && let Some(warning) = self.ends_soon()
                {
                    tracing::warn!("{warning}");
                    warned = Some(tokio::time::Instant::now());
                }
                tokio::time::sleep(LOOK_AGAIN).await;
                let found = self.stamp();
                if found == stamp {
                    continue;
                }
                stamp = found;
                match self.read() {
                    Ok(config) => {
                        tracing::info!("{}: read again", self.cert.display());
                        sender.send_replace(config);
                        warned = None;
                    }
                    // Certificate and key may be replaced one after the other.
                    Err(error) => tracing::error!("{error}: the certificate before it stays in use"),
                }
            }
        });
        Ok(receiver)
    }

    fn ends_soon(&self) -> Option<String> {
        let leaf = certificates(&self.cert).ok()?.into_iter().next()?;
        let ends = Certificate::read(&leaf).ok()?.ends;
        let left = ends.duration_since(SystemTime::now()).unwrap_or_default();
        let days = left.as_secs() / (24 * 3600);
        (left < WARN_BEFORE)
            .then(|| format!("{}: ends in {days} days: put a new one in its place", self.cert.display()))
    }

    /// Tells one content of the files from another.
    fn stamp(&self) -> Vec<Option<(SystemTime, u64)>> {
        let of = |path: &PathBuf| {
            let metadata = std::fs::metadata(path).ok()?;
            Some((metadata.modified().ok()?, metadata.len()))
        };
        [Some(&self.cert), Some(&self.key), self.client_ca.as_ref()].into_iter().flatten().map(of).collect()
    }
}

/// All certificates of a PEM file, at least one.
///
/// # Errors
/// When it cannot be read, or holds none.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let found = read.map_err(|error| at(path)(&error))?;
    if found.is_empty() {
        return Err(TlsError {
            path: path.to_owned(),
            cause: "there is no certificate (PEM) in it".to_owned(),
        });
    }
    Ok(found)
}

/// What a certificate says of its holder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// Names (DNS) and addresses it is for.
    pub names: Vec<String>,
    /// SHA-256, in hex.
    pub sha256: String,
    /// When it ends.
    pub ends: SystemTime,
}

impl Certificate {
    /// Reads a certificate.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(der: &CertificateDer<'_>) -> Result<Self, String> {
        let (_, parsed) = X509Certificate::from_der(der).map_err(|error| error.to_string())?;
        let mut names = Vec::new();
        let alternative = parsed.subject_alternative_name().map_err(|error| error.to_string())?;
        for name in alternative.iter().flat_map(|extension| &extension.value.general_names) {
            match name {
                GeneralName::DNSName(name) => names.push((*name).to_owned()),
                GeneralName::IPAddress(bytes) => names.extend(address(bytes)),
                _ => {}
            }
        }
        let seconds = u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or(0);
        let ends = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        Ok(Certificate { names, sha256: tunefleet_proto::digest_hex(der), ends })
    }
}

fn address(bytes: &[u8]) -> Option<String> {
    let v4 = <[u8; 4]>::try_from(bytes).map(std::net::IpAddr::from);
    let v6 = <[u8; 16]>::try_from(bytes).map(std::net::IpAddr::from);
    v4.or(v6).ok().map(|address| address.to_string())
}
