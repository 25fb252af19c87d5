//! What products of a few rows with a large matrix take beside libtorch's, as a table: `scripts/bench` runs it.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a table is what it is for")]

use std::time::Instant;

use tch::{Device, Kind, Tensor};
use tunefleet_kernels::few_rows::{self, Matrix};
use tunefleet_kernels::quant::{self, Code4, FourBit, Nested};

const OUTPUTS: i64 = 49_152;
const INPUTS: i64 = 2_048;
const REPEATS: usize = 9;
const FITS: &str = "tensors of one shape";

/// Median seconds of `run`.
fn seconds(mut run: impl FnMut()) -> f64 {
    run();
    let mut all: Vec<f64> = (0..REPEATS)
        .map(|_| {
            let begin = Instant::now();
            run();
            begin.elapsed().as_secs_f64()
        })
        .collect();
    all.sort_by(f64::total_cmp);
    all[REPEATS / 2]
}

fn row(name: &str, rows: i64, bytes: f64, x: &Tensor, matrix: &Matrix<'_>, peer: Option<&Tensor>) {
    let ours = seconds(|| drop(few_rows::linear(x, matrix, None).expect(FITS).expect("a CPU with AVX-512")));
    let theirs = peer.map(|weight| seconds(|| drop(x.linear(weight, None::<&Tensor>))));
    println!(
        "| {name} | {rows} | {:.2} | {} | {} | {:.1} |",
        ours * 1e3,
        theirs.map_or_else(String::new, |s| format!("{:.2}", s * 1e3)),
        theirs.map_or_else(String::new, |s| format!("{:.1}x", s / ours)),
        bytes / ours / 1e9
    );
}

fn main() {
    let cpu = Device::Cpu;
    let weight = Tensor::randn([OUTPUTS, INPUTS], (Kind::Float, cpu));
    let narrow = weight.to_kind(Kind::BFloat16);
    let codes8 = Tensor::zeros([OUTPUTS, INPUTS], (Kind::Int8, cpu));
    let row_scales = Tensor::zeros([OUTPUTS], (Kind::Float, cpu));
    quant::quantize_int8_rows(&weight, &codes8, &row_scales).expect(FITS);
    let (len, block) = (OUTPUTS * INPUTS, 64);
    let bytes = |len: i64| Tensor::zeros([len], (Kind::Uint8, cpu));
    let code8 = quant::dynamic_code(true, cpu).expect(FITS);
    let (codes4, scale_codes) = (bytes(len / 2), bytes(len / block));
    let absmax = Tensor::zeros([quant::blocks(len / block, 256)], (Kind::Float, cpu));
    let offset = Tensor::zeros([1], (Kind::Float, cpu));
    let parts = FourBit {
        code: Code4::Nf4,
        block,
        codes: &codes4,
        absmax: &absmax,
        nested: Some(Nested { codes: &scale_codes, code8: &code8, offset: &offset }),
    };
    quant::quantize_4bit(&weight, &parts).expect(FITS);
    println!(
        "| {OUTPUTS} x {INPUTS}, held as | rows | ours, ms | libtorch, ms | ratio | GB/s of the matrix |"
    );
    println!("| --- | --- | --- | --- | --- | --- |");
    for rows in [1, 4, 16, 32] {
        let x = Tensor::randn([rows, INPUTS], (Kind::Float, cpu));
        let count = len as f64;
        row("fp32", rows, 4.0 * count, &x, &Matrix::Dense(&weight), Some(&weight));
        let x16 = x.to_kind(Kind::BFloat16);
        row("bf16", rows, 2.0 * count, &x16, &Matrix::Dense(&narrow), Some(&narrow));
        let matrix = Matrix::Int8Rows { codes: &codes8, scales: &row_scales };
        row("8 bits", rows, count, &x16, &matrix, None);
        let matrix = Matrix::FourBit { parts: &parts, size: [OUTPUTS, INPUTS] };
        row("NF4", rows, 0.516 * count, &x16, &matrix, None);
    }
}
