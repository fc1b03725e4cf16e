use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;

use super::gpu::GpuDevice;
use super::leases::{GpuLease, Lease, Leases};
use super::open_gpu::LinkGpu;
use super::tensor::BytePool;
use crate::device::{Device, HostDevice, InProcessDevice, Region, RegionHandle, Span};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{ArenaId, Epoch, GpuUuid};
use crate::protocol::{ArenaHandle, ArenaOffer, Descriptor};
use crate::transport::Attachment;

/// Arenas by the client's GPU that they are open in: one of the broker's GPU may be open in several.
type Arenas = FxHashMap<(ArenaId, Option<GpuUuid>), Arc<dyn Region>>;

/// A session's memory as the client sees it: arenas mapped once, leases, and input slots kept for the next call.
#[derive(Debug)]
pub(super) struct ImportedMemory {
    arenas: RwLock<Arenas>,
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
    pub(super) fn import(
        &self,
        offer: &ArenaOffer,
        attachment: Option<Attachment>,
        gpu: Option<&GpuDevice>,
    ) -> Result<Arc<dyn Region>> {
        let size_bytes = usize::try_from(offer.size_bytes).unwrap_or(usize::MAX);
        let region = match (&offer.handle, attachment) {
            (ArenaHandle::CudaIpc(handle), _) => {
                let handle = handle.as_slice().try_into().map_err(|_| missing(offer.arena))?;
                gpu.ok_or_else(|| missing(offer.arena))?.import(RegionHandle::CudaIpc(handle), size_bytes)?
            }
            #[cfg(unix)]
            (ArenaHandle::CudaVmm, Some(Attachment::Fd(fd))) => {
                gpu.ok_or_else(|| missing(offer.arena))?.import(RegionHandle::CudaVmm(fd), size_bytes)?
            }
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
            (ArenaHandle::Attached | ArenaHandle::CudaVmm, _) => return Err(missing(offer.arena)),
        };
        self.arenas.write().insert((offer.arena, offer.gpu), Arc::clone(&region));
        Ok(region)
    }

    /// An arena that is open.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] where it was not handed over, or did not open.
    pub(super) fn arena(&self, arena: ArenaId, gpu: Option<GpuUuid>) -> Result<Arc<dyn Region>> {
        self.arenas.read().get(&(arena, gpu)).cloned().ok_or_else(|| missing(arena))
    }

    /// Whether a descriptor's arena is open for this GPU: one that did not open wears the rung out.
    pub(super) fn is_open(&self, descriptor: &Descriptor, gpu: GpuUuid) -> bool {
        self.arenas.read().contains_key(&(descriptor.lease.arena, Some(gpu)))
    }

    /// Takes up the slot that a reply names. Everything the broker wrote there is visible afterwards.
    ///
    /// # Errors
    /// [`ErrorKind::Stale`] for another epoch, [`crate::device::DeviceError`] for a range outside the arena; the lease is given back.
    /// In GPU memory it is visible behind the mark that the lease carries.
    pub(super) fn take_up(&self, descriptor: &Descriptor, epoch: Epoch, gpu: Option<&Arc<LinkGpu>>) -> Result<Lease> {
        let taken = self.reach(descriptor, epoch, gpu.map(|gpu| gpu.gpu));
        if taken.is_err() {
            self.leases.give_back(descriptor.lease);
        }
        let on_gpu = gpu.map(|gpu| GpuLease::new(Arc::clone(gpu), descriptor.sequence));
        taken.map(|span| self.leases.hold(descriptor.lease, descriptor.offset, span, on_gpu))
    }

    fn reach(&self, descriptor: &Descriptor, epoch: Epoch, gpu: Option<GpuUuid>) -> Result<Span> {
        if descriptor.epoch != epoch {
            return Err(Error::new(
                ErrorKind::Stale,
                "the broker answered from another life",
                "send the request again",
            ));
        }
        descriptor.meta.validate()?;
        let region = self.arena(descriptor.lease.arena, gpu)?;
        if gpu.is_none() {
            region.wait(descriptor.sequence)?;
        }
        let offset = usize::try_from(descriptor.offset).unwrap_or(usize::MAX);
        Ok(Span::new(region, offset, descriptor.meta.span_bytes()?)?)
    }

    /// An idle input slot of at least `length` bytes, the smallest there is; in host memory, or shared for `gpu`.
    pub(super) fn idle_input(&self, length: usize, gpu: Option<&Arc<LinkGpu>>) -> Option<Lease> {
        let mut idle = self.idle_inputs.lock();
        let there = |lease: &Lease| match (lease.gpu(), gpu) {
            (Some(one), Some(gpu)) => Arc::ptr_eq(&one.gpu, gpu),
            (one, gpu) => one.is_none() && gpu.is_none(),
        };
        let fitting = idle.iter().enumerate().filter(|(_, lease)| lease.span().length() >= length && there(lease));
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
