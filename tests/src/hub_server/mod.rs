//! A small Hugging Face hub on a free port: repositories, the store of Git LFS, and faults on demand.
//!
//! Its requests and answers are those of `huggingface_hub` 1.x, whose own client is one of its tests.

/// What it answers.
mod answers;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;
use tokio_stream::StreamExt;

/// Who may do everything.
pub const TOKEN: &str = "hf_of_a_test";

/// A file of a branch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Within the commit.
    Committed(Vec<u8>),
    /// In the store, by SHA-256.
    Stored(String),
}

/// A branch.
#[derive(Debug, Clone, Default)]
pub struct Branch {
    /// Number of commits.
    pub commits: u32,
    /// By path.
    pub files: BTreeMap<String, Content>,
}

/// A repository.
#[derive(Debug, Clone, Default)]
pub struct Repository {
    /// As it was asked for.
    pub private: bool,
    /// By name.
    pub branches: BTreeMap<String, Branch>,
}

/// What goes wrong, and how often.
#[derive(Debug, Clone)]
pub struct Fault {
    /// Beginning of "METHOD PATH".
    pub on: String,
    /// So many times.
    pub times: u32,
    /// And how.
    pub kind: FaultKind,
}

/// How a request goes wrong.
#[derive(Debug, Clone)]
pub enum FaultKind {
    /// A status, headers and a body instead of an answer.
    Answer(u16, Vec<(&'static str, &'static str)>, &'static str),
    /// Of the answer's body, only so many bytes.
    HalfAnswer(usize),
    /// A status after so many bytes of the body.
    AnswerAfter(usize, u16),
    /// The connection ends after so many bytes of the body.
    CutAfter(usize),
    /// The connection ends when everything has been done, before the answer.
    CutBeforeAnswer,
}

/// All that the hub knows.
#[derive(Debug, Default)]
pub struct Hub {
    /// By OWNER/NAME.
    pub repositories: BTreeMap<String, Repository>,
    /// The store, by SHA-256.
    pub objects: BTreeMap<String, Vec<u8>>,
    /// Objects of more bytes than this are sent in parts of so many.
    pub part_bytes: u64,
    /// What will go wrong.
    pub faults: Vec<Fault>,
    /// "METHOD PATH" of all requests.
    pub requests: Vec<String>,
    /// Bytes of bodies that arrived at the store whole.
    pub stored_bytes: u64,
    /// Whether anyone may read.
    pub is_public: bool,
    /// Whether a token was sent where none belongs.
    pub token_leaked: bool,
    parts: BTreeMap<(String, u64), Vec<u8>>,
    url: String,
}

/// A running hub; it ends with the test's process.
pub struct HubServer {
    /// Its address.
    pub url: String,
    state: Arc<Mutex<Hub>>,
}

impl HubServer {
    /// Starts one that sends objects above `part_bytes` in parts.
    pub fn start(part_bytes: u64) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(Hub { part_bytes, url: url.clone(), ..Hub::default() }));
        let router = Router::new().fallback(handle).with_state(Arc::clone(&state));
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
            runtime.unwrap().block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                axum::serve(listener, router).await.unwrap();
            });
        });
        HubServer { url, state }
    }

    /// What it knows now.
    pub fn hub(&self) -> MutexGuard<'_, Hub> {
        self.state.lock().unwrap()
    }
}

impl Hub {
    /// Puts files into a branch, as a push does; those above the limit, and tables, go to the store.
    pub fn commit(&mut self, repository: &str, branch: &str, files: &[(&str, &[u8])]) {
        let of = self.repositories.entry(repository.to_owned()).or_default();
        let branch = of.branches.entry(branch.to_owned()).or_default();
        branch.commits += 1;
        for &(path, bytes) in files {
            let content = match answers::is_stored(path, bytes.len() as u64) {
                true => {
                    let oid = answers::sha256(bytes);
                    self.objects.insert(oid.clone(), bytes.to_vec());
                    Content::Stored(oid)
                }
                false => Content::Committed(bytes.to_vec()),
            };
            branch.files.insert(path.to_owned(), content);
        }
    }

