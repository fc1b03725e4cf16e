//! Text encoders: what a file holds, what a call is, and what comes out of it.

mod call;
mod detect;
mod executor;
mod facts;

pub use call::{ClipCall, ClipPlan, ClipPrompt};
pub use detect::{clip_facts, text_encoders};
pub use executor::Clip;
pub use facts::{ClipFacts, ClipKind, TextEncoders};

#[cfg(feature = "torch")]
pub(super) use detect::{FoundClip, find_set};
