use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A family of text encoders: how it computes and which of its results a diffusion model takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ClipKind {
    /// CLIP-L of SD1 and, beside G, of SDXL.
    #[serde(rename = "clip_l")]
    L,
    /// CLIP-H of SD2.
    #[serde(rename = "clip_h")]
    H,
    /// CLIP-G of SDXL and its refiner.
    #[serde(rename = "clip_g")]
    G,
}

impl ClipKind {
    /// Every family, in the order in which results are joined.
    pub const ALL: [Self; 3] = [Self::L, Self::H, Self::G];

    /// The name used in prompts, messages and files of embeddings.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::L => "clip_l",
            Self::H => "clip_h",
            Self::G => "clip_g",
        }
    }

    /// The family of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl fmt::Display for ClipKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One position of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub enum Token {
    /// A row of the encoder's own table.
    Id(u32),
    /// A row from elsewhere, as wide as the encoder.
    Vector(Arc<[f32]>),
}

/// A position with how strongly it counts.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightedToken {
    /// What is there.
    pub token: Token,
    /// 1 changes nothing.
    pub weight: f32,
}

/// As many positions as an encoder takes at once, marks and padding included.
pub type Chunk = Vec<WeightedToken>;

/// A prompt for one encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ClipPrompt {
    /// The encoder.
    pub kind: ClipKind,
    /// At least one, all of one length.
    pub chunks: Vec<Chunk>,
}

/// An embedding that a prompt names in vain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IgnoredEmbedding {
    /// The name in the prompt.
    pub name: String,
    /// Why it is left out.
    pub reason: String,
}

/// What text encoders are given, over what stands for a tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ClipInput<T> {
    /// Words, which become tokens where the encoders are.
    Text(ClipText),
    /// Tokens for each encoder of the set.
    Tokens(Vec<ClipTokens<T>>),
}

/// A prompt in words: weights by parentheses, `embedding:name` for trained rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClipText {
    /// For every encoder without a text of its own.
    pub text: String,
    /// For CLIP-G, where it is told something else. The shorter of both prompts is filled up with empty ones.
    pub text_g: Option<String>,
}

/// A prompt for one encoder in tensors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClipTokens<T> {
    /// The encoder.
    pub kind: ClipKind,
    /// int32 `[chunks, positions]`: a token's number, or −1 − r for row r of `rows`.
    pub ids: T,
    /// float32, one for each of `ids`; 1 everywhere where absent.
    pub weights: Option<T>,
    /// float32 `[rows, width]`: what stands where no token does, each once and in this order.
    pub rows: Option<T>,
}

/// How a prompt is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClipOptions {
    /// Which block's result becomes the conditioning, counted from the end: 1 is the last. `None` is what the diffusion
    /// model was trained with. A number larger than there are blocks is the last, normalised.
    pub from_end: Option<NonZeroU32>,
    /// Whether the pooled row is projected where the file has a projection.
    pub project: bool,
}

impl Default for ClipOptions {
    fn default() -> Self {
        Self { from_end: None, project: true }
    }
}

impl<T> ClipInput<T> {
    /// The same with every tensor replaced.
    ///
    /// # Errors
    /// The first that `f` returns.
    pub fn try_map<'a, U, E>(&'a self, f: &mut impl FnMut(&'a T) -> Result<U, E>) -> Result<ClipInput<U>, E> {
        Ok(match self {
            Self::Text(text) => ClipInput::Text(text.clone()),
            Self::Tokens(all) => ClipInput::Tokens(all.iter().map(|one| one.try_map(f)).collect::<Result<_, E>>()?),
        })
    }

    /// Every tensor, in the order in which they cross.
    pub fn each<'a>(&'a self) -> impl Iterator<Item = &'a T> + use<'a, T> {
        let all = match self {
            Self::Text(_) => &[][..],
            Self::Tokens(all) => all.as_slice(),
        };
        all.iter().flat_map(|ClipTokens { ids, weights, rows, .. }| [ids].into_iter().chain(weights).chain(rows))
    }
}

impl<T> ClipTokens<T> {
    /// The same with every tensor replaced.
    ///
    /// # Errors
    /// The first that `f` returns.
    pub fn try_map<'a, U, E>(&'a self, f: &mut impl FnMut(&'a T) -> Result<U, E>) -> Result<ClipTokens<U>, E> {
        Ok(ClipTokens {
            kind: self.kind,
            ids: f(&self.ids)?,
            weights: self.weights.as_ref().map(&mut *f).transpose()?,
            rows: self.rows.as_ref().map(&mut *f).transpose()?,
        })
    }
}
