use tch::{Kind, TchError, Tensor};

use super::super::layout::{Attention, Conv, Kl, KlDecoder, KlEncoder, Level, Middle, Norm, ResBlock};
use super::ops::{conv, conv1, conv3, double, norm};
use super::vae::Net;

/// Groups of every normalisation.
const GROUPS: u64 = 32;
/// What keeps a normalisation of constant values finite; the UNet's is ten times this.
const EPS: f64 = 1e-6;

// All activations are NCHW, in the element type of the weights; what comes in and goes out is float32.
// Values are replaced rather than shadowed, so that each is freed by the next.

impl Net for Kl<Tensor> {
    fn decode(&self, latent: &Tensor) -> Option<Result<Tensor, TchError>> {
        self.decoder.as_ref().map(|decoder| decoder.forward(latent))
    }

    fn encode(&self, image: &Tensor) -> Option<Result<Tensor, TchError>> {
        self.encoder.as_ref().map(|encoder| encoder.forward(image))
    }
}

impl KlDecoder<Tensor> {
    /// Raw latent to an image in 0…1, not yet clamped.
    fn forward(&self, latent: &Tensor) -> Result<Tensor, TchError> {
        let mut x = latent.f_to_kind(self.conv_in.weight.kind())?;
        if let Some(layer) = &self.post_quant {
            x = conv1(layer, &x)?;
        }
        x = conv3(&self.conv_in, &x)?;
        x = self.middle.forward(x)?;
        for level in &self.levels {
            x = level.blocks(x)?;
            if let Some(layer) = &level.resample {
                x = double(&x)?;
                x = conv3(layer, &x)?;
            }
        }
        x = normalise(&self.norm_out, &x)?;
        // The range is changed in float32: half-precision numbers near 1 are too far apart for an image.
        x = conv3(&self.conv_out, &x)?.f_to_kind(Kind::Float)?;
        x.f_add_scalar_(1.0)?.f_div_scalar_(2.0)
    }
}

impl KlEncoder<Tensor> {
    /// Image in 0…1 to the mean of the posterior.
    fn forward(&self, image: &Tensor) -> Result<Tensor, TchError> {
        let mut x = image.f_mul_scalar(2.0)?.f_sub_scalar_(1.0)?.f_to_kind(self.conv_in.weight.kind())?;
        x = conv3(&self.conv_in, &x)?;
        for level in &self.levels {
            x = level.blocks(x)?;
            if let Some(layer) = &level.resample {
                // One column at the right, one row at the bottom: what a padding of 1 does not do.
                x = x.f_constant_pad_nd([0, 1, 0, 1])?;
                x = conv(layer, &x, 2, 0)?;
            }
        }
        x = self.middle.forward(x)?;
        x = normalise(&self.norm_out, &x)?;
        x = conv3(&self.conv_out, &x)?;
        if let Some(layer) = &self.quant {
            x = conv1(layer, &x)?;
        }
        let (_, moments, ..) = x.size4()?;
        x.f_narrow(1, 0, moments / 2)?.f_to_kind(Kind::Float)
    }
}

impl Level<Tensor> {
    fn blocks(&self, mut x: Tensor) -> Result<Tensor, TchError> {
        for block in &self.blocks {
            x = block.forward(x)?;
        }
        Ok(x)
    }
}

impl Middle<Tensor> {
    fn forward(&self, mut x: Tensor) -> Result<Tensor, TchError> {
        x = self.first.forward(x)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(x)?;
        }
        self.second.forward(x)
    }
}

impl ResBlock<Tensor> {
    fn forward(&self, x: Tensor) -> Result<Tensor, TchError> {
        let mut h = normalise(&self.norm1, &x)?;
        h = conv3(&self.conv1, &h)?;
        h = normalise(&self.norm2, &h)?;
        h = conv3(&self.conv2, &h)?;
        let residual = match &self.shortcut {
            Some(layer) => conv1(layer, &x)?,
            None => x,
        };
        h.f_add_(&residual)
    }
}

impl Attention<Tensor> {
    fn forward(&self, mut x: Tensor) -> Result<Tensor, TchError> {
        let (samples, channels, height, width) = x.size4()?;
        let mut h = norm(&self.norm, &x, GROUPS, EPS)?;
        // The linear layers make query, key and value contiguous, which the fused attention needs.
        h = h.f_view([samples, channels, height * width])?.f_transpose(1, 2)?.f_contiguous()?;
        let [query, key, value] = [&self.query, &self.key, &self.value].map(|layer| {
            let projected = linear(layer, &h, channels)?;
            projected.f_unsqueeze(1)
        });
        h = Tensor::f_scaled_dot_product_attention(&query?, &key?, &value?, None::<&Tensor>, 0.0, false, None, false)?;
        h = linear(&self.out, &h.f_squeeze_dim(1)?, channels)?;
        h = h.f_transpose(1, 2)?.f_contiguous()?.f_view([samples, channels, height, width])?;
        x.f_add_(&h)
    }
}

/// A projection of the last dimension; stored as a matrix or as 1 × 1 kernels.
fn linear(layer: &Conv<Tensor>, x: &Tensor, channels: i64) -> Result<Tensor, TchError> {
    x.f_linear(&layer.weight.f_view([channels, channels])?, layer.bias.as_ref())
}

/// A normalisation and the activation after it.
fn normalise(layer: &Norm<Tensor>, x: &Tensor) -> Result<Tensor, TchError> {
    norm(layer, x, GROUPS, EPS)?.f_silu_()
}
