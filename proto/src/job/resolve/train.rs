//! `data` and `train`: how files become batches, and batches weights.

use super::{ABOVE_0, BELOW_1, MAX_RANKS, Resolver};
use crate::job::file::{DataFile, TrainFile};
use crate::job::read::{At, Field};
use crate::job::spec::{
    DataSpec, DeviceKind, EarlyStopping, FimLevel, MemoryBudget, Offload, Optimizer, Packing, Precision,
    Recompute, Schedule, Strategy, TrainSpec, sequence_misfit,
};
use crate::model::ModelConfig;

const MAX_STEPS: u64 = 1_000_000_000;

impl Resolver<'_> {
    pub(super) fn data(&mut self, data: &DataFile, shape: Option<&ModelConfig>) -> DataSpec {
        let positions = shape.and_then(|shape| u32::try_from(shape.max_positions).ok());
        let default = positions.map_or(2048, |most| most.min(2048));
        let sequence_tokens =
            self.within("data.sequence_tokens", &data.sequence_tokens, 8..=1 << 20, default);
        if let (Some(at), Some(misfit)) =
            (data.sequence_tokens.given(), shape.and_then(|shape| sequence_misfit(sequence_tokens, shape)))
        {
            self.sink.report(&at.place, misfit);
        }
        let chat = self.chat(data);
        let packing = match chat {
            Some(_) => Packing::Whole,
            None => data.packing.or(Packing::Continuous),
        };
        let fim_level = match (packing, data.fim_level.given()) {
            (Packing::SeedCompatible, Some(At { value: FimLevel::Window, place })) => {
                let message = "data.fim_level window contradicts data.packing seed_compatible, whose token \
                               streams rearrange whole documents: write fim_level: document";
                self.sink.report(place, message);
                FimLevel::Document
            }
            (_, Some(at)) => at.value,
            (Packing::SeedCompatible, None) => FimLevel::Document,
            (Packing::Continuous | Packing::Whole, None) => FimLevel::Window,
        };
        for (key, given, they) in [
            ("metadata_prefix", data.metadata_prefix.given(), "token streams hold texts alone"),
            ("document_mask", data.document_mask.given(), "documents see each other"),
        ] {
            if let (Packing::SeedCompatible, Some(At { value: true, place })) = (packing, given) {
                let message = format!(
                    "data.{key} contradicts data.packing seed_compatible, whose {they}: leave out one of the two"
                );
                self.sink.report(place, message);
            }
        }
        DataSpec {
            sequence_tokens,
            // A conversation has no hole.
            fim_rate: self.within(
                "data.fim_rate",
                &data.fim_rate,
                0.0..=1.0,
                if chat.is_some() { 0.0 } else { 0.5 },
            ),
            fim_spm_rate: self.within("data.fim_spm_rate", &data.fim_spm_rate, 0.0..=1.0, 0.5),
            fim_level,
            packing,
            metadata_prefix: data.metadata_prefix.or(false),
            document_mask: data.document_mask.or(chat.is_some()),
            chat,
            seed: data.seed.or(0),
        }
    }

    pub(super) fn train(&mut self, train: &TrainFile, held_out: bool, adapter: bool) -> TrainSpec {
        let steps = self.within("train.steps", &train.steps, 0..=MAX_STEPS, 2000);
        let warmup_steps =
            self.within("train.warmup_steps", &train.warmup_steps, 0..=MAX_STEPS, (steps / 10).min(30));
        if let Some(at) = train.warmup_steps.given()
            && warmup_steps > steps
            && !matches!(train.steps, Field::Wrong)
        {
            let steps_are = match train.steps.given() {
                Some(at) => format!("train.steps is {steps} ({})", at.place),
                None => format!("train.steps is {steps} by default"),
            };
            let message =
                format!("train.warmup_steps is {warmup_steps}, but {steps_are}: warm-up would never end");
            self.sink.report(&at.place, message);
        }
        let default = if held_out { 100 } else { 0 };
        let eval_every_steps =
            self.within("train.eval_every_steps", &train.eval_every_steps, 0..=MAX_STEPS, default);
        if let Some(at) = train.eval_every_steps.given()
            && eval_every_steps > 0
            && !held_out
        {
            let message = format!(
                "train.eval_every_steps is {eval_every_steps}, but collect.validation_fraction is 0: no file \
                 is held out to evaluate on"
            );
            self.sink.report(&at.place, message);
        }
        let ranks = self.within("train.ranks", &train.ranks, 1..=MAX_RANKS, 1);
        let strategy = train.strategy.or(Strategy::FullShard);
        let shard_ranks = self.shard_ranks(train, strategy, ranks);
        let memory_budget = self.memory_budget(train);
        let learning_rate = self.within(
            "train.learning_rate",
            &train.learning_rate,
            ABOVE_0..=1.0,
            if adapter { 2e-4 } else { 5e-5 },
        );
        let schedule = train.schedule.or(Schedule::Cosine);
        let early_stopping = self.early_stopping(train, eval_every_steps > 0);
        let keep_best = train.keep_best.or(early_stopping.is_some());
        if let Some(at) = train.keep_best.given()
            && keep_best
            && eval_every_steps == 0
        {
            let message = "train.keep_best needs evaluations, but train.eval_every_steps is 0";
            self.sink.report(&at.place, message);
        }
        let dropout =
            train.dropout.given().map(|_| self.within("train.dropout", &train.dropout, 0.0..=BELOW_1, 0.0));
        TrainSpec {
            ranks,
            strategy,
            shard_ranks,
            device: train.device.or(DeviceKind::Auto),
            precision: train.precision.or(Precision::Bf16),
            steps,
            micro_batch_sequences: self.within(
                "train.micro_batch_sequences",
                &train.micro_batch_sequences,
                1..=65_536,
                1,
            ),
            accumulate_micro_batches: self.within(
                "train.accumulate_micro_batches",
                &train.accumulate_micro_batches,
                1..=65_536,
                2,
            ),
            learning_rate,
            optimizer: train.optimizer.or(Optimizer::AdamW),
            schedule,
            schedule_power: self.within("train.schedule_power", &train.schedule_power, ABOVE_0..=100.0, 1.0),
            final_learning_rate: self.within(
                "train.final_learning_rate",
                &train.final_learning_rate,
                0.0..=learning_rate,
                if schedule == Schedule::Polynomial { learning_rate.min(1e-7) } else { 0.0 },
            ),
            warmup_steps,
            weight_decay: self.within("train.weight_decay", &train.weight_decay, 0.0..=1.0, 0.01),
            betas: self.betas(&train.betas),
            epsilon: self.within("train.epsilon", &train.epsilon, ABOVE_0..=1.0, 1e-8),
            max_grad_norm: self.within("train.max_grad_norm", &train.max_grad_norm, 0.0..=1e9, 1.0),
            dropout,
            recompute: train.recompute.or(Recompute::All),
            resident_blocks: self.within("train.resident_blocks", &train.resident_blocks, 0..=1024, 0),
            gather_ahead: self.within("train.gather_ahead", &train.gather_ahead, 1..=8, 1),
            reduce_precision: train.reduce_precision.or(Precision::Fp32),
            offload: train.offload.or(Offload::None),
            memory_budget,
            seed: train.seed.or(42),
            log_every_steps: self.within("train.log_every_steps", &train.log_every_steps, 1..=MAX_STEPS, 25),
            eval_every_steps,
            eval_sequences: self.within("train.eval_sequences", &train.eval_sequences, 1..=1 << 20, 64),
            checkpoint_every_steps: self.within(
                "train.checkpoint_every_steps",
                &train.checkpoint_every_steps,
                0..=MAX_STEPS,
                500,
            ),
            keep_checkpoints: self.within("train.keep_checkpoints", &train.keep_checkpoints, 1..=1000, 2),
            keep_best,
            checkpoints_async: train.checkpoints_async.or(true),
            early_stopping,
            collective_timeout_seconds: self.within(
                "train.collective_timeout_seconds",
                &train.collective_timeout_seconds,
                1..=86_400,
                600,
            ),
        }
    }

    /// How many ranks share one copy of the weights.
    fn shard_ranks(&mut self, train: &TrainFile, strategy: Strategy, ranks: u32) -> u32 {
        let given = train.shard_ranks.given();
        match (strategy, given) {
            (Strategy::HybridShard, None) => {
                if let (Some(at), Field::Absent) = (train.strategy.given(), &train.shard_ranks) {
                    let message = "train.strategy hybrid_shard needs train.shard_ranks: the ranks of one group, \
                                   such as the GPUs of a node";
                    self.sink.report(&at.place, message);
                }
                ranks
            }
            (Strategy::HybridShard, Some(at)) => {
                if at.value == 0 || !ranks.is_multiple_of(at.value) {
                    let message =
                        format!("train.shard_ranks must divide train.ranks ({ranks}), got {}", at.value);
                    self.sink.report(&at.place, message);
                    return ranks;
                }
                at.value
            }
            (_, Some(at)) => {
                let message =
                    "train.shard_ranks is for train.strategy hybrid_shard alone: take one of them away";
                self.sink.report(&at.place, message);
                ranks
            }
            (Strategy::NoShard, None) => 1,
            (Strategy::FullShard | Strategy::ShardGradOp, None) => ranks,
        }
    }

    fn memory_budget(&mut self, train: &TrainFile) -> Option<MemoryBudget> {
        train.memory_budget_gib.given()?;
        let gib = self.within("train.memory_budget_gib", &train.memory_budget_gib, 0.01..=1e6, 1.0);
        Some(MemoryBudget {
            bytes: (gib * (1u64 << 30) as f64) as u64,
            recompute: train.recompute.is_absent(),
            resident_blocks: train.resident_blocks.is_absent(),
            offload: train.offload.is_absent(),
        })
    }

    fn early_stopping(&mut self, train: &TrainFile, evaluates: bool) -> Option<EarlyStopping> {
        let min_delta =
            self.within("train.early_stopping_min_delta", &train.early_stopping_min_delta, 0.0..=1000.0, 0.0);
        let Some(at) = train.early_stopping_evaluations.given() else {
            if let Some(at) = train.early_stopping_min_delta.given() {
                let message =
                    "train.early_stopping_min_delta does nothing without train.early_stopping_evaluations";
                self.sink.report(&at.place, message);
            }
            return None;
        };
        if !evaluates {
            let message =
                "train.early_stopping_evaluations needs evaluations, but train.eval_every_steps is 0";
            self.sink.report(&at.place, message);
        }
        let key = "train.early_stopping_evaluations";
        let evaluations = self.within(key, &train.early_stopping_evaluations, 1..=1_000_000, 1);
        Some(EarlyStopping { evaluations, min_delta })
    }

    fn betas(&mut self, field: &Field<[f64; 2]>) -> (f64, f64) {
        let default = (0.9, 0.999);
        let Some(At { value: [beta1, beta2], place }) = field.given() else { return default };
        if ![beta1, beta2].into_iter().all(|beta| (0.0..1.0).contains(beta)) {
            let message = format!("train.betas must each be 0 to below 1, got [{beta1}, {beta2}]");
            self.sink.report(place, message);
            return default;
        }
        (*beta1, *beta2)
    }
}
