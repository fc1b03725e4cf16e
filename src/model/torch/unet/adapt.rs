use std::collections::BTreeMap;
use std::sync::Arc;

use tch::{Kind, TchError, Tensor};

use super::super::super::adapter::{Change, Delta, Part, changed_elements};
use super::super::super::layout::unet::Layer;
use super::super::super::{Adapter, AdapterFile, AdapterReport, LayerId, ModelError, ReadyStack, StackMaker};
use super::super::adapter::{Narrow, merged, narrow, tensors};
use super::super::failed;
use super::WHAT;
use super::base::Base;
use super::load::TorchUnet;
use super::stack::{LayerPatch, LowRank, Replaced, Stack};
use crate::service::AdapterMode;

/// What adapters make of a model.
#[derive(Debug)]
pub struct Adapted {
    /// For [`super::Patches`].
    pub stack: Stack,
    /// By adapter: what the model took up of it.
    pub reports: Vec<AdapterReport>,
}

/// What one adapter changes in a layer.
pub(in crate::model::torch) struct Step<T> {
    pub(in crate::model::torch) change: Change<T>,
    pub(in crate::model::torch) strength: f64,
}

impl TorchUnet {
    /// As [`StackMaker::make`], for rows that [`super::Patches`] names.
    ///
    /// # Errors
    /// As there.
    pub fn adapt(&self, adapters: &[Adapter<'_>], mode: AdapterMode) -> Result<Adapted, ModelError> {
        self.base.adapt(adapters, mode)
    }
}

impl StackMaker for Base {
    fn make(
        &self,
        adapters: &[Adapter<'_>],
        mode: AdapterMode,
    ) -> Result<(ReadyStack, Vec<AdapterReport>), ModelError> {
        let Adapted { stack, reports } = self.adapt(adapters, mode)?;
        let size_bytes = stack.size_bytes();
        Ok((ReadyStack::new(Arc::new(stack), size_bytes), reports))
    }

    fn merged_bytes(&self, adapters: &[Adapter<'_>]) -> Result<u64, ModelError> {
        let element_bytes = self.kind.elt_size_in_bytes() as u64;
        Ok(changed_elements(&self.names, adapters)?.saturating_mul(element_bytes))
    }
}

impl Base {
    fn adapt(&self, adapters: &[Adapter<'_>], mode: AdapterMode) -> Result<Adapted, ModelError> {
        let mut reports = Vec::new();
        let mut layers: BTreeMap<LayerId, Vec<(&AdapterFile, Step<Part>)>> = BTreeMap::new();
        for &Adapter { file, strength } in adapters {
            if !strength.is_finite() {
                return Err(ModelError::AdapterStrength { path: file.path().to_owned(), strength });
            }
            file.file().check_unchanged()?;
            let fitted = file.fit(&self.names)?;
            reports.push(fitted.report);
            if strength == 0.0 {
                continue;
            }
            for (id, change) in fitted.changes {
                layers.entry(id).or_default().push((file, Step { change, strength }));
            }
        }
        self.check_unchanged()?;
        let changes = self.changes(&layers, mode)?;
        Ok(Adapted { stack: self.stack(changes)?, reports })
    }

    fn changes(
        &self,
        layers: &BTreeMap<LayerId, Vec<(&AdapterFile, Step<Part>)>>,
        mode: AdapterMode,
    ) -> Result<Vec<(LayerId, LayerPatch)>, ModelError> {
        let _no_grad = tch::no_grad_guard();
        let _current = self.target.make_current()?;
        let mut changes = Vec::new();
        for (id, steps) in layers {
            let Some(layer) = self.layers.get(id.0) else { continue };
            let read = |(file, Step { change, strength }): &(&AdapterFile, Step<Part>)| {
                Ok(Step { change: tensors(file, change, self.target.device())?, strength: *strength })
            };
            let steps = steps.iter().map(read).collect::<Result<Vec<_>, ModelError>>()?;
            changes.push((*id, patch(layer, &steps, mode, self.kind).map_err(failed(WHAT))?));
        }
        Ok(changes)
    }
}

/// What the steps, in their order, make of a layer that computes in `kind`.
pub(in crate::model::torch) fn patch(
    layer: &Layer<Tensor>,
    steps: &[Step<Tensor>],
    mode: AdapterMode,
    kind: Kind,
) -> Result<LayerPatch, TchError> {
    // Differences commute with each other. What comes before a step that depends on the weight is merged with it.
    let free_from = steps.iter().rposition(|step| step.change.depends_on_order()).map_or(0, |last| last + 1);
    let apart = mode == AdapterMode::Side || (mode == AdapterMode::Auto && is_cheaper_apart(layer, steps));
    let (mut paths, mut bias) = (Vec::new(), None);
    let mut weight = None;
    for (at, Step { change, strength }) in steps.iter().enumerate() {
        match &change.weight {
            Some(Delta::LowRank { up, down, mid }) if apart && at >= free_from && change.is_low_rank() => {
                let Narrow { down, up } = narrow(up, down, mid.as_ref(), &layer.weight.size())?;
                paths.push(LowRank { down, up: up.f_mul_scalar(strength * change.scale)? });
            }
            Some(_) => {
                let before = match weight {
                    Some(weight) => weight,
                    None => layer.weight.f_to_kind(Kind::Float)?,
                };
                weight = Some(merged(&before, change, *strength)?);
            }
            None => {}
        }
        if let (Some(own), Some(difference)) = (&layer.bias, &change.bias) {
            let before = match bias {
                Some(bias) => bias,
                None => own.f_to_kind(Kind::Float)?,
            };
            bias = Some(before.f_add(&difference.f_flatten(0, -1)?.f_mul_scalar(*strength)?)?);
        }
    }
    let replaced = match (weight, bias) {
        (None, None) => None,
        (weight, bias) => Some(Replaced {
            weight: own(weight.as_ref(), &layer.weight, kind)?,
            bias: match &layer.bias {
                Some(original) => Some(own(bias.as_ref(), original, kind)?),
                None => None,
            },
        }),
    };
    Ok(LayerPatch { low_rank: joined(paths)?, replaced })
}

/// A changed tensor in the element type computed in, or a copy of the original: nothing points into the model's memory.
fn own(changed: Option<&Tensor>, original: &Tensor, kind: Kind) -> Result<Tensor, TchError> {
    match changed {
        Some(changed) => changed.f_to_kind(kind),
        None => original.f_detach_copy(),
    }
}

/// Whether only side paths are wanted and two narrow products are less work than one with the weight.
fn is_cheaper_apart(layer: &Layer<Tensor>, steps: &[Step<Tensor>]) -> bool {
    let mut rank = 0;
    for step in steps {
        match &step.change.weight {
            Some(Delta::LowRank { up, .. }) if step.change.is_low_rank() => {
                rank += up.size().iter().skip(1).product::<i64>();
            }
            Some(_) => return false,
            None => {}
        }
    }
    let rows = layer.weight.size().first().copied().unwrap_or(0);
    let inner: i64 = layer.weight.size().iter().skip(1).product();
    rank * (rows + inner) < rows * inner
}

/// Several side paths as one: their ranks add up, and two products do for all.
fn joined(mut paths: Vec<LowRank>) -> Result<Vec<LowRank>, TchError> {
    if paths.len() > 1 {
        let (downs, ups): (Vec<_>, Vec<_>) = paths.into_iter().map(|LowRank { down, up }| (down, up)).unzip();
        paths = vec![LowRank { down: Tensor::f_cat(&downs, 0)?, up: Tensor::f_cat(&ups, 1)? }];
    }
    Ok(paths)
}
