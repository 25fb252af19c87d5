//! What the tests of this room share.

use std::process::Command;

use tch::{Device, Kind, Tensor};

/// Distance of `ours` from `exact` (fp64), in the Euclidean norm.
pub fn error(ours: &Tensor, exact: &Tensor) -> f64 {
    (wide(ours) - exact.detach().to_device(Device::Cpu)).square().sum(Kind::Double).double_value(&[]).sqrt()
}

/// In fp64 on the CPU, without a graph.
pub fn wide(x: &Tensor) -> Tensor {
    x.detach().to_device(Device::Cpu).to_kind(Kind::Double)
}

/// The CPU, and a GPU where there is one.
pub fn devices() -> Vec<Device> {
    if tch::Cuda::is_available() {
        return vec![Device::Cpu, Device::Cuda(0)];
    }
    println!("skipped on a GPU: this machine has none that libtorch can use");
    vec![Device::Cpu]
}

/// Asserts that `run` returns the same bits on one thread and on three, and so, on a GPU, when it is repeated.
/// Tests run in processes of their own.
pub fn assert_same_on_any_number_of_threads(run: impl Fn() -> Vec<Tensor>) {
    let threads = tch::get_num_threads();
    tch::set_num_threads(1);
    let one = run();
    tch::set_num_threads(3);
    let three = run();
    tch::set_num_threads(threads);
    for (i, (one, three)) in one.iter().zip(&three).enumerate() {
        assert!(one.equal(three), "result {i} is not what it was");
    }
}

/// Runs a test of this program again where libtorch and this crate take the CPU for one without AVX-512.
pub fn assert_passes_without_avx512(test: &str) {
    let mut again = Command::new(std::env::current_exe().unwrap());
    let output = again.args(["--exact", test]).env("ATEN_CPU_CAPABILITY", "avx2").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("1 passed"), "{test}: {text}");
}

/// Rows and columns: a single element, around a register's and a word's width, and more rows than one part of a sum.
pub const SHAPES: [(i64, i64); 9] =
    [(1, 1), (2, 3), (3, 63), (65, 64), (64, 65), (5, 1000), (1000, 5), (200, 256), (2, 5003)];

/// What the gradients of `out` are weighted by: fixed, with both signs, and without a period that sums in one
/// order or another would meet.
pub fn weights_like(out: &Tensor) -> Tensor {
    let len = out.numel() as i64;
    let steps = Tensor::arange(len, (Kind::Double, Device::Cpu));
    ((steps.square() * 0.7).sin() * 2.0)
        .view(out.size().as_slice())
        .to_device(out.device())
        .to_kind(out.kind())
}

/// The result of `op` and the gradients with respect to each of `inputs`.
pub fn run(inputs: &[Tensor], op: impl Fn(&[Tensor]) -> Tensor) -> (Tensor, Vec<Tensor>) {
    let leaves: Vec<Tensor> = inputs.iter().map(|x| x.detach().set_requires_grad(true)).collect();
    let out = op(&leaves);
    let grads = crate::autograd::grad(&out, &weights_like(&out), &leaves).unwrap();
    (out.detach(), grads)
}

/// Asserts that `ours` and its gradients are at most 1.3 times as far from fp64 as `theirs`; on a GPU 2 times, where
/// libtorch's own order of additions changes with the shape.
pub fn assert_about_as_exact(
    inputs: &[Tensor],
    ours: impl Fn(&[Tensor]) -> Tensor,
    theirs: impl Fn(&[Tensor]) -> Tensor,
    name: &str,
) {
    let wide: Vec<Tensor> = inputs.iter().map(wide).collect();
    let weights = weights_like(&ours(inputs));
    let leaves: Vec<Tensor> = wide.iter().map(|x| x.set_requires_grad(true)).collect();
    let exact = theirs(&leaves);
    let exact_grads =
        crate::autograd::grad(&exact, &weights.to_device(Device::Cpu).to_kind(Kind::Double), &leaves)
            .unwrap();
    let (our_out, our_grads) = run(inputs, ours);
    let (their_out, their_grads) = run(inputs, theirs);
    let most = if our_out.device().is_cuda() { 2.0 } else { 1.3 };
    let results = [&our_out].into_iter().chain(&our_grads).zip([&their_out].into_iter().chain(&their_grads));
    for (i, ((own, peers), exact)) in results.zip([&exact].into_iter().chain(&exact_grads)).enumerate() {
        assert_eq!((own.size(), own.kind()), (peers.size(), peers.kind()), "{name}: result {i}");
        let (own, peers) = (error(own, exact), error(peers, exact));
        // What fp32 cannot tell apart, where a result happens to be exact.
        let noise = exact.detach().norm().double_value(&[]) * 1e-7;
        assert!(
            own <= most * peers + noise + 1e-7,
            "{name}: result {i} is off by {own}, libtorch's by {peers}"
        );
    }
}
