//! Who holds what: FSDP's and ZeRO's settings to `train.strategy`, `train.offload` and their kin.

use super::launcher::{Launcher, Means};
use super::{Original, settle};
use crate::convert::job::Job;
use crate::convert::note::{Faults, Notes};
use crate::convert::settings::{At, Settings};

pub(super) fn map(
    original: &mut Original,
    launcher: &Launcher,
    job: &mut Job,
    notes: &mut Notes,
    faults: &mut Faults,
) {
    let machines = machines(original, notes);
    match launcher.means {
        Means::Alone => {}
        Means::Replicas => job.set_from("train.strategy", "no_shard", &launcher.said.written),
        Means::Fsdp => fsdp(original, launcher, machines, job, notes, faults),
        Means::Zero => zero(original, launcher, job, notes, faults),
    }
}

/// How many machines there are, where that is said.
fn machines(original: &mut Original, notes: &mut Notes) -> Option<At<u64>> {
    let machines = original.config.take::<u64>("num_machines")?;
    match machines.value {
        1 => notes.ignored(&machines.place, &machines.written, "ranks go where workers have slots"),
        _ => notes.differs(
            &machines.place,
            &machines.written,
            "start coordinator serve, and a worker daemon on each machine, and give workers.coordinator",
        ),
    }
    Some(machines)
}

fn fsdp(
    original: &mut Original,
    launcher: &Launcher,
    machines: Option<At<u64>>,
    job: &mut Job,
    notes: &mut Notes,
    faults: &mut Faults,
) {
    let strategy = fsdp_strategy(original, notes);
    if let Some(mesh) = mesh(original, launcher, notes, faults) {
        mesh.set(launcher, job);
    } else {
        let strategy = match strategy.value {
            "SHARD_GRAD_OP" | "false" => Strategy::of("shard_grad_op", &strategy),
            "NO_SHARD" => Strategy::of("no_shard", &strategy),
            "HYBRID_SHARD" | "HYBRID_SHARD_ZERO2" => hybrid(&strategy, launcher, machines, notes, faults),
            _ => Strategy::of("full_shard", &strategy),
        };
        strategy.set(launcher, job);
    }
    prefetch(original, job, notes);
    let config = &mut original.config;
    let offload = config.take::<bool>("fsdp_config.fsdp_offload_params");
    let older = config.take::<bool>("fsdp_config.fsdp_cpu_offload");
    if let Some(offload) = settle(offload, older, notes) {
        job.set("train.offload", &offload.map(|offload| if offload { "all" } else { "none" }));
    }
}

/// A value of `train.strategy`, with the size of its groups where it has any.
struct Strategy {
    word: &'static str,
    written: String,
    group: Option<At<u64>>,
}

impl Strategy {
    fn of(word: &'static str, from: &At<&'static str>) -> Self {
        Strategy { word, written: from.written.clone(), group: None }
    }

    fn set(self, launcher: &Launcher, job: &mut Job) {
        let written = format!("{}, {}", launcher.said.written, self.written);
        job.set_from("train.strategy", self.word, &written);
        if let Some(group) = self.group {
            job.set("train.shard_ranks", &group);
        }
    }
}

/// What says the strategy: version 2 reads another key than version 1.
fn fsdp_strategy(original: &mut Original, notes: &mut Notes) -> At<&'static str> {
    let config = &mut original.config;
    let version = config.take::<u64>("fsdp_config.fsdp_version");
    let strategy = if version.as_ref().is_some_and(|version| version.value == 2) {
        config.take_or("fsdp_config.fsdp_reshard_after_forward", "accelerate", "true")
    } else if let Some(strategy) = config.take("fsdp_config.fsdp_sharding_strategy") {
        strategy
    } else {
        // `accelerate config` writes this key for version 1 too, whose plugin then does not read it.
        let reshard = config.take_or("fsdp_config.fsdp_reshard_after_forward", "accelerate", "FULL_SHARD");
        if !matches!(reshard.value, "FULL_SHARD" | "true") {
            let text =
                "taken as it was meant; accelerate does not read it with fsdp_version 1, and shards fully";
            notes.differs(&reshard.place, &reshard.written, text);
        }
        reshard
    };
    match version {
        Some(version) => At { written: format!("{}, {}", version.written, strategy.written), ..strategy },
        None => strategy,
    }
}

