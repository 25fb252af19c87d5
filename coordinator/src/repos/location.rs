//! Where a repository is, and what it is called. Credentials in a URL stay in here.

use std::path::{Path, PathBuf};

use super::Error;

/// A parsed location. Its `Debug` form shows no credentials.
#[derive(Clone)]
pub struct Location {
    place: Place,
    /// Without credentials: for manifests, messages and digests.
    pub shown: String,
    /// `org/name` where the location tells it, else the last path component.
    pub repo_id: String,
}

/// How the repository is reached.
#[derive(Clone)]
pub enum Place {
    /// Opened in place.
    Local(PathBuf),
    /// Fetched into the cache; the URL may carry credentials.
    Remote(String),
}

impl std::fmt::Debug for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Location").field("shown", &self.shown).field("repo_id", &self.repo_id).finish()
    }
}

impl Location {
    /// Understands `https://`, `http://`, `ssh://`, `git://`, `file://`, `[user@]host:path` and local paths.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let refuse = |shown: &str, rule| Error::Location { location: shown.to_owned(), rule };
        if text.is_empty() || text.contains(['\0', '\n']) {
            return Err(refuse(&text.replace(['\0', '\n'], " "), "is empty or has a control character"));
        }
        if let Some((scheme, rest)) = text.split_once("://") {
            let shown = without_credentials(scheme, rest);
            if !matches!(scheme, "https" | "http" | "ssh" | "git" | "file") {
                return Err(refuse(&shown, "unknown URL scheme"));
            }
            let path = match scheme {
                "file" => last_component(rest),
                _ => shown.splitn(4, '/').nth(3).map(org_and_name).unwrap_or_default(),
            };
            return match path.is_empty() {
                true => Err(refuse(&shown, "names no repository")),
                false => Ok(Self { place: Place::Remote(text.to_owned()), shown, repo_id: path }),
            };
        }
        // As git has it: a colon before any slash means host:path.
        if let Some((host, path)) = text.split_once(':')
            && !host.is_empty()
            && !host.contains('/')
        {
            let repo_id = org_and_name(path);
            return match repo_id.is_empty() {
                true => Err(refuse(text, "names no repository")),
                false => Ok(Self { place: Place::Remote(text.to_owned()), shown: text.to_owned(), repo_id }),
            };
        }
        // `.` and links get their real name; a path that is not there is reported when it is opened.
        let path = Path::new(text).canonicalize().unwrap_or_else(|_| PathBuf::from(text));
        let shown = path.display().to_string();
        let repo_id = last_component(&shown);
        match repo_id.is_empty() {
            true => Err(refuse(&shown, "names no repository")),
            false => Ok(Self { place: Place::Local(path), shown, repo_id }),
        }
    }

    /// How it is reached.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// `message` with every trace of this location's credentials removed.
    pub fn redact(&self, message: &str) -> String {
        let Place::Remote(url) = &self.place else { return message.to_owned() };
        let mut out = message.replace(url.as_str(), &self.shown);
        if let Some((_, rest)) = url.split_once("://")
            && let Some((user_info, _)) = authority(rest).rsplit_once('@')
        {
            out = out.replace(user_info, "***");
            if let Some((_, password)) = user_info.split_once(':')
                && !password.is_empty()
            {
                out = out.replace(password, "***");
            }
        }
        out
    }
}

/// The part of a URL between `//` and the path.
fn authority(rest: &str) -> &str {
    rest.split(['/', '?', '#']).next().unwrap_or(rest)
}

/// The URL without password, query and fragment; the user name stays where it is part of the address (ssh).
fn without_credentials(scheme: &str, rest: &str) -> String {
    if scheme == "file" {
        return format!("file://{rest}");
    }
    let authority = authority(rest);
    let path = rest.get(authority.len()..).unwrap_or_default();
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let host = match authority.rsplit_once('@') {
        None => authority.to_owned(),
        Some((user_info, host)) if scheme == "ssh" => {
            format!("{}@{host}", user_info.split(':').next().unwrap_or_default())
        }
        Some((_, host)) => host.to_owned(),
    };
    format!("{scheme}://{host}{path}")
}

/// `org/name` (with subgroups, where there are) from the path of a URL.
fn org_and_name(path: &str) -> String {
    let path = path.trim_matches('/');
    let path = path.strip_suffix(".git").unwrap_or(path);
    path.split('/').filter(|part| !matches!(*part, "" | "." | ".." | "~")).collect::<Vec<_>>().join("/")
}

/// Name of the directory, whether the path leads to the work tree, its `.git` or a bare repository.
fn last_component(path: &str) -> String {
    let path = path.trim_end_matches('/');
    let path = path.strip_suffix("/.git").unwrap_or(path);
    let name = path.rsplit('/').next().unwrap_or_default();
    name.strip_suffix(".git").unwrap_or(name).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_named_after_organisation_and_repository() {
        for (text, shown, repo_id) in [
            ("https://example.com/org/name.git", "https://example.com/org/name.git", "org/name"),
            ("https://example.com/org/name/", "https://example.com/org/name/", "org/name"),
            ("https://example.com/a/b/name", "https://example.com/a/b/name", "a/b/name"),
            ("https://me:s3cret@example.com/org/name", "https://example.com/org/name", "org/name"),
            ("https://s3cret@example.com/o/n?access=s3cret", "https://example.com/o/n", "o/n"),
            ("ssh://git:s3cret@example.com:22/org/name", "ssh://git@example.com:22/org/name", "org/name"),
            ("git@example.com:org/name.git", "git@example.com:org/name.git", "org/name"),
            ("file:///srv/git/name.git", "file:///srv/git/name.git", "name"),
            ("/no/such/dir/name", "/no/such/dir/name", "name"),
            ("/no/such/dir/name/.git", "/no/such/dir/name/.git", "name"),
        ] {
            let location = Location::parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!((location.shown.as_str(), location.repo_id.as_str()), (shown, repo_id), "{text}");
            assert!(!format!("{location:?}").contains("s3cret"));
        }
    }

    #[test]
    fn what_is_no_location_is_refused_without_showing_credentials() {
        for text in
            ["", "ftp://me:s3cret@host/x", "https://me:s3cret@host", "https://host/..", "git@host:", "/"]
        {
            let message = Location::parse(text).map(|l| l.repo_id).unwrap_err().to_string();
            assert!(!message.contains("s3cret"), "{message}");
        }
    }

    #[test]
    fn credentials_are_removed_from_messages() {
        let location = Location::parse("https://me:s3cret@example.com/org/name").unwrap();
        let message = location.redact("https://me:s3cret@example.com/org/name refused me:s3cret, s3cret");
        assert_eq!(message, "https://example.com/org/name refused ***, ***");
    }
}
