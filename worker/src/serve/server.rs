//! What a request asks for, in tokens, whichever client has sent it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tunefleet_proto::chat::Conversation;
use tunefleet_proto::job::ChatLoss;
use tunefleet_proto::model::ModelConfig;

use super::engine::request::{End, Event, Failure, Request, Token};
use super::engine::{AdapterId, Handle, Refused};
use super::stop::{Rules, Shape};
use crate::chat::Chat;
use crate::data::infill::FimTokens;
use crate::data::tokenizer::{self, Tokenizer};
use crate::generate::adapters::Adapter;
use crate::generate::prompt::{self, InfillOrder, anchored};
use crate::generate::sampling::Sampling;
use crate::model::numerics::Numerics;

/// Tokens of an answer in a chat, where a request does not say.
const ANSWER_TOKENS: usize = 1024;
/// Most strings that end a text.
pub const MAX_STOPS: usize = 16;

/// Everything that requests are answered from.
pub struct Server {
    /// The engine.
    pub engine: Handle,
    /// Text to tokens, and back.
    pub tokenizer: Arc<Tokenizer>,
    /// How chats are laid out for the model, and for adapters that have no template of their own.
    pub chat: Option<Arc<Chat>>,
    /// Shape of the model.
    pub config: ModelConfig,
    /// Where and in which dtype it computes.
    pub numerics: Numerics,
    /// What the model is called.
    pub model_name: String,
    /// What else it may be called.
    pub other_names: Vec<String>,
    /// How holes are filled.
    pub infill_order: InfillOrder,
    /// Longest time for a completion.
    pub timeout: Duration,
    /// Tokens of a completion where a request does not say.
    pub default_new_tokens: usize,
    /// By name.
    pub adapters: RwLock<BTreeMap<String, Loaded>>,
    /// For requests that name neither the model nor an adapter.
    pub default_adapter: Option<String>,
    /// Unix time of the start.
    pub started_unix: u64,
}

/// An adapter that requests may choose.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// How chats are laid out for it, where it has a template of its own.
    pub chat: Option<Arc<Chat>>,
    /// The engine's name for it.
    pub id: AdapterId,
    /// What its difference is multiplied by.
    pub weight: f64,
}

/// A prompt as a client gives it.
#[derive(Debug, Clone)]
pub enum Prompt {
    /// Text in which special tokens may be spelt out.
    Text(String),
    /// Tokens.
    Tokens(Vec<u32>),
    /// A conversation, laid out by the template of the model or the adapter that is asked.
    Chat(Conversation),
    /// What stands around the cursor; special tokens spelt out in it are text.
    Between {
        /// Before it.
        prefix: String,
        /// After it.
        suffix: String,
    },
}

/// A completion that is asked for.
#[derive(Debug, Clone)]
pub struct Ask {
    /// What is completed.
    pub prompt: Prompt,
    /// Tokens at most.
    pub max_new_tokens: Option<usize>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Strings that end the text.
    pub stop: Vec<String>,
    /// Whether they are part of it.
    pub keeps_stop: bool,
    /// How far it goes; `None` takes what suits the prompt.
    pub shape: Option<Shape>,
    /// The model or the adapter.
    pub adapter: Option<String>,
    /// Likeliest tokens to tell with each token.
    pub top: Option<usize>,
}

/// A completion under way.
pub struct Answer {
    /// What the engine says.
    pub events: UnboundedReceiver<Event>,
    /// The prompt in tokens.
    pub prompt: Vec<u32>,
}

