use std::io;
use std::path::PathBuf;

use crate::error::{Error, ErrorKind};

/// Why bytes could not be moved, or no connection made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The peer closed the connection, or died.
    #[error("the peer closed the connection")]
    Closed,
    /// Nothing came in time.
    #[error("nothing came within the time allowed")]
    TimedOut,
    /// Nobody listens at the address.
    #[error("no broker answers at {address}: {cause}")]
    NoListener {
        /// The address.
        address: String,
        /// The system's answer.
        cause: io::Error,
    },
    /// Somebody already listens there.
    #[error("another broker already serves {address}")]
    AlreadyServed {
        /// The address.
        address: String,
    },
    /// The path is taken by something that is not a socket; it was left alone.
    #[error("{} exists and is not a socket; it was left alone", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket belongs to another user.
    #[error("the broker at {address} belongs to user {owner}, not to user {user}")]
    ForeignOwner {
        /// The address.
        address: String,
        /// The owner's user id.
        owner: u32,
        /// The caller's user id.
        user: u32,
    },
    /// Somebody else could put a socket of their own in the default socket's place.
    #[error("the socket's folder {} is not safe: {defect}", folder.display())]
    UnsafeFolder {
        /// The folder.
        folder: PathBuf,
        /// What is wrong with it.
        defect: FolderDefect,
    },
    /// A frame is longer than frames may be.
    #[error("a frame of {length} bytes exceeds the limit of {limit}")]
    FrameTooLong {
        /// Announced length.
        length: u64,
        /// The limit.
        limit: u64,
    },
    /// The operating system refused a call.
    #[error("{call} failed: {cause}")]
    Os {
        /// The call.
        call: &'static str,
        /// The system's answer.
        cause: io::Error,
    },
}

/// What is wrong with the folder of the default socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FolderDefect {
    /// Whoever made the link chooses where it leads.
    #[error("it is a link")]
    Link,
    /// Another user made it.
    #[error("it belongs to user {owner}, not to user {user}")]
    ForeignOwner {
        /// The owner's user id.
        owner: u32,
        /// The caller's user id.
        user: u32,
    },
    /// Its mode lets its group or everybody write.
    #[error("other users can write to it (mode {mode:o})")]
    Writable {
        /// The permission bits.
        mode: u32,
    },
}

impl TransportError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Closed | Self::NoListener { .. } => ErrorKind::ConnectionLost,
            Self::TimedOut => ErrorKind::Timeout,
            Self::AlreadyServed { .. } | Self::NotASocket { .. } | Self::UnsafeFolder { .. } => {
                ErrorKind::Configuration
            }
            Self::ForeignOwner { .. } => ErrorKind::Refused,
            Self::FrameTooLong { .. } => ErrorKind::Protocol,
            Self::Os { .. } => ErrorKind::Io,
        }
    }

    /// What to do about it; empty where nothing sensible can be said.
    pub(crate) fn remedy(&self) -> &'static str {
        match self {
            Self::NoListener { .. } => "start one with `luna-broker serve`, or name its socket with LUNA_BROKER",
            Self::Closed => "start the broker again; the next call connects anew",
            Self::AlreadyServed { .. } => "use that broker, stop it, or name another socket with --socket",
            Self::NotASocket { .. } => "name another path with --socket, or move the file away",
            Self::ForeignOwner { .. } => "start a broker of your own, or name its socket with LUNA_BROKER",
            Self::UnsafeFolder { .. } => {
                "make it a folder of this user's alone (chmod 700), or name another socket with --socket"
            }
            Self::TimedOut | Self::FrameTooLong { .. } | Self::Os { .. } => "",
        }
    }

    /// Folds an error of a read or write into what it means for the connection.
    pub(crate) fn from_stream(call: &'static str, cause: io::Error) -> Self {
        match cause.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Self::TimedOut,
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::NotConnected
            | io::ErrorKind::UnexpectedEof => Self::Closed,
            _ => Self::Os { call, cause },
        }
    }
}

impl From<TransportError> for Error {
    fn from(error: TransportError) -> Self {
        Self::caused(error.kind(), error.remedy(), error)
    }
}
