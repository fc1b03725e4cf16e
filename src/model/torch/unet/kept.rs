use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tch::{Kind, TchError, Tensor};

use super::super::super::unet::{Moment, Progress, least_common_multiple};
use super::super::super::{Control, ModelFile, RunMemory};
use crate::service::{BlockCache, CacheStep, CacheVerdict, RunReport};

/// On a GPU, computed steps and others of a run whose time is taken, for which the host waits.
const MEASURED: u32 = 2;

/// Different sets of conditionings that a run's block cache compares for.
const MAX_COMPARED: usize = 8;

/// What a model keeps of a run.
#[derive(Debug)]
pub(super) struct Kept {
    /// The weights that it was computed with.
    file: Arc<ModelFile>,
    conds: BTreeMap<u32, Cond>,
    /// What the block cache compares with, by the conditionings of a call.
    last: BTreeMap<Vec<u32>, Computed>,
    progress: Progress,
    computed: Mean,
    hit: Mean,
}

/// A conditioning that was sent: `[rows, tokens, width]` and `[rows, width]` as the model computes with them.
#[derive(Debug, Default)]
pub(super) struct Cond {
    pub(super) context: Option<Tensor>,
    pub(super) y: Option<Tensor>,
}

/// The last forward that was computed for some conditionings.
#[derive(Debug)]
struct Computed {
    /// What the first block changed.
    first: Tensor,
    /// What all blocks behind it changed.
    rest: Tensor,
    control: Control<Tensor>,
    /// Of the last call, computed or not.
    timestep: f64,
    /// Calls not computed since.
    hits: u32,
}

#[derive(Debug, Default)]
struct Mean {
    sum_s: f64,
    count: u32,
}

impl Mean {
    fn add(&mut self, time: Duration) {
        self.sum_s += time.as_secs_f64();
        self.count += 1;
    }

    fn seconds(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum_s / f64::from(self.count) }
    }
}

/// A call of a run with a block cache before its rest is run or left out.
pub(super) struct Opinion {
    moment: Moment,
    progress: Progress,
    /// Settled without a look at the tensors.
    settled: Option<CacheVerdict>,
    /// Otherwise by which share first block and control differ: two numbers, still where the model computes.
    distances: Option<Tensor>,
}

impl Kept {
    /// What `memory` holds for the weights in `file`; what it held for others is dropped.
    pub(super) fn of<'a>(memory: &'a mut RunMemory, file: &Arc<ModelFile>) -> Option<&'a mut Self> {
        let is_own = |kept: &Self| Arc::ptr_eq(&kept.file, file);
        if !memory.kept.as_ref().and_then(|kept| kept.downcast_ref()).is_some_and(is_own) {
            memory.kept = Some(Box::new(Self {
                file: Arc::clone(file),
                conds: BTreeMap::new(),
                last: BTreeMap::new(),
                progress: Progress::new(&memory.sigmas),
                computed: Mean::default(),
                hit: Mean::default(),
            }));
        }
        memory.kept.as_mut().and_then(|kept| kept.downcast_mut())
    }

    pub(super) fn cond(&self, id: u32) -> Option<&Cond> {
        self.conds.get(&id)
    }

    /// Takes up what a step brought of its conditionings. Where that is something else than before, nothing is kept that
    /// was computed with it.
    pub(super) fn bring(&mut self, id: u32, brought: Cond) -> Result<(), TchError> {
        let cond = self.conds.entry(id).or_default();
        let mut changed = false;
        for (own, new) in [(&mut cond.context, brought.context), (&mut cond.y, brought.y)] {
            let Some(new) = new else { continue };
            let is_same = match own {
                // Read on the host: only worth it where something is kept.
                Some(own) if !self.last.is_empty() => own.size() == new.size() && own.f_equal(&new)?,
                _ => false,
            };
            changed |= !is_same;
            *own = Some(new);
        }
        if changed {
            self.last.retain(|conds, _| !conds.contains(&id));
        }
        Ok(())
    }

    /// Whether the rest of the call's forward can be left out, as far as that is known here. `first` is what its first block
    /// changed.
    pub(super) fn opinion(
        &self,
        cache: &BlockCache,
        conds: &[u32],
        timestep: f64,
        first: &Tensor,
        control: &Control<Tensor>,
    ) -> Result<Opinion, TchError> {
        let mut progress = self.progress.clone();
        let moment = progress.step(timestep);
        let settled = |verdict| Ok((Some(verdict), None));
        let (settled, distances) = match self.last.get(conds) {
            _ if !moment.is_within(cache) => settled(CacheVerdict::Outside),
            None => settled(CacheVerdict::Empty),
            Some(last) if last.first.size() != first.size() => settled(CacheVerdict::Empty),
            Some(last) if timestep > last.timestep => settled(CacheVerdict::Restarted),
            Some(last) if sizes(&last.control) != sizes(control) => settled(CacheVerdict::Control),
            Some(last) if cache.max_hits.is_some_and(|most| last.hits >= most) => settled(CacheVerdict::Exhausted),
            Some(last) => {
                let own = distance([(&last.first, first)].into_iter())?;
                let control = distance(last.control.each().zip(control.each()))?;
                Ok::<_, TchError>((None, Some(Tensor::f_stack(&[own, control], 0)?)))
            }
        }?;
        Ok(Opinion { moment, progress, settled, distances })
    }

    /// What the rest of the last computed forward changed.
    pub(super) fn rest(&self, conds: &[u32]) -> Option<&Tensor> {
        self.last.get(conds).map(|last| &last.rest)
    }

    /// The call was not computed.
    pub(super) fn note_hit(&mut self, conds: &[u32], opinion: Opinion) {
        self.progress = opinion.progress;
        if let Some(last) = self.last.get_mut(conds) {
            last.hits += 1;
            last.timestep = opinion.moment.timestep;
        }
    }

    /// The call was computed; everything given owns its memory.
    pub(super) fn note_computed(
        &mut self,
        conds: &[u32],
        opinion: Opinion,
        ([first, rest], control): ([Tensor; 2], Control<Tensor>),
    ) {
        self.progress = opinion.progress;
        let timestep = opinion.moment.timestep;
        if self.last.len() >= MAX_COMPARED && !self.last.contains_key(conds) {
            // The one furthest behind: later timesteps are smaller.
            let behind = self.last.iter().max_by(|(_, one), (_, other)| one.timestep.total_cmp(&other.timestep));
            let behind = behind.map(|(conds, _)| conds.clone());
            behind.map(|conds| self.last.remove(&conds));
        }
        self.last.insert(conds.to_vec(), Computed { first, rest, control, timestep, hits: 0 });
    }

    /// Whether times are still to be taken where the host must wait for that.
    pub(super) fn wants_time(&self) -> bool {
        self.computed.count.min(self.hit.count) < MEASURED && self.computed.count + self.hit.count < 3 * MEASURED
    }

    /// Counts a step, with its time where that was taken; the run until now.
    pub(super) fn count(&mut self, before: RunReport, hit: bool, time: Option<Duration>) -> RunReport {
        let mean = if hit { &mut self.hit } else { &mut self.computed };
        if let Some(time) = time {
            mean.add(time);
        }
        RunReport {
            steps: before.steps + 1,
            hits: before.hits + u64::from(hit),
            computed_s: self.computed.seconds(),
            hit_s: self.hit.seconds(),
        }
    }
}

