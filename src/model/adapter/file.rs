use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::super::header::quote;
use super::super::{FileState, LayerId, ModelError, ModelFile, StoredTensor};
use super::build::{Alpha, Builder};
use super::change::{Change, Part};
use super::names::{LayerNames, Subject};
use super::number;
use super::piece::{Piece, is_of_text_encoder, split};
use super::report::{AdapterReport, UnknownKeys};
use super::settings::Settings;

/// An adapter's file: its keys taken apart, its data still on the disk.
#[derive(Debug)]
pub struct AdapterFile {
    file: Arc<ModelFile>,
    /// In the order of their keys.
    groups: Vec<Group>,
    unknown: Vec<(Subject, String)>,
    settings: Settings,
}

/// All that a file has for one layer.
#[derive(Debug)]
struct Group {
    /// What the file calls the layer.
    name: String,
    pieces: BTreeMap<Piece, Part>,
    alpha: Option<f64>,
    subject: Subject,
}

/// What an adapter changes in one model.
#[derive(Debug)]
pub(in crate::model) struct Fitted {
    /// By layer; each once.
    #[cfg_attr(not(feature = "torch"), expect(dead_code, reason = "only running needs it"))]
    pub(in crate::model) changes: BTreeMap<LayerId, Change<Part>>,
    pub(in crate::model) report: AdapterReport,
}

impl AdapterFile {
    /// Takes the keys of `file` apart. Reads the header and the single numbers called alpha.
    ///
    /// A layer that has no such number has the alpha that diffusers wrote into the header or peft into `adapter_config.json`
    /// beside `adapter_model.safetensors`. Where none of them says one, the change is taken as it is, by a factor of one.
    ///
    /// # Errors
    /// [`ModelError::AdapterFile`] for a key that is there in two spellings, for an alpha that is no finite number, and for
    /// settings in the header that cannot be understood; [`ModelError::Malformed`] for such settings beside it;
    /// [`ModelError::Changed`], [`ModelError::Unreadable`].
    pub fn read(file: Arc<ModelFile>) -> Result<Self, ModelError> {
        let settings = Settings::of(&file)?;
        let mut groups: BTreeMap<&str, Group> = BTreeMap::new();
        let mut unknown = Vec::new();
        for (key, stored) in file.tensors() {
            let subject = if is_of_text_encoder(key) { Subject::TextEncoders } else { Subject::Unet };
            let Some((name, piece)) = split(key) else {
                unknown.push((subject, key.to_owned()));
                continue;
            };
            let group = groups.entry(name).or_insert_with(|| Group::named(name, subject));
            if piece == Piece::Alpha {
                group.alpha = Some(alpha(&file, key, stored)?);
            }
            let part = Part { key: key.to_owned(), stored: stored.clone() };
            if let Some(other) = group.pieces.insert(piece, part) {
                return Err(refused(&file, format!("{} says again what {} says", quote(key), quote(&other.key))));
            }
        }
        let groups = groups.into_values().collect();
        Ok(Self { file, groups, unknown, settings })
    }

    /// The path the file was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// What tells whether the file is still the same.
    #[must_use]
    pub fn state(&self) -> &FileState {
        self.file.state()
    }

    /// What the model with these layers takes up of it. Reads nothing.
    ///
    /// # Errors
    /// [`ModelError::AdapterFile`] where nothing of it is for that model, where pieces are missing and where one does
    /// not fit its layer.
    pub fn report(&self, names: &LayerNames) -> Result<AdapterReport, ModelError> {
        Ok(self.fit(names)?.report)
    }

    pub(in crate::model) fn fit(&self, names: &LayerNames) -> Result<Fitted, ModelError> {
        let mut report = AdapterReport::default();
        let other_keys = self.keys_of_others(names.subject);
        match names.subject {
            Subject::Unet => report.text_encoder_keys = other_keys,
            Subject::TextEncoders => report.unet_keys = other_keys,
        }
        let unknown = self.unknown.iter().filter(|(subject, _)| *subject == names.subject);
        unknown.for_each(|(_, key)| report.unknown.add(key));
        let mut changes = BTreeMap::new();
        let mut called: BTreeMap<LayerId, &str> = BTreeMap::new();
        for group in self.groups.iter().filter(|group| group.subject == names.subject) {
            let found = names.find(&group.name).and_then(|id| Some((id, names.layer(id)?)));
            let Some((id, layer)) = found else {
                group.pieces.values().for_each(|part| report.unknown.add(&part.key));
                continue;
            };
            let Some(change) = self.change(group, layer, &mut report.unknown)? else { continue };
            if let Some(other) = called.insert(id, &group.name) {
                let (own, other) = (quote(&group.name), quote(other));
                return Err(refused(&self.file, format!("{own} and {other} are the same layer, {}", layer.stem)));
            }
            report.count(change.kind());
            changes.insert(id, change);
        }
        if changes.is_empty() && (report.unknown.count > 0 || other_keys == 0) {
            let keys = match report.unknown.first.first() {
                Some(first) => {
                    format!("none of its {} keys names a layer of the model, as {first}", report.unknown.count)
                }
                None => "it has no keys".to_owned(),
            };
            return Err(refused(&self.file, keys));
        }
        Ok(Fitted { changes, report })
    }

    /// Keys that are not about layers of this part.
    fn keys_of_others(&self, subject: Subject) -> usize {
        let groups = self.groups.iter().filter(|group| group.subject != subject);
        let unknown = self.unknown.iter().filter(|(other, _)| *other != subject);
        groups.map(|group| group.pieces.len()).sum::<usize>() + unknown.count()
    }

    /// What the group changes in its layer: `None` where it changes nothing.
    fn change(
        &self,
        group: &Group,
        layer: &super::names::LayerFacts,
        unknown: &mut UnknownKeys,
    ) -> Result<Option<Change<Part>>, ModelError> {
        let mut pieces = group.pieces.clone();
        let alpha = pieces.remove(&Piece::Alpha);
        if !layer.biased
            && let Some(part) = pieces.remove(&Piece::BiasDifference)
        {
            unknown.add(&part.key);
        }
        if pieces.is_empty() {
            alpha.iter().for_each(|part| unknown.add(&part.key));
            return Ok(None);
        }
        let alpha = Alpha { stored: group.alpha, said: self.settings.find(&group.name) };
        Builder::new(self.file.path(), layer, pieces, alpha).build().map(Some)
    }

    /// The open file.
    #[cfg(feature = "torch")]
    pub(in crate::model) fn file(&self) -> &ModelFile {
        &self.file
    }
}

impl Group {
    fn named(name: &str, subject: Subject) -> Self {
        Self { name: name.to_owned(), pieces: BTreeMap::new(), alpha: None, subject }
    }
}

fn alpha(file: &ModelFile, key: &str, stored: &StoredTensor) -> Result<f64, ModelError> {
    match number::read(file, stored)? {
        Some(alpha) if alpha.is_finite() => Ok(alpha),
        Some(alpha) => Err(refused(file, format!("{} is {alpha}", quote(key)))),
        None => Err(refused(file, format!("{} is no number: {} of {:?}", quote(key), stored.dtype, stored.shape))),
    }
}

fn refused(file: &ModelFile, reason: String) -> ModelError {
    ModelError::AdapterFile { path: file.path().to_owned(), reason }
}
