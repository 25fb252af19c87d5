//! Settings of accelerate and DeepSpeed, spelling by spelling.

use tunefleet_proto::job::{Offload, Precision, Schedule, Strategy as Sharding};

use super::{Converted, Given, accelerate, deepspeed, fsdp, script};

#[test]
fn every_spelling_of_an_fsdp_strategy_is_taken() {
    for (spellings, expected) in [
        (&["1", "\"1\"", "FULL_SHARD", "full_shard"][..], (Sharding::FullShard, 8)),
        (&["2", "SHARD_GRAD_OP"], (Sharding::ShardGradOp, 8)),
        (&["3", "NO_SHARD"], (Sharding::NoShard, 1)),
        (&["4", "HYBRID_SHARD"], (Sharding::HybridShard, 4)),
        (&["5", "HYBRID_SHARD_ZERO2"], (Sharding::HybridShard, 4)),
    ] {
        for spelling in spellings {
            for key in ["fsdp_sharding_strategy", "sharding_strategy", "fsdp_reshard_after_forward"] {
                let train = fsdp(&format!("  {key}: {spelling}\n")).unwrap().spec.train;
                assert_eq!((train.strategy, train.shard_ranks), expected, "{key}: {spelling}");
            }
        }
    }
    for (spelling, expected) in [
        ("true", Sharding::FullShard),
        ("false", Sharding::ShardGradOp),
        ("SHARD_GRAD_OP", Sharding::ShardGradOp),
    ] {
        let text = format!("  fsdp_version: 2\n  fsdp_reshard_after_forward: {spelling}\n");
        assert_eq!(fsdp(&text).unwrap().spec.train.strategy, expected, "{spelling}");
    }
}

#[test]
fn a_key_that_accelerate_does_not_read_is_told() {
    let version_2 = fsdp("  fsdp_version: 2\n  fsdp_sharding_strategy: NO_SHARD\n").unwrap();
    assert_eq!(version_2.spec.train.strategy, Sharding::FullShard);
    assert!(
        version_2.notes.contains("fsdp_sharding_strategy: NO_SHARD: has no effect"),
        "{}",
        version_2.notes
    );
    let other = accelerate(
        "distributed_type: MULTI_GPU\nnum_processes: 2\nfsdp_config: {fsdp_offload_params: true}\n",
    );
    let other = other.unwrap();
    assert_eq!((other.spec.train.strategy, other.spec.train.offload), (Sharding::NoShard, Offload::None));
    assert!(other.notes.contains("fsdp_offload_params: true: has no effect"), "{}", other.notes);
}

#[test]
fn hybrid_sharding_needs_machines_that_divide_the_ranks() {
    let message = accelerate(
        "distributed_type: FSDP\nnum_processes: 8\nnum_machines: 3\nfsdp_config: {fsdp_sharding_strategy: 4}\n",
    );
    assert!(message.unwrap_err().contains("a.yaml:3:15: num_machines: 3 must divide num_processes (8)"));
    let one =
        accelerate("distributed_type: FSDP\nnum_processes: 8\nfsdp_config: {fsdp_sharding_strategy: 4}\n");
    assert_eq!(one.unwrap().spec.train.strategy, Sharding::FullShard);
}

#[test]
fn a_mesh_of_replicas_and_shards_is_hybrid_and_other_parallelism_is_refused() {
    let mesh = |sizes: &str| {
        accelerate(&format!(
            "distributed_type: FSDP\nnum_processes: 8\nfsdp_config: {{fsdp_version: 2}}\nparallelism_config:\n{sizes}"
        ))
    };
    let hybrid =
        mesh("  parallelism_config_dp_replicate_size: 2\n  parallelism_config_dp_shard_size: 4\n").unwrap();
    assert_eq!((hybrid.spec.train.strategy, hybrid.spec.train.shard_ranks), (Sharding::HybridShard, 4));
    let message = mesh("  parallelism_config_dp_replicate_size: 2\n  parallelism_config_dp_shard_size: 2\n");
    assert!(message.unwrap_err().contains("make 4 processes, but there are 8"));
    let message = mesh("  parallelism_config_tp_size: 2\n").unwrap_err();
    assert!(message.contains("a.yaml:5:31: parallelism_config_tp_size: 2: "), "{message}");
    let megatron = accelerate("distributed_type: MEGATRON_LM\n").unwrap_err();
    assert!(megatron.contains("a.yaml:1:19: distributed_type: MEGATRON_LM splits layers"), "{megatron}");
}

