use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::memory::{MemoryEnd, WeightPlace};
use super::set::{Holder, Known, PublishedPlan, Variant, WeightSet};
use super::wanted::{Origin, Wanted};
use crate::device::Region;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{AttachmentId, ContentDigest, RequestId, SessionId, WeightSetId};
use crate::model::ModelFile;
use crate::model::weights::WeightPlan;
use crate::protocol::{Force, WeightState};

/// More sets than any machine serves at a time: each takes a descriptor of the broker's. Those that nobody holds give way.
const MAX_SETS: usize = 256;

/// More than a worker has at a time; bounds what one that never gives anything back can make the broker remember.
const MAX_ATTACHMENTS: usize = 4096;

/// Names by which one set can be attached.
const MAX_PUBLISHED_NAMES: usize = 64;

/// Files of the same content that one set is known to be of, and names it was asked for by that are told.
const MAX_REMEMBERED: usize = 16;

/// All sets of weights, and who holds them.
#[derive(Debug)]
pub(super) struct Table {
    limit: u64,
    sets: BTreeMap<WeightSetId, Known>,
    /// Bytes promised to sets that are being loaded or published.
    reserved: u64,
    /// Sets that are being loaded or published.
    coming: usize,
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

impl Table {
    /// An empty table of up to `limit` bytes of weights.
    pub(super) fn new(limit: u64) -> Self {
        Self {
            limit,
            sets: BTreeMap::new(),
            reserved: 0,
            coming: 0,
            next_set: 1,
            next_attachment: 1,
            forsaken: Vec::new(),
        }
    }

    pub(super) fn new_id(&mut self) -> WeightSetId {
        let id = WeightSetId(self.next_set);
        self.next_set += 1;
        id
    }

    pub(super) fn sets(&self) -> impl Iterator<Item = &Known> {
        self.sets.values()
    }

    /// The set that is what is wanted, as far as is known without a look at any tensor.
    pub(super) fn of_origin(&mut self, wanted: &Wanted) -> Option<WeightSetId> {
        match &wanted.origin {
            Origin::File(file) => self.of_file(file, wanted),
            Origin::Published { set, name } => {
                let id = self.of_source(set.content, &wanted.plan, wanted.place)?;
                self.add_variant(id, name, set.content, &wanted.plan);
                Some(id)
            }
        }
    }

    /// The set that a file, unchanged since it was loaded, gives under a plan. Sets of files that have changed are
    /// marked, and dropped where nobody holds them.
    fn of_file(&mut self, file: &ModelFile, wanted: &Wanted) -> Option<WeightSetId> {
        let path = file.path();
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

    /// Notes that a set is what was published under `name`, converted or in other memory.
    pub(super) fn add_variant(&mut self, id: WeightSetId, name: &str, content: ContentDigest, plan: &WeightPlan) {
        if let Some(known) = self.sets.get_mut(&id)
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

    /// Sets aside room for a new set, giving up sets that nobody holds, the longest unused first.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] where sets that are held leave too little, [`ErrorKind::Busy`] where they are too many;
    /// nothing is given up then.
    pub(super) fn reserve(&mut self, bytes: u64, what: &str) -> Result<()> {
        let held: Vec<&Known> = self.sets.values().filter(|known| !known.holders.is_empty()).collect();
        let held_bytes = held.iter().map(|known| known.set.plan.size_bytes).sum::<u64>() + self.reserved;
        if held_bytes.saturating_add(bytes) > self.limit {
            let names: Vec<String> = held.into_iter().map(Known::shown_with_holders).collect();
            let by = if names.is_empty() { String::new() } else { format!(" by {}", names.join(", ")) };
            let message =
                format!("{what} takes {bytes} bytes; {held_bytes} of the {} for weights are in use{by}", self.limit);
            let remedy = "have clients give back what they no longer need, ask for a smaller element type, or raise \
                          --weight-bytes";
            return Err(Error::new(ErrorKind::OutOfMemory, message, remedy));
        }
        if held.len() + self.coming >= MAX_SETS {
            let message = format!("clients hold {MAX_SETS} sets of weights already; {what} is one too many");
            return Err(Error::new(ErrorKind::Busy, message, "have them give back what they no longer need"));
        }
        while self.used().saturating_add(bytes) > self.limit || self.sets.len() + self.coming >= MAX_SETS {
            if !self.give_up_one_of(|_| true) {
                break;
            }
        }
        self.reserved += bytes;
        self.coming += 1;
        Ok(())
    }

    /// Gives up the longest unused of the sets in some place that nobody holds; `false` where there is none.
    pub(super) fn give_up_one(&mut self, place: WeightPlace) -> bool {
        self.give_up_one_of(|known| known.set.place == place)
    }

    fn give_up_one_of(&mut self, is_meant: impl Fn(&Known) -> bool) -> bool {
        let idle = self.sets.values().filter(|known| known.holders.is_empty() && is_meant(known));
        let longest = idle.min_by_key(|known| known.last_used).map(|known| known.set.id);
        let Some(known) = longest.and_then(|id| self.sets.remove(&id)) else { return false };
        self.forsaken.push(Arc::clone(&known.set.memory.region));
        tracing::info!(weights = known.shown(), "weights that nobody holds give way to others");
        true
    }

    fn used(&self) -> u64 {
        self.reserved + self.sets.values().map(|known| known.set.plan.size_bytes).sum::<u64>()
    }

    /// What was set aside is not needed any more: the set is there, or will not come.
    pub(super) fn unreserve(&mut self, bytes: u64) {
        self.reserved = self.reserved.saturating_sub(bytes);
        self.coming = self.coming.saturating_sub(1);
    }

    pub(super) fn insert(&mut self, set: WeightSet) -> WeightSetId {
        let id = set.id;
        let known = Known {
            set: Arc::new(set),
            files: Vec::new(),
            published: Default::default(),
            variant_of: Default::default(),
            names: Default::default(),
            holders: BTreeMap::new(),
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
            !known.holders.is_empty() && (variant || known.published.contains(name) && known.set.content != content)
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

    fn drop_forsaken(&mut self) {
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
            Some(known) => Err(Error::new(
                ErrorKind::Stale,
                format!(
                    "{} was unloaded by force; its tensors stay readable, but nobody else gets them",
                    known.shown()
                ),
                "reattach it, or drop its tensors and attach it again",
            )),
        }
    }

    /// Gives up the sets of a name or path.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where somebody holds one and `force` does not say that it goes nevertheless.
    pub(super) fn unload(&mut self, name: &str, path: Option<&Path>, force: Force) -> Result<Unloaded> {
        let meant: Vec<WeightSetId> =
            self.ready().filter(|known| known.is_called(name, path)).map(|known| known.set.id).collect();
        if force == Force::No
            && let Some(held) = meant.iter().filter_map(|id| self.sets.get(id)).find(|known| !known.holders.is_empty())
        {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("{} is attached; nothing was unloaded", held.shown_with_holders()),
                "have them give it back, or unload it by force: their tensors stay readable then",
            ));
        }
        for id in &meant {
            if let Some(known) = self.sets.get_mut(id) {
                known.state = WeightState::Revoked;
            }
        }
        self.drop_forsaken();
        Ok(if meant.is_empty() { Unloaded::Nothing } else { Unloaded::Weights })
    }

    /// The sets of a name or path, for a look at what they contain.
    pub(super) fn named(&self, name: &str, path: Option<&Path>) -> Vec<(String, Arc<WeightSet>)> {
        let meant = self.sets.values().filter(|known| known.is_called(name, path));
        meant.map(|known| (known.shown(), Arc::clone(&known.set))).collect()
    }
}
