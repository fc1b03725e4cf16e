use std::sync::Arc;

use super::api::note_failure;
use super::context::Context;
use super::device::CudaDevice;
use crate::device::{DeviceError, LockShare, Place, Region, RegionHandle};

/// The registered memory is page-locked for every context of the process.
const PORTABLE: u32 = 1;

impl CudaDevice {
    /// Locks the pages of a host region, so that copies run at full speed and beside other work.
    ///
    /// # Errors
    /// [`DeviceError::NotHost`]; [`DeviceError::Cuda`], also for a region whose pages this process has locked already.
    pub fn pin(&self, region: Arc<dyn Region>) -> Result<Pinned, DeviceError> {
        if region.place() != Place::Host {
            return Err(DeviceError::NotHost);
        }
        let address = std::ptr::with_exposed_provenance_mut(region.address());
        // SAFETY: host memory, mapped while the region lives, which `Pinned` sees to.
        unsafe { self.context().current()?.cuMemHostRegister_v2(address, region.size_bytes(), PORTABLE) }?;
        Ok(Pinned { region, context: Arc::clone(self.context()), share: None })
    }
}

/// A host region with its pages locked; dropping it unlocks them, before the region goes. It asks for no wait for the GPU,
/// as no copy outlasts the borrow of a region's bytes; a driver may wait all the same.
#[derive(Debug)]
pub struct Pinned {
    region: Arc<dyn Region>,
    context: Arc<Context>,
    /// Given back once the pages are unlocked.
    share: Option<LockShare>,
}

impl Pinned {
    /// The same, with what it takes of a budget.
    pub(super) fn counted(mut self, share: Option<LockShare>) -> Self {
        self.share = share;
        self
    }

    /// The region.
    #[must_use]
    pub fn region(&self) -> &Arc<dyn Region> {
        &self.region
    }
}

// SAFETY: it is the region it holds: the same bytes, mapped for as long.
unsafe impl Region for Pinned {
    fn size_bytes(&self) -> usize {
        self.region.size_bytes()
    }

    fn address(&self) -> usize {
        self.region.address()
    }

    fn place(&self) -> Place {
        self.region.place()
    }

    fn export(&self) -> Result<RegionHandle, DeviceError> {
        self.region.export()
    }

    fn opened(&self) {
        self.region.opened();
    }

    fn copy_in(&self, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        self.region.copy_in(offset, bytes)
    }

    fn copy_out(&self, offset: usize, target: &mut [u8]) -> Result<(), DeviceError> {
        self.region.copy_out(offset, target)
    }

    fn record(&self) -> Result<u64, DeviceError> {
        self.region.record()
    }

    fn wait(&self, sequence: u64) -> Result<(), DeviceError> {
        self.region.wait(sequence)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let address = std::ptr::with_exposed_provenance_mut(self.region.address());
        // SAFETY: registered in `pin`, undone here alone. No copy is in flight: `read_range`, `write_range`, a region's
        // `copy_in` and `copy_out`, and `CopyStream::copy` with host memory wait for their stream before they return, also
        // after an error; libtorch's blocking copies do; and the caller of `CudaDevice::copy` promised to.
        note_failure(self.context.current().and_then(|cuda| unsafe { cuda.cuMemHostUnregister(address) }));
    }
}
