use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::memory::{MemoryEnd, WeightPlace};
use super::set::{Known, WeightSet};
use super::wanted::Wanted;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{AttachmentId, ContentDigest, SessionId, WeightSetId};
use crate::model::ModelFile;
use crate::model::weights::WeightPlan;
use crate::protocol::{Force, WeightState};

/// All sets of weights, and who holds them.
#[derive(Debug)]
pub(super) struct Table {
    limit: u64,
    sets: BTreeMap<WeightSetId, Known>,
    /// Bytes promised to sets that are being loaded or published.
    reserved: u64,
    next_set: u64,
    next_attachment: u64,
}

/// What was found under a name that is to be unloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::broker) enum Unloaded {
    Nothing,
    Weights,
}

impl Table {
    /// An empty table of up to `limit` bytes of weights.
    pub(super) fn new(limit: u64) -> Self {
        Self { limit, sets: BTreeMap::new(), reserved: 0, next_set: 1, next_attachment: 1 }
    }

    pub(super) fn new_id(&mut self) -> WeightSetId {
        let id = WeightSetId(self.next_set);
        self.next_set += 1;
        id
    }

    pub(super) fn sets(&self) -> impl Iterator<Item = &Known> {
        self.sets.values()
    }

    /// The set that a file, unchanged since it was loaded, gives under a plan. Sets of files that have changed are
    /// marked, and dropped where nobody holds them.
    pub(super) fn of_file(&mut self, wanted: &Wanted) -> Option<WeightSetId> {
        let path = wanted.file.path();
        for known in self.sets.values_mut() {
            let was_of_file = known.files.iter().any(|file| file.path() == path);
            if was_of_file && known.state == WeightState::Ready && known.is_outdated() {
                tracing::info!(
                    weights = known.shown(),
                    "the file has changed: its weights stay until nobody holds them"
                );
                known.state = WeightState::Outdated;
            }
        }
        self.drop_unheld_leftovers();
        let fits = |known: &&Known| {
            known.state == WeightState::Ready
                && known.set.place == wanted.place
                && known.set.plan == wanted.plan
                && known.is_current(path)
        };
        self.sets.values().find(fits).map(|known| known.set.id)
    }

    /// A set whose tensors are laid out like this, whatever they contain: they may be the same.
    pub(super) fn has_likeness(&self, plan: &WeightPlan, place: WeightPlace) -> bool {
        self.ready().any(|known| known.set.place == place && known.set.plan == *plan)
    }

    /// The set with this content before casting, laid out like this.
    pub(super) fn of_source(
        &self,
        source: ContentDigest,
        plan: &WeightPlan,
        place: WeightPlace,
    ) -> Option<WeightSetId> {
        let fits = |known: &&Known| {
            let set = &known.set;
            set.source == source && set.place == place && set.plan == *plan
        };
        self.ready().find(fits).map(|known| known.set.id)
    }

    /// The set with this content.
    pub(super) fn of_content(&self, content: ContentDigest, place: WeightPlace) -> Option<WeightSetId> {
        self.ready().find(|known| known.set.content == content && known.set.place == place).map(|known| known.set.id)
    }

    /// The set published under `name`.
    pub(super) fn published(&self, name: &str) -> Option<&Known> {
        self.ready().find(|known| known.published.contains(name))
    }

    fn ready(&self) -> impl Iterator<Item = &Known> {
        self.sets.values().filter(|known| known.state == WeightState::Ready)
    }

    /// Sets aside room for a new set, giving up sets that nobody holds, the longest unused first.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] where sets that are held leave too little.
    pub(super) fn reserve(&mut self, bytes: u64, what: &str) -> Result<()> {
        let used =
            |table: &Self| table.reserved + table.sets.values().map(|known| known.set.plan.size_bytes).sum::<u64>();
        while used(self).saturating_add(bytes) > self.limit {
            let idle = self.sets.values().filter(|known| known.holders.is_empty());
            let Some(id) = idle.min_by_key(|known| known.last_used).map(|known| known.set.id) else {
                let held: Vec<String> = self.sets.values().map(Known::shown).collect();
                let message = format!(
                    "{what} takes {bytes} bytes; {} of the {} for weights are in use by {}",
                    used(self),
                    self.limit,
                    if held.is_empty() { "nobody".to_owned() } else { held.join(", ") }
                );
                let remedy = "have clients give back what they no longer need, ask for a smaller element type, or raise \
                              --weight-bytes";
                return Err(Error::new(ErrorKind::OutOfMemory, message, remedy));
            };
            if let Some(known) = self.sets.remove(&id) {
                tracing::info!(weights = known.shown(), "weights that nobody holds give way to others");
            }
        }
        self.reserved += bytes;
        Ok(())
    }

    pub(super) fn unreserve(&mut self, bytes: u64) {
        self.reserved = self.reserved.saturating_sub(bytes);
    }

    pub(super) fn insert(&mut self, set: WeightSet) -> WeightSetId {
        let id = set.id;
        let known = Known {
            set: Arc::new(set),
            files: Vec::new(),
            published: Default::default(),
            names: Default::default(),
            holders: BTreeMap::new(),
            last_used: Instant::now(),
            state: WeightState::Ready,
        };
        self.sets.insert(id, known);
        id
    }

