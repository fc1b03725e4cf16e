//! What the other process finds when one is killed, or frees what is still open elsewhere.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use luna_broker::device::cuda::CopyWay::DeviceToDevice;
use luna_broker::device::cuda::CudaSharing::{self, Ipc, Vmm};
use luna_broker::device::cuda::{CudaDevice, Fence, FenceHandle, StreamRef};
use luna_broker::device::{Device, DeviceError, HostDevice, Region};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::{Value, json};

use super::{MIB, device, fact, fresh, name, read, real_or, said, twice};
use crate::roles::{Peer, Role, Stage};

/// Ends this process as a crash would: nothing of it runs any more.
fn die() -> ! {
    kill_process(rustix::process::getpid(), Signal::KILL).unwrap();
    unreachable!("the signal cannot be caught");
}

fn size() -> usize {
    real_or(64 * MIB, 2 * MIB)
}

/// Until the system has taken a process down, which goes on after its sockets are closed.
fn settle() {
    std::thread::sleep(Duration::from_millis(real_or(500, 50)));
}

/// `None` where the driver says nothing more to this process.
fn free_bytes(device: &CudaDevice) -> Option<u64> {
    device.free_and_total_bytes().ok().map(|(free, _)| free)
}

/// Has other memory allocated and cleared, as much as there is within reason, so that what only looks kept is lost.
fn refill(device: &CudaDevice) -> (Vec<Arc<dyn Region>>, u64) {
    let chunk = real_or(1024 * MIB, 2 * MIB);
    let count = (free_bytes(device).unwrap_or(0) / 10 * 9 / chunk as u64).min(real_or(256, 4));
    let regions: Vec<_> = (0..count).map_while(|_| device.allocate(chunk).ok()).collect();
    let bytes = regions.len() as u64 * chunk as u64;
    (regions, bytes)
}

/// What a process makes of memory whose owner is gone.
fn survey(device: &Arc<CudaDevice>, shared: &Arc<dyn Region>, expected: &[u8]) -> Value {
    let look = || {
        let seen = read(shared, 0, expected.len());
        json!({ "said": said(&seen), "is_as_before": seen.is_ok_and(|seen| seen == expected) })
    };
    let first = look();
    let (filler, filled_bytes) = refill(device);
    let after_refill = look();
    drop(filler);
    let own = device.allocate(MIB);
    let copied = own.as_ref().map(|own| {
        // SAFETY: both ranges are mapped; they are unmapped after the synchronisation.
        let enqueued = unsafe { device.copy(own.address(), shared.address(), MIB, DeviceToDevice, StreamRef::DEFAULT) };
        enqueued.and_then(|()| device.synchronize())
    });
    let wrote = shared.copy_in(0, &[1; 64]);
    let back = read(shared, 0, 64);
    json!({
        "read": first,
        "filled_bytes": filled_bytes,
        "read_after_refill": after_refill,
        "copy_within_the_gpu": copied.map_or_else(ToString::to_string, |result| said(&result)),
        "write": said(&wrote),
        "write_is_seen": back.is_ok_and(|back| back == [1; 64]),
        "new_allocation": said(&device.allocate(MIB)),
    })
}

/// The owner shares one region and then ends in the given way; the importer looks at what it has.
fn owner_leaves(stage: Stage, sharing: CudaSharing, how: &'static str, leave: impl FnOnce(Peer, Arc<dyn Region>)) {
    stage.two(
        |peer| {
            let shared = device(sharing).allocate(size()).unwrap();
            let bytes = fresh(size());
            shared.copy_in(0, &bytes).unwrap();
            peer.hand_over(shared.export().unwrap());
            peer.say(&bytes);
            peer.meet();
            leave(peer, shared);
        },
        |peer| {
            let device = device(Ipc);
            let [handle, again] = twice(peer.receive());
            let shared = device.import(handle, size()).unwrap();
            let bytes = peer.hear();
            assert!(read(&shared, 0, size()).unwrap() == bytes);
            peer.meet();
            // Either that it has freed the memory, or the end of the socket.
            let word = peer.listen();
            settle();
            let mut found = survey(&device, &shared, &bytes);
            let before = free_bytes(&device);
            drop(shared);
            let freed = free_bytes(&device).zip(before).map(|(after, before)| after.saturating_sub(before));
            found["bytes_freed_by_closing"] = json!(freed);
            let opened = device.import(again, size());
            found["opened_again"] = json!(said(&opened));
            fact("owner_leaves", &json!({ "sharing": name(sharing), "owner": how, "importer": found }));
            if sharing == Vmm {
                // What a reconnecting client relies on.
                assert_eq!(found["read_after_refill"]["is_as_before"], true);
            }
            if word.is_some() {
                peer.say(b"seen");
            }
        },
    );
}

