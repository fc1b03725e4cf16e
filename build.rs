//! With the feature `torch`: lets binaries and tests find libtorch where it was found at build time, and compiles the
//! shim for what the tensor library's binding lacks on CUDA.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "torch")]
    torch::prepare();
}

#[cfg(feature = "torch")]
mod torch {
    use std::env;
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::Output;

    const SOURCE: &str = "src/model/torch/shim/torch_shim.cpp";
    /// A folder with CUDA headers that are not beside torch; beside torch means the wheels' `nvidia/cu13/include`.
    const CUDA_INCLUDE: &str = "LUNA_BROKER_CUDA_INCLUDE";
    /// One header of each of the wheels that the shim needs headers of.
    const CUDA_HEADERS: [&str; 2] = ["cuda_runtime_api.h", "crt/host_defines.h"];

    pub(super) fn prepare() {
        println!("cargo::rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
        println!("cargo::rerun-if-env-changed={CUDA_INCLUDE}");
        println!("cargo::rerun-if-changed={SOURCE}");
        // torch-sys announces the folder on systems that have run-time search paths; elsewhere PATH must name it.
        let libraries = env::var_os("DEP_TCH_LIBTORCH_LIB").map(PathBuf::from);
        if let Some(folder) = &libraries {
            println!("cargo::rustc-link-arg=-Wl,-rpath,{}", folder.display());
        }
        let target = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("torch_shim.so");
        // A build for the CPU is a whole build: what is missing is said by the program once a GPU is asked for.
        let missing = compile(libraries.as_deref(), &target).err().unwrap_or_default();
        if !missing.is_empty() {
            fs::write(&target, []).expect("the build's own folder can be written to");
        }
        println!("cargo::rustc-env=LUNA_BROKER_SHIM_MISSING={missing}");
        println!("cargo::rustc-env=LUNA_BROKER_SHIM={}", target.display());
    }

    /// Compiles the shim to `target`, or says why there is none, fit for the end of a sentence.
    fn compile(libraries: Option<&Path>, target: &Path) -> Result<(), String> {
        if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
            return Err("it was not built for Linux".to_owned());
        }
        let libraries = libraries.ok_or("the folder of libtorch was not known when it was built")?;
        if !libraries.join("libc10_cuda.so").is_file() {
            return Err("the libtorch it was built with has no CUDA half".to_owned());
        }
        let torch = libraries.join("../include");
        let candidates =
            [env::var_os(CUDA_INCLUDE).map(PathBuf::from), Some(libraries.join("../../nvidia/cu13/include"))];
        let folders: Vec<PathBuf> = candidates.into_iter().flatten().filter(|folder| folder.is_dir()).collect();
        // Only what exists: a path that does not would make every build start from here.
        for folder in &folders {
            println!("cargo::rerun-if-changed={}", folder.display());
        }
        for header in CUDA_HEADERS {
            if !folders.iter().any(|folder| folder.join(header).is_file()) {
                return Err(format!("the CUDA header {header} was not there when it was built"));
            }
        }
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(2).debug(false).pic(true).cargo_metadata(false);
        let compiler = build.try_get_compiler().map_err(|error| failed(&error.to_string()))?;
        let mut command = compiler.to_command();
        command.args(["-shared", "-fvisibility=hidden", "-Wl,-s", "-w", SOURCE, "-o"]).arg(target);
        for folder in std::iter::once(&torch).chain(&folders) {
            command.arg("-isystem").arg(folder);
        }
        let Output { status, stderr, .. } = command.output().map_err(|error| failed(&error.to_string()))?;
        if status.success() { Ok(()) } else { Err(failed(&String::from_utf8_lossy(&stderr))) }
    }

    /// Shows the compiler's words to whoever builds; the program only says that there were some.
    fn failed(words: &str) -> String {
        println!("cargo::warning=the CUDA shim could not be compiled; models will run on the CPU only");
        for line in words.lines().filter(|line| line.contains("error")).take(5) {
            println!("cargo::warning={line}");
        }
        "the CUDA shim could not be compiled when it was built".to_owned()
    }
}
