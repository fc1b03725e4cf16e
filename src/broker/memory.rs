use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;

use crate::device::{Device, DeviceError, Region, RegionHandle, Span};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{ArenaId, Epoch, LeaseRef, SessionId};
use crate::memory::{Grant, Ledger, LedgerError, Pin};
use crate::protocol::{ArenaHandle, ArenaOffer, Descriptor};
use crate::tensor::TensorMeta;
use crate::transport::Attachment;

/// Slots start at multiples of this: more than any vector instruction or page-cache line asks for.
const SLOT_ALIGNMENT: u64 = 512;

/// One session's tensor memory: its arenas, and who may use which part of them.
#[derive(Debug)]
pub(super) struct SessionMemory {
    session: SessionId,
    epoch: Epoch,
    device: Arc<dyn Device>,
    /// Whether the client maps the arenas; otherwise bytes cross in frames and the arenas stay private.
    exported: bool,
    limits: Limits,
    arena_ids: Arc<AtomicU32>,
    table: Mutex<Table>,
}

/// Bounds of a session's memory, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Least size of an arena.
    pub(super) arena: u64,
    /// All arenas together.
    pub(super) session: u64,
}

#[derive(Debug, Default)]
struct Table {
    ledger: Ledger,
    regions: HashMap<ArenaId, Arc<dyn Region>>,
    /// Arenas the client has not been told of, ready to be handed over.
    unannounced: HashMap<ArenaId, RegionHandle>,
    /// Leases that the client keeps for its inputs.
    inputs: HashSet<LeaseRef>,
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
    pub(super) fn new(
        session: SessionId,
        epoch: Epoch,
        device: Arc<dyn Device>,
        exported: bool,
        limits: Limits,
        arena_ids: Arc<AtomicU32>,
    ) -> Arc<Self> {
        Arc::new(Self { session, epoch, device, exported, limits, arena_ids, table: Mutex::default() })
    }

    /// A slot of at least `length` bytes, leased to the session and held for a job.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] beyond the session's bytes, or where the system has no memory.
    pub(super) fn lease(self: &Arc<Self>, length: u64) -> Result<Held> {
        let mut table = self.table.lock();
        let grant = match table.ledger.acquire(self.session, length) {
            Some(grant) => grant,
            None => {
                self.grow(&mut table, length)?;
                table.ledger.acquire(self.session, length).ok_or_else(|| self.exhausted(length))?
            }
        };
        let Grant { address, offset, length: slot_length } = grant;
        let pin = table.ledger.pin(self.session, address, offset, slot_length)?;
        let region = table.regions.get(&address.arena).cloned().ok_or_else(|| self.exhausted(length))?;
        drop(table);
        let span = Span::new(region, offset as usize, slot_length as usize)?;
        Ok(Held { memory: Arc::clone(self), pin: Some(pin), span, offset, ends_lease: true })
    }

    fn grow(&self, table: &mut Table, length: u64) -> Result<()> {
        let held = table.ledger.arena_bytes();
        let room = self.limits.session.saturating_sub(held);
        let needed = length.checked_next_multiple_of(SLOT_ALIGNMENT).ok_or_else(|| self.exhausted(length))?;
        if needed > room {
            return Err(self.exhausted(length));
        }
        // Rounded up, so that a tensor that grows a little from call to call does not make an arena each time.
        let size = needed.checked_next_power_of_two().unwrap_or(needed).max(self.limits.arena).min(room);
        let region = self.device.allocate(usize::try_from(size).map_err(|_| self.exhausted(length))?)?;
        let id = ArenaId(self.arena_ids.fetch_add(1, Ordering::Relaxed));
        if self.exported {
            // Before anything is in the arena: one that cannot be handed over is of no use.
            table.unannounced.insert(id, region.export()?);
        }
        table.ledger.add_arena(id, size, SLOT_ALIGNMENT);
        table.regions.insert(id, region);
        Ok(())
    }

    fn exhausted(&self, length: u64) -> Error {
        Error::new(
            ErrorKind::OutOfMemory,
            format!(
                "a tensor of {length} bytes does not fit into what is left of the session's {} bytes; \
                 the tensors it holds are intact",
                self.limits.session
            ),
            "drop tensors that are no longer needed, send a smaller batch, or raise --session-bytes",
        )
    }

