//! What the two programs are linked with: the coordinator runs where there is no libtorch, and the
//! worker finds its own, with CUDA in it.

use std::path::Path;
use std::process::Command;

use tunefleet_tests::{programs, skip};

/// The dynamic section of a program.
fn dynamic_section(program: &Path) -> Option<String> {
    let Ok(output) = Command::new("readelf").arg("-d").arg(program).output() else {
        skip("readelf is not installed (apt-get install binutils)");
        return None;
    };
    assert!(output.status.success());
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn the_coordinator_needs_no_torch() {
    let Some(section) = dynamic_section(&programs::coordinator()) else { return };
    for library in ["torch", "c10", "cuda", "nccl"] {
        assert!(!section.contains(library), "{library}:\n{section}");
    }
}

#[test]
fn the_worker_finds_libtorch_by_itself_and_lets_the_environment_win() {
    let Some(section) = dynamic_section(&programs::worker()) else { return };
    // RPATH would win over LD_LIBRARY_PATH.
    let run_path = section.lines().find(|line| line.contains("(RUNPATH)")).expect(&section);
    assert!(run_path.contains("torch/lib") || run_path.contains("libtorch"), "{run_path}");
    assert!(!section.contains("(RPATH)"), "{section}");
}

#[test]
fn the_worker_is_linked_with_cuda_where_its_headers_are() {
    let headers =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../.libtorch/../nvidia/cu13/include/cuda_runtime_api.h");
    let torch = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.libtorch/lib/libtorch_cuda.so");
    if !headers.exists() || !torch.exists() {
        return skip("this libtorch has no CUDA beside it");
    }
    let Some(section) = dynamic_section(&programs::worker()) else { return };
    // Dropped by --as-needed, CUDA would be invisible at run time with no error.
    assert!(section.contains("libtorch_cuda.so"), "{section}");
}
