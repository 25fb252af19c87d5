//! What is asked of the engine, and what it answers.

use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::AdapterId;
use crate::generate::sampling::Sampling;
use crate::serve::stop::Rules;

/// One completion.
#[derive(Debug)]
pub struct Request {
    /// What the model is shown.
    pub prompt: Vec<u32>,
    /// Tokens to make at most.
    pub max_new_tokens: usize,
    /// How they are chosen.
    pub sampling: Sampling,
    /// Where the text ends.
    pub rules: Rules,
    /// Whether a string that ends the text is part of it.
    pub keeps_stop: bool,
    /// Tokens that end it, and are not part of it.
    pub end_tokens: Vec<u32>,
    /// What is added to the base.
    pub adapter: Option<AdapterId>,
    /// Likeliest tokens that are told with each token; `None` tells no probabilities.
    pub top: Option<usize>,
    /// When it came.
    pub asked: Instant,
    /// When it is given up.
    pub deadline: Instant,
    /// Where answers go. When nobody listens, the completion is given up.
    pub events: UnboundedSender<Event>,
}

/// What the engine says of a completion.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// These were made. They are told when no rule will take their text back.
    Made(Vec<Token>),
    /// It is complete.
    Ended(End),
    /// It failed.
    Failed(Failure),
}

/// One token.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// What it adds to the text; a character of several tokens comes with the last of them.
    pub text: String,
    /// Natural logarithm of its probability, before temperature.
    pub logprob: f32,
    /// The likeliest tokens in its place, with their logarithms.
    pub top: Vec<(u32, String, f32)>,
}

/// How a completion ended.
#[derive(Debug, Clone, PartialEq)]
pub struct End {
    /// Why.
    pub reason: Reason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of those, so many were known from before.
    pub known_tokens: usize,
    /// Tokens that were made, those that ended it included.
    pub made_tokens: usize,
    /// Tokens that were guessed, and were right.
    pub guessed_tokens: usize,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// So many tokens were asked for, or there is no room for more.
    Length,
    /// The model ended it.
    EndToken,
    /// A string, or the shape of the text.
    Stop,
}

/// Why a completion failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// It took too long.
    #[error("the completion took longer than its time-out")]
    TimedOut,
    /// Its adapter was removed before it began.
    #[error("the adapter was removed before the completion began")]
    AdapterGone,
    /// The server ends.
    #[error("the server is shutting down")]
    Ending,
    /// The model could not compute.
    #[error("the model failed: {0}")]
    Model(String),
}

impl From<tunefleet_kernels::Error> for Failure {
    fn from(error: tunefleet_kernels::Error) -> Self {
        Failure::Model(error.to_string())
    }
}