/// Judges calls by their opinions. Waits for the GPU once for all of them, and not at all where nothing has to be looked at.
pub(super) fn judge(opinions: &[(BlockCache, &Opinion)]) -> Result<Vec<CacheStep>, TchError> {
    let unsettled: Vec<&Tensor> = opinions.iter().filter_map(|(_, opinion)| opinion.distances.as_ref()).collect();
    let mut numbers = match unsettled.is_empty() {
        true => Vec::new(),
        false => Vec::<f64>::try_from(Tensor::f_cat(&unsettled, 0)?.f_to_kind(Kind::Double)?)?,
    }
    .into_iter();
    let mut next = || numbers.next().unwrap_or(f64::INFINITY);
    let one = |(cache, opinion): &(BlockCache, &Opinion)| {
        if let Some(verdict) = opinion.settled {
            return CacheStep { verdict, distance: None };
        }
        let (own, control) = (next(), next());
        // Not a number is no hit.
        let verdict = match () {
            () if own < cache.threshold && control < cache.threshold => CacheVerdict::Hit,
            () if own < cache.threshold => CacheVerdict::Control,
            () => CacheVerdict::Different,
        };
        CacheStep { verdict, distance: Some(own) }
    };
    Ok(opinions.iter().map(one).collect())
}

/// Sum of the differences over the sum of what was, for all pairs together; 0 where there are none.
fn distance<'a>(pairs: impl Iterator<Item = (&'a Tensor, &'a Tensor)>) -> Result<Tensor, TchError> {
    let mut sums: Option<(Tensor, Tensor)> = None;
    for (before, now) in pairs {
        // In float32: sums of many halves leave their range.
        let total = |tensor: Tensor| tensor.f_abs()?.f_sum(Kind::Float);
        let (apart, size) = (total(before.f_sub(now)?)?, total(before.shallow_clone())?);
        sums = Some(match sums {
            Some((all_apart, all_sizes)) => (all_apart.f_add(&apart)?, all_sizes.f_add(&size)?),
            None => (apart, size),
        });
    }
    match sums {
        Some((apart, size)) => apart.f_div(&size),
        None => Ok(Tensor::from(0f32)),
    }
}

fn sizes(control: &Control<Tensor>) -> Control<Vec<i64>> {
    let Ok(sizes) = control.try_map(&mut |tensor| Ok::<_, std::convert::Infallible>(tensor.size()));
    sizes
}

/// Contexts of several conditionings for `rows` rows each, one below the other and repeated to a common length.
pub(super) fn contexts<'a>(conds: impl Iterator<Item = &'a Tensor> + Clone, rows: i64) -> Result<Tensor, TchError> {
    let length = |context: &Tensor| context.size().get(1).copied().unwrap_or(1).max(1).cast_unsigned();
    let common = conds.clone().map(length).try_fold(1, least_common_multiple);
    let common = common.ok_or_else(|| TchError::Shape("contexts without a common length".to_owned()))?;
    let all = conds.map(|context| {
        let (_, _, width) = context.size3()?;
        let times = common / length(context);
        context.f_repeat([1, times.cast_signed(), 1])?.f_expand([rows, common.cast_signed(), width], false)
    });
    Tensor::f_cat(&all.collect::<Result<Vec<_>, TchError>>()?, 0)
}

/// The same of their vectors.
pub(super) fn vectors<'a>(conds: impl Iterator<Item = &'a Tensor>, rows: i64) -> Result<Tensor, TchError> {
    let all = conds.map(|y| y.f_expand([rows, y.size2()?.1], false));
    Tensor::f_cat(&all.collect::<Result<Vec<_>, TchError>>()?, 0)
}
