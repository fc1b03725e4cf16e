use std::sync::Arc;

use parking_lot::RwLock;

use super::memory::{Held, MemoryCounts, SessionMemory};
use crate::device::CopyStream;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{ArenaId, GpuUuid, LeaseRef};
use crate::protocol::{ArenaOffer, Descriptor, DeviceRung, GpuTarget, Release};
use crate::transport::Attachment;

/// What a session shares for one GPU of its client's.
#[derive(Debug)]
pub(super) struct SessionGpu {
    pub(super) gpu: GpuUuid,
    pub(super) rung: DeviceRung,
    /// Absent where the rung shares no GPU memory.
    pub(super) shared: Option<SharedGpu>,
}

/// GPU memory of a session, and where work on it that needs no lane is enqueued.
#[derive(Debug, Clone)]
pub(super) struct SharedGpu {
    pub(super) memory: Arc<SessionMemory>,
    pub(super) queue: Arc<dyn CopyStream>,
}

/// All tensor memory of a session: the host's, and that of GPUs as they are opened.
#[derive(Debug)]
pub(super) struct Memories {
    pub(super) host: Arc<SessionMemory>,
    /// A GPU that was demoted stays in the list, behind it what replaced it: the client still holds tensors there.
    gpus: RwLock<Vec<SessionGpu>>,
}

impl Memories {
    pub(super) fn new(host: Arc<SessionMemory>) -> Self {
        Self { host, gpus: RwLock::default() }
    }

    /// Adds an opening; its number.
    pub(super) fn add(&self, gpu: SessionGpu) -> u32 {
        let mut gpus = self.gpus.write();
        gpus.push(gpu);
        (gpus.len() - 1) as u32
    }

    /// How often GPUs were opened.
    pub(super) fn opened_gpus(&self) -> usize {
        self.gpus.read().len()
    }

    /// The memory that is shared in an opening.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where no memory of this GPU is shared.
    pub(super) fn shared_gpu(&self, target: GpuTarget) -> Result<SharedGpu> {
        let GpuTarget { gpu, opening } = target;
        let gpus = self.gpus.read();
        let opened = gpus.get(opening as usize).filter(|one| one.gpu == gpu);
        opened.and_then(|one| one.shared.clone()).ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                format!("this session shares no memory of {gpu} with the broker"),
                "open the GPU first, or take the result in host memory",
            )
        })
    }

    /// Rungs of the GPUs in use now.
    pub(super) fn gpu_rungs(&self) -> Vec<DeviceRung> {
        let gpus = self.gpus.read();
        let mut rungs: Vec<&DeviceRung> = Vec::new();
        for gpu in gpus.iter().rev() {
            if rungs.iter().all(|rung| rung.device != gpu.rung.device) {
                rungs.push(&gpu.rung);
            }
        }
        rungs.into_iter().rev().cloned().collect()
    }

    /// The memory that a lease is of, and the queue beside it. The host's where no GPU's is: it answers that the lease
    /// is stale.
    fn of(&self, lease: LeaseRef) -> (Arc<SessionMemory>, Option<Arc<dyn CopyStream>>) {
        let gpus = self.gpus.read();
        let shared = gpus.iter().filter_map(|gpu| gpu.shared.as_ref()).find(|shared| shared.memory.granted(lease));
        match shared {
            Some(shared) => (Arc::clone(&shared.memory), Some(Arc::clone(&shared.queue))),
            None => (Arc::clone(&self.host), None),
        }
    }

    /// The memory a client's descriptor refers to, held for a job, and the queue of its GPU.
    ///
    /// # Errors
    /// As [`SessionMemory::resolve`].
    pub(super) fn resolve(&self, descriptor: &Descriptor) -> Result<(Held, Option<Arc<dyn CopyStream>>)> {
        let (memory, queue) = self.of(descriptor.lease);
        Ok((memory.resolve(descriptor)?, queue))
    }

    pub(super) fn release(&self, releases: &[Release]) {
        for release in releases {
            self.of(release.lease).0.release(release);
        }
    }

    pub(super) fn announce(&self, lease: LeaseRef, attachments: &mut Vec<Attachment>) -> Option<ArenaOffer> {
        self.of(lease).0.announce(lease.arena, attachments)
    }

    /// The client has an arena mapped. Arenas of GPUs have no names that could go.
    pub(super) fn opened(&self, arena: ArenaId) {
        self.host.opened(arena);
    }

    /// Whether the client may still be using GPU memory that others get after it.
    pub(super) fn holds_gpu_memory(&self) -> bool {
        let gpus = self.gpus.read();
        gpus.iter().filter_map(|gpu| gpu.shared.as_ref()).any(|shared| shared.memory.counts().leased_bytes > 0)
    }

    pub(super) fn reap(&self) {
        self.host.reap();
        for gpu in self.gpus.read().iter() {
            if let Some(shared) = &gpu.shared {
                shared.memory.reap();
            }
        }
    }

    /// Everything together.
    pub(super) fn counts(&self) -> MemoryCounts {
        let gpus = self.gpus.read();
        let shared = gpus.iter().filter_map(|gpu| gpu.shared.as_ref());
        shared.fold(self.host.counts(), |sum, shared| {
            let more = shared.memory.counts();
            MemoryCounts {
                leases: sum.leases + more.leases,
                input_slots: sum.input_slots + more.input_slots,
                leased_bytes: sum.leased_bytes + more.leased_bytes,
                // Arenas of a GPU are everybody's, and are told of with the GPU.
                arena_bytes: sum.arena_bytes,
            }
        })
    }
}
