use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use luna_broker::device::cuda::CopyWay::DeviceToDevice;
use luna_broker::device::cuda::CudaSharing::Ipc;
use luna_broker::device::cuda::{CudaDevice, CudaStream, Fence, FenceHandle, StreamRef};
use luna_broker::device::{Device, DeviceError, HostDevice, Region};

use super::{assert_live, device, fresh, read, refused, region};
use crate::roles::{Peer, Stage};

const SLOW: Duration = Duration::from_millis(300);
const BYTES: usize = 64 << 10;
const EVENTS: u64 = Fence::EVENTS as u64;

/// One process's end of a fence and a region.
struct End {
    peer: Peer,
    device: Arc<CudaDevice>,
    fence: Fence,
    page: Arc<dyn Region>,
    shared: Arc<dyn Region>,
    /// Not shared: where bytes come from and go to.
    own: Arc<dyn Region>,
    stream: CudaStream,
}

impl End {
    fn of_broker(peer: Peer) -> Self {
        let device = device(Ipc);
        let page = HostDevice::default().allocate(4096).unwrap();
        let shared = region(&device);
        let fence = Fence::create(&device, Arc::clone(&page)).unwrap();
        peer.hand_over(page.export().unwrap());
        peer.hand_over(shared.export().unwrap());
        peer.say(&fence.handle().unwrap().to_bytes());
        Self::new(peer, device, fence, page, shared)
    }

    fn of_client(peer: Peer) -> Self {
        let device = device(Ipc);
        let page = HostDevice::default().import(peer.receive(), 4096).unwrap();
        let shared = device.import(peer.receive(), 2 * BYTES).unwrap();
        let handle = FenceHandle::from_bytes(&peer.hear()).unwrap();
        let fence = Fence::open(&device, Arc::clone(&page), &handle).unwrap();
        Self::new(peer, device, fence, page, shared)
    }

    fn new(peer: Peer, device: Arc<CudaDevice>, fence: Fence, page: Arc<dyn Region>, shared: Arc<dyn Region>) -> Self {
        let (own, stream) = (region(&device), device.stream().unwrap());
        Self { peer, device, fence, page, shared, own, stream }
    }

    /// Enqueues, behind a pause, that `bytes` get into the shared region at `offset`.
    fn write_slowly(&self, offset: usize, bytes: &[u8], pause: Duration) {
        // Not while a copy enqueued before still reads from there.
        self.stream.synchronize().unwrap();
        self.own.copy_in(0, bytes).unwrap();
        self.device.delay(self.stream.handle(), pause).unwrap();
        self.copy(self.shared.address() + offset, self.own.address(), bytes.len());
    }

    /// What the stream finds in the shared region once it has come to this point.
    fn take(&self, offset: usize, length: usize) -> Vec<u8> {
        self.copy(self.own.address() + BYTES, self.shared.address() + offset, length);
        self.stream.synchronize().unwrap();
        read(&self.own, BYTES, length)
    }

    fn copy(&self, to: usize, from: usize, bytes: usize) {
        // SAFETY: both ranges lie in regions that `self` holds; they go after the synchronisation in their drop.
        unsafe { self.device.copy(to, from, bytes, DeviceToDevice, self.stream.handle()) }.unwrap();
    }

    /// The memory is the broker's: it stays until the client has closed it.
    fn end_of_client(self) {
        let Self { peer, device, fence, page, shared, own, stream } = self;
        drop((fence, stream, shared, own, page, device));
        peer.meet();
    }

    fn end_of_broker(self) {
        self.peer.meet();
    }
}

#[test]
fn each_side_sees_what_the_other_wrote_before_its_mark() {
    const ROUNDS: usize = 12;
    Stage::new().set("SUBSTITUTE_CUDA_DELAY_MS", 2).two(
        |peer| {
            let end = End::of_broker(peer);
            for _ in 0..ROUNDS {
                let bytes = fresh(BYTES);
                end.write_slowly(0, &bytes, Duration::from_millis(20));
                end.peer.say_number(end.fence.record(end.stream.handle()).unwrap());
                end.peer.say(&bytes);
                let mark = end.peer.hear_number();
                end.fence.wait(mark, end.stream.handle()).unwrap();
                assert!(end.take(BYTES, BYTES) == end.peer.hear());
            }
            end.end_of_broker();
        },
        |peer| {
            let end = End::of_client(peer);
            for _ in 0..ROUNDS {
                let mark = end.peer.hear_number();
                end.fence.wait(mark, end.stream.handle()).unwrap();
                assert!(end.take(0, BYTES) == end.peer.hear());
                let bytes = fresh(BYTES);
                end.write_slowly(BYTES, &bytes, Duration::from_millis(20));
                end.peer.say_number(end.fence.record(end.stream.handle()).unwrap());
                end.peer.say(&bytes);
            }
            end.end_of_client();
        },
    );
}

