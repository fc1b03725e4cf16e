use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;

use super::gpu::GpuDevice;
use super::leases::{GpuLease, Lease, Leases, SlotMemory};
use super::open_gpu::LinkGpu;
use super::tensor::BytePool;
use crate::device::{Device, HostDevice, InProcessDevice, Region, RegionHandle, Span, StagingDevice};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{ArenaId, Epoch, GpuUuid};
use crate::protocol::{ArenaHandle, ArenaOffer, ArenaPlace, Descriptor, SlotPlace};
use crate::service::Pages;
use crate::transport::Attachment;

/// Arenas by what they are for; one of the broker's GPU may be open in several of the client's.
type Arenas = FxHashMap<(ArenaId, ArenaKind), Arc<dyn Region>>;

/// What an arena is for: one is never taken for another, whatever a reply says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum ArenaKind {
    Host,
    Staging,
    Gpu(GpuUuid),
}

impl From<ArenaPlace> for ArenaKind {
    fn from(place: ArenaPlace) -> Self {
        match place {
            ArenaPlace::Host => Self::Host,
            ArenaPlace::Staging(_) => Self::Staging,
            ArenaPlace::Gpu(gpu) => Self::Gpu(gpu),
        }
    }
}

/// Which of the session's memories a slot is wanted in, or comes from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Home<'a> {
    Host,
    /// For tensors of this GPU to pass through.
    Staging(&'a LinkGpu),
    Gpu(&'a Arc<LinkGpu>),
}

impl Home<'_> {
    /// The name in requests.
    pub(super) fn place(&self) -> SlotPlace {
        match self {
            Self::Host => SlotPlace::Host,
            Self::Staging(gpu) => SlotPlace::Staging(gpu.target),
            Self::Gpu(gpu) => SlotPlace::Gpu(gpu.target),
        }
    }

    fn kind(&self) -> ArenaKind {
        match self {
            Self::Host => ArenaKind::Host,
            Self::Staging(_) => ArenaKind::Staging,
            Self::Gpu(gpu) => ArenaKind::Gpu(gpu.gpu),
        }
    }

    fn slot(&self, sequence: u64) -> SlotMemory {
        match self {
            Self::Host => SlotMemory::Host,
            Self::Staging(_) => SlotMemory::Staging,
            Self::Gpu(gpu) => SlotMemory::Gpu(Arc::new(GpuLease::new(Arc::clone(gpu), sequence))),
        }
    }

    /// Whether a slot in `memory` will do.
    fn takes(&self, memory: &SlotMemory) -> bool {
        match (self, memory) {
            (Self::Host, SlotMemory::Host) | (Self::Staging(_), SlotMemory::Staging) => true,
            (Self::Gpu(gpu), SlotMemory::Gpu(lease)) => Arc::ptr_eq(&lease.gpu, gpu),
            _ => false,
        }
    }
}

