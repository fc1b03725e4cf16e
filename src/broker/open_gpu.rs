use std::sync::Arc;
use std::time::{Duration, Instant};

use super::gpu::{BrokerGpu, Marks};
use super::memories::{Memories, SessionGpu, SharedGpu};
use super::memory::{Handing, Held, SessionMemory, attach};
use super::state::State;
use crate::device::{CopyStream, DeviceError, Order, Span};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{GpuUuid, SessionId};
use crate::protocol::{
    DeviceRung, FailureCode, FenceOffer, GpuAnswer, GpuFindings, GpuNonces, GpuOffer, GpuProbeOutcome, GpuProbed,
    GpuSituation, GpuTarget, NONCE_BYTES, OpenGpu, Rung, RungFailure, gpu_reason, judge_gpu,
};
use crate::service::GpuOrder;
use crate::transport::{Abilities, Attachment};

/// More GPUs than any machine has, each demoted as often as there are rungs.
const MAX_OPENED: usize = 64;

/// How long a client's marked work of a probe may take. It takes milliseconds, and the session reads nothing meanwhile.
const MARK_PATIENCE: Duration = Duration::from_secs(5);

/// How often it is looked whether it is done.
const MARK_TICK: Duration = Duration::from_millis(1);

/// Places in the probed slot, in nonces: what each side writes plainly, what each writes marked, and scratch.
const BROKERS_PLAIN: usize = 0;
const CLIENTS_PLAIN: usize = 1;
const BROKERS_MARKED: usize = 2;
const CLIENTS_MARKED: usize = 3;
const SCRATCH: usize = 4;
const PLACES: usize = 5;

/// The search for one GPU's rung, between an offer and what the client found in it.
struct Search {
    situation: GpuSituation,
    forced: Option<Rung>,
    /// Rungs not yet tried, best first.
    left: Vec<Rung>,
    failures: Vec<RungFailure>,
    offered: Option<Offered>,
}

/// Memory that the client was asked to probe.
struct Offered {
    rung: Rung,
    memory: Arc<SessionMemory>,
    slot: ProbedSlot,
    queue: Arc<dyn CopyStream>,
    marks: Option<Marks>,
    nonces: GpuNonces,
}

/// The slot with the nonces. Nobody else gets it before the delayed copy into it is done.
struct ProbedSlot {
    slot: Held,
    queue: Arc<dyn CopyStream>,
}

impl Drop for ProbedSlot {
    fn drop(&mut self) {
        if let Err(error) = self.queue.synchronize() {
            tracing::warn!(%error, "the copy of a probe could not be awaited");
        }
    }
}

/// An answer with what travels beside it.
pub(super) struct Step {
    pub(super) answer: GpuAnswer,
    pub(super) attachments: Vec<Attachment>,
}

/// Finds rungs for the GPUs of one session's client.
pub(super) struct GpuDoor {
    session: SessionId,
    host: Rung,
    search: Option<Search>,
}

impl GpuDoor {
    pub(super) fn new(session: SessionId, host: Rung) -> Self {
        Self { session, host, search: None }
    }

    /// Begins the search for a rung.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] for a forced rung that cannot be had, [`ErrorKind::Busy`] for more GPUs than there can be.
    pub(super) fn open(
        &mut self,
        state: &State,
        memories: &Memories,
        abilities: Abilities,
        wish: OpenGpu,
    ) -> Result<Step> {
        if memories.opened_gpus() >= MAX_OPENED {
            let message = format!("the session has opened GPUs {MAX_OPENED} times");
            return Err(Error::new(ErrorKind::Busy, message, "connect anew"));
        }
        let OpenGpu { gpu, forced, failed } = wish;
        let failed = failed.map(|RungFailure { rung, detail, .. }| RungFailure {
            rung,
            code: FailureCode::Demoted,
            detail: crate::protocol::presentable(&detail),
        });
        if let Some(RungFailure { rung, code, .. }) = &failed {
            state.metrics.rung_failed(*rung, code.name());
        }
        let brokers = state.gpu.as_ref().map(BrokerGpu::uuid);
        let reaches = state.gpu.as_ref().is_some_and(|brokers| brokers.is_reached_from(gpu));
        let Abilities { descriptors, same_process } = abilities;
        let situation = GpuSituation { gpu, brokers, reaches, same_process, descriptors };
        let below = |rung: &Rung| failed.as_ref().is_none_or(|failed| *rung > failed.rung);
        let mut left: Vec<Rung> = situation.ladder().iter().copied().filter(below).collect();
        if let Some(forced) = forced {
            left.retain(|rung| *rung == forced);
            if left.is_empty() && forced != self.host {
                let why = if situation.ladder().is_empty() {
                    situation.obstacle()
                } else {
                    "it is not on the ladder".to_owned()
                };
                return Err(cannot_force(forced, &why));
            }
        }
        self.search = Some(Search { situation, forced, left, failures: failed.into_iter().collect(), offered: None });
        self.advance(state, memories)
    }

