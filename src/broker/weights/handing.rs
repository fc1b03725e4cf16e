use std::sync::Arc;

use super::super::memory::attach;
use super::super::outbox::Payload;
use super::super::responder::Responder;
use super::loading::{Inner, Weights};
use super::set::{Holder, WeightSet};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{AttachmentId, WeightSetId};
use crate::protocol::{AttachedWeights, Outcome};

/// Somebody who gets a set once it is there.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) responder: Responder,
    /// What the set was asked for by.
    pub(super) name: String,
}

/// A hold on a set that its session does not know of yet.
#[derive(Debug)]
pub(super) struct Grant {
    attachment: AttachmentId,
    set: Arc<WeightSet>,
}

impl Inner {
    /// Attaches a set for whoever asked for it as `name`. In the same step as it was found: what is held gives way to
    /// nobody.
    ///
    /// # Errors
    /// As [`super::table::Table::attach`]; [`ErrorKind::ConnectionLost`] where the session has ended.
    pub(super) fn grant(&mut self, id: WeightSetId, asker: &Responder, name: &str) -> Result<Grant> {
        // A session that ends is closed first and gives everything back then: what is granted before it is closed is
        // found there, and nothing is granted after.
        if asker.is_over() {
            return Err(Error::new(ErrorKind::ConnectionLost, "the session has ended", "connect again"));
        }
        let (attachment, set) =
            self.table.attach(id, Holder { session: asker.session(), request: asker.request() }, name)?;
        Ok(Grant { attachment, set })
    }
}

impl Weights {
    pub(super) fn answer(&self, granted: Result<Grant>, responder: Responder) {
        match granted {
            Ok(grant) => self.hand_over(grant, responder),
            Err(error) => responder.fail(error),
        }
    }

    /// Answers with a set, and with what maps it.
    pub(super) fn hand_over(&self, grant: Grant, responder: Responder) {
        let Grant { attachment, set } = grant;
        let mut handles = Vec::new();
        match set.memory.region.export() {
            Ok(handle) => {
                let handle = attach(handle, &mut handles);
                let size_bytes = set.memory.region.size_bytes() as u64;
                let weights = AttachedWeights { attachment, set: set.id, content: set.content, size_bytes, handle };
                let table = Payload::Table(Arc::clone(&set.table));
                responder.answer_with(Outcome::Attached(Box::new(weights)), Some(table), handles);
            }
            Err(error) => {
                self.lock().table.detach(responder.session(), attachment);
                responder.fail(error);
            }
        }
    }
}
