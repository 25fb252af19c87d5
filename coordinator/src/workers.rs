//! The verbs about the workers of a coordinator: `workers`, `drain`, `undrain`.

use std::io::Write;
use std::process::ExitCode;

use serde_json::{Value, json};
use tunefleet_proto::rpc::{DrainRequest, ListWorkersRequest, UndrainRequest, WorkerStatus};

use crate::connect::{self, Connect, Failure};

/// Command line of `coordinator workers`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    #[command(flatten)]
    connect: Connect,
    /// One JSON document instead of a table.
    #[arg(long)]
    json: bool,
}

/// Command line of `coordinator drain`.
#[derive(Debug, clap::Args)]
pub struct DrainArgs {
    /// Name of the worker.
    worker: String,
    #[command(flatten)]
    connect: Connect,
    /// Jobs with ranks there save a checkpoint, stop, and go on elsewhere; else their ranks go on to their end.
    #[arg(long)]
    preempt: bool,
}

/// Command line of `coordinator undrain`.
#[derive(Debug, clap::Args)]
pub struct UndrainArgs {
    /// Name of the worker.
    worker: String,
    #[command(flatten)]
    connect: Connect,
}

/// Runs `coordinator workers`.
pub fn list(args: ListArgs) -> ExitCode {
    connect::block_on(async {
        let workers =
            args.connect.client().await?.list_workers(ListWorkersRequest {}).await?.into_inner().workers;
        if args.json {
            let all = Value::from_iter(workers.iter().map(to_json));
            // A reader that has gone away wants no more.
            let _ = writeln!(std::io::stdout(), "{all:#}");
            return Ok(0);
        }
        table(&workers)
    })
}

/// Runs `coordinator drain`.
pub fn drain(args: DrainArgs) -> ExitCode {
    connect::block_on(async {
        let request = DrainRequest { worker: args.worker, preempt: args.preempt };
        let worker = args.connect.client().await?.drain(request).await?.into_inner();
        table(&[worker])
    })
}

/// Runs `coordinator undrain`.
pub fn undrain(args: UndrainArgs) -> ExitCode {
    connect::block_on(async {
        let request = UndrainRequest { worker: args.worker };
        let worker = args.connect.client().await?.undrain(request).await?.into_inner();
        table(&[worker])
    })
}

fn jobs_of(worker: &WorkerStatus) -> Vec<String> {
    worker.tasks.iter().map(|task| format!("{} a{}", task.job, task.attempt)).collect()
}

fn to_json(worker: &WorkerStatus) -> Value {
    let registered = worker.registered.clone().unwrap_or_default();
    json!({
        "worker": worker.name,
        "state": worker.state().name(),
        "slots": registered.slots,
        "used_slots": worker.used_slots,
        "gpus": registered.gpus,
        "devices": registered.devices.iter().map(|gpu| json!({
            "index": gpu.index, "uuid": gpu.uuid, "name": gpu.name, "memory_bytes": gpu.memory_bytes,
        })).collect::<Vec<_>>(),
        "cores": registered.cores,
        "memory_bytes": registered.memory_bytes,
        "address": registered.advertise_address,
        "version": registered.version,
        "metrics": registered.metrics_url,
        "silent_seconds": worker.silent_ms as f64 / 1000.0,
        "tasks": worker.tasks.iter().map(|task| json!({
            "job": task.job, "attempt": task.attempt, "stage": task.stage().name(),
        })).collect::<Vec<_>>(),
        "detail": worker.detail,
    })
}

fn table(workers: &[WorkerStatus]) -> Result<u8, Failure> {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(
        out,
        "{:<24} {:<9} {:>7} {:>4} {:>7} {:<16} {:<24} DETAIL",
        "WORKER", "STATE", "SLOTS", "GPUS", "HEARD", "ADDRESS", "RUNS"
    );
    for worker in workers {
        let registered = worker.registered.clone().unwrap_or_default();
        let _ = writeln!(
            out,
            "{:<24} {:<9} {:>7} {:>4} {:>7} {:<16} {:<24} {}",
            worker.name,
            worker.state().name(),
            format!("{}/{}", worker.used_slots, registered.slots),
            registered.gpus,
            format!("{:.0} s", worker.silent_ms as f64 / 1000.0),
            registered.advertise_address,
            jobs_of(worker).join(", "),
            worker.detail
        );
    }
    Ok(0)
}
