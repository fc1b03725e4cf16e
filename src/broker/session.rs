use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::admission::{admit, refuse_or_ignore};
use super::gpu::BrokerGpu;
use super::incoming::Incoming;
use super::jobs::{Unfinished, VaeCallJob, VaeWork};
use super::memories::{Memories, SlotSource};
use super::memory::{Handing, Held, SessionMemory};
use super::open_gpu::{GpuDoor, Step};
use super::outbox::Outbox;
use super::pool::{ArenaPool, Limits};
use super::quarantine::Process;
use super::responder::{OpenSession, Responder, SessionLink};
use super::state::State;
use super::weights::Unloaded;
use crate::device::{CopyStream, Device, HostDevice, HostSharing, InProcessDevice};
use crate::error::{Error, ErrorKind, Fault, Result};
use crate::id::{GpuUuid, RequestId, SessionId};
use crate::lane::Entry;
use crate::model::HandOff;
use crate::protocol::{
    Accepted, Action, DeviceRung, FailureCode, Features, Force, GpuTarget, Hello, MAX_TABLE_BYTES, NONCE_BYTES,
    Operation, Outcome, PROTOCOL_VERSION, ProbeAnswer, ProbeOffer, ProbeOutcome, PublishRequest, Reason, Release, Rung,
    ServerMessage, SlotPlace, TensorSource, VaeRequest, Welcome, codec, decode_table, negotiate, settle,
};
use crate::service::Service;
use crate::tensor::{DType, Dims, TensorMeta};
use crate::transport::{Abilities, Connection, FrameReader, TransportError};

/// One connection on the broker's side, on the thread that reads it.
pub(super) struct Session {
    state: Arc<State>,
    link: Arc<SessionLink>,
    connection: Incoming,
    reader: FrameReader,
    has_room: bool,
    /// What both sides can do; nothing before negotiation.
    features: Features,
    probing: Option<Probing>,
    /// Absent until the session is open.
    gpu_door: Option<GpuDoor>,
    /// Watched from the first GPU on.
    process: Option<Process>,
}

/// A session between its welcome and the answer to its probe.
struct Probing {
    hello: Hello,
    planned: (Rung, Reason),
    memory: Arc<SessionMemory>,
    slot: Held,
    nonce: [u8; NONCE_BYTES],
}

impl Session {
    /// A connection that was accepted: known to the broker from here on, so that its shutdown finds it.
    pub(super) fn new(state: &Arc<State>, connection: Arc<dyn Connection>) -> Self {
        let outbox = Outbox::new(Arc::clone(&connection));
        let connection = Incoming::new(connection, state.config.negotiation_timeout);
        let id = state.sessions.next_id();
        let link = SessionLink::new(id, connection.peer(), outbox, state.config.session_in_flight);
        let has_room = state.sessions.add(&link, state.config.max_sessions);
        let reader = FrameReader::new(codec::MAX_MESSAGE_BYTES, state.config.session_bytes)
            .payload_patience(state.config.payload_patience);
        Self {
            state: Arc::clone(state),
            link,
            connection,
            reader,
            has_room,
            features: Features::default(),
            probing: None,
            gpu_door: None,
            process: None,
        }
    }

    /// Serves the connection until it ends.
    pub(super) fn serve(mut self) {
        let ended = catch_unwind(AssertUnwindSafe(|| self.run())).unwrap_or_else(|_| {
            // What the session held is given back all the same.
            Err(Error::new(ErrorKind::Internal, "the session's thread panicked", "see the broker's log"))
        });
        self.end(ended);
    }

    /// Ends a connection that nobody will serve.
    pub(super) fn abandon(state: &State, id: SessionId, connection: &dyn Connection) {
        connection.close();
        state.sessions.remove(id);
    }

    pub(super) fn id(&self) -> SessionId {
        self.link.id()
    }

