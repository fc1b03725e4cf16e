use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use parking_lot::Mutex;

use super::pool::{ArenaPool, Growth, Limits};
use crate::config::BrokerConfig;
use crate::device::cuda::{Driver, Fence};
use crate::device::{
    CopyStream, CudaDevice, CudaSharing, Device, DeviceError, HostDevice, LockBudget, Order, PageLock, Region,
};
use crate::id::GpuUuid;
use crate::protocol::Rung;

/// How much later the marked nonce is written: long enough that a client that does not wait reads the old bytes.
const PROBE_DELAY: Duration = Duration::from_millis(5);

/// Bytes of the page that counts marks.
const PAGE_BYTES: usize = 4096;

/// The GPU that this broker's models run on, and the tensor memory there that all sessions share.
#[derive(Debug)]
pub(super) struct BrokerGpu {
    uuid: GpuUuid,
    limits: Limits,
    arena_ids: Arc<AtomicU32>,
    pinned: Arc<LockBudget>,
    plain: Pool,
    /// Made when the first client needs it.
    descriptors: Mutex<Option<Pool>>,
}

#[derive(Debug, Clone)]
struct Pool {
    device: Arc<CudaDevice>,
    arenas: Arc<ArenaPool>,
}

/// Marks between two processes, with what the client opens them by.
pub(super) struct Marks {
    pub(super) order: Arc<dyn Order>,
    pub(super) page: Arc<dyn Region>,
    pub(super) events: Vec<u8>,
}

impl BrokerGpu {
    /// The GPU that the settings name; `None` for the CPU.
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`], [`DeviceError::UnknownGpu`], [`DeviceError::Cuda`].
    pub(super) fn open(config: &BrokerConfig, arena_ids: &Arc<AtomicU32>) -> Result<Option<Self>, DeviceError> {
        let wanted = config.tensor_device();
        if wanted.eq_ignore_ascii_case("cpu") {
            return Ok(None);
        }
        let uuid = Driver::get()?.named(wanted)?.uuid;
        let limits = Limits {
            arena: config.gpu_arena_bytes,
            total: config.gpu_bytes,
            session: config.session_bytes,
            setting: "--gpu-bytes",
            growth: Growth::Doubling,
        };
        let plain = Pool::open(uuid, CudaSharing::Ipc, limits, arena_ids)?;
        tracing::info!(gpu = %uuid, name = plain.device.gpu().name, "tensors are shared on this GPU");
        Ok(Some(Self {
            uuid,
            limits,
            arena_ids: Arc::clone(arena_ids),
            pinned: Arc::new(LockBudget::new(config.pinned_bytes)),
            plain,
            descriptors: Mutex::default(),
        }))
    }

    pub(super) fn uuid(&self) -> GpuUuid {
        self.uuid
    }

    /// Whether `gpu` is another one that reaches this one's memory.
    pub(super) fn is_reached_from(&self, gpu: GpuUuid) -> bool {
        Driver::get().is_ok_and(|driver| driver.can_access_peer(gpu, self.uuid))
    }

    fn pool(&self, rung: Rung) -> Result<Pool, DeviceError> {
        if rung != Rung::CudaVmm {
            return Ok(self.plain.clone());
        }
        let mut made = self.descriptors.lock();
        if let Some(pool) = &*made {
            return Ok(pool.clone());
        }
        let pool = Pool::open(self.uuid, CudaSharing::Vmm, self.limits, &self.arena_ids)?;
        Ok(made.insert(pool).clone())
    }

    /// The arenas that are handed over on this rung.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub(super) fn arenas(&self, rung: Rung) -> Result<Arc<ArenaPool>, DeviceError> {
        Ok(self.pool(rung)?.arenas)
    }

    /// Memory for weights: of the kind that outlives the broker and that others can be given for reading alone, or plain
    /// memory where the driver hands that kind to nobody.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], [`DeviceError::Cuda`].
    pub(super) fn weight_memory(&self, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError> {
        let readable = CudaDevice::open(self.uuid, CudaSharing::Vmm).and_then(|device| device.allocate(size_bytes));
        match readable {
            Err(DeviceError::Cuda { call, code, name }) => {
                tracing::warn!(call, code, name, "weights lie in plain GPU memory, which every client can write to");
                self.plain.device.allocate(size_bytes)
            }
            done => done,
        }
    }

    /// Bytes of all tensor arenas.
    pub(super) fn arena_bytes(&self) -> u64 {
        let descriptors = self.descriptors.lock().as_ref().map_or(0, |pool| pool.arenas.arena_bytes());
        self.plain.arenas.arena_bytes() + descriptors
    }

    /// Bytes of the GPU's memory, where the driver says.
    pub(super) fn memory_bytes(&self) -> Option<u64> {
        self.plain.device.free_and_total_bytes().ok().map(|(_, total)| total)
    }

    /// A stream for work that needs no lane.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub(super) fn queue(&self) -> Result<Arc<dyn CopyStream>, DeviceError> {
        Ok(Arc::new(self.plain.device.stream()?))
    }

    /// Marks for one session.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] where the driver shares no events.
    pub(super) fn marks(&self) -> Result<Marks, DeviceError> {
        let page = HostDevice::default().allocate(PAGE_BYTES)?;
        let fence = Fence::create(&self.plain.device, Arc::clone(&page))?;
        let events = fence.handle()?.to_bytes();
        Ok(Marks { order: Arc::new(fence), page, events })
    }

    /// Locks pages of host memory for copies of this GPU, as many as all sessions together may have locked.
    pub(super) fn page_lock(&self) -> PageLock {
        self.plain.device.page_lock(Some(Arc::clone(&self.pinned)))
    }

    /// What is enqueued on `queue` from now on runs late enough for a probe to notice.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub(super) fn delay(&self, queue: &dyn CopyStream) -> Result<(), DeviceError> {
        self.plain.device.delay(queue.handle(), PROBE_DELAY)
    }
}

impl Pool {
    fn open(
        gpu: GpuUuid,
        sharing: CudaSharing,
        limits: Limits,
        arena_ids: &Arc<AtomicU32>,
    ) -> Result<Self, DeviceError> {
        let device = CudaDevice::open(gpu, sharing)?;
        let arenas = ArenaPool::new(Arc::clone(&device) as Arc<dyn Device>, limits, Arc::clone(arena_ids));
        Ok(Self { device, arenas: Arc::new(arenas) })
    }
}
