use std::path::PathBuf;
use std::sync::Arc;

use crate::device::{Span, StreamRef};
use crate::service::{CacheStep, Precision, StepInput, VaeMode, VaeOperation};
use crate::tensor::TensorMeta;

#[cfg(doc)]
use super::{Conds, UnetFacts};
use super::{ModelError, ReadyStack, RunMemory, StackMaker};

/// Where the weights of a loaded model live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightStorage {
    /// On the CPU: the mapped file itself, where its element type is the one computed in; nothing is copied.
    #[default]
    Mapped,
    /// A sealed memfd of the broker's own: costs a copy, survives whatever happens to the file.
    Copied,
}

/// Family of the tiny autoencoders.
pub(super) const TINY_FAMILY: &str = "taesd";

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

/// What a GPU can do, as NVIDIA numbers it: 8.0 for A100, 9.0 for H100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Capability {
    /// The generation.
    pub major: i32,
    /// The step within it.
    pub minor: i32,
}

impl Capability {
    /// The first with fast float16.
    pub(super) const VOLTA: Self = Self { major: 7, minor: 0 };
    /// The first that computes in bfloat16.
    const AMPERE: Self = Self { major: 8, minor: 0 };
}

impl VaeFacts {
    /// The element type this VAE computes in unless a setting says otherwise: on the CPU (`None`) float32, on a GPU
    /// bfloat16 where it can, else float32.
    ///
    /// Float16 is chosen for the tiny autoencoders only, and only where there is no bfloat16: activations of a full
    /// one leave its range with some pictures, which then come out black.
    #[must_use]
    pub fn precision(&self, gpu: Option<Capability>) -> Precision {
        match gpu {
            Some(gpu) if gpu >= Capability::AMPERE => Precision::Bf16,
            Some(gpu) if gpu >= Capability::VOLTA && self.family == TINY_FAMILY => Precision::F16,
            _ => Precision::F32,
        }
    }

    /// The same VAE where it computes in `precision`; sizes are told for float32 at first.
    #[must_use]
    pub fn in_precision(self, precision: Precision) -> Self {
        let scaled = |bytes: u64| bytes.saturating_mul(precision.size_bytes()).div_ceil(Precision::F32.size_bytes());
        Self {
            weight_bytes: scaled(self.weight_bytes),
            decode_bytes_per_pixel: scaled(self.decode_bytes_per_pixel),
            encode_bytes_per_pixel: scaled(self.encode_bytes_per_pixel),
            ..self
        }
    }
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
#[derive(Debug, Clone, Copy)]
pub struct ModelInput<'a> {
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
    /// Answers the mode that ran: tiled where memory did not suffice for one piece.
    ///
    /// With [`Vae::stream`], `input` and `output` may also lie in that GPU's memory, and the call returns when all
    /// work is *enqueued* on the stream: before it, the caller has made the stream wait for whatever still writes
    /// `input` or uses `output`; after it, the caller records an event there and keeps both alive until that has
    /// happened. An error leaves work on the stream too. A result in host memory is complete on return all the same,
    /// and input in host memory is no longer read.
    ///
    /// NaN passes through: a NaN in the input shows in the output.
    ///
    /// # Errors
    /// [`ModelError::OutOfMemory`] after everything the attempt held was freed, [`ModelError::Executor`],
    /// [`ModelError::Changed`], [`ModelError::Cancelled`].
    fn run(
        &mut self,
        plan: &VaePlan,
        input: ModelInput<'_>,
        output: &Span,
        stop: &dyn Fn() -> bool,
    ) -> Result<VaeMode, ModelError>;

    /// The stream that GPU work of every [`Vae::run`] is enqueued on; `None` where there is none and a result is
    /// complete when `run` returns. Always the same answer, valid as long as the process.
    ///
    /// It does not order itself with the GPU's default stream.
    fn stream(&self) -> Option<StreamRef> {
        None
    }
}

/// One step of a request, as a UNet runs it.
#[derive(Debug)]
pub struct UnetCall<'a> {
    /// The tensors; a step of a run may leave out what the run has.
    pub input: StepInput<ModelInput<'a>>,
    /// Where the result goes: holds what was said of it when the step was checked.
    pub output: &'a Span,
    /// Adapters that were put together for this model.
    pub stack: Option<&'a ReadyStack>,
    /// The run that the step is of, and the conditionings that share its rows evenly.
    pub run: Option<(&'a mut RunMemory, &'a [u32])>,
}

/// A loaded UNet. It belongs to its lane's thread and is never modified by a call.
pub trait Unet {
    /// Runs one step of each of `calls` as one batch: the network's output for each straight into its own place, as
    /// [`UnetFacts::check_alone`] or [`Conds::check`] said of it. Answers, by call, what a block cache did.
    ///
    /// Those that run together have latents of one height and width and as many tokens each; one with a control runs alone.
    /// A request's result is the same alone and among others, but for rounding. `stop` is asked before the batch begins and
    /// ends it with [`ModelError::Cancelled`].
    ///
    /// With [`Unet::stream`], tensors may also lie in that GPU's memory, under the terms of [`Vae::run`].
    ///
    /// # Errors
    /// As those checks; [`ModelError::OutOfMemory`] after everything the attempt held was freed,
    /// [`ModelError::Executor`], [`ModelError::Changed`], [`ModelError::Cancelled`]. All calls of a batch fail together;
    /// their runs keep what the calls brought.
    fn step(
        &mut self,
        calls: &mut [UnetCall<'_>],
        stop: &dyn Fn() -> bool,
    ) -> Result<Vec<Option<CacheStep>>, ModelError>;

    /// What puts stacks of adapters together for this model. It outlives the model, and keeps its weights.
    fn stack_maker(&self) -> Arc<dyn StackMaker>;

    /// Waits until all work that was enqueued is done; nothing to do where it is done when a call returns.
    ///
    /// # Errors
    /// [`ModelError::Executor`] where the GPU failed.
    fn wait(&self) -> Result<(), ModelError> {
        Ok(())
    }

    /// The stream that GPU work of every [`Unet::step`] is enqueued on; as [`Vae::stream`].
    fn stream(&self) -> Option<StreamRef> {
        None
    }
}
