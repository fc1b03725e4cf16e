use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

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

/// How soon a job that was not ready is asked again at first, and at the latest: the pause doubles from one to the other.
const FIRST_PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);

/// A job whose turn has come, if it is ready.
#[derive(Debug, PartialEq, Eq)]
pub struct Turn<J> {
    /// The job.
    pub entry: Entry<J>,
    /// Its number in the order of arrival.
    arrival: u64,
    /// Since its first turn for which it was not ready.
    unready: Option<Unready>,
    /// When its session was served before this turn.
    served_before: Option<u64>,
}

impl<J> Turn<J> {
    /// Whether the job has not been asked before whether it is ready.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.unready.is_none()
    }
}

/// A job that was not ready for as long as its queue has patience.
#[derive(Debug, PartialEq, Eq)]
pub struct Overdue<J> {
    /// The job.
    pub entry: Entry<J>,
    /// How long it was not ready.
    pub waited: Duration,
}

/// When a job that was not ready is asked again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Unready {
    since: Instant,
    pause: Duration,
    again: Instant,
}

/// What the queue gives out.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<J> {
    /// Run this, or [set it aside](Queue::set_aside) where it is not ready.
    Run(Turn<J>),
    /// Its caller has stopped waiting: answer it, do not run it.
    Expired(Entry<J>),
    /// Nothing waits but jobs that were not ready: ask again then, or with the next arrival.
    Later(Instant),
}

/// A bounded queue of jobs. One that is not ready when its turn comes keeps its place, holds nobody up and keeps nobody out.
#[derive(Debug)]
pub struct Queue<J> {
    policy: Policy,
    capacity: usize,
    /// How long a job may be not ready; `None` for as long as it takes.
    patience: Option<Duration>,
    /// In order of arrival.
    waiting: VecDeque<Turn<J>>,
    arrivals: u64,
    /// When each session was last served, as a count of services; for sessions not yet forgotten.
    served: HashMap<SessionId, u64>,
    services: u64,
}

impl<J> Queue<J> {
    /// An empty queue that holds up to `capacity` jobs beside those that were set aside.
    #[must_use]
    pub fn new(policy: Policy, capacity: usize) -> Self {
        let (waiting, served) = (VecDeque::new(), HashMap::new());
        Self { policy, capacity, patience: None, waiting, arrivals: 0, served, services: 0 }
    }

    /// Gives up a job that is not ready for so long after its turn first came. By default none is.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = Some(patience);
        self
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

    /// Most jobs that may wait for their first turn. Those that were [set aside](Queue::set_aside) take nobody's place:
    /// their callers' own limits bound them.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Adds a job at the end.
    ///
    /// # Errors
    /// The entry itself where the queue is full; nothing changes then.
    pub fn push(&mut self, entry: Entry<J>) -> Result<(), Entry<J>> {
        let set_aside = self.waiting.iter().filter(|turn| turn.unready.is_some()).count();
        if self.waiting.len() - set_aside >= self.capacity {
            return Err(entry);
        }
        self.arrivals += 1;
        let (arrival, served_before) = (self.arrivals, None);
        self.waiting.push_back(Turn { entry, arrival, unready: None, served_before });
        Ok(())
    }

    /// The next job; `None` where nothing waits.
    pub fn pop(&mut self, now: Instant) -> Option<Next<J>> {
        let due = |turn: &Turn<J>| turn.unready.is_none_or(|unready| unready.again <= now);
        let Some(at) = self.first(due) else {
            let unready = self.waiting.iter().filter_map(|turn| turn.unready);
            return unready.map(|unready| unready.again).min().map(Next::Later);
        };
        let mut turn = self.waiting.remove(at)?;
        if turn.entry.deadline.is_some_and(|deadline| deadline <= now) {
            return Some(Next::Expired(turn.entry));
        }
        turn.served_before = self.serve(turn.entry.session);
        Some(Next::Run(turn))
    }

