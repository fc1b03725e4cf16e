//! What it costs to make, export, open and close memory, and what a process costs that only has a GPU open.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use luna_broker::device::cuda::CudaSharing::{Ipc, Vmm};
use luna_broker::device::cuda::{CudaDevice, Fence};
use luna_broker::device::{Device, HostDevice};
use serde_json::json;

use super::{MIB, device, fact, median, microseconds, name, read, real_or, twice};
use crate::roles::Stage;

/// Times of one step, by sharing, bytes and what was done.
#[derive(Default)]
struct Times(BTreeMap<(&'static str, usize), BTreeMap<&'static str, Vec<f64>>>);

impl Times {
    fn add(&mut self, sharing: &'static str, bytes: usize, done: &'static str, since: Instant) {
        self.0.entry((sharing, bytes)).or_default().entry(done).or_default().push(microseconds(since));
    }

    fn tell(self, what: &str) {
        for ((sharing, bytes), steps) in self.0 {
            let medians: BTreeMap<_, _> =
                steps.into_iter().map(|(done, mut times)| (done, median(&mut times))).collect();
            fact(what, &json!({ "sharing": sharing, "bytes": bytes, "median_us": medians }));
        }
    }
}

/// 2 MiB to 8 GiB, as far as half of the free memory goes.
fn sizes(device: &CudaDevice) -> Vec<usize> {
    let wanted = real_or([2, 32, 256, 1024, 4096, 8192].as_slice(), &[2, 4]);
    let (free, _) = device.free_and_total_bytes().unwrap();
    wanted.iter().map(|size| size * MIB).filter(|size| 2 * *size as u64 <= free).collect()
}

#[test]
fn opening_by_size() {
    Stage::new().two(
        |peer| {
            let devices = [device(Ipc), device(Vmm)];
            let sizes = sizes(&devices[0]);
            let mut times = Times::default();
            // Round by round, so that what the machine does meanwhile meets all of them.
            for _ in 0..real_or(7, 2) {
                for &size in &sizes {
                    for device in &devices {
                        let sharing = name(device.sharing());
                        let start = Instant::now();
                        let region = device.allocate(size).unwrap();
                        times.add(sharing, size, "allocate_and_clear", start);
                        region.copy_in(size - 1, b"!").unwrap();
                        let start = Instant::now();
                        let handle = region.export().unwrap();
                        times.add(sharing, size, "export", start);
                        peer.say(sharing.as_bytes());
                        peer.say_number(size as u64);
                        peer.hand_over(handle);
                        assert_eq!(peer.hear(), b"closed");
                        let start = Instant::now();
                        drop(region);
                        times.add(sharing, size, "free", start);
                    }
                }
            }
            peer.say(b"end");
            times.tell("making_by_size");
        },
        |peer| {
            let device = device(Ipc);
            let mut times = Times::default();
            loop {
                let sharing = match peer.hear().as_slice() {
                    b"legacy" => "legacy",
                    b"vmm" => "vmm",
                    _ => break,
                };
                let size = peer.hear_number() as usize;
                for (handle, [open, close]) in
                    twice(peer.receive()).into_iter().zip([["open", "close"], ["open_again", "close_again"]])
                {
                    let start = Instant::now();
                    let region = device.import(handle, size).unwrap();
                    times.add(sharing, size, open, start);
                    let start = Instant::now();
                    assert_eq!(read(&region, size - 1, 1).unwrap(), b"!");
                    if open == "open" {
                        times.add(sharing, size, "first_read", start);
                    }
                    let start = Instant::now();
                    drop(region);
                    times.add(sharing, size, close, start);
                }
                peer.say(b"closed");
            }
            times.tell("opening_by_size");
        },
    );
}

#[test]
fn memory_that_a_process_costs() {
    const STEPS: [&str; 3] = ["context", "region_of_2_mib", "fence"];
    Stage::new().two(
        |peer| {
            let done = || {
                peer.meet();
                peer.meet();
            };
            peer.meet();
            let device = device(Ipc);
            done();
            let region = device.allocate(2 * MIB).unwrap();
            done();
            let page = HostDevice::default().allocate(4096).unwrap();
            let fence = Fence::create(&device, Arc::clone(&page)).unwrap();
            done();
            drop((fence, page, region));
        },
        |peer| {
            let device = device(Ipc);
            let free = || i128::from(device.free_and_total_bytes().unwrap().0);
            let mut before = free();
            peer.meet();
            for step in STEPS {
                peer.meet();
                let now = free();
                let taken = i64::try_from(before - now).unwrap();
                fact("memory_of_a_process", &json!({ "of": step, "bytes": taken }));
                before = now;
                peer.meet();
            }
        },
    );
}
