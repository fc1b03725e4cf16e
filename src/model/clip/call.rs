use std::num::NonZeroU32;

use super::super::ModelError;
use super::{ClipFacts, TextEncoders};
use crate::service::{Chunk, ClipPrompt, Token};
use crate::tensor::{DType, Dims, TensorMeta};

/// Most chunks of a prompt: they run as one batch, whose activations this bounds.
pub(super) const MAX_CHUNKS: usize = 128;

/// One call to a set of text encoders.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipCall {
    /// The prompt, cut for each encoder of the set.
    pub prompts: Vec<ClipPrompt>,
    /// Which block's result becomes the conditioning, counted from the end: 1 is the last. `None` is what the diffusion
    /// model was trained with. A number larger than there are blocks is the last, normalised.
    pub from_end: Option<NonZeroU32>,
    /// Whether the pooled row is projected where the file has a projection.
    pub project: bool,
}

/// What comes out of a valid call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClipPlan {
    /// `[1, positions, width]`, float32: the chunks one after the other, the encoders side by side. Where encoders have
    /// different numbers of chunks, positions that not all have are left out.
    pub cond: TensorMeta,
    /// `[1, width]`, float32: of the first chunk, by the last encoder.
    pub pooled: TensorMeta,
}

impl TextEncoders {
    /// Checks `call` and tells what comes out of it.
    ///
    /// # Errors
    /// [`ModelError::Prompt`] where a prompt is missing, of an encoder that is not in the set, empty, too long, or has
    /// tokens or rows that the encoder does not take.
    pub fn plan(&self, call: &ClipCall) -> Result<ClipPlan, ModelError> {
        let [first, ..] = self.encoders.as_slice() else {
            return Err(refused("there is no text encoder"));
        };
        let last = self.encoders.last().unwrap_or(first);
        for prompt in &call.prompts {
            if call.prompts.iter().filter(|other| other.kind == prompt.kind).count() > 1 {
                return Err(refused(format!("there are two for {}", prompt.kind)));
            }
            if self.get(prompt.kind).is_none() {
                return Err(refused(format!("it is for {}, which is not loaded", prompt.kind)));
            }
        }
        let mut positions = u64::MAX;
        let mut width = 0u64;
        for facts in &self.encoders {
            let prompt = call.prompts.iter().find(|prompt| prompt.kind == facts.kind);
            let prompt = prompt.ok_or_else(|| refused(format!("there is none for {}", facts.kind)))?;
            positions = positions.min(facts.check(&prompt.chunks)?);
            width = width.saturating_add(facts.width);
        }
        let pooled = last.projection.filter(|_| call.project).unwrap_or(last.width);
        let plan = ClipPlan {
            cond: TensorMeta::contiguous(DType::F32, Dims::of([1, positions, width])),
            pooled: TensorMeta::contiguous(DType::F32, Dims::of([1, pooled])),
        };
        plan.cond.validate()?;
        plan.pooled.validate()?;
        Ok(plan)
    }
}

impl ClipFacts {
    /// Checks the chunks of a prompt; how many positions they have together.
    fn check(&self, chunks: &[Chunk]) -> Result<u64, ModelError> {
        let [first, ..] = chunks else {
            return Err(refused(format!("it has no chunk for {}", self.kind)));
        };
        if chunks.len() > MAX_CHUNKS {
            return Err(refused(format!("it has {} chunks; at most {MAX_CHUNKS} are taken", chunks.len())));
        }
        let length = first.len() as u64;
        if length == 0 || length > self.tokens || chunks.iter().any(|chunk| chunk.len() as u64 != length) {
            let most = self.tokens;
            return Err(refused(format!("chunks for {} must have one length of 1 to {most} positions", self.kind)));
        }
        for at in chunks.iter().flatten() {
            match &at.token {
                Token::Id(id) if u64::from(*id) < self.vocabulary => {}
                Token::Id(id) => {
                    return Err(refused(format!("token {id} is not one of the {} of {}", self.vocabulary, self.kind)));
                }
                Token::Vector(row) if row.len() as u64 == self.width => {}
                Token::Vector(row) => {
                    let (has, width) = (row.len(), self.width);
                    return Err(refused(format!("a row of {has} numbers is not {width} wide as {} is", self.kind)));
                }
            }
            if !at.weight.is_finite() {
                return Err(refused(format!("a weight is {}", at.weight)));
            }
        }
        Ok(length * chunks.len() as u64)
    }
}

pub(super) fn refused(reason: impl Into<String>) -> ModelError {
    ModelError::Prompt { reason: reason.into() }
}
