//! Quantised bases and adapters on a GPU; each test probes for one and says why it skips.

use tch::{Device, Kind, Tensor};
use tunefleet_kernels::device::managed_zeros;
use tunefleet_kernels::optim::{AdamW, AdamW8State, adamw_8bit};
use tunefleet_kernels::quant::{self, Code4, FourBit, Nested};
use tunefleet_proto::job::{Optimizer, Precision, TrainSpec};
use tunefleet_worker::train::walk::Batch;

use crate::common::*;
use crate::gpu::gpu;
use crate::{engine, qlora};

const GPU: Device = Device::Cuda(0);

/// Codes, scales, codes of scales and offset of `values`, where they lie.
fn quantized(values: &Tensor, code: Code4, block: i64) -> [Tensor; 4] {
    let (len, device) = (values.numel() as i64, values.device());
    let zeros = |len: i64, kind| Tensor::zeros([len], (kind, device));
    let blocks = quant::blocks(len, block);
    let parts = [
        zeros((len + 1) / 2, Kind::Uint8),
        zeros(quant::blocks(blocks, 256), Kind::Float),
        zeros(blocks, Kind::Uint8),
        zeros(1, Kind::Float),
    ];
    let code8 = quant::dynamic_code(true, device).unwrap();
    quant::quantize_4bit(values, &four_bit(&parts, &code8, code, block)).unwrap();
    parts
}

fn four_bit<'a>(
    [codes, absmax, scale_codes, offset]: &'a [Tensor; 4],
    code8: &'a Tensor,
    code: Code4,
    block: i64,
) -> FourBit<'a> {
    FourBit { code, block, codes, absmax, nested: Some(Nested { codes: scale_codes, code8, offset }) }
}

#[test]
fn the_gpu_dequantises_the_cpus_codes_to_the_same_bits() {
    if !gpu() {
        return;
    }
    for (len, block, code) in
        [(4096 * 96, 64, Code4::Nf4), (1003, 128, Code4::Fp4), (65_537, 4096, Code4::Nf4)]
    {
        let values = Tensor::randn([len], (Kind::Float, Device::Cpu));
        let parts = quantized(&values, code, block);
        let there = [0, 1, 2, 3].map(|i| parts[i].to_device(GPU));
        for kind in [Kind::Float, Kind::BFloat16] {
            let dequantize = |parts: &[Tensor; 4], device| {
                let out = Tensor::zeros([len], (kind, device));
                let code8 = quant::dynamic_code(true, device).unwrap();
                quant::dequantize_4bit(&four_bit(parts, &code8, code, block), &out).unwrap();
                out.to_device(Device::Cpu)
            };
            assert_eq!(dequantize(&parts, Device::Cpu), dequantize(&there, GPU), "{len} {block} {kind:?}");
        }
        // Its own codes differ where a scale's reciprocal rounds otherwise, or a tie falls. Zero has two codes in
        // FP4, and bitsandbytes' CPU code takes the other one.
        let own = quantized(&values.to_device(GPU), code, block);
        let codes = |parts: &[Tensor; 4]| {
            let bytes = parts[0].to_device(Device::Cpu).to_kind(Kind::Int64);
            let codes = Tensor::cat(&[bytes.bitwise_right_shift(&Tensor::from(4)), bytes.bitwise_and(15)], 0);
            if code == Code4::Fp4 { codes.masked_fill(&codes.eq(8), 0) } else { codes }
        };
        let apart = codes(&own).ne_tensor(&codes(&parts)).sum(Kind::Int64).int64_value(&[]);
        assert!(apart * 1000 <= len, "{apart} of {len} codes differ");
    }
}

