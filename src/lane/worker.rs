use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::queue::{Entry, Next, Queue};
use crate::id::{RequestId, SessionId};

/// Why a job is not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The queue holds as many jobs as it may.
    Full {
        /// That number.
        capacity: usize,
    },
    /// The caller took it back.
    Cancelled,
    /// The caller's deadline passed while it waited.
    Expired,
    /// The session ended.
    SessionEnded,
    /// The lane stops.
    ShuttingDown,
}

/// Work for a lane. Exactly one of the two methods is called, on the lane's thread or on that of whoever refuses.
pub trait Job: Send + 'static {
    /// What the lane's thread owns.
    type Executor;

    /// Does the work and answers it. A panic in here is caught; the lane goes on with the next job.
    fn run(self, executor: &mut Self::Executor, stop: &StopSignal<'_>);

    /// Answers without having done anything.
    fn refuse(self, why: Refusal);
}

/// Tells a running job that nobody waits for it any more.
#[derive(Debug)]
pub struct StopSignal<'a> {
    cancelled: &'a AtomicBool,
    deadline: Option<Instant>,
}

impl StopSignal<'_> {
    /// Whether to stop at the next convenient point.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed) || self.is_late()
    }

    /// Whether the caller's deadline has passed.
    #[must_use]
    pub fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= Instant::now())
    }
}

/// Numbers for `status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneCounts {
    /// Jobs waiting.
    pub queued: usize,
    /// Most jobs that may wait.
    pub capacity: usize,
    /// Whether a job is running.
    pub busy: bool,
    /// Jobs run so far.
    pub completed: u64,
}

#[derive(Debug)]
struct State<J> {
    queue: Queue<J>,
    running: Option<(SessionId, RequestId)>,
    completed: u64,
    open: bool,
}

#[derive(Debug)]
struct Shared<J> {
    state: Mutex<State<J>>,
    arrival: Condvar,
    /// Belongs to the running job; set and cleared under the lock of `state`.
    cancelled: AtomicBool,
}

/// A queue and the one thread that works it off. Dropping the lane shuts it down.
#[derive(Debug)]
pub struct Lane<J: Job> {
    shared: Arc<Shared<J>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl<J: Job> Lane<J> {
    /// Starts the thread. `executor` is made and dropped on it, and never leaves it.
    ///
    /// # Errors
    /// The operating system's, where it cannot start a thread.
    pub fn spawn(
        name: &str,
        queue: Queue<J>,
        executor: impl FnOnce() -> J::Executor + Send + 'static,
    ) -> std::io::Result<Self> {
        let state = State { queue, running: None, completed: 0, open: true };
        let shared =
            Arc::new(Shared { state: Mutex::new(state), arrival: Condvar::new(), cancelled: AtomicBool::new(false) });
        let worker = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let mut executor = executor();
            while let Some(next) = worker.next() {
                worker.work(&mut executor, next);
            }
        })?;
        Ok(Self { shared, thread: Mutex::new(Some(thread)) })
    }

    /// Queues a job, or refuses it at once.
    pub fn submit(&self, entry: Entry<J>) {
        let mut state = self.shared.state.lock();
        let refused = if state.open {
            let capacity = state.queue.capacity();
            state.queue.push(entry).err().map(|entry| (entry, Refusal::Full { capacity }))
        } else {
            Some((entry, Refusal::ShuttingDown))
        };
        drop(state);
        match refused {
            None => _ = self.shared.arrival.notify_one(),
            Some((entry, why)) => entry.job.refuse(why),
        }
    }

    /// Takes a job back: refused if it waits, told to stop if it runs.
    pub fn cancel(&self, session: SessionId, request: RequestId) {
        let mut state = self.shared.state.lock();
        if state.running == Some((session, request)) {
            self.shared.cancelled.store(true, Ordering::Relaxed);
        }
        let waiting = state.queue.cancel(session, request);
        drop(state);
        if let Some(entry) = waiting {
            entry.job.refuse(Refusal::Cancelled);
        }
    }

    /// Takes back all jobs of a session that is over.
    pub fn end_session(&self, session: SessionId) {
        let mut state = self.shared.state.lock();
        if state.running.is_some_and(|(running, _)| running == session) {
            self.shared.cancelled.store(true, Ordering::Relaxed);
        }
        let waiting = state.queue.end_session(session);
        drop(state);
        for entry in waiting {
            entry.job.refuse(Refusal::SessionEnded);
        }
    }

    /// Finishes the running job, refuses the waiting ones, and ends the thread. Repeating it is harmless.
    pub fn shut_down(&self) {
        let mut state = self.shared.state.lock();
        state.open = false;
        let waiting = state.queue.drain();
        drop(state);
        self.shared.arrival.notify_all();
        for entry in waiting {
            entry.job.refuse(Refusal::ShuttingDown);
        }
        let thread = self.thread.lock().take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a lane's executor panicked while it was made or dropped");
        }
    }

    /// Numbers for `status`.
    #[must_use]
    pub fn counts(&self) -> LaneCounts {
        let state = self.shared.state.lock();
        LaneCounts {
            queued: state.queue.len(),
            capacity: state.queue.capacity(),
            busy: state.running.is_some(),
            completed: state.completed,
        }
    }
}

