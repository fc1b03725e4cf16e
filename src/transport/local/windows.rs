use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::os::windows::ffi::OsStrExt;
use std::os::windows::io::{AsRawHandle, FromRawHandle, OwnedHandle, RawHandle};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use interprocess::ConnectWaitMode;
use interprocess::os::windows::named_pipe::{DuplexPipeStream, PipeListener, PipeListenerOptions, pipe_mode};
use parking_lot::{Mutex, RwLock};

use windows_sys::Win32::Foundation::{
    ERROR_BROKEN_PIPE, ERROR_IO_PENDING, ERROR_NO_DATA, ERROR_OPERATION_ABORTED, ERROR_PIPE_NOT_CONNECTED,
    WAIT_OBJECT_0, WAIT_TIMEOUT,
};
use windows_sys::Win32::Storage::FileSystem::{ReadFile, WriteFile};
use windows_sys::Win32::System::IO::{CancelIoEx, GetOverlappedResult, OVERLAPPED};
use windows_sys::Win32::System::Pipes::WaitNamedPipeW;
use windows_sys::Win32::System::Threading::{CreateEventW, INFINITE, SetEvent, WaitForMultipleObjects};

use super::SEND_TIMEOUT;
use crate::transport::{Abilities, Attachment, Connection, Peer, TransportError, Wait};

/// As much as a Unix socket holds by default: ordinary messages never wait for their reader.
const PIPE_BUFFER_BYTES: u32 = 208 << 10;

/// How long a client waits for a broker that exists and accepts nobody.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The pipe a broker of this user listens on when told nothing else.
#[must_use]
pub fn default_address() -> String {
    let user = std::env::var("USERNAME").unwrap_or_else(|_| "default".to_owned());
    format!("luna-broker-{user}")
}

pub(in crate::transport) fn own_uid() -> Option<u32> {
    None
}

fn pipe_path(address: &str) -> io::Result<String> {
    if address.is_empty() || address.contains('\0') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a name for a pipe"));
    }
    Ok(format!(r"\\.\pipe\{address}"))
}

/// A connected named pipe.
#[derive(Debug)]
pub struct LocalConnection {
    /// Gone once the connection is closed, and with it the system's handle, which is what the peer notices.
    pipe: RwLock<Option<DuplexPipeStream<pipe_mode::Bytes>>>,
    peer: Peer,
    /// Set once: wakes whoever waits in a read or a write.
    closing: Event,
    /// One of each at a time, so each direction has one event of its own.
    read_done: Mutex<Event>,
    write_done: Mutex<Event>,
}

impl LocalConnection {
    /// Connects to the broker at `address`, the name of a pipe.
    ///
    /// # Errors
    /// [`TransportError::NoListener`].
    pub fn connect(address: &str) -> Result<Self, TransportError> {
        let no_listener = |cause| TransportError::NoListener { address: address.to_owned(), cause };
        Self::adopt(open(address).map_err(no_listener)?)
    }

    fn adopt(pipe: DuplexPipeStream<pipe_mode::Bytes>) -> Result<Self, TransportError> {
        let event = || Event::new().map_err(|cause| TransportError::Os { call: "CreateEvent", cause });
        let peer = Peer { pid: pipe.peer_process_id().ok(), uid: None };
        let (closing, read_done, write_done) = (event()?, Mutex::new(event()?), Mutex::new(event()?));
        Ok(Self { pipe: RwLock::new(Some(pipe)), peer, closing, read_done, write_done })
    }
}

fn open(address: &str) -> io::Result<DuplexPipeStream<pipe_mode::Bytes>> {
    let path = pipe_path(address)?;
    DuplexPipeStream::connect_by_path_with_wait_mode(path.as_str(), ConnectWaitMode::Timeout(CONNECT_TIMEOUT))
}

impl Connection for LocalConnection {
    fn peer(&self) -> Peer {
        self.peer
    }

    fn abilities(&self) -> Abilities {
        Abilities { descriptors: false, same_process: false }
    }

