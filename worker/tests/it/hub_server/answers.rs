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
        let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
        match (method, segments.as_slice()) {
            ("PUT", ["store", oid]) => self.put(headers, oid, None, body),
            ("PUT", ["store", oid, part]) => self.put(headers, oid, Some(part.parse().unwrap()), body),
            ("POST", ["store", "complete", oid]) => self.complete(oid, body),
            _ if !authorized => no(StatusCode::UNAUTHORIZED, "Invalid username or password."),
            ("POST", ["api", "repos", "create"]) => self.create(body),
            ("GET", ["api", "models", owner, name]) => {
                match self.repositories.get(&format!("{owner}/{name}")) {
                    Some(_) => yes(&json!({ "id": format!("{owner}/{name}") })),
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
        let Some(branch) = repository.branches.get_mut(revision) else {
            let answer = no(StatusCode::NOT_FOUND, "Invalid rev id");
            return ([("x-error-code", "RevisionNotFound")], answer).into_response();
        };
        match verb {
            ("GET", "revision") => yes(&json!({ "id": id, "sha": format!("{:040x}", branch.commits) })),
            ("POST", "preupload") => {
                let asked: Value = serde_json::from_slice(body).unwrap();
                let mode = |file: &Value| {
                    let path = file["path"].as_str().unwrap();
                    let sample = BASE64.decode(file["sample"].as_str().unwrap()).unwrap();
                    assert!(sample.len() <= 512);
                    let stored = path.ends_with(".safetensors")
                        || file["size"].as_u64().unwrap() > MAX_COMMITTED_BYTES;
                    let oid = branch.files.get(path).map(|content| match content {
                        Content::Committed(bytes) => {
                            let blob = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
                            tunefleet_proto::hex(&Sha1::digest(blob))
                        }
                        Content::Stored(oid) => oid.clone(),
                    });
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

fn etag(part: &[u8]) -> String {
    tunefleet_proto::hex(&Sha256::digest(part))[..32].to_owned()
}

fn yes(value: &Value) -> Response {
    ([("content-type", "application/json")], value.to_string()).into_response()
}
