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

/// What came of a wish.
pub(super) enum Obtained {
    /// A set that is there already contains the same.
    There(WeightSetId),
    New(WeightSet),
}

/// The set that is wanted. It is looked for among those that are there only where there is no room for another one:
/// looking takes as long as loading, and what turns out to be there already is dropped again.
pub(super) fn obtain(state: &State, wanted: &Wanted) -> Result<Obtained> {
    let has_room = state.weights.has_room(wanted);
    if has_room {
        match make(state, wanted) {
            Err(error) if error.kind() == ErrorKind::OutOfMemory => {
                return same(state, wanted)?.map(Obtained::There).ok_or(error);
            }
            made => return made.map(Obtained::New),
        }
    }
    if let Some(id) = same(state, wanted)? {
        return Ok(Obtained::There(id));
    }
    state.weights.make_room(wanted)?;
    make(state, wanted).map(Obtained::New)
}

/// A set that is there and contains what the file does, laid out as wanted.
fn same(state: &State, wanted: &Wanted) -> Result<Option<WeightSetId>> {
    let Wanted { origin, plan, place, .. } = wanted;
    let Origin::File(file) = origin else { return Ok(None) };
    let is_alike = state.weights.lock().table.has_likeness(plan, *place);
    if !is_alike {
        return Ok(None);
    }
    let stop = || state.stopping.load(Ordering::Acquire);
    // Who waits is not told how far this is: the loading that may follow starts from nothing.
    let source = digest_file(file, &|_, _| {}, &stop).map_err(|why| ended(why, &stop))?;
    Ok(state.weights.lock().table.of_source(source, plan, *place))
}

fn make(state: &State, wanted: &Wanted) -> Result<WeightSet> {
    let Wanted { origin, plan, place, booked_bytes } = wanted;
    let stop = || state.stopping.load(Ordering::Acquire);
    let progress = |done: u64, total: u64| state.weights.tell(wanted, done, total);
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
    let id = state.weights.lock().table.new_id();
    let booked_bytes = *booked_bytes;
    Ok(WeightSet { id, place: *place, plan: plan.clone(), table, source, content, memory, booked_bytes })
}

/// Memory for the set. Sets that nobody holds give way to it where the device has none left, whatever is allowed.
fn allocate(state: &State, wanted: &Wanted) -> Result<WeightDraft> {
    let Wanted { origin, plan, place, .. } = wanted;
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