impl<J: Job> Drop for Lane<J> {
    fn drop(&mut self) {
        self.shut_down();
    }
}

impl<J: Job> Shared<J> {
    /// Waits for the next job; `None` when the lane is shut down and empty.
    fn next(&self) -> Option<Next<J>> {
        let mut state = self.state.lock();
        loop {
            if let Some(next) = state.queue.pop(Instant::now()) {
                if let Next::Run(entry) = &next {
                    state.running = Some((entry.session, entry.request));
                    self.cancelled.store(false, Ordering::Relaxed);
                }
                return Some(next);
            }
            if !state.open {
                return None;
            }
            self.arrival.wait(&mut state);
        }
    }

    fn work(&self, executor: &mut J::Executor, next: Next<J>) {
        let entry = match next {
            Next::Expired(entry) => return entry.job.refuse(Refusal::Expired),
            Next::Run(entry) => entry,
        };
        let stop = StopSignal { cancelled: &self.cancelled, deadline: entry.deadline };
        let outcome = catch_unwind(AssertUnwindSafe(|| entry.job.run(executor, &stop)));
        if outcome.is_err() {
            // The job answered while it unwound; the executor keeps no state of a call.
            tracing::error!(session = %entry.session, request = %entry.request, "a job panicked");
        }
        let mut state = self.state.lock();
        state.running = None;
        state.completed += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

    use super::*;
    use crate::lane::Policy;

    /// Says what happened to it; waits for `go` while it runs.
    struct Probe {
        name: u64,
        go: Option<Receiver<()>>,
        tell: Sender<(u64, Result<bool, Refusal>)>,
    }

    impl Job for Probe {
        type Executor = Vec<u64>;

        fn run(self, executor: &mut Vec<u64>, stop: &StopSignal<'_>) {
            self.tell.send((self.name, Ok(stop.is_set()))).unwrap();
            assert_ne!(self.name, 13, "the unlucky job panics");
            if let Some(go) = self.go {
                go.recv().unwrap();
                self.tell.send((self.name, Ok(stop.is_set()))).unwrap();
            }
            executor.push(self.name);
        }

        fn refuse(self, why: Refusal) {
            self.tell.send((self.name, Err(why))).unwrap();
        }
    }

    struct Setup {
        lane: Lane<Probe>,
        go: Sender<()>,
        told: Receiver<(u64, Result<bool, Refusal>)>,
        tell: Sender<(u64, Result<bool, Refusal>)>,
    }

    /// A lane whose first job is running and waits.
    fn occupied(capacity: usize) -> Setup {
        let lane = Lane::spawn("test", Queue::new(Policy::Fifo, capacity), Vec::new).unwrap();
        let (go, wait) = bounded(0);
        let (tell, told) = unbounded();
        let setup = Setup { lane, go, told, tell };
        setup.submit(1, 1, Some(wait), None);
        assert_eq!(setup.told.recv().unwrap(), (1, Ok(false)));
        setup
    }

    impl Setup {
        fn submit(&self, session: u64, name: u64, go: Option<Receiver<()>>, deadline: Option<Instant>) {
            let job = Probe { name, go, tell: self.tell.clone() };
            self.lane.submit(Entry { session: SessionId(session), request: RequestId(name), deadline, job });
        }
    }

    #[test]
    fn a_full_lane_refuses_at_once_while_a_job_runs() {
        let lane = occupied(1);
        lane.submit(1, 2, None, None);
        lane.submit(1, 3, None, None);
        assert_eq!(lane.told.recv().unwrap(), (3, Err(Refusal::Full { capacity: 1 })));
        lane.go.send(()).unwrap();
        assert_eq!(lane.told.recv().unwrap(), (1, Ok(false)));
        assert_eq!(lane.told.recv().unwrap(), (2, Ok(false)));
    }

    #[test]
    fn a_waiting_job_is_cancelled_at_once_and_a_running_one_told() {
        let lane = occupied(4);
        lane.submit(1, 2, None, None);
        lane.lane.cancel(SessionId(1), RequestId(2));
        assert_eq!(lane.told.recv().unwrap(), (2, Err(Refusal::Cancelled)));
        lane.lane.cancel(SessionId(2), RequestId(1));
        lane.lane.cancel(SessionId(1), RequestId(1));
        lane.go.send(()).unwrap();
        assert_eq!(lane.told.recv().unwrap(), (1, Ok(true)));
    }

    #[test]
    fn the_stop_signal_of_one_job_does_not_reach_the_next() {
        let lane = occupied(4);
        lane.submit(1, 2, None, None);
        lane.lane.cancel(SessionId(1), RequestId(1));
        lane.go.send(()).unwrap();
        assert_eq!(lane.told.recv().unwrap(), (1, Ok(true)));
        assert_eq!(lane.told.recv().unwrap(), (2, Ok(false)));
    }

    #[test]
    fn jobs_of_an_ended_session_never_reach_the_executor() {
        let lane = occupied(4);
        lane.submit(7, 2, None, None);
        lane.submit(8, 3, None, None);
        lane.lane.end_session(SessionId(7));
        assert_eq!(lane.told.recv().unwrap(), (2, Err(Refusal::SessionEnded)));
        lane.go.send(()).unwrap();
        assert_eq!(lane.told.recv().unwrap(), (1, Ok(false)));
        assert_eq!(lane.told.recv().unwrap(), (3, Ok(false)));
    }

    #[test]
    fn a_job_that_waited_past_its_deadline_is_answered_and_not_run() {
        let lane = occupied(4);
        lane.submit(1, 2, None, Some(Instant::now().checked_sub(Duration::from_nanos(1)).unwrap()));
        lane.go.send(()).unwrap();
        assert_eq!(lane.told.recv().unwrap(), (1, Ok(false)));
        assert_eq!(lane.told.recv().unwrap(), (2, Err(Refusal::Expired)));
    }

    #[test]
    fn a_panicking_job_does_not_take_the_lane_with_it() {
        let lane = occupied(4);
        lane.submit(1, 13, None, None);
        lane.submit(1, 14, None, None);
        lane.go.send(()).unwrap();
        let told: Vec<_> = (0..3).map(|_| lane.told.recv().unwrap().0).collect();
        assert_eq!(told, [1, 13, 14]);
    }

    #[test]
    fn shutting_down_finishes_the_running_job_and_answers_the_rest() {
        let lane = occupied(4);
        lane.submit(1, 2, None, None);
        std::thread::scope(|scope| {
            scope.spawn(|| lane.lane.shut_down());
            assert_eq!(lane.told.recv().unwrap(), (2, Err(Refusal::ShuttingDown)));
            lane.submit(1, 3, None, None);
            assert_eq!(lane.told.recv().unwrap(), (3, Err(Refusal::ShuttingDown)));
            lane.go.send(()).unwrap();
            assert_eq!(lane.told.recv().unwrap(), (1, Ok(false)));
        });
        assert_eq!(lane.lane.counts().completed, 1);
    }
}
