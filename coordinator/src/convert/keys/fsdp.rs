//! Sections of an accelerate config. Source: accelerate 0.20 to 1.15, `commands/config/cluster.py` and
//! `utils/dataclasses.py`.

use super::Takes::{Anything, Auto, Bool, Count, Number, Text, Word};
use super::{Key, becomes, needless};

/// FSDP's strategies, in the order of their numbers; the last two are the spellings of FSDP2.
const STRATEGIES: &[&str] =
    &["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2", "true", "false"];
const PREFETCH: &[&str] = &["BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"];
const AHEAD: &str = "1 in any case: the next block is gathered while one is computed, forwards and backwards";
const UNIT: &str = "a unit is always one transformer block, as with `TRANSFORMER_BASED_WRAP`; other units train the \
                    same model";

/// `fsdp_config`; accelerate takes its keys without `fsdp_` as well.
pub const FSDP: &[Key] = &[
    becomes(
        "fsdp_config.fsdp_version",
        Count(1, 2),
        "train.strategy",
        "1 reads `fsdp_sharding_strategy`, 2 reads `fsdp_reshard_after_forward`",
    ),
    becomes(
        "fsdp_config.fsdp_sharding_strategy",
        Word(STRATEGIES, 5),
        "train.strategy, train.shard_ranks",
        "also 1 to 5; the hybrid ones shard over the ranks of a machine, and are `full_shard` on one machine; \
         `HYBRID_SHARD_ZERO2` becomes `hybrid_shard`, which gathers once more and needs less memory",
    ),
    becomes(
        "fsdp_config.fsdp_reshard_after_forward",
        Word(STRATEGIES, 5),
        "train.strategy",
        "`true`: `full_shard`; `false`: `shard_grad_op`; older spellings as with `fsdp_sharding_strategy`",
    ),
    becomes("fsdp_config.fsdp_offload_params", Bool, "train.offload", "`true`: `all`"),
    becomes("fsdp_config.fsdp_cpu_offload", Bool, "train.offload", "older spelling of `fsdp_offload_params`"),
    becomes("fsdp_config.fsdp_backward_prefetch", Word(PREFETCH, 2), "train.gather_ahead", AHEAD),
    becomes("fsdp_config.fsdp_backward_prefetch_policy", Word(PREFETCH, 2), "train.gather_ahead", AHEAD),
    becomes("fsdp_config.fsdp_forward_prefetch", Bool, "train.gather_ahead", AHEAD),
    becomes(
        "fsdp_config.fsdp_activation_checkpointing",
        Bool,
        "train.recompute",
        "`true`: `all`; so does train.py unless told `--no_gradient_checkpointing`",
    ),
    needless(
        "fsdp_config.fsdp_activation_checkpointing_offload",
        Anything,
        "what a block kept stays where it was computed",
    ),
    needless(
        "fsdp_config.fsdp_auto_wrap_policy",
        Word(&["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"], 3),
        UNIT,
    ),
    needless(
        "fsdp_config.fsdp_transformer_layer_cls_to_wrap",
        Anything,
        "the model's config says what its blocks are",
    ),
    needless("fsdp_config.fsdp_min_num_params", Anything, UNIT),
    needless(
        "fsdp_config.fsdp_state_dict_type",
        Word(&["FULL_STATE_DICT", "LOCAL_STATE_DICT", "SHARDED_STATE_DICT"], 3),
        "every rank writes its shard of a checkpoint, and the export is one whole model",
    ),
    needless(
        "fsdp_config.fsdp_sync_module_states",
        Anything,
        "every rank reads its own slices of the weights",
    ),
    needless("fsdp_config.fsdp_cpu_ram_efficient_loading", Anything, "no rank ever holds the whole model"),
    needless(
        "fsdp_config.fsdp_use_orig_params",
        Anything,
        "weights keep their names and settings, as views of a buffer",
    ),
    needless("fsdp_config.fsdp_ignored_modules", Anything, "all modules are sharded"),
];

