use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

#[cfg(not(target_os = "linux"))]
use interprocess::local_socket::traits::StreamCommon as _;
use interprocess::local_socket::traits::{Listener as _, Stream as _};
use interprocess::local_socket::{GenericFilePath, Listener, ListenerOptions, Stream, ToFsName};
use interprocess::os::unix::local_socket::ListenerOptionsExt;
use rustix::fs::{FlockOperation, flock};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    Shutdown, recv, recvmsg, send, sendmsg, shutdown, sockopt,
};

use super::SEND_TIMEOUT;
use crate::transport::{Abilities, Attachment, Connection, FolderDefect, Peer, TransportError, Wait};

/// Most descriptors in one message, either way.
const MAX_FDS: usize = 8;

/// Asked for on both ends; the kernel cuts it to its limit. Matters only for bytes behind frames.
const SOCKET_BUFFER_BYTES: usize = 1 << 20;

/// A link in a folder that others can write to must not choose what is opened.
const NO_FOLLOW: i32 = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();

/// The socket a broker of this user listens on when told nothing else.
#[must_use]
pub fn default_address() -> String {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_dir());
    let folder = runtime
        .unwrap_or_else(|| std::env::temp_dir().join(format!("luna-broker-{}", rustix::process::getuid().as_raw())));
    folder.join("luna-broker.sock").to_string_lossy().into_owned()
}

pub(in crate::transport) fn own_uid() -> Option<u32> {
    Some(rustix::process::geteuid().as_raw())
}

/// A connected Unix socket.
#[derive(Debug)]
pub struct LocalConnection {
    stream: Stream,
    peer: Peer,
    /// The receive timeout the socket has now, in nanoseconds, 0 for none: setting it costs a system call.
    receive_timeout_ns: AtomicU64,
}

impl LocalConnection {
    /// Connects to the broker at `address`, a path.
    ///
    /// # Errors
    /// [`TransportError::NoListener`], [`TransportError::ForeignOwner`] where neither this user nor root listens there.
    pub fn connect(address: &str) -> Result<Self, TransportError> {
        let no_listener = |cause| TransportError::NoListener { address: address.to_owned(), cause };
        let name = address.to_fs_name::<GenericFilePath>().map_err(no_listener)?;
        let connection = Self::adopt(Stream::connect(name).map_err(no_listener)?)?;
        let user = rustix::process::geteuid().as_raw();
        // A stranger's broker could show this user's prompts and pictures to the stranger.
        match connection.peer.uid {
            Some(owner) if owner != user && owner != 0 => {
                Err(TransportError::ForeignOwner { address: address.to_owned(), owner, user })
            }
            _ => Ok(connection),
        }
    }

    fn adopt(stream: Stream) -> Result<Self, TransportError> {
        let os = |call| move |cause| TransportError::Os { call, cause };
        let peer = peer_of(&stream).map_err(os("reading the peer's credentials"))?;
        stream.set_send_timeout(Some(SEND_TIMEOUT)).map_err(os("setting the send timeout"))?;
        let connection = Self { stream, peer, receive_timeout_ns: AtomicU64::new(0) };
        let fd = connection.fd();
        sockopt::set_socket_send_buffer_size(fd, SOCKET_BUFFER_BYTES).map_err(|e| os("setsockopt")(e.into()))?;
        sockopt::set_socket_recv_buffer_size(fd, SOCKET_BUFFER_BYTES).map_err(|e| os("setsockopt")(e.into()))?;
        Ok(connection)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match &self.stream {
            Stream::UdSocket(stream) => stream.as_fd(),
        }
    }

