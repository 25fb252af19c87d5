//! Lets the program find libtorch by itself. RUNPATH and not RPATH: `LD_LIBRARY_PATH` must win on
//! a machine whose libtorch lies elsewhere.

use std::env;

fn main() {
    let rpath = env::var("DEP_TUNEFLEET_KERNELS_RPATH").expect("kernels-sys exports where libtorch lies");
    println!("cargo:rustc-link-arg=-Wl,--enable-new-dtags,-rpath,{rpath}");
}
