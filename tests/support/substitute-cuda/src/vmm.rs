//! Physical memory of `cuMemCreate` and the handles to it.
//!
//! It is an anonymous file, alive while a handle, a mapping or a descriptor of any process is. Its name says which GPU
//! it is on, so that an importer can tell, and so that other files are refused.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_ulonglong};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use crate::abi::{AllocationProperties, In, Location, Out, call};
use crate::code::{INVALID_DEVICE, INVALID_VALUE, OUT_OF_MEMORY, Result};
use crate::device::{self, Uuid};
use crate::faults::faults;
use crate::mapping::GRANULE;
use crate::region::{self, Kind};
use crate::run;

pub(crate) const POSIX_FD: c_int = 1;
const PINNED: c_int = 1;
const ON_DEVICE: c_int = 1;
const NAME: &str = "luna-substitute-cuda.";

pub(crate) struct Physical {
    pub(crate) file: OwnedFd,
    pub(crate) bytes: usize,
    pub(crate) uuid: Uuid,
    /// The device that lends it, for what this process created itself.
    lender: Option<usize>,
    pub(crate) handle_types: c_int,
}

impl Physical {
    fn create(device: usize, bytes: usize, handle_types: c_int) -> Result<Self> {
        let uuid = device::get(device)?.uuid;
        let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        let name = CString::new(format!("{NAME}{hex}")).map_err(|_| INVALID_VALUE)?;
        run::take_memory(device, bytes as u64)?;
        // SAFETY: the name is a NUL-terminated string that outlives the call.
        let raw = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
        // SAFETY: a length of a file is set on a descriptor that, if valid, was just made.
        if raw < 0 || unsafe { libc::ftruncate(raw, bytes as libc::off_t) } != 0 {
            run::return_memory(device, bytes as u64);
            return Err(OUT_OF_MEMORY);
        }
        // SAFETY: the descriptor is open and nobody else's.
        let file = unsafe { OwnedFd::from_raw_fd(raw) };
        let this = Self { file, bytes, uuid, lender: Some(device), handle_types };
        if faults().dirty {
            run::litter(this.file.as_fd(), bytes as u64)?;
        }
        Ok(this)
    }

    /// What another process exported.
    pub(crate) fn import(file: OwnedFd) -> Result<Self> {
        let link = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(|_| INVALID_VALUE)?;
        let link = link.to_string_lossy();
        let hex = link.strip_prefix("/memfd:").and_then(|name| name.strip_prefix(NAME)).and_then(|name| name.get(..32));
        let number = hex.and_then(|hex| u128::from_str_radix(hex, 16).ok()).ok_or(INVALID_VALUE)?;
        let bytes =
            fs::File::from(file.try_clone().map_err(|_| OUT_OF_MEMORY)?).metadata().map_err(|_| INVALID_VALUE)?;
        let (bytes, uuid) = (bytes.len() as usize, number.to_be_bytes());
        Ok(Self { file, bytes, uuid, lender: None, handle_types: POSIX_FD })
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        if let Some(device) = self.lender {
            run::return_memory(device, self.bytes as u64);
        }
    }
}

struct Held {
    physical: Arc<Physical>,
    references: u64,
}

static HANDLES: Mutex<Option<HashMap<u64, Held>>> = Mutex::new(None);

fn with_handles<T>(work: impl FnOnce(&mut HashMap<u64, Held>) -> T) -> T {
    work(HANDLES.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default())
}

pub(crate) fn insert(physical: Arc<Physical>) -> u64 {
    let handle = run::fresh_number() << 8;
    with_handles(|handles| handles.insert(handle, Held { physical, references: 1 }));
    handle
}

pub(crate) fn get(handle: u64) -> Result<Arc<Physical>> {
    with_handles(|handles| handles.get(&handle).map(|held| Arc::clone(&held.physical))).ok_or(INVALID_VALUE)
}

pub(crate) fn handles() -> u64 {
    with_handles(|handles| handles.len() as u64)
}

/// The visible device of a location.
pub(crate) fn located(location: Location) -> Result<usize> {
    if location.kind != ON_DEVICE {
        return Err(INVALID_VALUE);
    }
    device::ordinal(location.id).map_err(|_| INVALID_DEVICE)
}

fn create(bytes: usize, properties: &AllocationProperties, flags: c_ulonglong) -> Result<u64> {
    device::all()?;
    let whole = bytes > 0 && bytes.is_multiple_of(GRANULE);
    let known = properties.kind == PINNED && properties.handle_types & !POSIX_FD == 0;
    if !whole || !known || flags != 0 {
        return Err(INVALID_VALUE);
    }
    Ok(insert(Arc::new(Physical::create(located(properties.location)?, bytes, properties.handle_types)?)))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetAllocationGranularity(
    granularity: Out<usize>,
    properties: In<AllocationProperties>,
    option: c_int,
) -> c_int {
    call(|| {
        granularity.fill(|| {
            located(properties.get(0)?.location)?;
            if (0..=1).contains(&option) { Ok(GRANULE) } else { Err(INVALID_VALUE) }
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemCreate(
    handle: Out<u64>,
    bytes: usize,
    properties: In<AllocationProperties>,
    flags: c_ulonglong,
) -> c_int {
    call(|| handle.fill(|| create(bytes, &properties.get(0)?, flags)))
}

/// Allowed while mappings remain; they keep the memory.
#[unsafe(no_mangle)]
extern "C" fn cuMemRelease(handle: u64) -> c_int {
    call(|| {
        with_handles(|handles| {
            let held = handles.get_mut(&handle).ok_or(INVALID_VALUE)?;
            held.references -= 1;
            if held.references == 0 {
                handles.remove(&handle);
            }
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemRetainAllocationHandle(handle: Out<u64>, address: usize) -> c_int {
    call(|| {
        handle.fill(|| {
            let physical = match region::read().find(address).map(|region| &region.kind) {
                Some(Kind::Mapped(physical)) => Arc::clone(physical),
                _ => return Err(INVALID_VALUE),
            };
            let existing = with_handles(|handles| {
                let (handle, held) = handles.iter_mut().find(|(_, held)| Arc::ptr_eq(&held.physical, &physical))?;
                held.references += 1;
                Some(*handle)
            });
            Ok(existing.unwrap_or_else(|| insert(physical)))
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetAllocationPropertiesFromHandle(out: Out<AllocationProperties>, handle: u64) -> c_int {
    call(|| {
        out.fill(|| {
            let physical = get(handle)?;
            let ordinal = device::all()?.iter().position(|device| device.uuid == physical.uuid);
            let id = ordinal.map_or(-1, |ordinal| ordinal as c_int);
            Ok(AllocationProperties {
                kind: PINNED,
                handle_types: physical.handle_types,
                location: Location { kind: ON_DEVICE, id },
                win32_metadata: std::ptr::null_mut(),
                compression: 0,
                rdma: 0,
                usage: 0,
                reserved: [0; 4],
            })
        })
    })
}
