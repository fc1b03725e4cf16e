use std::path::Path;

use luna_broker::ErrorKind;
use luna_broker::config::BrokerConfig;

use crate::process::{BrokerProcess, serve_command};
use crate::support::{Place, broker_at, client_at, config};
use crate::tiny;
use crate::unet::{Numbers, write_sparse};

fn write_vae(path: &Path) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    tiny::write(path, 8);
}

fn write_unet(path: &Path) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    write_sparse(path, &Numbers::SMALL.entries(), "F16", None);
}

#[test]
fn models_are_found_where_comfyui_looks_for_them() {
    let place = Place::new();
    write_vae(&place.file("comfy/models/vae/sub/tiny.safetensors"));
    write_unet(&place.file("comfy/models/unet/small.safetensors"));
    let paths = place.file("comfy/extra_model_paths.yaml");
    std::fs::write(&paths, "mine:\n  base_path: models\n  vae: vae/\n  unet: |\n    nowhere\n    unet\n").unwrap();
    let _broker = BrokerProcess::start(&place.socket(), &["--comfyui-paths", paths.to_str().unwrap()]);
    let client = client_at(&place);
    assert_eq!(client.vae("sub/tiny.safetensors").unwrap().info().family, "taesd");
    assert_eq!(client.unet("small").unwrap().info().name, "small.safetensors");
    let listed = client.models().unwrap();
    assert!(listed.iter().any(|model| model.path.ends_with("vae/sub/tiny.safetensors")), "{listed:?}");
    let error = client.unet("nothing.safetensors").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ModelNotFound);
    assert!(error.message().contains("models/nowhere") && error.remedy().contains("--comfyui-paths"), "{error}");
}

#[test]
fn a_name_in_two_folders_is_the_file_that_holds_the_part_asked_for() {
    let place = Place::new();
    let folders = ["checkpoints", "vae"].map(|folder| place.file(folder));
    write_unet(&folders[0].join("same.safetensors"));
    write_vae(&folders[1].join("same.safetensors"));
    write_vae(&folders[1].join("vae-only.safetensors"));
    let _broker = broker_at(&place, BrokerConfig { model_folders: folders.to_vec(), ..config() });
    let client = client_at(&place);
    assert!(client.vae("same").unwrap().info().path.ends_with("vae/same.safetensors"));
    assert!(client.unet("same").unwrap().info().path.ends_with("checkpoints/same.safetensors"));
    assert_eq!(client.unet("vae-only").unwrap_err().kind(), ErrorKind::InvalidModel);
}

#[test]
fn a_setting_of_folders_that_cannot_be_used_is_told_by_name_before_anything_is_served() {
    let place = Place::new();
    let broken = place.file("extra_model_paths.yaml");
    std::fs::write(&broken, "mine:\n  loras: [a,\n").unwrap();
    let missing = place.file("missing").display().to_string();
    let cases = [
        ("--comfyui-paths", broken.to_str().unwrap(), "extra_model_paths.yaml, line 3"),
        ("--comfyui-paths", &missing, "missing"),
        ("--loras", &missing, "no such folder"),
        ("--embeddings", &missing, "no such folder"),
    ];
    for (flag, value, word) in cases {
        let said = BrokerProcess::launch(serve_command(&place.socket(), &[flag, value])).err().unwrap();
        assert!(said.contains(flag) && said.contains(word), "{flag} {value}: {said}");
    }
}
