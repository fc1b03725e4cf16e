use std::any::Any;
use std::fmt;

use crate::service::{BlockCache, RunReport, RunSettings};

/// What an executor keeps of one run from step to step: conditionings, and what a block cache compares with.
///
/// Empty at first. Whoever makes a run keeps this; dropping it frees what it holds.
#[derive(Default)]
pub struct RunMemory {
    /// Whether steps may be left out.
    pub(in crate::model) cache: Option<BlockCache>,
    /// Noise levels, where they are known.
    #[cfg_attr(not(feature = "torch"), expect(dead_code, reason = "only executors look at them"))]
    pub(in crate::model) sigmas: Vec<f64>,
    /// An executor's own. Not shared: a run is in one place at a time.
    #[cfg_attr(not(feature = "torch"), expect(dead_code, reason = "only executors fill it"))]
    pub(in crate::model) kept: Option<Box<dyn Any + Send>>,
    pub(in crate::model) report: RunReport,
}

impl RunMemory {
    /// For a run with these settings.
    #[must_use]
    pub fn new(settings: &RunSettings) -> Self {
        Self { cache: settings.cache, sigmas: settings.sigmas.clone(), kept: None, report: RunReport::default() }
    }

    /// The run until now.
    #[must_use]
    pub fn report(&self) -> RunReport {
        self.report
    }

    /// Whether steps of it may be left out.
    #[must_use]
    pub fn has_cache(&self) -> bool {
        self.cache.is_some()
    }
}

impl fmt::Debug for RunMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunMemory").field("cache", &self.cache).field("report", &self.report).finish_non_exhaustive()
    }
}
