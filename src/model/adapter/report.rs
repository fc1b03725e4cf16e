use super::super::header::quote;

/// Unknown keys that a report names.
const FIRST_KEYS: usize = 5;

/// What an adapter does to a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum AdapterKind {
    /// A product of two narrow matrices is added; also in three parts, around a small convolution.
    Lora,
    /// The elementwise product of two such products is added.
    Loha,
    /// A Kronecker product is added.
    Lokr,
    /// Two products are added, one of them with the weight itself.
    Glora,
    /// Blocks of output channels are turned.
    Oft,
    /// Output channels are turned in several rounds, in other blocks each time.
    Boft,
    /// One of the others, with the lengths of rows or columns set apart.
    Dora,
    /// A full-size difference is added, to the weight or to the bias.
    Difference,
    /// The weight is another.
    Set,
}

impl AdapterKind {
    /// A word for messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::Loha => "loha",
            Self::Lokr => "lokr",
            Self::Glora => "glora",
            Self::Oft => "oft",
            Self::Boft => "boft",
            Self::Dora => "dora",
            Self::Difference => "difference",
            Self::Set => "set",
        }
    }
}

/// What of an adapter's file a model takes up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AdapterReport {
    /// Layers that it changes.
    pub layers: usize,
    /// How many of them in which way, by kind.
    pub kinds: Vec<(AdapterKind, usize)>,
    /// Keys that name nothing in the model.
    pub unknown: UnknownKeys,
    /// Keys about text encoders, which a UNet has no use for.
    pub text_encoder_keys: usize,
    /// Keys that are not about text encoders, where those are what is changed.
    pub unet_keys: usize,
}

impl AdapterReport {
    pub(super) fn count(&mut self, kind: AdapterKind) {
        self.layers += 1;
        match self.kinds.binary_search_by_key(&kind, |(own, _)| *own) {
            Ok(at) => {
                if let Some((_, count)) = self.kinds.get_mut(at) {
                    *count += 1;
                }
            }
            Err(at) => self.kinds.insert(at, (kind, 1)),
        }
    }
}

/// Keys of a file that nothing was done with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnknownKeys {
    /// The first few, quoted, in the order of the file.
    pub first: Vec<String>,
    /// All of them.
    pub count: usize,
}

impl UnknownKeys {
    pub(super) fn add(&mut self, key: &str) {
        self.count += 1;
        if self.first.len() < FIRST_KEYS {
            self.first.push(quote(key));
        }
    }
}
