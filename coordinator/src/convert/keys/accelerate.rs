//! Settings of an accelerate config outside its sections, and the arguments of `accelerate launch`
//! that are none of them. Source: accelerate 0.20 to 1.15, `commands/config/config_args.py` and
//! `commands/launch.py`.

use super::Takes::{Anything, Bool, Count, Section, Switch, Text, Word};
use super::{Key, becomes, needless};

const RENDEZVOUS: &str = "ranks find one another through the control plane";
const TPU: &str = "for TPUs; ranks run on NVIDIA GPUs and CPUs";
const SAGEMAKER: &str = "for Amazon SageMaker; ranks run where workers are";
const COMPILER: &str = "for torch.compile; the engine has kernels of its own, and no Python to compile";
const MPI: &str = "for mpirun; daemons start the ranks";

/// In the order in which accelerate's own files have them, roughly.
pub const ACCELERATE: &[Key] = &[
    needless("compute_environment", Text, "where accelerate was to run; ranks run where workers are"),
    becomes(
        "distributed_type",
        Word(
            &[
                "NO",
                "MULTI_CPU",
                "MULTI_GPU",
                "MULTI_NPU",
                "MULTI_MLU",
                "MULTI_SDAA",
                "MULTI_MUSA",
                "MULTI_XPU",
                "MULTI_HPU",
                "MULTI_NEURON",
                "DEEPSPEED",
                "FSDP",
                "XLA",
                "TPU",
                "MPS",
                "MEGATRON_LM",
                "DATA_PARALLEL",
                "MODEL_PARALLEL",
            ],
            0,
        ),
        "train.strategy",
        "`FSDP` and `DEEPSPEED`: see their sections; `NO`: one rank; `MEGATRON_LM` and `MODEL_PARALLEL` are refused; \
         the others: `no_shard`, on GPUs where there are any",
    ),
    becomes(
        "mixed_precision",
        Word(&["no", "fp16", "bf16", "fp8"], 0),
        "train.precision",
        "`no`: `fp32`; `fp16` and `fp8`: `bf16`, which has the range of fp32, so no loss is scaled; train.py's \
         `--bf16` and `--no_fp16` come first",
    ),
    becomes("fp16", Bool, "train.precision", "older spelling of `mixed_precision: fp16`"),
    becomes("use_cpu", Bool, "train.device", "`true`: `cpu`"),
    becomes("num_processes", Count(1, 1024), "train.ranks", ""),
    becomes(
        "num_machines",
        Count(1, 1024),
        "train.shard_ranks",
        "with hybrid sharding, the ranks of one machine; else ranks go where workers have slots",
    ),
    needless("machine_rank", Anything, "the control plane places ranks"),
    needless(
        "gpu_ids",
        Anything,
        "a worker's slots are the GPUs that it sees: set CUDA_VISIBLE_DEVICES for it",
    ),
    needless("main_process_ip", Anything, RENDEZVOUS),
    needless("main_process_port", Anything, RENDEZVOUS),
    needless("rdzv_backend", Anything, RENDEZVOUS),
    needless("same_network", Anything, RENDEZVOUS),
    needless("main_training_function", Anything, "there is no script whose function is called"),
    needless("debug", Anything, "checks the shapes of collectives; here the shard plan fixes them"),
    needless("enable_cpu_affinity", Anything, "a CPU rank has threads of its own: workers.threads_per_rank"),
    needless("dynamo_config", Anything, COMPILER),
    needless("dynamo_backend", Anything, COMPILER),
    needless("fp8_config", Anything, "there is no fp8: bf16 is used"),
    needless("megatron_lm_config", Anything, "for `distributed_type: MEGATRON_LM`, which is refused"),
    needless("mpirun_config", Anything, MPI),
    needless(
        "ipex_config",
        Anything,
        "for Intel's extension of PyTorch; CPU ranks use libtorch and kernels here",
    ),
    needless("use_xpu", Anything, "for Intel GPUs; ranks run on NVIDIA GPUs and CPUs"),
    needless("downcast_bf16", Anything, TPU),
    needless("tpu_name", Anything, TPU),
    needless("tpu_zone", Anything, TPU),
    needless("tpu_use_cluster", Anything, TPU),
    needless("tpu_use_sudo", Anything, TPU),
    needless("tpu_vm", Anything, TPU),
    needless("tpu_env", Anything, TPU),
    needless("command_file", Anything, TPU),
    needless("commands", Anything, TPU),
    needless("ec2_instance_type", Anything, SAGEMAKER),
    needless("iam_role_name", Anything, SAGEMAKER),
    needless("image_uri", Anything, SAGEMAKER),
    needless("profile", Anything, SAGEMAKER),
    needless("region", Anything, SAGEMAKER),
    needless("base_job_name", Anything, SAGEMAKER),
    needless("pytorch_version", Anything, SAGEMAKER),
    needless("transformers_version", Anything, SAGEMAKER),
    needless("py_version", Anything, SAGEMAKER),
    needless("sagemaker_inputs_file", Anything, SAGEMAKER),
    needless("sagemaker_metrics_file", Anything, SAGEMAKER),
    needless("additional_args", Anything, SAGEMAKER),
    needless("fsdp_config", Section, ""),
    needless("deepspeed_config", Section, ""),
    needless("parallelism_config", Section, ""),
];

