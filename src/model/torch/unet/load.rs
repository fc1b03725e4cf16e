use std::collections::HashMap;
use std::sync::Arc;

use tch::Tensor;

use super::super::super::detect_unet::{facts, unet_layout};
use super::super::super::layout::unet::{Layer, Unet};
use super::super::super::{LayerId, LayerNames, ModelError, ModelFile, UnetFacts};
use super::super::frozen::Frozen;
use super::super::target::kind_of_precision;
use super::super::weights::{LoadOptions, Weights};
use super::base::Base;
use super::stack::{LayerPatch, Stack};

/// A loaded UNet. It belongs to its lane's thread and is never modified by a call.
#[derive(Debug)]
pub struct TorchUnet {
    // Declared before `base`, so that it is dropped before the memory that its tensors point into.
    pub(super) net: Unet<Tensor>,
    ids: HashMap<String, LayerId>,
    pub(super) facts: UnetFacts,
    pub(super) base: Arc<Base>,
}

/// Loads the UNet in `file`, to be run by the calling thread.
///
/// # Errors
/// As [`super::super::super::unet_facts`]; [`ModelError::OutOfMemory`] where the weights do not fit,
/// [`ModelError::Changed`] where the file is no longer the one that was opened.
pub fn load_unet(file: Arc<ModelFile>, options: LoadOptions<'_>) -> Result<TorchUnet, ModelError> {
    let loaded = load(&file, options);
    // What a failed attempt had loaded, and what a successful one needed for converting.
    options.target.reclaim();
    loaded
}

fn load(file: &Arc<ModelFile>, options: LoadOptions<'_>) -> Result<TorchUnet, ModelError> {
    let _no_grad = tch::no_grad_guard();
    let _current = options.target.make_current()?;
    file.check_unchanged()?;
    let layout = unet_layout(file)?;
    let facts = facts(file, &layout)?;
    let names = LayerNames::of(&layout);
    let kind = kind_of_precision(options.target.unet_precision(&facts));
    let mut lengths = Vec::new();
    layout.each(|layer| {
        lengths.extend(std::iter::once(&layer.weight).chain(&layer.bias).map(|stored| stored.elements()));
    });
    let mut weights = Weights::new(file, options, kind, &lengths)?;
    let mut layers = Vec::new();
    let net = layout.try_map(&mut |layer| {
        let weight = weights.tensor(&layer.weight)?;
        let bias = layer.bias.as_ref().map(|stored| weights.tensor(stored)).transpose()?;
        layers.push(same(layer.id, &weight, bias.as_ref()));
        Ok::<_, ModelError>(Layer { id: layer.id, weight, bias })
    })?;
    layers.sort_by_key(|layer| layer.id);
    let ids = layers.iter().filter_map(|layer| Some((net.stems.get(layer.id.0)?.clone(), layer.id))).collect();
    let base = Base {
        layers: Frozen::new(layers),
        stems: net.stems.clone(),
        names,
        kind,
        target: options.target.clone(),
        backing: weights.into_backing(file),
        file: Arc::clone(file),
    };
    Ok(TorchUnet { net, ids, facts, base: Arc::new(base) })
}

fn same(id: LayerId, weight: &Tensor, bias: Option<&Tensor>) -> Layer<Tensor> {
    Layer { id, weight: weight.shallow_clone(), bias: bias.map(Tensor::shallow_clone) }
}

impl TorchUnet {
    /// What was known of it before it was loaded.
    #[must_use]
    pub fn facts(&self) -> &UnetFacts {
        &self.facts
    }

    /// All layers with what single-file checkpoints call them, without prefix: `input_blocks.1.1.proj_in`.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = (LayerId, &str)> {
        self.base.layers.iter().map(|layer| (layer.id, self.base.stem(layer.id)))
    }

    /// The layer of that name.
    #[must_use]
    pub fn layer(&self, stem: &str) -> Option<LayerId> {
        self.ids.get(stem).copied()
    }

    /// A layer's weight and bias, to be read only: every request computes with them.
    #[must_use]
    pub fn weights(&self, id: LayerId) -> Option<(&Tensor, Option<&Tensor>)> {
        self.base.layers.get(id.0).map(|layer| (&layer.weight, layer.bias.as_ref()))
    }

    /// Checks what adapters change and brings it to where and how this model computes. Each layer may be named once.
    ///
    /// # Errors
    /// [`ModelError::Adapter`] for a change that does not fit its layer, [`ModelError::OutOfMemory`].
    pub fn stack(&self, changes: Vec<(LayerId, LayerPatch)>) -> Result<Stack, ModelError> {
        self.base.stack(changes)
    }
}
