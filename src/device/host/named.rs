use std::fmt;
use std::io;

use parking_lot::Mutex;
use shared_memory::{Shmem, ShmemConf, ShmemError};

use super::SharedMemory;
use crate::device::{DeviceError, RegionHandle};

/// A mapped named segment.
pub(super) struct Segment {
    /// Behind a lock because removing the name changes who unlinks it on drop.
    map: Mutex<Shmem>,
    address: usize,
    size_bytes: usize,
    name: String,
}

// SAFETY: `Shmem` is not Send only because it holds a raw pointer. The mapping is process-wide, valid on every thread
// until drop; the mutable parts are behind the lock, and the memory is reached through `address` alone.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    pub(super) fn create(size_bytes: usize) -> io::Result<Self> {
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        // The name is the capability on systems where segments are found by name: 128 random bits. It ends in the size,
        // because Windows tells an importer whole pages only.
        let name = format!("/luna-broker-{:032x}-{size_bytes:x}", u128::from_le_bytes(random));
        let map = ShmemConf::new().size(size_bytes).os_id(&name).create().map_err(os_error)?;
        Ok(Self::from_map(map, name))
    }

    pub(super) fn open(name: &str) -> Result<Self, DeviceError> {
        let map = ShmemConf::new()
            .os_id(name)
            .open()
            .map_err(|error| DeviceError::Os { call: "opening a named segment", cause: os_error(error) })?;
        Ok(Self::from_map(map, name.to_owned()))
    }

    fn from_map(map: Shmem, name: String) -> Self {
        let named = name.rsplit_once('-').and_then(|(_, size)| usize::from_str_radix(size, 16).ok());
        let size_bytes = named.map_or(map.len(), |size| size.min(map.len()));
        Self { address: map.as_ptr() as usize, size_bytes, map: Mutex::new(map), name }
    }
}

fn os_error(error: ShmemError) -> io::Error {
    match error {
        ShmemError::MapCreateFailed(code) | ShmemError::MapOpenFailed(code) | ShmemError::UnknownOsError(code) => {
            io::Error::from_raw_os_error(code.cast_signed())
        }
        other => io::Error::other(other),
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the name: it is a capability and does not belong in logs.
        f.debug_struct("Segment").field("size_bytes", &self.size_bytes).finish_non_exhaustive()
    }
}

impl SharedMemory for Segment {
    fn address(&self) -> usize {
        self.address
    }

    fn size_bytes(&self) -> usize {
        self.size_bytes
    }

    fn handle(&self) -> Result<RegionHandle, DeviceError> {
        Ok(RegionHandle::Name(self.name.clone()))
    }

    fn remove_name(&self) {
        let mut map = self.map.lock();
        #[cfg(unix)]
        if map.set_owner(false)
            && let Err(errno) = rustix::shm::unlink(self.name.as_str())
        {
            tracing::warn!(%errno, "the name of a shared segment could not be removed");
        }
        // Elsewhere the name is a file's, which an owner removes when it lets go; whoever still maps it keeps the memory.
        // A second mapping that becomes the owner and goes does that early.
        #[cfg(not(unix))]
        if map.set_owner(false) {
            match ShmemConf::new().os_id(&self.name).open() {
                Ok(mut second) => _ = second.set_owner(true),
                Err(error) => tracing::warn!(%error, "the name of a shared segment could not be removed"),
            }
        }
    }
}
