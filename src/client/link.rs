use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use parking_lot::{Mutex, RwLock};

use super::janitor;
use super::leases::Leases;
use super::memory::{ImportedMemory, Retired};
use super::open_gpu::{LinkGpu, travels_beside};
use super::opener::Opener;
use super::options::CallOptions;
use super::router::{Answer, Router, Turn};
use super::session::{Negotiation, SessionInfo};
use super::weights::WeightMaps;
use crate::config::ClientConfig;
use crate::error::{Error, ErrorKind, Fault, Result};
use crate::id::{AttachmentId, RequestId};
use crate::protocol::{
    ArenaPlace, ClientMessage, GpuAnswer, Operation, Outcome, ProtocolError, Release, Reply, Request, Rung,
    ServerMessage, codec,
};
use crate::service::GpuOrder;
use crate::transport::{Connection, FrameReader, FrameWriter, TransportError, Wait, begin_frame, finish_frame};

mod giving_back;
mod gpus;

/// How often a waiting caller looks at its deadline and whether it was interrupted.
const TICK: Duration = Duration::from_millis(100);

/// How long the last user of a session waits for its arenas to be unmapped, so that a program that ends next leaves nothing
/// to the driver. It takes a moment, unless GPU work is in flight.
const FAREWELL: Duration = Duration::from_millis(500);

/// More than any result: the client asked for it, so its size is no surprise.
const MAX_PAYLOAD_BYTES: u64 = 1 << 40;

/// One session over one connection.
#[derive(Debug)]
pub(super) struct Link {
    connection: Arc<dyn Connection>,
    address: String,
    reader: Mutex<FrameReader>,
    writer: Mutex<Outgoing>,
    router: Router,
    next: AtomicU64,
    closing: AtomicBool,
    /// The connection ended before the client closed it.
    lost: AtomicBool,
    opener: Opener,
    pub(super) session: SessionInfo,
    /// The only rung that the client wants, on every device it can have.
    pub(super) forced: Option<Rung>,
    gpu_order: GpuOrder,
    gpus: RwLock<Vec<Arc<LinkGpu>>>,
    /// Held while a GPU's rung is looked for: the search is a conversation.
    opening: Mutex<()>,
    pub(super) memory: ImportedMemory,
    pub(super) weight_maps: WeightMaps,
    /// Attachments to be given back.
    detached: Mutex<Vec<AttachmentId>>,
    /// Held while they are being given back. Whoever notes another one does not wait for that.
    detaching: Mutex<()>,
    /// What the janitor is to drop. Dropped itself to end the janitor.
    retired: Mutex<Option<Sender<Retired>>>,
    /// Disconnected once the janitor has ended.
    janitor_gone: Receiver<()>,
    janitor: OnceLock<ThreadId>,
}

/// Reused from request to request.
#[derive(Debug, Default)]
struct Outgoing {
    frame: Vec<u8>,
    releases: Vec<Release>,
}

impl Link {
    /// Negotiates a session over `connection`.
    ///
    /// # Errors
    /// As [`Negotiation::run`].
    pub(super) fn open(connection: Arc<dyn Connection>, address: &str, config: &ClientConfig) -> Result<Arc<Self>> {
        let mut reader = FrameReader::new(codec::MAX_MESSAGE_BYTES, MAX_PAYLOAD_BYTES);
        let (leases, rings) = Leases::new();
        let memory = ImportedMemory::new(leases, config.idle_input_bytes);
        let deadline = Instant::now().checked_add(config.connect_timeout);
        let negotiation = Negotiation { connection: &*connection, reader: &mut reader, deadline };
        let session = negotiation.run(config, &memory).inspect_err(|_| connection.close())?;
        let (retired, to_drop) = unbounded();
        let (janitor_alive, janitor_gone) = bounded(0);
        let link = Arc::new(Self {
            connection,
            address: address.to_owned(),
            reader: Mutex::new(reader),
            writer: Mutex::default(),
            router: Router::default(),
            next: AtomicU64::new(1),
            closing: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            opener: Opener::this(),
            session,
            forced: config.rung,
            gpu_order: config.gpu_order,
            gpus: RwLock::default(),
            opening: Mutex::default(),
            memory,
            weight_maps: WeightMaps::default(),
            detached: Mutex::default(),
            detaching: Mutex::default(),
            retired: Mutex::new(Some(retired)),
            janitor_gone,
            janitor: OnceLock::new(),
        });
        let weak = Arc::downgrade(&link);
        let janitor = spawn("luna-janitor", move || {
            janitor::run(&weak, &rings, &to_drop);
            // What was not taken goes before the word that nothing is left.
            drop(to_drop);
            drop(janitor_alive);
        })?;
        _ = link.janitor.set(janitor);
        Ok(link)
    }

