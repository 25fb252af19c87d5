//! `worker chat`: a conversation in the terminal, answered as it is made.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tch::Device;
use tokio::sync::mpsc::unbounded_channel;
use tunefleet_kernels::device::keep_freed_memory;
use tunefleet_proto::base_plan::Quantization;
use tunefleet_proto::chat::{Conversation, Fault, Last, Message, Role};
use tunefleet_proto::job::{ChatLoss, Precision};

use super::Chat;
use crate::data::tokenizer::{self, TOKENIZER_FILE, Tokenizer};
use crate::generate::adapters::Adapter;
use crate::generate::decoder::{Decoder, LoadError};
use crate::generate::sampling::Sampling;
use crate::model::numerics::Numerics;
use crate::serve::engine::request::{Event, Failure, Request};
use crate::serve::engine::{self, AdapterId, Handle, Refused, Settings, StartError};
use crate::serve::parse_quantization;
use crate::serve::stop::Rules;

/// Tokens of a prompt in one step.
const PREFILL_TOKENS: usize = 512;
/// No answer takes so long.
const PATIENCE: Duration = Duration::from_secs(3600);
/// Opens and closes a turn of several lines.
const BLOCK: &str = "\"\"\"";
const HELP: &str = "A line is a turn; a turn of several lines stands between lines of \"\"\". /reset forgets what was \
                    said, /exit or the end of input ends.";

/// Command line of `worker chat`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  worker chat --model starcoderplus --adapter runs/assistant/adapter\n  \
                        echo 'How do I open a file?' | worker chat --model starcoderplus-chat")]
