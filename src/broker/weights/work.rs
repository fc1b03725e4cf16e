use std::sync::Arc;

use crossbeam_channel::{Receiver, TryRecvError, select};

use super::super::state::State;
use super::looks::Look;
use super::making::obtain;
use super::publish::Filled;
use super::wanted::Wanted;
use crate::error::{Error, ErrorKind, Result};

/// What takes its time.
#[derive(Debug)]
pub(super) enum Job {
    Load { state: Arc<State>, wanted: Wanted },
    Publish(Filled),
}

impl Job {
    fn run(self) {
        match self {
            Self::Load { state, wanted } => {
                if state.weights.begin(&wanted) {
                    let obtained = caught(|| obtain(&state, &wanted));
                    state.weights.finish(&wanted, obtained.map_err(Error::into_fault));
                }
            }
            Self::Publish(filled) => filled.complete(),
        }
    }

    /// Nobody will run it.
    pub(super) fn give_up(self) {
        let gone = || Error::new(ErrorKind::Internal, "the thread that loads weights is gone", "see the broker's log");
        match self {
            Self::Load { state, wanted } => state.weights.finish(&wanted, Err(gone().into_fault())),
            Self::Publish(filled) => filled.give_up(gone()),
        }
    }
}

/// Works jobs off, one after the other: a load by itself uses several cores and all of the disk. Looks at what is there
/// come when no job waits.
pub(super) fn work(jobs: &Receiver<Job>, looks: &Receiver<Look>) {
    loop {
        match jobs.try_recv() {
            Ok(job) => job.run(),
            Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) => select! {
                recv(jobs) -> job => match job {
                    Ok(job) => job.run(),
                    Err(_) => return,
                },
                recv(looks) -> look => match look {
                    Ok(look) => look.run(),
                    Err(_) => return,
                },
            },
        }
    }
}

/// Does what may meet anything that a file or a peer holds: a panic in there is an error of that one job.
pub(super) fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::Internal, "the thread that loads weights panicked", "see the broker's log"))
    })
}
