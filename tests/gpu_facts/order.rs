//! Order between two processes under load, and what it costs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use luna_broker::device::cuda::CopyWay::DeviceToDevice;
use luna_broker::device::cuda::CudaSharing::Ipc;
use luna_broker::device::cuda::{CudaDevice, CudaStream, Fence, FenceHandle};
use luna_broker::device::{Device, HostDevice, Region};
use serde_json::json;

use super::{MIB, device, fact, fresh, median, microseconds, read, real_or, rounded};
use crate::roles::{Peer, Stage};

/// Bytes of one message; the broker's lie in the first half of the shared region, the client's in the second.
const BYTES: usize = 256 << 10;
/// How long a writer's stream is held up, so that a reader who does not wait is early.
const PAUSE: Duration = Duration::from_millis(1);

/// One process's end of a fence and a region.
struct End {
    peer: Peer,
    device: Arc<CudaDevice>,
    fence: Fence,
    shared: Arc<dyn Region>,
    /// Where bytes come from, and go to behind them.
    own: Arc<dyn Region>,
    stream: CudaStream,
}

impl End {
    fn of_broker(peer: Peer) -> Self {
        let device = device(Ipc);
        let page = HostDevice::default().allocate(4096).unwrap();
        let shared = device.allocate(2 * MIB).unwrap();
        let fence = Fence::create(&device, Arc::clone(&page)).unwrap();
        peer.hand_over(page.export().unwrap());
        peer.hand_over(shared.export().unwrap());
        peer.say(&fence.handle().unwrap().to_bytes());
        Self::new(peer, device, fence, shared)
    }

    fn of_client(peer: Peer) -> Self {
        let device = device(Ipc);
        let page = HostDevice::default().import(peer.receive(), 4096).unwrap();
        let shared = device.import(peer.receive(), 2 * MIB).unwrap();
        let fence = Fence::open(&device, page, &FenceHandle::from_bytes(&peer.hear()).unwrap()).unwrap();
        Self::new(peer, device, fence, shared)
    }

    fn new(peer: Peer, device: Arc<CudaDevice>, fence: Fence, shared: Arc<dyn Region>) -> Self {
        let (own, stream) = (device.allocate(2 * MIB).unwrap(), device.stream().unwrap());
        Self { peer, device, fence, shared, own, stream }
    }

    /// Enqueues fresh bytes behind a pause, and says what they are and which mark they come before.
    fn write(&self, offset: usize) {
        let bytes = fresh(BYTES);
        self.stream.synchronize().unwrap();
        self.own.copy_in(0, &bytes).unwrap();
        self.device.delay(self.stream.handle(), PAUSE).unwrap();
        self.copy(self.shared.address() + offset, self.own.address());
        let mark = self.fence.record(self.stream.handle()).unwrap();
        self.peer.say_number(mark);
        self.peer.say(&bytes);
    }

    /// Whether the bytes are there when the stream comes to them, having waited for their mark or not.
    fn is_right(&self, offset: usize, waits: bool) -> bool {
        let (mark, bytes) = (self.peer.hear_number(), self.peer.hear());
        if waits {
            self.fence.wait(mark, self.stream.handle()).unwrap();
        }
        self.copy(self.own.address() + BYTES, self.shared.address() + offset);
        self.stream.synchronize().unwrap();
        let is_right = read(&self.own, BYTES, BYTES).unwrap() == bytes;
        // Before the writer goes on to the next bytes.
        self.fence.synchronize_peers(mark).unwrap();
        is_right
    }

    fn copy(&self, to: usize, from: usize) {
        // SAFETY: both ranges lie in regions that `self` holds; they go after the synchronisation in their drop.
        unsafe { self.device.copy(to, from, BYTES, DeviceToDevice, self.stream.handle()) }.unwrap();
    }

    /// The memory is the broker's: it stays until the client has closed it.
    fn end_of_client(self) {
        let Self { peer, device, fence, shared, own, stream } = self;
        drop((fence, stream, shared, own, device));
        peer.meet();
    }
}

/// How many of the rounds, each there and back, the client or the broker found wrong.
fn wrong(end: &End, rounds: usize, waits: bool, is_broker: bool) -> usize {
    let mut wrong = 0;
    for _ in 0..rounds {
        if is_broker {
            end.write(0);
            wrong += usize::from(!end.is_right(BYTES, waits));
        } else {
            wrong += usize::from(!end.is_right(0, waits));
            end.write(BYTES);
        }
        end.peer.meet();
    }
    wrong
}

