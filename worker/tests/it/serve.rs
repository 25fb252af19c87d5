//! The completion server: what many requests at once are answered, and over which routes.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::data_support::{Workshop, documents};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};
use tch::Device;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tunefleet_proto::job::Precision;
use tunefleet_worker::data::tokenizer::Tokenizer;
use tunefleet_worker::generate::decoder::Decoder;
use tunefleet_worker::generate::sampling::Sampling;
use tunefleet_worker::model::numerics::Numerics;
use tunefleet_worker::serve::engine::request::{Event, Request, Token};
use tunefleet_worker::serve::engine::{self, Handle, Settings};
use tunefleet_worker::serve::stop::Rules;

/// A tokenizer, and a model of random weights for it in the same directory.
fn model() -> (Workshop, PathBuf) {
    let workshop = Workshop::standard();
    let dir = workshop.dir.path().join("model");
    let tokenizer = workshop.tokenizer();
    tunefleet_worker::init_model::init("tiny", Some(&tokenizer), 5, Precision::Fp32, &dir).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        if !dir.join(file).exists() {
            std::fs::copy(tokenizer.join(file), dir.join(file)).unwrap();
        }
    }
    (workshop, dir)
}

const ALONE: Settings = Settings {
    max_batch: 1,
    max_queue: 1000,
    prefill_tokens: 32,
    cache_tokens: Some(16_384),
    prefix_cache: false,
    speculate: false,
    batch_invariant: false,
};
const SHARED: Settings = Settings { max_batch: 8, prefix_cache: true, speculate: true, ..ALONE };

fn decoder(model: &Path) -> Decoder {
    Decoder::load(model, Numerics::new(Device::Cpu, Precision::Fp32)).unwrap()
}

fn start(model: &Path, settings: Settings) -> Handle {
    let tokenizer = Arc::new(Tokenizer::load(model).unwrap());
    let model = model.to_owned();
    let numerics = Numerics::new(Device::Cpu, Precision::Fp32);
    engine::start(move || Decoder::load(&model, numerics), tokenizer, settings).unwrap().0
}

fn ask(engine: &Handle, prompt: &[u32], sampling: Sampling) -> UnboundedReceiver<Event> {
    let (events, received) = unbounded_channel();
    let request = Request {
        prompt: prompt.to_vec(),
        max_new_tokens: 24,
        sampling,
        rules: Rules::default(),
        keeps_stop: false,
        end_tokens: vec![0],
        adapter: None,
        top: Some(0),
        asked: Instant::now(),
        deadline: Instant::now() + Duration::from_secs(120),
        events,
    };
    engine.submit(request).unwrap();
    received
}

/// The tokens of a completion, and how many of its prompt were known.
fn made(mut events: UnboundedReceiver<Event>) -> (Vec<Token>, usize) {
    let mut tokens = Vec::new();
    loop {
        match events.blocking_recv().expect("an end is told") {
            Event::Made(more) => tokens.extend(more),
            Event::Ended(end) => return (tokens, end.known_tokens),
            Event::Failed(failure) => panic!("{failure}"),
        }
    }
}

/// Prompts that begin alike, and others.
fn prompts(model: &Path, count: u64) -> Vec<Vec<u32>> {
    let tokenizer = Tokenizer::load(model).unwrap();
    let texts = documents(count, 3);
    texts
        .iter()
        .enumerate()
        .map(|(number, text)| {
            let common = if number % 2 == 0 { "def value(x, y):\n    return self.value(x, y)\n" } else { "" };
            let mut tokens = tokenizer.encode_document(&format!("{common}{text} ")).unwrap();
            tokens.truncate(150);
            tokens
        })
        .collect()
}