pub struct Args {
    /// A Hugging Face model directory.
    #[arg(long)]
    model: PathBuf,
    /// An adapter beside it.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// A `tokenizer.json`, or a directory that holds one; the adapter's or the model's own when absent.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// How turns are laid out: a name (prompter, octocoder, starchat, chatml) or a directory with a chat template; the
    /// adapter's or the model's own when absent.
    #[arg(long)]
    template: Option<String>,
    /// What the system says.
    #[arg(long)]
    system: Option<String>,
    /// Tokens of an answer at most.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    /// 0 always takes the likeliest token.
    #[arg(long, default_value_t = 0.2)]
    temperature: f64,
    /// Draw from the smallest set of tokens with at least this probability.
    #[arg(long, default_value_t = 0.95)]
    top_p: f64,
    /// Tokens that were there already are made less likely by this factor.
    #[arg(long, default_value_t = 1.1)]
    repetition_penalty: f64,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Dtype of weights and activations; bf16 when absent, but fp32 on a CPU that does not multiply bf16.
    #[arg(long, value_parser = crate::export::parse_dtype)]
    dtype: Option<Precision>,
    /// Hold the linears of the blocks in 4 bits (nf4, fp4) or 8 (int8).
    #[arg(long, value_name = "KIND", value_parser = parse_quantization)]
    quantize: Option<Quantization>,
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model.
    #[error(transparent)]
    Engine(#[from] StartError<LoadError>),
    /// The adapter.
    #[error(transparent)]
    Adapter(#[from] crate::adapter::Error),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    /// The template, or a turn.
    #[error(transparent)]
    Chat(#[from] super::Error),
    /// The engine takes no more.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The engine gave up.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// The terminal.
    #[error("reading turns: {0}")]
    Input(#[from] io::Error),
    /// A setting that breaks a rule.
    #[error("{0}")]
    Setting(String),
}

/// Runs the verb: answers on stdout, everything else on stderr.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args) -> Result<(), Error> {
    let rules = [
        (!(args.temperature >= 0.0 && args.temperature.is_finite()), "--temperature must be 0 or more"),
        (!(args.top_p > 0.0 && args.top_p <= 1.0), "--top-p must be above 0 and at most 1"),
        (
            !(args.repetition_penalty > 0.0 && args.repetition_penalty.is_finite()),
            "--repetition-penalty must be above 0",
        ),
    ];
    if let Some((_, rule)) = rules.into_iter().find(|(is_broken, _)| *is_broken) {
        return Err(Error::Setting(rule.to_owned()));
    }
    let mut talk = Talk::load(&args)?;
    let is_terminal = io::stdin().is_terminal();
    if is_terminal {
        eprintln!("{HELP}");
    }
    let mut lines = io::stdin().lock().lines();
    while let Some(turn) = next_turn(&mut lines, is_terminal)? {
        match turn.trim() {
            "" => {}
            "/exit" => break,
            "/reset" => talk.messages.clear(),
            _ => talk.answer(turn, &args)?,
        }
    }
    Ok(())
}

/// A conversation under way.
struct Talk {
    chat: Chat,
    tokenizer: Arc<Tokenizer>,
    engine: Handle,
    adapter: Option<AdapterId>,
    max_positions: usize,
    messages: Vec<Message>,
}

impl Talk {
    fn load(args: &Args) -> Result<Self, Error> {
        keep_freed_memory();
        let with_own = |dir: &&PathBuf| dir.join(TOKENIZER_FILE).exists();
        let tokenizer_dir = args.tokenizer.as_ref();
        let own = || args.adapter.as_ref().filter(with_own);
        let tokenizer_dir = tokenizer_dir.or_else(own).unwrap_or(&args.model);
        let tokenizer = Arc::new(Tokenizer::load(tokenizer_dir)?);
        let chat = match &args.template {
            Some(name) if Path::new(name).is_dir() => {
                Chat::beside(Path::new(name), &tokenizer, ChatLoss::All)?
            }
            Some(name) => Some(Chat::built_in(name, &tokenizer)?),
            None => match &args.adapter {
                Some(dir) => Chat::beside(dir, &tokenizer, ChatLoss::All)?,
                None => None,
            },
        };
        let chat = match chat {
            Some(chat) => chat,
            None => Chat::of_tokenizer(&args.model, &tokenizer, ChatLoss::All)?,
        };
        let device = Device::cuda_if_available();
        let numerics = Numerics::new(device, args.dtype.unwrap_or_else(|| Numerics::fast_precision(device)));
        let (dir, quantization) = (args.model.clone(), args.quantize);
        let decoder = move || match quantization {
            None => Ok(Decoder::load(&dir, numerics)?),
            Some(quantization) => Decoder::load_quantized(&dir, quantization, numerics),
        };
        let settings = Settings {
            max_batch: 1,
            max_queue: 1,
            prefill_tokens: PREFILL_TOKENS,
            cache_tokens: None,
            prefix_cache: true,
            speculate: true,
            batch_invariant: false,
        };
        let (engine, config) = engine::start(decoder, tokenizer.clone(), settings)?;
        if let Some(misfit) = tokenizer.misfit(config.vocab_size) {
            return Err(Error::Setting(misfit));
        }
        let adapter = match &args.adapter {
            Some(dir) => Some(engine.add(Adapter::load(dir, 1.0, &config, numerics)?)?),
            None => None,
        };
        let max_positions = usize::try_from(config.max_positions).unwrap_or(usize::MAX);
        Ok(Talk { chat, tokenizer, engine, adapter, max_positions, messages: Vec::new() })
    }

    /// Asks, and shows the answer while it is made. A question that has no room is told, and not kept.
    fn answer(&mut self, turn: String, args: &Args) -> Result<(), Error> {
        self.messages.push(Message::new(Role::User, turn));
        let prompt = match self.prompt(args) {
            Ok(prompt) => prompt,
            Err(Error::Setting(problem)) => {
                eprintln!("error: {problem}");
                self.messages.pop();
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let (sender, mut events) = unbounded_channel();
        self.engine.submit(Request {
            prompt,
            max_new_tokens: args.max_new_tokens as usize,
            sampling: Sampling {
                temperature: args.temperature,
                top_p: args.top_p,
                repetition_penalty: args.repetition_penalty,
                seed: args.seed,
                ..Sampling::default()
            },
            rules: Rules::strings(Vec::new()),
            keeps_stop: false,
            end_tokens: self.chat.ends().to_vec(),
            adapter: self.adapter,
            top: None,
            asked: Instant::now(),
            deadline: Instant::now() + PATIENCE,
            events: sender,
        })?;
        let mut answer = String::new();
        loop {
            match events.blocking_recv() {
                Some(Event::Made(tokens)) => {
                    let begins = answer.trim_start().is_empty();
                    let made: String = tokens.iter().map(|token| token.text.as_str()).collect();
                    answer.push_str(&made);
                    show(if begins { made.trim_start() } else { &made });
                }
                Some(Event::Ended(_)) => break,
                Some(Event::Failed(failure)) => return Err(failure.into()),
                None => return Err(Failure::Ending.into()),
            }
        }
        show("\n");
        match answer.trim() {
            // A turn that says nothing cannot be laid out again.
            "" => drop(self.messages.pop()),
            answer => self.messages.push(Message::new(Role::Assistant, answer)),
        }
        Ok(())
    }

    /// Tokens of what was said so far. Where there is no room, the oldest questions go, and that is said.
    fn prompt(&mut self, args: &Args) -> Result<Vec<u32>, Error> {
        let most = self.max_positions.saturating_sub(args.max_new_tokens as usize);
        loop {
            let fault = |fault: Fault| Error::Setting(fault.to_string());
            let conversation = Conversation::new(self.messages.clone(), Last::Question).map_err(fault)?;
            let with_system = conversation.clone().or_system(args.system.as_deref());
            let prompt = self.chat.prompt(&with_system, &self.tokenizer)?;
            let tokens = prompt.len();
            if tokens <= most {
                return Ok(prompt);
            }
            let Some(shorter) = conversation.without_oldest() else {
                return Err(Error::Setting(format!(
                    "the question has {tokens} tokens, and there is room for {most} beside an answer of {}: ask less, or \
                     lower --max-new-tokens",
                    args.max_new_tokens
                )));
            };
            eprintln!(
                "(the oldest question and its answer are left out: {tokens} tokens, there is room for {most})"
            );
            self.messages = shorter.messages().to_vec();
        }
    }
}

/// A reader that has gone away wants no more.
fn show(text: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// The next turn; `None` at the end.
fn next_turn(
    lines: &mut impl Iterator<Item = io::Result<String>>,
    is_terminal: bool,
) -> io::Result<Option<String>> {
    if is_terminal {
        eprint!("> ");
    }
    let Some(line) = lines.next().transpose()? else { return Ok(None) };
    if line.trim() != BLOCK {
        return Ok(Some(line));
    }
    let mut turn = Vec::new();
    for line in lines {
        let line = line?;
        if line.trim() == BLOCK {
            break;
        }
        turn.push(line);
    }
    Ok(Some(turn.join("\n")))
}
