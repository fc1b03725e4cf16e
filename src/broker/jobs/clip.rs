use std::sync::Arc;
use std::time::Instant;

use super::super::adapters::Stacked;
use super::super::entry::ModelEntry;
use super::super::loader::Loader;
use super::super::memory::Held;
use super::super::outbox::Payload;
use super::super::registry::Registry;
use super::super::responder::Responder;
use super::super::usage::InUse;
use super::models::{LoadedModels, ModelJob};
use super::prepare::PrepareJob;
use super::refusal::{late, refuse};
use crate::device::{DeviceError, Span, StreamRef};
use crate::error::Error;
use crate::lane::{Job, Refusal, StopSignal};
use crate::model::ModelError;
use crate::model::clip::{Clip, ClipCall, ClipPlan};
use crate::protocol::{EncodedPrompt, Outcome, TensorSource};
use crate::service::{IgnoredEmbedding, Service};

/// Where the results of a prompt go.
#[derive(Debug)]
pub(in crate::broker) enum ClipOutput {
    /// To the client's memory, each to a slot of its own.
    Leased { cond: Held, pooled: Held },
    /// Behind the reply, one after the other.
    Inline(Held),
}

/// A prompt with the memory for its results, ready to run.
#[derive(Debug)]
pub(in crate::broker) struct ClipCallJob {
    pub(in crate::broker) responder: Responder,
    pub(in crate::broker) model: InUse,
    pub(in crate::broker) call: ClipCall,
    pub(in crate::broker) plan: ClipPlan,
    pub(in crate::broker) output: ClipOutput,
    pub(in crate::broker) ignored: Vec<IgnoredEmbedding>,
    pub(in crate::broker) stacked: Option<Arc<Stacked>>,
}

impl ClipCallJob {
    /// Runs the call on `clip` and answers it; a failure comes back with the duty to answer.
    fn run_on(mut self, clip: &mut dyn Clip, stop: &dyn Fn() -> bool) -> Option<(Responder, ModelError)> {
        self.responder.started();
        let stream = clip.stream();
        let ran = self.run(clip, stop);
        self.responder.finished();
        match ran {
            Ok(()) => {
                self.answer(stream);
                None
            }
            Err(error) => {
                self.output.give_up(stream);
                Some((self.responder, error))
            }
        }
    }

    fn run(&self, clip: &mut dyn Clip, stop: &dyn Fn() -> bool) -> Result<(), ModelError> {
        let (cond, pooled) = self.output.spans(&self.plan)?;
        let stack = self.stacked.as_ref().map(|stacked| &stacked.stack);
        clip.encode(&self.call, stack, &cond, &pooled, stop)?;
        if let Some(stacked) = &self.stacked {
            stacked.note_step();
        }
        Ok(())
    }

    /// Answers without having run.
    fn fail(self, error: ModelError) {
        let Self { responder, model, .. } = self;
        drop(model);
        responder.fail(error);
    }

    fn answer(self, stream: Option<StreamRef>) {
        let Self { responder, model, plan, output, ignored, stacked, .. } = self;
        let adapters = stacked.as_ref().map(|stacked| stacked.taken.clone()).unwrap_or_default();
        // Before the client can know: its next request may need the room.
        drop((model, stacked));
        match output {
            ClipOutput::Leased { cond, pooled } => {
                let handed_over = cond.hand_over(plan.cond, stream).and_then(|cond| {
                    let pooled = pooled.hand_over(plan.pooled, stream)?;
                    Ok((TensorSource::Leased(cond), TensorSource::Leased(pooled)))
                });
                match handed_over {
                    Ok((cond, pooled)) => {
                        responder.answer(Outcome::Encoded(Box::new(EncodedPrompt { cond, pooled, ignored, adapters })));
                    }
                    Err(error) => responder.fail(error),
                }
            }
            ClipOutput::Inline(held) => match length(&plan) {
                Ok(length) => {
                    let (cond, pooled) = (TensorSource::Inline(plan.cond), TensorSource::Inline(plan.pooled));
                    let encoded = Outcome::Encoded(Box::new(EncodedPrompt { cond, pooled, ignored, adapters }));
                    responder.answer_with_payload(encoded, Payload::Slot { held, length });
                }
                Err(error) => responder.fail(error),
            },
        }
    }
}

