//! The quantisation kernels against bitsandbytes' on the CPU, bit for bit; what the fixtures hold stands
//! in `tests/parity/README.md`.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};
use tunefleet_kernels::optim::{AdamW, AdamW8State, adamw_8bit};
use tunefleet_kernels::quant::{self, Code4, FourBit, Nested};

use crate::common::*;

type Fixture = (serde_json::Value, HashMap<String, Tensor>);

fn fixture() -> Option<Fixture> {
    let dir = fixtures_of("make_quant_fixtures.py", "quant")?;
    let index = std::fs::read_to_string(dir.join("index.json")).unwrap();
    Some((serde_json::from_str(&index).unwrap(), tensors(&dir.join("quant.safetensors"))))
}

fn cases(index: &serde_json::Value, key: &str) -> Vec<(String, serde_json::Value)> {
    let cases = index[key].as_array().unwrap();
    assert!(!cases.is_empty());
    cases.iter().map(|case| (case["name"].as_str().unwrap().to_owned(), case.clone())).collect()
}

/// Equal in every bit, zeros of either sign and all.
fn assert_bits(ours: &Tensor, theirs: &Tensor, what: &str) {
    let bytes = |t: &Tensor| tunefleet_kernels::bytes::bytes(&t.contiguous()).unwrap().to_vec();
    let (ours, theirs) = (ours.contiguous(), theirs.contiguous());
    assert_eq!(ours.kind(), theirs.kind(), "{what}");
    if bytes(&ours) != bytes(&theirs) {
        let differ = ours.reshape([-1]).ne_tensor(&theirs.reshape([-1]));
        let count = differ.sum(Kind::Int64).int64_value(&[]);
        panic!("{what}: {count} of {} differ, or signs of zeros do", ours.numel());
    }
}

#[test]
fn codes_scales_and_values_of_4_bits_are_bitsandbytes_to_the_bit() {
    let Some((index, file)) = fixture() else { return };
    let code8 = quant::dynamic_code(true, Device::Cpu).unwrap();
    for (name, case) in cases(&index, "four_bit") {
        let values = &file[case["values"].as_str().unwrap()];
        let (len, block) = (values.numel() as i64, case["block"].as_i64().unwrap());
        let code = if case["kind"] == "fp4" { Code4::Fp4 } else { Code4::Nf4 };
        let zeros = |len: i64, kind| Tensor::zeros([len], (kind, Device::Cpu));
        let blocks = quant::blocks(len, block);
        let double = case["double"].as_bool().unwrap();
        let codes = zeros((len + 1) / 2, Kind::Uint8);
        let absmax = zeros(if double { quant::blocks(blocks, 256) } else { blocks }, Kind::Float);
        let (absmax8, offset) = (zeros(blocks, Kind::Uint8), zeros(1, Kind::Float));
        let nested = double.then_some(Nested { codes: &absmax8, code8: &code8, offset: &offset });
        let parts = FourBit { code, block, codes: &codes, absmax: &absmax, nested };
        quant::quantize_4bit(values, &parts).unwrap();

        let theirs = |part: &str| &file[&format!("{name}.{part}")];
        assert_bits(&codes, theirs("codes"), &format!("{name}: codes"));
        if double {
            assert_bits(&offset, theirs("offset"), &format!("{name}: offset"));
            assert_bits(&absmax, theirs("absmax2"), &format!("{name}: second scales"));
            assert_bits(&absmax8, theirs("absmax8"), &format!("{name}: codes of scales"));
        } else {
            assert_bits(&absmax, theirs("absmax"), &format!("{name}: scales"));
        }
        for (part, kind) in [("f32", Kind::Float), ("bf16", Kind::BFloat16)] {
            // Its kernel takes denormals for zeros where the CPU rounds to bf16 in one instruction.
            if name.starts_with("denormal") && kind == Kind::BFloat16 {
                continue;
            }
            let out = zeros(len, kind);
            quant::dequantize_4bit(&parts, &out).unwrap();
            assert_bits(&out, &theirs(part).reshape([-1]), &format!("{name}: values in {part}"));
        }
    }
}

#[test]
fn rows_of_8_bits_are_bitsandbytes_to_the_bit() {
    let Some((index, file)) = fixture() else { return };
    for (name, case) in cases(&index, "int8") {
        let values = &file[case["values"].as_str().unwrap()];
        let theirs = |part: &str| &file[&format!("{name}.{part}")];
        let codes = theirs("codes").zeros_like();
        let scales = theirs("scales").zeros_like();
        quant::quantize_int8_rows(values, &codes, &scales).unwrap();
        assert_bits(&codes, theirs("codes"), &format!("{name}: codes"));
        assert_bits(&scales, theirs("scales"), &format!("{name}: scales"));
        let out = theirs("f32").zeros_like();
        quant::dequantize_int8_rows(&codes, &scales, &out).unwrap();
        assert_bits(&out, theirs("f32"), &format!("{name}: values"));
    }
}

