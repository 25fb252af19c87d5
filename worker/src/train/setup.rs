//! From a job's spec to a run that can take its first step: data, frozen base, and what is trained, from
//! the model, the beginning of an adapter or a checkpoint.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tch::{Device, Kind, Tensor};
use tunefleet_kernels::device::assert_fused_attention;
use tunefleet_proto::adapter::AdapterPlan;
use tunefleet_proto::checkpoint::{AdapterRecord, DataPosition, Manifest};
use tunefleet_proto::job::{JobSpec, Offload, Precision};
use tunefleet_proto::model::{Dropout, ModelConfig};
use tunefleet_proto::shard_plan::ShardPlan;

use super::adapter::{self, Frozen, Wiring};
use super::gradients::Checks;
use super::rng::Seeds;
use super::walk::{Walk, WalkOptions};
use super::{Error, Event, Host, Run, schedule, units};
use crate::base::{Base, cache};
use crate::checkpoint::fence::Fence;
use crate::checkpoint::save::{self, Saver};
use crate::checkpoint::{self, hugging_face, load};
use crate::comm::{Communicator, Mesh, Tag};
use crate::data::{Sequences, Split};
use crate::model::numerics::Numerics;

impl<'a> Run<'a> {
    /// Opens everything that a run needs, and loads or begins what it trains. Collective.
    pub(super) fn set_up(
        spec: &'a JobSpec,
        plan: &ShardPlan,
        mesh: Mesh<'a>,
        device: Device,
        resume: bool,
        host: &dyn Host,
    ) -> Result<Self, Error> {
        if device == Device::Cpu {
            tunefleet_kernels::device::keep_freed_memory();
        }
        tunefleet_kernels::device::set_deterministic(true)?;
        let rank = mesh.world.rank();
        let mut config = hugging_face::read_config(&spec.model_dir())?;
        if let Some(p) = spec.train.dropout {
            config.dropout = Dropout { attention: p, embedding: p, residual: p };
        }
        let misfit = |error: tunefleet_proto::adapter::Error| Error::Mismatch(format!("adapter: {error}"));
        let adapter_plan = spec.adapter_plan(&config).map_err(misfit)?;
        if *plan != spec.shard_plan(&config).map_err(misfit)? || plan.world != mesh.shards.rank().world {
            return Err(Error::Mismatch(format!(
                "the shard plan of this attempt is not that of {} on {} ranks; both sides must run the same version",
                spec.model_dir().display(),
                mesh.shards.rank().world
            )));
        }
        let open = |split| {
            let (dataset, tokenizer) = (spec.dataset_dir(), spec.tokenizer_dir());
            Sequences::open(&spec.data, &dataset, &tokenizer, split, &spec.output.join("tokens"))
        };
        let training = open(Split::Train)?;
        let validation = if spec.train.eval_every_steps > 0 { Some(open(Split::Validation)?) } else { None };
        if rank.rank == 0 {
            let left_out =
                [Some(&training), validation.as_ref()].into_iter().flatten().filter_map(Sequences::left_out);
            left_out.for_each(|told| host.report(Event::Note(told)));
        }
        check_fit(spec, &config, &training)?;

        let numerics = Numerics::new(device, spec.train.precision);
        check_attention(spec, &config, numerics, host)?;
        let own = mesh.shards.rank().rank;
        // On a CPU everything is in main memory as it is.
        let offload = if device == Device::Cpu { Offload::None } else { spec.train.offload };
        let kind = if adapter_plan.is_some() { Kind::Float } else { numerics.kind };
        let shards = units::shards(plan, own, numerics, spec.train.optimizer, offload, kind)?;
        let opened =
            adapter_plan.map(|adapter| open_base(spec, &config, adapter, plan, mesh, numerics, host));
        let mut opened = opened.transpose()?;
        let record = opened.as_ref().map(|(_, record)| record.clone());
        let (step, consumed, loss, found, ended) = if resume {
            let (dir, manifest) = agree_on_checkpoint(spec, mesh.world, device, host)?;
            check_data(&dir, &manifest.data, &training)?;
            check_adapter(&dir, manifest.adapter.as_ref(), record.as_ref())?;
            load::load(&dir, &manifest, plan, own, &shards)?;
            (manifest.step, manifest.data.sequences, manifest.loss, manifest.validation, manifest.finished)
        } else {
            match &mut opened {
                Some((frozen, _)) => {
                    let base = &mut frozen.base;
                    tch::no_grad(|| {
                        let trained = (&config, config.added_tokens.as_slice());
                        adapter::init(&shards, plan, trained, base, mesh.shards, spec.train.seed)
                    })?;
                }
                None => hugging_face::load(&spec.model_dir(), plan, mesh, &shards)?,
            }
            (0, 0, f64::NAN, None, false)
        };
        let seeds = Seeds::new(spec.train.seed);
        let options = WalkOptions::of(&spec.train);
        let mut walk = Walk::new(config, plan.clone(), shards, numerics, mesh, seeds, options);
        walk.invalidate();
        let walk = match opened {
            Some((frozen, _)) => walk.over(frozen),
            None => walk,
        };
        let moved = (1..=step).rev().take(2).any(|done| schedule::learning_rate(&spec.train, done) > 0.0);
        Ok(Run {
            spec,
            walk,
            training,
            validation,
            rank,
            device,
            step,
            consumed,
            loss,
            data_wait: Duration::ZERO,
            saver: Saver::new(save::Settings {
                dir: spec.checkpoints_dir(),
                keep: spec.train.keep_checkpoints as usize,
                keep_best: spec.train.keep_best,
                asynchronous: spec.train.checkpoints_async,
                fence: host.attempt().map(|attempt| Fence::new(&spec.output, attempt)),
            }),
            found,
            found_at: found.and_then(|found| found.loss).map(|_| step),
            ended,
            adapter: record,
            checks: Checks::new(moved),
        })
    }
}

