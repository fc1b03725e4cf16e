use std::ffi::{CStr, c_char};
use std::sync::OnceLock;

use cudarc::driver::sys;

use super::api::Api;
use crate::device::{DeviceError, NoDriver};
use crate::id::GpuUuid;

/// One GPU as this process sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Its identity, the same in every process; an instance of a divided GPU has its own.
    pub uuid: GpuUuid,
    /// Its number in this process, as in torch's `cuda:1`.
    pub ordinal: i32,
    /// The product's name.
    pub name: String,
    /// All of its memory.
    pub memory_bytes: u64,
}

impl Gpu {
    /// Whether this is an instance of a divided GPU.
    #[must_use]
    pub fn is_mig(&self) -> bool {
        self.name.contains(" MIG ")
    }
}

/// The CUDA driver of this machine, loaded and initialised once per process.
#[derive(Debug)]
pub struct Driver {
    api: &'static Api,
    version: i32,
    gpus: Vec<Gpu>,
    /// The driver's own numbers of `gpus`.
    devices: Vec<sys::CUdevice>,
}

impl Driver {
    /// The driver. Occupies no GPU memory: contexts are made by [`CudaDevice::open`](super::CudaDevice::open).
    ///
    /// # Errors
    /// [`DeviceError::NoDriver`], in the words of [`Driver::find`].
    pub fn get() -> Result<&'static Self, DeviceError> {
        Ok(Self::find()?)
    }

    /// As [`Driver::get`], for callers that tell one reason from another.
    ///
    /// # Errors
    /// Where there is no libcuda, where it lacks a function, does not start, or shows no GPU; the same at every call.
    pub fn find() -> Result<&'static Self, NoDriver> {
        static DRIVER: OnceLock<Result<Driver, NoDriver>> = OnceLock::new();
        DRIVER.get_or_init(Self::look).as_ref().map_err(Clone::clone)
    }

    fn look() -> Result<Self, NoDriver> {
        let api = Api::get()?;
        let refused = |error: DeviceError| NoDriver::NoAnswer { answer: error.to_string() };
        let (mut version, mut count) = (0, 0);
        // SAFETY: both out-pointers are valid for the calls; the driver is initialised.
        unsafe {
            api.cuDriverGetVersion(&raw mut version).map_err(refused)?;
            api.cuDeviceGetCount(&raw mut count).map_err(refused)?;
        }
        if count < 1 {
            return Err(NoDriver::NoGpu);
        }
        let seen: Result<Vec<_>, _> = (0..count).map(|ordinal| describe(api, ordinal)).collect();
        let (devices, gpus) = seen.map_err(refused)?.into_iter().unzip();
        Ok(Self { api, version, gpus, devices })
    }

    pub(super) fn api(&self) -> &'static Api {
        self.api
    }

    /// The newest CUDA version the driver serves: major, minor.
    #[must_use]
    pub fn version(&self) -> (u32, u32) {
        let version = self.version.unsigned_abs();
        (version / 1000, version % 1000 / 10)
    }

    /// The GPUs this process sees, by ordinal.
    #[must_use]
    pub fn gpus(&self) -> &[Gpu] {
        &self.gpus
    }

    /// The GPU of this identity.
    ///
    /// # Errors
    /// [`DeviceError::NoGpu`] where this process does not see it.
    pub fn gpu(&self, uuid: GpuUuid) -> Result<&Gpu, DeviceError> {
        self.gpus.iter().find(|gpu| gpu.uuid == uuid).ok_or(DeviceError::NoGpu { gpu: uuid })
    }

    /// The GPU that a setting names: `cuda` (the first), `cuda:1` (by ordinal in this process), `GPU-…` or `MIG-…`.
    ///
    /// # Errors
    /// [`DeviceError::UnknownGpu`] where no GPU has this name.
    pub fn named(&self, name: &str) -> Result<&Gpu, DeviceError> {
        let wanted = name.trim();
        let found = match wanted.split_once(':') {
            None if wanted.eq_ignore_ascii_case("cuda") => self.gpus.first(),
            Some((kind, ordinal)) if kind.eq_ignore_ascii_case("cuda") => {
                ordinal.parse().ok().and_then(|ordinal: usize| self.gpus.get(ordinal))
            }
            _ => parse_uuid(wanted).and_then(|uuid| self.gpus.iter().find(|gpu| gpu.uuid == uuid)),
        };
        found.ok_or_else(|| DeviceError::UnknownGpu { name: name.to_owned() })
    }

    /// Whether `from` reaches the memory of `to` directly; a GPU reaches its own. False for a GPU this process does not
    /// see, and where the driver does not say.
    #[must_use]
    pub fn can_access_peer(&self, from: GpuUuid, to: GpuUuid) -> bool {
        let (Ok(from_device), Ok(to_device)) = (self.device(from), self.device(to)) else { return false };
        let mut can = 0;
        // SAFETY: both devices are the driver's; the out-pointer is valid for the call.
        let answer = unsafe { self.api.cuDeviceCanAccessPeer(&raw mut can, from_device, to_device) };
        from == to || (answer.is_ok() && can != 0)
    }

    /// Whether events of this GPU can order work across processes, where the driver knows the question.
    #[must_use]
    pub fn supports_ipc_events(&self, gpu: GpuUuid) -> Option<bool> {
        use sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED as SUPPORTED;
        self.attribute(gpu, SUPPORTED).map(|value| value != 0)
    }

    /// Whether allocations of this GPU can be exported as file descriptors, as far as the driver says.
    #[must_use]
    pub fn supports_vmm_export(&self, gpu: GpuUuid) -> Option<bool> {
        use sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED as SUPPORTED;
        self.attribute(gpu, SUPPORTED).map(|value| value != 0)
    }

    /// Whether this GPU's memory is the machine's: such GPUs do not share it by handles.
    #[must_use]
    pub fn is_integrated(&self, gpu: GpuUuid) -> Option<bool> {
        use sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED as INTEGRATED;
        self.attribute(gpu, INTEGRATED).map(|value| value != 0)
    }

    /// The GPU's compute capability: major, minor.
    #[must_use]
    pub fn compute_capability(&self, gpu: GpuUuid) -> Option<(u32, u32)> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        let major = self.attribute(gpu, MAJOR)?;
        let minor = self.attribute(gpu, MINOR)?;
        Some((u32::try_from(major).ok()?, u32::try_from(minor).ok()?))
    }

    /// The driver's number of a GPU.
    pub(super) fn device(&self, uuid: GpuUuid) -> Result<sys::CUdevice, DeviceError> {
        let seen = self.gpus.iter().zip(&self.devices).find(|(gpu, _)| gpu.uuid == uuid);
        seen.map(|(_, device)| *device).ok_or(DeviceError::NoGpu { gpu: uuid })
    }

    fn attribute(&self, gpu: GpuUuid, attribute: sys::CUdevice_attribute) -> Option<i32> {
        let device = self.device(gpu).ok()?;
        let mut value = 0;
        // SAFETY: the out-pointer is valid for the call; a driver that does not know the attribute says so.
        unsafe { self.api.cuDeviceGetAttribute(&raw mut value, attribute as u32, device) }.ok()?;
        Some(value)
    }
}

