use std::ffi::{c_int, c_void};
use std::os::unix::fs::symlink;

use luna_broker::device::cuda::{CudaDevice, CudaSharing, Driver, StreamRef};
use luna_broker::device::{Device, DeviceError};
use luna_broker::id::GpuUuid;
use luna_broker::{Error, ErrorKind};

use super::{assert_live, read, region};
use crate::cuda::driver_function;
use crate::roles::{Role, Stage};

fn uuids() -> Vec<GpuUuid> {
    Driver::get().unwrap().gpus().iter().map(|gpu| gpu.uuid).collect()
}

#[test]
fn gpus_are_known_by_their_identity_whatever_their_order() {
    let stage = Stage::new().set("SUBSTITUTE_CUDA_DEVICES", "alpha,beta,gamma");
    let stage = stage.set_for(Role::Broker, "CUDA_VISIBLE_DEVICES", "0,1,2");
    stage.set_for(Role::Client, "CUDA_VISIBLE_DEVICES", "2,1").two(
        |peer| {
            let gpus = uuids();
            assert_eq!(gpus.len(), 3);
            for gpu in &gpus {
                peer.say(&gpu.0);
            }
            let gamma = CudaDevice::open(gpus[2], CudaSharing::Ipc).unwrap();
            let shared = region(&gamma);
            shared.copy_in(0, b"gamma").unwrap();
            peer.hand_over(shared.export().unwrap());
            peer.meet();
        },
        |peer| {
            let [alpha, beta, gamma] = [(); 3].map(|()| GpuUuid(peer.hear().try_into().unwrap()));
            assert_eq!(uuids(), [gamma, beta]);
            let driver = Driver::get().unwrap();
            assert_eq!(driver.gpu(gamma).unwrap().ordinal, 0);
            assert_eq!(driver.named("cuda:1").unwrap().uuid, beta);
            assert!(matches!(driver.gpu(alpha), Err(DeviceError::NoGpu { gpu }) if gpu == alpha));
            let hidden = CudaDevice::open(alpha, CudaSharing::Ipc);
            assert!(matches!(hidden, Err(DeviceError::NoGpu { gpu }) if gpu == alpha));

            let device = CudaDevice::open(gamma, CudaSharing::Ipc).unwrap();
            let shared = device.import(peer.receive(), 5).unwrap();
            assert_eq!(read(&shared, 0, 5), b"gamma");
            drop(shared);
            peer.meet();
        },
    );
}

#[test]
fn a_setting_names_a_gpu_by_ordinal_or_identity() {
    Stage::new().set("SUBSTITUTE_CUDA_DEVICES", "alpha,beta").alone(|| {
        let driver = Driver::get().unwrap();
        let [alpha, beta] = driver.gpus() else { panic!("two were set") };
        assert_eq!(driver.named("cuda").unwrap(), alpha);
        assert_eq!(driver.named(" CUDA:1 ").unwrap(), beta);
        assert_eq!(driver.named(&beta.uuid.to_string()).unwrap(), beta);
        assert_eq!(driver.named(&beta.uuid.to_string().to_lowercase()).unwrap(), beta);
        assert_eq!(driver.named(&alpha.uuid.to_string().replace("GPU-", "MIG-")).unwrap(), alpha);
        for wrong in ["", "cuda:", "cuda:2", "cuda:-1", "1", "GPU-", "GPU-00010203-0405-0607-0809-0a0b0c0d0eff"] {
            let unknown = driver.named(wrong).map(|_| ()).map_err(Error::from).unwrap_err();
            assert_eq!(unknown.kind(), ErrorKind::Configuration, "{wrong}");
            assert!(unknown.message().contains(&format!("`{wrong}`")), "{unknown}");
        }
    });
}

#[test]
fn the_driver_tells_about_its_gpus() {
    Stage::new().set("SUBSTITUTE_CUDA_DEVICES", "alpha,beta").set("SUBSTITUTE_CUDA_MEMORY", 64 << 20).alone(|| {
        let driver = Driver::get().unwrap();
        let alpha = &driver.gpus()[0];
        assert!(driver.version() >= (12, 0), "{:?}", driver.version());
        assert_eq!((alpha.ordinal, alpha.memory_bytes), (0, 64 << 20));
        assert!(!alpha.name.is_empty() && !alpha.is_mig());
        let beta = driver.gpus()[1].uuid;
        assert!(driver.can_access_peer(beta, beta));
        assert!(!driver.can_access_peer(beta, alpha.uuid));
        assert!(!driver.can_access_peer(beta, GpuUuid([7; 16])));
        assert!(driver.compute_capability(beta).is_some());
        assert_eq!(driver.is_integrated(beta), Some(false));
        assert_eq!(driver.supports_ipc_events(GpuUuid([7; 16])), None);
        assert_live!(contexts: 0);
    });
}

#[test]
fn gpus_that_reach_each_other_are_said_to() {
    Stage::new().set("SUBSTITUTE_CUDA_DEVICES", "alpha,beta").set("SUBSTITUTE_CUDA_P2P", 1).alone(|| {
        let gpus = uuids();
        assert!(Driver::get().unwrap().can_access_peer(gpus[0], gpus[1]));
    });
}

