//! UNets of the Stable Diffusion family: the tree of their layers, read from names and shapes.

mod diffusers;
mod names;
mod read;
mod reader;
mod size;
mod tree;

pub(crate) use names::Names;
pub use size::Skip;
pub use tree::LayerId;
pub(crate) use tree::{Layer, Unet};

#[cfg(feature = "torch")]
pub(crate) use tree::{Attention, Block, FeedForward, Input, ResBlock, Transformer, TransformerBlock};
