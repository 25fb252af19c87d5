//! The training loop of one rank.
//!
//! libtorch's own failures (an out-of-memory error above all) arise as panics of tch; the rank
//! process turns them into an error at its border, see `rank`.

/// Which sequences a rank sees when.
pub mod batches;
/// A rank's fp32 state, and gathered buffers.
pub mod units;
/// AdamW's moments, in fp32 or 8 bits.
pub mod moments;
/// What an adapter trains beside its frozen base.
pub mod adapter;
/// Whether gradients reach all of it.
pub mod gradients;
/// Gradients on their way to the shards.
pub mod reduce;
/// Forward, loss and backward, block by block.
pub mod walk;
/// Seeds by position.
pub mod rng;
/// The learning rate of a step.
pub mod schedule;
/// Norm, clipping and AdamW.
pub mod optimizer;

mod setup;
mod meter;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tunefleet_proto::checkpoint::{AdapterRecord, DataPosition, Validation};
use tunefleet_proto::ids::Rank;
use tunefleet_proto::job::{EarlyStopping, JobSpec};
use tunefleet_proto::shard_plan::ShardPlan;

use crate::checkpoint::save::{self, Saver};
use crate::comm::{Mesh, Tag};
use crate::data::Sequences;
use crate::memory;
use batches::Batches;
use gradients::Checks;
use meter::{Meter, Waited};
use optimizer::{StepStatus, StepValues};
use walk::{MicroPosition, Walk};

/// What a rank tells about itself; the host process forwards it.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The rank entered a section: `setup`, `step`, `evaluate`, `save`.
    Section(&'static str),
    /// Something that people want to know, in words.
    Note(String),
    /// One optimizer update is done. Sent every `log_every_steps` and at the last step.
    Step(StepReport),
    /// Mean loss over the validation sequences after `step` updates.
    Evaluated {
        /// Updates done.
        step: u64,
        /// Mean loss per target token.
        loss: f64,
    },
    /// A checkpoint exists.
    Saved {
        /// Updates done.
        step: u64,
        /// Its directory.
        path: PathBuf,
        /// How long training stood still for it.
        pause_seconds: f64,
    },
}

/// What one logged step tells.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Updates done.
    pub step: u64,
    /// Mean loss per target token of this step, over all ranks.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Input tokens consumed since the job began, over all ranks.
    pub tokens: u64,
    /// Input tokens per second over all ranks since the last report.
    pub tokens_per_second: f64,
    /// Mean duration of a step since the last report.
    pub step_seconds: f64,
    /// Most that this rank's tensors took, since it began.
    pub peak_memory_bytes: u64,
    /// Mean time of a step since the last report that this rank's thread waited for its batches.
    pub data_wait_seconds: f64,
    /// And for collectives. A GPU's are not waited for: they are ordered on the device.
    pub collective_wait_seconds: f64,
}

/// The host process, as the training loop sees it.
pub trait Host: Sync {
    /// Forward this; must not block.
    fn report(&self, event: Event);
    /// The work goes on, with so many updates done: who watches knows that it does not hang. Called often.
    fn progress(&self, step: u64) {
        let _ = step;
    }
    /// The attempt that this is, which a newer one supersedes; absent where nothing counts attempts.
    fn attempt(&self) -> Option<u32> {
        None
    }
    /// Whether to save and stop at the next step boundary. All ranks agree on the step among themselves.
    fn stop_requested(&self) -> bool;
}

/// How a run ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done and saved.
    Finished,
    /// Stopped on request after so many updates, with a checkpoint saved.
    Stopped(u64),
}

