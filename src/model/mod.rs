//! Models: open a file, tell from its keys and shapes what it holds, load it, run it.
//!
//! Opening and recognising need no libtorch; running does (feature `torch`), except for the do-nothing model.

mod detect;
mod error;
mod executor;
mod file;
mod hand_off;
mod header;
mod layout;
mod plan;
#[cfg(feature = "torch")]
pub mod torch;
pub mod weights;

pub use detect::vae_facts;
pub use error::{CudaUnavailable, ModelError};
pub use executor::{Capability, Vae, VaeFacts, VaeInput, VaePlan, WeightStorage};
pub use file::{FileState, ModelFile, StoredDType, StoredTensor};
pub use hand_off::HandOff;
