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

/// Elements of the smallest result that are compared at least.
const ELEMENTS: usize = 200;

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
/// libtorch's own order of additions changes with the shape. Results with few elements, which either may happen to
/// round luckily, are drawn many times, and the middle draw counts.
pub fn assert_about_as_exact(
    inputs: impl Fn() -> Vec<Tensor>,
    ours: impl Fn(&[Tensor]) -> Tensor,
    theirs: impl Fn(&[Tensor]) -> Tensor,
    name: &str,
) {
    // Of the output and each gradient, for each draw: our error as a share of theirs, and both.
    let mut draws: Vec<Vec<[f64; 3]>> = Vec::new();
    let (mut elements, mut most) = (0, 1.3);
    while elements < ELEMENTS {
        let inputs = inputs();
        let wide: Vec<Tensor> = inputs.iter().map(wide).collect();
        let weights = weights_like(&ours(&inputs));
        let leaves: Vec<Tensor> = wide.iter().map(|x| x.set_requires_grad(true)).collect();
        let exact = theirs(&leaves);
        let exact_grads =
            crate::autograd::grad(&exact, &weights.to_device(Device::Cpu).to_kind(Kind::Double), &leaves)
                .unwrap();
        let (our_out, our_grads) = run(&inputs, &ours);
        let (their_out, their_grads) = run(&inputs, &theirs);
        if our_out.device().is_cuda() {
            most = 2.0;
        }
        let all = |out, grads| [out].into_iter().chain(grads).collect::<Vec<Tensor>>();
        let (own, peers) = (all(our_out, our_grads), all(their_out, their_grads));
        let exact = all(exact, exact_grads);
        draws.resize(exact.len(), Vec::new());
        elements += own.iter().map(Tensor::numel).min().unwrap_or(ELEMENTS);
        for (i, draws) in draws.iter_mut().enumerate() {
            assert_eq!(
                (own[i].size(), own[i].kind()),
                (peers[i].size(), peers[i].kind()),
                "{name}: result {i}"
            );
            // What fp32 cannot tell apart, where a result happens to be exact.
            let noise = exact[i].detach().norm().double_value(&[]) * 1e-7 + 1e-7;
            let (own, peers) = (error(&own[i], &exact[i]), error(&peers[i], &exact[i]));
            draws.push([(own - noise).max(0.0) / peers.max(noise), own, peers]);
        }
    }
    for (i, mut draws) in draws.into_iter().enumerate() {
        draws.sort_by(|a, b| a[0].total_cmp(&b[0]));
        let [share, own, peers] = draws[draws.len() / 2];
        assert!(share <= most, "{name}: result {i} is off by {own}, libtorch's by {peers}");
    }
}
