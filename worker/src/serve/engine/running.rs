//! One completion under way.

use std::rc::Rc;
use std::time::Instant;

use tch::{Kind, Tensor};

use super::contexts::Kept;
use super::request::{End, Event, Failure, Reason, Request, Token};
use super::speculate::Guesser;
use super::text::Text;
use crate::data::tokenizer::Tokenizer;
use crate::generate::adapters::Adapter;
use crate::generate::decoder::{Context, Piece};
use crate::generate::sampling::Sampler;
use crate::serve::{metrics, stop};

/// A request, and how far it is.
pub struct Running {
    request: Request,
    adapter: Option<Rc<Adapter>>,
    context: Context,
    /// Prompt, and what was made.
    tokens: Vec<u32>,
    known: usize,
    /// Shown in steps of the same bounds whatever was known.
    stepped: usize,
    text: Text,
    /// Tokens whose text is not settled, with the end of their text.
    untold: Vec<(Token, usize)>,
    /// Text that has been told.
    told: usize,
    sampler: Sampler,
    guesser: Guesser,
    /// What the next step shows.
    shown: Vec<u32>,
    guessed: usize,
    wants_logits: bool,
    guessed_right: usize,
    is_done: bool,
}

impl Running {
    pub fn new(request: Request, adapter: Option<Rc<Adapter>>, context: Context, known: usize) -> Self {
        Running {
            tokens: request.prompt.clone(),
            sampler: Sampler::new(request.sampling),
            request,
            adapter,
            context,
            known,
            stepped: known,
            text: Text::default(),
            untold: Vec::new(),
            told: 0,
            guesser: Guesser::default(),
            shown: Vec::new(),
            guessed: 0,
            wants_logits: false,
            guessed_right: 0,
            is_done: false,
        }
    }

    pub fn is_done(&self) -> bool {
        self.is_done
    }

    /// Ends it where nobody listens or its time is up.
    pub fn give_up(&mut self, now: Instant) {
        if now >= self.request.deadline {
            let _ = self.request.events.send(Event::Failed(Failure::TimedOut));
            self.is_done = true;
        }
        self.is_done |= self.request.events.is_closed();
    }

    /// Ends it with a failure.
    pub fn fail(self, failure: Failure) {
        let _ = self.request.events.send(Event::Failed(failure));
    }

    /// Ends it with a failure before it has begun; its context and room are free.
    pub fn abandoned(self, failure: Failure) -> (Kept, usize) {
        let _ = self.request.events.send(Event::Failed(failure));
        self.into_context()
    }

    /// Decides what the next step shows: a piece of the prompt, or the last token and guesses.
    pub fn prepare(&mut self, budget: &mut usize, step_tokens: usize, speculate: bool, fixed: bool) {
        self.shown.clear();
        (self.guessed, self.wants_logits) = (0, false);
        let seen = self.context.tokens();
        let unseen = self.tokens.get(seen..).unwrap_or_default();
        let most = match (fixed, unseen.len()) {
            (_, 1) => 1,
            (true, _) => step_tokens - seen % step_tokens,
            (false, _) => *budget,
        };
        let count = unseen.len().min(most);
        self.shown.extend(unseen.iter().take(count));
        if count == 0 {
            return;
        }
        if unseen.len() > 1 {
            *budget = budget.saturating_sub(count);
        }
        self.wants_logits = count == unseen.len();
        if speculate && self.wants_logits && self.made() > 0 {
            let room = self.request.max_new_tokens.saturating_sub(self.made() + 1);
            let guess = self.guesser.guess(&self.tokens, room);
            self.guessed = guess.len();
            self.shown.extend(guess);
        }
    }

