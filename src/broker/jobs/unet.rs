use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use super::super::adapters::Stacked;
use super::super::entry::ModelEntry;
use super::super::loader::Loader;
use super::super::memory::Held;
use super::super::registry::Registry;
use super::super::responder::Responder;
use super::super::runs::RunStep;
use super::super::usage::InUse;
use super::finished::{Finished, enqueue_failed};
use super::models::{LoadedModels, ModelJob};
use super::prepare::PrepareJob;
use super::refusal::{late, refuse, taken_back};
use crate::device::StreamRef;
use crate::error::Error;
use crate::id::ModelId;
use crate::lane::{Calibration, Job, Refusal, StopSignal};
use crate::model::{ModelError, ModelInput, StepFacts, Unet, UnetCall};
use crate::service::{CacheStep, CacheVerdict, How, Service, StepInput, UnetStep};
use crate::tensor::TensorMeta;

/// Most requests that run as one batch where a calibration decides.
const MOST_TOGETHER: usize = 8;
/// Kinds of steps whose calibration is remembered.
const MAX_CALIBRATIONS: usize = 64;

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
    pub(in crate::broker) input: StepInput<UnetOperand>,
    pub(in crate::broker) facts: StepFacts,
    pub(in crate::broker) output: Held,
    /// Whether the result crosses as bytes behind the reply.
    pub(in crate::broker) inline: bool,
    /// Adapters of a step that is of no run.
    pub(in crate::broker) stacked: Option<Arc<Stacked>>,
    /// What it is to the run that it is of.
    pub(in crate::broker) run: Option<RunStep>,
}

/// What steps have in common that can run as one batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Likeness {
    model: ModelId,
    /// Rows, channels, height and width.
    latent: [u64; 4],
    tokens: u64,
}

impl UnetCallJob {
    fn likeness(&self) -> Likeness {
        let latent = <[u64; 4]>::try_from(self.input.x.meta.shape.as_slice()).unwrap_or_default();
        Likeness { model: self.model.id(), latent, tokens: self.facts.tokens }
    }

    fn is_ready(&self) -> bool {
        self.input.each().all(|operand| operand.held.is_written())
    }

    fn is_of_same_run(&self, other: &Self) -> bool {
        matches!((&self.run, &other.run), (Some(one), Some(other)) if Arc::ptr_eq(&one.run, &other.run))
    }

    /// Answers without having run.
    fn fail(self, error: impl Into<Error>) {
        let Self { responder, model, stacked, run, .. } = self;
        drop((model, stacked, run));
        responder.fail(error);
    }

    fn answer(self, stream: Option<StreamRef>, step: UnetStep) {
        let Self { responder, input, facts, output, inline, stacked, run, model } = self;
        // Before the client can know: its next request may need the room.
        drop((stacked, run, model));
        let mark = |input: &mut StepInput<UnetOperand>, output: &Held| {
            input.each_mut().try_for_each(|operand| operand.held.mark_read(output, stream))
        };
        let how = How::Step(Box::new(step));
        Finished { responder, output, meta: facts.output, how, inline }.answer(input, mark, stream);
    }

    /// An error leaves GPU work enqueued: no slot is reused before that is done.
    fn give_up(self, stream: Option<StreamRef>) -> Responder {
        self.output.give_up(stream);
        self.input.into_each(&mut |operand: UnetOperand| operand.held.give_up(stream));
        self.responder
    }

    /// What there is to say of it now that it ran among `together`.
    fn told(&self, cache: Option<CacheStep>, together: usize, working_bytes: u64) -> UnetStep {
        let run = self.run.as_ref().map(|step| *step.run.report.lock());
        let adapters = self.stacked.as_ref().map(|stacked| stacked.taken.clone()).unwrap_or_default();
        UnetStep { together: u32::try_from(together).unwrap_or(u32::MAX), working_bytes, adapters, cache, run }
    }
}

/// Runs steps as one batch.
fn run(
    unet: &mut dyn Unet,
    jobs: &mut [UnetCallJob],
    stop: &dyn Fn() -> bool,
) -> Result<Vec<Option<CacheStep>>, ModelError> {
    let stream = unet.stream();
    for job in jobs.iter_mut() {
        job.responder.started();
        for operand in job.input.each_mut() {
            operand.held.await_written(stream).map_err(enqueue_failed)?;
        }
    }
    // Each is of another run, so that no lock is waited for that is held here.
    let mut memories: Vec<_> = jobs.iter().map(|job| job.run.as_ref().map(|step| step.run.memory.lock())).collect();
    let mut calls = Vec::new();
    for (job, memory) in jobs.iter().zip(&mut memories) {
        let input = job.input.try_map(&mut |operand| {
            Ok::<_, ModelError>(ModelInput { meta: operand.meta, memory: operand.held.span() })
        })?;
        let of_run = job.run.as_ref().and_then(|step| step.run.stacked.as_ref());
        let stack = job.stacked.as_ref().or(of_run).map(|stacked| &stacked.stack);
        let run = memory.as_deref_mut().zip(job.run.as_ref().map(|step| step.conds.as_slice()));
        calls.push(UnetCall { input, output: job.output.span(), stack, run });
    }
    let done = unet.step(&mut calls, stop)?;
    drop(calls);
    for (job, memory) in jobs.iter().zip(&memories) {
        if let (Some(step), Some(memory)) = (&job.run, memory) {
            step.note(memory);
        }
        let of_run = job.run.as_ref().and_then(|step| step.run.stacked.as_ref());
        if let Some(stacked) = job.stacked.as_ref().or(of_run) {
            stacked.note_step();
        }
    }
    Ok(done)
}

