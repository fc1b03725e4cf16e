use rustc_hash::FxHashSet;

use super::message::{ClientMessage, Operation, Release};
use super::negotiate::{Hello, ProbeAnswer};
use crate::error::{Error, ErrorKind};
use crate::id::{ArenaId, AttachmentId, DraftId, PermitId, RequestId, RunId};

/// Where a session is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Connected; the hello is due.
    Connected,
    /// The hello was answered with an arena to probe; the answer is due.
    Probing,
    /// Negotiated: requests are taken.
    Open,
    /// Over: nothing more is taken.
    Closed,
}

/// A well-formed message at the wrong time or with the wrong content. The session ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// The message does not belong to this phase.
    #[error("a {message} message is out of place in phase {phase:?}")]
    OutOfPlace {
        /// What came.
        message: &'static str,
        /// When.
        phase: Phase,
    },
    /// The id names a request that is still in flight.
    #[error("request id {id} is already in flight")]
    DuplicateRequest {
        /// The id.
        id: RequestId,
    },
    /// The peer attached something that was not announced, or did not attach what was.
    #[error("the peer announced {announced} handles and attached {attached}")]
    HandleCount {
        /// Handles the message speaks of.
        announced: usize,
        /// Handles that came.
        attached: usize,
    },
    /// The peer answered with something else than what was asked.
    #[error("the peer answered with an unexpected {message} message")]
    Unexpected {
        /// What came.
        message: &'static str,
    },
}

/// What the broker does about a message.
#[expect(clippy::large_enum_variant, reason = "moved a few times; a box would be an allocation per call")]
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Negotiate, then tell [`SessionMachine::welcomed`] whether a probe was offered.
    Negotiate(Hello),
    /// Settle the probe.
    Settle(ProbeAnswer),
    /// Give back `releases`, then do the work and answer it; [`SessionMachine::answered`] follows.
    Start {
        /// The request.
        id: RequestId,
        /// How long its caller waits.
        timeout_ms: Option<u32>,
        /// Leases to give back first.
        releases: Vec<Release>,
        /// The work.
        operation: Operation,
    },
    /// Give back `releases` and answer that the session has `limit` requests in flight already.
    Reject {
        /// The request.
        id: RequestId,
        /// Leases to give back.
        releases: Vec<Release>,
        /// The bound.
        limit: usize,
    },
    /// Take the request back if it still waits; it is in flight.
    Cancel(RequestId),
    /// Give back leases.
    Release(Vec<Release>),
    /// End attachments.
    Detach(Vec<AttachmentId>),
    /// Drop a draft.
    Abandon(DraftId),
    /// End a permit.
    EndPermit(PermitId),
    /// End a run.
    CloseRun(RunId),
    /// Take back the permit, the weights, the draft or the run that answered this request: the client has given it up and does not
    /// look at the answer.
    Recall(RequestId),
    /// The arena's name can go.
    Opened(ArenaId),
    /// The client left in order.
    Leave,
}

/// The broker's side of one session: which message may come when, and which requests are in flight.
#[derive(Debug)]
pub struct SessionMachine {
    phase: Phase,
    in_flight: FxHashSet<RequestId>,
    limit: usize,
}

impl SessionMachine {
    /// A new connection that may have up to `limit` requests in flight.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { phase: Phase::Connected, in_flight: FxHashSet::default(), limit }
    }

    /// Where the session is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Requests not yet answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// What to do about `message`.
    ///
    /// # Errors
    /// [`ProtocolError`]; the phase is [`Phase::Closed`] afterwards.
    pub fn receive(&mut self, message: ClientMessage) -> Result<Action, ProtocolError> {
        let action = self.step(message);
        if action.is_err() {
            self.phase = Phase::Closed;
        }
        action
    }

    fn step(&mut self, message: ClientMessage) -> Result<Action, ProtocolError> {
        match (self.phase, message) {
            (Phase::Connected, ClientMessage::Hello(hello)) => Ok(Action::Negotiate(hello)),
            (Phase::Probing, ClientMessage::Probed(answer)) => {
                self.phase = Phase::Open;
                Ok(Action::Settle(answer))
            }
            (Phase::Open, ClientMessage::Request(request)) => {
                if self.in_flight.contains(&request.id) {
                    return Err(ProtocolError::DuplicateRequest { id: request.id });
                }
                if self.in_flight.len() >= self.limit {
                    return Ok(Action::Reject { id: request.id, releases: request.releases, limit: self.limit });
                }
                self.in_flight.insert(request.id);
                Ok(Action::Start {
                    id: request.id,
                    timeout_ms: request.timeout_ms,
                    releases: request.releases,
                    operation: request.operation,
                })
            }
            // The answer may have crossed the cancel.
            (Phase::Open, ClientMessage::Cancel { id }) if self.in_flight.contains(&id) => Ok(Action::Cancel(id)),
            (Phase::Open, ClientMessage::Cancel { id }) => Ok(Action::Recall(id)),
            (Phase::Open, ClientMessage::Release(leases)) => Ok(Action::Release(leases)),
            (Phase::Open | Phase::Probing, ClientMessage::Opened { arena }) => Ok(Action::Opened(arena)),
            (Phase::Open, ClientMessage::Detach(attachments)) => Ok(Action::Detach(attachments)),
            (Phase::Open, ClientMessage::Abandon { draft }) => Ok(Action::Abandon(draft)),
            (Phase::Open, ClientMessage::EndPermit { permit }) => Ok(Action::EndPermit(permit)),
            (Phase::Open, ClientMessage::CloseRun { run }) => Ok(Action::CloseRun(run)),
            (Phase::Open, ClientMessage::Goodbye) => {
                self.phase = Phase::Closed;
                Ok(Action::Leave)
            }
            (phase, message) => Err(ProtocolError::OutOfPlace { message: message.name(), phase }),
        }
    }

    /// The hello was answered; with an arena to probe or without.
    pub fn welcomed(&mut self, probing: bool) {
        if self.phase == Phase::Connected {
            self.phase = if probing { Phase::Probing } else { Phase::Open };
        }
    }

    /// The request was answered: its id may be used again.
    pub fn answered(&mut self, id: RequestId) {
        self.in_flight.remove(&id);
    }

    /// The session is over.
    pub fn close(&mut self) {
        self.phase = Phase::Closed;
    }
}

