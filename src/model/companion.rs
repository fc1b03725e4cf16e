use std::io::Read;
use std::path::{Path, PathBuf};

use super::ModelError;
use super::file::{Identity, open_regular};

/// What peft calls the tensors of an adapter that it saves, in a folder of their own.
const TENSORS: &str = "adapter_model.safetensors";
/// What it says about them, beside them.
const SETTINGS: &str = "adapter_config.json";
/// Many times what peft writes, with every layer of a model named.
pub(super) const MAX_SETTINGS_BYTES: usize = 1 << 20;

/// The file of settings that goes with a file of tensors, as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Companion {
    path: PathBuf,
    /// Absent where there was none.
    identity: Option<Identity>,
}

impl Companion {
    /// What belongs beside the file at `path`, with its text where it is there; `None` for a file that nothing belongs to.
    ///
    /// # Errors
    /// [`ModelError::Unreadable`], [`ModelError::Directory`], and [`ModelError::Malformed`] for more than settings take and
    /// for what is no text.
    pub(super) fn of(path: &Path) -> Result<Option<(Self, Option<String>)>, ModelError> {
        if path.file_name().is_none_or(|name| name != TENSORS) {
            return Ok(None);
        }
        let path = path.with_file_name(SETTINGS);
        // A link to nothing is no file either.
        if !path.exists() {
            return Ok(Some((Self { path, identity: None }, None)));
        }
        let (file, metadata) = open_regular(&path)?;
        let mut bytes = Vec::new();
        let mut part = file.take(MAX_SETTINGS_BYTES as u64 + 1);
        part.read_to_end(&mut bytes).map_err(|cause| ModelError::Unreadable { path: path.clone(), cause })?;
        let malformed = |reason: String| ModelError::Malformed { path: path.clone(), reason };
        if bytes.len() > MAX_SETTINGS_BYTES {
            return Err(malformed(format!("it has more than the {MAX_SETTINGS_BYTES} bytes that settings may have")));
        }
        let text = String::from_utf8(bytes).map_err(|error| malformed(error.to_string()))?;
        Ok(Some((Self { path, identity: Some(Identity::of(&metadata)) }, Some(text))))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether what is at its place is still what was found there, or still nothing.
    pub(super) fn is_unchanged(&self) -> bool {
        std::fs::metadata(&self.path).ok().map(|metadata| Identity::of(&metadata)) == self.identity
    }
}
