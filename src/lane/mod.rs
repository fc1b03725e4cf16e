//! One lane runs the work of one service on one device: a bounded queue and exactly one thread that owns the models.
//!
//! The queue is pure and takes the time as an argument; the thread beside it is the only part with a clock.

mod calibration;
mod queue;
mod worker;

pub use calibration::Calibration;
pub use queue::{Entry, Next, Policy, Queue, Turn};
pub(crate) use worker::comes_true_soon;
pub use worker::{Job, Lane, LaneCounts, Refusal, StopSignal};
