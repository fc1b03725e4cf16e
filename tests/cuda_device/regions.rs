use std::sync::Arc;

use luna_broker::device::cuda::CopyWay::DeviceToDevice;
use luna_broker::device::cuda::CudaSharing::{self, Ipc, Vmm};
use luna_broker::device::cuda::StreamRef;
use luna_broker::device::{Device, DeviceError, HostDevice, InProcessDevice, Region, RegionHandle};

use super::{MIB, assert_live, device, read, refused, region};
use crate::roles::{Peer, Role, Stage};

/// The broker hands over one region and keeps it until the client is done with it.
fn hand_over_one(sharing: CudaSharing) -> impl FnOnce(Peer) {
    move |peer| {
        let shared = region(&device(sharing));
        shared.copy_in(0, b"shared").unwrap();
        peer.hand_over(shared.export().unwrap());
        peer.meet();
    }
}

#[test]
fn a_process_cannot_open_its_own_handle() {
    Stage::new().alone(|| {
        let device = device(Ipc);
        let own = region(&device);
        let opened = device.import(own.export().unwrap(), 1);
        assert_eq!(refused(opened), ("cuIpcOpenMemHandle_v2", 201));
    });
}

#[test]
fn imports_of_one_handle_share_one_region() {
    Stage::new().two(hand_over_one(Ipc), |peer| {
        let RegionHandle::CudaIpc(handle) = peer.receive() else { panic!("a handle was expected") };
        let open = || device(Ipc).import(RegionHandle::CudaIpc(handle), 6);
        let (first, second) = (open().unwrap(), open().unwrap());
        assert!(Arc::ptr_eq(&first, &second));
        assert_live!(imports: 1);
        drop(first);
        assert_eq!(read(&second, 0, 6), b"shared");
        assert_live!(imports: 1);
        drop(second);
        assert_live!(imports: 0);
        assert_eq!(read(&open().unwrap(), 0, 6), b"shared");
        assert_live!(imports: 0);
        peer.meet();
    });
}

#[test]
fn an_open_region_is_no_excuse_for_a_wrong_size() {
    Stage::new().two(hand_over_one(Ipc), |peer| {
        let RegionHandle::CudaIpc(handle) = peer.receive() else { panic!("a handle was expected") };
        let device = device(Ipc);
        let fitting = device.import(RegionHandle::CudaIpc(handle), 2 * MIB).unwrap();
        let larger = device.import(RegionHandle::CudaIpc(handle), 2 * MIB + 1);
        assert!(matches!(larger, Err(DeviceError::TooSmall { actual, .. }) if actual == 2 * MIB));
        drop((larger, fitting));
        assert_live!(imports: 0);
        peer.meet();
    });
}

#[test]
fn threads_that_open_and_close_one_handle_do_not_disturb_each_other() {
    Stage::new().two(hand_over_one(Ipc), |peer| {
        let RegionHandle::CudaIpc(handle) = peer.receive() else { panic!("a handle was expected") };
        let device = device(Ipc);
        std::thread::scope(|threads| {
            for _ in 0..4 {
                threads.spawn(|| {
                    for _ in 0..200 {
                        let shared = device.import(RegionHandle::CudaIpc(handle), 6).unwrap();
                        assert_eq!(read(&shared, 0, 6), b"shared");
                    }
                });
            }
        });
        assert_live!(imports: 0);
        peer.meet();
    });
}

#[test]
fn an_opening_that_fails_once_is_tried_again() {
    Stage::new().set("SUBSTITUTE_CUDA_FAIL_OPEN", 1).two(hand_over_one(Ipc), |peer| {
        let shared = device(Ipc).import(peer.receive(), 6).unwrap();
        assert_eq!(read(&shared, 0, 6), b"shared");
        drop(shared);
        peer.meet();
    });
}

#[test]
fn an_opening_that_fails_twice_is_an_error_and_leaves_nothing() {
    Stage::new().set("SUBSTITUTE_CUDA_FAIL_OPEN", "1+").two(hand_over_one(Ipc), |peer| {
        let opened = device(Ipc).import(peer.receive(), 6);
        assert_eq!(refused(opened), ("cuIpcOpenMemHandle_v2", 205));
        assert_live!(imports: 0);
        peer.meet();
    });
}

