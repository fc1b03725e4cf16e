//! In a build that reaches no GPU.

use super::gpu::Driven;
use crate::device::NoDriver;

/// Nobody to ask.
pub(super) fn look() -> Result<Driven, NoDriver> {
    Err(NoDriver::NotBuilt)
}
