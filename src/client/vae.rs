use std::sync::Arc;

use super::connect::{CallOptions, Client, ResultPlace, Unshared};
use super::input::{Input, unexpected_outcome};
use super::leases::GpuLease;
use super::link::Link;
use super::memory::Home;
use super::open_gpu::LinkGpu;
use super::router::Answer;
use super::tensor::{Storage, Tensor};
use crate::error::{Error, ErrorKind, Result};
use crate::id::GpuUuid;
use crate::protocol::{ModelReport, Operation, Outcome, Times, VaeRequest};
use crate::service::{TileShape, Tiling, VaeCall, VaeMode, VaeOperation};

/// A VAE that the broker runs.
#[derive(Debug, Clone)]
pub struct Vae {
    client: Client,
    model: String,
    info: ModelReport,
}

/// What a VAE call gave.
#[derive(Debug, Clone)]
pub struct VaeOutput {
    /// The result, in the slot it was computed in.
    pub tensor: Tensor,
    /// In one piece or in tiles.
    pub mode: VaeMode,
    /// When it ran, by the broker's clock.
    pub times: Times,
    /// Bytes the client copied to hand the input over; 0 for an input built in place.
    pub copied_in_bytes: u64,
    /// Bytes copied to bring the result back, or still to be copied where it is staged; 0 where it is read in place.
    pub copied_out_bytes: u64,
}

impl Vae {
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

    /// Latent `[N, C, h, w]` to image: float32 `[N, h·ratio, w·ratio, 3]` in 0…1. In tiles where the broker's byte
    /// budget asks for it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidTensor`] for another shape or an integer type, [`crate::ErrorKind::OutOfMemory`],
    /// [`crate::ErrorKind::Busy`], [`crate::ErrorKind::Timeout`], [`crate::ErrorKind::ConnectionLost`].
    pub fn decode(&self, latent: Input<'_>) -> Result<Tensor> {
        Ok(self.call(auto(VaeOperation::Decode), latent, &self.client.default_options())?.tensor)
    }

    /// Image `[N, H, W, 3]` in 0…1 to latent: float32 `[N, C, H/ratio, W/ratio]`, the mean of the posterior. Sides are
    /// cropped, centred, to multiples of the ratio.
    ///
    /// # Errors
    /// As [`Vae::decode`].
    pub fn encode(&self, image: Input<'_>) -> Result<Tensor> {
        Ok(self.call(auto(VaeOperation::Encode), image, &self.client.default_options())?.tensor)
    }

    /// As [`Vae::decode`], in tiles of this many latent elements.
    ///
    /// # Errors
    /// As [`Vae::decode`]; also for a shape whose overlap is not smaller than its sides.
    pub fn decode_tiled(&self, latent: Input<'_>, tiles: TileShape) -> Result<Tensor> {
        let call = VaeCall { operation: VaeOperation::Decode, tiling: Tiling::Tiles(tiles) };
        Ok(self.call(call, latent, &self.client.default_options())?.tensor)
    }

    /// As [`Vae::encode`], in tiles of this many pixels.
    ///
    /// # Errors
    /// As [`Vae::decode_tiled`].
    pub fn encode_tiled(&self, image: Input<'_>, tiles: TileShape) -> Result<Tensor> {
        let call = VaeCall { operation: VaeOperation::Encode, tiling: Tiling::Tiles(tiles) };
        Ok(self.call(call, image, &self.client.default_options())?.tensor)
    }

    /// Any VAE call, waiting as `options` say, with everything there is to know about it.
    ///
    /// # Errors
    /// As [`Vae::decode`]; [`crate::ErrorKind::Cancelled`] where `options` interrupt it.
    pub fn call(&self, call: VaeCall, input: Input<'_>, options: &CallOptions<'_>) -> Result<VaeOutput> {
        self.client.with_link(|link| {
            loop {
                match self.call_over(link, call, input, options)? {
                    Called::Done(output) => return Ok(output),
                    // Nothing was changed by the call: it is made again on the next rung.
                    Called::WornOut(gpu, why) => _ = link.demote_gpu(&gpu, &why, options)?,
                }
            }
        })
    }

