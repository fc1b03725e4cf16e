use std::borrow::Cow;
use std::sync::Arc;

use super::leases::{GpuLease, Lease};
use super::link::Link;
use super::memory::Home;
use super::open_gpu::LinkGpu;
use super::options::CallOptions;
use super::tensor::{Storage, Tensor};
use crate::device::GpuRange;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{GpuUuid, LeaseRef};
use crate::protocol::{Descriptor, Operation, Outcome, Rung, TensorSource};
use crate::tensor::{TensorMeta, copy_dense};

/// Least size of an input slot: small inputs of different sizes share one.
const MIN_SLOT_BYTES: usize = 64 << 10;

/// A tensor to send: anywhere in memory, or already in a slot.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    meta: TensorMeta,
    memory: Memory<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Memory<'a> {
    Host(&'a [u8]),
    /// Of another library's.
    Gpu(GpuRange<'a>),
    /// In a slot of a GPU.
    Leased(&'a Lease, &'a Arc<GpuLease>),
}

impl<'a> Input<'a> {
    /// The tensor `meta` describes in `bytes`. It is copied once into a slot, in the order its dimensions have in
    /// memory, unless `bytes` lie in a slot already.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`] where `bytes` are too short or the description is impossible.
    pub fn new(meta: TensorMeta, bytes: &'a [u8]) -> Result<Self> {
        meta.validate()?;
        meta.check_fits(bytes.len())?;
        Ok(Self { meta, memory: Memory::Host(bytes) })
    }

    /// The tensor `meta` describes in GPU memory, written by work on the range's stream. It is copied once, on that
    /// stream, unless it lies in a slot already. Elements must be dense: gaps and repetitions do not cross.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidTensor`] where the range is too short, the description impossible or not dense.
    pub fn on_gpu(meta: TensorMeta, range: GpuRange<'a>) -> Result<Self> {
        meta.validate()?;
        meta.check_fits(range.length())?;
        if !meta.is_dense() {
            let message =
                format!("a {} tensor {} in GPU memory with gaps between its elements", meta.dtype, meta.shape);
            return Err(Error::new(ErrorKind::InvalidTensor, message, "make it contiguous first"));
        }
        Ok(Self { meta, memory: Memory::Gpu(range) })
    }

    /// Element type, shape and strides.
    #[must_use]
    pub fn meta(&self) -> &TensorMeta {
        &self.meta
    }

    /// The GPU it lies on.
    pub(super) fn gpu(&self) -> Option<GpuUuid> {
        match self.memory {
            Memory::Host(_) => None,
            Memory::Gpu(range) => Some(range.gpu()),
            Memory::Leased(_, lease) => Some(lease.gpu.gpu),
        }
    }
}

impl<'a> TryFrom<&'a Tensor> for Input<'a> {
    type Error = Error;

    fn try_from(tensor: &'a Tensor) -> Result<Self> {
        if let Storage::Leased(lease) = tensor.storage()
            && let Some(on_gpu) = lease.gpu()
        {
            return Ok(Self { meta: *tensor.meta(), memory: Memory::Leased(lease, on_gpu) });
        }
        Self::new(*tensor.meta(), tensor.bytes()?)
    }
}

/// An input on its way: where the broker finds it, and what must live until it has.
pub(super) struct Staged<'a> {
    pub(super) source: TensorSource,
    pub(super) payload: Cow<'a, [u8]>,
    /// Kept for the next call afterwards.
    pub(super) slot: Option<Lease>,
    /// The lease in GPU memory that is read in place.
    pub(super) in_place: Option<Arc<GpuLease>>,
    pub(super) copied_bytes: u64,
}

impl<'a> Staged<'a> {
    fn in_place(descriptor: Descriptor, in_place: Option<Arc<GpuLease>>) -> Self {
        let source = TensorSource::Leased(descriptor);
        Self { source, payload: Cow::Borrowed(&[]), slot: None, in_place, copied_bytes: 0 }
    }

