//! Who may ask for what: roles, tokens, revoked certificates.
//!
//! They are in one file, `access.json` in the state directory, which holds no secret: of a token only its SHA-256 (it
//! has 256 random bits, so there is nothing to guess). The file is read again when it has changed, so that a token
//! that is revoked is refused at once, and what lasts (sessions of workers, logs and events that are followed) ends
//! with the next message.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

/// The file, in the state directory.
const FILE: &str = "access.json";
/// Held while the file is changed.
const LOCK: &str = "access.lock";
/// Largest file: ten thousand tokens fit.
const MAX_BYTES: u64 = 4 << 20;
/// What every token begins with, so that scanners for secrets find them.
const TOKEN_PREFIX: &str = "tf_";
/// Longest name of a token.
const MAX_NAME: usize = 64;

/// What a caller may do. Each but [`Role::Worker`] may do all that those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Holds a worker's session, and nothing else.
    Worker,
    /// Sees jobs, workers and logs.
    Viewer,
    /// Submits, cancels, suspends and resumes jobs.
    User,
    /// Drains workers, reads the audit, and all else.
    Admin,
}

impl Role {
    /// Whether one with this role may do what `needed` may.
    pub fn covers(self, needed: Role) -> bool {
        match (self, needed) {
            (Role::Admin, _) => true,
            (Role::Worker, _) | (_, Role::Worker) => self == needed,
            (Role::User, needed) => needed != Role::Admin,
            (Role::Viewer, needed) => needed == Role::Viewer,
        }
    }

    /// Name in files and on screen.
    pub fn name(self) -> &'static str {
        match self {
            Role::Worker => "worker",
            Role::Viewer => "viewer",
            Role::User => "user",
            Role::Admin => "admin",
        }
    }
}

/// Somebody's token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// Whose, in the audit.
    pub name: String,
    /// What for.
    pub role: Role,
    /// SHA-256 of the token, in hex.
    pub sha256: String,
    /// When it was made.
    pub created_unix_ms: u64,
}

/// All that is granted, and what is not any more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grants {
    /// Tokens.
    #[serde(default)]
    pub tokens: Vec<Grant>,
    /// SHA-256 of certificates that are refused although their signature is right, in hex.
    #[serde(default)]
    pub revoked_certificates: BTreeSet<String>,
}

/// Why the file of grants cannot be used or changed.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// Reading or writing it.
    #[error("{path}: {cause}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// It is not what this program writes.
    #[error("{path}: {cause}; nobody is let in by it until that is mended")]
    Bad {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// Names are unique.
    #[error("there is a token named {0:?}: revoke it first, or choose another name")]
    Exists(String),
    /// Nothing to revoke.
    #[error("there is no token named {0:?}")]
    Missing(String),
    /// Not a name.
    #[error("{0:?} is no name of a token: 1 to {MAX_NAME} letters, digits, '-', '_', '.' or '@'")]
    Name(String),
}

