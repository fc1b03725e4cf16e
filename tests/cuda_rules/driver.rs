//! The driver as the peer calls it: one driver function for each thing that can be asked.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::mpsc::{Receiver, Sender, channel};

use cudarc::driver::sys::{self, CUevent, CUresult, CUstream};

use crate::wire::{Answer, Ask};

const NON_BLOCKING: u32 = 1;

/// State between the calls of one peer.
#[derive(Default)]
pub(crate) struct Calls {
    gates: Vec<Sender<()>>,
    buffers: Vec<Vec<u8>>,
}

struct Said {
    code: CUresult,
    numbers: Vec<u64>,
    bytes: Vec<u8>,
    file: Option<OwnedFd>,
}

impl From<CUresult> for Said {
    fn from(code: CUresult) -> Self {
        Self { code, numbers: Vec::new(), bytes: Vec::new(), file: None }
    }
}

impl Said {
    fn number(code: CUresult, number: u64) -> Self {
        Self { numbers: vec![number], ..code.into() }
    }
}

fn name(code: CUresult) -> String {
    let mut text: *const c_char = ptr::null();
    // SAFETY: the pointer is written by the call and, if it succeeds, names a string of the driver that is never freed.
    unsafe {
        match sys::cuGetErrorName(code, &mut text) {
            CUresult::CUDA_SUCCESS => CStr::from_ptr(text).to_string_lossy().into_owned(),
            _ => format!("a code without a name ({code:?})"),
        }
    }
}

/// Handles of the driver travel as numbers.
fn stream(number: u64) -> CUstream {
    number as usize as CUstream
}

fn event(number: u64) -> CUevent {
    number as usize as CUevent
}

fn characters(bytes: &[u8]) -> [c_char; 64] {
    let mut reserved = [0; 64];
    for (place, byte) in reserved.iter_mut().zip(bytes) {
        *place = *byte as c_char;
    }
    reserved
}

fn location() -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: 0 }
}

const POSIX_FD: sys::CUmemAllocationHandleType =
    sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

unsafe extern "C" fn wait_at_gate(gate: *mut c_void) {
    // SAFETY: `ShutGate` leaked this value for this one call.
    let gate = unsafe { Box::from_raw(gate.cast::<Receiver<()>>()) };
    // A peer that ends without opening its gate opens it by dropping the other end.
    let _ = gate.recv();
}

impl Calls {
    pub(crate) fn answer(&mut self, ask: Ask, file: Option<OwnedFd>) -> (Answer, Option<OwnedFd>) {
        // SAFETY: pointers passed are to live locals of the right types, the struct arguments are plain data, and handles
        // and device pointers may be anything: what the driver says to wrong ones is what is tested.
        let said = unsafe { self.call(ask, file) };
        let answer = Answer { code: said.code as u32, name: name(said.code), numbers: said.numbers, bytes: said.bytes };
        (answer, said.file)
    }

    /// # Safety
    /// Copies between host and device trust the sizes asked for.
    unsafe fn call(&mut self, ask: Ask, file: Option<OwnedFd>) -> Said {
        // SAFETY: see `answer`.
        unsafe {
            match ask {
                Ask::Init | Ask::Count | Ask::Uuid { .. } | Ask::Context | Ask::NoContext | Ask::ReleaseContext => {
                    device(ask)
                }
                Ask::Export { .. } | Ask::Open { .. } | Ask::Close { .. } => legacy(ask),
                Ask::Event { .. }
                | Ask::DestroyEvent { .. }
                | Ask::ExportEvent { .. }
                | Ask::OpenEvent { .. }
                | Ask::Record { .. }
                | Ask::Wait { .. }
                | Ask::Query { .. }
                | Ask::AwaitEvent { .. } => events(ask),
                Ask::Create { .. } | Ask::Release { .. } | Ask::ExportFile { .. } | Ask::ImportFile => {
                    physical(ask, file)
                }
                Ask::Reserve { .. }
                | Ask::FreeRange { .. }
                | Ask::Map { .. }
                | Ask::Unmap { .. }
                | Ask::Access { .. } => ranges(ask),
                other => self.work(other),
            }
        }
    }