    fn set_receive_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        let wanted = nanoseconds(timeout);
        if self.receive_timeout_ns.load(Ordering::Relaxed) != wanted {
            self.stream.set_recv_timeout(timeout.map(|timeout| timeout.max(Duration::from_micros(1))))?;
            self.receive_timeout_ns.store(wanted, Ordering::Relaxed);
        }
        Ok(())
    }

    /// A receive timeout that the socket has already and that is shorter than `wanted`.
    fn shorter_timeout(&self, wanted: Option<Duration>) -> Option<Duration> {
        let kept = self.receive_timeout_ns.load(Ordering::Relaxed);
        let is_shorter = kept != 0 && (wanted.is_none() || kept < nanoseconds(wanted));
        is_shorter.then(|| Duration::from_nanos(kept))
    }

    /// # Errors
    /// `TimedOut` where nothing came within the time the socket has now.
    fn receive(&self, target: &mut [u8], attachments: Option<&mut Vec<Attachment>>) -> io::Result<usize> {
        let timed_out = |errno: rustix::io::Errno| match io::Error::from(errno) {
            error if error.kind() == io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            error => error,
        };
        let Some(attachments) = attachments else {
            // The kernel closes descriptors that come with bytes read this way.
            let (count, _) = recv(self.fd(), target, RecvFlags::empty()).map_err(timed_out)?;
            return Ok(count);
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = recvmsg(self.fd(), &mut [IoSliceMut::new(target)], &mut control, RecvFlags::CMSG_CLOEXEC);
        let received = received.map_err(timed_out)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                attachments.extend(fds.map(Attachment::Fd));
            }
        }
        Ok(received.bytes)
    }
}

/// A timeout as [`LocalConnection`] remembers it.
fn nanoseconds(timeout: Option<Duration>) -> u64 {
    timeout.map_or(0, |timeout| u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX).max(1))
}

