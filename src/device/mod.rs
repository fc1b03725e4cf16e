//! Where tensors live: allocate, export, import, close and order memory on one device.
//!
//! The broker allocates and exports; clients only import. One import per region and process: a tensor is
//! a base address plus an offset, never a mapping of its own.

use std::fmt::Debug;
use std::sync::Arc;

mod error;
mod host;
mod in_process;
mod span;

pub use error::DeviceError;
pub use host::{HostDevice, HostSharing};
pub use in_process::InProcessDevice;
pub use span::Span;

use crate::id::GpuUuid;

/// The kind of memory a device offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// Memory the CPU reads and writes.
    Host,
    /// Memory of one GPU.
    Gpu(GpuUuid),
}

/// What an importer needs to map a region.
#[derive(Debug)]
#[non_exhaustive]
pub enum RegionHandle {
    /// A file descriptor of sealed memory; crosses by `SCM_RIGHTS`.
    #[cfg(unix)]
    Fd(std::os::fd::OwnedFd),
    /// The unguessable name of a shared segment.
    Name(String),
    /// The region itself, for a client in the broker's process.
    Local(Arc<dyn Region>),
}

/// One place where memory can be allocated (by the broker) or imported (by a client).
pub trait Device: Debug + Send + Sync {
    /// The kind of memory.
    fn place(&self) -> Place;

    /// Allocates a zeroed, exportable region of at least `size_bytes`. Called once per arena, never per tensor.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], [`DeviceError::Os`].
    fn allocate(&self, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError>;

    /// Maps a region that another process exported and checks that it holds `size_bytes`.
    /// Called once per arena and process.
    ///
    /// # Errors
    /// [`DeviceError::WrongHandle`] for a handle of another kind of device, [`DeviceError::TooSmall`],
    /// [`DeviceError::NotSealed`], [`DeviceError::Os`].
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

    /// Publishes what was written so far; the sequence number goes into the descriptor of the written tensor.
    ///
    /// # Errors
    /// [`DeviceError::Os`] where the device refuses.
    fn record(&self) -> Result<u64, DeviceError>;

    /// Makes everything published up to `sequence` visible to this process.
    ///
    /// # Errors
    /// [`DeviceError::NotRecorded`] where `sequence` has not been published: the reader is early.
    fn wait(&self, sequence: u64) -> Result<(), DeviceError>;
}
