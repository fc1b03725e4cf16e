use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::leases::{Lease, Leases};
use super::tensor::BytePool;
use crate::device::{Device, HostDevice, InProcessDevice, Region, RegionHandle, Span};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{ArenaId, Epoch};
use crate::protocol::{ArenaHandle, ArenaOffer, Descriptor};
use crate::transport::Attachment;

/// A session's memory as the client sees it: arenas mapped once, leases, and input slots kept for the next call.
#[derive(Debug)]
pub(super) struct ImportedMemory {
    arenas: RwLock<HashMap<ArenaId, Arc<dyn Region>>>,
    pub(super) leases: Arc<Leases>,
    idle_inputs: Mutex<Vec<Lease>>,
    idle_limit: u64,
    pub(super) pool: Arc<BytePool>,
}

impl ImportedMemory {
    pub(super) fn new(leases: Arc<Leases>, idle_limit: u64) -> Self {
        Self {
            arenas: RwLock::default(),
            leases,
            idle_inputs: Mutex::default(),
            idle_limit,
            pool: Arc::new(BytePool::new(idle_limit)),
        }
    }

    /// Maps an arena that the broker offers.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] where its handle is missing, [`crate::device::DeviceError`] where it cannot be mapped.
    pub(super) fn import(&self, offer: &ArenaOffer, attachment: Option<Attachment>) -> Result<Arc<dyn Region>> {
        let size_bytes = usize::try_from(offer.size_bytes).unwrap_or(usize::MAX);
        let region = match (&offer.handle, attachment) {
            (ArenaHandle::Named(name), _) => {
                HostDevice::default().import(RegionHandle::Name(name.clone()), size_bytes)?
            }
            #[cfg(unix)]
            (ArenaHandle::Attached, Some(Attachment::Fd(fd))) => {
                HostDevice::default().import(RegionHandle::Fd(fd), size_bytes)?
            }
            (ArenaHandle::Attached, Some(Attachment::Local(region))) => {
                let region = region.downcast::<Arc<dyn Region>>().map_err(|_| missing(offer.arena))?;
                InProcessDevice.import(RegionHandle::Local(Arc::clone(&region)), size_bytes)?
            }
            (ArenaHandle::Attached, None) => return Err(missing(offer.arena)),
        };
        self.arenas.write().insert(offer.arena, Arc::clone(&region));
        Ok(region)
    }

    /// Takes up the slot that a reply names. Everything the broker wrote there is visible afterwards.
    ///
    /// # Errors
    /// [`ErrorKind::Stale`] for another epoch, [`crate::device::DeviceError`] for a range outside the arena; the lease is given back.
    pub(super) fn take_up(&self, descriptor: &Descriptor, epoch: Epoch) -> Result<Lease> {
        let taken = self.reach(descriptor, epoch);
        if taken.is_err() {
            self.leases.give_back(descriptor.lease);
        }
        taken.map(|span| self.leases.hold(descriptor.lease, descriptor.offset, span))
    }

    fn reach(&self, descriptor: &Descriptor, epoch: Epoch) -> Result<Span> {
        if descriptor.epoch != epoch {
            return Err(Error::new(
                ErrorKind::Stale,
                "the broker answered from another life",
                "send the request again",
            ));
        }
        descriptor.meta.validate()?;
        let arenas = self.arenas.read();
        let region = arenas.get(&descriptor.lease.arena).cloned().ok_or_else(|| missing(descriptor.lease.arena))?;
        drop(arenas);
        region.wait(descriptor.sequence)?;
        let offset = usize::try_from(descriptor.offset).unwrap_or(usize::MAX);
        Ok(Span::new(region, offset, descriptor.meta.span_bytes()?)?)
    }

    /// An idle input slot of at least `length` bytes, the smallest there is.
    pub(super) fn idle_input(&self, length: usize) -> Option<Lease> {
        let mut idle = self.idle_inputs.lock();
        let fitting = idle.iter().enumerate().filter(|(_, lease)| lease.span().length() >= length);
        let (at, _) = fitting.min_by_key(|(_, lease)| lease.span().length())?;
        Some(idle.swap_remove(at))
    }

    /// Keeps an input slot for the next call, or gives it back where enough are kept.
    pub(super) fn keep_input(&self, lease: Lease) {
        let mut idle = self.idle_inputs.lock();
        let kept: usize = idle.iter().map(|lease| lease.span().length()).sum();
        if (kept + lease.span().length()) as u64 <= self.idle_limit {
            idle.push(lease);
        }
    }

    /// The session is over: idle slots go, and nothing is given back any more.
    pub(super) fn end(&self) {
        self.leases.end();
        self.idle_inputs.lock().clear();
        self.arenas.write().clear();
    }
}

fn missing(arena: ArenaId) -> Error {
    Error::new(ErrorKind::Protocol, format!("the broker speaks of arena {arena} but did not hand it over"), "")
}
