//! Weights that exist once and that every client maps: sets, who holds them, loading, publishing.

mod diverged;
mod handing;
mod header;
mod loading;
mod looks;
mod making;
mod memory;
mod publish;
mod report;
mod room;
mod running;
mod set;
mod table;
mod wanted;
mod work;

pub(super) use loading::Weights;
pub(super) use memory::WeightLimits;
pub(super) use running::PublishedModel;
pub(super) use table::Unloaded;
