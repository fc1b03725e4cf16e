use std::sync::Arc;
use std::time::Instant;

use super::super::adapters::{Stacked, Waiting, Wish};
use super::super::jobs::{UnetCallJob, UnetOperand, UnetWork};
use super::super::memories::SlotSource;
use super::super::responder::Responder;
use super::super::runs::{Run, RunStep, Runs};
use super::super::usage::InUse;
use super::Session;
use super::entering::{Enterable, Unprepared};
use super::vae::check_reach;
use crate::error::{Error, ErrorKind, Result};
use crate::id::RunId;
use crate::model::StepFacts;
use crate::protocol::{OpenRun, Outcome, Rung, SlotPlace, StepSubject, TensorSource, UnetRequest};
use crate::service::{AdapterStack, Service, StepInput};
use crate::tensor::TensorMeta;

impl Session {
    /// # Errors
    /// What ends the session: bytes behind the request did not come.
    pub(super) fn unet(&mut self, responder: Responder, deadline: Option<Instant>, request: UnetRequest) -> Result<()> {
        match self.prepare_unet(request) {
            Err(unprepared) => return unprepared.answer(responder),
            Ok((prepared, wish)) => {
                let work = |responder, stacked| UnetWork::Call(prepared(responder, stacked));
                self.enter(|state| &state.unet_lane, (responder, deadline), wish, work);
            }
        }
        Ok(())
    }

    /// Checks a step and finds its memory; what comes out lacks who is answered and, where there is a wish, the adapters.
    fn prepare_unet(
        &mut self,
        request: UnetRequest,
    ) -> Enterable<impl FnOnce(Responder, Option<Arc<Stacked>>) -> UnetCallJob + use<>> {
        let UnetRequest { subject, input, result } = request;
        let metas = input.try_map(&mut |source| {
            let meta = source.meta();
            meta.validate().map(|()| meta)
        });
        let checked = metas.map_err(Error::from).and_then(|metas| self.subject(subject, &metas));
        let Subject { model, facts, wish, run } = checked?;
        // In this order they lie behind the frame, where they do.
        let operands = input.try_map(&mut |source| match source {
            TensorSource::Leased(descriptor) => {
                let (held, _) = self.memories()?.resolve(descriptor)?;
                check_reach(&model, &held)?;
                Ok(UnetOperand { held, meta: descriptor.meta })
            }
            TensorSource::Inline(meta) => Ok::<_, Unprepared>(UnetOperand { held: self.receive(meta)?, meta: *meta }),
        })?;
        let SlotSource { memory, .. } = self.memories()?.source(&self.state, result)?;
        let output = memory.lease(facts.output.size_bytes()? as u64)?;
        check_reach(&model, &output)?;
        let crosses_inline = self.link.open.get().is_some_and(|open| open.rung.rung == Rung::Inline);
        let inline = crosses_inline && result == SlotPlace::Host;
        let job = move |responder, stacked| {
            let input = operands;
            UnetCallJob { responder, model, input, facts, output, inline, stacked, run }
        };
        Ok((job, wish))
    }

    /// What a step is of, where it fits that.
    fn subject(&self, subject: StepSubject, input: &StepInput<TensorMeta>) -> Result<Subject> {
        match subject {
            StepSubject::Model { name, adapters } => {
                let model = InUse::by(self.link.id(), self.state.registry.resolve(Service::Unet, &name)?);
                let facts = model.unet()?.check_alone(input)?;
                let wish = self.wish(&model, adapters)?;
                Ok(Subject { model, facts, wish, run: None })
            }
            StepSubject::Run { run, conds } => {
                let run = self.runs()?.get(run)?;
                let model = run.model.clone();
                let (facts, uses) = run.conds.lock().check(model.unet()?, input, &conds)?;
                Ok(Subject { model, facts, wish: None, run: Some(RunStep { run, conds, uses }) })
            }
        }
    }

    pub(super) fn open_run(&self, responder: Responder, request: OpenRun) {
        let OpenRun { model, settings } = request;
        let prepared = settings.validate().map_err(Error::from).and_then(|()| {
            let model = InUse::by(self.link.id(), self.state.registry.resolve(Service::Unet, &model)?);
            let wish = self.wish(&model, settings.adapters.clone())?;
            Ok((model, wish))
        });
        let (model, wish) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return responder.fail(error),
        };
        let (session, id) = (responder.session(), responder.request());
        let open = move |responder: Responder, stacked: Option<Arc<_>>| {
            let run = Run::new(model, stacked.clone(), &settings);
            let opened = responder.runs().ok_or_else(not_negotiated).and_then(|runs| runs.open(id, run));
            let adapters = stacked.map(|stacked| stacked.taken.clone()).unwrap_or_default();
            responder.settle(opened.map(|run| Outcome::Run { run, adapters }));
        };
        let Some(wish) = wish else { return open(responder, None) };
        let go_on = move |stacked: Result<_>| match stacked {
            Ok(stacked) => open(responder, Some(stacked)),
            Err(error) => responder.fail(error),
        };
        self.state.adapters.obtain(&self.state, wish, Waiting { session, request: id, go_on: Box::new(go_on) });
    }

    pub(super) fn close_run(&self, run: RunId) {
        if let Ok(runs) = self.runs() {
            runs.close(run);
        }
    }

    /// Puts adapters together, and answers what the model took up of each.
    pub(super) fn prefetch(&self, responder: Responder, service: Service, models: &[String], adapters: AdapterStack) {
        let registry = &self.state.registry;
        let model = match (service, models) {
            (Service::Clip, models) => registry.resolve_set(models).map_err(Error::from),
            (Service::Unet, [model]) => registry.resolve(service, model).map_err(Error::from),
            (service, models) => {
                let message = format!("there are no adapters for the {} in {} files", service.name(), models.len());
                Err(Error::new(ErrorKind::Unsupported, message, "name one UNet, or text encoders"))
            }
        };
        let wish = model.and_then(|model| self.wish(&InUse::by(self.link.id(), model), adapters));
        let wish = match wish {
            Ok(Some(wish)) => wish,
            Ok(None) => return responder.answer(Outcome::Adapters(Vec::new())),
            Err(error) => return responder.fail(error),
        };
        let (session, request) = (responder.session(), responder.request());
        let go_on = move |stacked: Result<Arc<Stacked>>| {
            responder.settle(stacked.map(|stacked| Outcome::Adapters(stacked.taken.clone())));
        };
        self.state.adapters.obtain(&self.state, wish, Waiting { session, request, go_on: Box::new(go_on) });
    }

    fn runs(&self) -> Result<&Runs> {
        self.link.open.get().map(|open| &open.runs).ok_or_else(not_negotiated)
    }
}

fn not_negotiated() -> Error {
    Error::new(ErrorKind::Protocol, "the session is not negotiated", "send a hello first")
}

/// What a step is of, found to fit it.
struct Subject {
    model: InUse,
    facts: StepFacts,
    wish: Option<Wish>,
    run: Option<RunStep>,
}
