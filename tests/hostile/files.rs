//! Files that are not what they say, and names that lead nowhere.

use std::path::{Path, PathBuf};

use luna_broker::ErrorKind;
use luna_broker::protocol::Operation;
use luna_broker::service::Service;

use crate::Expected;
use crate::raw::Raw;
use crate::scene::Scene;

/// A safetensors file of this header with `data` bytes behind it.
fn stored(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
}

fn tensor(name: &str, shape: &str, start: usize, end: usize) -> String {
    format!("{name:?}:{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[{start},{end}]}}")
}

/// Asks for the model in every way; each must fail as expected and name it.
fn refused(scene: &Scene, case: &str, name: &str, shown: &str, expected: &Expected) {
    scene.check_bystander();
    let described = scene.bystander.vae(name).map(|_| ()).unwrap_err().into_fault();
    let loaded = scene.bystander.load(name).map(|_| ()).unwrap_err().into_fault();
    for fault in [described, loaded] {
        expected.check(case, &fault);
        assert!(fault.message.contains(shown), "{case} does not name {shown}: {fault}");
    }
    scene.check_bystander();
}

#[test]
fn a_file_that_is_no_usable_model_is_refused_by_name_with_a_way_out() {
    let scene = Scene::new(&[]);
    let weight = |end| format!("{{{}}}", tensor("decoder.conv_in.weight", "[4]", 0, end));
    let two = format!("{{{},{}}}", tensor("a", "[4]", 0, 16), tensor("b", "[4]", 8, 24));
    let huge = format!("{{{}}}", tensor("a", "[18446744073709551615,18446744073709551615]", 0, 16));
    let clip = format!("{{{}}}", tensor("text_model.embeddings.weight", "[4]", 0, 16));
    let cases: [(&str, &str, Vec<u8>, &'static [&'static str]); 14] = [
        ("an empty file", "empty.safetensors", Vec::new(), &["too few"]),
        ("too short for a header", "short.safetensors", vec![1; 7], &["too few"]),
        (
            "a header beyond the file",
            "beyond.safetensors",
            u64::MAX.to_le_bytes().to_vec(),
            &["not a valid safetensors"],
        ),
        ("a header longer than the file", "long.safetensors", stored("{}", 0)[..9].to_vec(), &["longer than the file"]),
        ("a header that is no JSON", "nojson.safetensors", stored("{\"a\":", 16), &["not a valid safetensors"]),
        (
            "a header that is no text",
            "notext.safetensors",
            [&4u64.to_le_bytes()[..], &[0xff; 4]].concat(),
            &["not a valid"],
        ),
        ("a truncated file", "truncated.safetensors", stored(&weight(16), 15), &["truncated"]),
        ("bytes behind the last tensor", "appended.safetensors", stored(&weight(16), 17), &["bytes appended"]),
        ("a shape that is not that of the bytes", "shape.safetensors", stored(&weight(12), 12), &["not a valid"]),
        ("overlapping tensors", "overlap.safetensors", stored(&two, 24), &["not a valid"]),
        ("a shape without end", "vast.safetensors", stored(&huge, 16), &["not a valid"]),
        ("a file without a VAE", "clip.safetensors", stored(&clip, 16), &["no VAE", "text_model"]),
        ("a pickle by name", "model.ckpt", b"anything".to_vec(), &["pickle", "runs code"]),
        ("a pickle by content", "zipped.safetensors", b"PK\x03\x04 and so on".to_vec(), &["pickle", "runs code"]),
    ];
    for (case, name, bytes, says) in cases {
        let path = scene.place.file(name);
        std::fs::write(&path, bytes).unwrap();
        let expected = Expected::new(ErrorKind::InvalidModel, says).with_remedy();
        refused(&scene, case, &path.to_string_lossy(), name, &expected);
    }
    assert!(scene.bystander.status().unwrap().models.iter().all(|model| model.name.starts_with("builtin:")));
}

#[test]
fn a_path_that_is_no_file_is_refused_by_name() {
    let scene = Scene::new(&[]);
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    let missing = text(scene.place.file("missing.safetensors"));
    let expected = Expected::new(ErrorKind::ModelNotFound, &[]).with_remedy();
    refused(&scene, "a missing file", &missing, "missing.safetensors", &expected);
    let folder = text(scene.place.folder.path().to_owned());
    let expected = Expected::new(ErrorKind::InvalidModel, &["directory"]).with_remedy();
    refused(&scene, "a directory", &folder, &folder, &expected);
    let pipe = scene.place.file("pipe.safetensors");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    let expected = Expected::new(ErrorKind::Io, &["not a regular file"]).with_remedy();
    refused(&scene, "a pipe that nobody writes to", &text(pipe), "pipe.safetensors", &expected);
    let expected = Expected::new(ErrorKind::Io, &[]).with_remedy();
    refused(&scene, "a device", "/dev/zero", "/dev/zero", &expected);
    refused(&scene, "the broker's own socket", &scene.place.socket(), "broker.sock", &expected);
    refused(&scene, "a name with an end in it", "/tmp/a\0b", "/tmp/a", &expected);
}

