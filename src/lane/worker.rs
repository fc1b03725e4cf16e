use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::queue::{Entry, Next, Overdue, Queue, Turn};
use crate::id::{RequestId, SessionId};

/// How long a job whose turn comes for the first time is asked again at once. Others go on waiting for that long.
const SPIN: Duration = Duration::from_micros(30);

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
    /// It was not ready when its turn came, nor became so.
    Unready {
        /// How long the lane had patience with it.
        waited: Duration,
    },
    /// The session ended.
    SessionEnded,
    /// The lane stops.
    ShuttingDown,
}

/// Work for a lane. Exactly one of [`Job::run`] and [`Job::refuse`] is called, on the lane's thread or on that of whoever
/// refuses.
pub trait Job: Send + 'static {
    /// What the lane's thread owns.
    type Executor;

    /// Whether it can be run at once. Asked on the lane's thread when the job's turn comes, and again up to a thousand
    /// times a second while it is not: other jobs are run meanwhile. Must not block.
    fn is_ready(&self) -> bool {
        true
    }

    /// Does the work and answers it. A panic in here is caught; the lane goes on with the next job.
    fn run(self, executor: &mut Self::Executor, stop: &StopSignal<'_>);

    /// Answers without having done anything.
    fn refuse(self, why: Refusal);

    /// How many jobs like this one may be run at once at this moment, this one included. Asked on the lane's thread when the
    /// job's turn has come and it is ready.
    fn most_together(&self, _executor: &Self::Executor) -> usize {
        1
    }

    /// Whether `other` can be run at once with this one, and is ready. Must not block: the lane's queue waits for the answer.
    fn goes_with(&self, _other: &Self) -> bool {
        false
    }

    /// Does the work of several jobs, of which the first found that the others go with it, and answers each.
    fn run_together(jobs: Vec<(Self, StopSignal<'_>)>, executor: &mut Self::Executor)
    where
        Self: Sized,
    {
        for (job, stop) in jobs {
            job.run(executor, &stop);
        }
    }

    /// Puts what the thread owns in order: called on it after each job, when the lane is [woken](Lane::waker), and at the
    /// moment that the last call named. Must be cheap where there is nothing to do.
    fn tidy(_executor: &mut Self::Executor) -> Option<Instant> {
        None
    }
}

/// Tells a running job that nobody waits for it any more.
#[derive(Debug, Clone, Copy)]
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
    /// Jobs waiting, also one that is just being asked whether it is ready.
    pub queued: usize,
    /// Most jobs that may wait for their first turn.
    pub capacity: usize,
    /// Whether a job is running.
    pub busy: bool,
    /// Jobs run so far.
    pub completed: u64,
    /// How often the lane's thread ran some, one or several at once.
    pub batches: u64,
}

#[derive(Debug)]
struct State<J> {
    queue: Queue<J>,
    /// What the lane's thread has taken out of the queue.
    taken: Vec<Taken>,
    completed: u64,
    batches: u64,
    open: bool,
    /// Whether somebody wants the executor put in order.
    woken: bool,
}

/// A job on the lane's thread.
#[derive(Debug)]
struct Taken {
    session: SessionId,
    request: RequestId,
    stage: Stage,
    cancelled: Arc<AtomicBool>,
}

impl Taken {
    fn new<J>(entry: &Entry<J>, stage: Stage, cancelled: &Arc<AtomicBool>) -> Self {
        let cancelled = Arc::clone(cancelled);
        Self { session: entry.session, request: entry.request, stage, cancelled }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Stage {
    /// Asked whether it is ready: it waits still.
    Asked,
    Running,
}

#[derive(Debug)]
struct Shared<J> {
    state: Mutex<State<J>>,
    arrival: Condvar,
    /// Belongs to the job that is taken first; cleared under the lock of `state`.
    first_cancelled: Arc<AtomicBool>,
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
        let state = State { queue, taken: Vec::new(), completed: 0, batches: 0, open: true, woken: false };
        let first_cancelled = Arc::default();
        let shared = Arc::new(Shared { state: Mutex::new(state), arrival: Condvar::new(), first_cancelled });
        let worker = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let mut executor = executor();
            let mut again = None;
            while let Some(next) = worker.next(again) {
                worker.work(&mut executor, next);
                again = tidy::<J>(&mut executor);
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
        state.stop(|taken| (taken.session, taken.request) == (session, request));
        let waiting = state.queue.cancel(session, request);
        drop(state);
        if let Some(entry) = waiting {
            entry.job.refuse(Refusal::Cancelled);
        }
    }

    /// Takes back all jobs of a session that is over.
    pub fn end_session(&self, session: SessionId) {
        let mut state = self.shared.state.lock();
        state.stop(|taken| taken.session == session);
        let waiting = state.queue.end_session(session);
        drop(state);
        for entry in waiting {
            entry.job.refuse(Refusal::SessionEnded);
        }
    }

    /// What makes the lane's thread put its executor in order as soon as it runs no job. Does nothing once the lane is gone.
    pub fn waker(&self) -> impl Fn() + Send + Sync + use<J> {
        let shared = Arc::downgrade(&self.shared);
        move || {
            if let Some(shared) = shared.upgrade() {
                shared.state.lock().woken = true;
                shared.arrival.notify_one();
            }
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
        let count = |stage| state.taken.iter().filter(|taken| taken.stage == stage).count();
        LaneCounts {
            queued: state.queue.len() + count(Stage::Asked),
            capacity: state.queue.capacity(),
            busy: count(Stage::Running) > 0,
            completed: state.completed,
            batches: state.batches,
        }
    }
}

impl<J: Job> Drop for Lane<J> {
    fn drop(&mut self) {
        self.shut_down();
    }
}

impl<J> State<J> {
    fn stop(&self, is_meant: impl Fn(&Taken) -> bool) {
        for taken in self.taken.iter().filter(|taken| is_meant(taken)) {
            taken.cancelled.store(true, Ordering::Relaxed);
        }
    }
}

impl<J: Job> Shared<J> {
    /// Waits for the next job, or until the executor is to be put in order: at `tidy_at`, or when somebody wants it. `None`
    /// when the lane is shut down and empty.
    fn next(&self, tidy_at: Option<Instant>) -> Option<Coming<J>> {
        let mut state = self.state.lock();
        loop {
            if std::mem::take(&mut state.woken) {
                return Some(Coming::Order);
            }
            // Jobs come before what is due of the order: that follows each of them anyway.
            match state.queue.pop(Instant::now()) {
                Some(Next::Run(turn)) => {
                    self.first_cancelled.store(false, Ordering::Relaxed);
                    state.taken.push(Taken::new(&turn.entry, Stage::Asked, &self.first_cancelled));
                    return Some(Coming::Turn(turn));
                }
                Some(Next::Expired(entry)) => return Some(Coming::Expired(entry)),
                _ if tidy_at.is_some_and(|at| at <= Instant::now()) => return Some(Coming::Order),
                Some(Next::Later(again)) => {
                    let until = tidy_at.map_or(again, |at| at.min(again));
                    _ = self.arrival.wait_until(&mut state, until);
                }
                None if state.open => match tidy_at {
                    Some(at) => _ = self.arrival.wait_until(&mut state, at),
                    None => self.arrival.wait(&mut state),
                },
                None => return None,
            }
        }
    }

    fn work(&self, executor: &mut J::Executor, next: Coming<J>) {
        let turn = match next {
            Coming::Order => return,
            Coming::Expired(entry) => return entry.job.refuse(Refusal::Expired),
            Coming::Turn(turn) => turn,
        };
        if !becomes_ready(&turn) {
            return self.put_off(turn);
        }
        let (first, along) = self.with_those_along(turn.entry, executor);
        let (along, flags): (Vec<_>, Vec<_>) = along.into_iter().unzip();
        let count = 1 + along.len() as u64;
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let stop = StopSignal { cancelled: &self.first_cancelled, deadline: first.deadline };
            if along.is_empty() {
                return first.job.run(executor, &stop);
            }
            let with_stop = along.into_iter().zip(&flags).map(|(entry, cancelled)| {
                let stop = StopSignal { cancelled, deadline: entry.deadline };
                (entry.job, stop)
            });
            J::run_together(std::iter::once((first.job, stop)).chain(with_stop).collect(), executor);
        }));
        let mut state = self.state.lock();
        if outcome.is_err() {
            // Each job answered while it unwound; the executor keeps no state of a call.
            for Taken { session, request, .. } in &state.taken {
                tracing::error!(%session, %request, "a job panicked");
            }
        }
        state.taken.clear();
        state.completed += count;
        state.batches += 1;
    }

    /// The job, which runs now, and others that are run at once with it.
    fn with_those_along(&self, first: Entry<J>, executor: &J::Executor) -> (Entry<J>, Vec<Along<J>>) {
        // One that panics here does so when it is run too, and is answered there.
        let most = catch_unwind(AssertUnwindSafe(|| first.job.most_together(executor))).unwrap_or(1);
        let mut state = self.state.lock();
        let entries = match most {
            0 | 1 => Vec::new(),
            most => {
                let goes_with = |job: &J| catch_unwind(AssertUnwindSafe(|| first.job.goes_with(job))).unwrap_or(false);
                state.queue.take_along(most - 1, Instant::now(), goes_with)
            }
        };
        if let Some(first) = state.taken.first_mut() {
            first.stage = Stage::Running;
        }
        let note = |entry: Entry<J>| {
            let cancelled = Arc::<AtomicBool>::default();
            state.taken.push(Taken::new(&entry, Stage::Running, &cancelled));
            (entry, cancelled)
        };
        let along = entries.into_iter().map(note).collect();
        (first, along)
    }

    /// Takes a job that is not ready back into the queue, unless nobody waits for it any more.
    fn put_off(&self, turn: Turn<J>) {
        let mut state = self.state.lock();
        let is_cancelled = state.taken.drain(..).any(|taken| taken.cancelled.load(Ordering::Relaxed));
        let refused = if is_cancelled {
            Some((turn.entry, Refusal::Cancelled))
        } else if !state.open {
            Some((turn.entry, Refusal::ShuttingDown))
        } else {
            let overdue = state.queue.set_aside(turn, Instant::now()).err();
            overdue.map(|Overdue { entry, waited }| (entry, Refusal::Unready { waited }))
        };
        drop(state);
        if let Some((entry, why)) = refused {
            entry.job.refuse(why);
        }
    }
}

/// A job that runs at once with another, and whether it is taken back.
type Along<J> = (Entry<J>, Arc<AtomicBool>);

/// What the lane's thread does next.
enum Coming<J> {
    Turn(Turn<J>),
    Expired(Entry<J>),
    /// The executor is to be put in order, as it is after everything else.
    Order,
}

/// Puts the executor in order; a panic in there must not end the lane.
fn tidy<J: Job>(executor: &mut J::Executor) -> Option<Instant> {
    catch_unwind(AssertUnwindSafe(|| J::tidy(executor))).unwrap_or_else(|_| {
        tracing::error!("putting a lane in order panicked");
        None
    })
}

/// Whether the job is ready. At its first turn it is given a moment: most often what it waits for is about to happen, and
/// setting it aside costs more.
fn becomes_ready<J: Job>(turn: &Turn<J>) -> bool {
    // One that panics here does so when it is run too, and is answered there.
    let is_ready = || catch_unwind(AssertUnwindSafe(|| turn.entry.job.is_ready())).unwrap_or(true);
    if turn.is_first() { comes_true_soon(is_ready) } else { is_ready() }
}

/// Whether the answer is yes, or becomes so within a moment.
pub(crate) fn comes_true_soon(question: impl Fn() -> bool) -> bool {
    let began = Instant::now();
    loop {
        if question() {
            return true;
        }
        if began.elapsed() >= SPIN {
            return false;
        }
        std::thread::yield_now();
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
