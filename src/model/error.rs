use std::io;
use std::path::PathBuf;

use super::weights::CastError;
use crate::device::DeviceError;
use crate::error::{Error, ErrorKind};
use crate::tensor::{DType, TensorError};

/// Why a model could not be found, opened, loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// Nothing of that name.
    #[error("no {what} {name:?}; looked in {searched}")]
    NotFound {
        /// What was looked for: a model, an adapter.
        what: &'static str,
        /// The name asked for.
        name: String,
        /// The places looked at.
        searched: String,
    },
    /// The path is not a regular file.
    #[error("{} is a directory, not a model file", path.display())]
    Directory {
        /// The path.
        path: PathBuf,
    },
    /// The operating system refused access.
    #[error("cannot read {}: {cause}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        cause: io::Error,
    },
    /// A format that executes code when it is read.
    #[error("{} is a pickle checkpoint, which runs code when it is read; it was not opened", path.display())]
    Pickle {
        /// The file.
        path: PathBuf,
    },
    /// The header lies, or the file is shorter than its header says.
    #[error("{} is not a valid safetensors file: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A valid file that holds none of the parts asked for.
    #[error("{} holds no {part}: {found}", path.display())]
    MissingPart {
        /// The file.
        path: PathBuf,
        /// The part looked for.
        part: &'static str,
        /// What was found instead.
        found: String,
    },
    /// A part that is recognised but not something this executor runs.
    #[error("{}: {what} is not supported", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What is not supported.
        what: String,
    },
    /// The file is not the one that was loaded.
    #[error("{} changed on disk since it was opened; it is loaded anew by the next request", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A tensor of an element type that weights are not shared in.
    #[error("{}: tensor {tensor} is stored as {stored}, which cannot be shared", path.display())]
    ElementType {
        /// The file.
        path: PathBuf,
        /// The tensor, quoted.
        tensor: String,
        /// The element type, as the file names it.
        stored: String,
    },
    /// A rule asks for an element type that nothing is converted to.
    #[error("weights cannot be converted to {wanted}")]
    CastTarget {
        /// The element type asked for.
        wanted: DType,
    },
    /// A tensor of a set has a shape that cannot be described, or with it the set is larger than the address space.
    #[error("tensor {tensor}: {cause}")]
    WeightShape {
        /// The tensor, quoted.
        tensor: String,
        /// What is wrong.
        cause: Box<TensorError>,
    },
    /// A set names a tensor twice.
    #[error("tensor {tensor} is in the set twice")]
    DuplicateTensor {
        /// The tensor, quoted.
        tensor: String,
    },
    /// A set of no tensors.
    #[error("the set has no tensors")]
    EmptySet,
    /// A plan was used with a file or a region that it was not made for.
    #[error("tensor {tensor} is not where the plan says: {reason}")]
    PlanMismatch {
        /// The tensor, quoted.
        tensor: String,
        /// What does not match.
        reason: &'static str,
    },
    /// Bytes could not be converted.
    #[error(transparent)]
    Cast(#[from] CastError),
    /// The memory that weights are loaded into refused.
    #[error(transparent)]
    Memory(#[from] DeviceError),
    /// A tensor does not fit the model.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// A call lacks a tensor that the model computes with.
    #[error("{} needs {tensor} {expected}, which was not given", path.display())]
    MissingInput {
        /// The model.
        path: PathBuf,
        /// Name of the argument.
        tensor: &'static str,
        /// The shape it must have.
        expected: String,
    },
    /// A call brings a tensor that the model has no place for.
    #[error("{} has no place for {tensor}: {reason}", path.display())]
    UnwantedInput {
        /// The model.
        path: PathBuf,
        /// Name of the argument.
        tensor: &'static str,
        /// What the model has instead.
        reason: String,
    },
    /// A step of a run refers to conditionings in a way that does not work out.
    #[error("{}: {reason}", path.display())]
    Conds {
        /// The model.
        path: PathBuf,
        /// What does not work out.
        reason: String,
    },
    /// The conditionings of a run take more memory than one may keep.
    #[error("{}: the run would keep {bytes} bytes of its conds, and may keep {limit}", path.display())]
    CondsTooLarge {
        /// The model.
        path: PathBuf,
        /// Bytes of all of them.
        bytes: u64,
        /// Most of them.
        limit: u64,
    },
    /// What an adapter changes does not fit the model.
    #[error("an adapter does not fit layer {layer}: {reason}")]
    Adapter {
        /// The layer's stem, or its number where there is no such layer.
        layer: String,
        /// What does not fit.
        reason: String,
    },
    /// An adapter's file holds something that cannot be what its names say, or nothing for the model.
    #[error("adapter {}: {reason}", path.display())]
    AdapterFile {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the key.
        reason: String,
    },
    /// An adapter was asked for at a strength that is no number.
    #[error("adapter {}: a strength of {strength} cannot be computed with", path.display())]
    AdapterStrength {
        /// The file.
        path: PathBuf,
        /// The strength asked for.
        strength: f64,
    },
    /// Tiles of an impossible shape.
    #[error("tiles of {width} × {height} with an overlap of {overlap} cannot be used: {reason}")]
    Tiles {
        /// Columns asked for.
        width: u32,
        /// Rows asked for.
        height: u32,
        /// Overlap asked for.
        overlap: u32,
        /// What is wrong with them.
        reason: String,
    },
    /// In tiles of the size asked for, or of the default size, the call needs more memory than it may use.
    #[error("{what} needs {needed_bytes} bytes of working memory; the budget is {budget_bytes}")]
    OverBudget {
        /// The call.
        what: &'static str,
        /// Bytes it would need.
        needed_bytes: u64,
        /// Bytes it may use.
        budget_bytes: u64,
    },
    /// Models of this kind are run by another broker, if by any.
    #[error("the {service} service is not served here, only {served}")]
    NotServed {
        /// What was asked for.
        service: &'static str,
        /// What is served.
        served: String,
    },
    /// The models that requests use leave too little room for another.
    #[error(
        "{name} takes {needed_bytes} bytes; {used_bytes} of the {limit_bytes} for models on {device} are in use{}; nothing \
         was unloaded",
        if users.is_empty() { String::new() } else { format!(" by {users}") }
    )]
    NoRoom {
        /// The model.
        name: String,
        /// Bytes of its weights.
        needed_bytes: u64,
        /// Bytes of the weights of models that requests wait for or run on.
        used_bytes: u64,
        /// Bytes that all may take.
        limit_bytes: u64,
        /// Where.
        device: String,
        /// The models in use.
        users: String,
    },
    /// The allocator failed while the model ran; everything the attempt held was freed.
    #[error("out of memory while running {what}: {cause}")]
    OutOfMemory {
        /// The call.
        what: &'static str,
        /// The allocator's words.
        cause: String,
    },
    /// A prompt that the text encoders cannot take.
    #[error("the prompt cannot be encoded: {reason}")]
    Prompt {
        /// What is wrong with it.
        reason: String,
    },
    /// The tensor library refused an operation on valid input.
    #[error("{what} failed: {cause}")]
    Executor {
        /// The call.
        what: &'static str,
        /// The library's words.
        cause: String,
    },
    /// A GPU was asked for that models cannot run on.
    #[error("models cannot run on a GPU: {0}")]
    Cuda(#[from] CudaUnavailable),
    /// The caller took the request back while it ran.
    #[error("the request was cancelled while it ran")]
    Cancelled,
}

