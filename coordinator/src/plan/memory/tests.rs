//! The model against what was worked out by hand. `tests/tests/it/plan_measure.rs` has it against an allocator.

use std::path::Path;

use tunefleet_proto::job;

use super::*;

const GPU: Machine = Machine { on_gpu: true, bf16_products: true };
const CPU: Machine = Machine { on_gpu: false, bf16_products: true };

fn needs(preset: &str, overrides: &[&str], machine: Machine) -> Needs {
    let text = format!("dataset: d\nmodel: {{init: {{preset: {preset}}}}}\ntrain: {{ranks: 8}}\n");
    let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
    let spec = job::load(Path::new("/j.yaml"), &text, &overrides, Path::new("/")).unwrap();
    let config = ModelConfig::preset(preset).unwrap();
    of_rank(&spec, &config, &spec.shard_plan(&config).unwrap(), machine).unwrap()
}

fn starcoder(overrides: &[&str]) -> Needs {
    needs("starcoder", overrides, GPU)
}

fn gb(items: &[Item], what: &str) -> f64 {
    items.iter().filter(|item| item.what.starts_with(what)).map(|item| item.bytes as f64).sum::<f64>() / 1e9
}

#[test]
fn starcoder_on_eight_gpus_needs_what_was_worked_out_by_hand() {
    let needs = starcoder(&[]);
    let gb = |what| gb(&needs.items, what);
    assert!((gb("master weights") + gb("Adam moments") - 23.28).abs() < 0.03);
    assert!((gb("gradient shard") - 7.76).abs() < 0.01);
    // The embeddings, and two blocks of 0.76 GB.
    assert!((gb("gathered weights") - (0.70 + 2.0 * 0.755)).abs() < 0.02);
    // Forty inputs and the last output of 25 MB, and the embeddings' dropout mask of a byte an element.
    assert!((gb("block inputs") - 41.5 * 0.025_165_8).abs() < 0.001);
    // Two buffers of a block in fp32 with an eighth of it each, and the embeddings' gradient.
    assert!((gb("gradients being reduced") - (2.0 * 1.51 * 1.125 + 1.41)).abs() < 0.02);
    let total = needs.needed_bytes as f64 / 1e9;
    assert!((38.0..45.0).contains(&total), "{total} GB: fits 80 GB with room");
}

#[test]
fn a_checkpoint_of_starcoder_is_staged_in_23_gb_of_main_memory_a_rank() {
    let host = starcoder(&[]).host.unwrap();
    assert!((gb(&host.items, "copy of the state") - 23.28).abs() < 0.03);
    assert_eq!((host.ranks, host.machine_bytes), (8, 8 * host.rank_bytes));
    let one_by_one = starcoder(&["train.checkpoints_async=false"]).host.unwrap();
    assert!(one_by_one.rank_bytes < host.rank_bytes / 5);
    // Of several copies one is written.
    let copies = starcoder(&["train.strategy=hybrid_shard", "train.shard_ranks=4"]).host.unwrap();
    let staged = gb(&copies.items, "copy of the state");
    let all = copies.machine_bytes as f64 / 1e9;
    assert!((all - (4.0 * staged + 8.0 * (copies.rank_bytes as f64 / 1e9 - staged))).abs() < 0.01);
}

#[test]
fn offloading_moves_bytes_from_the_gpu_to_main_memory() {
    let (none, some) = (starcoder(&[]), starcoder(&["train.offload=optimizer"]));
    let all = starcoder(&["train.offload=all"]);
    let gpu = |needs: &Needs| needs.needed_bytes as f64 / 1e9;
    let host = |needs: &Needs| needs.host.as_ref().unwrap().rank_bytes as f64 / 1e9;
    // 12 bytes a parameter go, a bf16 copy of 2 comes; with `all` that goes as well.
    assert!((gpu(&none) - gpu(&some) - 19.4).abs() < 0.1, "{}", gpu(&none) - gpu(&some));
    assert!((gpu(&some) - gpu(&all) - 3.88).abs() < 0.05);
    assert!(host(&some) - host(&none) > 23.2);
}

#[test]
fn more_ranks_shrink_the_state_and_keeping_activations_costs() {
    let (eight, four) = (starcoder(&[]), starcoder(&["train.ranks=4"]));
    let ratio = gb(&four.items, "Adam moments") / gb(&eight.items, "Adam moments");
    assert!((ratio - 2.0).abs() < 1e-4);
    let kept = starcoder(&["train.recompute=none"]);
    assert!(gb(&kept.items, "activations kept") > 10.0);
    // The last block's alone, which are there when the loss is made.
    assert!(gb(&eight.items, "activations kept") < 0.4);
    assert!(gb(&kept.items, "gathered weights") > 10.0 * gb(&eight.items, "gathered weights"));
    let some = starcoder(&["train.recompute=every 4"]);
    assert!(some.needed_bytes < kept.needed_bytes && some.needed_bytes > eight.needed_bytes);
}

