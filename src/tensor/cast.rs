use serde::{Deserialize, Serialize};

use super::DType;

/// Which element types the tensors of a set are wanted in, by the beginnings of their keys. The longest beginning that
/// fits a key counts; the empty one fits every key.
///
/// Only floating-point tensors are ever converted, rounding to the nearest, and only to one of 16 bits or more; integers
/// and booleans stay as they are.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CastRule {
    /// Sorted by prefix, each once.
    entries: Vec<(String, Option<DType>)>,
}

impl CastRule {
    /// Every tensor as it is stored.
    #[must_use]
    pub fn stored() -> Self {
        Self::default()
    }

    /// Every floating-point tensor as `dtype`.
    #[must_use]
    pub fn all(dtype: DType) -> Self {
        Self::stored().with("", Some(dtype))
    }

    /// As this rule, but keys that begin with `prefix` become `dtype`; `None` keeps them as they are stored.
    #[must_use]
    pub fn with(mut self, prefix: impl Into<String>, dtype: Option<DType>) -> Self {
        let prefix = prefix.into();
        match self.entries.binary_search_by(|(known, _)| known.cmp(&prefix)) {
            Ok(at) => {
                if let Some(entry) = self.entries.get_mut(at) {
                    entry.1 = dtype;
                }
            }
            Err(at) => self.entries.insert(at, (prefix, dtype)),
        }
        self
    }

    /// The prefixes and their element types.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = (&str, Option<DType>)> {
        self.entries.iter().map(|(prefix, dtype)| (prefix.as_str(), *dtype))
    }

    /// The element type that the tensor `key`, stored as `stored`, is wanted in.
    #[must_use]
    pub fn wanted(&self, key: &str, stored: DType) -> DType {
        if !stored.is_float() && !stored.is_float8() {
            return stored;
        }
        let fitting = self.entries.iter().filter(|(prefix, _)| key.starts_with(prefix.as_str()));
        fitting.max_by_key(|(prefix, _)| prefix.len()).and_then(|(_, dtype)| *dtype).unwrap_or(stored)
    }

    /// The first element type asked for that nothing is converted to.
    #[must_use]
    pub fn impossible(&self) -> Option<DType> {
        self.entries.iter().filter_map(|(_, dtype)| *dtype).find(|dtype| !dtype.is_float())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_prefix_decides_and_only_floats_change() {
        let rule = CastRule::all(DType::F16).with("vae.", Some(DType::F32)).with("vae.post.", None);
        assert_eq!(rule.wanted("unet.weight", DType::F32), DType::F16);
        assert_eq!(rule.wanted("vae.weight", DType::F16), DType::F32);
        assert_eq!(rule.wanted("vae.post.weight", DType::Bf16), DType::Bf16);
        assert_eq!(rule.wanted("vae.ids", DType::I64), DType::I64);
        assert_eq!(rule.wanted("unet.weight", DType::F8E4M3Fn), DType::F16);
        assert_eq!(CastRule::stored().wanted("unet.weight", DType::F8E5M2), DType::F8E5M2);
    }

    #[test]
    fn the_order_of_entries_makes_no_difference() {
        let one = CastRule::stored().with("a", Some(DType::F16)).with("b", None);
        let two = CastRule::stored().with("b", Some(DType::F32)).with("a", Some(DType::F16)).with("b", None);
        assert_eq!(one, two);
    }

    #[test]
    fn only_floating_point_types_can_be_asked_for() {
        assert_eq!(CastRule::all(DType::I64).impossible(), Some(DType::I64));
        assert_eq!(CastRule::all(DType::F8E5M2).impossible(), Some(DType::F8E5M2));
        assert_eq!(CastRule::all(DType::Bf16).impossible(), None);
    }
}
