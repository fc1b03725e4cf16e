//! Plain allocations, shared by legacy IPC handles.

use std::ffi::c_char;
use std::fmt;
use std::sync::{Arc, Weak};

use cudarc::driver::sys;

use super::api::{MAP_FAILED, note_failure};
use super::context::{Context, Current};
use super::region::{CudaRegion, Memory};
use crate::device::{DeviceError, Region, RegionHandle};

/// The only flag the driver takes: access from another GPU is enabled where that is what opens it.
const LAZY_ENABLE_PEER_ACCESS: u32 = 1;

/// An allocation of this process.
#[derive(Debug)]
pub(super) struct Allocated {
    context: Arc<Context>,
    address: sys::CUdeviceptr,
    size_bytes: usize,
}

impl Allocated {
    pub(super) fn new(context: &Arc<Context>, size_bytes: usize) -> Result<Self, DeviceError> {
        let mut address = 0;
        // Not from a memory pool: what comes from there has no handle.
        // SAFETY: the out-pointer is valid for the call; the context is current.
        unsafe { context.current()?.cuMemAlloc_v2(&raw mut address, size_bytes) }?;
        Ok(Self { context: Arc::clone(context), address, size_bytes })
    }
}

impl Memory for Allocated {
    fn context(&self) -> &Arc<Context> {
        &self.context
    }

    fn address(&self) -> sys::CUdeviceptr {
        self.address
    }

    fn size_bytes(&self) -> usize {
        self.size_bytes
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn export(&self) -> Result<RegionHandle, DeviceError> {
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the out-pointer is valid for the call; the address is the base of a live allocation.
        unsafe { self.context.current()?.cuIpcGetMemHandle(&raw mut handle, self.address) }?;
        Ok(RegionHandle::CudaIpc(handle.reserved.map(c_char::cast_unsigned)))
    }
}

impl Drop for Allocated {
    fn drop(&mut self) {
        note_failure(self.context.synchronize());
        // SAFETY: allocated in `new`, freed here alone; nothing of this process uses it any more.
        note_failure(self.context.current().and_then(|cuda| unsafe { cuda.cuMemFree_v2(self.address) }));
    }
}

/// An allocation of another process.
pub(super) struct Opened {
    context: Arc<Context>,
    /// Which opening this is. A capability: never shown.
    handle: [u8; 64],
    address: sys::CUdeviceptr,
    size_bytes: usize,
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, size_bytes, .. } = self;
        f.debug_struct("Opened").field("address", address).field("size_bytes", size_bytes).finish_non_exhaustive()
    }
}

impl Opened {
    /// The region behind a handle: the one that is open already, or a new one.
    pub(super) fn import(
        context: &Arc<Context>,
        handle: [u8; 64],
        announced: usize,
    ) -> Result<Arc<CudaRegion<Self>>, DeviceError> {
        let mut openings = context.openings.lock();
        let region = match openings.get(&handle).and_then(Weak::upgrade) {
            Some(region) => region,
            None => {
                let region = Arc::new(CudaRegion(Self::open(context, handle)?));
                openings.insert(handle, Arc::downgrade(&region));
                region
            }
        };
        drop(openings);
        let actual = region.size_bytes();
        if actual < announced {
            return Err(DeviceError::TooSmall { announced, actual });
        }
        Ok(region)
    }

    fn open(context: &Arc<Context>, handle: [u8; 64]) -> Result<Self, DeviceError> {
        let cuda = context.current()?;
        let address = match map(&cuda, handle) {
            // Seen now and then where the same memory was closed a moment before; it passes.
            Err(DeviceError::Cuda { code: MAP_FAILED, .. }) => map(&cuda, handle)?,
            other => other?,
        };
        let (mut base, mut size) = (0, 0);
        // SAFETY: the out-pointers are valid for the call; the address is mapped.
        let range = unsafe { cuda.cuMemGetAddressRange_v2(&raw mut base, &raw mut size, address) };
        // Before it can fail, so that the mapping is closed where it does; the lock is held, so not by dropping it.
        if let Err(error) = range {
            note_failure(unmap(&cuda, address));
            return Err(error);
        }
        let size_bytes = size.saturating_sub(address.saturating_sub(base) as usize);
        Ok(Self { context: Arc::clone(context), handle, address, size_bytes })
    }
}

fn map(cuda: &Current<'_>, handle: [u8; 64]) -> Result<sys::CUdeviceptr, DeviceError> {
    let handle = sys::CUipcMemHandle { reserved: handle.map(u8::cast_signed) };
    let mut address = 0;
    // SAFETY: the out-pointer is valid for the call; a handle that is none is refused by the driver.
    unsafe { cuda.cuIpcOpenMemHandle_v2(&raw mut address, handle, LAZY_ENABLE_PEER_ACCESS) }?;
    Ok(address)
}

fn unmap(cuda: &Current<'_>, address: sys::CUdeviceptr) -> Result<(), DeviceError> {
    // SAFETY: the callers opened it and use it no more.
    unsafe { cuda.cuIpcCloseMemHandle(address) }
}

impl Memory for Opened {
    fn context(&self) -> &Arc<Context> {
        &self.context
    }

    fn address(&self) -> sys::CUdeviceptr {
        self.address
    }

    fn size_bytes(&self) -> usize {
        self.size_bytes
    }

    fn is_writable(&self) -> bool {
        true
    }

    fn export(&self) -> Result<RegionHandle, DeviceError> {
        Err(DeviceError::Imported)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        // Closing under work in flight would pull the memory from under it.
        note_failure(self.context.synchronize());
        let mut openings = self.context.openings.lock();
        // A new opening may have taken the place meanwhile; the driver counts the two.
        if openings.get(&self.handle).is_some_and(|region| region.strong_count() == 0) {
            openings.remove(&self.handle);
        }
        note_failure(self.context.current().and_then(|cuda| unmap(&cuda, self.address)));
    }
}
