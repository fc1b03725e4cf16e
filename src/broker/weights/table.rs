use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::memory::{MemoryEnd, WeightLimits, WeightPlace};
use super::room::Room;
use super::set::{Holder, Known, PublishedPlan, Variant, WeightSet};
use super::wanted::{Origin, Wanted};
use crate::device::Region;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{AttachmentId, ContentDigest, RequestId, SessionId, WeightSetId};
use crate::model::weights::WeightPlan;
use crate::model::{FileState, ModelFile};
use crate::protocol::{Force, WeightState};

/// More than a worker has at a time; bounds what one that never gives anything back can make the broker remember.
const MAX_ATTACHMENTS: usize = 4096;

/// Names by which one set can be attached.
const MAX_PUBLISHED_NAMES: usize = 64;

/// Files of the same content that one set is known to be of, and names it was asked for by that are told.
const MAX_REMEMBERED: usize = 16;

/// All sets of weights, and who holds them.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) room: Room,
    sets: BTreeMap<WeightSetId, Known>,
    next_set: u64,
    next_attachment: u64,
    /// Memory that nobody needs any more: giving it back takes its time.
    forsaken: Vec<Arc<dyn Region>>,
}

/// What was found under a name that is to be unloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::broker) enum Unloaded {
    Nothing,
    Weights,
}

/// What was asked for as `name` went away between the look for it and the hold on it.
pub(super) fn gone(name: &str) -> Error {
    Error::new(ErrorKind::Stale, format!("{name} was unloaded in this moment"), "attach it again")
}

fn taken_by_force(known: &Known) -> Error {
    Error::new(
        ErrorKind::Stale,
        format!("{} was unloaded by force; its tensors stay readable, but nobody else gets them", known.shown()),
        "reattach it, or drop its tensors and attach it again",
    )
}

impl Table {
    /// An empty table.
    pub(super) fn new(limits: WeightLimits) -> Self {
        let room = Room::new(limits);
        Self { room, sets: BTreeMap::new(), next_set: 1, next_attachment: 1, forsaken: Vec::new() }
    }

    pub(super) fn new_id(&mut self) -> WeightSetId {
        let id = WeightSetId(self.next_set);
        self.next_set += 1;
        id
    }

    pub(super) fn sets(&self) -> impl Iterator<Item = &Known> {
        self.sets.values()
    }

    pub(super) fn remove(&mut self, id: WeightSetId) -> Option<Known> {
        self.sets.remove(&id)
    }

    /// Files that sets of what is at `path` were found in: whether they have changed is asked without the lock.
    pub(super) fn files_of(&self, path: &Path) -> Vec<FileState> {
        let is_meant = |known: &&Known| known.files.iter().any(|file| file.path() == path);
        self.ready().filter(is_meant).flat_map(|known| known.files.iter().cloned()).collect()
    }

    /// A variant is being made of a set: it must stay.
    pub(super) fn pin(&mut self, id: WeightSetId) {
        if let Some(known) = self.sets.get_mut(&id) {
            known.readers += 1;
        }
    }

    pub(super) fn unpin(&mut self, id: WeightSetId) {
        if let Some(known) = self.sets.get_mut(&id) {
            known.readers = known.readers.saturating_sub(1);
            known.last_used = Instant::now();
        }
        self.drop_forsaken();
    }

    /// A set for a lane to run as a model; absent where it is gone or not what `name` means any more.
    pub(super) fn begin_run(&mut self, id: WeightSetId, name: &str) -> Option<Arc<WeightSet>> {
        self.published(name).filter(|known| known.set.id == id)?;
        let known = self.sets.get_mut(&id)?;
        known.runners += 1;
        Some(Arc::clone(&known.set))
    }

    /// A lane does not run a set any more.
    pub(super) fn end_run(&mut self, id: WeightSetId) {
        if let Some(known) = self.sets.get_mut(&id) {
            known.runners = known.runners.saturating_sub(1);
            known.last_used = Instant::now();
        }
        self.drop_forsaken();
    }

