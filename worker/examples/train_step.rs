//! Whole training steps of a random model, or of an adapter on one, one per line on stdin: our side of the
//! throughput comparison. Protocol and flags are those of `tests/bench/peer.py` and `peer_qlora.py`.
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use tunefleet_kernels::device::{cuda_memory, keep_freed_memory, set_deterministic};
use tunefleet_kernels::quant;
use tunefleet_proto::adapter::LoraConfig;
use tunefleet_proto::base_plan::{BasePlan, PartDtype, Quantization};
use tunefleet_proto::ids::{Attempt, JobId, Rank};
use tunefleet_proto::job::{Offload, Optimizer, Precision, Recompute, Residency, TrainSpec};
use tunefleet_proto::model::{Dropout, ModelConfig};
use tunefleet_proto::shard_plan::ShardPlan;
use tunefleet_worker::base::{Base, encode};
use tunefleet_worker::comm::simulated::Simulated;
use tunefleet_worker::comm::tcp::TcpListener;
use tunefleet_worker::comm::{Communicator, Mesh, Solo, Tag};
use tunefleet_worker::model::embed::TableGrad;
use tunefleet_worker::model::head;
use tunefleet_worker::model::numerics::Numerics;
use tunefleet_worker::train::adapter::{Frozen, Wiring};
use tunefleet_worker::train::optimizer;
use tunefleet_worker::train::rng::Seeds;
use tunefleet_worker::train::units;
use tunefleet_worker::train::walk::{Batch, MicroPosition, Walk, WalkOptions};

#[derive(Debug, Clone, Copy, ValueEnum)]
enum On {
    Cpu,
    Cuda,
}

#[derive(Debug, Parser)]
struct Args {
    #[arg(long, default_value = "bench")]
    preset: String,
    #[arg(long, default_value_t = 512)]
    sequence: i64,
    #[arg(long, default_value_t = 4)]
    batch: i64,
    #[arg(long)]
    layers: Option<u64>,
    #[arg(long)]
    recompute: bool,
    #[arg(long, default_value = "bf16", value_parser = tunefleet_worker::export::parse_dtype)]
    precision: Precision,
    #[arg(long, value_enum, default_value = "cpu")]
    device: On,
    #[arg(long, default_value_t = 1)]
    ranks: u32,
    #[arg(long)]
    threads: Option<usize>,
    /// Train an adapter on a base held like this: nf4-64-double, int8, plain; nf4 is short for the first.
    #[arg(long, value_parser = quantization)]
    base: Option<Quantization>,
    /// Rank of the adapter.
    #[arg(long, default_value_t = 32, requires = "base")]
    rank: u64,
    #[arg(long)]
    vocab: Option<u64>,
    /// Run rank 0 of so many alone: what one rank of a large job computes and holds.
    #[arg(long, conflicts_with = "ranks")]
    of: Option<u32>,
    /// Bytes per second between the ranks that `--of` plays; unlimited when absent.
    #[arg(long, requires = "of")]
    bus: Option<f64>,
    /// Do not wait for requests: run some steps, and print a row with the share of the device's matrix rate.
    #[arg(long)]
    utilisation: bool,
    /// Show where the time of a step goes as well.
    #[arg(long, requires = "utilisation")]
    profile: bool,
    /// Set by the parent process of several ranks.
    #[arg(long, hide = true)]
    as_rank: Option<u32>,
}

fn quantization(text: &str) -> Result<Quantization, String> {
    let name = if text == "nf4" { "nf4-64-double" } else { text };
    Quantization::from_name(name).ok_or_else(|| "expected nf4-64-double, int8, plain or the like".to_owned())
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let args = Args::parse();
    match args.as_rank {
        None if args.ranks > 1 => relay(&args),
        None => match args.of {
            None => steps(&args, &Solo),
            Some(world) => steps(&args, &Simulated::new(Rank { rank: 0, world }, args.bus)),
        },
        Some(rank) => {
            let listener = TcpListener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST))?;
            reply(&json!({ "address": listener.addr().to_string() }))?;
            let mut line = String::new();
            std::io::stdin().read_line(&mut line)?;
            let peers: Vec<SocketAddr> = serde_json::from_str(&line)?;
            let rank = Rank { rank, world: args.ranks };
            let deadline = Instant::now() + Duration::from_secs(60);
            let job = JobId("bench".to_owned());
            steps(&args, &listener.join(rank, &peers, &[1; 32], &job, Attempt(1), deadline)?)
        }
    }
}