/// The control of the test above: what it finds is the wait's doing.
#[test]
fn without_a_wait_the_other_side_sees_old_bytes() {
    Stage::new().two(
        |peer| {
            let end = End::of_broker(peer);
            let bytes = fresh(BYTES);
            end.write_slowly(0, &bytes, SLOW);
            end.fence.record(end.stream.handle()).unwrap();
            end.peer.say(&bytes);
            end.end_of_broker();
        },
        |peer| {
            let end = End::of_client(peer);
            let bytes = end.peer.hear();
            assert!(end.take(0, BYTES) == vec![0; BYTES]);
            end.fence.wait(1, end.stream.handle()).unwrap();
            assert!(end.take(0, BYTES) == bytes);
            end.end_of_client();
        },
    );
}

#[test]
fn the_cpu_can_wait_for_a_mark_too() {
    Stage::new().two(
        |peer| {
            let end = End::of_broker(peer);
            let bytes = fresh(BYTES);
            end.write_slowly(0, &bytes, SLOW);
            let mark = end.fence.record(end.stream.handle()).unwrap();
            assert!(!end.fence.passed_own(mark).unwrap());
            end.peer.say_number(mark);
            end.peer.say(&bytes);
            end.fence.synchronize_own(mark).unwrap();
            assert!(end.fence.passed_own(mark).unwrap());
            end.end_of_broker();
        },
        |peer| {
            let end = End::of_client(peer);
            let mark = end.peer.hear_number();
            assert!(!end.fence.passed_peers(mark).unwrap());
            end.fence.synchronize_peers(mark).unwrap();
            assert!(read(&end.shared, 0, BYTES) == end.peer.hear());
            assert!(end.fence.passed_peers(mark).unwrap());
            end.end_of_client();
        },
    );
}

#[test]
fn a_wait_for_a_mark_that_was_not_made_is_refused() {
    Stage::new().two(
        |peer| {
            let end = End::of_broker(peer);
            let own = end.stream.handle();
            assert_eq!(end.fence.recorded(), 0);
            assert!(end.fence.passed_own(0).unwrap());
            assert!(matches!(end.fence.synchronize_own(1), Err(DeviceError::NotRecorded { awaited: 1, recorded: 0 })));
            end.peer.meet();
            assert_eq!(end.fence.record(own).unwrap(), 1);
            assert_eq!(end.fence.recorded(), 1);
            end.peer.meet();
            end.end_of_broker();
        },
        |peer| {
            let end = End::of_client(peer);
            let early = |sequence, newest| {
                let refused = |result: Result<(), DeviceError>| {
                    assert!(matches!(result, Err(DeviceError::NotRecorded { awaited, recorded })
                        if awaited == sequence && recorded == newest));
                };
                refused(end.fence.wait(sequence, end.stream.handle()));
                refused(end.fence.passed_peers(sequence).map(|_| ()));
                refused(end.fence.synchronize_peers(sequence));
            };
            end.fence.wait(0, end.stream.handle()).unwrap();
            early(1, 0);
            // Own marks are not the peer's.
            end.fence.record(end.stream.handle()).unwrap();
            early(1, 0);
            end.peer.meet();
            end.peer.meet();
            end.fence.wait(1, end.stream.handle()).unwrap();
            early(2, 1);
            early(u64::MAX, 1);
            end.end_of_client();
        },
    );
}