/// A completion.
#[derive(Debug, Clone)]
pub struct Whole {
    /// Its text.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<Token>,
    /// How it ended.
    pub end: End,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request breaks a rule.
    #[error("{0}")]
    Invalid(String),
    /// No such model or adapter.
    #[error("there is no model or adapter `{name}`; there are {known}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// The engine takes no more.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The engine gave up.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// An adapter that cannot be used.
    #[error(transparent)]
    Adapter(#[from] crate::adapter::Error),
}

impl Error {
    fn text(error: &tokenizer::Error) -> Self {
        Error::Invalid(error.to_string())
    }
}

impl Server {
    /// Begins a completion.
    ///
    /// # Errors
    /// Requests that break a rule; an engine that is busy.
    pub fn ask(&self, ask: &Ask) -> Result<Answer, Error> {
        self.check(ask)?;
        let adapter = self.adapter(ask.adapter.as_deref())?;
        let max_positions = self.config.max_positions as usize;
        let default = match &ask.prompt {
            // An answer ends when it is said.
            Prompt::Chat(_) => ANSWER_TOKENS.min(max_positions / 2),
            Prompt::Text(_) | Prompt::Tokens(_) | Prompt::Between { .. } => self.default_new_tokens,
        };
        let wanted = ask.max_new_tokens.unwrap_or(default);
        if wanted == 0 || wanted >= max_positions {
            return Err(Error::Invalid(format!(
                "max_new_tokens must be 1 to {}, got {wanted}",
                max_positions - 1
            )));
        }
        let (prompt, rules) = self.prompt(ask, max_positions - wanted)?;
        if prompt.is_empty() {
            return Err(Error::Invalid("the prompt is empty: give some text to continue".to_owned()));
        }
        let chat_ends = match &ask.prompt {
            Prompt::Chat(_) => self.chat(ask.adapter.as_deref())?.ends().to_vec(),
            Prompt::Text(_) | Prompt::Tokens(_) | Prompt::Between { .. } => Vec::new(),
        };
        let (sender, events) = unbounded_channel();
        self.engine.submit(Request {
            prompt: prompt.clone(),
            max_new_tokens: wanted,
            sampling: ask.sampling,
            rules,
            keeps_stop: ask.keeps_stop,
            end_tokens: self.tokenizer.ends_of_completions().into_iter().chain(chat_ends).collect(),
            adapter,
            top: ask.top,
            asked: Instant::now(),
            deadline: Instant::now() + self.timeout,
            events: sender,
        })?;
        Ok(Answer { events, prompt })
    }

    /// Names of the model and of its adapters.
    pub fn names(&self) -> Vec<String> {
        let adapters = self.adapters.read().unwrap_or_else(PoisonError::into_inner);
        std::iter::once(self.model_name.clone()).chain(adapters.keys().cloned()).collect()
    }

    /// Text of tokens, special ones spelt out.
    ///
    /// # Errors
    /// Tokens that are none.
    pub fn text(&self, tokens: &[u32]) -> Result<String, Error> {
        self.tokenizer.decode(tokens, false).map_err(|error| Error::text(&error))
    }

    /// Adapters and their weights, in order of their names.
    pub fn weights(&self) -> Vec<(String, f64)> {
        let adapters = self.adapters.read().unwrap_or_else(PoisonError::into_inner);
        adapters.iter().map(|(name, adapter)| (name.clone(), adapter.weight)).collect()
    }

    /// Loads an adapter, or loads it anew; completions under way keep theirs.
    ///
    /// # Errors
    /// Files that are no adapter of this model; a name that is taken by the model.
    pub fn load_adapter(&self, name: &str, dir: &Path, weight: f64) -> Result<(), Error> {
        if name.is_empty() || name == self.model_name {
            return Err(Error::Invalid(format!("an adapter cannot be called `{name}`, choose another name")));
        }
        if !weight.is_finite() {
            return Err(Error::Invalid(format!("the weight of an adapter must be a number, got {weight}")));
        }
        let id = self.engine.add(Adapter::load(dir, weight, &self.config, self.numerics)?)?;
        let chat = Chat::beside(dir, &self.tokenizer, ChatLoss::All)
            .map_err(|error| Error::Invalid(error.to_string()))?;
        let chat = chat.map(Arc::new);
        let mut adapters = self.adapters.write().unwrap_or_else(PoisonError::into_inner);
        match adapters.insert(name.to_owned(), Loaded { chat, id, weight }) {
            Some(before) => Ok(self.engine.forget(before.id)?),
            None => Ok(()),
        }
    }

