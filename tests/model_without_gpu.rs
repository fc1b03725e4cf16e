//! Executors where no GPU can be used: what a process needs before one is asked for, and what it says when one is.
//!
//! Models run on the CPU here before a GPU is asked for, so a machine that has one cannot use it in this process.
#![cfg(all(feature = "torch", target_os = "linux"))]

#[cfg(feature = "cli")]
#[path = "support/elf.rs"]
mod elf;
#[path = "support/tiny.rs"]
mod tiny;

#[cfg(feature = "cli")]
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use luna_broker::device::{Device, InProcessDevice, Span};
use luna_broker::model::torch::{LoadOptions, Target, TorchCuda, load_vae, shim_version};
use luna_broker::model::{CudaUnavailable, ModelError, ModelFile, ModelInput, WeightStorage, vae_facts};
use luna_broker::service::{Tiling, VaeCall, VaeOperation};

fn mapped(library: &str) -> bool {
    std::fs::read_to_string("/proc/self/maps").expect("this process's mappings").contains(library)
}

/// A small picture, computed on the CPU.
fn decode() -> Vec<u8> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("taesd.safetensors");
    tiny::write(&path, 8);
    let file = Arc::new(ModelFile::open(&path).expect("a valid file"));
    let latent = tiny::Batch::new(1, 8, 3);
    let call = VaeCall { operation: VaeOperation::Decode, tiling: Tiling::Auto };
    let plan = vae_facts(&file).expect("a VAE").plan(&call, &latent.meta, u64::MAX).expect("a plan");
    let options = LoadOptions {
        target: &Target::Cpu,
        storage: WeightStorage::Mapped,
        memory: &InProcessDevice,
        progress: &|_, _| {},
    };
    let mut vae = load_vae(file, options).expect("it loads");
    let span = |bytes| Span::new(InProcessDevice.allocate(bytes).expect("memory"), 0, bytes).expect("a range");
    let (input, output) = (span(latent.bytes.len()), span(plan.output.size_bytes().expect("a size")));
    input.write(&latent.bytes).expect("it fits");
    vae.run(&plan, ModelInput { meta: latent.meta, memory: &input }, &output, &|| false).expect("it runs");
    let mut image = vec![0; output.length()];
    output.read(&mut image).expect("it fits");
    image
}

/// Whether a test of this process has asked for a GPU: from then on the CUDA half is there. Held while a test runs.
static ASKED: Mutex<bool> = Mutex::new(false);

#[test]
fn asking_for_a_gpu_in_vain_names_what_is_missing_and_leaves_the_cpu_alone() {
    let mut asked = ASKED.lock().unwrap_or_else(PoisonError::into_inner);
    let before = decode();
    assert!(*asked || !mapped("libtorch_cuda"), "nothing of CUDA is opened for models on the CPU");
    *asked = true;
    let refused = TorchCuda::open(0).expect_err("no GPU can be used");
    println!("{refused}; {}", refused.remedy());
    let ModelError::Cuda(why) = &refused else { panic!("{refused}") };
    match why {
        CudaUnavailable::NoDriver => assert!(!mapped("libcuda.so")),
        CudaUnavailable::Driver { code, cause } => assert!(*code != 0 && !cause.is_empty()),
        // A build against a libtorch for the CPU, or without the headers.
        CudaUnavailable::NoCudaHalf { .. } | CudaUnavailable::NoShim { .. } => assert!(!mapped("libtorch_cuda")),
        CudaUnavailable::TooLate => assert!(mapped("libcuda.so")),
        other => panic!("{other}"),
    }
    assert!(!refused.remedy().is_empty());
    let again = TorchCuda::open(0).expect_err("still not").to_string();
    assert_eq!(again, refused.to_string(), "asking twice gives the same answer");
    assert_eq!(decode(), before, "models on the CPU go on as before");
}

#[test]
fn the_shim_opens_after_the_cuda_half_without_a_driver() {
    let mut asked = ASKED.lock().unwrap_or_else(PoisonError::into_inner);
    *asked = true;
    match shim_version() {
        Ok(version) => {
            assert_eq!(version, 1);
            assert!(mapped("libtorch_cuda.so"));
            assert!(mapped("luna-broker-shim"), "the shim is opened from memory");
        }
        Err(ModelError::Cuda(why @ (CudaUnavailable::NoCudaHalf { .. } | CudaUnavailable::NoShim { .. }))) => {
            eprintln!("skipped: {why}");
        }
        Err(other) => panic!("{other}"),
    }
    assert!(!decode().is_empty());
}

#[test]
#[cfg(feature = "cli")]
fn the_binary_needs_no_more_of_cuda_than_the_cpu_half_of_libtorch() {
    let needed = elf::needs(Path::new(env!("CARGO_BIN_EXE_luna-broker")));
    assert!(needed.iter().any(|name| name == "libtorch_cpu.so"), "{needed:?}");
    for name in &needed {
        let allowed = !["cuda", "cudart", "cupti", "nvidia", "libtorch.so"].iter().any(|part| name.contains(part));
        assert!(allowed, "the binary needs {name}: it would not start where that is missing, of {needed:?}");
    }
    // Only libtorch's CPU half may ask for more, and what it asks for is its own affair.
    let maps = std::fs::read_to_string("/proc/self/maps").expect("this process's mappings");
    let half = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    let half = half.into_iter().find(|path| path.ends_with("libtorch_cpu.so")).expect("this test runs with libtorch");
    for beside in needed.iter().map(|name| half.with_file_name(name)).filter(|path| path != half && path.is_file()) {
        let more = elf::needs(&beside);
        assert!(!more.iter().any(|name| name.contains("cuda")), "{} needs {more:?}", beside.display());
    }
}
