use serde::{Deserialize, Serialize};

use super::DType;

/// More than anybody writes down. Each is held against every key of a set.
pub const MAX_PREFIXES: usize = 256;

/// Which element types the tensors of a set are wanted in, by the beginnings of their keys. The longest beginning that
/// fits a key counts; the empty one fits every key.
///
/// Only floating-point tensors are ever converted, rounding to the nearest, and only to one of 16 bits or more; integers
/// and booleans stay as they are.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(try_from = "Entries", into = "Entries")]
pub struct CastRule {
    /// Sorted by prefix, each once.
    entries: Entries,
}

/// A rule as it crosses the wire.
type Entries = Vec<(String, Option<DType>)>;

/// Why what a peer sent is no rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CastRuleError {
    /// It is longer than any that is used.
    #[error("a rule of {count} beginnings of keys; {MAX_PREFIXES} are the most")]
    TooLong {
        /// Beginnings of keys.
        count: usize,
    },
    /// Two sides that hold the same rule must find the same in it.
    #[error("a rule whose beginnings of keys are not sorted, each once")]
    Unsorted,
}

impl TryFrom<Entries> for CastRule {
    type Error = CastRuleError;

    fn try_from(entries: Entries) -> Result<Self, CastRuleError> {
        if entries.len() > MAX_PREFIXES {
            return Err(CastRuleError::TooLong { count: entries.len() });
        }
        let is_sorted = entries.is_sorted_by(|(one, _), (other, _)| one < other);
        if is_sorted { Ok(Self { entries }) } else { Err(CastRuleError::Unsorted) }
    }
}

impl From<CastRule> for Entries {
    fn from(rule: CastRule) -> Self {
        rule.entries
    }
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
    fn a_rule_of_a_peers_is_sorted_each_once_and_short() {
        let entries = |prefixes: &[&str]| prefixes.iter().map(|&prefix| (prefix.to_owned(), None)).collect::<Entries>();
        assert_eq!(CastRule::try_from(entries(&["a", "b"])), Ok(CastRule::stored().with("b", None).with("a", None)));
        for wrong in [entries(&["b", "a"]), entries(&["a", "a"])] {
            assert_eq!(CastRule::try_from(wrong), Err(CastRuleError::Unsorted));
        }
        let many = |count: usize| (0..count).map(|at| (format!("{at:09}"), None)).collect::<Entries>();
        assert!(CastRule::try_from(many(MAX_PREFIXES)).is_ok());
        assert_eq!(CastRule::try_from(many(257)), Err(CastRuleError::TooLong { count: 257 }));
    }

    #[test]
    fn only_floating_point_types_can_be_asked_for() {
        assert_eq!(CastRule::all(DType::I64).impossible(), Some(DType::I64));
        assert_eq!(CastRule::all(DType::F8E5M2).impossible(), Some(DType::F8E5M2));
        assert_eq!(CastRule::all(DType::Bf16).impossible(), None);
    }
}