    fn run(&mut self) -> Result<()> {
        admit(self.connection.peer())?;
        self.check_room()?;
        loop {
            self.link.outbox.wait_for_room();
            self.reader.next(&self.connection, None)?;
            let message = codec::decode(self.reader.message())?;
            let action = self.link.machine.lock().receive(message)?;
            match action {
                Action::Start { id, timeout_ms, releases, operation } => {
                    let responder = Responder::new(&self.state, &self.link, id);
                    self.memories()?.release(&releases);
                    self.start(responder, timeout_ms, operation)?;
                }
                Action::Cancel(id) => {
                    self.state.vae_lane.cancel(self.link.id(), id);
                    self.state.weights.cancel(self.link.id(), id);
                }
                Action::Detach(attachments) => self.state.weights.detach(self.link.id(), &attachments),
                Action::EndPermit(permit) => self.state.permits.end(self.link.id(), permit),
                Action::Release(releases) => self.memories()?.release(&releases),
                Action::Reject { id, releases, limit } => self.reject(id, &releases, limit)?,
                Action::Opened(arena) => self.opened(arena),
                Action::Negotiate(hello) => self.negotiate(hello)?,
                Action::Settle(answer) => self.settle(&answer)?,
                Action::Ignore => {}
                Action::Leave => return Ok(()),
            }
        }
    }

    fn check_room(&self) -> Result<()> {
        if self.has_room {
            return Ok(());
        }
        let limit = self.state.config.max_sessions;
        let message = format!("the broker serves {limit} sessions already");
        Err(Error::new(ErrorKind::Busy, message, "close clients that are no longer needed, or raise --max-sessions"))
    }

    fn memories(&self) -> Result<&Memories> {
        let open = self.link.open.get();
        open.map(|open| &open.memories)
            .ok_or_else(|| Error::new(ErrorKind::Protocol, "the session is not negotiated", ""))
    }

    fn end(self, ended: Result<()>) {
        let Self { state, link, connection, probing, gpu_door, process, .. } = self;
        link.machine.lock().close();
        match (&ended, link.open.get()) {
            (Ok(()), _) => tracing::info!(session = %link.id(), "session ended"),
            (Err(error), Some(open)) => {
                state.metrics.sessions_lost.inc();
                tracing::info!(session = %link.id(), name = open.name, %error, "session lost");
            }
            (Err(error), None) => {
                state.metrics.refused.inc();
                tracing::info!(session = %link.id(), %error, "no session");
            }
        }
        if let Err(error) = ended {
            refuse_or_ignore(&link, error);
        }
        link.outbox.flush(Instant::now() + Duration::from_millis(200));
        // In this order: the reason is the last word, and no job starts on memory that goes away.
        link.outbox.close();
        state.permits.end_session(link.id());
        state.vae_lane.end_session(link.id());
        state.weights.end_session(link.id());
        connection.close();
        drop((probing, gpu_door));
        if let Some(open) = link.open.get() {
            if let Some(process) = process.filter(|_| open.memories.holds_gpu_memory()) {
                tracing::info!(session = %link.id(), "GPU memory of the session is kept until its process has ended");
                link.quarantined.store(true, Ordering::Relaxed);
                process.wait_gone(|| state.stopping.load(Ordering::Acquire));
            }
            open.memories.reap();
        }
    }

    fn negotiate(&mut self, mut hello: Hello) -> Result<()> {
        let ours = self.features();
        let (features, rung, reason) = negotiate(&mut hello, ours)?;
        self.features = features;
        let memory = self.make_memory(rung);
        let probe = if rung == Rung::Inline { None } else { Some(memory.lease(2 * NONCE_BYTES as u64)?) };
        let session = self.link.id();
        let welcome = |probe| Welcome {
            version: PROTOCOL_VERSION,
            broker: env!("CARGO_PKG_VERSION").to_owned(),
            epoch: self.state.epoch,
            session,
            features,
            probe,
        };
        self.link.machine.lock().welcomed(probe.is_some());
        let Some(mut slot) = probe else {
            self.link.outbox.post(None, |_| ServerMessage::Welcome(welcome(None)));
            return self.open(hello, memory, rung, reason);
        };
        let mut nonce = [0; NONCE_BYTES];
        getrandom::fill(&mut nonce).map_err(|error| Error::new(ErrorKind::Internal, error.to_string(), ""))?;
        slot.span_mut().write(&nonce)?;
        self.link.outbox.post(None, |attachments| {
            let read_at = slot.offset();
            let write_at = read_at + NONCE_BYTES as u64;
            let arena = slot.lease().and_then(|lease| memory.announce(lease.arena, attachments));
            ServerMessage::Welcome(welcome(arena.map(|arena| ProbeOffer { arena, read_at, write_at })))
        });
        self.probing = Some(Probing { hello, planned: (rung, reason), memory, slot, nonce });
        Ok(())
    }

