use std::collections::HashMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::super::gpu::GpuWeights;
use super::super::open_gpu::LinkGpu;
use crate::device::{Region, RegionHandle};
use crate::error::{Error, ErrorKind, Result};
use crate::id::WeightSetId;
use crate::protocol::ArenaHandle;
use crate::transport::Attachment;

/// What one session has mapped: however often a set is attached, its memory is imported once.
#[derive(Debug, Default)]
pub(in crate::client) struct WeightMaps {
    by_set: Mutex<HashMap<WeightSetId, Weak<WeightMap>>>,
}

impl WeightMaps {
    /// The map of a set: the one that there is, else what `open` makes.
    pub(super) fn share(&self, set: WeightSetId, open: impl FnOnce() -> Result<WeightMap>) -> Result<Arc<WeightMap>> {
        let mut by_set = self.by_set.lock();
        if let Some(map) = by_set.get(&set).and_then(Weak::upgrade).filter(|map| map.check().is_ok()) {
            return Ok(map);
        }
        let map = Arc::new(open()?);
        by_set.retain(|_, map| map.strong_count() > 0);
        by_set.insert(set, Arc::downgrade(&map));
        Ok(map)
    }

    /// Notes that `map` is that of `set` from now on.
    pub(super) fn note(&self, set: WeightSetId, map: &Arc<WeightMap>) {
        self.by_set.lock().insert(set, Arc::downgrade(map));
    }
}

/// The memory of attached weights in this process.
#[derive(Debug)]
pub(in crate::client) enum WeightMap {
    /// A private view: what is written to it nobody else sees.
    #[cfg(target_os = "linux")]
    Host(Arc<crate::device::SealedRegion>),
    Gpu {
        weights: GpuWeights,
        ordinal: i32,
    },
}

impl WeightMap {
    /// Maps what was handed over.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] where the handle is missing, else [`crate::device::DeviceError`].
    pub(super) fn open(
        handle: &ArenaHandle,
        attached: Option<Attachment>,
        size_bytes: u64,
        gpu: Option<&LinkGpu>,
    ) -> Result<Self> {
        let size_bytes = usize::try_from(size_bytes).unwrap_or(usize::MAX);
        match (handle, attached, gpu) {
            #[cfg(target_os = "linux")]
            (ArenaHandle::Attached, Some(Attachment::Fd(fd)), None) => {
                Ok(Self::Host(crate::device::SealedRegion::import(fd, size_bytes)?))
            }
            #[cfg(unix)]
            (ArenaHandle::CudaVmm, Some(Attachment::Fd(fd)), Some(gpu)) => {
                let weights = gpu.device.import_weights(RegionHandle::CudaVmm(fd), size_bytes)?;
                Ok(Self::Gpu { weights, ordinal: gpu.device.ordinal() })
            }
            (ArenaHandle::CudaIpc(handle), _, Some(gpu)) => {
                let handle = handle.as_slice().try_into().map_err(|_| missing())?;
                let weights = gpu.device.import_weights(RegionHandle::CudaIpc(handle), size_bytes)?;
                Ok(Self::Gpu { weights, ordinal: gpu.device.ordinal() })
            }
            _ => Err(missing()),
        }
    }

    pub(super) fn region(&self) -> Arc<dyn Region> {
        match self {
            #[cfg(target_os = "linux")]
            Self::Host(region) => Arc::clone(region) as Arc<dyn Region>,
            Self::Gpu { weights, .. } => weights.region(),
        }
    }

    /// This process's ordinal of the GPU that it lies on.
    pub(super) fn ordinal(&self) -> Option<i32> {
        match self {
            #[cfg(target_os = "linux")]
            Self::Host(_) => None,
            Self::Gpu { ordinal, .. } => Some(*ordinal),
        }
    }

    /// That there is memory behind the addresses.
    ///
    /// # Errors
    /// [`ErrorKind::Stale`] where [`WeightMap::replace`] left none.
    pub(super) fn check(&self) -> Result<()> {
        match self {
            #[cfg(target_os = "linux")]
            Self::Host(_) => Ok(()),
            Self::Gpu { weights, .. } => Ok(weights.check()?),
        }
    }

    /// Puts other memory of equal content behind the same addresses.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for plain memory of a GPU; as [`WeightMap::open`], and the map is as it was then;
    /// [`ErrorKind::Stale`] where the driver takes neither the new memory of a GPU nor the old, and nothing is mapped.
    pub(super) fn replace(&self, handle: &ArenaHandle, attached: Option<Attachment>) -> Result<()> {
        match (self, handle, attached) {
            #[cfg(target_os = "linux")]
            (Self::Host(region), ArenaHandle::Attached, Some(Attachment::Fd(fd))) => Ok(region.replace(fd)?),
            #[cfg(unix)]
            (Self::Gpu { weights, .. }, ArenaHandle::CudaVmm, Some(Attachment::Fd(fd))) => {
                Ok(weights.replace(RegionHandle::CudaVmm(fd))?)
            }
            (Self::Gpu { .. }, ..) => Err(Error::new(
                ErrorKind::Unsupported,
                "plain memory of a GPU cannot be replaced behind the same addresses",
                "attach the weights again, and assign the new tensors",
            )),
            #[cfg(target_os = "linux")]
            _ => Err(missing()),
        }
    }
}

fn missing() -> Error {
    Error::new(ErrorKind::Protocol, "the broker speaks of weights but did not hand them over", "")
}
