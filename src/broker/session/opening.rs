use std::sync::Arc;

use super::super::memories::Memories;
use super::super::memory::{Handing, Held, SessionMemory};
use super::super::open_gpu::GpuDoor;
use super::super::pool::{ArenaPool, Growth, Limits};
use super::super::responder::OpenSession;
use super::super::runs::Runs;
use super::Session;
use crate::device::{Device, HostDevice, HostSharing, InProcessDevice};
use crate::error::{Error, ErrorKind, Result};
use crate::protocol::{
    Accepted, DeviceRung, FailureCode, Features, Hello, NONCE_BYTES, PROTOCOL_VERSION, ProbeAnswer, ProbeOffer,
    ProbeOutcome, Reason, Rung, ServerMessage, Welcome, negotiate, settle,
};
use crate::transport::{Abilities, Connection};

/// A session between its welcome and the answer to its probe.
pub(super) struct Probing {
    hello: Hello,
    planned: (Rung, Reason),
    pub(super) memory: Arc<SessionMemory>,
    slot: Held,
    nonce: [u8; NONCE_BYTES],
}

impl Session {
    pub(super) fn negotiate(&mut self, mut hello: Hello) -> Result<()> {
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

    pub(super) fn features(&self) -> Features {
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
    pub(super) fn sharing(&self, rung: Rung) -> Option<HostSharing> {
        let sealed = self.features.contains(Features::HANDLES);
        (rung == Rung::Shm).then_some(if sealed { HostSharing::Memfd } else { HostSharing::Named })
    }

    pub(super) fn make_memory(&self, rung: Rung) -> Arc<SessionMemory> {
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
            growth: Growth::Doubling,
        };
        let pool = Arc::new(ArenaPool::new(device, limits, Arc::clone(&self.state.arena_ids)));
        SessionMemory::new(self.link.id(), self.state.epoch, pool, handing)
    }

    pub(super) fn settle(&mut self, answer: &ProbeAnswer) -> Result<()> {
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

    pub(super) fn open(&mut self, hello: Hello, memory: Arc<SessionMemory>, rung: Rung, reason: Reason) -> Result<()> {
        tracing::info!(session = %self.link.id(), name = hello.name, %rung, %reason, "session opened");
        self.gpu_door = Some(GpuDoor::new(self.link.id(), rung));
        let memories = Memories::new(memory, self.sharing(rung));
        let rung = DeviceRung::host(rung, reason);
        let rungs = vec![rung.clone()];
        let open = OpenSession { name: hello.name, rung, memories, runs: Runs::default() };
        if self.link.open.set(open).is_err() {
            return Err(Error::new(ErrorKind::Internal, "a session was opened twice", ""));
        }
        self.connection.negotiated();
        self.link.outbox.post(None, |_| ServerMessage::Accepted(Accepted { rungs }));
        Ok(())
    }
}
