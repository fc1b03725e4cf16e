use std::fmt;
use std::sync::Arc;

use tch::{Device as Compute, Kind, TchError, Tensor};

use super::super::detect::{VaeLayout, vae_layout};
use super::super::{ModelError, ModelFile, Vae, VaeInput, VaePlan, vae_facts};
use super::tiles::Tiled;
use super::tiny::ScaledTiny;
use super::weights::{Backing, LoadOptions, Weights};
use super::{failed, kind_of};
use crate::device::Span;
use crate::service::{VaeMode, VaeOperation};
use crate::tensor::{DType, TensorMeta};

/// A network on float32 NCHW tensors: raw latents on one side, images in 0…1 (not clamped) on the other.
/// `None` where the file holds no such half. A result is the caller's to write to.
pub(super) trait Net: fmt::Debug {
    fn decode(&self, latent: &Tensor) -> Option<Result<Tensor, TchError>>;
    fn encode(&self, image: &Tensor) -> Option<Result<Tensor, TchError>>;
}

/// Loads the VAE in `file`, to be run in float32 on the CPU by the calling thread.
///
/// # Errors
/// As [`vae_facts`]; [`ModelError::OutOfMemory`] where the weights do not fit, [`ModelError::Changed`] where the file
/// is no longer the one that was opened.
pub fn load_vae(file: Arc<ModelFile>, options: LoadOptions<'_>) -> Result<Box<dyn Vae>, ModelError> {
    let _no_grad = tch::no_grad_guard();
    file.check_unchanged()?;
    let facts = vae_facts(&file)?;
    let layout = vae_layout(&file)?;
    let mut lengths = Vec::new();
    layout.each(|stored| lengths.push(stored.elements()))?;
    let mut weights = Weights::new(&file, options, &lengths)?;
    let mut load = |stored: &_| weights.tensor(stored);
    let net: Box<dyn Net> = match layout {
        VaeLayout::Kl(kl) => Box::new(kl.try_map(&mut load)?),
        VaeLayout::Tiny(tiny, scale) => Box::new(ScaledTiny { tiny: tiny.try_map(&mut load)?, scale }),
    };
    let backing = weights.into_backing(&file);
    Ok(Box::new(TorchVae { net, ratio: facts.ratio, backing }))
}

#[derive(Debug)]
struct TorchVae {
    // Declared before `backing`, so that it is dropped before the memory that its tensors point into.
    net: Box<dyn Net>,
    ratio: u64,
    backing: Backing,
}

impl Vae for TorchVae {
    fn run(
        &mut self,
        plan: &VaePlan,
        input: VaeInput<'_>,
        output: &Span,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), ModelError> {
        if let Backing::File(file) = &self.backing {
            file.check_unchanged()?;
        }
        let _no_grad = tch::no_grad_guard();
        let what = plan.operation.name();
        // Both are views on the caller's memory. They and whatever is made of them stay inside this call.
        let source = view(what, &input.meta, input.memory)?;
        let target = view(what, &plan.output, output)?;
        let (source, target) = match plan.operation {
            VaeOperation::Decode => (source, channels_first(&target).map_err(failed(what))?),
            VaeOperation::Encode => {
                let source = channels_first(&source).map_err(failed(what))?;
                (crop(&source, self.ratio.cast_signed()).map_err(failed(what))?, target)
            }
        };
        if source.size4().map_err(failed(what))?.0 != target.size4().map_err(failed(what))?.0 {
            return Err(shape_error(what));
        }
        for at in 0..target.size4().map_err(failed(what))?.0 {
            if stop() {
                return Err(ModelError::Cancelled);
            }
            let one = sample(&source, at).map_err(failed(what))?;
            let place = target.f_narrow(0, at, 1).map_err(failed(what))?;
            self.sample(plan, &one, &place, stop)?;
        }
        Ok(())
    }
}

