//! `worker serve`: completions for editors, over the routes that their extensions know.
//!
//! request -> tokens and rules (`server`) -> steps of many at once (`engine`) -> text, ended where a person would (`stop`)

/// Where a completion ends.
pub mod stop;
/// Steps of the model for many requests at once.
pub mod engine;
/// What a request asks for, in tokens.
pub mod server;
/// Routes.
pub mod http;
/// What Prometheus sees.
mod metrics;

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Parser as _;
use sha2::{Digest, Sha256};
use tch::Device;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tunefleet_kernels::device::keep_freed_memory;
use tunefleet_proto::base_plan::{QuantKind, Quantization};
use tunefleet_proto::job::{ChatLoss, JobSpec, MergeBase, Precision, ServeSpec};
use tunefleet_proto::service_manager;

use crate::chat::Chat;
use crate::data::tokenizer::{self, Tokenizer};
use crate::generate::decoder::{Decoder, LoadError};
use crate::generate::prompt::InfillOrder;
use crate::model::numerics::Numerics;
use engine::{Settings, StartError};
use http::Shared;
use server::Server;

/// How often a job's server looks whether the job is to stop.
const STOP_INTERVAL: Duration = Duration::from_millis(100);
/// Environment variable with a token that requests must bear.
const TOKEN_VARIABLE: &str = "TUNEFLEET_SERVE_TOKEN";

/// Command line of `worker serve`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// YAML file with these flags, e.g. `max_batch: 32`; the command line wins over it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A Hugging Face model directory.
    #[arg(long)]
    model: PathBuf,
    /// A `tokenizer.json`, or a directory that holds one; the model's own when absent.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// An adapter beside the model, `NAME=DIR` or `NAME=DIR@WEIGHT`; requests choose it by NAME.
    #[arg(long = "adapter", value_name = "NAME=DIR[@WEIGHT]", value_parser = parse_adapter)]
    adapters: Vec<(String, PathBuf, f64)>,
    /// Address to listen on; beyond this machine only with a token.
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Names by which requests may call the model; the directory's name when absent.
    #[arg(long = "name")]
    names: Vec<String>,
    /// A file with tokens, one in a line, of which requests must bear one.
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// Completions under way at once.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    max_batch: u16,
    /// Requests that wait for a place; more are told to come again.
    #[arg(long, default_value_t = 128)]
    max_queue: u16,
    /// Tokens of prompts that are computed in one step; a prompt that nobody waits behind has steps of up to a second.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    prefill_tokens: u32,
    /// Tokens of all contexts in memory; 16 full contexts when absent.
    #[arg(long)]
    cache_tokens: Option<usize>,
    /// Tokens of a completion where a request does not say.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    default_new_tokens: u32,
    /// Longest time for a completion, waiting included.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    timeout_seconds: u32,
    /// How a prompt with a hole is laid out; when absent spm where the model's family has learnt it, else psm.
    #[arg(long, value_enum)]
    infill_order: Option<InfillOrder>,
    /// Dtype of weights and activations; bf16 when absent, but fp32 on a CPU that does not multiply bf16.
    #[arg(long, value_parser = crate::export::parse_dtype)]
    dtype: Option<Precision>,
    /// Hold the linears of the blocks in 4 bits (nf4, fp4: blocks of 64, scales quantised as well) or 8 (int8, by rows).
    #[arg(long, value_name = "KIND", value_parser = parse_quantization)]
    quantize: Option<Quantization>,
    /// Compute every prompt whole, whatever was computed before.
    #[arg(long)]
    no_prefix_cache: bool,
    /// Guess no tokens from what stands in the prompt.
    #[arg(long)]
    no_speculation: bool,
    /// Make each completion as if it were alone, to the last bit. Slower.
    #[arg(long)]
    batch_invariant: bool,
    /// How chats are laid out where neither the model nor an adapter has a template beside it: prompter, octocoder,
    /// starchat or chatml.
    #[arg(long, value_name = "NAME")]
    chat_template: Option<String>,
    /// The adapter for requests that name none; the model itself when absent.
    #[arg(long, value_name = "NAME")]
    default_adapter: Option<String>,
    /// Where it computes; on the first GPU, where there is one, when absent.
    #[arg(skip)]
    device: Option<Device>,
}

/// `worker serve` with its defaults.
#[derive(clap::Parser)]
struct Defaults {
    #[command(flatten)]
    args: Args,
}

