//! Lets the programs find libtorch, as worker's does.

use std::env;

fn main() {
    let rpath = env::var("DEP_TUNEFLEET_KERNELS_RPATH").expect("kernels-sys exports where libtorch lies");
    println!("cargo:rustc-link-arg=-Wl,--enable-new-dtags,-rpath,{rpath}");
}
