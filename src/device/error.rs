use std::io;

use crate::error::{Error, ErrorKind};
use crate::id::GpuUuid;

/// Why memory could not be allocated, exported, imported or reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The operating system or driver has no memory left.
    #[error("cannot allocate {size_bytes} bytes of {what}: {cause}")]
    OutOfMemory {
        /// The kind of memory.
        what: &'static str,
        /// Bytes asked for.
        size_bytes: usize,
        /// The system's answer.
        cause: io::Error,
    },
    /// The operating system refused a call.
    #[error("{call} failed: {cause}")]
    Os {
        /// The call.
        call: &'static str,
        /// The system's answer.
        cause: io::Error,
    },
    /// A handle of another kind of device.
    #[error("a {device} device cannot import this kind of handle")]
    WrongHandle {
        /// The importing device.
        device: &'static str,
    },
    /// The memory behind the handle is smaller than announced.
    #[error("the region holds {actual} bytes but {announced} were announced")]
    TooSmall {
        /// Bytes announced.
        announced: usize,
        /// Bytes found.
        actual: usize,
    },
    /// A peer could shrink the memory under the mapping.
    #[error("the region's memory is not sealed against shrinking")]
    NotSealed,
    /// Memory that is to become unchangeable can still be written to by somebody.
    #[error("the memory is still mapped for writing")]
    StillMapped,
    /// Only the process that allocated a region exports it.
    #[error("the region was imported; only its owner exports it")]
    Imported,
    /// A range reaches beyond the region.
    #[error("bytes {offset}..{offset}+{length} lie outside a region of {size_bytes} bytes")]
    OutOfBounds {
        /// Start of the range.
        offset: usize,
        /// Length of the range.
        length: usize,
        /// Size of the region.
        size_bytes: usize,
    },
    /// The awaited write has not been published.
    #[error("sequence {awaited} was awaited but only {recorded} is published")]
    NotRecorded {
        /// The sequence number in the descriptor.
        awaited: u64,
        /// The newest published number.
        recorded: u64,
    },
    /// The CPU cannot reach this memory.
    #[error("the region is not in host memory")]
    NotHost,
    /// The region was imported for reading.
    #[error("the region is mapped for reading only")]
    ReadOnly,
    /// Other memory was to take the place of a region's, and the driver refused it, and then refused what was there before.
    #[error(
        "nothing is mapped any more where this memory was: the driver refused what was to replace it, and then it too"
    )]
    NothingMapped,
    /// CUDA cannot be used by this process.
    #[error("no CUDA driver that this process can use: {reason}")]
    NoDriver {
        /// What is missing, or what the driver answers.
        reason: String,
    },
    /// The process that owns the memory is gone: what it holds is undetermined.
    #[error("the broker that owns this GPU memory is gone")]
    OwnerGone,
    /// The driver shows this process no such GPU.
    #[error("this process sees no GPU {gpu}")]
    NoGpu {
        /// The GPU asked for.
        gpu: GpuUuid,
    },
    /// No GPU has this name.
    #[error("`{name}` names no GPU that this process sees")]
    UnknownGpu {
        /// The name asked for.
        name: String,
    },
    /// More pages would be locked than allowed.
    #[error("locking {size_bytes} bytes more would pass the limit of {limit} bytes for all sessions (--pinned-bytes)")]
    LockLimit {
        /// Bytes to be locked.
        size_bytes: usize,
        /// Most bytes that may be locked at once.
        limit: u64,
    },
    /// The CUDA driver refused a call, or the GPU failed at work enqueued before.
    #[error("{call} answers {code} {name}")]
    Cuda {
        /// The call.
        call: &'static str,
        /// The driver's code.
        code: u32,
        /// The driver's name of the code.
        name: String,
    },
}

/// What keeps this process from using CUDA.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoDriver {
    /// The build has no code for it, or the platform no way to share its memory.
    #[error("this build does without CUDA")]
    NotBuilt,
    /// There is no library to open.
    #[error("there is no libcuda on this machine")]
    NoLibrary,
    /// What was opened is no driver of a version that can be used.
    #[error("libcuda has no function {name}")]
    NoFunction {
        /// The function.
        name: &'static str,
    },
    /// The driver does not start.
    #[error("cuInit answers {code} {name}")]
    NoStart {
        /// The driver's code.
        code: u32,
        /// The driver's name of the code.
        name: String,
    },
    /// The driver starts, and has nothing.
    #[error("the driver shows this process no GPU")]
    NoGpu,
    /// The driver started and then refused a call that only asks.
    #[error("{answer}")]
    NoAnswer {
        /// The call, and what it answered.
        answer: String,
    },
}

impl From<NoDriver> for DeviceError {
    fn from(error: NoDriver) -> Self {
        Self::NoDriver { reason: error.to_string() }
    }
}

impl DeviceError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::OutOfMemory { .. } | Self::LockLimit { .. } => ErrorKind::OutOfMemory,
            Self::Os { .. } | Self::Cuda { .. } => ErrorKind::Io,
            Self::WrongHandle { .. } | Self::NotHost | Self::ReadOnly | Self::NoDriver { .. } | Self::NoGpu { .. } => {
                ErrorKind::Unsupported
            }
            Self::UnknownGpu { .. } => ErrorKind::Configuration,
            Self::TooSmall { .. } | Self::NotSealed | Self::StillMapped | Self::Imported | Self::OutOfBounds { .. } => {
                ErrorKind::Protocol
            }
            Self::NotRecorded { .. } | Self::OwnerGone | Self::NothingMapped => ErrorKind::Stale,
        }
    }
}

impl DeviceError {
    fn remedy(&self) -> &'static str {
        match self {
            Self::NothingMapped => "compute nothing with it; reattach once the GPU has room, or attach anew",
            _ => "",
        }
    }
}

impl From<DeviceError> for Error {
    fn from(error: DeviceError) -> Self {
        Self::caused(error.kind(), error.remedy(), error)
    }
}
