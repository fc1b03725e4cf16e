use tch::{Kind, TchError, Tensor};

use super::super::super::ModelError;
use super::super::failed;
use super::WHAT;

/// Numbers that one size becomes.
const SIZE_WIDTH: i64 = 256;
/// Longest period of the waves that a size becomes.
const LONGEST: f64 = 10_000.0;

/// Sizes that SDXL is conditioned on, in pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum SdxlSizes {
    /// The base model.
    Base {
        /// Rows and columns of the picture that the training picture was made of.
        original: [f32; 2],
        /// Rows cut off at the top and columns at the left.
        crop: [f32; 2],
        /// Rows and columns of the picture asked for.
        target: [f32; 2],
    },
    /// The refiner.
    Refiner {
        /// Rows and columns of the picture that the training picture was made of.
        original: [f32; 2],
        /// Rows cut off at the top and columns at the left.
        crop: [f32; 2],
        /// How much people like it: 6 for what is wanted, 2.5 for what is not.
        aesthetic: f32,
    },
}

impl SdxlSizes {
    /// In the order in which the model takes them.
    fn values(self) -> Vec<f32> {
        match self {
            Self::Base { original, crop, target } => [original, crop, target].concat(),
            Self::Refiner { original, crop, aesthetic } => [&original[..], &crop[..], &[aesthetic]].concat(),
        }
    }
}

/// The vector that SDXL takes beside the prompt: the pooled row of CLIP-G, then each size as waves. 2816 numbers for
/// the base model, 2560 for the refiner, both with 1280 pooled ones. Computed in float32 on the CPU.
///
/// # Errors
/// [`ModelError::OutOfMemory`], [`ModelError::Executor`].
pub fn sdxl_vector(pooled: &[f32], sizes: SdxlSizes) -> Result<Vec<f32>, ModelError> {
    let _no_grad = tch::no_grad_guard();
    let waves = waves(&sizes.values()).map_err(failed(WHAT))?;
    let mut vector = vec![0f32; pooled.len() + waves.numel()];
    let (first, rest) = vector.split_at_mut(pooled.len());
    first.copy_from_slice(pooled);
    waves.f_copy_data(rest, waves.numel()).map_err(failed(WHAT))?;
    Ok(vector)
}

/// Cosines, then sines, of each value at 128 speeds.
fn waves(values: &[f32]) -> Result<Tensor, TchError> {
    let half = SIZE_WIDTH / 2;
    let speeds = Tensor::f_arange(half, (Kind::Float, tch::Device::Cpu))?
        .f_mul_scalar_(-LONGEST.ln())?
        .f_div_scalar_(half as f64)?
        .f_exp_()?;
    let angles = Tensor::f_from_slice(values)?.f_unsqueeze(1)?.f_mul(&speeds)?;
    Tensor::f_cat(&[angles.f_cos()?, angles.f_sin()?], 1)?.f_flatten(0, 1)
}