impl ClipOutput {
    fn spans(&self, plan: &ClipPlan) -> Result<(Span, Span), ModelError> {
        match self {
            Self::Leased { cond, pooled } => Ok((cond.span().clone(), pooled.span().clone())),
            Self::Inline(held) => {
                let (first, second) = (plan.cond.size_bytes()?, plan.pooled.size_bytes()?);
                let part = |offset, length| held.span().part(offset, length).map_err(outside);
                Ok((part(0, first)?, part(first, second)?))
            }
        }
    }

    /// A failed call leaves GPU work enqueued: no slot is reused before that is done.
    fn give_up(self, stream: Option<StreamRef>) {
        match self {
            Self::Leased { cond, pooled } => [cond, pooled].into_iter().for_each(|held| held.give_up(stream)),
            Self::Inline(held) => held.give_up(stream),
        }
    }
}

/// Bytes of both results.
pub(in crate::broker) fn length(plan: &ClipPlan) -> Result<usize, ModelError> {
    Ok(plan.cond.size_bytes()?.saturating_add(plan.pooled.size_bytes()?))
}

fn outside(error: DeviceError) -> ModelError {
    ModelError::Executor { what: "placing the results", cause: error.to_string() }
}

/// What the text encoders' lane is given.
#[expect(clippy::large_enum_variant, reason = "moved a few times; a box would be an allocation per call")]
#[derive(Debug)]
pub(in crate::broker) enum ClipWork {
    Call(ClipCallJob),
    Model(ModelJob),
    Prepare(PrepareJob),
}

/// What the text encoders' lane's thread owns.
pub(in crate::broker) struct ClipExecutor {
    loader: Loader,
    models: LoadedModels<dyn Clip>,
}

impl ClipExecutor {
    pub(in crate::broker) fn new(loader: Loader, registry: Arc<Registry>) -> Self {
        loader.prepare_thread();
        Self { loader, models: LoadedModels::new(registry) }
    }

    /// The encoders, loaded where they are not, and known to those who put adapters together for them.
    fn obtain(&mut self, model: &Arc<ModelEntry>) -> Result<&mut Box<dyn Clip>, ModelError> {
        let clip = self.models.obtain(model, |model| self.loader.load_clip(model))?;
        model.lend(|| clip.stack_maker());
        Ok(clip)
    }

    fn call(&mut self, job: ClipCallJob, stop: &StopSignal<'_>) {
        let model = Arc::clone(&*job.model);
        let clip = match self.obtain(&model) {
            Ok(clip) => clip,
            Err(error) => return job.fail(error),
        };
        let Some((responder, error)) = job.run_on(&mut **clip, &|| stop.is_set()) else { return };
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

impl ClipWork {
    /// It will not run: what is left is the duty to answer, unless somebody has done that already.
    pub(in crate::broker) fn give_up(self) -> Option<Responder> {
        match self {
            Self::Call(job) => Some(job.responder),
            Self::Model(job) => job.give_up(),
            Self::Prepare(_) => None,
        }
    }
}

impl Job for ClipWork {
    type Executor = ClipExecutor;

    /// A prompt was read before it came here.
    fn is_ready(&self) -> bool {
        true
    }

    fn run(self, executor: &mut ClipExecutor, stop: &StopSignal<'_>) {
        match self {
            Self::Call(job) => executor.call(job, stop),
            Self::Model(job) => {
                let ClipExecutor { loader, models } = executor;
                job.run(models, |model| loader.load_clip(model));
            }
            Self::Prepare(job) => {
                let loaded = executor.obtain(job.model()).map(|_| ()).map_err(Error::from);
                job.finish(loaded);
            }
        }
    }

    fn tidy(executor: &mut ClipExecutor) -> Option<Instant> {
        executor.models.tidy()
    }

    fn refuse(self, why: Refusal) {
        match self {
            Self::Prepare(job) => job.refuse(),
            work => refuse(Service::Clip, work.give_up(), why),
        }
    }
}
