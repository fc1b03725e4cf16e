//! Adapters as peft saves them, by their paths.

use std::path::Path;

use luna_broker::client::Client;
use luna_broker::service::{AdapterMode, AdapterStack, AdapterUse};
use luna_broker::{ErrorKind, Result};

use crate::clip::difference;
use crate::golden::{Case, folder, values};
use crate::support::{Place, broker_at, client_at, config};

const SETTINGS: &str = "adapter_config.json";

#[test]
fn an_adapter_is_as_strong_as_the_settings_beside_it_say_now() {
    let Some(folder) = folder("peft") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let case = Case::of(&folder, "sd15");
    let model = folder.with_file_name("unet").join("sd15.diffusers.safetensors");
    let step = |client: &Client, adapter: &Path| -> Result<Vec<f32>> {
        let adapters = vec![AdapterUse { name: adapter.to_str().unwrap().to_owned(), strength: 1.0 }];
        let stack = AdapterStack { adapters, mode: AdapterMode::Side };
        let unet = client.unet(model.to_str().unwrap())?;
        Ok(values(&unet.call(&case.input(), &stack, &client.default_options())?.tensor))
    };
    // As caches of downloads have it: the files are elsewhere, under names that say nothing.
    let own = folder.join("sd15.patterns");
    let files = ["adapter_model.safetensors", SETTINGS].map(|name| {
        let (blob, link) = (place.file(&format!("{}-blob", name.len())), place.file(name));
        std::fs::copy(own.join(name), &blob).unwrap();
        std::os::unix::fs::symlink(&blob, &link).unwrap();
        link
    });
    let off = difference(&step(&client, &files[0]).unwrap(), &case.out("patterns"));
    assert!(off <= 3e-5, "{off:e}");
    std::fs::remove_file(&files[1]).unwrap();
    let without = step(&client, &files[0]).unwrap();
    assert!(difference(&without, &case.out("patterns")) > 1e-2, "settings that are gone do not count");
    std::fs::write(&files[1], "{").unwrap();
    let error = step(&client, &files[0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidModel);
    assert!(error.message().contains(SETTINGS), "{error}");
    std::fs::write(&files[1], std::fs::read(own.join(SETTINGS)).unwrap()).unwrap();
    assert!(difference(&step(&client, &files[0]).unwrap(), &case.out("patterns")) <= 3e-5);
}
