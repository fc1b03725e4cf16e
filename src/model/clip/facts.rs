use std::path::PathBuf;

use super::super::text::{ChunkRules, END};
use crate::service::ClipKind;

/// Numbers per attention head, the same in every CLIP.
const HEAD_WIDTH: u64 = 64;
/// Blocks of CLIP-H as it was trained.
const FULL_H: u64 = 24;

impl ClipKind {
    /// What fills a prompt behind its end.
    #[must_use]
    pub const fn pad(self) -> u32 {
        match self {
            Self::L => END,
            Self::H | Self::G => 0,
        }
    }
}

/// What is known of a text encoder from its file's header alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClipFacts {
    /// The file; for messages.
    pub path: PathBuf,
    /// Which one it is.
    pub kind: ClipKind,
    /// Numbers per token.
    pub width: u64,
    /// Blocks that the file holds. CLIP-H is also published without its last one, which SD2 does not use.
    pub layers: u64,
    /// Rows of the table of tokens.
    pub vocabulary: u64,
    /// Positions of a prompt: 77.
    pub tokens: u64,
    /// Numbers of a projected pooled row, where the file has a projection.
    pub projection: Option<u64>,
    /// Bytes of its weights as they are stored, which is how they are kept.
    pub weight_bytes: u64,
}

impl ClipFacts {
    /// What this encoder wants of a prompt.
    #[must_use]
    pub fn rules(&self) -> ChunkRules {
        ChunkRules {
            length: usize::try_from(self.tokens).unwrap_or(usize::MAX),
            pad: self.kind.pad(),
            key: self.kind.name(),
            width: self.width,
        }
    }

    /// Attention heads.
    #[must_use]
    pub fn heads(&self) -> u64 {
        self.width / HEAD_WIDTH
    }

    /// Whether a width can be cut into heads.
    pub(super) fn has_whole_heads(width: u64) -> bool {
        width > 0 && width.is_multiple_of(HEAD_WIDTH)
    }

    /// The token that ends a prompt: the usual one, or the last of a smaller vocabulary.
    #[must_use]
    pub fn end(&self) -> u32 {
        u32::try_from(self.vocabulary.saturating_sub(1)).unwrap_or(END).min(END)
    }

    /// Blocks of the encoder as it was trained: for CLIP-H one more than the file may hold.
    #[must_use]
    pub fn trained_layers(&self) -> u64 {
        match self.kind {
            ClipKind::H if self.layers + 1 == FULL_H => FULL_H,
            _ => self.layers,
        }
    }

    /// Blocks to run for the result of block `from_end`, counted from the end of the encoder as it was trained: 1 is
    /// the last. Beyond the first block, or where the file lacks it, the last one that is there.
    #[must_use]
    pub fn blocks_until(&self, from_end: u32) -> u64 {
        match (self.trained_layers() + 1).checked_sub(u64::from(from_end)) {
            Some(blocks) if blocks > 0 => blocks.min(self.layers),
            _ => self.layers,
        }
    }
}

/// The text encoders that one prompt goes through together: L, H or G alone, or L and G.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextEncoders {
    /// In the order in which their results are joined.
    pub(super) encoders: Vec<ClipFacts>,
}

impl TextEncoders {
    /// Each encoder, in the order in which their results are joined.
    #[must_use]
    pub fn encoders(&self) -> &[ClipFacts] {
        &self.encoders
    }

    /// The encoder of that kind.
    #[must_use]
    pub fn get(&self, kind: ClipKind) -> Option<&ClipFacts> {
        self.encoders.iter().find(|facts| facts.kind == kind)
    }

    /// Architecture as shown to users.
    #[must_use]
    pub fn family(&self) -> &'static str {
        match self.encoders.as_slice() {
            [one] => match one.kind {
                ClipKind::L => "clip-l",
                ClipKind::H => "clip-h",
                ClipKind::G => "clip-g",
            },
            _ => "clip-l+g",
        }
    }

    /// Bytes of all weights as they are stored.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.encoders.iter().fold(0, |sum, facts| sum.saturating_add(facts.weight_bytes))
    }
}
