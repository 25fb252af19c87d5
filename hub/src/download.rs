//! Files of a repository, into the cache that all tools of the hub share.
//!
//! The layout is that of `huggingface_hub` (`file_download.py`): `<kind>--<owner>--<name>/blobs/<etag>` holds
//! contents, `snapshots/<commit>/<path>` links to them, `refs/<branch>` names a commit. What is there is not
//! fetched again; a download that broke off goes on where it ended; contents are held against their digests.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};

use reqwest::header::RANGE;
use reqwest::redirect::Policy;
use serde::Deserialize;
use sha1::{Digest as _, Sha1};
use sha2::{Digest as _, Sha256};

use super::Error;
use super::client::{Answer, Client, Repeat, TRIES, back_off, causes, is_passing, timeout};
use super::progress::Progress;
use super::target::{self, RepoKind, Token};

/// Written at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// A repository to download from.
#[derive(Debug, Clone)]
pub struct Remote {
    /// What it holds.
    pub kind: RepoKind,
    /// `OWNER/NAME`, or `NAME` alone of a few old ones.
    pub repo: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// Address of the hub, without a slash at its end.
    pub endpoint: String,
    /// Who asks, where that matters.
    pub token: Option<Token>,
    /// The shared cache.
    pub cache: PathBuf,
    /// Ask nobody: what is in the cache is all there is.
    pub offline: bool,
}

/// One state of a repository, on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The directory with the files.
    pub dir: PathBuf,
    /// The commit.
    pub commit: String,
    /// Paths of the files that were wanted, in order.
    pub files: Vec<String>,
}

#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// What the hub says of one file.
struct Found {
    etag: String,
    bytes: u64,
    /// Where its content is.
    url: String,
    /// Whether the hub itself gives it, and wants to know who asks; an address of the store is a secret by itself.
    is_signed: bool,
}

impl Remote {
    /// A repository as the environment says: `HF_ENDPOINT`, `HF_TOKEN` or the token that is kept, `HF_HOME` or
    /// `HF_HUB_CACHE`, `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// [`Error::Setting`] for what cannot be used.
    pub fn from_environment(kind: RepoKind, repo: &str, revision: Option<&str>) -> Result<Self, Error> {
        let variable = |name: &str| std::env::var(name).ok();
        let offline = variable("HF_HUB_OFFLINE").is_some_and(|on| !matches!(on.as_str(), "" | "0" | "false"));
        let cache = target::cache(variable)
            .ok_or_else(|| Error::Setting("there is no place for the hub's cache: set HF_HOME".to_owned()))?;
        Ok(Remote {
            kind,
            repo: repo.to_owned(),
            revision: target::revision(revision.unwrap_or("main"))?,
            endpoint: target::endpoint(None, variable)?,
            token: target::token_if_any(variable)?,
            cache,
            offline,
        })
    }

    /// The commit that the revision stands at now.
    ///
    /// # Errors
    /// As [`snapshot`](Self::snapshot).
    pub fn commit(&self) -> Result<String, Error> {
        match self.offline {
            true => self.kept_commit(),
            false => Ok(self.listing()?.sha),
        }
    }

    /// Brings the files that are `wanted`, by their paths, to this machine.
    ///
    /// # Errors
    /// As [`snapshot_of`](Self::snapshot_of).
    pub fn snapshot(&self, wanted: impl Fn(&str) -> bool) -> Result<Snapshot, Error> {
        self.snapshot_of(|files| files.retain(|file| wanted(file)))
    }