    /// Takes what the client found, and settles or goes on.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] where nothing was offered for this GPU; as [`GpuDoor::open`].
    pub(super) fn probed(&mut self, state: &State, memories: &Memories, probed: GpuProbed) -> Result<Step> {
        let offered = self.search.as_mut().filter(|search| search.situation.gpu == probed.gpu);
        let Some(mut offered) = offered.and_then(|search| search.offered.take()) else {
            return Err(Error::new(ErrorKind::Protocol, format!("no memory was offered for {}", probed.gpu), ""));
        };
        let failure = match probed.outcome {
            GpuProbeOutcome::Failed(what) => (FailureCode::Open, what),
            GpuProbeOutcome::Opened(findings) => match offered.judge(&findings) {
                Ok(order) => return self.settle(memories, Some((offered, order, findings.open_us))),
                Err((code, what)) => (code, what),
            },
        };
        self.fail(state, offered.rung, failure.0, failure.1);
        drop(offered);
        self.advance(state, memories)
    }

    /// The client has everything open: writes the marked nonce, late enough for the client to notice if it does not wait.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] where no events were offered for this GPU, [`DeviceError::Cuda`].
    pub(super) fn ready(&mut self, state: &State, gpu: GpuUuid) -> Result<Step> {
        let search = self.search.as_ref().filter(|search| search.situation.gpu == gpu);
        let offered = search.and_then(|search| search.offered.as_ref());
        let (Some(device), Some(offered), Some(marks)) =
            (&state.gpu, offered, offered.and_then(|offered| offered.marks.as_ref()))
        else {
            return Err(Error::new(ErrorKind::Protocol, format!("no events were offered for {gpu}"), ""));
        };
        device.delay(&*offered.queue)?;
        offered.queue.copy(&place(&offered.slot.slot, SCRATCH)?, &place(&offered.slot.slot, BROKERS_MARKED)?)?;
        let sequence = marks.order.record(offered.queue.handle())?;
        Ok(Step { answer: GpuAnswer::Marked { sequence }, attachments: Vec::new() })
    }

    fn fail(&mut self, state: &State, rung: Rung, code: FailureCode, detail: String) {
        state.metrics.rung_failed(rung, code.name());
        let detail = crate::protocol::presentable(&detail);
        tracing::warn!(session = %self.session, %rung, code = code.name(), detail, "a rung for GPU memory failed");
        if let Some(search) = &mut self.search {
            search.failures.push(RungFailure { rung, code, detail });
        }
    }

    /// Offers the next rung, or settles on the host's.
    fn advance(&mut self, state: &State, memories: &Memories) -> Result<Step> {
        loop {
            let Some(search) = &mut self.search else {
                return Err(Error::new(ErrorKind::Internal, "no search for a GPU's rung is on", ""));
            };
            let (Some(gpu), false) = (&state.gpu, search.left.is_empty()) else {
                return self.settle(memories, None);
            };
            let rung = search.left.remove(0);
            match offer(state, gpu, self.session, rung, search.situation.gpu) {
                Ok((offered, step)) => {
                    search.offered = Some(offered);
                    return Ok(step);
                }
                Err(error) => self.fail(state, rung, FailureCode::Export, error.to_string()),
            }
        }
    }