    /// Memory and streams.
    ///
    /// # Safety
    /// As `call`.
    unsafe fn work(&mut self, ask: Ask) -> Said {
        let mut pointer = 0;
        // SAFETY: see `answer`.
        unsafe {
            match ask {
                Ask::Alloc { bytes } => Said::number(sys::cuMemAlloc_v2(&mut pointer, bytes), pointer),
                Ask::AllocOrdered { bytes } => {
                    let code = sys::cuMemAllocAsync(&mut pointer, bytes, ptr::null_mut());
                    Said::number(code, pointer)
                }
                Ask::AllocHost { bytes } => {
                    let mut host = ptr::null_mut();
                    let code = sys::cuMemHostAlloc(&mut host, bytes, 0);
                    Said::number(code, host as u64)
                }
                Ask::Free { pointer } => sys::cuMemFree_v2(pointer).into(),
                Ask::FreeHost { pointer } => sys::cuMemFreeHost(pointer as usize as *mut c_void).into(),
                Ask::Range { pointer } => {
                    let (mut base, mut bytes) = (0, 0);
                    let code = sys::cuMemGetAddressRange_v2(&mut base, &mut bytes, pointer);
                    Said { numbers: vec![base, bytes as u64], ..code.into() }
                }
                Ask::HostBuffer { bytes } => {
                    self.buffers.push(vec![0; bytes]);
                    let address = self.buffers.last().map_or(0, |buffer| buffer.as_ptr() as u64);
                    Said::number(CUresult::CUDA_SUCCESS, address)
                }
                Ask::Register { pointer, bytes } => {
                    sys::cuMemHostRegister_v2(pointer as usize as *mut c_void, bytes, 0).into()
                }
                Ask::Unregister { pointer } => sys::cuMemHostUnregister(pointer as usize as *mut c_void).into(),
                Ask::Write { pointer, bytes } => {
                    sys::cuMemcpyHtoD_v2(pointer, bytes.as_ptr().cast(), bytes.len()).into()
                }
                Ask::Read { pointer, bytes } => {
                    let mut read = vec![0; bytes];
                    let code = sys::cuMemcpyDtoH_v2(read.as_mut_ptr().cast(), pointer, bytes);
                    Said { bytes: read, ..code.into() }
                }
                Ask::Stream => {
                    let mut made = ptr::null_mut();
                    let code = sys::cuStreamCreate(&mut made, NON_BLOCKING);
                    Said::number(code, made as u64)
                }
                Ask::DestroyStream { stream: s } => sys::cuStreamDestroy_v2(stream(s)).into(),
                Ask::Synchronize { stream: s } => sys::cuStreamSynchronize(stream(s)).into(),
                Ask::ShutGate { stream: s } => {
                    let (opener, gate) = channel::<()>();
                    self.gates.push(opener);
                    let gate = Box::into_raw(Box::new(gate));
                    sys::cuLaunchHostFunc(stream(s), Some(wait_at_gate), gate.cast()).into()
                }
                Ask::OpenGate => {
                    self.gates.clear();
                    CUresult::CUDA_SUCCESS.into()
                }
                Ask::Fill { pointer, value, bytes, stream: s } => {
                    sys::cuMemsetD8Async(pointer, value, bytes, stream(s)).into()
                }
                Ask::Copy { to, from, bytes, stream: s } => {
                    sys::cuMemcpyDtoDAsync_v2(to, from, bytes, stream(s)).into()
                }
                other => unreachable!("{other:?} belongs to another function"),
            }
        }
    }
}

/// # Safety
/// As `Calls::call`.
unsafe fn device(ask: Ask) -> Said {
    // SAFETY: see `Calls::answer`.
    unsafe {
        match ask {
            Ask::Init => sys::cuInit(0).into(),
            Ask::Count => {
                let mut count = 0;
                let code = sys::cuDeviceGetCount(&mut count);
                Said::number(code, count as u64)
            }
            Ask::Uuid { ordinal } => {
                let mut uuid = sys::CUuuid { bytes: [0; 16] };
                let code = sys::cuDeviceGetUuid_v2(&mut uuid, ordinal);
                Said { bytes: uuid.bytes.iter().map(|byte| *byte as u8).collect(), ..code.into() }
            }
            Ask::Context => {
                let mut context = ptr::null_mut();
                match sys::cuDevicePrimaryCtxRetain(&mut context, 0) {
                    CUresult::CUDA_SUCCESS => sys::cuCtxSetCurrent(context).into(),
                    code => code.into(),
                }
            }
            Ask::NoContext => sys::cuCtxSetCurrent(ptr::null_mut()).into(),
            Ask::ReleaseContext => sys::cuDevicePrimaryCtxRelease_v2(0).into(),
            other => unreachable!("{other:?} belongs to another function"),
        }
    }
}