    fn in_slot(descriptor: Descriptor, slot: Lease, copied: usize) -> Self {
        let source = TensorSource::Leased(descriptor);
        Self { source, payload: Cow::Borrowed(&[]), slot: Some(slot), in_place: None, copied_bytes: copied as u64 }
    }
}

impl<'a> Input<'a> {
    /// Brings the input where the broker can reach it over `link`; `gpu` is how the input's GPU is shared.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] where the session has no room, or as [`Link::call`].
    pub(super) fn stage(
        &self,
        link: &Link,
        gpu: Option<&Arc<LinkGpu>>,
        options: &CallOptions<'_>,
    ) -> Result<Staged<'a>> {
        match (self.memory, gpu) {
            (Memory::Host(bytes), _) => self.stage_host(bytes, link, options),
            (Memory::Gpu(range), Some(gpu)) if gpu.is_shared() => self.stage_gpu(&range, link, gpu, options),
            (Memory::Gpu(range), Some(gpu)) => self.stage_through_host(&range, link, gpu, options),
            (Memory::Leased(lease, on_gpu), _) => {
                if !lease.is_of(&link.memory.leases) {
                    return Err(stale_input());
                }
                let queue = on_gpu.gpu.queue.handle();
                on_gpu.gpu.wait(on_gpu.ready(), queue)?;
                on_gpu.publish_uses()?;
                let sequence = on_gpu.gpu.publish(queue)?;
                let descriptor = self.descriptor(link, lease.reference(), lease.offset(), sequence);
                Ok(Staged::in_place(descriptor, Some(Arc::clone(on_gpu))))
            }
            (Memory::Gpu(_), None) => Err(unexpected_outcome()),
        }
    }

    fn descriptor(&self, link: &Link, lease: LeaseRef, offset: u64, sequence: u64) -> Descriptor {
        Descriptor { epoch: link.session.epoch, lease, offset, sequence, meta: self.meta }
    }

    fn stage_host(&self, bytes: &'a [u8], link: &Link, options: &CallOptions<'_>) -> Result<Staged<'a>> {
        if link.session.host_rung() == Rung::Inline {
            return self.stage_inline(bytes);
        }
        let length = self.meta.span_bytes()?;
        if let Some((lease, offset, _)) = link.memory.leases.locate(bytes.as_ptr() as usize, length) {
            return Ok(Staged::in_place(self.descriptor(link, lease, offset, 0), None));
        }
        let length = self.meta.densified().size_bytes()?;
        let mut slot = input_slot(link, Home::Host, length, options)?;
        let target = slot.span_mut();
        let meta = copy_dense(bytes, &self.meta, target.bytes_mut(target.length())?)?;
        let descriptor = Descriptor { meta, ..self.descriptor(link, slot.reference(), slot.offset(), 0) };
        Ok(Staged::in_slot(descriptor, slot, length))
    }

    fn stage_inline(&self, bytes: &'a [u8]) -> Result<Staged<'a>> {
        let dense = self.meta.densified();
        let length = dense.size_bytes()?;
        let payload = if self.meta.is_dense() {
            Cow::Borrowed(bytes.get(..length).unwrap_or_default())
        } else {
            let mut copy = vec![0; length];
            copy_dense(bytes, &self.meta, &mut copy)?;
            Cow::Owned(copy)
        };
        Ok(Staged {
            source: TensorSource::Inline(dense),
            payload,
            slot: None,
            in_place: None,
            copied_bytes: length as u64,
        })
    }

    fn stage_gpu(
        &self,
        range: &GpuRange<'_>,
        link: &Link,
        gpu: &Arc<LinkGpu>,
        options: &CallOptions<'_>,
    ) -> Result<Staged<'a>> {
        let length = self.meta.span_bytes()?;
        if let Some((lease, offset, Some(on_gpu))) = link.memory.leases.locate(range.address(), length) {
            on_gpu.publish_uses()?;
            let sequence = on_gpu.gpu.publish(range.stream())?;
            return Ok(Staged::in_place(self.descriptor(link, lease, offset, sequence), Some(on_gpu)));
        }
        let slot = input_slot(link, Home::Gpu(gpu), length, options)?;
        if let Some(on_gpu) = slot.gpu() {
            gpu.wait(on_gpu.ready(), range.stream())?;
        }
        gpu.device.copy_in(range, slot.span())?;
        let sequence = gpu.publish(range.stream())?;
        if let Some(on_gpu) = slot.gpu() {
            // The mark and not the stream, which may be gone when the slot is given back.
            on_gpu.set_marked(sequence);
        }
        let descriptor = self.descriptor(link, slot.reference(), slot.offset(), sequence);
        Ok(Staged::in_slot(descriptor, slot, length))
    }

    /// No GPU memory is shared: the tensor crosses through the host's, in one piece: the broker sees it when all of it is
    /// there.
    fn stage_through_host(
        &self,
        range: &GpuRange<'_>,
        link: &Link,
        gpu: &LinkGpu,
        options: &CallOptions<'_>,
    ) -> Result<Staged<'a>> {
        let length = self.meta.span_bytes()?;
        if link.session.host_rung() == Rung::Inline {
            let mut copy = vec![0; length];
            gpu.device.read(range, &mut copy)?;
            let source = TensorSource::Inline(self.meta);
            return Ok(Staged {
                source,
                payload: Cow::Owned(copy),
                slot: None,
                in_place: None,
                copied_bytes: length as u64,
            });
        }
        let home = if link.has_staging() { Home::Staging(gpu) } else { Home::Host };
        let mut slot = input_slot(link, home, length, options)?;
        gpu.device.read(range, slot.span_mut().bytes_mut(length)?)?;
        let descriptor = self.descriptor(link, slot.reference(), slot.offset(), 0);
        Ok(Staged::in_slot(descriptor, slot, length))
    }
}