    fn write(&self, parts: &[IoSlice<'_>], attachments: &mut Vec<Attachment>, wait: Wait) -> io::Result<usize> {
        if !attachments.is_empty() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let pipe = self.pipe.read();
        let pipe = pipe.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        // A pipe cannot be asked for room: the caller's own thread must not write.
        if wait == Wait::Never {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let Some(part) = parts.first() else { return Ok(0) };
        let length = u32::try_from(part.len()).unwrap_or(u32::MAX);
        let done = self.write_done.lock();
        let operation = Operation { pipe: pipe.as_raw_handle(), done: &done, closing: &self.closing };
        // SAFETY: `part` is readable for `length` bytes until `complete` returns, and so is the operation's state.
        let written = operation.complete(Some(SEND_TIMEOUT), |overlapped| unsafe {
            WriteFile(operation.pipe, part.as_ptr(), length, ptr::null_mut(), overlapped)
        });
        written.map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut => io::ErrorKind::WouldBlock.into(),
            _ => error,
        })
    }

    fn read(
        &self,
        target: &mut [u8],
        _attachments: Option<&mut Vec<Attachment>>,
        timeout: Option<Duration>,
    ) -> io::Result<usize> {
        let pipe = self.pipe.read();
        let Some(pipe) = pipe.as_ref() else { return Ok(0) };
        let length = u32::try_from(target.len()).unwrap_or(u32::MAX);
        let done = self.read_done.lock();
        let operation = Operation { pipe: pipe.as_raw_handle(), done: &done, closing: &self.closing };
        // SAFETY: `target` is writable for `length` bytes until `complete` returns, and so is the operation's state.
        let read = operation.complete(timeout, |overlapped| unsafe {
            ReadFile(operation.pipe, target.as_mut_ptr(), length, ptr::null_mut(), overlapped)
        });
        match read {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(0),
            read => read,
        }
    }

    fn close(&self) {
        self.closing.set();
        // The lock is had as soon as whoever reads or writes has woken. What was written stays readable for the peer.
        drop(self.pipe.write().take());
    }
}

/// A listening named pipe.
#[derive(Debug)]
pub struct LocalListener {
    listener: PipeListener<pipe_mode::Bytes, pipe_mode::Bytes>,
    address: String,
    closed: AtomicBool,
    /// The connection that woke the last accept. Kept, because accept passes over a client that has already left.
    waker: Mutex<Option<DuplexPipeStream<pipe_mode::Bytes>>>,
}

impl LocalListener {
    /// Listens at `address`, the name of a pipe.
    ///
    /// # Errors
    /// [`TransportError::AlreadyServed`], [`TransportError::Os`].
    pub fn bind(address: &str) -> Result<Self, TransportError> {
        let os = |call| move |cause| TransportError::Os { call, cause };
        let already_served = || TransportError::AlreadyServed { address: address.to_owned() };
        let path = pipe_path(address).map_err(os("naming the pipe"))?;
        if exists(&path) {
            return Err(already_served());
        }
        let options = PipeListenerOptions::new()
            .path(path)
            .input_buffer_size_hint(PIPE_BUFFER_BYTES)
            .output_buffer_size_hint(PIPE_BUFFER_BYTES);
        let listener = options.create_duplex().map_err(|cause| match cause.kind() {
            io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied => already_served(),
            _ => os("listening")(cause),
        })?;
        Ok(Self { listener, address: address.to_owned(), closed: AtomicBool::new(false), waker: Mutex::new(None) })
    }
}

/// Whether somebody listens. Asked although a listener claims to be the pipe's first: wine grants that claim to all.
fn exists(path: &str) -> bool {
    let wide: Vec<u16> = OsStr::new(path).encode_wide().chain([0]).collect();
    // SAFETY: a string that ends in zero, alive during the call.
    let free = unsafe { WaitNamedPipeW(wide.as_ptr(), 1) != 0 };
    // One that has no instance free at this moment is there as well.
    free || io::Error::last_os_error().kind() == io::ErrorKind::TimedOut
}

impl crate::transport::Listener for LocalListener {
    fn address(&self) -> String {
        self.address.clone()
    }

