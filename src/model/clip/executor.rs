use std::fmt;

use super::super::ModelError;
#[cfg(doc)]
use super::super::Vae;
use super::ClipCall;
#[cfg(doc)]
use super::TextEncoders;
use crate::device::{Span, StreamRef};

/// Loaded text encoders. They belong to their lane's thread and are never modified by a call.
pub trait Clip: fmt::Debug {
    /// Encodes the prompts of `call` into `cond` and `pooled`, which hold what [`TextEncoders::plan`] says of them. `stop`
    /// is asked before each block and ends the call with [`ModelError::Cancelled`].
    ///
    /// With [`Clip::stream`], both may also lie in that GPU's memory, under the terms of [`Vae::run`].
    ///
    /// # Errors
    /// As [`TextEncoders::plan`]; [`ModelError::OutOfMemory`] after everything the attempt held was freed,
    /// [`ModelError::Executor`], [`ModelError::Changed`], [`ModelError::Cancelled`].
    fn encode(
        &mut self,
        call: &ClipCall,
        cond: &Span,
        pooled: &Span,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), ModelError>;

    /// The stream that GPU work of every [`Clip::encode`] is enqueued on; as [`Vae::stream`].
    fn stream(&self) -> Option<StreamRef> {
        None
    }
}
