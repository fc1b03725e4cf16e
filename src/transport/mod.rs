//! Moves bytes and operating-system handles between peers: local socket, in-memory.
//!
//! A [`Connection`] is a byte stream that can carry handles; [`FrameReader`] and [`FrameWriter`] put frames on it.

use std::any::Any;
use std::fmt::Debug;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

mod error;
mod frame;
mod local;
mod memory;

pub use error::{FolderDefect, TransportError};
pub use frame::{FrameHeader, FrameReader, FrameWriter, HEADER_BYTES, begin_frame, finish_frame};
pub use local::{LocalConnection, LocalListener, default_address};
pub use memory::{MemoryConnection, MemoryListener, memory_pair};

/// Something that travels beside the bytes.
#[non_exhaustive]
pub enum Attachment {
    /// A file descriptor, by `SCM_RIGHTS`.
    #[cfg(unix)]
    Fd(std::os::fd::OwnedFd),
    /// A value of the same process.
    Local(Arc<dyn Any + Send + Sync>),
}

impl Debug for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            #[cfg(unix)]
            Self::Fd(_) => "Fd",
            Self::Local(_) => "Local",
        })
    }
}

/// Who is at the other end, as the system tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Peer {
    /// Process id; absent on systems that do not tell, and for a process that this one's PID namespace does not show.
    pub pid: Option<u32>,
    /// User id; absent on systems without one.
    pub uid: Option<u32>,
}

/// What a connection can carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abilities {
    /// File descriptors.
    pub descriptors: bool,
    /// Values of the same process.
    pub same_process: bool,
}

/// Whether a write may wait for room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Until there is room, or the send timeout has passed.
    Block,
    /// Not at all.
    Never,
}

/// One live byte stream between two peers. One thread may read while another writes.
pub trait Connection: Debug + Send + Sync {
    /// Who is at the other end.
    fn peer(&self) -> Peer;

    /// What the connection can carry.
    fn abilities(&self) -> Abilities;

    /// Writes some of `parts`; how many bytes. `attachments` leave with the first byte and are emptied then.
    ///
    /// # Errors
    /// `WouldBlock` where there is no room at once ([`Wait::Never`]) or for longer than the send timeout
    /// ([`Wait::Block`]); nothing was written then. Any other error ends the connection.
    fn write(&self, parts: &[IoSlice<'_>], attachments: &mut Vec<Attachment>, wait: Wait) -> io::Result<usize>;

    /// Reads some bytes into `target`; 0 at the end of the stream. Attachments that arrived are added to `attachments`;
    /// without one they are closed, and the read is cheaper.
    ///
    /// # Errors
    /// `TimedOut` where nothing came within `timeout`. Any other error ends the connection.
    fn read(
        &self,
        target: &mut [u8],
        attachments: Option<&mut Vec<Attachment>>,
        timeout: Option<Duration>,
    ) -> io::Result<usize>;

    /// Ends the stream for both sides and wakes a blocked read. Repeating it is harmless.
    fn close(&self);
}

/// Accepts connections at one address.
pub trait Listener: Debug + Send + Sync {
    /// The address, as a client passes it.
    fn address(&self) -> String;

    /// The next connection; `None` once the listener is closed.
    ///
    /// # Errors
    /// A connection that failed while it was made; the listener goes on.
    fn accept(&self) -> Result<Option<Arc<dyn Connection>>, TransportError>;

    /// Stops listening and wakes a blocked `accept`. Repeating it is harmless.
    fn close(&self);
}
