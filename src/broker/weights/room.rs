use std::sync::Arc;

use super::memory::{WeightLimits, WeightPlace};
use super::set::Known;
use super::table::Table;
use crate::error::{Error, ErrorKind, Result};

/// More sets than any machine serves at a time: each takes a descriptor of the broker's. Those that nobody holds give way.
const MAX_SETS: usize = 256;

/// What is allowed, and what is promised to sets that are being loaded or published.
#[derive(Debug)]
pub(super) struct Room {
    limits: WeightLimits,
    host: u64,
    gpu: u64,
    /// Sets on their way.
    coming: usize,
}

impl Room {
    pub(super) fn new(limits: WeightLimits) -> Self {
        Self { limits, host: 0, gpu: 0, coming: 0 }
    }

    fn promised(&mut self, place: WeightPlace) -> &mut u64 {
        match place {
            WeightPlace::Host => &mut self.host,
            WeightPlace::Gpu(_) => &mut self.gpu,
        }
    }
}

impl Table {
    /// Sets aside room for a new set, giving up sets in the same memory that nobody holds, the longest unused first.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] where sets that are held leave too little, [`ErrorKind::Busy`] where they are too many;
    /// nothing is given up then.
    pub(super) fn reserve(&mut self, place: WeightPlace, bytes: u64, what: &str) -> Result<()> {
        let (limit, promised) = (self.room.limits.of(place), *self.room.promised(place));
        let held: Vec<&Known> = self.sets().filter(|known| known.set.place == place && known.is_held()).collect();
        let held_bytes = held.iter().map(|known| known.set.booked_bytes).fold(promised, u64::saturating_add);
        if held_bytes.saturating_add(bytes) > limit {
            let names: Vec<String> = held.into_iter().map(Known::shown_with_holders).collect();
            let by = if names.is_empty() { String::new() } else { format!(" by {}", names.join(", ")) };
            let message = format!(
                "{what} takes {bytes} bytes; {held_bytes} of the {limit} for weights on {} are in use{by}",
                place.name()
            );
            let remedy = "have clients give back what they no longer need, ask for a smaller element type, or raise \
                          --weight-bytes";
            return Err(Error::new(ErrorKind::OutOfMemory, message, remedy));
        }
        if self.sets().filter(|known| known.is_held()).count() + self.room.coming >= MAX_SETS {
            let message = format!("clients hold {MAX_SETS} sets of weights already; {what} is one too many");
            return Err(Error::new(ErrorKind::Busy, message, "have them give back what they no longer need"));
        }
        while self.used(place).saturating_add(bytes) > limit && self.give_up_one(place) {}
        while self.sets().count() + self.room.coming >= MAX_SETS && self.give_up_one_of(|_| true) {}
        *self.room.promised(place) += bytes;
        self.room.coming += 1;
        Ok(())
    }

    /// Gives up the longest unused of the sets in some place that nobody holds; `false` where there is none.
    pub(super) fn give_up_one(&mut self, place: WeightPlace) -> bool {
        self.give_up_one_of(|known| known.set.place == place)
    }

    fn give_up_one_of(&mut self, is_meant: impl Fn(&Known) -> bool) -> bool {
        let idle = self.sets().filter(|known| !known.is_held() && is_meant(known));
        let longest = idle.min_by_key(|known| known.last_used).map(|known| known.set.id);
        let Some(known) = longest.and_then(|id| self.remove(id)) else { return false };
        self.forsake(Arc::clone(&known.set.memory.region));
        tracing::info!(weights = known.shown(), "weights that nobody holds give way to others");
        true
    }

    fn used(&mut self, place: WeightPlace) -> u64 {
        let promised = *self.room.promised(place);
        let sets = self.sets().filter(|known| known.set.place == place);
        sets.map(|known| known.set.booked_bytes).fold(promised, u64::saturating_add)
    }

    /// What was set aside is not needed any more: the set is there, or will not come.
    pub(super) fn unreserve(&mut self, place: WeightPlace, bytes: u64) {
        let promised = self.room.promised(place);
        *promised = promised.saturating_sub(bytes);
        self.room.coming = self.room.coming.saturating_sub(1);
    }
}
