use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::transport::{Abilities, Attachment, Connection, Peer, Wait};

/// A client's connection as the broker reads it. Clients have no handles to give: what comes is closed at once. Until
/// the session is negotiated, all reads together must be done by a deadline.
#[derive(Debug)]
pub(super) struct Incoming {
    connection: Arc<dyn Connection>,
    /// Absent once the session is negotiated.
    deadline: Option<Instant>,
}

impl Incoming {
    pub(super) fn new(connection: Arc<dyn Connection>, negotiation: Duration) -> Self {
        Self { connection, deadline: Instant::now().checked_add(negotiation) }
    }

    /// The session is negotiated: its client may be silent as long as it likes.
    pub(super) fn negotiated(&mut self) {
        self.deadline = None;
    }
}

impl Connection for Incoming {
    fn peer(&self) -> Peer {
        self.connection.peer()
    }

    fn abilities(&self) -> Abilities {
        self.connection.abilities()
    }

    fn write(&self, parts: &[IoSlice<'_>], attachments: &mut Vec<Attachment>, wait: Wait) -> io::Result<usize> {
        self.connection.write(parts, attachments, wait)
    }

    fn read(&self, target: &mut [u8], _: Option<&mut Vec<Attachment>>, timeout: Option<Duration>) -> io::Result<usize> {
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.connection.read(target, None, left.or(timeout))
    }

    fn close(&self) {
        self.connection.close();
    }
}
