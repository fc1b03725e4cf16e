//! Text encoders with libtorch. Weights stay as they are stored; activations are float32.

mod adapt;
mod base;
mod encode;
mod linear;
mod load;
mod net;

pub use adapt::ClipStack;
pub use base::ClipBase;
pub use load::{TorchClip, load_clip};

/// The call named in errors.
const WHAT: &str = "text encoding";

#[cfg(test)]
mod tests;
