use std::sync::Arc;
use std::time::Instant;

use super::super::loader::Loader;
use super::super::memory::Held;
use super::super::permits::PermitJob;
use super::super::registry::Registry;
use super::super::responder::Responder;
use super::super::usage::InUse;
use super::finished::{Finished, enqueue_failed};
use super::models::{LoadedModels, ModelJob};
use super::refusal::{late, refuse};
use crate::device::StreamRef;
use crate::lane::{Job, Refusal, StopSignal};
use crate::model::{ModelError, ModelInput, Vae, VaePlan};
use crate::service::{How, Service, VaeMode};
use crate::tensor::TensorMeta;

/// A VAE call with its memory, ready to run.
#[derive(Debug)]
pub(in crate::broker) struct VaeCallJob {
    pub(in crate::broker) responder: Responder,
    pub(in crate::broker) model: InUse,
    pub(in crate::broker) plan: VaePlan,
    pub(in crate::broker) input: Held,
    pub(in crate::broker) input_meta: TensorMeta,
    pub(in crate::broker) output: Held,
    /// Whether the result crosses as bytes behind the reply.
    pub(in crate::broker) inline: bool,
}

impl VaeCallJob {
    /// Runs the call on `vae` and answers it; a failure comes back with the duty to answer.
    pub(in crate::broker) fn run_on(mut self, vae: &mut dyn Vae, stop: &dyn Fn() -> bool) -> Option<Unfinished> {
        self.responder.started();
        let stream = vae.stream();
        let ran = self.input.await_written(stream).map_err(enqueue_failed).and_then(|()| {
            let input = ModelInput { meta: self.input_meta, memory: self.input.span() };
            vae.run(&self.plan, input, self.output.span(), stop)
        });
        self.responder.finished();
        match ran {
            Ok(mode) => {
                self.answer(mode, stream);
                None
            }
            Err(error) => {
                // An error leaves GPU work enqueued: neither slot is reused before that is done.
                self.output.give_up(stream);
                self.input.give_up(stream);
                Some(Unfinished { responder: self.responder, error })
            }
        }
    }

    /// Answers without having run.
    fn fail(self, error: ModelError) {
        let Self { responder, model, .. } = self;
        drop(model);
        responder.fail(error);
    }

    fn answer(self, mode: VaeMode, stream: Option<StreamRef>) {
        let Self { responder, model, plan, input, output, inline, .. } = self;
        // Before the client can know: its next request may need the room.
        drop(model);
        let finished = Finished { responder, output, meta: plan.output, how: How::Vae(mode), inline };
        finished.answer(input, |input, output| input.mark_read(output, stream), stream);
    }
}

/// A call that failed and is not answered yet.
#[derive(Debug)]
pub(in crate::broker) struct Unfinished {
    pub(in crate::broker) responder: Responder,
    pub(in crate::broker) error: ModelError,
}

/// What the VAE lane is given.
#[expect(clippy::large_enum_variant, reason = "moved a few times; a box would be an allocation per call")]
#[derive(Debug)]
pub(in crate::broker) enum VaeWork {
    Call(VaeCallJob),
    Model(ModelJob),
    /// Work that a client does itself.
    Permit(PermitJob),
}

/// What the VAE lane's thread owns.
pub(in crate::broker) struct VaeExecutor {
    loader: Loader,
    models: LoadedModels<dyn Vae>,
}

impl VaeExecutor {
    pub(in crate::broker) fn new(loader: Loader, registry: Arc<Registry>) -> Self {
        loader.prepare_thread();
        Self { loader, models: LoadedModels::new(registry) }
    }

    fn call(&mut self, job: VaeCallJob, stop: &StopSignal<'_>) {
        let model = Arc::clone(&job.model);
        let vae = match self.models.obtain(&model, |model| self.loader.load_vae(model)) {
            Ok(vae) => vae,
            Err(error) => return job.fail(error),
        };
        let Some(Unfinished { responder, error }) = job.run_on(&mut **vae, &|| stop.is_set()) else { return };
        match error {
            ModelError::Changed { .. } => {
                self.models.drop_weights(&model);
                responder.fail(error);
            }
            ModelError::Cancelled if stop.is_late() => responder.fail(late("while it ran")),
            error => responder.fail(error),
        }
    }
}

impl VaeWork {
    /// It will not run: what is left is the duty to answer, unless somebody has done that already.
    pub(in crate::broker) fn give_up(self) -> Option<Responder> {
        match self {
            Self::Call(job) => Some(job.responder),
            Self::Model(job) => job.give_up(),
            Self::Permit(job) => Some(job.give_up()),
        }
    }
}

impl Job for VaeWork {
    type Executor = VaeExecutor;

    /// A call is ready when the client's GPU work that writes its input is done. The lane's stream could wait for that
    /// instead, but only without a bound: behind a client whose stream hangs, everybody's calls would stay on the GPU's
    /// queue, where nobody can take them back, and whatever waits for the whole GPU (freeing memory, for one) with them.
    ///
    /// The price: the call is enqueued, and its reply leaves, only after the host has seen the client's own work pass the
    /// mark. The question is one look at an event, it is not even asked where the mark is known to have passed, and
    /// between two looks the lane runs what is ready, or has nothing to do; but client and broker do not launch kernels at
    /// the same time. What stays unsynchronised is the result: the reply leaves when the call's work is enqueued and its
    /// mark recorded, and the client's stream waits for that.
    fn is_ready(&self) -> bool {
        match self {
            Self::Call(job) => job.input.is_written(),
            Self::Model(_) | Self::Permit(_) => true,
        }
    }

    fn run(self, executor: &mut VaeExecutor, stop: &StopSignal<'_>) {
        match self {
            Self::Call(job) => executor.call(job, stop),
            Self::Model(job) => {
                let VaeExecutor { loader, models } = executor;
                job.run(models, |model| loader.load_vae(model));
            }
            Self::Permit(job) => job.hold(),
        }
    }

    fn tidy(executor: &mut VaeExecutor) -> Option<Instant> {
        executor.models.tidy()
    }

    fn refuse(self, why: Refusal) {
        refuse(Service::Vae, self.give_up(), why);
    }
}
