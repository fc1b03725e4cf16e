//! ComfyUI's `extra_model_paths.yaml`, read as ComfyUI reads it.

use std::path::{Path, PathBuf};

use luna_broker::{Error, ErrorKind};
use saphyr::{LoadableYamlNode, MarkedYaml, ScanError};

use crate::folders::{Folders, Kind, absolute};

/// ComfyUI's names for folders of what this broker runs, with the older names that it still takes. Folders of all else are
/// left to ComfyUI.
const KINDS: [(&str, Kind); 9] = [
    ("checkpoints", Kind::Models),
    ("diffusion_models", Kind::Models),
    ("unet", Kind::Models),
    ("vae", Kind::Models),
    ("vae_approx", Kind::Models),
    ("text_encoders", Kind::Models),
    ("clip", Kind::Models),
    ("loras", Kind::Adapters),
    ("embeddings", Kind::Embeddings),
];

/// Adds the folders that the file at `path` names. A folder that is not there is no error, as in ComfyUI: it may come later.
///
/// # Errors
/// A file that cannot be read, or that ComfyUI would not understand.
pub(crate) fn read(path: &Path, folders: &mut Folders) -> Result<(), Error> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        let message = format!("--comfyui-paths {}: {error}", path.display());
        Error::new(ErrorKind::Configuration, message, "name ComfyUI's extra_model_paths.yaml")
    })?;
    let file = PathsFile { path, folder: absolute(path).parent().map(Path::to_owned).unwrap_or_default() };
    file.add(&text, folders)
}

/// The file as messages speak of it, and the folder that it is in.
struct PathsFile<'a> {
    path: &'a Path,
    folder: PathBuf,
}

impl PathsFile<'_> {
    fn add(&self, text: &str, folders: &mut Folders) -> Result<(), Error> {
        let documents = MarkedYaml::load_from_str(text).map_err(|error| self.no_yaml(&error))?;
        let Some(document) = documents.first().filter(|document| !document.data.is_null()) else { return Ok(()) };
        let sections = document.data.as_mapping().ok_or_else(|| {
            self.wrong(document, "sections are expected, each a name with a colon and what belongs to it below")
        })?;
        for (name, section) in sections {
            if !section.data.is_null() {
                self.add_section(name.data.as_str().unwrap_or("?"), section, folders)?;
            }
        }
        Ok(())
    }

    fn add_section(&self, name: &str, section: &MarkedYaml<'_>, folders: &mut Folders) -> Result<(), Error> {
        let Some(entries) = section.data.as_mapping() else {
            return Err(self.wrong(section, &format!("section {name:?} holds no keys such as checkpoints or loras")));
        };
        let base = section.data.as_mapping_get("base_path").filter(|base| !base.data.is_null());
        let base = base.map(|base| self.text("base_path", base).map(expand)).transpose()?.unwrap_or_default();
        let base = self.folder.join(base);
        let is_default = section.data.as_mapping_get("is_default").is_some_and(is_true);
        for (key, value) in entries {
            let known = KINDS.iter().find(|(name, _)| key.data.as_str() == Some(name));
            let Some((key, kind)) = known.filter(|_| !value.data.is_null()) else { continue };
            for line in self.text(key, value)?.split('\n').filter(|line| !line.is_empty()) {
                let folder: PathBuf = base.join(line).components().collect();
                tracing::info!(kind = key, folder = %folder.display(), "folder from ComfyUI's paths");
                let known = folders.of_kind(*kind);
                match is_default {
                    true => known.insert(0, folder),
                    false => known.push(folder),
                }
            }
        }
        Ok(())
    }

    fn text<'a>(&self, key: &str, value: &'a MarkedYaml<'_>) -> Result<&'a str, Error> {
        let reason = || format!("{key} is neither a path nor a block of paths");
        value.data.as_str().ok_or_else(|| self.wrong(value, &reason()))
    }

    fn wrong(&self, at: &MarkedYaml<'_>, reason: &str) -> Error {
        self.refused(at.span.start.line(), reason)
    }

    fn no_yaml(&self, error: &ScanError) -> Error {
        self.refused(error.marker().line(), error.info())
    }

    fn refused(&self, line: usize, reason: &str) -> Error {
        let message = format!("--comfyui-paths {}, line {line}: {reason}", self.path.display());
        let remedy = "write it as ComfyUI's extra_model_paths.yaml.example shows: `loras: path`, or `loras: |` with a path \
                      on each line below";
        Error::new(ErrorKind::Configuration, message, remedy)
    }
}