/// Fails where two completions differ, but for places where the two likeliest tokens are nearly as likely.
fn assert_same_but_for_ties(decoder: &Decoder, prompt: &[u32], one: &[Token], other: &[Token]) {
    let ids = |tokens: &[Token]| tokens.iter().map(|token| token.id).collect::<Vec<_>>();
    let (one, other) = (ids(one), ids(other));
    let alike = one.iter().zip(&other).take_while(|(a, b)| a == b).count();
    if alike == one.len() && alike == other.len() {
        return;
    }
    let seen = [prompt, &one[..alike]].concat();
    let logits = decoder.next_logits(&mut decoder.context(seen.len()), &seen);
    let (two, _) = logits.topk(2, 0, true, true);
    let margin = two.double_value(&[0]) - two.double_value(&[1]);
    assert!(margin < 1e-4, "after {alike} tokens of {prompt:?}: {one:?} and {other:?}, {margin} apart");
}

#[test]
fn many_requests_at_once_are_answered_as_each_alone() {
    let (_workshop, model) = model();
    let decoder = decoder(&model);
    let prompts = prompts(&model, 100);
    let alone = start(&model, ALONE);
    let shared = start(&model, SHARED);
    let asked: Vec<_> = prompts.iter().map(|prompt| ask(&shared, prompt, Sampling::default())).collect();
    let mut known_tokens = 0;
    for (prompt, asked) in prompts.iter().zip(asked) {
        let (expected, _) = made(ask(&alone, prompt, Sampling::default()));
        let (found, known) = made(asked);
        known_tokens += known;
        assert_same_but_for_ties(&decoder, prompt, &expected, &found);
    }
    assert!(known_tokens > 500, "{known_tokens} tokens were known from before");
}

#[test]
fn a_completion_of_the_engine_is_that_of_generate() {
    let (_workshop, model) = model();
    let decoder = decoder(&model);
    let engine = start(&model, SHARED);
    for prompt in prompts(&model, 10) {
        let expected = tunefleet_worker::generate::complete(&decoder, &prompt, 24, &[0], Sampling::default());
        let tokens =
            expected.iter().map(|id| Token { id: *id, text: String::new(), logprob: 0.0, top: vec![] });
        let (found, _) = made(ask(&engine, &prompt, Sampling::default()));
        assert_same_but_for_ties(&decoder, &prompt, &tokens.collect::<Vec<_>>(), &found);
    }
}

#[test]
fn in_batch_invariant_mode_a_completion_is_the_same_to_the_last_bit_alone_and_in_any_batch() {
    let (_workshop, model) = model();
    let prompts = prompts(&model, 30);
    let drawn = |seed| Sampling { temperature: 0.8, top_p: 0.95, seed, ..Sampling::default() };
    let alone = start(&model, Settings { batch_invariant: true, ..ALONE });
    let shared = start(&model, Settings { batch_invariant: true, ..SHARED });
    let asked: Vec<_> =
        prompts.iter().zip(0..).map(|(prompt, seed)| ask(&shared, prompt, drawn(seed))).collect();
    let mut known_tokens = 0;
    for ((prompt, seed), asked) in prompts.iter().zip(0..).zip(asked) {
        let (expected, _) = made(ask(&alone, prompt, drawn(seed)));
        let (found, known) = made(asked);
        known_tokens += known;
        let bits = |tokens: &[Token]| tokens.iter().map(|t| (t.id, t.logprob.to_bits())).collect::<Vec<_>>();
        assert_eq!(bits(&found), bits(&expected));
    }
    // Again, now that all of them are known.
    for (prompt, seed) in prompts.iter().zip(0..) {
        let bits = |tokens: &[Token]| tokens.iter().map(|t| (t.id, t.logprob.to_bits())).collect::<Vec<_>>();
        let (again, known) = made(ask(&shared, prompt, drawn(seed)));
        known_tokens += known;
        assert_eq!(bits(&again), bits(&made(ask(&alone, prompt, drawn(seed))).0));
    }
    assert!(known_tokens > 500, "{known_tokens} tokens were known from before");
}