/// Attention that keeps every score takes many times the memory and time: on a GPU that is an error, in fp32 and
/// on a CPU it is told.
fn check_attention(
    spec: &JobSpec,
    config: &ModelConfig,
    numerics: Numerics,
    host: &dyn Host,
) -> Result<(), Error> {
    let path = assert_fused_attention(
        numerics.device,
        numerics.product_kind,
        config.heads as i64,
        config.kv_heads as i64,
        config.head_dim() as i64,
        i64::from(spec.data.sequence_tokens),
        config.dropout.attention,
    );
    match path {
        Ok("math") => host.report(Event::Note(
            "attention dropout takes a slow path on CPUs, which keeps every score: train.dropout: 0 turns it off"
                .to_owned(),
        )),
        Ok(_) => {}
        Err(error) if spec.train.precision == Precision::Fp32 => host.report(Event::Note(error.to_string())),
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// The frozen base of `spec`'s adapter, and the record of what is trained on it.
fn open_base(
    spec: &JobSpec,
    config: &ModelConfig,
    adapter: AdapterPlan,
    plan: &ShardPlan,
    mesh: Mesh<'_>,
    numerics: Numerics,
    host: &dyn Host,
) -> Result<(Frozen, AdapterRecord), Error> {
    let (Some(settings), Some(base_plan)) = (&spec.adapter, spec.base_plan(config)) else {
        return Err(Error::Mismatch("the job has no adapter".to_owned()));
    };
    if !adapter.unmatched.is_empty() && mesh.world.rank().rank == 0 {
        let unmatched = adapter.unmatched.join(", ");
        host.report(Event::Note(format!("adapter.target_modules: nothing matches {unmatched}")));
    }
    let (cache_dir, model_dir) = (spec.base_dir(), spec.model_dir());
    let opened = cache::open(&cache_dir, &model_dir, config, &base_plan, mesh, numerics.device)?;
    if let Some(why) = opened.built {
        let name = base_plan.quantization.name();
        host.report(Event::Note(format!("quantised {} to {name}: {why}", model_dir.display())));
    }
    let world = mesh.shards.rank().world;
    let residency = WalkOptions::of(&spec.train).residency(world, plan.units.len() - 1);
    let base = Base::new(base_plan, opened.shards, world, numerics, &residency, false)?;
    let wiring = Wiring::new(&settings.lora, &adapter, config, plan, numerics.device);
    let record = AdapterRecord {
        lora: settings.lora.with_added_tokens(config),
        quantization: settings.quantization,
        precision: spec.train.precision,
        base_sha256: opened.base_sha256,
    };
    Ok((Frozen { base, wiring }, record))
}

fn check_adapter(
    dir: &Path,
    saved: Option<&AdapterRecord>,
    wanted: Option<&AdapterRecord>,
) -> Result<(), Error> {
    let misfit = match (saved, wanted) {
        (None, None) => None,
        (Some(saved), Some(wanted)) => saved.misfit(wanted),
        (Some(_), None) => Some("holds an adapter; the job trains all weights".to_owned()),
        (None, Some(_)) => Some("holds all weights; the job trains an adapter".to_owned()),
    };
    match misfit {
        None => Ok(()),
        Some(misfit) => Err(Error::Mismatch(format!(
            "{}: {misfit}; restore it, or start over with launch --fresh",
            dir.display()
        ))),
    }
}

/// The newest checkpoint that all ranks find sound, each looking at its share of the files. Rank 0
/// says which one is looked at, so that all load the same.
fn agree_on_checkpoint(
    spec: &JobSpec,
    comm: &dyn Communicator,
    device: Device,
    host: &dyn Host,
) -> Result<(PathBuf, Manifest), Error> {
    let dir = spec.checkpoints_dir();
    let rank = comm.rank();
    let sum = |value: i64, what| -> Result<i64, Error> {
        let tensor = Tensor::full([], value, (Kind::Int64, device));
        comm.all_reduce(&tensor, Tag { unit: None, what })?.wait()?;
        Ok(tensor.int64_value(&[]))
    };
    let (mut before, mut detail, mut broken) = (u64::MAX, String::new(), false);
    loop {
        let candidate = match rank.rank {
            0 => {
                load::steps(&dir).into_iter().rev().find(|step| *step < before).map_or(-1, |step| step as i64)
            }
            _ => 0,
        };
        let Ok(step) = u64::try_from(sum(candidate, "checkpoint choice")?) else {
            // Whose part of the files was broken tells it.
            return Err(match rank.rank == 0 && !broken || !detail.is_empty() {
                true => checkpoint::Error::NoCheckpoint { path: dir, detail }.into(),
                false => checkpoint::Error::Elsewhere("no sound checkpoint to resume from".to_owned()).into(),
            });
        };
        let path = dir.join(tunefleet_proto::checkpoint::dir_name(step));
        let verified = load::verify_share(&path, rank);
        let failed = sum(i64::from(verified.is_err()), "checkpoint check")?;
        match verified {
            Ok(manifest) if failed == 0 => {
                if rank.rank == 0 {
                    host.report(Event::Note(format!("resuming from {}", path.display())));
                }
                return Ok((path, manifest));
            }
            Ok(_) => broken = true,
            Err(error) => {
                host.report(Event::Note(format!("passed over a checkpoint: {error}")));
                detail.push_str(&format!("; {error}"));
            }
        }
        before = step;
    }
}

fn check_data(dir: &Path, saved: &DataPosition, training: &Sequences) -> Result<(), Error> {
    for (what, saved, now) in [
        ("dataset", saved.dataset_digest.as_str(), training.dataset_digest()),
        ("tokenizer", saved.tokenizer_digest.as_str(), training.tokenizer_digest()),
    ] {
        if saved != now {
            return Err(Error::Mismatch(format!(
                "{}: was trained on another {what} (digest {saved}, the job's is {now}); \
                 restore it, or start over with launch --fresh",
                dir.display()
            )));
        }
    }
    Ok(())
}

fn check_fit(spec: &JobSpec, config: &ModelConfig, training: &Sequences) -> Result<(), Error> {
    let sequence_tokens = u64::from(spec.data.sequence_tokens);
    if sequence_tokens > config.max_positions {
        return Err(Error::Mismatch(format!(
            "data.sequence_tokens ({sequence_tokens}) must be at most the model's positions ({})",
            config.max_positions
        )));
    }
    if training.vocab_size() > config.vocab_size {
        return Err(Error::Mismatch(format!(
            "the tokenizer has {} tokens, the model's embedding {}: they do not belong together",
            training.vocab_size(),
            config.vocab_size
        )));
    }
    if training.len_per_epoch() == 0 {
        return Err(Error::Mismatch(format!(
            "{}: too little text for one sequence of {sequence_tokens} tokens; collect more or lower data.sequence_tokens",
            spec.dataset_dir().display()
        )));
    }
    Ok(())
}