    fn accept(&self) -> Result<Option<Arc<dyn Connection>>, TransportError> {
        if self.closed.load(Ordering::Acquire) {
            return Ok(None);
        }
        let accepted = self.listener.accept();
        if self.closed.load(Ordering::Acquire) {
            return Ok(None);
        }
        let pipe = accepted.map_err(|cause| TransportError::Os { call: "accept", cause })?;
        Ok(Some(Arc::new(LocalConnection::adopt(pipe)?)))
    }

    fn close(&self) {
        if !self.closed.swap(true, Ordering::AcqRel) {
            // A blocked accept returns for a connection and for nothing else.
            *self.waker.lock() = open(&self.address).ok();
        }
    }
}

/// A manual-reset event.
#[derive(Debug)]
struct Event(OwnedHandle);

impl Event {
    fn new() -> io::Result<Self> {
        // SAFETY: no attributes and no name; the handle is owned by nobody else.
        unsafe {
            let handle = CreateEventW(ptr::null(), 1, 0, ptr::null());
            if handle.is_null() {
                Err(io::Error::last_os_error())
            } else {
                Ok(Self(OwnedHandle::from_raw_handle(handle)))
            }
        }
    }

    fn set(&self) {
        // SAFETY: an open event. It cannot fail then.
        unsafe { SetEvent(self.0.as_raw_handle()) };
    }
}

/// A read or a write under way: it ends with its bytes, with its time, or when the connection is closed. The pipes are
/// opened for overlapped calls, as nothing else can be given up.
struct Operation<'a> {
    pipe: RawHandle,
    done: &'a Event,
    closing: &'a Event,
}

impl Operation<'_> {
    /// Makes the system call and waits for its end; how many bytes were moved.
    ///
    /// # Errors
    /// `TimedOut`, `BrokenPipe` where either side closed the pipe, or the system's.
    fn complete(&self, timeout: Option<Duration>, call: impl FnOnce(*mut OVERLAPPED) -> i32) -> io::Result<usize> {
        let mut overlapped = OVERLAPPED { hEvent: self.done.0.as_raw_handle(), ..OVERLAPPED::default() };
        let overlapped = &raw mut overlapped;
        if call(overlapped) == 0 {
            let error = io::Error::last_os_error();
            if code(&error) != ERROR_IO_PENDING {
                return Err(ended(error));
            }
        }
        let events = [self.done.0.as_raw_handle(), self.closing.0.as_raw_handle()];
        let mut moved = 0;
        // SAFETY: both events are open. The overlapped structure is this operation's own and, like the caller's buffer,
        // stays in place until the operation has ended, which the last call waits for.
        let (woken, succeeded) = unsafe {
            let woken = WaitForMultipleObjects(2, events.as_ptr(), 0, timeout.map_or(INFINITE, milliseconds));
            if woken != WAIT_OBJECT_0 {
                CancelIoEx(self.pipe, overlapped);
            }
            (woken, GetOverlappedResult(self.pipe, overlapped, &raw mut moved, 1) != 0)
        };
        if succeeded {
            // Also where the bytes came at the very moment of giving up.
            return Ok(moved as usize);
        }
        let error = io::Error::last_os_error();
        match (code(&error), woken) {
            (ERROR_OPERATION_ABORTED, WAIT_TIMEOUT) => Err(io::ErrorKind::TimedOut.into()),
            (ERROR_OPERATION_ABORTED, _) => Err(io::ErrorKind::BrokenPipe.into()),
            _ => Err(ended(error)),
        }
    }
}

/// Folds the ways in which the system says that the other end is gone into one.
fn ended(error: io::Error) -> io::Error {
    match code(&error) {
        ERROR_BROKEN_PIPE | ERROR_NO_DATA | ERROR_PIPE_NOT_CONNECTED => io::ErrorKind::BrokenPipe.into(),
        _ => error,
    }
}

/// The system's number of an error; 0, which is none, where it has no such number.
fn code(error: &io::Error) -> u32 {
    error.raw_os_error().map_or(0, i32::cast_unsigned)
}

/// At least the time asked for; never the value that means for ever.
fn milliseconds(time: Duration) -> u32 {
    u32::try_from(time.as_nanos().div_ceil(1_000_000)).map_or(INFINITE - 1, |time| time.min(INFINITE - 1))
}
