//! The plan against what an allocator counted: the same engine that trains, on real shapes. Memory is the
//! same on every machine; times are compared in the long test alone.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests fail and speak as tests do")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tunefleet_proto::job;
use tunefleet_proto::measure::{Answer, Measured, Point, Request};
use tunefleet_proto::model::{Dropout, ModelConfig, Parameter};
use tunefleet_tests::job::Job;
use tunefleet_tests::process::{Ended, Running};
use tunefleet_tests::programs;

/// How far what is planned may be from what is counted.
const MEMORY_TOLERANCE: f64 = 0.05;

/// A model's shape and a job on it, in a directory of its own.
struct Case {
    dir: tempfile::TempDir,
    config: ModelConfig,
}

fn shape() -> ModelConfig {
    ModelConfig {
        layers: 6,
        hidden_size: 128,
        heads: 4,
        intermediate_size: 512,
        vocab_size: 2048,
        max_positions: 256,
        dropout: Dropout::NONE,
        ..ModelConfig::preset("demo").unwrap()
    }
}

impl Case {
    fn new(config: ModelConfig, train: &str, more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("model")).unwrap();
        let json = config.to_json("float32").to_string();
        std::fs::write(dir.path().join("model/config.json"), json).unwrap();
        let text = format!(
            "name: measured\noutput: output\ndataset: dataset\nmodel: {{path: model}}\n\
             data: {{sequence_tokens: 256}}\n{more}\n\
             train: {{device: cpu, steps: 100, checkpoint_every_steps: 10, {train}}}\n\
             workers: {{threads_per_rank: 1}}\n"
        );
        std::fs::write(dir.path().join("job.yaml"), text).unwrap();
        Case { dir, config }
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("job.yaml")
    }

    fn plan(&self, arguments: &[&str]) -> Ended {
        programs::worker();
        let mut command = Command::new(programs::coordinator());
        command.arg("plan").arg("--config").arg(self.file()).args(arguments);
        Running::start(command).wait()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let arguments: Vec<&str> = arguments.iter().copied().chain(["--json"]).collect();
        let plan = self.plan(&arguments).expect(0);
        serde_json::from_str(&plan.stdout).unwrap()
    }
}

fn bytes(value: &Value) -> f64 {
    value.as_u64().unwrap() as f64
}

#[track_caller]
fn assert_near(what: &str, planned: f64, counted: f64) {
    let off = planned / counted - 1.0;
    println!("{what}: planned {planned}, counted {counted} bytes: {:+.2}%", 100.0 * off);
    assert!(off.abs() <= MEMORY_TOLERANCE, "{what}: planned {planned}, counted {counted} bytes");
}

#[track_caller]
fn assert_planned_as_counted(what: &str, case: &Case) {
    let plan = case.json(&["--measure=full"]);
    assert_eq!(plan["memory"]["on_gpu"], false);
    let planned = bytes(&plan["memory"]["tensor_bytes"]);
    assert_near(what, planned, bytes(&plan["measurement"]["peak_bytes"]));
    // What is held throughout is no smaller part of it.
    let held = bytes(&plan["measurement"]["points"][0]["held_bytes"]);
    assert!(held < planned && held > 0.1 * planned, "{held} of {planned}");
}

#[test]
fn one_rank_in_fp32_that_computes_all_blocks_again_needs_what_was_planned() {
    let train = "ranks: 1, precision: fp32, recompute: all, micro_batch_sequences: 2";
    assert_planned_as_counted("fp32, recompute all", &Case::new(shape(), train, ""));
}

#[test]
fn one_rank_in_bf16_that_keeps_all_activations_needs_what_was_planned() {
    let train = "ranks: 1, precision: bf16, recompute: none, micro_batch_sequences: 2";
    assert_planned_as_counted("bf16, recompute none", &Case::new(shape(), train, ""));
}

#[test]
fn every_second_block_and_four_micro_batches_need_what_was_planned() {
    let train = "ranks: 1, precision: bf16, recompute: every 2, accumulate_micro_batches: 4";
    assert_planned_as_counted("bf16, every 2, 4 micro-batches", &Case::new(shape(), train, ""));
}

