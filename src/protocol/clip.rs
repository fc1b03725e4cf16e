//! What is said about text encoders.

use serde::{Deserialize, Serialize};

use super::message::{SlotPlace, TensorSource};
use crate::service::{AdapterStack, AdapterTaken, ClipInput, ClipKind, ClipOptions, IgnoredEmbedding};

/// More files than any set of text encoders has.
pub const MAX_ENCODER_FILES: usize = 4;

/// A prompt for text encoders. Tensors that cross inline lie behind the frame one after the other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClipRequest {
    /// Names or paths of the files that hold the set, in any order.
    pub models: Vec<String>,
    /// The prompt.
    pub input: ClipInput<TensorSource>,
    /// What is made of it.
    pub options: ClipOptions,
    /// Adapters of the encoders for this prompt.
    pub adapters: AdapterStack,
    /// The memory that both results go to.
    pub result: SlotPlace,
}

/// An encoded prompt. Tensors that cross inline lie behind the frame one after the other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EncodedPrompt {
    /// `[1, positions, width]`, float32.
    pub cond: TensorSource,
    /// `[1, width]`, float32.
    pub pooled: TensorSource,
    /// Embeddings that the prompt names in vain.
    pub ignored: Vec<IgnoredEmbedding>,
    /// What the encoders took up of each adapter.
    pub adapters: Vec<AdapterTaken>,
}

/// What is done to a set of text encoders apart from running it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EncodersTask {
    /// Say what it is; loads nothing.
    Describe,
    /// Load it now instead of with its first call.
    Load,
}

/// What a set of text encoders is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClipReport {
    /// The files that hold it.
    pub files: Vec<String>,
    /// Each encoder, in the order in which results are joined.
    pub encoders: Vec<EncoderReport>,
}

/// One text encoder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EncoderReport {
    /// Which one it is.
    pub kind: ClipKind,
    /// Numbers per position of the conditioning.
    pub width: u64,
    /// Blocks it has as it was trained.
    pub layers: u64,
    /// Positions of a chunk.
    pub tokens: u64,
    /// Numbers of a projected pooled row, where it has a projection.
    pub projection: Option<u64>,
}
