use std::sync::Arc;

use super::super::gpu::BrokerGpu;
use crate::device::{DeviceError, Region, RegionHandle};
use crate::id::GpuUuid;

/// Where a set lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WeightPlace {
    Host,
    Gpu(GpuUuid),
}

impl WeightPlace {
    /// What every tensor starts at a multiple of, in bytes: what the tensor library's own allocations have there.
    pub(super) fn alignment(self) -> u64 {
        match self {
            Self::Host => 64,
            Self::Gpu(_) => 512,
        }
    }

    pub(super) fn name(self) -> String {
        match self {
            Self::Host => "cpu".to_owned(),
            Self::Gpu(gpu) => gpu.to_string(),
        }
    }
}

/// How many bytes of weights each kind of memory may hold.
#[derive(Debug, Clone, Copy)]
pub(in crate::broker) struct WeightLimits {
    pub(super) host: u64,
    pub(super) gpu: u64,
}

impl WeightLimits {
    /// What is asked for; else what a GPU has, and of the host's memory so much that clients can still work beside the
    /// weights. A machine that does not tell has no bound.
    pub(in crate::broker) fn new(asked_for: Option<u64>, gpu: Option<&BrokerGpu>) -> Self {
        let most = |bytes: Option<u64>| asked_for.or(bytes).unwrap_or(u64::MAX);
        Self { host: most(host_bytes().map(|host| host / 4 * 3)), gpu: most(gpu.and_then(BrokerGpu::memory_bytes)) }
    }

    pub(super) fn of(self, place: WeightPlace) -> u64 {
        match place {
            WeightPlace::Host => self.host,
            WeightPlace::Gpu(_) => self.gpu,
        }
    }
}

/// All of the host's memory, or what this process's control group may use of it.
#[cfg(target_os = "linux")]
fn host_bytes() -> Option<u64> {
    use procfs::Current;
    let installed = procfs::Meminfo::current().ok()?.mem_total;
    let allowed = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let allowed = allowed.and_then(|text| text.trim().parse::<u64>().ok());
    Some(allowed.map_or(installed, |allowed| allowed.min(installed)))
}

#[cfg(not(target_os = "linux"))]
fn host_bytes() -> Option<u64> {
    None
}

/// Memory of a set that is being filled.
#[derive(Debug)]
pub(super) enum WeightDraft {
    #[cfg(target_os = "linux")]
    Host(Arc<crate::device::DraftRegion>),
    /// Whether others can write to it is the driver's business, not the memory's.
    Gpu(Arc<dyn Region>),
}

/// Memory of a set that is complete.
#[derive(Debug)]
pub(super) struct SealedWeights {
    pub(super) region: Arc<dyn Region>,
    /// What the system calls it; of the host's memory only.
    pub(super) inode: Option<u64>,
    /// Bytes of pages that exist, because they were written to; of the host's memory only.
    pub(super) stored_bytes: Option<u64>,
    pub(super) end: MemoryEnd,
}

/// When memory goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MemoryEnd {
    /// With the last process that maps it, whoever else has given it up.
    Counted,
    /// With the broker's hold on it, whoever still maps it: it must be kept until they are gone.
    Owned,
}

impl WeightDraft {
    /// # Errors
    /// [`DeviceError::OutOfMemory`], [`DeviceError::Cuda`]; [`DeviceError::WrongHandle`] where the system has no memory
    /// that can be handed over for reading alone, and for a GPU that is not the broker's.
    pub(super) fn allocate(
        place: WeightPlace,
        gpu: Option<&BrokerGpu>,
        size_bytes: usize,
    ) -> Result<Self, DeviceError> {
        match place {
            #[cfg(target_os = "linux")]
            WeightPlace::Host => Ok(Self::Host(crate::device::DraftRegion::allocate(size_bytes)?)),
            #[cfg(not(target_os = "linux"))]
            WeightPlace::Host => Err(DeviceError::WrongHandle { device: "host" }),
            WeightPlace::Gpu(uuid) => {
                let gpu = gpu.filter(|gpu| gpu.uuid() == uuid).ok_or(DeviceError::NoGpu { gpu: uuid })?;
                Ok(Self::Gpu(gpu.weight_memory(size_bytes)?))
            }
        }
    }

    pub(super) fn region(&self) -> Arc<dyn Region> {
        match self {
            #[cfg(target_os = "linux")]
            Self::Host(draft) => Arc::clone(draft) as Arc<dyn Region>,
            Self::Gpu(region) => Arc::clone(region),
        }
    }

    /// Ends the writing. Nobody else may hold the region.
    ///
    /// # Errors
    /// [`DeviceError::StillMapped`].
    pub(super) fn seal(self) -> Result<SealedWeights, DeviceError> {
        match self {
            #[cfg(target_os = "linux")]
            Self::Host(draft) => {
                let sealed = draft.seal()?;
                let (inode, stored_bytes) = (Some(sealed.inode()?), Some(sealed.stored_bytes()?));
                Ok(SealedWeights { region: sealed, inode, stored_bytes, end: MemoryEnd::Counted })
            }
            Self::Gpu(region) => {
                let end = match region.export()? {
                    RegionHandle::CudaIpc(_) => MemoryEnd::Owned,
                    _ => MemoryEnd::Counted,
                };
                Ok(SealedWeights { region, inode: None, stored_bytes: None, end })
            }
        }
    }
}
