use tch::{Kind, TchError, Tensor};

use super::super::detect::Scale;
use super::super::layout::{Pool, Step, Tiny, TinyBlock};
use super::ops::{conv, conv1, conv3, double, norm};
use super::vae::Net;

/// What keeps a normalisation of constant values finite.
const EPS: f64 = 1e-5;
/// Where the clamp of a latent levels out.
const MAGNITUDE: f64 = 3.0;

/// A tiny autoencoder that takes and gives raw latents, as every other VAE does.
#[derive(Debug)]
pub(super) struct ScaledTiny {
    pub(super) tiny: Tiny<Tensor>,
    pub(super) scale: Scale,
    /// Element type of the weights.
    pub(super) kind: Kind,
}

impl Net for ScaledTiny {
    fn decode(&self, latent: &Tensor) -> Option<Result<Tensor, TchError>> {
        let steps = self.tiny.decoder.as_deref()?;
        let own = latent.f_sub_scalar(self.scale.shift).and_then(|mut x| x.f_mul_scalar_(self.scale.scale));
        Some(own.and_then(|x| self.run(steps, x)))
    }

    fn encode(&self, image: &Tensor) -> Option<Result<Tensor, TchError>> {
        let steps = self.tiny.encoder.as_deref()?;
        let own = self.run(steps, image.shallow_clone());
        Some(own.and_then(|mut x| x.f_div_scalar_(self.scale.scale)?.f_add_scalar_(self.scale.shift)))
    }
}

impl ScaledTiny {
    /// Float32 through the network's own element type and back.
    fn run(&self, steps: &[Step<Tensor>], x: Tensor) -> Result<Tensor, TchError> {
        run(steps, x.f_to_kind(self.kind)?)?.f_to_kind(Kind::Float)
    }
}

fn run(steps: &[Step<Tensor>], mut x: Tensor) -> Result<Tensor, TchError> {
    for step in steps {
        x = match step {
            Step::Conv(layer) => conv3(layer, &x)?,
            Step::Halve(layer) => conv(layer, &x, 2, 1)?,
            Step::Block(block) => block.forward(x)?,
            Step::Clamp => x.f_div_scalar(MAGNITUDE)?.f_tanh_()?.f_mul_scalar_(MAGNITUDE)?,
            Step::Relu => x.f_relu_()?,
            Step::Double => double(&x)?,
        };
    }
    Ok(x)
}

impl TinyBlock<Tensor> {
    fn forward(&self, mut x: Tensor) -> Result<Tensor, TchError> {
        if let Some(pool) = &self.pool {
            x = pool.forward(&x)?;
        }
        let [first, second, third] = &self.convs;
        let mut h = conv3(first, &x)?.f_relu_()?;
        h = conv3(second, &h)?.f_relu_()?;
        h = conv3(third, &h)?;
        let residual = match &self.skip {
            Some(layer) => conv1(layer, &x)?,
            None => x,
        };
        h.f_add_(&residual)?.f_relu_()
    }
}

impl Pool<Tensor> {
    fn forward(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let mut h = conv1(&self.widen, x)?;
        h = norm(&self.norm, &h, Self::GROUPS, EPS)?.f_relu_()?;
        conv1(&self.narrow, &h)?.f_add_(x)
    }
}
