use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use super::open_gpu::LinkGpu;
use super::opener::Opener;
use crate::device::{DeviceError, Span, StreamRef};
use crate::id::LeaseRef;
use crate::protocol::Release;

/// A release is about 40 bytes: this many fill a sixth of the longest message.
const MAX_RELEASES: usize = 4096;

/// Leases a session holds, and those it no longer needs.
///
/// Dropping a lease only notes it here: that may happen on any thread, in the middle of anything. The notes leave
/// with the next request, or with the janitor where no request comes.
#[derive(Debug)]
pub(super) struct Leases {
    notes: Mutex<Notes>,
    doorbell: Sender<()>,
    opener: Opener,
}

#[derive(Debug, Default)]
struct Notes {
    released: Vec<Dropped>,
    /// By address of the first byte.
    live: BTreeMap<usize, Held>,
    /// Nobody is left to tell: the session is over.
    over: bool,
}

/// A lease that nobody holds any more.
#[derive(Debug)]
struct Dropped {
    lease: LeaseRef,
    used: Option<GpuUse>,
}

/// What a slot in GPU memory was last used by.
#[derive(Debug)]
struct GpuUse(Arc<GpuLease>);

/// A lease in GPU memory: whose, and what its users enqueue their work on.
#[derive(Debug)]
pub(super) struct GpuLease {
    pub(super) gpu: Arc<LinkGpu>,
    /// The broker's mark behind which the slot holds what it should, or is free to be written.
    ready: AtomicU64,
    /// This side's mark behind what is known to have used it.
    marked: AtomicU64,
    streams: Mutex<Streams>,
}

/// What a tensor was handed out on.
#[derive(Debug, Default)]
struct Streams {
    known: Vec<StreamRef>,
    /// On streams that nobody named, or that mean another one on another thread.
    unknown: bool,
}

impl GpuLease {
    pub(super) fn new(gpu: Arc<LinkGpu>, ready: u64) -> Self {
        Self { gpu, ready: AtomicU64::new(ready), marked: AtomicU64::new(0), streams: Mutex::default() }
    }

    pub(super) fn ready(&self) -> u64 {
        self.ready.load(Ordering::Acquire)
    }

    /// The broker has enqueued its work on the slot; it is free behind this mark.
    pub(super) fn raise_ready(&self, sequence: u64) {
        self.ready.fetch_max(sequence, Ordering::AcqRel);
    }

    /// Everything of this side's so far is behind this mark.
    pub(super) fn set_marked(&self, sequence: u64) {
        self.marked.fetch_max(sequence, Ordering::AcqRel);
    }

    /// Marks what is enqueued on the streams it was handed out on, and waits where they are not known.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub(super) fn publish_uses(&self) -> Result<u64, DeviceError> {
        let streams = self.streams.lock();
        if streams.unknown || (self.gpu.order.is_none() && !streams.known.is_empty()) {
            // Also what somebody enqueued on a stream that nobody spoke of.
            self.gpu.device.synchronize()?;
            return Ok(self.marked.load(Ordering::Acquire));
        }
        // The newest mark stands for all: marks pass in order.
        for stream in &streams.known {
            self.set_marked(self.gpu.publish(*stream)?);
        }
        Ok(self.marked.load(Ordering::Acquire))
    }

    /// The slot is not given back before all GPU work of this process is done: its users cannot be named.
    pub(super) fn used_somewhere(&self) {
        self.streams.lock().unknown = true;
    }

    /// The slot is not given back before what is enqueued on `stream` then is done.
    pub(super) fn used_on(&self, stream: StreamRef) {
        let mut streams = self.streams.lock();
        if stream == StreamRef::PER_THREAD {
            streams.unknown = true;
        } else if !streams.known.contains(&stream) {
            streams.known.push(stream);
        }
    }
}

/// The memory that a leased slot is in.
#[derive(Debug, Clone)]
pub(super) enum SlotMemory {
    /// The host's.
    Host,
    /// The host's, for tensors of GPUs to pass through. Its slots are not lent out as tensors.
    Staging,
    /// A GPU's.
    Gpu(Arc<GpuLease>),
}

impl SlotMemory {
    fn gpu(&self) -> Option<&Arc<GpuLease>> {
        match self {
            Self::Host | Self::Staging => None,
            Self::Gpu(lease) => Some(lease),
        }
    }
}

#[derive(Debug, Clone)]
struct Held {
    length: usize,
    memory: SlotMemory,
    lease: LeaseRef,
    /// Bytes from the start of the arena.
    offset: u64,
}

