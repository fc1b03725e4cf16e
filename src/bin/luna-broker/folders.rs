use std::path::{Path, PathBuf};

use luna_broker::{Error, ErrorKind};

use crate::args::ServeArgs;
use crate::comfyui_paths;

/// Folders in which clients may name files without a path, by what is looked for in them; earlier ones go first.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Folders {
    pub(crate) models: Vec<PathBuf>,
    pub(crate) adapters: Vec<PathBuf>,
    pub(crate) embeddings: Vec<PathBuf>,
}

/// What is looked for in a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Models,
    Adapters,
    Embeddings,
}

impl Folders {
    /// What the flags name, and behind it what ComfyUI's files name.
    ///
    /// # Errors
    /// A folder that a flag names and that is none; as [`comfyui_paths::read`].
    pub(crate) fn of(args: &ServeArgs) -> Result<Self, Error> {
        let mut folders = Self {
            models: existing("--models", &args.models)?,
            adapters: existing("--loras", &args.loras)?,
            embeddings: existing("--embeddings", &args.embeddings)?,
        };
        for file in &args.comfyui_paths {
            comfyui_paths::read(file, &mut folders)?;
        }
        Ok(folders)
    }

    pub(crate) fn of_kind(&mut self, kind: Kind) -> &mut Vec<PathBuf> {
        match kind {
            Kind::Models => &mut self.models,
            Kind::Adapters => &mut self.adapters,
            Kind::Embeddings => &mut self.embeddings,
        }
    }
}

fn existing(flag: &str, folders: &[PathBuf]) -> Result<Vec<PathBuf>, Error> {
    if let Some(missing) = folders.iter().find(|folder| !folder.is_dir()) {
        let message = format!("{flag} {}: no such folder", missing.display());
        return Err(Error::new(ErrorKind::Configuration, message, "name an existing folder"));
    }
    Ok(folders.iter().map(|folder| absolute(folder)).collect())
}

/// The path as it is meant from here.
pub(crate) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