#[test]
fn who_goes_away_leaves_nothing_behind() {
    let (_workshop, model) = model();
    let settings = Settings { cache_tokens: Some(2000), ..SHARED };
    let engine = start(&model, settings);
    let prompts = prompts(&model, 20);
    for (number, prompt) in prompts.iter().cycle().take(200).enumerate() {
        let mut asked = ask(&engine, prompt, Sampling::default());
        // Some wait for a first token, some for nothing.
        if number % 3 == 0 {
            let _ = asked.blocking_recv();
        }
    }
    let (tokens, _) = made(ask(&engine, &prompts[0], Sampling::default()));
    assert!(!tokens.is_empty());
    let deadline = Instant::now() + Duration::from_secs(20);
    let gauges = engine.gauges();
    while gauges.running.load(Ordering::Acquire) > 0 || gauges.waiting.load(Ordering::Acquire) > 0 {
        assert!(Instant::now() < deadline, "{gauges:?}");
        std::thread::yield_now();
    }
    assert!(gauges.cached_tokens.load(Ordering::Acquire) <= 2000, "{gauges:?}");
}

/// A `worker serve` of its own.
struct Server {
    child: Child,
    address: SocketAddr,
}

impl Server {
    fn start(model: &Path, flags: &[&str], token: Option<&str>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_worker"));
        command
            .args([
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--name",
                "demo",
                "--chat-template",
                "prompter",
                "--model",
            ])
            .arg(model)
            .args(flags);
        command.env("NO_COLOR", "1").stderr(Stdio::piped());
        if let Some(token) = token {
            command.env("TUNEFLEET_SERVE_TOKEN", token);
        }
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().expect("the server says where it is").unwrap();
            if let Some((_, rest)) = line.split_once("address=") {
                break rest.split_whitespace().next().unwrap().parse().unwrap();
            }
        };
        std::thread::spawn(move || lines.for_each(drop));
        Server { child, address }
    }

    /// Status and body of an answer.
    fn send(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.address).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
        )
        .unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let body = if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
            unchunked(body)
        } else {
            body.to_owned()
        };
        (status, body)
    }

    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, text) = self.send("POST", path, "", &body.to_string());
        (status, serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}: {text}")))
    }

    /// The data of each server-sent event.
    fn stream(&self, path: &str, body: &Value) -> Vec<String> {
        let (status, text) = self.send("POST", path, "", &body.to_string());
        assert_eq!(status, 200, "{text}");
        text.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn unchunked(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).unwrap();
        whole.push_str(&rest[..length]);
        body = &rest[length + 2..];
    }
    whole
}

