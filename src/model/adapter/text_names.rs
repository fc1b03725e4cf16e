use std::collections::HashMap;

use super::super::clip::{ClipKind, FoundClip, find_set};
use super::super::layout::Linear;
use super::super::{LayerId, ModelError, ModelFile, StoredTensor};
use super::names::{LayerFacts, LayerNames, Subject};

impl LayerNames {
    /// The linear layers of the text encoders in `files`, of all as one set. Reads the headers only.
    ///
    /// # Errors
    /// As [`super::super::clip::text_encoders`].
    pub fn of_text_encoders(files: &[&ModelFile]) -> Result<Self, ModelError> {
        Ok(Self::of_clips(&find_set(files)?))
    }

    /// Each layer, and each share of the rows of one that is several, in the order in which they run.
    pub(in crate::model) fn of_clips(set: &[FoundClip]) -> Self {
        let mut layers: Vec<LayerFacts> = Vec::new();
        let mut by_name = HashMap::new();
        for found in set {
            let alone = set.len() == 1;
            found.layout.each_linear(&mut |layer| {
                for stem in &layer.stems {
                    let id = LayerId(layers.len());
                    let (weight, biased) = (extents(found, layer), layer.bias.is_some());
                    layers.push(LayerFacts { stem: stem.clone(), weight, biased });
                    for name in spellings(found.facts.kind, alone, stem) {
                        by_name.entry(name).or_insert(id);
                    }
                }
            });
        }
        Self { layers, by_name, subject: Subject::TextEncoders }
    }
}

/// Extents `[out, in]` of each share of a layer.
fn extents(found: &FoundClip, layer: &Linear<StoredTensor>) -> Vec<u64> {
    let mut extents: Vec<u64> = layer.weight.shape.iter().map(|&extent| extent as u64).collect();
    let is_turned = |projection: &super::super::layout::Projection<StoredTensor>| {
        projection.transposed && std::ptr::eq(&raw const projection.layer, layer)
    };
    if found.layout.projection.as_ref().is_some_and(is_turned) {
        extents.reverse();
    }
    if let Some(rows) = extents.first_mut() {
        *rows /= layer.stems.len().max(1) as u64;
    }
    extents
}

/// Everything that a layer is called in adapters, by its name in transformers. An encoder that is `alone` is also meant
/// where only one is spoken of.
fn spellings(kind: ClipKind, alone: bool, stem: &str) -> Vec<String> {
    let (joined, dotted): (&[&str], &[&str]) = match (kind, alone) {
        (ClipKind::G, false) => (&["te2"], &["text_encoder_2"]),
        (ClipKind::G, true) => (&["te", "te1", "te2"], &["text_encoder", "text_encoder_2"]),
        (ClipKind::L | ClipKind::H, _) => (&["te", "te1"], &["text_encoder"]),
    };
    let mut names = vec![format!("text_encoders.{}.transformer.{stem}", kind.name())];
    // Without projection, since transformers 5.
    let inner = stem.strip_prefix("text_model.");
    let underscored = stem.replace('.', "_");
    for start in joined {
        names.extend([format!("lora_{start}_{underscored}"), format!("lycoris_{start}_{underscored}")]);
    }
    for start in dotted {
        names.push(format!("{start}.{stem}"));
        names.push(format!("{start}.base_model.model.{stem}"));
        names.extend(inner.map(|inner| format!("{start}.{inner}")));
        if let Some(old) = before_projections(stem) {
            names.push(format!("{start}.{old}"));
        }
    }
    if alone {
        names.push(format!("base_model.model.{stem}"));
        names.extend(inner.map(|inner| format!("base_model.model.{inner}")));
    }
    names
}

/// A projection of an attention as diffusers called it when it kept adapters in attention processors.
fn before_projections(stem: &str) -> Option<String> {
    let (attention, projection) = stem.rsplit_once('.')?;
    let old = match projection {
        "q_proj" => "to_q",
        "k_proj" => "to_k",
        "v_proj" => "to_v",
        "out_proj" => "to_out",
        _ => return None,
    };
    Some(format!("{attention}.{old}"))
}
