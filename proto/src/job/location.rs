//! Where a repository is: the forms that are taken, and local paths made absolute.

use std::path::{Component, Path, PathBuf};

/// `path` seen from `base`, with `.` and `..` taken away. Not through symbolic links: this crate
/// does no IO, and the user wrote names, not inodes.
pub fn absolute(base: &Path, path: &str) -> PathBuf {
    let mut clean = PathBuf::new();
    for component in base.join(path).components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                clean.pop();
            }
            other => clean.push(other),
        }
    }
    clean
}

/// The location of a repository as everything downstream sees it: a URL as it was written, a
/// local path made absolute from `base`.
///
/// # Errors
/// The rule that `text` breaks.
pub(super) fn resolve(text: &str, base: &Path) -> Result<String, String> {
    if let Some((scheme, rest)) = text.split_once("://") {
        return url(scheme, rest).map(|()| text.to_owned());
    }
    if text.starts_with('~') {
        return Err("write the whole path: only a shell knows what ~ stands for".to_owned());
    }
    if is_scp_like(text) { Ok(text.to_owned()) } else { local(&absolute(base, text)) }
}

fn local(path: &Path) -> Result<String, String> {
    match path.to_str() {
        Some(path) => Ok(path.to_owned()),
        None => Err("the path must be UTF-8: it becomes part of the dataset's manifest".to_owned()),
    }
}

/// `git@host:org/repo`: a colon before the first slash.
fn is_scp_like(text: &str) -> bool {
    text.split_once(':').is_some_and(|(host, _)| !host.is_empty() && !host.contains('/'))
}

fn url(scheme: &str, rest: &str) -> Result<(), String> {
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let user_info = authority.rsplit_once('@').map(|(user_info, _)| user_info);
    match (scheme, user_info) {
        ("file", _) if !authority.is_empty() => {
            Err("a file:// URL has three slashes before its path: file:///path/to/repository".to_owned())
        }
        ("file", _) => Ok(()),
        // What is written here ends up in manifests and logs.
        ("http" | "https", Some(_)) => {
            Err("must not hold a user name, password or token: leave them out and \
             let git's credential helper give them (git config credential.helper)"
                .to_owned())
        }
        ("ssh", Some(user)) if user.contains(':') => {
            Err("must not hold a password: use a key, or the SSH agent".to_owned())
        }
        ("http" | "https" | "ssh", _) if authority.is_empty() || path.is_empty() => {
            Err("needs a host and a path: https://host/org/repo".to_owned())
        }
        ("http" | "https", _) if rest.contains(['?', '#']) => {
            Err("must not hold ? or #: tokens in URLs end up in manifests and logs".to_owned())
        }
        ("http" | "https" | "ssh", _) => Ok(()),
        _ => Err(format!("the scheme must be https, http, ssh or file, not {scheme:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_paths_become_absolute_and_urls_stay() {
        let base = Path::new("/home/ann/app/deploy/jobs");
        for (given, expected) in [
            ("../..", "/home/ann/app"),
            ("./x/../y", "/home/ann/app/deploy/jobs/y"),
            ("/srv/git/a.git", "/srv/git/a.git"),
            ("../../../../../../..", "/"),
            ("git@host:org/repo", "git@host:org/repo"),
            ("https://host/org/repo.git", "https://host/org/repo.git"),
            ("ssh://git@host:2222/org/repo", "ssh://git@host:2222/org/repo"),
            ("file:///srv/git/a", "file:///srv/git/a"),
            ("a/b:c", "/home/ann/app/deploy/jobs/a/b:c"),
        ] {
            assert_eq!(resolve(given, base).as_deref(), Ok(expected), "{given}");
        }
    }

    #[test]
    fn secrets_and_unknown_schemes_are_refused_with_advice() {
        for (given, expected) in [
            ("https://ann:hunter2@host/a/b", "credential helper"),
            ("https://ghp_secret@host/a/b", "credential helper"),
            ("https://host/a/b?private_token=x", "tokens in URLs"),
            ("ssh://git:hunter2@host/a/b", "use a key"),
            ("ftp://host/a", "must be https"),
            ("file://srv/a", "three slashes"),
            ("https://", "needs a host"),
            ("~/code", "whole path"),
        ] {
            let message = resolve(given, Path::new("/")).unwrap_err();
            assert!(message.contains(expected), "{given}: {message}");
            assert!(!message.contains("hunter2") && !message.contains("ghp_secret"), "{message}");
        }
    }
}
