//! Weights in the broker's memory, mapped by this process; tensors handed to the broker for others; permits.

mod attach;
mod attached;
mod header;
mod map;
mod permit;
mod publish;

pub use attach::AttachOptions;
pub(super) use attached::Attached;
pub use attached::Weights;
pub(super) use map::WeightMaps;
pub use permit::Permit;
pub use publish::Published;
