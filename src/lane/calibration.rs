use std::time::Duration;

/// Runs of a size that are looked at; the fastest of them counts, as the first ones warm things up.
const RUNS: u32 = 3;

/// Finds out, from runs that are made anyway, how many jobs of one kind run at once without taking longer than one after the
/// other.
#[derive(Debug, Clone, Default)]
pub struct Calibration {
    /// By number of jobs, from 1 on.
    sizes: Vec<Size>,
}

#[derive(Debug, Clone, Copy)]
struct Size {
    runs: u32,
    best: Duration,
}

impl Calibration {
    /// How many jobs to run at once now, up to `limit`. One more than is known to pay is tried until it is known.
    #[must_use]
    pub fn most(&self, limit: usize) -> usize {
        let paying = (1..=limit).take_while(|&jobs| self.pays(jobs)).count();
        match self.size(paying + 1) {
            // Each size is held against one job alone.
            _ if paying == 0 => 1,
            Some(size) if size.runs >= RUNS => paying,
            _ => paying + 1,
        }
        .min(limit)
        .max(1)
    }

    /// Whether the time that so many jobs take is still of interest.
    #[must_use]
    pub fn wants(&self, jobs: usize) -> bool {
        self.size(jobs).is_none_or(|size| size.runs < RUNS)
    }

    /// So many jobs were run at once, and took so long together.
    pub fn note(&mut self, jobs: usize, time: Duration) {
        if self.sizes.len() < jobs {
            self.sizes.resize(jobs, Size { runs: 0, best: Duration::MAX });
        }
        if let Some(size) = jobs.checked_sub(1).and_then(|at| self.sizes.get_mut(at)) {
            size.runs = size.runs.saturating_add(1);
            size.best = size.best.min(time);
        }
    }

    /// So many jobs cannot be run at once: they failed together, and not one by one.
    pub fn fails(&mut self, jobs: usize) {
        for _ in 0..RUNS {
            self.note(jobs, Duration::MAX);
        }
    }

    /// By number of jobs: the shortest time that so many took, and whether that is no longer than one after the other. Only
    /// numbers that were looked at often enough.
    pub fn known(&self) -> impl Iterator<Item = (usize, Duration, bool)> {
        let sizes = self.sizes.iter().enumerate().filter(|(_, size)| size.runs >= RUNS);
        sizes.map(|(at, size)| (at + 1, size.best, self.pays(at + 1)))
    }

    fn size(&self, jobs: usize) -> Option<&Size> {
        self.sizes.get(jobs.checked_sub(1)?)
    }

    fn pays(&self, jobs: usize) -> bool {
        let (Some(alone), Some(size)) = (self.size(1), self.size(jobs)) else { return false };
        let factor = u32::try_from(jobs).unwrap_or(u32::MAX);
        alone.runs >= RUNS && size.runs >= RUNS && size.best <= alone.best.saturating_mul(factor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs jobs as a lane does where `waiting` wait, each run of `n` jobs taking `time(n)` milliseconds.
    fn settle(waiting: usize, time: impl Fn(usize) -> u64) -> (Calibration, usize) {
        let mut calibration = Calibration::default();
        for _ in 0..50 {
            let jobs = calibration.most(waiting);
            if calibration.wants(jobs) {
                calibration.note(jobs, Duration::from_millis(time(jobs)));
            }
        }
        let most = calibration.most(waiting);
        (calibration, most)
    }

    #[test]
    fn what_costs_nothing_together_grows_to_the_limit() {
        assert_eq!(settle(8, |_| 100).1, 8);
        assert_eq!(settle(3, |_| 100).1, 3);
        assert_eq!(settle(1, |_| 100).1, 1);
    }

    #[test]
    fn what_takes_longer_together_stays_apart() {
        let (calibration, most) = settle(8, |jobs| 100 * jobs as u64 + if jobs > 1 { 1 } else { 0 });
        assert_eq!(most, 1);
        assert_eq!(
            calibration.known().map(|(jobs, _, pays)| (jobs, pays)).collect::<Vec<_>>(),
            [(1, true), (2, false)]
        );
        // As long as one after the other is no loss.
        assert_eq!(settle(8, |jobs| 100 * jobs as u64).1, 8);
        // Pays up to four.
        assert_eq!(settle(8, |jobs| if jobs > 4 { 1000 } else { 100 + jobs as u64 }).1, 4);
    }

    #[test]
    fn what_fails_together_is_not_tried_again() {
        let (mut calibration, most) = settle(2, |_| 100);
        assert_eq!((most, calibration.most(8)), (2, 3));
        calibration.fails(3);
        assert_eq!((calibration.most(8), calibration.wants(3)), (2, false));
    }

    #[test]
    fn one_job_alone_is_known_before_any_are_put_together() {
        let mut calibration = Calibration::default();
        for run in 0..RUNS {
            assert_eq!(calibration.most(8), 1, "run {run}");
            calibration.note(1, Duration::from_millis(100 - u64::from(run)));
        }
        assert_eq!(calibration.most(8), 2);
        calibration.note(2, Duration::from_secs(9));
        assert_eq!(calibration.most(8), 2, "a slow first run is not the last word");
    }
}