/// With `~` and variables of the environment replaced; what is not set stays as it is written.
fn expand(path: &str) -> PathBuf {
    let home = || std::env::home_dir().and_then(|home| home.into_os_string().into_string().ok());
    let variable = |name: &str| std::env::var(name).ok();
    PathBuf::from(shellexpand::full_with_context_no_errors(path, home, variable).into_owned())
}

/// What ComfyUI's older YAML takes for yes, too.
fn is_true(value: &MarkedYaml<'_>) -> bool {
    let is_yes = |text: &str| ["yes", "on", "true"].iter().any(|yes| text.eq_ignore_ascii_case(yes));
    value.data.as_bool().unwrap_or_else(|| value.data.as_str().is_some_and(is_yes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str, folders: &mut Folders) -> Result<(), Error> {
        PathsFile { path: Path::new("extra_model_paths.yaml"), folder: PathBuf::from("/comfy") }.add(text, folders)
    }

    fn folders(text: &str) -> Folders {
        let mut folders = Folders::default();
        read_text(text, &mut folders).unwrap();
        folders
    }

    fn paths(names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn each_key_names_folders_of_its_kind_in_the_order_of_the_file() {
        let found = folders(
            "a1111:\n    base_path: /a1111\n    checkpoints: models/Stable-diffusion\n    configs: models/Stable-diffusion\n    \
             vae: models/VAE/\n    loras: |\n         models/Lora\n         models/LyCORIS\n    embeddings: embeddings\n    \
             controlnet: models/ControlNet\nempty:\nother:\n    unet: relative\n    clip: /absolute/clip\n",
        );
        let models = ["/a1111/models/Stable-diffusion", "/a1111/models/VAE", "/comfy/relative", "/absolute/clip"];
        assert_eq!(found.models, paths(&models));
        assert_eq!(found.adapters, paths(&["/a1111/models/Lora", "/a1111/models/LyCORIS"]));
        assert_eq!(found.embeddings, paths(&["/a1111/embeddings"]));
    }

    #[test]
    fn a_base_path_is_relative_to_the_file_and_may_name_home_and_variables() {
        let home = std::env::home_dir().unwrap();
        assert_eq!(folders("a:\n  base_path: ..\n  loras: l\n").adapters, paths(&["/comfy/../l"]));
        assert_eq!(folders("a:\n  base_path: ~/models\n  loras: l\n").adapters, [home.join("models/l")]);
        let package = env!("CARGO_MANIFEST_DIR");
        let expanded = folders("a:\n  base_path: ${CARGO_MANIFEST_DIR}/x\n  loras: l\n").adapters;
        if std::env::var_os("CARGO_MANIFEST_DIR").is_some() {
            assert_eq!(expanded, [Path::new(package).join("x/l")]);
        }
        let unset = folders("a:\n  base_path: /$LUNA_BROKER_NO_SUCH_VARIABLE\n  loras: l\n").adapters;
        assert_eq!(unset, paths(&["/$LUNA_BROKER_NO_SUCH_VARIABLE/l"]));
    }

    #[test]
    fn folders_of_a_default_section_go_before_all_others() {
        for yes in ["true", "yes", "True"] {
            let mut found = Folders { adapters: paths(&["/flag"]), ..Folders::default() };
            read_text(&format!("a:\n  loras: /last\nb:\n  is_default: {yes}\n  loras: /first\n"), &mut found).unwrap();
            assert_eq!(found.adapters, paths(&["/first", "/flag", "/last"]));
        }
    }

    #[test]
    fn what_is_no_such_file_is_refused_by_name_and_line() {
        let broken = [
            ("a:\n  loras: [one\n", 3, ""),
            ("a:\n  loras: x\n  loras: y\n", 3, "duplicated"),
            ("a:\n  base_path: x\n  loras:\n    - one\n", 4, "loras"),
            ("a:\n  base_path: 7\n", 2, "base_path"),
            ("a: models\n", 1, "\"a\""),
            ("- models\n", 1, "sections"),
        ];
        for (text, line, word) in broken {
            let error = read_text(text, &mut Folders::default()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Configuration);
            let place = format!("extra_model_paths.yaml, line {line}: ");
            assert!(error.message().contains(&place) && error.message().contains(word), "{text:?}: {error}");
            assert!(error.remedy().contains("extra_model_paths.yaml.example"));
        }
    }

    #[test]
    fn a_file_that_names_nothing_is_none_the_worse() {
        for text in ["", "# only words\n", "a:\n  loras:\n", "a:\n"] {
            assert_eq!(folders(text), Folders::default(), "{text:?}");
        }
    }
}
