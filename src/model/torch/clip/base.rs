use std::sync::Arc;

use super::super::super::clip::TextEncoders;
use super::super::super::{LayerNames, ModelError, ModelFile};
use super::super::target::Target;
use super::super::weights::Backing;
use super::encode::Encoder;

/// Loaded text encoders with all that stacks of adapters are made from. Any thread may read them; they live as long as the
/// longest of their users.
#[derive(Debug)]
pub struct ClipBase {
    /// In the order of the set.
    pub(super) encoders: Vec<Encoder>,
    pub(super) set: TextEncoders,
    /// What adapters call the layers.
    pub(super) names: LayerNames,
    pub(super) target: Target,
    /// Tells stacks made for these weights from those for others.
    pub(super) files: Vec<Arc<ModelFile>>,
}

impl ClipBase {
    /// Fails where weights are the mapped file and that has changed.
    pub(super) fn check_unchanged(&self) -> Result<(), ModelError> {
        for encoder in &self.encoders {
            if let Backing::File(file) = &encoder.backing {
                file.check_unchanged()?;
            }
        }
        Ok(())
    }
}