/// Arenas of a session that is over.
#[derive(Debug)]
pub(super) struct Retired(#[expect(dead_code, reason = "held to be dropped")] Arenas);

/// A session's memory as the client sees it: arenas mapped once, leases, and input slots kept for the next call.
#[derive(Debug)]
pub(super) struct ImportedMemory {
    arenas: RwLock<Arenas>,
    pub(super) leases: Arc<Leases>,
    idle_inputs: Mutex<Vec<Lease>>,
    idle_limit: u64,
    /// Of the arenas that tensors of GPUs pass through; one whose pages could not be locked speaks for all.
    pages: Mutex<Option<Pages>>,
    pub(super) pool: Arc<BytePool>,
}

impl ImportedMemory {
    pub(super) fn new(leases: Arc<Leases>, idle_limit: u64) -> Self {
        Self {
            arenas: RwLock::default(),
            leases,
            idle_inputs: Mutex::default(),
            idle_limit,
            pages: Mutex::default(),
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
        let plain = HostDevice::default();
        let staging = gpu.filter(|_| ArenaKind::from(offer.place) == ArenaKind::Staging);
        let staging = staging.map(|gpu| StagingDevice::locked_by(gpu.page_lock(), HostDevice::default()));
        let host: &dyn Device = staging.as_ref().map_or(&plain, |staging| staging);
        let region = match (&offer.handle, attachment) {
            (ArenaHandle::CudaIpc(handle), _) => {
                let handle = handle.as_slice().try_into().map_err(|_| missing(offer.arena))?;
                gpu.ok_or_else(|| missing(offer.arena))?.import(RegionHandle::CudaIpc(handle), size_bytes)?
            }
            #[cfg(unix)]
            (ArenaHandle::CudaVmm, Some(Attachment::Fd(fd))) => {
                gpu.ok_or_else(|| missing(offer.arena))?.import(RegionHandle::CudaVmm(fd), size_bytes)?
            }
            (ArenaHandle::Named(name), _) => host.import(RegionHandle::Name(name.clone()), size_bytes)?,
            #[cfg(unix)]
            (ArenaHandle::Attached, Some(Attachment::Fd(fd))) => host.import(RegionHandle::Fd(fd), size_bytes)?,
            (ArenaHandle::Attached, Some(Attachment::Local(region))) => {
                let region = region.downcast::<Arc<dyn Region>>().map_err(|_| missing(offer.arena))?;
                InProcessDevice.import(RegionHandle::Local(Arc::clone(&region)), size_bytes)?
            }
            (ArenaHandle::Attached | ArenaHandle::CudaVmm, _) => return Err(missing(offer.arena)),
        };
        self.arenas.write().insert((offer.arena, offer.place.into()), Arc::clone(&region));
        if let Some(pages) = staging.and_then(|staging| staging.pages()) {
            let mut all = self.pages.lock();
            if !matches!(*all, Some(Pages::Pageable(_))) {
                *all = Some(pages);
            }
        }
        Ok(region)
    }

    /// How this side holds the memory that tensors of GPUs pass through; absent before the first of them.
    pub(super) fn pages(&self) -> Option<Pages> {
        self.pages.lock().clone()
    }

    /// An arena that is open.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] where it was not handed over, or did not open.
    pub(super) fn arena(&self, arena: ArenaId, kind: ArenaKind) -> Result<Arc<dyn Region>> {
        self.arenas.read().get(&(arena, kind)).cloned().ok_or_else(|| missing(arena))
    }

    /// Whether a descriptor's arena is open for this GPU: one that did not open wears the rung out.
    pub(super) fn is_open(&self, descriptor: &Descriptor, gpu: GpuUuid) -> bool {
        self.arenas.read().contains_key(&(descriptor.lease.arena, ArenaKind::Gpu(gpu)))
    }

    /// Takes up the slot that a reply names. Everything the broker wrote there is visible afterwards.
    ///
    /// # Errors
    /// [`ErrorKind::Stale`] for another epoch, [`crate::device::DeviceError`] for a range outside the arena; the lease is given back.
    /// In GPU memory it is visible behind the mark that the lease carries.
    pub(super) fn take_up(&self, descriptor: &Descriptor, epoch: Epoch, home: Home<'_>) -> Result<Lease> {
        let taken = self.reach(descriptor, epoch, home.kind());
        if taken.is_err() {
            self.leases.give_back(descriptor.lease);
        }
        let memory = home.slot(descriptor.sequence);
        taken.map(|span| self.leases.hold(descriptor.lease, descriptor.offset, span, memory))
    }

    /// Gives back the slot that a reply names and nobody takes up.
    pub(super) fn leave(&self, descriptor: &Descriptor) {
        self.leases.give_back(descriptor.lease);
    }

    fn reach(&self, descriptor: &Descriptor, epoch: Epoch, kind: ArenaKind) -> Result<Span> {
        if descriptor.epoch != epoch {
            return Err(Error::new(
                ErrorKind::Stale,
                "the broker answered from another life",
                "send the request again",
            ));
        }
        descriptor.meta.validate()?;
        let region = self.arena(descriptor.lease.arena, kind)?;
        if matches!(kind, ArenaKind::Host | ArenaKind::Staging) {
            region.wait(descriptor.sequence)?;
        }
        let offset = usize::try_from(descriptor.offset).unwrap_or(usize::MAX);
        Ok(Span::new(region, offset, descriptor.meta.span_bytes()?)?)
    }

    /// An idle input slot of at least `length` bytes, the smallest there is of this memory's.
    pub(super) fn idle_input(&self, length: usize, home: Home<'_>) -> Option<Lease> {
        let mut idle = self.idle_inputs.lock();
        let fits = |lease: &Lease| lease.span().length() >= length && home.takes(lease.memory());
        let fitting = idle.iter().enumerate().filter(|(_, lease)| fits(lease));
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

    /// Idle slots are no longer kept.
    pub(super) fn drop_idle(&self) {
        self.idle_inputs.lock().clear();
    }

    /// The session is over: idle slots go, and nothing is given back any more. Dropping the arenas may wait for all GPU work
    /// of this process.
    #[must_use]
    pub(super) fn end(&self) -> Retired {
        self.leases.end();
        let idle = std::mem::take(&mut *self.idle_inputs.lock());
        // Outside the lock. The arenas outlive the slots: nothing is unmapped here.
        let arenas = std::mem::take(&mut *self.arenas.write());
        drop(idle);
        Retired(arenas)
    }
}

fn missing(arena: ArenaId) -> Error {
    Error::new(ErrorKind::Protocol, format!("the broker speaks of arena {arena} but did not hand it over"), "")
}
