//! The repositories of an organisation or a user, by GitHub's REST API or one of the same shape (GitHub Enterprise,
//! Gitea, Forgejo).
//!
//! What the API says is not believed blindly: an address to clone from must be one of a server, and the token goes to
//! that server alone which belongs to the API.

use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::blocking::{Client, Response};
use reqwest::header::{ACCEPT, HeaderMap};
use serde::Deserialize;
use tunefleet_proto::job::{OrganizationSpec, RepositoryOrder, RepositorySpec};

use super::credentials::AccessToken;
use crate::progress::Progress;

/// Repositories on a page: the most that GitHub gives.
const PAGE_REPOSITORIES: usize = 100;
/// Far above any real owner.
const MAX_PAGES: u32 = 1000;
/// Largest answer that is read.
const MAX_ANSWER_BYTES: u64 = 32 << 20;
const TIMEOUT: Duration = Duration::from_secs(60);
/// Tries of a request that may succeed a little later; the waits between them double from the first.
const TRIES: u32 = 5;
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// A limit of requests is waited for so long at most: GitHub's last for an hour.
const MAX_LIMIT_WAIT: Duration = Duration::from_secs(3700);

/// An owner whose repositories cannot be listed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither an organisation nor a user.
    #[error("{api} knows no organisation or user {org:?}{hint}; correct sources.github.org")]
    NotFound {
        /// Address of the API.
        api: String,
        /// Who was asked for.
        org: String,
        /// About a token.
        hint: &'static str,
    },
    /// The API said no.
    #[error("{url}: the server answered {status}{message}; {advice}")]
    Refused {
        /// What was asked for.
        url: String,
        /// HTTP status.
        status: u16,
        /// The server's own words.
        message: String,
        /// What to do.
        advice: &'static str,
    },
    /// The API could not be reached.
    #[error("{url}: {cause}, {TRIES} times; check the network and sources.github.api, and run again")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// The client's words.
        cause: String,
    },
    /// An answer that breaks the protocol.
    #[error("{url}: {rule}; is sources.github.api the address of such an API?")]
    Answer {
        /// What was asked for.
        url: String,
        /// What is wrong with it.
        rule: String,
    },
}

impl Error {
    /// Whether the cause is that something is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Error::NotFound { .. })
    }

    /// Whether the cause is the network or a lack of rights.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Error::Unreachable { .. } | Error::Refused { .. })
    }
}

/// What the API says of a repository.
#[derive(Debug, Deserialize)]
struct Repository {
    full_name: String,
    name: String,
    clone_url: String,
    #[serde(default)]
    ssh_url: String,
    #[serde(default)]
    fork: bool,
    #[serde(default)]
    archived: bool,
    #[serde(default)]
    disabled: bool,
    /// Of GitHub.
    #[serde(default)]
    stargazers_count: u64,
    /// Of Gitea.
    #[serde(default)]
    stars_count: u64,
    /// RFC 3339, which sorts as text; Gitea has only the second.
    #[serde(default)]
    pushed_at: Option<String>,
    #[serde(default)]
    updated_at: Option<String>,
}

impl Repository {
    fn stars(&self) -> u64 {
        self.stargazers_count.max(self.stars_count)
    }

    fn changed_at(&self) -> &str {
        self.pushed_at.as_deref().or(self.updated_at.as_deref()).unwrap_or_default()
    }
}

/// Lists the repositories that `spec` wants, the first first.
pub fn list(
    spec: &OrganizationSpec,
    token: Option<&AccessToken>,
    progress: &dyn Progress,
) -> Result<Vec<RepositorySpec>, Error> {
    let api = Api {
        spec,
        token: token.filter(|token| token.is_for(&spec.api)),
        http: client(&spec.api)?,
        progress,
    };
    let mut found = match api.pages("orgs")? {
        Some(found) => found,
        None => api.pages("users")?.ok_or_else(|| Error::NotFound {
            api: spec.api.clone(),
            org: spec.org.clone(),
            hint: if api.token.is_none() { " without a token (GITHUB_TOKEN)" } else { "" },
        })?,
    };
    found.retain(|repository| {
        (spec.forks || !repository.fork)
            && (spec.archived || !repository.archived)
            && !repository.disabled
            && !spec.exclude.iter().any(|name| *name == repository.name || *name == repository.full_name)
    });
    found.sort_by(|a, b| {
        let first = match spec.sort {
            RepositoryOrder::Stars => b.stars().cmp(&a.stars()),
            RepositoryOrder::Updated => b.changed_at().cmp(a.changed_at()),
            RepositoryOrder::Name => std::cmp::Ordering::Equal,
        };
        first.then_with(|| a.full_name.cmp(&b.full_name))
    });
    // A repository that moved between two pages is on both.
    found.dedup_by(|a, b| a.full_name == b.full_name);
    if let Some(top) = spec.top {
        found.truncate(top as usize);
    }
    found.into_iter().map(|repository| api.source(repository)).collect()
}

fn client(api: &str) -> Result<Client, Error> {
    let built = Client::builder()
        .user_agent(concat!("tunefleet/", env!("CARGO_PKG_VERSION")))
        .timeout(TIMEOUT)
        .build();
    built.map_err(|error| Error::Unreachable { url: api.to_owned(), cause: error.to_string() })
}

struct Api<'a> {
    spec: &'a OrganizationSpec,
    token: Option<&'a AccessToken>,
    http: Client,
    progress: &'a dyn Progress,
}

