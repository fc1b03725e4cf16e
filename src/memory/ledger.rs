use std::collections::BTreeMap;

use rustc_hash::FxHashMap;

use super::SlotAllocator;
use crate::error::{Error, ErrorKind};
use crate::id::{ArenaId, Generation, LeaseRef, SessionId, SlotId};

/// Why the ledger refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// The reference is from an earlier use of the slot, or never was.
    #[error("lease {slot} of arena {arena}, generation {generation}, is stale: it was released or never granted")]
    Stale {
        /// The arena.
        arena: ArenaId,
        /// The slot.
        slot: SlotId,
        /// The generation referred to.
        generation: Generation,
    },
    /// The slot is leased to somebody else.
    #[error("slot {slot} of arena {arena} belongs to another session")]
    NotHolder {
        /// The arena.
        arena: ArenaId,
        /// The slot.
        slot: SlotId,
    },
    /// A range reaches beyond its slot.
    #[error(
        "bytes {offset}..{offset}+{length} lie outside slot {slot} of arena {arena} ({slot_offset}..{slot_offset}+{slot_length})"
    )]
    OutOfBounds {
        /// The arena.
        arena: ArenaId,
        /// The slot.
        slot: SlotId,
        /// Start of the range in the arena.
        offset: u64,
        /// Length of the range.
        length: u64,
        /// Start of the slot in the arena.
        slot_offset: u64,
        /// Length of the slot.
        slot_length: u64,
    },
}

impl LedgerError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Stale { .. } => ErrorKind::Stale,
            Self::NotHolder { .. } | Self::OutOfBounds { .. } => ErrorKind::InvalidTensor,
        }
    }
}

/// A new lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// The slot.
    pub address: LeaseRef,
    /// Bytes from the start of the arena.
    pub offset: u64,
    /// Bytes in the slot; at least what was asked for.
    pub length: u64,
}

/// The broker's own hold on a slot while a job reads or writes it. Given back with [`Ledger::unpin`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a pin that is not given back keeps its slot for ever"]
pub struct Pin {
    address: LeaseRef,
}

impl Pin {
    /// The pinned slot.
    #[must_use]
    pub fn address(&self) -> LeaseRef {
        self.address
    }
}

#[derive(Debug)]
struct Slot {
    generation: Generation,
    /// Absent between uses.
    used: Option<Use>,
}

#[derive(Debug)]
struct Use {
    offset: u64,
    length: u64,
    /// Absent in limbo: the lease is gone but a pin remains, so the slot is neither usable nor free.
    holder: Option<SessionId>,
    pins: u32,
}

#[derive(Debug)]
struct Arena {
    allocator: SlotAllocator,
    slots: Vec<Slot>,
    vacant: Vec<SlotId>,
}

/// The table of arenas, slots and leases of one trust domain; the only place where a lease changes.
#[derive(Debug, Default)]
pub struct Ledger {
    arenas: BTreeMap<ArenaId, Arena>,
    /// Leases and their bytes per session, so that `status` costs nothing.
    held: FxHashMap<SessionId, (u64, u64)>,
}

impl Ledger {
    /// An empty table.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an arena of `size` bytes. Its slots start at multiples of `alignment`.
    pub fn add_arena(&mut self, id: ArenaId, size: u64, alignment: u64) {
        let allocator = SlotAllocator::new(size, alignment);
        self.arenas.insert(id, Arena { allocator, slots: Vec::new(), vacant: Vec::new() });
    }

    /// Leases a slot of at least `length` bytes to `holder`; `None` where no arena has room.
    pub fn acquire(&mut self, holder: SessionId, length: u64) -> Option<Grant> {
        let (id, arena, (offset, length)) = self
            .arenas
            .iter_mut()
            .find_map(|(id, arena)| arena.allocator.allocate(length).map(|range| (*id, arena, range)))?;
        let slot = arena.vacant.pop().unwrap_or_else(|| {
            arena.slots.push(Slot { generation: Generation(0), used: None });
            SlotId((arena.slots.len() - 1) as u32)
        });
        let entry = &mut arena.slots[slot.0 as usize];
        entry.used = Some(Use { offset, length, holder: Some(holder), pins: 0 });
        let held = self.held.entry(holder).or_default();
        held.0 += 1;
        held.1 += length;
        let address = LeaseRef { arena: id, slot, generation: entry.generation };
        Some(Grant { address, offset, length })
    }