#[test]
fn moments_of_8_bits_need_what_was_planned() {
    let case = Case::new(shape(), "ranks: 1, precision: bf16, optimizer: adamw_8bit", "");
    assert_planned_as_counted("bf16, 8-bit moments", &case);
}

#[test]
fn an_adapter_on_4_bits_needs_what_was_planned() {
    let train = "ranks: 1, precision: bf16, micro_batch_sequences: 2";
    let case = Case::new(shape(), train, "adapter: {rank: 8, quantize: nf4}");
    assert_planned_as_counted("adapter on nf4", &case);
    let train = "ranks: 1, precision: bf16, recompute: none, micro_batch_sequences: 2";
    let more = "adapter: {rank: 8, quantize: int8, dropout: 0.1, target_modules: 'c_attn,c_fc'}";
    assert_planned_as_counted("adapter with dropout on int8", &Case::new(shape(), train, more));
}

#[test]
fn two_ranks_that_share_the_weights_need_what_was_planned() {
    let train = "ranks: 2, precision: bf16, gather_ahead: 2, resident_blocks: 2, reduce_precision: bf16";
    assert_planned_as_counted("2 ranks, full_shard", &Case::new(shape(), train, ""));
}

#[test]
fn two_ranks_with_a_copy_each_need_what_was_planned() {
    let case = Case::new(shape(), "ranks: 2, precision: fp32, strategy: no_shard", "");
    assert_planned_as_counted("2 ranks, no_shard", &case);
}

#[test]
fn two_copies_over_four_ranks_need_what_was_planned() {
    let train = "ranks: 4, shard_ranks: 2, precision: bf16, strategy: hybrid_shard";
    assert_planned_as_counted("4 ranks, hybrid_shard", &Case::new(shape(), train, ""));
}

#[test]
fn attention_with_dropout_keeps_its_matrices_as_planned() {
    let case = Case::new(shape(), "ranks: 1, precision: fp32, dropout: 0.1", "");
    assert_planned_as_counted("fp32 with dropout", &case);
}

/// Grouped queries, rotary positions and a gated MLP; and layer norm, a window and three projections.
#[test]
fn models_of_other_families_need_what_was_planned() {
    let of = |preset| ModelConfig {
        layers: 6,
        hidden_size: 128,
        heads: 4,
        kv_heads: 2,
        intermediate_size: 352,
        vocab_size: 2048,
        dropout: Dropout::NONE,
        ..ModelConfig::preset(preset).unwrap()
    };
    let keep = "ranks: 1, precision: bf16, recompute: none, micro_batch_sequences: 2";
    let again = "ranks: 1, precision: fp32, recompute: all, micro_batch_sequences: 2";
    let (llama, starcoder2) = (of("decicoder-1b"), of("starcoder2-3b"));
    assert_planned_as_counted("a Llama, kept", &Case::new(llama.clone(), keep, ""));
    let more = "adapter: {rank: 8, quantize: nf4}";
    assert_planned_as_counted("adapter on a Llama", &Case::new(llama, again, more));
    assert_planned_as_counted("StarCoder2, again", &Case::new(starcoder2, again, ""));
}

/// Eight of them would hold six gigabytes.
#[test]
fn one_rank_of_eight_needs_what_was_planned_for_it() {
    let config = ModelConfig {
        layers: 8,
        hidden_size: 1024,
        heads: 16,
        intermediate_size: 4096,
        vocab_size: 8192,
        ..shape()
    };
    let train = "ranks: 8, precision: bf16, accumulate_micro_batches: 1";
    let case = Case::new(config, train, "");
    let planned = bytes(&case.json(&[])["memory"]["tensor_bytes"]);
    assert!((0.5e9..1.2e9).contains(&planned), "{planned}");
    let measured = measure(&case);
    assert_near("rank 0 of 8", planned, measured.peak_bytes as f64);
    // bf16 gathers of the embeddings, of eight blocks forward and, but for the two that are still there,
    // backward; reductions of all in fp32.
    let count = |list: Vec<Parameter>| list.iter().map(Parameter::elements).sum::<u64>() as f64 * 7.0 / 8.0;
    let (embed, block) = (count(case.config.embed_parameters()), count(case.config.block_parameters(0)));
    let gathered = measured.gathered_bytes as f64 / (2.0 * (embed + 14.0 * block));
    let reduced = measured.reduced_bytes as f64 / (4.0 * (embed + 8.0 * block));
    assert!((gathered - 1.0).abs() < 0.001 && (reduced - 1.0).abs() < 0.001, "{gathered} {reduced}");
}

