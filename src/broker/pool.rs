use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use crate::device::{Device, Order, Region, Span};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{ArenaId, LeaseRef, SessionId};
use crate::memory::{Grant, Ledger, LedgerError, Pin};

/// Slots start at multiples of this: more than any vector instruction or page-cache line asks for.
const SLOT_ALIGNMENT: u64 = 512;

/// Bounds of a pool and of what one session may take of it, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Least size of an arena.
    pub(super) arena: u64,
    /// All arenas together.
    pub(super) total: u64,
    /// One session's slots.
    pub(super) session: u64,
    /// The setting that raises the bound.
    pub(super) setting: &'static str,
    pub(super) growth: Growth,
}

/// How much more than a tensor needs an arena has that is made for it, so that one that grows a little from call to call
/// does not make an arena each time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Growth {
    /// Up to a power of two.
    Doubling,
    /// Up to whole blocks: for memory that is used up from the start.
    Blocks,
}

/// Of [`Growth::Blocks`].
const BLOCK_BYTES: u64 = 2 << 20;

/// Arenas on one device, and who may use which part of them.
#[derive(Debug)]
pub(super) struct ArenaPool {
    device: Arc<dyn Device>,
    limits: Limits,
    arena_ids: Arc<AtomicU32>,
    table: Mutex<Table>,
    /// Held while an arena is made, which takes the driver's time: releases and other leases go on meanwhile. Taken
    /// before the table.
    growth: Mutex<()>,
}

#[derive(Debug, Default)]
struct Table {
    ledger: Ledger,
    regions: FxHashMap<ArenaId, Arc<dyn Region>>,
    /// What ends once the GPU is past it.
    pending: Vec<Pending>,
}

/// Something that must not happen while the GPU may still use a slot.
#[derive(Debug)]
struct Pending {
    session: SessionId,
    end: End,
    gate: Gate,
}

#[derive(Debug)]
enum End {
    Lease(LeaseRef),
    Pin(Pin),
}

/// Marks that the GPU must have passed.
#[derive(Debug, Clone)]
pub(super) struct Gate {
    pub(super) order: Arc<dyn Order>,
    /// The broker's.
    pub(super) own: u64,
    /// The client's.
    pub(super) peers: u64,
}

impl Gate {
    /// A driver that fails keeps the gate shut: a slot that is lost is better than one with two users.
    fn is_open(&self) -> bool {
        let passed = self.order.passed_own(self.own).and_then(|own| Ok(own && self.order.passed_peers(self.peers)?));
        passed.unwrap_or_else(|error| {
            tracing::warn!(%error, "a GPU slot stays out of use");
            false
        })
    }
}

impl Table {
    fn end(&mut self, session: SessionId, end: End) {
        match end {
            End::Lease(lease) => {
                // A reference that is stale was given back before: nothing is lost.
                if let Err(error) = self.ledger.release(session, lease) {
                    tracing::debug!(%session, %error, "a release was ignored");
                }
            }
            End::Pin(pin) => self.ledger.unpin(pin),
        }
    }

    /// Ends what the GPU is past.
    fn sweep(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let (open, shut) = std::mem::take(&mut self.pending).into_iter().partition(|pending| pending.gate.is_open());
        self.pending = shut;
        let open: Vec<Pending> = open;
        for Pending { session, end, .. } in open {
            self.end(session, end);
        }
    }
}

/// A slot pinned for a job.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) pin: Pin,
    pub(super) span: Span,
    /// Start of the tensor in its arena.
    pub(super) offset: u64,
}

/// What a pool holds.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PoolCounts {
    pub(super) leases: u64,
    pub(super) leased_bytes: u64,
    pub(super) arena_bytes: u64,
}

impl ArenaPool {
    pub(super) fn new(device: Arc<dyn Device>, limits: Limits, arena_ids: Arc<AtomicU32>) -> Self {
        Self { device, limits, arena_ids, table: Mutex::default(), growth: Mutex::default() }
    }

    /// A pool on another device, bounded as this one, with arenas of at least `arena` bytes and little more than is needed.
    pub(super) fn beside(&self, device: Arc<dyn Device>, arena: u64) -> Self {
        Self::new(device, Limits { arena, growth: Growth::Blocks, ..self.limits }, Arc::clone(&self.arena_ids))
    }

    /// A slot of at least `length` bytes, leased to the session and pinned.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] beyond a bound, or where the system has no memory.
    pub(super) fn lease(&self, session: SessionId, length: u64) -> Result<Place> {
        if let Some(place) = self.grant(&mut self.table.lock(), session, length)? {
            return Ok(place);
        }
        let _growing = self.growth.lock();
        // Somebody else may have made room meanwhile.
        if let Some(place) = self.grant(&mut self.table.lock(), session, length)? {
            return Ok(place);
        }
        let (size, region) = self.make_arena(length)?;
        let id = ArenaId(self.arena_ids.fetch_add(1, Ordering::Relaxed));
        // In one go: nobody else can take the new room first.
        let mut table = self.table.lock();
        table.ledger.add_arena(id, size, SLOT_ALIGNMENT);
        table.regions.insert(id, region);
        self.grant(&mut table, session, length)?.ok_or_else(|| self.exhausted(length))
    }

