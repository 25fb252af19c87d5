//! Arguments of train.py and its launcher.

use std::path::Path;

use tunefleet_proto::job::{Optimizer, Packing, Precision, Recompute, Schedule, Strategy as Sharding};

use super::{Converted, Given, accelerate, deepspeed, script};

#[test]
fn precision_follows_train_py_then_accelerate_and_fp16_becomes_bf16() {
    for (config, args, expected, told) in [
        (Some("bf16"), None, Precision::Bf16, ""),
        (Some("'no'"), None, Precision::Fp32, ""),
        (Some("no"), None, Precision::Fp32, ""),
        (Some("fp16"), None, Precision::Bf16, "bf16, which has the range of fp32"),
        (Some("fp8"), None, Precision::Bf16, "bf16, which has the range of fp32"),
        (Some("no"), Some("--bf16 --no_fp16"), Precision::Bf16, "--bf16 --no_fp16 (--args) says otherwise"),
        (Some("bf16"), Some("--no_fp16"), Precision::Bf16, ""),
        (None, Some("--no_fp16"), Precision::Fp32, ""),
        (None, Some(""), Precision::Bf16, "no --no_fp16: bf16, which has the range of fp32"),
        (None, Some("--bf16"), Precision::Bf16, "without --no_fp16 the original has fp16 on as well"),
    ] {
        let config = config.map(|word| format!("distributed_type: 'NO'\nmixed_precision: {word}\n"));
        let given = Given { accelerate: config.as_deref(), args, ..Given::default() };
        let Converted { spec, notes, .. } = given.convert().unwrap();
        assert_eq!(spec.train.precision, expected, "{config:?} {args:?}");
        assert!(notes.contains(told), "{config:?} {args:?}: {notes}");
        let quiet = !notes.contains("says otherwise") && !notes.contains("bf16, which");
        assert!(!told.is_empty() || quiet, "{config:?} {args:?}: {notes}");
    }
    assert_eq!(
        deepspeed("{\"zero_optimization\": {\"stage\": 2}, \"bf16\": {\"enabled\": false}}")
            .unwrap()
            .spec
            .train
            .precision,
        Precision::Fp32
    );
}

#[test]
fn train_py_without_arguments_has_its_defaults() {
    let spec = script("").unwrap().spec;
    assert_eq!(spec.name, "checkpoints");
    assert_eq!(spec.output, Path::new("/here/checkpoints"));
    assert_eq!(spec.model.name(), "bigcode/starcoderplus");
    assert_eq!(spec.data.sequence_tokens, 8192);
    assert_eq!((spec.data.fim_rate, spec.data.fim_spm_rate, spec.data.seed), (0.0, 0.0, 0));
    assert_eq!(spec.data.packing, Packing::SeedCompatible);
    assert_eq!(spec.adapter, None);
    let train = spec.train;
    assert_eq!((train.ranks, train.steps, train.warmup_steps), (1, 10_000, 100));
    assert_eq!((train.micro_batch_sequences, train.accumulate_micro_batches), (2, 8));
    assert_eq!((train.learning_rate, train.weight_decay, train.schedule), (5e-5, 0.05, Schedule::Cosine));
    assert_eq!((train.optimizer, train.betas, train.epsilon), (Optimizer::AdamW, (0.9, 0.999), 1e-8));
    assert_eq!((train.max_grad_norm, train.seed, train.recompute), (1.0, 42, Recompute::All));
    assert_eq!(
        (train.log_every_steps, train.eval_every_steps, train.checkpoint_every_steps),
        (1, 1000, 1000)
    );
    assert_eq!(train.keep_checkpoints, 10);
    assert_eq!(script("--no_gradient_checkpointing").unwrap().spec.train.recompute, Recompute::None);
}

#[test]
fn schedules_keep_their_shape_and_their_end() {
    let train = |word: &str| script(&format!("--lr_scheduler_type {word}")).unwrap().spec.train;
    for (word, schedule, warmup, last) in [
        ("cosine", Schedule::Cosine, 100, 0.0),
        ("cosine_with_restarts", Schedule::Cosine, 100, 0.0),
        ("linear", Schedule::Linear, 100, 0.0),
        ("polynomial", Schedule::Polynomial, 100, 1e-7),
        ("constant_with_warmup", Schedule::Constant, 100, 0.0),
        ("constant", Schedule::Constant, 0, 0.0),
    ] {
        let train = train(word);
        assert_eq!(
            (train.schedule, train.warmup_steps, train.final_learning_rate),
            (schedule, warmup, last),
            "{word}"
        );
    }
    let message = script("--lr_scheduler_type inverse_sqrt").unwrap_err();
    assert!(message.contains("--lr_scheduler_type: expected one of cosine, linear"), "{message}");
}

