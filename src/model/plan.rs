use crate::service::{TileShape, Tiling, VaeCall, VaeMode, VaeOperation};
use crate::tensor::{DType, Dims, TensorError, TensorMeta};

use super::{ModelError, VaeFacts, VaePlan};

/// Tiles of a decode that does not fit its budget, in latent elements.
const DECODE_TILES: TileShape = TileShape { width: 64, height: 64, overlap: 16 };
/// Tiles of an encode that does not fit its budget, in pixels.
const ENCODE_TILES: TileShape = TileShape { width: 512, height: 512, overlap: 64 };
/// Least side of a tile, in latent elements: below it nearly all work is overlap.
const MIN_TILE_SIDE: u64 = 8;
/// Working memory of the blending, in bytes per channel and element of the result: the current pass and the sum.
const BLEND_BYTES: u64 = 2 * 4;
/// The same for the weights of the current pass, which all channels share.
const BLEND_WEIGHT_BYTES: u64 = 4;
/// Channels of an image.
const RGB: u64 = 3;

impl VaeFacts {
    /// Checks `input` against `call` and decides, by `budget_bytes` of working memory, how it is run.
    ///
    /// Samples of a batch are run one after the other, so a batch needs no more memory than one sample.
    ///
    /// # Errors
    /// [`ModelError::MissingPart`] for a direction that the file does not hold, [`ModelError::Tensor`] for an input
    /// that does not fit, [`ModelError::Tiles`] for an impossible tile shape, [`ModelError::OverBudget`].
    pub fn plan(&self, call: &VaeCall, input: &TensorMeta, budget_bytes: u64) -> Result<VaePlan, ModelError> {
        input.validate()?;
        let (output, bytes_per_pixel) = match call.operation {
            VaeOperation::Decode => (self.decoded(input)?, self.decode_bytes_per_pixel),
            VaeOperation::Encode => (self.encoded(input)?, self.encode_bytes_per_pixel),
        };
        output.validate()?;
        let work = Work { facts: self, operation: call.operation, bytes_per_pixel, output: &output };
        let mode = match call.tiling {
            Tiling::Auto if work.full_bytes() <= budget_bytes => VaeMode::Full,
            Tiling::Auto => VaeMode::Tiled(default_tiles(call.operation)),
            Tiling::Tiles(tiles) => VaeMode::Tiled(tiles),
        };
        if let VaeMode::Tiled(tiles) = mode {
            work.check_tiles(tiles)?;
            let needed_bytes = work.tiled_bytes(tiles);
            if needed_bytes > budget_bytes {
                return Err(ModelError::OverBudget { what: call.operation.name(), needed_bytes, budget_bytes });
            }
        }
        Ok(VaePlan { operation: call.operation, output, mode })
    }

    /// The image that the latent `input` decodes to.
    fn decoded(&self, input: &TensorMeta) -> Result<TensorMeta, ModelError> {
        self.require(self.can_decode, "decoder", "only an encoder")?;
        let expected = || format!("a latent [N, {}, h, w] of floating-point numbers", self.latent_channels);
        match *input.shape.as_slice() {
            [n, channels, h, w]
                if channels == self.latent_channels && ![n, h, w].contains(&0) && input.dtype.is_float() =>
            {
                let (Some(height), Some(width)) = (h.checked_mul(self.ratio), w.checked_mul(self.ratio)) else {
                    return Err(TensorError::TooLarge { shape: input.shape }.into());
                };
                Ok(TensorMeta::contiguous(DType::F32, Dims::of([n, height, width, RGB])))
            }
            _ => Err(unexpected("latent", expected(), input)),
        }
    }

    /// The latent that the image `input` encodes to; what does not fill an element is cut off, half at each side.
    fn encoded(&self, input: &TensorMeta) -> Result<TensorMeta, ModelError> {
        self.require(self.can_encode, "encoder", "only a decoder")?;
        let ratio = self.ratio;
        let expected =
            || format!("an image [N, H, W, 3 or more] of floating-point numbers with sides of at least {ratio}");
        match *input.shape.as_slice() {
            [n, height, width, channels]
                if n > 0 && height >= ratio && width >= ratio && channels >= RGB && input.dtype.is_float() =>
            {
                let shape = Dims::of([n, self.latent_channels, height / ratio, width / ratio]);
                Ok(TensorMeta::contiguous(DType::F32, shape))
            }
            _ => Err(unexpected("image", expected(), input)),
        }
    }

    fn require(&self, present: bool, part: &'static str, found: &str) -> Result<(), ModelError> {
        if present {
            return Ok(());
        }
        Err(ModelError::MissingPart { path: self.path.clone(), part, found: found.to_owned() })
    }
}