#[test]
fn zero_stages_and_offloading_become_strategies_and_offloading() {
    for (lines, strategy, offload) in [
        ("zero_stage: 0", Sharding::NoShard, Offload::None),
        ("zero_stage: 1", Sharding::ShardGradOp, Offload::None),
        ("zero_stage: 2, offload_optimizer_device: cpu", Sharding::ShardGradOp, Offload::Optimizer),
        ("zero_stage: 3, offload_optimizer_device: nvme", Sharding::FullShard, Offload::Optimizer),
        ("zero_stage: 3, offload_param_device: cpu", Sharding::FullShard, Offload::All),
        ("zero_stage: 2, offload_param_device: cpu", Sharding::ShardGradOp, Offload::None),
        ("zero3_init_flag: true", Sharding::ShardGradOp, Offload::None),
    ] {
        let text = format!("distributed_type: DEEPSPEED\nnum_processes: 4\ndeepspeed_config: {{{lines}}}\n");
        let train = accelerate(&text).unwrap().spec.train;
        assert_eq!((train.strategy, train.offload), (strategy, offload), "{lines}");
    }
    let mics = "{\"zero_optimization\": {\"stage\": 3, \"mics_shard_size\": 2}}";
    let config = "distributed_type: DEEPSPEED\nnum_processes: 4\nmixed_precision: bf16\n";
    let given = Given { accelerate: Some(config), deepspeed: Some(mics), ..Given::default() };
    let train = given.convert().unwrap().spec.train;
    assert_eq!((train.strategy, train.shard_ranks), (Sharding::HybridShard, 2));
    assert_eq!(train.reduce_precision, Precision::Bf16);
}

#[test]
fn a_deepspeed_config_alone_gives_its_values_and_tabs_are_no_fault() {
    let json = r#"{
	"bf16": {"enabled": true},
	"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8, "overlap_comm": true,
		"offload_optimizer": {"device": "cpu", "pin_memory": true}},
	"optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.8, 0.99], "eps": 1e-7, "weight_decay": 3e-7}},
	"scheduler": {"type": "WarmupDecayLR",
		"params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-5, "warmup_num_steps": 500, "total_num_steps": 5000}},
	"gradient_clipping": 0.5, "gradient_accumulation_steps": 4, "train_batch_size": 32, "steps_per_print": 2000
}"#;
    let Converted { spec, notes, .. } = deepspeed(json).unwrap();
    let train = spec.train;
    assert_eq!((train.strategy, train.offload), (Sharding::ShardGradOp, Offload::Optimizer));
    assert_eq!(
        (train.learning_rate, train.betas, train.epsilon, train.weight_decay),
        (3e-5, (0.8, 0.99), 1e-7, 3e-7)
    );
    assert_eq!((train.schedule, train.warmup_steps, train.steps), (Schedule::Linear, 500, 5000));
    assert_eq!(
        (train.max_grad_norm, train.accumulate_micro_batches, train.micro_batch_sequences),
        (0.5, 4, 8)
    );
    for told in ["ds.json:3:58: reduce_bucket_size: 5e8: ", "steps_per_print: 2000: what DeepSpeed reports"] {
        assert!(notes.contains(told), "{told}: {notes}");
    }
}

