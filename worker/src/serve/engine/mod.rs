//! Completions of many requests at once: each step shows the model the next tokens of all of them, so that its weights
//! are read once for all (continuous batching). One thread owns the model; requests come and answers go by channels.

/// What is asked, and what is answered.
pub mod request;
/// Contexts that are kept: a prompt that begins like an earlier one is not computed again.
mod contexts;
/// Guesses of what comes next.
mod speculate;
/// One completion under way.
mod running;
/// Tokens to text as they come.
pub mod text;

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Instant;

use tch::Tensor;
use tunefleet_proto::model::ModelConfig;

use crate::data::tokenizer::Tokenizer;
use crate::generate::adapters::Adapter;
use crate::generate::decoder::{Decoder, Piece};
use contexts::Contexts;
use request::{Event, Failure, Request};
use running::Running;

/// Contexts of full length that are kept in memory where nothing else is said.
pub const DEFAULT_CONTEXTS: usize = 16;

/// How long a piece of a prompt may take where nobody else waits: whoever comes or goes meanwhile is noticed after it.
const ALONE_SECONDS: f64 = 1.0;

/// How the engine works.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Completions under way at once.
    pub max_batch: usize,
    /// Requests that wait, at most.
    pub max_queue: usize,
    /// Tokens of prompts in one step, so that other completions go on meanwhile; a prompt that is alone has more at once.
    pub prefill_tokens: usize,
    /// Tokens of all contexts, those kept for later included; [`DEFAULT_CONTEXTS`] of full length when absent.
    pub cache_tokens: Option<usize>,
    /// Whether contexts are kept for prompts that begin alike.
    pub prefix_cache: bool,
    /// Whether tokens are guessed.
    pub speculate: bool,
    /// Whether what is made does not depend on what is made beside it, to the last bit. Slower: nothing is shared.
    pub batch_invariant: bool,
}

/// What others know of the engine.
#[derive(Debug, Default)]
pub struct Gauges {
    /// Requests that wait.
    pub waiting: AtomicUsize,
    /// Completions under way.
    pub running: AtomicUsize,
    /// Tokens of contexts in memory.
    pub cached_tokens: AtomicUsize,
}

/// A way to the engine.
#[derive(Debug, Clone)]
pub struct Handle {
    sender: Sender<Command>,
    next_adapter: Arc<AtomicU64>,
    gauges: Arc<Gauges>,
    is_ending: Arc<AtomicBool>,
    max_queue: usize,
}

/// What the engine is told.
#[derive(Debug)]
enum Command {
    Complete(Box<Request>),
    Add(AdapterId, Adapter),
    Weigh {
        known: AdapterId,
        new: AdapterId,
        weight: f64,
    },
    Forget(AdapterId),
    Score {
        tokens: Vec<u32>,
        targets: Vec<i64>,
        adapter: Option<AdapterId>,
        answer: Sender<Result<f64, Failure>>,
    },
}

/// An adapter with its weight, as requests name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AdapterId(u64);

/// The engine takes no more requests at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too many wait.
    #[error("too many requests are waiting; try again")]
    Busy,
    /// It ends.
    #[error("the server is shutting down")]
    Ending,
}

impl Handle {
    /// Hands a request to the engine.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn submit(&self, request: Request) -> Result<(), Refused> {
        if self.is_ending.load(Ordering::Acquire) {
            return Err(Refused::Ending);
        }
        let waiting = self.gauges.waiting.fetch_add(1, Ordering::AcqRel);
        if waiting >= self.max_queue || self.sender.send(Command::Complete(Box::new(request))).is_err() {
            self.gauges.waiting.fetch_sub(1, Ordering::AcqRel);
            return Err(if waiting >= self.max_queue { Refused::Busy } else { Refused::Ending });
        }
        Ok(())
    }

    /// Adds an adapter.
    ///
    /// # Errors
    /// An engine that has ended.
    pub fn add(&self, adapter: Adapter) -> Result<AdapterId, Refused> {
        let id = self.new_id();
        self.tell(Command::Add(id, adapter))?;
        Ok(id)
    }

    /// Adds an adapter that is known with another weight.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn weigh(&self, known: AdapterId, weight: f64) -> Result<AdapterId, Refused> {
        let new = self.new_id();
        self.tell(Command::Weigh { known, new, weight })?;
        Ok(new)
    }

    /// Forgets an adapter when no completion needs it any more.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub fn forget(&self, id: AdapterId) -> Result<(), Refused> {
        self.tell(Command::Forget(id))
    }

    /// Sum of the losses, in nats, of `targets` behind `tokens`, each after those before it; [`crate::data::IGNORED`] ones do not count.
    /// Completions wait meanwhile.
    ///
    /// # Errors
    /// An engine that has ended, an adapter that is not there, and whatever the model fails with.
    pub fn score(
        &self,
        tokens: Vec<u32>,
        targets: Vec<i64>,
        adapter: Option<AdapterId>,
    ) -> Result<f64, Failure> {
        let (answer, told) = channel();
        self.tell(Command::Score { tokens, targets, adapter, answer }).map_err(|_| Failure::Ending)?;
        told.recv().map_err(|_| Failure::Ending)?
    }

    fn new_id(&self) -> AdapterId {
        AdapterId(self.next_adapter.fetch_add(1, Ordering::Relaxed))
    }

    fn tell(&self, command: Command) -> Result<(), Refused> {
        self.sender.send(command).map_err(|_| Refused::Ending)
    }

    /// What is going on.
    pub fn gauges(&self) -> &Gauges {
        &self.gauges
    }

    /// Lets completions under way and waiting end, and takes no more.
    pub fn end(&self) {
        self.is_ending.store(true, Ordering::Release);
    }
}

