use std::sync::Arc;
use std::time::{Duration, Instant};

use luna_broker::device::cuda::CopyWay::{DeviceToDevice, DeviceToHost, HostToDevice};
use luna_broker::device::cuda::CudaSharing::{Ipc, Vmm};
use luna_broker::device::cuda::StreamRef;
use luna_broker::device::{Device, DeviceError, HostDevice, Place};

use super::{MIB, assert_live, device, fresh, read, refused, region};
use crate::roles::Stage;

/// Longer than a process takes to look at memory.
const SLOW: Duration = Duration::from_millis(300);

#[test]
fn bytes_are_copied_each_way_in_the_order_of_the_stream() {
    Stage::new().set("SUBSTITUTE_CUDA_DELAY_MS", 5).alone(|| {
        let device = device(Ipc);
        let (first, second) = (region(&device), region(&device));
        let (from, to) = (HostDevice::default().allocate(MIB).unwrap(), HostDevice::default().allocate(MIB).unwrap());
        let own = device.stream().unwrap();
        for stream in [own.handle(), StreamRef::DEFAULT] {
            let bytes = fresh(MIB);
            from.copy_in(0, &bytes).unwrap();
            // SAFETY: all four regions hold as many bytes and outlive the synchronisation below.
            unsafe {
                device.copy(first.address(), from.address(), MIB, HostToDevice, stream).unwrap();
                device.copy(second.address() + MIB, first.address(), MIB, DeviceToDevice, stream).unwrap();
                device.copy(to.address(), second.address() + MIB, MIB, DeviceToHost, stream).unwrap();
                device.copy(to.address(), 0, 0, DeviceToHost, stream).unwrap();
            }
            device.synchronize_stream(stream).unwrap();
            assert!(read(&to, 0, MIB) == bytes);
        }
    });
}

#[test]
fn a_pause_holds_back_what_is_enqueued_after_it() {
    Stage::new().alone(|| {
        let device = device(Ipc);
        let stream = device.stream().unwrap();
        let start = Instant::now();
        device.delay(stream.handle(), SLOW).unwrap();
        stream.synchronize().unwrap();
        assert!(start.elapsed() >= SLOW);
    });
}

#[test]
fn a_record_of_gpu_memory_waits_for_the_gpu() {
    Stage::new().alone(|| {
        let device = device(Ipc);
        let (from, to) = (region(&device), region(&device));
        let stream = device.stream().unwrap();
        from.copy_in(0, &[1]).unwrap();
        device.delay(stream.handle(), SLOW).unwrap();
        // SAFETY: both regions outlive the record, which waits for the copy.
        unsafe { device.copy(to.address(), from.address(), 1, DeviceToDevice, stream.handle()) }.unwrap();
        assert_eq!(read(&to, 0, 1), [0], "the copy was not slow: the test shows nothing");
        assert_eq!(to.record().unwrap(), 0);
        assert_eq!(read(&to, 0, 1), [1]);
        to.wait(0).unwrap();
        assert!(matches!(to.wait(1), Err(DeviceError::NotRecorded { awaited: 1, recorded: 0 })));
        to.opened();
        assert_eq!(to.place(), Place::Gpu(device.gpu().uuid));
    });
}

#[test]
fn a_region_is_closed_when_the_work_on_it_is_done() {
    Stage::new().two(
        |peer| {
            let regions = [region(&device(Ipc)), region(&device(Vmm))];
            for region in &regions {
                peer.hand_over(region.export().unwrap());
            }
            peer.meet();
            for region in &regions {
                assert_eq!(read(region, 0, 2), [1, 1]);
            }
        },
        |peer| {
            let device = device(Ipc);
            let ones = region(&device);
            ones.copy_in(0, &[1, 1]).unwrap();
            let stream = device.stream().unwrap();
            for _ in 0..2 {
                let shared = device.import(peer.receive(), 2).unwrap();
                device.delay(stream.handle(), SLOW).unwrap();
                // SAFETY: `ones` outlives the synchronisation in the drop of `shared`, which waits for the copy.
                unsafe { device.copy(shared.address(), ones.address(), 2, DeviceToDevice, stream.handle()) }.unwrap();
                drop(shared);
            }
            peer.meet();
        },
    );
}

#[test]
fn host_memory_is_pinned_once_and_for_as_long_as_asked() {
    Stage::new().alone(|| {
        let device = device(Ipc);
        let host = HostDevice::default().allocate(3 * 4096).unwrap();
        let pinned = device.pin(Arc::clone(&host)).unwrap();
        assert_eq!(pinned.region().address(), host.address());
        assert_live!(registered: 1);
        assert_eq!(refused(device.pin(Arc::clone(&host))), ("cuMemHostRegister_v2", 712));
        drop(pinned);
        assert_live!(registered: 0);
        drop(device.pin(host).unwrap());
        assert!(matches!(device.pin(region(&device)), Err(DeviceError::NotHost)));
    });
}

#[test]
fn copies_to_and_from_pinned_memory_are_done_on_return_too() {
    Stage::new().set("SUBSTITUTE_CUDA_DELAY_MS", 50).alone(|| {
        let device = device(Ipc);
        let pinned = device.pin(HostDevice::default().allocate(4096).unwrap()).unwrap();
        let address = pinned.region().address() as *mut u8;
        // SAFETY: the region is mapped for as many bytes and used through this slice alone until the end.
        let bytes = unsafe { std::slice::from_raw_parts_mut(address, 4096) };
        let region = region(&device);
        bytes.fill(1);
        region.copy_in(0, bytes).unwrap();
        bytes.fill(2);
        assert_eq!(read(&region, 0, 4096), vec![1; 4096]);
        region.copy_out(0, bytes).unwrap();
        assert_eq!(bytes, vec![1; 4096]);
    });
}

#[test]
fn the_cpu_has_no_view_of_gpu_memory() {
    Stage::new().alone(|| {
        let region = region(&device(Ipc));
        let span = luna_broker::device::Span::new(region, 16, 16).unwrap();
        span.write_at(1, &[5]).unwrap();
        let mut bytes = [0xaa; 3];
        span.read(&mut bytes).unwrap();
        assert_eq!(bytes, [0, 5, 0]);
    });
}
