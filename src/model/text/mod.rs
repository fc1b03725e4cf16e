//! Prompts: from text to the token rows that CLIP text encoders take. Pure but for reading embedding files.

mod chunk;
mod embedding;
mod prompt;
mod tokenizer;

pub use crate::service::{Chunk, IgnoredEmbedding, Token, WeightedToken};
pub use chunk::{ChunkRules, PromptTokens};
pub use embedding::Embeddings;
pub use prompt::{Segment, segments};
pub use tokenizer::{END, START, Tokenizer};