fn owner_is_killed(sharing: CudaSharing) {
    // The importer's driver may well refuse to close what is gone.
    let stage = Stage::new().killed(Role::Broker).unaccounted();
    owner_leaves(stage, sharing, "killed", |_, _| die());
}

#[test]
fn owner_killed_while_its_plain_memory_is_open() {
    owner_is_killed(Ipc);
}

#[test]
fn owner_killed_while_its_vmm_memory_is_open() {
    owner_is_killed(Vmm);
}

fn owner_frees(sharing: CudaSharing) {
    owner_leaves(Stage::new().unaccounted(), sharing, "freed it", |peer, shared| {
        drop(shared);
        peer.say(b"freed");
        assert_eq!(peer.hear(), b"seen");
    });
}

#[test]
fn owner_frees_plain_memory_that_is_open() {
    owner_frees(Ipc);
}

#[test]
fn owner_frees_vmm_memory_that_is_open() {
    owner_frees(Vmm);
}

fn importer_is_killed(sharing: CudaSharing) {
    Stage::new().killed(Role::Client).two(
        |peer| {
            let device = device(sharing);
            let before = free_bytes(&device);
            let shared = device.allocate(size()).unwrap();
            let bytes = fresh(size());
            shared.copy_in(0, &bytes).unwrap();
            peer.hand_over(shared.export().unwrap());
            assert_eq!(peer.hear(), b"open");
            assert!(peer.listen().is_none());
            settle();
            let seen = read(&shared, 0, size());
            let wrote = shared.copy_in(0, &[1; 64]);
            let is_kept = seen.as_ref().is_ok_and(|seen| *seen == bytes);
            let result = said(&seen);
            drop(shared);
            let missing = before.zip(free_bytes(&device)).map(|(before, after)| i128::from(before) - i128::from(after));
            let missing = missing.and_then(|bytes| i64::try_from(bytes).ok());
            fact(
                "importer_is_killed",
                &json!({
                    "sharing": name(sharing),
                    "owner_reads": result,
                    "is_as_before": is_kept,
                    "owner_writes": said(&wrote),
                    "bytes_missing_after_free": missing,
                    "new_allocation": said(&device.allocate(MIB)),
                }),
            );
            assert!(is_kept, "the owner's memory is its own");
        },
        |peer| {
            let shared = device(Ipc).import(peer.receive(), size()).unwrap();
            read(&shared, 0, 1).unwrap();
            peer.say(b"open");
            die();
        },
    );
}

#[test]
fn importer_killed_with_plain_memory_open() {
    importer_is_killed(Ipc);
}

#[test]
fn importer_killed_with_vmm_memory_open() {
    importer_is_killed(Vmm);
}