/// Settings of the config that take no value on the command line of `accelerate launch`.
pub const SWITCHES: &[&str] =
    &["debug", "same_network", "enable_cpu_affinity", "tpu_use_sudo", "downcast_bf16"];

/// Arguments of `accelerate launch` alone. Those of its config have the names that they have there.
pub const LAUNCH: &[Key] = &[
    needless("--config_file", Text, "give that file with --accelerate"),
    becomes("--use_fsdp", Switch, "train.strategy", "as `distributed_type: FSDP`"),
    becomes("--use_deepspeed", Switch, "train.strategy", "as `distributed_type: DEEPSPEED`"),
    becomes("--multi_gpu", Switch, "train.strategy", "as `distributed_type: MULTI_GPU`"),
    becomes("--cpu", Switch, "train.device", "`cpu`"),
    becomes(
        "--num_cpu_threads_per_process",
        Count(1, 1024),
        "workers.threads_per_rank",
        "threads of a rank on a CPU",
    ),
    needless("--tpu", Switch, TPU),
    needless("--tpu_cluster", Switch, TPU),
    needless("--no_tpu_cluster", Switch, TPU),
    needless("--vm", Anything, TPU),
    needless("--env", Anything, TPU),
    needless("--ipex", Switch, "for Intel's extension of PyTorch; CPU ranks use libtorch and kernels here"),
    needless("--use_mps_device", Switch, "for Apple's GPUs; ranks run on NVIDIA GPUs and CPUs"),
    needless("--use_parallelism_config", Switch, "`parallelism_config` speaks for itself"),
    needless("--dynamo_mode", Anything, COMPILER),
    needless("--dynamo_use_fullgraph", Switch, COMPILER),
    needless("--dynamo_use_dynamic", Switch, COMPILER),
    needless("--dynamo_use_regional_compilation", Switch, COMPILER),
    needless("--mpirun_hostfile", Anything, MPI),
    needless("--mpirun_ccl", Anything, MPI),
    needless("--rdzv_conf", Anything, RENDEZVOUS),
    needless(
        "--max_restarts",
        Anything,
        "restart.max_restarts says how often a job whose rank failed is started again",
    ),
    needless("--monitor_interval", Anything, "daemons are told when a rank ends"),
    needless("--log_dir", Anything, "a job's logs are in its output directory: coordinator logs"),
    needless("--tee", Anything, "coordinator logs shows what ranks print"),
    needless("--role", Anything, "ranks have numbers, and no roles"),
    needless("--module", Switch, "there is no script that Python has to find"),
    needless("--no_python", Switch, "there is no script that Python has to run"),
    needless("--quiet", Switch, "concerns what the launcher prints"),
];