#[test]
fn a_name_does_not_lead_out_of_the_model_folders() {
    let folder = tempfile::tempdir().unwrap();
    let outside = folder.path().join("outside.safetensors");
    std::fs::write(&outside, stored("{}", 0)).unwrap();
    let models = folder.path().join("models");
    std::fs::create_dir(&models).unwrap();
    let scene = Scene::new(&["--models", &models.to_string_lossy()]);
    let expected = Expected::new(ErrorKind::ModelNotFound, &["looked in", "models"]).with_remedy();
    // Without a client around it, which would look for the name where it is itself.
    let mut raw = Raw::inline(&scene.place.socket());
    for name in
        ["unheard-of", "../outside.safetensors", "a/../../outside.safetensors", "..", ".", "", " ", "builtin:other"]
    {
        let model = name.to_owned();
        let describe = Operation::Describe { service: Service::Vae, model: model.clone() };
        for operation in [describe, Operation::Load { service: None, model }] {
            let fault = raw.fault(operation, &[]);
            expected.check("a name that leads nowhere", &fault);
            assert!(fault.message.contains(&format!("{name:?}")), "{fault}");
        }
    }
    scene.check_bystander();
    assert!(Path::new(&outside).exists());
}

#[cfg(feature = "torch")]
#[test]
fn a_file_that_changes_while_it_is_in_use_is_noticed_and_loaded_anew() {
    use crate::tiny::{self, Batch, digest};

    let scene = Scene::new(&[]);
    let path = scene.place.file("tiny.safetensors");
    tiny::write(&path, 16);
    let vae = scene.bystander.vae(&path.to_string_lossy()).unwrap();
    let decode = || vae.decode(Batch::new(1, 8, 1).input()).map(|image| digest(image.bytes().unwrap()));
    let first = decode().unwrap();
    // By renaming another file over it, as one replaces a file in use.
    let other = scene.place.file("other.safetensors");
    tiny::write(&other, 32);
    std::fs::rename(&other, &path).unwrap();
    let fault = decode().unwrap_err().into_fault();
    Expected::new(ErrorKind::Stale, &["tiny.safetensors", "changed"]).with_remedy().check("a new file", &fault);
    assert_ne!(decode().unwrap(), first, "the new file's weights are used");
    // Gone altogether.
    std::fs::remove_file(&path).unwrap();
    assert_eq!(decode().unwrap_err().kind(), ErrorKind::Stale);
    assert_eq!(decode().unwrap_err().kind(), ErrorKind::ModelNotFound);
    scene.check_bystander();
}

#[cfg(feature = "torch")]
#[test]
fn a_file_that_is_replaced_while_unloaded_is_loaded_anew_at_once() {
    use crate::tiny;

    let scene = Scene::new(&[]);
    let path = scene.place.file("tiny.safetensors");
    let name = path.to_string_lossy().into_owned();
    // Another spelling of the same path is another name of the same model.
    let spelled = format!("/{name}");
    for (width, name) in [(16, &name), (24, &name), (32, &spelled)] {
        let other = scene.place.file("other.safetensors");
        tiny::write(&other, width);
        let bytes = std::fs::metadata(&other).unwrap().len();
        std::fs::rename(&other, &path).unwrap();
        let report = scene.bystander.load(name).unwrap().remove(0);
        assert!(report.loaded && report.bytes < bytes && report.bytes > bytes / 2, "{report:?} of {bytes} bytes");
        assert_eq!(scene.broker.mapped_but_deleted(), 0, "the file that was replaced is let go");
        scene.bystander.unload(name).unwrap();
    }
    assert_eq!(scene.bystander.status().unwrap().models.iter().filter(|model| model.path == name).count(), 1);
    scene.check_bystander();
}

#[cfg(feature = "torch")]
#[test]
fn a_model_among_thousands_of_other_files_is_listed() {
    let folder = tempfile::tempdir().unwrap();
    for at in 0..1500 {
        std::fs::write(folder.path().join(format!("lora-{at}.safetensors")), stored("{}", 0)).unwrap();
    }
    // Folders inside are looked at after the files beside them.
    std::fs::create_dir(folder.path().join("vae")).unwrap();
    crate::tiny::write(&folder.path().join("vae/tiny.safetensors"), 16);
    let scene = Scene::new(&["--models", &folder.path().to_string_lossy()]);
    let listed = scene.bystander.models().unwrap();
    assert!(listed.iter().any(|model| model.name == "tiny.safetensors"), "{listed:?}");
}
