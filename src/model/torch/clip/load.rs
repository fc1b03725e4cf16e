use std::cell::Cell;
use std::sync::Arc;

use tch::{TchError, Tensor};

use super::super::super::clip::{Clip, ClipCall, ClipPlan, FoundClip, TextEncoders, find_set, text_encoders};
use super::super::super::{ModelError, ModelFile};
use super::super::failed;
use super::super::spans::view;
use super::super::target::Target;
use super::super::weights::{Backing, LoadOptions, Weights};
use super::WHAT;
use super::encode::{Encoded, Encoder};
use super::linear::NoAdapters;
use crate::device::{Span, StreamRef};

/// Loads the text encoders in `files` as one set, to be run by the calling thread. Weights are kept as they are stored,
/// whatever precision the target has.
///
/// # Errors
/// As [`text_encoders`]; [`ModelError::OutOfMemory`] where the weights do not fit, [`ModelError::Changed`] where a file
/// is no longer the one that was opened.
pub fn load_clip(files: &[Arc<ModelFile>], options: LoadOptions<'_>) -> Result<Box<dyn Clip>, ModelError> {
    let loaded = load(files, options);
    // What a failed attempt had loaded, and what a successful one needed on its way.
    options.target.reclaim();
    Ok(Box::new(loaded?))
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
    for found in find_set(&headers)? {
        let progress = |done: u64, _| (options.progress)(done_before.get() + done, set.weight_bytes());
        // `find_set` numbers the files it was given.
        let Some(file) = files.get(found.file) else { continue };
        encoders.push(load_one(file, &found, LoadOptions { progress: &progress, ..options })?);
        done_before.set(done_before.get() + found.facts.weight_bytes);
    }
    Ok(TorchClip { encoders, set, target: options.target.clone() })
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
    Ok(Encoder { net, facts: found.facts.clone(), backing: weights.into_backing(file) })
}

/// A loaded set.
#[derive(Debug)]
struct TorchClip {
    /// In the order of the set.
    encoders: Vec<Encoder>,
    set: TextEncoders,
    target: Target,
}

impl Clip for TorchClip {
    fn encode(
        &mut self,
        call: &ClipCall,
        cond: &Span,
        pooled: &Span,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), ModelError> {
        for encoder in &self.encoders {
            if let Backing::File(file) = &encoder.backing {
                file.check_unchanged()?;
            }
        }
        let plan = self.set.plan(call)?;
        let _no_grad = tch::no_grad_guard();
        let _current = self.target.make_current()?;
        let result = self.run(call, &plan, cond, pooled, stop);
        if let Err(ModelError::OutOfMemory { .. }) = &result {
            self.target.reclaim();
        }
        result
    }

    fn stream(&self) -> Option<StreamRef> {
        self.target.stream()
    }
}

impl TorchClip {
    /// Every tensor made here is gone on return.
    fn run(
        &self,
        call: &ClipCall,
        plan: &ClipPlan,
        cond: &Span,
        pooled: &Span,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), ModelError> {
        // Views on the caller's memory. They stay inside this call.
        let cond = view(WHAT, &plan.cond, cond, &self.target)?;
        let pooled = view(WHAT, &plan.pooled, pooled, &self.target)?;
        let mut results = Vec::new();
        for encoder in &self.encoders {
            let prompt = call.prompts.iter().find(|prompt| prompt.kind == encoder.facts.kind);
            let chunks = prompt.map_or(&[][..], |prompt| &prompt.chunks);
            results.push(encoder.run(chunks, call, self.encoders.len() == 1, &NoAdapters, stop)?);
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