    fn features(&self) -> Features {
        let Abilities { descriptors, same_process, .. } = self.connection.abilities();
        // One or the other: a client must not be able to choose memory that it can shrink under the broker.
        let sealed = descriptors && cfg!(target_os = "linux") && !self.state.config.named_segments;
        let mut features = if sealed { Features::HANDLES } else { Features::NAMED_SEGMENTS };
        if same_process {
            features = features.union(Features::SAME_PROCESS);
        }
        features
    }

    /// How host memory crosses to the client on this rung; absent where it does not cross processes.
    fn sharing(&self, rung: Rung) -> Option<HostSharing> {
        let sealed = self.features.contains(Features::HANDLES);
        (rung == Rung::Shm).then_some(if sealed { HostSharing::Memfd } else { HostSharing::Named })
    }

    fn make_memory(&self, rung: Rung) -> Arc<SessionMemory> {
        let (device, handing): (Arc<dyn Device>, _) = match self.sharing(rung) {
            Some(sharing) => (Arc::new(HostDevice::new(sharing)), Handing::Handles),
            None if rung == Rung::Local => (Arc::new(InProcessDevice), Handing::Itself),
            // Rungs of GPUs are never the host's.
            None => (Arc::new(InProcessDevice), Handing::Never),
        };
        let config = &self.state.config;
        let limits = Limits {
            arena: config.arena_bytes,
            total: config.session_bytes,
            session: config.session_bytes,
            setting: "--session-bytes",
        };
        let pool = Arc::new(ArenaPool::new(device, limits, Arc::clone(&self.state.arena_ids)));
        SessionMemory::new(self.link.id(), self.state.epoch, pool, handing)
    }

    fn opened(&self, arena: crate::id::ArenaId) {
        if let Some(probing) = &self.probing {
            probing.memory.opened(arena);
        } else if let Ok(memories) = self.memories() {
            memories.opened(arena);
        }
    }

