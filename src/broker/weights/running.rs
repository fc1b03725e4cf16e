use std::fmt;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::loading::Weights;
use super::set::WeightSet;
use crate::device::Span;
use crate::id::{ContentDigest, WeightSetId};
use crate::model::{ModelError, ModelFile};

/// A published set as the registry knows it: by what it was published, without a hold on its memory.
#[derive(Clone)]
pub(in crate::broker) struct PublishedModel {
    weights: Weak<Weights>,
    id: WeightSetId,
    content: ContentDigest,
    name: String,
    /// As it was opened last, where somebody still has that: what was made for it is for it alone.
    opened: Arc<Mutex<Weak<ModelFile>>>,
}

impl fmt::Debug for PublishedModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PublishedModel").field("id", &self.id).field("name", &self.name).finish_non_exhaustive()
    }
}

/// A set that is run: it gives way to no other while this lives.
struct Running {
    weights: Weak<Weights>,
    set: Arc<WeightSet>,
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").field("set", &self.set.id).finish_non_exhaustive()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(weights) = self.weights.upgrade() {
            weights.lock().table.end_run(self.set.id);
        }
    }
}

impl Weights {
    /// The set that is published under `name`.
    pub(in crate::broker) fn published_model(self: &Arc<Self>, name: &str) -> Option<PublishedModel> {
        let (id, content) = self.lock().table.published(name).map(|known| (known.set.id, known.set.content))?;
        Some(PublishedModel {
            weights: Arc::downgrade(self),
            id,
            content,
            name: name.to_owned(),
            opened: Arc::default(),
        })
    }
}

impl PublishedModel {
    pub(in crate::broker) fn name(&self) -> &str {
        &self.name
    }

    pub(in crate::broker) fn id(&self) -> WeightSetId {
        self.id
    }

    /// What its tensors contain.
    pub(in crate::broker) fn content(&self) -> ContentDigest {
        self.content
    }

    pub(in crate::broker) fn is_same(&self, other: &Self) -> bool {
        self.id == other.id
    }

    /// Whether the name means another set by now, or none.
    pub(in crate::broker) fn is_outdated(&self) -> bool {
        let now = self.weights.upgrade().and_then(|weights| Some(weights.lock().table.published(&self.name)?.set.id));
        now != Some(self.id)
    }

    /// The tensors, where they lie. They are held, as by a session, until the value goes.
    ///
    /// # Errors
    /// [`ModelError::Changed`] where the name means another set by now, or none; as [`ModelFile::in_memory`].
    pub(in crate::broker) fn open(&self) -> Result<Arc<ModelFile>, ModelError> {
        let changed = || ModelError::Changed { path: self.name.clone().into() };
        let weights = self.weights.upgrade().ok_or_else(changed)?;
        let set = weights.lock().table.begin_run(self.id, &self.name).ok_or_else(changed)?;
        let running = Arc::new(Running { weights: self.weights.clone(), set: Arc::clone(&set) });
        let mut opened = self.opened.lock();
        if let Some(same) = opened.upgrade() {
            return Ok(same);
        }
        let region = &set.memory.region;
        let span = Span::new(Arc::clone(region), 0, region.size_bytes())?;
        let file = Arc::new(ModelFile::in_memory(&self.name, &set.plan, span, running)?);
        *opened = Arc::downgrade(&file);
        Ok(file)
    }
}