    /// The set that is what is wanted, as far as is known without a look at any tensor; `changed` are files that were found
    /// to have changed.
    ///
    /// # Errors
    /// [`ErrorKind::Stale`] where the name does not mean the published set any more.
    pub(super) fn of_origin(&mut self, wanted: &Wanted, changed: &[FileState]) -> Result<Option<WeightSetId>> {
        match &wanted.origin {
            Origin::File(file) => Ok(self.of_file(file, wanted, changed)),
            Origin::Published { set, name } => {
                if self.published(name).is_none_or(|known| known.set.id != set.id) {
                    return Err(gone(name));
                }
                let id = self.of_source(set.content, &wanted.plan, wanted.place);
                if let Some(id) = id {
                    self.add_variant(id, name, set.content, &wanted.plan);
                }
                Ok(id)
            }
        }
    }

    /// The set that a file, unchanged since it was loaded, gives under a plan. Sets of files that have changed are
    /// marked, and dropped where nobody holds them.
    fn of_file(&mut self, file: &ModelFile, wanted: &Wanted, changed: &[FileState]) -> Option<WeightSetId> {
        let path = file.path();
        for known in self.sets.values_mut() {
            let was_of_file = known.files.iter().any(|file| file.path() == path);
            if was_of_file && known.state == WeightState::Ready && known.is_outdated(changed) {
                tracing::info!(
                    weights = known.shown(),
                    "the file has changed: its weights stay until nobody holds them"
                );
                known.state = WeightState::Outdated;
            }
        }
        self.forget_other_states(file);
        self.drop_forsaken();
        let fits = |known: &&Known| {
            known.state == WeightState::Ready
                && known.set.place == wanted.place
                && known.set.plan.is_laid_out_like(&wanted.plan)
                && known.files.contains(file.state())
        };
        self.sets.values().find(fits).map(|known| known.set.id)
    }