    fn settle(&mut self, answer: &ProbeAnswer) -> Result<()> {
        let Some(Probing { hello, planned, memory, slot, nonce }) = self.probing.take() else { return Ok(()) };
        let mut both = [0; 2 * NONCE_BYTES];
        slot.span().read(&mut both)?;
        let found: [u8; NONCE_BYTES] = std::array::from_fn(|at| both[NONCE_BYTES + at]);
        drop(slot);
        let tried = planned.0;
        let (rung, reason) = settle(planned, &nonce, &answer.outcome, &found);
        if rung != Rung::Inline {
            return self.open(hello, memory, rung, reason);
        }
        let code = match &answer.outcome {
            ProbeOutcome::Failed(_) => FailureCode::Open,
            ProbeOutcome::Mapped { .. } => FailureCode::NonceMismatch,
        };
        self.state.metrics.rung_failed(tried, code.name());
        tracing::warn!(session = %self.link.id(), code = code.name(), %reason, "bytes cross in frames");
        memory.reap();
        if let Some(forced) = hello.forced.filter(|&forced| forced != rung) {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("rung {forced} was forced, but {reason}"),
                "unset LUNA_BROKER_TRANSPORT or force another rung",
            ));
        }
        let memory = self.make_memory(rung);
        self.open(hello, memory, rung, reason)
    }

    fn open(&mut self, hello: Hello, memory: Arc<SessionMemory>, rung: Rung, reason: Reason) -> Result<()> {
        tracing::info!(session = %self.link.id(), name = hello.name, %rung, %reason, "session opened");
        self.gpu_door = Some(GpuDoor::new(self.link.id(), rung));
        let memories = Memories::new(memory, self.sharing(rung));
        let rung = DeviceRung::host(rung, reason);
        let rungs = vec![rung.clone()];
        let open = OpenSession { name: hello.name, rung, memories };
        if self.link.open.set(open).is_err() {
            return Err(Error::new(ErrorKind::Internal, "a session was opened twice", ""));
        }
        self.connection.negotiated();
        self.link.outbox.post(None, |_| ServerMessage::Accepted(Accepted { rungs }));
        Ok(())
    }

    fn reject(&self, id: RequestId, releases: &[Release], limit: usize) -> Result<()> {
        self.memories()?.release(releases);
        let message = format!("the session has {limit} requests in flight; this one was not started");
        let remedy = "wait for an answer before sending more, or raise --session-in-flight";
        Responder::new(&self.state, &self.link, id).fail(Fault::new(ErrorKind::Busy, message, remedy));
        Ok(())
    }

    /// # Errors
    /// What ends the session; what only ends the request is its answer.
    fn start(&mut self, responder: Responder, timeout_ms: Option<u32>, operation: Operation) -> Result<()> {
        let deadline = timeout_ms.and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms.into())));
        match operation {
            Operation::Ping => responder.answer(Outcome::Done),
            Operation::Vae(request) => self.vae(responder, deadline, request)?,
            Operation::Allocate { place, size_bytes, kept } => {
                let source = self.memories().and_then(|memories| memories.source(&self.state, place));
                responder.settle(source.and_then(|source| allocate(&source.memory, size_bytes, kept)));
            }
            Operation::OpenGpu(wish) => {
                self.step_gpu(responder, |door, state, memories, abilities| door.open(state, memories, abilities, wish))
            }
            Operation::GpuReady { gpu } => self.step_gpu(responder, |door, state, _, _| door.ready(state, gpu)),
            Operation::GpuProbed(probed) => {
                self.step_gpu(responder, |door, state, memories, _| door.probed(state, memories, probed));
            }
            Operation::Describe { model } => {
                let described = self.state.registry.resolve(&model);
                responder.settle(described.map(|model| Outcome::Model(model.report())).map_err(Error::from));
            }
            Operation::Load { model } => match self.state.registry.resolve(&model) {
                Ok(model) => {
                    self.submit(responder.session(), responder.request(), deadline, VaeWork::Load { responder, model })
                }
                Err(error) => responder.fail(error),
            },
            Operation::Unload { model, force } => self.unload(responder, deadline, &model, force),
            Operation::Attach(request) => match self.weights_place(request.gpu) {
                Ok(gpu) => self.state.weights.attach(&self.state, responder, request, gpu),
                Err(error) => responder.fail(error),
            },
            Operation::Publish(request) => self.publish(responder, request)?,
            Operation::PublishFilled { draft } => self.state.weights.filled(&self.state, responder, draft),
            Operation::CheckAttached => {
                responder.settle(self.state.weights.check(self.link.id()).map(|()| Outcome::Done));
            }
            Operation::Permit { service: Service::Vae, bytes } => self.permit(responder, deadline, bytes),
            Operation::Verify { name } => self.state.weights.verify(&self.state, responder, name),
            Operation::Models => responder.answer(Outcome::Models(self.state.registry.list())),
            Operation::Status => responder.answer(Outcome::Status(Box::new(self.state.status()))),
            Operation::Metrics => responder.answer(Outcome::Metrics(self.state.metrics_text())),
        }
        Ok(())
    }

    fn submit(&self, session: SessionId, request: RequestId, deadline: Option<Instant>, job: VaeWork) {
        self.state.vae_lane.submit(Entry { session, request, deadline, job });
    }

    /// Unloads weights and the model of that name.
    fn unload(&self, responder: Responder, deadline: Option<Instant>, name: &str, force: Force) {
        let weights = match self.state.weights.unload(&self.state, name, force) {
            Ok(weights) => weights,
            Err(error) => return responder.fail(error),
        };
        match (self.state.registry.resolve(name), weights) {
            (Ok(model), _) => {
                let (session, request) = (responder.session(), responder.request());
                self.submit(session, request, deadline, VaeWork::Unload { responder, model });
            }
            // What attached it need not be a model that is run here.
            (Err(_), Unloaded::Weights) => responder.answer(Outcome::Done),
            (Err(error), Unloaded::Nothing) => responder.fail(error),
        }
    }

    /// Where weights go for this client: absent for host memory.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where no memory can be handed to it.
    fn weights_place(&self, target: Option<GpuTarget>) -> Result<Option<GpuUuid>> {
        let open = self.link.open.get();
        let rung = open.map_or(Rung::Inline, |open| open.rung.rung);
        if let Some(target) = target {
            self.memories()?.shared_gpu(target)?;
            return Ok(self.state.gpu.as_ref().map(BrokerGpu::uuid));
        }
        let hands_over = self.connection.abilities().descriptors || self.connection.abilities().same_process;
        if rung == Rung::Inline || !hands_over || !cfg!(target_os = "linux") {
            let message = format!("this session is on the rung {rung}, where no memory can be mapped by both sides");
            return Err(Error::new(
                ErrorKind::Unsupported,
                message,
                "run the worker on the broker's machine, on Linux",
            ));
        }
        Ok(None)
    }

    /// # Errors
    /// What ends the session: the table behind the request did not come.
    fn publish(&mut self, responder: Responder, request: PublishRequest) -> Result<()> {
        let mut table = vec![0; self.reader.payload_length().min(MAX_TABLE_BYTES)];
        if let Err(error) = self.reader.read_payload(&self.connection, &mut table) {
            return match error {
                error @ TransportError::FrameTooLong { .. } => {
                    responder.fail(error);
                    Ok(())
                }
                error => Err(error.into()),
            };
        }
        let entries = self.weights_place(None).and_then(|_| Ok(decode_table(&table)?));
        match entries {
            Ok(entries) => {
                let is_file = self.state.registry.locate(&request.name).is_ok_and(|path| path.is_file());
                self.state.weights.publish(responder, request, entries, is_file);
            }
            Err(error) => responder.fail(error),
        }
        Ok(())
    }

    fn permit(&self, responder: Responder, deadline: Option<Instant>, bytes: u64) {
        let budget = self.state.config.vae_budget_bytes;
        if bytes > budget {
            let message = format!("{bytes} bytes of working memory were asked for; one call may use {budget}");
            return responder.fail(Error::new(ErrorKind::OutOfMemory, message, "work in tiles, or raise --vae-budget"));
        }
        if let Err(error) = self.state.weights.check(self.link.id()) {
            return responder.fail(error);
        }
        let (session, request) = (responder.session(), responder.request());
        let job = self.state.permits.ask(responder, self.state.config.permit_patience);
        self.submit(session, request, deadline, VaeWork::Permit(job));
    }

    /// Goes on with the search for a GPU's rung.
    fn step_gpu(
        &mut self,
        responder: Responder,
        step: impl FnOnce(&mut GpuDoor, &State, &Memories, Abilities) -> Result<Step>,
    ) {
        let Abilities { descriptors, same_process } = self.connection.abilities();
        let sealed = descriptors && cfg!(target_os = "linux");
        let abilities = Abilities { descriptors: sealed, same_process };
        let (Some(door), Some(open)) = (&mut self.gpu_door, self.link.open.get()) else {
            return responder.fail(Error::new(ErrorKind::Protocol, "the session is not negotiated", ""));
        };
        if self.process.is_none() && !same_process {
            self.process = Some(Process::of(self.link.peer.pid));
        }
        match step(door, &self.state, &open.memories, abilities) {
            Ok(Step { answer, attachments }) => {
                responder.answer_with_handles(Outcome::Gpu(Box::new(answer)), attachments);
            }
            Err(error) => responder.fail(error),
        }
    }

    fn vae(&mut self, responder: Responder, deadline: Option<Instant>, request: VaeRequest) -> Result<()> {
        let (session, id) = (responder.session(), responder.request());
        // The responder moves into the job only once everything that can be refused early has been.
        match self.prepare(request) {
            Err(Unprepared::Refused(error)) => responder.fail(error),
            Err(Unprepared::Broken(error)) => {
                let fault = error.into_fault();
                responder.fail(fault.clone());
                return Err(fault.into());
            }
            Ok((prepared, queue)) => {
                let job = prepared.with(responder);
                if job.model.facts().runs_inline {
                    let mut vae = queue.map_or_else(HandOff::default, HandOff::on);
                    if let Some(Unfinished { responder, error }) = job.run_on(&mut vae, &|| false) {
                        responder.fail(error);
                    }
                } else {
                    self.submit(session, id, deadline, VaeWork::Call(job));
                }
            }
        }
        Ok(())
    }

    /// Checks a call and finds its memory; the queue is that of the GPU where the memory is one's.
    fn prepare(&mut self, request: VaeRequest) -> Result<(Prepared, Option<Arc<dyn CopyStream>>), Unprepared> {
        let VaeRequest { model, call, input, result } = request;
        let model = self.state.registry.resolve(&model)?;
        let meta = match &input {
            TensorSource::Leased(descriptor) => descriptor.meta,
            TensorSource::Inline(meta) => *meta,
        };
        meta.validate()?;
        let plan = model.facts().plan(&call, &meta, self.state.config.vae_budget_bytes)?;
        let (input, mut queue) = match input {
            TensorSource::Leased(descriptor) => self.memories()?.resolve(&descriptor)?,
            TensorSource::Inline(meta) => (self.receive(&meta)?, None),
        };
        let SlotSource { memory, queue: its_queue } = self.memories()?.source(&self.state, result)?;
        queue = its_queue.or(queue);
        let output = memory.lease(plan.output.size_bytes()? as u64)?;
        let crosses_inline = self.link.open.get().is_some_and(|open| open.rung.rung == Rung::Inline);
        let inline = crosses_inline && result == SlotPlace::Host;
        Ok((Prepared { model, plan, input, meta, output, inline }, queue))
    }

    /// Takes the bytes behind the frame into a slot.
    fn receive(&mut self, meta: &TensorMeta) -> Result<Held, Unprepared> {
        let length = meta.span_bytes()?;
        let mut held = self.memories()?.host.lease(length as u64)?;
        let target = held.span_mut().bytes_mut(length)?;
        match self.reader.read_payload(&self.connection, target) {
            Ok(()) => Ok(held),
            // Said of the request by itself: the stream is where it was.
            Err(error @ TransportError::FrameTooLong { .. }) => Err(error.into()),
            Err(error) => Err(Unprepared::Broken(error.into())),
        }
    }
}