    /// A branch's files, those of the store with their content.
    pub fn files(&self, repository: &str, branch: &str) -> BTreeMap<String, Vec<u8>> {
        let files = &self.repositories[repository].branches[branch].files;
        let content = |content: &Content| match content {
            Content::Committed(bytes) => bytes.clone(),
            Content::Stored(oid) => self.objects[oid].clone(),
        };
        files.iter().map(|(path, file)| (path.clone(), content(file))).collect()
    }

    /// Kinds of requests that came: digests, numbers of parts and names left out.
    pub fn kinds_of_requests(&self) -> BTreeSet<String> {
        let kind = |request: &String| {
            let parts = request.split('/').map(|part| if part.len() == 64 { "OID" } else { part });
            let kind = parts.collect::<Vec<_>>().join("/");
            kind.trim_end_matches(|c: char| c.is_ascii_digit()).to_owned()
        };
        self.requests.iter().map(kind).collect()
    }

    /// How many requests began so.
    pub fn count(&self, on: &str) -> usize {
        self.requests.iter().filter(|request| request.starts_with(on)).count()
    }

    fn fault(&mut self, request: &str) -> Option<FaultKind> {
        let fault = self.faults.iter_mut().find(|f| f.times > 0 && request.starts_with(&f.on))?;
        fault.times -= 1;
        Some(fault.kind.clone())
    }
}

fn no(status: StatusCode, error: &str) -> Response {
    (status, json!({ "error": error }).to_string()).into_response()
}

/// Ends the connection: what serves it unwinds.
fn cut() -> ! {
    std::panic::resume_unwind(Box::new("cut"))
}

/// At least `bytes` of a body, unless it is shorter.
async fn read_some(body: Body, bytes: usize) {
    let mut stream = body.into_data_stream();
    let mut read = 0;
    while read < bytes {
        let Some(Ok(chunk)) = stream.next().await else { break };
        read += chunk.len();
    }
}

/// The answer, which promises its whole length and ends too early.
async fn half(answer: Response, bytes: usize) -> Response {
    let (head, body) = answer.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    let part = body.slice(..bytes.min(body.len()));
    let ends = std::io::Error::other("cut");
    let stream = tokio_stream::iter([Ok(part), Err(ends)]);
    Response::from_parts(head, Body::from_stream(stream))
}

async fn handle(State(state): State<Arc<Mutex<Hub>>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let (method, path) = (head.method.as_str().to_owned(), head.uri.path().to_owned());
    let name = format!("{method} {path}");
    let fault = {
        let mut hub = state.lock().unwrap();
        hub.requests.push(name.clone());
        hub.fault(&name)
    };
    match fault {
        Some(FaultKind::Answer(status, headers, text)) => {
            read_some(body, usize::MAX).await;
            let mut answer = (StatusCode::from_u16(status).unwrap(), text).into_response();
            for (name, value) in headers {
                answer.headers_mut().insert(name, value.parse().unwrap());
            }
            return answer;
        }
        Some(FaultKind::AnswerAfter(bytes, status)) => {
            read_some(body, bytes).await;
            return no(StatusCode::from_u16(status).unwrap(), "in the middle");
        }
        Some(FaultKind::CutAfter(bytes)) => {
            read_some(body, bytes).await;
            cut();
        }
        Some(FaultKind::CutBeforeAnswer | FaultKind::HalfAnswer(_)) | None => {}
    }
    let Ok(body) = axum::body::to_bytes(body, usize::MAX).await else { cut() };
    let answer = state.lock().unwrap().answer(&method, &path, &head.headers, &body);
    match fault {
        Some(FaultKind::HalfAnswer(bytes)) => half(answer, bytes).await,
        Some(_) => cut(),
        None => answer,
    }
}
