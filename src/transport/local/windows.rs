use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use interprocess::local_socket::traits::{Listener as _, Stream as _, StreamCommon as _};
use interprocess::local_socket::{GenericNamespaced, Listener, ListenerOptions, Stream, ToNsName};

use crate::transport::{Abilities, Attachment, Connection, Peer, TransportError, Wait};

/// The pipe a broker of this user listens on when told nothing else.
#[must_use]
pub fn default_address() -> String {
    let user = std::env::var("USERNAME").unwrap_or_else(|_| "default".to_owned());
    format!("luna-broker-{user}")
}

pub(in crate::transport) fn own_uid() -> Option<u32> {
    None
}

/// A connected named pipe.
#[derive(Debug)]
pub struct LocalConnection {
    stream: Stream,
    peer: Peer,
    closed: AtomicBool,
}

impl LocalConnection {
    /// Connects to the broker at `address`, the name of a pipe.
    ///
    /// # Errors
    /// [`TransportError::NoListener`].
    pub fn connect(address: &str) -> Result<Self, TransportError> {
        let no_listener = |cause| TransportError::NoListener { address: address.to_owned(), cause };
        let name = address.to_ns_name::<GenericNamespaced>().map_err(no_listener)?;
        Ok(Self::adopt(Stream::connect(name).map_err(no_listener)?))
    }

    fn adopt(stream: Stream) -> Self {
        let pid = stream.peer_creds().ok().and_then(|credentials| credentials.pid());
        Self { stream, peer: Peer { pid, uid: None }, closed: AtomicBool::new(false) }
    }
}

impl Connection for LocalConnection {
    fn peer(&self) -> Peer {
        self.peer
    }

    fn abilities(&self) -> Abilities {
        Abilities { descriptors: false, same_process: false, timed_reads: false }
    }

    fn write(&self, parts: &[IoSlice<'_>], attachments: &mut Vec<Attachment>, wait: Wait) -> io::Result<usize> {
        if !attachments.is_empty() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        if self.closed.load(Ordering::Acquire) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        // A pipe cannot be asked for room: the caller's own thread must not write.
        if wait == Wait::Never {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        match parts.first() {
            Some(part) => (&self.stream).write(part),
            None => Ok(0),
        }
    }

    fn read(
        &self,
        target: &mut [u8],
        _attachments: &mut Vec<Attachment>,
        _timeout: Option<Duration>,
    ) -> io::Result<usize> {
        if self.closed.load(Ordering::Acquire) {
            return Ok(0);
        }
        (&self.stream).read(target)
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }
}

/// A listening named pipe.
#[derive(Debug)]
pub struct LocalListener {
    listener: Listener,
    address: String,
    closed: AtomicBool,
}

impl LocalListener {
    /// Listens at `address`, the name of a pipe.
    ///
    /// # Errors
    /// [`TransportError::AlreadyServed`], [`TransportError::Os`].
    pub fn bind(address: &str) -> Result<Self, TransportError> {
        let os = |call| move |cause| TransportError::Os { call, cause };
        let name = address.to_ns_name::<GenericNamespaced>().map_err(os("naming the pipe"))?;
        let listener = ListenerOptions::new().name(name).create_sync().map_err(|cause| match cause.kind() {
            io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied => {
                TransportError::AlreadyServed { address: address.to_owned() }
            }
            _ => os("listening")(cause),
        })?;
        Ok(Self { listener, address: address.to_owned(), closed: AtomicBool::new(false) })
    }
}

impl crate::transport::Listener for LocalListener {
    fn address(&self) -> String {
        self.address.clone()
    }

    fn accept(&self) -> Result<Option<Arc<dyn Connection>>, TransportError> {
        let accepted = self.listener.accept();
        if self.closed.load(Ordering::Acquire) {
            return Ok(None);
        }
        let stream = accepted.map_err(|cause| TransportError::Os { call: "accept", cause })?;
        Ok(Some(Arc::new(LocalConnection::adopt(stream))))
    }

    fn close(&self) {
        if !self.closed.swap(true, Ordering::AcqRel) {
            // A blocked accept returns for a connection and for nothing else.
            _ = LocalConnection::connect(&self.address);
        }
    }
}
