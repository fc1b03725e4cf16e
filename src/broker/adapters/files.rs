use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::weights::PublishedModel;
use crate::id::ContentDigest;
use crate::model::{AdapterFile, FileState, ModelError, ModelFile};

/// More adapters than are in use at a time; bounds open files.
const MAX_FILES: usize = 128;

/// An adapter that was read, with what it contains.
#[derive(Debug, Clone)]
pub(super) struct ReadAdapter {
    pub(super) file: Arc<AdapterFile>,
    pub(super) content: ContentDigest,
}

/// Adapters that were read, by path. A file that has changed since is not among them.
#[derive(Debug, Default)]
pub(super) struct Files {
    read: HashMap<PathBuf, (ReadAdapter, u64)>,
    uses: u64,
}

impl Files {
    pub(super) fn get(&mut self, path: &Path) -> Option<ReadAdapter> {
        self.uses += 1;
        let (read, last_used) = self.read.get_mut(path)?;
        *last_used = self.uses;
        Some(read.clone())
    }

    /// Remembers an adapter. The longest unused one gives way where there are too many.
    pub(super) fn add(&mut self, path: &Path, read: ReadAdapter) {
        if self.read.len() >= MAX_FILES && !self.read.contains_key(path) {
            let oldest = self.read.iter().min_by_key(|(_, (_, last_used))| *last_used).map(|(path, _)| path.clone());
            oldest.map(|path| self.read.remove(&path));
        }
        self.uses += 1;
        self.read.insert(path.to_owned(), (read, self.uses));
    }
}

impl ReadAdapter {
    /// Reads the adapter at `path`: its header, and all of it once for its digest.
    ///
    /// # Errors
    /// As [`ModelFile::open`] and [`AdapterFile::read`].
    pub(super) fn read(path: &Path) -> Result<Self, ModelError> {
        let file = Arc::new(ModelFile::open(path)?);
        let content = file.digest()?;
        file.check_unchanged()?;
        Ok(Self { file: Arc::new(AdapterFile::read(file)?), content })
    }

    /// The adapter that a client published.
    ///
    /// # Errors
    /// As [`PublishedModel::open`] and [`AdapterFile::read`].
    pub(super) fn published(set: &PublishedModel) -> Result<Self, ModelError> {
        Ok(Self { file: Arc::new(AdapterFile::read(set.open()?)?), content: set.content() })
    }

    /// Whether its file is what it was. Looks at the disk.
    pub(super) fn is_current(&self) -> bool {
        let state: &FileState = self.file.state();
        state.check_unchanged().is_ok()
    }
}
