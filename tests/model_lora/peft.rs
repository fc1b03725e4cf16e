//! What peft and diffusers save says in other places than its tensors how strong it is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use luna_broker::error::{Error, ErrorKind};
use luna_broker::model::{Adapter, AdapterFile, AdapterKind, ModelError, ModelFile};
use tempfile::TempDir;

use crate::{MODES, Scene, TOLERANCE, difference, for_all_rows, read};

const PEFT: &str = "adapter_model.safetensors";
const SETTINGS: &str = "adapter_config.json";
/// As pipelines and models of diffusers save it.
const DIFFUSERS: [&str; 2] = ["pytorch_lora_weights.safetensors", "bare.safetensors"];

fn kind(name: &str) -> AdapterKind {
    match name.split('-').next() {
        Some("dora") => AdapterKind::Dora,
        Some("loha") => AdapterKind::Loha,
        Some("lokr") => AdapterKind::Lokr,
        _ => AdapterKind::Lora,
    }
}

/// Files of an adapter, each with the whole of it.
fn files(scene: &Scene, name: &str) -> Vec<PathBuf> {
    let folder = scene.folder.join(format!("{}.{name}", scene.name));
    let all = [PEFT].into_iter().chain(DIFFUSERS).map(|file| folder.join(file));
    all.filter(|path| path.is_file()).collect()
}

#[test]
fn every_file_that_peft_and_diffusers_save_does_what_it_does_in_peft() {
    let mut seen = 0;
    for scene in ["sd15", "sdxl"].into_iter().filter_map(|name| Scene::by("peft", name)) {
        let results = scene.tensors.iter().filter_map(|(name, out)| Some((name.strip_suffix(".out")?, out)));
        for (name, expected) in results.filter(|(name, _)| *name != "plain") {
            for path in files(&scene, name) {
                let file = read(&path);
                for mode in MODES {
                    let adapters = [Adapter { file: &file, strength: 1.0 }];
                    let adapted = scene.unet.adapt(&adapters, mode).unwrap_or_else(|error| panic!("{error}"));
                    let report = adapted.reports[0].clone();
                    let off = difference(&scene.run(&for_all_rows(adapted)), expected);
                    println!("{} {mode:?} {off:.1e}", path.display());
                    assert!(off <= TOLERANCE, "{} {mode:?}: {off:e}", path.display());
                    assert_eq!(report.unknown.count, 0, "{report:?}");
                    assert_eq!(report.kinds, [(kind(name), report.layers)], "{}", path.display());
                }
                seen += 1;
            }
        }
    }
    assert!(seen == 0 || seen > 15, "only {seen} files");
}

/// A copy of an adapter as peft saves it, with these settings or none.
fn saved(scene: &Scene, name: &str, settings: Option<&str>) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join(PEFT);
    let own = scene.folder.join(format!("{}.{name}", scene.name)).join(PEFT);
    std::fs::copy(own, &path).expect("a copy");
    if let Some(settings) = settings {
        std::fs::write(folder.path().join(SETTINGS), settings).expect("it can be written");
    }
    (folder, path)
}

fn open(path: &Path) -> Result<AdapterFile, ModelError> {
    AdapterFile::read(Arc::new(ModelFile::open(path)?))
}

#[test]
fn without_settings_an_adapter_is_taken_by_a_factor_of_one() {
    let Some(scene) = Scene::by("peft", "sd15") else { return };
    // Both are the rank.
    let settings = r#"{"lora_alpha": 4, "r": 4}"#;
    let with = |(_folder, path): (TempDir, PathBuf)| {
        scene.with(&[Adapter { file: &open(&path).expect("an adapter"), strength: 1.0 }], MODES[1])
    };
    let [none, one] = [None, Some(settings)].map(|settings| with(saved(&scene, "lora", settings)));
    assert_eq!(none, one);
    assert!(difference(&none, &scene.tensors["lora.out"]) > 1e-2, "what it was trained with is another");
}

#[test]
fn settings_that_cannot_be_understood_are_an_error_of_their_own_file() {
    let Some(scene) = Scene::by("peft", "sd15") else { return };
    let long = format!("{}{{}}", " ".repeat(1 << 20));
    for (settings, says) in [
        ("", "EOF"),
        (r#"{"lora_alpha": "ten"}"#, "lora_alpha"),
        (r#"{"alpha_pattern": {"(": 1}}"#, "alpha_pattern"),
        (r#"{"peft_type": "VERA"}"#, "VERA"),
        (&long, "bytes"),
    ] {
        let (_folder, path) = saved(&scene, "lora", Some(settings));
        let error = open(&path).expect_err(says);
        let words = error.to_string();
        assert!(words.contains(SETTINGS) && words.contains(says), "{says}: {words}");
        assert_eq!(Error::from(error).kind(), ErrorKind::InvalidModel, "{says}");
    }
    // Diffusers' are in the header: of another file, so that the rest of it is as it was.
    let own = scene.folder.join("sd15.lora").join(DIFFUSERS[0]);
    let bytes = std::fs::read(own).expect("a file");
    let broken = bytes.windows(6).position(|part| part == b"_alpha").expect("its setting");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("small.safetensors");
    let mut bytes = bytes;
    let at = broken + bytes[broken..].iter().position(|byte| *byte == b':').expect("a value") + 1;
    bytes[at] = b'-';
    bytes[at + 1] = b'-';
    std::fs::write(&path, bytes).expect("it can be written");
    let error = open(&path).expect_err("no number");
    assert!(error.to_string().contains("lora_adapter_metadata in its header"), "{error}");
    assert_eq!(Error::from(error).kind(), ErrorKind::InvalidModel);
}

#[test]
fn settings_belong_to_the_file_they_are_beside() {
    let Some(scene) = Scene::by("peft", "sd15") else { return };
    let (folder, path) = saved(&scene, "lora", None);
    let settings = folder.path().join(SETTINGS);
    let digests = [None, Some(r#"{"lora_alpha": 2}"#), Some(r#"{"lora_alpha": 2.5}"#)].map(|text| {
        let before = ModelFile::open(&path).expect("a file");
        before.check_unchanged().expect("nothing happened yet");
        if let Some(text) = text {
            std::fs::write(&settings, text).expect("it can be written");
            let changed = before.check_unchanged();
            assert!(matches!(&changed, Err(ModelError::Changed { path }) if path.ends_with(SETTINGS)), "{changed:?}");
        }
        ModelFile::open(&path).expect("a file").digest().expect("it can be read")
    });
    assert!(digests[0] != digests[1] && digests[1] != digests[2], "what was made with others is not used");
    // Beside a file of another name they are not its own.
    let other = folder.path().join("style.safetensors");
    std::fs::copy(&path, &other).expect("a copy");
    assert_eq!(ModelFile::open(&other).expect("a file").digest().expect("it can be read"), digests[0]);
}
