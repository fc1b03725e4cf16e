use tch::{Device, Kind, TchError, Tensor};

use super::super::ModelError;
use super::super::plan::passes;
use super::failed;
use crate::service::{TileShape, VaeOperation};

/// A tiled run of one sample: three passes with tiles of different shapes, averaged, so that no seam is in the
/// same place twice.
pub(super) struct Tiled<'a> {
    pub(super) operation: VaeOperation,
    pub(super) tiles: TileShape,
    /// Pixels per latent element in each direction.
    pub(super) ratio: i64,
    /// Channels, rows and columns of the whole result.
    pub(super) output: [i64; 3],
    /// Runs the model on one tile `[1, C, rows, columns]`.
    pub(super) model: &'a dyn Fn(&Tensor) -> Result<Tensor, ModelError>,
    /// Whether to give up; asked before each tile.
    pub(super) stop: &'a dyn Fn() -> bool,
}

/// One dimension of one tile.
#[derive(Debug, Clone, Copy)]
struct Part {
    start: i64,
    length: i64,
}

impl Tiled<'_> {
    /// The whole result for `input` `[1, C, rows, columns]`.
    pub(super) fn run(&self, input: &Tensor) -> Result<Tensor, ModelError> {
        let (_, _, height, width) = input.size4().map_err(self.failed())?;
        let passes = passes(self.tiles).map(|(rows, columns)| (rows.cast_signed(), columns.cast_signed()));
        if passes.iter().all(|&(rows, columns)| height <= rows && width <= columns) {
            return self.tile(input);
        }
        let mut sum: Option<Tensor> = None;
        for (rows, columns) in passes {
            let pass = self.pass(input, self.parts(height, rows), self.parts(width, columns))?;
            sum = Some(match sum {
                Some(mut sum) => sum.f_add_(&pass).map_err(self.failed())?,
                None => pass,
            });
        }
        let mut sum =
            sum.ok_or(ModelError::Executor { what: self.operation.name(), cause: "no pass was made".to_owned() })?;
        sum.f_div_scalar_(3.0).map_err(self.failed())
    }

    /// Where the tiles of one dimension start and how long they are. The last may be hardly longer than the overlap.
    fn parts(&self, size: i64, tile: i64) -> Vec<Part> {
        if size <= tile {
            return vec![Part { start: 0, length: size }];
        }
        let overlap = i64::from(self.tiles.overlap);
        let step = usize::try_from(tile - overlap).unwrap_or(1).max(1);
        (0..size - overlap).step_by(step).map(|start| Part { start, length: tile.min(size - start) }).collect()
    }

    fn pass(&self, input: &Tensor, rows: Vec<Part>, columns: Vec<Part>) -> Result<Tensor, ModelError> {
        if rows.len() == 1 && columns.len() == 1 {
            return self.tile(input);
        }
        let [channels, height, width] = self.output;
        let options = (Kind::Float, input.device());
        let mut sum = Tensor::f_zeros([1, channels, height, width], options).map_err(self.failed())?;
        let weights = Tensor::f_zeros([1, 1, height, width], options).map_err(self.failed())?;
        for &row in &rows {
            for &column in &columns {
                let part = input
                    .f_narrow(2, row.start, row.length)
                    .and_then(|part| part.f_narrow(3, column.start, column.length))
                    .and_then(|part| part.f_contiguous())
                    .map_err(self.failed())?;
                let tile = self.tile(&part)?;
                self.add(&sum, &weights, tile, (row, column)).map_err(self.failed())?;
            }
        }
        sum.f_div_(&weights).map_err(self.failed())
    }

    /// Adds a tile's result, faded out at its edges, and the weight of each of its elements.
    fn add(&self, sum: &Tensor, weights: &Tensor, mut tile: Tensor, at: (Part, Part)) -> Result<(), TchError> {
        let (_, _, height, width) = tile.size4()?;
        let rows = self.fade(height, tile.device())?.f_view([1, 1, height, 1])?;
        let fade = rows.f_mul(&self.fade(width, tile.device())?)?;
        let tile = tile.f_mul_(&fade)?;
        for (target, addend) in [(sum, &tile), (weights, &fade)] {
            let mut place = target.f_narrow(2, self.scaled(at.0.start), height)?;
            place = place.f_narrow(3, self.scaled(at.1.start), width)?;
            let _ = place.f_add_(addend)?;
        }
        Ok(())
    }

    /// Weights along one side: rising over the overlap at the start, falling at the end. Both apply where they meet.
    fn fade(&self, length: i64, device: Device) -> Result<Tensor, TchError> {
        let feather = self.scaled(i64::from(self.tiles.overlap));
        let mut weights = vec![1f32; usize::try_from(length).unwrap_or(0)];
        if feather < length {
            let last = weights.len() - 1;
            for at in 0..usize::try_from(feather).unwrap_or(0) {
                let weight = (at + 1) as f32 / feather as f32;
                weights[at] *= weight;
                weights[last - at] *= weight;
            }
        }
        Tensor::f_from_slice(&weights)?.f_to_device(device)
    }

    /// A length on the input as one on the result. Encodes have tiles of whole latent elements.
    fn scaled(&self, length: i64) -> i64 {
        match self.operation {
            VaeOperation::Decode => length * self.ratio,
            VaeOperation::Encode => length / self.ratio,
        }
    }

    fn tile(&self, part: &Tensor) -> Result<Tensor, ModelError> {
        if (self.stop)() {
            return Err(ModelError::Cancelled);
        }
        (self.model)(part)
    }

    fn failed(&self) -> impl Fn(TchError) -> ModelError {
        failed(self.operation.name())
    }
}
