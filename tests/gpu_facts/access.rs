//! Whether memory that was opened for reading only can be written to.

use luna_broker::device::cuda::CopyWay::{self, DeviceToDevice, HostToDevice};
use luna_broker::device::cuda::CudaSharing::{Ipc, Vmm};
use luna_broker::device::cuda::StreamRef;
use luna_broker::device::{Device, HostDevice, RegionHandle};
use serde_json::json;

use super::{MIB, device, fact, read, said};
use crate::roles::Stage;

/// The copy goes past the check of this library, straight to the driver.
fn write_to_memory_opened_for_reading(way: CopyWay) {
    Stage::new().unaccounted().two(
        |peer| {
            let shared = device(Vmm).allocate(2 * MIB).unwrap();
            shared.copy_in(0, b"kept").unwrap();
            peer.hand_over(shared.export().unwrap());
            assert_eq!(peer.hear(), b"tried");
            let seen = read(&shared, 0, 4);
            let is_kept = seen.as_ref().is_ok_and(|seen| seen == b"kept");
            let found = json!({
                "way": format!("{way:?}"),
                "owner_reads": said(&seen),
                "is_as_before": is_kept,
                "owner_writes": said(&shared.copy_in(0, b"more")),
            });
            fact("owner_of_memory_opened_for_reading", &found);
            peer.say(b"end");
            assert!(is_kept, "an importer for reading wrote");
        },
        |peer| {
            let RegionHandle::CudaVmm(fd) = peer.receive() else { panic!("a descriptor was expected") };
            let device = device(Ipc);
            let shared = device.import_read_only(fd, 2 * MIB).unwrap().region();
            let seen = read(&shared, 0, 4);
            let (on_gpu, on_host) = (device.allocate(MIB).unwrap(), HostDevice::default().allocate(4096).unwrap());
            let from = if way == DeviceToDevice { on_gpu.address() } else { on_host.address() };
            // SAFETY: both ranges are mapped until the end; what the driver does with the access is the question.
            let enqueued = unsafe { device.copy(shared.address(), from, 4, way, StreamRef::DEFAULT) };
            let done = device.synchronize();
            let found = json!({
                "way": format!("{way:?}"),
                "read": said(&seen),
                "copy_to_it": said(&enqueued),
                "synchronise_after_it": said(&done),
                "next_allocation": said(&device.allocate(MIB)),
            });
            fact("write_to_memory_opened_for_reading", &found);
            peer.say(b"tried");
            assert_eq!(peer.hear(), b"end");
            assert!(enqueued.is_err() || done.is_err(), "the driver let it pass");
        },
    );
}

#[test]
fn copy_within_the_gpu_to_memory_opened_for_reading() {
    write_to_memory_opened_for_reading(DeviceToDevice);
}

#[test]
fn copy_from_the_host_to_memory_opened_for_reading() {
    write_to_memory_opened_for_reading(HostToDevice);
}
