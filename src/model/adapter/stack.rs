use std::any::Any;
#[cfg(feature = "torch")]
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use super::super::ModelError;
#[cfg(feature = "torch")]
use super::LayerNames;
use super::{AdapterFile, AdapterReport};
use crate::service::AdapterMode;

/// An adapter, and how much of it.
#[derive(Debug, Clone, Copy)]
pub struct Adapter<'a> {
    /// Its file.
    pub file: &'a AdapterFile,
    /// Times what the file says; 0 leaves it out, less turns it round.
    pub strength: f64,
}

/// Adapters put together for one model by its [`StackMaker`]: in its element type, on its device, never changed.
///
/// A clone is the same stack.
#[derive(Clone)]
pub struct ReadyStack {
    tensors: Arc<dyn Any + Send + Sync>,
    size_bytes: u64,
}

impl ReadyStack {
    /// What an executor made, of `size_bytes`.
    pub fn new<T: Any + Send + Sync>(tensors: Arc<T>, size_bytes: u64) -> Self {
        Self { tensors, size_bytes }
    }

    /// Bytes of all its tensors.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// What an executor of another kind did not make.
    #[must_use]
    pub fn tensors<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        Arc::clone(&self.tensors).downcast().ok()
    }
}

impl fmt::Debug for ReadyStack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadyStack").field("size_bytes", &self.size_bytes).finish_non_exhaustive()
    }
}

/// Makes stacks of adapters for one loaded model, on another thread than the one that runs it. As long as it lives, so do the
/// model's weights.
pub trait StackMaker: fmt::Debug + Send + Sync {
    /// Puts adapters together, which are applied in this order. The model is not modified.
    ///
    /// Answers the stack and, by adapter, what the model took up of it.
    ///
    /// # Errors
    /// As [`AdapterFile::report`]; [`ModelError::AdapterStrength`], [`ModelError::Changed`] where a file is no longer the
    /// one that was opened, [`ModelError::OutOfMemory`].
    fn make(&self, adapters: &[Adapter<'_>], mode: AdapterMode)
    -> Result<(ReadyStack, Vec<AdapterReport>), ModelError>;

    /// Bytes of private copies of all weights that the adapters change. Makes none.
    ///
    /// # Errors
    /// As [`AdapterFile::report`].
    fn merged_bytes(&self, adapters: &[Adapter<'_>]) -> Result<u64, ModelError>;
}

/// Elements of all weights and biases that adapters change.
#[cfg(feature = "torch")]
pub(in crate::model) fn changed_elements(names: &LayerNames, adapters: &[Adapter<'_>]) -> Result<u64, ModelError> {
    let mut changed = BTreeSet::new();
    for adapter in adapters {
        changed.extend(adapter.file.fit(names)?.changes.into_keys());
    }
    let elements = changed.into_iter().filter_map(|id| names.layer(id)).map(|layer| {
        let weight = layer.weight.iter().fold(1, |all: u64, &extent| all.saturating_mul(extent));
        let bias = if layer.biased { layer.weight.first().copied().unwrap_or(0) } else { 0 };
        weight.saturating_add(bias)
    });
    Ok(elements.fold(0, u64::saturating_add))
}
