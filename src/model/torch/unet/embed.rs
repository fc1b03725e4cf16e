use tch::{Kind, TchError, Tensor};

/// The longest period of the sinusoids, in timesteps.
const MAX_PERIOD: f64 = 10_000.0;

/// Timesteps `[B]` as `[B, width]` cosines and sines, in float32: half-precision cannot tell neighbouring steps apart.
pub(super) fn sinusoids(timesteps: &Tensor, width: u64) -> Result<Tensor, TchError> {
    let half = width.cast_signed() / 2;
    let mut frequencies = Tensor::f_arange(half, (Kind::Float, timesteps.device()))?;
    frequencies = frequencies.f_mul_scalar_(-MAX_PERIOD.ln())?.f_div_scalar_(half)?.f_exp()?;
    let angles = timesteps.f_to_kind(Kind::Float)?.f_unsqueeze(1)?.f_mul(&frequencies)?;
    Tensor::f_cat(&[angles.f_cos()?, angles.f_sin()?], 1)
}
