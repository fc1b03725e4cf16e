use tch::{Device as Compute, Tensor};

use super::super::ModelError;
use super::target::Target;
use super::{failed, kind_of};
use crate::device::{Place, Span};
use crate::tensor::TensorMeta;

/// A tensor over `memory`, on the CPU or on the lane's GPU. Not to be kept beyond the call of `what` that `memory` was
/// borrowed for.
pub(super) fn view(
    what: &'static str,
    meta: &TensorMeta,
    memory: &Span,
    target: &Target,
) -> Result<Tensor, ModelError> {
    let refused = |cause: &str| ModelError::Executor { what, cause: cause.to_owned() };
    meta.validate()?;
    meta.check_fits(memory.length())?;
    let device = match (memory.region().place(), target) {
        (Place::Host, _) => Compute::Cpu,
        (Place::Gpu(_), Target::Cuda { .. }) => target.device(),
        (Place::Gpu(_), Target::Cpu) => return Err(refused("a model on the CPU cannot reach memory of a GPU")),
    };
    if !memory.address().is_multiple_of(meta.dtype.size_bytes()) {
        return Err(refused("a tensor is not aligned to its element type"));
    }
    let as_i64 = |value: &u64| i64::try_from(*value);
    let shape: Result<Vec<i64>, _> = meta.shape.as_slice().iter().map(as_i64).collect();
    // The stride of a dimension of one element means nothing and may be any number.
    let pairs = meta.shape.as_slice().iter().zip(meta.strides.as_slice());
    let strides: Result<Vec<i64>, _> =
        pairs.map(|(&extent, stride)| if extent > 1 { as_i64(stride) } else { Ok(1) }).collect();
    let (Ok(shape), Ok(strides)) = (shape, strides) else {
        return Err(refused("a tensor is larger than the address space"));
    };
    let kind = kind_of(meta.dtype).ok_or_else(|| refused("elements of a kind that is not computed with"))?;
    let address = memory.address() as *const u8;
    // SAFETY: `check_fits` established that shape and strides stay inside the memory, which is aligned. Host memory is
    // mapped for as long as the caller's borrow, and no work on it is left when the call returns; the caller keeps a
    // GPU's memory until the lane's stream has passed the call. The library asks the driver which GPU the address
    // belongs to and refuses one that is not `device`. The tensor is dropped inside the call.
    unsafe { Tensor::f_from_blob(address, &shape, &strides, kind, device) }.map_err(failed(what))
}
