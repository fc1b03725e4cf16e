use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::super::state::State;
use super::memory::WeightDraft;
use super::set::{WeightSet, wire_table};
use super::wanted::{Origin, Wanted};
use crate::device::DeviceError;
use crate::error::{Error, ErrorKind, Result};
use crate::id::WeightSetId;
use crate::model::ModelError;
use crate::model::weights::{Filled, Loaded, digest_file, load, recast};

/// The set that is wanted: one that is there already and contains the same, or a new one.
pub(super) fn obtain(state: &Arc<State>, wanted: &Wanted) -> Result<Result<WeightSetId, WeightSet>> {
    let Wanted { origin, plan, place } = wanted;
    let weights = &state.weights;
    let stop = || state.stopping.load(Ordering::Acquire);
    let progress = |done: u64, total: u64| weights.tell(wanted, done, total);
    let is_alike = weights.lock().table.has_likeness(plan, *place);
    if is_alike {
        let source = match origin {
            Origin::File(file) => digest_file(file, &progress, &stop).map_err(|why| ended(why, &stop))?,
            Origin::Published { set, .. } => set.content,
        };
        if let Some(id) = weights.lock().table.of_source(source, plan, *place) {
            return Ok(Ok(id));
        }
    }
    weights.make_room(wanted)?;
    let started = Instant::now();
    let table = wire_table(plan)?;
    let draft = allocate(state, wanted)?;
    let region = draft.region();
    let loaded = match origin {
        Origin::File(file) => load(file, plan, &region, &progress, &stop),
        Origin::Published { set, .. } => {
            let filled = Filled { plan: &set.plan, region: &set.memory.region };
            recast(filled, plan, &region, &progress, &stop).map(|content| Loaded { source: set.content, content })
        }
    };
    let Loaded { source, content } = loaded.map_err(|why| ended(why, &stop))?;
    drop(region);
    let memory = draft.seal()?;
    let seconds = started.elapsed().as_secs_f64();
    tracing::info!(of = origin.shown(), device = place.name(), bytes = plan.size_bytes, seconds, "weights loaded");
    let id = weights.lock().table.new_id();
    Ok(Err(WeightSet { id, place: *place, plan: plan.clone(), table, source, content, memory }))
}

/// Memory for the set. Sets that nobody holds give way to it where the device has none left, whatever is allowed.
fn allocate(state: &State, wanted: &Wanted) -> Result<WeightDraft> {
    let Wanted { origin, plan, place } = wanted;
    let size_bytes = usize::try_from(plan.size_bytes).unwrap_or(usize::MAX);
    loop {
        match WeightDraft::allocate(*place, state.gpu.as_ref(), size_bytes) {
            Err(DeviceError::OutOfMemory { .. }) if state.weights.lock().table.give_up_one(*place) => {}
            Err(error @ DeviceError::OutOfMemory { .. }) => {
                let message = format!("{} does not fit into memory: {error}", origin.shown());
                let remedy = "have clients give back weights that they no longer need, ask for a smaller element type, \
                              or attach in other memory";
                return Err(Error::new(ErrorKind::OutOfMemory, message, remedy));
            }
            other => return Ok(other?),
        }
    }
}

/// Loading stops by itself only with the broker.
fn ended(why: ModelError, stop: &dyn Fn() -> bool) -> Error {
    match why {
        ModelError::Cancelled if stop() => Error::new(
            ErrorKind::ShuttingDown,
            "the broker is stopping; the weights were not loaded",
            "attach them again",
        ),
        why => why.into(),
    }
}