/// The process at the other end. One in a PID namespace that this process does not look into has no number here, and is
/// served all the same; libraries take it for a lost connection, or for a number that cannot be 0.
#[cfg(target_os = "linux")]
fn peer_of(stream: &Stream) -> io::Result<Peer> {
    use std::os::fd::AsRawFd;
    let Stream::UdSocket(stream) = stream;
    let mut found = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut length = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: both pointers are valid for the call, the first one for `length` bytes; any bytes are a value of the type.
    let answer = unsafe {
        let (level, option) = (libc::SOL_SOCKET, libc::SO_PEERCRED);
        libc::getsockopt(stream.as_fd().as_raw_fd(), level, option, (&raw mut found).cast(), &raw mut length)
    };
    match answer {
        0 if found.uid == u32::MAX => Err(io::ErrorKind::NotConnected.into()),
        0 => Ok(Peer { pid: u32::try_from(found.pid).ok().filter(|pid| *pid != 0), uid: Some(found.uid) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The process at the other end.
#[cfg(not(target_os = "linux"))]
fn peer_of(stream: &Stream) -> io::Result<Peer> {
    let found = stream.peer_creds()?;
    Ok(Peer { pid: found.pid().and_then(|pid| u32::try_from(pid).ok()), uid: found.euid() })
}

impl Connection for LocalConnection {
    fn peer(&self) -> Peer {
        self.peer
    }

    fn abilities(&self) -> Abilities {
        Abilities { descriptors: true, same_process: false }
    }

    fn write(&self, parts: &[IoSlice<'_>], attachments: &mut Vec<Attachment>, wait: Wait) -> io::Result<usize> {
        let flags = match wait {
            Wait::Block => SendFlags::NOSIGNAL,
            Wait::Never => SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        };
        if let ([part], true) = (parts, attachments.is_empty()) {
            return Ok(send(self.fd(), part, flags)?);
        }
        let fds: Vec<BorrowedFd<'_>> = attachments
            .iter()
            .map(|attachment| match attachment {
                Attachment::Fd(fd) => Ok(fd.as_fd()),
                Attachment::Local(_) => Err(io::Error::from(io::ErrorKind::Unsupported)),
            })
            .collect::<io::Result<_>>()?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one frame"));
        }
        let count = sendmsg(self.fd(), parts, &mut control, flags)?;
        attachments.clear();
        Ok(count)
    }

    fn read(
        &self,
        target: &mut [u8],
        mut attachments: Option<&mut Vec<Attachment>>,
        timeout: Option<Duration>,
    ) -> io::Result<usize> {
        // Frames and payloads are waited for with different patience, in turn, and nearly always come before either ends:
        // the shorter time stays set, and the longer one is only set by who has waited that long.
        let Some(kept) = self.shorter_timeout(timeout) else {
            self.set_receive_timeout(timeout)?;
            return self.receive(target, attachments);
        };
        match self.receive(target, attachments.as_deref_mut()) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                self.set_receive_timeout(timeout.map(|timeout| timeout.saturating_sub(kept)))?;
                self.receive(target, attachments)
            }
            done => done,
        }
    }

    fn close(&self) {
        // The only failure is a socket that is no longer connected, which is the aim.
        _ = shutdown(self.fd(), Shutdown::Both);
    }
}

/// The default folder has a name that anybody can guess and make first.
fn check_private(folder: &Path) -> Result<(), TransportError> {
    let found = fs::symlink_metadata(folder);
    let found = found.map_err(|cause| TransportError::Os { call: "looking at the socket's folder", cause })?;
    let user = rustix::process::geteuid().as_raw();
    let defect = if found.is_symlink() {
        FolderDefect::Link
    } else if found.uid() != user {
        FolderDefect::ForeignOwner { owner: found.uid(), user }
    } else if found.mode() & 0o022 != 0 {
        FolderDefect::Writable { mode: found.mode() & 0o7777 }
    } else {
        return Ok(());
    };
    Err(TransportError::UnsafeFolder { folder: folder.to_owned(), defect })
}

/// A listening Unix socket.
#[derive(Debug)]
pub struct LocalListener {
    listener: Listener,
    path: PathBuf,
    closed: AtomicBool,
    /// Held while this broker serves the path: two that start at once cannot both take a dead socket's place.
    _lock: File,
}

impl LocalListener {
    /// Listens at `address`, a path. A socket that a killed broker left behind is replaced; the socket is for this
    /// user only, and so is its folder where it has to be made.
    ///
    /// # Errors
    /// [`TransportError::AlreadyServed`], [`TransportError::NotASocket`], [`TransportError::UnsafeFolder`] for the
    /// folder of [`default_address`], [`TransportError::Os`].
    pub fn bind(address: &str) -> Result<Self, TransportError> {
        let os = |call| move |cause| TransportError::Os { call, cause };
        let path = PathBuf::from(address);
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)
                .map_err(os("making the socket's folder"))?;
            if address == default_address() {
                check_private(folder)?;
            }
        }
        let lock = Self::lock(&path)?;
        Self::clear(&path)?;
        let name = path.as_path().to_fs_name::<GenericFilePath>().map_err(os("naming the socket"))?;
        let listener = ListenerOptions::new().name(name).mode(0o600).create_sync().map_err(os("listening"))?;
        Ok(Self { listener, path, closed: AtomicBool::new(false), _lock: lock })
    }

    fn lock(path: &Path) -> Result<File, TransportError> {
        let os = |call| move |cause| TransportError::Os { call, cause };
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .custom_flags(NO_FOLLOW)
            .open(lock_path);
        let lock = lock.map_err(os("opening the socket's lock file"))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| TransportError::AlreadyServed { address: path.to_string_lossy().into_owned() })?;
        Ok(lock)
    }

    /// Removes a dead socket, and nothing else.
    fn clear(path: &Path) -> Result<(), TransportError> {
        let Ok(found) = fs::symlink_metadata(path) else { return Ok(()) };
        if !found.file_type().is_socket() {
            return Err(TransportError::NotASocket { path: path.to_owned() });
        }
        let address = path.to_string_lossy().into_owned();
        let user = rustix::process::geteuid().as_raw();
        if found.uid() != user {
            return Err(TransportError::ForeignOwner { address, owner: found.uid(), user });
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(TransportError::AlreadyServed { address });
        }
        fs::remove_file(path).map_err(|cause| TransportError::Os { call: "removing a dead socket", cause })
    }
}

impl crate::transport::Listener for LocalListener {
    fn address(&self) -> String {
        self.path.to_string_lossy().into_owned()
    }

    fn accept(&self) -> Result<Option<Arc<dyn Connection>>, TransportError> {
        let accepted = self.listener.accept();
        if self.closed.load(Ordering::Acquire) {
            return Ok(None);
        }
        let stream = accepted.map_err(|cause| TransportError::Os { call: "accept", cause })?;
        Ok(Some(Arc::new(LocalConnection::adopt(stream)?)))
    }

    fn close(&self) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let Listener::UdSocket(listener) = &self.listener;
        // Wakes a blocked accept on Linux, whatever has become of the path; elsewhere a connection does.
        if shutdown(listener.as_fd(), Shutdown::Both).is_err() {
            _ = std::os::unix::net::UnixStream::connect(&self.path);
        }
    }
}
