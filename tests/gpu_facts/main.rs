//! What no document says of a GPU: what opening costs, what is left when a process dies, how order holds under load.
//!
//! Each test prints what it found as a line of JSON behind the word `FACT`; `make gpu-check` collects the lines where
//! there is a GPU. On the substitute driver, with small sizes, only the asking is tested.
#![cfg(all(feature = "cuda", target_os = "linux"))]

#[path = "../support/cuda.rs"]
mod cuda;
#[path = "../support/roles.rs"]
mod roles;

mod access;
mod death;
mod opening;
mod order;

use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use luna_broker::device::cuda::{CudaDevice, CudaSharing, Driver};
use luna_broker::device::{DeviceError, Region, RegionHandle};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;

/// One thing on a real driver, another on the substitute: sizes, rounds, pauses.
fn real_or<T>(real: T, substitute: T) -> T {
    if cuda::is_real() { real } else { substitute }
}

/// Says what was found.
fn fact(name: &str, found: &Value) {
    let line = format!("FACT {}\n", json!({ "fact": name, "found": found }));
    // One call to the system: two processes may speak at a time, and the harness must not keep the line to itself.
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}

/// How a call went, in the driver's words where it refused.
fn said<T>(result: &Result<T, DeviceError>) -> String {
    result.as_ref().map_or_else(ToString::to_string, |_| "ok".to_owned())
}

fn name(sharing: CudaSharing) -> &'static str {
    match sharing {
        CudaSharing::Ipc => "legacy",
        CudaSharing::Vmm => "vmm",
    }
}

/// The first GPU this process sees.
fn device(sharing: CudaSharing) -> Arc<CudaDevice> {
    CudaDevice::open(Driver::get().unwrap().gpus()[0].uuid, sharing).unwrap()
}

fn read(region: &Arc<dyn Region>, offset: usize, length: usize) -> Result<Vec<u8>, DeviceError> {
    let mut bytes = vec![0xaa; length];
    region.copy_out(offset, &mut bytes).map(|()| bytes)
}

/// Bytes that no earlier call returned.
fn fresh(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

/// The same handle a second time.
fn twice(handle: RegionHandle) -> [RegionHandle; 2] {
    match handle {
        RegionHandle::CudaIpc(handle) => [RegionHandle::CudaIpc(handle), RegionHandle::CudaIpc(handle)],
        RegionHandle::CudaVmm(fd) => [RegionHandle::CudaVmm(fd.try_clone().unwrap()), RegionHandle::CudaVmm(fd)],
        other => panic!("{other:?} is no handle of the driver's"),
    }
}

fn microseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e6
}

/// To a hundredth: what is finer is the clock's.
fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    rounded(times[times.len() / 2])
}

fn rounded(time: f64) -> f64 {
    (time * 100.0).round() / 100.0
}
