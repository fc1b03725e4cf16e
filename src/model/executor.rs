use std::path::PathBuf;

use crate::device::Span;
use crate::service::{VaeMode, VaeOperation};
use crate::tensor::TensorMeta;

use super::ModelError;

/// Where the weights of a loaded model live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightStorage {
    /// On the CPU: the mapped file itself, where its element type is the one computed in; nothing is copied.
    #[default]
    Mapped,
    /// A sealed memfd of the broker's own: costs a copy, survives whatever happens to the file.
    Copied,
}

/// What is known of a VAE from its file's header alone.
#[derive(Debug, Clone, PartialEq)]
pub struct VaeFacts {
    /// The file, or the name of a built-in model; for messages.
    pub path: PathBuf,
    /// Architecture as shown to users: `autoencoder-kl`, `taesd`, `hand-off`.
    pub family: &'static str,
    /// Channels of the latent.
    pub latent_channels: u64,
    /// Pixels per latent element in each direction.
    pub ratio: u64,
    /// Whether the file holds a decoder.
    pub can_decode: bool,
    /// Whether the file holds an encoder.
    pub can_encode: bool,
    /// Bytes of weights in the element type computed in.
    pub weight_bytes: u64,
    /// Working memory of a decode, in bytes per output pixel.
    pub decode_bytes_per_pixel: u64,
    /// Working memory of an encode, in bytes per input pixel.
    pub encode_bytes_per_pixel: u64,
    /// Computes nothing worth queueing for: runs on the thread that read the request.
    pub runs_inline: bool,
}

/// A validated VAE call: what comes out, and how it is run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VaePlan {
    /// Direction.
    pub operation: VaeOperation,
    /// The result: float32, contiguous.
    pub output: TensorMeta,
    /// In one piece or in tiles.
    pub mode: VaeMode,
}

/// A tensor in memory that the caller keeps alive and unchanged while the call runs.
#[derive(Debug)]
pub struct VaeInput<'a> {
    /// Element type, shape and strides.
    pub meta: TensorMeta,
    /// Memory holding at least `meta.span_bytes()`.
    pub memory: &'a Span,
}

/// A loaded VAE. It belongs to its lane's thread and is never modified by a call.
pub trait Vae {
    /// Runs `plan` on `input`; the last operation writes straight into `output`, which holds
    /// `plan.output.size_bytes()`. `stop` is asked between tiles and ends the call with [`ModelError::Cancelled`].
    ///
    /// NaN passes through: a NaN in the input shows in the output.
    ///
    /// # Errors
    /// [`ModelError::OutOfMemory`] after everything the attempt held was freed, [`ModelError::Executor`],
    /// [`ModelError::Changed`], [`ModelError::Cancelled`].
    fn run(
        &mut self,
        plan: &VaePlan,
        input: VaeInput<'_>,
        output: &Span,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), ModelError>;
}
