use std::sync::Arc;

use super::gpu::BrokerGpu;
use super::memory::SessionMemory;
use super::state::State;
use crate::device::{Device, HostDevice, HostSharing, StagingDevice};
use crate::id::GpuUuid;
use crate::service::Pages;

/// Least size of an arena: a latent and an image of 1024 by 1024. Locked pages take memory from the start, so that
/// the larger arenas of other host memory would cost what nobody uses.
const ARENA_BYTES: u64 = 16 << 20;

/// A session's host memory that tensors of GPUs pass through and nobody's tensor stays in.
#[derive(Debug)]
pub(super) struct Staging {
    pub(super) memory: Arc<SessionMemory>,
    device: Arc<StagingDevice>,
}

impl Staging {
    /// Memory beside the session's other host memory, shared in the same way, first needed for the client's `gpu`.
    pub(super) fn new(state: &State, host: &SessionMemory, sharing: HostSharing, gpu: GpuUuid) -> Self {
        let memory = HostDevice::new(sharing);
        let device = Arc::new(match state.gpu.as_ref().map(BrokerGpu::page_lock) {
            Some(lock) => StagingDevice::locked_by(lock, memory),
            None => StagingDevice::pageable("the broker runs on no GPU".to_owned(), memory),
        });
        let arena = ARENA_BYTES.min(state.config.arena_bytes);
        let memory = host.staging(Arc::clone(&device) as Arc<dyn Device>, arena, gpu);
        Self { memory, device }
    }

    /// Whether the broker's side is page-locked; absent before the first arena.
    pub(super) fn pages(&self) -> Option<Pages> {
        self.device.pages()
    }
}
