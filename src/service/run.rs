use serde::{Deserialize, Serialize};

use super::{AdapterStack, AdapterTaken, VaeMode};
use crate::config::ConfigError;

/// When the rest of a forward is left out because its first block gave what it gave before.
///
/// The first block's change of its input is held against that of the last forward that was computed: where the sum of the
/// differences is less than `threshold` times the sum of what it was, what the rest added then is added again.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BlockCache {
    /// Largest share by which the first block's change may differ. 0 computes always; 0.1 to 0.2 is usual.
    pub threshold: f64,
    /// Where in the run it begins, as a share: 0 is the start. Of the run's steps where its `sigmas` are known, else of the
    /// 1000 timesteps that the model was trained with.
    pub start: f64,
    /// Where it ends, likewise: 1 is the end.
    pub end: f64,
    /// Most steps left out in a row; `None` for as many as the threshold allows.
    pub max_hits: Option<u32>,
}

impl BlockCache {
    /// All of a run, as long as steps are alike by this `threshold`.
    #[must_use]
    pub const fn new(threshold: f64) -> Self {
        Self { threshold, start: 0.0, end: 1.0, max_hits: None }
    }

    /// Checks bounds and relations.
    ///
    /// # Errors
    /// The first setting that is out of bounds, and why.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let refuse = |reason: String| Err(ConfigError { setting: "block cache", reason });
        let Self { threshold, start, end, .. } = *self;
        if !(threshold >= 0.0 && threshold.is_finite()) {
            return refuse(format!("a threshold of {threshold}; it must be a number from 0 on"));
        }
        if !(0.0..=1.0).contains(&start) || !(0.0..=1.0).contains(&end) {
            return refuse(format!("a range from {start} to {end}; both are shares from 0 to 1"));
        }
        if start >= end {
            return refuse(format!("a range from {start} to {end}; it must begin before it ends"));
        }
        Ok(())
    }
}

/// What stays the same during one sampling run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RunSettings {
    /// Adapters of every step.
    pub adapters: AdapterStack,
    /// Whether steps may be left out.
    pub cache: Option<BlockCache>,
    /// The noise levels of the run, one per step and a last one behind them; empty where they are not known.
    pub sigmas: Vec<f64>,
}

/// Most noise levels of a run.
const MAX_SIGMAS: usize = 10_001;

impl RunSettings {
    /// Checks bounds and relations.
    ///
    /// # Errors
    /// As [`BlockCache::validate`].
    pub fn validate(&self) -> Result<(), ConfigError> {
        if let Some(cache) = &self.cache {
            cache.validate()?;
        }
        let refuse = |reason: String| Err(ConfigError { setting: "sigmas", reason });
        if self.sigmas.len() > MAX_SIGMAS {
            return refuse(format!("{} noise levels; at most {MAX_SIGMAS} are taken", self.sigmas.len()));
        }
        match self.sigmas.iter().find(|sigma| !(**sigma >= 0.0 && sigma.is_finite())) {
            Some(wrong) => refuse(format!("a noise level of {wrong}; they are numbers from 0 on")),
            None => Ok(()),
        }
    }
}

/// Why a step of a run with a block cache was computed, or that it was not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheVerdict {
    /// The rest of the forward was left out.
    Hit,
    /// Nothing to compare with, or of another size.
    Empty,
    /// The timestep went up: another pass through the noise levels began.
    Restarted,
    /// Control came, went, or changed by more than the threshold.
    Control,
    /// Before the cache's start or behind its end.
    Outside,
    /// As many steps in a row as may be were left out.
    Exhausted,
    /// The first block's change differs by the threshold or more.
    Different,
}

impl CacheVerdict {
    /// The name used in Python and in metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Empty => "empty",
            Self::Restarted => "restarted",
            Self::Control => "control",
            Self::Outside => "outside",
            Self::Exhausted => "exhausted",
            Self::Different => "different",
        }
    }
}

/// What a block cache did in one step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CacheStep {
    /// Whether the step was left out, or why not.
    pub verdict: CacheVerdict,
    /// By which share the first block's change differs from the last computed one's, where that was looked at.
    pub distance: Option<f64>,
}

/// A run until now.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct RunReport {
    /// Steps run.
    pub steps: u64,
    /// Steps among them whose rest was left out.
    pub hits: u64,
    /// Mean time of a step that was computed, in seconds; 0 before the first.
    pub computed_s: f64,
    /// Mean time of a step that was left out, in seconds; 0 before the first.
    pub hit_s: f64,
}

impl RunReport {
    /// How many times as long the run would have taken without its block cache; 1 where nothing was left out.
    #[must_use]
    pub fn speed_up(&self) -> f64 {
        let (steps, hits) = (self.steps as f64, self.hits as f64);
        let taken = (steps - hits) * self.computed_s + hits * self.hit_s;
        if self.hits == 0 || self.computed_s <= 0.0 || taken <= 0.0 { 1.0 } else { steps * self.computed_s / taken }
    }
}

/// How one step of a UNet was run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct UnetStep {
    /// Requests that ran together in one batch, this one included.
    pub together: u32,
    /// Working memory of the batch, in bytes, as [`crate::model::UnetFacts::step_bytes`] counts it.
    pub working_bytes: u64,
    /// What the model took up of each adapter of the request; for a run this is told when it is opened.
    pub adapters: Vec<AdapterTaken>,
    /// What the run's block cache did.
    pub cache: Option<CacheStep>,
    /// The run until now, this step included.
    pub run: Option<RunReport>,
}

/// How a result was computed, where there is something to say of that.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum How {
    /// In the one way that there is.
    Plain,
    /// By a VAE: in one piece or in tiles.
    Vae(VaeMode),
    /// As a step of a UNet.
    Step(Box<UnetStep>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_that_could_never_answer_or_ends_before_it_begins_is_refused() {
        assert_eq!(BlockCache::new(0.1).validate(), Ok(()));
        let of = |threshold, start, end| BlockCache { threshold, start, end, max_hits: None };
        for cache in
            [of(-0.1, 0.0, 1.0), of(f64::NAN, 0.0, 1.0), of(0.1, 0.5, 0.5), of(0.1, 0.6, 0.2), of(0.1, 0.0, 1.1)]
        {
            assert_eq!(cache.validate().unwrap_err().setting, "block cache", "{cache:?}");
        }
        let settings = RunSettings { sigmas: vec![14.6, f64::INFINITY], ..RunSettings::default() };
        assert_eq!(settings.validate().unwrap_err().setting, "sigmas");
    }

    #[test]
    fn the_speed_up_is_what_all_steps_would_have_taken_over_what_they_took() {
        let report = RunReport { steps: 10, hits: 5, computed_s: 1.0, hit_s: 0.2 };
        assert!((report.speed_up() - 10.0 / 6.0).abs() < 1e-12);
        assert_eq!(RunReport { steps: 3, hits: 0, computed_s: 1.0, hit_s: 0.0 }.speed_up(), 1.0);
        assert_eq!(RunReport::default().speed_up(), 1.0);
    }
}