#[test]
fn blocks_of_8_bits_are_bitsandbytes_to_the_bit_and_moments_survive_exactly() {
    let Some((index, file)) = fixture() else { return };
    for signed in [true, false] {
        let name = if signed { "code8.signed" } else { "code8.unsigned" };
        assert_bits(&quant::dynamic_code(signed, Device::Cpu).unwrap(), &file[name], name);
    }
    for (name, case) in cases(&index, "blockwise8") {
        let theirs = |part: &str| file[&format!("{name}.{part}")].reshape([-1]);
        let code8 = &file[case["code"].as_str().unwrap()];
        let values = theirs("values");
        let (codes, absmax) = (theirs("codes").zeros_like(), theirs("absmax").zeros_like());
        quant::quantize_8bit(&values, code8, 256, &codes, &absmax).unwrap();
        assert_bits(&codes, &theirs("codes"), &format!("{name}: codes"));
        assert_bits(&absmax, &theirs("absmax"), &format!("{name}: scales"));
        let out = values.zeros_like();
        quant::dequantize_8bit(&codes, &absmax, code8, 256, &out).unwrap();
        assert_bits(&out, &theirs("f32"), &format!("{name}: values"));
        // As moments are held: what was dequantised has the same codes and scales again.
        quant::quantize_8bit_signed(&values, code8, 256, &codes, &absmax).unwrap();
        quant::dequantize_8bit(&codes, &absmax, code8, 256, &out).unwrap();
        if !name.ends_with("denormal") {
            let largest = values.abs().max().double_value(&[]);
            let error = largest_difference(&out, &values);
            assert!(error <= 0.016 * largest, "{name}: {error} of {largest}");
        }
        let (again, scales) = (codes.zeros_like(), absmax.zeros_like());
        quant::quantize_8bit_signed(&out, code8, 256, &again, &scales).unwrap();
        assert_bits(&again, &codes, &format!("{name}: codes again"));
        assert!(scales == absmax, "{name}: scales again");
    }
}

/// Each step from the fixture's states: bitsandbytes' own table would take small second moments for
/// zero, and the nearest code of some is zero as well, which ours never is.
#[test]
fn adamw_in_8_bits_takes_the_steps_of_its_arithmetic_and_no_leaps() {
    let Some((_, file)) = fixture() else { return };
    let options = AdamW { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, weight_decay: 0.01, epsilon: 1e-8 };
    let cpu = (Kind::Float, Device::Cpu);
    let (one, zero) = (Tensor::ones([], cpu), Tensor::zeros([], cpu));
    let update = |step: i64, param: &Tensor, states: &[Tensor; 4]| {
        let [exp_avg, exp_avg_scales, exp_avg_sq, exp_avg_sq_scales] = states;
        let state = AdamW8State {
            param,
            grad: &file["adamw8.grads"].get(step),
            exp_avg,
            exp_avg_scales,
            exp_avg_sq,
            exp_avg_sq_scales,
            signed8: &file["code8.signed"],
            unsigned8: &file["code8.unsigned"],
        };
        adamw_8bit(&state, step as u64 + 1, &one, &zero, options).unwrap();
    };
    let parts = ["exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax"];
    let theirs = |part: &str, step: i64| file[&format!("adamw8.nearest.{part}")].get(step).copy();
    let steps = file["adamw8.grads"].size()[0];
    for step in 0..steps {
        let (param, states) = match step {
            0 => (file["adamw8.start"].copy(), parts.map(|part| theirs(part, 0).zeros_like())),
            _ => (theirs("param", step - 1), parts.map(|part| theirs(part, step - 1))),
        };
        update(step, &param, &states);
        let distance = largest_difference(&param, &theirs("param", step));
        assert!(distance <= 2e-6, "step {step}: parameters differ by {distance}");
        // Second moments are held alike, but for one rounding more or less and for zeros.
        let apart = (states[2].to_kind(Kind::Int) - theirs(parts[2], step).to_kind(Kind::Int)).abs();
        assert!(apart.max().int64_value(&[]) <= 1, "step {step}: codes of second moments");
        assert!(largest_difference(&states[1].abs(), &theirs(parts[1], step)) <= 1e-6 * norm(&states[1]));
    }
    // On its own way, an element moves by about the learning rate each step.
    let param = file["adamw8.start"].copy();
    let states = parts.map(|part| theirs(part, 0).zeros_like());
    (0..steps).for_each(|step| update(step, &param, &states));
    let moved = largest_difference(&param, &file["adamw8.start"]);
    assert!(moved <= 1e-2 * steps as f64, "an element moved by {moved}");
}
