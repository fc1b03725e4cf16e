use std::sync::Arc;

use luna_broker::device::{Device, DeviceError, HostDevice, HostSharing, InProcessDevice, Region, Span};

const SIZE: usize = 3 * 4096 + 512;

/// An owner's region and what an importer makes of its handle.
pub(crate) fn shared(device: &dyn Device) -> (Arc<dyn Region>, Arc<dyn Region>) {
    let owner = device.allocate(SIZE).unwrap();
    let importer = device.import(owner.export().unwrap(), owner.size_bytes()).unwrap();
    (owner, importer)
}

pub(crate) fn span(region: &Arc<dyn Region>, offset: usize, length: usize) -> Span {
    Span::new(Arc::clone(region), offset, length).unwrap()
}

pub(crate) fn read(region: &Arc<dyn Region>, offset: usize, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xaa; length];
    span(region, offset, length).read(&mut bytes).unwrap();
    bytes
}

pub(crate) fn a_new_region_is_zeroed_and_large_enough(device: &dyn Device) {
    let (owner, importer) = shared(device);
    assert!(owner.size_bytes() >= SIZE);
    assert_eq!(importer.size_bytes(), owner.size_bytes());
    assert_eq!((owner.place(), importer.place()), (device.place(), device.place()));
    let size = owner.size_bytes();
    assert!(read(&owner, 0, size) == vec![0; size]);
    assert!(read(&importer, 0, size) == vec![0; size]);
}

pub(crate) fn both_sides_see_what_either_writes(device: &dyn Device) {
    let (owner, importer) = shared(device);
    let last = owner.size_bytes() - 4;
    span(&owner, 0, 4).write(&[1, 2, 3, 4]).unwrap();
    span(&importer, last, 4).write(&[5, 6, 7, 8]).unwrap();
    assert_eq!(read(&importer, 0, 4), [1, 2, 3, 4]);
    assert_eq!(read(&owner, last, 4), [5, 6, 7, 8]);
}

pub(crate) fn an_importer_reads_after_the_owner_is_gone(device: &dyn Device) {
    let (owner, importer) = shared(device);
    span(&owner, 100, 1).write(&[7]).unwrap();
    drop(owner);
    assert_eq!(read(&importer, 100, 1), [7]);
}

fn a_published_write_is_awaited_by_its_number_and_an_early_reader_is_told(device: &dyn Device) {
    let (owner, importer) = shared(device);
    importer.wait(0).unwrap();
    let first = owner.record().unwrap();
    importer.wait(first).unwrap();
    assert!(matches!(importer.wait(first + 1), Err(DeviceError::NotRecorded { awaited, recorded })
        if awaited == first + 1 && recorded == first));
    let second = owner.record().unwrap();
    assert!(second > first);
    importer.wait(second).unwrap();
    importer.wait(first).unwrap();
}

pub(crate) fn a_region_smaller_than_announced_is_refused(device: &dyn Device) {
    let owner = device.allocate(SIZE).unwrap();
    let size = owner.size_bytes();
    let refused = device.import(owner.export().unwrap(), size + 1);
    assert!(matches!(refused, Err(DeviceError::TooSmall { announced, actual })
        if announced == size + 1 && actual == size));
}

pub(crate) fn a_range_outside_the_region_is_refused(device: &dyn Device) {
    let (owner, importer) = shared(device);
    for region in [owner, importer] {
        let size = region.size_bytes();
        for (offset, length) in [(size, 1), (0, size + 1), (usize::MAX, 2), (1, usize::MAX)] {
            let outside = Span::new(Arc::clone(&region), offset, length);
            assert!(matches!(outside, Err(DeviceError::OutOfBounds { .. })), "{offset} {length}");
        }
        for offset in [size - 1, size, usize::MAX] {
            assert!(matches!(region.copy_in(offset, &[1, 2]), Err(DeviceError::OutOfBounds { .. })), "{offset}");
            assert!(matches!(region.copy_out(offset, &mut [0, 0]), Err(DeviceError::OutOfBounds { .. })), "{offset}");
        }
        let inside = span(&region, size - 1, 1);
        assert!(matches!(inside.write(&[1, 2]), Err(DeviceError::OutOfBounds { .. })));
        assert!(matches!(inside.write_at(1, &[1]), Err(DeviceError::OutOfBounds { .. })));
        assert!(matches!(inside.read(&mut [0, 0]), Err(DeviceError::OutOfBounds { .. })));
    }
}

pub(crate) fn a_span_keeps_its_region(device: &dyn Device) {
    let region = device.allocate(SIZE).unwrap();
    let last = span(&region, SIZE - 1, 1);
    drop(region);
    last.write(&[9]).unwrap();
    let mut byte = [0];
    last.read(&mut byte).unwrap();
    assert_eq!(byte, [9]);
}

