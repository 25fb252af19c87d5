//! How many ranks there are, on what, and by which means the original kept them together.

use super::Original;
use crate::convert::job::Job;
use crate::convert::note::{Faults, Notes};
use crate::convert::settings::At;

/// By which means the original kept its processes together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Means {
    /// One process.
    Alone,
    /// Copies whose gradients are averaged.
    Replicas,
    /// PyTorch's FSDP.
    Fsdp,
    /// DeepSpeed's ZeRO.
    Zero,
}

/// The processes of the original.
#[derive(Debug)]
pub(super) struct Launcher {
    pub(super) means: Means,
    pub(super) ranks: u64,
    /// Where `means` was said.
    pub(super) said: At<()>,
}

pub(super) fn map(
    original: &mut Original,
    job: &mut Job,
    notes: &mut Notes,
    faults: &mut Faults,
) -> Launcher {
    let processes = original.config.take::<u64>("num_processes");
    let (means, said) = means(original, processes.as_ref(), faults);
    let ranks = ranks(processes, original.launched_bare, means, &said, notes);
    job.set("train.ranks", &ranks);
    device(original, job);
    if let Some(threads) = original.launch.take::<u64>("--num_cpu_threads_per_process") {
        job.set("workers.threads_per_rank", &threads);
    }
    Launcher { means, ranks: ranks.value, said }
}

fn means(original: &mut Original, processes: Option<&At<u64>>, faults: &mut Faults) -> (Means, At<()>) {
    let told = original.config.take::<&'static str>("distributed_type");
    for (switch, means) in
        [("--use_fsdp", Means::Fsdp), ("--use_deepspeed", Means::Zero), ("--multi_gpu", Means::Replicas)]
    {
        let switch = original.launch.switch(switch);
        if switch.value {
            return (means, switch.map(|_| ()));
        }
    }
    let Some(told) = told else {
        let several = processes.is_some_and(|processes| processes.value > 1);
        let (means, written) = match (original.has_deepspeed, original.launched_bare && several) {
            (true, _) => (Means::Zero, "a DeepSpeed config"),
            (false, true) => (Means::Replicas, "accelerate launch"),
            (false, false) => (Means::Alone, "one process: nothing says more"),
        };
        return (means, At { value: (), place: String::new(), written: written.to_owned() });
    };
    let means = match told.value {
        "NO" => Means::Alone,
        "FSDP" => Means::Fsdp,
        "DEEPSPEED" => Means::Zero,
        "MEGATRON_LM" | "MODEL_PARALLEL" => {
            let rule = "splits layers and products over processes, which no key of a job file says: write a job file \
                        with coordinator init";
            faults.report(&told.place, format!("{} {rule}", told.written));
            Means::Alone
        }
        _ => Means::Replicas,
    };
    (means, told.map(|_| ()))
}

fn ranks(given: Option<At<u64>>, bare: bool, means: Means, said: &At<()>, notes: &mut Notes) -> At<u64> {
    match (given, means) {
        (Some(given), Means::Alone) if given.value > 1 => {
            let text = format!("{said} starts one process: train.ranks is 1");
            notes.contradiction(&given.place, &given.written, &text);
            At { value: 1, ..given }
        }
        (Some(given), Means::Alone) => {
            At { written: format!("{}, {}", said.written, given.written), ..given }
        }
        (Some(given), _) => given,
        (None, Means::Alone) if !bare => At { value: 1, place: String::new(), written: said.written.clone() },
        (None, _) => {
            notes.differs(
                "",
                "num_processes is not given",
                "accelerate takes every GPU: train.ranks is 1, set it",
            );
            At { value: 1, place: String::new(), written: "num_processes is not given: set it".to_owned() }
        }
    }
}

fn device(original: &mut Original, job: &mut Job) {
    let switch = original.launch.switch("--cpu");
    let config = original.config.take::<bool>("use_cpu");
    match config {
        _ if switch.value => job.set_from("train.device", "cpu", &switch.written),
        Some(config) if config.value => job.set_from("train.device", "cpu", &config.written),
        Some(config) => job.set_from("train.device", "auto", &config.written),
        None => {}
    }
}
