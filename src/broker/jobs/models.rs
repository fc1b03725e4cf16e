use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use parking_lot::Mutex;

use super::super::registry::{ModelEntry, Registry};
use super::super::responder::Responder;
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
        match self.loaded.entry(model.id()) {
            Entry::Occupied(loaded) => Ok(loaded.into_mut()),
            Entry::Vacant(place) => {
                if !self.registry.knows(model) {
                    return Err(model.changed());
                }
                let made = load(model)?;
                if !self.registry.keep_loaded(model) {
                    return Err(model.changed());
                }
                Ok(place.insert(made))
            }
        }
    }

    pub(super) fn drop_weights(&mut self, model: &ModelEntry) {
        self.loaded.remove(&model.id());
        self.registry.unloaded(model);
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
    pub(in crate::broker) model: Arc<ModelEntry>,
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
        match task {
            ModelTask::Load => match models.obtain(&model, load).map(|_| ()) {
                Ok(()) => answer.done(Some(model.report())),
                Err(error) => {
                    if let Some(responder) = answer.take() {
                        responder.fail(Error::from(error));
                    }
                }
            },
            ModelTask::Unload => {
                // The registry keeps it: a call that is queued already loads it again under the same id.
                models.drop_weights(&model);
                answer.done(None);
            }
        }
    }

    pub(super) fn give_up(self) -> Option<Responder> {
        self.answer.take()
    }
}
