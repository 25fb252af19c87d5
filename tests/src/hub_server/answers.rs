//! The hub's answers, one function for each kind of request.

use std::collections::BTreeMap;

use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use sha1::{Digest as _, Sha1};
use sha2::{Digest as _, Sha256};

use super::{Branch, Content, Hub, Repository, TOKEN, no};

/// Files longer than this go to the store, whatever their names.
const MAX_COMMITTED_BYTES: u64 = 10_000;

impl Hub {
    /// The answer to a request whose body has arrived.
    pub(super) fn answer(&mut self, method: &str, path: &str, headers: &HeaderMap, body: &[u8]) -> Response {
        let authorized =
            headers.get("authorization").is_some_and(|value| value == format!("Bearer {TOKEN}").as_str());
        let segments: Vec<String> =
            path.split('/').skip(1).map(|segment| segment.replace("%2F", "/")).collect();
        let mut segments: Vec<&str> = segments.iter().map(String::as_str).collect();
        // Datasets stand beside models of the same names.
        if segments.first() == Some(&"datasets") {
            segments.remove(0);
        }
        if let ["api", kind @ "datasets", ..] = segments.as_mut_slice() {
            *kind = "models";
        }
        match (method, segments.as_slice()) {
            ("PUT", ["store", oid]) => self.put(headers, oid, None, body),
            ("PUT", ["store", oid, part]) => self.put(headers, oid, Some(part.parse().unwrap()), body),
            ("POST", ["store", "complete", oid]) => self.complete(oid, body),
            ("GET" | "HEAD", ["store", oid]) => {
                self.token_leaked |= headers.contains_key("authorization");
                match self.objects.get(*oid) {
                    Some(object) => ranged(headers, object),
                    None => no(StatusCode::NOT_FOUND, "no such object"),
                }
            }
            ("GET" | "HEAD", [owner, name, "resolve", revision, path @ ..])
                if authorized || self.is_public =>
            {
                self.resolve(method, &format!("{owner}/{name}"), revision, &path.join("/"), headers)
            }
            ("GET", ["api", "models", owner, name, "revision", revision]) if self.is_public => {
                self.of_branch(&format!("{owner}/{name}"), (method, "revision"), revision, headers, body)
            }
            _ if !authorized => no(StatusCode::UNAUTHORIZED, "Invalid username or password."),
            ("POST", ["api", "repos", "create"]) => self.create(body),
            ("GET", ["api", "models", owner, name]) => {
                match self.repositories.get(&format!("{owner}/{name}")) {
                    Some(repository) => {
                        let main = &repository.branches["main"];
                        let names = main.files.keys().map(|path| json!({ "rfilename": path }));
                        yes(&json!({
                            "id": format!("{owner}/{name}"), "sha": format!("{:040x}", main.commits),
                            "siblings": names.collect::<Vec<_>>(),
                        }))
                    }
                    None => no(StatusCode::NOT_FOUND, "Repository not found"),
                }
            }
            ("POST", [owner, name, "info", "lfs", "objects", "batch"]) => {
                self.batch(&format!("{owner}/{}", name.strip_suffix(".git").unwrap()), body)
            }
            ("POST", [_, _, "info", "lfs", "objects", "verify"]) => {
                let asked: Value = serde_json::from_slice(body).unwrap();
                let object = self.objects.get(asked["oid"].as_str().unwrap());
                match object.is_some_and(|object| object.len() as u64 == asked["size"]) {
                    true => yes(&json!({})),
                    false => no(StatusCode::NOT_FOUND, "Object not found"),
                }
            }
            ("GET", ["api", "models", owner, name, "tree", revision, ..]) => {
                self.of_branch(&format!("{owner}/{name}"), (method, "tree"), revision, headers, body)
            }
            (_, ["api", "models", owner, name, verb, revision]) => {
                self.of_branch(&format!("{owner}/{name}"), (method, verb), revision, headers, body)
            }
            _ => no(StatusCode::NOT_FOUND, "no such address"),
        }
    }

