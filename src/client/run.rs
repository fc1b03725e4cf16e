use std::sync::Arc;

use parking_lot::Mutex;

use super::connect::Client;
use super::input::{Input, unexpected_outcome};
use super::link::Link;
use super::options::CallOptions;
use super::tensor::Tensor;
use super::unet::{UnetOutput, step};
use crate::error::{Error, ErrorKind, Result};
use crate::id::RunId;
use crate::protocol::{OpenRun, Operation, Outcome, StepSubject};
use crate::service::{AdapterTaken, RunReport, RunSettings, StepInput};

/// One sampling run of a UNet: adapters, a block cache, and conditionings that cross once. Dropping it ends it.
///
/// Steps of one run go one after the other; runs of one client may go side by side.
#[derive(Debug)]
pub struct Run {
    client: Client,
    model: String,
    settings: RunSettings,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Absent once it is closed.
    open: Option<Open>,
    report: RunReport,
}

/// A run in one session. Dropping it ends it there.
#[derive(Debug)]
struct Open {
    link: Arc<Link>,
    id: RunId,
    taken: Vec<AdapterTaken>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.link.close_run(self.id);
    }
}

impl Open {
    fn on(link: Arc<Link>, model: &str, settings: &RunSettings, options: &CallOptions<'_>) -> Result<Self> {
        let request = OpenRun { model: model.to_owned(), settings: settings.clone() };
        let answer = link.call(Operation::OpenRun(Box::new(request)), &[], options)?;
        match answer.reply.outcome {
            Outcome::Run { run, adapters } => Ok(Self { link, id: run, taken: adapters }),
            _ => Err(unexpected_outcome()),
        }
    }
}

impl Run {
    pub(super) fn open(
        client: Client,
        model: String,
        settings: RunSettings,
        options: &CallOptions<'_>,
    ) -> Result<Self> {
        let open = client.with_shared_link(|link| Open::on(link, &model, &settings, options))?;
        let state = Mutex::new(State { open: Some(open), report: RunReport::default() });
        Ok(Self { client, model, settings, state })
    }

    /// What the model took up of each adapter, in their order; none once the run is closed.
    #[must_use]
    pub fn adapters(&self) -> Vec<AdapterTaken> {
        self.state.lock().open.as_ref().map(|open| open.taken.clone()).unwrap_or_default()
    }

    /// Its settings.
    #[must_use]
    pub fn settings(&self) -> &RunSettings {
        &self.settings
    }

    /// The run until now.
    #[must_use]
    pub fn report(&self) -> RunReport {
        self.state.lock().report
    }

    /// One step: the network's output for `input`, whose rows `conds` share evenly, in their order. A cond is a number that
    /// the caller chooses; `context` and `y` may be left out once they were sent for each of them.
    ///
    /// # Errors
    /// As [`super::Unet::step`]; [`ErrorKind::InvalidTensor`] for conds that were never sent or do not fit the rows,
    /// [`ErrorKind::Stale`] where the run is closed, or where the connection was lost and with it what was sent.
    pub fn step(&self, input: &StepInput<Input<'_>>, conds: &[u32]) -> Result<Tensor> {
        Ok(self.call(input, conds, &self.client.default_options())?.tensor)
    }

    /// As [`Run::step`], waiting as `options` say, with everything there is to know about it.
    ///
    /// # Errors
    /// As [`Run::step`]; [`ErrorKind::Cancelled`] where `options` interrupt it.
    pub fn call(&self, input: &StepInput<Input<'_>>, conds: &[u32], options: &CallOptions<'_>) -> Result<UnetOutput> {
        // A session that came after a lost one knows nothing of the run. Not under the link's own lock: it asks the broker.
        self.client.with_shared_link(|link| self.settle_on(link, input, options))?;
        let output = step(&self.client, input, options, |link| {
            let state = self.state.lock();
            let open = state.open.as_ref().ok_or_else(closed)?;
            if !std::ptr::eq(&*open.link, link) {
                return Err(lost());
            }
            Ok(StepSubject::Run { run: open.id, conds: conds.to_vec() })
        })?;
        if let Some(report) = output.step.run {
            self.state.lock().report = report;
        }
        Ok(output)
    }

    /// Opens the run anew where the connection was lost; a step that leaves nothing out can go on.
    fn settle_on(&self, link: Arc<Link>, input: &StepInput<Input<'_>>, options: &CallOptions<'_>) -> Result<()> {
        let is_there = |open: &Open| Arc::ptr_eq(&open.link, &link);
        if self.state.lock().open.as_ref().ok_or_else(closed).map(is_there)? {
            return Ok(());
        }
        if input.context.is_none() {
            return Err(lost());
        }
        let fresh = Open::on(link, &self.model, &self.settings, options)?;
        let mut state = self.state.lock();
        // Closed by another thread meanwhile.
        state.open.as_ref().ok_or_else(closed)?;
        let before = state.open.replace(fresh);
        drop(state);
        drop(before);
        Ok(())
    }

    /// Ends the run; a step that is under way is finished. Repeating it is harmless.
    pub fn close(&self) {
        let open = self.state.lock().open.take();
        drop(open);
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Stale, "the run is closed", "open another run")
}

fn lost() -> Error {
    let message = "the connection was lost, and with it what the run had sent";
    Error::new(ErrorKind::Stale, message, "send context, and y where the model takes one, with the step")
}
