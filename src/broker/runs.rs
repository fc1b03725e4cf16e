use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::adapters::Stacked;
use super::usage::InUse;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{RequestId, RunId, SessionId};
use crate::model::{Arrived, CondUse, Conds, ModelError, RunMemory};
use crate::protocol::RunStatus;
use crate::service::{BlockCache, RunReport, RunSettings};

/// Runs that one session has open at a time.
const MAX_RUNS: usize = 64;

/// One sampling run: the model, what stays the same, and what was kept of the steps until now.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) model: InUse,
    /// Absent without adapters.
    pub(super) stacked: Option<Arc<Stacked>>,
    cache: Option<BlockCache>,
    /// What was sent: looked at before a step is queued.
    pub(super) conds: Mutex<Conds>,
    /// What of that has reached the model. Only the lane's thread looks at it.
    pub(super) arrived: Mutex<Arrived>,
    /// Locked while a step runs.
    pub(super) memory: Mutex<RunMemory>,
    /// Told while a step runs.
    pub(super) report: Mutex<RunReport>,
}

/// What a step is to a run.
#[derive(Debug)]
pub(super) struct RunStep {
    pub(super) run: Arc<Run>,
    /// The conditionings that share its rows.
    pub(super) conds: Vec<u32>,
    pub(super) uses: Vec<CondUse>,
}

impl RunStep {
    /// That all is there which the step leaves out. Asked on the lane's thread right before it runs.
    ///
    /// # Errors
    /// As [`Arrived::check`].
    pub(super) fn check(&self) -> Result<(), ModelError> {
        self.run.arrived.lock().check(self.run.model.unet()?, &self.uses)
    }

    /// It ran, and this is what the run came to.
    pub(super) fn note(&self, memory: &RunMemory) {
        self.run.arrived.lock().note(&self.uses);
        *self.run.report.lock() = memory.report();
    }
}

impl Run {
    pub(super) fn new(model: InUse, stacked: Option<Arc<Stacked>>, settings: &RunSettings) -> Self {
        Self {
            model,
            stacked,
            cache: settings.cache,
            conds: Mutex::default(),
            arrived: Mutex::default(),
            memory: Mutex::new(RunMemory::new(settings)),
            report: Mutex::default(),
        }
    }

    fn status(&self, session: SessionId, run: RunId) -> RunStatus {
        let report = *self.report.lock();
        RunStatus {
            session,
            run,
            model: self.model.report().name,
            adapters: self.stacked.as_ref().map_or(0, |stacked| stacked.taken.len() as u64),
            cache: self.cache,
            report,
            speed_up: report.speed_up(),
        }
    }
}

/// The runs of one session.
#[derive(Debug, Default)]
pub(super) struct Runs(Mutex<Open>);

#[derive(Debug, Default)]
struct Open {
    next: u64,
    runs: HashMap<RunId, (RequestId, Arc<Run>)>,
    is_over: bool,
}

impl Runs {
    /// Opens a run that `request` asked for.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] where there are too many, [`ErrorKind::Cancelled`] where the session is over.
    pub(super) fn open(&self, request: RequestId, run: Run) -> Result<RunId> {
        let mut open = self.0.lock();
        if open.is_over {
            let message = "the session ended before the run was open";
            return Err(Error::new(ErrorKind::Cancelled, message, "open another session"));
        }
        if open.runs.len() >= MAX_RUNS {
            let message = format!("the session has {MAX_RUNS} runs open; this one was not opened");
            return Err(Error::new(ErrorKind::Busy, message, "close runs that are done"));
        }
        open.next += 1;
        let id = RunId(open.next);
        open.runs.insert(id, (request, Arc::new(run)));
        Ok(id)
    }

    /// The run of that id.
    ///
    /// # Errors
    /// [`ErrorKind::Stale`] where there is none.
    pub(super) fn get(&self, id: RunId) -> Result<Arc<Run>> {
        let found = self.0.lock().runs.get(&id).map(|(_, run)| Arc::clone(run));
        found.ok_or_else(|| {
            let message = format!("run {id} is not open: it was closed, or never opened in this session");
            Error::new(ErrorKind::Stale, message, "open another run")
        })
    }

    /// Ends a run. A step of it that is queued still runs.
    pub(super) fn close(&self, id: RunId) {
        let closed = self.0.lock().runs.remove(&id);
        drop(closed);
    }

    /// Ends what a request opened whose caller does not look at the answer.
    pub(super) fn recall(&self, request: RequestId) {
        let mut recalled = Vec::new();
        let mut open = self.0.lock();
        open.runs.retain(|_, (opened_by, run)| {
            let stays = *opened_by != request;
            if !stays {
                recalled.push(Arc::clone(run));
            }
            stays
        });
        drop(open);
        drop(recalled);
    }

    /// Ends all of them for good.
    pub(super) fn end(&self) {
        let mut open = self.0.lock();
        open.is_over = true;
        let runs = std::mem::take(&mut open.runs);
        drop(open);
        drop(runs);
    }

    /// All runs, the oldest first.
    pub(super) fn statuses(&self, session: SessionId) -> Vec<RunStatus> {
        let mut runs: Vec<_> = self.0.lock().runs.iter().map(|(id, (_, run))| (*id, Arc::clone(run))).collect();
        runs.sort_by_key(|(id, _)| *id);
        runs.iter().map(|(id, run)| run.status(session, *id)).collect()
    }
}
