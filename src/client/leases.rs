use std::collections::BTreeMap;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use crate::device::Span;
use crate::id::LeaseRef;

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
}

#[derive(Debug, Default)]
struct Notes {
    released: Vec<LeaseRef>,
    /// By address of the first byte.
    live: BTreeMap<usize, Held>,
    /// Nobody is left to tell: the session is over.
    over: bool,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    length: usize,
    lease: LeaseRef,
    /// Bytes from the start of the arena.
    offset: u64,
}

impl Leases {
    /// An empty table, and the doorbell that rings when a lease was dropped.
    pub(super) fn new() -> (Arc<Self>, Receiver<()>) {
        let (doorbell, rings) = bounded(1);
        (Arc::new(Self { notes: Mutex::default(), doorbell }), rings)
    }

    /// Takes up a lease on `span`, which starts `offset` bytes into its arena.
    pub(super) fn hold(self: &Arc<Self>, lease: LeaseRef, offset: u64, span: Span) -> Lease {
        let held = Held { length: span.length(), lease, offset };
        self.notes.lock().live.insert(span.address(), held);
        Lease { lease, offset, span, leases: Arc::clone(self) }
    }

    /// Gives back a lease that nobody took up.
    pub(super) fn give_back(&self, lease: LeaseRef) {
        self.notes.lock().released.push(lease);
        self.ring();
    }

    /// Moves what is to be given back to `into`, as much as fits into one message.
    pub(super) fn take_released(&self, into: &mut Vec<LeaseRef>) {
        let mut notes = self.notes.lock();
        let count = notes.released.len().min(MAX_RELEASES.saturating_sub(into.len()));
        into.extend(notes.released.drain(..count));
    }

    /// The lease in which `length` bytes at `address` lie, and their offset in its arena.
    pub(super) fn locate(&self, address: usize, length: usize) -> Option<(LeaseRef, u64)> {
        let notes = self.notes.lock();
        let (&start, held) = notes.live.range(..=address).next_back()?;
        let from_start = address - start;
        let inside = from_start.checked_add(length).is_some_and(|end| end <= held.length);
        inside.then_some((held.lease, held.offset + from_start as u64))
    }

    /// The session is over: nothing is noted any more.
    pub(super) fn end(&self) {
        let mut notes = self.notes.lock();
        notes.over = true;
        notes.released.clear();
    }

    fn ring(&self) {
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

    pub(super) fn span_mut(&mut self) -> &mut Span {
        &mut self.span
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut notes = self.leases.notes.lock();
        notes.live.remove(&self.span.address());
        if notes.over {
            return;
        }
        notes.released.push(self.lease);
        drop(notes);
        self.leases.ring();
    }
}