/// What the UNet lane is given.
#[expect(clippy::large_enum_variant, reason = "moved a few times; a box would be an allocation per call")]
#[derive(Debug)]
pub(in crate::broker) enum UnetWork {
    Call(UnetCallJob),
    Model(ModelJob),
    Prepare(PrepareJob),
}

/// What the UNet lane's thread owns.
pub(in crate::broker) struct UnetExecutor {
    loader: Loader,
    models: LoadedModels<dyn Unet>,
    /// How many requests run as one batch; `None` where calibrations decide.
    max_batch: Option<usize>,
    calibrations: HashMap<Likeness, Calibration>,
}

impl UnetExecutor {
    pub(in crate::broker) fn new(loader: Loader, registry: Arc<Registry>, max_batch: Option<usize>) -> Self {
        loader.prepare_thread();
        Self { loader, models: LoadedModels::new(registry), max_batch, calibrations: HashMap::new() }
    }

    /// The model, loaded where it is not, and known to those who put adapters together for it.
    fn obtain(&mut self, model: &Arc<ModelEntry>) -> Result<&mut Box<dyn Unet>, ModelError> {
        let unet = self.models.obtain(model, |model| self.loader.load_unet(model))?;
        model.lend(|| unet.stack_maker());
        Ok(unet)
    }