impl Args {
    /// What a job serves: the merged or trained model, or the base with the adapter beside it.
    fn of_job(spec: &JobSpec, serve: &ServeSpec, device: Device) -> Result<Self, Error> {
        let beside = spec.adapter.is_some() && spec.export.merge == MergeBase::None;
        let model = if beside { spec.model_dir() } else { spec.export_dir() };
        let flags = ["serve".into(), "--model".into(), model.into_os_string()];
        let defaults = Defaults::try_parse_from(flags).map_err(|error| Error::Setting(error.to_string()))?;
        let name = if beside { "base".to_owned() } else { spec.name.clone() };
        let quantize = Some(serve.quantization).filter(|of| of.kind != QuantKind::None);
        let adapters = beside.then(|| (spec.name.clone(), spec.adapter_dir(), 1.0));
        Ok(Args {
            config: None,
            // What is exported has its own beside it.
            tokenizer: beside.then(|| spec.tokenizer_dir()),
            adapters: adapters.into_iter().collect(),
            default_adapter: beside.then(|| spec.name.clone()),
            listen: serve.listen,
            names: vec![name],
            token_file: serve.token_file.clone(),
            max_batch: serve.max_batch,
            quantize,
            device: Some(device),
            ..defaults.args
        })
    }
}

/// What can keep a server from starting.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model's files, or the engine's thread.
    #[error(transparent)]
    Engine(#[from] StartError<LoadError>),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    /// An adapter.
    #[error(transparent)]
    Adapter(#[from] server::Error),
    /// The template of chats.
    #[error(transparent)]
    Chat(#[from] crate::chat::Error),
    /// A setting that breaks a rule.
    #[error("{0}")]
    Setting(String),
    /// A file of tokens.
    #[error("{path}: {source}", path = path.display())]
    Tokens {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The address.
    #[error("cannot listen on {address}: {source}; choose another with --listen")]
    Listen {
        /// What was asked for.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The system refused something.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Serves until SIGTERM or SIGINT; then completions under way are finished.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args) -> Result<(), Error> {
    serve(&args, async {
        let mut ends = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
        let [terminate, interrupt] = &mut ends;
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        Ok(())
    })
}

/// Serves what a job has made, until `is_over`; then completions under way are finished.
///
/// # Errors
/// See [`Error`].
pub fn run_job(spec: &JobSpec, device: Device, is_over: impl Fn() -> bool) -> Result<(), Error> {
    let Some(serve_spec) = &spec.serve else {
        return Err(Error::Setting("the job asks for no server".to_owned()));
    };
    serve(&Args::of_job(spec, serve_spec, device)?, async {
        while !is_over() {
            tokio::time::sleep(STOP_INTERVAL).await;
        }
        Ok(())
    })
}

/// What is wrong with these arguments, where that can be seen without a model.
///
/// # Errors
/// The first fault.
pub fn check(args: &Args) -> Result<(), Error> {
    if tokens(args)?.is_empty() && !args.listen.ip().is_loopback() {
        return Err(Error::Setting(format!(
            "--listen {} is open to other machines: give --token-file, or {TOKEN_VARIABLE}, so that not everybody may ask",
            args.listen
        )));
    }
    Ok(())
}

fn serve(args: &Args, ended: impl Future<Output = std::io::Result<()>>) -> Result<(), Error> {
    check(args)?;
    let tokens = tokens(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    // Before the model is read: a wrong address is told at once.
    let listener = runtime
        .block_on(TcpListener::bind(args.listen))
        .map_err(|source| Error::Listen { address: args.listen, source })?;
    // Each step takes and frees what the one before it did.
    keep_freed_memory();
    let server = load(args)?;
    let address = listener.local_addr()?;
    tracing::info!(%address, model = server.model_name, "serving");
    let (engine, model_name) = (server.engine.clone(), server.model_name.clone());
    let router = http::router(Shared { server: Arc::new(server), tokens: tokens.into() });
    runtime.block_on(async move {
        let watchdog = tokio::spawn(crate::watchdog::live());
        service_manager::ready(&format!("serves {model_name} on {address}"));
        let (end, told) = tokio::sync::oneshot::channel::<()>();
        let told = async move { drop(told.await) };
        let serving =
            tokio::spawn(async move { axum::serve(listener, router).with_graceful_shutdown(told).await });
        ended.await?;
        service_manager::stopping();
        tracing::info!("completions under way are finished, then the server ends");
        engine.end();
        drop(end);
        let served = serving.await.map_err(std::io::Error::other)?;
        watchdog.abort();
        served
    })?;
    Ok(())
}

/// Reads model, tokenizer and adapters, and starts the engine.
fn load(args: &Args) -> Result<Server, Error> {
    let place = args.tokenizer.as_ref().unwrap_or(&args.model);
    let tokenizer = Arc::new(Tokenizer::load(place)?);
    let device = args.device.unwrap_or_else(Device::cuda_if_available);
    let numerics = Numerics::new(device, args.dtype.unwrap_or_else(|| Numerics::fast_precision(device)));
    let (dir, quantization) = (args.model.clone(), args.quantize);
    let decoder = move || match quantization {
        None => Ok(Decoder::load(&dir, numerics)?),
        Some(quantization) => Decoder::load_quantized(&dir, quantization, numerics),
    };
    let settings = Settings {
        max_batch: args.max_batch.into(),
        max_queue: args.max_queue.into(),
        prefill_tokens: args.prefill_tokens as usize,
        cache_tokens: args.cache_tokens,
        prefix_cache: !args.no_prefix_cache,
        speculate: !args.no_speculation,
        batch_invariant: args.batch_invariant,
    };
    let (engine, config) = engine::start(decoder, tokenizer.clone(), settings)?;
    if let Some(misfit) = tokenizer.misfit(config.vocab_size) {
        return Err(Error::Setting(misfit));
    }
    let mut names = args.names.iter().cloned();
    let infill_order = args.infill_order.unwrap_or_else(|| InfillOrder::of(&tokenizer));
    let chat = match Chat::beside(place, &tokenizer, ChatLoss::All)? {
        Some(chat) => Some(chat),
        None => args.chat_template.as_ref().map(|name| Chat::built_in(name, &tokenizer)).transpose()?,
    };
    let server = Server {
        engine,
        chat: chat.map(Arc::new),
        tokenizer,
        config,
        numerics,
        model_name: names.next().unwrap_or_else(|| name_of(&args.model)),
        other_names: names.collect(),
        infill_order,
        timeout: Duration::from_secs(args.timeout_seconds.into()),
        default_new_tokens: args.default_new_tokens as usize,
        adapters: RwLock::new(BTreeMap::new()),
        default_adapter: args.default_adapter.clone(),
        started_unix: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
    };
    for (name, dir, weight) in &args.adapters {
        server.load_adapter(name, dir, *weight)?;
    }
    if let Some(name) = &args.default_adapter
        && !args.adapters.iter().any(|(known, ..)| known == name)
    {
        return Err(Error::Setting(format!(
            "--default-adapter {name} is none of the adapters: add --adapter {name}=DIR"
        )));
    }
    Ok(server)
}

/// Digests of the tokens that are given.
fn tokens(args: &Args) -> Result<Vec<[u8; 32]>, Error> {
    let mut tokens: Vec<String> = std::env::var(TOKEN_VARIABLE).into_iter().collect();
    if let Some(path) = &args.token_file {
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::Tokens { path: path.clone(), source })?;
        let before = tokens.len();
        tokens.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
        if tokens.len() == before {
            return Err(Error::Setting(format!(
                "{}: holds no token, write one in each line",
                path.display()
            )));
        }
    }
    Ok(tokens.iter().map(|token| Sha256::digest(token.as_bytes()).into()).collect())
}

fn name_of(dir: &Path) -> String {
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    whole.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// `nf4`, `fp4` or `int8`.
pub(crate) fn parse_quantization(text: &str) -> Result<Quantization, String> {
    let name = match text {
        "nf4" => "nf4-64-double",
        "fp4" => "fp4-64-double",
        other => other,
    };
    Quantization::from_name(name)
        .filter(|settings| settings.kind != QuantKind::None)
        .ok_or_else(|| format!("`{text}` is none of nf4, fp4 and int8"))
}

/// `NAME=DIR` or `NAME=DIR@WEIGHT`.
pub(crate) fn parse_adapter(text: &str) -> Result<(String, PathBuf, f64), String> {
    let (name, dir) = text
        .split_once('=')
        .filter(|(name, dir)| !name.is_empty() && !dir.is_empty())
        .ok_or_else(|| format!("`{text}` must look like NAME=DIR or NAME=DIR@WEIGHT"))?;
    match dir.rsplit_once('@') {
        Some((dir, weight)) if weight.parse::<f64>().is_ok_and(f64::is_finite) && !dir.is_empty() => {
            Ok((name.to_owned(), dir.into(), weight.parse().unwrap_or(1.0)))
        }
        _ => Ok((name.to_owned(), dir.into(), 1.0)),
    }
}
