//! UNets and text encoders whose tensors a client published.

use std::path::Path;

use luna_broker::ErrorKind;
use luna_broker::client::Client;
use luna_broker::service::{ClipKind, ClipPrompt};

use crate::clip;
use crate::golden::{Case, folder, publish, values};
use crate::support::{Place, broker_at, client_at, config, eventually};

/// Publishes by a client that goes, so that only running keeps anything.
fn publish_and_go(place: &Place, name: &str, path: &Path) {
    let publisher = client_at(place);
    publish(&publisher, name, path).unwrap();
    publisher.close();
}

#[test]
fn a_published_unet_gives_the_step_that_its_file_gives() {
    let Some(folder) = folder("unet") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    for (model, file) in [("sd15", "sd15.diffusers"), ("sdxl", "sdxl.bare"), ("quiet", "quiet.bare")] {
        let (path, case) = (folder.join(format!("{file}.safetensors")), Case::of(&folder, model));
        publish_and_go(&place, model, &path);
        let step = |name: &str| values(&client.unet(name).unwrap().step(&case.input()).unwrap());
        let (published, of_file) = (step(model), step(path.to_str().unwrap()));
        assert!(published == of_file, "{model} is another model");
        let off = clip::difference(&published, &case.out("plain"));
        assert!(off <= 2e-5, "{model}: {off:e}");
        let info = client.unet(model).unwrap().info().clone();
        assert_eq!((info.name.as_str(), info.path.as_str(), info.loaded), (model, "", true));
        assert_eq!(client.vae(model).unwrap_err().kind(), ErrorKind::InvalidModel);
    }
}

/// One prompt for each encoder of SDXL, and the reference's results.
fn prompts(folder: &Path) -> (Vec<ClipPrompt>, clip::Numbers) {
    let cases = clip::Cases::of(folder, "sdxl");
    let expected = clip::Numbers { cond: cases.floats("cond"), pooled: cases.floats("pooled") };
    (vec![cases.prompt(ClipKind::L, "l"), cases.prompt(ClipKind::G, "g")], expected)
}

fn encode(client: &Client, names: &[&str], prompts: &[ClipPrompt]) -> luna_broker::Result<clip::Numbers> {
    Ok(clip::numbers(&client.clip(names)?.encode_tokens(prompts)?))
}

#[test]
fn text_encoders_may_be_published_alone_together_and_each_under_a_name_of_its_own() {
    let Some(folder) = clip::golden() else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let (both, expected) = prompts(&folder);
    let [file_l, file_g] = ["clip_l.transformers", "clip_g.transformers"].map(|name| clip::path(&folder, name));
    publish_and_go(&place, "own l", Path::new(&file_l));
    publish_and_go(&place, "own g", Path::new(&file_g));
    publish_and_go(&place, "whole", Path::new(&clip::path(&folder, "sdxl.checkpoint")));
    let of_files = encode(&client, &[&file_l, &file_g], &both).unwrap();
    for names in [vec!["own l", "own g"], vec!["own g", "own l"], vec![&file_l, "own g"], vec!["own l", &file_g]] {
        assert!(encode(&client, &names, &both).unwrap() == of_files, "{names:?}");
    }
    for numbers in [of_files, encode(&client, &["whole"], &both).unwrap()] {
        assert!(clip::difference(&numbers.cond, &expected.cond) <= clip::TOLERANCE);
        assert!(clip::difference(&numbers.pooled, &expected.pooled) <= clip::TOLERANCE);
    }
    let info = client.clip(&["own g", "own l"]).unwrap().info().clone();
    assert_eq!((info.name.as_str(), info.family.as_str(), info.path.as_str()), ("own g + own l", "clip-l+g", ""));
    assert!(info.loaded && info.clip.unwrap().files.is_empty());
    assert_eq!(client.clip(&["own l", "own l"]).unwrap().info().family, "clip-l", "the same twice is one");
    let missing = client.clip(&["own l", "own h"]).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::ModelNotFound);
    assert!(missing.message().contains("own h"), "{missing}");
}

#[test]
fn a_set_of_published_encoders_holds_each_until_it_is_unloaded_and_means_what_was_published_last() {
    let Some(folder) = clip::golden() else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let (both, _) = prompts(&folder);
    let [file_l, file_g] = ["clip_l.transformers", "clip_g.transformers"].map(|name| clip::path(&folder, name));
    let set = ["own l", "own g"];
    publish_and_go(&place, set[0], Path::new(&file_l));
    publish_and_go(&place, set[1], Path::new(&file_g));
    let first = encode(&client, &set, &both).unwrap();
    eventually("the publishers have given them back", || {
        client.status().unwrap().weights.iter().all(|weights| weights.holders.is_empty())
    });
    for (name, file) in [(set[0], &file_g), (set[1], &file_l)] {
        let refused = publish(&client, name, Path::new(file)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InUse, "{name} is run");
    }
    client.unload(set[1]).unwrap();
    eventually("its memory is free", || client.status().unwrap().weights.len() == 1);
    assert_eq!(encode(&client, &set, &both).unwrap_err().kind(), ErrorKind::ModelNotFound);
    // With the other half changed the name of the set means another.
    let other = clip::path(&folder, "clip_g.refiner");
    publish_and_go(&place, set[1], Path::new(&other));
    let second = encode(&client, &set, &both).unwrap();
    assert!(second == encode(&client, &[&file_l, &other], &both).unwrap());
    client.unload(set[1]).unwrap();
    eventually("its memory is free", || client.status().unwrap().weights.len() == 1);
    publish_and_go(&place, set[1], Path::new(&file_g));
    assert!(encode(&client, &set, &both).unwrap() == first);
}
