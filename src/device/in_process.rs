use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};

use super::{Device, DeviceError, Place, Region, RegionHandle};

/// Private host memory: for a client in the broker's process, and for sessions whose bytes cross in frames.
#[derive(Debug, Default)]
pub struct InProcessDevice;

impl Device for InProcessDevice {
    fn place(&self) -> Place {
        Place::Host
    }

    fn allocate(&self, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError> {
        let memory = MmapOptions::new()
            .len(size_bytes.max(1))
            .map_anon()
            .map_err(|cause| DeviceError::OutOfMemory { what: "private memory", size_bytes, cause })?;
        Ok(Arc::new_cyclic(|this| InProcessRegion {
            this: this.clone(),
            memory: MmapRaw::from(memory),
            size_bytes,
            published: AtomicU64::new(0),
        }))
    }

    fn import(&self, handle: RegionHandle, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError> {
        let RegionHandle::Local(region) = handle else {
            return Err(DeviceError::WrongHandle { device: "in-process" });
        };
        if region.size_bytes() < size_bytes {
            return Err(DeviceError::TooSmall { announced: size_bytes, actual: region.size_bytes() });
        }
        Ok(region)
    }
}

#[derive(Debug)]
struct InProcessRegion {
    this: std::sync::Weak<InProcessRegion>,
    memory: MmapRaw,
    size_bytes: usize,
    published: AtomicU64,
}

// SAFETY: an anonymous mapping of at least `size_bytes`, unmapped when the value is dropped.
unsafe impl Region for InProcessRegion {
    fn size_bytes(&self) -> usize {
        self.size_bytes
    }

    fn address(&self) -> usize {
        self.memory.as_ptr() as usize
    }

    fn place(&self) -> Place {
        Place::Host
    }

    fn export(&self) -> Result<RegionHandle, DeviceError> {
        let this = self.this.upgrade().ok_or(DeviceError::Imported)?;
        Ok(RegionHandle::Local(this))
    }

    fn opened(&self) {}

    fn record(&self) -> Result<u64, DeviceError> {
        Ok(self.published.fetch_add(1, Ordering::Release) + 1)
    }

    fn wait(&self, sequence: u64) -> Result<(), DeviceError> {
        super::host::await_published(&self.published, sequence)
    }
}
