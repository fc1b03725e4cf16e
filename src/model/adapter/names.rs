use std::collections::HashMap;

use super::super::detect_unet::unet_layout;
use super::super::layout::unet::Unet;
use super::super::{LayerId, ModelError, ModelFile, StoredTensor};

/// A model's layers, and everything that adapters call them.
#[derive(Debug)]
pub struct LayerNames {
    pub(super) layers: Vec<LayerFacts>,
    pub(super) by_name: HashMap<String, LayerId>,
    pub(super) subject: Subject,
}

/// Which of a diffusion model's parts a key or a layer is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subject {
    Unet,
    TextEncoders,
}

/// A layer as adapters are checked against it.
#[derive(Debug)]
pub(super) struct LayerFacts {
    pub(super) stem: String,
    /// Extents of its weight.
    pub(super) weight: Vec<u64>,
    pub(super) biased: bool,
}

impl LayerNames {
    /// The layers of the UNet in `file`. Reads the header only.
    ///
    /// # Errors
    /// As [`super::super::unet_facts`].
    pub fn of_unet(file: &ModelFile) -> Result<Self, ModelError> {
        Ok(Self::of(&unet_layout(file)?))
    }

    pub(in crate::model) fn of(unet: &Unet<StoredTensor>) -> Self {
        let mut layers: Vec<_> = Vec::new();
        unet.each(|layer| {
            let weight = layer.weight.shape.iter().map(|&extent| extent as u64).collect();
            layers.push((layer.id, weight, layer.bias.is_some()));
        });
        layers.sort_by_key(|(id, ..)| *id);
        let mut by_name = HashMap::new();
        for ((id, stem), diffusers) in (0..).map(LayerId).zip(&unet.stems).zip(unet.diffusers_stems()) {
            for name in spellings(stem, &diffusers) {
                by_name.entry(name).or_insert(id);
            }
        }
        let facts = |((_, weight, biased), stem): (_, &String)| LayerFacts { stem: stem.clone(), weight, biased };
        let layers = layers.into_iter().zip(&unet.stems).map(facts).collect();
        Self { layers, by_name, subject: Subject::Unet }
    }

    /// The layer that an adapter calls `name`, which is a key without its suffix.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<LayerId> {
        self.by_name.get(name).copied()
    }

    /// What single-file checkpoints call a layer, without prefix; of text encoders, what transformers does.
    #[must_use]
    pub fn stem(&self, id: LayerId) -> Option<&str> {
        self.layer(id).map(|layer| layer.stem.as_str())
    }

    /// All names with the layers they stand for, in no order.
    pub fn all(&self) -> impl ExactSizeIterator<Item = (&str, LayerId)> {
        self.by_name.iter().map(|(name, id)| (name.as_str(), *id))
    }

    pub(super) fn layer(&self, id: LayerId) -> Option<&LayerFacts> {
        self.layers.get(id.0)
    }
}

/// Everything that a layer is called in adapters, by its name in single files and its names in diffusers.
fn spellings(stem: &str, diffusers: &[String]) -> Vec<String> {
    let joined = |name: &str| name.replace('.', "_");
    let mut names = vec![format!("lora_unet_{}", joined(stem)), format!("diffusion_model.{stem}")];
    for name in diffusers {
        names.push(format!("lora_unet_{}", joined(name)));
        names.push(format!("lycoris_{}", joined(name)));
        names.extend([name.clone(), format!("unet.{name}"), format!("base_model.model.{name}")]);
        if name.contains(".to_") {
            // From when diffusers kept adapters in attention processors.
            let mut name = name.replace(".to_", ".processor.to_");
            name.truncate(name.strip_suffix(".to_out.0").map_or(name.len(), |kept| kept.len() + ".to_out".len()));
            names.push(format!("unet.{name}"));
            names.push(name);
        }
    }
    names
}