pub(crate) fn more_memory_than_there_is_is_an_error(device: &dyn Device) {
    for size in [usize::MAX - 4096, usize::MAX / 2] {
        assert!(
            matches!(device.allocate(size), Err(DeviceError::OutOfMemory { size_bytes, .. }) if size_bytes == size)
        );
    }
}

pub(crate) fn an_exported_region_can_be_exported_again_and_its_name_removed_twice(device: &dyn Device) {
    let (owner, _importer) = shared(device);
    let again = device.import(owner.export().unwrap(), owner.size_bytes()).unwrap();
    span(&owner, 0, 1).write(&[3]).unwrap();
    assert_eq!(read(&again, 0, 1), [3]);
    owner.opened();
    owner.opened();
}

/// Does not hold for memory of the own process, which needs no import.
pub(crate) fn an_importer_does_not_export(device: &dyn Device) {
    let (_owner, importer) = shared(device);
    assert!(matches!(importer.export(), Err(DeviceError::Imported)));
}

macro_rules! suite {
    ($($implementation:ident: $device:expr;)*) => {$(
        mod $implementation {
            use super::*;

            suite! { @rules $device;
                a_new_region_is_zeroed_and_large_enough
                both_sides_see_what_either_writes
                an_importer_reads_after_the_owner_is_gone
                a_published_write_is_awaited_by_its_number_and_an_early_reader_is_told
                a_region_smaller_than_announced_is_refused
                a_range_outside_the_region_is_refused
                a_span_keeps_its_region
                more_memory_than_there_is_is_an_error
                an_exported_region_can_be_exported_again_and_its_name_removed_twice
            }
        }
    )*};
    (@rules $device:expr; $($rule:ident)*) => {$(
        #[test]
        fn $rule() {
            super::$rule(&$device);
        }
    )*};
}

suite! {
    named: HostDevice::new(HostSharing::Named);
    in_process: InProcessDevice;
}

#[cfg(target_os = "linux")]
suite! {
    memfd: HostDevice::new(HostSharing::Memfd);
}

#[test]
fn an_importer_of_a_named_segment_does_not_export() {
    an_importer_does_not_export(&HostDevice::new(HostSharing::Named));
}

#[test]
fn a_handle_of_another_kind_of_device_is_refused() {
    let local = InProcessDevice.allocate(SIZE).unwrap();
    let shared = HostDevice::default().allocate(SIZE).unwrap();
    assert!(matches!(
        HostDevice::default().import(local.export().unwrap(), SIZE),
        Err(DeviceError::WrongHandle { .. })
    ));
    assert!(matches!(InProcessDevice.import(shared.export().unwrap(), SIZE), Err(DeviceError::WrongHandle { .. })));
}

#[cfg(target_os = "linux")]
mod sealed {
    use std::os::fd::AsFd;

    use luna_broker::device::RegionHandle;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    #[test]
    fn an_importer_does_not_export() {
        super::an_importer_does_not_export(&HostDevice::new(HostSharing::Memfd));
    }

    #[test]
    fn nobody_can_shrink_or_grow_the_memory() {
        let owner = HostDevice::new(HostSharing::Memfd).allocate(SIZE).unwrap();
        let RegionHandle::Fd(fd) = owner.export().unwrap() else { panic!("a memfd is exported by its descriptor") };
        for size in [0, 4096, 1 << 30] {
            assert_eq!(ftruncate(fd.as_fd(), size), Err(rustix::io::Errno::PERM), "{size}");
        }
        assert_eq!(read(&owner, 0, SIZE), vec![0; SIZE]);
    }

    #[test]
    fn memory_that_a_peer_could_shrink_is_refused() {
        let fd = memfd_create("unsealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, 1 << 20).unwrap();
        let refused = HostDevice::default().import(RegionHandle::Fd(fd), 4096);
        assert!(matches!(refused, Err(DeviceError::NotSealed)));
    }

    #[test]
    fn a_descriptor_that_is_no_memory_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let refused = HostDevice::default().import(RegionHandle::Fd(file.into()), 4096);
        assert!(matches!(refused, Err(DeviceError::NotSealed)));
    }

    #[test]
    fn named_segments_are_for_this_user_only_and_gone_once_opened() {
        use std::os::unix::fs::PermissionsExt;
        let (owner, _importer) = shared(&HostDevice::new(HostSharing::Named));
        let RegionHandle::Name(name) = owner.export().unwrap() else { panic!("a segment is exported by its name") };
        let file = std::path::Path::new("/dev/shm").join(name.trim_start_matches('/'));
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        owner.opened();
        assert!(!file.exists());
    }
}
