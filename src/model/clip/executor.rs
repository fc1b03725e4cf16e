use std::fmt;
use std::sync::Arc;

#[cfg(doc)]
use super::super::Vae;
use super::super::{ModelError, ReadyStack, StackMaker};
use super::ClipCall;
#[cfg(doc)]
use super::TextEncoders;
use crate::device::{Span, StreamRef};

/// Loaded text encoders. They belong to their lane's thread and are never modified by a call.
pub trait Clip: fmt::Debug {
    /// Encodes the prompts of `call`, with adapters that were put together for these encoders, into `cond` and `pooled`, which hold what [`TextEncoders::plan`] says of them. `stop`
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
        stack: Option<&ReadyStack>,
        cond: &Span,
        pooled: &Span,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), ModelError>;

    /// What puts stacks of adapters together for these encoders. It outlives them, and keeps their weights.
    fn stack_maker(&self) -> Arc<dyn StackMaker>;

    /// The stream that GPU work of every [`Clip::encode`] is enqueued on; as [`Vae::stream`].
    fn stream(&self) -> Option<StreamRef> {
        None
    }
}