/// Runs the steps that stdin asks for as one rank.
fn steps(args: &Args, comm: &dyn Communicator) -> Outcome<()> {
    let cores = std::thread::available_parallelism()?.get();
    tch::set_num_threads(args.threads.unwrap_or_else(|| (cores / args.ranks as usize).max(1)) as i32);
    let device = match args.device {
        On::Cpu => Device::Cpu,
        On::Cuda => Device::Cuda(0),
    };
    keep_freed_memory();
    set_deterministic(true)?;
    let config = shape(args)?;
    let rank = comm.rank();
    let numerics = Numerics::new(device, args.precision);
    tch::manual_seed(i64::from(rank.rank));
    let adapter = args.base.map(|base| adapter(args, &config, base, comm, numerics)).transpose()?;
    let plan = match &adapter {
        Some((plan, _)) => plan.clone(),
        None => ShardPlan::new(&config, rank.world),
    };
    let trained: u64 = plan.units.iter().flat_map(|unit| &unit.parameters).map(|slot| slot.elements()).sum();
    let parameters = config.parameter_count() + if adapter.is_some() { trained } else { 0 };
    let shards = units::shards(
        &plan,
        rank.rank,
        numerics,
        Optimizer::AdamW,
        Offload::None,
        if adapter.is_some() { Kind::Float } else { numerics.kind },
    )?;
    for shard in &shards {
        let _ = shard.master.shallow_clone().normal_(0.0, 0.02);
    }
    let spec = spec(args)?;
    let options = WalkOptions::of(&spec);
    let walk = Walk::new(config.clone(), plan, shards, numerics, Mesh::sharded(comm), Seeds::new(0), options);
    let mut walk = match adapter {
        Some((_, frozen)) => walk.over(frozen),
        None => walk,
    };
    if args.utilisation {
        return utilisation(args, &mut walk, &spec, &config, device);
    }
    reply(&json!({ "ready": true, "parameters": parameters, "rss_bytes": memory("VmRSS") }))?;

    for (index, line) in std::io::stdin().lines().enumerate() {
        if line?.trim() != "go" {
            return Err("unknown request, expected go".into());
        }
        let begin = Instant::now();
        let loss = one_step(&mut walk, &spec, index as u64 + 1, &random_batch(args, &config, device))?;
        let tokens = args.batch * args.sequence * i64::from(args.ranks);
        reply(&json!({
            "seconds": begin.elapsed().as_secs_f64(), "tokens": tokens, "loss": loss,
            "peak_rss_bytes": memory("VmHWM"),
            "peak_device_bytes": cuda_memory(0).ok().map(|m| m.allocated_peak),
        }))?;
    }
    Ok(())
}

fn random_batch(args: &Args, config: &ModelConfig, device: Device) -> Batch {
    let size = [args.batch, args.sequence];
    let tokens_bt = Tensor::randint(config.vocab_size as i64, size, (Kind::Int64, device));
    let targets_bt = tokens_bt.roll([-1], [1]);
    let _ = targets_bt.narrow(1, args.sequence - 1, 1).fill_(-100);
    Batch::new(tokens_bt, targets_bt)
}

