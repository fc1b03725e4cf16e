//! Adapters: files of small changes to a model's layers, as trainers write them.
//!
//! A key is a layer's name in one of many spellings, and a suffix that says what the tensor is to the layer. Spellings
//! are made from the model's own names and looked up: names with underscores cannot be taken apart.

mod build;
#[cfg_attr(not(feature = "torch"), expect(dead_code, reason = "only executors read the tensors"))]
mod change;
mod file;
mod names;
mod number;
mod piece;
mod report;
mod settings;
mod stack;
mod text_names;

#[cfg(feature = "torch")]
pub(super) use change::{Change, Delta, Factor, Lengths, Part};
pub use file::AdapterFile;
pub use names::LayerNames;
pub use report::{AdapterKind, AdapterReport, UnknownKeys};
#[cfg(feature = "torch")]
pub(super) use stack::changed_elements;
pub use stack::{Adapter, ReadyStack, StackMaker};