impl Grants {
    /// What a state directory grants.
    ///
    /// # Errors
    /// When there is a file that cannot be used.
    pub fn read(state: &Path) -> Result<Self, AccessError> {
        let path = state.join(FILE);
        let io = |cause| AccessError::Io { path: path.clone(), cause };
        let bad = |cause: String| AccessError::Bad { path: path.clone(), cause };
        let text = match std::fs::metadata(&path) {
            Ok(metadata) if metadata.len() > MAX_BYTES => {
                return Err(bad(format!("{} bytes are more than {MAX_BYTES}", metadata.len())));
            }
            Ok(_) => std::fs::read(&path).map_err(io)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Grants::default()),
            Err(error) => return Err(io(error)),
        };
        serde_json::from_slice(&text).map_err(|error| bad(error.to_string()))
    }

    /// Puts them in the place of what the directory granted before, whole or not at all.
    fn write(&self, state: &Path) -> Result<(), AccessError> {
        let path = state.join(FILE);
        let io = |cause| AccessError::Io { path: path.clone(), cause };
        let new = state.join(format!("{FILE}.new"));
        let text = serde_json::to_vec_pretty(self).map_err(|error| io(error.into()))?;
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .map_err(io)?;
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(io)?;
        // The coordinator must be able to read what an administrator writes.
        let owner = std::fs::metadata(state).map_err(io)?;
        std::os::unix::fs::chown(&new, Some(owner.uid()), Some(owner.gid())).map_err(io)?;
        std::fs::rename(&new, &path).map_err(io)
    }

    /// Changes what a state directory grants; two who do so at once wait for each other.
    fn change(
        state: &Path,
        by: impl FnOnce(&mut Self) -> Result<(), AccessError>,
    ) -> Result<(), AccessError> {
        let path = state.join(LOCK);
        let io = |cause| AccessError::Io { path: path.clone(), cause };
        std::fs::create_dir_all(state).map_err(io)?;
        let file = std::fs::File::create(&path).map_err(io)?;
        let _lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| io(errno.into()))?;
        let mut grants = Grants::read(state)?;
        by(&mut grants)?;
        grants.write(state)
    }

    /// Makes a token; it is returned, and kept nowhere.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub fn create(state: &Path, name: &str, role: Role) -> Result<String, AccessError> {
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.@".contains(&byte);
        if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(legal) {
            return Err(AccessError::Name(name.to_owned()));
        }
        let token = format!("{TOKEN_PREFIX}{}", tunefleet_proto::hex(&rand::random::<[u8; 32]>()));
        Grants::change(state, |grants| {
            if grants.tokens.iter().any(|grant| grant.name == name) {
                return Err(AccessError::Exists(name.to_owned()));
            }
            grants.tokens.push(Grant {
                name: name.to_owned(),
                role,
                sha256: tunefleet_proto::digest_hex(token.as_bytes()),
                created_unix_ms: super::events::unix_ms(),
            });
            Ok(())
        })?;
        Ok(token)
    }

    /// Ends a token.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub fn revoke(state: &Path, name: &str) -> Result<(), AccessError> {
        Grants::change(state, |grants| {
            let before = grants.tokens.len();
            grants.tokens.retain(|grant| grant.name != name);
            if grants.tokens.len() == before { Err(AccessError::Missing(name.to_owned())) } else { Ok(()) }
        })
    }

    /// Refuses a certificate from now on.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub fn revoke_certificate(state: &Path, sha256: String) -> Result<(), AccessError> {
        Grants::change(state, |grants| {
            grants.revoked_certificates.insert(sha256);
            Ok(())
        })
    }
}

/// The grants of a running coordinator.
pub struct Access {
    /// Where they are; absent for a coordinator inside another program.
    state: Option<PathBuf>,
    /// SHA-256 of the token of `--token-file`, which may do all.
    shared_sha256: Option<String>,
    /// SHA-256 of a token that may only look, of a coordinator inside another program.
    viewer_sha256: Option<String>,
    loaded: Mutex<Loaded>,
}

struct Loaded {
    stamp: Stamp,
    grants: Arc<Grants>,
    /// Tokens are asked for, though there are none that can be read.
    is_broken: bool,
}

/// Tells one content of a file from another.
type Stamp = Option<(u64, i64, i64, u64)>;

impl Access {
    /// Grants of a state directory, and a token that may do all.
    ///
    /// # Errors
    /// When there is a file that cannot be used.
    pub fn open(state: Option<PathBuf>, shared_sha256: Option<String>) -> Result<Self, AccessError> {
        let stamp = state.as_deref().and_then(stamp);
        let grants = state.as_deref().map(Grants::read).transpose()?.unwrap_or_default();
        let loaded = Loaded { stamp, grants: Arc::new(grants), is_broken: false };
        Ok(Access { state, shared_sha256, viewer_sha256: None, loaded: Mutex::new(loaded) })
    }

    /// These, and one more token that may only look.
    pub fn with_viewer(self, sha256: String) -> Self {
        Access { viewer_sha256: Some(sha256), ..self }
    }

    /// The state directory.
    pub fn state(&self) -> Option<&Path> {
        self.state.as_deref()
    }

    /// Whether anybody must show a token.
    pub fn asks_for_tokens(&self) -> bool {
        let (grants, is_broken) = self.now();
        self.shared_sha256.is_some() || is_broken || !grants.tokens.is_empty()
    }

