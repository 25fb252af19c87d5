//! Arguments of the original train.py, as published with the Personal Copilot post (October 2023),
//! with the defaults that it gave them.

use super::Takes::{Anything, Count, Number, Switch, Text, Word};
use super::{Key, becomes, needless};

/// In the order of its `--help`.
pub const SCRIPT: &[Key] = &[
    becomes(
        "--model_path",
        Text,
        "model.hub, model.path",
        "default bigcode/starcoderplus; what is no OWNER/NAME of the hub becomes a path",
    ),
    becomes(
        "--dataset_name",
        Text,
        "dataset",
        "default smangrul/hf-stack-v1; a dataset is a directory that `coordinator collect` writes",
    ),
    needless("--subset", Anything, "train.py reads it and does nothing with it"),
    needless("--split", Text, "a dataset has files to train on and files held out, and no other splits"),
    needless(
        "--size_valid_set",
        Count(0, u64::MAX),
        "only with --streaming; see collect.validation_fraction",
    ),
    becomes(
        "--test_size",
        Number(0.0, 0.5),
        "collect.validation_fraction",
        "default 0.005; stands in the commented `collect` section",
    ),
    needless("--streaming", Switch, "files are always streamed, from memory-mapped segments"),
    needless("--shuffle_buffer", Count(0, u64::MAX), "only with --streaming"),
    needless("--data_column", Text, "the text of a file is always in the column `content`"),
    becomes("--seq_length", Count(8, 1 << 20), "data.sequence_tokens", "default 8192"),
    becomes("--max_steps", Count(1, 1_000_000_000), "train.steps", "default 10000"),
    becomes(
        "--batch_size",
        Count(1, 65_536),
        "train.micro_batch_sequences",
        "default 2; also of an evaluation",
    ),
    becomes("--gradient_accumulation_steps", Count(1, 65_536), "train.accumulate_micro_batches", "default 8"),
    needless("--eos_token_id", Anything, "train.py reads it and takes the tokenizer's"),
    becomes("--learning_rate", Number(0.0, 1.0), "train.learning_rate", "default 5e-5"),
    becomes(
        "--lr_scheduler_type",
        Word(
            &["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "cosine_with_restarts"],
            0,
        ),
        "train.schedule, train.schedule_power, train.final_learning_rate",
        "default cosine; `constant` has no warm-up; `polynomial` ends at 1e-7 with power 1; `cosine_with_restarts` \
         restarts once, which is `cosine`",
    ),
    becomes("--num_warmup_steps", Count(0, 1_000_000_000), "train.warmup_steps", "default 100"),
    becomes(
        "--weight_decay",
        Number(0.0, 1.0),
        "train.weight_decay",
        "default 0.05; biases and norms are exempt in both",
    ),
    needless("--local_rank", Anything, "ranks know their numbers"),
    becomes(
        "--no_fp16",
        Switch,
        "train.precision",
        "turns fp16 off, which is on by default and becomes `bf16`",
    ),
    becomes(
        "--bf16",
        Switch,
        "train.precision",
        "without it and with `--no_fp16`: what accelerate says, else `fp32`",
    ),
    becomes("--no_gradient_checkpointing", Switch, "train.recompute", "`none`; without it `all`"),
    becomes(
        "--seed",
        Count(0, 0xffff_ffff),
        "data.seed, collect.split_seed",
        "default 0; `train.seed` is TrainingArguments' 42, which also shuffled the original's windows",
    ),
    needless(
        "--num_workers",
        Anything,
        "processes that load the dataset; its segments are mapped into memory",
    ),
    becomes("--output_dir", Text, "output, name", "default ./checkpoints"),
    becomes("--log_freq", Count(1, 1_000_000_000), "train.log_every_steps", "default 1"),
    becomes(
        "--eval_freq",
        Count(1, 1_000_000_000),
        "train.eval_every_steps",
        "default 1000; on all held-out files",
    ),
    becomes(
        "--save_freq",
        Count(1, 1_000_000_000),
        "train.checkpoint_every_steps, train.keep_checkpoints",
        "default 1000; all are kept",
    ),
    becomes("--fim_rate", Number(0.0, 1.0), "data.fim_rate", "default 0"),
    becomes("--fim_spm_rate", Number(0.0, 1.0), "data.fim_spm_rate", "default 0"),
    becomes("--use_peft_lora", Switch, "adapter", "an `adapter` section; the arguments below need it"),
    becomes("--lora_r", Count(1, 65_536), "adapter.rank", "must be given: its default 0 is refused"),
    becomes("--lora_alpha", Count(1, 1_000_000), "adapter.alpha", "must be given: its default 0 is refused"),
    becomes("--lora_dropout", Number(0.0, 0.999_999), "adapter.dropout", "default 0"),
    becomes("--lora_target_modules", Text, "adapter.target_modules", "must be given"),
    needless("--use_flash_attn", Switch, "attention is always fused"),
    becomes("--use_4bit_qunatization", Switch, "adapter.quantize", "by `--bnb_4bit_quant_type`"),
    becomes("--use_nested_quant", Switch, "adapter.double_quantize", "`true`; without it `false`"),
    becomes("--bnb_4bit_quant_type", Word(&["nf4", "fp4"], 0), "adapter.quantize", "default nf4"),
    becomes(
        "--bnb_4bit_compute_dtype",
        Word(&["float16", "bfloat16", "float32"], 0),
        "train.precision",
        "default float16; weights are dequantised into `train.precision`",
    ),
    becomes(
        "--use_8bit_qunatization",
        Switch,
        "adapter.quantize",
        "`int8`: a scale per row, and no outliers kept apart, since dequantised weights are multiplied",
    ),
    needless("--push_to_hub", Switch, "what is exported stays in the job's output directory"),
];