fn unexpected(tensor: &'static str, expected: String, got: &TensorMeta) -> ModelError {
    TensorError::Unexpected { tensor, expected, shape: got.shape, dtype: got.dtype }.into()
}

/// One call, for reckoning its memory. All sums saturate: what does not fit in 64 bits fits no budget.
struct Work<'a> {
    facts: &'a VaeFacts,
    operation: VaeOperation,
    bytes_per_pixel: u64,
    output: &'a TensorMeta,
}

impl Work<'_> {
    /// Pixels per unit of a tile's sides: tiles are measured on the input.
    fn pixels_per_unit(&self) -> u64 {
        match self.operation {
            VaeOperation::Decode => self.facts.ratio,
            VaeOperation::Encode => 1,
        }
    }

    /// Rows and columns of one sample, in pixels.
    fn pixels(&self) -> (u64, u64) {
        match (self.operation, self.output.shape.as_slice()) {
            (VaeOperation::Decode, &[_, height, width, _]) => (height, width),
            (VaeOperation::Encode, &[_, _, h, w]) => {
                (h.saturating_mul(self.facts.ratio), w.saturating_mul(self.facts.ratio))
            }
            _ => (0, 0),
        }
    }

    fn full_bytes(&self) -> u64 {
        let (height, width) = self.pixels();
        height.saturating_mul(width).saturating_mul(self.bytes_per_pixel)
    }

    /// The largest tile of the three passes, and what blending them takes.
    fn tiled_bytes(&self, tiles: TileShape) -> u64 {
        let (height, width) = self.pixels();
        let unit = self.pixels_per_unit();
        let tile = passes(tiles)
            .into_iter()
            .map(|(rows, columns)| {
                let rows = rows.saturating_mul(unit).min(height);
                let columns = columns.saturating_mul(unit).min(width);
                rows.saturating_mul(columns).saturating_mul(self.bytes_per_pixel)
            })
            .max()
            .unwrap_or(0);
        let elements = match self.output.shape.as_slice().first() {
            Some(&samples) if samples > 0 => self.output.elements().map_or(u64::MAX, |all| all as u64 / samples),
            _ => 0,
        };
        let channels = match self.operation {
            VaeOperation::Decode => RGB,
            VaeOperation::Encode => self.facts.latent_channels.max(1),
        };
        let blending = elements.saturating_mul(BLEND_BYTES).saturating_add(elements / channels * BLEND_WEIGHT_BYTES);
        tile.saturating_add(blending)
    }

    /// Every pass halves one side and doubles the other, so each side must survive both.
    fn check_tiles(&self, tiles: TileShape) -> Result<(), ModelError> {
        let unit = match self.operation {
            VaeOperation::Decode => 1,
            VaeOperation::Encode => self.facts.ratio,
        };
        let (width, height, overlap) = (u64::from(tiles.width), u64::from(tiles.height), u64::from(tiles.overlap));
        let reason = if width.min(height) < MIN_TILE_SIDE * unit {
            format!("each side must be at least {}", MIN_TILE_SIDE * unit)
        } else if overlap * 2 >= width.min(height) {
            "the overlap must be less than half of each side".to_owned()
        } else if !width.is_multiple_of(2 * unit) || !height.is_multiple_of(2 * unit) {
            format!("each side must be a multiple of {}", 2 * unit)
        } else if !overlap.is_multiple_of(unit) {
            format!("the overlap must be a multiple of {unit}")
        } else {
            return Ok(());
        };
        Err(ModelError::Tiles { width: tiles.width, height: tiles.height, overlap: tiles.overlap, reason })
    }
}

impl VaePlan {
    /// Ways to run the call, the planned one first. Tiles that somebody asked for are not replaced by others.
    #[cfg_attr(not(feature = "torch"), expect(dead_code, reason = "only running needs it"))]
    pub(super) fn modes(&self) -> Vec<VaeMode> {
        match self.mode {
            VaeMode::Full => vec![VaeMode::Full, VaeMode::Tiled(default_tiles(self.operation))],
            tiled @ VaeMode::Tiled(_) => vec![tiled],
        }
    }
}

/// Tiles of a call that needs too much memory in one piece.
fn default_tiles(operation: VaeOperation) -> TileShape {
    match operation {
        VaeOperation::Decode => DECODE_TILES,
        VaeOperation::Encode => ENCODE_TILES,
    }
}

/// Rows and columns of the tiles of the three passes: as asked for, tall, wide.
pub(super) fn passes(tiles: TileShape) -> [(u64, u64); 3] {
    let (width, height) = (u64::from(tiles.width), u64::from(tiles.height));
    [(height, width), (height * 2, width / 2), (height / 2, width * 2)]
}
