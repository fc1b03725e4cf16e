use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use rustc_hash::FxHashSet;

use super::pool::{ArenaPool, Gate, Place as PinnedSlot};
use crate::device::{Device, DeviceError, Order, Place, RegionHandle, Span, StreamRef};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{ArenaId, Epoch, GpuUuid, LeaseRef, SessionId};
use crate::memory::Pin;
use crate::protocol::{ArenaHandle, ArenaOffer, ArenaPlace, Descriptor, Release};
use crate::tensor::TensorMeta;
use crate::transport::Attachment;

/// How the arenas of a pool reach a session's client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Handing {
    /// Not at all: bytes cross in frames.
    Never,
    /// As they are: the client lives in this process.
    Itself,
    /// By handles.
    Handles,
}

/// Whose pool a session's memory is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sharing {
    /// The session's own: it goes with it.
    Private,
    /// All sessions'.
    Common,
}

/// One session's tensor memory on one device.
#[derive(Debug)]
pub(super) struct SessionMemory {
    session: SessionId,
    epoch: Epoch,
    pool: Arc<ArenaPool>,
    handing: Handing,
    sharing: Sharing,
    place: ArenaPlace,
    /// Between the GPU work of broker and client; absent for host memory and where each side waits on the host.
    order: OnceLock<Arc<dyn Order>>,
    told: Mutex<Told>,
}

/// What the client knows and keeps.
#[derive(Debug, Default)]
struct Told {
    arenas: FxHashSet<ArenaId>,
    /// Leases of a common pool.
    granted: FxHashSet<LeaseRef>,
    /// Leases that the client keeps for its inputs.
    inputs: FxHashSet<LeaseRef>,
}

/// What `status` tells of a session's memory.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MemoryCounts {
    pub(super) leases: u64,
    pub(super) input_slots: u64,
    pub(super) leased_bytes: u64,
    pub(super) arena_bytes: u64,
}

impl SessionMemory {
    /// Host memory of the session's own.
    pub(super) fn new(session: SessionId, epoch: Epoch, pool: Arc<ArenaPool>, handing: Handing) -> Arc<Self> {
        let (order, told) = (OnceLock::new(), Mutex::default());
        let (sharing, place) = (Sharing::Private, ArenaPlace::Host);
        Arc::new(Self { session, epoch, pool, handing, sharing, place, order, told })
    }

    /// Memory of the same session on another device, for tensors of the client's `gpu` to pass through. Bounded
    /// as this one is, in arenas of at least `arena` bytes.
    pub(super) fn staging(&self, device: Arc<dyn Device>, arena: u64, gpu: GpuUuid) -> Arc<Self> {
        let &Self { session, epoch, handing, sharing, .. } = self;
        let (order, told) = (OnceLock::new(), Mutex::default());
        let (pool, place) = (Arc::new(self.pool.beside(device, arena)), ArenaPlace::Staging(gpu));
        Arc::new(Self { session, epoch, pool, handing, sharing, place, order, told })
    }

    /// A part of the arenas that all sessions have on the broker's GPU, for a GPU of the client's.
    pub(super) fn on_gpu(
        session: SessionId,
        epoch: Epoch,
        pool: Arc<ArenaPool>,
        handing: Handing,
        gpu: GpuUuid,
    ) -> Arc<Self> {
        let (order, told) = (OnceLock::new(), Mutex::default());
        let (sharing, place) = (Sharing::Common, ArenaPlace::Gpu(gpu));
        Arc::new(Self { session, epoch, pool, handing, sharing, place, order, told })
    }

    /// From here on GPU work is ordered by marks.
    pub(super) fn order_by(&self, order: Arc<dyn Order>) {
        if self.order.set(order).is_err() {
            tracing::error!(session = %self.session, "the order of a session's GPU work was settled twice");
        }
    }

    /// What a slot must wait for before it is free: everything enqueued for the session, and the client's mark.
    fn gate(&self, peers: u64) -> Option<Gate> {
        let order = Arc::clone(self.order.get()?);
        Some(Gate { own: order.recorded(), order, peers })
    }

    /// A slot of at least `length` bytes, leased to the session and held for a job.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] beyond the session's bytes, or where the system has no memory.
    pub(super) fn lease(self: &Arc<Self>, length: u64) -> Result<Held> {
        let slot = self.pool.lease(self.session, length)?;
        if self.sharing == Sharing::Common {
            self.told.lock().granted.insert(slot.pin.address());
        }
        Ok(self.held(slot, 0, EndsLease::Yes))
    }

    fn held(self: &Arc<Self>, slot: PinnedSlot, written: u64, ends_lease: EndsLease) -> Held {
        let PinnedSlot { pin, span, offset } = slot;
        Held { memory: Arc::clone(self), pin: Some(pin), span, offset, written, ends_lease }
    }

    /// The client keeps this lease for its inputs.
    pub(super) fn note_input(&self, lease: LeaseRef) {
        self.told.lock().inputs.insert(lease);
    }

