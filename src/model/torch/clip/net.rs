use tch::{TchError, Tensor};

use super::super::super::ModelError;
use super::super::super::clip::{ClipFacts, ClipKind};
use super::super::super::layout::{Block, Clip, Qkv};
use super::super::failed;
use super::WHAT;
use super::linear::{Adapters, linear, norm};

/// What tells the families apart, beside their weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct Style {
    heads: i64,
    gelu: Gelu,
}

#[derive(Debug, Clone, Copy)]
enum Gelu {
    /// With the error function.
    Exact,
    /// x · sigmoid(1.702 · x).
    Quick,
}

impl Style {
    pub(super) fn of(facts: &ClipFacts) -> Self {
        let gelu = match facts.kind {
            ClipKind::L => Gelu::Quick,
            ClipKind::H | ClipKind::G => Gelu::Exact,
        };
        Self { heads: facts.heads().cast_signed(), gelu }
    }
}

/// One forward.
pub(super) struct Pass<'a> {
    pub(super) style: Style,
    /// Blocks after which the hidden state is taken.
    pub(super) blocks: u64,
    pub(super) adapters: &'a dyn Adapters,
    /// Asked before each block.
    pub(super) stop: &'a dyn Fn() -> bool,
}

/// Hidden states, neither of them normalised.
pub(super) struct Hidden {
    pub(super) taken: Tensor,
    pub(super) last: Tensor,
}

impl Clip<Tensor> {
    /// Runs all blocks on `x` `[chunks, positions, width]` in float32.
    pub(super) fn forward(&self, mut x: Tensor, pass: &Pass<'_>) -> Result<Hidden, ModelError> {
        let mut taken = None;
        for (block, number) in self.blocks.iter().zip(1u64..) {
            if (pass.stop)() {
                return Err(ModelError::Cancelled);
            }
            x = block.forward(&x, pass).map_err(failed(WHAT))?;
            if number == pass.blocks {
                taken = Some(x.shallow_clone());
            }
        }
        Ok(Hidden { taken: taken.unwrap_or_else(|| x.shallow_clone()), last: x })
    }
}

impl Block<Tensor> {
    // Nothing is added in place: the hidden state that came in may be one that is taken.
    fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor, TchError> {
        let attended = self.attend(&norm(&self.norm1, x)?, pass)?;
        let x = x.f_add(&attended)?;
        let mut h = linear(&self.fc1, &norm(&self.norm2, &x)?, pass.adapters)?;
        h = match pass.style.gelu {
            Gelu::Exact => h.f_gelu("none")?,
            Gelu::Quick => h.f_mul(&h.f_mul_scalar(1.702)?.f_sigmoid_()?)?,
        };
        x.f_add(&linear(&self.fc2, &h, pass.adapters)?)
    }

    /// Attention of each position to itself and those before it; padding is not masked.
    fn attend(&self, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor, TchError> {
        let (chunks, positions, width) = x.size3()?;
        let heads = |t: &Tensor| t.f_view([chunks, positions, pass.style.heads, -1])?.f_transpose(1, 2);
        let [query, key, value] = match &self.qkv {
            Qkv::Split(layers) => layers.each_ref().map(|layer| heads(&linear(layer, x, pass.adapters)?)),
            Qkv::Fused(layer) => {
                let all = linear(layer, x, pass.adapters)?;
                [0, 1, 2].map(|third| heads(&all.f_narrow(-1, third * width, width)?))
            }
        };
        let h =
            Tensor::f_scaled_dot_product_attention(&query?, &key?, &value?, None::<&Tensor>, 0.0, true, None, false)?;
        linear(&self.out, &h.f_transpose(1, 2)?.f_reshape([chunks, positions, width])?, pass.adapters)
    }
}
