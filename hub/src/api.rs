//! The hub's requests and answers, as `huggingface_hub` 1.x sends and reads them.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use reqwest::blocking::{self, RequestBuilder};
use reqwest::header::{ACCEPT, CONTENT_TYPE};
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{Answer, Client, Repeat, timeout};
use super::files::LocalFile;
use super::target::PUBLIC_ENDPOINT;
use super::{Error, Target};

/// Files that are asked about in one request.
pub(super) const BATCH_FILES: usize = 256;
/// Of Git LFS's requests.
pub(super) const LFS_JSON: &str = "application/vnd.git-lfs+json";

/// Where the hub wants a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) enum UploadMode {
    /// Within the commit.
    #[serde(rename = "regular")]
    Commit,
    /// In Git LFS's store, and in the commit by its digest.
    #[serde(rename = "lfs")]
    Store,
}

/// What the hub says of a file.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct FileMode {
    path: String,
    #[serde(rename = "uploadMode")]
    pub(super) mode: UploadMode,
    /// The repository's `.gitignore` leaves it out.
    #[serde(default)]
    pub(super) should_ignore: bool,
    /// The content that the branch has under this name, see [`LocalFile::object_id`].
    #[serde(default)]
    pub(super) oid: Option<String>,
}

/// What the store says of an object.
#[derive(Debug, Deserialize)]
pub(super) struct StoreObject {
    pub(super) oid: String,
    #[serde(default)]
    error: Option<StoreError>,
    /// None where the store has the object.
    #[serde(default)]
    pub(super) actions: Option<Actions>,
}

#[derive(Debug, Deserialize)]
struct StoreError {
    #[serde(default)]
    code: u16,
    message: String,
}

/// How an object gets into the store.
#[derive(Debug, Deserialize)]
pub(super) struct Actions {
    #[serde(default)]
    pub(super) upload: Option<Action>,
    #[serde(default)]
    pub(super) verify: Option<Action>,
}

/// One request of several.
#[derive(Debug, Deserialize)]
pub(super) struct Action {
    pub(super) href: String,
    /// Headers; of an upload in parts, `chunk_size` and the address of each part by its number.
    #[serde(default)]
    pub(super) header: BTreeMap<String, Value>,
}

/// One repository of one hub.
pub(super) struct Hub<'t> {
    target: &'t Target,
    pub(super) client: Client,
}

impl<'t> Hub<'t> {
    pub(super) fn new(target: &'t Target) -> Result<Self, Error> {
        Ok(Hub { target, client: Client::new(Some(&target.token))? })
    }

    /// The repository's page.
    pub(super) fn repository_url(&self) -> String {
        format!("{}/{}{}", self.target.endpoint, self.target.kind.page(), self.target.repo)
    }

    fn repository_api(&self) -> String {
        format!("{}/api/{}/{}", self.target.endpoint, self.target.kind.plural(), self.target.repo)
    }

    /// The branch within an address.
    fn revision(&self) -> String {
        self.target.revision.replace('/', "%2F")
    }

    fn say(&self, doing: &str) -> String {
        format!("{doing} {} at {}", self.target.repo, self.target.endpoint)
    }

    fn get(&self, what: &str, url: &str) -> Result<Answer, Error> {
        self.request(what, 0, |http| http.get(url))
    }

    fn post(&self, what: &str, url: &str, payload: &Value) -> Result<Answer, Error> {
        self.request(what, 0, |http| http.post(url).json(payload))
    }

    fn request(
        &self,
        what: &str,
        sent_bytes: u64,
        build: impl Fn(&blocking::Client) -> RequestBuilder,
    ) -> Result<Answer, Error> {
        self.client.send(what, Repeat::Freely, |http| {
            Ok(self.client.signed(build(http)).timeout(timeout(sent_bytes)))
        })
    }

    /// Makes the repository where there is none.
    pub(super) fn ensure_repository(&self) -> Result<(), Error> {
        let Target { repo, private, .. } = self.target;
        let mut payload =
            json!({ "name": repo.name, "organization": repo.owner, "type": self.target.kind.name() });
        if *private {
            payload["visibility"] = "private".into();
        }
        let url = format!("{}/api/repos/create", self.target.endpoint);
        let answer = self.post(&self.say("making"), &url, &payload)?;
        let exists = match answer.status {
            409 => true,
            // A token that may write to a repository need not be allowed to make one.
            401..=403 => self.get(&self.say("looking for"), &self.repository_api())?.status == 200,
            _ => false,
        };
        match exists {
            true if *private => tracing::warn!("{repo} exists already: --private changes nothing of it"),
            true => {}
            false => drop(answer.accepted()?),
        }
        Ok(())
    }

    /// Makes the branch where there is none.
    pub(super) fn ensure_branch(&self) -> Result<(), Error> {
        if self.target.revision == "main" {
            return Ok(());
        }
        let (api, revision) = (self.repository_api(), self.revision());
        let branch = format!("branch {} of", self.target.revision);
        let what = self.say(&format!("looking for {branch}"));
        let found = self.get(&what, &format!("{api}/revision/{revision}"))?;
        if found.status != 404 {
            return found.accepted().map(drop);
        }
        let what = self.say(&format!("making {branch}"));
        let made = self.post(&what, &format!("{api}/branch/{revision}"), &json!({}))?;
        if made.status == 409 { Ok(()) } else { made.accepted().map(drop) }
    }

