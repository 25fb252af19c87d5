//! Quantises or dequantises one 4096 x 4096 bf16 weight per line on stdin: our side of the comparison with
//! bitsandbytes' kernels. Protocol and flags are those of `tests/bench/peer_quant.py`.
#![forbid(unsafe_code)]

use std::io::Write;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use serde_json::{Value, json};
use tch::{Cuda, Device, Kind, Tensor};
use tunefleet_kernels::device::{cuda_memory, keep_freed_memory};
use tunefleet_kernels::quant::{self, Code4, FourBit, Nested};

const SIDE: i64 = 4096;
const BLOCK: i64 = 64;

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Mode {
    Quantize,
    Dequantize,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum On {
    Cpu,
    Cuda,
}

#[derive(Debug, Parser)]
struct Args {
    #[arg(long, value_enum, default_value = "dequantize")]
    mode: Mode,
    #[arg(long, value_enum, default_value = "cpu")]
    device: On,
    #[arg(long)]
    threads: Option<usize>,
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let args = Args::parse();
    let cores = std::thread::available_parallelism()?.get();
    tch::set_num_threads(args.threads.unwrap_or(cores) as i32);
    let device = match args.device {
        On::Cpu => Device::Cpu,
        On::Cuda => Device::Cuda(0),
    };
    keep_freed_memory();
    tch::manual_seed(0);
    let zeros = |len: i64, kind| Tensor::zeros([len], (kind, device));
    let len = SIDE * SIDE;
    let weight = zeros(len, Kind::BFloat16).normal_(0.0, 0.02);
    let blocks = quant::blocks(len, BLOCK);
    let (codes, absmax) = (zeros(len / 2, Kind::Uint8), zeros(quant::blocks(blocks, 256), Kind::Float));
    let (absmax8, offset) = (zeros(blocks, Kind::Uint8), zeros(1, Kind::Float));
    let code8 = quant::dynamic_code(true, device)?;
    let nested = Some(Nested { codes: &absmax8, code8: &code8, offset: &offset });
    let parts = FourBit { code: Code4::Nf4, block: BLOCK, codes: &codes, absmax: &absmax, nested };
    quant::quantize_4bit(&weight, &parts)?;
    // As in training: into a scratch that is there.
    let out = zeros(len, Kind::BFloat16);
    reply(&json!({ "ready": true, "parameters": len, "rss_bytes": memory("VmRSS") }))?;
    for line in std::io::stdin().lines() {
        if line?.trim() != "go" {
            return Err("unknown request, expected go".into());
        }
        let begin = Instant::now();
        match args.mode {
            Mode::Quantize => quant::quantize_4bit(&weight, &parts)?,
            Mode::Dequantize => quant::dequantize_4bit(&parts, &out)?,
        }
        if device != Device::Cpu {
            Cuda::synchronize(0);
        }
        reply(&json!({
            "seconds": begin.elapsed().as_secs_f64(), "tokens": len, "loss": 0.0,
            "peak_rss_bytes": memory("VmHWM"),
            "peak_device_bytes": cuda_memory(0).ok().map(|m| m.allocated_peak),
        }))?;
    }
    Ok(())
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
