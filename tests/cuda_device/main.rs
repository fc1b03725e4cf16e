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

use std::ffi::{CString, c_char, c_int, c_void};
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

unsafe extern "C" {
    fn dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// A function of the driver, for what the library under test has no business to tell.
fn driver_function(name: &str) -> *mut c_void {
    let name = CString::new(name).unwrap();
    // SAFETY: the name ends in a NUL; the driver is loaded already, so that its constructors do not run again.
    let library = unsafe { dlopen(c"libcuda.so".as_ptr(), 2) };
    assert!(!library.is_null());
    // SAFETY: an open library and a name that ends in a NUL.
    let function = unsafe { dlsym(library, name.as_ptr()) };
    assert!(!function.is_null(), "{name:?}");
    function
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
    let function = driver_function("substituteCudaLive");
    // SAFETY: the substitute's function has this signature.
    let function: extern "C" fn(*mut u64, usize) -> usize = unsafe { std::mem::transmute(function) };
    let mut counts = [0; 11];
    assert_eq!(function(counts.as_mut_ptr(), counts.len()), counts.len());
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