#[test]
fn a_system_without_ipc_says_so_when_a_handle_is_opened() {
    Stage::new().set("SUBSTITUTE_CUDA_IPC", "refused").two(hand_over_one(Ipc), |peer| {
        let opened = device(Ipc).import(peer.receive(), 6);
        assert!(opened.as_ref().is_err_and(|error| error.to_string().contains("CUDA_ERROR_INVALID_HANDLE")));
        assert_eq!(refused(opened), ("cuIpcOpenMemHandle_v2", 400));
        peer.meet();
    });
}

#[test]
fn bytes_that_are_no_handle_are_refused() {
    Stage::new().alone(|| {
        let opened = device(Ipc).import(RegionHandle::CudaIpc([7; 64]), 1);
        assert_eq!(refused(opened).0, "cuIpcOpenMemHandle_v2");
    });
}

#[test]
fn another_pid_namespace_refuses_handles_and_takes_descriptors() {
    let stage = || Stage::new().set_for(Role::Client, "SUBSTITUTE_CUDA_PID_NAMESPACE", "container");
    stage().two(
        |peer| {
            let (plain, mapped) = (region(&device(Ipc)), region(&device(Vmm)));
            mapped.copy_in(0, b"shared").unwrap();
            peer.hand_over(plain.export().unwrap());
            peer.hand_over(mapped.export().unwrap());
            peer.meet();
        },
        |peer| {
            let device = device(Ipc);
            assert_eq!(refused(device.import(peer.receive(), 6)).0, "cuIpcOpenMemHandle_v2");
            let shared = device.import(peer.receive(), 6).unwrap();
            assert_eq!(read(&shared, 0, 6), b"shared");
            drop(shared);
            peer.meet();
        },
    );
}

#[test]
fn a_driver_that_does_not_export_descriptors_says_so_when_memory_is_allocated() {
    Stage::new().set("SUBSTITUTE_CUDA_VMM", "refused").alone(|| {
        assert_eq!(refused(device(Vmm).allocate(MIB)), ("cuMemExportToShareableHandle", 801));
        assert_live!(mappings: 0, vmm_handles: 0, reserved: 0);
        device(Ipc).allocate(MIB).unwrap();
    });
}

#[test]
fn a_descriptor_that_cannot_be_imported_is_an_error_and_leaves_nothing() {
    Stage::new().set("SUBSTITUTE_CUDA_FAIL_IMPORT", 1).two(hand_over_one(Vmm), |peer| {
        let device = device(Ipc);
        assert_eq!(refused(device.import(peer.receive(), 6)), ("cuMemImportFromShareableHandle", 801));
        let file = RegionHandle::CudaVmm(tempfile::tempfile().unwrap().into());
        assert_eq!(refused(device.import(file, 6)).0, "cuMemImportFromShareableHandle");
        assert_live!(mappings: 0, vmm_handles: 0, reserved: 0);
        peer.meet();
    });
}

#[test]
fn more_than_a_descriptor_holds_cannot_be_mapped() {
    Stage::new().two(hand_over_one(Vmm), |peer| {
        let mapped = device(Ipc).import(peer.receive(), 2 * MIB + 1);
        assert_eq!(refused(mapped).0, "cuMemMap");
        assert_live!(mappings: 0, vmm_handles: 0, reserved: 0);
        peer.meet();
    });
}

#[test]
fn descriptors_are_imported_where_they_were_made_too() {
    Stage::new().alone(|| {
        let device = device(Vmm);
        let own = region(&device);
        let imported = device.import(own.export().unwrap(), own.size_bytes()).unwrap();
        assert_ne!(imported.address(), own.address());
        imported.copy_in(9, &[9]).unwrap();
        assert_eq!(read(&own, 9, 1), [9]);
        // A mapping alone keeps no handle: the memory goes with the last mapping.
        assert_live!(vmm_handles: 1);
    });
}

