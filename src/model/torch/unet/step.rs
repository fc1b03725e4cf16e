use tch::Tensor;

use super::super::super::{ModelError, ModelInput, Unet, UnetInput};
use super::super::spans::view;
use super::super::{failed, kind_of};
use super::WHAT;
use super::load::TorchUnet;
use super::patches::Patches;
use crate::device::{Span, StreamRef};

impl Unet for TorchUnet {
    fn run(
        &mut self,
        input: &UnetInput<ModelInput<'_>>,
        output: &Span,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), ModelError> {
        let metas = input.try_map(&mut |one| Ok::<_, ModelError>(one.meta))?;
        let meta = self.facts.check(&metas)?;
        if stop() {
            return Err(ModelError::Cancelled);
        }
        let _no_grad = tch::no_grad_guard();
        let _current = self.target.make_current()?;
        // Views on the caller's memory. They and whatever is made of them stay inside this call.
        let tensors = input.try_map(&mut |one| view(WHAT, &one.meta, one.memory, &self.target))?;
        let place = view(WHAT, &meta, output, &self.target)?;
        let result = self.forward(&tensors, &Patches::none());
        if result.is_err() {
            // Memory that was kept for later is what others may lack.
            self.target.reclaim();
        }
        write(&result?, &place, kind_of(meta.dtype))
    }

    fn stream(&self) -> Option<StreamRef> {
        self.target.stream()
    }
}

/// Copies a result to where it is wanted. The library would silently convert or repeat one that does not fit.
fn write(result: &Tensor, place: &Tensor, kind: Option<tch::Kind>) -> Result<(), ModelError> {
    if result.size() != place.size() || Some(result.kind()) != kind {
        let cause = "the result does not have the planned shape".to_owned();
        return Err(ModelError::Executor { what: WHAT, cause });
    }
    place.shallow_clone().f_copy_(result).map_err(failed(WHAT))
}