/// # Safety
/// As `Calls::call`.
unsafe fn legacy(ask: Ask) -> Said {
    // SAFETY: see `Calls::answer`.
    unsafe {
        match ask {
            Ask::Export { pointer } => {
                let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
                let code = sys::cuIpcGetMemHandle(&mut handle, pointer);
                Said { bytes: handle.reserved.iter().map(|byte| *byte as u8).collect(), ..code.into() }
            }
            Ask::Open { handle, flags } => {
                let mut pointer = 0;
                let handle = sys::CUipcMemHandle { reserved: characters(&handle) };
                let code = sys::cuIpcOpenMemHandle_v2(&mut pointer, handle, flags);
                Said::number(code, pointer)
            }
            Ask::Close { pointer } => sys::cuIpcCloseMemHandle(pointer).into(),
            other => unreachable!("{other:?} belongs to another function"),
        }
    }
}

/// # Safety
/// As `Calls::call`.
unsafe fn events(ask: Ask) -> Said {
    let mut made = ptr::null_mut();
    // SAFETY: see `Calls::answer`.
    unsafe {
        match ask {
            Ask::Event { flags } => {
                let code = sys::cuEventCreate(&mut made, flags);
                Said::number(code, made as u64)
            }
            Ask::DestroyEvent { event: e } => sys::cuEventDestroy_v2(event(e)).into(),
            Ask::ExportEvent { event: e } => {
                let mut handle = sys::CUipcEventHandle { reserved: [0; 64] };
                let code = sys::cuIpcGetEventHandle(&mut handle, event(e));
                Said { bytes: handle.reserved.iter().map(|byte| *byte as u8).collect(), ..code.into() }
            }
            Ask::OpenEvent { handle } => {
                let handle = sys::CUipcEventHandle { reserved: characters(&handle) };
                let code = sys::cuIpcOpenEventHandle(&mut made, handle);
                Said::number(code, made as u64)
            }
            Ask::Record { event: e, stream: s } => sys::cuEventRecord(event(e), stream(s)).into(),
            Ask::Wait { stream: s, event: e } => sys::cuStreamWaitEvent(stream(s), event(e), 0).into(),
            Ask::Query { event: e } => sys::cuEventQuery(event(e)).into(),
            Ask::AwaitEvent { event: e } => sys::cuEventSynchronize(event(e)).into(),
            other => unreachable!("{other:?} belongs to another function"),
        }
    }
}

/// # Safety
/// As `Calls::call`.
unsafe fn physical(ask: Ask, file: Option<OwnedFd>) -> Said {
    let mut handle = 0;
    // SAFETY: see `Calls::answer`; an exported descriptor is open and nobody else's.
    unsafe {
        match ask {
            Ask::Create { bytes, exportable } => {
                let mut properties = std::mem::zeroed::<sys::CUmemAllocationProp>();
                properties.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
                properties.location = location();
                if exportable {
                    properties.requestedHandleTypes = POSIX_FD;
                }
                let code = sys::cuMemCreate(&mut handle, bytes, &properties, 0);
                Said::number(code, handle)
            }
            Ask::Release { handle } => sys::cuMemRelease(handle).into(),
            Ask::ExportFile { handle } => {
                let mut raw: c_int = -1;
                let code = sys::cuMemExportToShareableHandle((&raw mut raw).cast(), handle, POSIX_FD, 0);
                let file = (code == CUresult::CUDA_SUCCESS).then(|| OwnedFd::from_raw_fd(raw));
                Said { file, ..code.into() }
            }
            Ask::ImportFile => {
                let file = file.expect("the test sends a descriptor along");
                let raw = file.as_raw_fd() as usize as *mut c_void;
                let code = sys::cuMemImportFromShareableHandle(&mut handle, raw, POSIX_FD);
                Said::number(code, handle)
            }
            other => unreachable!("{other:?} belongs to another function"),
        }
    }
}

/// # Safety
/// As `Calls::call`.
unsafe fn ranges(ask: Ask) -> Said {
    // SAFETY: see `Calls::answer`.
    unsafe {
        match ask {
            Ask::Reserve { bytes } => {
                let mut pointer = 0;
                let code = sys::cuMemAddressReserve(&mut pointer, bytes, 0, 0, 0);
                Said::number(code, pointer)
            }
            Ask::FreeRange { pointer, bytes } => sys::cuMemAddressFree(pointer, bytes).into(),
            Ask::Map { pointer, bytes, handle } => sys::cuMemMap(pointer, bytes, 0, handle, 0).into(),
            Ask::Unmap { pointer, bytes } => sys::cuMemUnmap(pointer, bytes).into(),
            Ask::Access { pointer, bytes, writable } => {
                let flags = if writable {
                    sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE
                } else {
                    sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READ
                };
                let wanted = sys::CUmemAccessDesc { location: location(), flags };
                sys::cuMemSetAccess(pointer, bytes, &wanted, 1).into()
            }
            other => unreachable!("{other:?} belongs to another function"),
        }
    }
}