    /// Where the hub wants each file, in their order.
    pub(super) fn upload_modes(&self, files: &[LocalFile]) -> Result<Vec<FileMode>, Error> {
        let url = format!("{}/preupload/{}", self.repository_api(), self.revision());
        let what = self.say("announcing files to");
        let mut modes = Vec::with_capacity(files.len());
        for batch in files.chunks(BATCH_FILES) {
            let announce = |file: &LocalFile| json!({ "path": file.name, "sample": BASE64.encode(&file.sample), "size": file.bytes });
            let payload = json!({ "files": batch.iter().map(announce).collect::<Vec<_>>() });
            let answer = self.post(&what, &url, &payload)?.accepted()?;
            #[derive(Deserialize)]
            struct Modes {
                files: Vec<FileMode>,
            }
            let found: Modes = answer.json()?;
            for file in batch {
                let mode = found.files.iter().find(|mode| mode.path == file.name);
                let mut mode = mode
                    .cloned()
                    .ok_or_else(|| answer.broken(format!("nothing is said of {:?}", file.name)))?;
                // The store takes nothing that is empty.
                if file.bytes == 0 {
                    mode.mode = UploadMode::Commit;
                }
                modes.push(mode);
            }
        }
        Ok(modes)
    }

    /// What the store wants of each object, in some order.
    pub(super) fn store_batch(&self, files: &[&LocalFile]) -> Result<Vec<StoreObject>, Error> {
        let url = format!("{}.git/info/lfs/objects/batch", self.repository_url());
        let objects = files.iter().map(|file| json!({ "oid": file.sha256, "size": file.bytes }));
        let payload = json!({
            "operation": "upload",
            "transfers": ["basic", "multipart"],
            "objects": objects.collect::<Vec<_>>(),
            "hash_algo": "sha256",
            "ref": { "name": self.target.revision },
        });
        let what = self.say("asking the store of");
        let build = |http: &blocking::Client| {
            http.post(&url).json(&payload).header(ACCEPT, LFS_JSON).header(CONTENT_TYPE, LFS_JSON)
        };
        let answer = self.request(&what, 0, build)?.accepted()?;
        #[derive(Deserialize)]
        struct Batch {
            objects: Vec<StoreObject>,
        }
        let batch: Batch = answer.json()?;
        for object in &batch.objects {
            if let Some(error) = &object.error {
                let (status, message) = (error.code, format!(" for {}: {}", object.oid, error.message));
                return Err(Error::Refused { what, status, message, hint: String::new() });
            }
        }
        Ok(batch.objects)
    }

    /// Has the store check an object.
    pub(super) fn verify(&self, file: &LocalFile, action: &Action) -> Result<(), Error> {
        let url = self.at_home(&action.href);
        let payload = json!({ "oid": file.sha256, "size": file.bytes });
        let what = format!("having {} verified", file.name);
        let is_hub = self.is_hub(&url);
        let answer = self.client.send(&what, Repeat::Freely, |http| {
            let request = http.post(&url).json(&payload).timeout(timeout(file.bytes));
            Ok(if is_hub { self.client.signed(request) } else { request })
        })?;
        answer.accepted().map(drop)
    }

    /// Commits files that the store has, or that go within the commit; the commit's id.
    pub(super) fn commit(&self, files: &[(&LocalFile, UploadMode)]) -> Result<String, Error> {
        let header = json!({ "summary": "Upload with tunefleet", "description": "" });
        let mut lines = format!("{}\n", json!({ "key": "header", "value": header }));
        for (file, mode) in files {
            let line = match mode {
                UploadMode::Commit => json!({ "key": "file", "value": {
                    "content": BASE64.encode(file.content()?), "path": file.name, "encoding": "base64",
                }}),
                UploadMode::Store => json!({ "key": "lfsFile", "value": {
                    "path": file.name, "algo": "sha256", "oid": file.sha256, "size": file.bytes,
                }}),
            };
            lines.push_str(&format!("{line}\n"));
        }
        let url = format!("{}/commit/{}", self.repository_api(), self.revision());
        let what = self.say("committing to");
        let answer = self.client.send(&what, Repeat::IfRefused, |http| {
            let request = http.post(&url).header(CONTENT_TYPE, "application/x-ndjson");
            let request = request.body(lines.clone()).timeout(timeout(lines.len() as u64));
            Ok(self.client.signed(request))
        })?;
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Made {
            commit_oid: String,
        }
        let made: Made = answer.accepted()?.json()?;
        Ok(made.commit_oid)
    }

    /// An address as seen through this endpoint: a mirror passes on answers that name the public hub.
    pub(super) fn at_home(&self, href: &str) -> String {
        match href.strip_prefix(PUBLIC_ENDPOINT).filter(|rest| rest.starts_with('/')) {
            Some(rest) => format!("{}{rest}", self.target.endpoint),
            None => href.to_owned(),
        }
    }

    /// Whether the token may be sent to `url`.
    fn is_hub(&self, url: &str) -> bool {
        let origin = |url: &str| Some(reqwest::Url::parse(url).ok()?.origin());
        let endpoint = origin(&self.target.endpoint);
        endpoint.is_some() && endpoint == origin(url)
    }
}
