//! Adapters by names, in folders that the broker was told of.

use luna_broker::ErrorKind;
use luna_broker::client::Client;
use luna_broker::service::{AdapterMode, AdapterStack, AdapterUse, RunSettings};

use crate::process::BrokerProcess;
use crate::support::{Place, client_at};
use crate::{Scene, copied, values};

fn stack(name: &str) -> AdapterStack {
    AdapterStack { adapters: vec![AdapterUse { name: name.to_owned(), strength: 1.0 }], mode: AdapterMode::Auto }
}

/// What a step gives by itself and as one of a run.
fn stepped(scene: &Scene, client: &Client, adapters: &AdapterStack) -> Vec<f32> {
    let unet = scene.unet(client);
    let output = unet.call(&scene.input(), adapters, &client.default_options()).unwrap();
    assert!(output.step.adapters[0].layers > 0, "{:?}", output.step.adapters);
    let run = unet.run(RunSettings { adapters: adapters.clone(), ..RunSettings::default() }).unwrap();
    let alone = values(&output.tensor);
    assert_eq!(values(&run.step(&scene.step(), &[0, 1]).unwrap()), alone);
    alone
}

#[test]
fn a_bare_name_is_the_file_in_the_folders_of_flags_and_of_comfyuis_paths() {
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    for folder in ["flagged", "comfy/models/Lora/sub", "comfy/models/LyCORIS"] {
        std::fs::create_dir_all(place.file(folder)).unwrap();
    }
    // Everybody's file of that name is another adapter.
    for (name, adapter) in [
        ("flagged/style.safetensors", "lora"),
        ("comfy/models/Lora/style.safetensors", "loha"),
        ("comfy/models/Lora/line.safetensors", "loha"),
        ("comfy/models/LyCORIS/line.safetensors", "lokr"),
        ("comfy/models/Lora/sub/ink.v1.safetensors", "lokr"),
        ("comfy/models/LyCORIS/glass.safetensors", "locon"),
    ] {
        copied(&scene.file(adapter), place.folder.path(), name);
    }
    let paths = place.file("comfy/extra_model_paths.yaml");
    let text = "a1111:\n  base_path: models\n  loras: |\n    Lora\n    LyCORIS\n    nowhere\n";
    std::fs::write(&paths, text).unwrap();
    let flags = ["--comfyui-paths", paths.to_str().unwrap(), "--loras", place.file("flagged").to_str().unwrap()]
        .map(str::to_owned);
    let _broker = BrokerProcess::start(&place.socket(), &flags.each_ref().map(String::as_str));
    let client = client_at(&place);
    let expected = |adapter: &str| stepped(&scene, &client, &stack(scene.file(adapter).to_str().unwrap()));
    let [lora, loha, lokr, locon] = ["lora", "loha", "lokr", "locon"].map(expected);
    for (name, expected, what) in [
        ("style", &lora, "a flag's folder goes before ComfyUI's"),
        ("style.safetensors", &lora, "with the ending"),
        ("line", &loha, "the earlier of ComfyUI's folders"),
        ("sub/ink.v1", &lokr, "below a folder"),
        ("glass.safetensors", &locon, "in the second of ComfyUI's folders"),
    ] {
        assert!(stepped(&scene, &client, &stack(name)) == *expected, "{name}: {what}");
    }
    // Its place is no folder of models, and those of models are none of adapters.
    assert_eq!(client.unet("style").unwrap_err().kind(), ErrorKind::ModelNotFound);
    for name in ["ink.v1", "../outside", "nothing"] {
        let error = scene.unet(&client).call(&scene.input(), &stack(name), &client.default_options()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ModelNotFound, "{name}: {error}");
        assert!(error.message().contains(name) && error.message().contains("models/LyCORIS"), "{error}");
        assert!(error.remedy().contains("--loras"), "{error}");
    }
}
