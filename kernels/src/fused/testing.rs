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

/// Asserts that `run` returns the same bits on one thread and on three. Tests run in processes of their own.
pub fn assert_same_on_any_number_of_threads(run: impl Fn() -> Vec<Tensor>) {
    let threads = tch::get_num_threads();
    tch::set_num_threads(1);
    let one = run();
    tch::set_num_threads(3);
    let three = run();
    tch::set_num_threads(threads);
    for (i, (one, three)) in one.iter().zip(&three).enumerate() {
        assert!(one.equal(three), "result {i} depends on the number of threads");
    }
}

/// Runs a test of this program again where libtorch and this crate take the CPU for one without AVX-512.
pub fn assert_passes_without_avx512(test: &str) {
    let mut again = Command::new(std::env::current_exe().unwrap());
    let output = again.args(["--exact", test]).env("ATEN_CPU_CAPABILITY", "avx2").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("1 passed"), "{test}: {text}");
}
