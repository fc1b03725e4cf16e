use super::compute::{Computed, Sources, compute};
use super::connect::Client;
use super::input::{Input, unexpected_outcome};
use super::options::CallOptions;
use super::tensor::Tensor;
use crate::error::Result;
use crate::protocol::{ModelReport, Operation, Times, VaeRequest};
use crate::service::{How, TileShape, Tiling, VaeCall, VaeMode, VaeOperation};

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
        let operation = |mut sources: Sources, result| {
            let input = sources.pop().ok_or_else(unexpected_outcome)?;
            Ok(Operation::Vae(VaeRequest { model: self.model.clone(), call, input, result }))
        };
        let computed = self.client.with_link(|link| compute(link, &[input], &operation, options))?;
        let Computed { tensor, how, times, copied_in_bytes, copied_out_bytes, .. } = computed;
        let How::Vae(mode) = how else { return Err(unexpected_outcome()) };
        Ok(VaeOutput { tensor, mode, times, copied_in_bytes, copied_out_bytes })
    }
}

fn auto(operation: VaeOperation) -> VaeCall {
    VaeCall { operation, tiling: Tiling::Auto }
}
