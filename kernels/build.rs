//! Lets the tests find libtorch, with CUDA where it has it; see the worker's build script.

use std::env;

fn main() {
    let rpath = env::var("DEP_TUNEFLEET_KERNELS_RPATH").expect("kernels-sys exports where libtorch lies");
    println!("cargo:rustc-link-arg=-Wl,--enable-new-dtags,-rpath,{rpath}");
    if let Ok(argument) = env::var("DEP_TUNEFLEET_KERNELS_LINK_ARG") {
        println!("cargo:rustc-link-arg={argument}");
    }
}
