//! The learning rate of a step, as transformers' schedulers have it.

use tunefleet_proto::job::{Schedule, TrainSpec};

/// Learning rate of 1-based `step`: linear warm-up from 0, then the schedule, down to the final
/// learning rate at the end.
///
/// The first step of a warm-up uses rate 0, like `LambdaLR` before its first `step()`.
pub fn learning_rate(spec: &TrainSpec, step: u64) -> f64 {
    let done = step.saturating_sub(1) as f64;
    let (warmup, steps) = (spec.warmup_steps as f64, spec.steps as f64);
    if done < warmup {
        return spec.learning_rate * done / warmup.max(1.0);
    }
    let progress = (done - warmup) / (steps - warmup).max(1.0);
    let left = (1.0 - progress).max(0.0);
    let share = match spec.schedule {
        Schedule::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0),
        Schedule::Linear => left,
        Schedule::Polynomial => left.powf(spec.schedule_power),
        Schedule::Constant => 1.0,
    };
    spec.final_learning_rate + (spec.learning_rate - spec.final_learning_rate) * share
}
