use tch::{TchError, Tensor};

use super::super::layout::{Conv, Norm};

/// A convolution; the caller chose stride and padding.
pub(super) fn conv(layer: &Conv<Tensor>, x: &Tensor, stride: i64, padding: i64) -> Result<Tensor, TchError> {
    x.f_conv2d(&layer.weight, layer.bias.as_ref(), [stride, stride], [padding, padding], [1, 1], 1)
}

/// A convolution that keeps the size: 3 × 3 kernels.
pub(super) fn conv3(layer: &Conv<Tensor>, x: &Tensor) -> Result<Tensor, TchError> {
    conv(layer, x, 1, 1)
}

/// A convolution over channels only: 1 × 1 kernels.
pub(super) fn conv1(layer: &Conv<Tensor>, x: &Tensor) -> Result<Tensor, TchError> {
    conv(layer, x, 1, 0)
}

/// A group normalisation.
pub(super) fn norm(layer: &Norm<Tensor>, x: &Tensor, groups: u64, eps: f64) -> Result<Tensor, TchError> {
    x.f_group_norm(groups.cast_signed(), Some(&layer.weight), Some(&layer.bias), eps, true)
}

/// Doubles each side by repeating every element.
pub(super) fn double(x: &Tensor) -> Result<Tensor, TchError> {
    let (_, _, height, width) = x.size4()?;
    x.f_upsample_nearest2d([height * 2, width * 2], 2.0, 2.0)
}
