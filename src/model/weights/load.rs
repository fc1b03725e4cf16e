use std::sync::Arc;

use blake3::Hasher;

use super::cast::is_possible;
use super::plan::{WeightPlan, file_tensors};
use super::transfer::{CHUNK_BYTES, Caller, Hashes, Target, Transfer, Workspace, room};
use crate::device::{Region, Span};
use crate::id::ContentDigest;
use crate::model::header::quote;
use crate::model::{ModelError, ModelFile, StoredTensor};
use crate::tensor::{DType, Dims};
use crate::tensor::{Digested, digest_of, parallel};

/// What a region was filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// Of the tensors as they are in the file.
    pub source: ContentDigest,
    /// Of the tensors as they are in the region; the same where nothing was converted.
    pub content: ContentDigest,
}

/// Fills `region` with the tensors of `file` where `plan` wants them, on several threads. `progress` hears bytes of the
/// file done and in all, from one thread at a time, at most every few MiB; `stop` is asked for every chunk.
///
/// The region must be as it was allocated: zeroed, and not yet seen by anybody else. After an error it holds anything
/// and is to be dropped.
///
/// # Errors
/// [`ModelError::Changed`] where the file changes before the end, [`ModelError::Cancelled`], [`ModelError::Unreadable`],
/// [`ModelError::PlanMismatch`] where `plan` is not of this file or reaches beyond the region, [`ModelError::Memory`],
/// and what [`WeightPlan::of_file`] finds wrong with the file.
pub fn load(
    file: &ModelFile,
    plan: &WeightPlan,
    region: &Arc<dyn Region>,
    progress: &(dyn Fn(u64, u64) + Sync),
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<Loaded, ModelError> {
    check_layout(plan)?;
    let described = described(file)?;
    if described.len() != plan.tensors.len() {
        return Err(mismatch("", "the file has another number of tensors"));
    }
    let targets = described.iter().zip(&plan.tensors).map(|(source, planned)| {
        let is_same = source.key == planned.key && source.dtype == planned.stored && source.shape == planned.meta.shape;
        if !is_same || !is_possible(source.dtype, planned.meta.dtype) {
            return Err(mismatch(&planned.key, "the file has another tensor"));
        }
        Ok((planned.meta.dtype, span(region, planned)?))
    });
    let targets = targets.collect::<Result<Vec<_>, ModelError>>()?;
    let hashes = read(file, &described, progress, stop, |at| {
        targets.get(at).map(|(dtype, span)| Target { dtype: *dtype, span: span.clone() })
    })?;
    let source = source_digest(&described, &hashes);
    let content = digest_of(plan.tensors.iter().zip(&hashes).map(|(planned, hashes)| Digested {
        key: &planned.key,
        dtype: planned.meta.dtype,
        shape: planned.meta.shape.as_slice(),
        bytes: hashes.wanted,
    }));
    Ok(Loaded { source, content })
}

/// The digest of the tensors of `file` as they are stored: [`Loaded::source`], without loading.
///
/// # Errors
/// As [`load`].
pub fn digest_file(
    file: &ModelFile,
    progress: &(dyn Fn(u64, u64) + Sync),
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<ContentDigest, ModelError> {
    let described = described(file)?;
    let hashes = read(file, &described, progress, stop, |_| None)?;
    Ok(source_digest(&described, &hashes))
}

/// The digest of the tensors that `region` holds now: [`Loaded::content`], unless somebody wrote to it.
///
/// Reading memory of the host that was never written makes the system provide it.
///
/// # Errors
/// [`ModelError::Cancelled`], [`ModelError::PlanMismatch`] where `plan` reaches beyond the region,
/// [`ModelError::Memory`].
pub fn digest_region(
    plan: &WeightPlan,
    region: &Arc<dyn Region>,
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<ContentDigest, ModelError> {
    check_layout(plan)?;
    let spans = plan.tensors.iter().map(|planned| span(region, planned)).collect::<Result<Vec<_>, _>>()?;
    let sizes: Vec<u64> = spans.iter().map(|span| span.length() as u64).collect();
    let hashes = parallel::each(&sizes, Vec::new, |at, scratch| {
        let mut hasher = Hasher::new();
        let Some(span) = spans.get(at) else { return Ok(hasher.finalize()) };
        for start in (0..span.length()).step_by(CHUNK_BYTES) {
            if stop() {
                return Err(ModelError::Cancelled);
            }
            let length = CHUNK_BYTES.min(span.length() - start);
            let bytes = room(scratch, length);
            span.part(start, length)?.read(bytes)?;
            hasher.update(bytes);
        }
        Ok(hasher.finalize())
    })?;
    Ok(digest_of(plan.tensors.iter().zip(hashes).map(|(planned, bytes)| Digested {
        key: &planned.key,
        dtype: planned.meta.dtype,
        shape: planned.meta.shape.as_slice(),
        bytes,
    })))
}

/// One tensor of a file, as it is digested.
struct Source<'a> {
    key: String,
    dtype: DType,
    shape: Dims,
    stored: &'a StoredTensor,
}

/// The tensors of `file`, sorted by key.
fn described(file: &ModelFile) -> Result<Vec<Source<'_>>, ModelError> {
    let described = file_tensors(file)?.into_iter().zip(file.tensors());
    Ok(described.map(|((key, dtype, shape), (_, stored))| Source { key, dtype, shape, stored }).collect())
}

/// Reads every tensor once, into the target that `target` has for it.
fn read(
    file: &ModelFile,
    described: &[Source<'_>],
    progress: &(dyn Fn(u64, u64) + Sync),
    stop: &(dyn Fn() -> bool + Sync),
    target: impl Fn(usize) -> Option<Target> + Sync,
) -> Result<Vec<Hashes>, ModelError> {
    file.check_unchanged()?;
    let sizes: Vec<u64> = described.iter().map(|source| source.stored.bytes.len() as u64).collect();
    let caller = Caller::start(sizes.iter().sum(), progress, stop);
    let hashes = parallel::each(&sizes, Workspace::default, |at, scratch| {
        let source = described.get(at).ok_or(ModelError::EmptySet)?;
        let transfer = Transfer { file, tensor: source.stored, dtype: source.dtype, caller: &caller };
        transfer.run(target(at), scratch)
    })?;
    caller.check()?;
    file.check_unchanged()?;
    caller.finish();
    Ok(hashes)
}

fn source_digest(described: &[Source<'_>], hashes: &[Hashes]) -> ContentDigest {
    digest_of(described.iter().zip(hashes).map(|(source, hashes)| Digested {
        key: &source.key,
        dtype: source.dtype,
        shape: source.shape.as_slice(),
        bytes: hashes.stored,
    }))
}

/// The bytes of a planned tensor.
pub(super) fn span(region: &Arc<dyn Region>, planned: &super::PlannedTensor) -> Result<Span, ModelError> {
    let beyond = || mismatch(&planned.key, "it lies beyond the region");
    let offset = usize::try_from(planned.offset).map_err(|_| beyond())?;
    Span::new(Arc::clone(region), offset, planned.meta.size_bytes()?).map_err(|_| beyond())
}

/// Threads write to the tensors of a plan at the same time: no two may share a byte, whoever made the plan.
pub(super) fn check_layout(plan: &WeightPlan) -> Result<(), ModelError> {
    let mut end = 0u64;
    let mut last: Option<&str> = None;
    for planned in &plan.tensors {
        if planned.offset < end || last.is_some_and(|last| last >= planned.key.as_str()) {
            return Err(mismatch(&planned.key, "tensors overlap or are not sorted"));
        }
        let size_bytes = planned.meta.size_bytes()? as u64;
        end = planned.offset.checked_add(size_bytes).ok_or_else(|| mismatch(&planned.key, "it has no end"))?;
        last = Some(&planned.key);
    }
    Ok(())
}

pub(super) fn mismatch(key: &str, reason: &'static str) -> ModelError {
    ModelError::PlanMismatch { tensor: quote(key), reason }
}
