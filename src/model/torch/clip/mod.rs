//! Text encoders with libtorch. Weights stay as they are stored; activations are float32.

mod encode;
mod linear;
mod load;
mod net;
mod vector;

pub use load::load_clip;
pub use vector::{SdxlSizes, sdxl_vector};

/// The call named in errors.
const WHAT: &str = "text encoding";

#[cfg(test)]
mod tests;
