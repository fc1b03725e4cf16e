//! What is built without `torch` starts on a machine that has nothing of CUDA or libtorch: neither it nor anything it
//! loads asks for them.
#![cfg(target_os = "linux")]

#[path = "support/elf.rs"]
mod elf;

use std::path::{Path, PathBuf};

/// Names the broker's binary that was built without `torch`.
const BROKER: &str = "LUNA_BROKER_WITHOUT_TORCH";
/// Names the library of the Python extension.
const EXTENSION: &str = "LUNA_BROKER_EXTENSION";

/// How the names of libraries begin that must not be needed.
const FOREIGN: [&str; 11] = [
    "libc10",
    "libcublas",
    "libcuda",
    "libcudnn",
    "libcufft",
    "libcupti",
    "libcurand",
    "libcusolver",
    "libcusparse",
    "libnv",
    "libtorch",
];

/// The file that a variable names; a variable that is set names a file that is there.
fn named_by(variable: &str) -> Option<PathBuf> {
    let path = PathBuf::from(std::env::var_os(variable)?);
    assert!(path.is_file(), "{variable} names {}, which is not a file", path.display());
    Some(path)
}

fn assert_asks_for_nothing_foreign(path: &Path) {
    let needs = elf::all_needs(path);
    // Otherwise the file is no program of this system, and the rest shows nothing.
    assert!(needs.keys().any(|name| name.starts_with("libc.so")), "{} needs {needs:?}", path.display());
    for (name, by) in &needs {
        let is_foreign = FOREIGN.iter().any(|start| name.starts_with(start));
        assert!(!is_foreign, "{} needs {name}, because {} does", path.display(), by.display());
    }
}

#[test]
fn a_broker_without_torch_needs_nothing_of_cuda() {
    // In a build without the feature, the binary beside this test is one.
    #[cfg(all(feature = "cli", not(feature = "torch")))]
    assert_asks_for_nothing_foreign(Path::new(env!("CARGO_BIN_EXE_luna-broker")));
    match named_by(BROKER) {
        Some(path) => assert_asks_for_nothing_foreign(&path),
        None => eprintln!("skipped in part: {BROKER} names no binary; `make test-rust` builds one"),
    }
}

#[test]
fn the_python_extension_needs_nothing_of_cuda() {
    match named_by(EXTENSION) {
        Some(path) => assert_asks_for_nothing_foreign(&path),
        None => eprintln!("skipped: {EXTENSION} names no library; `make extension` builds one"),
    }
}