    /// Whether a new session is needed.
    pub(super) fn is_over(&self) -> bool {
        self.closing.load(Ordering::Acquire) || self.router.is_lost()
    }

    /// Sends a request, with `payload` behind it, and waits for its answer. A fault is an error.
    ///
    /// # Errors
    /// The broker's fault, [`ErrorKind::ConnectionLost`], [`ErrorKind::Timeout`], [`ErrorKind::Cancelled`]; as
    /// [`Opener::check`].
    pub(super) fn call(&self, operation: Operation, payload: &[u8], options: &CallOptions<'_>) -> Result<Answer> {
        self.opener.check()?;
        let started = Instant::now();
        let id = RequestId(self.next.fetch_add(1, Ordering::Relaxed));
        self.router.expect(id)?;
        let timeout_ms = options.timeout.map(|timeout| u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX));
        if let Err(error) = self.send_request(id, timeout_ms, operation, payload) {
            _ = self.router.give_up(id);
            return Err(error);
        }
        let deadline = options.timeout.and_then(|timeout| started.checked_add(timeout));
        let answer = self.wait(id, deadline, options)?;
        match answer.reply.outcome {
            Outcome::Fault(fault) => Err(fault.into()),
            _ => Ok(answer),
        }
    }

    fn send_request(&self, id: RequestId, timeout_ms: Option<u32>, operation: Operation, payload: &[u8]) -> Result<()> {
        // Who drops weights and asks for others needs the room, or the name, of the first.
        self.send_detached()?;
        let mut releases = std::mem::take(&mut self.writer.lock().releases);
        // Before the lock: marking GPU work may take its time, and others want to write.
        self.memory.leases.take_released(&mut releases);
        let mut writer = self.writer.lock();
        let message = ClientMessage::Request(Request { id, timeout_ms, releases, operation });
        let sent = self.write(&mut writer.frame, &message, payload);
        if let ClientMessage::Request(Request { mut releases, .. }) = message {
            match &sent {
                // The message was too long, and nothing left: what it would have given back goes with the next one.
                Err(error) if error.kind() == ErrorKind::Protocol => {}
                _ => releases.clear(),
            }
            writer.releases = releases;
        }
        sent
    }

    fn write(&self, frame: &mut Vec<u8>, message: &ClientMessage, payload: &[u8]) -> Result<()> {
        begin_frame(frame);
        codec::encode(message, frame)?;
        finish_frame(frame, payload.len() as u64);
        let written = FrameWriter::default().write(&*self.connection, frame, payload, &mut Vec::new(), Wait::Block);
        written.map(|_| ()).map_err(|error| self.lose(error.into()))
    }

    fn wait(&self, id: RequestId, deadline: Option<Instant>, options: &CallOptions<'_>) -> Result<Answer> {
        loop {
            match self.router.turn(id) {
                Turn::Answered(answer) => return Ok(*answer),
                Turn::Lost(fault) => return Err(fault.into()),
                Turn::Read => match self.read_for_a_while(id, patience(deadline)).transpose() {
                    Some(read) => {
                        self.router.stop_reading(id);
                        return read;
                    }
                    // Who is asked below may take its time, and may use this very client.
                    None => self.router.pause_reading(id),
                },
                Turn::Sleep => std::thread::park_timeout(patience(deadline)),
            }
            if let Some(given_up) = given_up(deadline, options) {
                return match self.router.give_up(id) {
                    Some(answer) => Ok(*answer),
                    None => {
                        self.cancel(id);
                        Err(given_up)
                    }
                };
            }
        }
    }

    /// Reads for everybody until the answer to `id` comes; `None` once it took so long.
    fn read_for_a_while(&self, id: RequestId, longest: Duration) -> Result<Option<Answer>> {
        let began = Instant::now();
        loop {
            let left = longest.saturating_sub(began.elapsed());
            let read = self.read_and_deliver(Some(id), Some(left))?;
            if read.is_some() || began.elapsed() >= longest {
                return Ok(read);
            }
        }
    }

    /// Reads one message. The answer to `mine` is returned, any other goes to its caller.
    ///
    /// # Errors
    /// Why the connection is gone; everybody else has been told too.
    fn read_and_deliver(&self, mine: Option<RequestId>, timeout: Option<Duration>) -> Result<Option<Answer>> {
        match self.read_answer(timeout) {
            Ok(Some(answer)) if Some(answer.reply.id) == mine => Ok(Some(answer)),
            Ok(Some(answer)) => {
                if let Some(unwanted) = self.router.deliver(answer) {
                    self.dispose(&unwanted);
                }
                Ok(None)
            }
            Ok(None) => Ok(None),
            Err(error) => Err(self.lose(error)),
        }
    }

    fn read_answer(&self, timeout: Option<Duration>) -> Result<Option<Answer>> {
        let mut reader = self.reader.lock();
        let header = match reader.next(&*self.connection, timeout) {
            Err(TransportError::TimedOut) => return Ok(None),
            header => header?,
        };
        let reply = match codec::decode(reader.message())? {
            ServerMessage::Reply(reply) => reply,
            ServerMessage::Closing => {
                self.closing.store(true, Ordering::Release);
                return Ok(None);
            }
            ServerMessage::Refused(fault) => return Err(fault.into()),
            other => return Err(ProtocolError::Unexpected { message: other.name() }.into()),
        };
        let opened = self.import(&mut reader, &reply)?;
        let handles = match &reply.outcome {
            Outcome::Gpu(step) => reader.take_attachments(handles_of(step)),
            Outcome::Attached(weights) => reader.take_attachments(usize::from(travels_beside(&weights.handle))),
            Outcome::Draft(offer) => reader.take_attachments(usize::from(travels_beside(&offer.handle))),
            _ => Vec::new(),
        };
        let payload = match usize::try_from(header.payload) {
            Ok(0) => None,
            Ok(length) => {
                let mut received = self.memory.pool.take(length);
                let target = received.bytes.get_mut(..length).unwrap_or_default();
                reader.read_payload(&*self.connection, target)?;
                Some(received)
            }
            Err(_) => {
                return Err(TransportError::FrameTooLong { length: header.payload, limit: usize::MAX as u64 }.into());
            }
        };
        drop(reader);
        for arena in opened {
            self.send(&ClientMessage::Opened { arena })?;
        }
        Ok(Some(Answer { reply, payload, handles }))
    }

    fn import(&self, reader: &mut FrameReader, reply: &Reply) -> Result<Vec<crate::id::ArenaId>> {
        let mut opened = Vec::new();
        for offer in &reply.arenas {
            let attached = usize::from(travels_beside(&offer.handle));
            let attachment = reader.take_attachments(attached).pop();
            let gpu = match offer.place {
                ArenaPlace::Host => None,
                ArenaPlace::Staging(gpu) => Some(self.gpu(gpu)?),
                // Not the end of the session: whoever needs the arena finds it missing, and takes another rung.
                ArenaPlace::Gpu(gpu) => {
                    let gpu = self.gpu(gpu);
                    if let Err(error) = gpu.and_then(|gpu| self.memory.import(offer, attachment, Some(&gpu.device))) {
                        tracing::warn!(arena = %offer.arena, %error, "memory of the GPU could not be opened");
                    }
                    continue;
                }
            };
            self.memory.import(offer, attachment, gpu.as_ref().map(|gpu| &gpu.device))?;
            opened.push(offer.arena);
        }
        Ok(opened)
    }

    fn cancel(&self, id: RequestId) {
        // A connection that is gone needs no cancelling.
        _ = self.send(&ClientMessage::Cancel { id });
    }

    fn send(&self, message: &ClientMessage) -> Result<()> {
        self.opener.check()?;
        let mut writer = self.writer.lock();
        self.write(&mut writer.frame, message, &[])
    }

    /// Notes why the connection is gone and tells everybody.
    fn lose(&self, error: Error) -> Error {
        let fault = match error.kind() {
            ErrorKind::ConnectionLost | ErrorKind::Io | ErrorKind::Timeout => Fault::new(
                ErrorKind::ConnectionLost,
                format!(
                    "the broker at {} went away: {}; tensors already received stay readable",
                    self.address,
                    error.message()
                ),
                "start it again; the next call connects anew",
            ),
            _ => error.into_fault(),
        };
        self.lost.store(true, Ordering::Release);
        self.router.lose(fault.clone());
        for gpu in self.gpus.read().iter() {
            gpu.lose_owner();
        }
        self.connection.close();
        self.end_memory();
        fault.into()
    }

    /// No arena is used any more. Unmapping one may wait for work on the GPU that has nothing to do with the session, so
    /// the janitor does it: whoever is told that the session is over is told at once.
    fn end_memory(&self) {
        let arenas = self.memory.end();
        if let Some(retired) = &*self.retired.lock() {
            // A janitor that is gone leaves the arenas to be dropped here.
            _ = retired.send(arenas);
        }
    }

    /// Ends the session in order. Tensors already received stay readable.
    pub(super) fn close(&self) {
        if !self.opener.is_here() {
            return;
        }
        if !self.router.is_lost() {
            // Slots in GPU memory that are not given back are kept from others until this process has ended.
            self.memory.drop_idle();
            self.release_now();
            _ = self.send(&ClientMessage::Goodbye);
            let fault = Fault::new(ErrorKind::ConnectionLost, "the client was closed", "connect again");
            self.router.lose(fault);
        }
        self.end_memory();
        self.connection.close();
        self.retired.lock().take();
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let was_lost = self.lost.load(Ordering::Acquire);
        self.close();
        let is_janitor = self.janitor.get() == Some(&std::thread::current().id());
        // Who connects anew because the broker went away does not wait.
        if !was_lost && !is_janitor && self.opener.is_here() {
            _ = self.janitor_gone.recv_timeout(FAREWELL);
        }
    }
}

