use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use super::pool::ArenaPool;
use crate::config::BrokerConfig;
use crate::device::{CopyStream, DeviceError, Order, PageLock, Region};
use crate::id::GpuUuid;
use crate::protocol::Rung;

/// A GPU in a build that reaches none: there is no value of this type.
#[derive(Debug)]
pub(super) enum BrokerGpu {}

/// As with a GPU.
pub(super) struct Marks {
    pub(super) order: Arc<dyn Order>,
    pub(super) page: Arc<dyn Region>,
    pub(super) events: Vec<u8>,
}

impl BrokerGpu {
    /// No GPU: what runs on one here shares no memory of it.
    #[expect(clippy::unnecessary_wraps, reason = "the same signature as with a GPU")]
    pub(super) fn open(_config: &BrokerConfig, _arena_ids: &Arc<AtomicU32>) -> Result<Option<Self>, DeviceError> {
        Ok(None)
    }

    pub(super) fn uuid(&self) -> GpuUuid {
        match *self {}
    }

    pub(super) fn is_reached_from(&self, _gpu: GpuUuid) -> bool {
        match *self {}
    }

    pub(super) fn arenas(&self, _rung: Rung) -> Result<Arc<ArenaPool>, DeviceError> {
        match *self {}
    }

    pub(super) fn weight_memory(&self, _size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError> {
        match *self {}
    }

    pub(super) fn arena_bytes(&self) -> u64 {
        match *self {}
    }

    pub(super) fn memory_bytes(&self) -> Option<u64> {
        match *self {}
    }

    pub(super) fn queue(&self) -> Result<Arc<dyn CopyStream>, DeviceError> {
        match *self {}
    }

    pub(super) fn marks(&self) -> Result<Marks, DeviceError> {
        match *self {}
    }

    pub(super) fn page_lock(&self) -> PageLock {
        match *self {}
    }

    pub(super) fn delay(&self, _queue: &dyn CopyStream) -> Result<(), DeviceError> {
        match *self {}
    }
}