    /// A pinned slot in the arenas there are; `None` where none has room.
    fn grant(&self, table: &mut Table, session: SessionId, length: u64) -> Result<Option<Place>> {
        table.sweep();
        // In a pool of its own a session is bounded by the pool.
        let is_shared = self.limits.session < self.limits.total;
        if is_shared && table.ledger.held(session).1.saturating_add(length) > self.limits.session {
            return Err(self.exhausted(length));
        }
        let Some(Grant { address, offset, length: slot_length }) = table.ledger.acquire(session, length) else {
            return Ok(None);
        };
        let pin = table.ledger.pin(session, address, offset, slot_length)?;
        let region = table.regions.get(&address.arena).cloned().ok_or_else(|| self.exhausted(length))?;
        let span = Span::new(region, offset as usize, slot_length as usize)?;
        Ok(Some(Place { pin, span, offset }))
    }

    /// Memory for an arena with room for `length` bytes, and how much of it. The caller holds `growth`.
    fn make_arena(&self, length: u64) -> Result<(u64, Arc<dyn Region>)> {
        let held = self.table.lock().ledger.arena_bytes();
        let room = self.limits.total.saturating_sub(held);
        let needed = length.checked_next_multiple_of(SLOT_ALIGNMENT).ok_or_else(|| self.exhausted(length))?;
        if needed > room {
            return Err(self.exhausted(length));
        }
        let rounded = match self.limits.growth {
            Growth::Doubling => needed.checked_next_power_of_two(),
            Growth::Blocks => needed.checked_next_multiple_of(BLOCK_BYTES),
        };
        let size = rounded.unwrap_or(needed).max(self.limits.arena).min(room);
        let region = self.device.allocate(usize::try_from(size).map_err(|_| self.exhausted(length))?)?;
        // Before anything is in the arena: one that cannot be handed over is of no use.
        drop(region.export()?);
        Ok((size, region))
    }

    fn exhausted(&self, length: u64) -> Error {
        let Limits { total, session, setting, .. } = self.limits;
        Error::new(
            ErrorKind::OutOfMemory,
            format!(
                "a tensor of {length} bytes does not fit into what is left of the session's {} bytes; \
                 the tensors it holds are intact",
                total.min(session)
            ),
            format!("drop tensors that are no longer needed, send a smaller batch, or raise {setting}"),
        )
    }

    /// Pins `length` bytes at `offset` of the arena, which must lie in the leased slot.
    ///
    /// # Errors
    /// [`LedgerError`], [`crate::device::DeviceError::OutOfBounds`].
    pub(super) fn pin(&self, session: SessionId, lease: LeaseRef, offset: u64, length: usize) -> Result<Place> {
        let LeaseRef { arena, slot, generation } = lease;
        let mut table = self.table.lock();
        let region = table.regions.get(&arena).cloned().ok_or(LedgerError::Stale { arena, slot, generation })?;
        let pin = table.ledger.pin(session, lease, offset, length as u64)?;
        match Span::new(region, offset as usize, length) {
            Ok(span) => Ok(Place { pin, span, offset }),
            Err(error) => {
                table.ledger.unpin(pin);
                Err(error.into())
            }
        }
    }

    /// Ends a lease, at once or when the gate is open.
    pub(super) fn release(&self, session: SessionId, lease: LeaseRef, gate: Option<Gate>) {
        self.end_behind(session, End::Lease(lease), gate);
    }

    /// Ends a pin, at once or when the gate is open.
    pub(super) fn unpin(&self, session: SessionId, pin: Pin, gate: Option<Gate>) {
        self.end_behind(session, End::Pin(pin), gate);
    }

    fn end_behind(&self, session: SessionId, end: End, gate: Option<Gate>) {
        let mut table = self.table.lock();
        match gate {
            Some(gate) => {
                table.pending.push(Pending { session, end, gate });
                table.sweep();
            }
            None => table.end(session, end),
        }
    }

    /// The session is over, and its client's GPU work with it: what it held is free once the broker's work is done.
    pub(super) fn reap(&self, session: SessionId) {
        let mut table = self.table.lock();
        // Leases end here; pins stay for what the GPU still does for the session.
        table.pending.retain(|one| one.session != session || matches!(one.end, End::Pin(_)));
        for one in table.pending.iter_mut().filter(|one| one.session == session) {
            one.gate.peers = 0;
        }
        table.ledger.reap(session);
        table.sweep();
    }

    /// Nobody uses the pool any more: arenas go as soon as no job uses them.
    pub(super) fn close(&self) {
        let regions = std::mem::take(&mut self.table.lock().regions);
        // Outside the table: unmapping and unlocking pages take the system's time.
        drop(regions);
    }

    pub(super) fn region(&self, arena: ArenaId) -> Option<Arc<dyn Region>> {
        self.table.lock().regions.get(&arena).cloned()
    }

    /// Bytes of all arenas.
    #[cfg_attr(
        not(all(feature = "cuda", unix)),
        expect(dead_code, reason = "only GPUs' arenas are counted by themselves")
    )]
    pub(super) fn arena_bytes(&self) -> u64 {
        self.table.lock().ledger.arena_bytes()
    }

    pub(super) fn counts(&self, session: SessionId) -> PoolCounts {
        let mut table = self.table.lock();
        table.sweep();
        let (leases, leased_bytes) = table.ledger.held(session);
        PoolCounts { leases, leased_bytes, arena_bytes: table.ledger.arena_bytes() }
    }
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
