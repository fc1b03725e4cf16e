use std::borrow::Cow;
use std::sync::Arc;

use smallvec::SmallVec;

use super::input::{Input, Staged, unexpected_outcome};
use super::leases::GpuLease;
use super::link::Link;
use super::memory::Home;
use super::open_gpu::LinkGpu;
use super::options::{CallOptions, ResultPlace, Unshared};
use super::router::Answer;
use super::tensor::{PooledBytes, Storage, Tensor};
use crate::error::{Error, ErrorKind, Result};
use crate::id::GpuUuid;
use crate::protocol::{EncodedPrompt, Operation, Outcome, SlotPlace, TensorSource, Times};
use crate::service::{AdapterTaken, How, IgnoredEmbedding};

/// Where a call's tensors are, in the order in which they were given. Most calls have one.
pub(super) type Sources = SmallVec<[TensorSource; 1]>;

/// What a call gave.
pub(super) struct Computed {
    /// The result, or the first of two.
    pub(super) tensor: Tensor,
    pub(super) second: Option<Tensor>,
    pub(super) how: How,
    pub(super) ignored: Vec<IgnoredEmbedding>,
    pub(super) adapters: Vec<AdapterTaken>,
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
#[expect(clippy::large_enum_variant, reason = "moved once or twice; a box would be an allocation per call")]
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
        let result_mark = answer.reply.outcome.leased().map(|descriptor| descriptor.sequence).max().unwrap_or(0);
        all.into_iter().for_each(|staged| reuse(link, staged, result_gpu.as_ref(), result_mark));
    }
    let Answer { reply, payload, .. } = answer?;
    let Results { first, second, how, ignored, adapters } = Results::of(reply.outcome)?;
    let mut taking =
        Taking { link, home, shared: result_gpu.as_ref(), unshared: unshared.as_ref(), payload, copied_bytes: 0 };
    // Of two results behind the frame the second lies behind the first.
    let offset = first.meta().size_bytes()?;
    let second = second.map(|source| taking.take(&source, offset)).transpose();
    if !matches!(second, Ok(None | Some(Taken::Tensor(_)))) {
        taking.leave(&first);
    }
    let second = match second? {
        Some(Taken::WornOut(gpu, why)) => return Ok(Called::WornOut(gpu, why)),
        Some(Taken::Tensor(tensor)) => Some(tensor),
        None => None,
    };
    let tensor = match taking.take(&first, 0)? {
        Taken::WornOut(gpu, why) => return Ok(Called::WornOut(gpu, why)),
        Taken::Tensor(tensor) => tensor,
    };
    let copied_out_bytes = taking.copied_bytes;
    Ok(Called::Done(Computed {
        tensor,
        second,
        how,
        ignored,
        adapters,
        times: reply.times,
        copied_in_bytes,
        copied_out_bytes,
    }))
}

/// What an answer says of results.
struct Results {
    first: TensorSource,
    second: Option<TensorSource>,
    how: How,
    ignored: Vec<IgnoredEmbedding>,
    adapters: Vec<AdapterTaken>,
}

impl Results {
    fn of(outcome: Outcome) -> Result<Self> {
        let one = |first, how| Self { first, second: None, how, ignored: Vec::new(), adapters: Vec::new() };
        Ok(match outcome {
            Outcome::Tensor { descriptor, how } => one(TensorSource::Leased(descriptor), how),
            Outcome::InlineTensor { meta, how } => one(TensorSource::Inline(meta), how),
            Outcome::Encoded(encoded) => {
                let EncodedPrompt { cond, pooled, ignored, adapters } = *encoded;
                Self { first: cond, second: Some(pooled), how: How::Plain, ignored, adapters }
            }
            _ => return Err(unexpected_outcome()),
        })
    }
}

/// Takes results up, the one at the start of the payload last.
struct Taking<'a> {
    link: &'a Link,
    home: Home<'a>,
    shared: Option<&'a Arc<LinkGpu>>,
    /// The GPU that results in host memory are on their way to.
    unshared: Option<&'a Arc<LinkGpu>>,
    payload: Option<PooledBytes>,
    copied_bytes: u64,
}

enum Taken {
    Tensor(Tensor),
    /// As [`Called::WornOut`].
    WornOut(Arc<LinkGpu>, Error),
}

impl Taking<'_> {
    /// Gives back a result that nobody takes up.
    fn leave(&self, source: &TensorSource) {
        if let TensorSource::Leased(descriptor) = source {
            self.link.memory.leave(descriptor);
        }
    }

    /// The result at `source`; `offset` is where it starts in what came behind the frame, if it did.
    fn take(&mut self, source: &TensorSource, offset: usize) -> Result<Taken> {
        let memory = &self.link.memory;
        match source {
            TensorSource::Leased(descriptor) => {
                let lease = match (memory.take_up(descriptor, self.link.session.epoch, self.home), self.shared) {
                    (Err(error), Some(gpu)) if !memory.is_open(descriptor, gpu.gpu) => {
                        return Ok(Taken::WornOut(Arc::clone(gpu), error));
                    }
                    (lease, _) => lease?,
                };
                let storage = match self.unshared {
                    Some(gpu) => {
                        self.copied_bytes += descriptor.meta.span_bytes()? as u64;
                        Storage::Staged(lease, Arc::clone(gpu))
                    }
                    None => Storage::Leased(lease),
                };
                Ok(Taken::Tensor(Tensor::new(descriptor.meta, storage)))
            }
            TensorSource::Inline(meta) => {
                meta.validate()?;
                let length = meta.size_bytes()?;
                let bytes = match offset {
                    0 => self.payload.take().ok_or_else(unexpected_outcome)?,
                    _ => {
                        let all = self.payload.as_ref().map(PooledBytes::received).unwrap_or_default();
                        let own = all.get(offset..).and_then(|rest| rest.get(..length));
                        let own = own.ok_or_else(unexpected_outcome)?;
                        let mut bytes = memory.pool.take(length);
                        bytes.bytes.get_mut(..length).unwrap_or_default().copy_from_slice(own);
                        bytes
                    }
                };
                meta.check_fits(bytes.received().len())?;
                self.copied_bytes += length as u64;
                Ok(Taken::Tensor(Tensor::new(*meta, Storage::Received(bytes))))
            }
        }
    }
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
