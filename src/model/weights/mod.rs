//! Weights that are shared between processes: where each tensor of a set lies in one region, how the region is filled
//! from a file or from another region, and what tells one content from another.
//!
//! No libtorch. The region is filled before anybody else sees it; whoever imports it later finds the same layout for
//! the same file and rule, so that the memory of a restarted broker goes where the old one's was.

mod cast;
mod load;
mod plan;
mod recast;
mod sparse;
mod transfer;

#[cfg(test)]
mod tests;

pub use cast::{CastError, cast};
pub use load::{Loaded, digest_file, digest_region, load};
pub use plan::{PlannedTensor, WeightPlan};
pub use recast::{Filled, recast};