    /// Takes up to `most` further jobs that go with one whose turn has come, in the order of the policy; of each session none
    /// before one that came earlier. Their sessions were served then.
    pub fn take_along(&mut self, most: usize, now: Instant, goes_along: impl Fn(&J) -> bool) -> Vec<Entry<J>> {
        let mut taken = Vec::new();
        while taken.len() < most {
            let due = |turn: &Turn<J>| {
                let is_asked = turn.unready.is_none_or(|unready| unready.again <= now);
                is_asked
                    && turn.entry.deadline.is_none_or(|deadline| deadline > now)
                    && goes_along(&turn.entry.job)
                    && self.is_its_sessions_first(turn)
            };
            let Some(at) = self.first(due) else { break };
            let Some(turn) = self.waiting.remove(at) else { break };
            self.serve(turn.entry.session);
            taken.push(turn.entry);
        }
        taken
    }

    fn is_its_sessions_first(&self, turn: &Turn<J>) -> bool {
        let first = self.waiting.iter().find(|other| other.entry.session == turn.entry.session);
        first.is_some_and(|first| first.arrival == turn.arrival)
    }

    /// Which of the waiting jobs that may goes first.
    fn first(&self, may: impl Fn(&Turn<J>) -> bool) -> Option<usize> {
        match self.policy {
            Policy::Fifo => self.waiting.iter().position(may),
            Policy::FairBySession => {
                let last_served = |turn: &Turn<J>| self.served.get(&turn.entry.session).copied().unwrap_or(0);
                let may = self.waiting.iter().enumerate().filter(|(_, turn)| may(turn));
                // `min_by_key` keeps the first of equals: order of arrival decides.
                may.min_by_key(|(_, turn)| last_served(turn)).map(|(at, _)| at)
            }
        }
    }

    /// Notes that a session is served now; when it was before.
    fn serve(&mut self, session: SessionId) -> Option<u64> {
        if self.policy == Policy::Fifo {
            return None;
        }
        self.services += 1;
        self.served.insert(session, self.services)
    }

    /// Takes a turn back into its place, as its job is not ready: jobs behind it go first until it is. It no longer counts
    /// against the capacity, so that there is always room for it.
    ///
    /// # Errors
    /// The entry itself where it was not ready for as long as the queue has patience.
    pub fn set_aside(&mut self, mut turn: Turn<J>, now: Instant) -> Result<(), Overdue<J>> {
        // Its session was not served.
        match (self.policy, turn.served_before.take()) {
            (Policy::Fifo, _) => {}
            (Policy::FairBySession, Some(before)) => _ = self.served.insert(turn.entry.session, before),
            (Policy::FairBySession, None) => _ = self.served.remove(&turn.entry.session),
        }
        let (since, pause) = match turn.unready {
            Some(Unready { since, pause, .. }) => (since, (2 * pause).min(LONGEST_PAUSE)),
            None => (now, FIRST_PAUSE),
        };
        let waited = now.saturating_duration_since(since);
        if self.patience.is_some_and(|patience| waited >= patience) {
            return Err(Overdue { entry: turn.entry, waited });
        }
        turn.unready = Some(Unready { since, pause, again: now + pause });
        let at = self.waiting.partition_point(|other| other.arrival < turn.arrival);
        self.waiting.insert(at, turn);
        Ok(())
    }

    /// Takes a waiting job back.
    pub fn cancel(&mut self, session: SessionId, request: RequestId) -> Option<Entry<J>> {
        let is_meant = |turn: &Turn<J>| turn.entry.session == session && turn.entry.request == request;
        let at = self.waiting.iter().position(is_meant)?;
        self.waiting.remove(at).map(|turn| turn.entry)
    }

    /// Takes back everything of a session that is over, and forgets it.
    pub fn end_session(&mut self, session: SessionId) -> Vec<Entry<J>> {
        self.served.remove(&session);
        let is_theirs = |turn: &Turn<J>| turn.entry.session == session;
        let (theirs, others): (VecDeque<_>, _) = self.waiting.drain(..).partition(is_theirs);
        self.waiting = others;
        theirs.into_iter().map(|turn| turn.entry).collect()
    }

    /// Takes back everything.
    pub fn drain(&mut self) -> Vec<Entry<J>> {
        self.waiting.drain(..).map(|turn| turn.entry).collect()
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
