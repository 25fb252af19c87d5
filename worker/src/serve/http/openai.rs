//! OpenAI's routes; `suffix` is filled in by the model's own markers.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use tunefleet_proto::chat::{Conversation, Fault, Last, Message as Turn, Role};

use super::Shared;
use super::exchange::{Dialect, Refusal, answer, error_body, parse, send, send_done, stream};
use super::native::{Parameters, StopAt};
use crate::generate::sampling::Sampling;
use crate::serve::engine::request::{End, Event, Reason, Token};
use crate::serve::server::{Ask, Error, Prompt, Server, Whole};
use crate::serve::stop::Shape;

const DIALECT: Dialect = Dialect::OpenAi;
/// Most prompts, times `n`, of a request.
const MAX_CHOICES: usize = 128;
/// Most likeliest tokens that are told.
const MAX_LOGPROBS: usize = 20;

/// One string, or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

/// Text or tokens, of one prompt or of several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    ManyTokens(Vec<Vec<u32>>),
}

impl Default for Prompts {
    fn default() -> Self {
        Prompts::Text(String::new())
    }
}

#[derive(Debug, Deserialize)]
#[serde(default)]
struct Body {
    model: Option<String>,
    prompt: Prompts,
    suffix: Option<String>,
    max_tokens: Option<usize>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<usize>,
    repetition_penalty: Option<f64>,
    n: usize,
    stream: bool,
    stream_options: Option<StreamOptions>,
    logprobs: Option<usize>,
    echo: bool,
    stop: Option<OneOrMore>,
    seed: Option<u64>,
    stop_at: Option<StopAt>,
    /// As llm-vscode sends them to every route.
    parameters: Option<Parameters>,
}

impl Default for Body {
    fn default() -> Self {
        Body {
            model: None,
            prompt: Prompts::default(),
            suffix: None,
            max_tokens: None,
            temperature: None,
            top_p: None,
            top_k: None,
            repetition_penalty: None,
            n: 1,
            stream: false,
            stream_options: None,
            logprobs: None,
            echo: false,
            stop: None,
            seed: None,
            stop_at: None,
            parameters: None,
        }
    }
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: bool,
}

impl Body {
    fn sampling(&self) -> Sampling {
        let nested = self.parameters.as_ref().map(Parameters::sampling).unwrap_or_default();
        let is_nested = self.parameters.is_some();
        Sampling {
            // OpenAI draws at 1 where nothing is said.
            temperature: self.temperature.unwrap_or(if is_nested { nested.temperature } else { 1.0 }),
            top_p: self.top_p.unwrap_or(if is_nested { nested.top_p } else { 1.0 }),
            top_k: self.top_k.unwrap_or(nested.top_k),
            repetition_penalty: self.repetition_penalty.unwrap_or(if is_nested {
                nested.repetition_penalty
            } else {
                1.0
            }),
            seed: self.seed.unwrap_or_else(rand::random),
        }
    }

    /// What is asked for, prompt by prompt and `n` times each, with the text that is echoed.
    fn asks(&self, server: &Server) -> Result<Vec<(Ask, String)>, Refusal> {
        let prompts: Vec<Prompt> = match self.prompt.clone() {
            Prompts::Text(text) => vec![Prompt::Text(text)],
            Prompts::Texts(texts) => texts.into_iter().map(Prompt::Text).collect(),
            Prompts::Tokens(tokens) => vec![Prompt::Tokens(tokens)],
            Prompts::ManyTokens(many) => many.into_iter().map(Prompt::Tokens).collect(),
        };
        let choices = prompts.len().saturating_mul(self.n);
        if choices == 0 || choices > MAX_CHOICES {
            return Err(Refusal::body(format!("prompts times n must be 1 to {MAX_CHOICES}, got {choices}")));
        }
        if let Some(logprobs) = self.logprobs.filter(|logprobs| *logprobs > MAX_LOGPROBS) {
            return Err(Refusal::body(format!("logprobs must be at most {MAX_LOGPROBS}, got {logprobs}")));
        }
        let nested = self.parameters.as_ref();
        let sampling = self.sampling();
        let mut asks = Vec::with_capacity(choices);
        for prompt in prompts {
            let shown = match &prompt {
                Prompt::Text(text) => text.clone(),
                Prompt::Tokens(tokens) => server.text(tokens)?,
                Prompt::Between { .. } | Prompt::Chat(_) => String::new(),
            };
            let prompt = match (prompt, self.suffix.clone().filter(|suffix| !suffix.is_empty())) {
                (Prompt::Text(prefix), Some(suffix)) => Prompt::Between { prefix, suffix },
                (Prompt::Tokens(_), Some(_)) => {
                    return Err(Refusal::body("suffix goes with a prompt of text, not of tokens".to_owned()));
                }
                (prompt, _) => prompt,
            };
            for copy in 0..self.n as u64 {
                let ask = Ask {
                    prompt: prompt.clone(),
                    max_new_tokens: self.max_tokens.or_else(|| nested.and_then(Parameters::max_new_tokens)),
                    sampling: Sampling { seed: sampling.seed.wrapping_add(copy), ..sampling },
                    stop: match self.stop.clone() {
                        Some(OneOrMore::One(stop)) => vec![stop],
                        Some(OneOrMore::More(stops)) => stops,
                        None => Vec::new(),
                    },
                    keeps_stop: false,
                    shape: self.stop_at.map(Shape::from),
                    adapter: self.model.clone().filter(|name| !is_anything(name)),
                    top: self.logprobs,
                };
                asks.push((ask, if self.echo { shown.clone() } else { String::new() }));
            }
        }
        Ok(asks)
    }
}

