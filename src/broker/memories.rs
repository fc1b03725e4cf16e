use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;

use super::memory::{Held, MemoryCounts, SessionMemory};
use super::staging::Staging;
use super::state::State;
use crate::device::{CopyStream, HostSharing};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{ArenaId, GpuUuid, LeaseRef};
use crate::protocol::{ArenaOffer, Descriptor, DeviceRung, GpuTarget, Release, SlotPlace};
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

/// Where slots of one place come from.
pub(super) struct SlotSource {
    pub(super) memory: Arc<SessionMemory>,
    /// For work on it; absent for the host's.
    pub(super) queue: Option<Arc<dyn CopyStream>>,
}

/// All tensor memory of a session: the host's, and that of GPUs as they are opened.
#[derive(Debug)]
pub(super) struct Memories {
    pub(super) host: Arc<SessionMemory>,
    /// How the host's memory is shared; absent where it does not cross processes.
    sharing: Option<HostSharing>,
    /// Made for the first tensor that passes through.
    staging: OnceLock<Staging>,
    /// A GPU that was demoted stays in the list, behind it what replaced it: the client still holds tensors there.
    gpus: RwLock<Vec<SessionGpu>>,
}

impl Memories {
    pub(super) fn new(host: Arc<SessionMemory>, sharing: Option<HostSharing>) -> Self {
        Self { host, sharing, staging: OnceLock::new(), gpus: RwLock::default() }
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

    /// The memory that slots of this place come from.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the session has none.
    pub(super) fn source(&self, state: &State, place: SlotPlace) -> Result<SlotSource> {
        Ok(match place {
            SlotPlace::Host => SlotSource { memory: Arc::clone(&self.host), queue: None },
            SlotPlace::Staging(target) => SlotSource { memory: self.staging(state, target)?, queue: None },
            SlotPlace::Gpu(target) => {
                let SharedGpu { memory, queue } = self.shared_gpu(target)?;
                SlotSource { memory, queue: Some(queue) }
            }
        })
    }

    /// The memory that is shared in an opening.
    pub(super) fn shared_gpu(&self, target: GpuTarget) -> Result<SharedGpu> {
        self.opening(target).flatten().ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                format!("this session shares no memory of {} with the broker", target.gpu),
                "open the GPU first, or take the result in host memory",
            )
        })
    }

    /// What is shared in an opening; `None` where there is no such opening.
    fn opening(&self, target: GpuTarget) -> Option<Option<SharedGpu>> {
        let gpus = self.gpus.read();
        let opened = gpus.get(target.opening as usize).filter(|one| one.gpu == target.gpu);
        opened.map(|opened| opened.shared.clone())
    }

    /// The host memory that tensors of an opening's GPU pass through; made with the first of them. An error where there
    /// is no such opening, where it shares GPU memory, or where the session shares none of the host's.
    fn staging(&self, state: &State, target: GpuTarget) -> Result<Arc<SessionMemory>> {
        let (Some(None), Some(sharing)) = (self.opening(target), self.sharing) else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("tensors of {} do not pass through shared host memory in this session", target.gpu),
                "open the GPU first, and take the rung that it got",
            ));
        };
        let staging = self.staging.get_or_init(|| Staging::new(state, &self.host, sharing, target.gpu));
        Ok(Arc::clone(&staging.memory))
    }

    /// Rungs of the GPUs in use now.
    pub(super) fn gpu_rungs(&self) -> Vec<DeviceRung> {
        let gpus = self.gpus.read();
        let pages = self.staging.get().and_then(Staging::pages);
        let mut rungs: Vec<DeviceRung> = Vec::new();
        for gpu in gpus.iter().rev() {
            if rungs.iter().all(|rung| rung.device != gpu.rung.device) {
                let pages = pages.clone().filter(|_| gpu.shared.is_none());
                rungs.push(DeviceRung { pages, ..gpu.rung.clone() });
            }
        }
        rungs.reverse();
        rungs
    }

    /// The memory that a lease is of, and the queue beside it. The host's where no GPU's is: it answers that the lease
    /// is stale.
    fn of(&self, lease: LeaseRef) -> (Arc<SessionMemory>, Option<Arc<dyn CopyStream>>) {
        let gpus = self.gpus.read();
        let shared = gpus.iter().filter_map(|gpu| gpu.shared.as_ref()).find(|shared| shared.memory.granted(lease));
        match shared {
            Some(shared) => (Arc::clone(&shared.memory), Some(Arc::clone(&shared.queue))),
            None => (Arc::clone(self.of_host(lease.arena)), None),
        }
    }

    /// The host memory that an arena is of.
    fn of_host(&self, arena: ArenaId) -> &Arc<SessionMemory> {
        let staging = self.staging.get().map(|staging| &staging.memory).filter(|memory| memory.has(arena));
        staging.unwrap_or(&self.host)
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
        self.of_host(arena).opened(arena);
    }

    /// Whether the client may still be using GPU memory that others get after it.
    pub(super) fn holds_gpu_memory(&self) -> bool {
        let gpus = self.gpus.read();
        gpus.iter().filter_map(|gpu| gpu.shared.as_ref()).any(|shared| shared.memory.counts().leased_bytes > 0)
    }

    pub(super) fn reap(&self) {
        // First what others wait for; unmapping the session's own memory takes longer.
        for gpu in self.gpus.read().iter() {
            if let Some(shared) = &gpu.shared {
                shared.memory.reap();
            }
        }
        self.host.reap();
        if let Some(staging) = self.staging.get() {
            staging.memory.reap();
        }
    }

    /// Everything together.
    pub(super) fn counts(&self) -> MemoryCounts {
        let gpus = self.gpus.read();
        // Arenas of a GPU are everybody's, and are told of with the GPU.
        let shared = gpus.iter().filter_map(|gpu| gpu.shared.as_ref());
        let shared = shared.map(|shared| MemoryCounts { arena_bytes: 0, ..shared.memory.counts() });
        let own = self.staging.get().map(|staging| staging.memory.counts());
        own.into_iter().chain(shared).fold(self.host.counts(), |sum, more| MemoryCounts {
            leases: sum.leases + more.leases,
            input_slots: sum.input_slots + more.input_slots,
            leased_bytes: sum.leased_bytes + more.leased_bytes,
            arena_bytes: sum.arena_bytes + more.arena_bytes,
        })
    }
}
