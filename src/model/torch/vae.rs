use std::fmt;
use std::sync::Arc;

use tch::{Device as Compute, Kind, TchError, Tensor};

use super::super::detect::{VaeLayout, vae_layout};
use super::super::{ModelError, ModelFile, ModelInput, Vae, VaePlan, vae_facts};
use super::failed;
use super::ladder::descend;
use super::spans::view;
use super::target::{Target, kind_of_precision};
use super::tiles::Tiled;
use super::tiny::ScaledTiny;
use super::weights::{Backing, LoadOptions, Weights};
use crate::device::{Span, StreamRef};
use crate::service::{VaeMode, VaeOperation};
use crate::tensor::TensorMeta;

/// A network on float32 NCHW tensors, whatever it computes in: raw latents on one side, images in 0…1 (not clamped) on
/// the other.
/// `None` where the file holds no such half. A result is the caller's to write to.
pub(super) trait Net: fmt::Debug {
    fn decode(&self, latent: &Tensor) -> Option<Result<Tensor, TchError>>;
    fn encode(&self, image: &Tensor) -> Option<Result<Tensor, TchError>>;
}

/// Loads the VAE in `file`, to be run by the calling thread.
///
/// # Errors
/// As [`vae_facts`]; [`ModelError::OutOfMemory`] where the weights do not fit, [`ModelError::Changed`] where the file
/// is no longer the one that was opened.
pub fn load_vae(file: Arc<ModelFile>, options: LoadOptions<'_>) -> Result<Box<dyn Vae>, ModelError> {
    let loaded = load(&file, options);
    // What a failed attempt had loaded, and what a successful one needed for converting.
    options.target.reclaim();
    Ok(Box::new(loaded?))
}

fn load(file: &Arc<ModelFile>, options: LoadOptions<'_>) -> Result<TorchVae, ModelError> {
    let _no_grad = tch::no_grad_guard();
    let _current = options.target.make_current()?;
    file.check_unchanged()?;
    let facts = vae_facts(file)?;
    let layout = vae_layout(file)?;
    let kind = kind_of_precision(options.target.precision(&facts));
    let mut lengths = Vec::new();
    layout.each(|stored| lengths.push(stored.elements()))?;
    let mut weights = Weights::new(file, options, kind, &lengths)?;
    let mut load = |stored: &_| weights.tensor(stored);
    let net: Box<dyn Net> = match layout {
        VaeLayout::Kl(kl) => Box::new(kl.try_map(&mut load)?),
        VaeLayout::Tiny(tiny, scale) => Box::new(ScaledTiny { tiny: tiny.try_map(&mut load)?, scale, kind }),
    };
    let backing = weights.into_backing(file);
    Ok(TorchVae { net, ratio: facts.ratio, target: options.target.clone(), backing })
}

#[derive(Debug)]
struct TorchVae {
    // Declared before `backing`, so that it is dropped before the memory that its tensors point into.
    net: Box<dyn Net>,
    ratio: u64,
    target: Target,
    backing: Backing,
}

impl Vae for TorchVae {
    fn run(
        &mut self,
        plan: &VaePlan,
        input: ModelInput<'_>,
        output: &Span,
        stop: &dyn Fn() -> bool,
    ) -> Result<VaeMode, ModelError> {
        if let Backing::File(file) = &self.backing {
            file.check_unchanged()?;
        }
        let _no_grad = tch::no_grad_guard();
        let _current = self.target.make_current()?;
        let call = Call { operation: plan.operation, output: &plan.output, stop };
        descend(&plan.modes(), |mode| self.attempt(&call, mode, &input, output), || self.target.reclaim())
    }

    fn stream(&self) -> Option<StreamRef> {
        self.target.stream()
    }
}

/// One call, apart from its memory and the way it is run.
struct Call<'a> {
    operation: VaeOperation,
    output: &'a TensorMeta,
    stop: &'a dyn Fn() -> bool,
}

impl TorchVae {
    /// Runs the whole call in one way. Every tensor made here is gone on return: what is out of memory now may fit in
    /// another way.
    fn attempt(&self, call: &Call<'_>, mode: VaeMode, input: &ModelInput<'_>, output: &Span) -> Result<(), ModelError> {
        let what = call.operation.name();
        // Both are views on the caller's memory. They and whatever is made of them stay inside this call.
        let source = view(what, &input.meta, input.memory, &self.target)?;
        let target = view(what, call.output, output, &self.target)?;
        let (source, target) = match call.operation {
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
            if (call.stop)() {
                return Err(ModelError::Cancelled);
            }
            let one = sample(&source, at, self.target.device()).map_err(failed(what))?;
            let place = target.f_narrow(0, at, 1).map_err(failed(what))?;
            self.sample(call, mode, &one, &place)?;
        }
        Ok(())
    }

    /// Runs one sample; `place` is its view on the result.
    fn sample(&self, call: &Call<'_>, mode: VaeMode, input: &Tensor, place: &Tensor) -> Result<(), ModelError> {
        let what = call.operation.name();
        let (_, channels, height, width) = place.size4().map_err(failed(what))?;
        let model = |part: &Tensor| self.forward(call.operation, part);
        let result = match mode {
            VaeMode::Full => model(input)?,
            VaeMode::Tiled(tiles) => Tiled {
                operation: call.operation,
                tiles,
                ratio: self.ratio.cast_signed(),
                output: [channels, height, width],
                model: &model,
                stop: call.stop,
            }
            .run(input)?,
        };
        // The library silently gives an output of the wrong shape or type other memory than the slot's.
        if result.size() != place.size() || result.kind() != Kind::Float || place.kind() != Kind::Float {
            return Err(shape_error(what));
        }
        write(call.operation, result, place).map_err(failed(what))
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

/// Puts `result` into `place`: straight where both are on one device. From a GPU to the host it goes in one piece in
/// the order it has there, and the copy waits for it.
fn write(operation: VaeOperation, mut result: Tensor, place: &Tensor) -> Result<(), TchError> {
    if result.device() == place.device() {
        return match operation {
            VaeOperation::Decode => result.f_clamp_out(place, 0.0, 1.0).map(drop),
            VaeOperation::Encode => place.shallow_clone().f_copy_(&result),
        };
    }
    match operation {
        VaeOperation::Decode => {
            let image = result.f_clamp_(0.0, 1.0)?.f_permute([0, 2, 3, 1])?.f_contiguous()?;
            place.f_permute([0, 2, 3, 1])?.f_copy_(&image)
        }
        VaeOperation::Encode => place.shallow_clone().f_copy_(&result.f_contiguous()?),
    }
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

/// One sample where, in which layout and as which element type models take it. Crosses to a GPU as it is stored.
fn sample(batch: &Tensor, at: i64, device: Compute) -> Result<Tensor, TchError> {
    batch.f_narrow(0, at, 1)?.f_to_device(device)?.f_to_kind(Kind::Float)?.f_contiguous()
}

#[cfg(test)]
#[path = "vae_tests.rs"]
mod tests;
