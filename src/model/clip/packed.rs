use super::super::ModelError;
use super::call::{MAX_CHUNKS, refused};
use super::{ClipFacts, TextEncoders};
use crate::service::{Chunk, ClipPrompt, ClipTokens, Token, WeightedToken};
use crate::tensor::{DType, Dims, TensorMeta};

impl TextEncoders {
    /// Checks what tensors of tokens say they are, before anybody fetches them.
    ///
    /// # Errors
    /// [`ModelError::Prompt`] for tensors of other shapes or element types than a prompt for these encoders has.
    pub fn check_packed(&self, prompts: &[ClipTokens<TensorMeta>]) -> Result<(), ModelError> {
        if prompts.len() > self.encoders.len() {
            let (got, most) = (prompts.len(), self.encoders.len());
            return Err(refused(format!("there are {got} for {most} text encoders")));
        }
        for prompt in prompts {
            let facts = self.get(prompt.kind);
            let facts = facts.ok_or_else(|| refused(format!("it is for {}, which is not loaded", prompt.kind)))?;
            facts.check_packed(prompt)?;
        }
        Ok(())
    }
}

impl ClipFacts {
    fn check_packed(&self, prompt: &ClipTokens<TensorMeta>) -> Result<(), ModelError> {
        let ClipTokens { kind, ids, weights, rows } = prompt;
        let wrong = |tensor: &str, expected: String, is: &TensorMeta| {
            refused(format!("{tensor} for {kind} are {} {}, where {expected} are taken", is.dtype, is.shape))
        };
        let dense = |meta: &TensorMeta, dtype| meta.dtype == dtype && meta.strides == meta.shape.contiguous_strides();
        let positions = match *ids.shape.as_slice() {
            [chunks, length] if chunks <= MAX_CHUNKS as u64 && length <= self.tokens => chunks.checked_mul(length),
            _ => None,
        };
        let Some(positions) = positions.filter(|_| dense(ids, DType::I32)) else {
            let most = self.tokens;
            return Err(wrong("ids", format!("int32 [up to {MAX_CHUNKS} chunks, up to {most} positions]"), ids));
        };
        if let Some(weights) = weights.as_ref().filter(|is| is.shape != ids.shape || !dense(is, DType::F32)) {
            return Err(wrong("weights", format!("float32 {}", ids.shape), weights));
        }
        let fits = |meta: &&TensorMeta| {
            let fits = matches!(*meta.shape.as_slice(), [rows, width] if rows <= positions && width == self.width);
            fits && dense(meta, DType::F32)
        };
        if let Some(rows) = rows.as_ref().filter(|meta| !fits(meta)) {
            let expected = format!("float32 [up to {positions} rows, {}]", self.width);
            return Err(wrong("rows", expected, rows));
        }
        Ok(())
    }
}

/// A prompt's tensors as numbers.
#[derive(Debug)]
pub struct PackedPrompt {
    /// As [`ClipTokens::ids`].
    pub ids: Vec<i32>,
    /// As [`ClipTokens::weights`].
    pub weights: Option<Vec<f32>>,
    /// As [`ClipTokens::rows`].
    pub rows: Vec<f32>,
}

/// The prompt that tensors hold which [`TextEncoders::check_packed`] found to be of the right shapes.
///
/// # Errors
/// [`ModelError::Prompt`] where rows are not used each once and in order.
pub fn unpack(prompt: &ClipTokens<TensorMeta>, packed: &PackedPrompt) -> Result<ClipPrompt, ModelError> {
    let kind = prompt.kind;
    let length = extent(&prompt.ids.shape, 1).max(1);
    let width = prompt.rows.as_ref().map_or(1, |rows| extent(&rows.shape, 1)).max(1);
    let mut rows = packed.rows.chunks_exact(width).enumerate();
    let weights = packed.weights.as_deref().unwrap_or_default().iter().copied();
    let mut weights = weights.chain(std::iter::repeat(1.0));
    let mut token = |id: i32| match u32::try_from(id) {
        Ok(id) => Ok(Token::Id(id)),
        Err(_) => match rows.next() {
            Some((at, row)) if i64::from(id) == -1 - at as i64 => Ok(Token::Vector(row.into())),
            _ => Err(refused(format!("position {id} for {kind} is not the next of its rows"))),
        },
    };
    let mut chunks = Vec::new();
    for ids in packed.ids.chunks_exact(length) {
        let mut chunk = Chunk::with_capacity(length);
        for &id in ids {
            chunk.push(WeightedToken { token: token(id)?, weight: weights.next().unwrap_or(1.0) });
        }
        chunks.push(chunk);
    }
    match rows.next() {
        Some((at, _)) => Err(refused(format!("row {at} for {kind} stands nowhere"))),
        None => Ok(ClipPrompt { kind, chunks }),
    }
}

fn extent(shape: &Dims, at: usize) -> usize {
    shape.as_slice().get(at).map_or(0, |&extent| usize::try_from(extent).unwrap_or(usize::MAX))
}
