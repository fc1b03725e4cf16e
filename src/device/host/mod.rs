//! Host memory that crosses processes: sealed memfds on Linux, named segments elsewhere and as a fallback.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Device, DeviceError, Place, Region, RegionHandle};

#[cfg(target_os = "linux")]
mod memfd;
mod named;
#[cfg(target_os = "linux")]
mod sealed;

#[cfg(target_os = "linux")]
pub use sealed::{DraftRegion, SealedRegion};

/// How a host region is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HostSharing {
    /// A sealed memfd handed over with `SCM_RIGHTS`: no name, nothing outlives a killed owner, nobody can truncate it.
    Memfd,
    /// A named segment: unguessable name, readable by this user only, unlinked once the session has opened it.
    Named,
}

impl HostSharing {
    /// The best way this platform has.
    #[must_use]
    pub const fn preferred() -> Self {
        if cfg!(target_os = "linux") { Self::Memfd } else { Self::Named }
    }
}

/// Bytes before the usable part of a shared host region: its first word counts published writes.
const HEADER_BYTES: usize = 4096;

/// Shared host memory.
#[derive(Debug)]
pub struct HostDevice {
    sharing: HostSharing,
}

impl HostDevice {
    /// Host memory shared in the given way.
    #[must_use]
    pub const fn new(sharing: HostSharing) -> Self {
        Self { sharing }
    }
}

impl Default for HostDevice {
    fn default() -> Self {
        Self::new(HostSharing::preferred())
    }
}

impl Device for HostDevice {
    fn place(&self) -> Place {
        Place::Host
    }

    fn allocate(&self, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError> {
        let out_of_memory = |what| move |cause: std::io::Error| DeviceError::OutOfMemory { what, size_bytes, cause };
        let total = size_bytes
            .checked_add(HEADER_BYTES)
            .ok_or_else(|| out_of_memory("shared memory")(std::io::ErrorKind::OutOfMemory.into()))?;
        match self.sharing {
            #[cfg(target_os = "linux")]
            HostSharing::Memfd => {
                let memory = memfd::Memfd::create(total).map_err(out_of_memory("sealed shared memory"))?;
                Ok(Arc::new(HostRegion { memory, size_bytes, owned: true, recorded: AtomicU64::new(0) }))
            }
            #[cfg(not(target_os = "linux"))]
            HostSharing::Memfd => Err(out_of_memory("sealed shared memory")(std::io::ErrorKind::Unsupported.into())),
            HostSharing::Named => {
                let memory = named::Segment::create(total).map_err(out_of_memory("a named shared segment"))?;
                Ok(Arc::new(HostRegion { memory, size_bytes, owned: true, recorded: AtomicU64::new(0) }))
            }
        }
    }

    fn import(&self, handle: RegionHandle, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError> {
        match handle {
            #[cfg(target_os = "linux")]
            RegionHandle::Fd(fd) => imported(memfd::Memfd::open(fd)?, size_bytes),
            RegionHandle::Name(name) => imported(named::Segment::open(&name)?, size_bytes),
            _ => Err(DeviceError::WrongHandle { device: "host" }),
        }
    }
}

fn imported<M: SharedMemory>(memory: M, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError> {
    let actual = memory.size_bytes().saturating_sub(HEADER_BYTES);
    if actual < size_bytes {
        return Err(DeviceError::TooSmall { announced: size_bytes, actual });
    }
    Ok(Arc::new(HostRegion { memory, size_bytes, owned: false, recorded: AtomicU64::new(0) }))
}

/// Mapped memory of `size_bytes()` bytes at `address()`, page-aligned, valid while the value lives.
trait SharedMemory: std::fmt::Debug + Send + Sync + 'static {
    fn address(&self) -> usize;
    fn size_bytes(&self) -> usize;
    fn handle(&self) -> Result<RegionHandle, DeviceError>;
    fn remove_name(&self);
}

#[derive(Debug)]
struct HostRegion<M> {
    memory: M,
    size_bytes: usize,
    owned: bool,
    /// What the owner published. The importers' word is a copy: they can write to it.
    recorded: AtomicU64,
}

impl<M: SharedMemory> HostRegion<M> {
    fn published(&self) -> &AtomicU64 {
        // SAFETY: every shared region starts with a header page, mapped while `self.memory` lives, page-aligned and
        // so aligned for a u64; both processes use the word only as an atomic.
        unsafe { AtomicU64::from_ptr(self.memory.address() as *mut u64) }
    }
}

// SAFETY: `memory` is mapped for `HEADER_BYTES + size_bytes` bytes while the value lives: `allocate` asked for that
// many, `imported` checked it, and neither kind of memory can shrink under its mapping on the owner's side.
unsafe impl<M: SharedMemory> Region for HostRegion<M> {
    fn size_bytes(&self) -> usize {
        self.size_bytes
    }

    fn address(&self) -> usize {
        self.memory.address() + HEADER_BYTES
    }

    fn place(&self) -> Place {
        Place::Host
    }

    fn export(&self) -> Result<RegionHandle, DeviceError> {
        if !self.owned {
            return Err(DeviceError::Imported);
        }
        self.memory.handle()
    }

    fn opened(&self) {
        self.memory.remove_name();
    }

    fn record(&self) -> Result<u64, DeviceError> {
        let sequence = self.recorded.fetch_add(1, Ordering::Relaxed) + 1;
        // Records of two threads may cross: the word never goes back.
        self.published().fetch_max(sequence, Ordering::Release);
        Ok(sequence)
    }

    fn wait(&self, sequence: u64) -> Result<(), DeviceError> {
        await_published(self.published(), sequence)
    }
}

/// The descriptor travels after the write was published, so a reader that is early was lied to.
pub(super) fn await_published(published: &AtomicU64, sequence: u64) -> Result<(), DeviceError> {
    let recorded = published.load(Ordering::Acquire);
    if recorded < sequence {
        return Err(DeviceError::NotRecorded { awaited: sequence, recorded });
    }
    Ok(())
}