#[test]
fn an_argument_string_is_split_as_by_a_shell_and_read_as_by_argparse() {
    let expected = script("--seq_length 1024 --output_dir 'a b'").unwrap().spec;
    for args in [
        "python train.py --seq_length 1024 --output_dir 'a b'",
        "python3 -u ./train.py --seq_length=1024 --output_dir=\"a b\"",
        "train.py --seq_length \\\n   1024 \\\r\n --output_dir a\\ b",
        "# a comment\nCUDA_VISIBLE_DEVICES=0 accelerate launch train.py --seq_len 1024 --output_dir 'a b'",
        "--seq_length 8 --seq_length 1024 --output_d 'a b'",
    ] {
        let spec = script(args).unwrap_or_else(|message| panic!("{args}: {message}")).spec;
        assert_eq!(
            (spec.data, spec.name, spec.output),
            (expected.data.clone(), expected.name.clone(), expected.output.clone()),
            "{args}"
        );
    }
    for (args, message) in [
        ("--output_dir 'a", "a quote is not closed"),
        ("--seq_length", "--seq_length lacks its value"),
        ("--seq_length --bf16", "--seq_length lacks its value"),
        ("--bf16=yes", "--bf16 takes no value, got \"yes\""),
        ("--seq_length x", "--seq_length: expected a whole number from 8 to 1048576, got \"x\""),
        (
            "--use_4bit_quantization",
            "unknown argument \"--use_4bit_quantization\" (did you mean \"--use_4bit_qunatization\"?)",
        ),
        ("--seed 1 2", "the word \"2\" belongs to no argument"),
        ("torchrun train.py", "begins with \"torchrun\""),
        ("accelerate config", "after accelerate, expected launch"),
        ("accelerate launch --num_procs 2 train.py", "unknown argument \"--num_procs\""),
    ] {
        let found = script(args).unwrap_err();
        assert!(found.contains(&format!("--args: {message}")) || found.contains(message), "{args}: {found}");
    }
}

#[test]
fn what_the_launcher_was_told_comes_before_its_config() {
    let config = "distributed_type: FSDP\nnum_processes: 8\nfsdp_config: {fsdp_sharding_strategy: 1}\n";
    let args = "accelerate launch --config_file x.yaml --num-processes 4 --fsdp_sharding_strategy SHARD_GRAD_OP \
                train.py --bf16 --no_fp16";
    let given = Given { accelerate: Some(config), args: Some(args), ..Given::default() };
    let Converted { spec, notes, .. } = given.convert().unwrap();
    assert_eq!((spec.train.ranks, spec.train.strategy), (4, Sharding::ShardGradOp));
    let told = "a.yaml:2:16: num_processes: 8: --num_processes 4 (--args) says otherwise, and is used";
    assert!(notes.contains(told), "{notes}");
    let absent = script("accelerate launch --config_file x.yaml train.py").unwrap_err();
    assert!(
        absent.contains("--config_file x.yaml: that file holds settings as well: give it with --accelerate")
    );
    let json =
        accelerate("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: ds.json}\n");
    assert!(json.unwrap_err().contains("give it with --deepspeed"));
}

#[test]
fn adapters_need_their_settings_and_quantised_weights_need_adapters() {
    for (args, message) in [
        ("--use_peft_lora --lora_alpha 64 --lora_target_modules c_attn", "--use_peft_lora needs --lora_r"),
        ("--use_peft_lora --lora_r 8 --lora_alpha 64", "--use_peft_lora needs --lora_target_modules"),
        ("--use_4bit_qunatization", "--use_4bit_qunatization needs --use_peft_lora"),
        ("--use_peft_lora --use_4bit_qunatization --use_8bit_qunatization", "contradict each other"),
    ] {
        let found = script(args).unwrap_err();
        assert!(found.contains(message), "{args}: {found}");
    }
    let lora = "--use_peft_lora --lora_r 8 --lora_alpha 16 --lora_target_modules c_attn";
    let eight = script(&format!("{lora} --use_8bit_qunatization")).unwrap();
    assert!(eight.notes.contains("no outliers kept apart"), "{}", eight.notes);
    assert!(eight.text.contains("  quantize: int8  # --use_8bit_qunatization\n"), "{}", eight.text);
    let four = script(&format!("{lora} --use_4bit_qunatization --bnb_4bit_quant_type fp4")).unwrap();
    assert!(four.text.contains("  quantize: fp4  #") && four.text.contains("  double_quantize: false  #"));
    assert!(
        four.notes.contains("default of train.py: weights are dequantised into train.precision"),
        "{}",
        four.notes
    );
    let unused = script("--lora_r 8").unwrap();
    assert!(unused.notes.contains("--lora_r 8: has no effect"), "{}", unused.notes);
}

#[test]
fn what_makes_no_sound_job_is_refused_by_the_job_file_s_own_rules() {
    let message = script("--num_warmup_steps 100 --max_steps 50").unwrap_err();
    let expected =
        "  warmup_steps: 100  # --num_warmup_steps 100\n    train.warmup_steps is 100, but train.steps is 50";
    assert!(message.contains(expected), "{message}");
}
