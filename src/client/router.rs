use std::thread::Thread;

use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use super::tensor::PooledBytes;
use crate::error::Fault;
use crate::id::RequestId;
use crate::protocol::Reply;
use crate::transport::Attachment;

/// A reply with the bytes that came behind it.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) reply: Reply,
    pub(super) payload: Option<PooledBytes>,
    /// What travelled beside it, arenas left out.
    pub(super) handles: Vec<Attachment>,
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
    waiting: FxHashMap<RequestId, Waiting>,
    reading: bool,
    lost: Option<Fault>,
}

#[derive(Debug)]
struct Waiting {
    thread: Thread,
    answer: Option<Box<Answer>>,
}

impl State {
    fn wake_a_reader(&self) {
        if let Some(next) = self.waiting.values().find(|waiting| waiting.answer.is_none()) {
            next.thread.unpark();
        }
    }
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

    /// The caller that was told to read has what it waited for, or gives up: another waiting caller takes over.
    pub(super) fn stop_reading(&self, id: RequestId) {
        let mut state = self.state.lock();
        state.waiting.remove(&id);
        state.reading = false;
        state.wake_a_reader();
    }

    /// The caller that was told to read has something else to do for a moment: another waiting caller may read meanwhile.
    pub(super) fn pause_reading(&self, id: RequestId) {
        let mut state = self.state.lock();
        state.reading = false;
        let next = state.waiting.iter().find(|(other, waiting)| **other != id && waiting.answer.is_none());
        if let Some((_, next)) = next {
            next.thread.unpark();
        }
    }

    /// The caller waiting for `id` gives up; its answer, if that came in the same moment. Never makes it the reader.
    pub(super) fn give_up(&self, id: RequestId) -> Option<Box<Answer>> {
        let mut state = self.state.lock();
        let answer = state.waiting.remove(&id).and_then(|waiting| waiting.answer);
        // It may have been woken to read and not have begun.
        if !state.reading {
            state.wake_a_reader();
        }
        answer
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Outcome, Times};

    fn answer(id: u64) -> Answer {
        let reply = Reply { id: RequestId(id), times: Times::default(), arenas: Vec::new(), outcome: Outcome::Done };
        Answer { reply, payload: None, handles: Vec::new() }
    }

    #[test]
    fn a_caller_that_gives_up_never_keeps_the_others_from_reading() {
        let router = Router::default();
        router.expect(RequestId(1)).unwrap();
        router.expect(RequestId(2)).unwrap();
        assert!(matches!(router.turn(RequestId(1)), Turn::Read));
        assert!(matches!(router.turn(RequestId(2)), Turn::Sleep));
        router.stop_reading(RequestId(1));
        assert!(router.give_up(RequestId(2)).is_none());
        router.expect(RequestId(3)).unwrap();
        assert!(matches!(router.turn(RequestId(3)), Turn::Read));
    }

    #[test]
    fn an_answer_that_comes_while_its_caller_gives_up_is_not_lost() {
        let router = Router::default();
        router.expect(RequestId(1)).unwrap();
        assert!(router.deliver(answer(1)).is_none());
        assert!(router.give_up(RequestId(1)).is_some());
        assert!(router.deliver(answer(1)).is_some(), "nobody waits any more: whoever read it disposes of it");
    }

    #[test]
    fn everybody_is_told_that_the_connection_is_gone() {
        let router = Router::default();
        router.expect(RequestId(1)).unwrap();
        router.lose(Fault::new(crate::ErrorKind::ConnectionLost, "gone", ""));
        router.lose(Fault::new(crate::ErrorKind::Internal, "later", ""));
        assert!(matches!(router.turn(RequestId(1)), Turn::Lost(fault) if fault.message == "gone"));
        assert!(router.expect(RequestId(2)).is_err());
    }
}
