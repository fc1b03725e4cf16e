use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};
use parking_lot::Mutex;

use super::responder::Responder;
use crate::error::{ErrorKind, Fault};
use crate::id::{PermitId, RequestId, SessionId};
use crate::protocol::Outcome;

/// Places in a lane that clients have asked for: work of their own runs there in its turn.
#[derive(Debug, Default)]
pub(super) struct Permits {
    next: AtomicU64,
    open: Mutex<Open>,
    holder: Mutex<Option<(SessionId, PermitId)>>,
    expired: AtomicU64,
}

#[derive(Debug, Default)]
struct Open {
    permits: HashMap<PermitId, OpenPermit>,
    /// The broker stops: nothing is given any more.
    is_closed: bool,
}

/// A permit that waits or is held.
#[derive(Debug)]
struct OpenPermit {
    session: SessionId,
    request: RequestId,
    /// Dropping it ends the permit.
    _end: Sender<()>,
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
        let id = PermitId(self.next.fetch_add(1, Ordering::Relaxed) + 1);
        let (end, ended) = bounded(1);
        let mut open = self.open.lock();
        if !open.is_closed {
            let (session, request) = (responder.session(), responder.request());
            open.permits.insert(id, OpenPermit { session, request, _end: end });
        }
        drop(open);
        PermitJob { id, permits: Arc::clone(self), ended, patience, responder }
    }

    /// The client gives its place back.
    pub(super) fn end(&self, session: SessionId, permit: PermitId) {
        self.open.lock().permits.retain(|id, open| *id != permit || open.session != session);
    }

    /// The client has given up a request that may have been answered with a permit meanwhile.
    pub(super) fn recall(&self, session: SessionId, request: RequestId) {
        self.open.lock().permits.retain(|_, open| open.session != session || open.request != request);
    }

    pub(super) fn end_session(&self, session: SessionId) {
        self.open.lock().permits.retain(|_, open| open.session != session);
    }

    /// The broker stops: nobody holds up its lanes.
    pub(super) fn end_all(&self) {
        *self.open.lock() = Open { is_closed: true, ..Open::default() };
    }

    /// Permits that were not given back in time.
    pub(super) fn expired(&self) -> u64 {
        self.expired.load(Ordering::Relaxed)
    }

    /// The session that has the lane by a permit now.
    pub(super) fn holder(&self) -> Option<SessionId> {
        (*self.holder.lock()).map(|(session, _)| session)
    }

    /// Whether the session has the lane and has not given it back: what it asks of the lane would wait for itself.
    pub(super) fn is_held_by(&self, session: SessionId) -> bool {
        let holder = *self.holder.lock();
        holder.is_some_and(|(its, permit)| its == session && self.open.lock().permits.contains_key(&permit))
    }
}

impl PermitJob {
    /// Keeps the lane's thread until the client is done.
    pub(super) fn hold(self) {
        let Self { id, permits, ended, patience, mut responder } = self;
        if ended.try_recv() == Err(TryRecvError::Disconnected) {
            // Nobody hears this who has taken the request back or whose session ended.
            let message = "the broker is stopping; the permit did not come";
            return responder.fail(Fault::new(ErrorKind::ShuttingDown, message, "ask again once the broker is back"));
        }
        let session = responder.session();
        *permits.holder.lock() = Some((session, id));
        responder.started();
        responder.answer(Outcome::Permitted { permit: id });
        if ended.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!(%session, ?patience, "a permit was not given back in time; the lane goes on");
            permits.expired.fetch_add(1, Ordering::Relaxed);
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
