//! What is known of a UNet without running it, and what a call must look like.

mod facts;
mod input;

pub use crate::service::{Control, UnetInput};
pub use facts::{Prediction, UnetFacts, UnetVariant};