/// Steps beside the rate of the device's matrix products at the model's own shapes: 6 floating-point operations
/// a weight and token, and attention's (Chowdhery et al. 2022); what is computed again does not count.
fn utilisation(
    args: &Args,
    walk: &mut Walk<'_>,
    spec: &TrainSpec,
    config: &ModelConfig,
    device: Device,
) -> Outcome<()> {
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let mut times = Vec::new();
    for step in 1..=7 {
        let batch = random_batch(args, config, device);
        let begin = Instant::now();
        // Reading the loss waits for the device.
        one_step(walk, spec, step, &batch)?;
        times.push(begin.elapsed().as_secs_f64());
    }
    times.drain(..2);
    let seconds = median(&mut times);

    let (tokens, width) = (args.batch * args.sequence, config.hidden_size as i64);
    let kind = walk.numerics().product_kind;
    let x = Tensor::randn([tokens, width], (Kind::Float, device)).to_kind(kind);
    let w = Tensor::randn([width, config.intermediate_size as i64], (Kind::Float, device)).to_kind(kind);
    let mut rates = Vec::new();
    for _ in 0..7 {
        let begin = Instant::now();
        for _ in 0..8 {
            let _ = x.mm(&w);
        }
        if device.is_cuda() {
            tch::Cuda::synchronize(0);
        }
        rates.push(begin.elapsed().as_secs_f64() / 8.0);
    }
    let product = 2.0 * (tokens * width) as f64 * config.intermediate_size as f64;
    let rate = product / median(&mut rates);

    // Looked up, not multiplied: positions, and the token embedding where the head is another.
    let layout = config.embed_layout();
    let mut lookups = if layout.positions.is_some() { config.max_positions * config.hidden_size } else { 0 };
    if !config.tied_head {
        lookups += config.vocab_size * config.hidden_size;
    }
    let linears = (config.parameter_count() - lookups) as f64;
    let attention = 12.0 * (config.layers * config.attention_width()) as f64 * args.sequence as f64;
    let flops = (6.0 * linears + attention) * tokens as f64;
    let peak = match device {
        Device::Cpu => memory("VmHWM").unwrap_or_default(),
        _ => cuda_memory(0)?.allocated_peak as u64,
    };
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "| {} x {} tokens{}{} | {:.0} | {:.2} | {:.2} | {:.1}% | {:.2} |",
        args.batch,
        args.sequence,
        if args.recompute { ", recompute" } else { "" },
        args.of.map_or_else(String::new, |world| format!(", rank 0 of {world}")),
        tokens as f64 / seconds,
        flops / seconds / 1e12,
        rate / 1e12,
        100.0 * flops / seconds / rate,
        peak as f64 / 1e9,
    )?;
    if args.profile {
        profile(args, walk, spec, config, device, seconds, &mut out)?;
    }
    Ok(out.flush()?)
}

