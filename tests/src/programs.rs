//! Where the programs under test are.

use std::path::PathBuf;

/// The `coordinator` program.
pub fn coordinator() -> PathBuf {
    program("coordinator")
}

/// The `worker` program.
pub fn worker() -> PathBuf {
    program("worker")
}

/// From `target/<profile>`, the profile of the test itself; from TUNEFLEET_PROGRAMS when set.
fn program(name: &str) -> PathBuf {
    let dir = std::env::var_os("TUNEFLEET_PROGRAMS").map(PathBuf::from).unwrap_or_else(|| {
        // The test is target/<profile>/deps/<test>-<hash>.
        let test = std::env::current_exe().unwrap();
        test.ancestors().nth(2).unwrap().to_owned()
    });
    let path = dir.join(name);
    assert!(
        path.is_file(),
        "{} is not there: run `make programs`, or set TUNEFLEET_PROGRAMS to the directory of both programs",
        path.display()
    );
    path
}

/// The checkout.
pub fn root() -> PathBuf {
    let tests = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.ancestors().nth(1).map(PathBuf::from).unwrap_or_default()
}
