//! What can be asked of a model service and how its tensors cross: the vocabulary shared by the wire, the lanes and
//! the executors.

use std::fmt;

use serde::{Deserialize, Serialize};

mod adapters;
mod clip;
mod run;
mod unet;

pub use adapters::{AdapterMode, AdapterStack, AdapterTaken, AdapterUse};
pub use clip::{
    Chunk, ClipInput, ClipKind, ClipOptions, ClipPrompt, ClipText, ClipTokens, IgnoredEmbedding, Token, WeightedToken,
};
pub use run::{BlockCache, CacheStep, CacheVerdict, How, RunReport, RunSettings, UnetStep};
pub use unet::{Control, StepInput, UnetInput};

/// A kind of model that the broker serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Service {
    /// Latents to images and back.
    Vae,
    /// One denoising step.
    Unet,
    /// Prompts to what UNets are conditioned on.
    Clip,
}

impl Service {
    /// Every service.
    pub const ALL: [Self; 3] = [Self::Vae, Self::Unet, Self::Clip];

    /// The name used in `status` and metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vae => "vae",
            Self::Unet => "unet",
            Self::Clip => "clip",
        }
    }

    /// The service of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|service| service.name() == name)
    }
}

/// Direction of a VAE call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VaeOperation {
    /// Latent `[N, C, h, w]` to image `[N, h·ratio, w·ratio, 3]`.
    Decode,
    /// Image `[N, H, W, 3]` to latent `[N, C, H/ratio, W/ratio]`, the mean of the posterior.
    Encode,
}

impl VaeOperation {
    /// The name used in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Encode => "encode",
        }
    }
}

/// Whether a VAE call may be cut into tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tiling {
    /// In one piece where the byte budget allows it, else in tiles of the default size.
    Auto,
    /// Always in tiles of this size.
    Tiles(TileShape),
}

/// Size and overlap of tiles: in latent elements for a decode, in pixels for an encode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TileShape {
    /// Columns of the first of the three passes.
    pub width: u32,
    /// Rows of the first of the three passes.
    pub height: u32,
    /// Columns and rows that neighbouring tiles share.
    pub overlap: u32,
}

/// One call to a VAE, without its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VaeCall {
    /// Direction.
    pub operation: VaeOperation,
    /// Tiling asked for.
    pub tiling: Tiling,
}

/// How a VAE call was run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VaeMode {
    /// In one piece.
    Full,
    /// In tiles of this size, three passes averaged.
    Tiled(TileShape),
}

/// The element type a model computes in. Tensors that cross stay as they are: images and latents are float32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    F32,
    /// 16 bits with the range of 32.
    Bf16,
    /// 16 bits with more digits and a range up to 65504, which the activations of some autoencoders leave.
    F16,
}

impl Precision {
    /// Bytes of one element.
    #[must_use]
    pub const fn size_bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The name used in settings.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

/// How host memory is held through which tensors of a GPU cross.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pages {
    /// Page-locked: the GPU copies to and from it by itself.
    Locked,
    /// Ordinary memory, and why: the driver copies once more, by way of its own.
    Pageable(String),
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Locked => f.write_str("page-locked"),
            Self::Pageable(why) => write!(f, "not page-locked: {why}"),
        }
    }
}

/// One way for tensors to cross; better ones first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Rung {
    /// The client lives in the broker's process.
    Local,
    /// Memory of the broker's GPU, opened by `cudaIpcMemHandle`.
    CudaIpc,
    /// Memory of the broker's GPU, opened by a file descriptor: crosses PID namespaces.
    CudaVmm,
    /// Memory of the broker's GPU, reached from another GPU; results are copied once.
    Peer,
    /// Shared memory of the machine.
    Shm,
    /// Bytes behind the frame.
    Inline,
}

impl Rung {
    /// The name used in `status` and in `LUNA_BROKER_TRANSPORT`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::CudaIpc => "cuda-ipc",
            Self::CudaVmm => "cuda-vmm",
            Self::Peer => "peer",
            Self::Shm => "shm",
            Self::Inline => "inline",
        }
    }

    /// The rung of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|rung| rung.name() == name)
    }

    /// Every rung, best first.
    pub const ALL: [Self; 6] = [Self::Local, Self::CudaIpc, Self::CudaVmm, Self::Peer, Self::Shm, Self::Inline];

    /// Whether tensors of a GPU cross in memory of a GPU.
    #[must_use]
    pub const fn is_gpu(self) -> bool {
        matches!(self, Self::CudaIpc | Self::CudaVmm | Self::Peer)
    }
}

/// How work of two processes on one GPU is kept in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GpuOrder {
    /// By events: nobody's thread waits for the GPU.
    Events,
    /// Each side waits for its GPU work before it tells the other: slower, and always right.
    Host,
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
