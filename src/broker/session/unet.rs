use std::time::Instant;

use super::super::jobs::{UnetCallJob, UnetOperand, UnetWork};
use super::super::memories::SlotSource;
use super::super::responder::Responder;
use super::super::usage::InUse;
use super::Session;
use super::vae::{Unprepared, check_reach};
use crate::error::Result;
use crate::lane::Entry;
use crate::protocol::{Rung, SlotPlace, TensorSource, UnetRequest};
use crate::service::Service;

impl Session {
    /// # Errors
    /// What ends the session: bytes behind the request did not come.
    pub(super) fn unet(&mut self, responder: Responder, deadline: Option<Instant>, request: UnetRequest) -> Result<()> {
        let (session, id) = (responder.session(), responder.request());
        let UnetRequest { model, input, result } = request;
        let prepared = self.prepare_unet(&model, &input, result);
        match prepared {
            Err(Unprepared::Refused(error)) => responder.fail(error),
            Err(Unprepared::Broken(error)) => {
                let fault = error.into_fault();
                responder.fail(fault.clone());
                return Err(fault.into());
            }
            Ok(prepared) => {
                let job = UnetWork::Call(prepared(responder));
                self.state.unet_lane.submit(Entry { session, request: id, deadline, job });
            }
        }
        Ok(())
    }

    /// Checks a step and finds its memory; what comes out lacks only who is answered.
    fn prepare_unet(
        &mut self,
        model: &str,
        input: &crate::service::UnetInput<TensorSource>,
        result: SlotPlace,
    ) -> Result<impl FnOnce(Responder) -> UnetCallJob + use<>, Unprepared> {
        let model = InUse::by(self.link.id(), self.state.registry.resolve(Service::Unet, model)?);
        let metas = input.try_map(&mut |source| {
            let meta = source.meta();
            meta.validate().map(|()| meta)
        })?;
        let output_meta = model.unet()?.check(&metas)?;
        // In this order they lie behind the frame, where they do.
        let operands = input.try_map(&mut |source| match source {
            TensorSource::Leased(descriptor) => {
                let (held, _) = self.memories()?.resolve(descriptor)?;
                check_reach(&model, &held)?;
                Ok(UnetOperand { held, meta: descriptor.meta })
            }
            TensorSource::Inline(meta) => Ok::<_, Unprepared>(UnetOperand { held: self.receive(meta)?, meta: *meta }),
        })?;
        let SlotSource { memory, .. } = self.memories()?.source(&self.state, result)?;
        let output = memory.lease(output_meta.size_bytes()? as u64)?;
        check_reach(&model, &output)?;
        let crosses_inline = self.link.open.get().is_some_and(|open| open.rung.rung == Rung::Inline);
        let inline = crosses_inline && result == SlotPlace::Host;
        Ok(move |responder| UnetCallJob { responder, model, input: operands, output, output_meta, inline })
    }
}