    /// Ends a lease. The slot is free at once, or when its last pin goes.
    ///
    /// # Errors
    /// [`LedgerError::Stale`], [`LedgerError::NotHolder`]; nothing changes then.
    pub fn release(&mut self, holder: SessionId, address: LeaseRef) -> Result<(), LedgerError> {
        let used = self.held_use(holder, address)?;
        used.holder = None;
        let (pins, length) = (used.pins, used.length);
        self.forget(holder, length);
        if pins == 0 {
            self.vacate(address);
        }
        Ok(())
    }

    /// Holds a slot for a job that uses `length` bytes at `offset` of its arena.
    ///
    /// # Errors
    /// [`LedgerError::Stale`], [`LedgerError::NotHolder`], [`LedgerError::OutOfBounds`]; nothing changes then.
    pub fn pin(&mut self, holder: SessionId, address: LeaseRef, offset: u64, length: u64) -> Result<Pin, LedgerError> {
        let used = self.held_use(holder, address)?;
        let inside =
            offset >= used.offset && offset.checked_add(length).is_some_and(|end| end <= used.offset + used.length);
        if !inside {
            return Err(LedgerError::OutOfBounds {
                arena: address.arena,
                slot: address.slot,
                offset,
                length,
                slot_offset: used.offset,
                slot_length: used.length,
            });
        }
        used.pins += 1;
        Ok(Pin { address })
    }

    /// The job is done with the slot.
    pub fn unpin(&mut self, pin: Pin) {
        let Some(used) = self.current_use(pin.address) else { return };
        used.pins -= 1;
        if used.pins == 0 && used.holder.is_none() {
            self.vacate(pin.address);
        }
    }

    /// Ends all leases of `holder`; how many there were. Pinned slots stay in limbo until their jobs end.
    pub fn reap(&mut self, holder: SessionId) -> u64 {
        let mut unused = Vec::new();
        let mut reaped = 0;
        for (&arena_id, arena) in &mut self.arenas {
            for (at, slot) in arena.slots.iter_mut().enumerate() {
                let Some(used) = slot.used.as_mut().filter(|used| used.holder == Some(holder)) else { continue };
                used.holder = None;
                reaped += 1;
                if used.pins == 0 {
                    unused.push(LeaseRef { arena: arena_id, slot: SlotId(at as u32), generation: slot.generation });
                }
            }
        }
        for address in unused {
            self.vacate(address);
        }
        self.held.remove(&holder);
        reaped
    }

    /// Leases of `holder` and their bytes.
    #[must_use]
    pub fn held(&self, holder: SessionId) -> (u64, u64) {
        self.held.get(&holder).copied().unwrap_or_default()
    }

    /// Bytes of all arenas.
    #[must_use]
    pub fn arena_bytes(&self) -> u64 {
        self.arenas.values().map(|arena| arena.allocator.size()).sum()
    }

    /// Bytes of all slots in use, limbo included.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.arenas.values().map(|arena| arena.allocator.used()).sum()
    }

    fn current_use(&mut self, address: LeaseRef) -> Option<&mut Use> {
        let slot = self.arenas.get_mut(&address.arena)?.slots.get_mut(address.slot.0 as usize)?;
        if slot.generation == address.generation { slot.used.as_mut() } else { None }
    }

    fn held_use(&mut self, holder: SessionId, address: LeaseRef) -> Result<&mut Use, LedgerError> {
        let LeaseRef { arena, slot, generation } = address;
        match self.current_use(address) {
            None | Some(Use { holder: None, .. }) => Err(LedgerError::Stale { arena, slot, generation }),
            Some(used) if used.holder == Some(holder) => Ok(used),
            Some(_) => Err(LedgerError::NotHolder { arena, slot }),
        }
    }

    fn forget(&mut self, holder: SessionId, length: u64) {
        if let Some(held) = self.held.get_mut(&holder) {
            held.0 -= 1;
            held.1 -= length;
        }
    }

    fn vacate(&mut self, address: LeaseRef) {
        let Some(arena) = self.arenas.get_mut(&address.arena) else { return };
        let Some(slot) = arena.slots.get_mut(address.slot.0 as usize) else { return };
        if let Some(used) = slot.used.take() {
            arena.allocator.free(used.offset);
            slot.generation = Generation(slot.generation.0.wrapping_add(1));
            arena.vacant.push(address.slot);
        }
    }
}

impl From<LedgerError> for Error {
    fn from(error: LedgerError) -> Self {
        Self::caused(error.kind(), "", error)
    }
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