    /// Brings the files that `choose` leaves of all paths to this machine.
    ///
    /// # Errors
    /// Whatever the hub refuses, after several tries where trying again can help; names that lead out of the
    /// directory; contents that are not what the hub says they are.
    pub fn snapshot_of(&self, choose: impl FnOnce(&mut Vec<String>)) -> Result<Snapshot, Error> {
        if self.offline {
            return self.kept(choose);
        }
        let Listing { sha: commit, siblings } = self.listing()?;
        let what = self.say("listing");
        let broken = |rule: String| Error::Answer { what: what.clone(), rule };
        if commit.len() != 40 || !commit.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(broken(format!("{commit:?} is no commit")));
        }
        let mut files: Vec<String> = siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        choose(&mut files);
        files.sort();
        if let Some(file) = files.iter().find(|file| !is_inside(file)) {
            return Err(broken(format!("{file:?} is no path in a repository")));
        }
        let dir = self.dir().join("snapshots").join(&commit);
        let peek = Client::with_redirects(self.token.as_ref(), Policy::none())?;
        for file in &files {
            let place = dir.join(file);
            if place.exists() {
                continue;
            }
            let found = self.look(&peek, &commit, file)?;
            let blob = self.fetch(file, &found)?;
            link(&place, &blob, file)?;
        }
        let reference = self.dir().join("refs").join(&self.revision);
        if self.revision != commit {
            make_parent(&reference)?;
            fs::write(&reference, &commit).map_err(Error::io(&reference))?;
        }
        Ok(Snapshot { dir, commit, files })
    }

    fn say(&self, doing: &str) -> String {
        format!("{doing} {} at {}", self.repo, self.endpoint)
    }

    /// The repository's place in the cache.
    fn dir(&self) -> PathBuf {
        self.cache.join(format!("{}--{}", self.kind.plural(), self.repo.replace('/', "--")))
    }

    fn listing(&self) -> Result<Listing, Error> {
        let client = Client::new(self.token.as_ref())?;
        let revision = self.revision.replace('/', "%2F");
        let url = format!("{}/api/{}/{}/revision/{revision}", self.endpoint, self.kind.plural(), self.repo);
        let ask = |http: &reqwest::blocking::Client| Ok(client.signed(http.get(&url)).timeout(timeout(0)));
        client.send(&self.say("listing"), Repeat::Freely, ask)?.accepted()?.json()
    }

    fn kept_commit(&self) -> Result<String, Error> {
        let reference = self.dir().join("refs").join(&self.revision);
        match fs::read_to_string(&reference) {
            Ok(commit) => Ok(commit.trim().to_owned()),
            Err(_) if self.dir().join("snapshots").join(&self.revision).is_dir() => Ok(self.revision.clone()),
            Err(source) => Err(Error::Setting(format!(
                "{}: {source}; {} at {} is not in the cache, and HF_HUB_OFFLINE says to ask nobody",
                reference.display(),
                self.repo,
                self.revision
            ))),
        }
    }

    fn kept(&self, choose: impl FnOnce(&mut Vec<String>)) -> Result<Snapshot, Error> {
        let commit = self.kept_commit()?;
        let dir = self.dir().join("snapshots").join(&commit);
        let mut files = Vec::new();
        list(&dir, "", &mut files)?;
        choose(&mut files);
        files.sort();
        Ok(Snapshot { dir, commit, files })
    }

    /// Asks where a file's content is. The hub says what it is in headers of its redirect.
    fn look(&self, peek: &Client, commit: &str, file: &str) -> Result<Found, Error> {
        let path = file.split('/').map(encode).collect::<Vec<_>>().join("/");
        let page = self.kind.page();
        let mut url = format!("{}/{page}{}/resolve/{commit}/{path}", self.endpoint, self.repo);
        let what = format!("looking at {file} of {}", self.repo);
        // A repository that was renamed answers with a relative address.
        for _ in 0..3 {
            let ask = |http: &reqwest::blocking::Client| {
                let request = http.head(&url).header("accept-encoding", "identity");
                Ok(peek.signed(request).timeout(timeout(0)))
            };
            let answer = peek.send(&what, Repeat::Freely, ask)?;
            let location = answer.header("location").map(str::to_owned);
            match (answer.status, location) {
                (300..=399, Some(to)) if to.starts_with('/') && answer.header("x-linked-etag").is_none() => {
                    url = format!("{}{to}", self.endpoint);
                }
                (300..=399, Some(to)) => return self.found(&answer, to, false),
                (300..=399, None) => return Err(answer.broken("a redirect to nowhere")),
                _ => {
                    let answer = answer.accepted()?;
                    return self.found(&answer, url, true);
                }
            }
        }
        Err(Error::Answer { what, rule: "it redirects again and again".to_owned() })
    }

    fn found(&self, answer: &Answer, to: String, is_signed: bool) -> Result<Found, Error> {
        let header = |own: &str, usual: &str| answer.header(own).or_else(|| answer.header(usual));
        let etag = header("x-linked-etag", "etag").unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
        if etag.is_empty()
            || etag.len() > 128
            || !etag.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        {
            return Err(answer.broken(format!("{etag:?} names no content")));
        }
        let bytes = header("x-linked-size", "content-length").and_then(|text| text.parse().ok());
        let bytes = bytes.ok_or_else(|| answer.broken("the size is not said"))?;
        let url = if to.starts_with('/') { format!("{}{to}", self.endpoint) } else { to };
        Ok(Found { etag, bytes, url, is_signed })
    }

    /// The content in the cache, fetched where it is not there.
    fn fetch(&self, file: &str, found: &Found) -> Result<PathBuf, Error> {
        let blob = self.dir().join("blobs").join(&found.etag);
        if blob.metadata().is_ok_and(|there| there.len() == found.bytes) {
            return Ok(blob);
        }
        make_parent(&blob)?;
        let incomplete = blob.with_file_name(format!("{}.incomplete", found.etag));
        let mut out = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .read(true)
            .open(&incomplete)
            .map_err(Error::io(&incomplete))?;
        out.lock().map_err(Error::io(&incomplete))?;
        let client = Client::new(self.token.as_ref())?;
        let progress = Progress::new("receiving", found.bytes);
        let mut tries = 1;
        loop {
            let outcome = receive(&client, file, found, &mut out, &incomplete, &progress);
            match outcome {
                Ok(()) => break,
                Err(error) if error.is_passing() && tries < TRIES => {
                    let wait = back_off(tries);
                    tracing::warn!("{error}; trying again in {} s", wait.as_secs());
                    std::thread::sleep(wait);
                    tries += 1;
                }
                Err(error) => return Err(error),
            }
        }
        if let Err(rule) = check(&mut out, found).map_err(Error::io(&incomplete))? {
            let _ = fs::remove_file(&incomplete);
            return Err(Error::Answer { what: format!("receiving {file} of {}", self.repo), rule });
        }
        out.sync_all().map_err(Error::io(&incomplete))?;
        fs::rename(&incomplete, &blob).map_err(Error::io(&blob))?;
        Ok(blob)
    }
}

