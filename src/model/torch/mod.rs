//! Running models with libtorch. Every tensor call is the kind that returns an error; none may panic.

mod kl;
mod ops;
mod tiles;
mod tiny;
mod vae;
mod weights;

use tch::{Kind, TchError};

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

/// The library's name of an element type.
fn kind_of(dtype: DType) -> Kind {
    match dtype {
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
    }
}

/// Turns the library's error for `what` into ours. The library has no kinds of error, only words.
fn failed(what: &'static str) -> impl Fn(TchError) -> ModelError {
    move |error| {
        let words = error.to_string();
        let cause: String = words.lines().next().unwrap_or_default().chars().take(MAX_CAUSE_CHARS).collect();
        let exhausted = ["out of memory", "can't allocate memory", "bad_alloc", "could not create a memory"];
        if exhausted.iter().any(|known| words.contains(known)) {
            return ModelError::OutOfMemory { what, cause };
        }
        ModelError::Executor { what, cause }
    }
}