fn describe(api: &Api, ordinal: i32) -> Result<(sys::CUdevice, Gpu), DeviceError> {
    let mut device = 0;
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    let mut name: [c_char; 256] = [0; 256];
    let mut memory_bytes = 0;
    // SAFETY: the out-pointers are valid for the calls, `name` for one byte more than the length given, so that it ends
    // in a NUL whatever the driver writes; the driver is initialised and knows the device it just answered.
    unsafe {
        api.cuDeviceGet(&raw mut device, ordinal)?;
        api.cuDeviceGetUuid_v2(&raw mut uuid, device)?;
        api.cuDeviceGetName(name.as_mut_ptr(), 255, device)?;
        api.cuDeviceTotalMem_v2(&raw mut memory_bytes, device)?;
    }
    let name: Vec<u8> = name.iter().map(|c| c.cast_unsigned()).collect();
    let name = CStr::from_bytes_until_nul(&name).map_or_else(|_| String::new(), |name| name.to_string_lossy().into());
    let uuid = GpuUuid(uuid.bytes.map(i8::cast_unsigned));
    Ok((device, Gpu { uuid, ordinal, name, memory_bytes: memory_bytes as u64 }))
}

/// The identity in the form that the driver's tools print, whatever it begins with.
fn parse_uuid(text: &str) -> Option<GpuUuid> {
    let (kind, digits) = text.split_once('-')?;
    let digits: String = digits.chars().filter(|c| *c != '-').collect();
    let is_prefixed = ["gpu", "mig"].contains(&kind.to_ascii_lowercase().as_str());
    let is_whole = digits.len() == 32 && digits.chars().all(|c| c.is_ascii_hexdigit());
    let value = u128::from_str_radix(&digits, 16).ok()?;
    (is_prefixed && is_whole).then_some(GpuUuid(value.to_be_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_read_as_it_is_printed() {
        let uuid = GpuUuid([0xfe, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]);
        assert_eq!(parse_uuid(&uuid.to_string()), Some(uuid));
        assert_eq!(parse_uuid(&uuid.to_string().replace("GPU-", "MIG-").to_uppercase()), Some(uuid));
        for wrong in ["", "GPU-", "fe010203", "GPU-+e010203-0405-0607-0809-0a0b0c0d0eff", "CPU-00", "GPU-ü"] {
            assert_eq!(parse_uuid(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_machine_without_a_driver_is_told_so() {
        if let Err(error) = Driver::get() {
            assert!(matches!(&error, DeviceError::NoDriver { reason } if !reason.is_empty()), "{error}");
        }
    }
}
