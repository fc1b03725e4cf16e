//! The CUDA device on the substitute driver: what a process sees, regions that cross, and order between two processes.
#![cfg(all(feature = "cuda", target_os = "linux"))]

#[path = "../support/cuda.rs"]
mod cuda;
#[path = "../support/roles.rs"]
mod roles;

mod driver;
mod fences;
mod regions;
mod work;

use std::sync::Arc;

use luna_broker::device::cuda::{CudaDevice, CudaSharing, Driver};
use luna_broker::device::{Device, DeviceError, Region};

const MIB: usize = 1 << 20;

/// The first GPU this process sees.
fn device(sharing: CudaSharing) -> Arc<CudaDevice> {
    CudaDevice::open(Driver::get().unwrap().gpus()[0].uuid, sharing).unwrap()
}

fn region(device: &CudaDevice) -> Arc<dyn Region> {
    device.allocate(2 * MIB).unwrap()
}

fn read(region: &Arc<dyn Region>, offset: usize, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xaa; length];
    region.copy_out(offset, &mut bytes).unwrap();
    bytes
}

/// Bytes that no earlier call returned.
fn fresh(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    getrandom::fill(&mut bytes).unwrap();
    bytes
}

/// The driver's code in an error, and the call that it answered.
fn refused<T: std::fmt::Debug>(result: Result<T, DeviceError>) -> (&'static str, u32) {
    match result {
        Err(DeviceError::Cuda { call, code, .. }) => (call, code),
        other => panic!("the driver did not refuse: {other:?}"),
    }
}

/// What the substitute driver holds for this process.
#[derive(Debug, PartialEq, Eq)]
struct Live {
    allocations: u64,
    registered: u64,
    imports: u64,
    mappings: u64,
    vmm_handles: u64,
    reserved: u64,
    events: u64,
    opened_events: u64,
    contexts: u64,
}

/// `None` on a real driver, which does not count.
fn live() -> Option<Live> {
    if cuda::is_real() {
        return None;
    }
    let counts = cuda::counters("substituteCudaLive");
    let [allocations, _, registered, imports, mappings, vmm_handles, reserved, events, opened_events, _, contexts] =
        counts;
    Some(Live { allocations, registered, imports, mappings, vmm_handles, reserved, events, opened_events, contexts })
}

/// How many of some kinds the driver holds, where it can be asked: `assert_live!(imports: 1)`.
macro_rules! assert_live {
    ($($kind:ident: $count:expr),+) => {
        if let Some(live) = crate::live() {
            $(assert_eq!(live.$kind, $count, stringify!($kind));)+
        }
    };
}
use assert_live;