    fn settle(&mut self, memories: &Memories, proven: Option<(Offered, GpuOrder, u32)>) -> Result<Step> {
        let Some(Search { situation, forced, failures, .. }) = self.search.take() else {
            return Err(Error::new(ErrorKind::Internal, "no search for a GPU's rung is on", ""));
        };
        let rung = proven.as_ref().map_or(self.host, |(offered, ..)| offered.rung);
        let reason = gpu_reason(rung, &failures, &situation);
        if let Some(forced) = forced.filter(|forced| *forced != rung) {
            return Err(cannot_force(forced, &reason.to_string()));
        }
        let mut settled = DeviceRung::new(situation.gpu.to_string(), rung, reason);
        let shared = proven.map(|(Offered { memory, slot, queue, marks, .. }, order, open_us)| {
            (settled.open_us, settled.order) = (Some(open_us), Some(order));
            drop(slot);
            if let Some(marks) = marks.filter(|_| order == GpuOrder::Events) {
                memory.order_by(marks.order);
            }
            SharedGpu { memory, queue }
        });
        tracing::info!(session = %self.session, gpu = settled.device, rung = %settled.rung, reason = %settled.reason, "GPU opened");
        let opening = memories.add(SessionGpu { gpu: situation.gpu, rung: settled.clone(), shared });
        let target = GpuTarget { gpu: situation.gpu, opening };
        Ok(Step { answer: GpuAnswer::Settled { rung: settled, target }, attachments: Vec::new() })
    }
}

fn cannot_force(forced: Rung, why: &str) -> Error {
    Error::new(
        ErrorKind::Refused,
        format!("rung {forced} was forced, but {why}"),
        "unset LUNA_BROKER_TRANSPORT or force another rung",
    )
}

/// Memory of `gpu` with nonces in it, as `rung` hands it over.
fn offer(state: &State, gpu: &BrokerGpu, session: SessionId, rung: Rung, clients: GpuUuid) -> Result<(Offered, Step)> {
    let handing = if rung == Rung::Local { Handing::Itself } else { Handing::Handles };
    let memory = SessionMemory::on_gpu(session, state.epoch, gpu.arenas(rung)?, handing, clients);
    let slot = memory.lease((PLACES * NONCE_BYTES) as u64)?;
    let queue = gpu.queue()?;
    let nonces = GpuNonces { plain: nonce()?, marked: nonce()? };
    place(&slot, BROKERS_PLAIN)?.write(&nonces.plain)?;
    place(&slot, SCRATCH)?.write(&nonces.marked)?;
    let marks = match (rung, state.config.gpu_order) {
        // Events of one process do not open in it.
        (Rung::Local, _) | (_, GpuOrder::Host) => None,
        (_, GpuOrder::Events) => gpu
            .marks()
            .inspect_err(
                |error| tracing::warn!(%session, %error, "no events are shared: each side waits for its GPU work"),
            )
            .ok(),
    };
    let lease = slot.lease().ok_or(DeviceError::Imported)?;
    let mut attachments = Vec::new();
    let fence = match &marks {
        Some(Marks { page, events, .. }) => Some(FenceOffer {
            page: attach(page.export()?, &mut attachments),
            page_bytes: page.size_bytes() as u64,
            events: events.clone(),
        }),
        None => None,
    };
    let offset = slot.offset();
    let slot = ProbedSlot { slot, queue: Arc::clone(&queue) };
    let offer = GpuOffer { gpu: clients, rung, arena: None, lease, offset, fence };
    let mut arena_attachments = Vec::new();
    let arena = memory.announce(lease.arena, &mut arena_attachments);
    arena_attachments.append(&mut attachments);
    let step = Step { answer: GpuAnswer::Probe(GpuOffer { arena, ..offer }), attachments: arena_attachments };
    Ok((Offered { rung, memory, slot, queue, marks, nonces }, step))
}