#[test]
fn fresh_data_in_every_round() {
    let (rounds, controls) = real_or((1000, 50), (10, 3));
    Stage::new().two(
        |peer| {
            let end = End::of_broker(peer);
            let found = wrong(&end, rounds, true, true) + end.peer.hear_number() as usize;
            let control = wrong(&end, controls, false, true) + end.peer.hear_number() as usize;
            fact(
                "order_between_processes",
                &json!({
                    "rounds": rounds, "messages": 2 * rounds, "bytes": BYTES, "wrong": found,
                    "control_without_waiting": { "messages": 2 * controls, "wrong": control },
                }),
            );
            end.peer.meet();
            assert_eq!(found, 0, "messages that waiting did not put in order");
            assert!(control > 0, "without waiting nothing was wrong either: the rounds show nothing");
        },
        |peer| {
            let end = End::of_client(peer);
            end.peer.say_number(wrong(&end, rounds, true, false) as u64);
            end.peer.say_number(wrong(&end, controls, false, false) as u64);
            end.end_of_client();
        },
    );
}

/// Ping-pong of one message each way, with marks or without: the difference is what order costs.
fn round_trips(end: &End, rounds: usize, is_broker: bool) {
    let stream = end.stream.handle();
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for round in 0..2 * rounds {
        let marked = round % 2 == 0;
        let say = || end.peer.say_number(if marked { end.fence.record(stream).unwrap() } else { 0 });
        let hear = || {
            let mark = end.peer.hear_number();
            if marked {
                end.fence.wait(mark, stream).unwrap();
            }
        };
        if is_broker {
            let start = Instant::now();
            say();
            hear();
            if marked { &mut with } else { &mut without }.push(microseconds(start));
        } else {
            hear();
            say();
        }
    }
    if is_broker {
        let medians = json!({ "with_marks": median(&mut with), "without": median(&mut without) });
        let found = json!({ "rounds": rounds, "median_us": medians });
        fact("round_trip_of_a_message", &found);
    }
}

#[test]
fn what_order_costs() {
    let rounds = real_or(1000, 10);
    Stage::new().two(
        |peer| {
            let end = End::of_broker(peer);
            let stream = end.stream.handle();
            let each = |call: &dyn Fn()| {
                let mut times: Vec<f64> = (0..rounds)
                    .map(|_| {
                        let start = Instant::now();
                        call();
                        microseconds(start)
                    })
                    .collect();
                end.stream.synchronize().unwrap();
                median(&mut times)
            };
            end.peer.meet();
            let mark = end.peer.hear_number();
            let record = each(&|| _ = end.fence.record(stream).unwrap());
            let wait = each(&|| end.fence.wait(mark, stream).unwrap());
            let newest = end.fence.recorded();
            let passed = each(&|| _ = end.fence.passed_own(newest).unwrap());
            let copy = |bytes: usize, waits: bool| {
                let start = Instant::now();
                for _ in 0..rounds {
                    if waits {
                        end.fence.wait(mark, stream).unwrap();
                    }
                    // SAFETY: as in `End::copy`.
                    unsafe {
                        end.device.copy(end.own.address(), end.shared.address(), bytes, DeviceToDevice, stream)
                    }
                    .unwrap();
                }
                end.stream.synchronize().unwrap();
                rounded(microseconds(start) / rounds as f64)
            };
            copy(4, true);
            let found = json!({
                "calls": rounds,
                "median_us_of_the_call": { "record": record, "wait": wait, "has_passed": passed },
                "mean_us_of_small_copies_to_their_end": { "alone": copy(4, false), "each_behind_a_wait": copy(4, true) },
            });
            fact("cost_of_order", &found);
            round_trips(&end, rounds, true);
            end.peer.meet();
        },
        |peer| {
            let end = End::of_client(peer);
            let mark = end.fence.record(end.stream.handle()).unwrap();
            end.stream.synchronize().unwrap();
            end.peer.meet();
            end.peer.say_number(mark);
            round_trips(&end, rounds, false);
            end.end_of_client();
        },
    );
}