/// Where the time of a step goes: parts that can be run by themselves are timed, and what is left is the
/// backward pass of the blocks, with what it computes again and what it waits for.
fn profile(
    args: &Args,
    walk: &mut Walk<'_>,
    spec: &TrainSpec,
    config: &ModelConfig,
    device: Device,
    step_seconds: f64,
    out: &mut impl Write,
) -> Outcome<()> {
    let median = |run: &mut dyn FnMut() -> Outcome<()>| -> Outcome<f64> {
        let mut times = Vec::new();
        for _ in 0..6 {
            let begin = Instant::now();
            run()?;
            if device.is_cuda() {
                tch::Cuda::synchronize(0);
            }
            times.push(begin.elapsed().as_secs_f64());
        }
        times.remove(0);
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
    };
    let batch = random_batch(args, config, device);
    let numerics = walk.numerics();
    let (width, vocab) = (config.hidden_size as i64, config.vocab_size as i64);
    let random =
        |size: [i64; 2]| Tensor::randn(size, (Kind::Float, device)).to_kind(numerics.product_kind) * 0.02;
    let (h_nd, weight_vd) = (random([args.batch * args.sequence, width]), random([vocab, width]));
    let targets_n = batch.targets_bt.reshape([-1]);
    let dweight_vd = TableGrad::Whole(Tensor::zeros([vocab, width], (Kind::Float, device)));
    let scale = Tensor::full([], 1e-3, (Kind::Float, device));
    let mut scratch = head::Scratch::default();
    let evaluate = median(&mut || {
        let _ = walk.evaluate(&batch)?;
        Ok(())
    })?;
    let loss = median(&mut || {
        let _ = tch::no_grad(|| head::loss_sum(numerics, &weight_vd, &h_nd, &targets_n))?;
        Ok(())
    })?;
    let with_grads = median(&mut || {
        let dweight_vd = args.base.is_none().then_some(&dweight_vd);
        let _ = tch::no_grad(|| {
            head::loss_sum_and_grads(
                numerics,
                &weight_vd,
                &h_nd,
                &targets_n,
                &scale,
                dweight_vd,
                &mut scratch,
            )
        })?;
        Ok(())
    })?;
    let one = Tensor::full([], 1.0, (Kind::Double, device));
    let mut step = 100;
    let update = median(&mut || {
        step += 1;
        optimizer::update(walk, spec, step, spec.learning_rate, &one, &one)?.read();
        Ok(())
    })?;
    let forward = (evaluate - loss).max(0.0);
    let rest = (step_seconds - forward - with_grads - update).max(0.0);
    writeln!(out, "\n| part of a step | ms | share |\n| --- | --- | --- |")?;
    for (what, seconds) in [
        ("forward pass of the blocks", forward),
        ("output embedding, loss and their gradients", with_grads),
        ("backward pass of the blocks, reduction", rest),
        ("norm, clipping, AdamW", update),
    ] {
        writeln!(out, "| {what} | {:.1} | {:.0}% |", 1e3 * seconds, 100.0 * seconds / step_seconds)?;
    }
    Ok(())
}

/// What an adapter on all four linears trains, over random weights that are made and quantised where they
/// stay, tensor by tensor.
fn adapter(
    args: &Args,
    config: &ModelConfig,
    base: Quantization,
    comm: &dyn Communicator,
    numerics: Numerics,
) -> Outcome<(ShardPlan, Frozen)> {
    let rank = comm.rank();
    if rank.world > 1 {
        return Err("--base is for one rank".into());
    }
    let lora = LoraConfig::from_peft_json(&format!(
        r#"{{"r": {}, "lora_alpha": {}, "target_modules": "all-linear"}}"#,
        args.rank,
        2 * args.rank
    ))?;
    let adapter = lora.plan(config)?;
    let plan = ShardPlan::of_adapter(&adapter, config, rank.world);
    let plain = if args.precision == Precision::Fp32 { PartDtype::F32 } else { PartDtype::Bf16 };
    let base_plan = BasePlan::new(config, base, plain);
    let code8 = quant::dynamic_code(true, numerics.device)?;
    let mut shards = Vec::new();
    for unit in &base_plan.units {
        let buffer = Tensor::zeros([unit.padded_bytes(1) as i64], (Kind::Uint8, numerics.device));
        for tensor in &unit.tensors {
            let shape: Vec<i64> = tensor.shape.iter().map(|&n| n as i64).collect();
            let values = Tensor::zeros(shape.as_slice(), (Kind::Float, numerics.device)).normal_(0.0, 0.02);
            encode::encode(tensor, base, &values, &code8, &buffer)?;
        }
        shards.push(buffer);
    }
    let recompute = if args.recompute { Recompute::All } else { Recompute::None };
    let residency = Residency::new(recompute, 0, 1, config.layers as usize);
    let base = Base::new(base_plan, shards, rank.world, numerics, &residency, false)?;
    let wiring = Wiring::new(&lora, &adapter, config, &plan, numerics.device);
    Ok((plan, Frozen { base, wiring }))
}

fn one_step(walk: &mut Walk<'_>, spec: &TrainSpec, step: u64, batch: &Batch) -> Outcome<f64> {
    let targets = batch.targets_bt.ne(-100).sum(Kind::Double);
    walk.mesh().world.all_reduce(&targets, Tag { unit: None, what: "target count" })?.wait()?;
    let scale = targets.reciprocal().to_kind(Kind::Float);
    walk.begin_step()?;
    let loss = walk.train_micro_batch(batch, MicroPosition { step, micro: 0, of: 1 }, &scale)?;
    walk.finish_step()?;
    Ok(optimizer::update(walk, spec, step, spec.learning_rate, &loss, &targets)?.read().loss)
}

