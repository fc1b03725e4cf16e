//! What this process finds on its way to a broker and to the memory of its GPUs, and what to do about what it does not
//! find. Nothing panics, and each step has a time limit.

mod broker;
#[cfg(all(feature = "cuda", unix))]
mod driver;
#[cfg(not(all(feature = "cuda", unix)))]
#[path = "no_driver.rs"]
mod driver;
mod examine;
mod finding;
mod gpu;
mod platform;
mod rung;
mod system;

pub use examine::{PATIENCE, examine};
pub use finding::{Diagnosis, Finding, Verdict};