    /// The client keeps this lease for its inputs.
    pub(super) fn note_input(&self, lease: LeaseRef) {
        self.table.lock().inputs.insert(lease);
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
        let stale = LedgerError::Stale {
            arena: descriptor.lease.arena,
            slot: descriptor.lease.slot,
            generation: descriptor.lease.generation,
        };
        let mut table = self.table.lock();
        let region = table.regions.get(&descriptor.lease.arena).cloned().ok_or(stale)?;
        let offset = descriptor.offset;
        let pin = table.ledger.pin(self.session, descriptor.lease, offset, length as u64)?;
        match Span::new(region, offset as usize, length) {
            Ok(span) => Ok(Held { memory: Arc::clone(self), pin: Some(pin), span, offset, ends_lease: false }),
            Err(error) => {
                table.ledger.unpin(pin);
                Err(error.into())
            }
        }
    }

    /// Ends leases the client gave back. A reference that is stale was given back before: nothing is lost.
    pub(super) fn release(&self, leases: &[LeaseRef]) {
        if leases.is_empty() {
            return;
        }
        let mut table = self.table.lock();
        for &lease in leases {
            table.inputs.remove(&lease);
            if let Err(error) = table.ledger.release(self.session, lease) {
                tracing::debug!(session = %self.session, %error, "a release was ignored");
            }
        }
    }

    /// The session is over: all leases end, arenas go as soon as no job uses them.
    pub(super) fn reap(&self) -> u64 {
        let mut table = self.table.lock();
        table.regions.clear();
        table.unannounced.clear();
        table.inputs.clear();
        table.ledger.reap(self.session)
    }

    /// The offer of an arena that the client has not been told of, with what travels beside the message.
    pub(super) fn announce(&self, arena: ArenaId, attachments: &mut Vec<Attachment>) -> Option<ArenaOffer> {
        let mut table = self.table.lock();
        let handle = table.unannounced.remove(&arena)?;
        let size_bytes = table.regions.get(&arena)?.size_bytes() as u64;
        drop(table);
        let handle = match handle {
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
            // Sessions have arenas of host memory only.
            RegionHandle::CudaIpc(_) => return None,
            #[cfg(unix)]
            RegionHandle::CudaVmm(_) => return None,
        };
        Some(ArenaOffer { arena, size_bytes, handle })
    }

    /// The client has the arena mapped.
    pub(super) fn opened(&self, arena: ArenaId) {
        if let Some(region) = self.table.lock().regions.get(&arena) {
            region.opened();
        }
    }

    pub(super) fn counts(&self) -> MemoryCounts {
        let table = self.table.lock();
        let (leases, leased_bytes) = table.ledger.held(self.session);
        let input_slots = table.inputs.len() as u64;
        let leases = leases.saturating_sub(input_slots);
        MemoryCounts { leases, input_slots, leased_bytes, arena_bytes: table.ledger.arena_bytes() }
    }
}

/// A slot held for a job. Dropping it gives the pin back, and the lease too unless it was passed on to the client.
#[derive(Debug)]
pub(super) struct Held {
    memory: Arc<SessionMemory>,
    pin: Option<Pin>,
    span: Span,
    /// Start of the tensor in its arena.
    offset: u64,
    /// Whether the lease ends with the hold: a result that was not handed over, not an input of the client's.
    ends_lease: bool,
}

impl Held {
    pub(super) fn span(&self) -> &Span {
        &self.span
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The arena the slot lies in.
    pub(super) fn arena(&self) -> Option<ArenaId> {
        self.pin.as_ref().map(|pin| pin.address().arena)
    }

    pub(super) fn span_mut(&mut self) -> &mut Span {
        &mut self.span
    }

    /// Passes the lease on to the client: the descriptor of what was written.
    ///
    /// # Errors
    /// The device's, where it cannot publish the write; the lease ends then.
    pub(super) fn hand_over(mut self, meta: TensorMeta) -> Result<Descriptor> {
        let sequence = self.span.region().record()?;
        let lease = self.pin.as_ref().map(Pin::address).ok_or(DeviceError::Imported)?;
        self.ends_lease = false;
        Ok(Descriptor { epoch: self.memory.epoch, lease, offset: self.offset, sequence, meta })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let Some(pin) = self.pin.take() else { return };
        let mut table = self.memory.table.lock();
        if self.ends_lease {
            // Gone already where the session was reaped meanwhile.
            _ = table.ledger.release(self.memory.session, pin.address());
        }
        table.ledger.unpin(pin);
    }
}