impl Leases {
    /// An empty table, and the doorbell that rings when a lease was dropped.
    pub(super) fn new() -> (Arc<Self>, Receiver<()>) {
        let (doorbell, rings) = bounded(1);
        (Arc::new(Self { notes: Mutex::default(), doorbell, opener: Opener::this() }), rings)
    }

    /// Takes up a lease on `span`, which starts `offset` bytes into its arena.
    pub(super) fn hold(self: &Arc<Self>, lease: LeaseRef, offset: u64, span: Span, memory: SlotMemory) -> Lease {
        let held = Held { length: span.length(), memory: memory.clone(), lease, offset };
        self.notes.lock().live.insert(span.address(), held);
        Lease { lease, offset, span, memory, leases: Arc::clone(self) }
    }

    /// Gives back a lease that nobody took up.
    pub(super) fn give_back(&self, lease: LeaseRef) {
        self.notes.lock().released.push(Dropped { lease, used: None });
        self.ring();
    }

    /// Moves what is to be given back to `into`, as much as fits into one message.
    ///
    /// Leases in GPU memory leave with a mark behind what used them; those whose use cannot be marked are kept, as the
    /// GPU may not be done with them.
    pub(super) fn take_released(&self, into: &mut Vec<Release>) {
        let mut notes = self.notes.lock();
        let count = notes.released.len().min(MAX_RELEASES.saturating_sub(into.len()));
        if notes.released.iter().take(count).all(|dropped| dropped.used.is_none()) {
            into.extend(notes.released.drain(..count).map(|dropped| Release { lease: dropped.lease, sequence: 0 }));
            return;
        }
        let dropped: Vec<Dropped> = notes.released.drain(..count).collect();
        // Marking takes driver calls, and other threads drop leases meanwhile.
        drop(notes);
        for Dropped { lease, used } in dropped {
            match used.map_or(Ok(0), |GpuUse(used)| used.publish_uses()) {
                Ok(sequence) => into.push(Release { lease, sequence }),
                Err(error) => tracing::warn!(%error, "a GPU slot is not given back before the session ends"),
            }
        }
    }

    /// The lease in which `length` bytes at `address` lie, their offset in its arena, and what it has on a GPU.
    pub(super) fn locate(&self, address: usize, length: usize) -> Option<(LeaseRef, u64, Option<Arc<GpuLease>>)> {
        let notes = self.notes.lock();
        let (&start, held) = notes.live.range(..=address).next_back()?;
        let from_start = address - start;
        let inside = from_start.checked_add(length).is_some_and(|end| end <= held.length);
        inside.then(|| (held.lease, held.offset + from_start as u64, held.memory.gpu().cloned()))
    }

    /// The session is over: nothing is noted any more.
    pub(super) fn end(&self) {
        let mut notes = self.notes.lock();
        notes.over = true;
        notes.released.clear();
    }

    /// Has the janitor look what is to be given back.
    pub(super) fn ring(&self) {
        // A bell that already rings is enough.
        _ = self.doorbell.try_send(());
    }
}

/// The right to a slot. Dropping it gives the slot back; the memory stays mapped as long as `span` is held.
#[derive(Debug)]
pub(super) struct Lease {
    lease: LeaseRef,
    offset: u64,
    span: Span,
    memory: SlotMemory,
    leases: Arc<Leases>,
}

impl Lease {
    pub(super) fn reference(&self) -> LeaseRef {
        self.lease
    }

    /// Bytes from the start of the arena.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(super) fn span(&self) -> &Span {
        &self.span
    }

    /// What only a lease in GPU memory has.
    pub(super) fn gpu(&self) -> Option<&Arc<GpuLease>> {
        self.memory.gpu()
    }

    pub(super) fn memory(&self) -> &SlotMemory {
        &self.memory
    }

    /// Whether the lease is of this table's session.
    pub(super) fn is_of(&self, leases: &Arc<Leases>) -> bool {
        Arc::ptr_eq(&self.leases, leases)
    }

    pub(super) fn span_mut(&mut self) -> &mut Span {
        &mut self.span
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.leases.opener.is_here() {
            return;
        }
        let mut notes = self.leases.notes.lock();
        notes.live.remove(&self.span.address());
        if notes.over {
            return;
        }
        notes.released.push(Dropped { lease: self.lease, used: self.gpu().cloned().map(GpuUse) });
        drop(notes);
        self.leases.ring();
    }
}
