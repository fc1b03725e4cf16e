use crate::service::BlockCache;

/// Timesteps that models are trained with; the first is the last of a run.
const LAST_TIMESTEP: f64 = 999.0;

/// Where a run is, by the timesteps of its calls: they go down. Several calls of one step have the same.
#[derive(Debug, Clone, Default)]
pub(in crate::model) struct Progress {
    timestep: Option<f64>,
    /// Steps begun, without the first.
    index: usize,
    /// Steps of the run, where they are known.
    steps: Option<usize>,
}

/// One call of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::model) struct Moment {
    /// The largest of the call's timesteps.
    pub(in crate::model) timestep: f64,
    /// How much of the run lies before it.
    share: f64,
}

impl Progress {
    /// A run with these noise levels, one per step and one behind them; none where they are not known.
    pub(in crate::model) fn new(sigmas: &[f64]) -> Self {
        Self { steps: sigmas.len().checked_sub(1).filter(|&steps| steps > 0), ..Self::default() }
    }

    /// The next call, with its largest timestep.
    pub(in crate::model) fn step(&mut self, timestep: f64) -> Moment {
        match self.timestep {
            Some(before) if timestep < before => self.index += 1,
            Some(before) if timestep > before => self.index = 0,
            _ => {}
        }
        self.timestep = Some(timestep);
        let share = match self.steps {
            Some(steps) => self.index as f64 / steps as f64,
            None => 1.0 - timestep / LAST_TIMESTEP,
        };
        Moment { timestep, share }
    }
}

impl Moment {
    /// Whether a cache may answer at this moment.
    pub(in crate::model) fn is_within(self, cache: &BlockCache) -> bool {
        cache.start <= self.share && (self.share < cache.end || cache.end >= 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(sigmas: &[f64], timesteps: &[f64]) -> Vec<f64> {
        let mut progress = Progress::new(sigmas);
        timesteps.iter().map(|&timestep| progress.step(timestep).share).collect()
    }

    #[test]
    fn a_run_of_known_length_is_counted_in_steps() {
        // Two calls in the second step, and another pass behind the last one.
        let timesteps = [900.0, 600.0, 600.0, 300.0, 1.0, 900.0, 600.0];
        assert_eq!(shares(&[4.0, 3.0, 2.0, 1.0, 0.0], &timesteps), [0.0, 0.25, 0.25, 0.5, 0.75, 0.0, 0.25]);
    }

    #[test]
    fn one_of_unknown_length_is_measured_by_the_timestep() {
        for sigmas in [&[][..], &[1.0]] {
            assert_eq!(shares(sigmas, &[999.0, 499.5, 0.0]), [0.0, 0.5, 1.0]);
        }
    }

    #[test]
    fn the_range_has_its_start_and_not_its_end_unless_that_is_the_runs() {
        let cache = |start, end| BlockCache { start, end, ..BlockCache::new(0.1) };
        let at = |share| Moment { timestep: 0.0, share };
        assert!(at(0.2).is_within(&cache(0.2, 0.8)) && at(0.79).is_within(&cache(0.2, 0.8)));
        assert!(!at(0.19).is_within(&cache(0.2, 0.8)) && !at(0.8).is_within(&cache(0.2, 0.8)));
        assert!(at(1.0).is_within(&cache(0.2, 1.0)));
    }
}
