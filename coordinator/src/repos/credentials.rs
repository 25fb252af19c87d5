//! Proof of identity for remotes, in git's own order: ssh agent, key files in `~/.ssh`, credential helpers.

use std::collections::VecDeque;
use std::path::PathBuf;

use git2::{Config, Cred, CredentialType, Error, ErrorClass, ErrorCode};

/// Key files that OpenSSH looks for by default.
const KEY_FILES: [&str; 3] = ["id_ed25519", "id_ecdsa", "id_rsa"];

/// What is left to try for one connection. libgit2 asks again after each refusal.
pub struct Credentials {
    agent: bool,
    key_files: VecDeque<PathBuf>,
    helper: bool,
}

impl Credentials {
    /// Everything that this machine offers.
    pub fn new() -> Self {
        let home = std::env::home_dir().unwrap_or_default();
        let key_files = KEY_FILES.iter().map(|name| home.join(".ssh").join(name));
        Self {
            agent: std::env::var_os("SSH_AUTH_SOCK").is_some(),
            key_files: key_files.filter(|path| path.is_file()).collect(),
            helper: true,
        }
    }

    /// The next proof to try, or an authentication error that ends the connection.
    pub fn next(&mut self, url: &str, user: Option<&str>, allowed: CredentialType) -> Result<Cred, Error> {
        let ssh_user = user.unwrap_or("git");
        if allowed.is_ssh_key() {
            if std::mem::take(&mut self.agent) {
                return Cred::ssh_key_from_agent(ssh_user);
            }
            if let Some(key_file) = self.key_files.pop_front() {
                return Cred::ssh_key(ssh_user, None, &key_file, None);
            }
        }
        if allowed.is_user_pass_plaintext()
            && std::mem::take(&mut self.helper)
            && let Ok(credentials) = Cred::credential_helper(&Config::open_default()?, url, user)
        {
            return Ok(credentials);
        }
        if allowed.is_username() {
            return Cred::username(ssh_user);
        }
        Err(Error::new(
            ErrorCode::Auth,
            ErrorClass::Callback,
            "no agent, key file or credential helper was accepted",
        ))
    }
}
