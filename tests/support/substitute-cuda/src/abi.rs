//! What crosses the C boundary: pointers of the caller, structs by value, and the fence against panics.

use std::ffi::{c_int, c_uint, c_ushort, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::code::{INVALID_VALUE, Result, UNKNOWN};

/// Handles of the driver (contexts, streams, events) are opaque to the caller; here they are numbers.
pub(crate) type Opaque = usize;
/// An address in device memory.
pub(crate) type DevicePointer = u64;

/// Where the caller wants a value. NULL is answered with `INVALID_VALUE`.
#[repr(transparent)]
pub(crate) struct Out<T>(*mut T);

impl<T> Out<T> {
    pub(crate) fn put(&self, value: T) -> Result {
        self.fill(|| Ok(value))
    }

    /// Nothing is made when there is nowhere to put it.
    pub(crate) fn fill(&self, make: impl FnOnce() -> Result<T>) -> Result {
        if self.0.is_null() {
            return Err(INVALID_VALUE);
        }
        let value = make()?;
        // SAFETY: the driver's contract: an output pointer is NULL, excluded above, or valid for one write of its type.
        unsafe { self.0.write_unaligned(value) };
        Ok(())
    }

    /// For outputs that the caller may leave out.
    pub(crate) fn offer(&self, value: T) {
        // The only failure is that the caller does not want it.
        let _ = self.put(value);
    }

    pub(crate) fn cast<U>(self) -> Out<U> {
        Out(self.0.cast())
    }
}

/// What the caller shows: `count` values of a type.
#[repr(transparent)]
pub(crate) struct In<T>(*const T);

impl<T: Copy> In<T> {
    pub(crate) fn get(&self, at: usize) -> Result<T> {
        if self.0.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the driver's contract: an input pointer is NULL, excluded above, or holds as many values as the call
        // says; callers of this function stay below that number.
        Ok(unsafe { self.0.add(at).read_unaligned() })
    }
}

/// 64 opaque bytes, passed by value: `CUipcMemHandle` and `CUipcEventHandle`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Bytes64(pub(crate) [u8; 64]);

/// `CUuuid`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Bytes16(pub(crate) [u8; 16]);

/// `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Location {
    pub(crate) kind: c_int,
    pub(crate) id: c_int,
}

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct AllocationProperties {
    pub(crate) kind: c_int,
    pub(crate) handle_types: c_int,
    pub(crate) location: Location,
    pub(crate) win32_metadata: *mut c_void,
    pub(crate) compression: u8,
    pub(crate) rdma: u8,
    pub(crate) usage: c_ushort,
    pub(crate) reserved: [u8; 4],
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct AccessDescription {
    pub(crate) location: Location,
    pub(crate) flags: c_uint,
}

/// Runs the body of an exported function; a panic in it is a bug here and must not unwind into C.
pub(crate) fn call(body: impl FnOnce() -> Result) -> c_int {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => 0,
        Ok(Err(code)) => code.0,
        Err(_) => UNKNOWN.0,
    }
}