fn nonce() -> Result<[u8; NONCE_BYTES]> {
    let mut nonce = [0; NONCE_BYTES];
    getrandom::fill(&mut nonce).map_err(|error| Error::new(ErrorKind::Internal, error.to_string(), ""))?;
    Ok(nonce)
}

fn place(slot: &Held, at: usize) -> Result<Span, DeviceError> {
    slot.span().part(at * NONCE_BYTES, NONCE_BYTES)
}

fn read(slot: &Held, at: usize) -> Result<[u8; NONCE_BYTES], DeviceError> {
    let mut bytes = [0; NONCE_BYTES];
    place(slot, at)?.read(&mut bytes)?;
    Ok(bytes)
}

impl Offered {
    fn judge(&mut self, findings: &GpuFindings) -> Result<GpuOrder, (FailureCode, String)> {
        let unread = |error: DeviceError| (FailureCode::NonceMismatch, error.to_string());
        let found = read(&self.slot.slot, CLIENTS_PLAIN).map_err(unread)?;
        let marked = findings.marked.as_ref().zip(self.marks.as_ref()).and_then(|(marked, marks)| {
            match self.read_marked(marks, marked.sequence) {
                Ok(marked) => Some(marked),
                Err(error) => {
                    tracing::warn!(%error, "a client's mark cannot be waited for");
                    None
                }
            }
        });
        if findings.marked.is_some() && marked.is_none() {
            // The client's copy may come yet, into nobody else's slot.
            self.slot.slot.keep_lease();
        }
        judge_gpu(&self.nonces, findings, &found, marked.as_ref()).map_err(|(code, what)| (code, what.to_owned()))
    }

    /// What a stream that waits for the client's mark finds behind it. The mark must have passed by then: others wait for
    /// the stream too, and a client's stream may stand still.
    fn read_marked(&self, marks: &Marks, sequence: u64) -> Result<[u8; NONCE_BYTES]> {
        if !passes_within(&*marks.order, sequence, MARK_PATIENCE)? {
            let message = format!("GPU work before it was not done after {} s", MARK_PATIENCE.as_secs());
            return Err(Error::new(ErrorKind::Timeout, message, ""));
        }
        marks.order.wait(sequence, self.queue.handle())?;
        self.queue.copy(&place(&self.slot.slot, CLIENTS_MARKED)?, &place(&self.slot.slot, SCRATCH)?)?;
        self.queue.synchronize()?;
        Ok(read(&self.slot.slot, SCRATCH)?)
    }
}

/// Whether the GPU passes a mark of the peer's in this time.
fn passes_within(order: &dyn Order, sequence: u64, limit: Duration) -> Result<bool, DeviceError> {
    let deadline = Instant::now() + limit;
    loop {
        if order.passed_peers(sequence)? {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        std::thread::sleep(MARK_TICK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::StreamRef;

    /// Marks that pass up to this one, and that nobody may wait for.
    #[derive(Debug)]
    struct PassedUpTo(u64);

    impl Order for PassedUpTo {
        fn record(&self, _: StreamRef) -> Result<u64, DeviceError> {
            unreachable!("nothing is marked")
        }

        fn wait(&self, _: u64, _: StreamRef) -> Result<(), DeviceError> {
            unreachable!("nothing waits without a bound")
        }

        fn recorded(&self) -> u64 {
            0
        }

        fn passed_own(&self, _: u64) -> Result<bool, DeviceError> {
            Ok(true)
        }

        fn passed_peers(&self, sequence: u64) -> Result<bool, DeviceError> {
            Ok(sequence <= self.0)
        }

        fn synchronize_peers(&self, _: u64) -> Result<(), DeviceError> {
            unreachable!("nothing waits without a bound")
        }

        fn synchronize_own(&self, _: u64) -> Result<(), DeviceError> {
            unreachable!("nothing waits without a bound")
        }
    }

    #[test]
    fn a_mark_that_does_not_pass_is_waited_for_no_longer_than_allowed() {
        let order = PassedUpTo(1);
        assert!(passes_within(&order, 1, Duration::ZERO).unwrap());
        assert!(!passes_within(&order, 2, Duration::from_millis(5)).unwrap());
    }
}
