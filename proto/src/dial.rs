//! How a coordinator is dialled: what is shown to it, how it is known, and what is not said over an open line.
//!
//! `https://` is TLS 1.2 or later. Files are read again each time something is dialled, so that tokens and
//! certificates can be replaced while a daemon runs.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

use crate::rpc::{BadToken, TOKEN_VARIABLE, Token};

/// How long a connection may take to come about.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// A peer that is silent for so long is asked whether it lives, and has as long again to answer.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// What a program shows to a coordinator, and how it knows the right one.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Credentials {
    /// File that holds the coordinator's token; else it is taken from TUNEFLEET_TOKEN.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Certificates (PEM) of who may have signed the coordinator's; else those that this system trusts.
    #[arg(long, value_name = "FILE", env = "TUNEFLEET_CA")]
    pub ca: Option<PathBuf>,
    /// Certificate (PEM) that is shown to the coordinator.
    #[arg(long, value_name = "FILE", env = "TUNEFLEET_CERT", requires = "key")]
    pub cert: Option<PathBuf>,
    /// The private key (PEM) of that certificate.
    #[arg(long, value_name = "FILE", env = "TUNEFLEET_KEY", requires = "cert")]
    pub key: Option<PathBuf>,
    /// Show the token even where others can read it: over http:// to another machine.
    #[arg(long, env = "TUNEFLEET_INSECURE")]
    pub insecure: bool,
}

/// Why a coordinator is not dialled.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The address cannot be used.
    #[error("coordinator {url}: {cause}; expected https://HOST:PORT, or http://HOST:PORT on this machine")]
    Url {
        /// As given.
        url: String,
        /// What is wrong with it.
        cause: String,
    },
    /// A file of credentials cannot be used.
    #[error("{flag} {path}: {cause}")]
    File {
        /// The flag that names it.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: String,
    },
    /// Not a token.
    #[error("the coordinator's token: {0}")]
    Token(#[from] BadToken),
    /// A token would travel in the open.
    #[error(
        "coordinator {0}: http:// would show the token to everybody on the way: use https://, or --insecure on a network \
         that you trust"
    )]
    Open(String),
}

impl Credentials {
    /// The token in the file, or else in the environment.
    ///
    /// # Errors
    /// When the file cannot be read, or there is no token in it.
    pub fn token(&self) -> Result<Option<Token>, DialError> {
        let text = match &self.token_file {
            Some(path) => Some(read("--token-file", path)?),
            None => std::env::var(TOKEN_VARIABLE).ok().map(String::into_bytes),
        };
        let text = text.map(|bytes| String::from_utf8(bytes).map_err(|_| BadToken)).transpose()?;
        Ok(text.map(|text| Token::new(text.trim_end())).transpose()?)
    }

    /// Where to dial, and the token to show there.
    ///
    /// # Errors
    /// See [`DialError`].
    pub fn endpoint(&self, url: &str) -> Result<(Endpoint, Option<Token>), DialError> {
        let bad = |cause: String| DialError::Url { url: url.to_owned(), cause };
        let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|error| bad(chain(&error)))?;
        let (scheme, host) = (endpoint.uri().scheme_str(), endpoint.uri().host().unwrap_or_default());
        if host.is_empty() {
            return Err(bad("no host".to_owned()));
        }
        let token = self.token()?;
        let endpoint = match scheme {
            Some("https") => endpoint.tls_config(self.tls()?).map_err(|error| bad(chain(&error)))?,
            Some("http") if token.is_none() || self.insecure || is_this_machine(host) => endpoint,
            Some("http") => return Err(DialError::Open(url.to_owned())),
            _ => return Err(bad("neither https nor http".to_owned())),
        };
        let endpoint = endpoint
            .connect_timeout(CONNECT_LIMIT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        Ok((endpoint, token))
    }

    fn tls(&self) -> Result<ClientTlsConfig, DialError> {
        let tls = match &self.ca {
            Some(path) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read("--ca", path)?)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        Ok(match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => {
                tls.identity(Identity::from_pem(read("--cert", cert)?, read("--key", key)?))
            }
            _ => tls,
        })
    }
}

fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, DialError> {
    std::fs::read(path).map_err(|cause| DialError::File {
        flag,
        path: path.to_owned(),
        cause: cause.to_string(),
    })
}

/// Whether what is said to `host` stays on this machine.
fn is_this_machine(host: &str) -> bool {
    let literal = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || literal.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// An error with what it says it came from; transport errors name their cause only so.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_token(dir: &Path) -> Credentials {
        let file = dir.join("token");
        std::fs::write(&file, "secret\n").unwrap();
        Credentials { token_file: Some(file), ..Credentials::default() }
    }

    #[test]
    fn a_token_does_not_travel_in_the_open_unless_it_is_told_to() {
        let dir = std::env::temp_dir().join(format!("dial-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let mut credentials = with_token(&dir);
        for url in ["http://127.0.0.1:7070", "http://[::1]:7070", "http://localhost:7070"] {
            assert!(credentials.endpoint(url).is_ok(), "{url}");
        }
        for url in ["http://10.0.0.1:7070", "http://control:7070", "http://127.0.0.1.example:7070"] {
            let refused = credentials.endpoint(url).unwrap_err().to_string();
            assert!(refused.contains("--insecure") && refused.contains(url), "{refused}");
        }
        credentials.insecure = true;
        assert!(credentials.endpoint("http://10.0.0.1:7070").is_ok());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_cannot_be_dialled_is_named() {
        let none = Credentials::default();
        for url in ["", "control", "ftp://control:1", "http://", "https:///x", "\u{0}"] {
            let refused = none.endpoint(url).unwrap_err().to_string();
            assert!(refused.contains("expected https://HOST:PORT"), "{url:?}: {refused}");
        }
        let ca = Some(PathBuf::from("/nowhere/ca.pem"));
        let refused = Credentials { ca, ..none }.endpoint("https://control:7070").unwrap_err().to_string();
        assert!(refused.starts_with("--ca /nowhere/ca.pem: "), "{refused}");
    }
}