    /// Gives an adapter another weight.
    ///
    /// # Errors
    /// One that is not there; a weight that is no number.
    pub fn weigh_adapter(&self, name: &str, weight: f64) -> Result<(), Error> {
        if !weight.is_finite() {
            return Err(Error::Invalid(format!("the weight of an adapter must be a number, got {weight}")));
        }
        let mut adapters = self.adapters.write().unwrap_or_else(PoisonError::into_inner);
        let Some(adapter) = adapters.get_mut(name) else {
            drop(adapters);
            return Err(self.unknown(name));
        };
        let id = self.engine.weigh(adapter.id, weight)?;
        let new = Loaded { chat: adapter.chat.clone(), id, weight };
        let before = std::mem::replace(adapter, new);
        Ok(self.engine.forget(before.id)?)
    }

    /// Forgets an adapter.
    ///
    /// # Errors
    /// One that is not there.
    pub fn unload_adapter(&self, name: &str) -> Result<(), Error> {
        let removed = self.adapters.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        match removed {
            Some(adapter) => Ok(self.engine.forget(adapter.id)?),
            None => Err(self.unknown(name)),
        }
    }

    fn unknown(&self, name: &str) -> Error {
        Error::Unknown { name: name.to_owned(), known: self.names().join(", ") }
    }

    /// How chats with the adapter of that name are laid out, or with the model.
    fn chat(&self, name: Option<&str>) -> Result<Arc<Chat>, Error> {
        let own = self.loaded(name)?.and_then(|adapter| adapter.chat);
        own.or_else(|| self.chat.clone()).ok_or_else(|| {
            let name = name.unwrap_or(&self.model_name);
            Error::Invalid(format!(
                "`{name}` has no chat template: put one beside the model with `worker init-chat`, or serve with \
                 --chat-template NAME"
            ))
        })
    }

    fn adapter(&self, name: Option<&str>) -> Result<Option<AdapterId>, Error> {
        Ok(self.loaded(name)?.map(|adapter| adapter.id))
    }

    /// The adapter of that name, or the one for who names none; the model's own name is the base.
    fn loaded(&self, name: Option<&str>) -> Result<Option<Loaded>, Error> {
        let is_model =
            |name: &str| name == self.model_name || self.other_names.iter().any(|other| other == name);
        let name = name.filter(|name| !name.is_empty()).or(self.default_adapter.as_deref());
        let Some(name) = name.filter(|name| !is_model(name)) else {
            return Ok(None);
        };
        let found = self.adapters.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        found.map(Some).ok_or_else(|| self.unknown(name))
    }

    fn check(&self, ask: &Ask) -> Result<(), Error> {
        let Sampling { temperature, top_p, repetition_penalty, .. } = ask.sampling;
        let rules = [
            (!(temperature >= 0.0 && temperature.is_finite()), "temperature", "0 or more", temperature),
            (!(top_p > 0.0 && top_p <= 1.0), "top_p", "above 0 and at most 1", top_p),
            (
                !(repetition_penalty > 0.0 && repetition_penalty.is_finite()),
                "repetition_penalty",
                "above 0",
                repetition_penalty,
            ),
        ];
        if let Some((_, name, rule, value)) = rules.into_iter().find(|(is_broken, ..)| *is_broken) {
            return Err(Error::Invalid(format!("{name} must be {rule}, got {value}")));
        }
        if ask.stop.len() > MAX_STOPS {
            return Err(Error::Invalid(format!(
                "stop must be at most {MAX_STOPS} strings, got {}",
                ask.stop.len()
            )));
        }
        Ok(())
    }

