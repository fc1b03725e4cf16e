use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::entry::ModelEntry;
use crate::id::ModelId;
use crate::metrics::{Evictions, Reason};
use crate::model::ModelError;

/// How long a lane waits for another's answer before it looks again: nothing but a lane that ended without a word is found
/// by that.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The models whose weights the lanes hold, and for how long they do.
///
/// Only a lane's own thread can drop its models. A lane that needs room marks what is to go, wakes the other lanes, and waits
/// until they have dropped it; while it waits it drops what others have marked of its own, so that no two wait for each
/// other.
pub(super) struct Residents {
    /// Bytes of weights on each device.
    limit: Option<u64>,
    /// How long a model that nobody uses is kept.
    patience: Option<Duration>,
    held: Mutex<Held>,
    changed: Condvar,
    /// Makes each lane look at what is to go.
    wake: OnceLock<Vec<Box<dyn Fn() + Send + Sync>>>,
    evictions: Evictions,
}

type Held = BTreeMap<ModelId, Resident>;

#[derive(Debug)]
struct Resident {
    model: Arc<ModelEntry>,
    stay: Stay,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stay {
    /// Being loaded.
    Coming,
    Here,
    /// To be dropped by its lane, unless somebody asks for it before.
    Leaving,
}

impl fmt::Debug for Residents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Residents")
            .field("limit", &self.limit)
            .field("patience", &self.patience)
            .finish_non_exhaustive()
    }
}

impl Residents {
    pub(super) fn new(limit: Option<u64>, patience: Option<Duration>, evictions: Evictions) -> Self {
        let (held, changed, wake) = (Mutex::default(), Condvar::new(), OnceLock::new());
        Self { limit, patience, held, changed, wake, evictions }
    }

    /// What makes each lane ask [`Residents::due`]. Given once, when the lanes are there.
    pub(super) fn wake_by(&self, lanes: Vec<Box<dyn Fn() + Send + Sync>>) {
        _ = self.wake.set(lanes);
    }

