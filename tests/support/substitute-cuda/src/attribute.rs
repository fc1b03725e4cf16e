//! `cuDeviceGetAttribute`. Attributes claim support even where a fault refuses it: programs must probe, not ask.

use std::ffi::c_int;

use crate::abi::{Out, call};
use crate::code::{INVALID_VALUE, Result};
use crate::device;

/// Numbers of `CUdevice_attribute` that a program which only moves bytes asks for.
fn value(attribute: c_int, slot: usize) -> Result<c_int> {
    Ok(match attribute {
        // Threads, block sizes and warp of a device that runs no kernels: what every recent GPU says.
        1 => 1024,
        10 => 32,
        16 => 1,
        // Host memory can be mapped, kernels run concurrently, two copy engines, one address space.
        19 | 31 | 41 => 1,
        40 => 2,
        // Bus, device and domain differ for each GPU.
        33 => slot as c_int + 1,
        // Compute capability.
        75 => 9,
        76 => 0,
        // Host registration; virtual memory management; POSIX file descriptors; pools; interprocess events.
        99 | 102 | 103 | 115 | 125 => 1,
        other if (2..=150).contains(&other) => 0,
        _ => return Err(INVALID_VALUE),
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetAttribute(out: Out<c_int>, attribute: c_int, device: c_int) -> c_int {
    call(|| out.fill(|| value(attribute, device::get(device::ordinal(device)?)?.slot)))
}
