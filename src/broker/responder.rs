use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::memories::Memories;
use super::outbox::{Outbox, Payload};
use super::runs::Runs;
use super::state::State;
use crate::error::{Error, ErrorKind, Fault};
use crate::id::{RequestId, SessionId};
use crate::metrics::Metrics;
use crate::protocol::{DeviceRung, Outcome, Phase, Reply, ServerMessage, SessionMachine, Times};
use crate::transport::{Attachment, Peer};

/// The part of a session that lanes and `status` reach.
#[derive(Debug)]
pub(super) struct SessionLink {
    id: SessionId,
    pub(super) peer: Peer,
    pub(super) outbox: Arc<Outbox>,
    pub(super) machine: Mutex<SessionMachine>,
    pub(super) answered: AtomicU64,
    /// The connection is over; GPU memory is kept until the process is.
    pub(super) quarantined: AtomicBool,
    /// Absent until the session is negotiated.
    pub(super) open: std::sync::OnceLock<OpenSession>,
}

/// What negotiation settles.
#[derive(Debug)]
pub(super) struct OpenSession {
    pub(super) name: String,
    pub(super) rung: DeviceRung,
    pub(super) memories: Memories,
    pub(super) runs: Runs,
}

impl SessionLink {
    pub(super) fn new(id: SessionId, peer: Peer, outbox: Arc<Outbox>, in_flight: usize) -> Arc<Self> {
        Arc::new(Self {
            id,
            peer,
            outbox,
            machine: Mutex::new(SessionMachine::new(in_flight)),
            answered: AtomicU64::new(0),
            quarantined: AtomicBool::new(false),
            open: std::sync::OnceLock::new(),
        })
    }

    pub(super) fn id(&self) -> SessionId {
        self.id
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.machine.lock().phase(), Phase::Closed)
    }
}

/// The duty to answer one request. Dropped unanswered, it answers that the job ended without a result.
#[derive(Debug)]
pub(super) struct Responder {
    state: Arc<State>,
    link: Arc<SessionLink>,
    request: RequestId,
    times: Times,
    answered: bool,
}

impl Responder {
    pub(super) fn new(state: &Arc<State>, link: &Arc<SessionLink>, request: RequestId) -> Self {
        let times = Times { enqueued_ns: state.clock.now_ns(), started_ns: 0, finished_ns: 0 };
        Self { state: Arc::clone(state), link: Arc::clone(link), request, times, answered: false }
    }

    pub(super) fn session(&self) -> SessionId {
        self.link.id
    }

    pub(super) fn link(&self) -> &Arc<SessionLink> {
        &self.link
    }

    pub(super) fn request(&self) -> RequestId {
        self.request
    }

    /// Whether the session has ended, so that nobody hears the answer.
    pub(super) fn is_over(&self) -> bool {
        self.link.machine.lock().phase() == Phase::Closed
    }

    /// What the client calls itself.
    pub(super) fn client(&self) -> &str {
        self.link.open.get().map_or("the client", |open| &open.name)
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.state.metrics
    }

    /// The session's runs; `None` before it is negotiated.
    pub(super) fn runs(&self) -> Option<&Runs> {
        self.link.open.get().map(|open| &open.runs)
    }

    /// Execution begins now.
    pub(super) fn started(&mut self) {
        self.times.started_ns = self.state.clock.now_ns();
    }

    /// Execution ended now.
    pub(super) fn finished(&mut self) {
        self.times.finished_ns = self.state.clock.now_ns();
    }

    pub(super) fn answer(mut self, outcome: Outcome) {
        self.send(outcome, None, Vec::new());
    }

    pub(super) fn answer_with_payload(mut self, outcome: Outcome, payload: Payload) {
        self.send(outcome, Some(payload), Vec::new());
    }

    /// Answers with handles beside the message, of which the outcome speaks.
    pub(super) fn answer_with_handles(mut self, outcome: Outcome, handles: Vec<Attachment>) {
        self.send(outcome, None, handles);
    }

    /// As [`Responder::answer_with_handles`], with bytes behind the message.
    pub(super) fn answer_with(mut self, outcome: Outcome, payload: Option<Payload>, handles: Vec<Attachment>) {
        self.send(outcome, payload, handles);
    }

    pub(super) fn fail(self, error: impl Into<Error>) {
        let fault = error.into().into_fault();
        tracing::debug!(session = %self.link.id, request = %self.request, %fault, "request failed");
        self.answer(Outcome::Fault(fault));
    }

    pub(super) fn settle(self, result: Result<Outcome, Error>) {
        match result {
            Ok(outcome) => self.answer(outcome),
            Err(error) => self.fail(error),
        }
    }

    fn send(&mut self, outcome: Outcome, payload: Option<Payload>, mut handles: Vec<Attachment>) {
        self.answered = true;
        if self.times.finished_ns == 0 {
            self.times.finished_ns = self.state.clock.now_ns();
            if self.times.started_ns == 0 {
                self.times.started_ns = self.times.finished_ns;
            }
        }
        self.state.metrics.requests.inc();
        if matches!(outcome, Outcome::Fault(_)) {
            self.state.metrics.faults.inc();
        }
        self.link.answered.fetch_add(1, Ordering::Relaxed);
        // Before the answer is out: the client may use the id again as soon as it has read it.
        self.link.machine.lock().answered(self.request);
        let (id, times) = (self.request, self.times);
        let memories = self.link.open.get().map(|open| &open.memories);
        self.link.outbox.post(payload, |attachments| {
            let mut announce = |lease| memories.and_then(|memories| memories.announce(lease, attachments));
            let arenas = outcome.leased().filter_map(|descriptor| announce(descriptor.lease)).collect();
            attachments.append(&mut handles);
            ServerMessage::Reply(Reply { id, times, arenas, outcome })
        });
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if !self.answered {
            let message =
                "the executor stopped in the middle of this request; the model and all other requests are intact";
            let remedy = "send it again; if it fails again, the broker's log has the cause";
            self.send(Outcome::Fault(Fault::new(ErrorKind::Internal, message, remedy)), None, Vec::new());
        }
    }
}