impl Api<'_> {
    /// All pages of an owner of this kind; `None` where there is no such owner.
    fn pages(&self, kind: &str) -> Result<Option<Vec<Repository>>, Error> {
        let mut found = Vec::new();
        for page in 1..=MAX_PAGES {
            // GitHub reads `per_page`, Gitea `limit`.
            let url = format!(
                "{}/{kind}/{}/repos?per_page={PAGE_REPOSITORIES}&limit={PAGE_REPOSITORIES}&page={page}",
                self.spec.api, self.spec.org
            );
            let Some((headers, body)) = self.get(&url)? else { return Ok(None) };
            let repositories: Vec<Repository> =
                serde_json::from_slice(&body).map_err(|error| Error::Answer {
                    url: url.clone(),
                    rule: format!("the answer is no list of repositories: {error}"),
                })?;
            let is_last = match header(&headers, "link") {
                Some(links) => !links.contains("rel=\"next\""),
                None => repositories.len() < PAGE_REPOSITORIES,
            };
            let is_empty = repositories.is_empty();
            found.extend(repositories);
            if is_last || is_empty {
                break;
            }
        }
        Ok(Some(found))
    }

    /// An answer; `None` for 404.
    fn get(&self, url: &str) -> Result<Option<(HeaderMap, Vec<u8>)>, Error> {
        let mut tries = 1;
        let mut wait = FIRST_WAIT;
        loop {
            let mut request = self.http.get(url).header(ACCEPT, "application/vnd.github+json");
            if let Some(token) = self.token {
                request = request.bearer_auth(token.secret());
            }
            let cause = match request.send().and_then(answer) {
                Ok((404, _, _)) => return Ok(None),
                Ok((200, headers, body)) => return Ok(Some((headers, body))),
                Ok((status, headers, body)) => match limit(status, &headers) {
                    Some(asked) if asked <= MAX_LIMIT_WAIT && tries < TRIES => {
                        let advice = if self.token.is_none() { "; GITHUB_TOKEN raises it" } else { "" };
                        self.progress.note(&format!(
                            "note: {} allows no more requests for {} s, waiting{advice}",
                            self.spec.api,
                            asked.as_secs()
                        ));
                        sleep(asked);
                        tries += 1;
                        continue;
                    }
                    None if matches!(status, 500 | 502 | 503 | 504) => {
                        format!("the server answered {status}")
                    }
                    _ => return Err(refused(url, status, &body)),
                },
                Err(error) => error.without_url().to_string(),
            };
            if tries == TRIES {
                return Err(Error::Unreachable { url: url.to_owned(), cause });
            }
            sleep(wait);
            wait *= 2;
            tries += 1;
        }
    }

    /// The repository as a source, if its address is one that may be asked.
    fn source(&self, repository: Repository) -> Result<RepositorySpec, Error> {
        let location = if self.spec.ssh { repository.ssh_url } else { repository.clone_url };
        let is_remote = match self.spec.ssh {
            true => location.starts_with("ssh://") || (location.contains('@') && !location.contains("://")),
            false => location.starts_with("https://") || location.starts_with("http://"),
        };
        match is_remote {
            true => Ok(RepositorySpec { location, revision: None }),
            false => Err(Error::Answer {
                url: self.spec.api.clone(),
                rule: format!(
                    "{} is to be cloned from {location:?}, which is no such address",
                    repository.full_name
                ),
            }),
        }
    }
}

fn answer(response: Response) -> Result<(u16, HeaderMap, Vec<u8>), reqwest::Error> {
    use std::io::Read;
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let mut body = Vec::new();
    // One that breaks off or is too long is no JSON.
    let _ = response.take(MAX_ANSWER_BYTES).read_to_end(&mut body);
    Ok((status, headers, body))
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// How long the server wants to be left alone, where it refuses for that reason.
fn limit(status: u16, headers: &HeaderMap) -> Option<Duration> {
    if !matches!(status, 403 | 429) {
        return None;
    }
    let number = |name: &str| header(headers, name)?.trim().parse::<u64>().ok();
    if let Some(seconds) = number("retry-after") {
        return Some(Duration::from_secs(seconds));
    }
    if number("x-ratelimit-remaining") == Some(0) {
        let reset = Duration::from_secs(number("x-ratelimit-reset")?);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // A second more: the server rounds.
        return Some(reset.saturating_sub(now) + Duration::from_secs(1));
    }
    (status == 429).then_some(Duration::from_secs(60))
}

fn refused(url: &str, status: u16, body: &[u8]) -> Error {
    let message = serde_json::from_slice::<serde_json::Value>(body).ok();
    let message = message.as_ref().and_then(|json| json["message"].as_str()).unwrap_or_default();
    let shown: String = message.chars().filter(|c| !c.is_control()).take(200).collect();
    Error::Refused {
        url: url.to_owned(),
        status,
        message: if shown.is_empty() { shown } else { format!(": {shown}") },
        advice: match status {
            401 => "the token in GITHUB_TOKEN or GH_TOKEN is not accepted: make a new one",
            403 | 429 => "give a token that may see these repositories in GITHUB_TOKEN, or wait",
            _ => "check sources.github.api",
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(entries: &[(&'static str, String)]) -> HeaderMap {
        entries.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn the_server_says_how_long_to_wait() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let of = |status, entries: &[(&'static str, String)]| limit(status, &headers(entries));
        assert_eq!(of(403, &[("retry-after", "7".to_owned())]), Some(Duration::from_secs(7)));
        let wait = of(
            403,
            &[("x-ratelimit-remaining", "0".to_owned()), ("x-ratelimit-reset", (now + 30).to_string())],
        );
        assert!((29..=31).contains(&wait.unwrap().as_secs()), "{wait:?}");
        assert_eq!(of(403, &[("x-ratelimit-remaining", "12".to_owned())]), None);
        assert_eq!(of(403, &[]), None);
        assert_eq!(of(429, &[]), Some(Duration::from_secs(60)));
        assert_eq!(of(500, &[("retry-after", "7".to_owned())]), None);
    }
}
