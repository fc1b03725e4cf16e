use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::io;
use std::sync::OnceLock;

use cudarc::driver::sys;

use crate::device::{DeviceError, NoDriver};

const SUCCESS: u32 = 0;
const OUT_OF_MEMORY: u32 = 2;
/// The driver is being torn down with the process; it frees everything itself.
const DEINITIALIZED: u32 = 4;
/// A mapping could not be made.
pub(super) const MAP_FAILED: u32 = 205;
const NOT_READY: u32 = 600;

/// The functions of libcuda that this module calls, looked up once and together.
///
/// The bindings' own functions look themselves up at the first call, panic where that fails, and return an enum, for
/// which a code that a newer driver invented would be undefined behaviour. So only their library and types are used.
macro_rules! functions {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {
        #[allow(non_snake_case, reason = "the names of cuda.h")]
        #[derive(Debug)]
        pub(super) struct Api {
            $($name: unsafe extern "C" fn($($type),*) -> u32,)*
        }

        #[allow(non_snake_case, dead_code, reason = "some are called through the table, for their code")]
        impl Api {
            fn load() -> Result<Self, NoDriver> {
                // SAFETY: the constructors of libcuda are those of the library that CUDA programs load.
                if !unsafe { sys::is_culib_present() } {
                    return Err(NoDriver::NoLibrary);
                }
                // SAFETY: present a moment ago; kept loaded from here on.
                let library = unsafe { sys::culib() };
                Ok(Self {
                    $($name: {
                        // SAFETY: the signature is the one that cuda.h declares for this name.
                        let symbol = unsafe {
                            library.get::<unsafe extern "C" fn($($type),*) -> u32>(
                                concat!(stringify!($name), "\0").as_bytes(),
                            )
                        };
                        *symbol.map_err(|_| NoDriver::NoFunction { name: stringify!($name) })?
                    },)*
                })
            }

            $(
                /// # Safety
                /// What cuda.h asks of the arguments, pointers above all.
                pub(super) unsafe fn $name(&self, $($argument: $type),*) -> Result<(), DeviceError> {
                    // SAFETY: passed on to the caller.
                    let code = unsafe { (self.$name)($($argument),*) };
                    self.check(stringify!($name), code)
                }
            )*
        }
    };
}

functions! {
    cuInit(flags: c_uint);
    cuDriverGetVersion(version: *mut c_int);
    cuGetErrorName(code: u32, name: *mut *const c_char);

    cuDeviceGetCount(count: *mut c_int);
    cuDeviceGet(device: *mut sys::CUdevice, ordinal: c_int);
    cuDeviceGetName(name: *mut c_char, length: c_int, device: sys::CUdevice);
    cuDeviceGetUuid_v2(uuid: *mut sys::CUuuid, device: sys::CUdevice);
    cuDeviceGetAttribute(value: *mut c_int, attribute: u32, device: sys::CUdevice);
    cuDeviceTotalMem_v2(bytes: *mut usize, device: sys::CUdevice);
    cuDeviceCanAccessPeer(can: *mut c_int, from: sys::CUdevice, to: sys::CUdevice);
    cuDevicePrimaryCtxRetain(context: *mut sys::CUcontext, device: sys::CUdevice);
    cuDevicePrimaryCtxRelease_v2(device: sys::CUdevice);
    cuCtxGetCurrent(context: *mut sys::CUcontext);
    cuCtxSetCurrent(context: sys::CUcontext);
    cuCtxSynchronize();

    cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    cuMemAlloc_v2(address: *mut sys::CUdeviceptr, bytes: usize);
    cuMemFree_v2(address: sys::CUdeviceptr);
    cuMemGetAddressRange_v2(base: *mut sys::CUdeviceptr, bytes: *mut usize, address: sys::CUdeviceptr);
    cuMemHostRegister_v2(address: *mut c_void, bytes: usize, flags: c_uint);
    cuMemHostUnregister(address: *mut c_void);
    cuMemcpyHtoDAsync_v2(to: sys::CUdeviceptr, from: *const c_void, bytes: usize, stream: sys::CUstream);
    cuMemcpyDtoHAsync_v2(to: *mut c_void, from: sys::CUdeviceptr, bytes: usize, stream: sys::CUstream);
    cuMemcpyDtoDAsync_v2(to: sys::CUdeviceptr, from: sys::CUdeviceptr, bytes: usize, stream: sys::CUstream);
    cuMemsetD8Async(address: sys::CUdeviceptr, value: u8, bytes: usize, stream: sys::CUstream);

    cuIpcGetMemHandle(handle: *mut sys::CUipcMemHandle, address: sys::CUdeviceptr);
    cuIpcOpenMemHandle_v2(address: *mut sys::CUdeviceptr, handle: sys::CUipcMemHandle, flags: c_uint);
    cuIpcCloseMemHandle(address: sys::CUdeviceptr);
    cuIpcGetEventHandle(handle: *mut sys::CUipcEventHandle, event: sys::CUevent);
    cuIpcOpenEventHandle(event: *mut sys::CUevent, handle: sys::CUipcEventHandle);

    cuMemGetAllocationGranularity(bytes: *mut usize, properties: *const sys::CUmemAllocationProp, option: u32);
    cuMemCreate(
        handle: *mut sys::CUmemGenericAllocationHandle,
        bytes: usize,
        properties: *const sys::CUmemAllocationProp,
        flags: c_ulonglong
    );
    cuMemRelease(handle: sys::CUmemGenericAllocationHandle);
    cuMemAddressReserve(
        address: *mut sys::CUdeviceptr,
        bytes: usize,
        alignment: usize,
        hint: sys::CUdeviceptr,
        flags: c_ulonglong
    );
    cuMemAddressFree(address: sys::CUdeviceptr, bytes: usize);
    cuMemMap(
        address: sys::CUdeviceptr,
        bytes: usize,
        offset: usize,
        handle: sys::CUmemGenericAllocationHandle,
        flags: c_ulonglong
    );
    cuMemUnmap(address: sys::CUdeviceptr, bytes: usize);
    cuMemSetAccess(address: sys::CUdeviceptr, bytes: usize, access: *const sys::CUmemAccessDesc, count: usize);
    cuMemExportToShareableHandle(
        shareable: *mut c_void,
        handle: sys::CUmemGenericAllocationHandle,
        kind: u32,
        flags: c_ulonglong
    );
    cuMemImportFromShareableHandle(
        handle: *mut sys::CUmemGenericAllocationHandle,
        shareable: *mut c_void,
        kind: u32
    );

    cuStreamCreate(stream: *mut sys::CUstream, flags: c_uint);
    cuStreamDestroy_v2(stream: sys::CUstream);
    cuStreamSynchronize(stream: sys::CUstream);
    cuStreamWaitEvent(stream: sys::CUstream, event: sys::CUevent, flags: c_uint);
    cuLaunchHostFunc(stream: sys::CUstream, function: sys::CUhostFn, argument: *mut c_void);
    cuEventCreate(event: *mut sys::CUevent, flags: c_uint);
    cuEventRecord(event: sys::CUevent, stream: sys::CUstream);
    cuEventQuery(event: sys::CUevent);
    cuEventSynchronize(event: sys::CUevent);
    cuEventDestroy_v2(event: sys::CUevent);
}

