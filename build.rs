//! With the feature `torch`: lets binaries and tests find libtorch where it was found at build time.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    if env::var_os("CARGO_FEATURE_TORCH").is_none() {
        return;
    }
    // torch-sys announces the folder on the systems that have run-time search paths; elsewhere PATH must name it.
    let Ok(folder) = env::var("DEP_TCH_LIBTORCH_LIB") else { return };
    println!("cargo::rustc-link-arg=-Wl,-rpath,{folder}");
}