/// Shards within a machine, copies between machines.
fn hybrid(
    strategy: &At<&'static str>,
    launcher: &Launcher,
    machines: Option<At<u64>>,
    notes: &mut Notes,
    faults: &mut Faults,
) -> Strategy {
    if strategy.value == "HYBRID_SHARD_ZERO2" {
        let text =
            "blocks are gathered again in the backward pass: more traffic within a machine, less memory";
        notes.differs(&strategy.place, &strategy.written, text);
    }
    let machines = machines.unwrap_or_else(|| At::default_of("accelerate", 1));
    if machines.value <= 1 {
        return Strategy::of("full_shard", strategy);
    }
    if !launcher.ranks.is_multiple_of(machines.value) {
        let message = format!("{} must divide num_processes ({})", machines.written, launcher.ranks);
        faults.report(&machines.place, message);
    }
    let group = machines.map(|machines| (launcher.ranks / machines).max(1));
    Strategy { group: Some(group), ..Strategy::of("hybrid_shard", strategy) }
}

/// FSDP2's mesh of replicas and shards, where it says more than the strategy.
fn mesh(
    original: &mut Original,
    launcher: &Launcher,
    notes: &mut Notes,
    faults: &mut Faults,
) -> Option<Strategy> {
    let config = &mut original.config;
    for name in ["tp", "cp", "sp"] {
        let key = format!("parallelism_config.parallelism_config_{name}_size");
        match config.take::<u64>(&key) {
            Some(At { value: 1, place, written }) => notes.ignored(&place, &written, "splits nothing"),
            Some(size) => {
                let rule =
                    "ranks share the data and the shards, and split no sequence and no product: give 1";
                faults.report(&size.place, format!("{}: {rule}", size.written));
            }
            None => {}
        }
    }
    let replicas = config.take::<u64>("parallelism_config.parallelism_config_dp_replicate_size");
    let shards = config.take::<u64>("parallelism_config.parallelism_config_dp_shard_size");
    let said = replicas.as_ref().or(shards.as_ref())?;
    let sizes = [&replicas, &shards].map(|size| size.as_ref().map_or(1, |size| size.value));
    let product: u64 = sizes.iter().product();
    if product != launcher.ranks {
        let written: Vec<&str> =
            [&replicas, &shards].into_iter().flatten().map(|size| size.written.as_str()).collect();
        let (written, ranks) = (written.join(" and "), launcher.ranks);
        let message =
            format!("{written}: groups and their ranks make {product} processes, but there are {ranks}");
        faults.report(&said.place, message);
    }
    let written = said.written.clone();
    match sizes {
        [1, _] => {
            for size in [replicas, shards].into_iter().flatten() {
                notes.ignored(&size.place, &size.written, "one group of all ranks, as without it");
            }
            None
        }
        [_, 1] => {
            if let Some(shards) = shards {
                notes.ignored(&shards.place, &shards.written, "groups of one rank shard nothing");
            }
            Some(Strategy { word: "no_shard", written, group: None })
        }
        _ => Some(Strategy { word: "hybrid_shard", written, group: shards }),
    }
}

fn prefetch(original: &mut Original, job: &mut Job, notes: &mut Notes) {
    let config = &mut original.config;
    let backward = config.take::<&'static str>("fsdp_config.fsdp_backward_prefetch");
    let policy = config.take::<&'static str>("fsdp_config.fsdp_backward_prefetch_policy");
    let backward = settle(backward, policy, notes);
    let forward = config.take::<bool>("fsdp_config.fsdp_forward_prefetch");
    if let Some(backward) = backward.as_ref().filter(|backward| backward.value != "BACKWARD_PRE") {
        let text = "the next block is gathered while one is computed, which takes the memory of one block";
        notes.differs(&backward.place, &backward.written, text);
    }
    let written = [backward.map(|at| at.written), forward.map(|at| at.written)];
    let written: Vec<String> = written.into_iter().flatten().collect();
    if !written.is_empty() {
        job.set_from("train.gather_ahead", 1, &written.join(", "));
    }
}

