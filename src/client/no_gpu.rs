use std::sync::Arc;
use std::time::Duration;

use crate::device::{CopyStream, DeviceError, GpuRange, Order, PageLock, Region, RegionHandle, Span, StreamRef};
use crate::id::GpuUuid;

/// A GPU in a build that reaches none: there is no value of this type.
#[derive(Debug, Clone)]
pub(super) enum GpuDevice {}

impl GpuDevice {
    pub(super) fn open(_gpu: GpuUuid) -> Result<Self, DeviceError> {
        Err(no_driver())
    }

    pub(super) fn import(&self, _handle: RegionHandle, _size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError> {
        match *self {}
    }

    pub(super) fn import_weights(&self, _: RegionHandle, _: usize) -> Result<GpuWeights, DeviceError> {
        match *self {}
    }

    pub(super) fn queue(&self) -> Result<Arc<dyn CopyStream>, DeviceError> {
        match *self {}
    }

    pub(super) fn order(&self, _page: Arc<dyn Region>, _events: &[u8]) -> Result<Arc<dyn Order>, DeviceError> {
        match *self {}
    }

    pub(super) fn delay(&self, _stream: StreamRef, _time: Duration) -> Result<(), DeviceError> {
        match *self {}
    }

    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        match *self {}
    }

    pub(super) fn synchronize_stream(&self, _stream: StreamRef) -> Result<(), DeviceError> {
        match *self {}
    }

    pub(super) fn copy_in(&self, _from: &GpuRange<'_>, _to: &Span) -> Result<(), DeviceError> {
        match *self {}
    }

    pub(super) fn copy_out(&self, _from: &Span, _to: &GpuRange<'_>) -> Result<(), DeviceError> {
        match *self {}
    }

    pub(super) fn read(&self, _from: &GpuRange<'_>, _to: &mut [u8]) -> Result<(), DeviceError> {
        match *self {}
    }

    pub(super) fn write(&self, _from: &[u8], _to: &GpuRange<'_>) -> Result<(), DeviceError> {
        match *self {}
    }

    pub(super) fn page_lock(&self) -> PageLock {
        match *self {}
    }

    pub(super) fn ordinal(&self) -> i32 {
        match *self {}
    }
}

pub(super) fn gpu_named(_name: &str) -> Result<GpuUuid, DeviceError> {
    Err(no_driver())
}

fn no_driver() -> DeviceError {
    DeviceError::NoDriver { reason: "this build was made without it".to_owned() }
}

/// As with a GPU.
#[derive(Debug)]
pub(super) enum GpuWeights {}

impl GpuWeights {
    pub(super) fn region(&self) -> Arc<dyn Region> {
        match *self {}
    }

    #[cfg(unix)]
    pub(super) fn replace(&self, _: RegionHandle) -> Result<(), DeviceError> {
        match *self {}
    }

    pub(super) fn check(&self) -> Result<(), DeviceError> {
        match *self {}
    }
}
