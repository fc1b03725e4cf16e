use std::sync::Arc;
use std::time::Instant;

use super::super::adapters::Stacked;
use super::super::jobs::{ClipCallJob, ClipOutput, ClipWork, ModelTask, clip_length};
use super::super::memories::SlotSource;
use super::super::memory::Held;
use super::super::prompts::Tokenized;
use super::super::responder::Responder;
use super::super::usage::InUse;
use super::Session;
use super::entering::{Enterable, Unprepared};
use super::vae::check_reach;
use crate::error::{Error, Result};
use crate::model::clip::{ClipCall, PackedPrompt, TextEncoders, unpack};
use crate::protocol::{ClipRequest, EncodersTask, Outcome, Rung, SlotPlace, TensorSource};
use crate::service::{ClipInput, ClipPrompt, ClipTokens};

impl Session {
    /// # Errors
    /// What ends the session: bytes behind the request did not come.
    pub(super) fn clip(&mut self, responder: Responder, deadline: Option<Instant>, request: ClipRequest) -> Result<()> {
        match self.prepare_clip(request) {
            Err(unprepared) => return unprepared.answer(responder),
            Ok((prepared, wish)) => {
                let work = |responder, stacked| ClipWork::Call(prepared(responder, stacked));
                self.enter(|state| &state.clip_lane, (responder, deadline), wish, work);
            }
        }
        Ok(())
    }

    /// Says what a set of text encoders is, or loads it.
    pub(super) fn encoders(
        &self,
        responder: Responder,
        deadline: Option<Instant>,
        models: &[String],
        task: EncodersTask,
    ) {
        match (self.state.registry.resolve_set(models), task) {
            (Ok(set), EncodersTask::Describe) => responder.answer(Outcome::Model(set.report())),
            (Ok(set), EncodersTask::Load) => self.submit_each(responder, deadline, ModelTask::Load, vec![set]),
            (Err(error), _) => responder.fail(error),
        }
    }

    /// Reads a prompt and finds memory for its results; what comes out lacks who is answered and, where there is a wish,
    /// the adapters. Nothing of the request is looked at after this: the lane has nothing to wait for.
    fn prepare_clip(
        &mut self,
        request: ClipRequest,
    ) -> Enterable<impl FnOnce(Responder, Option<Arc<Stacked>>) -> ClipCallJob + use<>> {
        let ClipRequest { models, input, options, adapters, result } = request;
        let model = InUse::by(self.link.id(), self.state.registry.resolve_set(&models)?);
        let set = model.clip()?;
        let Tokenized { prompts, ignored } = match input {
            ClipInput::Text(text) => self.state.prompts.tokenize(set, &text)?,
            ClipInput::Tokens(sources) => Tokenized { prompts: self.unpack(set, &sources)?, ignored: Vec::new() },
        };
        let call = ClipCall { prompts, from_end: options.from_end, project: options.project };
        let plan = set.plan(&call)?;
        let SlotSource { memory, .. } = self.memories()?.source(&self.state, result)?;
        let crosses_inline = self.link.open.get().is_some_and(|open| open.rung.rung == Rung::Inline);
        let output = if crosses_inline && result == SlotPlace::Host {
            ClipOutput::Inline(memory.lease(clip_length(&plan)? as u64)?)
        } else {
            let cond = memory.lease(plan.cond.size_bytes()? as u64)?;
            check_reach(&model, &cond)?;
            ClipOutput::Leased { cond, pooled: memory.lease(plan.pooled.size_bytes()? as u64)? }
        };
        let wish = self.wish(&model, adapters)?;
        let job = move |responder, stacked| ClipCallJob { responder, model, call, plan, output, ignored, stacked };
        Ok((job, wish))
    }

    /// Copies tokens out of the client's reach, and checks the copies.
    fn unpack(
        &mut self,
        set: &TextEncoders,
        sources: &[ClipTokens<TensorSource>],
    ) -> Result<Vec<ClipPrompt>, Unprepared> {
        let mut metas = Vec::new();
        for one in sources {
            metas.push(one.try_map(&mut |source| {
                let meta = source.meta();
                meta.validate().map(|()| meta)
            })?);
        }
        set.check_packed(&metas)?;
        let mut prompts = Vec::new();
        for (one, meta) in sources.iter().zip(&metas) {
            // In this order they lie behind the frame, where they do.
            let ids = self.take(&one.ids)?;
            let weights = one.weights.as_ref().map(|source| self.take(source)).transpose()?;
            let rows = one.rows.as_ref().map(|source| self.take(source)).transpose()?.unwrap_or_default();
            let packed = PackedPrompt {
                ids: each(&ids, i32::from_ne_bytes),
                weights: weights.map(|bytes| each(&bytes, f32::from_ne_bytes)),
                rows: each(&rows, f32::from_ne_bytes),
            };
            prompts.push(unpack(meta, &packed)?);
        }
        Ok(prompts)
    }

    /// The bytes of a tensor in host memory.
    fn take(&mut self, source: &TensorSource) -> Result<Vec<u8>, Unprepared> {
        let meta = source.meta();
        let held: Held = match source {
            TensorSource::Leased(descriptor) => self.memories()?.resolve(descriptor)?.0,
            TensorSource::Inline(meta) => self.receive(meta)?,
        };
        let bytes = held.span().bytes(meta.size_bytes()?).map_err(Error::from)?;
        Ok(bytes.to_vec())
    }
}

fn each<T>(bytes: &[u8], number: impl Fn([u8; 4]) -> T) -> Vec<T> {
    bytes.as_chunks::<4>().0.iter().copied().map(number).collect()
}
