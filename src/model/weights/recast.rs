use std::sync::Arc;

use blake3::{Hash, Hasher};

use super::cast::{cast, is_possible};
use super::load::{check_layout, mismatch, span};
use super::plan::{PlannedTensor, WeightPlan};
use super::transfer::{CHUNK_BYTES, Caller, Workspace, room};
use crate::device::{Place, Region, Span};
use crate::id::ContentDigest;
use crate::model::ModelError;
use crate::tensor::{DType, Digested, digest_of, parallel};

/// A region that is complete, and where its tensors lie.
#[derive(Debug, Clone, Copy)]
pub struct Filled<'a> {
    /// Its layout.
    pub plan: &'a WeightPlan,
    /// Its memory.
    pub region: &'a Arc<dyn Region>,
}

/// Fills `region` with the tensors of `source` where and as `plan` wants them, on several threads, and answers what it
/// then contains. `progress`, `stop` and the state of `region` are as in [`super::load`], with bytes of `source`.
///
/// # Errors
/// [`ModelError::Cancelled`], [`ModelError::PlanMismatch`] where `plan` is not of `source` or one of the two reaches
/// beyond its region, [`ModelError::Memory`].
pub fn recast(
    source: Filled<'_>,
    plan: &WeightPlan,
    region: &Arc<dyn Region>,
    progress: &(dyn Fn(u64, u64) + Sync),
    stop: &(dyn Fn() -> bool + Sync),
) -> Result<ContentDigest, ModelError> {
    check_layout(source.plan)?;
    check_layout(plan)?;
    if source.plan.tensors.len() != plan.tensors.len() {
        return Err(mismatch("", "the source has another number of tensors"));
    }
    let pairs = source.plan.tensors.iter().zip(&plan.tensors);
    let moves = pairs.map(|(from, to)| Move::of(from, source.region, to, region)).collect::<Result<Vec<_>, _>>()?;
    let sizes: Vec<u64> = moves.iter().map(|one| one.from.length() as u64).collect();
    let caller = Caller::start(sizes.iter().sum(), progress, stop);
    let hashes = parallel::each(&sizes, Workspace::default, |at, scratch| {
        moves.get(at).ok_or(ModelError::EmptySet)?.run(&caller, scratch)
    })?;
    caller.check()?;
    caller.finish();
    Ok(digest_of(plan.tensors.iter().zip(hashes).map(|(planned, bytes)| Digested {
        key: &planned.key,
        dtype: planned.meta.dtype,
        shape: planned.meta.shape.as_slice(),
        bytes,
    })))
}

/// One tensor on its way from region to region.
struct Move {
    from: Span,
    stored: DType,
    to: Span,
    wanted: DType,
}

impl Move {
    fn of(
        from: &PlannedTensor,
        source: &Arc<dyn Region>,
        to: &PlannedTensor,
        region: &Arc<dyn Region>,
    ) -> Result<Self, ModelError> {
        let (stored, wanted) = (from.meta.dtype, to.meta.dtype);
        if from.key != to.key || from.meta.shape != to.meta.shape || !is_possible(stored, wanted) {
            return Err(mismatch(&to.key, "the source has another tensor"));
        }
        Ok(Self { from: span(source, from)?, stored, to: span(region, to)?, wanted })
    }

    fn run(&self, caller: &Caller<'_>, scratch: &mut Workspace) -> Result<Hash, ModelError> {
        let mut hasher = Hasher::new();
        let on_host = self.from.place() == Place::Host;
        for start in (0..self.from.length()).step_by(CHUNK_BYTES) {
            caller.check()?;
            let length = CHUNK_BYTES.min(self.from.length() - start);
            let part = self.from.part(start, length)?;
            let stored = match on_host {
                true => part.bytes(length)?,
                false => {
                    let stored = room(&mut scratch.stored, length);
                    part.read(stored)?;
                    stored
                }
            };
            let wanted = if self.stored == self.wanted {
                stored
            } else {
                let wanted = room(&mut scratch.wanted, length / self.stored.size_bytes() * self.wanted.size_bytes());
                cast(self.stored, self.wanted, stored, wanted)?;
                wanted
            };
            hasher.update(wanted);
            let place = self.to.part(start / self.stored.size_bytes() * self.wanted.size_bytes(), wanted.len())?;
            place.populate();
            place.write(wanted)?;
            caller.advance(length as u64);
        }
        Ok(hasher.finalize())
    }
}
