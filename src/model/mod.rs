//! Models: open a file, tell from its keys and shapes what it holds, load it, run it.
//!
//! Opening and recognising need no libtorch; running does (feature `torch`), except for the do-nothing model.

mod adapter;
pub mod clip;
mod companion;
mod detect;
mod detect_unet;
mod error;
mod executor;
mod file;
mod hand_off;
mod header;
mod layout;
mod plan;
pub mod text;
#[cfg(feature = "torch")]
pub mod torch;
mod unet;
pub mod weights;

pub use adapter::{Adapter, AdapterFile, AdapterKind, AdapterReport, LayerNames, ReadyStack, StackMaker, UnknownKeys};
pub use detect::vae_facts;
pub use detect_unet::unet_facts;
pub use error::{CudaUnavailable, ModelError};
pub use executor::{Capability, ModelInput, Unet, UnetCall, Vae, VaeFacts, VaePlan, WeightStorage};
pub use file::{FileState, ModelFile, StoredDType, StoredTensor};
pub use hand_off::HandOff;
pub use layout::{LayerId, Skip};
pub use unet::{
    Arrived, CondUse, Conds, Control, Prediction, RunMemory, StepFacts, StepInput, UnetFacts, UnetInput, UnetVariant,
};
