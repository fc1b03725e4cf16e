use std::borrow::Cow;
use std::sync::Arc;

use smallvec::SmallVec;

use super::connect::{CallOptions, ResultPlace, Unshared};
use super::input::{Input, Staged, unexpected_outcome};
use super::leases::GpuLease;
use super::link::Link;
use super::memory::Home;
use super::open_gpu::LinkGpu;
use super::router::Answer;
use super::tensor::{Storage, Tensor};
use crate::error::{Error, ErrorKind, Result};
use crate::id::GpuUuid;
use crate::protocol::{Operation, Outcome, SlotPlace, TensorSource, Times};
use crate::service::How;

/// Where a call's tensors are, in the order in which they were given. Most calls have one.
pub(super) type Sources = SmallVec<[TensorSource; 1]>;

/// What a call gave.
pub(super) struct Computed {
    pub(super) tensor: Tensor,
    pub(super) how: How,
    pub(super) times: Times,
    pub(super) copied_in_bytes: u64,
    pub(super) copied_out_bytes: u64,
}

/// Brings `inputs` where the broker reaches them, sends the `operation` made of them, and takes its result up. A result
/// that is to be where the input is goes where the first one is.
///
/// # Errors
/// As [`Link::call`]; of bringing and taking what is in the way of each.
pub(super) fn compute(
    link: &Link,
    inputs: &[Input<'_>],
    operation: &impl Fn(Sources, SlotPlace) -> Result<Operation>,
    options: &CallOptions<'_>,
) -> Result<Computed> {
    loop {
        match attempt(link, inputs, operation, options)? {
            Called::Done(computed) => return Ok(computed),
            // Nothing was changed by the call: it is made again on the next rung.
            Called::WornOut(gpu, why) => _ = link.demote_gpu(&gpu, &why, options)?,
        }
    }
}

/// What a call came to on the rungs of the moment.
enum Called {
    Done(Computed),
    /// GPU memory that worked before no longer opens, and why.
    WornOut(Arc<LinkGpu>, Error),
}

fn attempt(
    link: &Link,
    inputs: &[Input<'_>],
    operation: &impl Fn(Sources, SlotPlace) -> Result<Operation>,
    options: &CallOptions<'_>,
) -> Result<Called> {
    let opened = |gpu: Option<GpuUuid>| gpu.map(|gpu| link.open_gpu(gpu, options)).transpose();
    let result_gpu = match options.result {
        ResultPlace::LikeInput => opened(inputs.first().and_then(Input::gpu))?,
        ResultPlace::Host => None,
        ResultPlace::Gpu(gpu) => opened(Some(gpu))?,
    };
    // Without shared GPU memory the result comes in the host's, or through it.
    let (result_gpu, unshared) = match result_gpu {
        Some(gpu) if gpu.is_shared() => (Some(gpu), None),
        unshared => (None, unshared.filter(|_| options.unshared == Unshared::Staging && link.has_staging())),
    };
    let home = match (&result_gpu, &unshared) {
        (Some(gpu), _) => Home::Gpu(gpu),
        (None, Some(gpu)) => Home::Staging(gpu),
        (None, None) => Home::Host,
    };
    let mut all: SmallVec<[Staged<'_>; 1]> = SmallVec::new();
    for input in inputs {
        let gpu = opened(input.gpu())?;
        match (input.stage(link, gpu.as_ref(), options), gpu) {
            (Err(error), Some(gpu)) if wears_out(&error, &gpu) => {
                keep(link, all);
                return Ok(Called::WornOut(gpu, error));
            }
            (Err(error), _) => {
                keep(link, all);
                return Err(error);
            }
            (Ok(staged), _) => all.push(staged),
        }
    }
    let sources = all.iter().map(|staged| staged.source.clone()).collect();
    let answer = link.call(operation(sources, home.place())?, &payload(&all), options);
    let copied_in_bytes = all.iter().map(|staged| staged.copied_bytes).sum();
    // The broker read the input before it answered, or behind the mark of the result; a request that was given up
    // may still be reading it.
    if let Ok(answer) = &answer {
        let result_mark = match &answer.reply.outcome {
            Outcome::Tensor { descriptor, .. } => descriptor.sequence,
            _ => 0,
        };
        all.into_iter().for_each(|staged| reuse(link, staged, result_gpu.as_ref(), result_mark));
    }
    let Answer { reply, payload, .. } = answer?;
    let (tensor, how, copied_out_bytes) = match (reply.outcome, payload) {
        (Outcome::Tensor { descriptor, how }, _) => {
            let lease = match (link.memory.take_up(&descriptor, link.session.epoch, home), &result_gpu) {
                (Err(error), Some(gpu)) if !link.memory.is_open(&descriptor, gpu.gpu) => {
                    return Ok(Called::WornOut(Arc::clone(gpu), error));
                }
                (lease, _) => lease?,
            };
            let (storage, copied) = match unshared {
                Some(gpu) => (Storage::Staged(lease, gpu), descriptor.meta.span_bytes()? as u64),
                None => (Storage::Leased(lease), 0),
            };
            (Tensor::new(descriptor.meta, storage), how, copied)
        }
        (Outcome::InlineTensor { meta, how }, Some(bytes)) => {
            meta.validate()?;
            meta.check_fits(bytes.bytes.len())?;
            (Tensor::new(meta, Storage::Received(bytes)), how, meta.size_bytes()? as u64)
        }
        _ => return Err(unexpected_outcome()),
    };
    Ok(Called::Done(Computed { tensor, how, times: reply.times, copied_in_bytes, copied_out_bytes }))
}

/// Bytes that go behind the frame: the inputs' own where it is one, else one after the other.
fn payload<'a>(all: &'a [Staged<'_>]) -> Cow<'a, [u8]> {
    match all {
        [staged] => Cow::Borrowed(&staged.payload),
        many => Cow::Owned(many.iter().flat_map(|staged| staged.payload.iter().copied()).collect()),
    }
}

/// Slots of a call that was not sent are as good as before. Those of a GPU are given back behind the mark of the copy that
/// may still be on its way there: whoever used them next would not wait for it.
fn keep<'a>(link: &Link, all: impl IntoIterator<Item = Staged<'a>>) {
    let slots = all.into_iter().filter_map(|staged| staged.slot);
    slots.filter(|slot| slot.gpu().is_none()).for_each(|slot| link.memory.keep_input(slot));
}

/// Keeps an input's slot for the next call, behind the mark that says when this one has read it.
fn reuse(link: &Link, staged: Staged<'_>, result_gpu: Option<&Arc<LinkGpu>>, result_mark: u64) {
    // Whether the mark of the result stands for the reading of an input: they must be of one opening. A result in host
    // memory is complete, and so is the reading.
    let stands_for = |lease: &GpuLease| result_gpu.is_none_or(|gpu| Arc::ptr_eq(gpu, &lease.gpu));
    let read_behind = |lease: &GpuLease| {
        if result_gpu.is_some() && stands_for(lease) {
            lease.raise_ready(result_mark);
        }
    };
    if let Some(lease) = &staged.in_place {
        read_behind(lease);
    }
    if let Some(slot) = staged.slot {
        if let Some(lease) = slot.gpu() {
            read_behind(lease);
        }
        // One whose reading has no mark here is given back: the broker knows when it is done.
        if slot.gpu().is_none_or(|lease| stands_for(lease)) {
            link.memory.keep_input(slot);
        }
    }
}

/// Whether an error on the way into GPU memory says that its rung is no longer good.
fn wears_out(error: &Error, gpu: &LinkGpu) -> bool {
    gpu.is_shared() && error.kind() == ErrorKind::Protocol
}
