use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::*;
use crate::device::{DeviceError, HostDevice, Place as Memory, RegionHandle};

/// Longer than anything takes that does not wait for the device.
const PATIENCE: Duration = Duration::from_secs(10);
const ARENA: u64 = 4096;

/// A device that says when it is to allocate, and waits for the word.
#[derive(Debug)]
struct Slow {
    host: HostDevice,
    asked: Sender<usize>,
    go: Receiver<()>,
}

impl Device for Slow {
    fn place(&self) -> Memory {
        Memory::Host
    }

    fn allocate(&self, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError> {
        self.asked.send(size_bytes).unwrap();
        self.go.recv().unwrap();
        self.host.allocate(size_bytes)
    }

    fn import(&self, handle: RegionHandle, size_bytes: usize) -> Result<Arc<dyn Region>, DeviceError> {
        self.host.import(handle, size_bytes)
    }
}

struct Setup {
    pool: Arc<ArenaPool>,
    asked: Receiver<usize>,
    go: Sender<()>,
}

fn slow(growth: Growth) -> Setup {
    let ((ask, asked), (go, wait)) = (unbounded(), unbounded());
    let device = Slow { host: HostDevice::default(), asked: ask, go: wait };
    let limits = Limits { arena: ARENA, total: 64 << 20, session: 64 << 20, setting: "--a-setting", growth };
    Setup { pool: Arc::new(ArenaPool::new(Arc::new(device), limits, Arc::default())), asked, go }
}

impl Setup {
    /// A lease of this many bytes in a thread of its own; the arena it is of.
    fn lease(&self, session: u64, length: u64) -> Receiver<(SessionId, Place)> {
        let (tell, told) = unbounded();
        let pool = Arc::clone(&self.pool);
        std::thread::spawn(move || {
            let session = SessionId(session);
            // Nobody listens any more where the test has failed.
            _ = tell.send((session, pool.lease(session, length).unwrap()));
        });
        told
    }

    fn give_back(&self, (session, place): (SessionId, Place)) {
        self.pool.release(session, place.pin.address(), None);
        self.pool.unpin(session, place.pin, None);
    }
}

#[test]
fn callers_that_find_no_room_at_the_same_time_make_one_arena() {
    let setup = slow(Growth::Doubling);
    let leases = [setup.lease(1, 1024), setup.lease(2, 1024)];
    setup.asked.recv_timeout(PATIENCE).unwrap();
    // Nobody can tell when the other caller has found no room: one that comes later makes the test easier, not wrong.
    std::thread::sleep(Duration::from_millis(20));
    setup.go.send(()).unwrap();
    let arenas = leases.map(|lease| lease.recv_timeout(PATIENCE).unwrap().1.pin.address().arena);
    assert_eq!(arenas[0], arenas[1]);
    assert!(setup.asked.is_empty());
    assert_eq!(setup.pool.arena_bytes(), ARENA);
}

#[test]
fn leases_end_and_begin_while_an_arena_is_made() {
    let setup = slow(Growth::Doubling);
    setup.go.send(()).unwrap();
    let first = setup.lease(1, ARENA).recv_timeout(PATIENCE).unwrap();
    setup.asked.recv_timeout(PATIENCE).unwrap();
    let arena = first.1.pin.address().arena;
    let waiting = setup.lease(2, ARENA);
    setup.asked.recv_timeout(PATIENCE).unwrap();
    let pool = Arc::clone(&setup.pool);
    assert_eq!(pool.counts(SessionId(1)).leases, 1);
    setup.give_back(first);
    let (_, second) = setup.lease(3, ARENA).recv_timeout(PATIENCE).expect("there is room in the first arena");
    assert_eq!(second.pin.address().arena, arena);
    assert!(waiting.is_empty());
    setup.go.send(()).unwrap();
    assert_ne!(waiting.recv_timeout(PATIENCE).unwrap().1.pin.address().arena, arena);
}

#[test]
fn an_arena_of_memory_that_is_used_up_from_the_start_is_little_larger_than_needed() {
    for (growth, expected) in [(Growth::Doubling, 16 << 20), (Growth::Blocks, 10 << 20)] {
        let setup = slow(growth);
        setup.go.send(()).unwrap();
        setup.lease(1, (9 << 20) + 1).recv_timeout(PATIENCE).unwrap();
        assert_eq!(setup.asked.recv_timeout(PATIENCE).unwrap(), expected);
    }
}
