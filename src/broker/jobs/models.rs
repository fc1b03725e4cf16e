use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use super::super::entry::ModelEntry;
use super::super::registry::Registry;
use super::super::responder::Responder;
use super::super::usage::InUse;
use crate::error::Error;
use crate::id::ModelId;
use crate::model::ModelError;
use crate::protocol::{ModelReport, Outcome};

/// The models that a lane's thread has loaded.
pub(super) struct LoadedModels<M: ?Sized> {
    registry: Arc<Registry>,
    loaded: HashMap<ModelId, Box<M>>,
}

impl<M: ?Sized> LoadedModels<M> {
    pub(super) fn new(registry: Arc<Registry>) -> Self {
        Self { registry, loaded: HashMap::new() }
    }

    /// The model, loaded where it is not.
    ///
    /// # Errors
    /// As `load`; [`ModelError::Changed`] for a model that was given up meanwhile.
    pub(super) fn obtain(
        &mut self,
        model: &Arc<ModelEntry>,
        load: impl FnOnce(&ModelEntry) -> Result<Box<M>, ModelError>,
    ) -> Result<&mut Box<M>, ModelError> {
        // The entry of the map would have to be held while others are dropped to make room.
        if !self.loaded.contains_key(&model.id()) {
            let made = self.make(model, load)?;
            self.loaded.insert(model.id(), made);
        }
        self.loaded.get_mut(&model.id()).ok_or_else(|| model.changed())
    }

    fn make(
        &mut self,
        model: &Arc<ModelEntry>,
        load: impl FnOnce(&ModelEntry) -> Result<Box<M>, ModelError>,
    ) -> Result<Box<M>, ModelError> {
        let registry = Arc::clone(&self.registry);
        if !registry.knows(model) {
            return Err(model.changed());
        }
        let admission = registry.residents().admit(model, |other| self.drop_own(other))?;
        let made = load(model)?;
        if !registry.keep_loaded(model) {
            return Err(model.changed());
        }
        admission.settle();
        Ok(made)
    }

    /// Drops what is to make room for others and what nobody has used for long; when to ask again at the latest.
    pub(super) fn tidy(&mut self) -> Option<Instant> {
        let (due, again) = self.registry.residents().due(|id| self.loaded.contains_key(&id));
        for (model, why) in due {
            if self.drop_own(&model) {
                self.registry.residents().note(&model, why);
            }
        }
        again
    }

    pub(super) fn drop_weights(&mut self, model: &ModelEntry) {
        if !self.drop_own(model) {
            self.registry.unloaded(model);
        }
    }

    /// Drops the weights of a model if they are this lane's; whether they are.
    fn drop_own(&mut self, model: &ModelEntry) -> bool {
        let is_own = self.loaded.remove(&model.id()).is_some();
        if is_own {
            self.registry.unloaded(model);
        }
        is_own
    }
}

/// A lane that ends keeps nobody waiting for the room that its models take.
impl<M: ?Sized> Drop for LoadedModels<M> {
    fn drop(&mut self) {
        for model in std::mem::take(&mut self.loaded).into_keys() {
            self.registry.residents().forget(model);
        }
    }
}

/// What is done to a model apart from running it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::broker) enum ModelTask {
    Load,
    Unload,
}

/// One part of a request that may be about several models, each in a lane of its own.
#[derive(Debug)]
pub(in crate::broker) struct ModelJob {
    pub(in crate::broker) task: ModelTask,
    pub(in crate::broker) model: InUse,
    pub(in crate::broker) answer: Shared,
}

/// The duty to answer once for several jobs: when the last is done, or one has failed.
#[derive(Debug, Clone)]
pub(in crate::broker) struct Shared(Arc<Mutex<Pending>>);

#[derive(Debug)]
struct Pending {
    /// Absent once it is answered.
    responder: Option<Responder>,
    left: usize,
    reports: Vec<ModelReport>,
}

impl Shared {
    /// Answers when `jobs` have said that they are done.
    pub(in crate::broker) fn new(responder: Responder, jobs: usize) -> Self {
        Self(Arc::new(Mutex::new(Pending { responder: Some(responder), left: jobs, reports: Vec::new() })))
    }

    /// A job begins; `false` where the request is answered already, and nobody wants it done.
    fn starts(&self) -> bool {
        let mut pending = self.0.lock();
        let Some(responder) = &mut pending.responder else { return false };
        responder.started();
        true
    }

    /// One job is done. The last one's answer carries what all reported.
    fn done(&self, report: Option<ModelReport>) {
        let mut pending = self.0.lock();
        pending.left = pending.left.saturating_sub(1);
        pending.reports.extend(report);
        if pending.left > 0 {
            return;
        }
        let (responder, reports) = (pending.responder.take(), std::mem::take(&mut pending.reports));
        drop(pending);
        if let Some(responder) = responder {
            responder.answer(if reports.is_empty() { Outcome::Done } else { Outcome::Models(reports) });
        }
    }

    /// The duty itself, for the one job that fails first.
    fn take(&self) -> Option<Responder> {
        self.0.lock().responder.take()
    }
}

impl ModelJob {
    pub(super) fn run<M: ?Sized>(
        self,
        models: &mut LoadedModels<M>,
        load: impl FnOnce(&ModelEntry) -> Result<Box<M>, ModelError>,
    ) {
        let Self { task, model, answer } = self;
        if !answer.starts() {
            return;
        }
        let done = match task {
            ModelTask::Load => models.obtain(&model, load).map(|_| Some(Arc::clone(&model))),
            ModelTask::Unload => {
                // The registry keeps it: a call that is queued already loads it again under the same id.
                models.drop_weights(&model);
                Ok(None)
            }
        };
        // Before the client can know: its next request may need the room.
        drop(model);
        match done {
            Ok(loaded) => answer.done(loaded.map(|model| model.report())),
            Err(error) => {
                if let Some(responder) = answer.take() {
                    responder.fail(Error::from(error));
                }
            }
        }
    }

    pub(super) fn give_up(self) -> Option<Responder> {
        self.answer.take()
    }
}
