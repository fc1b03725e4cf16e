use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::super::responder::Responder;
use super::super::state::State;
use super::loading::Weights;
use super::set::WeightSet;
use super::work::caught;
use crate::error::{Error, ErrorKind, Fault, Result};
use crate::id::{RequestId, SessionId};
use crate::model::weights::digest_region;
use crate::protocol::{Outcome, VerifyReport};

/// Looks at weights that wait or are under way: one for each session, so that nobody's keep the others waiting.
pub(super) type Looks = HashMap<SessionId, Pending>;

/// A look that somebody waits for.
#[derive(Debug)]
pub(super) struct Pending {
    name: String,
    responder: Responder,
}

/// A look that is to be run, if anybody still waits for it then.
#[derive(Debug)]
pub(super) struct Look {
    state: Arc<State>,
    session: SessionId,
    request: RequestId,
}

impl Weights {
    /// Compares what the sets of a name contain with what they should.
    pub(in crate::broker) fn verify(&self, state: &Arc<State>, responder: Responder, name: String) {
        let (session, request) = (responder.session(), responder.request());
        let refused = match self.looks.lock().entry(session) {
            Entry::Occupied(_) => Some(responder),
            Entry::Vacant(place) => {
                place.insert(Pending { name, responder });
                None
            }
        };
        if let Some(responder) = refused {
            let message = "the session waits for a look at weights already";
            return responder.fail(Error::new(ErrorKind::Busy, message, "ask again when that is answered"));
        }
        if self.send_look(Look { state: Arc::clone(state), session, request }).is_err()
            && let Some(pending) = self.take_look(session, request)
        {
            let message = "the thread that looks at weights is gone";
            pending.responder.fail(Error::new(ErrorKind::Internal, message, "see the broker's log"));
        }
    }

    /// Takes a look back, if the session waits for this one.
    pub(super) fn cancel_look(&self, session: SessionId, request: RequestId) {
        if let Some(pending) = self.take_look(session, request) {
            pending.responder.fail(Fault::new(ErrorKind::Cancelled, "the look at weights was cancelled", ""));
        }
    }

    fn take_look(&self, session: SessionId, request: RequestId) -> Option<Pending> {
        match self.looks.lock().entry(session) {
            Entry::Occupied(entry) if entry.get().responder.request() == request => Some(entry.remove()),
            _ => None,
        }
    }
}

impl Look {
    pub(super) fn run(self) {
        let Self { state, session, request } = self;
        let waits = |pending: &Pending| pending.responder.request() == request;
        let name = state.weights.looks.lock().get(&session).filter(|one| waits(one)).map(|one| one.name.clone());
        let Some(name) = name else { return };
        let is_over = || !state.weights.looks.lock().get(&session).is_some_and(waits);
        let stop = || state.stopping.load(Ordering::Acquire) || is_over();
        let found = caught(|| look(&state, &name, &stop));
        if let Some(pending) = state.weights.take_look(session, request) {
            pending.responder.settle(found.map(Outcome::Verified));
        }
    }
}

fn look(state: &State, name: &str, stop: &(dyn Fn() -> bool + Sync)) -> Result<Vec<VerifyReport>> {
    let path = state.registry.locate(name);
    let sets = state.weights.lock().table.named(name, path.as_deref().ok());
    if sets.is_empty() {
        let found = path.map(|_| ()).map_err(Error::from);
        let absent =
            || Error::new(ErrorKind::ModelNotFound, format!("{name} is attached by nobody"), "attach it first");
        return Err(found.map_or_else(|error| error, |()| absent()));
    }
    let report = |(name, set): (String, Arc<WeightSet>)| {
        let found = digest_region(&set.plan, &set.memory.region, stop)?;
        let bytes = set.plan.size_bytes;
        Ok(VerifyReport { name, device: set.place.name(), bytes, expected: set.content, found })
    };
    sets.into_iter().map(report).collect()
}