/// Names that clients send where a user has given none.
fn is_anything(name: &str) -> bool {
    matches!(name, "" | "default" | "tunefleet" | "tgi")
}

fn reason(reason: Reason) -> &'static str {
    match reason {
        Reason::Length => "length",
        Reason::EndToken | Reason::Stop => "stop",
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn id(prefix: &str) -> String {
    format!("{prefix}-{:016x}", rand::random::<u64>())
}

fn usage(ends: &[End]) -> Value {
    let prompt: usize = ends.iter().map(|end| end.prompt_tokens).sum();
    let made: usize = ends.iter().map(|end| end.made_tokens).sum();
    let known: usize = ends.iter().map(|end| end.known_tokens).sum();
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": { "cached_tokens": known },
    })
}

/// Tokens, places and probabilities, as the completions route tells them.
fn logprobs(tokens: &[Token], mut offset: usize) -> Value {
    let mut offsets = Vec::with_capacity(tokens.len());
    for token in tokens {
        offsets.push(offset);
        offset += token.text.chars().count();
    }
    let top = tokens.iter().map(|token| {
        token
            .top
            .iter()
            .map(|(_, text, logprob)| (text.clone(), json!(logprob)))
            .collect::<serde_json::Map<_, _>>()
    });
    json!({
        "tokens": tokens.iter().map(|token| &token.text).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
        "top_logprobs": top.collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}

/// `POST /v1/completions`.
pub async fn completions(State(shared): State<Shared>, body: Bytes) -> Response {
    let parsed = parse::<Body>(&body).and_then(|body| Ok((body.asks(&shared.server)?, body)));
    let (asks, body) = match parsed {
        Ok(parsed) => parsed,
        Err(refusal) => return refusal.in_dialect(DIALECT),
    };
    let model = body
        .model
        .clone()
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| shared.server.model_name.clone());
    let mut answers = Vec::with_capacity(asks.len());
    for (ask, echoed) in asks {
        match shared.server.ask(&ask) {
            Ok(answer) => answers.push((answer, echoed)),
            Err(error) => return Refusal::from(error).in_dialect(DIALECT),
        }
    }
    let tells_probabilities = body.logprobs.is_some();
    let (id, created) = (id("cmpl"), now());
    let head = move |choices: Value| json!({ "id": id, "object": "text_completion", "created": created, "model": model, "choices": choices });
    if !body.stream {
        let (mut choices, mut ends) = (Vec::new(), Vec::new());
        for (index, (answer, echoed)) in answers.into_iter().enumerate() {
            let Whole { text, tokens, end } = match answer.whole().await {
                Ok(whole) => whole,
                Err(error) => return Refusal::from(error).in_dialect(DIALECT),
            };
            let offset = echoed.chars().count();
            choices.push(json!({
                "index": index,
                "text": echoed + &text,
                "logprobs": tells_probabilities.then(|| logprobs(&tokens, offset)),
                "finish_reason": reason(end.reason),
            }));
            ends.push(end);
        }
        let mut answered = head(Value::Array(choices));
        answered["usage"] = usage(&ends);
        return answer(DIALECT, Ok(answered));
    }
    stream(|lines| async move {
        let chunk = |index: usize, text: &str, logprobs: Value, ended: Option<&str>| {
            head(json!([{ "index": index, "text": text, "logprobs": logprobs, "finish_reason": ended }]))
        };
        let mut ends = Vec::new();
        for (index, (mut asked, echoed)) in answers.into_iter().enumerate() {
            if !echoed.is_empty() && !send(&lines, &chunk(index, &echoed, Value::Null, None)) {
                return;
            }
            let mut offset = echoed.chars().count();
            while let Some(event) = asked.events.recv().await {
                let sent = match event {
                    Event::Made(tokens) => {
                        let text: String = tokens.iter().map(|token| token.text.as_str()).collect();
                        let told = if tells_probabilities { logprobs(&tokens, offset) } else { Value::Null };
                        offset += text.chars().count();
                        send(&lines, &chunk(index, &text, told, None))
                    }
                    Event::Ended(end) => {
                        let sent = send(&lines, &chunk(index, "", Value::Null, Some(reason(end.reason))));
                        ends.push(end);
                        sent
                    }
                    Event::Failed(failure) => {
                        let _ = send(&lines, &error_body(DIALECT, "generation", &failure.to_string()));
                        false
                    }
                };
                if !sent {
                    return;
                }
            }
        }
        if body.stream_options.is_some_and(|options| options.include_usage) {
            let mut last = head(json!([]));
            last["usage"] = usage(&ends);
            send(&lines, &last);
        }
        send_done(&lines);
    })
}

#[derive(Debug, Deserialize)]
struct Message {
    role: String,
    #[serde(default)]
    content: Content,
}

/// Text, or parts of which those that are text are read.
#[derive(Debug, Default, Deserialize)]
#[serde(untagged)]
enum Content {
    #[default]
    None,
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
struct Part {
    #[serde(default)]
    text: String,
}

impl Content {
    fn text(&self) -> String {
        match self {
            Content::None => String::new(),
            Content::Text(text) => text.clone(),
            Content::Parts(parts) => parts.iter().map(|part| part.text.as_str()).collect(),
        }
    }
}

#[derive(Debug, Deserialize)]
struct ChatBody {
    messages: Vec<Message>,
    max_completion_tokens: Option<usize>,
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

/// The conversation that is to be answered.
fn conversation(messages: &[Message]) -> Result<Conversation, Refusal> {
    let turn = |(at, message): (usize, &Message)| {
        let role = Role::from_name(&message.role).ok_or_else(|| Fault::UnknownRole {
            turn: at + 1,
            role: message.role.chars().take(40).collect(),
        })?;
        Ok(Turn::new(role, message.content.text()))
    };
    let turns: Result<Vec<Turn>, Fault> = messages.iter().enumerate().map(turn).collect();
    turns
        .and_then(|turns| Conversation::new(turns, Last::Question))
        .map_err(|fault| Refusal::body(format!("messages: {fault}")))
}

/// `POST /v1/chat/completions`.
pub async fn chat(State(shared): State<Shared>, body: Bytes) -> Response {
    let server = &shared.server;
    let outcome = parse::<ChatBody>(&body).and_then(|chat| {
        let conversation = conversation(&chat.messages)?;
        let mut rest = chat.rest;
        // In a chat they are flags, and a number beside them.
        for key in ["logprobs", "top_logprobs", "n"] {
            rest.remove(key);
        }
        let rest: Body = serde_json::from_value(Value::Object(rest))
            .map_err(|error| Refusal::body(format!("the body is not understood: {error}")))?;
        let max_tokens = chat.max_completion_tokens.or(rest.max_tokens);
        let body = Body { prompt: Prompts::default(), suffix: None, echo: false, max_tokens, ..rest };
        let (ask, _) = body.asks(server)?.remove(0);
        let ask = Ask { prompt: Prompt::Chat(conversation), ..ask };
        Ok((server.ask(&ask)?, body))
    });
    let (mut asked, body) = match outcome {
        Ok(outcome) => outcome,
        Err(refusal) => return refusal.in_dialect(DIALECT),
    };
    let model =
        body.model.clone().filter(|name| !name.is_empty()).unwrap_or_else(|| server.model_name.clone());
    let (id, created) = (id("chatcmpl"), now());
    let head = move |object: &str, choice: Value| json!({ "id": id, "object": object, "created": created, "model": model, "choices": [choice] });
    if !body.stream {
        return match asked.whole().await {
            Ok(Whole { text, end, .. }) => {
                let message = json!({ "role": "assistant", "content": text.trim() });
                let choice = json!({ "index": 0, "message": message, "finish_reason": reason(end.reason) });
                let mut answered = head("chat.completion", choice);
                answered["usage"] = usage(&[end]);
                answer(DIALECT, Ok(answered))
            }
            Err(error) => Refusal::from(error).in_dialect(DIALECT),
        };
    }
    stream(|lines| async move {
        let chunk = |delta: Value, ended: Option<&str>| {
            head("chat.completion.chunk", json!({ "index": 0, "delta": delta, "finish_reason": ended }))
        };
        let mut is_listening = send(&lines, &chunk(json!({ "role": "assistant", "content": "" }), None));
        let (mut has_begun, mut held) = (false, String::new());
        while is_listening && let Some(event) = asked.events.recv().await {
            is_listening = match event {
                Event::Made(tokens) => {
                    held.extend(tokens.iter().map(|token| token.text.as_str()));
                    // White space that a template puts around an answer is none of it: what is last may be that.
                    let text = held.trim_end();
                    let space = held.get(text.len()..).unwrap_or_default().to_owned();
                    let text = if has_begun { text } else { text.trim_start() };
                    has_begun |= !text.is_empty();
                    let sent = text.is_empty() || send(&lines, &chunk(json!({ "content": text }), None));
                    held = space;
                    sent
                }
                Event::Ended(end) => send(&lines, &chunk(json!({}), Some(reason(end.reason)))),
                Event::Failed(failure) => {
                    let message = Error::from(failure).to_string();
                    let _ = send(&lines, &error_body(DIALECT, "generation", &message));
                    false
                }
            };
        }
        send_done(&lines);
    })
}

/// `GET /v1/models`: the base, and the adapters on it.
pub async fn models(State(shared): State<Shared>) -> Response {
    let server = &shared.server;
    let entry = |name: &String| {
        let parent = (*name != server.model_name).then_some(&server.model_name);
        json!({
            "id": name, "object": "model", "created": server.started_unix, "owned_by": "tunefleet",
            "root": server.model_name, "parent": parent, "max_model_len": server.config.max_positions,
        })
    };
    let models: Vec<Value> = server.names().iter().map(entry).collect();
    answer(DIALECT, Ok(json!({ "object": "list", "data": models })))
}

#[derive(Deserialize)]
struct AdapterBody {
    #[serde(alias = "name")]
    lora_name: String,
    #[serde(default, alias = "path")]
    lora_path: Option<PathBuf>,
    #[serde(default)]
    weight: Option<f64>,
}

/// `POST /v1/load_lora_adapter`, as vLLM has it.
pub async fn load_adapter(State(shared): State<Shared>, body: Bytes) -> Response {
    let outcome = parse::<AdapterBody>(&body).and_then(|asked| {
        let path =
            asked.lora_path.ok_or_else(|| Refusal::body("lora_path is needed: a directory".to_owned()))?;
        Ok((asked.lora_name, path, asked.weight.unwrap_or(1.0)))
    });
    let outcome = match outcome {
        Ok((name, path, weight)) => {
            // Files are read here: not where others are answered.
            let loaded = tokio::task::spawn_blocking(move || {
                shared.server.load_adapter(&name, &path, weight).map(|()| json!({ "loaded": name }))
            });
            match loaded.await {
                Ok(outcome) => outcome.map_err(Refusal::from),
                Err(error) => Err(Refusal::body(error.to_string())),
            }
        }
        Err(refusal) => Err(refusal),
    };
    answer(DIALECT, outcome)
}

/// `POST /v1/unload_lora_adapter`.
pub async fn unload_adapter(State(shared): State<Shared>, body: Bytes) -> Response {
    let outcome = parse::<AdapterBody>(&body).and_then(|asked| {
        shared.server.unload_adapter(&asked.lora_name)?;
        Ok(json!({ "unloaded": asked.lora_name }))
    });
    answer(DIALECT, outcome)
}
