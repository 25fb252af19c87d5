//! llama.cpp's and Ollama's routes.

use axum::body::Bytes;
use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Shared;
use super::exchange::{Dialect, Refusal, answer, error_body, parse, send, stream};
use super::native::{Parameters, StopAt};
use crate::generate::sampling::Sampling;
use crate::serve::engine::request::{End, Event, Reason};
use crate::serve::server::{Ask, Prompt};
use crate::serve::stop::Shape;

const DIALECT: Dialect = Dialect::Plain;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct InfillBody {
    input_prefix: String,
    input_suffix: String,
    /// Typed after the prefix.
    prompt: String,
    n_predict: Option<i64>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<usize>,
    repeat_penalty: Option<f64>,
    seed: Option<i64>,
    stop: Vec<String>,
    stream: bool,
    stop_at: Option<StopAt>,
    model: Option<String>,
}

/// `POST /infill`, as llama.cpp has it.
pub async fn infill(State(shared): State<Shared>, body: Bytes) -> Response {
    let outcome = parse::<InfillBody>(&body).and_then(|body| {
        let ask = Ask {
            prompt: Prompt::Between { prefix: body.input_prefix + &body.prompt, suffix: body.input_suffix },
            // -1 is as many as there is room for.
            max_new_tokens: body.n_predict.and_then(|tokens| usize::try_from(tokens).ok()),
            sampling: Sampling {
                temperature: body.temperature.unwrap_or(0.8),
                top_p: body.top_p.unwrap_or(0.95),
                top_k: body.top_k.unwrap_or(40),
                repetition_penalty: body.repeat_penalty.unwrap_or(1.0),
                seed: body.seed.and_then(|seed| u64::try_from(seed).ok()).unwrap_or_else(rand::random),
            },
            stop: body.stop,
            keeps_stop: false,
            shape: body.stop_at.map(Shape::from),
            adapter: body.model,
            top: None,
        };
        Ok((shared.server.ask(&ask)?, body.stream))
    });
    let (mut asked, is_streamed) = match outcome {
        Ok(outcome) => outcome,
        Err(refusal) => return refusal.in_dialect(DIALECT),
    };
    let told = |text: &str, end: Option<&End>| {
        let mut told = json!({ "content": text, "stop": end.is_some() });
        if let Some(end) = end {
            told["tokens_predicted"] = json!(end.made_tokens);
            told["tokens_evaluated"] = json!(end.prompt_tokens);
            told["tokens_cached"] = json!(end.known_tokens);
            told["stop_type"] = json!(match end.reason {
                Reason::Length => "limit",
                Reason::EndToken => "eos",
                Reason::Stop => "word",
            });
        }
        told
    };
    if !is_streamed {
        return match asked.whole().await {
            Ok(whole) => answer(DIALECT, Ok(told(&whole.text, Some(&whole.end)))),
            Err(error) => Refusal::from(error).in_dialect(DIALECT),
        };
    }
    stream(move |lines| async move {
        let mut is_listening = true;
        while is_listening && let Some(event) = asked.events.recv().await {
            is_listening = match event {
                Event::Made(tokens) => {
                    let text: String = tokens.iter().map(|token| token.text.as_str()).collect();
                    send(&lines, &told(&text, None))
                }
                Event::Ended(end) => send(&lines, &told("", Some(&end))),
                Event::Failed(failure) => {
                    let _ = send(&lines, &error_body(DIALECT, "generation", &failure.to_string()));
                    false
                }
            };
        }
    })
}

/// `GET /lora-adapters`: names and weights, by number.
pub async fn adapters(State(shared): State<Shared>) -> Response {
    let adapters = shared.server.weights();
    let adapters = adapters
        .into_iter()
        .enumerate()
        .map(|(id, (name, scale))| json!({ "id": id, "path": name, "name": name, "scale": scale }));
    answer(DIALECT, Ok(adapters.collect::<Vec<Value>>()))
}