    /// A set whose tensors are laid out like this, whatever they contain: they may be the same.
    pub(super) fn has_likeness(&self, plan: &WeightPlan, place: WeightPlace) -> bool {
        self.whole().any(|known| known.set.place == place && known.set.plan.is_laid_out_like(plan))
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
            set.source == source && set.place == place && set.plan.is_laid_out_like(plan)
        };
        self.whole().find(fits).map(|known| known.set.id)
    }

    /// The set with this content.
    pub(super) fn of_content(&self, content: ContentDigest, place: WeightPlace) -> Option<WeightSetId> {
        self.whole().find(|known| known.set.content == content && known.set.place == place).map(|known| known.set.id)
    }

    /// The set published under `name`.
    pub(super) fn published(&self, name: &str) -> Option<&Known> {
        self.ready().find(|known| known.published.contains(name))
    }

    /// The sets in some place that are what was published under `name`, as it was or converted.
    pub(super) fn variants(&self, name: &str, place: WeightPlace) -> Vec<(WeightSetId, PublishedPlan)> {
        let there = self.ready().filter(|known| known.set.place == place);
        there.filter_map(|known| Some((known.set.id, known.published_plan(name)?))).collect()
    }

    /// Whether something that was published under `name` is still there.
    pub(super) fn has_variants(&self, name: &str) -> bool {
        self.ready().any(|known| known.variant_of.contains_key(name))
    }

    /// Notes that a set is what was published under `name`, converted or in other memory, if `name` still means that.
    pub(super) fn add_variant(&mut self, id: WeightSetId, name: &str, content: ContentDigest, plan: &WeightPlan) {
        if self.published(name).is_some_and(|known| known.set.content == content)
            && let Some(known) = self.sets.get_mut(&id)
            && !known.published.contains(name)
            && known.variant_of.len() < MAX_PUBLISHED_NAMES
        {
            known.variant_of.insert(name.to_owned(), Variant { content, plan: Arc::new(plan.clone()) });
            if known.state == WeightState::Outdated {
                known.state = WeightState::Ready;
            }
        }
    }

    /// Sets that contain what somebody may want; also of a file that was changed, and may hold the same again.
    fn whole(&self) -> impl Iterator<Item = &Known> {
        self.sets.values().filter(|known| known.state != WeightState::Revoked)
    }

    fn ready(&self) -> impl Iterator<Item = &Known> {
        self.sets.values().filter(|known| known.state == WeightState::Ready)
    }

    /// Adds a set, unless one in the same memory contains the same.
    pub(super) fn insert_once(&mut self, set: WeightSet) -> WeightSetId {
        match self.of_content(set.content, set.place) {
            Some(id) => {
                self.forsake(Arc::clone(&set.memory.region));
                id
            }
            None => self.insert(set),
        }
    }

    fn insert(&mut self, set: WeightSet) -> WeightSetId {
        let id = set.id;
        let known = Known {
            set: Arc::new(set),
            files: Vec::new(),
            published: Default::default(),
            variant_of: Default::default(),
            names: Default::default(),
            holders: BTreeMap::new(),
            readers: 0,
            runners: 0,
            last_used: Instant::now(),
            state: WeightState::Ready,
        };
        self.sets.insert(id, known);
        id
    }

    /// A path means what is there now: sets that go on by other names or files are not called by it any more.
    fn forget_other_states(&mut self, file: &ModelFile) {
        for known in self.sets.values_mut().filter(|known| known.state == WeightState::Ready) {
            known.files.retain(|one| one.path() != file.path() || one == file.state());
        }
    }

    /// Notes that a file holds this set.
    pub(super) fn add_file(&mut self, id: WeightSetId, file: &ModelFile) {
        self.forget_other_states(file);
        if let Some(known) = self.sets.get_mut(&id) {
            known.files.retain(|one| one.path() != file.path());
            if known.files.len() == MAX_REMEMBERED {
                // It is found to hold the same again when it is next asked for.
                known.files.remove(0);
            }
            known.files.push(file.state().clone());
            if known.state == WeightState::Outdated {
                known.state = WeightState::Ready;
            }
        }
    }

    /// That `name` can be given to what `content` says: it means nothing else that somebody holds.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`].
    pub(super) fn check_free(&self, name: &str, content: ContentDigest) -> Result<()> {
        let is_other = |known: &&Known| {
            let variant = known.variant_of.get(name).is_some_and(|variant| variant.content != content);
            known.is_held() && (variant || known.published.contains(name) && known.set.content != content)
        };
        match self.ready().find(is_other) {
            None => Ok(()),
            Some(known) => Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "{name} is published with other content, which is attached: {}; nothing was published",
                    known.shown_with_holders()
                ),
                "publish under another name, or have them give it back",
            )),
        }
    }

    /// Publishes a set under `name`, which then means no other set.
    ///
    /// # Errors
    /// As [`Table::check_free`]; [`ErrorKind::Busy`] for a set of too many names.
    pub(super) fn publish(&mut self, id: WeightSetId, name: &str) -> Result<()> {
        let Some(content) = self.sets.get(&id).map(|known| known.set.content) else { return Ok(()) };
        self.check_free(name, content)?;
        if let Some(known) = self.sets.get_mut(&id) {
            if !known.published.contains(name) && known.published.len() >= MAX_PUBLISHED_NAMES {
                let message = format!("what was to be published as {name} has {MAX_PUBLISHED_NAMES} names already");
                return Err(Error::new(ErrorKind::Busy, message, "attach it by one of them"));
            }
            known.published.insert(name.to_owned());
            known.names.remove(name);
            known.variant_of.remove(name);
            if known.state == WeightState::Outdated {
                known.state = WeightState::Ready;
            }
        }
        for known in self.sets.values_mut().filter(|known| known.set.id != id && known.state == WeightState::Ready) {
            known.published.remove(name);
            known.variant_of.retain(|one, variant| one != name || variant.content == content);
        }
        self.drop_forsaken();
        Ok(())
    }

    /// A hold on a set that was asked for as `name`.
    ///
    /// # Errors
    /// [`ErrorKind::Stale`] where the set is gone, [`ErrorKind::Busy`] where the session holds too much.
    pub(super) fn attach(
        &mut self,
        id: WeightSetId,
        holder: Holder,
        name: &str,
    ) -> Result<(AttachmentId, Arc<WeightSet>)> {
        let held: usize = self.sets.values().map(|known| known.count(holder.session)).sum();
        if held >= MAX_ATTACHMENTS {
            let message = format!("the session holds {MAX_ATTACHMENTS} attachments already");
            return Err(Error::new(ErrorKind::Busy, message, "drop those that are no longer needed"));
        }
        let attachment = AttachmentId(self.next_attachment);
        let known = self.sets.get_mut(&id).ok_or_else(|| gone(name))?;
        self.next_attachment += 1;
        known.holders.insert(attachment, holder);
        let is_called = known.published.contains(name) || known.variant_of.contains_key(name);
        if !is_called && known.names.len() < MAX_REMEMBERED {
            known.names.insert(name.to_owned());
        }
        known.last_used = Instant::now();
        Ok((attachment, Arc::clone(&known.set)))
    }

    /// Whether `session` holds a set by this attachment.
    pub(super) fn holds(&self, session: SessionId, attachment: AttachmentId) -> bool {
        self.sets.values().any(|known| known.holders.get(&attachment).is_some_and(|holder| holder.session == session))
    }

    pub(super) fn detach(&mut self, session: SessionId, attachment: AttachmentId) {
        for known in self.sets.values_mut() {
            if known.holders.get(&attachment).is_some_and(|holder| holder.session == session) {
                known.holders.remove(&attachment);
                known.last_used = Instant::now();
            }
        }
        self.drop_forsaken();
    }

    /// Ends what a request of the session's was answered with.
    pub(super) fn recall(&mut self, session: SessionId, request: RequestId) {
        let meant = Holder { session, request };
        for known in self.sets.values_mut() {
            let before = known.holders.len();
            known.holders.retain(|_, holder| *holder != meant);
            if known.holders.len() < before {
                known.last_used = Instant::now();
            }
        }
        self.drop_forsaken();
    }

    /// Ends what a session holds in memory of this kind.
    pub(super) fn end_session(&mut self, session: SessionId, kind: MemoryEnd) {
        for known in self.sets.values_mut().filter(|known| known.set.memory.end == kind) {
            known.holders.retain(|_, holder| holder.session != session);
        }
        self.drop_forsaken();
    }

    /// Whether a session holds memory that must be kept until its process is gone.
    pub(super) fn holds_owned(&self, session: SessionId) -> bool {
        let mut owned = self.sets.values().filter(|known| known.set.memory.end == MemoryEnd::Owned);
        owned.any(|known| known.holders.values().any(|holder| holder.session == session))
    }

    /// Whether `session`'s hold is still good.
    ///
    /// # Errors
    /// [`ErrorKind::Stale`] where the set was taken by force, or this is no hold of the session's.
    pub(super) fn check_attachment(&self, session: SessionId, attachment: AttachmentId) -> Result<()> {
        let is_theirs = |known: &&Known| known.holders.get(&attachment).is_some_and(|holder| holder.session == session);
        match self.sets.values().find(is_theirs) {
            None => Err(Error::new(
                ErrorKind::Stale,
                format!("the session holds no attachment {attachment}"),
                "attach the weights again",
            )),
            Some(known) if known.state == WeightState::Revoked => Err(taken_by_force(known)),
            Some(_) => Ok(()),
        }
    }

    pub(super) fn drop_forsaken(&mut self) {
        self.sets.retain(|_, known| {
            let is_forsaken = known.is_forsaken();
            if is_forsaken {
                self.forsaken.push(Arc::clone(&known.set.memory.region));
            }
            !is_forsaken
        });
    }

    /// Memory to be dropped once the table is no longer locked.
    pub(super) fn take_forsaken(&mut self) -> Vec<Arc<dyn Region>> {
        std::mem::take(&mut self.forsaken)
    }

    pub(super) fn forsake(&mut self, region: Arc<dyn Region>) {
        self.forsaken.push(region);
    }

    /// What was taken from a session by force, that it still holds; of those sets that were called `name` or are of the
    /// file at `path`, where `meant` gives them.
    ///
    /// # Errors
    /// [`ErrorKind::Stale`] naming it.
    pub(super) fn check(&self, session: SessionId, meant: Option<(&str, Option<&Path>)>) -> Result<()> {
        let is_meant =
            |known: &&Known| meant.is_none_or(|(name, path)| known.names.contains(name) || known.is_called(name, path));
        let mut revoked = self.sets.values().filter(|known| known.state == WeightState::Revoked).filter(is_meant);
        match revoked.find(|known| known.count(session) > 0) {
            None => Ok(()),
            Some(known) => Err(taken_by_force(known)),
        }
    }

    /// The sets that a name or path means: those that are called so, else those that were asked for by a name that leads to
    /// nothing any more.
    fn meant(&self, name: &str, path: Option<&Path>) -> Vec<WeightSetId> {
        let called: Vec<_> =
            self.ready().filter(|known| known.is_called(name, path)).map(|known| known.set.id).collect();
        if !called.is_empty() {
            return called;
        }
        self.ready().filter(|known| known.names.contains(name)).map(|known| known.set.id).collect()
    }

    /// Files of the sets that a name or path means, to be looked at without the lock.
    pub(super) fn files_meant(&self, name: &str, path: Option<&Path>) -> Vec<FileState> {
        let meant = self.meant(name, path).into_iter().filter_map(|id| self.sets.get(&id));
        meant.flat_map(|known| known.files.iter().cloned()).collect()
    }

    /// Gives up the sets of a name or path; without force those that are called by another name as well stay under that.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where somebody holds one and `force` does not say that it goes nevertheless.
    pub(super) fn unload(
        &mut self,
        name: &str,
        path: Option<&Path>,
        gone: &[FileState],
        force: Force,
    ) -> Result<Unloaded> {
        let meant = self.meant(name, path);
        if force == Force::No
            && let Some(held) = meant.iter().filter_map(|id| self.sets.get(id)).find(|known| known.is_attached())
        {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("{} is attached; nothing was unloaded", held.shown_with_holders()),
                "have them give it back, or unload it by force: their tensors stay readable then",
            ));
        }
        for id in &meant {
            let Some(known) = self.sets.get_mut(id) else { continue };
            if force == Force::Yes {
                known.state = WeightState::Revoked;
                continue;
            }
            // Where no file is at the path any more, it is those that are gone.
            known.files.retain(|file| !gone.contains(file));
            known.published.remove(name);
            known.variant_of.remove(name);
            known.files.retain(|file| Some(file.path()) != path);
        }
        self.drop_forsaken();
        Ok(if meant.is_empty() { Unloaded::Nothing } else { Unloaded::Weights })
    }

    /// The sets of a name or path, for a look at what they contain.
    pub(super) fn named(&self, name: &str, path: Option<&Path>) -> Vec<(String, Arc<WeightSet>)> {
        let called: Vec<_> = self.sets.values().filter(|known| known.is_called(name, path)).collect();
        let asked = || self.sets.values().filter(|known| known.names.contains(name)).collect();
        let meant: Vec<&Known> = if called.is_empty() { asked() } else { called };
        meant.into_iter().map(|known| (known.shown(), Arc::clone(&known.set))).collect()
    }
}