    fn create(&mut self, body: &[u8]) -> Response {
        let asked: Value = serde_json::from_slice(body).unwrap();
        let id = format!("{}/{}", asked["organization"].as_str().unwrap(), asked["name"].as_str().unwrap());
        if self.repositories.contains_key(&id) {
            return no(StatusCode::CONFLICT, "You already created this model repo");
        }
        let private = asked["visibility"] == "private";
        let branches = BTreeMap::from([("main".to_owned(), Branch::default())]);
        self.repositories.insert(id.clone(), Repository { private, branches });
        yes(&json!({ "url": format!("{}/{id}", self.url), "name": id }))
    }

    fn of_branch(
        &mut self,
        id: &str,
        verb: (&str, &str),
        revision: &str,
        headers: &HeaderMap,
        body: &[u8],
    ) -> Response {
        let Some(repository) = self.repositories.get_mut(id) else {
            return no(StatusCode::NOT_FOUND, "Repository not found");
        };
        if verb == ("POST", "branch") {
            let main = repository.branches["main"].clone();
            repository.branches.insert(revision.to_owned(), main);
            return yes(&json!({}));
        }
        if let ("GET", "tree") | ("POST", "paths-info") = verb {
            let of = |(name, branch): &(&String, &Branch)| {
                name.as_str() == revision || format!("{:040x}", branch.commits) == revision
            };
            let files = repository.branches.iter().find(of).map(|(_, branch)| branch.files.clone());
            return self.listing(verb.1, &files.unwrap_or_default(), body);
        }
        // By its name, or to read by its commit.
        let by_commit = |branch: &Branch| format!("{:040x}", branch.commits) == revision;
        let named = repository.branches.iter().find(|(name, branch)| *name == revision || by_commit(branch));
        let named = named.map(|(name, _)| name.clone());
        let Some(branch) = named.and_then(|name| repository.branches.get_mut(&name)) else {
            let answer = no(StatusCode::NOT_FOUND, "Invalid rev id");
            return ([("x-error-code", "RevisionNotFound")], answer).into_response();
        };
        match verb {
            ("GET", "revision") => {
                let names = branch.files.keys().map(|path| json!({ "rfilename": path }));
                let siblings: Vec<Value> = names.collect();
                yes(&json!({ "id": id, "sha": format!("{:040x}", branch.commits), "siblings": siblings }))
            }
            ("POST", "preupload") => {
                let asked: Value = serde_json::from_slice(body).unwrap();
                let mode = |file: &Value| {
                    let path = file["path"].as_str().unwrap();
                    let sample = BASE64.decode(file["sample"].as_str().unwrap()).unwrap();
                    assert!(sample.len() <= 512);
                    let stored = is_stored(path, file["size"].as_u64().unwrap());
                    let oid = branch.files.get(path).map(object_id);
                    let mode = if stored { "lfs" } else { "regular" };
                    json!({ "path": path, "uploadMode": mode, "shouldIgnore": false, "oid": oid })
                };
                yes(
                    &json!({ "files": asked["files"].as_array().unwrap().iter().map(mode).collect::<Vec<_>>() }),
                )
            }
            ("POST", "commit") => {
                assert_eq!(headers["content-type"], "application/x-ndjson");
                let mut lines = body.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
                let header: Value = serde_json::from_slice(lines.next().unwrap()).unwrap();
                assert!(header["key"] == "header" && header["value"]["summary"].is_string(), "{header}");
                for line in lines {
                    let line: Value = serde_json::from_slice(line).unwrap();
                    let value = &line["value"];
                    let content = match line["key"].as_str().unwrap() {
                        "file" => {
                            assert_eq!(value["encoding"], "base64");
                            Content::Committed(BASE64.decode(value["content"].as_str().unwrap()).unwrap())
                        }
                        "lfsFile" => {
                            let oid = value["oid"].as_str().unwrap();
                            let object = self.objects.get(oid);
                            if value["algo"] != "sha256"
                                || object.is_none_or(|o| o.len() as u64 != value["size"])
                            {
                                return no(StatusCode::BAD_REQUEST, "lfsFile without its object");
                            }
                            Content::Stored(oid.to_owned())
                        }
                        other => return no(StatusCode::BAD_REQUEST, other),
                    };
                    branch.files.insert(value["path"].as_str().unwrap().to_owned(), content);
                }
                branch.commits += 1;
                let oid = format!("{:040x}", branch.commits);
                let url = format!("{}/{id}/commit/{oid}", self.url);
                yes(&json!({ "success": true, "commitOid": oid, "commitUrl": url, "hookOutput": "" }))
            }
            _ => no(StatusCode::NOT_FOUND, "no such address"),
        }
    }

