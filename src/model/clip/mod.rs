//! Text encoders: what a file holds, what a call is, and what comes out of it.

mod call;
mod detect;
mod executor;
mod facts;
mod packed;
mod vector;

pub use crate::service::{ClipKind, ClipPrompt};
pub use call::{ClipCall, ClipPlan};
pub use detect::{clip_facts, text_encoders};
pub use executor::Clip;
pub use facts::{ClipFacts, TextEncoders};
pub use packed::{PackedPrompt, unpack};
pub use vector::{SdxlSizes, sdxl_vector};

pub(super) use detect::{FoundClip, find_set};
