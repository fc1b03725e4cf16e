use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::context::Context;
use super::device::CudaDevice;
use super::event::Event;
use super::stream::CudaStream;
use crate::device::host::await_published;
use crate::device::{DeviceError, Order, Place, Region, StreamRef, check_range};

/// Bytes of one handle.
const HANDLE_BYTES: usize = 64;

/// Bytes at the start of the page: one word for each side, its newest mark.
const PAGE_BYTES: usize = 64;
const OWNERS_WORD: usize = 0;
const CLIENTS_WORD: usize = 32;

/// What the other process needs to open a fence.
#[derive(Clone, PartialEq, Eq)]
pub struct FenceHandle {
    /// The driver's handles of all events: those the owner records, then those the client records.
    pub events: Vec<[u8; HANDLE_BYTES]>,
}

impl FenceHandle {
    /// The handles one after the other, as they cross in a message.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.events.concat()
    }

    /// The handles from a message.
    ///
    /// # Errors
    /// [`DeviceError::WrongHandle`] where their number is another one.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DeviceError> {
        let (events, rest) = bytes.as_chunks();
        Self { events: events.to_vec() }.checked().filter(|_| rest.is_empty()).ok_or(WRONG_HANDLE)
    }

    fn checked(self) -> Option<Self> {
        (self.events.len() == 2 * Fence::EVENTS).then_some(self)
    }
}

const WRONG_HANDLE: DeviceError = DeviceError::WrongHandle { device: "CUDA" };

impl fmt::Debug for FenceHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the handles: they are capabilities and do not belong in logs.
        f.debug_struct("FenceHandle").field("events", &self.events.len()).finish()
    }
}

/// Orders the work of two processes on one GPU without the CPU waiting: each side marks its own work, and the other
/// side's streams wait for the mark.
///
/// Mark `n` is a record of event `n % EVENTS` of the side that makes it. All marks of a side go through one stream, so
/// they pass in the order of their numbers, and an event that was recorded anew stands for its earlier marks too.
/// A wait that is enqueued before its record would wait for nothing, and nothing would say so: the number of the
/// newest record lies in shared memory, and a wait for a greater one is refused.
///
/// The price of the order: a mark passes only when the earlier marks of its side have passed, on whatever streams.
/// The broker's side must outlive the client's.
#[derive(Debug)]
pub struct Fence {
    own: Side,
    peers: Side,
    /// The newest own mark. Not read back from the page: the peer can write there.
    recorded: AtomicU64,
    /// Held while a mark is made, so that numbers and records have one order. The event takes a mark from the marked
    /// stream to the stream of marks; a wait keeps what it saw, so that one event does for all.
    recording: Mutex<Event>,
    marks: CudaStream,
    page: Arc<dyn Region>,
}

/// One direction: the marks that one of the two processes makes.
#[derive(Debug)]
struct Side {
    /// [`Fence::EVENTS`] of them.
    events: Vec<Event>,
    /// Where the number of the newest mark lies in the page.
    word: usize,
    /// The newest mark known to have passed.
    passed: AtomicU64,
}

impl Fence {
    /// Events, and so marks that can be told apart, in each direction.
    pub const EVENTS: usize = 32;

    /// The broker's side: makes all events. `page` is zeroed host memory that both sides map; its first 64 bytes
    /// belong to the fence.
    ///
    /// # Errors
    /// [`DeviceError::NotHost`] or [`DeviceError::OutOfBounds`] for a page that is too small or not aligned, [`DeviceError::Cuda`].
    pub fn create(device: &Arc<CudaDevice>, page: Arc<dyn Region>) -> Result<Self, DeviceError> {
        let ring = || (0..Self::EVENTS).map(|_| Event::interprocess(device.context())).collect::<Result<_, _>>();
        Self::new(device.context(), page, Side::new(ring()?, OWNERS_WORD), Side::new(ring()?, CLIENTS_WORD))
    }

    /// The client's side: opens the events that the broker made.
    ///
    /// # Errors
    /// As [`Fence::create`]; [`DeviceError::WrongHandle`] for another number of events.
    pub fn open(device: &Arc<CudaDevice>, page: Arc<dyn Region>, handle: &FenceHandle) -> Result<Self, DeviceError> {
        let events = &handle.clone().checked().ok_or(WRONG_HANDLE)?.events;
        let opened = |handles: &[[u8; HANDLE_BYTES]]| {
            handles.iter().map(|handle| Event::open(device.context(), *handle)).collect::<Result<_, _>>()
        };
        let (owners, clients) = events.split_at(Self::EVENTS);
        let peers = Side::new(opened(owners)?, OWNERS_WORD);
        Self::new(device.context(), page, Side::new(opened(clients)?, CLIENTS_WORD), peers)
    }

    fn new(context: &Arc<Context>, page: Arc<dyn Region>, own: Side, peers: Side) -> Result<Self, DeviceError> {
        if page.place() != Place::Host {
            return Err(DeviceError::NotHost);
        }
        check_range(0, PAGE_BYTES, page.size_bytes())?;
        if !page.address().is_multiple_of(align_of::<AtomicU64>()) {
            return Err(DeviceError::OutOfBounds { offset: 0, length: PAGE_BYTES, size_bytes: page.size_bytes() });
        }
        let recording = Mutex::new(Event::local(context)?);
        Ok(Self { own, peers, recorded: AtomicU64::new(0), recording, marks: CudaStream::new(context)?, page })
    }

    /// What the client opens the fence with.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`], also where this side opened the fence itself.
    pub fn handle(&self) -> Result<FenceHandle, DeviceError> {
        let events = self.own.events.iter().chain(&self.peers.events).map(Event::handle);
        Ok(FenceHandle { events: events.collect::<Result<_, _>>()? })
    }

