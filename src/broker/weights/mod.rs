//! Weights that exist once and that every client maps: sets, who holds them, loading, publishing.

mod diverged;
mod handing;
mod loading;
mod making;
mod memory;
mod publish;
mod report;
mod set;
mod table;
mod wanted;

pub(super) use loading::Weights;
pub(super) use memory::room_for_weights;
pub(super) use table::Unloaded;
