use std::fmt;
use std::sync::Arc;

use super::super::entry::ModelEntry;
use crate::error::{Error, ErrorKind, Result};

/// Has a lane load a model for somebody else than a client. Dropped unfinished, it says that it ended without a result.
pub(in crate::broker) struct PrepareJob {
    model: Arc<ModelEntry>,
    done: Option<Done>,
}

/// Called once, on any thread.
type Done = Box<dyn FnOnce(Result<()>) + Send>;

impl fmt::Debug for PrepareJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrepareJob").field("model", &self.model.id()).finish_non_exhaustive()
    }
}

impl PrepareJob {
    pub(in crate::broker) fn new(model: Arc<ModelEntry>, done: impl FnOnce(Result<()>) + Send + 'static) -> Self {
        Self { model, done: Some(Box::new(done)) }
    }

    pub(super) fn model(&self) -> &Arc<ModelEntry> {
        &self.model
    }

    pub(super) fn finish(mut self, loaded: Result<()>) {
        if let Some(done) = self.done.take() {
            done(loaded);
        }
    }

    /// Nothing is loaded.
    pub(super) fn refuse(self) {
        let message = "the model's lane has no room to load it, or is stopping";
        self.finish(Err(Error::new(ErrorKind::Busy, message, "send the request again after a pause")));
    }
}

impl Drop for PrepareJob {
    fn drop(&mut self) {
        if let Some(done) = self.done.take() {
            let message = "loading the model ended without a result";
            done(Err(Error::new(ErrorKind::Internal, message, "see the broker's log")));
        }
    }
}
