//! Lets the program find libtorch by itself. RUNPATH and not RPATH: `LD_LIBRARY_PATH` must win on
//! a machine whose libtorch lies elsewhere.

use std::env;

fn main() {
    let lib =
        env::var("DEP_TUNEFLEET_KERNELS_LIBTORCH_LIB").expect("kernels-sys exports libtorch's directory");
    let lib = std::fs::canonicalize(&lib).map_or(lib, |p| p.display().to_string());
    println!("cargo:rustc-link-arg=-Wl,--enable-new-dtags,-rpath,{lib}");
}
