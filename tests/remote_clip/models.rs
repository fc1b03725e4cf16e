use luna_broker::client::CallOptions;
use luna_broker::config::BrokerConfig;
use luna_broker::protocol::ModelReport;
use luna_broker::service::{ClipKind, Service};
use luna_broker::{ErrorKind, Result};

use crate::config;
use crate::golden::{Cases, TOLERANCE, difference, encoders, golden, numbers, path};
use crate::support::{Place, broker_at, client_at};

fn kinds(report: &ModelReport) -> Vec<(ClipKind, u64)> {
    let clip = report.clip.as_ref().expect("text encoders");
    clip.encoders.iter().map(|encoder| (encoder.kind, encoder.width)).collect()
}

#[test]
fn reports_say_which_encoders_a_set_has_and_from_which_files() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let _broker = broker_at(&place, BrokerConfig { model_folders: vec![folder.clone()], ..config() });
    let client = client_at(&place);
    let clip = client.clip(&["words.g", "words.l.safetensors"]).unwrap();
    let info = clip.info();
    assert_eq!(kinds(info), [(ClipKind::L, 64), (ClipKind::G, 64)]);
    assert_eq!((info.service, info.family.as_str(), info.loaded), (Service::Clip, "clip-l+g", false));
    let files = &info.clip.as_ref().unwrap().files;
    assert!(files.len() == 2 && files.iter().all(|file| file.contains("words.")), "{files:?}");
    let listed = client.models().unwrap();
    let of = |name: &str| listed.iter().find(|model| model.name == format!("{name}.safetensors")).unwrap();
    assert_eq!(kinds(of("sdxl.checkpoint")), [(ClipKind::L, 128), (ClipKind::G, 64)]);
    assert_eq!(of("clip_h24.one-less").clip.as_ref().unwrap().encoders[0].layers, 24);
    assert!(listed.iter().any(|model| model.name.contains(" + ")), "the set that was asked for");
    assert!(client.status().unwrap().lanes.iter().any(|lane| lane.service == Service::Clip));
}

#[test]
fn a_set_is_loaded_once_and_given_up_by_the_name_of_each_of_its_files() -> Result<()> {
    let Some(folder) = golden() else { return Ok(()) };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let cases = Cases::of(&folder, "sdxl");
    let prompts = [cases.prompt(ClipKind::L, "l"), cases.prompt(ClipKind::G, "g")];
    let files = [path(&folder, "clip_g.transformers"), path(&folder, "clip_l.transformers")];
    let loaded = || -> Vec<String> {
        let models = client.status().unwrap().models.into_iter();
        models.filter(|model| model.loaded).map(|model| model.name).collect()
    };
    let set = "clip_g.transformers.safetensors + clip_l.transformers.safetensors";
    for file in &files {
        let reports = client.load_clip(&files, &CallOptions::default())?;
        assert!(reports.len() == 1 && reports[0].loaded && reports[0].bytes > 0, "{reports:?}");
        let clip = encoders(&client, &folder, &["clip_l.transformers", "clip_g.transformers"]);
        assert!(difference(&numbers(&clip.encode_tokens(&prompts)?).cond, &cases.floats("cond")) <= TOLERANCE);
        assert_eq!(loaded(), [set], "the same one, in whatever order it is named");
        client.unload(file)?;
        assert_eq!(loaded(), [""; 0]);
        assert!(clip.encode_tokens(&prompts).is_ok(), "it is loaded anew");
    }
    Ok(())
}

#[test]
fn a_checkpoints_text_encoders_are_one_of_its_parts() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let path = path(&folder, "sdxl.checkpoint");
    let loaded = client.load(&path).unwrap();
    assert_eq!(loaded.iter().map(|part| part.service).collect::<Vec<_>>(), [Service::Clip]);
    assert!(loaded[0].loaded);
    client.unload(&path).unwrap();
    assert!(client.status().unwrap().models.iter().all(|model| !model.loaded));
    // The same by the service alone.
    assert!(client.load_with(Some(Service::Clip), &path, &CallOptions::default()).unwrap()[0].loaded);
}

#[test]
fn files_that_are_no_set_are_refused_by_what_they_are() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let full = |names: &[&str]| -> Vec<String> { names.iter().map(|name| path(&folder, name)).collect() };
    let cases = [
        (full(&["clip_l.float", "clip_h.checkpoint"]), ErrorKind::Unsupported, "clip_l, clip_h"),
        (full(&["clip_l.float", "clip_l.transformers"]), ErrorKind::Unsupported, "clip_l, clip_l"),
        (full(&["sdxl.checkpoint", "clip_g.transformers"]), ErrorKind::Unsupported, "clip_g, clip_g"),
        (full(&["clip_l.float", "nothing"]), ErrorKind::ModelNotFound, "nothing"),
        (full(&["clip_l.io"]), ErrorKind::InvalidModel, "text encoder"),
        (full(&["a", "b", "c", "d", "e"]), ErrorKind::Unsupported, "5 files"),
        (vec!["../clip_l".to_owned()], ErrorKind::ModelNotFound, "clip_l"),
        (Vec::new(), ErrorKind::ModelNotFound, ""),
    ];
    for (names, kind, says) in cases {
        let error = client.clip(&names).unwrap_err();
        println!("{names:?}: {error} ({})", error.remedy());
        assert_eq!(error.kind(), kind, "{names:?}: {error}");
        assert!(error.message().contains(says) && !error.remedy().is_empty(), "{names:?}: {error}");
    }
    assert!(client.clip(&full(&["clip_l.float"])).is_ok(), "the session goes on");
    assert_eq!(client.vae(&path(&folder, "clip_l.float")).unwrap_err().kind(), ErrorKind::InvalidModel);
}

#[test]
fn a_file_that_is_replaced_is_noticed_and_loaded_with_the_next_call() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let (client, cases) = (client_at(&place), Cases::of(&folder, "clip_l"));
    let [own, other] = ["clip.safetensors", "other"].map(|name| place.file(name));
    std::fs::copy(folder.join("clip_l.transformers.safetensors"), &own).unwrap();
    let clip = client.clip(&[own.to_str().unwrap()]).unwrap();
    let prompt = [cases.prompt(ClipKind::L, "short")];
    assert!(clip.encode_tokens(&prompt).is_ok());
    std::fs::copy(folder.join("clip_l.float.safetensors"), &other).unwrap();
    std::fs::rename(&other, &own).unwrap();
    assert_eq!(clip.encode_tokens(&prompt).unwrap_err().kind(), ErrorKind::Stale);
    let got = numbers(&clip.encode_tokens(&prompt).unwrap());
    assert!(difference(&got.cond, &cases.floats("short.cond")) <= TOLERANCE);
}
