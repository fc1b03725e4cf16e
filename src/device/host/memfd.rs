use std::io;
use std::os::fd::OwnedFd;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};

use super::SharedMemory;
use crate::device::{DeviceError, RegionHandle};

/// A mapped memfd whose size nobody can change.
#[derive(Debug)]
pub(super) struct Memfd {
    map: MmapRaw,
    /// Kept by the owner for later exports; an importer needs only the mapping.
    fd: Option<OwnedFd>,
}

impl Memfd {
    pub(super) fn create(size_bytes: usize) -> io::Result<Self> {
        let fd = memfd_create("luna-broker", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, size_bytes as u64)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let map = MmapOptions::new().len(size_bytes).map_raw(&fd)?;
        Ok(Self { map, fd: Some(fd) })
    }

    pub(super) fn open(fd: OwnedFd) -> Result<Self, DeviceError> {
        let os = |call| move |cause: io::Error| DeviceError::Os { call, cause };
        // Sealed against shrinking means that no peer can turn an access to the mapping into SIGBUS.
        let seals = fcntl_get_seals(&fd).map_err(|_| DeviceError::NotSealed)?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(DeviceError::NotSealed);
        }
        let size_bytes = fstat(&fd).map_err(|errno| os("fstat")(errno.into()))?.st_size;
        let size_bytes = usize::try_from(size_bytes).unwrap_or(0);
        let map = MmapOptions::new().len(size_bytes).map_raw(&fd).map_err(os("mmap"))?;
        Ok(Self { map, fd: None })
    }
}

impl SharedMemory for Memfd {
    fn address(&self) -> usize {
        self.map.as_ptr() as usize
    }

    fn size_bytes(&self) -> usize {
        self.map.len()
    }

    fn handle(&self) -> Result<RegionHandle, DeviceError> {
        let fd = self.fd.as_ref().ok_or(DeviceError::Imported)?;
        let fd = fd.try_clone().map_err(|cause| DeviceError::Os { call: "dup", cause })?;
        Ok(RegionHandle::Fd(fd))
    }

    fn remove_name(&self) {}
}
