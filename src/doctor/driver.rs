//! What the CUDA driver tells this process.

use super::gpu::{Driven, GpuFacts};
use crate::device::NoDriver;
use crate::device::cuda::Driver;

/// Asks the driver; no GPU memory is occupied.
pub(super) fn look() -> Result<Driven, NoDriver> {
    let driver = Driver::find()?;
    let gpus = driver.gpus().iter().map(|gpu| GpuFacts {
        uuid: gpu.uuid,
        ordinal: gpu.ordinal,
        name: gpu.name.clone(),
        memory_bytes: gpu.memory_bytes,
        compute: driver.compute_capability(gpu.uuid),
        is_mig: gpu.is_mig(),
        is_integrated: driver.is_integrated(gpu.uuid) == Some(true),
        events: driver.supports_ipc_events(gpu.uuid),
        descriptors: driver.supports_vmm_export(gpu.uuid),
    });
    Ok(Driven { version: driver.version(), gpus: gpus.collect() })
}