/// Appends what `out` lacks of the content.
fn receive(
    client: &Client,
    file: &str,
    found: &Found,
    out: &mut File,
    path: &Path,
    progress: &Progress,
) -> Result<(), Error> {
    let mut have = out.seek(SeekFrom::End(0)).map_err(Error::io(path))?;
    if have > found.bytes {
        out.set_len(0).map_err(Error::io(path))?;
        have = out.seek(SeekFrom::Start(0)).map_err(Error::io(path))?;
    }
    if have == found.bytes {
        return Ok(());
    }
    let what = format!("receiving {file}");
    let broken = |cause: String| Error::Connection { what: what.clone(), cause, tries: 1 };
    let mut request = client.http().get(&found.url).header("accept-encoding", "identity");
    request = request.timeout(timeout(found.bytes - have));
    if found.is_signed {
        request = client.signed(request);
    }
    if have > 0 {
        request = request.header(RANGE, format!("bytes={have}-"));
    }
    let mut response = request.send().map_err(|error| broken(causes(&error.without_url())))?;
    let status = response.status().as_u16();
    match status {
        206 => {}
        // The server does not go on in the middle.
        200 => {
            out.set_len(0).map_err(Error::io(path))?;
            have = out.seek(SeekFrom::Start(0)).map_err(Error::io(path))?;
        }
        _ if is_passing(status) => return Err(broken(format!("the server answered {status}"))),
        _ => {
            let (message, hint) = (String::new(), "; run again, for a new address of the file".to_owned());
            return Err(Error::Refused { what, status, message, hint });
        }
    }
    let mut chunk = vec![0; CHUNK_BYTES];
    while have < found.bytes {
        let count = response.read(&mut chunk).map_err(|error| broken(error.to_string()))?;
        if count == 0 {
            return Err(broken(format!("it ended after {have} of {} bytes", found.bytes)));
        }
        let count = count.min(usize::try_from(found.bytes - have).unwrap_or(usize::MAX));
        out.write_all(&chunk[..count]).map_err(Error::io(path))?;
        have += count as u64;
        progress.add(count as u64);
    }
    Ok(())
}

