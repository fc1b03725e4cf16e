use tch::{Device, TchError, Tensor};

use super::super::super::ModelError;
use super::super::super::clip::{ClipCall, ClipFacts, ClipKind};
use super::super::super::layout::Clip;
use super::super::super::text::{Chunk, Token};
use super::super::failed;
use super::super::frozen::Frozen;
use super::super::weights::Backing;
use super::WHAT;
use super::linear::{Adapters, float, linear, norm};
use super::net::{Pass, Style};

/// One loaded text encoder.
#[derive(Debug)]
pub(super) struct Encoder {
    // Declared before `backing`, so that it is dropped before the memory that its tensors point into.
    pub(super) net: Frozen<Clip<Tensor>>,
    pub(super) facts: ClipFacts,
    pub(super) backing: Backing,
}

/// Results of one encoder: `[1, positions, width]` and `[1, width]`, float32.
pub(super) struct Encoded {
    pub(super) cond: Tensor,
    pub(super) pooled: Tensor,
}

impl Encoder {
    /// Runs `chunks`, which [`crate::model::clip::TextEncoders::plan`] has checked. `alone` is whether it is the only
    /// encoder of its set.
    pub(super) fn run(
        &self,
        chunks: &[Chunk],
        call: &ClipCall,
        alone: bool,
        adapters: &dyn Adapters,
        stop: &dyn Fn() -> bool,
    ) -> Result<Encoded, ModelError> {
        let take = Take::of(&self.facts, call, alone);
        let batch = Batch::of(chunks, &self.facts);
        let rows = self.rows(&batch).map_err(failed(WHAT))?;
        let pass = Pass { style: Style::of(&self.facts), blocks: take.blocks, adapters, stop };
        let hidden = self.net.forward(rows, &pass)?;
        let cond = self.cond(hidden.taken, take, &batch).map_err(failed(WHAT))?;
        let pooled = self.pooled(&hidden.last, &batch, call.project, adapters).map_err(failed(WHAT))?;
        Ok(Encoded { cond, pooled })
    }

    /// Tokens and vectors as rows, with their positions added: `[chunks, positions, width]` in float32.
    fn rows(&self, batch: &Batch<'_>) -> Result<Tensor, TchError> {
        let device = self.device();
        let ids = Tensor::f_from_slice(&batch.ids)?.f_to_device(device)?;
        let mut rows = float(&Tensor::f_embedding(&self.net.tokens, &ids, -1, false, false)?)?;
        if !batch.vectors.is_empty() {
            let places: Vec<i64> = batch.vectors.iter().map(|(place, _)| *place).collect();
            let values: Vec<f32> = batch.vectors.iter().flat_map(|(_, row)| row.iter().copied()).collect();
            let values = Tensor::f_from_slice(&values)?.f_view([places.len() as i64, -1])?.f_to_device(device)?;
            rows = rows.f_index_copy_(0, &Tensor::f_from_slice(&places)?.f_to_device(device)?, &values)?;
        }
        let positions = float(&self.net.positions.f_narrow(0, 0, batch.length)?)?;
        rows.f_view([-1, batch.length, self.facts.width.cast_signed()])?.f_add(&positions)
    }

    /// The conditioning of all chunks, one after the other.
    fn cond(&self, mut hidden: Tensor, take: Take, batch: &Batch<'_>) -> Result<Tensor, TchError> {
        if take.normalised {
            hidden = norm(&self.net.norm_out, &hidden)?;
        }
        if let Some(weights) = &batch.weights {
            let (all, ..) = hidden.size3()?;
            let weights = Tensor::f_from_slice(weights)?.f_to_device(self.device())?.f_view([-1, batch.length, 1])?;
            let empty = hidden.f_narrow(0, all - 1, 1)?;
            hidden = hidden.f_narrow(0, 0, all - 1)?;
            let weighted = hidden.f_sub(&empty)?.f_mul_(&weights)?.f_add_(&empty)?;
            // What weighs 1 stays as it is to the last bit.
            hidden = weighted.f_where_self(&weights.f_ne(1.0)?, &hidden)?;
        }
        hidden.f_reshape([1, -1, self.facts.width.cast_signed()])
    }

    /// The last hidden state where the first chunk ends, normalised and, where asked, projected.
    fn pooled(
        &self,
        last: &Tensor,
        batch: &Batch<'_>,
        project: bool,
        adapters: &dyn Adapters,
    ) -> Result<Tensor, TchError> {
        let row = last.f_narrow(0, 0, 1)?.f_select(1, batch.end)?;
        let row = norm(&self.net.norm_out, &row)?;
        match &self.net.projection {
            Some(projection) if project => linear(&projection.layer, &row, adapters),
            _ => Ok(row),
        }
    }

    fn device(&self) -> Device {
        self.net.tokens.device()
    }
}

/// Which hidden state becomes the conditioning.
#[derive(Debug, Clone, Copy)]
struct Take {
    blocks: u64,
    normalised: bool,
}

impl Take {
    /// As the diffusion models were trained: SD1 with the last block of L, SD2 with the last but one of H, both
    /// normalised; SDXL with the last but one of L and G, not normalised.
    fn of(facts: &ClipFacts, call: &ClipCall, alone: bool) -> Self {
        let (usual, normalised) = match facts.kind {
            ClipKind::L if alone => (1, true),
            ClipKind::H => (2, true),
            ClipKind::L | ClipKind::G => (2, false),
        };
        let from_end = call.from_end.map_or(usual, std::num::NonZero::get);
        // What asks for more blocks than there are gets what the encoder itself ends with.
        let beyond = u64::from(from_end) > facts.trained_layers();
        Self { blocks: facts.blocks_until(from_end), normalised: normalised || beyond }
    }
}

/// Chunks as the network takes them, with the empty prompt behind them where there are weights.
struct Batch<'a> {
    ids: Vec<i64>,
    /// Rows that replace those of the table, by their place in `ids`.
    vectors: Vec<(i64, &'a [f32])>,
    /// Positions of a chunk.
    length: i64,
    /// Weights of all positions but the empty prompt's; `None` where each is 1.
    weights: Option<Vec<f32>>,
    /// Position of the first end in the first chunk.
    end: i64,
}

impl<'a> Batch<'a> {
    fn of(chunks: &'a [Chunk], facts: &ClipFacts) -> Self {
        let end = facts.end();
        let length = chunks.first().map_or(0, Vec::len);
        let is_end = |at: &_| matches!(at, Token::Id(id) if *id == end);
        let first_end = chunks.first().and_then(|chunk| chunk.iter().position(|at| is_end(&at.token)));
        let (mut ids, mut vectors, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for at in chunks.iter().flatten() {
            ids.push(match &at.token {
                Token::Id(id) => i64::from(*id),
                Token::Vector(row) => {
                    vectors.push((ids.len() as i64, row.as_ref()));
                    0
                }
            });
            weights.push(at.weight);
        }
        let weights = weights.iter().any(|weight| *weight != 1.0).then_some(weights);
        if weights.is_some() {
            let mut empty = vec![i64::from(end.saturating_sub(1)), i64::from(end)];
            empty.resize(length, i64::from(facts.kind.pad().min(end)));
            ids.extend(empty);
        }
        Self { ids, vectors, length: length as i64, weights, end: first_end.unwrap_or(length.saturating_sub(1)) as i64 }
    }
}
