use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys::CUmemAccess_flags as Access;

use super::context::Context;
use super::driver::Gpu;
use super::ipc::{Allocated, Opened};
use super::region::{CudaRegion, Memory};
use super::stream::{self, CopyWay, CudaStream};
use super::vmm::{Mapped, ReadOnly};
use crate::device::{Device, DeviceError, LockBudget, PageLock, Place, Region, RegionHandle, StreamRef};
use crate::id::GpuUuid;

/// How allocations of a GPU are shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CudaSharing {
    /// Plain allocations by their IPC handles: 64 bytes that any channel carries, within one PID namespace.
    Ipc,
    /// Allocations of the virtual memory interface as file descriptors.
    Vmm,
}

/// Regions are multiples of this: the driver cuts smaller allocations from a common block, and a handle to one of them
/// hands over the whole block.
const BLOCK_BYTES: usize = 2 << 20;

/// One GPU's memory in this process. The GPU's primary context is retained while this or anything made of it lives.
#[derive(Debug)]
pub struct CudaDevice {
    context: Arc<Context>,
    sharing: CudaSharing,
}

impl CudaDevice {
    /// The GPU of this identity, its allocations shared in the given way. Makes the primary context where there is
    /// none, which takes a part of a second and some hundred MiB of GPU memory.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`], [`DeviceError::NoGpu`], [`DeviceError::OutOfMemory`], [`DeviceError::Cuda`].
    pub fn open(gpu: GpuUuid, sharing: CudaSharing) -> Result<Arc<Self>, DeviceError> {
        Ok(Arc::new(Self { context: Context::of(gpu)?, sharing }))
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// The GPU.
    #[must_use]
    pub fn gpu(&self) -> &Gpu {
        self.context.gpu()
    }

    /// How allocations are shared.
    #[must_use]
    pub fn sharing(&self) -> CudaSharing {
        self.sharing
    }

    /// Bytes of GPU memory that nobody uses, and all there are.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn free_and_total_bytes(&self) -> Result<(u64, u64), DeviceError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: both out-pointers are valid for the call; the context is current.
        unsafe { self.context.current()?.cuMemGetInfo_v2(&raw mut free, &raw mut total) }?;
        Ok((free as u64, total as u64))
    }

    /// A new stream that does not order with the default stream.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn stream(self: &Arc<Self>) -> Result<CudaStream, DeviceError> {
        CudaStream::new(&self.context)
    }

    /// Enqueues a copy of `bytes` bytes between two addresses.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    ///
    /// # Safety
    /// Both ranges must be valid, of the kinds that `way` says, and stay so until the stream has run the copy; `stream`
    /// must be one of this GPU's primary context.
    pub unsafe fn copy(
        &self,
        to: usize,
        from: usize,
        bytes: usize,
        way: CopyWay,
        stream: StreamRef,
    ) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        let cuda = self.context.current()?;
        let (to_gpu, from_gpu) = (to as u64, from as u64);
        let (to_host, from_host) = (std::ptr::with_exposed_provenance_mut(to), std::ptr::with_exposed_provenance(from));
        // SAFETY: the caller answers for both ranges and the stream.
        unsafe {
            match way {
                CopyWay::DeviceToDevice => cuda.cuMemcpyDtoDAsync_v2(to_gpu, from_gpu, bytes, stream.raw()),
                CopyWay::HostToDevice => cuda.cuMemcpyHtoDAsync_v2(to_gpu, from_host, bytes, stream.raw()),
                CopyWay::DeviceToHost => cuda.cuMemcpyDtoHAsync_v2(to_host, from_gpu, bytes, stream.raw()),
            }
        }
    }

    /// Blocks until everything this process has enqueued on this GPU is done.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] where the GPU failed, also at work enqueued before.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.context.synchronize()
    }

    /// Blocks until the stream has run everything enqueued so far.
    ///
    /// # Errors
    /// As [`CudaDevice::synchronize`].
    pub fn synchronize_stream(&self, stream: StreamRef) -> Result<(), DeviceError> {
        stream::synchronize(&self.context, stream)
    }

    /// Enqueues a pause: what is enqueued on the stream afterwards runs that much later. For probes that have to see
    /// work in flight.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn delay(&self, stream: StreamRef, time: Duration) -> Result<(), DeviceError> {
        stream::delay(&self.context, stream, time)
    }

    /// Locks pages for this GPU's copies, and those of the process's others, within a budget where there is one.
    #[must_use]
    pub fn page_lock(self: &Arc<Self>, within: Option<Arc<LockBudget>>) -> PageLock {
        let device = Arc::clone(self);
        Box::new(move |region| {
            let share = within.as_ref().map(|budget| budget.take(region.size_bytes())).transpose()?;
            Ok(Arc::new(device.pin(region)?.counted(share)))
        })
    }

    /// Maps memory that another process exported as a descriptor, for reading only.
    ///
    /// # Errors
    /// As [`Device::import`]; writing to the region answers [`DeviceError::ReadOnly`].
    pub fn import_read_only(&self, fd: OwnedFd, size_bytes: usize) -> Result<CudaWeights, DeviceError> {
        Ok(CudaWeights(Arc::new(CudaRegion(ReadOnly::import(&self.context, &fd, size_bytes)?))))
    }
}

