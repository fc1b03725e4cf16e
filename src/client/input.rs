use std::borrow::Cow;

use super::connect::CallOptions;
use super::leases::Lease;
use super::link::Link;
use super::tensor::{Storage, Tensor};
use crate::error::{Error, ErrorKind, Result};
use crate::protocol::{Descriptor, Operation, Outcome, Rung, TensorSource};
use crate::tensor::{TensorMeta, copy_dense};

/// Least size of an input slot: small inputs of different sizes share one.
const MIN_SLOT_BYTES: usize = 64 << 10;

/// A tensor to send: anywhere in memory, or already in a slot.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    meta: TensorMeta,
    bytes: &'a [u8],
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
        Ok(Self { meta, bytes })
    }

    /// Element type, shape and strides.
    #[must_use]
    pub fn meta(&self) -> &TensorMeta {
        &self.meta
    }
}

impl<'a> TryFrom<&'a Tensor> for Input<'a> {
    type Error = Error;

    fn try_from(tensor: &'a Tensor) -> Result<Self> {
        Self::new(*tensor.meta(), tensor.bytes()?)
    }
}

/// An input on its way: where the broker finds it, and what must live until it has.
pub(super) struct Staged<'a> {
    pub(super) source: TensorSource,
    pub(super) payload: Cow<'a, [u8]>,
    /// Kept for the next call afterwards.
    pub(super) slot: Option<Lease>,
    pub(super) copied_bytes: u64,
}

impl<'a> Input<'a> {
    /// Brings the input where the broker can reach it over `link`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] where the session has no room, or as [`Link::call`].
    pub(super) fn stage(&self, link: &Link, options: &CallOptions<'_>) -> Result<Staged<'a>> {
        if link.session.host_rung() == Rung::Inline {
            return self.stage_inline();
        }
        if let Some(source) = self.in_place(link)? {
            return Ok(Staged { source, payload: Cow::Borrowed(&[]), slot: None, copied_bytes: 0 });
        }
        let length = self.meta.densified().size_bytes()?;
        let mut slot = match link.memory.idle_input(length) {
            Some(slot) => slot,
            None => {
                // Rounded up, so that inputs of different sizes share a slot.
                let rounded = length.max(MIN_SLOT_BYTES);
                allocate(link, rounded.checked_next_power_of_two().unwrap_or(rounded), true, options)?
            }
        };
        let target = slot.span_mut();
        let meta = copy_dense(self.bytes, &self.meta, target.bytes_mut(target.length())?)?;
        let descriptor =
            Descriptor { epoch: link.session.epoch, lease: slot.reference(), offset: slot.offset(), sequence: 0, meta };
        let source = TensorSource::Leased(descriptor);
        Ok(Staged { source, payload: Cow::Borrowed(&[]), slot: Some(slot), copied_bytes: length as u64 })
    }

    fn stage_inline(&self) -> Result<Staged<'a>> {
        let dense = self.meta.densified();
        let length = dense.size_bytes()?;
        let payload = if self.meta.is_dense() {
            Cow::Borrowed(self.bytes.get(..length).unwrap_or_default())
        } else {
            let mut copy = vec![0; length];
            copy_dense(self.bytes, &self.meta, &mut copy)?;
            Cow::Owned(copy)
        };
        Ok(Staged { source: TensorSource::Inline(dense), payload, slot: None, copied_bytes: length as u64 })
    }

    /// Where the input is, if it lies in a slot of this session.
    fn in_place(&self, link: &Link) -> Result<Option<TensorSource>> {
        let length = self.meta.span_bytes()?;
        let found = link.memory.leases.locate(self.bytes.as_ptr() as usize, length);
        Ok(found.map(|(lease, offset)| {
            let epoch = link.session.epoch;
            TensorSource::Leased(Descriptor { epoch, lease, offset, sequence: 0, meta: self.meta })
        }))
    }
}

/// A slot of at least `length` bytes for an input; `kept` for one that is used from call to call.
///
/// # Errors
/// [`ErrorKind::OutOfMemory`] where the session has no room, or as [`Link::call`].
pub(super) fn allocate(link: &Link, length: usize, kept: bool, options: &CallOptions<'_>) -> Result<Lease> {
    let answer = link.call(Operation::Allocate { size_bytes: length as u64, kept }, &[], options)?;
    match answer.reply.outcome {
        Outcome::Allocated { descriptor } => link.memory.take_up(&descriptor, link.session.epoch),
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