    /// Makes room for a model that is about to be loaded: the longest unused others on its device give way. `drop_own` drops
    /// a model if it is the asking lane's, and says whether it is.
    ///
    /// # Errors
    /// [`ModelError::NoRoom`] where those in use leave too little; nothing is given up then.
    pub(super) fn admit(
        &self,
        model: &Arc<ModelEntry>,
        mut drop_own: impl FnMut(&ModelEntry) -> bool,
    ) -> Result<Admission<'_>, ModelError> {
        loop {
            let mut held = self.held.lock();
            if self.has_room(&mut held, model)? {
                held.insert(model.id(), Resident { model: Arc::clone(model), stay: Stay::Coming });
                return Ok(Admission { residents: self, model: Arc::clone(model), is_settled: false });
            }
            let leaving = self.leaving(&mut held);
            drop(held);
            let mut dropped = false;
            for one in leaving.iter().filter(|one| drop_own(one)) {
                self.note(one, Reason::Room);
                dropped = true;
            }
            if !dropped {
                self.await_others();
            }
        }
    }

    /// Whether there is room now; where there will be, what has to go for it is marked.
    fn has_room(&self, held: &mut MutexGuard<'_, Held>, model: &ModelEntry) -> Result<bool, ModelError> {
        let Some(limit) = self.limit else { return Ok(true) };
        let needed = model.weight_bytes();
        let on_device = |one: &&mut Resident| one.model.device() == model.device() && one.model.id() != model.id();
        let there: Vec<&mut Resident> = held.values_mut().filter(on_device).collect();
        let used = there.iter().map(|one| one.model.weight_bytes()).fold(0, u64::saturating_add);
        if used.saturating_add(needed) <= limit {
            return Ok(true);
        }
        let (mut idle, rest): (Vec<_>, Vec<_>) = there.into_iter().partition(|one| one.is_idle());
        let in_use = rest.iter().map(|one| one.model.weight_bytes()).fold(0, u64::saturating_add);
        if in_use.saturating_add(needed) > limit {
            return Err(ModelError::NoRoom {
                name: model.name().to_owned(),
                needed_bytes: needed,
                used_bytes: in_use,
                limit_bytes: limit,
                device: model.device().to_owned(),
                users: rest.iter().map(|one| one.model.name()).collect::<Vec<_>>().join(", "),
            });
        }
        // What leaves already first, so that no more goes than has to.
        idle.sort_by_key(|one| (one.stay != Stay::Leaving, one.model.usage().last()));
        let mut left = used;
        for one in idle {
            if left.saturating_add(needed) <= limit {
                break;
            }
            left = left.saturating_sub(one.model.weight_bytes());
            one.stay = Stay::Leaving;
        }
        Ok(false)
    }

    /// Has the other lanes drop what is to go, and waits until something has changed.
    fn await_others(&self) {
        self.wake.get().into_iter().flatten().for_each(|wake| wake());
        let mut held = self.held.lock();
        // One that waits itself drops what was marked of its own.
        self.changed.notify_all();
        if held.values().any(|one| one.stay == Stay::Leaving) {
            _ = self.changed.wait_for(&mut held, LOOK_AGAIN);
        }
    }

    /// What a lane is to drop of its own now, and when it is to ask again at the latest.
    pub(super) fn due(&self, is_own: impl Fn(ModelId) -> bool) -> (Vec<(Arc<ModelEntry>, Reason)>, Option<Instant>) {
        if self.limit.is_none() && self.patience.is_none() {
            return (Vec::new(), None);
        }
        let mut held = self.held.lock();
        let leaving = self.leaving(&mut held).into_iter().filter(|model| is_own(model.id()));
        let mut due: Vec<_> = leaving.map(|model| (model, Reason::Room)).collect();
        let mut again = None;
        if let Some(patience) = self.patience {
            for one in held.values().filter(|one| one.stay == Stay::Here && is_own(one.model.id())) {
                match one.model.usage().idle() {
                    Some(idle) if idle >= patience => due.push((Arc::clone(&one.model), Reason::Idle)),
                    // Also of one in use: its request may be taken back without a word to the lane.
                    idle => {
                        let at = Instant::now() + patience.saturating_sub(idle.unwrap_or_default());
                        again = Some(again.map_or(at, |again: Instant| again.min(at)));
                    }
                }
            }
        }
        (due, again)
    }

    /// Those that are to go. Those among them that somebody has asked for since stay.
    fn leaving(&self, held: &mut Held) -> Vec<Arc<ModelEntry>> {
        let mut leaving = Vec::new();
        for one in held.values_mut().filter(|one| one.stay == Stay::Leaving) {
            if one.model.usage().is_in_use() {
                one.stay = Stay::Here;
                // Who waits for it to go has to look for another.
                self.changed.notify_all();
            } else {
                leaving.push(Arc::clone(&one.model));
            }
        }
        leaving
    }

    /// A model was dropped although nobody asked for that.
    pub(super) fn note(&self, model: &ModelEntry, why: Reason) {
        tracing::info!(model = model.name(), why = why.name(), "model unloaded");
        self.evictions.count(model.service(), model.device(), why);
    }

    /// The weights of a model are in no lane's memory any more.
    pub(super) fn forget(&self, model: ModelId) {
        self.held.lock().remove(&model);
        self.changed.notify_all();
    }
}

impl Resident {
    fn is_idle(&self) -> bool {
        self.stay != Stay::Coming && !self.model.usage().is_in_use()
    }
}

/// Room for a model that is being loaded; given back unless it is kept.
#[derive(Debug)]
pub(super) struct Admission<'a> {
    residents: &'a Residents,
    model: Arc<ModelEntry>,
    is_settled: bool,
}

impl Admission<'_> {
    /// The model is loaded and stays.
    pub(super) fn settle(mut self) {
        self.is_settled = true;
        if let Some(one) = self.residents.held.lock().get_mut(&self.model.id()) {
            one.stay = Stay::Here;
        }
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        if !self.is_settled {
            self.residents.forget(self.model.id());
        }
    }
}