    fn call_over(&self, link: &Link, call: VaeCall, input: Input<'_>, options: &CallOptions<'_>) -> Result<Called> {
        let opened = |gpu: Option<GpuUuid>| gpu.map(|gpu| link.open_gpu(gpu, options)).transpose();
        let input_gpu = opened(input.gpu())?;
        let result_gpu = match options.result {
            ResultPlace::LikeInput => input_gpu.clone(),
            ResultPlace::Host => None,
            ResultPlace::Gpu(gpu) => opened(Some(gpu))?,
        };
        // Without shared GPU memory the result comes in the host's, or through it.
        let (result_gpu, unshared) = match result_gpu {
            Some(gpu) if gpu.is_shared() => (Some(gpu), None),
            unshared => (None, unshared.filter(|_| options.unshared == Unshared::Staging && link.has_staging())),
        };
        let home = match (&result_gpu, &unshared) {
            (Some(gpu), _) => Home::Gpu(gpu),
            (None, Some(gpu)) => Home::Staging(gpu),
            (None, None) => Home::Host,
        };
        let staged = match (input.stage(link, input_gpu.as_ref(), options), &input_gpu) {
            (Err(error), Some(gpu)) if wears_out(&error, gpu) => return Ok(Called::WornOut(Arc::clone(gpu), error)),
            (staged, _) => staged?,
        };
        let request = VaeRequest { model: self.model.clone(), call, input: staged.source, result: home.place() };
        let answer = link.call(Operation::Vae(request), &staged.payload, options);
        // The broker read the input before it answered, or behind the mark of the result; a request that was given up
        // may still be reading it.
        if let Ok(answer) = &answer {
            let result_mark = match &answer.reply.outcome {
                Outcome::Tensor { descriptor, .. } => descriptor.sequence,
                _ => 0,
            };
            // Whether the mark of the result stands for the reading of an input: they must be of one opening. A result
            // in host memory is complete, and so is the reading.
            let stands_for = |lease: &GpuLease| result_gpu.as_ref().is_none_or(|gpu| Arc::ptr_eq(gpu, &lease.gpu));
            let read_behind = |lease: &GpuLease| {
                if result_gpu.is_some() && stands_for(lease) {
                    lease.raise_ready(result_mark);
                }
            };
            if let Some(lease) = &staged.in_place {
                read_behind(lease);
            }
            if let Some(slot) = staged.slot {
                if let Some(lease) = slot.gpu() {
                    read_behind(lease);
                }
                // One whose reading has no mark here is given back: the broker knows when it is done.
                if slot.gpu().is_none_or(|lease| stands_for(lease)) {
                    link.memory.keep_input(slot);
                }
            }
        }
        let Answer { reply, payload, .. } = answer?;
        let (tensor, mode, copied_out_bytes) = match (reply.outcome, payload) {
            (Outcome::Tensor { descriptor, mode }, _) => {
                let lease = match (link.memory.take_up(&descriptor, link.session.epoch, home), &result_gpu) {
                    (Err(error), Some(gpu)) if !link.memory.is_open(&descriptor, gpu.gpu) => {
                        return Ok(Called::WornOut(Arc::clone(gpu), error));
                    }
                    (lease, _) => lease?,
                };
                let (storage, copied) = match unshared {
                    Some(gpu) => (Storage::Staged(lease, gpu), descriptor.meta.span_bytes()? as u64),
                    None => (Storage::Leased(lease), 0),
                };
                (Tensor::new(descriptor.meta, storage), mode, copied)
            }
            (Outcome::InlineTensor { meta, mode }, Some(bytes)) => {
                meta.validate()?;
                meta.check_fits(bytes.bytes.len())?;
                (Tensor::new(meta, Storage::Received(bytes)), mode, meta.size_bytes()? as u64)
            }
            _ => return Err(unexpected_outcome()),
        };
        let (times, copied_in_bytes) = (reply.times, staged.copied_bytes);
        Ok(Called::Done(VaeOutput { tensor, mode, times, copied_in_bytes, copied_out_bytes }))
    }
}

/// What a call came to on the rungs of the moment.
enum Called {
    Done(VaeOutput),
    /// GPU memory that worked before no longer opens, and why.
    WornOut(Arc<LinkGpu>, Error),
}

/// Whether an error on the way into GPU memory says that its rung is no longer good.
fn wears_out(error: &Error, gpu: &LinkGpu) -> bool {
    gpu.is_shared() && error.kind() == ErrorKind::Protocol
}

fn auto(operation: VaeOperation) -> VaeCall {
    VaeCall { operation, tiling: Tiling::Auto }
}