#[test]
fn auto_is_taken_from_train_py_and_what_disagrees_with_it_is_told() {
    let json = |micro: &str, rate: &str| {
        format!(
            "{{\"zero_optimization\": {{\"stage\": 3}}, \"bf16\": {{\"enabled\": \"auto\"}}, \
             \"train_micro_batch_size_per_gpu\": {micro}, \"gradient_clipping\": \"auto\", \
             \"optimizer\": {{\"type\": \"AdamW\", \"params\": {{\"lr\": {rate}}}}}}}"
        )
    };
    let convert = |json: String| {
        let args =
            "accelerate launch --use_deepspeed --num_processes 2 train.py --batch_size 8 --bf16 --no_fp16";
        Given { deepspeed: Some(&json), args: Some(args), ..Given::default() }.convert().unwrap()
    };
    let agreeing = convert(json("\"auto\"", "\"auto\""));
    assert_eq!((agreeing.spec.train.micro_batch_sequences, agreeing.spec.train.learning_rate), (8, 5e-5));
    assert!(!agreeing.notes.contains("contradictions"), "{}", agreeing.notes);
    let disagreeing = convert(json("4", "1e-4"));
    assert_eq!(disagreeing.spec.train, agreeing.spec.train);
    for told in [
        "train_micro_batch_size_per_gpu: 4: --batch_size 8 (--args) says otherwise, and is used",
        "lr: 1e-4: default of train.py says otherwise, and is used",
    ] {
        assert!(disagreeing.notes.contains(told), "{told}: {}", disagreeing.notes);
    }
}

#[test]
fn processes_that_a_launcher_would_not_start_are_a_contradiction() {
    let Converted { spec, notes, .. } = accelerate("distributed_type: 'NO'\nnum_processes: 8\n").unwrap();
    assert_eq!(spec.train.ranks, 1);
    assert!(notes.contains("contradictions:\n  a.yaml:2:16: num_processes: 8: "), "{notes}");
}

#[test]
fn every_fault_is_reported_with_its_place_the_rule_and_the_value() {
    let text = "distributed_type: FSDP\nnum_procesess: 8\nmixed_precision: bf17\nfsdp_config:\n  \
                fsdp_shardng_strategy: 1\n  offload_params: maybe\nnum_machines: 0\nnum_machines: 1\n";
    let message = accelerate(text).unwrap_err();
    for line in [
        "a.yaml:2:1: unknown key \"num_procesess\" (did you mean \"num_processes\"?)",
        "a.yaml:3:18: mixed_precision: expected one of no, fp16, bf16, fp8, got \"bf17\"",
        "a.yaml:5:3: unknown key \"fsdp_shardng_strategy\" in fsdp_config (did you mean \"fsdp_sharding_strategy\"?)",
        "a.yaml:6:19: fsdp_config.fsdp_offload_params: expected true or false, got \"maybe\"",
        "a.yaml:7:15: num_machines: expected a whole number from 1 to 1024, got \"0\"",
        "a.yaml:8:1: key \"num_machines\" is given twice",
    ] {
        assert!(message.contains(line), "{line} is not in\n{message}");
    }
    let stranger = "distributed_type: 'NO'\nzzzzzzzz: [1]\n";
    assert!(
        accelerate(stranger).unwrap_err().contains("a.yaml:2:1: unknown key \"zzzzzzzz\"; --ignore-unknown")
    );
    let given = Given { accelerate: Some(stranger), ignore_unknown: true, ..Given::default() };
    assert!(given.convert().unwrap().notes.contains("a.yaml:2:1: zzzzzzzz: [...]: unknown"));
}

#[test]
fn a_launcher_without_a_config_starts_replicas() {
    let four = script("accelerate launch --num_processes 4 train.py").unwrap().spec.train;
    assert_eq!((four.ranks, four.strategy), (4, Sharding::NoShard));
    let unsaid = script("accelerate launch train.py").unwrap();
    assert_eq!(unsaid.spec.train.ranks, 1);
    assert!(
        unsaid.notes.contains("num_processes is not given: accelerate takes every GPU"),
        "{}",
        unsaid.notes
    );
    assert!(!script("python train.py").unwrap().notes.contains("num_processes"));
}

#[test]
fn a_deepspeed_config_given_as_one_of_accelerate_is_recognised() {
    let message = accelerate("{\"zero_optimization\": {\"stage\": 2}, \"fp16\": {}}").unwrap_err();
    assert_eq!(message, "a.yaml: this is a DeepSpeed config: give it with --deepspeed");
}
