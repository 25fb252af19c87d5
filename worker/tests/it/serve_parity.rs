//! The completion server's engine beside transformers' `generate`: what `tests/parity/make_completions.py` wrote.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Deserialize;
use tch::Device;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tunefleet_proto::job::Precision;
use tunefleet_worker::data::tokenizer::Tokenizer;
use tunefleet_worker::generate::adapters::Adapter;
use tunefleet_worker::generate::decoder::Decoder;
use tunefleet_worker::generate::sampling::Sampling;
use tunefleet_worker::model::numerics::Numerics;
use tunefleet_worker::serve::engine::request::{Event, Request};
use tunefleet_worker::serve::engine::{self, AdapterId, Handle, Settings};
use tunefleet_worker::serve::stop::Rules;

use crate::common::*;

/// Nearer logits may fall either way.
const TIE: f64 = 1e-4;

#[derive(Deserialize)]
struct Completions {
    prompts: Vec<Vec<u32>>,
    base: Vec<Completion>,
    adapter: Vec<Completion>,
}

#[derive(Deserialize)]
struct Completion {
    ids: Vec<u32>,
    margins: Vec<f64>,
}

const PLAIN: Settings = Settings {
    max_batch: 1,
    max_queue: 1000,
    prefill_tokens: 64,
    cache_tokens: Some(8192),
    prefix_cache: false,
    speculate: false,
    batch_invariant: false,
};

fn start(dir: &Path, settings: Settings) -> (Handle, AdapterId) {
    let model = dir.join("model");
    let tokenizer = Arc::new(Tokenizer::load(&model).unwrap());
    let numerics = Numerics::new(Device::Cpu, Precision::Fp32);
    let (engine, config) =
        engine::start(move || Decoder::load(&model, numerics), tokenizer, settings).unwrap();
    let adapter = Adapter::load(&dir.join("adapter"), 1.0, &config, numerics).unwrap();
    let id = engine.add(adapter).unwrap();
    (engine, id)
}

fn ask(engine: &Handle, prompt: &[u32], adapter: Option<AdapterId>) -> UnboundedReceiver<Event> {
    let (events, received) = unbounded_channel();
    let request = Request {
        prompt: prompt.to_vec(),
        max_new_tokens: 24,
        sampling: Sampling::default(),
        rules: Rules::default(),
        keeps_stop: false,
        end_tokens: vec![0],
        adapter,
        top: None,
        asked: Instant::now(),
        deadline: Instant::now() + Duration::from_secs(120),
        events,
    };
    engine.submit(request).unwrap();
    received
}

/// Tokens of a completion, how many of its prompt were known, and how many of them were guessed.
fn made(mut events: UnboundedReceiver<Event>) -> (Vec<u32>, usize, usize) {
    let mut tokens = Vec::new();
    loop {
        match events.blocking_recv().expect("an end is told") {
            Event::Made(more) => tokens.extend(more.iter().map(|token| token.id)),
            Event::Ended(end) => return (tokens, end.known_tokens, end.guessed_tokens),
            Event::Failed(failure) => panic!("{failure}"),
        }
    }
}

/// Fails unless `found` is what the peer made, up to the first place where it might have made something else.
fn assert_is_the_peers(found: &[u32], peer: &Completion, name: &str) {
    let end = peer.ids.iter().position(|id| *id == 0).unwrap_or(peer.ids.len());
    let sure = peer.margins.iter().position(|margin| *margin < TIE).unwrap_or(end).min(end);
    assert_eq!(found.get(..sure), peer.ids.get(..sure), "{name}");
    assert!(sure < end || found.len() == end, "{name}: {found:?} and {:?}", peer.ids);
}

#[test]
fn greedy_completions_are_those_of_transformers_alone_and_in_any_company() {
    let Some(dir) = fixtures_of("make_completions.py", "completions") else { return };
    let text = std::fs::read_to_string(dir.join("completions.json")).unwrap();
    let expected: Completions = serde_json::from_str(&text).unwrap();
    assert_eq!(expected.prompts.len(), 100);
    const ALL: [(bool, bool); 4] = [(false, false), (true, true), (true, false), (false, true)];
    // Alone, kept contexts and guesses are tried together; in company, each also without the other.
    for (max_batch, ways) in [(1, &ALL[..2]), (8, &ALL[..])] {
        for &(prefix_cache, speculate) in ways {
            let (engine, adapter) = start(&dir, Settings { max_batch, prefix_cache, speculate, ..PLAIN });
            let (mut known_tokens, mut guessed_tokens) = (0, 0);
            // Base and adapter take turns: in a batch they share steps.
            let asked: Vec<_> = expected
                .prompts
                .iter()
                .map(|prompt| [None, Some(adapter)].map(|adapter| ask(&engine, prompt, adapter)))
                .collect();
            for (number, [of_base, of_adapter]) in asked.into_iter().enumerate() {
                for (events, peer, who) in
                    [(of_base, &expected.base, "base"), (of_adapter, &expected.adapter, "adapter")]
                {
                    let (found, known, guessed) = made(events);
                    (known_tokens, guessed_tokens) = (known_tokens + known, guessed_tokens + guessed);
                    let name = format!("{who}, prompt {number}, {max_batch} {prefix_cache} {speculate}");
                    assert_is_the_peers(&found, &peer[number], &name);
                }
            }
            assert_eq!(known_tokens > 1000, prefix_cache, "{known_tokens} tokens were known");
            assert_eq!(guessed_tokens > 100, speculate, "{guessed_tokens} tokens were guessed");
        }
    }
}