/// Slots of a dead client are given to others once the system says that it has ended: nothing may write there then.
#[test]
fn importer_killed_while_it_writes() {
    Stage::new().killed(Role::Client).two(
        |peer| {
            let shared = device(Ipc).allocate(size()).unwrap();
            peer.hand_over(shared.export().unwrap());
            let process = Pid::from_raw(i32::try_from(peer.hear_number()).unwrap()).unwrap();
            let handle = pidfd_open(process, PidfdFlags::empty()).unwrap();
            assert_eq!(peer.hear(), b"writing");
            std::thread::sleep(Duration::from_millis(100));
            kill_process(process, Signal::KILL).unwrap();
            let start = Instant::now();
            let patience = Timespec { tv_sec: 20, tv_nsec: 0 };
            let is_over = poll(&mut [PollFd::new(&handle.as_fd(), PollFlags::IN)], Some(&patience)).unwrap() == 1;
            let ended_after = start.elapsed();
            let look = || Ok::<_, DeviceError>([read(&shared, 0, 1)?, read(&shared, size() - 1, 1)?]);
            let first = look();
            let start = Instant::now();
            let (mut looks, mut changes) = (0u32, 0u32);
            while start.elapsed() < Duration::from_millis(500) {
                looks += 1;
                changes += u32::from(!look().is_ok_and(|seen| first.as_ref().is_ok_and(|first| seen == *first)));
            }
            fact(
                "writes_of_a_killed_importer",
                &json!({
                    "the_system_says_it_ended": is_over,
                    "seconds_until_it_says_so": ended_after.as_secs_f64(),
                    "first_look": said(&first),
                    "looks_after_that": looks,
                    "looks_that_saw_something_else": changes,
                }),
            );
            assert!(is_over && changes == 0, "a dead client's memory is not safe to give away");
        },
        |peer| {
            let device = device(Ipc);
            let shared = device.import(peer.receive(), size()).unwrap();
            let sources = [1, 2].map(|value| {
                let source = device.allocate(size()).unwrap();
                source.copy_in(0, &vec![value; size()]).unwrap();
                source
            });
            peer.say_number(u64::from(std::process::id()));
            let stream = device.stream().unwrap();
            for round in 0u64.. {
                for source in &sources {
                    // SAFETY: all regions are mapped as long as this process lives.
                    unsafe { device.copy(shared.address(), source.address(), size(), DeviceToDevice, stream.handle()) }
                        .unwrap();
                }
                if round == 50 {
                    peer.say(b"writing");
                }
                // The queue of the substitute knows no limit.
                if round % 64 == 63 {
                    stream.synchronize().unwrap();
                }
            }
        },
    );
}

/// A worker's stream waits for the broker's mark, and the broker dies before its GPU work comes there.
#[test]
fn owner_killed_while_a_stream_waits_for_its_mark() {
    const PATIENCE: Duration = Duration::from_secs(10);
    Stage::new().killed(Role::Broker).killed(Role::Client).two(
        |peer| {
            let device = device(Ipc);
            let page = HostDevice::default().allocate(4096).unwrap();
            let fence = Fence::create(&device, Arc::clone(&page)).unwrap();
            peer.hand_over(page.export().unwrap());
            peer.say(&fence.handle().unwrap().to_bytes());
            let stream = device.stream().unwrap();
            device.delay(stream.handle(), 10 * PATIENCE).unwrap();
            peer.say_number(fence.record(stream.handle()).unwrap());
            assert_eq!(peer.hear(), b"waiting");
            die();
        },
        |peer| {
            let device = device(Ipc);
            let page = HostDevice::default().import(peer.receive(), 4096).unwrap();
            let fence = Fence::open(&device, page, &FenceHandle::from_bytes(&peer.hear()).unwrap()).unwrap();
            let stream = device.stream().unwrap();
            fence.wait(peer.hear_number(), stream.handle()).unwrap();
            let behind = fence.record(stream.handle()).unwrap();
            let was_waiting = !fence.passed_own(behind).unwrap();
            peer.say(b"waiting");
            assert!(peer.listen().is_none());
            let start = Instant::now();
            let outcome = loop {
                match fence.passed_own(behind) {
                    Ok(true) => break "the wait ended".to_owned(),
                    Ok(false) if start.elapsed() > PATIENCE => break "the wait did not end".to_owned(),
                    Ok(false) => std::thread::sleep(Duration::from_millis(1)),
                    Err(error) => break error.to_string(),
                }
            };
            fact(
                "wait_for_a_killed_owner",
                &json!({
                    "was_waiting": was_waiting,
                    "outcome": outcome,
                    "seconds": start.elapsed().as_secs_f64(),
                    "new_allocation": said(&device.allocate(MIB)),
                }),
            );
            // An ordinary end would wait for the stream, perhaps for ever.
            die();
        },
    );
}