/// Memory of another process that is read only, and that other memory can take the place of.
#[derive(Debug, Clone)]
pub struct CudaWeights(Arc<CudaRegion<ReadOnly>>);

impl CudaWeights {
    /// The memory.
    #[must_use]
    pub fn region(&self) -> Arc<dyn Region> {
        Arc::clone(&self.0) as Arc<dyn Region>
    }

    /// Puts other memory of equal size and content behind the same addresses. Waits for the GPU before; nothing that uses
    /// the memory may be enqueued meanwhile.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`]; the memory is what it was then. [`DeviceError::NothingMapped`] where the driver would not have
    /// that back: until a later call succeeds, nothing may be computed with it.
    pub fn replace(&self, fd: OwnedFd) -> Result<(), DeviceError> {
        self.0.0.replace(&fd)
    }

    /// Whether the memory is there.
    ///
    /// # Errors
    /// [`DeviceError::NothingMapped`] since [`CudaWeights::replace`] said so.
    pub fn check(&self) -> Result<(), DeviceError> {
        self.0.0.check()
    }
}

impl Device for CudaDevice {
    fn place(&self) -> Place {
        self.context.place()
    }

    /// Rounds up to whole blocks of 2 MiB, all of them usable. Regions shared by IPC handle must outlive their
    /// importers: freeing memory that another process has open is undefined.
    fn allocate(&self, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError> {
        let out_of_memory = |cause| DeviceError::OutOfMemory { what: "GPU memory", size_bytes, cause };
        let rounded = size_bytes.max(1).checked_next_multiple_of(BLOCK_BYTES);
        let rounded = rounded.ok_or_else(|| out_of_memory(std::io::ErrorKind::OutOfMemory.into()))?;
        let allocated: Result<Arc<dyn Region>, _> = match self.sharing {
            CudaSharing::Ipc => Allocated::new(&self.context, rounded)
                .and_then(CudaRegion::zeroed)
                .map(|region| Arc::new(region) as Arc<dyn Region>),
            CudaSharing::Vmm => Mapped::create(&self.context, rounded)
                .and_then(CudaRegion::zeroed)
                .map(|region| Arc::new(region) as Arc<dyn Region>),
        };
        allocated.map_err(|error| match error {
            DeviceError::OutOfMemory { cause, .. } => out_of_memory(cause),
            other => other,
        })
    }

    /// Takes handles of both kinds. A handle that is open already yields the region that is open.
    fn import(&self, handle: RegionHandle, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError> {
        match handle {
            RegionHandle::CudaIpc(handle) => Ok(Opened::import(&self.context, handle, size_bytes)?),
            RegionHandle::CudaVmm(fd) => {
                let access = Access::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
                Ok(Arc::new(CudaRegion(Mapped::import(&self.context, &fd, size_bytes, access)?)))
            }
            _ => Err(DeviceError::WrongHandle { device: "CUDA" }),
        }
    }
}
