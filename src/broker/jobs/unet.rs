use std::sync::Arc;
use std::time::Instant;

use super::super::loader::Loader;
use super::super::memory::Held;
use super::super::registry::Registry;
use super::super::responder::Responder;
use super::super::usage::InUse;
use super::finished::{Finished, enqueue_failed};
use super::models::{LoadedModels, ModelJob};
use super::refusal::{late, refuse};
use crate::device::StreamRef;
use crate::error::Error;
use crate::lane::{Job, Refusal, StopSignal};
use crate::model::{ModelError, ModelInput, Unet};
use crate::service::{Service, UnetInput};
use crate::tensor::TensorMeta;

/// A tensor of a call, in memory that is held for it.
#[derive(Debug)]
pub(in crate::broker) struct UnetOperand {
    pub(in crate::broker) held: Held,
    pub(in crate::broker) meta: TensorMeta,
}

/// One step with its memory, ready to run.
#[derive(Debug)]
pub(in crate::broker) struct UnetCallJob {
    pub(in crate::broker) responder: Responder,
    pub(in crate::broker) model: InUse,
    pub(in crate::broker) input: UnetInput<UnetOperand>,
    pub(in crate::broker) output: Held,
    pub(in crate::broker) output_meta: TensorMeta,
    /// Whether the result crosses as bytes behind the reply.
    pub(in crate::broker) inline: bool,
}

impl UnetCallJob {
    /// Runs the step on `unet` and answers it; a failure comes back with the duty to answer.
    fn run_on(mut self, unet: &mut dyn Unet, stop: &dyn Fn() -> bool) -> Option<(Responder, ModelError)> {
        self.responder.started();
        let stream = unet.stream();
        let ran = self.run(unet, stream, stop);
        self.responder.finished();
        match ran {
            Ok(()) => {
                self.answer(stream);
                None
            }
            Err(error) => {
                // An error leaves GPU work enqueued: no slot is reused before that is done.
                self.output.give_up(stream);
                self.input.into_each(&mut |operand: UnetOperand| operand.held.give_up(stream));
                Some((self.responder, error))
            }
        }
    }

    fn run(
        &mut self,
        unet: &mut dyn Unet,
        stream: Option<StreamRef>,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), ModelError> {
        for operand in self.input.each_mut() {
            operand.held.await_written(stream).map_err(enqueue_failed)?;
        }
        let input = self.input.try_map(&mut |operand| {
            Ok::<_, ModelError>(ModelInput { meta: operand.meta, memory: operand.held.span() })
        })?;
        unet.run(&input, self.output.span(), stop)
    }

    /// Answers without having run.
    fn fail(self, error: ModelError) {
        let Self { responder, model, .. } = self;
        drop(model);
        responder.fail(error);
    }

    fn answer(self, stream: Option<StreamRef>) {
        let Self { responder, model, input, output, output_meta: meta, inline } = self;
        // Before the client can know: its next request may need the room.
        drop(model);
        let mark = |input: &mut UnetInput<UnetOperand>, output: &Held| {
            input.each_mut().try_for_each(|operand| operand.held.mark_read(output, stream))
        };
        Finished { responder, output, meta, mode: None, inline }.answer(input, mark, stream);
    }
}

/// What the UNet lane is given.
#[expect(clippy::large_enum_variant, reason = "moved a few times; a box would be an allocation per call")]
#[derive(Debug)]
pub(in crate::broker) enum UnetWork {
    Call(UnetCallJob),
    Model(ModelJob),
}

/// What the UNet lane's thread owns.
pub(in crate::broker) struct UnetExecutor {
    loader: Loader,
    models: LoadedModels<dyn Unet>,
}

impl UnetExecutor {
    pub(in crate::broker) fn new(loader: Loader, registry: Arc<Registry>) -> Self {
        loader.prepare_thread();
        Self { loader, models: LoadedModels::new(registry) }
    }

    fn call(&mut self, job: UnetCallJob, stop: &StopSignal<'_>) {
        let model = Arc::clone(&job.model);
        let unet = match self.models.obtain(&model, |model| self.loader.load_unet(model)) {
            Ok(unet) => unet,
            Err(error) => return job.fail(error),
        };
        let Some((responder, error)) = job.run_on(&mut **unet, &|| stop.is_set()) else { return };
        match error {
            ModelError::Changed { .. } => {
                self.models.drop_weights(&model);
                responder.fail(Error::from(error));
            }
            ModelError::Cancelled if stop.is_late() => responder.fail(late("while it ran")),
            error => responder.fail(error),
        }
    }
}

impl UnetWork {
    /// It will not run: what is left is the duty to answer, unless somebody has done that already.
    pub(in crate::broker) fn give_up(self) -> Option<Responder> {
        match self {
            Self::Call(job) => Some(job.responder),
            Self::Model(job) => job.give_up(),
        }
    }
}

impl Job for UnetWork {
    type Executor = UnetExecutor;

    /// As with VAE calls: see there.
    fn is_ready(&self) -> bool {
        match self {
            Self::Call(job) => job.input.each().all(|operand| operand.held.is_written()),
            Self::Model(_) => true,
        }
    }

    fn run(self, executor: &mut UnetExecutor, stop: &StopSignal<'_>) {
        match self {
            Self::Call(job) => executor.call(job, stop),
            Self::Model(job) => {
                let UnetExecutor { loader, models } = executor;
                job.run(models, |model| loader.load_unet(model));
            }
        }
    }

    fn tidy(executor: &mut UnetExecutor) -> Option<Instant> {
        executor.models.tidy()
    }

    fn refuse(self, why: Refusal) {
        refuse(Service::Unet, self.give_up(), why);
    }
}
