use smallvec::SmallVec;

use super::compute::{Computed, Sources, compute};
use super::connect::Client;
use super::input::{Input, unexpected_outcome};
use super::options::CallOptions;
use super::run::Run;
use super::tensor::Tensor;
use crate::error::Result;
use crate::protocol::{ModelReport, Operation, Outcome, StepSubject, TensorSource, Times, UnetRequest};
use crate::service::{AdapterStack, AdapterTaken, How, RunSettings, Service, StepInput, UnetInput, UnetStep};

/// A UNet that the broker runs.
#[derive(Debug, Clone)]
pub struct Unet {
    client: Client,
    model: String,
    info: ModelReport,
}

/// What a step gave.
#[derive(Debug, Clone)]
pub struct UnetOutput {
    /// The network's output, in the slot it was computed in: `x`'s element type and size.
    pub tensor: Tensor,
    /// How it was run.
    pub step: UnetStep,
    /// When it ran, by the broker's clock.
    pub times: Times,
    /// Bytes the client copied to hand the inputs over; 0 for those built in place.
    pub copied_in_bytes: u64,
    /// Bytes copied to bring the result back, or still to be copied where it is staged; 0 where it is read in place.
    pub copied_out_bytes: u64,
}

impl Unet {
    pub(super) fn new(client: Client, model: String, info: ModelReport) -> Self {
        Self { client, model, info }
    }

    /// What the model is.
    #[must_use]
    pub fn info(&self) -> &ModelReport {
        &self.info
    }

    /// The client it is reached through.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// One step: the network's output for `input`, in `x`'s element type and size. What it means, `info` tells.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidTensor`] for a tensor that does not fit, is missing or has no place in this model,
    /// [`crate::ErrorKind::OutOfMemory`], [`crate::ErrorKind::Busy`], [`crate::ErrorKind::Timeout`],
    /// [`crate::ErrorKind::ConnectionLost`].
    pub fn step(&self, input: &UnetInput<Input<'_>>) -> Result<Tensor> {
        Ok(self.call(input, &AdapterStack::default(), &self.client.default_options())?.tensor)
    }

    /// As [`Unet::step`], with adapters and waiting as `options` say, with everything there is to know about it.
    ///
    /// The first call with adapters waits until they have been read and put together, and delays nobody else by that.
    ///
    /// # Errors
    /// As [`Unet::step`] and [`Unet::run`]; [`crate::ErrorKind::Cancelled`] where `options` interrupt it.
    pub fn call(
        &self,
        input: &UnetInput<Input<'_>>,
        adapters: &AdapterStack,
        options: &CallOptions<'_>,
    ) -> Result<UnetOutput> {
        let input = StepInput::from(input.clone());
        step(&self.client, &input, options, |_| {
            let adapters = located(adapters);
            Ok(StepSubject::Model { name: self.model.clone(), adapters })
        })
    }

    /// Opens a sampling run: what hangs together from step to step. Its adapters are read and put together now.
    ///
    /// # Errors
    /// [`crate::ErrorKind::ModelNotFound`] for an adapter that is not there, [`crate::ErrorKind::InvalidModel`] for one that
    /// does not fit the model, [`crate::ErrorKind::Configuration`] for settings out of bounds,
    /// [`crate::ErrorKind::OutOfMemory`], [`crate::ErrorKind::Busy`].
    pub fn run(&self, settings: RunSettings) -> Result<Run> {
        self.run_with(settings, &self.client.default_options())
    }

    /// As [`Unet::run`], waiting as `options` say.
    ///
    /// # Errors
    /// As [`Unet::run`].
    pub fn run_with(&self, settings: RunSettings, options: &CallOptions<'_>) -> Result<Run> {
        let settings = RunSettings { adapters: located(&settings.adapters), ..settings };
        Run::open(self.client.clone(), self.model.clone(), settings, options)
    }

    /// Has the broker read adapters and put them together now, instead of with the first request that asks for them; what
    /// the model takes up of each.
    ///
    /// # Errors
    /// As [`Unet::run`].
    pub fn prefetch(&self, adapters: &AdapterStack, options: &CallOptions<'_>) -> Result<Vec<AdapterTaken>> {
        let adapters = located(adapters);
        let operation = Operation::Prefetch { service: Service::Unet, models: vec![self.model.clone()], adapters };
        match self.client.ask(operation, options)? {
            Outcome::Adapters(taken) => Ok(taken),
            _ => Err(unexpected_outcome()),
        }
    }
}

/// Adapters by paths that mean the same to the broker.
pub(super) fn located(stack: &AdapterStack) -> AdapterStack {
    let mut stack = stack.clone();
    for adapter in &mut stack.adapters {
        adapter.name = super::connect::resolve_locally(&adapter.name);
    }
    stack
}

/// Sends a step of the subject that the session in use makes.
pub(super) fn step(
    client: &Client,
    input: &StepInput<Input<'_>>,
    options: &CallOptions<'_>,
    subject: impl Fn(&super::link::Link) -> Result<StepSubject>,
) -> Result<UnetOutput> {
    let inputs: SmallVec<[Input<'_>; 4]> = input.each().copied().collect();
    let computed = client.with_link(|link| {
        let operation = |sources: Sources, result| {
            let mut sources = sources.into_iter();
            // In the order in which they were given.
            let mut next = |_: &Input<'_>| -> Result<TensorSource> { sources.next().ok_or_else(unexpected_outcome) };
            let (subject, input) = (subject(link)?, input.try_map(&mut next)?);
            Ok(Operation::Unet(Box::new(UnetRequest { subject, input, result })))
        };
        compute(link, &inputs, &operation, options)
    })?;
    let Computed { tensor, how, times, copied_in_bytes, copied_out_bytes, .. } = computed;
    let How::Step(step) = how else { return Err(unexpected_outcome()) };
    Ok(UnetOutput { tensor, step: *step, times, copied_in_bytes, copied_out_bytes })
}
