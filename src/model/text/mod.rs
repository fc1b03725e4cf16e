//! Prompts: from text to the token rows that CLIP text encoders take. Pure but for reading embedding files.

mod chunk;
mod embedding;
mod prompt;
mod tokenizer;

pub use chunk::{Chunk, ChunkRules, IgnoredEmbedding, PromptTokens, Token, WeightedToken};
pub use embedding::Embeddings;
pub use prompt::{Segment, segments};
pub use tokenizer::{END, START, Tokenizer};
