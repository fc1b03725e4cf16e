//! Where tensors live: allocate, export, import, close and order memory on one device.
//!
//! The broker allocates and exports; clients only import. One import per region and process: a tensor is
//! a base address plus an offset, never a mapping of its own.

use std::fmt::{self, Debug};
use std::sync::Arc;

#[cfg(all(feature = "cuda", unix))]
pub mod cuda;
mod error;
mod host;
mod in_process;
mod order;
mod range;
mod span;
mod staging;

#[cfg(all(feature = "cuda", unix))]
pub use cuda::{CudaDevice, CudaSharing};
pub use error::{DeviceError, NoDriver};
#[cfg(target_os = "linux")]
pub use host::{DraftRegion, SealedRegion};
pub use host::{HostDevice, HostSharing};
pub use in_process::InProcessDevice;
pub use order::{CopyStream, Order};
pub use range::GpuRange;
pub use span::{Element, Span};
pub use staging::{LockBudget, LockShare, PageLock, StagingDevice};

use crate::id::GpuUuid;

/// The kind of memory a device offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// Memory the CPU reads and writes.
    Host,
    /// Memory of one GPU.
    Gpu(GpuUuid),
}

/// A stream of a GPU by its driver handle, as torch and DLPack give it out. The default stream is 0, or 1 in DLPack.
///
/// It names the stream and does not own it: whoever makes one of a number answers for it that the stream lives, and is
/// one of the GPU's primary context, wherever it is used. The driver may crash on any other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StreamRef(pub usize);

impl StreamRef {
    /// The legacy default stream.
    pub const DEFAULT: Self = Self(0);
    /// The default stream of whichever thread uses it.
    pub const PER_THREAD: Self = Self(2);
}

/// What an importer needs to map a region.
#[non_exhaustive]
pub enum RegionHandle {
    /// A file descriptor of sealed memory; crosses by `SCM_RIGHTS`.
    #[cfg(unix)]
    Fd(std::os::fd::OwnedFd),
    /// The unguessable name of a shared segment.
    Name(String),
    /// The region itself, for a client in the broker's process.
    Local(Arc<dyn Region>),
    /// The CUDA driver's handle of a whole allocation.
    CudaIpc([u8; 64]),
    /// A file descriptor that the CUDA driver made of an allocation; crosses by `SCM_RIGHTS`.
    #[cfg(unix)]
    CudaVmm(std::os::fd::OwnedFd),
}

impl Debug for RegionHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The kind alone: names and handles are capabilities and do not belong in logs.
        f.write_str(match self {
            #[cfg(unix)]
            Self::Fd(_) => "Fd",
            Self::Name(_) => "Name",
            Self::Local(_) => "Local",
            Self::CudaIpc(_) => "CudaIpc",
            #[cfg(unix)]
            Self::CudaVmm(_) => "CudaVmm",
        })
    }
}

/// One place where memory can be allocated (by the broker) or imported (by a client).
pub trait Device: Debug + Send + Sync {
    /// The kind of memory.
    fn place(&self) -> Place;

    /// Allocates a zeroed, exportable region of at least `size_bytes`. Called once per arena, never per tensor.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], [`DeviceError::Os`], [`DeviceError::Cuda`] where the driver refuses this way of
    /// sharing.
    fn allocate(&self, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError>;

    /// Maps a region that another process exported and checks that it holds `size_bytes`.
    /// Called once per arena and process.
    ///
    /// # Errors
    /// [`DeviceError::WrongHandle`] for a handle of another kind of device, [`DeviceError::TooSmall`],
    /// [`DeviceError::NotSealed`], [`DeviceError::Os`], [`DeviceError::Cuda`].
    fn import(&self, handle: RegionHandle, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError>;
}

/// One contiguous allocation. Dropping the last reference closes the mapping; memory goes when nobody maps it.
///
/// # Safety
/// For [`Place::Host`], `size_bytes()` bytes at `address()` must be readable and writable for as long as the value lives,
/// and both must always answer the same.
pub unsafe trait Region: Debug + Send + Sync + 'static {
    /// Usable bytes.
    fn size_bytes(&self) -> usize;

    /// Address of the first usable byte in this process; a device address for GPU memory.
    fn address(&self) -> usize;

    /// The kind of memory.
    fn place(&self) -> Place;

    /// A handle for one importer.
    ///
    /// # Errors
    /// [`DeviceError::Imported`] where this process did not allocate the region.
    fn export(&self) -> Result<RegionHandle, DeviceError>;

    /// The importer has the region open: a name that still exists is removed. Repeating it is harmless.
    fn opened(&self);

    /// Copies `bytes` to `offset` bytes from the start and returns when they are there. Work on a GPU that uses the range
    /// must be done before.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`], [`DeviceError::ReadOnly`], [`DeviceError::Cuda`].
    fn copy_in(&self, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        let target = host_range(self, offset, bytes.len())?;
        // SAFETY: `host_range` established that the range is host memory inside the region, which stays mapped while
        // `self` lives; `bytes` is a Rust slice and so cannot overlap a slot that only its lease's holder writes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
        Ok(())
    }

    /// Fills `target` from `offset` bytes after the start. Work on a GPU that writes to the range must be done before.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`], [`DeviceError::Cuda`].
    fn copy_out(&self, offset: usize, target: &mut [u8]) -> Result<(), DeviceError> {
        let from = host_range(self, offset, target.len())?;
        // SAFETY: as in `copy_in`; a peer that writes meanwhile can only change which bytes are copied.
        unsafe { std::ptr::copy_nonoverlapping(from, target.as_mut_ptr(), target.len()) };
        Ok(())
    }

    /// Publishes what was written so far; the sequence number goes into the descriptor of the written tensor.
    ///
    /// # Errors
    /// [`DeviceError::Os`] or [`DeviceError::Cuda`] where the device refuses.
    fn record(&self) -> Result<u64, DeviceError>;

    /// Makes everything published up to `sequence` visible to this process.
    ///
    /// # Errors
    /// [`DeviceError::NotRecorded`] where `sequence` has not been published: the reader is early.
    fn wait(&self, sequence: u64) -> Result<(), DeviceError>;
}

/// Where `length` bytes at `offset` lie, for the CPU.
fn host_range<R: Region + ?Sized>(region: &R, offset: usize, length: usize) -> Result<*mut u8, DeviceError> {
    if region.place() != Place::Host {
        return Err(DeviceError::NotHost);
    }
    check_range(offset, length, region.size_bytes())?;
    Ok(std::ptr::with_exposed_provenance_mut(region.address() + offset))
}

/// That `length` bytes at `offset` lie within `size_bytes`.
fn check_range(offset: usize, length: usize, size_bytes: usize) -> Result<(), DeviceError> {
    match offset.checked_add(length) {
        Some(end) if end <= size_bytes => Ok(()),
        _ => Err(DeviceError::OutOfBounds { offset, length, size_bytes }),
    }
}
