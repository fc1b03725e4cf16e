use std::fmt::Debug;
use std::sync::Arc;

use cudarc::driver::sys;

use super::context::Context;
use crate::device::{DeviceError, Place, Region, RegionHandle, check_range};

/// GPU memory mapped in this process, closed when the value is dropped.
pub(super) trait Memory: Debug + Send + Sync + 'static {
    fn context(&self) -> &Arc<Context>;
    fn address(&self) -> sys::CUdeviceptr;
    fn size_bytes(&self) -> usize;
    fn is_writable(&self) -> bool;

    /// # Errors
    /// [`DeviceError::NothingMapped`] where nothing is at its addresses.
    fn check(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn export(&self) -> Result<RegionHandle, DeviceError>;
}

/// A region of GPU memory, whichever way it is shared.
#[derive(Debug)]
pub(super) struct CudaRegion<M>(pub(super) M);

impl<M: Memory> CudaRegion<M> {
    /// A region of new memory, which keeps what was there before until it is cleared.
    pub(super) fn zeroed(memory: M) -> Result<Self, DeviceError> {
        let cuda = memory.context().current()?;
        let stream = memory.context().copies();
        // SAFETY: the memory is mapped for as many bytes; the stream lives as long as the context.
        unsafe {
            cuda.cuMemsetD8Async(memory.address(), 0, memory.size_bytes(), stream)?;
            cuda.cuStreamSynchronize(stream)?;
        }
        drop(cuda);
        Ok(Self(memory))
    }
}

// SAFETY: the contract asks something of host memory only.
unsafe impl<M: Memory> Region for CudaRegion<M> {
    fn size_bytes(&self) -> usize {
        self.0.size_bytes()
    }

    fn address(&self) -> usize {
        self.0.address() as usize
    }

    fn place(&self) -> Place {
        self.0.context().place()
    }

    fn export(&self) -> Result<RegionHandle, DeviceError> {
        self.0.export()
    }

    fn opened(&self) {}

    fn copy_in(&self, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        check_range(offset, bytes.len(), self.size_bytes())?;
        if !self.0.is_writable() {
            return Err(DeviceError::ReadOnly);
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let cuda = self.0.context().current()?;
        let stream = self.0.context().copies();
        // SAFETY: the range lies in memory that stays mapped while `self` lives, and `bytes` is borrowed until the copy
        // is done.
        unsafe {
            let to = self.0.address() + offset as u64;
            let enqueued = cuda.cuMemcpyHtoDAsync_v2(to, bytes.as_ptr().cast(), bytes.len(), stream);
            // In any case: nothing may read `bytes` once this has returned.
            enqueued.and(cuda.cuStreamSynchronize(stream))
        }
    }

    fn copy_out(&self, offset: usize, target: &mut [u8]) -> Result<(), DeviceError> {
        check_range(offset, target.len(), self.size_bytes())?;
        if target.is_empty() {
            return Ok(());
        }
        self.0.check()?;
        let cuda = self.0.context().current()?;
        let stream = self.0.context().copies();
        // SAFETY: as in `copy_in`; `target` is borrowed exclusively.
        unsafe {
            let from = self.0.address() + offset as u64;
            let enqueued = cuda.cuMemcpyDtoHAsync_v2(target.as_mut_ptr().cast(), from, target.len(), stream);
            enqueued.and(cuda.cuStreamSynchronize(stream))
        }
    }

    /// The way that needs no event: everything is done before the number is given out.
    fn record(&self) -> Result<u64, DeviceError> {
        self.0.context().synchronize()?;
        Ok(0)
    }

    fn wait(&self, sequence: u64) -> Result<(), DeviceError> {
        match sequence {
            0 => Ok(()),
            awaited => Err(DeviceError::NotRecorded { awaited, recorded: 0 }),
        }
    }
}
