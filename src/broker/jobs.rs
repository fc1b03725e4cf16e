use std::collections::HashMap;
use std::sync::Arc;

use super::loader::Loader;
use super::memory::Held;
use super::outbox::Payload;
use super::permits::PermitJob;
use super::registry::{ModelEntry, Registry};
use super::responder::Responder;
use crate::device::{DeviceError, StreamRef};
use crate::error::{Error, ErrorKind, Fault, Result};
use crate::id::ModelId;
use crate::lane::{Job, Refusal, StopSignal};
use crate::model::{ModelError, Vae, VaeInput, VaePlan};
use crate::protocol::Outcome;
use crate::service::VaeMode;
use crate::tensor::TensorMeta;

/// A VAE call with its memory, ready to run.
#[derive(Debug)]
pub(super) struct VaeCallJob {
    pub(super) responder: Responder,
    pub(super) model: Arc<ModelEntry>,
    pub(super) plan: VaePlan,
    pub(super) input: Held,
    pub(super) input_meta: TensorMeta,
    pub(super) output: Held,
    /// Whether the result crosses as bytes behind the reply.
    pub(super) inline: bool,
}

impl VaeCallJob {
    /// Runs the call on `vae` and answers it; a failure comes back with the duty to answer.
    pub(super) fn run_on(mut self, vae: &mut dyn Vae, stop: &dyn Fn() -> bool) -> Option<Unfinished> {
        self.responder.started();
        let stream = vae.stream();
        let ran = self.input.await_written(stream).map_err(enqueue_failed).and_then(|()| {
            let input = VaeInput { meta: self.input_meta, memory: self.input.span() };
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

    fn answer(self, mode: VaeMode, stream: Option<StreamRef>) {
        let Self { responder, plan, mut input, output, inline, .. } = self;
        let meta = plan.output;
        if let Err(error) = input.mark_read(&output, stream) {
            output.give_up(stream);
            return responder.fail(error);
        }
        if inline {
            let length = match meta.size_bytes() {
                Ok(length) => length,
                Err(error) => return responder.fail(error),
            };
            drop(input);
            return responder
                .answer_with_payload(Outcome::InlineTensor { meta, mode }, Payload::Slot { held: output, length });
        }
        let handed_over = output.hand_over(meta, stream);
        // Given back before the client can know, so that its next call finds the slot free; but behind the mark that
        // says when the GPU is done with it.
        drop(input);
        match handed_over {
            Ok(descriptor) => responder.answer(Outcome::Tensor { descriptor, mode }),
            Err(error) => responder.fail(error),
        }
    }
}

fn enqueue_failed(error: DeviceError) -> ModelError {
    ModelError::Executor { what: "waiting for the input", cause: error.to_string() }
}

/// A call that failed and is not answered yet.
#[derive(Debug)]
pub(super) struct Unfinished {
    pub(super) responder: Responder,
    pub(super) error: ModelError,
}

/// What the VAE lane is given.
#[expect(clippy::large_enum_variant, reason = "moved a few times; a box would be an allocation per call")]
#[derive(Debug)]
pub(super) enum VaeWork {
    Call(VaeCallJob),
    Load {
        responder: Responder,
        model: Arc<ModelEntry>,
    },
    Unload {
        responder: Responder,
        model: Arc<ModelEntry>,
    },
    /// Work that a client does itself.
    Permit(PermitJob),
}

/// What the VAE lane's thread owns.
pub(super) struct VaeExecutor {
    loader: Loader,
    registry: Arc<Registry>,
    loaded: HashMap<ModelId, Box<dyn Vae>>,
}

impl VaeExecutor {
    pub(super) fn new(loader: Loader, registry: Arc<Registry>) -> Self {
        loader.prepare_thread();
        Self { loader, registry, loaded: HashMap::new() }
    }

    fn obtain(&mut self, model: &Arc<ModelEntry>) -> Result<&mut Box<dyn Vae>, ModelError> {
        match self.loaded.entry(model.id()) {
            std::collections::hash_map::Entry::Occupied(loaded) => Ok(loaded.into_mut()),
            std::collections::hash_map::Entry::Vacant(place) => {
                if !self.registry.knows(model) {
                    return Err(model.changed());
                }
                let vae = self.loader.load(model)?;
                if !self.registry.keep_loaded(model) {
                    return Err(model.changed());
                }
                Ok(place.insert(vae))
            }
        }
    }

    fn drop_weights(&mut self, model: &ModelEntry) {
        self.loaded.remove(&model.id());
        self.registry.unloaded(model);
    }

    fn call(&mut self, job: VaeCallJob, stop: &StopSignal<'_>) {
        let model = Arc::clone(&job.model);
        let vae = match self.obtain(&model) {
            Ok(vae) => vae,
            Err(error) => return job.responder.fail(error),
        };
        let Some(Unfinished { responder, error }) = job.run_on(&mut **vae, &|| stop.is_set()) else { return };
        match error {
            ModelError::Changed { .. } => {
                self.drop_weights(&model);
                responder.fail(error);
            }
            ModelError::Cancelled if stop.is_late() => responder.fail(late("while it ran")),
            error => responder.fail(error),
        }
    }
}

impl VaeWork {
    /// It will not run: what is left is the duty to answer.
    pub(super) fn give_up(self) -> Responder {
        match self {
            Self::Call(job) => job.responder,
            Self::Load { responder, .. } | Self::Unload { responder, .. } => responder,
            Self::Permit(job) => job.give_up(),
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
            Self::Load { .. } | Self::Unload { .. } | Self::Permit(_) => true,
        }
    }

    fn run(self, executor: &mut VaeExecutor, stop: &StopSignal<'_>) {
        match self {
            Self::Call(job) => executor.call(job, stop),
            Self::Load { mut responder, model } => {
                responder.started();
                let loaded = executor.obtain(&model).map(|_| ());
                responder.finished();
                responder.settle(loaded.map(|()| Outcome::Model(model.report())).map_err(Error::from));
            }
            Self::Unload { mut responder, model } => {
                responder.started();
                // The registry keeps it: a call that is queued already loads it again under the same id.
                executor.drop_weights(&model);
                responder.finished();
                responder.answer(Outcome::Done);
            }
            Self::Permit(job) => job.hold(),
        }
    }

    fn refuse(self, why: Refusal) {
        let responder = self.give_up();
        let fault = refusal(why, responder.client());
        responder.fail(fault);
    }
}

/// The fault that answers a request of `client`'s which was not run.
fn refusal(why: Refusal, client: &str) -> Fault {
    match why {
        Refusal::Full { capacity } => Fault::new(
            ErrorKind::Busy,
            format!("the VAE lane has {capacity} requests waiting; this one was not queued"),
            "send it again after a pause, or raise --lane-capacity",
        ),
        Refusal::Cancelled => Fault::new(ErrorKind::Cancelled, "the request was cancelled while it waited", ""),
        Refusal::Expired => late("before its turn came; it was not run"),
        Refusal::Unready { waited } => Fault::new(
            ErrorKind::Timeout,
            format!(
                "GPU work that {client} enqueued before its mark on the input was not done after {:.1} s; the request was \
                 not run, and the input and all tensors are intact",
                waited.as_secs_f64()
            ),
            "look for what holds up the stream that writes the input, then send it again, or raise --input-patience",
        ),
        Refusal::SessionEnded => Fault::new(ErrorKind::Cancelled, "the session ended while the request waited", ""),
        Refusal::ShuttingDown => Fault::new(
            ErrorKind::ShuttingDown,
            "the broker is stopping; the request was not run",
            "send it again once the broker is back",
        ),
    }
}

fn late(when: &str) -> Fault {
    let message = format!("the request's time was up {when}");
    Fault::new(ErrorKind::Timeout, message, "allow more time, or send fewer requests at once")
}
