use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::memory::Held;
use crate::error::{ErrorKind, Fault};
use crate::protocol::codec::{self, CodecError};
use crate::protocol::{Outcome, Reply, ServerMessage};
use crate::transport::{Attachment, Connection, FrameWriter, Wait, begin_frame, finish_frame};

/// Frames that may wait for a client before nothing more is read from it. Calls in flight are bounded elsewhere; this
/// bounds the answers to what is answered at once.
const MAX_WAITING: usize = 64;
/// Bytes of tables that may wait so: a session's other answers lie in memory that is counted elsewhere.
const MAX_WAITING_TABLES: usize = 64 << 20;

/// One session's way out. Whoever answers writes at once if there is room; what does not fit is left to a thread of
/// the session's own, so that a client that does not read delays nobody else.
#[derive(Debug)]
pub(super) struct Outbox {
    connection: Arc<dyn Connection>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Reused from frame to frame.
    frame: Vec<u8>,
    waiting: VecDeque<Outgoing>,
    writer: Writer,
    closed: bool,
}

/// The thread that writes what did not fit at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Writer {
    /// Not needed so far.
    #[default]
    Absent,
    /// Waits for a frame.
    Idle,
    /// Has a frame in hand, which goes before every other.
    Writing,
}

#[derive(Debug)]
struct Outgoing {
    frame: Vec<u8>,
    attachments: Vec<Attachment>,
    payload: Option<Payload>,
    progress: FrameWriter,
}

/// Bytes that follow a message.
#[derive(Debug)]
pub(super) enum Payload {
    /// Straight from the slot they were computed in.
    Slot { held: Held, length: usize },
    /// A table that is sent to everybody who asks.
    Table(Arc<[u8]>),
}

impl State {
    fn table_bytes(&self) -> usize {
        let tables = self.waiting.iter().filter_map(|outgoing| match &outgoing.payload {
            Some(Payload::Table(table)) => Some(table.len()),
            _ => None,
        });
        tables.sum()
    }
}

impl Payload {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Slot { held, length } => held.span().bytes(*length).unwrap_or_default(),
            Self::Table(bytes) => bytes,
        }
    }
}

impl Outbox {
    pub(super) fn new(connection: Arc<dyn Connection>) -> Arc<Self> {
        Arc::new(Self { connection, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Sends what `message` makes, with `payload` behind it. `message` runs when the frame's place in the order of
    /// frames is settled. What is sent to a client that is gone is dropped.
    pub(super) fn post(
        self: &Arc<Self>,
        payload: Option<Payload>,
        message: impl FnOnce(&mut Vec<Attachment>) -> ServerMessage,
    ) {
        let mut state = self.state.lock();
        if state.closed {
            return;
        }
        let mut attachments = Vec::new();
        let message = message(&mut attachments);
        let mut frame = std::mem::take(&mut state.frame);
        begin_frame(&mut frame);
        if let Err(error) = encode(message, &mut frame) {
            tracing::error!(%error, "a message could not be encoded; the session ends");
            state.closed = true;
            self.connection.close();
            drop(state);
            self.changed.notify_all();
            return;
        }
        finish_frame(&mut frame, payload.as_ref().map_or(0, |payload| payload.bytes().len() as u64));
        let mut progress = FrameWriter::default();
        let idle = state.waiting.is_empty() && state.writer != Writer::Writing;
        if idle {
            let bytes = payload.as_ref().map(Payload::bytes).unwrap_or_default();
            match progress.write(&*self.connection, &frame, bytes, &mut attachments, Wait::Never) {
                Ok(true) => {
                    state.frame = frame;
                    return;
                }
                Ok(false) => {}
                Err(_) => {
                    state.closed = true;
                    self.connection.close();
                    return;
                }
            }
        }
        state.waiting.push_back(Outgoing { frame, attachments, payload, progress });
        if state.writer == Writer::Absent {
            state.writer = Writer::Idle;
            self.start_writer(&mut state);
        }
        drop(state);
        self.changed.notify_all();
    }

    fn start_writer(self: &Arc<Self>, state: &mut State) {
        let outbox = Arc::clone(self);
        let started = std::thread::Builder::new().name("luna-outbox".to_owned()).spawn(move || outbox.write_waiting());
        if let Err(error) = started {
            tracing::error!(%error, "no thread for a slow client's replies; the session ends");
            state.closed = true;
            self.connection.close();
        }
    }

    fn write_waiting(&self) {
        let mut state = self.state.lock();
        loop {
            if state.closed {
                state.waiting.clear();
                return;
            }
            let Some(mut next) = state.waiting.pop_front() else {
                self.changed.wait(&mut state);
                continue;
            };
            state.writer = Writer::Writing;
            drop(state);
            let bytes = next.payload.as_ref().map(Payload::bytes).unwrap_or_default();
            let written =
                next.progress.write(&*self.connection, &next.frame, bytes, &mut next.attachments, Wait::Block);
            drop(next);
            state = self.state.lock();
            state.writer = Writer::Idle;
            if let Err(error) = written {
                tracing::warn!(%error, "a client does not take its replies; the session ends");
                state.closed = true;
                self.connection.close();
            }
            self.changed.notify_all();
        }
    }

    /// Waits until the client has taken so much of what was posted that it may be listened to again.
    pub(super) fn wait_for_room(&self) {
        let mut state = self.state.lock();
        while !state.closed && (state.waiting.len() >= MAX_WAITING || state.table_bytes() >= MAX_WAITING_TABLES) {
            self.changed.wait(&mut state);
        }
    }

    /// Waits until everything posted is written, at most until `deadline`.
    pub(super) fn flush(&self, deadline: Instant) {
        let mut state = self.state.lock();
        while !state.closed && (!state.waiting.is_empty() || state.writer == Writer::Writing) {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return;
            }
        }
    }

    /// Ends the connection, which ends the session that reads from it.
    pub(super) fn hang_up(&self) {
        self.close();
        self.connection.close();
    }

    /// Drops what was not written and ends the writing thread.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_all();
    }
}

/// Encodes `message`; a reply that is longer than messages may be becomes one that says so.
///
/// # Errors
/// As [`codec::encode`].
fn encode(message: ServerMessage, frame: &mut Vec<u8>) -> Result<(), CodecError> {
    let encoded = match &message {
        ServerMessage::Reply(_) | ServerMessage::Closing => codec::encode(&message, frame),
        // Said before a version is agreed on, or because it cannot be.
        ServerMessage::Welcome(_) | ServerMessage::Accepted(_) | ServerMessage::Refused(_) => {
            codec::encode_named(&message, frame)
        }
    };
    match (encoded, message) {
        (Err(CodecError::TooLong { length }), ServerMessage::Reply(reply)) => {
            let what = format!("the answer of {length} bytes is longer than messages may be");
            let fault = Fault::new(ErrorKind::Unsupported, what, "serve fewer models or sessions from one broker");
            codec::encode(&ServerMessage::Reply(Reply { outcome: Outcome::Fault(fault), ..reply }), frame)
        }
        (encoded, _) => encoded,
    }
}