    /// A file of a commit; what is in the store is elsewhere.
    fn resolve(&self, method: &str, id: &str, revision: &str, path: &str, headers: &HeaderMap) -> Response {
        let Some(repository) = self.repositories.get(id) else {
            return no(StatusCode::NOT_FOUND, "Repository not found");
        };
        let of = |(name, branch): &(&String, &Branch)| {
            name.as_str() == revision || format!("{:040x}", branch.commits) == revision
        };
        let Some((_, branch)) = repository.branches.iter().find(of) else {
            return no(StatusCode::NOT_FOUND, "Invalid rev id");
        };
        let path = path.replace("%20", " ");
        let Some(content) = branch.files.get(&path) else {
            return no(StatusCode::NOT_FOUND, "Entry not found");
        };
        let commit = format!("{:040x}", branch.commits);
        let etag = format!("\"{}\"", object_id(content));
        match content {
            Content::Committed(bytes) if method == "HEAD" => {
                let length = bytes.len().to_string();
                ([("x-repo-commit", commit), ("etag", etag), ("content-length", length)], "").into_response()
            }
            Content::Committed(bytes) => ranged(headers, bytes),
            Content::Stored(oid) => {
                let size = self.objects[oid].len().to_string();
                // By another name: the store is another server.
                let store = self.url.replace("127.0.0.1", "localhost");
                let location = format!("{store}/store/{oid}?signature=secret");
                let headers = [
                    ("x-repo-commit", commit),
                    ("x-linked-etag", etag),
                    ("x-linked-size", size),
                    ("location", location),
                ];
                (StatusCode::FOUND, headers, "").into_response()
            }
        }
    }

    /// The files of a tree, or those of them that are asked for.
    fn listing(&self, verb: &str, files: &BTreeMap<String, Content>, body: &[u8]) -> Response {
        let asked = String::from_utf8_lossy(body).into_owned();
        let path = |pair: &str| Some(pair.strip_prefix("paths=")?.replace("%2F", "/").replace('+', " "));
        let asked: Vec<String> = asked.split('&').filter_map(path).collect();
        let found = files.iter().filter(|(path, _)| verb == "tree" || asked.contains(path));
        yes(&found.map(|file| self.entry(file)).collect())
    }

    /// A file as listings of a tree have it.
    fn entry(&self, (path, content): (&String, &Content)) -> Value {
        match content {
            Content::Committed(bytes) => {
                json!({ "type": "file", "path": path, "size": bytes.len(), "oid": object_id(content) })
            }
            Content::Stored(oid) => {
                let size = self.objects[oid].len();
                let lfs = json!({ "oid": oid, "size": size, "pointerSize": 130 });
                json!({ "type": "file", "path": path, "size": size, "oid": oid[..40], "lfs": lfs })
            }
        }
    }

