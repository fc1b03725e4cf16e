use std::fmt;

use tch::{Kind, TchError, Tensor};

use super::super::super::layout::{Linear, Norm};
use super::super::unet::{LayerPatch, LowRank, Replaced};

/// What keeps a normalisation of constant values finite.
const EPS: f64 = 1e-5;

/// What a request changes in linear layers without touching their weights.
pub(super) trait Adapters: fmt::Debug {
    /// What changes in the rows that `stem` names; asked for every layer of every forward.
    fn patch(&self, stem: &str) -> Option<&LayerPatch>;
}

/// The weights as they are.
#[derive(Debug)]
pub(super) struct NoAdapters;

impl Adapters for NoAdapters {
    fn patch(&self, _stem: &str) -> Option<&LayerPatch> {
        None
    }
}

/// A linear layer with whatever adapters change in it. Every linear layer goes through here.
pub(super) fn linear(layer: &Linear<Tensor>, x: &Tensor, adapters: &dyn Adapters) -> Result<Tensor, TchError> {
    let y = match layer.stems.as_slice() {
        [stem] if let Some(Replaced { weight, bias }) = replaced(adapters, stem) => {
            x.f_linear(weight, bias.as_ref())?
        }
        _ => x.f_linear(&float(&layer.weight)?, layer.bias.as_ref().map(float).transpose()?.as_ref())?,
    };
    let out = y.size().last().copied().unwrap_or(0);
    let share = out / i64::try_from(layer.stems.len().max(1)).unwrap_or(1);
    for (stem, start) in layer.stems.iter().zip((0..).step_by(usize::try_from(share.max(1)).unwrap_or(1))) {
        let Some(patch) = adapters.patch(stem) else { continue };
        let mut rows = y.f_narrow(-1, start, share)?;
        if let (Some(Replaced { weight, bias }), true) = (&patch.replaced, layer.stems.len() > 1) {
            rows.f_copy_(&x.f_linear(weight, bias.as_ref())?)?;
        }
        for LowRank { down, up } in &patch.low_rank {
            let _ = rows.f_add_(&x.f_linear(down, None::<&Tensor>)?.f_linear(up, None::<&Tensor>)?)?;
        }
    }
    Ok(y)
}

fn replaced<'a>(adapters: &'a dyn Adapters, stem: &str) -> Option<&'a Replaced> {
    adapters.patch(stem)?.replaced.as_ref()
}

/// A normalisation over the last dimension.
pub(super) fn norm(layer: &Norm<Tensor>, x: &Tensor) -> Result<Tensor, TchError> {
    let weight = float(&layer.weight)?;
    x.f_layer_norm(weight.size(), Some(&weight), Some(&float(&layer.bias)?), EPS, true)
}

/// The values in float32; nothing is copied where they are already. A converted copy lives for one operation.
pub(super) fn float(stored: &Tensor) -> Result<Tensor, TchError> {
    stored.f_to_kind(Kind::Float)
}
