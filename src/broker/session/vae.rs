use std::sync::Arc;
use std::time::Instant;

use super::super::entry::{ModelEntry, Source};
use super::super::jobs::{Unfinished, VaeCallJob, VaeWork};
use super::super::memories::SlotSource;
use super::super::memory::Held;
use super::super::responder::Responder;
use super::super::usage::InUse;
use super::Session;
use super::entering::Unprepared;
use crate::device::{CopyStream, Place};
use crate::error::{Error, ErrorKind, Result};
use crate::lane::comes_true_soon;
use crate::model::HandOff;
use crate::protocol::{Rung, SlotPlace, TensorSource, VaeRequest};
use crate::service::Service;
use crate::tensor::TensorMeta;
use crate::transport::TransportError;

impl Session {
    pub(super) fn vae(&mut self, responder: Responder, deadline: Option<Instant>, request: VaeRequest) -> Result<()> {
        let (session, id) = (responder.session(), responder.request());
        // The responder moves into the job only once everything that can be refused early has been.
        match self.prepare(request) {
            Err(unprepared) => return unprepared.answer(responder),
            Ok((prepared, queue)) => {
                let job = prepared.with(responder);
                // One whose input does not come waits where it can be taken back, and this thread goes on reading.
                if job.model.vae().is_ok_and(|facts| facts.runs_inline) && comes_true_soon(|| job.input.is_written()) {
                    let mut vae = queue.map_or_else(HandOff::default, HandOff::on);
                    if let Some(Unfinished { responder, error }) = job.run_on(&mut vae, &|| false) {
                        responder.fail(error);
                    }
                } else {
                    self.submit(session, id, deadline, VaeWork::Call(job));
                }
            }
        }
        Ok(())
    }

    /// Checks a call and finds its memory; the queue is that of the GPU where the memory is one's.
    fn prepare(&mut self, request: VaeRequest) -> Result<(Prepared, Option<Arc<dyn CopyStream>>), Unprepared> {
        let VaeRequest { model, call, input, result } = request;
        let model = InUse::by(self.link.id(), self.state.registry.resolve(Service::Vae, &model)?);
        let meta = input.meta();
        meta.validate()?;
        let plan = model.vae()?.plan(&call, &meta, self.state.config.vae_budget_bytes)?;
        let (input, mut queue) = match input {
            TensorSource::Leased(descriptor) => self.memories()?.resolve(&descriptor)?,
            TensorSource::Inline(meta) => (self.receive(&meta)?, None),
        };
        let SlotSource { memory, queue: its_queue } = self.memories()?.source(&self.state, result)?;
        queue = its_queue.or(queue);
        let output = memory.lease(plan.output.size_bytes()? as u64)?;
        check_reach(&model, &input)?;
        check_reach(&model, &output)?;
        let crosses_inline = self.link.open.get().is_some_and(|open| open.rung.rung == Rung::Inline);
        let inline = crosses_inline && result == SlotPlace::Host;
        Ok((Prepared { model, plan, input, meta, output, inline }, queue))
    }

    /// Takes the bytes behind the frame into a slot.
    pub(super) fn receive(&mut self, meta: &TensorMeta) -> Result<Held, Unprepared> {
        let length = meta.span_bytes()?;
        let mut held = self.memories()?.host.lease(length as u64)?;
        let target = held.span_mut().bytes_mut(length)?;
        match self.reader.read_payload(&self.connection, target) {
            Ok(()) => Ok(held),
            // Said of the request by itself: the stream is where it was.
            Err(error @ TransportError::FrameTooLong { .. }) => Err(error.into()),
            Err(error) => Err(Unprepared::Broken(error.into())),
        }
    }
}

/// That a model computes where the memory of a tensor of its call can be reached.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for memory of another GPU.
pub(super) fn check_reach(model: &ModelEntry, tensor: &Held) -> Result<()> {
    let Place::Gpu(gpu) = tensor.span().place() else { return Ok(()) };
    let gpu = gpu.to_string();
    // Built-in models run wherever the tensors are.
    if matches!(model.source(), Source::HandOff) || model.device() == gpu {
        return Ok(());
    }
    let (service, device) = (model.service().name(), model.device());
    Err(Error::new(
        ErrorKind::Unsupported,
        format!("the {service} lane runs on {device}, and memory of {gpu} was named for a tensor of its call"),
        "pass tensors in host memory and ask for the result there, or serve what shares tensors on one GPU",
    ))
}

/// A VAE call that only lacks who is answered.
struct Prepared {
    model: InUse,
    plan: crate::model::VaePlan,
    input: Held,
    meta: TensorMeta,
    output: Held,
    inline: bool,
}

impl Prepared {
    pub(super) fn with(self, responder: Responder) -> VaeCallJob {
        let Self { model, plan, input, meta, output, inline } = self;
        VaeCallJob { responder, model, plan, input, input_meta: meta, output, inline }
    }
}