/// What can end a run badly.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A collective failed.
    #[error(transparent)]
    Comm(#[from] crate::comm::Error),
    /// Weights could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::Error),
    /// The data could not be read.
    #[error(transparent)]
    Data(#[from] crate::data::Error),
    /// A kernel refused.
    #[error(transparent)]
    Kernel(#[from] tunefleet_kernels::Error),
    /// A trained tensor that learns nothing.
    #[error("step {step}: the gradient of {tensor} {fault}; no rank was updated")]
    Gradient {
        /// The step.
        step: u64,
        /// Full name.
        tensor: String,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// Settings that do not fit the model, the data or the checkpoint.
    #[error("{0}")]
    Mismatch(String),
    /// Loss or gradients are not finite; the update was withheld on all ranks.
    #[error(
        "step {step}: loss {loss}, gradient norm {grad_norm}: not finite; no rank was updated. \
         Lower train.learning_rate or look at the data of this step, then launch --resume"
    )]
    NonFinite {
        /// The step.
        step: u64,
        /// Its mean loss.
        loss: f64,
        /// Its gradient norm.
        grad_norm: f64,
    },
}

impl From<crate::base::Error> for Error {
    fn from(error: crate::base::Error) -> Self {
        match error {
            crate::base::Error::Comm(error) => error.into(),
            crate::base::Error::Kernel(error) => error.into(),
        }
    }
}

/// Trains from the newest sound checkpoint under `spec.checkpoints_dir()` when `resume` is set,
/// else from `spec.model_dir()`.
///
/// # Errors
/// See [`Error`]; the message says what to do next.
pub fn run(
    spec: &JobSpec,
    plan: &ShardPlan,
    mesh: Mesh<'_>,
    device: Device,
    resume: bool,
    host: &dyn Host,
) -> Result<Outcome, Error> {
    host.report(Event::Section("setup"));
    let mut run = Run::set_up(spec, plan, mesh, device, resume, host)?;
    let outcome = run.train(host);
    if let Err(Error::NonFinite { .. }) = outcome {
        // All ranks know it: what is being written is worth waiting for.
        run.finish_save(host)?;
    }
    outcome
}

/// One rank's run between set-up and outcome.
struct Run<'a> {
    spec: &'a JobSpec,
    walk: Walk<'a>,
    training: Sequences,
    validation: Option<Sequences>,
    rank: Rank,
    device: Device,
    /// Updates done.
    step: u64,
    /// Sequences consumed by them.
    consumed: u64,
    /// Mean loss of the last step that was read.
    loss: f64,
    /// How long batches were waited for, since the last report.
    data_wait: Duration,
    saver: Saver,
    /// What evaluations found so far, and after which update the last one was.
    found: Option<Validation>,
    found_at: Option<u64>,
    /// Whether what it goes on from is the end of a training.
    ended: bool,
    /// What is trained, where it is an adapter.
    adapter: Option<AdapterRecord>,
    checks: Checks,
}

/// What an evaluation means for the run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// Nothing to act on.
    Nothing,
    /// The lowest loss so far.
    Better,
    /// It has not fallen for so long that training ends.
    Enough,
}