/// `deepspeed_config` of an accelerate config.
pub const CONFIGURED_ZERO: &[Key] = &[
    needless("deepspeed_config.deepspeed_config_file", Text, "give that file with --deepspeed"),
    becomes(
        "deepspeed_config.zero_stage",
        Count(0, 3),
        "train.strategy",
        "0: `no_shard`; 1 and 2: `shard_grad_op`, which shards master weights, optimizer and gradients, and keeps \
         16-bit weights whole; 3: `full_shard`",
    ),
    becomes(
        "deepspeed_config.offload_optimizer_device",
        Word(&["none", "cpu", "nvme"], 0),
        "train.offload",
        "`cpu`: `optimizer`; `nvme`: the same, in main memory",
    ),
    becomes(
        "deepspeed_config.offload_param_device",
        Word(&["none", "cpu", "nvme"], 0),
        "train.offload",
        "`cpu`: `all`; `nvme`: the same, in main memory; for ZeRO stage 3 alone",
    ),
    needless("deepspeed_config.offload_optimizer_nvme_path", Anything, "nothing is offloaded to disks"),
    needless("deepspeed_config.offload_param_nvme_path", Anything, "nothing is offloaded to disks"),
    becomes(
        "deepspeed_config.gradient_accumulation_steps",
        Auto(&Count(1, 65_536)),
        "train.accumulate_micro_batches",
        "train.py's own comes first",
    ),
    becomes(
        "deepspeed_config.gradient_clipping",
        Auto(&Number(0.0, 1e9)),
        "train.max_grad_norm",
        "with train.py, TrainingArguments' 1.0 comes first",
    ),
    needless("deepspeed_config.zero3_init_flag", Anything, "no rank ever holds the whole model"),
    needless(
        "deepspeed_config.zero3_save_16bit_model",
        Anything,
        "the export is one whole model: export.dtype",
    ),
    needless("deepspeed_config.deepspeed_moe_layer_cls_names", Anything, "no supported model has experts"),
    needless("deepspeed_config.deepspeed_multinode_launcher", Anything, "daemons start the ranks"),
    needless("deepspeed_config.deepspeed_hostfile", Anything, "daemons start the ranks"),
    needless("deepspeed_config.deepspeed_exclusion_filter", Anything, "daemons start the ranks"),
    needless("deepspeed_config.deepspeed_inclusion_filter", Anything, "daemons start the ranks"),
];

const PARALLEL: &str =
    "above 1 it is refused: ranks share the data and the shards, and split no sequence and no product";

/// `parallelism_config` of FSDP2.
pub const PARALLELISM: &[Key] = &[
    becomes(
        "parallelism_config.parallelism_config_dp_replicate_size",
        Count(1, 1024),
        "train.strategy",
        "above 1: `hybrid_shard`, so many groups",
    ),
    becomes(
        "parallelism_config.parallelism_config_dp_shard_size",
        Count(1, 1024),
        "train.shard_ranks",
        "the ranks of a group",
    ),
    needless("parallelism_config.parallelism_config_tp_size", Count(1, 1024), PARALLEL),
    needless("parallelism_config.parallelism_config_cp_size", Count(1, 1024), PARALLEL),
    needless("parallelism_config.parallelism_config_sp_size", Count(1, 1024), PARALLEL),
    needless("parallelism_config.parallelism_config_cp_backend", Anything, PARALLEL),
    needless("parallelism_config.parallelism_config_cp_comm_strategy", Anything, PARALLEL),
    needless("parallelism_config.parallelism_config_sp_backend", Anything, PARALLEL),
    needless("parallelism_config.parallelism_config_sp_seq_length", Anything, PARALLEL),
    needless("parallelism_config.parallelism_config_sp_seq_length_is_variable", Anything, PARALLEL),
    needless("parallelism_config.parallelism_config_sp_attn_implementation", Anything, PARALLEL),
];
