use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};

use super::super::{ModelError, ModelFile, StoredTensor};
use crate::tensor::DType;

/// Deepest folder below a named one that is looked in; also what ends a circle of links.
const MAX_DEPTH: usize = 8;
/// Endings a prompt may leave out. The last ones are refused with a word about converting them.
const ENDINGS: [&str; 4] = ["safetensors", "pt", "bin", "ckpt"];
/// Names of the rows in files for one text encoder.
const COMMON_KEYS: [&str; 2] = ["emb_params", "*"];

/// Folders with trained embeddings (textual inversions), which a prompt names by `embedding:name`.
#[derive(Debug, Clone, Default)]
pub struct Embeddings {
    folders: Vec<PathBuf>,
}

impl Embeddings {
    /// Looks in `folders` and in the folders below them, in this order.
    #[must_use]
    pub fn new(folders: Vec<PathBuf>) -> Self {
        Self { folders }
    }

    /// The rows of embedding `name` for the encoder called `key`, each of `width` numbers; `None` where there is no
    /// such file.
    ///
    /// # Errors
    /// As [`ModelFile::open`], and [`ModelError::MissingPart`] for a file without rows of this width.
    pub fn rows(&self, name: &str, key: &str, width: u64) -> Result<Option<Vec<Arc<[f32]>>>, ModelError> {
        let Some(path) = self.find(name) else { return Ok(None) };
        let file = ModelFile::open(&path)?;
        let named = [key].into_iter().chain(COMMON_KEYS).find_map(|key| file.tensor(key));
        let fits = |stored: &&StoredTensor| fits(stored, width);
        // A file with other names in it: whatever has the width. One for other encoders has nothing for this one.
        let stored = match named {
            Some(stored) => Some(stored).filter(fits),
            None => file.tensors().map(|(_, stored)| stored).find(fits),
        };
        let stored = stored.ok_or_else(|| ModelError::MissingPart {
            path: path.clone(),
            part: "embedding of the text encoder's width",
            found: format!("{}, where rows of {width} are needed", file.summary()),
        })?;
        numbers(&file, stored, usize::try_from(width).unwrap_or(usize::MAX)).map(Some)
    }

    /// The first file that the name fits. A name that leads out of the folders fits none.
    fn find(&self, name: &str) -> Option<PathBuf> {
        let relative = Path::new(name);
        let stays_inside = relative.components().all(|part| matches!(part, Component::Normal(_)));
        if name.is_empty() || !stays_inside {
            return None;
        }
        self.folders.iter().find_map(|folder| find_below(folder, relative, 0))
    }
}

fn find_below(folder: &Path, relative: &Path, depth: usize) -> Option<PathBuf> {
    let exact = folder.join(relative);
    let with_ending = |ending: &&str| {
        let mut name = exact.clone().into_os_string();
        name.push(".");
        name.push(ending);
        PathBuf::from(name)
    };
    let mut candidates = std::iter::once(exact.clone()).chain(ENDINGS.iter().map(with_ending));
    if let Some(found) = candidates.find(|path| path.is_file()) {
        return Some(found);
    }
    if depth == MAX_DEPTH {
        return None;
    }
    // A folder that cannot be read holds nothing for anybody.
    let entries = std::fs::read_dir(folder).ok()?;
    let mut below: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_dir()).collect();
    below.sort();
    below.iter().find_map(|folder| find_below(folder, relative, depth + 1))
}

fn fits(stored: &StoredTensor, width: u64) -> bool {
    let known = matches!(stored.element(), Some(DType::F16 | DType::Bf16 | DType::F32 | DType::F64));
    known
        && match *stored.shape.as_slice() {
            [columns] => columns as u64 == width,
            [rows, columns] => rows > 0 && columns as u64 == width,
            _ => false,
        }
}

fn numbers(file: &ModelFile, stored: &StoredTensor, width: usize) -> Result<Vec<Arc<[f32]>>, ModelError> {
    let bytes = &file.read(stored)?;
    let values: Vec<f32> = match stored.element() {
        Some(DType::F16) => each(bytes, |bytes| f16::from_le_bytes(bytes).to_f32()),
        Some(DType::Bf16) => each(bytes, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        Some(DType::F64) => each(bytes, |bytes| f64::from_le_bytes(bytes) as f32),
        _ => each(bytes, f32::from_le_bytes),
    };
    Ok(values.chunks_exact(width.max(1)).map(Arc::from).collect())
}

fn each<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.chunks_exact(N).filter_map(|bytes| bytes.try_into().ok()).map(number).collect()
}