impl ClientMessage {
    /// The message's name in errors and logs.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Probed(_) => "probed",
            Self::Request(_) => "request",
            Self::Cancel { .. } => "cancel",
            Self::Release(_) => "release",
            Self::Opened { .. } => "opened",
            Self::Detach(_) => "detach",
            Self::EndPermit { .. } => "end-permit",
            Self::Abandon { .. } => "abandon",
            Self::CloseRun { .. } => "close-run",
            Self::Goodbye => "goodbye",
        }
    }
}

impl super::ServerMessage {
    /// The message's name in errors and logs.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Welcome(_) => "welcome",
            Self::Accepted(_) => "accepted",
            Self::Refused(_) => "refused",
            Self::Reply(_) => "reply",
            Self::Closing => "closing",
        }
    }
}

impl From<ProtocolError> for Error {
    fn from(error: ProtocolError) -> Self {
        Self::caused(ErrorKind::Protocol, "", error)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::protocol::message::Request;
    use crate::protocol::negotiate::{Features, ProbeOutcome};

    fn hello() -> ClientMessage {
        ClientMessage::Hello(Hello {
            version: 1,
            features: Features(0),
            name: String::new(),
            pid: 0,
            gpus: Vec::new(),
            forced: None,
        })
    }

    fn ping(id: u64) -> ClientMessage {
        let operation = Operation::Ping;
        ClientMessage::Request(Request { id: RequestId(id), timeout_ms: None, releases: Vec::new(), operation })
    }

    fn open(limit: usize) -> SessionMachine {
        let mut machine = SessionMachine::new(limit);
        machine.receive(hello()).unwrap();
        machine.welcomed(false);
        machine
    }

    #[test]
    fn requests_before_the_probe_is_settled_end_the_session() {
        let mut machine = SessionMachine::new(4);
        machine.receive(hello()).unwrap();
        machine.welcomed(true);
        assert!(matches!(machine.receive(ping(1)), Err(ProtocolError::OutOfPlace { phase: Phase::Probing, .. })));
        assert_eq!(machine.phase(), Phase::Closed);
        let answer = ProbeAnswer { outcome: ProbeOutcome::Failed(String::new()) };
        assert!(machine.receive(ClientMessage::Probed(answer)).is_err(), "a closed session takes nothing more");
    }

    #[test]
    fn an_id_is_free_again_only_when_answered() {
        let mut machine = open(4);
        machine.receive(ping(1)).unwrap();
        machine.answered(RequestId(1));
        machine.receive(ping(1)).unwrap();
        assert_eq!(machine.receive(ping(1)), Err(ProtocolError::DuplicateRequest { id: RequestId(1) }));
    }

    #[test]
    fn a_cancel_that_crossed_the_answer_takes_back_what_was_answered() {
        let mut machine = open(4);
        machine.receive(ping(1)).unwrap();
        assert_eq!(machine.receive(ClientMessage::Cancel { id: RequestId(1) }), Ok(Action::Cancel(RequestId(1))));
        machine.answered(RequestId(1));
        assert_eq!(machine.receive(ClientMessage::Cancel { id: RequestId(1) }), Ok(Action::Recall(RequestId(1))));
    }

    proptest! {
        /// Against the obvious model: a set of ids.
        #[test]
        fn in_flight_requests_are_exactly_those_started_and_not_answered(
            steps in prop::collection::vec((0u64..6, any::<bool>()), 0..60),
        ) {
            let mut machine = open(4);
            let mut naive = std::collections::BTreeSet::new();
            for (id, answer) in steps {
                if answer {
                    machine.answered(RequestId(id));
                    naive.remove(&id);
                    continue;
                }
                let full = naive.len() >= 4;
                let fresh = !naive.contains(&id);
                let answer = machine.receive(ping(id));
                if !fresh {
                    prop_assert!(answer.is_err());
                    prop_assert_eq!(machine.phase(), Phase::Closed);
                    return Ok(());
                }
                prop_assert_eq!(matches!(answer, Ok(Action::Start { .. })), !full);
                if !full {
                    naive.insert(id);
                }
                prop_assert_eq!(machine.in_flight(), naive.len());
            }
        }
    }
}
