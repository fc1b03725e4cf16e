use std::sync::Arc;
use std::time::Duration;

use crate::device::cuda::{CudaWeights, Driver, Fence, FenceHandle};
use crate::device::{
    CopyStream, CudaDevice, CudaSharing, Device, DeviceError, GpuRange, Order, PageLock, Region, RegionHandle, Span,
    StreamRef,
};
use crate::id::GpuUuid;

/// A GPU as this process uses it.
#[derive(Debug, Clone)]
pub(super) struct GpuDevice(Arc<CudaDevice>);

impl GpuDevice {
    /// # Errors
    /// [`DeviceError::NoDriver`], [`DeviceError::NoGpu`], [`DeviceError::Cuda`].
    pub(super) fn open(gpu: GpuUuid) -> Result<Self, DeviceError> {
        Ok(Self(CudaDevice::open(gpu, CudaSharing::Ipc)?))
    }

    pub(super) fn import(&self, handle: RegionHandle, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError> {
        self.0.import(handle, size_bytes)
    }

    /// Maps weights: for reading alone where the driver can enforce it.
    pub(super) fn import_weights(&self, handle: RegionHandle, size_bytes: usize) -> Result<GpuWeights, DeviceError> {
        match handle {
            RegionHandle::CudaVmm(fd) => Ok(GpuWeights::ReadOnly(self.0.import_read_only(fd, size_bytes)?)),
            handle => Ok(GpuWeights::Plain(self.0.import(handle, size_bytes)?)),
        }
    }

    pub(super) fn queue(&self) -> Result<Arc<dyn CopyStream>, DeviceError> {
        Ok(Arc::new(self.0.stream()?))
    }

    pub(super) fn order(&self, page: Arc<dyn Region>, events: &[u8]) -> Result<Arc<dyn Order>, DeviceError> {
        Ok(Arc::new(Fence::open(&self.0, page, &FenceHandle::from_bytes(events)?)?))
    }

    pub(super) fn delay(&self, stream: StreamRef, time: Duration) -> Result<(), DeviceError> {
        self.0.delay(stream, time)
    }

    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        self.0.synchronize()
    }

    pub(super) fn synchronize_stream(&self, stream: StreamRef) -> Result<(), DeviceError> {
        self.0.synchronize_stream(stream)
    }

    pub(super) fn copy_in(&self, from: &GpuRange<'_>, to: &Span) -> Result<(), DeviceError> {
        self.0.copy_range_in(from, to)
    }

    pub(super) fn copy_out(&self, from: &Span, to: &GpuRange<'_>) -> Result<(), DeviceError> {
        self.0.copy_range_out(from, to)
    }

    pub(super) fn read(&self, from: &GpuRange<'_>, to: &mut [u8]) -> Result<(), DeviceError> {
        self.0.read_range(from, to)
    }

    pub(super) fn write(&self, from: &[u8], to: &GpuRange<'_>) -> Result<(), DeviceError> {
        self.0.write_range(from, to)
    }

    pub(super) fn page_lock(&self) -> PageLock {
        self.0.page_lock(None)
    }

    pub(super) fn ordinal(&self) -> i32 {
        self.0.gpu().ordinal
    }
}

/// Weights in memory of a GPU.
#[derive(Debug)]
pub(super) enum GpuWeights {
    /// The driver enforces that they are read only.
    ReadOnly(CudaWeights),
    /// Nothing keeps this process from writing to them.
    Plain(Arc<dyn Region>),
}

impl GpuWeights {
    pub(super) fn region(&self) -> Arc<dyn Region> {
        match self {
            Self::ReadOnly(weights) => weights.region(),
            Self::Plain(region) => Arc::clone(region),
        }
    }

    /// Puts other memory of equal content behind the same addresses.
    ///
    /// # Errors
    /// [`DeviceError::WrongHandle`] for plain memory, whose addresses the driver chooses; as [`CudaWeights::replace`].
    pub(super) fn replace(&self, handle: RegionHandle) -> Result<(), DeviceError> {
        match (self, handle) {
            (Self::ReadOnly(weights), RegionHandle::CudaVmm(fd)) => weights.replace(fd),
            _ => Err(DeviceError::WrongHandle { device: "CUDA" }),
        }
    }

    /// # Errors
    /// As [`CudaWeights::check`].
    pub(super) fn check(&self) -> Result<(), DeviceError> {
        match self {
            Self::ReadOnly(weights) => weights.check(),
            Self::Plain(_) => Ok(()),
        }
    }
}

/// The GPU of that name or ordinal in this process.
///
/// # Errors
/// [`DeviceError::NoDriver`], [`DeviceError::UnknownGpu`].
pub(super) fn gpu_named(name: &str) -> Result<GpuUuid, DeviceError> {
    Ok(Driver::get()?.named(name)?.uuid)
}
