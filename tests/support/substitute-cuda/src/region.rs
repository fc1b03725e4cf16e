//! The table of all memory that this process can name to the driver.
//!
//! Whoever touches device memory holds the table for reading, whoever unmaps holds it for writing: no range disappears
//! under a copy.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use crate::abi::DevicePointer;
use crate::code::{INVALID_VALUE, Result};
use crate::faults::faults;
use crate::mapping::{Access, Mapping};
use crate::run;
use crate::slab::Slabs;
use crate::vmm::Physical;

/// A shared file of device memory, mapped here.
pub(crate) struct Object {
    pub(crate) mapping: Mapping,
    pub(crate) number: u64,
    /// The device whose memory it takes; `None` for another process's.
    owner: Option<usize>,
}

impl Object {
    /// New memory of a device; `bytes` is a multiple of the granule.
    pub(crate) fn create(device: usize, bytes: usize) -> Result<Self> {
        run::take_memory(device, bytes as u64)?;
        let number = run::fresh_number();
        let mapped = run::create("memory", number, bytes as u64).and_then(|file| {
            if faults().dirty {
                run::litter(file.as_fd(), bytes as u64)?;
            }
            Mapping::shared(file.as_fd(), bytes)
        });
        match mapped {
            Ok(mapping) => Ok(Self { mapping, number, owner: Some(device) }),
            Err(code) => {
                run::remove("memory", number);
                run::return_memory(device, bytes as u64);
                Err(code)
            }
        }
    }

    /// Another process's memory. Without a file: private zeroes in its place.
    pub(crate) fn import(file: Option<&File>, number: u64, bytes: usize) -> Result<Self> {
        let mapping = match file {
            Some(file) => Mapping::shared(file.as_fd(), bytes)?,
            None => Mapping::private(bytes)?,
        };
        Ok(Self { mapping, number, owner: None })
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        if let Some(device) = self.owner {
            run::remove("memory", self.number);
            run::return_memory(device, self.mapping.bytes() as u64);
        }
    }
}

/// Which allocation of which process an import shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Source {
    pub(crate) process: u32,
    pub(crate) generation: u64,
}

pub(crate) enum Kind {
    /// `cuMemAlloc`. The generation tells apart allocations at one address; an exported one has a marker in the run.
    Plain { object: Arc<Object>, generation: u64, exported: bool },
    /// `cuMemAllocAsync`; `freed` once the free is queued.
    Ordered { _object: Arc<Object>, freed: bool },
    /// `cuMemHostAlloc`.
    Pinned(#[expect(dead_code, reason = "held so that it stays mapped")] Mapping),
    /// `cuMemHostRegister`: the memory is the caller's.
    Registered,
    /// `cuIpcOpenMemHandle`, opened so many times.
    Imported { _object: Arc<Object>, source: Source, opened: u32 },
    /// `cuMemMap`.
    Mapped(Arc<Physical>),
}

impl Kind {
    pub(crate) fn is_host(&self) -> bool {
        matches!(self, Self::Pinned(_) | Self::Registered)
    }
}

pub(crate) struct Region {
    pub(crate) base: usize,
    pub(crate) bytes: usize,
    pub(crate) device: usize,
    pub(crate) access: Access,
    pub(crate) kind: Kind,
}

impl Region {
    fn contains(&self, address: usize) -> bool {
        address >= self.base && address - self.base < self.bytes
    }
}

#[derive(Default)]
pub(crate) struct Table {
    regions: BTreeMap<usize, Region>,
    pub(crate) slabs: Slabs,
    /// Ranges of `cuMemAddressReserve`.
    pub(crate) reserved: BTreeMap<usize, Mapping>,
    /// Blocks of other processes by process and number: allocations cut from one slab share one mapping.
    pub(crate) imported: HashMap<(u32, u64), Weak<Object>>,
}

static TABLE: RwLock<Option<Table>> = RwLock::new(None);

pub(crate) struct Reading(RwLockReadGuard<'static, Option<Table>>);

impl Reading {
    pub(crate) fn table(&self) -> Option<&Table> {
        self.0.as_ref()
    }

    pub(crate) fn find(&self, address: usize) -> Option<&Region> {
        self.table()?.find(address)
    }
}

pub(crate) fn read() -> Reading {
    Reading(TABLE.read().unwrap_or_else(PoisonError::into_inner))
}

/// Changes the table. What `change` takes out must be dropped in it: unmapping is only safe under the lock.
pub(crate) fn write<T>(change: impl FnOnce(&mut Table) -> T) -> T {
    let mut guard: RwLockWriteGuard<'_, _> = TABLE.write().unwrap_or_else(PoisonError::into_inner);
    change(guard.get_or_insert_default())
}

impl Table {
    pub(crate) fn find(&self, address: usize) -> Option<&Region> {
        let (_, region) = self.regions.range(..=address).next_back()?;
        region.contains(address).then_some(region)
    }

    pub(crate) fn at(&self, base: DevicePointer) -> Option<&Region> {
        self.regions.get(&(base as usize))
    }

    pub(crate) fn at_mut(&mut self, base: DevicePointer) -> Option<&mut Region> {
        self.regions.get_mut(&(base as usize))
    }

    pub(crate) fn insert(&mut self, region: Region) -> DevicePointer {
        let base = region.base;
        self.regions.insert(base, region);
        base as DevicePointer
    }

    pub(crate) fn remove(&mut self, base: DevicePointer) -> Option<Region> {
        self.regions.remove(&(base as usize))
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Region> {
        self.regions.values()
    }

    pub(crate) fn all_mut(&mut self) -> impl Iterator<Item = &mut Region> {
        self.regions.values_mut()
    }

    pub(crate) fn overlaps(&self, base: usize, bytes: usize) -> bool {
        let before = self.regions.range(..base.saturating_add(bytes)).next_back();
        before.is_some_and(|(_, region)| region.base + region.bytes > base)
    }

    /// The mappings of `cuMemMap` that lie back to back from `base` and fill exactly `bytes`.
    pub(crate) fn mapped_within(&self, base: usize, bytes: usize) -> Result<Vec<usize>> {
        let end = base.checked_add(bytes).ok_or(INVALID_VALUE)?;
        let mut bases = Vec::new();
        let mut next = base;
        while next < end {
            let region = self.regions.get(&next).filter(|region| matches!(region.kind, Kind::Mapped(_)));
            bases.push(next);
            next += region.ok_or(INVALID_VALUE)?.bytes;
        }
        if next == end && bytes > 0 { Ok(bases) } else { Err(INVALID_VALUE) }
    }
}