    /// Tokens of a prompt, at most `most`, and where its completion ends.
    fn prompt(&self, ask: &Ask, most: usize) -> Result<(Vec<u32>, Rules), Error> {
        let too_long = |tokens: usize| {
            Error::Invalid(format!(
                "the prompt has {tokens} tokens, and there is room for {most} beside what is asked for"
            ))
        };
        let infill = |prefix: &str, suffix: &str, order, most| {
            prompt::infill(&self.tokenizer, prefix, suffix, order, most).map_err(|error| Error::text(&error))
        };
        match &ask.prompt {
            Prompt::Tokens(tokens) => {
                let rows = self.config.vocab_size;
                if let Some(token) = tokens.iter().find(|token| u64::from(**token) >= rows) {
                    return Err(Error::Invalid(format!("token {token} is none of the model's {rows}")));
                }
                if tokens.len() > most {
                    return Err(too_long(tokens.len()));
                }
                Ok((tokens.clone(), Rules::strings(ask.stop.clone())))
            }
            Prompt::Text(text) => {
                let tokens = self.tokenizer.encode_prompt(text).map_err(|error| Error::text(&error))?;
                let tokens = if text.is_empty() { tokens } else { self.tokenizer.begun(tokens) };
                let hole = self.hole(&tokens).map_err(|error| Error::text(&error))?;
                let rules = match (&hole, ask.shape) {
                    (Some((prefix, suffix)), shape) => {
                        let shape = shape.unwrap_or_else(|| Shape::of(prefix, suffix));
                        Rules::between(shape, ask.stop.clone(), prefix, suffix)
                    }
                    (None, Some(shape)) => Rules::between(shape, ask.stop.clone(), text, ""),
                    (None, None) => Rules::strings(ask.stop.clone()),
                };
                match (tokens.len() > most, &hole) {
                    (false, _) => Ok((tokens, rules)),
                    (true, Some((prefix, suffix))) => {
                        Ok((infill(prefix, suffix, InfillOrder::Psm, most)?, rules))
                    }
                    // What is nearest to the end is kept, as TGI's `truncate` does.
                    (true, None) => Ok((tokens.split_at(anchored(tokens.len(), most)).1.to_vec(), rules)),
                }
            }
            Prompt::Chat(conversation) => {
                let chat = self.chat(ask.adapter.as_deref())?;
                let tokens = chat
                    .prompt(conversation, &self.tokenizer)
                    .map_err(|error| Error::Invalid(format!("messages: {error}")))?;
                match tokens.len() > most {
                    true => Err(Error::Invalid(format!(
                        "messages: the conversation has {} tokens, and there is room for {most} beside an answer: leave \
                         its oldest turns out, or ask for a shorter answer",
                        tokens.len()
                    ))),
                    false => Ok((tokens, Rules::strings(ask.stop.clone()))),
                }
            }
            Prompt::Between { prefix, suffix } => {
                let shape = ask.shape.unwrap_or_else(|| Shape::of(prefix, suffix));
                let rules = Rules::between(shape, ask.stop.clone(), prefix, suffix);
                Ok((infill(prefix, suffix, self.infill_order, most)?, rules))
            }
        }
    }

    /// What stands around the hole of a prompt that a client has laid out.
    fn hole(&self, tokens: &[u32]) -> Result<Option<(String, String)>, tokenizer::Error> {
        let Ok(FimTokens { prefix: pre, middle: mid, suffix: suf, .. }) = self.tokenizer.fim() else {
            return Ok(None);
        };
        let at = |marker| tokens.iter().position(|token| *token == marker);
        let (Some(pre), Some(suf), Some(mid)) = (at(pre), at(suf), at(mid)) else { return Ok(None) };
        let text = |begin: usize, end: usize| {
            self.tokenizer.decode_middle(tokens.get(begin..end.max(begin)).unwrap_or_default(), false)
        };
        Ok(match () {
            () if pre < suf && suf < mid && mid > suf + 1 && suf == pre + 1 && mid + 1 < tokens.len() => {
                Some((text(mid + 1, tokens.len())?, text(suf + 1, mid)?))
            }
            () if pre < suf && suf < mid => Some((text(pre + 1, suf)?, text(suf + 1, mid)?)),
            () => None,
        })
    }
}

impl Answer {
    /// Everything, when it is complete.
    ///
    /// # Errors
    /// What the engine met.
    pub async fn whole(mut self) -> Result<Whole, Error> {
        let mut tokens = Vec::new();
        loop {
            match self.events.recv().await {
                Some(Event::Made(made)) => tokens.extend(made),
                Some(Event::Ended(end)) => {
                    let text = tokens.iter().map(|token| token.text.as_str()).collect();
                    return Ok(Whole { text, tokens, end });
                }
                Some(Event::Failed(failure)) => return Err(failure.into()),
                None => return Err(Failure::Ending.into()),
            }
        }
    }
}
