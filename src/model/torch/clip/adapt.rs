use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tch::{Kind, TchError, Tensor};

use super::super::super::adapter::{Part, changed_elements};
use super::super::super::layout::Linear;
use super::super::super::layout::unet::Layer;
use super::super::super::{
    Adapter, AdapterFile, AdapterReport, LayerId, ModelError, ModelFile, ReadyStack, StackMaker,
};
use super::super::adapter::tensors;
use super::super::failed;
use super::super::frozen::Frozen;
use super::super::unet::{LayerPatch, Step, patch};
use super::WHAT;
use super::base::ClipBase;
use super::linear::{Adapters, float};
use crate::service::AdapterMode;

/// Bytes of an element of what changes.
const FLOAT_BYTES: u64 = 4;

/// All that one request's adapters change in a set of text encoders: in float32, on their device, never changed.
#[derive(Debug)]
pub struct ClipStack {
    /// By encoder, in the order of the set.
    encoders: Frozen<Vec<Patches>>,
    /// The weights it was made for.
    files: Vec<Arc<ModelFile>>,
    size_bytes: u64,
}

/// What changes in one encoder, by transformers' name of a layer.
#[derive(Debug, Default)]
pub(super) struct Patches(HashMap<String, LayerPatch>);

impl Adapters for Patches {
    fn patch(&self, stem: &str) -> Option<&LayerPatch> {
        self.0.get(stem)
    }
}

impl ClipStack {
    /// Bytes of all its tensors.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// What changes in the encoder of that place.
    pub(super) fn encoder(&self, at: usize) -> Option<&Patches> {
        self.encoders.get(at)
    }

    /// Whether it was made for that set.
    pub(super) fn is_for(&self, base: &ClipBase) -> bool {
        let (own, theirs) = (&self.files, &base.files);
        own.len() == theirs.len() && own.iter().zip(theirs).all(|(one, other)| Arc::ptr_eq(one, other))
    }
}

impl StackMaker for ClipBase {
    fn make(
        &self,
        adapters: &[Adapter<'_>],
        mode: AdapterMode,
    ) -> Result<(ReadyStack, Vec<AdapterReport>), ModelError> {
        let (stack, reports) = self.adapt(adapters, mode)?;
        let size_bytes = stack.size_bytes();
        Ok((ReadyStack::new(Arc::new(stack), size_bytes), reports))
    }

    fn merged_bytes(&self, adapters: &[Adapter<'_>]) -> Result<u64, ModelError> {
        Ok(changed_elements(&self.names, adapters)?.saturating_mul(FLOAT_BYTES))
    }
}

impl ClipBase {
    /// Puts adapters together for these text encoders, which are applied in this order; also on another thread than the one
    /// that runs them. The encoders are not modified. Answers the stack and, by adapter, what was taken up of it.
    ///
    /// # Errors
    /// As [`AdapterFile::report`]; [`ModelError::AdapterStrength`], [`ModelError::Changed`] where a file is no longer the
    /// one that was opened, [`ModelError::OutOfMemory`].
    pub fn adapt(
        &self,
        adapters: &[Adapter<'_>],
        mode: AdapterMode,
    ) -> Result<(ClipStack, Vec<AdapterReport>), ModelError> {
        let mut reports = Vec::new();
        let mut changes: BTreeMap<LayerId, Vec<(&AdapterFile, Step<Part>)>> = BTreeMap::new();
        for &Adapter { file, strength } in adapters {
            if !strength.is_finite() {
                return Err(ModelError::AdapterStrength { path: file.path().to_owned(), strength });
            }
            file.file().check_unchanged()?;
            let fitted = file.fit(&self.names)?;
            reports.push(fitted.report);
            for (id, change) in fitted.changes.into_iter().filter(|_| strength != 0.0) {
                changes.entry(id).or_default().push((file, Step { change, strength }));
            }
        }
        self.check_unchanged()?;
        let encoders = self.patches(&changes, mode)?;
        let size_bytes = encoders.iter().flat_map(|patches| patches.0.values()).map(size_bytes).sum();
        let files = self.files.clone();
        Ok((ClipStack { encoders: Frozen::new(encoders), files, size_bytes }, reports))
    }

    fn patches(
        &self,
        changes: &BTreeMap<LayerId, Vec<(&AdapterFile, Step<Part>)>>,
        mode: AdapterMode,
    ) -> Result<Vec<Patches>, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let _current = self.target.make_current()?;
        let mut all = Vec::new();
        // In the order in which the layers were counted when they got their names.
        let mut next = 0..;
        for encoder in &self.encoders {
            let mut layers = Vec::new();
            encoder.net.each_linear(&mut |layer| layers.push(layer));
            let mut patches = Patches::default();
            for layer in layers {
                for (share, stem) in layer.stems.iter().enumerate() {
                    let Some(steps) = next.next().and_then(|id| changes.get(&LayerId(id))) else { continue };
                    let read = |(file, Step { change, strength }): &(&AdapterFile, Step<Part>)| {
                        Ok(Step { change: tensors(file, change, self.target.device())?, strength: *strength })
                    };
                    let steps = steps.iter().map(read).collect::<Result<Vec<_>, ModelError>>()?;
                    let made = rows(layer, share).and_then(|layer| patch(&layer, &steps, mode, Kind::Float));
                    patches.0.insert(stem.clone(), made.map_err(failed(WHAT))?);
                }
            }
            all.push(patches);
        }
        Ok(all)
    }
}

/// One share of a layer's rows, in the type computed in.
fn rows(layer: &Linear<Tensor>, share: usize) -> Result<Layer<Tensor>, TchError> {
    let count = layer.weight.size().first().copied().unwrap_or(0) / layer.stems.len().max(1) as i64;
    let part = |tensor: &Tensor| float(&tensor.f_narrow(0, share as i64 * count, count)?);
    let bias = layer.bias.as_ref().map(part).transpose()?;
    Ok(Layer { id: LayerId(share), weight: part(&layer.weight)?, bias })
}

fn size_bytes(patch: &LayerPatch) -> u64 {
    let side = patch.low_rank.iter().flat_map(|path| [&path.down, &path.up]);
    let own = patch.replaced.iter().flat_map(|own| std::iter::once(&own.weight).chain(&own.bias));
    side.chain(own).map(|tensor| tensor.numel() as u64 * FLOAT_BYTES).sum()
}
