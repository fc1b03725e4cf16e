//! What peft says of an adapter apart from its tensors: its alphas. In the header, as diffusers has it, with the name of the
//! part of the pipeline before each setting; or in a file of its own, as peft has it, without.

mod parse;
mod pattern;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use super::super::companion::MAX_SETTINGS_BYTES;
use super::super::file::{ADAPTER_NOTES, Notes};
use super::super::header::quote;
use super::super::{ModelError, ModelFile};
use pattern::{Named, find};

/// What an adapter's keys begin with in files of peft's own.
const WRAPPED: &str = "base_model.model.";
/// Kinds of adapters whose tensors are what their names say, whoever wrote them; in peft's words.
const KINDS: [&str; 3] = ["LORA", "LOHA", "LOKR"];

/// What a file says apart from its tensors. What comes first goes before the rest.
#[derive(Debug, Default)]
pub(super) struct Settings(Vec<Parts>);

/// Settings by the part of a pipeline that they are about; by nothing where they are about all keys.
type Parts = BTreeMap<String, PartSettings>;

/// Settings of one wrapped model.
#[derive(Debug, Default, PartialEq)]
struct PartSettings {
    kind: Option<String>,
    alpha: Option<f64>,
    rank: Option<f64>,
    alphas: Vec<Named>,
    ranks: Vec<Named>,
    by_root: bool,
}

/// What is said of one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Said {
    alpha: f64,
    rank: Option<f64>,
    by_root: bool,
}

impl Said {
    /// What the change is multiplied by. `rank` is that of its tensors, where they have one.
    pub(super) fn scale(self, rank: Option<u64>) -> f64 {
        let rank = rank.map(|rank| rank as f64).or(self.rank);
        rank.map_or(1.0, |rank| self.alpha / if self.by_root { rank.sqrt() } else { rank })
    }
}

impl Settings {
    /// Everything that is said about a file's tensors.
    ///
    /// # Errors
    /// [`ModelError::AdapterFile`] for what cannot be understood, [`ModelError::Malformed`] for such a file beside it:
    /// an adapter at another strength than it was trained for would not be noticed.
    pub(super) fn of(file: &ModelFile) -> Result<Self, ModelError> {
        let Notes { header, beside } = file.notes();
        let mut settings = Self::default();
        if let Some(text) = header {
            let refused = |reason| ModelError::AdapterFile {
                path: file.path().to_owned(),
                reason: format!("{ADAPTER_NOTES} in its header: {reason}"),
            };
            settings.add(text).map_err(refused)?;
        }
        if let Some(text) = beside {
            let path = file.settings_path().unwrap_or(file.path()).to_owned();
            settings.add(text).map_err(|reason| ModelError::Malformed { path, reason })?;
        }
        Ok(settings)
    }

    fn add(&mut self, text: &str) -> Result<(), String> {
        if text.len() > MAX_SETTINGS_BYTES {
            return Err(format!("it is longer than the {MAX_SETTINGS_BYTES} bytes that settings may have"));
        }
        let parts = parse::parse(text)?;
        for part in parts.values() {
            if let Some(kind) = part.kind.as_ref().filter(|kind| !KINDS.contains(&kind.as_str())) {
                let known = KINDS.join(", ");
                return Err(format!("peft_type is {}; of peft's kinds, {known} are supported", quote(kind)));
            }
        }
        self.0.push(parts);
        Ok(())
    }

    /// What is said of the layer that the file calls `name`; `None` where its alpha is not.
    pub(super) fn find(&self, name: &str) -> Option<Said> {
        self.0.iter().find_map(|parts| {
            // The longest name of a part that it begins with; settings of none are about all.
            let within = name.rmatch_indices('.').find_map(|(dot, _)| {
                let (part, layer) = (name.get(..dot)?, name.get(dot + 1..)?);
                Some((parts.get(part)?, layer))
            });
            let (settings, layer) = within.or_else(|| Some((parts.get("")?, name)))?;
            settings.of(layer.strip_prefix(WRAPPED).unwrap_or(layer))
        })
    }
}

impl PartSettings {
    fn of(&self, layer: &str) -> Option<Said> {
        let alpha = find(&self.alphas, layer).or(self.alpha)?;
        Some(Said { alpha, rank: find(&self.ranks, layer).or(self.rank), by_root: self.by_root })
    }
}
