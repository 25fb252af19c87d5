//! Proof of identity for remotes, in git's own order: ssh agent, key files in `~/.ssh`, credential helpers; before
//! those a token out of the environment, for the server that it belongs to.

use std::collections::VecDeque;
use std::path::PathBuf;

use git2::{Config, Cred, CredentialType, Error, ErrorClass, ErrorCode};

/// Key files that OpenSSH looks for by default.
const KEY_FILES: [&str; 3] = ["id_ed25519", "id_ecdsa", "id_rsa"];

/// A token out of the environment. It cannot be printed, and goes to one server.
#[derive(Clone)]
pub struct AccessToken {
    secret: String,
    /// Whose repositories it opens.
    host: String,
}

impl std::fmt::Debug for AccessToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AccessToken").field("host", &self.host).finish_non_exhaustive()
    }
}

impl AccessToken {
    /// The token for the server of a URL (of a repository, or of an API), as GitHub's own program names them:
    /// `GH_TOKEN` and `GITHUB_TOKEN` are for github.com, `GH_ENTERPRISE_TOKEN` and `GITHUB_ENTERPRISE_TOKEN` for an
    /// API elsewhere, to which only a job file leads.
    pub fn for_url(url: &str, is_api: bool, variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let host = host(url)?;
        let names: &[&str] = match host.as_str() {
            "github.com" => &["GH_TOKEN", "GITHUB_TOKEN"],
            _ if is_api => &["GH_ENTERPRISE_TOKEN", "GITHUB_ENTERPRISE_TOKEN", "GITEA_TOKEN"],
            _ => &[],
        };
        let secret = names.iter().filter_map(|name| variable(name)).find(|text| !text.trim().is_empty())?;
        Some(AccessToken { secret: secret.trim().to_owned(), host })
    }

    /// Whether it may be sent to `url`.
    pub fn is_for(&self, url: &str) -> bool {
        host(url).is_some_and(|host| host == self.host)
    }

    /// For a header.
    pub fn secret(&self) -> &str {
        &self.secret
    }
}

/// The server of a URL that a token may travel to: over TLS, or within this machine. An API's own name stands for the
/// server whose repositories it lists.
fn host(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host).to_ascii_lowercase();
    let is_local = host.starts_with("127.0.0.1:") || host.starts_with("localhost:");
    let host = host.strip_prefix("api.").filter(|host| *host == "github.com").unwrap_or(&host).to_owned();
    (scheme == "https" || (scheme == "http" && is_local)).then_some(host)
}

/// What is left to try for one connection. libgit2 asks again after each refusal.
pub struct Credentials {
    token: Option<AccessToken>,
    agent: bool,
    key_files: VecDeque<PathBuf>,
    helper: bool,
}

impl Credentials {
    /// Everything that this machine offers.
    pub fn new(token: Option<AccessToken>) -> Self {
        let home = std::env::home_dir().unwrap_or_default();
        let key_files = KEY_FILES.iter().map(|name| home.join(".ssh").join(name));
        Self {
            token,
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
            && let Some(token) = self.token.take().filter(|token| token.is_for(url))
        {
            return Cred::userpass_plaintext("x-access-token", token.secret());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_goes_to_its_own_server_alone_and_never_over_a_plain_connection() {
        let set = |name: &str| match name {
            "GH_TOKEN" => Some("ghp_secret\n".to_owned()),
            "GH_ENTERPRISE_TOKEN" => Some("ghe_secret".to_owned()),
            _ => None,
        };
        let secret = |url: &str, is_api| AccessToken::for_url(url, is_api, set).map(|token| token.secret);
        assert_eq!(secret("https://api.github.com", true).as_deref(), Some("ghp_secret"));
        assert_eq!(secret("https://github.com/a/b", false).as_deref(), Some("ghp_secret"));
        assert_eq!(secret("https://git.example/api/v1", true).as_deref(), Some("ghe_secret"));
        for (url, is_api) in [
            ("https://git.example/a/b", false),
            ("http://github.com/a/b", false),
            ("http://git.example/api/v1", true),
            ("https://github.com.example/a", false),
            ("git@github.com:a/b", false),
        ] {
            assert_eq!(secret(url, is_api), None, "{url}");
        }
        let token = AccessToken::for_url("https://api.github.com", true, set).unwrap();
        assert!(token.is_for("https://github.com/a/b") && token.is_for("https://api.github.com/orgs/a"));
        assert!(!token.is_for("https://evil.example/a/b") && !token.is_for("http://github.com/a/b"));
        assert!(!format!("{token:?}").contains("secret"));
    }
}
