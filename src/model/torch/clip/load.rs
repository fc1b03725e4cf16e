use std::cell::Cell;
use std::sync::Arc;

use tch::{TchError, Tensor};

use super::super::super::clip::{Clip, ClipCall, ClipPlan, FoundClip, find_set, text_encoders};
use super::super::super::{LayerNames, ModelError, ModelFile, ReadyStack, StackMaker};
use super::super::failed;
use super::super::frozen::Frozen;
use super::super::spans::view;
use super::super::weights::{LoadOptions, Weights};
use super::WHAT;
use super::adapt::ClipStack;
use super::base::ClipBase;
use super::encode::{Encoded, Encoder};
use super::linear::{Adapters, NoAdapters};
use crate::device::{Span, StreamRef};

/// Loads the text encoders in `files` as one set, to be run by the calling thread. Weights are kept as they are stored,
/// whatever precision the target has.
///
/// # Errors
/// As [`text_encoders`]; [`ModelError::OutOfMemory`] where the weights do not fit, [`ModelError::Changed`] where a file
/// is no longer the one that was opened.
pub fn load_clip(files: &[Arc<ModelFile>], options: LoadOptions<'_>) -> Result<TorchClip, ModelError> {
    let loaded = load(files, options);
    // What a failed attempt had loaded, and what a successful one needed on its way.
    options.target.reclaim();
    loaded
}

fn load(files: &[Arc<ModelFile>], options: LoadOptions<'_>) -> Result<TorchClip, ModelError> {
    let _no_grad = tch::no_grad_guard();
    let _current = options.target.make_current()?;
    for file in files {
        file.check_unchanged()?;
    }
    let headers: Vec<_> = files.iter().map(AsRef::as_ref).collect();
    let set = text_encoders(&headers)?;
    let done_before = Cell::new(0);
    let mut encoders = Vec::new();
    let all = find_set(&headers)?;
    let names = LayerNames::of_clips(&all);
    for found in all {
        let progress = |done: u64, _| (options.progress)(done_before.get() + done, set.weight_bytes());
        // `find_set` numbers the files it was given.
        let Some(file) = files.get(found.file) else { continue };
        encoders.push(load_one(file, &found, LoadOptions { progress: &progress, ..options })?);
        done_before.set(done_before.get() + found.facts.weight_bytes);
    }
    let base = ClipBase { encoders, set, names, target: options.target.clone(), files: files.to_vec() };
    Ok(TorchClip { base: Arc::new(base) })
}

fn load_one(file: &Arc<ModelFile>, found: &FoundClip, options: LoadOptions<'_>) -> Result<Encoder, ModelError> {
    let mut sizes_bytes = Vec::new();
    found.layout.try_map(&mut |stored| {
        sizes_bytes.push(stored.bytes.len() as u64);
        Ok::<(), ModelError>(())
    })?;
    let mut weights = Weights::as_stored(file, options, &sizes_bytes)?;
    let mut net = found.layout.try_map(&mut |stored| weights.tensor(stored))?;
    if let Some(projection) = net.projection.as_mut().filter(|projection| projection.transposed) {
        // A view: nothing is copied.
        projection.layer.weight = projection.layer.weight.f_transpose(0, 1).map_err(failed(WHAT))?;
        projection.transposed = false;
    }
    Ok(Encoder { net: Frozen::new(net), facts: found.facts.clone(), backing: weights.into_backing(file) })
}

/// A loaded set of text encoders. It belongs to its lane's thread and is never modified by a call.
#[derive(Debug)]
pub struct TorchClip {
    base: Arc<ClipBase>,
}

impl Clip for TorchClip {
    fn encode(
        &mut self,
        call: &ClipCall,
        stack: Option<&ReadyStack>,
        cond: &Span,
        pooled: &Span,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), ModelError> {
        let foreign = || {
            let cause = "adapters that were put together for a model of another kind".to_owned();
            ModelError::Executor { what: WHAT, cause }
        };
        let stack = stack.map(|stack| stack.tensors::<ClipStack>().ok_or_else(foreign)).transpose()?;
        self.encode_with(call, stack.as_deref(), cond, pooled, stop)
    }

    fn stack_maker(&self) -> Arc<dyn StackMaker> {
        Arc::clone(&self.base) as Arc<dyn StackMaker>
    }

    fn stream(&self) -> Option<StreamRef> {
        self.base.target.stream()
    }
}

impl TorchClip {
    /// What puts stacks of adapters together for this set, on any thread. It keeps the weights.
    #[must_use]
    pub fn base(&self) -> Arc<ClipBase> {
        Arc::clone(&self.base)
    }

    /// As [`Clip::encode`], with what adapters change.
    ///
    /// # Errors
    /// As there; [`ModelError::Executor`] for a stack that was put together for another set.
    pub fn encode_with(
        &self,
        call: &ClipCall,
        stack: Option<&ClipStack>,
        cond: &Span,
        pooled: &Span,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), ModelError> {
        let ClipBase { set, target, .. } = &*self.base;
        self.base.check_unchanged()?;
        if stack.is_some_and(|stack| !stack.is_for(&self.base)) {
            let cause = "adapters that were put together for other text encoders".to_owned();
            return Err(ModelError::Executor { what: WHAT, cause });
        }
        let plan = set.plan(call)?;
        let _no_grad = tch::no_grad_guard();
        let _current = target.make_current()?;
        let result = self.run(call, stack, &plan, [cond, pooled], stop);
        if let Err(ModelError::OutOfMemory { .. }) = &result {
            target.reclaim();
        }
        result
    }

    /// Every tensor made here is gone on return.
    fn run(
        &self,
        call: &ClipCall,
        stack: Option<&ClipStack>,
        plan: &ClipPlan,
        [cond, pooled]: [&Span; 2],
        stop: &dyn Fn() -> bool,
    ) -> Result<(), ModelError> {
        let ClipBase { encoders, target, .. } = &*self.base;
        // Views on the caller's memory. They stay inside this call.
        let cond = view(WHAT, &plan.cond, cond, target)?;
        let pooled = view(WHAT, &plan.pooled, pooled, target)?;
        let mut results = Vec::new();
        for (at, encoder) in encoders.iter().enumerate() {
            let prompt = call.prompts.iter().find(|prompt| prompt.kind == encoder.facts.kind);
            let chunks = prompt.map_or(&[][..], |prompt| &prompt.chunks);
            let patches = stack.and_then(|stack| stack.encoder(at));
            let adapters: &dyn Adapters = patches.map_or(&NoAdapters, |patches| patches);
            results.push(encoder.run(chunks, call, encoders.len() == 1, adapters, stop)?);
        }
        write(&results, cond, pooled).map_err(failed(WHAT))
    }
}

/// Puts the encoders' results into their places: side by side, and the last one's pooled row.
fn write(results: &[Encoded], cond: Tensor, mut pooled: Tensor) -> Result<(), TchError> {
    let (_, positions, _) = cond.size3()?;
    let mut start = 0;
    for result in results {
        let (_, _, width) = result.cond.size3()?;
        let mut place = cond.f_narrow(2, start, width)?;
        place.f_copy_(&result.cond.f_narrow(1, 0, positions)?)?;
        start += width;
    }
    match results.last() {
        Some(last) => pooled.f_copy_(&last.pooled),
        None => Ok(()),
    }
}
