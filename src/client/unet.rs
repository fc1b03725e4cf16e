use smallvec::SmallVec;

use super::compute::{Computed, Sources, compute};
use super::connect::{CallOptions, Client};
use super::input::{Input, unexpected_outcome};
use super::tensor::Tensor;
use crate::error::Result;
use crate::protocol::{ModelReport, Operation, TensorSource, Times, UnetRequest};
use crate::service::UnetInput;

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
        Ok(self.call(input, &self.client.default_options())?.tensor)
    }

    /// As [`Unet::step`], waiting as `options` say, with everything there is to know about it.
    ///
    /// # Errors
    /// As [`Unet::step`]; [`crate::ErrorKind::Cancelled`] where `options` interrupt it.
    pub fn call(&self, input: &UnetInput<Input<'_>>, options: &CallOptions<'_>) -> Result<UnetOutput> {
        let inputs: SmallVec<[Input<'_>; 4]> = input.each().copied().collect();
        let operation = |sources: Sources, result| {
            let mut sources = sources.into_iter();
            // In the order in which they were given.
            let mut next = |_: &Input<'_>| -> Result<TensorSource> { sources.next().ok_or_else(unexpected_outcome) };
            let input = input.try_map(&mut next)?;
            Ok(Operation::Unet(Box::new(UnetRequest { model: self.model.clone(), input, result })))
        };
        let computed = self.client.with_link(|link| compute(link, &inputs, &operation, options))?;
        let Computed { tensor, times, copied_in_bytes, copied_out_bytes, .. } = computed;
        Ok(UnetOutput { tensor, times, copied_in_bytes, copied_out_bytes })
    }
}