/// Why there is no engine.
#[derive(Debug, thiserror::Error)]
pub enum StartError<E: std::error::Error> {
    /// The system has no thread.
    #[error("starting the engine's thread: {0}")]
    Thread(#[from] std::io::Error),
    /// The model.
    #[error(transparent)]
    Load(E),
    /// Out of memory above all: tch raises libtorch's failures as panics, and their message has been printed.
    #[error(
        "the model could not be loaded, see above; where memory is short, --quantize takes a quarter of it"
    )]
    Panicked,
}

/// Starts the engine's thread, which loads the model; it ends when all handles are gone. The model's shape comes back.
///
/// libtorch's helpers belong to the thread that they were first asked for by: where another one loaded the model, there
/// would be two sets of them for the same cores, and each would sleep between operations to make room for the other.
///
/// # Errors
/// See [`StartError`].
pub fn start<E: std::error::Error + Send + 'static>(
    load: impl FnOnce() -> Result<Decoder, E> + Send + 'static,
    tokenizer: Arc<Tokenizer>,
    settings: Settings,
) -> Result<(Handle, ModelConfig), StartError<E>> {
    let (sender, receiver) = channel();
    let (tell_loaded, loaded) = channel();
    let gauges = Arc::new(Gauges::default());
    let handle = Handle {
        sender,
        next_adapter: Arc::default(),
        gauges: gauges.clone(),
        is_ending: Arc::default(),
        max_queue: settings.max_queue,
    };
    let run = move || {
        let decoder = match load() {
            Ok(decoder) => decoder,
            Err(error) => return drop(tell_loaded.send(Err(error))),
        };
        if tell_loaded.send(Ok(decoder.config().clone())).is_err() {
            return;
        }
        let engine = Engine {
            contexts: Contexts::new(settings, decoder.config().max_positions as usize),
            adapters: HashMap::new(),
            decoder,
            tokenizer,
            settings,
            receiver,
            gauges,
            waiting: VecDeque::new(),
            running: Vec::new(),
            alone_tokens: 0,
        };
        engine.run();
    };
    std::thread::Builder::new().name("engine".to_owned()).spawn(run)?;
    match loaded.recv() {
        Ok(Ok(config)) => Ok((handle, config)),
        Ok(Err(error)) => Err(StartError::Load(error)),
        Err(_) => Err(StartError::Panicked),
    }
}

struct Engine {
    decoder: Decoder,
    tokenizer: Arc<Tokenizer>,
    settings: Settings,
    receiver: Receiver<Command>,
    adapters: HashMap<AdapterId, Rc<Adapter>>,
    gauges: Arc<Gauges>,
    contexts: Contexts,
    waiting: VecDeque<Request>,
    running: Vec<Running>,
    /// Tokens of a prompt that take [`ALONE_SECONDS`], by the last step of many.
    alone_tokens: usize,
}

impl Engine {
    fn run(mut self) {
        while self.receive() {
            self.give_up();
            self.admit();
            self.step();
            self.retire();
        }
    }