    /// Runs steps that go together, alone where they cannot be run at once.
    fn call(&mut self, steps: Vec<(UnetCallJob, StopSignal<'_>)>) {
        let (mut jobs, mut stops) = (Vec::new(), Vec::new());
        for (job, stop) in steps {
            match job.run.as_ref().map_or(Ok(()), RunStep::check) {
                Ok(()) => {
                    jobs.push(job);
                    stops.push(stop);
                }
                Err(error) => job.fail(error),
            }
        }
        let Some(first) = jobs.first() else { return };
        let (model, likeness, together) = (Arc::clone(&*first.model), first.likeness(), jobs.len());
        let wants_time = self.max_batch.is_none() && self.wants_time(likeness, together);
        let unet = match self.obtain(&model) {
            Ok(unet) => unet,
            Err(error) => {
                let fault = Error::from(error).into_fault();
                return jobs.into_iter().for_each(|job| job.fail(fault.clone()));
            }
        };
        let stream = unet.stream();
        if wants_time && let Err(error) = unet.wait() {
            // What was enqueued before would count as time of these.
            return self.failed(&model, jobs, &stops, error);
        }
        let began = Instant::now();
        // What several wait for is not stopped for one.
        let stop = || matches!(stops.as_slice(), [stop] if stop.is_set());
        let mut ran = run(&mut **unet, &mut jobs, &stop);
        if wants_time && ran.is_ok() {
            // Nobody's time is known that the GPU has not taken yet.
            ran = unet.wait().and(ran);
        }
        let time = began.elapsed();
        jobs.iter_mut().for_each(|job| job.responder.finished());
        match ran {
            Ok(done) => {
                let is_whole = |step: &Option<CacheStep>| step.is_none_or(|step| step.verdict != CacheVerdict::Hit);
                if wants_time && done.iter().all(is_whole) {
                    self.note_time(likeness, together, time);
                }
                let share = time.div_f64(together.max(1) as f64);
                let working_bytes = working_bytes(&model, likeness, together);
                for (job, cache) in jobs.into_iter().zip(done) {
                    if let Some(cache) = cache {
                        job.responder.metrics().block_cache(cache.verdict, share);
                    }
                    let told = job.told(cache, together, working_bytes);
                    job.answer(stream, told);
                }
            }
            Err(error) => self.failed(&model, jobs, &stops, error),
        }
    }

    fn failed(
        &mut self,
        model: &Arc<ModelEntry>,
        mut jobs: Vec<UnetCallJob>,
        stops: &[StopSignal<'_>],
        error: ModelError,
    ) {
        if jobs.len() > 1 {
            tracing::debug!(%error, requests = jobs.len(), "a batch failed; its requests are run one after the other");
            if self.max_batch.is_none()
                && let Some(first) = jobs.first()
            {
                self.calibration(first.likeness()).fails(jobs.len());
            }
            return jobs.into_iter().zip(stops).for_each(|(job, stop)| self.call(vec![(job, *stop)]));
        }
        let (Some(job), Some(stop)) = (jobs.pop(), stops.first()) else { return };
        let stream = self.obtain(model).ok().and_then(|unet| unet.stream());
        let responder = job.give_up(stream);
        match error {
            ModelError::Changed { .. } => {
                self.models.drop_weights(model);
                responder.fail(error);
            }
            ModelError::Cancelled if stop.is_late() => responder.fail(late("while it ran")),
            error => responder.fail(error),
        }
    }

    fn wants_time(&self, likeness: Likeness, together: usize) -> bool {
        self.calibrations.get(&likeness).is_none_or(|known| known.wants(together))
    }

    fn calibration(&mut self, likeness: Likeness) -> &mut Calibration {
        if self.calibrations.len() >= MAX_CALIBRATIONS && !self.calibrations.contains_key(&likeness) {
            // Whichever: it is found out again.
            let one = self.calibrations.keys().next().copied();
            one.map(|one| self.calibrations.remove(&one));
        }
        self.calibrations.entry(likeness).or_default()
    }

    fn note_time(&mut self, likeness: Likeness, together: usize, time: std::time::Duration) {
        let calibration = self.calibration(likeness);
        calibration.note(together, time);
        if !calibration.wants(together) {
            let [rows, _, height, width] = likeness.latent;
            let known: Vec<_> =
                calibration.known().map(|(jobs, time, pays)| (jobs, time.as_secs_f64(), pays)).collect();
            tracing::info!(rows, height, width, ?known, "requests together, seconds, whether that is no slower");
        }
    }
}

fn working_bytes(model: &ModelEntry, likeness: Likeness, together: usize) -> u64 {
    let [rows, _, height, width] = likeness.latent;
    let rows = rows.saturating_mul(together as u64);
    model.unet().map_or(0, |facts| facts.step_bytes(rows, height, width, model.unet_precision()))
}

impl UnetWork {
    /// It will not run: what is left is the duty to answer, unless somebody has done that already.
    pub(in crate::broker) fn give_up(self) -> Option<Responder> {
        match self {
            Self::Call(job) => Some(job.responder),
            Self::Model(job) => job.give_up(),
            Self::Prepare(_) => None,
        }
    }
}

impl Job for UnetWork {
    type Executor = UnetExecutor;

    /// As with VAE calls: see there.
    fn is_ready(&self) -> bool {
        match self {
            Self::Call(job) => job.is_ready(),
            Self::Model(_) | Self::Prepare(_) => true,
        }
    }

    fn run(self, executor: &mut UnetExecutor, stop: &StopSignal<'_>) {
        match self {
            Self::Call(job) => executor.call(vec![(job, *stop)]),
            Self::Model(job) => {
                let UnetExecutor { loader, models, .. } = executor;
                job.run(models, |model| loader.load_unet(model));
            }
            Self::Prepare(job) => {
                let loaded = executor.obtain(job.model()).map(|_| ()).map_err(Error::from);
                job.finish(loaded);
            }
        }
    }

    fn tidy(executor: &mut UnetExecutor) -> Option<Instant> {
        executor.models.tidy()
    }

    fn refuse(self, why: Refusal) {
        match self {
            Self::Prepare(job) => job.refuse(),
            work => refuse(Service::Unet, work.give_up(), why),
        }
    }

    fn most_together(&self, executor: &UnetExecutor) -> usize {
        let Self::Call(job) = self else { return 1 };
        if job.input.control.is_some() {
            return 1;
        }
        let calibrated = || executor.calibrations.get(&job.likeness()).map_or(1, |known| known.most(MOST_TOGETHER));
        executor.max_batch.unwrap_or_else(calibrated)
    }

    fn goes_with(&self, other: &Self) -> bool {
        let (Self::Call(job), Self::Call(other)) = (self, other) else { return false };
        job.likeness() == other.likeness()
            && other.input.control.is_none()
            && !job.is_of_same_run(other)
            && other.is_ready()
    }

    fn run_together(jobs: Vec<(Self, StopSignal<'_>)>, executor: &mut UnetExecutor) {
        let mut calls: Vec<(UnetCallJob, StopSignal<'_>)> = Vec::new();
        for (work, stop) in jobs {
            match work {
                Self::Call(job) if stop.is_set() => job.responder.fail(taken_back(&stop)),
                // Two steps of one run go one after the other, and here only the first was asked.
                Self::Call(job) if calls.iter().any(|(other, _)| other.is_of_same_run(&job)) => {
                    executor.call(std::mem::take(&mut calls));
                    calls.push((job, stop));
                }
                Self::Call(job) => calls.push((job, stop)),
                other => other.run(executor, &stop),
            }
        }
        executor.call(calls);
    }
}
