//! The thread behind a stream, and how far it has got.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use crate::code::{Result, UNKNOWN};
use crate::context;
use crate::faults::faults;

/// Counts the jobs of one stream.
#[derive(Default)]
pub(crate) struct Progress {
    counts: Mutex<Counts>,
    changed: Condvar,
}

#[derive(Clone, Copy, Default)]
struct Counts {
    submitted: u64,
    finished: u64,
}

impl Progress {
    fn counts(&self) -> Counts {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_idle(&self) -> bool {
        let counts = self.counts();
        counts.finished == counts.submitted
    }

    pub(crate) fn submitted(&self) -> u64 {
        self.counts().submitted
    }

    fn change(&self, change: impl FnOnce(&mut Counts) -> u64) -> u64 {
        let outcome = change(&mut self.counts.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
        outcome
    }
}

/// A point in the work of a stream.
#[derive(Clone)]
pub(crate) struct Ticket {
    pub(crate) progress: Arc<Progress>,
    pub(crate) number: u64,
}

impl Ticket {
    pub(crate) fn wait(&self) {
        let counts = self.progress.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let reached = self.progress.changed.wait_while(counts, |counts| counts.finished < self.number);
        drop(reached.unwrap_or_else(PoisonError::into_inner));
    }
}

struct Job {
    after: Vec<Ticket>,
    work: Box<dyn FnOnce() -> Result + Send>,
}

/// The queue of a thread that ends when this value is gone and everything queued is done.
pub(crate) struct Queue {
    jobs: Sender<Job>,
    pub(crate) progress: Arc<Progress>,
}

impl Queue {
    pub(crate) fn start(device: usize) -> Self {
        let (jobs, queued) = channel();
        let progress = Arc::new(Progress::default());
        let of_thread = Arc::clone(&progress);
        thread::spawn(move || serve(device, &queued, &of_thread));
        Self { jobs, progress }
    }

    /// Queues work that starts once everything in `after` is done.
    pub(crate) fn push(&self, after: Vec<Ticket>, work: Box<dyn FnOnce() -> Result + Send>) -> Ticket {
        let number = self.progress.change(|counts| {
            counts.submitted += 1;
            counts.submitted
        });
        // The thread lives as long as this value, so the job always arrives.
        let _ = self.jobs.send(Job { after, work });
        Ticket { progress: Arc::clone(&self.progress), number }
    }
}

fn serve(device: usize, queued: &Receiver<Job>, progress: &Progress) {
    for job in queued {
        for earlier in &job.after {
            earlier.wait();
        }
        if !faults().delay.is_zero() {
            thread::sleep(faults().delay);
        }
        // A panic is a bug here; those who wait for the stream must not hang for it.
        let outcome = catch_unwind(AssertUnwindSafe(job.work)).unwrap_or(Err(UNKNOWN));
        if let Err(code) = outcome {
            context::poison(device, code);
        }
        progress.change(|counts| {
            counts.finished += 1;
            counts.finished
        });
    }
}