#[test]
fn rows_of_8_bits_and_moments_of_8_bits_are_the_cpus() {
    if !gpu() {
        return;
    }
    let values = Tensor::randn([96, 200], (Kind::Float, Device::Cpu));
    let rows = |values: &Tensor| {
        let device = values.device();
        let codes = Tensor::zeros([96, 200], (Kind::Int8, device));
        let scales = Tensor::zeros([96], (Kind::Float, device));
        quant::quantize_int8_rows(values, &codes, &scales).unwrap();
        let out = values.zeros_like();
        quant::dequantize_int8_rows(&codes, &scales, &out).unwrap();
        out.to_device(Device::Cpu)
    };
    assert!(largest_difference(&rows(&values), &rows(&values.to_device(GPU))) <= 0.05);

    let run = |device: Device| {
        let param = Tensor::ones([5000], (Kind::Float, device));
        let bytes = || Tensor::zeros([5000], (Kind::Uint8, device));
        let scales = || Tensor::zeros([20], (Kind::Float, device));
        let (exp_avg, exp_avg_sq, avg_scales, sq_scales) = (bytes(), bytes(), scales(), scales());
        let codes = [true, false].map(|signed| quant::dynamic_code(signed, device).unwrap());
        let (one, zero) = (Tensor::ones([], (Kind::Float, device)), Tensor::zeros([], (Kind::Float, device)));
        let options =
            AdamW { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, weight_decay: 0.01, epsilon: 1e-8 };
        for step in 1..=5 {
            tch::manual_seed(step);
            let grad = Tensor::randn([5000], (Kind::Float, Device::Cpu)).to_device(device);
            let state = AdamW8State {
                param: &param,
                grad: &grad,
                exp_avg: &exp_avg,
                exp_avg_scales: &avg_scales,
                exp_avg_sq: &exp_avg_sq,
                exp_avg_sq_scales: &sq_scales,
                signed8: &codes[0],
                unsigned8: &codes[1],
            };
            adamw_8bit(&state, step as u64, &one, &zero, options).unwrap();
        }
        param.to_device(Device::Cpu)
    };
    // Ties of codes fall otherwise there.
    assert!(largest_difference(&run(Device::Cpu), &run(GPU)) <= 1e-3);
}

#[test]
fn adapter_gradients_on_the_gpu_are_the_peers() {
    if !gpu() {
        return;
    }
    for case in qlora::cases() {
        let fixture = tensors(&case.adapter.join("fixture.safetensors"));
        let there = |name: &str| fixture[name].to_device(GPU);
        let batch = Batch::new(there("ids"), there("targets"));
        let qlora::Case { model, adapter, quantization, name } = &case;
        let mut walk =
            qlora::adapter_walk(model, adapter, *quantization, Precision::Fp32, SOLO, RECOMPUTE, GPU);
        let (loss, grads) = loss_and_grads(&mut walk, &batch);
        let peer = fixture["loss"].double_value(&[0]);
        // Its own quantisation differs in a few codes from the CPU's, which the fixture has.
        assert!((loss - peer).abs() <= 1e-3 * peer, "{name}: loss {loss}, peer {peer}");
        let all = grads.values().map(|g| norm(g).powi(2)).sum::<f64>().sqrt();
        for (tensor, ours) in &grads {
            let peer = &fixture[&format!("grad.{tensor}")];
            let error = distance(&ours.to_device(Device::Cpu), peer);
            assert!(error <= 1e-2 * norm(peer) + 1e-5 * all, "{name}: {tensor}: {error:.2e}");
        }
    }
}

#[test]
fn two_ranks_that_share_a_gpu_train_the_adapter_of_one() {
    if !gpu() {
        return;
    }
    let (_dir, model) = engine::model();
    let on =
        |ranks, micro_batch| qlora::Trained { device: GPU, ..qlora::trained(&model, ranks, micro_batch) };
    engine::assert_close(&on(1, 4).run(), &on(2, 2).run());
}

#[test]
fn moments_in_managed_memory_are_moments() {
    if !gpu() {
        return;
    }
    // Without modules that are trained whole, the embeddings' unit is empty.
    let lora = r#"{"r": 8, "lora_alpha": 16, "target_modules": ["c_attn", "c_fc"]}"#;
    assert_eq!(managed_zeros(1000, 0).unwrap().sum(Kind::Float).double_value(&[]), 0.0);
    let (_dir, model) = engine::model();
    let with = |optimizer| {
        let spec = TrainSpec { optimizer, ..engine::spec(1, 4, 1) };
        qlora::Trained { device: GPU, spec, lora: lora.to_owned(), ..qlora::trained(&model, 1, 4) }.run()
    };
    engine::assert_bit_equal(&with(Optimizer::AdamW), &with(Optimizer::AdamWPaged));
}