#[test]
fn marks_keep_their_order_long_after_their_events_were_used_again() {
    const MARKS: u64 = 3 * EVENTS + 5;
    Stage::new().two(
        |peer| {
            let end = End::of_broker(peer);
            let other = end.device.stream().unwrap();
            let bytes = fresh(8 * MARKS as usize);
            end.own.copy_in(0, &bytes).unwrap();
            for mark in 1..=MARKS {
                // Slow work on one stream, marks of quick work on another between.
                let (stream, at) = (if mark % 2 == 0 { &other } else { &end.stream }, 8 * (mark as usize - 1));
                if mark % 16 == 1 {
                    end.device.delay(stream.handle(), Duration::from_millis(30)).unwrap();
                }
                let (to, from) = (end.shared.address() + at, end.own.address() + at);
                // SAFETY: both regions outlive the work: their drop waits for it.
                unsafe { end.device.copy(to, from, 8, DeviceToDevice, stream.handle()) }.unwrap();
                assert_eq!(end.fence.record(stream.handle()).unwrap(), mark);
            }
            end.peer.say(&bytes);
            end.end_of_broker();
        },
        |peer| {
            let end = End::of_client(peer);
            let bytes = end.peer.hear();
            // The first one lies on the stream that has nothing slow on it.
            for mark in [EVENTS, 1, EVENTS + 1, 2 * EVENTS, MARKS - EVENTS, MARKS - 1, MARKS] {
                end.fence.wait(mark, end.stream.handle()).unwrap();
                let length = 8 * mark as usize;
                assert!(end.take(0, length) == bytes[..length], "{mark}");
                assert!(end.fence.passed_peers(mark).unwrap(), "{mark}");
            }
            end.end_of_client();
        },
    );
}

#[test]
fn events_used_again_do_not_hide_what_has_passed() {
    Stage::new().two(
        |peer| {
            let end = End::of_broker(peer);
            let stream = end.stream.handle();
            let passed = EVENTS + 8;
            for _ in 0..passed {
                end.fence.record(stream).unwrap();
            }
            end.device.synchronize().unwrap();
            end.device.delay(stream, SLOW).unwrap();
            let newest = (0..10).map(|_| end.fence.record(stream).unwrap()).last().unwrap();
            end.peer.say_number(passed);
            end.peer.say_number(newest);
            // The events of the first marks stand for pending ones by now.
            for mark in [1, 3, 9, EVENTS, passed] {
                assert!(end.fence.passed_own(mark).unwrap(), "{mark}");
            }
            for mark in [passed + 1, newest] {
                assert!(!end.fence.passed_own(mark).unwrap(), "{mark}");
            }
            end.device.synchronize().unwrap();
            assert!(end.fence.passed_own(newest).unwrap());
            end.end_of_broker();
        },
        |peer| {
            let end = End::of_client(peer);
            let (passed, newest) = (end.peer.hear_number(), end.peer.hear_number());
            for mark in [1, 3, 9, EVENTS, passed] {
                assert!(end.fence.passed_peers(mark).unwrap(), "{mark}");
            }
            for mark in [passed + 1, newest] {
                assert!(!end.fence.passed_peers(mark).unwrap(), "{mark}");
            }
            end.fence.synchronize_peers(newest).unwrap();
            assert!(end.fence.passed_peers(newest).unwrap());
            end.end_of_client();
        },
    );
}

#[test]
fn a_mark_passes_after_the_marks_before_it_on_whatever_streams() {
    Stage::new().two(
        |peer| {
            let end = End::of_broker(peer);
            let bytes = fresh(BYTES);
            end.write_slowly(0, &bytes, SLOW);
            let slow = end.fence.record(end.stream.handle()).unwrap();
            let quick = end.fence.record(end.device.stream().unwrap().handle()).unwrap();
            assert!(!end.fence.passed_own(quick).unwrap());
            end.fence.synchronize_own(quick).unwrap();
            assert!(read(&end.shared, 0, BYTES) == bytes);
            assert!(end.fence.passed_own(slow).unwrap());
            end.end_of_broker();
        },
        |peer| End::of_client(peer).end_of_client(),
    );
}

#[test]
fn marks_of_many_threads_have_numbers_of_their_own() {
    Stage::new().two(
        |peer| {
            let end = End::of_broker(peer);
            let numbers = std::thread::scope(|threads| {
                let threads: Vec<_> = (0..4)
                    .map(|_| {
                        threads.spawn(|| {
                            let stream = end.device.stream().unwrap();
                            let record = || end.fence.record(stream.handle()).unwrap();
                            let numbers: Vec<_> = (0..50).map(|_| record()).collect();
                            assert!(numbers.is_sorted());
                            numbers
                        })
                    })
                    .collect();
                threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<BTreeSet<_>>()
            });
            assert!(numbers.into_iter().eq(1..=200));
            end.peer.meet();
            end.end_of_broker();
        },
        |peer| {
            let end = End::of_client(peer);
            end.peer.meet();
            end.fence.synchronize_peers(200).unwrap();
            assert!(end.fence.passed_peers(1).unwrap());
            end.end_of_client();
        },
    );
}

