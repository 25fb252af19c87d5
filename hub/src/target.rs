//! Where a push goes, and with whose token.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::Error;

/// The hub that everyone uses.
pub(super) const PUBLIC_ENDPOINT: &str = "https://huggingface.co";
/// Longest part of a repository's name that the hub takes.
const MAX_NAME_BYTES: usize = 96;

/// Where a push goes.
#[derive(Debug, Clone)]
pub struct Target {
    /// What it holds.
    pub kind: RepoKind,
    /// The repository.
    pub repo: RepoId,
    /// Whether a repository that is made is private.
    pub private: bool,
    /// The branch.
    pub revision: String,
    /// Address of the hub, without a slash at its end.
    pub endpoint: String,
    /// Who pushes.
    pub token: Token,
}

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepoKind {
    /// Weights.
    Model,
    /// Rows.
    Dataset,
}

impl RepoKind {
    /// What requests call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            RepoKind::Model => "model",
            RepoKind::Dataset => "dataset",
        }
    }

    /// Its part of the API, and of names in the cache.
    pub(super) fn plural(self) -> &'static str {
        match self {
            RepoKind::Model => "models",
            RepoKind::Dataset => "datasets",
        }
    }

    /// What stands before the name in the address of a page.
    pub(super) fn page(self) -> &'static str {
        match self {
            RepoKind::Model => "",
            RepoKind::Dataset => "datasets/",
        }
    }
}

/// `OWNER/NAME`, as the hub takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepoId {
    /// A user or an organisation.
    pub owner: String,
    /// The repository's own name.
    pub name: String,
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}

impl FromStr for RepoId {
    type Err = String;

    /// The rules of `huggingface_hub.utils.validate_repo_id`.
    fn from_str(text: &str) -> Result<Self, String> {
        let Some((owner, name)) = text.split_once('/') else {
            return Err(format!("{text:?} is not OWNER/NAME"));
        };
        for part in [owner, name] {
            let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            let outer = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
            if part.len() > MAX_NAME_BYTES
                || !part.chars().all(inner)
                || !outer(part.chars().next())
                || !outer(part.chars().last())
                || part.contains("--")
                || part.contains("..")
            {
                return Err(format!(
                    "{part:?} is no name on the hub: 1 to {MAX_NAME_BYTES} letters, digits, '_', '-' and '.', \
                     the last two neither at an end nor doubled"
                ));
            }
        }
        if name.ends_with(".git") {
            return Err(format!("{name:?} ends in .git, which the hub does not take"));
        }
        Ok(RepoId { owner: owner.to_owned(), name: name.to_owned() })
    }
}

