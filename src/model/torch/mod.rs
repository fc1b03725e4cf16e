//! Running models with libtorch. Every tensor call is the kind that returns an error; none may panic.

mod adapter;
mod clip;
mod cuda;
mod frozen;
mod kl;
mod ladder;
mod ops;
mod shim;
mod spans;
mod target;
mod tiles;
mod tiny;
mod unet;
mod vae;
mod weights;

use tch::{Kind, TchError};

pub use clip::{ClipBase, ClipStack, TorchClip, load_clip};
pub use cuda::{CudaSwitches, GpuFacts, TorchCuda, TorchMemory, shim_version};
pub use target::Target;
pub use unet::{Adapted, LayerPatch, LowRank, Patches, Replaced, Stack, Started, TorchUnet, load_unet};
pub use vae::load_vae;
pub use weights::LoadOptions;

use super::ModelError;
use crate::tensor::DType;

/// Longest message of the tensor library that is repeated.
const MAX_CAUSE_CHARS: usize = 300;

/// Sets how many threads an operation may use; takes effect for the thread that calls it and for those that have
/// not computed yet.
pub fn set_threads(threads: usize) {
    tch::set_num_threads(i32::try_from(threads.max(1)).unwrap_or(i32::MAX));
}

/// Threads that an operation on this thread may use.
#[must_use]
pub fn threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1)
}

/// The library's name of an element type, where it computes with that.
fn kind_of(dtype: DType) -> Option<Kind> {
    Some(match dtype {
        DType::Bool => Kind::Bool,
        DType::U8 => Kind::Uint8,
        DType::I8 => Kind::Int8,
        DType::I16 => Kind::Int16,
        DType::I32 => Kind::Int,
        DType::I64 => Kind::Int64,
        DType::F16 => Kind::Half,
        DType::Bf16 => Kind::BFloat16,
        DType::F32 => Kind::Float,
        DType::F64 => Kind::Double,
        _ => return None,
    })
}

/// Our name of an element type, where there is one.
fn dtype_of(kind: Kind) -> Option<DType> {
    DType::ALL.into_iter().find(|&dtype| kind_of(dtype) == Some(kind))
}

/// Turns the library's error for `what` into ours. The library has no kinds of error, only words.
fn failed(what: &'static str) -> impl Fn(TchError) -> ModelError {
    move |error| {
        let words = error.to_string();
        let cause: String = words.lines().next().unwrap_or_default().chars().take(MAX_CAUSE_CHARS).collect();
        if is_exhaustion(&words) {
            return ModelError::OutOfMemory { what, cause };
        }
        ModelError::Executor { what, cause }
    }
}

/// Whether an error's words are about memory.
fn is_exhaustion(words: &str) -> bool {
    const KNOWN: [&str; 9] = [
        // The caching allocator, the CUDA runtime and driver, by message and by name.
        "out of memory",
        "out_of_memory",
        "memoryallocation",
        // Libraries that allocate beside it.
        "status_alloc_failed",
        "host_allocation_failed",
        // What is left to say of a convolution once every kernel for it was refused its scratch.
        "unable to find an engine to execute this computation",
        // The CPU: the allocator, the language, and kernels that make scratch of their own.
        "can't allocate memory",
        "bad_alloc",
        "could not create a memory",
    ];
    let words = words.to_ascii_lowercase();
    KNOWN.iter().any(|known| words.contains(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wording_of_no_memory_left_is_understood() {
        let exhausted = [
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 3.00 GiB is free.",
            "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
            "CUDA driver error: out of memory",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
            "CUDA_ERROR_OUT_OF_MEMORY",
            "GET was unable to find an engine to execute this computation",
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 16 bytes",
            "std::bad_alloc",
            "could not create a memory object",
        ];
        for words in exhausted {
            let error = failed("decode")(TchError::Torch(words.to_owned()));
            assert!(matches!(error, ModelError::OutOfMemory { what: "decode", .. }), "{words}");
        }
        for words in ["CUDA error: an illegal memory access was encountered", "shape mismatch", ""] {
            let error = failed("decode")(TchError::Torch(words.to_owned()));
            assert!(matches!(error, ModelError::Executor { .. }), "{words}");
        }
    }
}