#[test]
fn every_route_answers_in_the_shape_that_its_clients_read() {
    let (_workshop, model) = model();
    let server = Server::start(&model, &[], None);
    let greedy = json!({ "max_new_tokens": 8, "stop_at": "free" });
    let inputs = "def value(x, y):\n    return";

    let (status, listed) = server.post("/", &json!({ "inputs": inputs, "parameters": greedy }));
    let text = listed[0]["generated_text"].as_str().unwrap().to_owned();
    assert_eq!(status, 200);
    assert!(!text.starts_with(inputs));
    let (_, named) =
        server.post("/models/bigcode/starcoder", &json!({ "inputs": inputs, "parameters": greedy }));
    assert_eq!(named, listed);
    let (_, one) = server.post(
        "/generate",
        &json!({ "inputs": inputs, "parameters": { "max_new_tokens": 8, "details": true, "return_full_text": true, "new": 1 }, "other": 2 }),
    );
    assert_eq!(one["generated_text"], format!("{inputs}{text}"));
    assert_eq!(one["details"]["finish_reason"], "length");
    assert_eq!(one["details"]["tokens"].as_array().unwrap().len(), 8);

    let events = server.stream("/generate_stream", &json!({ "inputs": inputs, "parameters": greedy }));
    let events: Vec<Value> = events.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let (last, before) = events.split_last().unwrap();
    assert_eq!(last["generated_text"], text);
    assert_eq!(last["details"]["finish_reason"], "length");
    assert!(before.iter().all(|event| event["generated_text"].is_null()));
    let joined: String = events.iter().map(|event| event["token"]["text"].as_str().unwrap()).collect();
    assert_eq!(joined, text);

    let asked = json!({ "model": "demo", "prompt": inputs, "max_tokens": 8, "temperature": 0, "logprobs": 2, "echo": true });
    let (_, completed) = server.post("/v1/completions", &asked);
    assert_eq!(completed["object"], "text_completion");
    assert_eq!(completed["choices"][0]["text"], format!("{inputs}{text}"));
    assert_eq!(completed["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(), 8);
    assert_eq!(completed["usage"]["completion_tokens"], 8);
    let nested = json!({ "prompt": inputs, "stream": false, "parameters": { "max_new_tokens": 8 } });
    assert_eq!(server.post("/v1/completions", &nested).1["choices"][0]["text"], text);
    let (_, several) = server.post(
        "/v1/completions",
        &json!({ "prompt": [inputs, inputs], "n": 2, "temperature": 0, "max_tokens": 8 }),
    );
    assert_eq!(several["choices"].as_array().unwrap().len(), 4);
    let events = server.stream(
        "/v1/completions",
        &json!({ "prompt": inputs, "temperature": 0, "max_tokens": 8, "stream": true }),
    );
    let (done, chunks) = events.split_last().unwrap();
    assert_eq!(done, "[DONE]");
    let chunks: Vec<Value> = chunks.iter().map(|chunk| serde_json::from_str(chunk).unwrap()).collect();
    let joined: String = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(joined, text);
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");

    let (status, chat) = server.post(
        "/v1/chat/completions",
        &json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 4 }),
    );
    assert_eq!((status, chat["choices"][0]["message"]["role"].as_str()), (200, Some("assistant")));
    let infill = json!({ "input_prefix": "def f(", "input_suffix": "):\n    return x", "n_predict": 8, "temperature": 0 });
    assert!(server.post("/infill", &infill).1["content"].is_string());
    let ollama = json!({ "model": "demo", "prompt": inputs, "stream": false, "options": { "num_predict": 8, "temperature": 0 } });
    assert_eq!(server.post("/api/generate", &ollama).1["response"], text);
    let suffix =
        json!({ "prompt": "def f(", "suffix": "):\n    return x", "max_tokens": 8, "temperature": 0 });
    assert_eq!(server.post("/v1/completions", &suffix).0, 200);

    let (_, models) = server.send("GET", "/v1/models", "", "");
    assert_eq!(serde_json::from_str::<Value>(&models).unwrap()["data"][0]["id"], "demo");
    let (_, tokens) = server.post("/tokenize", &json!({ "inputs": "gr\u{f6}\u{df}e = 1" }));
    let pieces: String = tokens.as_array().unwrap().iter().map(|t| t["text"].as_str().unwrap()).collect();
    assert_eq!(pieces, "gr\u{f6}\u{df}e = 1");
    for path in ["/", "/health", "/info"] {
        assert_eq!(server.send("GET", path, "", "").0, 200, "{path}");
    }
    assert!(server.send("GET", "/metrics", "", "").1.contains("tunefleet_serve_requests_total"));
}

#[test]
fn what_llm_ls_sends_through_each_of_its_backends_is_answered_as_it_reads_it() {
    let (_workshop, model) = model();
    let server = Server::start(&model, &[], None);
    // Made by `tests/serve/llm_ls.py` with the real program.
    let recorded: Vec<Value> =
        serde_json::from_str(include_str!("../../../tests/serve/llm_ls_requests.json")).unwrap();
    for request in &recorded {
        let (status, answer) = server.post(request["path"].as_str().unwrap(), &request["body"]);
        let text = match request["backend"].as_str().unwrap() {
            "huggingface" => &answer[0]["generated_text"],
            "tgi" => &answer["generated_text"],
            "openai" | "llamacpp" => &answer["choices"][0]["text"],
            "ollama" => &answer["response"],
            other => panic!("{other}"),
        };
        assert!(status == 200 && text.is_string(), "{request}: {status}: {answer}");
        // There is something on the cursor's line: a line is what is asked for.
        assert!(
            !text.as_str().unwrap().trim_start().contains('\n')
                || text.as_str().unwrap().contains(['(', '[', '{']),
            "{text}"
        );
    }
    assert_eq!(recorded.len(), 5);
}

#[test]
fn the_clients_of_openai_and_hugging_face_understand_every_answer() {
    let Some(python) = crate::common::python() else { return };
    let (_workshop, model) = model();
    let server = Server::start(&model, &[], None);
    let url = format!("http://{}", server.address);
    assert_eq!(crate::common::run_python(&python, &["tests/serve/clients.py", &url]), "understood\n");
}

