use std::sync::Arc;
use std::time::{Duration, Instant};

use tch::{Kind, TchError, Tensor};

use super::super::super::unet::share;
use super::super::super::{Control, ModelError, ReadyStack, StackMaker, StepInput, Unet, UnetCall, UnetInput};
use super::super::spans::view;
use super::super::target::Target;
use super::super::{failed, kind_of};
use super::WHAT;
use super::kept::{Cond, Kept, Opinion, contexts, judge, vectors};
use super::load::TorchUnet;
use super::patches::Patches;
use super::run::Started;
use super::stack::Stack;
use crate::device::StreamRef;
use crate::service::{BlockCache, CacheStep, CacheVerdict};

impl Unet for TorchUnet {
    fn step(
        &mut self,
        calls: &mut [UnetCall<'_>],
        stop: &dyn Fn() -> bool,
    ) -> Result<Vec<Option<CacheStep>>, ModelError> {
        if stop() {
            return Err(ModelError::Cancelled);
        }
        let _no_grad = tch::no_grad_guard();
        let _current = self.base.target.make_current()?;
        let result = self.batch(calls);
        if result.is_err() {
            // Memory that was kept for later is what others may lack.
            self.base.target.reclaim();
        }
        result
    }

    fn stack_maker(&self) -> Arc<dyn StackMaker> {
        Arc::clone(&self.base) as Arc<dyn StackMaker>
    }

    fn wait(&self) -> Result<(), ModelError> {
        match &self.base.target {
            Target::Cpu => Ok(()),
            Target::Cuda { lane, .. } => lane.synchronize(),
        }
    }

    fn stream(&self) -> Option<StreamRef> {
        self.base.target.stream()
    }
}

/// A call with its tensors complete.
struct Ready {
    input: UnetInput<Tensor>,
    first_row: i64,
    rows: i64,
}

/// A call of a run with a block cache.
struct Cached {
    settings: BlockCache,
    opinion: Opinion,
}

impl TorchUnet {
    fn batch(&self, calls: &mut [UnetCall<'_>]) -> Result<Vec<Option<CacheStep>>, ModelError> {
        let clock = Clock::start(&self.base.target, self.wants_time(calls))?;
        let mut patches = Patches::none();
        let (mut all, mut first_row) = (Vec::new(), 0);
        for call in calls.iter_mut() {
            let ready = self.ready(call, first_row)?;
            first_row += ready.rows;
            if let Some(stack) = call.stack {
                let of = |rows: i64| u32::try_from(rows).unwrap_or(u32::MAX);
                patches.add(of(ready.first_row), of(ready.rows), own_stack(stack)?)?;
            }
            all.push(ready);
        }
        let joined;
        let input = match all.as_slice() {
            [one] => &one.input,
            many => {
                joined = self.join(many).map_err(failed(WHAT))?;
                &joined
            }
        };
        let started = self.start(input, &patches)?;
        let cached = self.opinions(calls, &all, &started).map_err(failed(WHAT))?;
        let verdicts = verdicts(&cached).map_err(failed(WHAT))?;
        let end = self.end(calls, &all, &started, &verdicts)?;
        let out = self.finish(&started, &end)?;
        for (call, ready) in calls.iter().zip(&all) {
            self.write(call, ready, &out)?;
        }
        let time = clock.stop(calls.len())?;
        for (((call, ready), cached), verdict) in calls.iter_mut().zip(&all).zip(cached).zip(&verdicts) {
            let Some((memory, conds)) = &mut call.run else { continue };
            let report = memory.report;
            let Some(kept) = Kept::of(memory, &self.base.file) else { continue };
            if let Some(Cached { opinion, .. }) = cached {
                match is_hit(verdict) {
                    true => kept.note_hit(conds, opinion),
                    false => {
                        let computed = computed(&started, &end, ready).map_err(failed(WHAT))?;
                        kept.note_computed(conds, opinion, computed);
                    }
                }
            }
            memory.report = kept.count(report, is_hit(verdict), time);
        }
        Ok(verdicts)
    }

    /// Views on the call's tensors, and what its run has of those it leaves out.
    fn ready(&self, call: &mut UnetCall<'_>, first_row: i64) -> Result<Ready, ModelError> {
        // Views on the caller's memory. They and whatever is made of them stay inside the call, except for copies.
        let given = call.input.try_map(&mut |one| view(WHAT, &one.meta, one.memory, &self.base.target))?;
        let rows = given.x.size().first().copied().unwrap_or(0);
        let StepInput { x, timesteps, context, y, control } = given;
        let missing = |tensor| ModelError::MissingInput {
            path: self.facts.path.clone(),
            tensor,
            expected: format!("for {rows} rows"),
        };
        let (context, y) = match &mut call.run {
            None => (context.ok_or_else(|| missing("context"))?, y),
            Some((memory, conds)) => {
                let each = share(&self.facts, rows.cast_unsigned(), conds)?.cast_signed();
                let kept = Kept::of(memory, &self.base.file).ok_or_else(|| missing("context"))?;
                self.bring(kept, conds, each, [context.as_ref(), y.as_ref()]).map_err(failed(WHAT))?;
                self.complete(kept, conds, each, [context, y])?
            }
        };
        Ok(Ready { input: UnetInput { x, timesteps, context, y, control }, first_row, rows })
    }

    /// Gives the run its own copy of what a step brings.
    fn bring(
        &self,
        kept: &mut Kept,
        conds: &[u32],
        each: i64,
        [context, y]: [Option<&Tensor>; 2],
    ) -> Result<(), TchError> {
        for (&cond, first) in conds.iter().zip((0..).map(|at| at * each)) {
            let own = |tensor: &Tensor| {
                let there = tensor.f_narrow(0, first, each)?.f_to_device(self.base.target.device())?;
                there.f_to_kind(self.base.kind)?.f_detach_copy()?.f_contiguous()
            };
            // Only what will be found to fit: the forward checks it as a whole.
            let of = |tensor: Option<&Tensor>| {
                tensor.filter(|tensor| tensor.size().first() == Some(&(each * conds.len() as i64))).map(own).transpose()
            };
            kept.bring(cond, Cond { context: of(context)?, y: of(y)? })?;
        }
        Ok(())
    }

    fn complete(
        &self,
        kept: &Kept,
        conds: &[u32],
        each: i64,
        [context, y]: [Option<Tensor>; 2],
    ) -> Result<(Tensor, Option<Tensor>), ModelError> {
        let missing = |cond: &u32, what: &str| {
            let reason = format!("cond {cond} was never sent in this run, and the step brings no {what}");
            ModelError::Conds { path: self.facts.path.clone(), reason }
        };
        let context = match context {
            Some(context) => context,
            None => {
                let of = |cond: &u32| {
                    kept.cond(*cond).and_then(|sent| sent.context.as_ref()).ok_or_else(|| missing(cond, "context"))
                };
                let all = conds.iter().map(of).collect::<Result<Vec<_>, _>>()?;
                contexts(all.into_iter(), each).map_err(failed(WHAT))?
            }
        };
        let y = match (y, self.facts.vector_width) {
            (None, Some(_)) => {
                let of =
                    |cond: &u32| kept.cond(*cond).and_then(|sent| sent.y.as_ref()).ok_or_else(|| missing(cond, "y"));
                let all = conds.iter().map(of).collect::<Result<Vec<_>, _>>()?;
                Some(vectors(all.into_iter(), each).map_err(failed(WHAT))?)
            }
            (y, _) => y,
        };
        Ok((context, y))
    }

    /// Several calls as one, in the order of their rows. Results come in the element type computed in.
    fn join(&self, all: &[Ready]) -> Result<UnetInput<Tensor>, TchError> {
        let own = |tensor: &Tensor, kind| tensor.f_to_device(self.base.target.device())?.f_to_kind(kind);
        let cat = |of: &dyn Fn(&UnetInput<Tensor>) -> Option<&Tensor>, kind: Kind| {
            let parts = all.iter().filter_map(|ready| of(&ready.input)).map(|tensor| own(tensor, kind));
            Tensor::f_cat(&parts.collect::<Result<Vec<_>, TchError>>()?, 0)
        };
        let kind = self.base.kind;
        let has_y = all.iter().any(|ready| ready.input.y.is_some());
        Ok(UnetInput {
            x: cat(&|input| Some(&input.x), kind)?,
            // Half-precision cannot tell neighbouring steps apart.
            timesteps: cat(&|input| Some(&input.timesteps), Kind::Float)?,
            context: cat(&|input| Some(&input.context), kind)?,
            y: has_y.then(|| cat(&|input| input.y.as_ref(), kind)).transpose()?,
            // A call with one runs alone.
            control: None,
        })
    }

    /// By call, whether its rest can be left out, as far as can be told without a look at numbers.
    fn opinions(
        &self,
        calls: &mut [UnetCall<'_>],
        all: &[Ready],
        started: &Started,
    ) -> Result<Vec<Option<Cached>>, TchError> {
        let mut first = None;
        let mut cached = Vec::new();
        for (call, ready) in calls.iter_mut().zip(all) {
            let Some((settings, (memory, conds))) = call.run.as_mut().and_then(|run| Some((run.0.cache?, run))) else {
                cached.push(None);
                continue;
            };
            let Some(kept) = Kept::of(memory, &self.base.file) else {
                cached.push(None);
                continue;
            };
            let change = match &first {
                Some(change) => change,
                None => first.insert(started.h1().f_sub(started.h0())?),
            };
            let timestep = ready.input.timesteps.f_max()?.f_double_value(&[])?;
            let rows = change.f_narrow(0, ready.first_row, ready.rows)?;
            let opinion = kept.opinion(&settings, conds, timestep, &rows, started.control())?;
            cached.push(Some(Cached { settings, opinion }));
        }
        Ok(cached)
    }

    /// What the blocks give for all rows: computed where it must be, else as it was plus what changed since.
    fn end(
        &self,
        calls: &mut [UnetCall<'_>],
        all: &[Ready],
        started: &Started,
        verdicts: &[Option<CacheStep>],
    ) -> Result<Tensor, ModelError> {
        if !verdicts.iter().any(is_hit) {
            return self.rest(started);
        }
        let computing = all.iter().zip(verdicts).filter(|(_, verdict)| !is_hit(verdict));
        let rows: Vec<u32> = computing
            .flat_map(|(ready, _)| ready.first_row..ready.first_row + ready.rows)
            .map(|row| u32::try_from(row).unwrap_or(u32::MAX))
            .collect();
        let fresh = match rows.is_empty() {
            true => None,
            false => Some(self.rest(&started.select(&rows)?)?),
        };
        let mut done = 0;
        let mut part = |call: &mut UnetCall<'_>, ready: &Ready, hit: bool| {
            let Ready { first_row, rows, .. } = *ready;
            if !hit {
                let fresh = fresh.as_ref().ok_or_else(|| TchError::Shape("rows that were not run".to_owned()))?;
                done += rows;
                return fresh.f_narrow(0, done - rows, rows);
            }
            let rest = call.run.as_mut().and_then(|(memory, conds)| Kept::of(memory, &self.base.file)?.rest(conds));
            let rest = rest.ok_or_else(|| TchError::Shape("a hit without what it hit".to_owned()))?;
            started.h1().f_narrow(0, first_row, rows)?.f_add(rest)
        };
        let parts =
            calls.iter_mut().zip(all).zip(verdicts).map(|((call, ready), verdict)| part(call, ready, is_hit(verdict)));
        let parts = parts.collect::<Result<Vec<_>, TchError>>().map_err(failed(WHAT))?;
        match <[Tensor; 1]>::try_from(parts) {
            Ok([one]) => Ok(one),
            Err(parts) => Tensor::f_cat(&parts, 0).map_err(failed(WHAT)),
        }
    }

    /// Copies a call's rows to where they are wanted. The library would silently repeat some that do not fit.
    fn write(&self, call: &UnetCall<'_>, ready: &Ready, out: &Tensor) -> Result<(), ModelError> {
        let dtype = call.input.x.meta.dtype;
        let rows = out.f_narrow(0, ready.first_row, ready.rows).map_err(failed(WHAT))?;
        let shape: Vec<u64> = rows.size().iter().map(|extent| extent.cast_unsigned()).collect();
        let meta = crate::tensor::TensorMeta::contiguous(dtype, crate::tensor::Dims::new(&shape)?);
        let mut place = view(WHAT, &meta, call.output, &self.base.target)?;
        if rows.size() != place.size() || Some(place.kind()) != kind_of(dtype) {
            let cause = "the result does not have the planned shape".to_owned();
            return Err(ModelError::Executor { what: WHAT, cause });
        }
        place.f_copy_(&rows).map_err(failed(WHAT))
    }

    /// Whether some run's times are not known yet.
    fn wants_time(&self, calls: &mut [UnetCall<'_>]) -> bool {
        calls.iter_mut().filter_map(|call| call.run.as_mut()).any(|(memory, _)| {
            memory.has_cache() && Kept::of(memory, &self.base.file).is_some_and(|kept| kept.wants_time())
        })
    }
}

/// What a cache keeps of a call that was computed, in memory of its own.
fn computed(started: &Started, end: &Tensor, ready: &Ready) -> Result<([Tensor; 2], Control<Tensor>), TchError> {
    let rows = |tensor: &Tensor| tensor.f_narrow(0, ready.first_row, ready.rows);
    let h1 = rows(started.h1())?;
    let first = h1.f_sub(&rows(started.h0())?)?;
    let rest = rows(end)?.f_sub(&h1)?;
    // Not the caller's memory, which a control may lie in.
    let control = started.control().try_map(&mut |tensor| tensor.f_detach_copy())?;
    Ok(([first, rest], control))
}

fn verdicts(cached: &[Option<Cached>]) -> Result<Vec<Option<CacheStep>>, TchError> {
    let opinions: Vec<_> = cached.iter().flatten().map(|cached| (cached.settings, &cached.opinion)).collect();
    let mut judged = judge(&opinions)?.into_iter();
    Ok(cached.iter().map(|cached| cached.as_ref().and_then(|_| judged.next())).collect())
}

fn is_hit(step: &Option<CacheStep>) -> bool {
    step.is_some_and(|step| step.verdict == CacheVerdict::Hit)
}

fn own_stack(stack: &ReadyStack) -> Result<Arc<Stack>, ModelError> {
    let cause = || "adapters that were put together for a model of another kind".to_owned();
    stack.tensors().ok_or_else(|| ModelError::Executor { what: WHAT, cause: cause() })
}

/// Takes the time of a batch. On a GPU the host waits for that, so there it is only done where it is `wanted`.
struct Clock<'a> {
    target: &'a Target,
    began: Option<Instant>,
}

impl<'a> Clock<'a> {
    fn start(target: &'a Target, wanted: bool) -> Result<Self, ModelError> {
        let takes = match target {
            Target::Cpu => true,
            Target::Cuda { lane, .. } if wanted => lane.synchronize().map(|()| true)?,
            Target::Cuda { .. } => false,
        };
        Ok(Self { target, began: takes.then(Instant::now) })
    }

    /// The time that each of `calls` took, as if they had run one after the other.
    fn stop(self, calls: usize) -> Result<Option<Duration>, ModelError> {
        let Some(began) = self.began else { return Ok(None) };
        if let Target::Cuda { lane, .. } = self.target {
            lane.synchronize()?;
        }
        Ok(Some(began.elapsed() / u32::try_from(calls.max(1)).unwrap_or(u32::MAX)))
    }
}