/// Why models cannot run on a GPU in this process.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaUnavailable {
    /// Not built for Linux.
    #[error("this build does not run models on GPUs on this system")]
    Platform,
    /// The process has no libtorch that could be completed.
    #[error("libtorch is not loaded as a shared library")]
    NoLibtorch,
    /// A libtorch for the CPU only.
    #[error("the libtorch in use has no CUDA half: there is no {}", missing.display())]
    NoCudaHalf {
        /// The library that is not there.
        missing: PathBuf,
    },
    /// A libtorch with CUDA, but a build without the part of this program that talks to it.
    #[error("this build has no CUDA part: {reason}")]
    NoShim {
        /// What the build lacked.
        reason: &'static str,
    },
    /// The loader refused a library.
    #[error("{library} cannot be opened: {cause}")]
    Library {
        /// The library.
        library: String,
        /// The loader's words.
        cause: String,
    },
    /// Nothing that could answer for a GPU.
    #[error("there is no NVIDIA driver on this machine")]
    NoDriver,
    /// A driver from before the CUDA that libtorch was built with.
    #[error("the NVIDIA driver knows CUDA up to {driver}, this libtorch needs {needed}")]
    DriverTooOld {
        /// Version the driver knows, as major.minor.
        driver: String,
        /// Version libtorch needs, as major.minor.
        needed: String,
    },
    /// The driver is there and says no.
    #[error("the NVIDIA driver refuses (code {code}): {cause}")]
    Driver {
        /// The runtime's number for it.
        code: i32,
        /// The runtime's words.
        cause: String,
    },
    /// A driver, but not the GPU asked for.
    #[error("there is no GPU {device}; {count} are visible")]
    NoSuchDevice {
        /// The name asked for.
        device: String,
        /// GPUs the process sees.
        count: i32,
    },
    /// The tensor library looked for its CUDA half before it was opened, and looks only once.
    #[error("the tensor library has already computed in this process without its CUDA half")]
    TooLate,
}

impl CudaUnavailable {
    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Platform => "use --device cpu, or a Linux machine",
            Self::NoLibtorch | Self::NoCudaHalf { .. } => {
                "use --device cpu, or install a torch built for CUDA and build against it"
            }
            Self::NoShim { .. } => {
                "use --device cpu, or build again where torch for CUDA and the wheel nvidia-cuda-crt are installed"
            }
            Self::Library { .. } => "install torch with all of its CUDA wheels, of the version this was built with",
            Self::NoDriver => "install the NVIDIA driver; in a container, start it with the GPU made visible",
            Self::DriverTooOld { .. } => "update the NVIDIA driver",
            Self::Driver { .. } => "see whether nvidia-smi works; a restart of the driver or the machine may be due",
            Self::NoSuchDevice { .. } => "name a GPU that nvidia-smi lists and CUDA_VISIBLE_DEVICES does not hide",
            Self::TooLate => "open the GPU before the first model runs on the CPU",
        }
    }
}