/// Starts the ranks, and passes each request on to all of them; rank 0 answers.
fn relay(args: &Args) -> Outcome<()> {
    let program = std::env::current_exe()?;
    let mut ranks = Vec::new();
    for rank in 0..args.ranks {
        let mut child = Command::new(&program)
            .args(std::env::args().skip(1))
            .args(["--as-rank", &rank.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = BufReader::new(child.stdout.take().ok_or("no stdout")?);
        ranks.push((child, output));
    }
    let read = |output: &mut BufReader<_>| -> Outcome<Value> {
        let mut line = String::new();
        output.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    };
    let mut addresses = Vec::new();
    for (_, output) in &mut ranks {
        addresses.push(read(output)?["address"].clone());
    }
    let all = json!(addresses).to_string();
    let send = |child: &mut Child, text: &str| -> Outcome<()> {
        Ok(writeln!(child.stdin.as_mut().ok_or("no stdin")?, "{text}")?)
    };
    for (child, _) in &mut ranks {
        send(child, &all)?;
    }
    let mut answer = |request: Option<&str>| -> Outcome<()> {
        if let Some(request) = request {
            for (child, _) in &mut ranks {
                send(child, request)?;
            }
        }
        let answers: Vec<Value> = ranks.iter_mut().map(|(_, output)| read(output)).collect::<Outcome<_>>()?;
        reply(&answers[0])
    };
    answer(None)?;
    for line in std::io::stdin().lines() {
        answer(Some(&line?))?;
    }
    for (mut child, _) in ranks {
        drop(child.stdin.take());
        child.wait()?;
    }
    Ok(())
}

fn shape(args: &Args) -> Outcome<ModelConfig> {
    let none = Dropout::NONE;
    let mut config = match args.preset.as_str() {
        "bench" => ModelConfig {
            layers: 6,
            hidden_size: 384,
            heads: 6,
            intermediate_size: 1536,
            max_positions: 512,
            ..ModelConfig::preset("starcoderbase-1b")?
        },
        "qlora" => ModelConfig {
            vocab_size: 8192,
            layers: 8,
            hidden_size: 1024,
            heads: 16,
            intermediate_size: 4096,
            max_positions: 2048,
            ..ModelConfig::preset("starcoderbase-1b")?
        },
        "bench-llama" => ModelConfig {
            layers: 6,
            hidden_size: 384,
            heads: 6,
            kv_heads: 2,
            intermediate_size: 1024,
            max_positions: 512,
            ..ModelConfig::preset("decicoder-1b")?
        },
        name => ModelConfig::preset(name)?,
    };
    config.dropout = none;
    config.vocab_size = args.vocab.unwrap_or(config.vocab_size);
    config.layers = args.layers.unwrap_or(config.layers);
    config.max_positions = config.max_positions.max(args.sequence as u64);
    Ok(config)
}

fn spec(args: &Args) -> Outcome<TrainSpec> {
    let recompute = if args.recompute { "all" } else { "none" };
    let text = format!(
        "dataset: d\nmodel: {{path: m}}\ntrain: {{ranks: {}, precision: {}, micro_batch_sequences: {}, \
         accumulate_micro_batches: 1, learning_rate: 1e-4, schedule: constant, warmup_steps: 0, \
         weight_decay: 0.1, recompute: {recompute}}}\n",
        args.ranks,
        tunefleet_worker::export::dtype_name(args.precision),
        args.batch,
    );
    let root = std::path::Path::new("/");
    Ok(tunefleet_proto::job::load(&root.join("job.yaml"), &text, &[], root)?.train)
}

fn reply(value: &Value) -> Outcome<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}")?;
    Ok(out.flush()?)
}

/// A field of `/proc/self/status` in bytes.
fn memory(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}