#[test]
fn requests_that_break_a_rule_are_told_so_in_their_clients_words() {
    let (_workshop, model) = model();
    let server = Server::start(&model, &[], None);
    let (status, body) =
        server.post("/generate", &json!({ "inputs": "x", "parameters": { "temperature": -1 } }));
    assert_eq!((status, body["error_type"].as_str()), (422, Some("validation")));
    assert_eq!(body["error"], "temperature must be 0 or more, got -1");
    let (status, body) = server.post("/v1/completions", &json!({ "prompt": "x", "model": "other" }));
    assert_eq!(status, 404);
    assert_eq!(body["error"]["message"], "there is no model or adapter `other`; there are demo");
    assert!(body["detail"][0]["msg"].is_string());
    assert_eq!(server.post("/v1/completions", &json!({ "prompt": "x", "max_tokens": 100_000 })).0, 400);
    assert_eq!(server.post("/v1/completions", &json!({ "prompt": "", "max_tokens": 4 })).0, 400);
    assert_eq!(server.post("/v1/completions", &json!({ "prompt": [99_999], "max_tokens": 4 })).0, 400);
    assert_eq!(server.send("POST", "/generate", "", "{\"inputs\":").0, 422);
    assert_eq!(server.send("POST", "/generate", "", "\u{0}").0, 422);
    assert_eq!(server.send("GET", "/nothing", "", "").0, 404);
    assert_eq!(server.send("POST", "/infill", "", "{\"n_predict\": \"x\"}").0, 422);
    // And goes on.
    assert_eq!(server.post("/generate", &json!({ "inputs": "x" })).0, 200);
}

#[test]
fn only_who_bears_a_token_is_answered() {
    let (_workshop, model) = model();
    let server = Server::start(&model, &[], Some("secret-1"));
    let ask = |headers: &str| server.send("POST", "/generate", headers, "{\"inputs\":\"x\"}").0;
    assert_eq!(ask(""), 401);
    assert_eq!(ask("Authorization: Bearer secret-2\r\n"), 401);
    assert_eq!(ask("Authorization: Bearer secret-1\r\n"), 200);
    assert_eq!(server.send("GET", "/health", "", "").0, 200);
    let mut open = Command::new(env!("CARGO_BIN_EXE_worker"));
    open.args(["serve", "--listen", "0.0.0.0:0", "--model"]).arg(&model).env_remove("TUNEFLEET_SERVE_TOKEN");
    let refused = open.output().unwrap();
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("open to other machines"));
}

/// Bodies of every route, each sound.
fn bodies() -> Vec<(&'static str, Value)> {
    let few = json!({ "max_new_tokens": 3, "temperature": 0.5, "stop": ["x"], "seed": 1, "details": true });
    let hole = json!({ "prompt": "def f(", "suffix": ")\n", "max_tokens": 3, "logprobs": 1, "n": 2, "stop": ["a", "b"] });
    vec![
        (
            "/",
            json!({ "inputs": "<fim_prefix>def f(<fim_suffix>)\n<fim_middle>", "parameters": few, "stream": false }),
        ),
        ("/generate", json!({ "inputs": "def f(x):", "parameters": few })),
        ("/generate_stream", json!({ "inputs": "def f(x):", "parameters": few })),
        ("/v1/completions", hole),
        (
            "/v1/completions",
            json!({ "prompt": [[5, 6], [7]], "max_tokens": 3, "stream": true, "echo": true }),
        ),
        (
            "/v1/chat/completions",
            json!({ "messages": [{ "role": "user", "content": "x" }], "max_tokens": 3 }),
        ),
        ("/infill", json!({ "input_prefix": "a", "input_suffix": "b", "n_predict": 3, "stream": true })),
        (
            "/api/generate",
            json!({ "prompt": "a", "options": { "num_predict": 3, "top_k": 5 }, "stream": false }),
        ),
        ("/tokenize", json!({ "inputs": "gr\u{f6}\u{df}e" })),
        ("/lora-adapters", json!([{ "id": 0, "scale": 0.5 }])),
    ]
}

