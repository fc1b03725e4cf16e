use serde::{Deserialize, Serialize};

/// How adapters are applied. Results of the modes differ by rounding only: whoever repeats a result names the mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdapterMode {
    /// Beside the layer where all its adapters are of low rank and cost less there than the layer itself; else merged.
    #[default]
    Auto,
    /// Beside the layer whatever can run there, and a private copy of its weights for the rest: the least memory.
    Side,
    /// A private copy of every weight that is changed: the fastest run.
    Merged,
}

impl AdapterMode {
    /// Every mode.
    pub const ALL: [Self; 3] = [Self::Auto, Self::Side, Self::Merged];

    /// The name used in settings.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Side => "side",
            Self::Merged => "merged",
        }
    }

    /// The mode of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }
}

/// An adapter that a request asks for, and how much of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdapterUse {
    /// Name in a folder of adapters, path, or name of a published set.
    pub name: String,
    /// Times what the adapter says; 0 leaves it out, less turns it round.
    pub strength: f64,
}

/// The adapters of a request, applied in this order.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct AdapterStack {
    /// Each with its strength; none for the model as it is.
    pub adapters: Vec<AdapterUse>,
    /// How they are applied.
    pub mode: AdapterMode,
}

/// What a model takes up of one adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterTaken {
    /// The adapter, as it was asked for.
    pub name: String,
    /// Layers that it changes.
    pub layers: u64,
    /// How many of them in which way: `lora`, `loha`, `lokr`, `glora`, `oft`, `boft`, `dora`, `difference`, `set`.
    pub kinds: Vec<(String, u64)>,
    /// Keys that name nothing in the model.
    pub unknown_keys: u64,
    /// The first few of them, quoted.
    pub unknown: Vec<String>,
    /// Keys that are about another part: of text encoders for a UNet.
    pub other_keys: u64,
}