#[test]
fn every_strategy_gathers_what_it_keeps() {
    let gathered = |overrides: &[&str]| gb(&starcoder(overrides).items, "gathered weights");
    let whole = 2.0 * 15.517_456_384;
    assert!((gathered(&["train.strategy=shard_grad_op"]) - whole).abs() < 0.02);
    assert!((gathered(&["train.strategy=no_shard"]) - whole).abs() < 0.02);
    let resident = gathered(&["train.resident_blocks=10"]);
    assert!((resident - gathered(&[]) - 10.0 * 0.7581).abs() < 0.02);
    assert!((gathered(&["train.gather_ahead=3"]) - gathered(&[]) - 2.0 * 0.7581).abs() < 0.02);
}

#[test]
fn dropout_of_attention_on_a_cpu_keeps_matrices_of_all_tokens_with_all() {
    let shape = ["train.ranks=1", "data.sequence_tokens=2048", "train.precision=fp32"];
    let with = |dropout| {
        let overrides: Vec<&str> = shape.into_iter().chain([dropout]).collect();
        gb(&needs("starcoderbase-1b", &overrides, CPU).items, "a block's backward pass")
    };
    // Three of 16 heads x 2048 x 2048 in fp32 at least.
    assert!(with("train.dropout=0.1") - with("train.dropout=0") > 3.0 * 0.268);
}

#[test]
fn on_a_cpu_the_copy_for_a_checkpoint_is_in_the_ranks_own_memory() {
    let on_the_way = needs("starcoderbase-1b", &["train.ranks=1"], CPU);
    assert!((gb(&on_the_way.items, "copy of the state") - 12.0 * 1.1372).abs() < 0.01);
    assert_eq!(on_the_way.host, None);
    // At the end, activations and copy are not there together.
    let at_the_end = needs("starcoderbase-1b", &["train.ranks=1", "train.checkpoint_every_steps=0"], CPU);
    assert!(at_the_end.needed_bytes < on_the_way.needed_bytes);
}

#[test]
fn a_4_bit_adapter_of_starcoder_needs_what_was_worked_out_by_hand() {
    let alone = ["train.ranks=1", "adapter.rank=32", "train.micro_batch_sequences=4"];
    let needs = starcoder(&alone);
    let items = &needs.items;
    let gb = |what| gb(items, what);
    // 15.16 billion weights at 4.127 bits, the other 0.36 billion parameters at 16.
    assert!((items[0].bytes as f64 / 1e9 - (7.822 + 0.710)).abs() < 0.01);
    assert!((gb("frozen base, one block") - 0.758).abs() < 0.001);
    // 110,428,160 trained elements.
    assert!((gb("master weights") - 0.4417).abs() < 0.001);
    assert!((gb("Adam moments") - 0.8834).abs() < 0.001);
    assert!(needs.tensor_bytes < 18_000_000_000, "{} bytes of tensors", needs.tensor_bytes);
    let eight = starcoder(&["train.ranks=1", "adapter.rank=32", "train.optimizer=adamw_8bit"]);
    assert!(super::tests::gb(&eight.items, "Adam moments") < 0.3 * gb("Adam moments"));
    let shared = starcoder(&["train.ranks=8", "adapter.rank=32"]);
    assert!(shared.items[0].bytes as f64 <= 0.126 * items[0].bytes as f64);
}

#[test]
fn no_shape_that_a_config_may_state_overflows() {
    let largest = ModelConfig {
        vocab_size: 1 << 24,
        hidden_size: 1 << 20,
        layers: 4,
        heads: 1 << 20,
        intermediate_size: 1 << 20,
        max_positions: 1 << 20,
        ..ModelConfig::preset("starcoder").unwrap()
    };
    let text = "dataset: d\nmodel: {path: m}\ndata: {sequence_tokens: 1048576}\n\
                train: {ranks: 3, micro_batch_sequences: 65536, accumulate_micro_batches: 65536}\n";
    let spec = job::load(Path::new("/j.yaml"), text, &[], Path::new("/")).unwrap();
    for machine in [GPU, CPU] {
        let plan = spec.shard_plan(&largest).unwrap();
        let needs = of_rank(&spec, &largest, &plan, machine).unwrap();
        assert!(needs.needed_bytes > 1 << 50);
    }
}
