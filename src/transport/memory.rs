use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::{Condvar, Mutex};

use super::{Abilities, Attachment, Connection, Listener, Peer, TransportError, Wait};

/// As much as a Unix socket holds by default, so that back-pressure is met in tests as in production.
const CAPACITY_BYTES: usize = 208 << 10;

/// The in-memory counterpart of the send timeout of a socket.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct Stream {
    bytes: VecDeque<u8>,
    attachments: Vec<Attachment>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Pipe {
    stream: Mutex<Stream>,
    changed: Condvar,
}

impl Pipe {
    fn close(&self) {
        self.stream.lock().closed = true;
        self.changed.notify_all();
    }
}

/// One end of a byte stream inside this process.
#[derive(Debug)]
pub struct MemoryConnection {
    incoming: Arc<Pipe>,
    outgoing: Arc<Pipe>,
}

/// Two connected ends.
#[must_use]
pub fn memory_pair() -> (MemoryConnection, MemoryConnection) {
    let (one, other) = (Arc::new(Pipe::default()), Arc::new(Pipe::default()));
    let first = MemoryConnection { incoming: Arc::clone(&one), outgoing: Arc::clone(&other) };
    (first, MemoryConnection { incoming: other, outgoing: one })
}

impl Connection for MemoryConnection {
    fn peer(&self) -> Peer {
        Peer { pid: Some(std::process::id()), uid: super::local::own_uid() }
    }

    fn abilities(&self) -> Abilities {
        Abilities { descriptors: cfg!(unix), same_process: true }
    }

    fn write(&self, parts: &[IoSlice<'_>], attachments: &mut Vec<Attachment>, wait: Wait) -> io::Result<usize> {
        let mut stream = self.outgoing.stream.lock();
        while !stream.closed && stream.bytes.len() >= CAPACITY_BYTES {
            let timed_out =
                wait == Wait::Never || self.outgoing.changed.wait_for(&mut stream, SEND_TIMEOUT).timed_out();
            if timed_out {
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
        if stream.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let mut room = CAPACITY_BYTES - stream.bytes.len();
        let mut written = 0;
        for part in parts {
            let count = part.len().min(room);
            stream.bytes.extend(&part[..count]);
            room -= count;
            written += count;
        }
        stream.attachments.append(attachments);
        drop(stream);
        self.outgoing.changed.notify_all();
        Ok(written)
    }

    fn read(
        &self,
        target: &mut [u8],
        attachments: Option<&mut Vec<Attachment>>,
        timeout: Option<Duration>,
    ) -> io::Result<usize> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut stream = self.incoming.stream.lock();
        while stream.bytes.is_empty() && !stream.closed {
            match deadline {
                None => self.incoming.changed.wait(&mut stream),
                Some(deadline) => {
                    if self.incoming.changed.wait_until(&mut stream, deadline).timed_out() {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
            }
        }
        let count = stream.bytes.len().min(target.len());
        for (place, byte) in target.iter_mut().zip(stream.bytes.drain(..count)) {
            *place = byte;
        }
        match attachments {
            Some(attachments) => attachments.append(&mut stream.attachments),
            None => stream.attachments.clear(),
        }
        drop(stream);
        self.incoming.changed.notify_all();
        Ok(count)
    }

    fn close(&self) {
        self.incoming.close();
        self.outgoing.close();
    }
}

impl Drop for MemoryConnection {
    fn drop(&mut self) {
        self.close();
    }
}

/// Accepts connections from inside this process.
#[derive(Debug)]
pub struct MemoryListener {
    arrivals: Receiver<MemoryConnection>,
    /// Gone once the listener is closed.
    entrance: Mutex<Option<Sender<MemoryConnection>>>,
}

impl Default for MemoryListener {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryListener {
    /// A listener that nobody has connected to.
    #[must_use]
    pub fn new() -> Self {
        let (entrance, arrivals) = unbounded();
        Self { arrivals, entrance: Mutex::new(Some(entrance)) }
    }

    /// A new connection to this listener.
    ///
    /// # Errors
    /// [`TransportError::Closed`] once the listener is closed.
    pub fn connect(&self) -> Result<MemoryConnection, TransportError> {
        let (ours, theirs) = memory_pair();
        let entrance = self.entrance.lock();
        let entrance = entrance.as_ref().ok_or(TransportError::Closed)?;
        entrance.send(theirs).map_err(|_| TransportError::Closed)?;
        Ok(ours)
    }
}

impl Listener for MemoryListener {
    fn address(&self) -> String {
        "in-process".to_owned()
    }

    fn accept(&self) -> Result<Option<Arc<dyn Connection>>, TransportError> {
        Ok(self.arrivals.recv().ok().map(|connection| Arc::new(connection) as Arc<dyn Connection>))
    }

    fn close(&self) {
        self.entrance.lock().take();
    }
}