impl TorchVae {
    /// Runs one sample; `place` is its view on the result.
    fn sample(
        &self,
        plan: &VaePlan,
        input: &Tensor,
        place: &Tensor,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), ModelError> {
        let what = plan.operation.name();
        let (_, channels, height, width) = place.size4().map_err(failed(what))?;
        let model = |part: &Tensor| self.forward(plan.operation, part);
        let result = match plan.mode {
            VaeMode::Full => model(input)?,
            VaeMode::Tiled(tiles) => Tiled {
                operation: plan.operation,
                tiles,
                ratio: self.ratio.cast_signed(),
                output: [channels, height, width],
                model: &model,
                stop,
            }
            .run(input)?,
        };
        // The library silently gives an output of the wrong shape or type other memory than the slot's.
        if result.size() != place.size() || result.kind() != Kind::Float || place.kind() != Kind::Float {
            return Err(shape_error(what));
        }
        match plan.operation {
            VaeOperation::Decode => result.f_clamp_out(place, 0.0, 1.0).map(drop).map_err(failed(what)),
            VaeOperation::Encode => place.shallow_clone().f_copy_(&result).map_err(failed(what)),
        }
    }

    fn forward(&self, operation: VaeOperation, part: &Tensor) -> Result<Tensor, ModelError> {
        let what = operation.name();
        let result = match operation {
            VaeOperation::Decode => self.net.decode(part),
            VaeOperation::Encode => self.net.encode(part),
        };
        match result {
            Some(result) => result.map_err(failed(what)),
            None => Err(ModelError::Executor { what, cause: "the file holds no such half".to_owned() }),
        }
    }
}

fn shape_error(what: &'static str) -> ModelError {
    ModelError::Executor { what, cause: "the result does not have the planned shape".to_owned() }
}

/// A tensor over `memory`. Not to be kept beyond the call that `memory` was borrowed for.
fn view(what: &'static str, meta: &TensorMeta, memory: &Span) -> Result<Tensor, ModelError> {
    let refused = |cause: String| ModelError::Executor { what, cause };
    meta.validate()?;
    meta.check_fits(memory.length())?;
    let bytes = memory.bytes(meta.span_bytes()?).map_err(|error| refused(error.to_string()))?;
    if !(bytes.as_ptr() as usize).is_multiple_of(meta.dtype.size_bytes()) {
        return Err(refused("a tensor is not aligned to its element type".to_owned()));
    }
    let as_i64 = |value: &u64| i64::try_from(*value);
    let shape: Result<Vec<i64>, _> = meta.shape.as_slice().iter().map(as_i64).collect();
    // The stride of a dimension of one element means nothing and may be any number.
    let pairs = meta.shape.as_slice().iter().zip(meta.strides.as_slice());
    let strides: Result<Vec<i64>, _> =
        pairs.map(|(&extent, stride)| if extent > 1 { as_i64(stride) } else { Ok(1) }).collect();
    let (Ok(shape), Ok(strides)) = (shape, strides) else {
        return Err(refused("a tensor is larger than the address space".to_owned()));
    };
    // As a number, not by way of the slice: one of the two tensors is written to.
    let address = memory.address() as *const u8;
    // SAFETY: `check_fits` established that shape and strides stay inside the memory, which is aligned, mapped host
    // memory for as long as the caller's borrow; the tensor is dropped inside `run`.
    unsafe { Tensor::f_from_blob(address, &shape, &strides, kind_of(meta.dtype), Compute::Cpu) }.map_err(failed(what))
}

/// NHWC as NCHW, without moving anything; channels beyond the third are left out.
fn channels_first(image: &Tensor) -> Result<Tensor, TchError> {
    image.f_narrow(3, 0, 3)?.f_permute([0, 3, 1, 2])
}

/// The middle of an image whose sides are to be multiples of `ratio`.
fn crop(image: &Tensor, ratio: i64) -> Result<Tensor, TchError> {
    let (_, _, height, width) = image.size4()?;
    let rows = image.f_narrow(2, height % ratio / 2, height - height % ratio)?;
    rows.f_narrow(3, width % ratio / 2, width - width % ratio)
}

/// One sample in the layout and element type computed in.
fn sample(batch: &Tensor, at: i64) -> Result<Tensor, TchError> {
    batch.f_narrow(0, at, 1)?.f_to_kind(kind_of(DType::F32))?.f_contiguous()
}