#[test]
fn a_driver_without_gpus_is_no_driver() {
    Stage::new().set("SUBSTITUTE_CUDA_NO_DEVICE", 1).unaccounted().alone(|| {
        for _ in 0..2 {
            let error = Driver::get().map(|_| ()).unwrap_err();
            assert!(matches!(&error, DeviceError::NoDriver { reason } if reason.contains("100")), "{error}");
            assert_eq!(Error::from(error).kind(), ErrorKind::Unsupported);
        }
        let opened = CudaDevice::open(GpuUuid([0; 16]), CudaSharing::Ipc);
        assert!(matches!(opened, Err(DeviceError::NoDriver { .. })));
    });
}

#[test]
fn a_driver_that_hides_all_gpus_is_no_driver() {
    Stage::new().set("CUDA_VISIBLE_DEVICES", "-1").unaccounted().alone(|| {
        assert!(matches!(Driver::get(), Err(DeviceError::NoDriver { .. })));
    });
}

#[test]
fn a_missing_function_is_named() {
    // Any library will do that is not libcuda.
    let folder = tempfile::tempdir().unwrap();
    let loaded = std::fs::read_to_string("/proc/self/maps").unwrap();
    let other = loaded.split_whitespace().find(|word| word.contains("/libc.so")).expect("the C library is loaded");
    for name in ["libcuda.so", "libcuda.so.1"] {
        symlink(other, folder.path().join(name)).unwrap();
    }
    Stage::new().set("LD_LIBRARY_PATH", folder.path().display()).unaccounted().alone(|| {
        let error = Driver::get().map(|_| ()).unwrap_err();
        assert!(matches!(&error, DeviceError::NoDriver { reason } if reason.contains("cuInit")), "{error}");
    });
}

type Retain = extern "C" fn(*mut *mut c_void, c_int) -> c_int;
type Release = extern "C" fn(c_int) -> c_int;
type SetCurrent = extern "C" fn(*mut c_void) -> c_int;
type GetCurrent = extern "C" fn(*mut *mut c_void) -> c_int;

/// The contexts of other libraries in the process, as torch's.
struct Contexts {
    retain: Retain,
    release: Release,
    set: SetCurrent,
    get: GetCurrent,
}

impl Contexts {
    fn new() -> Self {
        // SAFETY: the signatures are those of cuda.h.
        unsafe {
            Self {
                retain: std::mem::transmute::<*mut c_void, Retain>(driver_function("cuDevicePrimaryCtxRetain")),
                release: std::mem::transmute::<*mut c_void, Release>(driver_function("cuDevicePrimaryCtxRelease_v2")),
                set: std::mem::transmute::<*mut c_void, SetCurrent>(driver_function("cuCtxSetCurrent")),
                get: std::mem::transmute::<*mut c_void, GetCurrent>(driver_function("cuCtxGetCurrent")),
            }
        }
    }

    fn current(&self) -> *mut c_void {
        let mut current = std::ptr::null_mut();
        assert_eq!((self.get)(&raw mut current), 0);
        current
    }
}

#[test]
fn what_was_current_before_a_call_is_current_after_it() {
    Stage::new().set("SUBSTITUTE_CUDA_DEVICES", "alpha,beta").alone(|| {
        let alpha = uuids()[0];
        let contexts = Contexts::new();
        let mut betas = std::ptr::null_mut();
        assert_eq!((contexts.retain)(&raw mut betas, 1), 0);
        for before in [std::ptr::null_mut(), betas] {
            assert_eq!((contexts.set)(before), 0);
            let unchanged = || assert_eq!(contexts.current(), before);
            let device = CudaDevice::open(alpha, CudaSharing::Vmm).unwrap();
            unchanged();
            let region = region(&device);
            unchanged();
            region.copy_in(0, &[1]).unwrap();
            region.record().unwrap();
            unchanged();
            assert!(region.copy_in(usize::MAX, &[1]).is_err());
            assert!(device.allocate(1 << 50).is_err());
            unchanged();
            drop(device.stream().unwrap());
            device.synchronize_stream(StreamRef::DEFAULT).unwrap();
            drop((region, device));
            unchanged();
        }
        assert_eq!((contexts.release)(1), 0);
    });
}

#[test]
fn one_context_serves_all_devices_of_a_gpu() {
    Stage::new().alone(|| {
        let gpu = uuids()[0];
        let first = CudaDevice::open(gpu, CudaSharing::Ipc).unwrap();
        let second = CudaDevice::open(gpu, CudaSharing::Vmm).unwrap();
        assert_eq!((first.sharing(), second.sharing()), (CudaSharing::Ipc, CudaSharing::Vmm));
        assert_live!(contexts: 1);
        let kept = region(&first);
        drop((first, second));
        assert_live!(contexts: 1);
        kept.copy_in(0, &[1]).unwrap();
        drop(kept);
        assert_live!(contexts: 0);
        drop(CudaDevice::open(gpu, CudaSharing::Ipc).unwrap());
    });
}