    /// Takes what has come; waits where there is nothing else to do. False when nobody can ask any more.
    fn receive(&mut self) -> bool {
        if self.running.is_empty() && self.waiting.is_empty() {
            match self.receiver.recv() {
                Ok(command) => self.obey(command),
                Err(_) => return false,
            }
        }
        loop {
            match self.receiver.try_recv() {
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => {
                    return !(self.running.is_empty() && self.waiting.is_empty());
                }
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Complete(request) => self.waiting.push_back(*request),
            Command::Add(id, adapter) => drop(self.adapters.insert(id, Rc::new(adapter))),
            Command::Weigh { known, new, weight } => {
                if let Some(adapter) = self.adapters.get(&known) {
                    let adapter = Rc::new(adapter.weighing(weight));
                    self.adapters.insert(new, adapter);
                }
            }
            Command::Forget(id) => drop(self.adapters.remove(&id)),
            Command::Score { tokens, targets, adapter, answer } => {
                // Who asked may have gone.
                let _ = answer.send(self.score(&tokens, &targets, adapter));
            }
        }
    }

    fn score(&self, tokens: &[u32], targets: &[i64], adapter: Option<AdapterId>) -> Result<f64, Failure> {
        let adapter = match adapter {
            None => None,
            Some(id) => Some(self.adapters.get(&id).ok_or(Failure::AdapterGone)?),
        };
        let ids: Vec<i64> = tokens.iter().map(|token| i64::from(*token)).collect();
        catch_unwind(AssertUnwindSafe(|| {
            let row =
                |values: &[i64]| Tensor::from_slice(values).to_device(self.decoder.device()).unsqueeze(0);
            let adapter = adapter.map(|adapter| &**adapter);
            let sum = self.decoder.loss_sum(&row(&ids), &row(targets), adapter)?;
            Ok(sum.double_value(&[]))
        }))
        .unwrap_or_else(|panic| Err(Failure::Model(crate::rank::message_of(&*panic))))
    }

    /// Drops what nobody waits for, and what has taken too long.
    fn give_up(&mut self) {
        let now = Instant::now();
        let before = self.waiting.len();
        self.waiting.retain(|request| {
            let is_late = now >= request.deadline;
            if is_late {
                let _ = request.events.send(Event::Failed(Failure::TimedOut));
            }
            !is_late && !request.events.is_closed()
        });
        self.gauges.waiting.fetch_sub(before - self.waiting.len(), Ordering::AcqRel);
        for running in &mut self.running {
            running.give_up(now);
        }
        self.retire();
    }

    /// Begins what there is room for.
    fn admit(&mut self) {
        while self.running.len() < self.settings.max_batch {
            let Some(request) = self.waiting.front() else { break };
            let Some((context, known)) = self.contexts.take(request, &self.decoder) else { break };
            let Some(request) = self.waiting.pop_front() else { break };
            self.gauges.waiting.fetch_sub(1, Ordering::AcqRel);
            let adapter = request.adapter.and_then(|id| self.adapters.get(&id).cloned());
            let is_gone = request.adapter.is_some() && adapter.is_none();
            let running = Running::new(request, adapter, context, known);
            if is_gone {
                // It was removed while this waited.
                self.contexts.give_back(running.abandoned(Failure::AdapterGone));
                continue;
            }
            self.running.push(running);
        }
        self.gauges.running.store(self.running.len(), Ordering::Release);
    }

    /// Shows the model the next tokens, and takes what it makes of them.
    fn step(&mut self) {
        if self.running.is_empty() {
            return;
        }
        let Settings { prefill_tokens, speculate, batch_invariant, .. } = self.settings;
        let is_alone = self.running.len() == 1 && self.waiting.is_empty() && !batch_invariant;
        let mut budget = if is_alone { prefill_tokens.max(self.alone_tokens) } else { prefill_tokens };
        let began = Instant::now();
        for running in &mut self.running {
            running.prepare(&mut budget, prefill_tokens, speculate && !batch_invariant, batch_invariant);
        }
        let shown: usize = self.running.iter().map(Running::shown_tokens).sum();
        let (decoder, tokenizer) = (&self.decoder, &self.tokenizer);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            if batch_invariant {
                for running in &mut self.running {
                    let logits = compute(decoder, std::slice::from_mut(running));
                    running.take(&logits, tokenizer);
                }
                return;
            }
            let logits = compute(decoder, &mut self.running);
            let mut first = 0;
            for running in &mut self.running {
                let rows = running.rows();
                running.take(&logits.narrow(0, first, rows), tokenizer);
                first += rows;
            }
        }));
        if shown >= prefill_tokens {
            self.alone_tokens = (shown as f64 * ALONE_SECONDS / began.elapsed().as_secs_f64()) as usize;
        }
        if let Err(panic) = outcome {
            let cause = crate::rank::message_of(&*panic);
            tracing::error!(%cause, "the model failed; all completions under way are given up");
            for running in self.running.drain(..) {
                running.fail(Failure::Model(cause.clone()));
            }
            self.contexts.clear();
        }
    }

    /// Keeps the contexts of what is complete.
    fn retire(&mut self) {
        let (done, going): (Vec<_>, Vec<_>) = self.running.drain(..).partition(Running::is_done);
        self.running = going;
        for running in done {
            self.contexts.give_back(running.into_context());
        }
        self.gauges.running.store(self.running.len(), Ordering::Release);
        self.gauges.cached_tokens.store(self.contexts.tokens(), Ordering::Release);
    }
}

/// Logits of the rows that are wanted, in order, fp32 on the CPU.
fn compute(decoder: &Decoder, running: &mut [Running]) -> Tensor {
    let pieces = running.iter_mut().map(Running::piece);
    let mut pieces: Vec<Piece<'_>> = pieces.filter(|piece| !piece.tokens.is_empty()).collect();
    decoder.step(&mut pieces)
}
