use tch::{TchError, Tensor};

use super::super::super::layout::unet::{
    Attention, Block, FeedForward, Layer, ResBlock, Transformer, TransformerBlock,
};
use super::patches::Patches;

/// What keeps a normalisation of constant values finite, in residual blocks and at the end.
pub(super) const EPS: f64 = 1e-5;
/// The same at the start of attention, and no other.
const ATTENTION_EPS: f64 = 1e-6;
/// The same over the last dimension.
const LAYER_EPS: f64 = 1e-5;

// All activations are NCHW or `[B, positions, channels]`, contiguous, in the element type of the weights. A permuted
// view that stays among them makes every later operation mix layouts.
// Values are replaced rather than shadowed, so that each is freed by the next.

/// What all blocks of one forward take.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    /// The activated embedding of timestep and vector, `[B, width]`.
    pub(super) embed: &'a Tensor,
    /// `[B, tokens, width]`.
    pub(super) context: &'a Tensor,
    pub(super) patches: &'a Patches,
}

impl Pass<'_> {
    /// A convolution that keeps the size: 3 × 3 kernels.
    pub(super) fn conv3(&self, layer: &Layer<Tensor>, x: &Tensor) -> Result<Tensor, TchError> {
        self.patches.conv(layer, x, 1, 1)
    }

    pub(super) fn block(&self, block: &Block<Tensor>, mut x: Tensor) -> Result<Tensor, TchError> {
        x = self.res(&block.res, x)?;
        match &block.transformer {
            Some(transformer) => self.transformer(transformer, x),
            None => Ok(x),
        }
    }

    pub(super) fn res(&self, block: &ResBlock<Tensor>, x: Tensor) -> Result<Tensor, TchError> {
        let mut h = self.patches.group_norm(&block.norm1, &x, EPS)?.f_silu_()?;
        h = self.conv3(&block.conv1, &h)?;
        let embed = self.patches.linear(&block.embed, self.embed)?.f_unsqueeze(2)?.f_unsqueeze(3)?;
        h = h.f_add_(&embed)?;
        h = self.patches.group_norm(&block.norm2, &h, EPS)?.f_silu_()?;
        h = self.conv3(&block.conv2, &h)?;
        let residual = match &block.shortcut {
            Some(layer) => self.patches.conv(layer, &x, 1, 0)?,
            None => x,
        };
        h.f_add_(&residual)
    }

    pub(super) fn transformer(&self, layers: &Transformer<Tensor>, x: Tensor) -> Result<Tensor, TchError> {
        let (rows, channels, height, width) = x.size4()?;
        let sequence = |h: &Tensor| h.f_view([rows, channels, height * width])?.f_transpose(1, 2)?.f_contiguous();
        let image = |h: &Tensor| h.f_transpose(1, 2)?.f_contiguous()?.f_view([rows, channels, height, width]);
        let mut h = self.patches.group_norm(&layers.norm, &x, ATTENTION_EPS)?;
        h = match layers.linear {
            true => self.patches.linear(&layers.proj_in, &sequence(&h)?)?,
            false => sequence(&self.patches.conv(&layers.proj_in, &h, 1, 0)?)?,
        };
        for block in &layers.blocks {
            h = self.transformer_block(block, layers.heads.cast_signed(), h)?;
        }
        h = match layers.linear {
            true => image(&self.patches.linear(&layers.proj_out, &h)?)?,
            false => self.patches.conv(&layers.proj_out, &image(&h)?, 1, 0)?,
        };
        h.f_add_(&x)
    }

    fn transformer_block(
        &self,
        block: &TransformerBlock<Tensor>,
        heads: i64,
        mut h: Tensor,
    ) -> Result<Tensor, TchError> {
        let mut normed = self.patches.layer_norm(&block.norm1, &h, LAYER_EPS)?;
        h = self.attention(&block.own, heads, &normed, &normed)?.f_add_(&h)?;
        normed = self.patches.layer_norm(&block.norm2, &h, LAYER_EPS)?;
        h = self.attention(&block.cross, heads, &normed, self.context)?.f_add_(&h)?;
        normed = self.patches.layer_norm(&block.norm3, &h, LAYER_EPS)?;
        self.feed_forward(&block.feed_forward, normed)?.f_add_(&h)
    }

    fn attention(
        &self,
        layers: &Attention<Tensor>,
        heads: i64,
        x: &Tensor,
        source: &Tensor,
    ) -> Result<Tensor, TchError> {
        let (rows, positions, channels) = x.size3()?;
        let split = |h: Tensor| h.f_view([rows, -1, heads, channels / heads])?.f_transpose(1, 2);
        let query = split(self.patches.linear(&layers.query, x)?)?;
        let key = split(self.patches.linear(&layers.key, source)?)?;
        let value = split(self.patches.linear(&layers.value, source)?)?;
        let mut h =
            Tensor::f_scaled_dot_product_attention(&query, &key, &value, None::<&Tensor>, 0.0, false, None, false)?;
        h = h.f_transpose(1, 2)?.f_reshape([rows, positions, channels])?;
        self.patches.linear(&layers.out, &h)
    }

    fn feed_forward(&self, layers: &FeedForward<Tensor>, x: Tensor) -> Result<Tensor, TchError> {
        let wide = self.patches.linear(&layers.widen, &x)?;
        drop(x);
        let half = wide.size3()?.2 / 2;
        let gate = wide.f_narrow(2, half, half)?;
        let mut h = gate.f_gelu("none")?.f_mul_(&wide.f_narrow(2, 0, half)?)?;
        drop((gate, wide));
        h = self.patches.linear(&layers.narrow, &h)?;
        Ok(h)
    }
}
