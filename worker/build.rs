//! Lets programs, tests and examples find libtorch by themselves, with CUDA where it has it. RUNPATH and not RPATH: `LD_LIBRARY_PATH` must win on
//! a machine whose libtorch lies elsewhere.

use std::env;

fn main() {
    let rpath = env::var("DEP_TUNEFLEET_KERNELS_RPATH").expect("kernels-sys exports where libtorch lies");
    println!("cargo:rustc-link-arg=-Wl,--enable-new-dtags,-rpath,{rpath}");
    if let Ok(argument) = env::var("DEP_TUNEFLEET_KERNELS_LINK_ARG") {
        println!("cargo:rustc-link-arg={argument}");
    }
}
