//! Text Generation Inference's routes, and those of the Hugging Face inference API, as llm-ls and
//! `huggingface_hub.InferenceClient` use them.

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Shared;
use super::exchange::{Dialect, Refusal, answer, error_body, parse, send, stream};
use crate::generate::sampling::Sampling;
use crate::serve::engine::request::{Event, Reason, Token};
use crate::serve::server::{Ask, Error, Prompt, Whole};
use crate::serve::stop::Shape;

const DIALECT: Dialect = Dialect::Native;

#[derive(Deserialize)]
struct Body {
    inputs: String,
    #[serde(default)]
    parameters: Parameters,
    #[serde(default)]
    stream: bool,
}

/// Those of TGI that mean something here; others are passed over.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default)]
pub struct Parameters {
    max_new_tokens: Option<usize>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<usize>,
    repetition_penalty: Option<f64>,
    do_sample: bool,
    seed: Option<u64>,
    stop: Vec<String>,
    return_full_text: Option<bool>,
    details: bool,
    top_n_tokens: Option<usize>,
    adapter_id: Option<String>,
    /// Ours: `free`, `line` or `block`.
    stop_at: Option<StopAt>,
}

/// How far a completion goes.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopAt {
    /// Until the model ends it.
    Free,
    /// To the end of the line.
    Line,
    /// To the end of the construct.
    Block,
}

impl From<StopAt> for Shape {
    fn from(at: StopAt) -> Self {
        match at {
            StopAt::Free => Shape::Free,
            StopAt::Line => Shape::Line,
            StopAt::Block => Shape::Block,
        }
    }
}

impl Parameters {
    /// Drawing is on where anything is said about it, as in TGI.
    pub fn sampling(&self) -> Sampling {
        let is_drawn =
            self.do_sample || self.temperature.is_some() || self.top_p.is_some() || self.top_k.is_some();
        Sampling {
            temperature: if is_drawn { self.temperature.unwrap_or(1.0) } else { 0.0 },
            top_p: self.top_p.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            seed: self.seed.unwrap_or_else(rand::random),
        }
    }

    /// Tokens at most.
    pub fn max_new_tokens(&self) -> Option<usize> {
        self.max_new_tokens
    }

    fn ask(&self, inputs: String) -> Ask {
        Ask {
            prompt: Prompt::Text(inputs),
            max_new_tokens: self.max_new_tokens,
            sampling: self.sampling(),
            stop: self.stop.clone(),
            keeps_stop: true,
            shape: self.stop_at.map(Shape::from),
            adapter: self.adapter_id.clone(),
            top: (self.details || self.top_n_tokens.is_some()).then(|| self.top_n_tokens.unwrap_or(0)),
        }
    }
}

/// A token as TGI tells of it.
#[derive(Serialize)]
struct ToldToken {
    id: u32,
    text: String,
    logprob: f32,
    special: bool,
}

impl From<&Token> for ToldToken {
    fn from(token: &Token) -> Self {
        ToldToken { id: token.id, text: token.text.clone(), logprob: token.logprob, special: false }
    }
}

/// TGI's word for why it ended.
fn reason(reason: Reason) -> &'static str {
    match reason {
        Reason::Length => "length",
        Reason::EndToken => "eos_token",
        Reason::Stop => "stop_sequence",
    }
}

async fn complete(shared: &Shared, inputs: String, parameters: &Parameters) -> Result<Value, Refusal> {
    let ask = parameters.ask(inputs.clone());
    let whole = shared.server.ask(&ask)?.whole().await?;
    Ok(body(&inputs, parameters, ask.sampling.seed, &whole))
}

fn body(inputs: &str, parameters: &Parameters, seed: u64, whole: &Whole) -> Value {
    let before = if parameters.return_full_text == Some(true) { inputs } else { "" };
    let mut body = json!({ "generated_text": format!("{before}{}", whole.text) });
    if parameters.details {
        body["details"] = json!({
            "finish_reason": reason(whole.end.reason),
            "generated_tokens": whole.end.made_tokens,
            "seed": seed,
            "prefill": [],
            "tokens": whole.tokens.iter().map(ToldToken::from).collect::<Vec<_>>(),
        });
    }
    body
}

/// `POST /` and `/models/NAME`: a list with one answer, or a stream. A name that is no adapter's is the model's: clients
/// put in what it is called elsewhere.
pub async fn compatible(State(shared): State<Shared>, name: Option<Path<String>>, body: Bytes) -> Response {
    let mut parsed: Body = match parse(&body) {
        Ok(parsed) => parsed,
        Err(refusal) => return refusal.in_dialect(DIALECT),
    };
    if let Some(Path(name)) = name
        && parsed.parameters.adapter_id.is_none()
        && shared.server.names().contains(&name)
    {
        parsed.parameters.adapter_id = Some(name);
    }
    if parsed.stream {
        return streamed(&shared, parsed);
    }
    let outcome = complete(&shared, parsed.inputs, &parsed.parameters).await;
    answer(DIALECT, outcome.map(|body| vec![body]))
}

