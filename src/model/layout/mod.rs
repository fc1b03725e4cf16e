//! What a model file holds, as a tree of its tensors: recognised and checked from names and shapes alone.
//!
//! The trees are generic over what stands for a tensor, so that the executor has the same tree of loaded ones.

mod clip;
mod kl;
mod reader;
mod tiny;
pub(super) mod unet;

pub(super) use clip::{Clip, Linear, Naming, Projection, Root, roots};
pub(super) use kl::{Kl, KlDecoder, KlEncoder};
pub(super) use reader::{Conv, Norm, Reader};
pub(super) use tiny::Tiny;
pub use unet::{LayerId, Skip};

#[cfg(feature = "torch")]
pub(super) use clip::{Block, Qkv};
#[cfg(feature = "torch")]
pub(super) use kl::{Attention, Level, Middle, ResBlock};
#[cfg(feature = "torch")]
pub(super) use tiny::{Pool, Step, TinyBlock};
