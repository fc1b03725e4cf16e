use std::collections::BTreeSet;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::entry::ModelEntry;
use crate::id::SessionId;

/// Who needs a model, and since when nobody does.
#[derive(Debug)]
pub(super) struct Usage {
    /// Requests that wait for it or run on it, and runs.
    requests: AtomicUsize,
    last: Mutex<Instant>,
    /// Sessions that have asked for it by name since its weights were last given up.
    users: Mutex<BTreeSet<SessionId>>,
}

impl Default for Usage {
    fn default() -> Self {
        Self { requests: AtomicUsize::new(0), last: Mutex::new(Instant::now()), users: Mutex::default() }
    }
}

impl Usage {
    pub(super) fn note_user(&self, session: SessionId) {
        self.users.lock().insert(session);
    }

    pub(super) fn forget_user(&self, session: SessionId) {
        self.users.lock().remove(&session);
    }

    pub(super) fn forget_users(&self) {
        self.users.lock().clear();
    }

    pub(super) fn users(&self) -> usize {
        self.users.lock().len()
    }

    pub(super) fn is_in_use(&self) -> bool {
        self.requests.load(Ordering::Acquire) > 0
    }

    /// When the last request for it ended, or it was recognised.
    pub(super) fn last(&self) -> Instant {
        *self.last.lock()
    }

    /// How long no request has waited for it or run on it; absent while one does.
    pub(super) fn idle(&self) -> Option<Duration> {
        (!self.is_in_use()).then(|| self.last().elapsed())
    }
}

/// A model that a request waits for or runs on, or a run is open for: it gives way to no other.
#[derive(Debug)]
pub(super) struct InUse(Arc<ModelEntry>);

impl InUse {
    /// For a request of `session`'s, which has asked for the model by name.
    pub(super) fn by(session: SessionId, model: Arc<ModelEntry>) -> Self {
        model.usage().note_user(session);
        Self::more(model)
    }

    pub(super) fn entry(&self) -> &Arc<ModelEntry> {
        &self.0
    }

    fn more(model: Arc<ModelEntry>) -> Self {
        model.usage().requests.fetch_add(1, Ordering::AcqRel);
        Self(model)
    }
}

impl Clone for InUse {
    fn clone(&self) -> Self {
        Self::more(Arc::clone(&self.0))
    }
}

impl Deref for InUse {
    type Target = Arc<ModelEntry>;

    fn deref(&self) -> &Arc<ModelEntry> {
        &self.0
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let usage = self.0.usage();
        // In this order: whoever finds that nobody uses it finds since when.
        *usage.last.lock() = Instant::now();
        usage.requests.fetch_sub(1, Ordering::AcqRel);
    }
}
