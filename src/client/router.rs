use std::collections::HashMap;
use std::thread::Thread;

use parking_lot::Mutex;

use super::tensor::PooledBytes;
use crate::error::Fault;
use crate::id::RequestId;
use crate::protocol::Reply;

/// A reply with the bytes that came behind it.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) reply: Reply,
    pub(super) payload: Option<PooledBytes>,
}

/// What a waiting caller does next.
pub(super) enum Turn {
    /// Its answer is here.
    Answered(Box<Answer>),
    /// The connection is gone.
    Lost(Fault),
    /// Nobody reads the connection: it does, for everybody, until its own answer comes.
    Read,
    /// Somebody else reads: it sleeps until woken.
    Sleep,
}

/// Brings replies to their callers without a thread of its own: one of the waiting callers reads for all.
#[derive(Debug, Default)]
pub(super) struct Router {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    waiting: HashMap<RequestId, Waiting>,
    reading: bool,
    lost: Option<Fault>,
}

#[derive(Debug)]
struct Waiting {
    thread: Thread,
    answer: Option<Box<Answer>>,
}

impl Router {
    /// The calling thread will wait for an answer to `id`.
    ///
    /// # Errors
    /// Why the connection is gone, if it is.
    pub(super) fn expect(&self, id: RequestId) -> Result<(), Fault> {
        let mut state = self.state.lock();
        if let Some(fault) = &state.lost {
            return Err(fault.clone());
        }
        state.waiting.insert(id, Waiting { thread: std::thread::current(), answer: None });
        Ok(())
    }

    /// What the caller waiting for `id` does next.
    pub(super) fn turn(&self, id: RequestId) -> Turn {
        let mut state = self.state.lock();
        if let Some(answer) = state.waiting.get_mut(&id).and_then(|waiting| waiting.answer.take()) {
            state.waiting.remove(&id);
            return Turn::Answered(answer);
        }
        if let Some(fault) = state.lost.clone() {
            state.waiting.remove(&id);
            return Turn::Lost(fault);
        }
        if state.reading {
            return Turn::Sleep;
        }
        state.reading = true;
        Turn::Read
    }

    /// Hands an answer to its caller; gives it back where nobody waits for it any more.
    pub(super) fn deliver(&self, answer: Answer) -> Option<Answer> {
        let mut state = self.state.lock();
        match state.waiting.get_mut(&answer.reply.id) {
            Some(waiting) => {
                waiting.answer = Some(Box::new(answer));
                waiting.thread.unpark();
                None
            }
            None => Some(answer),
        }
    }

    /// The caller waiting for `id` stops reading and waiting; another waiting caller takes over.
    pub(super) fn leave(&self, id: RequestId, was_reading: bool) {
        let mut state = self.state.lock();
        state.waiting.remove(&id);
        if was_reading {
            state.reading = false;
            if let Some(next) = state.waiting.values().find(|waiting| waiting.answer.is_none()) {
                next.thread.unpark();
            }
        }
    }

    /// The connection is gone: everybody is told, now and later. The first reason stays.
    pub(super) fn lose(&self, fault: Fault) {
        let mut state = self.state.lock();
        state.lost.get_or_insert(fault);
        state.reading = false;
        for waiting in state.waiting.values() {
            waiting.thread.unpark();
        }
    }

    pub(super) fn is_lost(&self) -> bool {
        self.state.lock().lost.is_some()
    }
}
