//! What needs a GPU: the engine on it, and NCCL as far as one GPU can prove it. Each test probes
//! for one and says why it skips.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use crate::common::*;
use tch::{Device, Kind, Tensor};
use tunefleet_kernels::nccl::Store;
use tunefleet_proto::ids::Rank;
use tunefleet_proto::job::Precision;
use tunefleet_proto::model::{Dropout, ModelConfig, Qkv, Window};
use tunefleet_proto::shard_plan::ShardPlan;
use tunefleet_worker::checkpoint::{hugging_face, model_dir};
use tunefleet_worker::comm::nccl::NcclCommunicator;
use tunefleet_worker::comm::{Communicator, Error, Mesh, Solo, Tag};
use tunefleet_worker::generate::decoder::Decoder;
use tunefleet_worker::model::numerics::Numerics;
use tunefleet_worker::train::rng::Seeds;
use tunefleet_worker::train::walk::{Batch, MicroPosition, Walk};

const TAG: Tag = Tag { unit: None, what: "test" };

pub fn gpu() -> bool {
    let found = tch::Cuda::is_available();
    if !found {
        println!("skipped: this machine has no GPU that libtorch can use");
    }
    found
}

#[derive(Default)]
struct Memory(Mutex<HashMap<String, Vec<u8>>>);

impl Store for Memory {
    fn set(&self, key: &str, value: &[u8]) -> bool {
        self.0.lock().unwrap().insert(key.to_owned(), value.to_vec());
        true
    }
    fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.0.lock().unwrap().get(key).cloned()
    }
}

fn alone() -> NcclCommunicator {
    NcclCommunicator::join(Rank::SOLE, 0, Box::<Memory>::default(), Duration::from_secs(30)).unwrap()
}

#[test]
fn nccl_in_a_world_of_one_gathers_reduces_and_meets() {
    if !gpu() {
        return;
    }
    let comm = alone();
    let x = Tensor::randn([1 << 20], (Kind::Float, Device::Cuda(0)));
    let before = x.copy();
    comm.all_gather(&x, TAG).unwrap().wait().unwrap();
    comm.all_reduce(&x, TAG).unwrap().wait().unwrap();
    let out = x.zeros_like();
    comm.reduce_scatter(&x, &out, TAG).unwrap().wait().unwrap();
    comm.barrier().unwrap();
    assert!(x.equal(&before) && out.equal(&before));
    let wrong = comm.all_reduce(&Tensor::zeros([1], (Kind::Float, Device::Cpu)), TAG).err().unwrap();
    assert!(wrong.to_string().contains("tensor must be on Cuda(0)"), "{wrong}");
}

#[test]
fn an_aborted_nccl_group_refuses_what_follows() {
    if !gpu() {
        return;
    }
    let comm = alone();
    std::thread::scope(|scope| {
        scope.spawn(|| comm.abort("a peer is gone"));
    });
    let x = Tensor::zeros([8], (Kind::Float, Device::Cuda(0)));
    let error = comm.all_reduce(&x, TAG).err().unwrap();
    assert!(matches!(&error, Error::Aborted(reason) if reason == "a peer is gone"), "{error}");
}

/// Loss and gradients of one batch on `device`.
fn step(
    dir: &std::path::Path,
    device: Device,
    precision: Precision,
    comm: &dyn Communicator,
) -> (f64, Vec<Tensor>) {
    // As a rank does: some of libtorch's kernels add up in no fixed order otherwise.
    tunefleet_kernels::device::set_deterministic(true).unwrap();
    let config = hugging_face::read_config(dir).unwrap();
    let plan = ShardPlan::new(&config, 1);
    let numerics = Numerics::new(device, precision);
    let shards = tunefleet_worker::train::units::shards(
        &plan,
        0,
        numerics,
        tunefleet_proto::job::Optimizer::AdamW,
        tunefleet_proto::job::Offload::None,
        numerics.kind,
    )
    .unwrap();
    hugging_face::load(dir, &plan, Mesh::sharded(comm), &shards).unwrap();
    let mut walk =
        Walk::new(config.clone(), plan, shards, numerics, Mesh::sharded(comm), Seeds::new(0), RECOMPUTE);
    tch::manual_seed(11);
    let tokens = Tensor::randint(config.vocab_size as i64, [4, 128], (Kind::Int64, Device::Cpu));
    let targets = tokens.roll([-1], [1]);
    let batch = Batch::new(tokens.to_device(device), targets.to_device(device));
    let scale = Tensor::from(1.0 / 512.0).to_kind(Kind::Float).to_device(device);
    walk.begin_step().unwrap();
    let loss = walk.train_micro_batch(&batch, MicroPosition { step: 1, micro: 0, of: 1 }, &scale).unwrap();
    walk.finish_step().unwrap();
    let grads = walk.shards().iter().map(|s| s.grad.to_device(Device::Cpu)).collect();
    (loss.double_value(&[]) / 512.0, grads)
}

