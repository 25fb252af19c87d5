//! Compiles the shim against the libtorch that torch-sys links, with CUDA whenever its headers
//! stand beside it (the pip wheels put them into `nvidia/`).

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCES: [&str; 20] = [
    "csrc/core.cpp",
    "csrc/cpu_memory.cpp",
    "csrc/attention_cpu.cpp",
    "csrc/gelu_cpu.cpp",
    "csrc/fused.cpp",
    "csrc/fused_autograd.cpp",
    "csrc/columns_cpu.cpp",
    "csrc/layer_norm_cpu.cpp",
    "csrc/bias_gelu_cpu.cpp",
    "csrc/gated_cpu.cpp",
    "csrc/rotary_cpu.cpp",
    "csrc/dropout_cpu.cpp",
    "csrc/cross_entropy_cpu.cpp",
    "csrc/accumulate_cpu.cpp",
    "csrc/quant.cpp",
    "csrc/quant_cpu.cpp",
    "csrc/few_rows.cpp",
    "csrc/few_rows_cpu.cpp",
    "csrc/cached_attention.cpp",
    "csrc/cached_attention_cpu.cpp",
];
const CUDA_SOURCES: [&str; 1] = ["csrc/cuda.cpp"];
const NO_CUDA_SOURCES: [&str; 1] = ["csrc/no_cuda.cpp"];
/// For the CUDA compiler, and what stands in for it where it is absent.
const KERNELS: [&str; 10] = [
    "csrc/columns.cu",
    "csrc/layer_norm.cu",
    "csrc/bias_gelu.cu",
    "csrc/gated.cu",
    "csrc/rotary.cu",
    "csrc/dropout.cu",
    "csrc/cross_entropy.cu",
    "csrc/accumulate.cu",
    "csrc/quant.cu",
    "csrc/quant_adamw.cu",
];
const NO_KERNELS: [&str; 2] = ["csrc/fused_no_cuda.cpp", "csrc/quant_no_cuda.cpp"];
const HEADERS: [&str; 16] = [
    "csrc/capi.h",
    "csrc/guard.h",
    "csrc/simd.h",
    "csrc/device.cuh",
    "csrc/fused.h",
    "csrc/fused_tensors.h",
    "csrc/columns_cpu.h",
    "csrc/columns.cuh",
    "csrc/philox.h",
    "csrc/gelu_simd.h",
    "csrc/attention_cpu.h",
    "csrc/quant.h",
    "csrc/quant_simd.h",
    "csrc/few_rows.h",
    "csrc/cached_attention.h",
    "csrc/quant_device.cuh",
];
/// A100 and H100, and PTX for what comes after.
const TARGETS: [&str; 3] =
    ["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"];

fn main() {
    let sources = SOURCES.iter().chain(&CUDA_SOURCES).chain(&NO_CUDA_SOURCES).chain(&HEADERS);
    for file in sources.chain(&KERNELS).chain(&NO_KERNELS) {
        println!("cargo:rerun-if-changed={file}");
    }
    println!("cargo:rerun-if-env-changed=TUNEFLEET_CUDA");

    // torch-sys exports the library directory (`links = "tch"`); the headers stand beside it.
    let lib =
        PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys exports its library directory"));
    let torch = lib.parent().expect("the library directory has a parent").to_path_buf();

    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .include(torch.join("include"))
        .include(torch.join("include/torch/csrc/api/include"))
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        // libtorch's headers are not ours to mend.
        .warnings(false)
        // A product and a sum are two roundings, as in the programs whose bits are matched.
        .flag("-ffp-contract=off")
        // Without it at::parallel_for is a loop; torch-sys links the library, libtorch's own at run time.
        .flag("-fopenmp")
        .files(SOURCES);
    match cuda_includes(&torch) {
        Some(includes) => {
            match compile_kernels(&torch) {
                Some(objects) => {
                    for object in objects {
                        build.object(object);
                    }
                }
                None => {
                    println!("cargo:warning=no CUDA compiler beside libtorch: building without CUDA kernels");
                    build.files(NO_KERNELS);
                }
            }
            build.includes(includes).files(CUDA_SOURCES);
            for define in ["USE_CUDA", "USE_DISTRIBUTED", "USE_C10D_NCCL"] {
                build.define(define, None);
            }
        }
        None => {
            println!("cargo:warning=no CUDA headers beside libtorch: building without CUDA and NCCL");
            build.files(NO_CUDA_SOURCES).files(NO_KERNELS);
        }
    }
    build.compile("tunefleet_kernels");

    println!("cargo:rustc-link-search=native={}", lib.display());
    // Where programs must look at run time, for their own build scripts.
    let mut rpath = vec![lib.canonicalize().unwrap_or_else(|_| lib.clone())];
    if cuda_includes(&torch).is_some() {
        println!("cargo:rustc-link-lib=torch_cuda");
        println!("cargo:rustc-link-lib=c10_cuda");
        // For the build scripts of programs: libtorch finds its CUDA half only where it is loaded, and
        // `--as-needed` drops it from a program that calls nothing in it.
        println!("cargo:link_arg=-Wl,--push-state,--no-as-needed,-ltorch_cuda,--pop-state");
        // The kernels' own runtime calls; the one that libtorch loads.
        let cuda_lib = cuda_root(&torch).join("lib");
        println!("cargo:rustc-link-search=native={}", cuda_lib.display());
        rpath.push(cuda_lib);
        println!("cargo:rustc-link-lib=dylib:+verbatim=libcudart.so.13");
    }
    let rpath: Vec<String> = rpath.iter().map(|dir| dir.display().to_string()).collect();
    println!("cargo:rpath={}", rpath.join(":"));
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
}

/// Objects of [`KERNELS`], where the wheels brought a CUDA compiler.
fn compile_kernels(torch: &Path) -> Option<Vec<PathBuf>> {
    let root = cuda_root(torch);
    let nvcc = root.join("bin/nvcc");
    if !nvcc.exists() {
        return None;
    }
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    let objects = KERNELS.iter().map(|source| {
        let object = out.join(Path::new(source).with_extension("cu.o").file_name().expect("a file name"));
        let mut command = Command::new(&nvcc);
        command.args(["-std=c++17", "-O3", "-c", source, "-o"]).arg(&object);
        command.args(["-Xcompiler", "-fPIC", "-I"]).arg(root.join("include"));
        command.args(TARGETS.iter().flat_map(|target| ["-gencode", target]));
        let status = command.status().unwrap_or_else(|error| panic!("{}: {error}", nvcc.display()));
        assert!(status.success(), "{command:?} failed");
        object
    });
    Some(objects.collect())
}

/// Where the wheels put CUDA.
fn cuda_root(torch: &Path) -> PathBuf {
    let torch = torch.canonicalize().unwrap_or_else(|_| torch.to_path_buf());
    torch.parent().map_or_else(|| torch.clone(), |site_packages| site_packages.join("nvidia/cu13"))
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
