//! What is known of a UNet without running it, what a call must look like, and what a run of calls is.

mod conds;
mod facts;
mod input;
mod memory;
#[cfg(feature = "torch")]
mod progress;

pub use crate::service::{Control, StepInput, UnetInput};
pub use conds::{Arrived, CondUse, Conds, StepFacts};
pub use facts::{Prediction, UnetFacts, UnetVariant};
pub use memory::RunMemory;

#[cfg(feature = "torch")]
pub(super) use conds::{least_common_multiple, share};
#[cfg(feature = "torch")]
pub(super) use progress::{Moment, Progress};