    fn batch(&mut self, id: &str, body: &[u8]) -> Response {
        let asked: Value = serde_json::from_slice(body).unwrap();
        assert!(asked["operation"] == "upload" && asked["hash_algo"] == "sha256", "{asked}");
        let offered: Vec<&str> =
            asked["transfers"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        assert!(offered.contains(&"basic") && offered.contains(&"multipart"));
        let object = |object: &Value| {
            let (oid, bytes) = (object["oid"].as_str().unwrap(), object["size"].as_u64().unwrap());
            if self.objects.contains_key(oid) {
                return json!({ "oid": oid, "size": bytes });
            }
            let url = &self.url;
            let upload = if bytes <= self.part_bytes {
                json!({ "href": format!("{url}/store/{oid}?signature=secret") })
            } else {
                let mut header = json!({ "chunk_size": self.part_bytes.to_string() });
                for part in 1..=bytes.div_ceil(self.part_bytes) {
                    header[part.to_string()] = format!("{url}/store/{oid}/{part}?signature=secret").into();
                }
                json!({ "href": format!("{url}/store/complete/{oid}"), "header": header })
            };
            let verify = json!({ "href": format!("{url}/{id}.git/info/lfs/objects/verify") });
            json!({ "oid": oid, "size": bytes, "actions": { "upload": upload, "verify": verify } })
        };
        let objects: Vec<Value> = asked["objects"].as_array().unwrap().iter().map(object).collect();
        yes(&json!({ "transfer": "multipart", "objects": objects }))
    }

    fn put(&mut self, headers: &HeaderMap, oid: &str, part: Option<u64>, body: &[u8]) -> Response {
        self.token_leaked |= headers.contains_key("authorization");
        self.stored_bytes += body.len() as u64;
        match part {
            Some(part) => drop(self.parts.insert((oid.to_owned(), part), body.to_vec())),
            None if tunefleet_proto::hex(&Sha256::digest(body)) == oid => {
                self.objects.insert(oid.to_owned(), body.to_vec());
            }
            None => return no(StatusCode::BAD_REQUEST, "another content"),
        }
        ([("etag", format!("\"{}\"", etag(body)))], "").into_response()
    }

    fn complete(&mut self, oid: &str, body: &[u8]) -> Response {
        let asked: Value = serde_json::from_slice(body).unwrap();
        assert_eq!(asked["oid"], oid);
        let mut object = Vec::new();
        for (part, number) in asked["parts"].as_array().unwrap().iter().zip(1u64..) {
            let Some(bytes) = self.parts.get(&(oid.to_owned(), number)) else {
                return no(StatusCode::BAD_REQUEST, "a part is missing");
            };
            assert_eq!(part["partNumber"], number);
            assert_eq!(part["etag"], format!("\"{}\"", etag(bytes)));
            object.extend_from_slice(bytes);
        }
        if tunefleet_proto::hex(&Sha256::digest(&object)) != oid {
            return no(StatusCode::BAD_REQUEST, "another content");
        }
        self.objects.insert(oid.to_owned(), object);
        yes(&json!({ "success": true }))
    }
}

/// Whether the hub keeps a file in the store.
pub(super) fn is_stored(path: &str, bytes: u64) -> bool {
    let is_table = [".safetensors", ".parquet", ".arrow"].iter().any(|end| path.ends_with(end));
    is_table || bytes > MAX_COMMITTED_BYTES
}

pub(super) fn sha256(bytes: &[u8]) -> String {
    tunefleet_proto::hex(&Sha256::digest(bytes))
}

/// What the hub calls a content.
fn object_id(content: &Content) -> String {
    match content {
        Content::Committed(bytes) => {
            let blob = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
            tunefleet_proto::hex(&Sha1::digest(blob))
        }
        Content::Stored(oid) => oid.clone(),
    }
}

/// The bytes, or those from `Range: bytes=N-` on.
fn ranged(headers: &HeaderMap, bytes: &[u8]) -> Response {
    let from = headers.get("range").and_then(|range| range.to_str().ok());
    let from = from.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    match from {
        Some(from) if from < bytes.len() => {
            let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
            (StatusCode::PARTIAL_CONTENT, [("content-range", range)], bytes[from..].to_vec()).into_response()
        }
        _ => bytes.to_vec().into_response(),
    }
}

fn etag(part: &[u8]) -> String {
    tunefleet_proto::hex(&Sha256::digest(part))[..32].to_owned()
}

fn yes(value: &Value) -> Response {
    ([("content-type", "application/json")], value.to_string()).into_response()
}