#[test]
fn memory_imported_for_reading_is_only_read() {
    Stage::new().unaccounted().two(hand_over_one(Vmm), |peer| {
        let RegionHandle::CudaVmm(fd) = peer.receive() else { panic!("a descriptor was expected") };
        let device = device(Ipc);
        let shared = device.import_read_only(fd, 6).unwrap().region();
        assert_eq!(read(&shared, 0, 6), b"shared");
        assert!(matches!(shared.copy_in(0, b"!"), Err(DeviceError::ReadOnly)));
        assert_eq!(read(&shared, 0, 6), b"shared");
        // What does not ask first is stopped by the driver, which then does nothing more for this process.
        let own = region(&device);
        // SAFETY: both ranges are mapped until the end.
        let enqueued = unsafe { device.copy(shared.address(), own.address(), 1, DeviceToDevice, StreamRef::DEFAULT) };
        let (_, code) = refused(enqueued.and_then(|()| device.synchronize()));
        assert_ne!(code, 0);
        drop((own, shared));
        peer.meet();
    });
}

#[test]
fn an_exported_descriptor_is_not_inherited() {
    Stage::new().alone(|| {
        let RegionHandle::CudaVmm(fd) = region(&device(Vmm)).export().unwrap() else { panic!("a descriptor") };
        assert!(rustix::io::fcntl_getfd(&fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    });
}

#[test]
fn devices_take_the_handles_of_their_own_kind() {
    Stage::new().alone(|| {
        let cuda = device(Ipc);
        let host = HostDevice::default();
        let wrong =
            |result: Result<Arc<dyn Region>, _>| assert!(matches!(result, Err(DeviceError::WrongHandle { .. })));
        wrong(cuda.import(host.allocate(1).unwrap().export().unwrap(), 1));
        wrong(cuda.import(RegionHandle::Name("/nowhere".to_owned()), 1));
        for sharing in [Ipc, Vmm] {
            wrong(host.import(region(&device(sharing)).export().unwrap(), 1));
            wrong(InProcessDevice.import(region(&device(sharing)).export().unwrap(), 1));
        }
    });
}

#[test]
fn handles_are_not_shown() {
    let handle = RegionHandle::CudaIpc([123; 64]);
    assert!(!format!("{handle:?}").contains("123"));
    Stage::new().two(hand_over_one(Ipc), |peer| {
        let RegionHandle::CudaIpc(handle) = peer.receive() else { panic!("a handle was expected") };
        let shared = device(Ipc).import(RegionHandle::CudaIpc(handle), 6).unwrap();
        let bytes = format!("{handle:?}");
        let bytes = bytes.trim_matches(['[', ']']);
        assert!(!format!("{shared:?}").contains(bytes), "{shared:?}");
        drop(shared);
        peer.meet();
    });
}

#[test]
fn memory_that_is_used_up_is_told_with_the_bytes_asked_for() {
    Stage::new().set("SUBSTITUTE_CUDA_MEMORY", 8 * MIB).alone(|| {
        for sharing in [Ipc, Vmm] {
            let device = device(sharing);
            let (free, total) = device.free_and_total_bytes().unwrap();
            assert_eq!((free, total), (8 << 20, 8 << 20));
            let refused = device.allocate(9 * MIB);
            assert!(matches!(refused, Err(DeviceError::OutOfMemory { size_bytes, .. }) if size_bytes == 9 * MIB));
            let all = device.allocate(7 * MIB).unwrap();
            assert_eq!(all.size_bytes(), 8 * MIB);
            assert_eq!(device.free_and_total_bytes().unwrap().0, 0);
            drop(all);
            assert_eq!(device.free_and_total_bytes().unwrap().0, 8 << 20);
        }
    });
}

#[test]
fn small_regions_do_not_share_a_block() {
    Stage::new().alone(|| {
        let device = device(Ipc);
        let small = [(); 2].map(|()| device.allocate(1000).unwrap());
        for region in &small {
            assert_eq!(region.size_bytes(), 2 * MIB);
        }
        assert!(small[0].address().abs_diff(small[1].address()) >= 2 * MIB);
    });
}
