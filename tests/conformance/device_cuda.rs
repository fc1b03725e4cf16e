//! The device suite on the CUDA device over the substitute driver. The importer is another process, since a handle
//! cannot be opened where it was made; [`Pair`] lets it look like one device to the rules.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use luna_broker::device::cuda::{CudaDevice, CudaSharing, Driver};
use luna_broker::device::{Device, DeviceError, Place, Region, RegionHandle};

use crate::device;
use crate::roles::{Peer, Stage};

macro_rules! suite {
    ($($sharing:ident $name:ident: $($rule:ident)*;)*) => {$(
        mod $name {
            use super::*;

            $(
                #[test]
                fn $rule() {
                    run(CudaSharing::$sharing, device::$rule);
                }
            )*
        }
    )*};
}

suite! {
    Ipc ipc:
        a_new_region_is_zeroed_and_large_enough
        both_sides_see_what_either_writes
        a_region_smaller_than_announced_is_refused
        a_range_outside_the_region_is_refused
        a_span_keeps_its_region
        more_memory_than_there_is_is_an_error
        an_exported_region_can_be_exported_again_and_its_name_removed_twice
        an_importer_does_not_export;
    Vmm vmm:
        a_new_region_is_zeroed_and_large_enough
        both_sides_see_what_either_writes
        an_importer_reads_after_the_owner_is_gone
        a_range_outside_the_region_is_refused
        a_span_keeps_its_region
        more_memory_than_there_is_is_an_error
        an_exported_region_can_be_exported_again_and_its_name_removed_twice
        an_importer_does_not_export;
}

fn run(sharing: CudaSharing, rule: fn(&dyn Device)) {
    Stage::new().two(
        |peer| {
            let own = CudaDevice::open(Driver::get().unwrap().gpus()[0].uuid, sharing).unwrap();
            rule(&Pair { own, importer: Arc::new(peer), imported: AtomicU64::new(0) });
        },
        obey,
    );
}

/// Allocates here, imports there.
#[derive(Debug)]
struct Pair {
    own: Arc<CudaDevice>,
    importer: Arc<Peer>,
    imported: AtomicU64,
}

impl Device for Pair {
    fn place(&self) -> Place {
        self.own.place()
    }

    fn allocate(&self, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError> {
        self.own.allocate(size_bytes)
    }

    fn import(&self, handle: RegionHandle, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError> {
        self.importer.say(b"import");
        self.importer.hand_over(handle);
        self.importer.say_number(size_bytes as u64);
        answer(&self.importer)?;
        let size_bytes = self.importer.hear_number() as usize;
        let number = self.imported.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(There { importer: Arc::clone(&self.importer), number, size_bytes, place: self.place() }))
    }
}

/// A region of the importing process.
#[derive(Debug)]
struct There {
    importer: Arc<Peer>,
    number: u64,
    size_bytes: usize,
    place: Place,
}

impl There {
    fn ask(&self, what: &[u8], number: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.importer.say(what);
        self.importer.say_number(self.number);
        self.importer.say_number(number);
        self.importer.say(bytes);
        answer(&self.importer)
    }
}

// SAFETY: not host memory.
unsafe impl Region for There {
    fn size_bytes(&self) -> usize {
        self.size_bytes
    }

    fn address(&self) -> usize {
        0
    }

    fn place(&self) -> Place {
        self.place
    }

    fn export(&self) -> Result<RegionHandle, DeviceError> {
        self.ask(b"export", 0, &[])?;
        panic!("an importer exported");
    }

    fn opened(&self) {}

    fn copy_in(&self, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        self.ask(b"write", offset as u64, bytes)
    }

    fn copy_out(&self, offset: usize, target: &mut [u8]) -> Result<(), DeviceError> {
        self.ask(b"read", offset as u64, &(target.len() as u64).to_le_bytes())?;
        target.copy_from_slice(&self.importer.hear());
        Ok(())
    }

    fn record(&self) -> Result<u64, DeviceError> {
        unreachable!("no rule asks an importer of GPU memory to")
    }

    fn wait(&self, _sequence: u64) -> Result<(), DeviceError> {
        unreachable!("no rule asks an importer of GPU memory to")
    }
}

/// The importing process: does what the other one asks until that is gone.
fn obey(peer: Peer) {
    let device = CudaDevice::open(Driver::get().unwrap().gpus()[0].uuid, CudaSharing::Ipc).unwrap();
    let mut regions: Vec<Arc<dyn Region>> = Vec::new();
    while let Some(what) = peer.listen() {
        if what == b"import" {
            let handle = peer.receive();
            let imported = device.import(handle, peer.hear_number() as usize);
            reply(&peer, imported.as_ref().map(|_| ()));
            if let Ok(region) = imported {
                peer.say_number(region.size_bytes() as u64);
                regions.push(region);
            }
            continue;
        }
        let region = &regions[peer.hear_number() as usize];
        let (offset, bytes) = (peer.hear_number() as usize, peer.hear());
        match what.as_slice() {
            b"write" => reply(&peer, region.copy_in(offset, &bytes).as_ref().copied()),
            b"read" => {
                let mut target = vec![0xaa; u64::from_le_bytes(bytes.try_into().unwrap()) as usize];
                let read = region.copy_out(offset, &mut target);
                reply(&peer, read.as_ref().copied());
                if read.is_ok() {
                    peer.say(&target);
                }
            }
            b"export" => reply(&peer, region.export().as_ref().map(|_| ())),
            other => panic!("asked for {}", String::from_utf8_lossy(other)),
        }
    }
}

/// The errors that rules look into cross in numbers.
fn reply(peer: &Peer, result: Result<(), &DeviceError>) {
    let (kind, first, second) = match result {
        Ok(()) => (0, 0, 0),
        Err(&DeviceError::TooSmall { announced, actual }) => (1, announced, actual),
        Err(&DeviceError::OutOfBounds { offset, length, .. }) => (2, offset, length),
        Err(DeviceError::Imported) => (3, 0, 0),
        Err(other) => panic!("the importer failed: {other}"),
    };
    for number in [kind, first, second] {
        peer.say_number(number as u64);
    }
}

fn answer(peer: &Peer) -> Result<(), DeviceError> {
    let [kind, first, second] = [(); 3].map(|()| peer.hear_number() as usize);
    match kind {
        0 => Ok(()),
        1 => Err(DeviceError::TooSmall { announced: first, actual: second }),
        2 => Err(DeviceError::OutOfBounds { offset: first, length: second, size_bytes: 0 }),
        _ => Err(DeviceError::Imported),
    }
}