    /// The memory a client's descriptor refers to, held for a job.
    ///
    /// # Errors
    /// [`ErrorKind::Stale`] for another life of the broker or of the slot, [`ErrorKind::InvalidTensor`] for a range
    /// outside the slot.
    pub(super) fn resolve(self: &Arc<Self>, descriptor: &Descriptor) -> Result<Held> {
        if descriptor.epoch != self.epoch {
            return Err(Error::new(
                ErrorKind::Stale,
                "the tensor descriptor is from an earlier life of the broker",
                "send the tensor again",
            ));
        }
        descriptor.meta.validate()?;
        let length = descriptor.meta.span_bytes()?;
        // Slots start at multiples of more than any element.
        if !descriptor.offset.is_multiple_of(descriptor.meta.dtype.size_bytes() as u64) {
            return Err(Error::new(
                ErrorKind::InvalidTensor,
                format!(
                    "a {} tensor at byte {} is not aligned to its elements",
                    descriptor.meta.dtype, descriptor.offset
                ),
                "start the tensor at a whole element",
            ));
        }
        let slot = self.pool.pin(self.session, descriptor.lease, descriptor.offset, length)?;
        Ok(self.held(slot, descriptor.sequence, EndsLease::No))
    }

    /// Ends a lease the client gave back.
    pub(super) fn release(&self, release: &Release) {
        let mut told = self.told.lock();
        told.inputs.remove(&release.lease);
        told.granted.remove(&release.lease);
        drop(told);
        if let Some(order) = self.order.get()
            && let Err(error) = order.passed_peers(release.sequence)
        {
            // Nobody could tell when the slot is free.
            tracing::warn!(session = %self.session, %error, "a GPU slot is kept until the session ends");
            return;
        }
        self.pool.release(self.session, release.lease, self.gate(release.sequence));
    }

    /// The session is over: all leases end, slots are free once the broker's own GPU work on them is done. The client's
    /// must be done before.
    pub(super) fn reap(&self) {
        if self.sharing == Sharing::Private {
            self.pool.close();
        }
        self.pool.reap(self.session);
    }

    /// Whether the lease was granted through this memory and not given back. Told of common pools only, as several
    /// memories of a session may be parts of one.
    pub(super) fn granted(&self, lease: LeaseRef) -> bool {
        self.told.lock().granted.contains(&lease)
    }

    /// Whether an arena is of this memory.
    pub(super) fn has(&self, arena: ArenaId) -> bool {
        self.pool.region(arena).is_some()
    }

    /// The offer of an arena that the client has not been told of, with what travels beside the message.
    pub(super) fn announce(&self, arena: ArenaId, attachments: &mut Vec<Attachment>) -> Option<ArenaOffer> {
        if self.handing == Handing::Never || !self.told.lock().arenas.insert(arena) {
            return None;
        }
        let region = self.pool.region(arena)?;
        let size_bytes = region.size_bytes() as u64;
        if self.handing == Handing::Itself {
            attachments.push(Attachment::Local(Arc::new(region)));
            return Some(ArenaOffer { arena, size_bytes, handle: ArenaHandle::Attached, place: self.place });
        }
        let handle = region.export().map(|handle| attach(handle, attachments));
        let handle = handle.inspect_err(|error| tracing::error!(%arena, %error, "an arena cannot be handed over"));
        Some(ArenaOffer { arena, size_bytes, handle: handle.ok()?, place: self.place })
    }

    /// The client has the arena mapped.
    pub(super) fn opened(&self, arena: ArenaId) {
        if let Some(region) = self.pool.region(arena) {
            region.opened();
        }
    }

    pub(super) fn counts(&self) -> MemoryCounts {
        let counts = self.pool.counts(self.session);
        let input_slots = self.told.lock().inputs.len() as u64;
        MemoryCounts {
            leases: counts.leases.saturating_sub(input_slots),
            input_slots,
            leased_bytes: counts.leased_bytes,
            arena_bytes: counts.arena_bytes,
        }
    }
}

/// What a message says of a region's handle; what cannot be said travels beside it.
pub(super) fn attach(handle: RegionHandle, attachments: &mut Vec<Attachment>) -> ArenaHandle {
    match handle {
        #[cfg(unix)]
        RegionHandle::Fd(fd) => {
            attachments.push(Attachment::Fd(fd));
            ArenaHandle::Attached
        }
        RegionHandle::Name(name) => ArenaHandle::Named(name),
        RegionHandle::Local(region) => {
            attachments.push(Attachment::Local(Arc::new(region)));
            ArenaHandle::Attached
        }
        RegionHandle::CudaIpc(handle) => ArenaHandle::CudaIpc(handle.to_vec()),
        #[cfg(unix)]
        RegionHandle::CudaVmm(fd) => {
            attachments.push(Attachment::Fd(fd));
            ArenaHandle::CudaVmm
        }
    }
}

