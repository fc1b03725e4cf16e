//! The GPUs that this process sees, and `cuInit`.

use std::env;
use std::ffi::{c_char, c_int, c_uint};
use std::sync::OnceLock;

use crate::abi::{Bytes16, Out, call};
use crate::code::{INVALID_DEVICE, INVALID_VALUE, NO_DEVICE, NOT_INITIALIZED, Result};
use crate::faults::{faults, fingerprint};
use crate::{leaks, run};

pub(crate) type Uuid = [u8; 16];

#[derive(Clone)]
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) uuid: Uuid,
    /// Place among all GPUs of the machine; the place among the visible ones is the ordinal.
    pub(crate) slot: usize,
}

static DEVICES: OnceLock<Vec<Device>> = OnceLock::new();

/// The visible devices; their index is the ordinal. Fails before `cuInit`.
pub(crate) fn all() -> Result<&'static [Device]> {
    DEVICES.get().map(Vec::as_slice).ok_or(NOT_INITIALIZED)
}

pub(crate) fn get(ordinal: usize) -> Result<&'static Device> {
    all()?.get(ordinal).ok_or(INVALID_DEVICE)
}

pub(crate) fn ordinal(device: c_int) -> Result<usize> {
    let ordinal = usize::try_from(device).map_err(|_| INVALID_DEVICE)?;
    get(ordinal).map(|_| ordinal)
}

fn installed() -> Vec<Device> {
    let named = faults().devices.iter().enumerate();
    named.map(|(slot, name)| Device { name: name.clone(), uuid: uuid_of(name), slot }).collect()
}

fn uuid_of(name: &str) -> Uuid {
    let mut uuid = [0; 16];
    let (first, second) = uuid.split_at_mut(8);
    first.copy_from_slice(&fingerprint(name, 0).to_be_bytes());
    second.copy_from_slice(&fingerprint(name, 0x5eed).to_be_bytes());
    uuid
}

fn written(uuid: &Uuid) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// An entry that names no device ends the list, as the real driver has it.
fn visible(installed: &[Device], list: &str) -> Vec<Device> {
    let mut seen: Vec<Device> = Vec::new();
    for entry in list.split(',').map(str::trim) {
        let found = match entry.parse::<usize>() {
            Ok(slot) => installed.get(slot),
            Err(_) if entry.starts_with("GPU-") => {
                installed.iter().find(|device| written(&device.uuid).starts_with(entry))
            }
            Err(_) => None,
        };
        match found {
            Some(device) if !seen.iter().any(|before| before.slot == device.slot) => seen.push(device.clone()),
            _ => break,
        }
    }
    seen
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(flags: c_uint) -> c_int {
    call(|| {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        let mut devices = if faults().no_device { Vec::new() } else { installed() };
        if let Ok(list) = env::var("CUDA_VISIBLE_DEVICES") {
            devices = visible(&devices, &list);
        }
        if devices.is_empty() {
            return Err(NO_DEVICE);
        }
        run::join()?;
        DEVICES.get_or_init(|| devices);
        leaks::report_at_exit();
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(version: Out<c_int>) -> c_int {
    call(|| version.put(13_000))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(count: Out<c_int>) -> c_int {
    call(|| count.fill(|| Ok(all()?.len() as c_int)))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(device: Out<c_int>, at: c_int) -> c_int {
    call(|| device.fill(|| ordinal(at).map(|_| at)))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(name: *mut c_char, room: c_int, device: c_int) -> c_int {
    call(|| {
        let device = get(ordinal(device)?)?;
        let room = usize::try_from(room).ok().filter(|room| *room > 0).ok_or(INVALID_VALUE)?;
        if name.is_null() {
            return Err(INVALID_VALUE);
        }
        let bytes = &device.name.as_bytes()[..device.name.len().min(room - 1)];
        // SAFETY: the caller gives `room` bytes; at most room - 1 and the NUL are written.
        unsafe {
            name.cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
            name.add(bytes.len()).write(0);
        }
        Ok(())
    })
}

fn give_uuid(out: &Out<Bytes16>, device: c_int) -> c_int {
    call(|| out.fill(|| Ok(Bytes16(get(ordinal(device)?)?.uuid))))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetUuid(uuid: Out<Bytes16>, device: c_int) -> c_int {
    give_uuid(&uuid, device)
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetUuid_v2(uuid: Out<Bytes16>, device: c_int) -> c_int {
    give_uuid(&uuid, device)
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: c_int) -> c_int {
    call(|| bytes.fill(|| ordinal(device).map(|_| faults().memory as usize)))
}