impl<'a> Run<'a> {
    fn train(&mut self, host: &dyn Host) -> Result<Outcome, Error> {
        let train = &self.spec.train;
        if self.ended {
            return Ok(Outcome::Finished);
        }
        let due_before = train.eval_every_steps > 0 && self.step.is_multiple_of(train.eval_every_steps);
        if self.step > 0 && due_before && self.found_at != Some(self.step) {
            // Stopped between a step and its evaluation: what follows must not depend on that.
            if self.evaluate(host)? == Found::Enough {
                return self.end(host);
            }
        }
        let mut meter = Meter::start((self.step, self.consumed), self.walk.mesh().world.waited());
        // On a GPU the host runs one step ahead: what a step found, and whether some rank was asked
        // to stop when it began, is read after the next one has begun.
        let mut unread: Option<(u64, StepStatus)> = None;
        let mut stop_asked: Option<Tensor> = None;
        while self.step < train.steps {
            host.report(Event::Section("step"));
            let learning_rate = schedule::learning_rate(train, self.step + 1);
            // Whether anything has moved, and whether it should have, is known once the last step is read.
            if self.adapter.is_some()
                && self.checks.are_due()
                && let Some((step, status)) = unread.take()
            {
                self.check(step, &status)?;
            }
            host.progress(self.step);
            let (status, asked) = self.one_step(learning_rate, host.stop_requested())?;
            self.step += 1;
            let stop = stop_asked.replace(asked).is_some_and(|asked| asked.double_value(&[]) > 0.0);
            if let Some((step, status)) = unread.replace((self.step, status)) {
                self.check(step, &status)?;
            }
            if let Some(saved) = self.saver.poll()? {
                host.report(saved.into());
            }
            let last = self.step == train.steps;
            let step = self.step;
            let due = |every: u64| every > 0 && (step.is_multiple_of(every) || last);
            let evaluate = due(train.eval_every_steps) && !stop;
            let save = last || stop || due(train.checkpoint_every_steps);
            if (due(train.log_every_steps) || save || evaluate)
                && let Some((step, status)) = unread.take()
            {
                let values = self.check(step, &status)?;
                if due(train.log_every_steps) {
                    let waited = Waited {
                        for_data: std::mem::take(&mut self.data_wait),
                        for_collectives: self.walk.mesh().world.waited(),
                    };
                    let mut report =
                        meter.report(self.spec, (step, self.consumed), learning_rate, values, waited);
                    report.peak_memory_bytes = memory::tensors(self.device)?.peak_bytes;
                    host.report(Event::Step(report));
                }
            }
            let found = if evaluate { meter.pause(|| self.evaluate(host))? } else { Found::Nothing };
            let ends = last || found == Found::Enough;
            if save || ends || found == Found::Better && train.keep_best {
                host.report(Event::Section("save"));
                meter.pause(|| self.save(host, ends))?;
            }
            if stop || ends {
                self.finish_save(host)?;
                return Ok(if ends { Outcome::Finished } else { Outcome::Stopped(self.step) });
            }
        }
        // A resume after the last step, of a checkpoint that was not the end.
        self.end(host)
    }

    fn end(&mut self, host: &dyn Host) -> Result<Outcome, Error> {
        self.save(host, true)?;
        self.finish_save(host)?;
        Ok(Outcome::Finished)
    }

    /// One optimizer update. Besides what it found, a scalar on the device that is above 0 when any
    /// rank was asked to stop: the same on all ranks.
    fn one_step(&mut self, learning_rate: f64, asked_to_stop: bool) -> Result<(StepStatus, Tensor), Error> {
        crate::fault::at(self.rank.rank, self.step + 1);
        let train = &self.spec.train;
        let batches = Batches::new(&self.training, train, self.rank, self.device);
        let began = Instant::now();
        let (micro_batches, own_targets) = batches.step(self.consumed)?;
        self.data_wait += began.elapsed();
        self.consumed += batches.step_sequences();

        // The loss is a mean over all targets of the whole step: not a mean of means.
        let scalar = |value: f64| Tensor::full([], value, (Kind::Double, self.device));
        let counts =
            Tensor::stack(&[scalar(own_targets as f64), scalar(f64::from(u8::from(asked_to_stop)))], 0);
        self.walk.mesh().world.all_reduce(&counts, Tag { unit: None, what: "target count" })?.wait()?;
        let (targets, asked) = (counts.get(0), counts.get(1));
        let scale = targets.reciprocal().to_kind(Kind::Float);

        self.walk.begin_step()?;
        let mut loss_sum = Tensor::zeros([], (Kind::Double, self.device));
        for (micro, batch) in micro_batches.iter().enumerate() {
            let position = MicroPosition {
                step: self.step + 1,
                micro: micro as u32,
                of: train.accumulate_micro_batches,
            };
            loss_sum += self.walk.train_micro_batch(batch, position, &scale)?;
        }
        self.walk.finish_step()?;
        let step = self.step + 1;
        if self.adapter.is_some()
            && let Some(expected) = self.checks.due()
        {
            gradients::check(self.walk.plan(), self.walk.shards(), self.walk.mesh().shards, step, expected)?;
        }
        let status = optimizer::update(&mut self.walk, train, step, learning_rate, &loss_sum, &targets)?;
        self.checks.updated(learning_rate);
        Ok((status, asked))
    }

