use std::sync::Arc;

use tch::{Kind, Tensor};

use super::super::super::layout::unet::Layer;
use super::super::super::{LayerId, LayerNames, ModelError, ModelFile};
use super::super::frozen::Frozen;
use super::super::target::Target;
use super::super::weights::Backing;
use super::stack::{LayerPatch, Slot, Stack, StackBuilder};

/// A loaded model's layers with all that stacks of adapters are made from. Lives as long as the longest of its users.
#[derive(Debug)]
pub(super) struct Base {
    // Declared before `backing`, so that they are dropped before the memory that they point into.
    /// By id: other names for the tensors that the network runs with.
    pub(super) layers: Frozen<Vec<Layer<Tensor>>>,
    /// By id: what single-file checkpoints call a layer, without prefix.
    pub(super) stems: Vec<String>,
    /// What adapters call the layers.
    pub(super) names: LayerNames,
    pub(super) kind: Kind,
    pub(super) target: Target,
    pub(super) backing: Backing,
    /// Tells stacks made for these weights from those for others.
    pub(super) file: Arc<ModelFile>,
}

impl Base {
    /// Fails where the weights are the mapped file and that has changed.
    pub(super) fn check_unchanged(&self) -> Result<(), ModelError> {
        match &self.backing {
            Backing::File(file) => file.check_unchanged(),
            Backing::Region { .. } | Backing::Gpu(_) => Ok(()),
        }
    }

    pub(super) fn stem(&self, id: LayerId) -> &str {
        self.stems.get(id.0).map_or("", String::as_str)
    }

    /// Checks what adapters change and brings it to where and how this model computes.
    pub(super) fn stack(&self, changes: Vec<(LayerId, LayerPatch)>) -> Result<Stack, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let _current = self.target.make_current()?;
        let mut stack = StackBuilder::new(&self.file, self.layers.len(), self.kind, self.target.device());
        for (id, change) in changes {
            let unknown =
                || ModelError::Adapter { layer: id.0.to_string(), reason: "there is no such layer".to_owned() };
            let layer = self.layers.get(id.0).ok_or_else(unknown)?;
            stack.add(id, &Slot { stem: self.stem(id), weight: &layer.weight }, change)?;
        }
        Ok(stack.finish())
    }
}