impl Api {
    /// The functions, looked up and `cuInit` called at the first use in this process.
    ///
    /// # Errors
    /// The same at every call.
    pub(super) fn get() -> Result<&'static Self, NoDriver> {
        static API: OnceLock<Result<Api, NoDriver>> = OnceLock::new();
        let loaded = API.get_or_init(|| {
            let api = Self::load()?;
            // SAFETY: a plain call; 0 is the only flag there is.
            match unsafe { (api.cuInit)(0) } {
                SUCCESS => Ok(api),
                code => Err(NoDriver::NoStart { code, name: api.name(code) }),
            }
        });
        loaded.as_ref().map_err(Clone::clone)
    }

    /// Whether the work before the newest record of an event is done.
    ///
    /// # Safety
    /// The event must exist.
    pub(super) unsafe fn is_done(&self, event: sys::CUevent) -> Result<bool, DeviceError> {
        // SAFETY: passed on to the caller.
        match unsafe { (self.cuEventQuery)(event) } {
            NOT_READY => Ok(false),
            code => self.check("cuEventQuery", code).map(|()| true),
        }
    }

    fn check(&self, call: &'static str, code: u32) -> Result<(), DeviceError> {
        match code {
            SUCCESS => Ok(()),
            OUT_OF_MEMORY => Err(DeviceError::OutOfMemory {
                what: "GPU memory",
                size_bytes: 0,
                cause: io::Error::other(format!("{call} answers {code} {}", self.name(code))),
            }),
            code => Err(DeviceError::Cuda { call, code, name: self.name(code) }),
        }
    }

    fn name(&self, code: u32) -> String {
        let mut name = std::ptr::null();
        // SAFETY: the out-pointer is valid for the call.
        if unsafe { (self.cuGetErrorName)(code, &raw mut name) } != SUCCESS || name.is_null() {
            return "(a code without a name)".to_owned();
        }
        // SAFETY: on success the driver answers with a constant, NUL-terminated string.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }
}

/// Tells of a failed clean-up. Nothing can be done about it: the driver keeps what it did not take back until exit.
pub(super) fn note_failure(result: Result<(), DeviceError>) {
    match result {
        Ok(()) | Err(DeviceError::Cuda { code: DEINITIALIZED, .. }) => {}
        Err(error) => tracing::warn!(%error, "the driver did not take something back"),
    }
}

/// An object of the driver's.
pub(super) struct Raw<T>(pub(super) *mut T);

impl<T> Clone for Raw<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Raw<T> {}

impl<T> std::fmt::Debug for Raw<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

// SAFETY: never dereferenced here, only handed to the driver, whose calls may come from any thread.
unsafe impl<T> Send for Raw<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Raw<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_is_told_so_at_every_call_and_nothing_panics() {
        // On a machine with a GPU there is nothing to see here.
        if let Err(missing) = Api::get() {
            assert!(!missing.to_string().is_empty());
            assert_eq!(Api::get().map(|_| ()), Err(missing));
        }
    }
}