    /// What the next step shows the model.
    pub fn piece(&mut self) -> Piece<'_> {
        let rows = self.rows() as usize;
        Piece {
            context: &mut self.context,
            tokens: &self.shown,
            logits: rows,
            adapter: self.adapter.as_deref(),
        }
    }

    /// Tokens that the next step shows.
    pub fn shown_tokens(&self) -> usize {
        self.shown.len()
    }

    /// Rows of logits that the step gives.
    pub fn rows(&self) -> i64 {
        if self.wants_logits { self.guessed as i64 + 1 } else { 0 }
    }

    /// Takes the logits `[rows, V]` of a step.
    pub fn take(&mut self, logits_rv: &Tensor, tokenizer: &Tokenizer) {
        if self.made() == 0 {
            self.stepped = self.context.tokens();
        }
        if !self.wants_logits || self.is_done {
            return;
        }
        let guess = self.shown.split_off(self.shown.len() - self.guessed);
        let before = self.tokens.len();
        let mut right = 0;
        for row in 0..self.rows() {
            let logits_v = logits_rv.get(row);
            let next = self.sampler.next(&logits_v, &self.tokens);
            if self.made() == 0 {
                metrics::first_token(self.request.asked.elapsed());
            }
            self.push(next, &logits_v, tokenizer);
            let is_right = guess.get(row as usize) == Some(&next);
            if self.is_done || !is_right {
                break;
            }
            right += 1;
        }
        self.guesser.learn(guess.len(), right);
        self.guessed_right += right;
        // What was guessed wrongly was never there.
        self.context.truncate((before + right).min(self.context.tokens()));
    }

    fn made(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Appends a token, and ends the completion where it ends.
    fn push(&mut self, next: u32, logits_v: &Tensor, tokenizer: &Tokenizer) {
        self.tokens.push(next);
        let is_end = self.request.end_tokens.contains(&next);
        let result = if is_end { Ok(()) } else { self.text.push(next, tokenizer) };
        let is_last = is_end || self.made() >= self.request.max_new_tokens || self.has_no_room();
        let result = result.and_then(|()| if is_last { self.text.finish(tokenizer) } else { Ok(()) });
        if let Err(error) = result {
            let _ = self.request.events.send(Event::Failed(Failure::Model(error.to_string())));
            self.is_done = true;
            return;
        }
        if !is_end {
            let token = self.token(next, logits_v, tokenizer);
            self.untold.push((token, self.text.as_str().len()));
        } else if let Some((_, end)) = self.untold.last_mut() {
            *end = self.text.as_str().len();
        }
        let text = self.text.as_str();
        if let Some(stop::End { at, string }) = self.request.rules.end(text, is_last) {
            let kept = string
                .filter(|_| self.request.keeps_stop)
                .map_or(0, |number| self.request.rules.string(number).len());
            self.tell(at + kept, true);
            self.end(Reason::Stop);
        } else if is_last {
            self.tell(text.len(), true);
            self.end(if is_end { Reason::EndToken } else { Reason::Length });
        } else {
            self.tell(self.request.rules.settled(text), false);
        }
    }

    fn has_no_room(&self) -> bool {
        self.tokens.len() >= self.context.max_tokens()
    }

    /// Tells tokens and text up to `until`, with which the text ends if `is_end`.
    fn tell(&mut self, until: usize, is_end: bool) {
        let text = self.text.as_str();
        let mut made = Vec::new();
        let whole = self.untold.iter().take_while(|(_, end)| *end <= until).count();
        // Of the token that is cut, what is left of it.
        let count = if is_end && self.untold.len() > whole { whole + 1 } else { whole };
        for (mut token, end) in self.untold.drain(..count) {
            let end = end.min(until).max(self.told);
            token.text = text.get(self.told..end).unwrap_or_default().to_owned();
            self.told = end;
            made.push(token);
        }
        if made.last().is_some_and(|token| is_end && token.text.is_empty() && made.len() > whole) {
            made.pop();
        }
        if !made.is_empty() {
            let _ = self.request.events.send(Event::Made(made));
        }
    }

    fn end(&mut self, reason: Reason) {
        self.is_done = true;
        let end = End {
            reason,
            prompt_tokens: self.request.prompt.len(),
            known_tokens: self.known,
            made_tokens: self.made(),
            guessed_tokens: self.guessed_right,
        };
        metrics::completed(&end);
        let _ = self.request.events.send(Event::Ended(end));
    }

    fn token(&self, id: u32, logits_v: &Tensor, tokenizer: &Tokenizer) -> Token {
        let mut token = Token { id, text: String::new(), logprob: 0.0, top: Vec::new() };
        let Some(top) = self.request.top else { return token };
        let logprobs_v = logits_v.log_softmax(-1, Kind::Float);
        token.logprob = logprobs_v.double_value(&[i64::from(id)]) as f32;
        let (values, ids) = logprobs_v.topk((top as i64).min(logprobs_v.size()[0]), 0, true, true);
        let values = Vec::<f32>::try_from(values).unwrap_or_default();
        let ids = Vec::<i64>::try_from(ids).unwrap_or_default();
        token.top = ids
            .into_iter()
            .zip(values)
            .map(|(id, value)| {
                (id as u32, tokenizer.decode_middle(&[id as u32], false).unwrap_or_default(), value)
            })
            .collect();
        token
    }

    /// The context for whoever comes next, and the tokens that there was room for.
    pub fn into_context(mut self) -> (Kept, usize) {
        let wanted = self.request.prompt.len() + self.request.max_new_tokens;
        self.tokens.truncate(self.context.tokens());
        let stepped = self.stepped.min(self.tokens.len());
        let kept =
            Kept { context: self.context, tokens: self.tokens, stepped, adapter: self.request.adapter };
        (kept, wanted)
    }
}
