use std::io;
use std::path::PathBuf;

use crate::error::{Error, ErrorKind};
use crate::tensor::TensorError;

/// Why a model could not be found, opened, loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// Nothing of that name.
    #[error("no model {name:?}; looked in {searched}")]
    NotFound {
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
    #[error("{} changed on disk since it was loaded; it is loaded anew by the next request", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A tensor does not fit the model.
    #[error(transparent)]
    Tensor(#[from] TensorError),
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
    /// The allocator failed while the model ran; everything the attempt held was freed.
    #[error("out of memory while running {what}: {cause}")]
    OutOfMemory {
        /// The call.
        what: &'static str,
        /// The allocator's words.
        cause: String,
    },
    /// The tensor library refused an operation on valid input.
    #[error("{what} failed: {cause}")]
    Executor {
        /// The call.
        what: &'static str,
        /// The library's words.
        cause: String,
    },
    /// The caller took the request back while it ran.
    #[error("the request was cancelled while it ran")]
    Cancelled,
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
            Self::Unsupported { .. } => ErrorKind::Unsupported,
            Self::Changed { .. } => ErrorKind::Stale,
            Self::Tensor(_) | Self::Tiles { .. } => ErrorKind::InvalidTensor,
            Self::OverBudget { .. } | Self::OutOfMemory { .. } => ErrorKind::OutOfMemory,
            Self::Executor { .. } => ErrorKind::Internal,
            Self::Cancelled => ErrorKind::Cancelled,
        }
    }

    /// What to do about it; empty where nothing sensible can be said.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "give a path, or put the file into a folder named with --models",
            Self::Directory { .. } => "name the .safetensors file inside it",
            Self::Unreadable { .. } => "check the path and that the broker's user may read it",
            Self::Pickle { .. } => {
                "convert it once on a machine where you trust it: load it with torch.load(path, weights_only=True), \
                 take its \"state_dict\" if it has one, and write that with safetensors.torch.save_file"
            }
            Self::Malformed { .. } => "download or convert the file again",
            Self::MissingPart { .. } => "name a checkpoint or VAE file that holds this part",
            Self::Unsupported { .. } => "use a supported model, or a worker that runs it itself",
            Self::Changed { .. } => {
                "send the request again; replace model files by renaming a new file over the old one"
            }
            Self::OverBudget { .. } => "send a smaller batch, smaller tiles, or raise --vae-budget",
            Self::OutOfMemory { .. } => "send a smaller batch or ask for tiles",
            Self::Tensor(_) | Self::Tiles { .. } | Self::Executor { .. } | Self::Cancelled => "",
        }
    }
}

impl From<ModelError> for Error {
    fn from(error: ModelError) -> Self {
        Self::caused(error.kind(), error.remedy(), error)
    }
}
