//! The umbrella error: what happened, what kind of failure it is, and what to do about it.

use serde::{Deserialize, Serialize};

use crate::device::DeviceError;
use crate::memory::LedgerError;
use crate::model::ModelError;
use crate::protocol::{CodecError, ProtocolError};
use crate::tensor::TensorError;
use crate::transport::TransportError;

/// Result with the crate's umbrella [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure an [`Error`] is; it travels in replies and names the Python exception class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The peer went away. Nothing the broker holds for other sessions was touched.
    ConnectionLost,
    /// Negotiation ended without a session: other user, other protocol version, forced rung not possible.
    Refused,
    /// A bounded queue is full; the request never entered it.
    Busy,
    /// A byte budget or an allocator said no; what was allocated for the request was given back.
    OutOfMemory,
    /// No such model, or no such file.
    ModelNotFound,
    /// The file exists but is not a model that can be used.
    InvalidModel,
    /// A tensor does not fit the operation.
    InvalidTensor,
    /// The thing referred to is from an earlier life: a reused slot, a restarted broker, an overwritten file.
    Stale,
    /// Recognised, but not something this build or device can do.
    Unsupported,
    /// The deadline passed before the work was done.
    Timeout,
    /// The caller took the request back.
    Cancelled,
    /// The broker is stopping and answers what is still queued.
    ShuttingDown,
    /// The peer broke the protocol.
    Protocol,
    /// A setting is wrong.
    Configuration,
    /// The operating system refused something.
    Io,
    /// The executor failed on valid input, or an invariant did not hold.
    Internal,
}

impl ErrorKind {
    /// Whether, and after what, the same request can be sent again.
    #[must_use]
    pub const fn retry(self) -> Retry {
        match self {
            Self::ConnectionLost | Self::ShuttingDown => Retry::Reconnect,
            Self::Busy | Self::Timeout => Retry::Later,
            Self::Stale => Retry::Refresh,
            Self::OutOfMemory
            | Self::Refused
            | Self::ModelNotFound
            | Self::InvalidModel
            | Self::InvalidTensor
            | Self::Unsupported
            | Self::Cancelled
            | Self::Protocol
            | Self::Configuration
            | Self::Io
            | Self::Internal => Retry::Never,
        }
    }
}

/// What a caller may do with a failed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// The same request fails the same way until something outside it changes.
    Never,
    /// The same request may succeed after a pause.
    Later,
    /// The same request may succeed on a new connection.
    Reconnect,
    /// The same request may succeed once what it refers to is obtained anew.
    Refresh,
}

/// An error in the form in which it crosses the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}{}{remedy}", if remedy.is_empty() { "" } else { " — " })]
pub struct Fault {
    /// The class of the failure.
    pub kind: ErrorKind,
    /// What happened, naming the input, and what was left intact.
    pub message: String,
    /// What to do about it; empty where nothing sensible can be said.
    pub remedy: String,
}

impl Fault {
    /// A fault of `kind` saying `message`, with what to do about it.
    pub fn new(kind: ErrorKind, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { kind, message: message.into(), remedy: remedy.into() }
    }
}

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The broker answered with a fault, or the client refused on its behalf.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// A tensor description is wrong.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// A slot or lease operation was refused.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// Memory could not be allocated, exported, imported or reached.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Bytes or handles could not be moved.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A frame could not be encoded or decoded.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// A well-formed message came at the wrong time or with the wrong content.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// A model file could not be used, or its executor failed.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl Error {
    /// An error of `kind` in the wire form.
    pub fn new(kind: ErrorKind, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Fault(Fault::new(kind, message, remedy))
    }

    /// The class of the failure.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Fault(fault) => fault.kind,
            Self::Tensor(_) => ErrorKind::InvalidTensor,
            Self::Ledger(error) => error.kind(),
            Self::Device(error) => error.kind(),
            Self::Transport(error) => error.kind(),
            Self::Codec(_) | Self::Protocol(_) => ErrorKind::Protocol,
            Self::Model(error) => error.kind(),
        }
    }

    /// Whether, and after what, the same request can be sent again.
    #[must_use]
    pub fn retry(&self) -> Retry {
        self.kind().retry()
    }

    /// What to do about it; empty where nothing sensible can be said.
    #[must_use]
    pub fn remedy(&self) -> &str {
        match self {
            Self::Fault(fault) => &fault.remedy,
            Self::Model(error) => error.remedy(),
            Self::Transport(error) => error.remedy(),
            Self::Tensor(_) | Self::Ledger(_) | Self::Device(_) | Self::Codec(_) | Self::Protocol(_) => "",
        }
    }

    /// The form in which this error crosses the wire.
    #[must_use]
    pub fn into_fault(self) -> Fault {
        match self {
            Self::Fault(fault) => fault,
            other => {
                let remedy = other.remedy().to_owned();
                Fault { kind: other.kind(), message: other.to_string(), remedy }
            }
        }
    }
}
