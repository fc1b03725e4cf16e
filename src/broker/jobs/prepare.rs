use std::fmt;
use std::sync::Arc;

use super::super::entry::ModelEntry;
use crate::error::{Error, ErrorKind};

/// Has a lane load a model for somebody else than a client.
pub(in crate::broker) struct PrepareJob {
    pub(in crate::broker) model: Arc<ModelEntry>,
    /// Called once, on any thread.
    pub(in crate::broker) done: Box<dyn FnOnce(Result<(), Error>) + Send>,
}

impl fmt::Debug for PrepareJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrepareJob").field("model", &self.model.id()).finish_non_exhaustive()
    }
}

impl PrepareJob {
    /// Nothing is loaded.
    pub(super) fn refuse(self) {
        let message = "the model's lane has no room to load it, or is stopping";
        (self.done)(Err(Error::new(ErrorKind::Busy, message, "send the request again after a pause")));
    }
}