/// `POST /lora-adapters`: weights, by number or name.
pub async fn weigh_adapters(State(shared): State<Shared>, body: Bytes) -> Response {
    #[derive(Deserialize)]
    struct Weight {
        id: Option<usize>,
        name: Option<String>,
        scale: f64,
    }
    let outcome = parse::<Vec<Weight>>(&body).and_then(|weights| {
        let known = shared.server.weights();
        for Weight { id, name, scale } in weights {
            let by_number = id.and_then(|id| known.get(id)).map(|(name, _)| name.clone());
            let Some(name) = name.or(by_number) else {
                return Err(Refusal::body(format!(
                    "there are {} adapters; give the id or the name of one",
                    known.len()
                )));
            };
            shared.server.weigh_adapter(&name, scale)?;
        }
        Ok(json!({ "success": true }))
    });
    answer(DIALECT, outcome)
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct OllamaBody {
    model: Option<String>,
    prompt: String,
    suffix: Option<String>,
    stream: Option<bool>,
    options: OllamaOptions,
    /// As llm-vscode sends them to every route.
    parameters: Option<Parameters>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct OllamaOptions {
    num_predict: Option<i64>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    top_k: Option<usize>,
    repeat_penalty: Option<f64>,
    seed: Option<i64>,
    stop: Vec<String>,
}

/// `POST /api/generate`, as Ollama has it. Streams are lines of JSON.
pub async fn ollama(State(shared): State<Shared>, body: Bytes) -> Response {
    let outcome = parse::<OllamaBody>(&body).and_then(|body| {
        let OllamaBody { model, prompt, suffix, stream, options, parameters } = body;
        let nested = parameters.as_ref().map(Parameters::sampling);
        let or = |own: Option<f64>, nested: Option<f64>, default: f64| own.or(nested).unwrap_or(default);
        let ask = Ask {
            prompt: match suffix.filter(|suffix| !suffix.is_empty()) {
                Some(suffix) => Prompt::Between { prefix: prompt, suffix },
                None => Prompt::Text(prompt),
            },
            max_new_tokens: (options.num_predict.and_then(|tokens| usize::try_from(tokens).ok()))
                .or_else(|| parameters.as_ref().and_then(Parameters::max_new_tokens)),
            sampling: Sampling {
                temperature: or(options.temperature, nested.map(|nested| nested.temperature), 0.8),
                top_p: or(options.top_p, nested.map(|nested| nested.top_p), 0.9),
                top_k: options.top_k.unwrap_or(40),
                repetition_penalty: options.repeat_penalty.unwrap_or(1.0),
                seed: options.seed.and_then(|seed| u64::try_from(seed).ok()).unwrap_or_else(rand::random),
            },
            stop: options.stop,
            keeps_stop: false,
            shape: None,
            adapter: model.clone(),
            top: None,
        };
        Ok((shared.server.ask(&ask)?, model, stream))
    });
    let (mut asked, model, is_streamed) = match outcome {
        Ok(outcome) => outcome,
        Err(refusal) => return refusal.in_dialect(DIALECT),
    };
    let model = model.unwrap_or_else(|| shared.server.model_name.clone());
    let told = move |text: &str, end: Option<&End>| {
        let mut told = json!({ "model": model, "response": text, "done": end.is_some() });
        if let Some(end) = end {
            told["done_reason"] = json!(if end.reason == Reason::Length { "length" } else { "stop" });
            told["prompt_eval_count"] = json!(end.prompt_tokens);
            told["eval_count"] = json!(end.made_tokens);
        }
        told
    };
    // Ollama streams unless it is told not to.
    if is_streamed == Some(false) {
        return match asked.whole().await {
            Ok(whole) => answer(DIALECT, Ok(told(&whole.text, Some(&whole.end)))),
            Err(error) => Refusal::from(error).in_dialect(DIALECT),
        };
    }
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(event) = asked.events.recv().await {
            let line = match event {
                Event::Made(tokens) => {
                    told(&tokens.iter().map(|token| token.text.as_str()).collect::<String>(), None)
                }
                Event::Ended(end) => told("", Some(&end)),
                Event::Failed(failure) => error_body(DIALECT, "generation", &failure.to_string()),
            };
            if sender.send(Ok::<_, std::convert::Infallible>(format!("{line}\n"))).is_err() {
                return;
            }
        }
    });
    let body = axum::body::Body::from_stream(tokio_stream::wrappers::UnboundedReceiverStream::new(receiver));
    let mut response = Response::new(body);
    let kind = axum::http::HeaderValue::from_static("application/x-ndjson");
    response.headers_mut().insert(axum::http::header::CONTENT_TYPE, kind);
    response
}