    fn check(&mut self, step: u64, status: &StepStatus) -> Result<StepValues, Error> {
        let values = status.read();
        if values.nonfinite {
            return Err(Error::NonFinite { step, loss: values.loss, grad_norm: values.grad_norm });
        }
        self.loss = values.loss;
        Ok(values)
    }

    /// Evaluates, and judges what was found.
    fn evaluate(&mut self, host: &dyn Host) -> Result<Found, Error> {
        host.report(Event::Section("evaluate"));
        let Some(loss) = self.validation_loss()? else { return Ok(Found::Nothing) };
        host.report(Event::Evaluated { step: self.step, loss });
        let stopping = self.spec.train.early_stopping;
        let min_delta = stopping.map_or(0.0, |stopping| stopping.min_delta);
        (self.found, self.found_at) = (Validation::after(self.found, loss, min_delta), Some(self.step));
        let Some(found) = self.found else { return Ok(Found::Nothing) };
        Ok(match stopping {
            Some(EarlyStopping { evaluations, .. }) if found.since >= evaluations => {
                let Validation { best, since, .. } = found;
                host.report(Event::Note(format!(
                    "step {}: {since} evaluations brought no validation loss below {best:.4}: training ends",
                    self.step
                )));
                Found::Enough
            }
            _ if found.since == 0 => Found::Better,
            _ => Found::Nothing,
        })
    }

    /// Mean loss per counted validation target; `None` without validation data.
    fn validation_loss(&mut self) -> Result<Option<f64>, Error> {
        let Some(sequences) = &self.validation else { return Ok(None) };
        let train = &self.spec.train;
        let (limit, micro) = (train.eval_sequences.into(), train.micro_batch_sequences.into());
        let mut sums = Tensor::zeros([2], (Kind::Double, self.device));
        for round in batches::validation(sequences, limit, micro, self.rank, self.device) {
            let (batch, targets) = round?;
            let loss = self.walk.evaluate(&batch)?;
            let targets = Tensor::full([], targets as f64, (Kind::Double, self.device));
            sums += Tensor::stack(&[loss, targets], 0);
        }
        self.walk.mesh().world.all_reduce(&sums, Tag { unit: None, what: "validation loss" })?.wait()?;
        let sums = sums.to_device(Device::Cpu);
        let (loss, targets) = (sums.double_value(&[0]), sums.double_value(&[1]));
        Ok((targets > 0.0).then(|| loss / targets))
    }

    /// Begins a checkpoint, when the one before it is written.
    fn save(&mut self, host: &dyn Host, finished: bool) -> Result<(), Error> {
        self.finish_save(host)?;
        let evaluated_now = self.found.filter(|_| self.found_at == Some(self.step));
        let before = || self.found.map(|found| Validation { loss: None, ..found });
        let state = save::State {
            step: self.step,
            seed: self.spec.train.seed,
            data: DataPosition {
                dataset_digest: self.training.dataset_digest().to_owned(),
                tokenizer_digest: self.training.tokenizer_digest().to_owned(),
                sequences: self.consumed,
            },
            loss: self.loss,
            validation: evaluated_now.or_else(before),
            finished,
            adapter: self.adapter.clone(),
        };
        let walk = &self.walk;
        Ok(self.saver.start(walk.plan(), walk.shards(), state, walk.mesh(), self.device)?)
    }

    /// Waits for the checkpoint that is being written, if one is.
    fn finish_save(&mut self, host: &dyn Host) -> Result<(), Error> {
        if let Some(saved) = self.saver.finish(self.walk.mesh(), self.device, self.step)? {
            host.report(saved.into());
        }
        Ok(())
    }
}

impl From<save::Saved> for Event {
    fn from(saved: save::Saved) -> Self {
        let save::Saved { step, path, pause_seconds } = saved;
        Event::Saved { step, path, pause_seconds }
    }
}
