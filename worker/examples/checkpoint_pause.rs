//! How long training stands still for a checkpoint: written before it goes on, and behind its back.
//!
//! One rank, a state of fp32 weights and moments; prints a Markdown row for each way, with medians.
#![forbid(unsafe_code)]

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use tch::Device;
use tunefleet_proto::checkpoint::DataPosition;
use tunefleet_proto::job::{Offload, Optimizer, Precision};
use tunefleet_proto::model::ModelConfig;
use tunefleet_proto::shard_plan::ShardPlan;
use tunefleet_worker::checkpoint::save::{Saver, Settings, State};
use tunefleet_worker::comm::{Mesh, Solo};
use tunefleet_worker::model::numerics::Numerics;
use tunefleet_worker::train::units;

#[derive(Debug, Parser)]
struct Args {
    /// Where checkpoints go; a temporary directory beside the program when absent.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Blocks of width 1,024: each has a state of 150 MB.
    #[arg(long, default_value_t = 8)]
    layers: u64,
    /// Checkpoints of each kind.
    #[arg(long, default_value_t = 5)]
    saves: u64,
    /// Keep the state on a GPU.
    #[arg(long)]
    cuda: bool,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let config = ModelConfig {
        vocab_size: 8192,
        layers: args.layers,
        hidden_size: 1024,
        heads: 16,
        intermediate_size: 4096,
        max_positions: 2048,
        ..ModelConfig::preset("starcoderbase-1b")?
    };
    let device = if args.cuda { Device::Cuda(0) } else { Device::Cpu };
    let plan = ShardPlan::new(&config, 1);
    let numerics = Numerics::new(device, Precision::Bf16);
    let shards = units::shards(&plan, 0, numerics, Optimizer::AdamW, Offload::None, numerics.kind)?;
    for shard in &shards {
        let _ = shard.master.shallow_clone().normal_(0.0, 0.02);
    }
    let bytes = 12 * plan.shard_elements();
    let temporary = tempfile::tempdir_in(std::env::current_exe()?.parent().ok_or("no directory")?)?;
    let dir = args.dir.unwrap_or_else(|| temporary.path().to_owned());
    let mesh = Mesh { world: &Solo, shards: &Solo, replicas: None };
    let mut medians = Vec::new();
    for asynchronous in [false, true] {
        let settings = Settings { dir: dir.clone(), keep: 1, keep_best: false, asynchronous, fence: None };
        let mut saver = Saver::new(settings);
        let (mut pauses, mut wholes) = (Vec::new(), Vec::new());
        // The first one takes memory that the others find.
        for step in 0..=args.saves {
            let data =
                DataPosition { dataset_digest: String::new(), tokenizer_digest: String::new(), sequences: 0 };
            let state =
                State { step, seed: 0, data, loss: 0.0, validation: None, finished: false, adapter: None };
            let began = Instant::now();
            saver.start(&plan, &shards, state, mesh, device)?;
            if !asynchronous {
                saver.finish(mesh, device, step)?;
            }
            pauses.push(began.elapsed().as_secs_f64());
            saver.finish(mesh, device, step)?;
            wholes.push(began.elapsed().as_secs_f64());
        }
        let median = |times: &mut Vec<f64>| {
            times.remove(0);
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        };
        medians.push([median(&mut pauses), median(&mut wholes)]);
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "| checkpoint of {:.2} GB | pause, s | until it is on the disk, s |", bytes as f64 / 1e9)?;
    writeln!(out, "| --- | --- | --- |")?;
    for (name, [pause, whole]) in
        ["written before training goes on", "written meanwhile"].iter().zip(&medians)
    {
        writeln!(out, "| {name} | {pause:.3} | {whole:.3} |")?;
    }
    writeln!(
        out,
        "\npause: {:.1}% of that of a checkpoint that is waited for",
        100.0 * medians[1][0] / medians[0][0]
    )?;
    Ok(())
}
