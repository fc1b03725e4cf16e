use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::admission::{admit, refuse_or_ignore};
use super::incoming::Incoming;
use super::jobs::VaeWork;
use super::memories::Memories;
use super::memory::SessionMemory;
use super::open_gpu::{GpuDoor, Step};
use super::outbox::{Outbox, Payload};
use super::quarantine::Process;
use super::responder::{Responder, SessionLink};
use super::state::State;
use crate::error::{Error, ErrorKind, Fault, Result};
use crate::id::{RequestId, SessionId};
use crate::lane::Entry;
use crate::protocol::{Action, Features, Operation, Outcome, Release, codec};
use crate::service::Service;
use crate::tensor::{DType, Dims, TensorMeta};
use crate::transport::{Abilities, Connection, FrameReader};

mod clip;
mod entering;
mod models;
mod opening;
mod unet;
mod vae;
mod weights;

use opening::Probing;

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
                    // In this order: what waits for adapters enters a lane after that.
                    self.state.adapters.cancel(self.link.id(), id);
                    self.state.vae_lane.cancel(self.link.id(), id);
                    self.state.unet_lane.cancel(self.link.id(), id);
                    self.state.clip_lane.cancel(self.link.id(), id);
                    self.state.weights.cancel(self.link.id(), id);
                    // It may be granted in this moment.
                    self.recall(id);
                }
                Action::CloseRun(run) => self.close_run(run),
                Action::Detach(attachments) => self.state.weights.detach(self.link.id(), &attachments),
                Action::Abandon(draft) => self.state.weights.abandon(self.link.id(), draft),
                Action::Recall(id) => self.recall(id),
                Action::EndPermit(permit) => self.state.permits.end(self.link.id(), permit),
                Action::Release(releases) => self.memories()?.release(&releases),
                Action::Reject { id, releases, limit } => self.reject(id, &releases, limit)?,
                Action::Opened(arena) => self.opened(arena),
                Action::Negotiate(hello) => self.negotiate(hello)?,
                Action::Settle(answer) => self.settle(&answer)?,
                Action::Leave => return Ok(()),
            }
        }
    }

    /// Takes back what a request was answered with.
    fn recall(&self, id: RequestId) {
        self.state.permits.recall(self.link.id(), id);
        self.state.weights.recall(self.link.id(), id);
        if let Some(open) = self.link.open.get() {
            open.runs.recall(id);
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
        state.registry.end_session(link.id());
        state.permits.end_session(link.id());
        state.adapters.end_session(link.id());
        state.vae_lane.end_session(link.id());
        state.unet_lane.end_session(link.id());
        state.clip_lane.end_session(link.id());
        state.weights.end_session(link.id());
        if let Some(open) = link.open.get() {
            open.runs.end();
        }
        connection.close();
        drop((probing, gpu_door));
        if let Some(open) = link.open.get() {
            if let Some(process) =
                process.filter(|_| open.memories.holds_gpu_memory() || state.weights.must_outlive(link.id()))
            {
                tracing::info!(session = %link.id(), "GPU memory of the session is kept until its process has ended");
                link.quarantined.store(true, Ordering::Relaxed);
                process.wait_gone(|| state.stopping.load(Ordering::Acquire));
            }
            open.memories.reap();
            state.weights.process_gone(link.id());
        }
    }

    fn opened(&self, arena: crate::id::ArenaId) {
        if let Some(probing) = &self.probing {
            probing.memory.opened(arena);
        } else if let Ok(memories) = self.memories() {
            memories.opened(arena);
        }
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
            Operation::Unet(request) => self.unet(responder, deadline, *request)?,
            Operation::OpenRun(request) => self.open_run(responder, *request),
            Operation::Prefetch { service, models, adapters } => self.prefetch(responder, service, &models, adapters),
            Operation::Clip(request) => self.clip(responder, deadline, *request)?,
            Operation::Encoders { models, task } => self.encoders(responder, deadline, &models, task),
            Operation::Describe { service, model } => {
                let described = self.state.registry.resolve(service, &model);
                let described = described.inspect(|model| model.usage().note_user(self.link.id()));
                responder.settle(described.map(|model| Outcome::Model(model.report())).map_err(Error::from));
            }
            Operation::Load { service, model } => self.load(responder, deadline, service, &model),
            Operation::Unload { model, force } => self.unload(responder, deadline, &model, force),
            Operation::Register(model) => {
                let registered = self.state.registry.registered().add(self.link.id(), model);
                responder.settle(registered.map(|()| Outcome::Done));
            }
            Operation::Attach(request) => match self.weights_place(request.gpu) {
                Ok(gpu) => self.state.weights.attach(&self.state, responder, request, gpu),
                Err(error) => responder.fail(error),
            },
            Operation::Publish(request) => self.publish(responder, request)?,
            Operation::PublishFilled { draft } => self.state.weights.filled(&self.state, responder, draft),
            Operation::CheckAttached { attachment } => {
                let checked = self.state.weights.check_attachment(self.link.id(), attachment);
                responder.settle(checked.map(|()| Outcome::Done));
            }
            Operation::Permit { service: Service::Vae, bytes } => self.permit(responder, deadline, bytes),
            Operation::Permit { service, .. } => {
                let message = format!("places in the {} lane are not given away", service.name());
                responder.fail(Error::new(ErrorKind::Unsupported, message, "ask for a place in the lane of the VAE"));
            }
            Operation::Header { name } => match self.state.weights.header(&self.state.registry, name) {
                Ok(table) => responder.answer_with_payload(Outcome::Header, Payload::Table(table)),
                Err(error) => responder.fail(error),
            },
            Operation::Verify { name } => self.state.weights.verify(&self.state, responder, name),
            Operation::Models => responder.answer(Outcome::Models(self.state.registry.list())),
            Operation::Status => responder.answer(Outcome::Status(Box::new(self.state.status()))),
            Operation::Metrics => responder.answer(Outcome::Metrics(self.state.metrics_text())),
        }
        Ok(())
    }

    fn submit(&self, session: SessionId, request: RequestId, deadline: Option<Instant>, job: VaeWork) {
        if self.state.permits.is_held_by(session) {
            if let Some(responder) = job.give_up() {
                responder.fail(waits_for_itself());
            }
            return;
        }
        self.state.vae_lane.submit(Entry { session, request, deadline, job });
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
}

/// What answers a session that asks the lane for something while the lane is its own.
fn waits_for_itself() -> Error {
    let message = "the session has the lane by a permit, and what it asks for would wait for the end of that";
    Error::new(ErrorKind::Unsupported, message, "give the permit back first, or ask in a session of its own")
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
