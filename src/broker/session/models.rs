use std::sync::Arc;
use std::time::Instant;

use super::super::entry::ModelEntry;
use super::super::jobs::{ClipWork, ModelJob, ModelTask, Shared, UnetWork, VaeWork};
use super::super::responder::Responder;
use super::super::usage::InUse;
use super::super::weights::Unloaded;
use super::{Session, waits_for_itself};
use crate::lane::Entry;
use crate::protocol::{Force, Outcome};
use crate::service::Service;

impl Session {
    /// Loads one part of a model, or every part that is run by somebody.
    pub(super) fn load(&self, responder: Responder, deadline: Option<Instant>, service: Option<Service>, model: &str) {
        let registry = &self.state.registry;
        let parts = match service {
            Some(service) => registry.resolve(service, model).map(|entry| vec![entry]),
            None => registry.parts(model),
        };
        match parts {
            // Before anything is loaded.
            Ok(parts) if self.would_wait_for_itself(&responder, &parts) => responder.fail(waits_for_itself()),
            Ok(parts) => self.submit_each(responder, deadline, ModelTask::Load, parts),
            Err(error) => responder.fail(error),
        }
    }

    /// Unloads weights and the models of that name.
    pub(super) fn unload(&self, responder: Responder, deadline: Option<Instant>, name: &str, force: Force) {
        let parts = self.state.registry.holding(name);
        // Before anything is unloaded.
        if parts.as_ref().is_ok_and(|parts| self.would_wait_for_itself(&responder, parts)) {
            return responder.fail(waits_for_itself());
        }
        let weights = match self.state.weights.unload(&self.state, name, force) {
            Ok(weights) => weights,
            Err(error) => return responder.fail(error),
        };
        match (parts, weights) {
            (Ok(parts), _) => self.submit_each(responder, deadline, ModelTask::Unload, parts),
            // What attached it need not be a model that is run here.
            (Err(_), Unloaded::Weights) => responder.answer(Outcome::Done),
            (Err(error), Unloaded::Nothing) => responder.fail(error),
        }
    }

    /// Whether the session has the VAE's lane by a permit, and one of the models is run there.
    fn would_wait_for_itself(&self, asker: &Responder, models: &[Arc<ModelEntry>]) -> bool {
        let runs_vae = models.iter().any(|model| model.service() == Service::Vae);
        runs_vae && self.state.permits.is_held_by(asker.session())
    }

    pub(super) fn submit_each(
        &self,
        responder: Responder,
        deadline: Option<Instant>,
        task: ModelTask,
        models: Vec<Arc<ModelEntry>>,
    ) {
        let (session, request) = (responder.session(), responder.request());
        let answer = Shared::new(responder, models.len());
        for model in models {
            let service = model.service();
            let job = ModelJob { task, model: InUse::by(session, model), answer: answer.clone() };
            match service {
                Service::Vae => self.submit(session, request, deadline, VaeWork::Model(job)),
                Service::Unet => {
                    self.state.unet_lane.submit(Entry { session, request, deadline, job: UnetWork::Model(job) });
                }
                Service::Clip => {
                    self.state.clip_lane.submit(Entry { session, request, deadline, job: ClipWork::Model(job) });
                }
            }
        }
    }
}
