//! The umbrella error: what happened, what kind of failure it is, and what to do about it.

use std::fmt;

use serde::{Deserialize, Serialize};

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
    /// Somebody uses what the request would replace or take away.
    InUse,
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
            Self::Busy | Self::InUse | Self::Timeout => Retry::Later,
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

impl ErrorKind {
    /// What this project's programs end with; `luna-broker --help` has the table.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Configuration | Self::Unsupported => 2,
            Self::ConnectionLost | Self::ShuttingDown => 3,
            Self::Refused => 4,
            Self::ModelNotFound | Self::InvalidModel => 5,
            Self::Busy | Self::InUse | Self::Timeout | Self::OutOfMemory => 6,
            Self::InvalidTensor | Self::Stale | Self::Cancelled | Self::Protocol | Self::Io | Self::Internal => 1,
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

/// Everything that can go wrong in this crate: a [`Fault`] and, where it began on this side, its cause.
#[derive(Debug)]
pub struct Error {
    fault: Fault,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` saying `message`, with what to do about it.
    pub fn new(kind: ErrorKind, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Fault::new(kind, message, remedy).into()
    }

    /// An error of `kind` that `cause` describes.
    pub(crate) fn caused(
        kind: ErrorKind,
        remedy: &'static str,
        cause: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        Self { fault: Fault::new(kind, cause.to_string(), remedy), source: Some(Box::new(cause)) }
    }

    /// The class of the failure.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.fault.kind
    }

    /// Whether, and after what, the same request can be sent again.
    #[must_use]
    pub fn retry(&self) -> Retry {
        self.kind().retry()
    }

    /// What happened, without the remedy.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.fault.message
    }

    /// What to do about it; empty where nothing sensible can be said.
    #[must_use]
    pub fn remedy(&self) -> &str {
        &self.fault.remedy
    }

    /// The form in which this error crosses the wire.
    #[must_use]
    pub fn into_fault(self) -> Fault {
        self.fault
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.fault, f)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // The cause's words are this error's own: what lies behind it is the cause's source.
        self.source.as_ref().and_then(|cause| cause.source())
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Self { fault, source: None }
    }
}
