//! Training that ends because the validation loss falls no more, and the checkpoint that leaves.

use std::process::Command;

use tunefleet_tests::job::Job;
use tunefleet_tests::process::Running;
use tunefleet_tests::programs;

fn verify(job: &Job, arguments: &[&str]) -> tunefleet_tests::process::Ended {
    let mut command = Command::new(programs::worker());
    command.args(["checkpoint", "verify"]).arg(job.output()).args(arguments);
    Running::start(command).wait()
}

#[test]
fn a_validation_loss_that_falls_no_more_ends_training() {
    // No loss falls by so much: the first evaluation stays the best.
    let job = Job::builder()
        .steps(40)
        .checkpoint_every(3)
        .train("eval_every_steps: 2")
        .train("early_stopping_evaluations: 2")
        .train("early_stopping_min_delta: 100")
        .train("keep_checkpoints: 1")
        .build();
    job.run(&[]).expect(0).says(&["step 6: 2 evaluations brought no validation loss below", "training ends"]);
    let metrics = job.metrics();
    assert_eq!(metrics.last_step(), 6, "after evaluations at 2, 4 and 6");
    // The loss does fall, though by less: the last is the best.
    assert_eq!(job.checkpoints(), [6]);
    assert!(job.output().join("export/model.safetensors").is_file());

    let told = verify(&job, &["--json"]).expect(0).stdout;
    let lines: Vec<serde_json::Value> =
        told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0]["step"], 6);
    assert!(lines[0]["validation_loss"].as_f64().unwrap() > 0.0, "{told}");
    assert_eq!(lines[0]["finished"], true);

    // The same job again: nothing is left to do.
    job.run(&[]).expect(0).says(&["train: cached", "export: cached"]);

    // A flipped byte is named, and the exit code tells it.
    let file = job.output().join("checkpoints/step-00000006/rank-00000.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    verify(&job, &[]).expect(1).says(&["1 of 1 checkpoints are not sound"]);
}