/// Why a VAE call does not come to run.
enum Unprepared {
    /// The request is answered with this; the session goes on.
    Refused(Error),
    /// The bytes behind the request did not come: nothing more can be read from this client.
    Broken(Error),
}

impl<E: Into<Error>> From<E> for Unprepared {
    fn from(error: E) -> Self {
        Self::Refused(error.into())
    }
}

fn allocate(memory: &Arc<SessionMemory>, size_bytes: u64, kept: bool) -> Result<Outcome> {
    let held = memory.lease(size_bytes)?;
    let length = held.span().length() as u64;
    let lease = held.lease();
    let descriptor = held.lend(TensorMeta::contiguous(DType::U8, Dims::of([length])))?;
    if let Some(lease) = lease.filter(|_| kept) {
        memory.note_input(lease);
    }
    Ok(Outcome::Allocated { descriptor })
}

/// A VAE call that only lacks who is answered.
struct Prepared {
    model: Arc<super::registry::ModelEntry>,
    plan: crate::model::VaePlan,
    input: Held,
    meta: TensorMeta,
    output: Held,
    inline: bool,
}

impl Prepared {
    fn with(self, responder: Responder) -> VaeCallJob {
        let Self { model, plan, input, meta, output, inline } = self;
        VaeCallJob { responder, model, plan, input, input_meta: meta, output, inline }
    }
}
