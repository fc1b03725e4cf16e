use std::path::{Component, Path, PathBuf};

use crate::model::ModelError;

/// More files than anybody keeps in a model folder; bounds what a listing opens.
const MAX_FILES: usize = 20_000;

/// Folders in which files are named without a path. An earlier folder goes before a later one.
#[derive(Debug)]
pub(super) struct Folders {
    folders: Vec<PathBuf>,
    /// What is looked for in them.
    what: &'static str,
    /// The setting that names them.
    flag: &'static str,
    /// What a path is known by.
    resolve: fn(PathBuf) -> PathBuf,
}

impl Folders {
    pub(super) fn of_models(folders: Vec<PathBuf>) -> Self {
        Self { folders, what: "model", flag: "--models", resolve: canonical }
    }

    pub(super) fn of_adapters(folders: Vec<PathBuf>) -> Self {
        Self { folders, what: "adapter", flag: "--loras", resolve: place }
    }

    /// Every file of that name, the one that goes before the others first; of a path, the file itself, whether it is there
    /// or not: its opener knows the reason. The ending `.safetensors` may be left out of a name.
    pub(super) fn all(&self, name: &str) -> Vec<PathBuf> {
        let given = Path::new(name);
        if given.is_absolute() {
            return vec![(self.resolve)(given.to_owned())];
        }
        // A name must stay inside the folders.
        if name.is_empty() || !given.components().all(|part| matches!(part, Component::Normal(_))) {
            return Vec::new();
        }
        let with_extension = format!("{name}.safetensors");
        let candidates = self.folders.iter().flat_map(|folder| [folder.join(given), folder.join(&with_extension)]);
        candidates.filter(|path| path.is_file()).map(self.resolve).collect()
    }

    /// The file of that name or path.
    ///
    /// # Errors
    /// [`ModelError::NotFound`].
    pub(super) fn first(&self, name: &str) -> Result<PathBuf, ModelError> {
        self.all(name).into_iter().next().ok_or_else(|| self.not_found(name))
    }

    pub(super) fn not_found(&self, name: &str) -> ModelError {
        ModelError::NotFound { what: self.what, name: name.to_owned(), searched: self.places() }
    }

    fn places(&self) -> String {
        let mut places: Vec<String> = self.folders.iter().map(|folder| folder.display().to_string()).collect();
        if places.is_empty() {
            places.push(format!("no folder, as none was named with {}", self.flag));
        }
        places.join(", ")
    }

    /// Every safetensors file in the folders and below them, in the order of their paths.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        let mut folders = self.folders.clone();
        while let Some(folder) = folders.pop() {
            let Ok(entries) = std::fs::read_dir(&folder) else { continue };
            for entry in entries.flatten() {
                // Links to folders are not followed: a circle would never end.
                let path = entry.path();
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(path);
                } else if path.extension().is_some_and(|extension| extension == "safetensors") {
                    if files.len() == MAX_FILES {
                        tracing::warn!(
                            limit = MAX_FILES,
                            "the folders hold more files than are looked at for a listing"
                        );
                        return sorted(files);
                    }
                    files.push(path);
                }
            }
        }
        sorted(files)
    }

    /// What a file in the folders is called by.
    pub(super) fn relative_name(&self, path: &Path) -> String {
        let relative = self.folders.iter().find_map(|folder| path.strip_prefix(folder).ok());
        relative.unwrap_or(path).to_string_lossy().into_owned()
    }
}

/// A file in two folders that lie in each other is one file.
fn sorted(mut files: Vec<PathBuf>) -> Vec<PathBuf> {
    files.sort();
    files.dedup();
    files
}

fn canonical(path: PathBuf) -> PathBuf {
    std::fs::canonicalize(&path).unwrap_or(path)
}

/// The folder is looked up, and a link to a file in it is left alone: settings belong beside the link. Two names of one
/// adapter are told by what they contain.
fn place(path: PathBuf) -> PathBuf {
    match (path.parent().map(std::fs::canonicalize), path.file_name()) {
        (Some(Ok(folder)), Some(name)) => folder.join(name),
        _ => path,
    }
}

#[cfg(test)]
mod tests {
    use crate::error::ErrorKind;

    use super::*;

    /// Two folders, of which the first has `one`, and both have `sub/two`.
    fn two_folders() -> (tempfile::TempDir, Folders) {
        let place = tempfile::tempdir().unwrap();
        let folders = ["a", "b"].map(|name| place.path().canonicalize().unwrap().join(name));
        for folder in &folders {
            std::fs::create_dir_all(folder.join("sub")).unwrap();
            std::fs::write(folder.join("sub/two.safetensors"), "").unwrap();
        }
        std::fs::write(folders[0].join("one.safetensors"), "").unwrap();
        std::fs::write(place.path().join("outside.safetensors"), "").unwrap();
        (place, Folders::of_adapters(folders.to_vec()))
    }

    #[test]
    fn an_earlier_folder_goes_first_and_the_ending_may_be_left_out() {
        let (place, folders) = two_folders();
        let root = place.path().canonicalize().unwrap();
        for name in ["sub/two.safetensors", "sub/two"] {
            assert_eq!(folders.first(name).unwrap(), root.join("a/sub/two.safetensors"));
            assert_eq!(folders.all(name).len(), 2);
        }
        assert_eq!(folders.first("one").unwrap(), root.join("a/one.safetensors"));
        let path = root.join("outside.safetensors");
        assert_eq!(folders.first(path.to_str().unwrap()).unwrap(), path, "a path needs no folder");
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_a_model_is_the_model_and_a_link_to_an_adapter_is_at_its_own_place() {
        let (place, adapters) = two_folders();
        let root = place.path().canonicalize().unwrap();
        let link = root.join("a/link.safetensors");
        std::os::unix::fs::symlink(root.join("outside.safetensors"), &link).unwrap();
        std::os::unix::fs::symlink(root.join("a"), root.join("linked")).unwrap();
        let by_path = root.join("linked/link.safetensors");
        for name in ["link", by_path.to_str().unwrap()] {
            assert_eq!(adapters.first(name).unwrap(), link, "settings beside it are in its folder");
            let models = Folders::of_models(adapters.folders.clone());
            assert_eq!(models.first(name).unwrap(), root.join("outside.safetensors"));
        }
    }

    #[test]
    fn what_is_not_there_or_leads_out_is_refused_with_the_folders_that_were_looked_in() {
        let (place, folders) = two_folders();
        let folder = place.path().canonicalize().unwrap().join("b").display().to_string();
        for name in ["none", "", "../outside.safetensors", "sub/../../outside", "."] {
            let error = crate::error::Error::from(folders.first(name).unwrap_err());
            assert_eq!(error.kind(), ErrorKind::ModelNotFound);
            assert!(error.message().contains(&format!("no adapter {name:?}; looked in ")), "{error}");
            assert!(error.message().contains(&folder) && error.remedy().contains("--loras"), "{error}");
        }
        let error = Folders::of_adapters(Vec::new()).first("style").unwrap_err().to_string();
        assert!(error.contains("none was named with --loras"), "{error}");
    }
}
