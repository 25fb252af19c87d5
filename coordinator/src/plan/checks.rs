//! What is worth a word before a job runs: each warning has its number, the rule that it breaks, and what
//! to do.

use serde::Serialize;
use tunefleet_proto::job::{DeviceKind, JobSpec, Offload};

use super::disk::Disk;
use super::print::{seconds, size};
use super::time::Times;

/// Exposed traffic above this share of a step is worth a word.
const EXPOSED: f64 = 0.2;

/// One warning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Warning {
    /// Which rule, for scripts.
    pub rule: &'static str,
    /// For people.
    pub text: String,
}

/// All that is worth a word.
pub fn warnings(spec: &JobSpec, times: Option<&Times>, disk: &Disk, on_gpu: bool) -> Vec<Warning> {
    let mut found = Vec::new();
    let mut warn = |rule, text| found.push(Warning { rule, text });
    let train = &spec.train;
    if let Some(free) = disk.free_bytes
        && disk.needed_bytes > free
    {
        warn(
            "disk",
            format!(
                "the output needs {} of disk, of which {} are free: free some, lower train.keep_checkpoints, or \
                 choose another output",
                size(disk.needed_bytes),
                size(free)
            ),
        );
    }
    if !on_gpu && train.device == DeviceKind::Cpu && train.offload != Offload::None {
        warn(
            "offload",
            "train.offload does nothing on CPUs, where all is in main memory: leave it out".to_owned(),
        );
    }
    let Some(times) = times else { return found };
    let stop = times.step_seconds + times.pause_seconds + times.write_seconds;
    let grace = spec.restart.stop_grace_seconds as f64;
    if stop > grace {
        let all = (stop.ceil() as u64).next_multiple_of(60);
        warn(
            "grace",
            format!(
                "to stop takes a step and a checkpoint, {}, but restart.stop_grace_seconds allows {} before ranks are \
                 killed without one: set it to {all}, and cancel with --grace {all}",
                seconds(stop),
                seconds(grace),
            ),
        );
    }
    let (what, longest) = [
        ("a step", times.step_seconds),
        ("an evaluation", times.evaluation_seconds),
        ("a checkpoint", times.write_seconds),
    ]
    .into_iter()
    .max_by(|a, b| a.1.total_cmp(&b.1))
    .unwrap_or(("a step", 0.0));
    let timeout = train.collective_timeout_seconds as f64;
    if train.ranks > 1 && longest > timeout {
        warn(
            "collective_timeout",
            format!(
                "ranks may wait for one that is at {what} for {}, but train.collective_timeout_seconds is {timeout}: \
                 set it to {} or more",
                seconds(longest),
                (2.0 * longest).ceil()
            ),
        );
    }
    let every = train.checkpoint_every_steps;
    let interval = every as f64 * times.step_seconds;
    if every > 0 && every < train.steps && train.checkpoints_async && times.write_seconds > interval {
        let enough = (times.write_seconds / times.step_seconds).ceil();
        warn(
            "checkpoint_interval",
            format!(
                "a checkpoint is written for {}, and begun every {}: training would wait; set \
                 train.checkpoint_every_steps to {enough} or more",
                seconds(times.write_seconds),
                seconds(interval)
            ),
        );
    }
    if times.exposed_seconds > EXPOSED * times.step_seconds {
        warn(
            "traffic",
            format!(
                "{} of a step's {} pass waiting for traffic between ranks: raise train.micro_batch_sequences, keep \
                 blocks gathered (train.resident_blocks, shard_grad_op), or reduce in bf16",
                seconds(times.exposed_seconds),
                seconds(times.step_seconds)
            ),
        );
    }
    found
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tunefleet_proto::job;

    use super::*;

    fn times() -> Times {
        Times {
            basis: String::new(),
            measured: false,
            step_seconds: 10.0,
            compute_seconds: 10.0,
            update_seconds: 0.0,
            gather_seconds: 0.0,
            reduce_seconds: 0.0,
            exposed_seconds: 0.0,
            evaluation_seconds: 30.0,
            evaluations: 1,
            pause_seconds: 1.0,
            write_seconds: 100.0,
            checkpoints: 1,
            training_seconds: 1.0,
            tokens_per_second: 1.0,
            model_flops_utilization: None,
        }
    }

    fn rules(train: &str, times: &Times) -> Vec<(&'static str, String)> {
        let text = format!("dataset: d\nmodel: {{init: {{preset: tiny}}}}\ntrain: {{{train}}}\n");
        let spec = job::load(Path::new("/j.yaml"), &text, &[], Path::new("/")).unwrap();
        let disk = Disk { items: Vec::new(), needed_bytes: 2 << 30, free_bytes: Some(3 << 30) };
        let found = warnings(&spec, Some(times), &disk, true);
        found.into_iter().map(|warning| (warning.rule, warning.text)).collect()
    }

    #[test]
    fn a_job_that_keeps_all_rules_is_not_warned_of() {
        assert_eq!(rules("ranks: 8", &times()), []);
    }

    #[test]
    fn every_rule_that_is_broken_is_named_with_its_number_and_a_way_out() {
        let slow = Times { write_seconds: 700.0, exposed_seconds: 5.0, ..times() };
        let found = rules("ranks: 8, checkpoint_every_steps: 20", &slow);
        let names: Vec<&str> = found.iter().map(|(rule, _)| *rule).collect();
        assert_eq!(names, ["grace", "collective_timeout", "checkpoint_interval", "traffic"]);
        let said = |rule: &str, text: &str| {
            assert!(
                found.iter().any(|(name, said)| *name == rule && said.contains(text)),
                "{text}: {found:?}"
            );
        };
        said("grace", "--grace 720");
        said("collective_timeout", "set it to 1400 or more");
        said("checkpoint_interval", "train.checkpoint_every_steps to 70 or more");
        said("traffic", "train.micro_batch_sequences");
        // Alone, nobody waits.
        assert!(rules("ranks: 1", &slow).iter().all(|(rule, _)| *rule != "collective_timeout"));
    }

    #[test]
    fn a_disk_that_is_too_small_is_named() {
        let text = "dataset: d\nmodel: {init: {preset: tiny}}\n";
        let spec = job::load(Path::new("/j.yaml"), text, &[], Path::new("/")).unwrap();
        let disk = Disk { items: Vec::new(), needed_bytes: 4 << 30, free_bytes: Some(3 << 30) };
        let found = warnings(&spec, None, &disk, true);
        assert!(found[0].text.contains("needs 4.0 GiB of disk, of which 3.0 GiB are free"), "{found:?}");
    }
}