/// Holds the content against its name: SHA-256 of what is in the store, git's own digest of what is in a commit.
fn check(out: &mut File, found: &Found) -> std::io::Result<Result<(), String>> {
    out.seek(SeekFrom::Start(0))?;
    let mut sha256 = Sha256::new();
    let mut git = Sha1::new();
    git.update(format!("blob {}\0", found.bytes));
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let count = out.read(&mut chunk)?;
        if count == 0 {
            break;
        }
        match found.etag.len() {
            64 => sha256.update(&chunk[..count]),
            _ => git.update(&chunk[..count]),
        }
    }
    let digest = match found.etag.len() {
        64 => tunefleet_proto::hex(&sha256.finalize()),
        40 => tunefleet_proto::hex(&git.finalize()),
        // A name that says nothing of the content.
        _ => return Ok(Ok(())),
    };
    Ok(match digest == found.etag {
        true => Ok(()),
        false => Err(format!("its digest is {digest}, and {} was promised", found.etag)),
    })
}

/// A path of components that name something.
fn is_inside(path: &str) -> bool {
    let mut components = Path::new(path).components();
    !path.is_empty() && !path.contains('\0') && components.all(|part| matches!(part, Component::Normal(_)))
}

/// A component of a path as an address has it.
fn encode(component: &str) -> String {
    let mut out = String::with_capacity(component.len());
    for byte in component.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

fn make_parent(path: &Path) -> Result<(), Error> {
    match path.parent() {
        Some(parent) => fs::create_dir_all(parent).map_err(Error::io(parent)),
        None => Ok(()),
    }
}

/// A relative link at `place`, so that the cache can be moved.
fn link(place: &Path, blob: &Path, file: &str) -> Result<(), Error> {
    make_parent(place)?;
    let up = "../".repeat(file.split('/').count() + 1);
    let name = blob.file_name().unwrap_or_default();
    let target = Path::new(&up).join("blobs").join(name);
    match symlink(&target, place) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            fs::remove_file(place).and_then(|()| symlink(&target, place)).map_err(Error::io(place))
        }
        outcome => outcome.map_err(Error::io(place)),
    }
}

/// Paths of the files below `dir`.
fn list(dir: &Path, prefix: &str, files: &mut Vec<String>) -> Result<(), Error> {
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        match entry.path().is_dir() {
            true => list(&entry.path(), &format!("{name}/"), files)?,
            false => files.push(name),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_stays_in_its_directory() {
        for good in ["a.parquet", "data/train-00000.parquet", "a b/c"] {
            assert!(is_inside(good), "{good}");
        }
        for bad in ["", "/etc/passwd", "../x", "a/../../x", "a\0b", "."] {
            assert!(!is_inside(bad), "{bad:?}");
        }
        assert_eq!(encode("a b#?.x"), "a%20b%23%3F.x");
    }
}