/// What proves who pushes; it cannot be printed.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// A token without the space around it.
    ///
    /// # Errors
    /// One that no header can hold, without repeating it.
    pub fn new(text: &str) -> Result<Self, String> {
        let token = text.trim();
        if token.is_empty() {
            return Err("is empty".to_owned());
        }
        if !token.chars().all(|c| c.is_ascii_graphic()) {
            return Err("holds something else than one token".to_owned());
        }
        Ok(Token(token.to_owned()))
    }

    /// What the header `Authorization` holds.
    pub(super) fn authorization(&self) -> String {
        format!("Bearer {}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// A branch's name, which goes into addresses.
///
/// # Errors
/// [`Error::Setting`] for anything else.
pub fn revision(text: &str) -> Result<String, Error> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    if text.is_empty() || text.contains("..") || text.starts_with('/') || !text.chars().all(plain) {
        let rule =
            format!("--revision {text:?} is no name of a branch: letters, digits, '-', '_', '.' and '/'");
        return Err(Error::Setting(rule));
    }
    Ok(text.to_owned())
}

/// The address that was given, that of `HF_ENDPOINT`, or the public one.
///
/// # Errors
/// [`Error::Setting`] for what is no address.
pub fn endpoint(given: Option<&str>, variable: impl Fn(&str) -> Option<String>) -> Result<String, Error> {
    let from_variable = || variable("HF_ENDPOINT").filter(|text| !text.trim().is_empty());
    let text = given.map(str::to_owned).or_else(from_variable);
    let text = text.unwrap_or_else(|| PUBLIC_ENDPOINT.to_owned());
    let address = reqwest::Url::parse(text.trim()).ok();
    let usable = address.filter(|url| matches!(url.scheme(), "http" | "https") && url.query().is_none());
    match usable {
        Some(url) => Ok(url.as_str().trim_end_matches('/').to_owned()),
        None => Err(Error::Setting(format!("{text:?} is no address of a hub: give one as https://HOST"))),
    }
}

/// The token of a file, of `HF_TOKEN`, or of the file that the hub's own tools keep: `HF_TOKEN_PATH`, or `token`
/// in `HF_HOME`, or in `huggingface` of the user's cache.
///
/// # Errors
/// [`Error::Setting`] where there is none, and what a file or variable holds that is no token.
pub fn token(file: Option<&Path>, variable: impl Fn(&str) -> Option<String>) -> Result<Token, Error> {
    let of_file = |path: &Path| {
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        Token::new(&text).map_err(|rule| Error::file(path, format!("the token {rule}")))
    };
    if let Some(path) = file {
        return of_file(path);
    }
    if let Some(text) = variable("HF_TOKEN").filter(|text| !text.trim().is_empty()) {
        return Token::new(&text).map_err(|rule| Error::Setting(format!("the token in HF_TOKEN {rule}")));
    }
    match home(&variable, "HF_TOKEN_PATH", "token") {
        Some(path) if path.exists() => of_file(&path),
        path => {
            let kept = path.map(|path| format!(" (there is no {})", path.display())).unwrap_or_default();
            Err(Error::Setting(format!(
                "no token to push with: give --token-file FILE or HF_TOKEN, or log in with `hf auth login`{kept}"
            )))
        }
    }
}

/// The token that [`token`] finds without being given one; `None` where there is none.
///
/// # Errors
/// What a file or variable holds that is no token.
pub fn token_if_any(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Token>, Error> {
    let is_set = variable("HF_TOKEN").is_some_and(|text| !text.trim().is_empty());
    let kept = home(&variable, "HF_TOKEN_PATH", "token");
    match is_set || kept.is_some_and(|path| path.exists()) {
        true => token(None, variable).map(Some),
        false => Ok(None),
    }
}

/// The cache that all the hub's tools share: `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or in `huggingface` of the
/// user's cache.
pub fn cache(variable: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    home(&variable, "HF_HUB_CACHE", "hub")
}

/// The path in `own`, or `name` in the hub's directory.
fn home(variable: &impl Fn(&str) -> Option<String>, own: &str, name: &str) -> Option<PathBuf> {
    let path = |name: &str| variable(name).filter(|text| !text.is_empty()).map(PathBuf::from);
    if let Some(path) = path(own) {
        return Some(path);
    }
    let home = path("HF_HOME").or_else(|| {
        let cache = path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")));
        Some(cache?.join("huggingface"))
    });
    Some(home?.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_the_hub_takes() {
        for good in ["me/model", "Team-1/my_model.v2", "_a/b_"] {
            assert_eq!(good.parse::<RepoId>().unwrap().to_string(), good);
        }
        let long = format!("a/{}", "b".repeat(97));
        for bad in [
            "model", "a/b/c", "a/", "/b", "a/-b", "a/b.", "a/b--c", "a/b..c", "a/b.git", "a/b c", "a/\u{e9}",
            &long,
        ] {
            assert!(bad.parse::<RepoId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_token_is_looked_for_in_its_places_in_order_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        for (name, text) in [("given", "hf_given\n"), ("token", "hf_home"), ("elsewhere", "hf_elsewhere")] {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let find = |file: Option<&str>, set: &[(&str, &str)]| {
            let value = |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
            token(file.map(Path::new), value).map(|token| token.authorization()).map_err(|e| e.to_string())
        };
        let (home, elsewhere) = (at(""), at("elsewhere"));
        let all = [("HF_TOKEN", "hf_variable"), ("HF_TOKEN_PATH", &elsewhere), ("HF_HOME", &home)];
        assert_eq!(find(Some(&at("given")), &all).unwrap(), "Bearer hf_given");
        assert_eq!(find(None, &all).unwrap(), "Bearer hf_variable");
        assert_eq!(find(None, &all[1..]).unwrap(), "Bearer hf_elsewhere");
        assert_eq!(find(None, &all[2..]).unwrap(), "Bearer hf_home");
        assert!(find(None, &[("HOME", &home)]).unwrap_err().contains(".cache/huggingface/token"));
        assert!(find(None, &[]).unwrap_err().contains("hf auth login"));
        let broken = find(None, &[("HF_TOKEN", "secret with spaces")]).unwrap_err();
        assert!(broken.contains("HF_TOKEN") && !broken.contains("secret"), "{broken}");
        assert_eq!(format!("{:?}", Token::new("hf_secret").unwrap()), "Token(..)");
    }

    #[test]
    fn the_endpoint_is_the_one_given_that_of_the_variable_or_the_public_one() {
        let variable = |_: &str| Some("https://mirror.example/hub/".to_owned());
        assert_eq!(endpoint(Some("http://127.0.0.1:9/"), variable).unwrap(), "http://127.0.0.1:9");
        assert_eq!(endpoint(None, variable).unwrap(), "https://mirror.example/hub");
        assert_eq!(endpoint(None, |_| None).unwrap(), PUBLIC_ENDPOINT);
        for bad in ["mirror.example", "ftp://mirror.example", "https://mirror.example?a=b"] {
            assert!(endpoint(Some(bad), variable).is_err(), "{bad}");
        }
    }

    #[test]
    fn branches_are_plain_names() {
        for good in ["main", "v1.0", "team/try-2"] {
            assert!(revision(good).is_ok());
        }
        for bad in ["", "../main", "/main", "a b", "a?b", "a#b"] {
            assert!(revision(bad).is_err(), "{bad}");
        }
    }
}
