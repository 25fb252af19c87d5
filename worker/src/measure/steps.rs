//! Steps of one rank, timed: as `train` takes them, with random tokens.

use std::time::Instant;

use tch::{Device, Kind, Tensor};
use tunefleet_proto::job::TrainSpec;
use tunefleet_proto::measure::{Measured, Point, Request, Seconds};

use super::Error;
use super::setup::{self, Peers};
use crate::checkpoint::save::{self, Staged};
use crate::comm::Tag;
use crate::comm::simulated::Traffic;
use crate::memory;
use crate::train;
use crate::train::optimizer;
use crate::train::walk::{Batch, MicroPosition, Walk};

/// Steps that are timed, fewer where they take long: whoever goes on from two depths to many multiplies what
/// a median is off by.
const STEPS: usize = 25;
const LEAST_STEPS: usize = 3;
/// Steps before: the first ones take fresh memory.
const WARM_UP: usize = 2;
/// After so long no further step begins, once there are enough.
const ENOUGH_SECONDS: f64 = 5.0;
/// Micro-batches of a step whose further ones are known from the second.
const MICRO_BATCHES: u32 = 2;

/// Measures `point`; `wait` is called when everything is ready to be timed. Besides what was measured, the
/// copy of the state that a checkpoint would be written from.
pub(super) fn measure(
    request: &Request,
    point: Point,
    device: Device,
    wait: &mut dyn FnMut() -> Result<(), Error>,
) -> Result<(Measured, Staged), Error> {
    let (spec, config) = setup::at(request, point);
    let train = &spec.train;
    let peers = Peers::new(&spec, request.link_bytes_per_second);
    let vocab = config.vocab_size;
    let mut rank = Measurement {
        walk: setup::walk(&spec, config, peers.mesh(), device)?,
        train,
        device,
        done: 0,
        batches: Vec::new(),
        micro_batches: match point.whole_steps {
            true => train.accumulate_micro_batches,
            false => train.accumulate_micro_batches.min(MICRO_BATCHES),
        },
    };
    let held_bytes = memory::tensors(device)?.bytes;
    memory::reset_peak(device)?;

    let size = [i64::from(train.micro_batch_sequences), i64::from(spec.data.sequence_tokens)];
    rank.batches =
        (0..train.accumulate_micro_batches).map(|_| random_batch(vocab as i64, size, device)).collect();
    for _ in 0..WARM_UP {
        rank.step()?;
    }
    let stages = train.checkpoints_async;
    let mut staged: Option<Staged> = None;
    if stages && train.saves_on_the_way() {
        staged = Some(save::stage(rank.walk.shards(), None)?);
    }
    peers.take_traffic();
    wait()?;
    let mut steps: Vec<StepSeconds> = Vec::new();
    let began = Instant::now();
    let mut traffic = Traffic { gathered_bytes: 0, reduced_bytes: 0 };
    while steps.len() < LEAST_STEPS || steps.len() < STEPS && began.elapsed().as_secs_f64() < ENOUGH_SECONDS {
        steps.push(rank.step()?);
        traffic = peers.take_traffic();
    }
    let mut evaluations = Vec::new();
    for _ in 0..LEAST_STEPS {
        evaluations.push(rank.evaluation()?);
    }
    let mut stagings = Vec::new();
    // Fresh memory costs page faults: of what is done on the way, the first time does not count.
    for _ in 0..if stages { 2 } else { 0 } {
        let began = Instant::now();
        let first = staged.is_none();
        staged = Some(save::stage(rank.walk.shards(), staged.take())?);
        synchronize(device);
        stagings.push(began.elapsed().as_secs_f64());
        if first {
            break;
        }
    }
    let seconds = |of: &dyn Fn(&StepSeconds) -> f64| {
        Seconds::of(&steps.iter().map(of).collect::<Vec<_>>()).unwrap_or(NO_SECONDS)
    };
    let later: Vec<f64> = steps.iter().flat_map(|step| step.micro_batches[1..].iter().copied()).collect();
    let measured = Measured {
        point,
        on_gpu: device != Device::Cpu,
        first_micro_batch: seconds(&|step| step.micro_batches[0]),
        later_micro_batch: Seconds::of(&later),
        update: seconds(&|step| step.update),
        step: seconds(&|step| step.whole),
        evaluation: Seconds::of(&evaluations).unwrap_or(NO_SECONDS),
        staging: Seconds::of(&stagings),
        shard_elements: rank.walk.plan().shard_elements(),
        peak_bytes: memory::tensors(device)?.peak_bytes,
        held_bytes,
        gathered_bytes: traffic.gathered_bytes,
        reduced_bytes: traffic.reduced_bytes,
    };
    Ok((measured, staged.unwrap_or_default()))
}

const NO_SECONDS: Seconds = Seconds { median: 0.0, least: 0.0, most: 0.0 };

struct Measurement<'a> {
    walk: Walk<'a>,
    train: &'a TrainSpec,
    device: Device,
    /// Updates.
    done: u64,
    /// Those of a step: a run reads them all before it computes the first.
    batches: Vec<Batch>,
    /// So many of them are computed.
    micro_batches: u32,
}

struct StepSeconds {
    micro_batches: Vec<f64>,
    update: f64,
    whole: f64,
}

impl Measurement<'_> {
    /// One update, as `train` makes it.
    fn step(&mut self) -> Result<StepSeconds, Error> {
        let began = self.now();
        let step = self.done + 1;
        let all: usize = self.batches.iter().map(|batch| batch.targets_bt.numel()).sum();
        let targets = Tensor::full([], all as f64, (Kind::Double, self.device));
        self.walk.mesh().world.all_reduce(&targets, Tag { unit: None, what: "target count" })?.wait()?;
        let scale = targets.reciprocal().to_kind(Kind::Float);
        self.walk.begin_step()?;
        let mut loss_sum = Tensor::zeros([], (Kind::Double, self.device));
        let mut micro_batches = Vec::new();
        let mut last = began;
        for (micro, batch) in (0..self.micro_batches).zip(&self.batches) {
            let position = MicroPosition { step, micro, of: self.micro_batches };
            loss_sum += self.walk.train_micro_batch(batch, position, &scale)?;
            let now = self.now();
            micro_batches.push(now.duration_since(last).as_secs_f64());
            last = now;
        }
        self.walk.finish_step()?;
        let rate = self.train.learning_rate;
        let values = optimizer::update(&mut self.walk, self.train, step, rate, &loss_sum, &targets)?.read();
        if values.nonfinite {
            let (loss, grad_norm) = (values.loss, values.grad_norm);
            return Err(train::Error::NonFinite { step, loss, grad_norm }.into());
        }
        self.done = step;
        let now = self.now();
        let update = now.duration_since(last).as_secs_f64();
        Ok(StepSeconds { micro_batches, update, whole: now.duration_since(began).as_secs_f64() })
    }

    /// One micro-batch of an evaluation, in seconds.
    fn evaluation(&mut self) -> Result<f64, Error> {
        let began = self.now();
        if let Some(batch) = self.batches.first() {
            let _ = self.walk.evaluate(batch)?.double_value(&[]);
        }
        Ok(self.now().duration_since(began).as_secs_f64())
    }

    /// When the device has done what it was asked to do.
    fn now(&self) -> Instant {
        synchronize(self.device);
        Instant::now()
    }
}

fn random_batch(vocab: i64, size: [i64; 2], device: Device) -> Batch {
    let tokens = || Tensor::randint(vocab, size, (Kind::Int64, device));
    Batch::new(tokens(), tokens())
}

fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}
