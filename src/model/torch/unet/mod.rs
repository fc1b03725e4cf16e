//! UNets: loaded once, run for rows of several requests at a time, never modified.

mod adapt;
mod base;
mod blocks;
mod embed;
mod kept;
mod load;
mod patches;
mod run;
mod stack;
mod step;

pub use adapt::Adapted;
pub(super) use adapt::{Step, patch};
pub use load::{TorchUnet, load_unet};
pub use patches::Patches;
pub use run::Started;
pub use stack::{LayerPatch, LowRank, Replaced, Stack};

/// The call named in errors.
const WHAT: &str = "unet";