    /// Notes that a file holds this set.
    pub(super) fn add_file(&mut self, id: WeightSetId, file: &Arc<ModelFile>) {
        if let Some(known) = self.sets.get_mut(&id) {
            known.files.retain(|one| one.path() != file.path());
            known.files.push(Arc::clone(file));
        }
    }

    /// Publishes a set under `name`, which then means no other set.
    pub(super) fn publish(&mut self, id: WeightSetId, name: &str) {
        for known in self.sets.values_mut() {
            known.published.remove(name);
        }
        if let Some(known) = self.sets.get_mut(&id) {
            known.published.insert(name.to_owned());
        }
    }

    /// A hold of `session` on a set that it asked for as `name`.
    ///
    /// # Errors
    /// [`ErrorKind::Stale`] where the set is gone.
    pub(super) fn attach(
        &mut self,
        id: WeightSetId,
        session: SessionId,
        name: &str,
    ) -> Result<(AttachmentId, Arc<WeightSet>)> {
        let attachment = AttachmentId(self.next_attachment);
        let known = self.sets.get_mut(&id).ok_or_else(|| {
            Error::new(ErrorKind::Stale, format!("{name} was unloaded in this moment"), "attach it again")
        })?;
        self.next_attachment += 1;
        known.holders.insert(attachment, session);
        if !known.published.contains(name) {
            known.names.insert(name.to_owned());
        }
        known.last_used = Instant::now();
        Ok((attachment, Arc::clone(&known.set)))
    }

    pub(super) fn detach(&mut self, session: SessionId, attachment: AttachmentId) {
        for known in self.sets.values_mut() {
            if known.holders.get(&attachment) == Some(&session) {
                known.holders.remove(&attachment);
                known.last_used = Instant::now();
            }
        }
        self.drop_unheld_leftovers();
    }

    /// Ends what a session holds in memory of this kind.
    pub(super) fn end_session(&mut self, session: SessionId, kind: MemoryEnd) {
        for known in self.sets.values_mut().filter(|known| known.set.memory.end == kind) {
            known.holders.retain(|_, holder| *holder != session);
        }
        self.drop_unheld_leftovers();
    }

    /// Whether a session holds memory that must be kept until its process is gone.
    pub(super) fn holds_owned(&self, session: SessionId) -> bool {
        let mut owned = self.sets.values().filter(|known| known.set.memory.end == MemoryEnd::Owned);
        owned.any(|known| known.holders.values().any(|holder| *holder == session))
    }

    fn drop_unheld_leftovers(&mut self) {
        self.sets.retain(|_, known| known.state == WeightState::Ready || !known.holders.is_empty());
    }

    /// What was taken from a session by force, that it still holds; of those sets that were called `name`, where one is
    /// given.
    ///
    /// # Errors
    /// [`ErrorKind::Stale`] naming it.
    pub(super) fn check(&self, session: SessionId, name: Option<&str>) -> Result<()> {
        let is_meant =
            |known: &&Known| name.is_none_or(|name| known.names.contains(name) || known.published.contains(name));
        let revoked = self.sets.values().filter(|known| known.state == WeightState::Revoked).filter(is_meant);
        match revoked.into_iter().find(|known| known.holders.values().any(|holder| *holder == session)) {
            None => Ok(()),
            Some(known) => Err(Error::new(
                ErrorKind::Stale,
                format!("{} was unloaded by force; its tensors stay readable, but are counted no more", known.shown()),
                "reattach it, or drop its tensors and attach it again",
            )),
        }
    }

    /// Gives up the sets of a name or path.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where somebody holds one and `force` does not say that it goes nevertheless.
    pub(super) fn unload(&mut self, name: &str, path: Option<&Path>, force: Force) -> Result<Unloaded> {
        let is_meant = |known: &Known| {
            let by_path = path.is_some_and(|path| known.files.iter().any(|file| file.path() == path));
            by_path || known.published.contains(name)
        };
        let meant: Vec<WeightSetId> = self.ready().filter(|known| is_meant(known)).map(|known| known.set.id).collect();
        if force == Force::No
            && let Some(held) = meant.iter().filter_map(|id| self.sets.get(id)).find(|known| !known.holders.is_empty())
        {
            let sessions: Vec<String> = held.by_session().keys().map(|session| format!("session {session}")).collect();
            return Err(Error::new(
                ErrorKind::InUse,
                format!("{} is attached by {}; nothing was unloaded", held.shown(), sessions.join(", ")),
                "have them give it back, or unload it by force: their tensors stay readable then",
            ));
        }
        for id in &meant {
            if let Some(known) = self.sets.get_mut(id) {
                known.state = WeightState::Revoked;
            }
        }
        self.drop_unheld_leftovers();
        Ok(if meant.is_empty() { Unloaded::Nothing } else { Unloaded::Weights })
    }

    /// The sets of a name or path, for a look at what they contain.
    pub(super) fn named(&self, name: &str, path: Option<&PathBuf>) -> Vec<(String, Arc<WeightSet>)> {
        let is_meant = |known: &&Known| {
            let by_path = path.is_some_and(|path| known.files.iter().any(|file| file.path() == path));
            by_path || known.published.contains(name)
        };
        self.sets.values().filter(is_meant).map(|known| (known.shown(), Arc::clone(&known.set))).collect()
    }
}
