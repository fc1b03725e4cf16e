//! What adapters do to weights. Formulas are those of ComfyUI, so that a file means the same in both.

mod delta;
mod merge;
mod read;

pub(super) use delta::{Narrow, narrow};
pub(super) use merge::merged;
pub(super) use read::tensors;