/// `worker measure` of the whole job, by itself.
fn measure(case: &Case) -> Measured {
    let text = std::fs::read_to_string(case.file()).unwrap();
    let spec = job::load(&case.file(), &text, &[], case.dir.path()).unwrap();
    let train = &spec.train;
    let point = Point {
        layers: case.config.layers,
        recompute: train.recompute,
        resident_blocks: train.resident_blocks,
        whole_steps: true,
    };
    let request = Request {
        spec: spec.clone(),
        config: case.config.clone(),
        points: vec![point],
        link_bytes_per_second: None,
        threads: 1,
        in_step: false,
    };
    let mut child = Command::new(programs::worker())
        .arg("measure")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    writeln!(child.stdin.take().unwrap(), "{}", serde_json::to_string(&request).unwrap()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let answers: Vec<Answer> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [Answer::Point(measured), Answer::Disk(_)] = &answers[..] else { panic!("{answers:?}") };
    Measured::clone(measured)
}

/// Real ranks, real traffic, real checkpoints: each tells in its log what its tensors took. Not of strategies
/// with copies: how many of their sums are under way at once is a matter of time.
#[test]
fn the_ranks_of_a_real_job_take_what_was_planned() {
    for (strategy, precision) in [("full_shard", "bf16"), ("shard_grad_op", "fp32")] {
        let job = Job::builder()
            .model("model: { init: { preset: demo, seed: 1 } }")
            .steps(4)
            .checkpoint_every(2)
            .train(&format!("strategy: {strategy}"))
            .train("micro_batch_sequences: 8")
            .build();
        let set = format!("train.precision={precision}");
        let plan = Running::start(job.command("plan", &["--json", "--set", &set])).wait().expect(0);
        let plan: Value = serde_json::from_str(&plan.stdout).unwrap();
        let planned = bytes(&plan["memory"]["tensor_bytes"]);
        job.run(&["--set", &set]).expect(0);
        assert_near(&format!("rank 0 of 2, {strategy}"), planned, logged_peak(&job.output(), 0));
    }
}

/// What the rank's log says its tensors took.
fn logged_peak(output: &Path, rank: u32) -> f64 {
    let path = output.join(format!("logs/attempt-1/rank-{rank}.log"));
    let text = std::fs::read_to_string(&path).unwrap();
    let after = text.split("tensors took ").nth(1).unwrap_or_else(|| panic!("{}: {text}", path.display()));
    after.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn a_quick_measurement_of_some_blocks_tells_memory_and_times_of_all() {
    let config = ModelConfig { layers: 10, ..shape() };
    let case = Case::new(config, "ranks: 2, precision: bf16, recompute: every 3", "");
    let plan = case.json(&["--measure"]);
    let measurement = &plan["measurement"];
    assert_eq!(measurement["ranks"], 2);
    let depths: Vec<u64> = measurement["points"]
        .as_array()
        .unwrap()
        .iter()
        .map(|measured| measured["point"]["layers"].as_u64().unwrap())
        .collect();
    assert_eq!(depths, [2, 4, 4]);
    assert_near(
        "from 2 and 4 of 10 blocks",
        bytes(&measurement["peak_bytes"]),
        bytes(&plan["memory"]["tensor_bytes"]),
    );
    let times = &plan["times"];
    assert_eq!(times["measured"], true);
    for part in ["step_seconds", "write_seconds", "pause_seconds", "gather_seconds", "training_seconds"] {
        assert!(times[part].as_f64().unwrap() > 0.0, "{part}: {times}");
    }
    assert!(measurement["disk"]["hash_bytes_per_second"].as_f64().unwrap() > 0.0);
    let left: Vec<_> = std::fs::read_dir(case.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    case.plan(&["--measure"])
        .expect(0)
        .says(&["measured on this machine, 2 and 4 of 10 blocks", "tensors, measured"]);
}

#[test]
fn on_a_cpu_a_plan_says_that_times_can_be_measured() {
    let case = Case::new(shape(), "ranks: 1", "");
    case.plan(&[]).expect(0).says(&["time is not known", "--measure"]);
}

#[test]
fn a_worker_that_cannot_measure_is_named() {
    let case = Case::new(shape(), "ranks: 1", "");
    let ended = case.plan(&["--measure", "--worker-bin", "/bin/false"]).expect(1);
    ended.says(&["/bin/false measure ended without an answer"]);
}

mod long {
    use super::*;

    /// How far a step may be from what some of its blocks say, where the machine is quiet.
    const TIME_TOLERANCE: f64 = 0.15;
    /// On a quiet machine the median of some steps is no farther above the shortest.
    const QUIET: f64 = 1.15;
    const ROUNDS: usize = 3;

    /// A step's time, and whether nothing else ran meanwhile.
    fn step(case: &Case, depth: &str) -> (f64, bool) {
        let plan = case.json(&[depth]);
        let points = plan["measurement"]["points"].as_array().unwrap().clone();
        let of = |point: &Value, which: &str| point["step"][which].as_f64().unwrap();
        let is_quiet = points.iter().all(|point| of(point, "median") < QUIET * of(point, "least"));
        (plan["measurement"]["step_seconds"].as_f64().unwrap(), is_quiet)
    }

    #[test]
    fn a_step_takes_as_long_as_some_of_its_blocks_say() {
        if std::env::var("TUNEFLEET_LONG_SAMPLE").is_ok_and(|sample| !sample.is_empty()) {
            println!("left out of a sample of the long tests: it needs a quiet machine, and minutes");
            return;
        }
        let config =
            ModelConfig { layers: 12, hidden_size: 256, heads: 8, intermediate_size: 1024, ..shape() };
        let two = "micro_batch_sequences: 2";
        let cases = [
            ("fp32, recompute all", format!("ranks: 1, precision: fp32, {two}"), ""),
            ("bf16, recompute none", format!("ranks: 1, precision: bf16, recompute: none, {two}"), ""),
            (
                "bf16, every 3, 4 micro-batches",
                "ranks: 1, precision: bf16, recompute: every 3, accumulate_micro_batches: 4".to_owned(),
                "",
            ),
            (
                "adapter on nf4",
                format!("ranks: 1, precision: bf16, {two}"),
                "adapter: {rank: 8, quantize: nf4}",
            ),
            ("2 ranks, full_shard", format!("ranks: 2, precision: bf16, {two}"), ""),
            ("2 ranks, no_shard", format!("ranks: 2, precision: bf16, strategy: no_shard, {two}"), ""),
        ];
        println!("{:<32} {:>12} {:>12} {:>8}", "job", "of some, ms", "of all, ms", "off");
        let mut bad = Vec::new();
        for (what, train, more) in &cases {
            let case = Case::new(config.clone(), train, more);
            let mut off_when_quiet = Vec::new();
            for _ in 0..ROUNDS {
                let ((some, first), (all, second)) =
                    (step(&case, "--measure"), step(&case, "--measure=full"));
                let off = some / all - 1.0;
                let busy = if first && second { "" } else { "  (something else ran)" };
                println!("{what:<32} {:>12.1} {:>12.1} {:>+7.1}%{busy}", some * 1e3, all * 1e3, off * 100.0);
                if off.abs() <= TIME_TOLERANCE {
                    off_when_quiet.clear();
                    break;
                }
                if first && second {
                    off_when_quiet.push(off);
                }
            }
            if !off_when_quiet.is_empty() {
                bad.push(format!("{what}: {off_when_quiet:?}"));
            }
        }
        assert!(bad.is_empty(), "on a quiet machine, never within {TIME_TOLERANCE}: {bad:?}");
    }
}