fn stale_input() -> Error {
    Error::new(
        ErrorKind::Stale,
        "the input lies in GPU memory of an earlier session, which is gone",
        "make the tensor anew",
    )
}

/// Rounded up, so that inputs of different sizes share a slot.
fn slot_bytes(length: usize) -> usize {
    let rounded = length.max(MIN_SLOT_BYTES);
    rounded.checked_next_power_of_two().unwrap_or(rounded)
}

/// A slot of at least `length` bytes that is kept from call to call.
fn input_slot(link: &Link, home: Home<'_>, length: usize, options: &CallOptions<'_>) -> Result<Lease> {
    match link.memory.idle_input(length, home) {
        Some(slot) => Ok(slot),
        None => allocate(link, home, slot_bytes(length), true, options),
    }
}

/// A slot of at least `length` bytes for an input; `kept` for one that is used from call to call.
///
/// # Errors
/// [`ErrorKind::OutOfMemory`] where the session has no room, [`ErrorKind::Protocol`] where the memory could not be
/// opened, or as [`Link::call`].
pub(super) fn allocate(
    link: &Link,
    home: Home<'_>,
    length: usize,
    kept: bool,
    options: &CallOptions<'_>,
) -> Result<Lease> {
    let operation = Operation::Allocate { place: home.place(), size_bytes: length as u64, kept };
    let answer = link.call(operation, &[], options)?;
    match answer.reply.outcome {
        Outcome::Allocated { descriptor } => link.memory.take_up(&descriptor, link.session.epoch, home),
        _ => Err(unexpected_outcome()),
    }
}

pub(super) fn unexpected_outcome() -> Error {
    Error::new(ErrorKind::Protocol, "the broker answered with another kind of result than was asked for", "")
}

impl Tensor {
    /// Whether the tensor lies in memory shared with the broker.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        matches!(self.storage(), Storage::Leased(_))
    }
}