/// Handles that travel beside a step of the search for a GPU's rung.
fn handles_of(step: &GpuAnswer) -> usize {
    match step {
        GpuAnswer::Settled { .. } | GpuAnswer::Marked { .. } => 0,
        GpuAnswer::Probe(offer) => {
            let arena = offer.arena.as_ref().is_some_and(|arena| travels_beside(&arena.handle));
            let page = offer.fence.as_ref().is_some_and(|fence| travels_beside(&fence.page));
            usize::from(arena) + usize::from(page)
        }
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<ThreadId> {
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run);
    thread.map(|thread| thread.thread().id()).map_err(|error| {
        Error::new(ErrorKind::Io, format!("a thread could not be started: {error}"), "raise the limit of processes")
    })
}

/// How long to wait before looking at the deadline again. The same value nearly always: changing a socket's timeout
/// costs a system call.
fn patience(deadline: Option<Instant>) -> Duration {
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    left.map_or(TICK, |left| left.clamp(Duration::from_millis(1), TICK))
}

fn given_up(deadline: Option<Instant>, options: &CallOptions<'_>) -> Option<Error> {
    if options.interrupted.is_some_and(|interrupted| interrupted()) {
        return Some(Error::new(ErrorKind::Cancelled, "the caller was interrupted; the request was taken back", ""));
    }
    if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
        let message = "no answer came within the time allowed; the request was taken back";
        return Some(Error::new(ErrorKind::Timeout, message, "allow more time, or look at `luna-broker status`"));
    }
    None
}