    /// Who shows a token with this SHA-256; digests are compared, so that the time it takes tells nothing about it.
    pub fn by_token(&self, sha256: &str) -> Option<(String, Role)> {
        if self.shared_sha256.as_deref() == Some(sha256) {
            return Some(("token".to_owned(), Role::Admin));
        }
        if self.viewer_sha256.as_deref() == Some(sha256) {
            return Some(("page".to_owned(), Role::Viewer));
        }
        let (grants, _) = self.now();
        let grant = grants.tokens.iter().find(|grant| grant.sha256 == sha256)?;
        Some((grant.name.clone(), grant.role))
    }

    /// Whether a certificate with this SHA-256 is refused.
    pub fn is_revoked(&self, sha256: &str) -> bool {
        let (grants, is_broken) = self.now();
        is_broken || grants.revoked_certificates.contains(sha256)
    }

    /// What is granted now.
    fn now(&self) -> (Arc<Grants>, bool) {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(state) = &self.state {
            let found = stamp(state);
            if found != loaded.stamp {
                match Grants::read(state) {
                    Ok(grants) => (loaded.grants, loaded.is_broken) = (Arc::new(grants), false),
                    Err(error) => {
                        tracing::error!("{error}");
                        (loaded.grants, loaded.is_broken) = (Arc::default(), true);
                    }
                }
                loaded.stamp = found;
            }
        }
        (Arc::clone(&loaded.grants), loaded.is_broken)
    }
}

fn stamp(state: &Path) -> Stamp {
    let metadata = std::fs::metadata(state.join(FILE)).ok()?;
    Some((metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_cover_what_is_below_them_and_a_worker_nothing_else() {
        let all = [Role::Worker, Role::Viewer, Role::User, Role::Admin];
        let covered = |role: Role| all.map(|needed| role.covers(needed));
        assert_eq!(covered(Role::Worker), [true, false, false, false]);
        assert_eq!(covered(Role::Viewer), [false, true, false, false]);
        assert_eq!(covered(Role::User), [false, true, true, false]);
        assert_eq!(covered(Role::Admin), [true, true, true, true]);
    }

    #[test]
    fn a_token_works_until_it_is_revoked_and_is_kept_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let access = Access::open(Some(dir.path().to_owned()), None).unwrap();
        assert!(!access.asks_for_tokens());
        let token = Grants::create(dir.path(), "ann", Role::User).unwrap();
        let sha256 = tunefleet_proto::digest_hex(token.as_bytes());
        assert!(access.asks_for_tokens());
        assert_eq!(access.by_token(&sha256), Some(("ann".to_owned(), Role::User)));
        assert_eq!(access.by_token(&token), None);
        let kept = std::fs::read_to_string(dir.path().join(FILE)).unwrap();
        assert!(!kept.contains(&token) && kept.contains(&sha256));
        let mode = std::fs::metadata(dir.path().join(FILE)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);

        assert!(matches!(Grants::create(dir.path(), "ann", Role::Admin), Err(AccessError::Exists(_))));
        assert!(matches!(Grants::create(dir.path(), "a b", Role::Admin), Err(AccessError::Name(_))));
        Grants::create(dir.path(), "bob", Role::Viewer).unwrap();
        Grants::revoke(dir.path(), "ann").unwrap();
        assert_eq!(access.by_token(&sha256), None);
        assert!(matches!(Grants::revoke(dir.path(), "ann"), Err(AccessError::Missing(_))));
    }

    #[test]
    fn a_file_of_grants_that_cannot_be_read_lets_nobody_in() {
        let dir = tempfile::tempdir().unwrap();
        let token = Grants::create(dir.path(), "ann", Role::User).unwrap();
        let access = Access::open(Some(dir.path().to_owned()), None).unwrap();
        std::fs::write(dir.path().join(FILE), "{\"tokens\": [{}]}").unwrap();
        assert!(access.asks_for_tokens());
        assert_eq!(access.by_token(&tunefleet_proto::digest_hex(token.as_bytes())), None);
        assert!(access.is_revoked("any"));
        assert!(Access::open(Some(dir.path().to_owned()), None).is_err());
    }
}
