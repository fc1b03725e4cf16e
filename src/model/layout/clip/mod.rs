//! CLIP text encoders under the names of transformers and of OpenCLIP.

mod names;
mod read;
mod tree;

pub(in crate::model) use names::{Naming, Root, roots};
pub(in crate::model) use tree::{Block, Clip, Linear, Projection, Qkv};
