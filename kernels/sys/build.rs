//! Compiles the shim against the libtorch that torch-sys links, with CUDA whenever its headers
//! stand beside it (the pip wheels put them into `nvidia/`).

use std::env;
use std::path::{Path, PathBuf};

const SOURCES: [&str; 1] = ["csrc/core.cpp"];
const CUDA_SOURCES: [&str; 1] = ["csrc/cuda.cpp"];
const NO_CUDA_SOURCES: [&str; 1] = ["csrc/no_cuda.cpp"];
const HEADERS: [&str; 2] = ["csrc/capi.h", "csrc/guard.h"];

fn main() {
    for file in SOURCES.iter().chain(&CUDA_SOURCES).chain(&NO_CUDA_SOURCES).chain(&HEADERS) {
        println!("cargo:rerun-if-changed={file}");
    }
    println!("cargo:rerun-if-env-changed=TUNEFLEET_CUDA");

    // torch-sys exports the library directory (`links = "tch"`); the headers stand beside it.
    let lib =
        PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys exports its library directory"));
    let torch = lib.parent().expect("the library directory has a parent").to_path_buf();
    println!("cargo:libtorch_lib={}", lib.display());

    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .include(torch.join("include"))
        .include(torch.join("include/torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        // libtorch's headers are not ours to mend.
        .warnings(false)
        .files(SOURCES);
    match cuda_includes(&torch) {
        Some(includes) => {
            build.includes(includes).files(CUDA_SOURCES);
            for define in ["USE_CUDA", "USE_DISTRIBUTED", "USE_C10D_NCCL"] {
                build.define(define, None);
            }
        }
        None => {
            println!("cargo:warning=no CUDA headers beside libtorch: building without CUDA and NCCL");
            build.files(NO_CUDA_SOURCES);
        }
    }
    build.compile("tunefleet_kernels");

    println!("cargo:rustc-link-search=native={}", lib.display());
    if cuda_includes(&torch).is_some() {
        // cuda.cpp references symbols of both, so `--as-needed` keeps libtorch_cuda in the binary;
        // without it CUDA would be invisible at run time, silently.
        println!("cargo:rustc-link-lib=torch_cuda");
        println!("cargo:rustc-link-lib=c10_cuda");
    }
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
}

/// Include directories of CUDA and NCCL, when they are there and not turned off.
fn cuda_includes(torch: &Path) -> Option<Vec<PathBuf>> {
    if env::var("TUNEFLEET_CUDA").as_deref() == Ok("0") {
        return None;
    }
    let site_packages = torch.canonicalize().ok()?.parent()?.to_path_buf();
    let cuda = site_packages.join("nvidia/cu13/include");
    let nccl = site_packages.join("nvidia/nccl/include");
    let found = cuda.join("cuda_runtime_api.h").exists()
        && nccl.join("nccl.h").exists()
        && torch.join("lib/libtorch_cuda.so").exists();
    found.then(|| vec![cuda, nccl])
}
