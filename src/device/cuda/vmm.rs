//! Allocations of the virtual memory interface, shared as file descriptors: they outlive their exporter, cross PID
//! namespaces, and an importer can map them for reading only.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys;
use parking_lot::Mutex;
use rustix::io::FdFlags;

use super::api::note_failure;
use super::context::Context;
use super::region::Memory;
use crate::device::{DeviceError, RegionHandle};

use sys::CUmemAccess_flags as Access;

const FILE_DESCRIPTOR: sys::CUmemAllocationHandleType =
    sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
const READ: Access = Access::CU_MEM_ACCESS_FLAGS_PROT_READ;
const MINIMUM: u32 = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM as u32;

/// Physical memory, given back when nobody maps it any more.
#[derive(Debug)]
struct Physical {
    context: Arc<Context>,
    handle: sys::CUmemGenericAllocationHandle,
}

impl Physical {
    fn create(context: &Arc<Context>, size_bytes: usize) -> Result<Self, DeviceError> {
        let (mut handle, properties) = (0, properties(context));
        // SAFETY: both pointers are valid for the call.
        unsafe { context.current()?.cuMemCreate(&raw mut handle, size_bytes, &raw const properties, 0) }?;
        Ok(Self { context: Arc::clone(context), handle })
    }

    fn import(context: &Arc<Context>, fd: &OwnedFd) -> Result<Self, DeviceError> {
        let mut handle = 0;
        // The interface takes the descriptor in place of the pointer; the driver keeps what it needs of it.
        let shareable = std::ptr::without_provenance_mut(fd.as_raw_fd() as usize);
        // SAFETY: the out-pointer is valid for the call, the descriptor is open; one of another kind is refused.
        unsafe {
            let cuda = context.current()?;
            cuda.cuMemImportFromShareableHandle(&raw mut handle, shareable, FILE_DESCRIPTOR.0)
        }?;
        Ok(Self { context: Arc::clone(context), handle })
    }

    fn export(&self) -> Result<OwnedFd, DeviceError> {
        let mut fd: i32 = -1;
        // SAFETY: for this kind of handle the driver writes one descriptor through the pointer.
        let fd = unsafe {
            let cuda = self.context.current()?;
            cuda.cuMemExportToShareableHandle((&raw mut fd).cast(), self.handle, FILE_DESCRIPTOR.0, 0)?;
            OwnedFd::from_raw_fd(fd)
        };
        // A child of this process has no business with it.
        rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC)
            .map_err(|errno| DeviceError::Os { call: "fcntl", cause: errno.into() })?;
        Ok(fd)
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        // SAFETY: created or imported once, released here alone.
        note_failure(self.context.current().and_then(|cuda| unsafe { cuda.cuMemRelease(self.handle) }));
    }
}

/// Addresses that nothing else gets.
#[derive(Debug)]
struct Reserved {
    context: Arc<Context>,
    address: sys::CUdeviceptr,
    size_bytes: usize,
}

impl Reserved {
    fn new(context: &Arc<Context>, size_bytes: usize) -> Result<Self, DeviceError> {
        let mut address = 0;
        // SAFETY: the out-pointer is valid for the call.
        unsafe { context.current()?.cuMemAddressReserve(&raw mut address, size_bytes, 0, 0, 0) }?;
        Ok(Self { context: Arc::clone(context), address, size_bytes })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let freed = self.context.current().and_then(|cuda| {
            // SAFETY: reserved in `new`; a mapping is dropped before the addresses it lies on.
            unsafe { cuda.cuMemAddressFree(self.address, self.size_bytes) }
        });
        note_failure(freed);
    }
}

/// Physical memory at addresses of this process. The fields go in this order after the mapping itself.
#[derive(Debug)]
pub(super) struct Mapped {
    /// Kept by the owner, for exports.
    physical: Option<Physical>,
    addresses: Reserved,
    is_writable: bool,
    /// Whether anything lies at the addresses: not where a replacement failed, and the way back too.
    is_there: AtomicBool,
}

impl Mapped {
    /// New memory of a multiple of the driver's granularity.
    pub(super) fn create(context: &Arc<Context>, size_bytes: usize) -> Result<Self, DeviceError> {
        let size_bytes = rounded(context, size_bytes)?;
        let physical = Physical::create(context, size_bytes)?;
        // A driver that refuses to export says so now, while the caller can still share another way.
        drop(physical.export()?);
        let mut this = Self::map(context, &physical, size_bytes, Access::CU_MEM_ACCESS_FLAGS_PROT_READWRITE)?;
        this.physical = Some(physical);
        Ok(this)
    }

    /// The memory behind a descriptor; the driver refuses to map more than there is.
    pub(super) fn import(
        context: &Arc<Context>,
        fd: &OwnedFd,
        size_bytes: usize,
        access: Access,
    ) -> Result<Self, DeviceError> {
        let size_bytes = rounded(context, size_bytes)?;
        let physical = Physical::import(context, fd)?;
        // Released at once: the mapping keeps the memory.
        Self::map(context, &physical, size_bytes, access)
    }

    fn map(
        context: &Arc<Context>,
        physical: &Physical,
        size_bytes: usize,
        access: Access,
    ) -> Result<Self, DeviceError> {
        let addresses = Reserved::new(context, size_bytes)?;
        map_at(&addresses, physical, access)?;
        let is_writable = access == Access::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        Ok(Self { physical: None, addresses, is_writable, is_there: AtomicBool::new(true) })
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if !*self.is_there.get_mut() {
            return;
        }
        let context = &self.addresses.context;
        // Unmapping does not wait for work that uses the memory.
        note_failure(context.synchronize());
        let unmapped = context.current().and_then(|cuda| {
            // SAFETY: mapped in `map` with this size, unmapped here alone; nothing of this process uses it any more.
            unsafe { cuda.cuMemUnmap(self.addresses.address, self.addresses.size_bytes) }
        });
        note_failure(unmapped);
    }
}

