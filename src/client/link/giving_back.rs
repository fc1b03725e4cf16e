use super::super::router::Answer;
use super::Link;
use crate::error::Result;
use crate::id::{AttachmentId, DraftId, PermitId, RunId};
use crate::protocol::{ClientMessage, Outcome};

impl Link {
    /// Gives back what came with an answer that nobody waits for.
    pub(super) fn dispose(&self, answer: &Answer) {
        for descriptor in answer.reply.outcome.leased() {
            self.memory.leases.give_back(descriptor.lease);
        }
        match answer.reply.outcome {
            Outcome::Attached(ref weights) => self.detach(weights.attachment),
            Outcome::Draft(ref offer) => self.abandon(offer.draft),
            Outcome::Permitted { permit } => self.end_permit(permit),
            Outcome::Run { run, .. } => self.close_run(run),
            _ => {}
        }
    }

    /// Weights are no longer used by this process. Noted here, said by the next message.
    pub(in crate::client) fn detach(&self, attachment: AttachmentId) {
        if !self.opener.is_here() {
            return;
        }
        self.detached.lock().push(attachment);
        self.memory.leases.ring();
    }

    /// A draft will not be filled.
    pub(in crate::client) fn abandon(&self, draft: DraftId) {
        // A connection that is gone has dropped it already.
        if self.opener.is_here() && !self.router.is_lost() {
            _ = self.send(&ClientMessage::Abandon { draft });
        }
    }

    /// A turn in a lane is given back.
    pub(in crate::client) fn end_permit(&self, permit: PermitId) {
        // A connection that is gone has given it back already.
        if self.opener.is_here() && !self.router.is_lost() {
            _ = self.send(&ClientMessage::EndPermit { permit });
        }
    }

    /// A run is over.
    pub(in crate::client) fn close_run(&self, run: RunId) {
        // A connection that is gone has ended it already.
        if self.opener.is_here() && !self.router.is_lost() {
            _ = self.send(&ClientMessage::CloseRun { run });
        }
    }

    /// Gives back attachments. One at a time until they are on their way, so that no request overtakes them.
    pub(super) fn send_detached(&self) -> Result<()> {
        let _detaching = self.detaching.lock();
        let detached = std::mem::take(&mut *self.detached.lock());
        // A connection that is gone has given everything back already.
        match detached {
            given if given.is_empty() || self.router.is_lost() => Ok(()),
            given => self.send(&ClientMessage::Detach(given)),
        }
    }

    /// Gives back leases that no request has taken along, and attachments.
    pub(in crate::client) fn release_now(&self) {
        _ = self.send_detached();
        loop {
            let mut released = Vec::new();
            self.memory.leases.take_released(&mut released);
            // A connection that is gone has given everything back already.
            if released.is_empty() || self.router.is_lost() || self.send(&ClientMessage::Release(released)).is_err() {
                return;
            }
        }
    }
}
