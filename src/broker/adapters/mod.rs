//! Stacks of adapters for loaded models: put together beside the lanes, kept by content, shared by all who ask for the same.

mod files;
mod service;
mod table;
mod work;

pub(super) use service::{Adapters, Stacked, Waiting, Wish};
