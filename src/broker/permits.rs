use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};
use parking_lot::Mutex;

use super::responder::Responder;
use crate::error::{ErrorKind, Fault};
use crate::id::{PermitId, SessionId};
use crate::protocol::Outcome;

/// Places in a lane that clients have asked for: work of their own runs there in its turn.
#[derive(Debug, Default)]
pub(super) struct Permits {
    next: AtomicU64,
    open: Mutex<Open>,
    holder: Mutex<Option<SessionId>>,
}

#[derive(Debug, Default)]
struct Open {
    /// Dropping the sender ends the permit.
    places: HashMap<PermitId, (SessionId, Sender<()>)>,
    /// The broker stops: nobody is given a place any more.
    closed: bool,
}

/// A place in a lane: waits like a job, and is the client's while it runs.
#[derive(Debug)]
pub(super) struct PermitJob {
    id: PermitId,
    permits: Arc<Permits>,
    ended: Receiver<()>,
    patience: Duration,
    pub(super) responder: Responder,
}

impl Permits {
    /// A place for whoever asked by `responder`. It ends by itself after `patience` from its turn on.
    pub(super) fn ask(self: &Arc<Self>, responder: Responder, patience: Duration) -> PermitJob {
        let (id, ended) = self.open(responder.session());
        PermitJob { id, permits: Arc::clone(self), ended, patience, responder }
    }

    /// A new place, and what its end shows by; one asked for when the broker stops has ended already.
    fn open(&self, session: SessionId) -> (PermitId, Receiver<()>) {
        let id = PermitId(self.next.fetch_add(1, Ordering::Relaxed) + 1);
        let (end, ended) = bounded(1);
        let mut open = self.open.lock();
        if !open.closed {
            open.places.insert(id, (session, end));
        }
        (id, ended)
    }

    /// The client gives its place back.
    pub(super) fn end(&self, session: SessionId, permit: PermitId) {
        let mut open = self.open.lock();
        if open.places.get(&permit).is_some_and(|(holder, _)| *holder == session) {
            open.places.remove(&permit);
        }
    }

    pub(super) fn end_session(&self, session: SessionId) {
        self.open.lock().places.retain(|_, (holder, _)| *holder != session);
    }

    /// The broker stops: nobody holds up its lanes, nor does who asks from now on.
    pub(super) fn end_all(&self) {
        let mut open = self.open.lock();
        open.closed = true;
        open.places.clear();
    }

    /// The session that has the lane by a permit now.
    pub(super) fn holder(&self) -> Option<SessionId> {
        *self.holder.lock()
    }
}

impl PermitJob {
    /// Keeps the lane's thread until the client is done.
    pub(super) fn hold(self) {
        let Self { id, permits, ended, patience, mut responder } = self;
        if ended.try_recv() == Err(TryRecvError::Disconnected) {
            let message = "the session ended before its permit came, or the broker is stopping";
            return responder.fail(Fault::new(ErrorKind::ShuttingDown, message, "ask again once the broker is back"));
        }
        let session = responder.session();
        *permits.holder.lock() = Some(session);
        responder.started();
        responder.answer(Outcome::Permitted { permit: id });
        if ended.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!(%session, ?patience, "a permit was not given back in time; the lane goes on");
        }
        *permits.holder.lock() = None;
        permits.end(session, id);
    }

    /// The permit will not come.
    pub(super) fn give_up(self) -> Responder {
        self.permits.end(self.responder.session(), self.id);
        self.responder
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permit_that_is_asked_for_when_the_broker_stops_has_ended() {
        let permits = Permits::default();
        let (_, before) = permits.open(SessionId(1));
        assert_eq!(before.try_recv(), Err(TryRecvError::Empty));
        permits.end_all();
        let (_, after) = permits.open(SessionId(2));
        assert_eq!([before.try_recv(), after.try_recv()], [Err(TryRecvError::Disconnected); 2]);
    }
}