    /// Marks everything enqueued on `stream` so far. The mark's number goes to the peer after this returned.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`]; no mark is made then.
    pub fn record(&self, stream: StreamRef) -> Result<u64, DeviceError> {
        let hand_over = self.recording.lock();
        let sequence = self.recorded() + 1;
        hand_over.record(stream)?;
        hand_over.hold_back(self.marks.handle())?;
        self.own.event(sequence).record(self.marks.handle())?;
        self.published(&self.own).fetch_max(sequence, Ordering::Release);
        self.recorded.store(sequence, Ordering::Release);
        Ok(sequence)
    }

    /// Work enqueued on `stream` from now on waits for the peer's mark `sequence`; 0 is nothing to wait for.
    ///
    /// # Errors
    /// [`DeviceError::NotRecorded`] where the peer has not made the mark, [`DeviceError::Cuda`].
    pub fn wait(&self, sequence: u64, stream: StreamRef) -> Result<(), DeviceError> {
        await_published(self.published(&self.peers), sequence)?;
        if self.peers.is_known_passed(sequence) {
            return Ok(());
        }
        self.peers.event(sequence).hold_back(stream)
    }

    /// The newest own mark; 0 before the first.
    #[must_use]
    pub fn recorded(&self) -> u64 {
        self.recorded.load(Ordering::Acquire)
    }

    /// Whether the GPU has passed an own mark. With more than [`Fence::EVENTS`] newer marks the answer may come late.
    ///
    /// # Errors
    /// [`DeviceError::NotRecorded`] where the mark was not made, [`DeviceError::Cuda`].
    pub fn passed_own(&self, sequence: u64) -> Result<bool, DeviceError> {
        self.own.has_passed(sequence, self.recorded())
    }

    /// Whether the GPU has passed a mark of the peer's.
    ///
    /// # Errors
    /// As [`Fence::passed_own`].
    pub fn passed_peers(&self, sequence: u64) -> Result<bool, DeviceError> {
        self.peers.has_passed(sequence, self.published(&self.peers).load(Ordering::Acquire))
    }

    /// Blocks the calling thread until a mark of the peer's has passed.
    ///
    /// # Errors
    /// As [`Fence::passed_own`].
    pub fn synchronize_peers(&self, sequence: u64) -> Result<(), DeviceError> {
        self.peers.synchronize(sequence, self.published(&self.peers).load(Ordering::Acquire))
    }

    /// Blocks the calling thread until an own mark has passed.
    ///
    /// # Errors
    /// As [`Fence::passed_own`].
    pub fn synchronize_own(&self, sequence: u64) -> Result<(), DeviceError> {
        self.own.synchronize(sequence, self.recorded())
    }

    /// The word in which a side says what its newest mark is.
    fn published(&self, side: &Side) -> &AtomicU64 {
        // SAFETY: `new` checked that the page is host memory of more bytes and aligned; it is mapped while `self` lives;
        // both processes use the words only as atomics.
        unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(self.page.address() + side.word)) }
    }
}

impl Order for Fence {
    fn record(&self, stream: StreamRef) -> Result<u64, DeviceError> {
        Self::record(self, stream)
    }

    fn wait(&self, sequence: u64, stream: StreamRef) -> Result<(), DeviceError> {
        Self::wait(self, sequence, stream)
    }

    fn recorded(&self) -> u64 {
        Self::recorded(self)
    }

    fn passed_own(&self, sequence: u64) -> Result<bool, DeviceError> {
        Self::passed_own(self, sequence)
    }

    fn passed_peers(&self, sequence: u64) -> Result<bool, DeviceError> {
        Self::passed_peers(self, sequence)
    }

    fn synchronize_peers(&self, sequence: u64) -> Result<(), DeviceError> {
        Self::synchronize_peers(self, sequence)
    }

    fn synchronize_own(&self, sequence: u64) -> Result<(), DeviceError> {
        Self::synchronize_own(self, sequence)
    }
}

impl Side {
    fn new(events: Vec<Event>, word: usize) -> Self {
        Self { events, word, passed: AtomicU64::new(0) }
    }

    /// The event of a mark, which may stand for a later one by now.
    fn event(&self, sequence: u64) -> &Event {
        &self.events[(sequence % self.events.len() as u64) as usize]
    }

    fn is_known_passed(&self, sequence: u64) -> bool {
        sequence <= self.passed.load(Ordering::Acquire)
    }

    fn has_passed(&self, sequence: u64, newest: u64) -> Result<bool, DeviceError> {
        if newest < sequence {
            return Err(DeviceError::NotRecorded { awaited: sequence, recorded: newest });
        }
        // Most often everything has passed, and one question tells. Otherwise the mark itself, or the oldest after it
        // that has an event of its own; that event may be about to be recorded anew, so the one after it too.
        let oldest = sequence.max(newest.saturating_sub(self.events.len() as u64 - 1));
        for candidate in [newest, oldest, oldest.saturating_add(1).min(newest)] {
            if self.is_known_passed(sequence) {
                break;
            }
            if self.event(candidate).is_done()? {
                self.passed.fetch_max(candidate, Ordering::AcqRel);
            }
        }
        Ok(self.is_known_passed(sequence))
    }

    fn synchronize(&self, sequence: u64, newest: u64) -> Result<(), DeviceError> {
        if newest < sequence {
            return Err(DeviceError::NotRecorded { awaited: sequence, recorded: newest });
        }
        if !self.is_known_passed(sequence) {
            self.event(sequence).synchronize()?;
            self.passed.fetch_max(sequence, Ordering::AcqRel);
        }
        Ok(())
    }
}
