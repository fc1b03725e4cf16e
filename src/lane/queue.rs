use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use crate::id::{RequestId, SessionId};

/// Who goes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Strictly in order of arrival.
    Fifo,
    /// The session that was served longest ago; in order of arrival within a session.
    FairBySession,
}

/// One waiting job.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry<J> {
    /// Whose it is.
    pub session: SessionId,
    /// Which of the session's requests it is.
    pub request: RequestId,
    /// When its caller stops waiting.
    pub deadline: Option<Instant>,
    /// The work.
    pub job: J,
}

/// What the queue gives out.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<J> {
    /// Run this.
    Run(Entry<J>),
    /// Its caller has stopped waiting: answer it, do not run it.
    Expired(Entry<J>),
}

/// A bounded queue of jobs.
#[derive(Debug)]
pub struct Queue<J> {
    policy: Policy,
    capacity: usize,
    /// In order of arrival.
    waiting: VecDeque<Entry<J>>,
    /// When each session was last served, as a count of services; for sessions not yet forgotten.
    served: HashMap<SessionId, u64>,
    services: u64,
}

impl<J> Queue<J> {
    /// An empty queue that holds up to `capacity` jobs.
    #[must_use]
    pub fn new(policy: Policy, capacity: usize) -> Self {
        Self { policy, capacity, waiting: VecDeque::new(), served: HashMap::new(), services: 0 }
    }

    /// Jobs waiting.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Most jobs that may wait.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Adds a job at the end.
    ///
    /// # Errors
    /// The entry itself where the queue is full; nothing changes then.
    pub fn push(&mut self, entry: Entry<J>) -> Result<(), Entry<J>> {
        if self.waiting.len() >= self.capacity {
            return Err(entry);
        }
        self.waiting.push_back(entry);
        Ok(())
    }

    /// The next job; `None` where nothing waits.
    pub fn pop(&mut self, now: Instant) -> Option<Next<J>> {
        let at = match self.policy {
            Policy::Fifo => 0,
            Policy::FairBySession => {
                let last_served = |entry: &Entry<J>| self.served.get(&entry.session).copied().unwrap_or(0);
                // `min_by_key` keeps the first of equals: order of arrival decides.
                self.waiting.iter().enumerate().min_by_key(|(_, entry)| last_served(entry)).map(|(at, _)| at)?
            }
        };
        let entry = self.waiting.remove(at)?;
        if entry.deadline.is_some_and(|deadline| deadline <= now) {
            return Some(Next::Expired(entry));
        }
        if self.policy == Policy::FairBySession {
            self.services += 1;
            self.served.insert(entry.session, self.services);
        }
        Some(Next::Run(entry))
    }

    /// Takes a waiting job back.
    pub fn cancel(&mut self, session: SessionId, request: RequestId) -> Option<Entry<J>> {
        let at = self.waiting.iter().position(|entry| entry.session == session && entry.request == request)?;
        self.waiting.remove(at)
    }

    /// Takes back everything of a session that is over, and forgets it.
    pub fn end_session(&mut self, session: SessionId) -> Vec<Entry<J>> {
        self.served.remove(&session);
        let (theirs, others): (VecDeque<_>, _) = self.waiting.drain(..).partition(|entry| entry.session == session);
        self.waiting = others;
        theirs.into()
    }

    /// Takes back everything.
    pub fn drain(&mut self) -> Vec<Entry<J>> {
        self.waiting.drain(..).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn entry(session: u64, request: u64) -> Entry<()> {
        Entry { session: SessionId(session), request: RequestId(request), deadline: None, job: () }
    }

    fn run(queue: &mut Queue<()>, now: Instant) -> Option<(u64, u64)> {
        match queue.pop(now)? {
            Next::Run(entry) => Some((entry.session.0, entry.request.0)),
            Next::Expired(_) => None,
        }
    }

    #[test]
    fn a_full_queue_gives_the_job_back() {
        let mut queue = Queue::new(Policy::Fifo, 1);
        queue.push(entry(1, 1)).unwrap();
        assert_eq!(queue.push(entry(2, 2)), Err(entry(2, 2)));
        assert_eq!(queue.len(), 1);
    }

    #[test]
    fn a_job_whose_caller_stopped_waiting_is_not_run() {
        let now = Instant::now();
        let mut queue = Queue::new(Policy::Fifo, 4);
        queue.push(Entry { deadline: Some(now), ..entry(1, 1) }).unwrap();
        queue.push(Entry { deadline: Some(now + Duration::from_secs(1)), ..entry(1, 2) }).unwrap();
        assert!(matches!(queue.pop(now), Some(Next::Expired(expired)) if expired.request == RequestId(1)));
        assert_eq!(run(&mut queue, now), Some((1, 2)));
    }

    #[test]
    fn a_session_with_many_jobs_does_not_hold_up_the_others() {
        let now = Instant::now();
        let mut queue = Queue::new(Policy::FairBySession, 16);
        for request in 0..4 {
            queue.push(entry(1, request)).unwrap();
        }
        queue.push(entry(2, 10)).unwrap();
        queue.push(entry(3, 20)).unwrap();
        let order: Vec<_> = std::iter::from_fn(|| run(&mut queue, now)).collect();
        assert_eq!(order, [(1, 0), (2, 10), (3, 20), (1, 1), (1, 2), (1, 3)]);
    }

    #[test]
    fn the_jobs_of_an_ended_session_are_all_taken_back() {
        let mut queue = Queue::new(Policy::Fifo, 16);
        for at in 0..6 {
            queue.push(entry(at % 2, at)).unwrap();
        }
        assert_eq!(queue.end_session(SessionId(1)).len(), 3);
        let now = Instant::now();
        let order: Vec<_> = std::iter::from_fn(|| run(&mut queue, now)).collect();
        assert_eq!(order, [(0, 0), (0, 2), (0, 4)]);
    }

    proptest! {
        /// Against the obvious model: for each job, who should go first by the definition of the policy.
        #[test]
        fn order_is_what_the_policy_says(
            fair: bool,
            steps in prop::collection::vec(prop_oneof![3 => (0u64..4).prop_map(Some), 2 => Just(None)], 0..80),
        ) {
            let now = Instant::now();
            let mut queue = Queue::new(if fair { Policy::FairBySession } else { Policy::Fifo }, 1000);
            let mut naive: Vec<(u64, u64)> = Vec::new();
            let mut history: Vec<u64> = Vec::new();
            for (request, step) in steps.into_iter().enumerate() {
                if let Some(session) = step {
                    queue.push(entry(session, request as u64)).unwrap();
                    naive.push((session, request as u64));
                    continue;
                }
                let expected = if fair {
                    let waited = |session: u64| history.iter().rposition(|&served| served == session);
                    let longest = naive.iter().map(|(session, _)| waited(*session)).min();
                    naive.iter().position(|(session, _)| Some(waited(*session)) == longest)
                } else {
                    (!naive.is_empty()).then_some(0)
                };
                let expected = expected.map(|at| naive.remove(at));
                prop_assert_eq!(run(&mut queue, now), expected);
                history.extend(expected.map(|(session, _)| session));
            }
        }
    }
}