impl Memory for Mapped {
    fn context(&self) -> &Arc<Context> {
        &self.addresses.context
    }

    fn address(&self) -> sys::CUdeviceptr {
        self.addresses.address
    }

    fn size_bytes(&self) -> usize {
        self.addresses.size_bytes
    }

    fn is_writable(&self) -> bool {
        self.is_writable
    }

    fn export(&self) -> Result<RegionHandle, DeviceError> {
        let physical = self.physical.as_ref().ok_or(DeviceError::Imported)?;
        Ok(RegionHandle::CudaVmm(physical.export()?))
    }
}

/// Memory of another process, mapped for reading only, that other memory can take the place of.
#[derive(Debug)]
pub(super) struct ReadOnly {
    mapped: Mapped,
    /// What is mapped, to go back to where a replacement fails.
    behind: Mutex<Physical>,
}

impl ReadOnly {
    pub(super) fn import(context: &Arc<Context>, fd: &OwnedFd, size_bytes: usize) -> Result<Self, DeviceError> {
        let size_bytes = rounded(context, size_bytes)?;
        let physical = Physical::import(context, fd)?;
        let mapped = Mapped::map(context, &physical, size_bytes, READ)?;
        Ok(Self { mapped, behind: Mutex::new(physical) })
    }

    /// Maps other memory of the same size at the same addresses. Waits for the GPU before; nothing that uses the memory
    /// may be enqueued meanwhile.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`], and what was there is there again; [`DeviceError::NothingMapped`] where the driver refuses
    /// that too. A later call may still succeed.
    pub(super) fn replace(&self, fd: &OwnedFd) -> Result<(), DeviceError> {
        let mut behind = self.behind.lock();
        let addresses = &self.mapped.addresses;
        let Reserved { context, address, size_bytes } = addresses;
        let other = Physical::import(context, fd)?;
        context.synchronize()?;
        if self.mapped.is_there.load(Ordering::Acquire) {
            // SAFETY: mapped with this size; the GPU is done with it, and the caller enqueues nothing.
            unsafe { context.current()?.cuMemUnmap(*address, *size_bytes) }?;
        }
        let replaced = map_at(addresses, &other, READ);
        let restored = if replaced.is_ok() { Ok(()) } else { map_at(addresses, &behind, READ) };
        self.mapped.is_there.store(restored.is_ok(), Ordering::Release);
        if let (Err(error), Err(also)) = (&replaced, &restored) {
            tracing::error!(%error, %also, "weights are mapped no more: the driver takes neither the new memory nor the old");
            return Err(DeviceError::NothingMapped);
        }
        replaced?;
        *behind = other;
        Ok(())
    }
}

impl Memory for ReadOnly {
    fn context(&self) -> &Arc<Context> {
        self.mapped.context()
    }

    fn address(&self) -> sys::CUdeviceptr {
        self.mapped.address()
    }

    fn size_bytes(&self) -> usize {
        self.mapped.size_bytes()
    }

    fn is_writable(&self) -> bool {
        false
    }

    fn check(&self) -> Result<(), DeviceError> {
        match self.mapped.is_there.load(Ordering::Acquire) {
            true => Ok(()),
            false => Err(DeviceError::NothingMapped),
        }
    }

    fn export(&self) -> Result<RegionHandle, DeviceError> {
        Err(DeviceError::Imported)
    }
}

/// Maps memory at reserved addresses where nothing is, and lets this GPU reach it; nothing is there after an error either.
fn map_at(addresses: &Reserved, physical: &Physical, access: Access) -> Result<(), DeviceError> {
    let Reserved { context, address, size_bytes } = addresses;
    let cuda = context.current()?;
    // SAFETY: the addresses are reserved for as many bytes, and the callers have nothing mapped there.
    unsafe { cuda.cuMemMap(*address, *size_bytes, 0, physical.handle, 0) }.map_err(|error| match error {
        DeviceError::OutOfMemory { what, cause, .. } => {
            DeviceError::OutOfMemory { what, size_bytes: *size_bytes, cause }
        }
        other => other,
    })?;
    let access = sys::CUmemAccessDesc { location: location(context), flags: access };
    // SAFETY: mapped above; the one description is valid for the call.
    let allowed = unsafe { cuda.cuMemSetAccess(*address, *size_bytes, &raw const access, 1) };
    if allowed.is_err() {
        // SAFETY: mapped above with this size; nobody was told of it.
        note_failure(unsafe { cuda.cuMemUnmap(*address, *size_bytes) });
    }
    allowed
}

fn location(context: &Context) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: context.device() }
}

fn properties(context: &Context) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: FILE_DESCRIPTOR,
        location: location(context),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

fn rounded(context: &Arc<Context>, size_bytes: usize) -> Result<usize, DeviceError> {
    let (mut granularity, properties) = (0, properties(context));
    // SAFETY: both pointers are valid for the call.
    unsafe {
        let cuda = context.current()?;
        cuda.cuMemGetAllocationGranularity(&raw mut granularity, &raw const properties, MINIMUM)
    }?;
    size_bytes.max(1).checked_next_multiple_of(granularity.max(1)).ok_or(DeviceError::OutOfMemory {
        what: "GPU memory",
        size_bytes,
        cause: std::io::ErrorKind::OutOfMemory.into(),
    })
}