#[test]
fn a_peer_that_writes_into_the_page_deceives_only_about_itself() {
    Stage::new().two(
        |peer| {
            let end = End::of_broker(peer);
            assert_eq!(end.fence.record(StreamRef::DEFAULT).unwrap(), 1);
            end.peer.meet();
            end.peer.meet();
            assert_eq!(end.fence.recorded(), 1);
            assert_eq!(end.fence.record(StreamRef::DEFAULT).unwrap(), 2);
            assert!(matches!(end.fence.passed_own(3), Err(DeviceError::NotRecorded { .. })));
            for claimed in [1, EVENTS, u64::MAX] {
                end.fence.wait(claimed, end.stream.handle()).unwrap();
                end.fence.passed_peers(claimed).unwrap();
            }
            end.stream.synchronize().unwrap();
            end.end_of_broker();
        },
        |peer| {
            let end = End::of_client(peer);
            end.peer.meet();
            end.page.copy_in(0, &[0xff; 64]).unwrap();
            end.peer.meet();
            end.end_of_client();
        },
    );
}

fn events_do_not_open(fault: &'static str, value: &str) {
    Stage::new().set(fault, value).two(
        |peer| {
            let page = HostDevice::default().allocate(4096).unwrap();
            let fence = Fence::create(&device(Ipc), Arc::clone(&page)).unwrap();
            peer.hand_over(page.export().unwrap());
            peer.say(&fence.handle().unwrap().to_bytes());
            peer.meet();
        },
        |peer| {
            let page = HostDevice::default().import(peer.receive(), 4096).unwrap();
            let handle = FenceHandle::from_bytes(&peer.hear()).unwrap();
            let opened = Fence::open(&device(Ipc), page, &handle);
            assert_eq!(refused(opened).0, "cuIpcOpenEventHandle");
            assert_live!(opened_events: 0);
            peer.meet();
        },
    );
}

#[test]
fn a_system_whose_events_do_not_cross_is_an_error() {
    events_do_not_open("SUBSTITUTE_CUDA_IPC", "refused");
}

#[test]
fn one_event_that_cannot_be_opened_is_an_error_and_leaves_nothing() {
    events_do_not_open("SUBSTITUTE_CUDA_FAIL_EVENT_OPEN", "40");
}

#[test]
fn a_fence_is_handed_on_by_the_side_that_made_it() {
    Stage::new().two(
        |peer| End::of_broker(peer).end_of_broker(),
        |peer| {
            let end = End::of_client(peer);
            assert_eq!(refused(end.fence.handle()).0, "cuIpcGetEventHandle");
            end.end_of_client();
        },
    );
}

#[test]
fn a_page_or_a_number_of_events_that_will_not_do_is_refused() {
    Stage::new().alone(|| {
        let device = device(Ipc);
        let small = HostDevice::default().allocate(63).unwrap();
        assert!(matches!(Fence::create(&device, small), Err(DeviceError::OutOfBounds { .. })));
        assert!(matches!(Fence::create(&device, region(&device)), Err(DeviceError::NotHost)));
        let page = HostDevice::default().allocate(64).unwrap();
        let fence = Fence::create(&device, Arc::clone(&page)).unwrap();
        let handle = fence.handle().unwrap();
        assert_eq!(handle.events.len(), 2 * Fence::EVENTS);
        let bytes = handle.to_bytes();
        assert_eq!(FenceHandle::from_bytes(&bytes).unwrap(), handle);
        for wrong in [&bytes[1..], &bytes[64..], &[bytes.as_slice(), &[0; 64]].concat(), &[]] {
            assert!(matches!(FenceHandle::from_bytes(wrong), Err(DeviceError::WrongHandle { .. })));
        }
        let fewer = FenceHandle { events: handle.events[1..].to_vec() };
        assert!(matches!(Fence::open(&device, page, &fewer), Err(DeviceError::WrongHandle { .. })));
        assert!(
            !format!("{handle:?} {fence:?}").contains(&format!("{}, {}", handle.events[0][0], handle.events[0][1]))
        );
        drop(fence);
        assert_live!(events: 0, opened_events: 0);
    });
}
