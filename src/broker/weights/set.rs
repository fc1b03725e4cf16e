use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::memory::{SealedWeights, WeightPlace};
use crate::error::Result;
use crate::id::{AttachmentId, ContentDigest, RequestId, SessionId, WeightSetId};
use crate::model::weights::{PlannedTensor, WeightPlan};
use crate::model::{FileState, ModelError};
use crate::protocol::{WeightEntry, WeightState, encode_table};
use crate::tensor::CastRule;

/// One set of weights, complete and never changed.
#[derive(Debug)]
pub(super) struct WeightSet {
    pub(super) id: WeightSetId,
    pub(super) place: WeightPlace,
    pub(super) plan: WeightPlan,
    /// The plan as clients get it.
    pub(super) table: Arc<[u8]>,
    /// What the source of the tensors contains, before they were cast.
    pub(super) source: ContentDigest,
    pub(super) content: ContentDigest,
    pub(super) memory: SealedWeights,
    /// Counted against what is allowed, see [`booked_bytes`].
    pub(super) booked_bytes: u64,
}

/// Bytes of a set's memory, and roughly of what describes it: many small tensors take more for that than for themselves.
pub(super) fn booked_bytes(plan: &WeightPlan) -> u64 {
    /// Element type, shape and offset in a table, with their framing.
    const ENTRY_BYTES: usize = 32;
    let described = |tensor: &PlannedTensor| 2 * tensor.key.len() + size_of::<PlannedTensor>() + ENTRY_BYTES;
    plan.size_bytes.saturating_add(plan.tensors.iter().map(|tensor| described(tensor) as u64).sum())
}

/// Who holds a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Holder {
    pub(super) session: SessionId,
    /// The request that this hold answers.
    pub(super) request: RequestId,
}

/// How a set comes from a published one.
#[derive(Debug, Clone)]
pub(super) struct Variant {
    /// What the published set contains.
    pub(super) content: ContentDigest,
    /// This set's layout, with the element types of the published one as those stored.
    pub(super) plan: Arc<WeightPlan>,
}

/// A set that is known: where it comes from, and who uses it.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) set: Arc<WeightSet>,
    /// Files that hold this set, as they were when that was found.
    pub(super) files: Vec<FileState>,
    /// Names it was published under.
    pub(super) published: BTreeSet<String>,
    /// Published names whose tensors these are, converted or in other memory.
    pub(super) variant_of: BTreeMap<String, Variant>,
    /// Names it was asked for by; the first few.
    pub(super) names: BTreeSet<String>,
    pub(super) holders: BTreeMap<AttachmentId, Holder>,
    /// Variants that are being made of it.
    pub(super) readers: usize,
    /// Lanes that run it as a model.
    pub(super) runners: usize,
    pub(super) last_used: Instant,
    pub(super) state: WeightState,
}

/// What is held against a rule for published tensors.
#[derive(Debug)]
pub(super) enum PublishedPlan {
    Same(Arc<WeightSet>),
    Variant(Arc<WeightPlan>),
}

impl PublishedPlan {
    /// Whether the tensors are there as `rule` wants them.
    pub(super) fn follows(&self, rule: &CastRule) -> bool {
        match self {
            Self::Same(set) => set.plan.is_untouched_by(rule),
            Self::Variant(plan) => plan.follows(rule),
        }
    }
}

/// Whether a file is another one now, or gone. One that cannot be looked at for now is what it was. Looks at the disk.
pub(super) fn has_changed(file: &FileState) -> bool {
    matches!(file.check_unchanged(), Err(ModelError::Changed { .. }))
}

/// The table of a plan as it crosses the wire.
///
/// # Errors
/// [`crate::protocol::CodecError::TooLong`].
pub(super) fn wire_table(plan: &WeightPlan) -> Result<Arc<[u8]>> {
    let entry = |tensor: &PlannedTensor| WeightEntry {
        key: tensor.key.clone(),
        dtype: tensor.meta.dtype,
        shape: tensor.meta.shape,
        offset: tensor.offset,
    };
    let entries: Vec<WeightEntry> = plan.tensors.iter().map(entry).collect();
    Ok(encode_table(&entries)?.into())
}

impl Known {
    /// Whether it or what it is a variant of was published as `name`, or it is what a file at `path` held.
    pub(super) fn is_called(&self, name: &str, path: Option<&Path>) -> bool {
        let by_path = path.is_some_and(|path| self.files.iter().any(|file| file.path() == path));
        by_path || self.published.contains(name) || self.variant_of.contains_key(name)
    }

    /// Whether it is needed as it is: by a session, for a variant that is being made of it, or by a lane that runs it.
    pub(super) fn is_held(&self) -> bool {
        self.is_attached() || self.runners > 0
    }

    /// Whether somebody else than a lane, which can be told to unload it, needs it as it is.
    pub(super) fn is_attached(&self) -> bool {
        !self.holders.is_empty() || self.readers > 0
    }

    /// Whether nobody holds it and nobody can ask for it.
    pub(super) fn is_forsaken(&self) -> bool {
        let is_nameless = self.published.is_empty() && self.variant_of.is_empty() && self.files.is_empty();
        !self.is_held() && (self.state != WeightState::Ready || is_nameless)
    }

    /// Whether the set comes from nowhere any more: every file that held it is among those that have changed, and nobody
    /// published it.
    pub(super) fn is_outdated(&self, changed: &[FileState]) -> bool {
        let is_published = !self.published.is_empty() || !self.variant_of.is_empty();
        !is_published && self.files.iter().all(|file| changed.contains(file))
    }

    /// The name to speak of it by, with the sessions that hold it.
    pub(super) fn shown_with_holders(&self) -> String {
        let mut by: Vec<String> = self.by_session().keys().map(|session| format!("session {session}")).collect();
        if self.readers > 0 {
            by.push("what is being made of it".to_owned());
        }
        if self.runners > 0 {
            by.push("the broker, which runs it".to_owned());
        }
        format!("{} ({})", self.shown(), by.join(", "))
    }

    /// The name to speak of it by.
    pub(super) fn shown(&self) -> String {
        let by_name = self.published.iter().chain(self.variant_of.keys()).chain(&self.names).next().cloned();
        by_name.or_else(|| self.files.first().map(|file| file.path().display().to_string())).unwrap_or_default()
    }

    /// The layout to hold against a rule for what was published as `name`: stored are the types it was published in.
    pub(super) fn published_plan(&self, name: &str) -> Option<PublishedPlan> {
        if self.published.contains(name) {
            return Some(PublishedPlan::Same(Arc::clone(&self.set)));
        }
        self.variant_of.get(name).map(|variant| PublishedPlan::Variant(Arc::clone(&variant.plan)))
    }

    /// How often a session holds it.
    pub(super) fn count(&self, session: SessionId) -> usize {
        self.holders.values().filter(|holder| holder.session == session).count()
    }

    /// How often each session holds it.
    pub(super) fn by_session(&self) -> BTreeMap<SessionId, u64> {
        let mut counts = BTreeMap::new();
        for holder in self.holders.values() {
            *counts.entry(holder.session).or_default() += 1;
        }
        counts
    }
}