fn zero(original: &mut Original, launcher: &Launcher, job: &mut Job, notes: &mut Notes, faults: &mut Faults) {
    let Original { config, deepspeed, has_deepspeed, .. } = original;
    let (whose, default) = if *has_deepspeed { ("DeepSpeed", 0) } else { ("accelerate", 2) };
    let (detailed, stage) =
        (deepspeed.take("zero_optimization.stage"), config.take("deepspeed_config.zero_stage"));
    let stage: At<u64> = settle(detailed, stage, notes).unwrap_or_else(|| At::default_of(whose, default));
    let groups = groups(deepspeed, stage.value, launcher, notes);
    let word = match (stage.value, &groups) {
        (3, Some(groups)) => {
            if !launcher.ranks.is_multiple_of(groups.value) {
                let message =
                    format!("{} must divide the number of ranks ({})", groups.written, launcher.ranks);
                faults.report(&groups.place, message);
            }
            "hybrid_shard"
        }
        (3, _) => "full_shard",
        (0, _) => "no_shard",
        _ => "shard_grad_op",
    };
    let strategy = Strategy { word, written: stage.written.clone(), group: groups };
    strategy.set(launcher, job);
    if stage.value == 1 {
        let text = "gradients are sharded as well, as with stage 2: less memory, the same result";
        notes.differs(&stage.place, &stage.written, text);
    }
    zero_offload(original, stage.value, job, notes);
}

/// The ranks of MiCS' groups, where they are groups.
fn groups(deepspeed: &mut Settings, stage: u64, launcher: &Launcher, notes: &mut Notes) -> Option<At<u64>> {
    let groups = deepspeed.take::<u64>("zero_optimization.mics_shard_size")?;
    let text = match groups.value {
        0 => "no groups",
        _ if stage != 3 => "for ZeRO stage 3 alone",
        ranks if ranks >= launcher.ranks => "one group of all ranks",
        _ => return Some(groups),
    };
    notes.ignored(&groups.place, &groups.written, text);
    None
}

fn zero_offload(original: &mut Original, stage: u64, job: &mut Job, notes: &mut Notes) {
    let Original { config, deepspeed, .. } = original;
    let older = deepspeed.take::<bool>("zero_optimization.cpu_offload");
    let older = older.map(|older| older.map(|older| if older { "cpu" } else { "none" }));
    let detailed = settle(deepspeed.take("zero_optimization.offload_optimizer.device"), older, notes);
    let optimizer = settle(detailed, config.take("deepspeed_config.offload_optimizer_device"), notes);
    let detailed = deepspeed.take("zero_optimization.offload_param.device");
    let params = settle(detailed, config.take("deepspeed_config.offload_param_device"), notes);
    for device in [&optimizer, &params].into_iter().flatten().filter(|device| device.value == "nvme") {
        notes.differs(&device.place, &device.written, "into main memory: nothing is offloaded to disks");
    }
    let offloaded = |device: &Option<At<&'static str>>| device.as_ref().is_some_and(|at| at.value != "none");
    let written: Vec<&str> =
        [&optimizer, &params].into_iter().flatten().map(|at| at.written.as_str()).collect();
    let word = match (offloaded(&optimizer), offloaded(&params)) {
        (optimizer, true) if stage == 3 => {
            if let (false, Some(params)) = (optimizer, &params) {
                let text = "the optimizer goes into main memory with the weights";
                notes.differs(&params.place, &params.written, text);
            }
            "all"
        }
        (true, _) => "optimizer",
        (false, _) => "none",
    };
    if let (true, false, Some(params)) = (offloaded(&params), stage == 3, &params) {
        notes.ignored(&params.place, &params.written, "for ZeRO stage 3 alone, in DeepSpeed too");
    }
    if !written.is_empty() {
        job.set_from("train.offload", word, &written.join(", "));
    }
}