/// A small model of each family, biases and norms random too.
fn small_models(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let small = |preset: &str| ModelConfig {
        layers: 2,
        hidden_size: 128,
        heads: 4,
        kv_heads: 2,
        intermediate_size: 352,
        vocab_size: 1024,
        max_positions: 256,
        dropout: Dropout::NONE,
        ..ModelConfig::preset(preset).unwrap()
    };
    let window = |tokens| Some(Window { tokens, first_block: 1 });
    let of_heads = ModelConfig { kv_heads: 4, qkv: Qkv::FusedByHead, ..small("starcoderbase-1b") };
    let shapes = [
        ("tiny", ModelConfig::preset("tiny").unwrap()),
        ("heads", of_heads),
        ("llama", small("deepseek-coder-1.3b")),
        ("qwen2", ModelConfig { window: window(48), ..small("qwen2.5-coder-0.5b") }),
        (
            "starcoder2",
            ModelConfig { window: Some(Window { tokens: 40, first_block: 0 }), ..small("starcoder2-3b") },
        ),
    ];
    tch::manual_seed(7);
    let write = |(name, config): (&str, ModelConfig)| {
        let path = dir.join(name);
        model_dir::write(&path, &config, Precision::Fp32, None, |parameter, sink| {
            let values = Tensor::randn([parameter.elements() as i64], (Kind::Float, Device::Cpu)) * 0.05;
            let is_norm = !parameter.decays && parameter.name.ends_with(".weight");
            sink(&Vec::<f32>::try_from(if is_norm { values + 1.0 } else { values }).unwrap())
        })
        .unwrap();
        path
    };
    shapes.map(write).to_vec()
}

#[test]
fn the_gpu_computes_what_the_cpu_computes() {
    if !gpu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let nccl = alone();
    for model in small_models(dir.path()) {
        let name = model.file_name().unwrap().to_str().unwrap();
        let (cpu_loss, cpu) = step(&model, Device::Cpu, Precision::Fp32, &Solo);
        for (precision, tolerance) in [(Precision::Fp32, 1e-4), (Precision::Bf16, 3e-2)] {
            for comm in [&Solo as &dyn Communicator, &nccl] {
                let (loss, grads) = step(&model, Device::Cuda(0), precision, comm);
                assert!(
                    (loss - cpu_loss).abs() <= tolerance * cpu_loss,
                    "{name} {precision:?}: {loss} and {cpu_loss}"
                );
                for (gpu, cpu) in grads.iter().zip(&cpu) {
                    let ratio = distance(gpu, cpu) / norm(cpu);
                    assert!(ratio <= tolerance, "{name} {precision:?}: gradients differ by {ratio}");
                }
                let (again, grads_again) = step(&model, Device::Cuda(0), precision, comm);
                assert_eq!(loss, again, "{name}: two runs differ");
                assert!(grads.iter().zip(&grads_again).all(|(a, b)| a.equal(b)), "{name}: two runs differ");
            }
        }
    }
}

#[test]
fn completions_on_the_gpu_have_the_logits_of_the_cpu_whatever_the_family() {
    if !gpu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (0..120).map(|n| n * n * 7 % 1000).collect();
    for model in small_models(dir.path()) {
        let [cpu, gpu] = [Device::Cpu, Device::Cuda(0)]
            .map(|device| Decoder::load(&model, Numerics::new(device, Precision::Fp32)).unwrap());
        // Alone, a few, many: each has a way of its own.
        for pieces in [vec![120], vec![60, 1, 1, 1, 7, 50]] {
            let (mut on_cpu, mut on_gpu) = (cpu.context(8), gpu.context(8));
            let mut first = 0;
            for count in pieces {
                let shown = &tokens[first..first + count];
                first += count;
                let ours = gpu.next_logits(&mut on_gpu, shown);
                let apart = largest_difference(&ours, &cpu.next_logits(&mut on_cpu, shown));
                assert!(apart <= 1e-3, "{}: after {first} tokens {apart:.1e} apart", model.display());
            }
        }
    }
}
