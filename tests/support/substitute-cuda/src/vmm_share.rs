//! Physical memory as a file descriptor, which crosses between processes over a Unix socket.

use std::ffi::{c_int, c_ulonglong, c_void};
use std::os::fd::{BorrowedFd, IntoRawFd, RawFd};
use std::sync::Arc;

use crate::abi::{Out, call};
use crate::code::{INVALID_VALUE, NOT_SUPPORTED, OUT_OF_MEMORY, Result};
use crate::device;
use crate::faults::faults;
use crate::vmm::{self, POSIX_FD, Physical};

fn export(handle: u64, handle_type: c_int, flags: c_ulonglong) -> Result<RawFd> {
    device::all()?;
    if faults().vmm_refused {
        return Err(NOT_SUPPORTED);
    }
    let physical = vmm::get(handle)?;
    if handle_type != POSIX_FD || physical.handle_types & POSIX_FD == 0 || flags != 0 {
        return Err(INVALID_VALUE);
    }
    Ok(physical.file.try_clone().map_err(|_| OUT_OF_MEMORY)?.into_raw_fd())
}

/// The caller keeps its descriptor and may close it at once.
fn import(file: RawFd, handle_type: c_int) -> Result<u64> {
    device::all()?;
    if faults().import.fails() {
        return Err(NOT_SUPPORTED);
    }
    if handle_type != POSIX_FD || file < 0 {
        return Err(INVALID_VALUE);
    }
    // SAFETY: borrowed for this call only, during which the caller keeps the descriptor open; if it is not open, cloning
    // it fails.
    let file = unsafe { BorrowedFd::borrow_raw(file) }.try_clone_to_owned().map_err(|_| INVALID_VALUE)?;
    Physical::import(file).map(|physical| vmm::insert(Arc::new(physical)))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemExportToShareableHandle(
    out: Out<c_void>,
    handle: u64,
    handle_type: c_int,
    flags: c_ulonglong,
) -> c_int {
    call(|| out.cast::<c_int>().fill(|| export(handle, handle_type, flags)))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemImportFromShareableHandle(out: Out<u64>, file: usize, handle_type: c_int) -> c_int {
    call(|| out.fill(|| import(RawFd::try_from(file).map_err(|_| INVALID_VALUE)?, handle_type)))
}