/// Whether a lease ends with the job's hold on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EndsLease {
    /// A result that was not handed over.
    Yes,
    /// An input of the client's.
    No,
}

/// A slot held for a job. Dropping it gives the pin back, and the lease too unless it was passed on to the client.
#[derive(Debug)]
pub(super) struct Held {
    memory: Arc<SessionMemory>,
    pin: Option<Pin>,
    span: Span,
    /// Start of the tensor in its arena.
    offset: u64,
    /// The client's mark behind its writing; 0 for what is visible already.
    written: u64,
    ends_lease: EndsLease,
}

impl Held {
    pub(super) fn span(&self) -> &Span {
        &self.span
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(super) fn lease(&self) -> Option<LeaseRef> {
        self.pin.as_ref().map(Pin::address)
    }

    pub(super) fn span_mut(&mut self) -> &mut Span {
        &mut self.span
    }

    /// Whether GPU work enqueued from now on sees what the client wrote, without waiting for it. `true` also where that
    /// cannot be told: [`Held::await_written`] says why.
    pub(super) fn is_written(&self) -> bool {
        self.memory.order.get().is_none_or(|order| order.passed_peers(self.written).unwrap_or(true))
    }

    /// GPU work enqueued on `stream` from now on sees what the client wrote.
    ///
    /// # Errors
    /// [`DeviceError::NotRecorded`] for a mark that the client has not made.
    pub(super) fn await_written(&self, stream: Option<StreamRef>) -> Result<(), DeviceError> {
        match (self.memory.order.get(), stream) {
            (Some(order), Some(stream)) => order.wait(self.written, stream),
            // Without marks the client waited before it sent the descriptor.
            _ => Ok(()),
        }
    }

    /// The lease ends with the session and not before: the client's GPU work may reach the slot at any time until then.
    pub(super) fn keep_lease(&mut self) {
        self.ends_lease = EndsLease::No;
    }

    /// Passes the lease on to the client: the descriptor of what was written, on `stream` where that is GPU work.
    ///
    /// # Errors
    /// The device's, where it cannot publish the write; the lease ends then.
    pub(super) fn hand_over(mut self, meta: TensorMeta, stream: Option<StreamRef>) -> Result<Descriptor> {
        let sequence = self.publish(stream)?;
        let lease = self.lease().ok_or(DeviceError::Imported)?;
        self.ends_lease = EndsLease::No;
        Ok(Descriptor { epoch: self.memory.epoch, lease, offset: self.offset, sequence, meta })
    }

    /// Passes the lease on to the client without anything written.
    ///
    /// # Errors
    /// [`DeviceError::Imported`] where the slot is not held, which cannot be.
    pub(super) fn lend(mut self, meta: TensorMeta) -> Result<Descriptor> {
        let lease = self.lease().ok_or(DeviceError::Imported)?;
        self.ends_lease = EndsLease::No;
        Ok(Descriptor { epoch: self.memory.epoch, lease, offset: self.offset, sequence: 0, meta })
    }

    /// A job failed with GPU work enqueued: the slot is not reused before that is done.
    pub(super) fn give_up(mut self, stream: Option<StreamRef>) {
        if self.span.place() != Place::Host
            && let Err(error) = self.publish(stream)
        {
            tracing::warn!(%error, "GPU work of a failed job could not be awaited");
        }
    }

    fn publish(&mut self, stream: Option<StreamRef>) -> Result<u64, DeviceError> {
        match (self.memory.order.get(), stream) {
            (Some(order), Some(stream)) => order.record(stream).inspect_err(|_| {
                // Without a mark nobody knows when the GPU is done: wait, or never use the slot again.
                if let Err(error) = self.span.region().record() {
                    tracing::error!(%error, "a GPU slot is lost: its work can be neither marked nor awaited");
                    _ = self.pin.take();
                }
            }),
            // Host memory, or a GPU whose work is waited for here.
            _ => self.span.region().record(),
        }
    }

    /// Marks GPU work that read this input where the result's mark does not stand for it: in memory of another order.
    ///
    /// # Errors
    /// As [`Held::hand_over`].
    pub(super) fn mark_read(&mut self, result: &Self, stream: Option<StreamRef>) -> Result<(), DeviceError> {
        let is_other = self.span.place() != Place::Host && !Arc::ptr_eq(&self.memory, &result.memory);
        if is_other { self.publish(stream).map(|_| ()) } else { Ok(()) }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(pin) = self.pin.take() else { return };
        let SessionMemory { session, pool, .. } = &*self.memory;
        let gate = self.memory.gate(0);
        if self.ends_lease == EndsLease::Yes {
            self.memory.told.lock().granted.remove(&pin.address());
            // Gone already where the session was reaped meanwhile.
            pool.release(*session, pin.address(), gate.clone());
        }
        pool.unpin(*session, pin, gate);
    }
}