impl ModelError {
    /// The class of the failure.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::ModelNotFound,
            Self::Directory { .. } | Self::Pickle { .. } | Self::Malformed { .. } | Self::MissingPart { .. } => {
                ErrorKind::InvalidModel
            }
            Self::Unreadable { cause, .. } if cause.kind() == io::ErrorKind::NotFound => ErrorKind::ModelNotFound,
            Self::Unreadable { .. } => ErrorKind::Io,
            Self::Unsupported { .. } | Self::NotServed { .. } | Self::ElementType { .. } | Self::CastTarget { .. } => {
                ErrorKind::Unsupported
            }
            Self::WeightShape { .. } | Self::DuplicateTensor { .. } | Self::EmptySet => ErrorKind::InvalidTensor,
            Self::PlanMismatch { .. } | Self::Cast(_) => ErrorKind::Internal,
            Self::Memory(cause) => cause.kind(),
            Self::Changed { .. } => ErrorKind::Stale,
            Self::Tensor(_)
            | Self::Tiles { .. }
            | Self::Prompt { .. }
            | Self::MissingInput { .. }
            | Self::UnwantedInput { .. }
            | Self::Conds { .. } => ErrorKind::InvalidTensor,
            Self::Adapter { .. } | Self::AdapterFile { .. } => ErrorKind::InvalidModel,
            Self::AdapterStrength { .. } => ErrorKind::Configuration,
            Self::OverBudget { .. } | Self::NoRoom { .. } | Self::OutOfMemory { .. } | Self::CondsTooLarge { .. } => {
                ErrorKind::OutOfMemory
            }
            Self::Executor { .. } => ErrorKind::Internal,
            Self::Cuda(CudaUnavailable::NoSuchDevice { .. }) => ErrorKind::Configuration,
            Self::Cuda(_) => ErrorKind::Unsupported,
            Self::Cancelled => ErrorKind::Cancelled,
        }
    }

    /// What to do about it; empty where nothing sensible can be said.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => {
                "give a path, or put the file into one of the folders that --models, --loras and --comfyui-paths name"
            }
            Self::Directory { .. } => "name the .safetensors file inside it",
            Self::Unreadable { .. } => "check the path and that the broker's user may read it",
            Self::Pickle { .. } => {
                "convert it once on a machine where you trust it: load it with torch.load(path, weights_only=True), \
                 take its \"state_dict\" if it has one, and write that with safetensors.torch.save_file"
            }
            Self::Malformed { .. } => "download or convert the file again",
            Self::MissingPart { .. } => "name a checkpoint, or a file of its own, that holds this part",
            Self::Unsupported { .. } => "use a supported model, or a worker that runs it itself",
            Self::ElementType { .. } => {
                "convert the file to a type of 8 bits or more, such as float8_e4m3fn or float16"
            }
            Self::CastTarget { .. } => "ask for float16, bfloat16, float32 or float64, or for the weights as stored",
            Self::WeightShape { .. } => "reshape the tensor, or leave it out of the set",
            Self::DuplicateTensor { .. } => "name each tensor once",
            Self::EmptySet => "give at least one tensor",
            Self::PlanMismatch { .. } | Self::Cast(_) | Self::Memory(_) => "",
            Self::Changed { .. } => {
                "send the request again; replace model files by renaming a new file over the old one"
            }
            Self::MissingInput { .. } => "encode the prompt as this model's family does, and pass all that it gives",
            Self::UnwantedInput { .. } => "leave it out, or use what was made for this model",
            Self::Conds { .. } => {
                "send context, and y where the model takes one, with the first step of each cond and of each number of rows"
            }
            Self::CondsTooLarge { .. } => "open another run, or send one row of context where all rows share it",
            Self::Adapter { .. } => "use an adapter that was made for this model's family",
            Self::AdapterFile { .. } => {
                "use an adapter that was made for this model's family; if this one was, download or export it again"
            }
            Self::AdapterStrength { .. } => "give a finite strength; 0 leaves the adapter out",
            Self::OverBudget { .. } => "send a smaller batch, smaller tiles, or raise --vae-budget",
            Self::NotServed { .. } => {
                "connect to the broker that serves it, or start this one with it among its --services"
            }
            Self::NoRoom { .. } => {
                "send it again when the others are not in use, use a smaller model, or raise --model-bytes"
            }
            Self::OutOfMemory { .. } => "send a smaller batch or ask for tiles",
            Self::Cuda(why) => why.remedy(),
            Self::Tensor(_) => "send a tensor of the shape and element type that the model takes",
            Self::Tiles { .. } | Self::Prompt { .. } | Self::Executor { .. } | Self::Cancelled => "",
        }
    }
}

impl From<ModelError> for Error {
    fn from(error: ModelError) -> Self {
        Self::caused(error.kind(), error.remedy(), error)
    }
}