/// `POST /generate`: one answer.
pub async fn generate(State(shared): State<Shared>, body: Bytes) -> Response {
    let outcome = match parse::<Body>(&body) {
        Ok(parsed) => complete(&shared, parsed.inputs, &parsed.parameters).await,
        Err(refusal) => Err(refusal),
    };
    answer(DIALECT, outcome)
}

/// `POST /generate_stream`: an event for each token; the last one has the whole text.
pub async fn generate_stream(State(shared): State<Shared>, body: Bytes) -> Response {
    match parse::<Body>(&body) {
        Ok(parsed) => streamed(&shared, parsed),
        Err(refusal) => refusal.in_dialect(DIALECT),
    }
}

fn streamed(shared: &Shared, parsed: Body) -> Response {
    let Body { inputs, parameters, .. } = parsed;
    let ask = parameters.ask(inputs.clone());
    let mut events = match shared.server.ask(&ask) {
        Ok(asked) => asked.events,
        Err(error) => return Refusal::from(error).in_dialect(DIALECT),
    };
    stream(|lines| async move {
        let (mut index, mut text, mut held) = (0, String::new(), None::<Token>);
        let told = |index: usize, token: &Token, whole: Option<&str>, details: Value| {
            json!({
                "index": index,
                "token": ToldToken::from(token),
                "generated_text": whole,
                "details": details,
            })
        };
        while let Some(event) = events.recv().await {
            match event {
                Event::Made(tokens) => {
                    for token in tokens {
                        text.push_str(&token.text);
                        index += 1;
                        // The last one bears the whole text: each waits for the next.
                        if let Some(held) = held.replace(token)
                            && !send(&lines, &told(index - 1, &held, None, Value::Null))
                        {
                            return;
                        }
                    }
                }
                Event::Ended(end) => {
                    let last =
                        held.unwrap_or(Token { id: 0, text: String::new(), logprob: 0.0, top: Vec::new() });
                    let whole = if parameters.return_full_text == Some(true) { inputs + &text } else { text };
                    let details = json!({
                        "finish_reason": reason(end.reason),
                        "generated_tokens": end.made_tokens,
                        "input_length": end.prompt_tokens,
                        "seed": ask.sampling.seed,
                    });
                    send(&lines, &told(index, &last, Some(&whole), details));
                    return;
                }
                Event::Failed(failure) => {
                    send(&lines, &error_body(DIALECT, "generation", &Error::from(failure).to_string()));
                    return;
                }
            }
        }
    })
}

/// `GET /info`.
pub async fn info(State(shared): State<Shared>) -> Response {
    let server = &shared.server;
    let positions = server.config.max_positions;
    answer(
        DIALECT,
        Ok(json!({
            "model_id": server.model_name,
            "model_dtype": format!("{:?}", server.numerics.kind).to_lowercase(),
            "model_device_type": if server.numerics.device.is_cuda() { "cuda" } else { "cpu" },
            "max_input_tokens": positions - 1,
            "max_total_tokens": positions,
            "max_stop_sequences": crate::serve::server::MAX_STOPS,
            "router": "tunefleet",
            "version": env!("CARGO_PKG_VERSION"),
        })),
    )
}

/// `POST /tokenize`: ids, texts and places.
pub async fn tokenize(State(shared): State<Shared>, body: Bytes) -> Response {
    #[derive(Deserialize)]
    struct Body {
        #[serde(alias = "content")]
        inputs: String,
    }
    let outcome = parse::<Body>(&body).and_then(|Body { inputs }| {
        let tokenizer = &shared.server.tokenizer;
        let broken = |error: crate::data::tokenizer::Error| Refusal::body(error.to_string());
        let ids = tokenizer.encode_prompt(&inputs).map_err(broken)?;
        let mut text = crate::serve::engine::text::Text::default();
        let mut tokens = Vec::with_capacity(ids.len());
        for id in ids {
            let start = text.as_str().len();
            text.push(id, tokenizer).map_err(broken)?;
            let whole = text.as_str();
            let piece = whole.get(start..).unwrap_or_default();
            tokens.push(json!({ "id": id, "text": piece, "start": start, "stop": whole.len() }));
        }
        Ok(tokens)
    });
    answer(DIALECT, outcome)
}
