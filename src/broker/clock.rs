use std::time::Instant;

/// The broker's clock: nanoseconds since it started.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock(Instant);

impl Clock {
    pub(super) fn start() -> Self {
        Self(Instant::now())
    }

    pub(super) fn now_ns(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    pub(super) fn uptime_s(&self) -> f64 {
        self.0.elapsed().as_secs_f64()
    }
}