/// A body with one value, or some bytes, replaced.
fn altered(body: &Value, random: &mut StdRng) -> Vec<u8> {
    const ODD: [&str; 12] = [
        "null",
        "-1",
        "1e400",
        "18446744073709551616",
        "\"\"",
        "[]",
        "{}",
        "true",
        "\"\\ud800\"",
        "0.0",
        "[[[[]]]]",
        "99999",
    ];
    let mut bytes = body.to_string().into_bytes();
    if random.random_bool(0.5) {
        let text = body.to_string();
        // Of what stands between a colon and the next comma.
        let colons: Vec<usize> = text.match_indices(':').map(|(at, _)| at + 1).collect();
        if let Some(at) = colons.get(random.random_range(0..colons.len().max(1))) {
            let end = text[*at..].find([',', '}']).map_or(text.len(), |end| at + end);
            let odd = ODD[random.random_range(0..ODD.len())];
            return format!("{}{odd}{}", &text[..*at], &text[end..]).into_bytes();
        }
    }
    for _ in 0..random.random_range(1..6) {
        let at = random.random_range(0..bytes.len());
        bytes[at] = random.random();
    }
    bytes.truncate(random.random_range(0..=bytes.len()));
    bytes
}

/// Sends as many altered requests, and hangs up on others at any moment; then the server is as it was.
fn survives(requests: usize, hang_ups: usize) {
    let (_workshop, model) = model();
    let server = Server::start(&model, &["--cache-tokens", "4000"], None);
    let mut random = StdRng::seed_from_u64(17);
    let bodies = bodies();
    let send = |path: &str, body: &[u8]| {
        let mut stream = TcpStream::connect(server.address).unwrap();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: t\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        stream
    };
    let resident_kb = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let mut warm = 0;
    for number in 0..requests {
        let (path, body) = &bodies[random.random_range(0..bodies.len())];
        let altered = altered(body, &mut random);
        let mut answer = Vec::new();
        let _ = send(path, &altered).read_to_end(&mut answer);
        let said = String::from_utf8_lossy(&altered);
        assert!(answer.starts_with(b"HTTP/1.1 "), "{path}: {said}: no answer");
        assert!(!answer.starts_with(b"HTTP/1.1 5"), "{path}: {said}: {}", String::from_utf8_lossy(&answer));
        if number == requests / 4 {
            warm = resident_kb();
        }
    }
    for _ in 0..hang_ups {
        let (path, body) = &bodies[random.random_range(0..bodies.len() - 2)];
        let mut stream = send(path, body.to_string().as_bytes());
        if random.random_bool(0.7) {
            let wanted = random.random_range(0..400);
            let _ = stream.read_exact(&mut vec![0; wanted]);
        }
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let (_, page) = server.send("GET", "/metrics", "", "");
        let gauge = |name: &str| {
            let line = page.lines().find(|line| line.starts_with(name)).unwrap();
            line.split(' ').nth(1).unwrap().parse::<f64>().unwrap()
        };
        let (waiting, running) =
            (gauge("tunefleet_serve_waiting_requests"), gauge("tunefleet_serve_running_completions"));
        if waiting + running == 0.0 {
            assert!(gauge("tunefleet_serve_cached_tokens") <= 4000.0);
            break;
        }
        assert!(Instant::now() < deadline, "{waiting} wait and {running} run although all have hung up");
    }
    let after = resident_kb();
    assert!(after < warm + 64 * 1024, "{warm} kB became {after} kB");
    assert_eq!(server.post("/generate", &json!({ "inputs": "x" })).0, 200);
}

#[test]
fn no_request_and_no_hanging_up_ends_or_fills_the_server() {
    survives(300, 50);
}

/// Minutes: CI runs a sample.
mod long {
    #[test]
    fn ten_thousand_requests_and_a_thousand_hang_ups_leave_the_server_as_it_was() {
        let is_sample = std::env::var("TUNEFLEET_LONG_SAMPLE").is_ok_and(|sample| !sample.is_empty());
        let share = if is_sample { 10 } else { 1 };
        super::survives(10_000 / share, 1000 / share);
    }
}
