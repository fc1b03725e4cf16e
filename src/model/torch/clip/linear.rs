use std::fmt;

use tch::{Kind, TchError, Tensor};

use super::super::super::layout::{Linear, Norm};

/// What keeps a normalisation of constant values finite.
const EPS: f64 = 1e-5;

/// What a request adds to the results of linear layers without touching their weights.
pub(super) trait Adapters: fmt::Debug {
    /// Adds to `y`, the rows that `stem` names of a layer's result, what the adapters make of the layer's input `x`.
    /// Both are `[…, in]` and `[…, out]` in float32; `y` may be a view and is written in place. Called for every layer
    /// of every forward, with one stem after the other.
    fn add(&self, stem: &str, x: &Tensor, y: &mut Tensor) -> Result<(), TchError>;
}

/// The weights as they are.
#[derive(Debug)]
pub(super) struct NoAdapters;

impl Adapters for NoAdapters {
    fn add(&self, _stem: &str, _x: &Tensor, _y: &mut Tensor) -> Result<(), TchError> {
        Ok(())
    }
}

/// A linear layer with whatever adapters add to it. Every linear layer goes through here.
pub(super) fn linear(layer: &Linear<Tensor>, x: &Tensor, adapters: &dyn Adapters) -> Result<Tensor, TchError> {
    let bias = layer.bias.as_ref().map(float).transpose()?;
    let y = x.f_linear(&float(&layer.weight)?, bias.as_ref())?;
    let out = y.size().last().copied().unwrap_or(0);
    let share = out / i64::try_from(layer.stems.len().max(1)).unwrap_or(1);
    for (stem, start) in layer.stems.iter().zip((0..).step_by(usize::try_from(share.max(1)).unwrap_or(1))) {
        adapters.add(stem, x, &mut y.f_narrow(-1, start, share)?)?;
    }
    Ok(y)
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
