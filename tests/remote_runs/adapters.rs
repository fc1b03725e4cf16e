//! Adapters of single steps: results, what is kept and read again, and what is refused.

use std::path::Path;

use luna_broker::client::{CallOptions, Client};
use luna_broker::service::{AdapterMode, AdapterStack, AdapterTaken, AdapterUse};
use luna_broker::{ErrorKind, Result};
use safetensors::tensor::{Dtype, TensorView};

use crate::config;
use crate::support::{Place, broker_at, client_at};
use crate::{MERGED, Scene, TOLERANCE, copied, difference, values};

fn with(scene: &Scene, client: &Client, stack: &AdapterStack) -> Result<(Vec<f32>, Vec<AdapterTaken>)> {
    let output = scene.unet(client).call(&scene.input(), stack, &client.default_options())?;
    Ok((values(&output.tensor), output.step.adapters))
}

/// The layer whose two matrices [`write_pair`] writes.
const PAIR: &str = "lora_unet_input_blocks_1_0_in_layers_2";

/// One matrix pair that fits, from the model's own adapter, and other tensors of one element beside it.
fn write_pair(scene: &Scene, path: &Path, others: &[(&str, f32)]) {
    let bytes = std::fs::read(scene.file("layout-kohya-single")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut views: Vec<_> = ["lora_up", "lora_down"]
        .map(|part| format!("{PAIR}.{part}.weight"))
        .map(|name| (name.clone(), tensors.tensor(&name).unwrap()))
        .into();
    let values: Vec<_> = others.iter().map(|(_, value)| value.to_le_bytes()).collect();
    let one = |bytes| TensorView::new(Dtype::F32, vec![], bytes).unwrap();
    views.extend(others.iter().zip(&values).map(|((name, _), bytes)| ((*name).to_owned(), one(&bytes[..]))));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

fn named(path: &Path) -> AdapterStack {
    let name = path.to_string_lossy().into_owned();
    AdapterStack { adapters: vec![AdapterUse { name, strength: 1.0 }], mode: AdapterMode::Auto }
}

#[test]
fn what_of_a_file_is_not_taken_up_is_told_with_every_reply() {
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let folder = tempfile::tempdir().unwrap();
    let [pair, stray] = ["pair", "stray"].map(|name| folder.path().join(format!("{name}.safetensors")));
    let (unknown, encoders) =
        ("lora_unet_of_another_family.alpha", "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha");
    write_pair(&scene, &pair, &[]);
    write_pair(&scene, &stray, &[(unknown, 1.0), (encoders, 1.0)]);
    let (expected, taken) = with(&scene, &client, &named(&pair)).unwrap();
    assert_eq!((taken[0].layers, taken[0].unknown_keys, taken[0].other_keys), (1, 0, 0), "{taken:?}");
    let plain = values(&scene.unet(&client).step(&scene.input()).unwrap());
    assert!(difference(&plain, &expected) > 1e-3, "the pair does something");
    let run = luna_broker::service::RunSettings { adapters: named(&stray), ..Default::default() };
    let run = scene.unet(&client).run(run).unwrap();
    let prefetched = scene.unet(&client).prefetch(&named(&stray), &CallOptions::default()).unwrap();
    // The second time, the stack is there already.
    for _ in 0..2 {
        let (got, taken) = with(&scene, &client, &named(&stray)).unwrap();
        assert_eq!(got, expected);
        assert_eq!((taken[0].layers, taken[0].unknown_keys, taken[0].other_keys), (1, 1, 1), "{taken:?}");
        assert_eq!(taken[0].unknown, [format!("{unknown:?}")]);
        assert_eq!((&run.adapters(), &prefetched), (&taken, &taken));
    }
}

#[test]
fn every_stack_gives_the_references_result_and_the_next_step_without_is_as_before() {
    for scene in ["sd15", "sdxl"].into_iter().filter_map(Scene::of) {
        let place = Place::new();
        let _broker = broker_at(&place, config());
        let client = client_at(&place);
        let plain = values(&scene.unet(&client).step(&scene.input()).unwrap());
        assert!(difference(&plain, &scene.plain()) <= TOLERANCE);
        let results = scene.results();
        assert!(results.len() > 10, "the generator ran many stacks");
        for (stack, out) in results {
            // One result for files in many layouts.
            let stack = &stack.replace("layout@", "layout-kohya@");
            for mode in [AdapterMode::Auto, AdapterMode::Side, AdapterMode::Merged] {
                let (got, taken) = with(&scene, &client, &scene.stack(stack, mode)).unwrap();
                let off = difference(&got, &out);
                assert!(off <= MERGED, "{} {stack} {mode:?}: {off:e}", scene.name);
                assert!(difference(&got, &plain) > 1e-3 || stack.contains("@0"), "{stack} does something");
                assert_eq!(taken.len(), stack.split('+').count());
                assert!(taken.iter().all(|one| one.layers > 0 && !one.kinds.is_empty()), "{taken:?}");
            }
            assert_eq!(values(&scene.unet(&client).step(&scene.input()).unwrap()), plain, "after {stack}");
        }
    }
}

#[test]
fn a_stack_is_put_together_once_for_all_who_ask_for_the_same_content() {
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let (one, other) = (client_at(&place), client_at(&place));
    let folder = tempfile::tempdir().unwrap();
    let copy = copied(&scene.file("lora"), folder.path(), "the same by another name.safetensors");
    let stack =
        |name: String| AdapterStack { adapters: vec![AdapterUse { name, strength: 0.8 }], mode: AdapterMode::Auto };
    let first = with(&scene, &one, &scene.stack("lora@0.8", AdapterMode::Auto)).unwrap().0;
    let second = with(&scene, &other, &stack(copy.to_string_lossy().into_owned())).unwrap().0;
    assert_eq!(first, second);
    let stacks = one.status().unwrap().stacks;
    assert_eq!(stacks.len(), 1, "{stacks:?}");
    assert!(stacks[0].bytes > 0 && stacks[0].users == 0);
    with(&scene, &one, &scene.stack("lora@0.5", AdapterMode::Auto)).unwrap();
    assert_eq!(one.status().unwrap().stacks.len(), 2, "another strength is another stack");
    one.unload(&scene.model()).unwrap();
    assert!(one.status().unwrap().stacks.is_empty(), "stacks go with their model");
}

#[test]
fn a_file_that_changed_is_read_again() {
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let folder = tempfile::tempdir().unwrap();
    let path = copied(&scene.file("lora"), folder.path(), "style.safetensors");
    let stack = AdapterStack {
        adapters: vec![AdapterUse { name: path.to_string_lossy().into_owned(), strength: 1.0 }],
        mode: AdapterMode::Auto,
    };
    let before = with(&scene, &client, &stack).unwrap().0;
    let other = copied(&scene.file("loha"), folder.path(), "new.safetensors");
    std::fs::rename(other, &path).unwrap();
    let after = with(&scene, &client, &stack).unwrap().0;
    assert!(difference(&before, &after) > 1e-3);
    assert_eq!(after, with(&scene, &client, &scene.stack("loha@1", AdapterMode::Auto)).unwrap().0);
    std::fs::remove_file(&path).unwrap();
    let error = with(&scene, &client, &stack).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ModelNotFound, "{error}");
    assert!(error.message().contains("style.safetensors"), "{error}");
}

#[test]
fn what_cannot_be_applied_is_refused_by_name_and_harms_nobody() {
    let Some(scene) = Scene::of("sd15") else { return };
    let Some(other) = Scene::of("sdxl") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let folder = tempfile::tempdir().unwrap();
    let half = folder.path().join("half.safetensors");
    let bytes = std::fs::read(scene.file("lora")).unwrap();
    std::fs::write(&half, &bytes[..bytes.len() / 2]).unwrap();
    let named = |name: &str, strength| AdapterStack {
        adapters: vec![AdapterUse { name: name.to_owned(), strength }],
        mode: AdapterMode::Auto,
    };
    let alphas = [("nan", f32::NAN), ("endless", f32::INFINITY)].map(|(name, alpha)| {
        let path = folder.path().join(format!("{name}.safetensors"));
        write_pair(&scene, &path, &[(&format!("{PAIR}.alpha"), alpha)]);
        path.to_string_lossy().into_owned()
    });
    let lora = scene.file("lora").to_string_lossy().into_owned();
    let foreign = folder.path().join("foreign.safetensors");
    let tensor = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
    safetensors::serialize_to_file([("lora_unet_of_another_family.lora_up.weight", tensor)], None, &foreign).unwrap();
    let cases = [
        (named("nowhere", 1.0), ErrorKind::ModelNotFound, "nowhere"),
        (named("/no/such/file.safetensors", 1.0), ErrorKind::ModelNotFound, "file.safetensors"),
        (named(&lora, f64::NAN), ErrorKind::Configuration, "NaN"),
        (named(&half.to_string_lossy(), 1.0), ErrorKind::InvalidModel, "half.safetensors"),
        (named(&foreign.to_string_lossy(), 1.0), ErrorKind::InvalidModel, "lora_unet_of_another_family"),
        (named(&alphas[0], 1.0), ErrorKind::InvalidModel, "nan.safetensors"),
        (named(&alphas[1], 1.0), ErrorKind::InvalidModel, "alpha"),
        (
            AdapterStack {
                adapters: vec![AdapterUse { name: lora.clone(), strength: 1.0 }; 65],
                mode: AdapterMode::Auto,
            },
            ErrorKind::Configuration,
            "65 adapters",
        ),
    ];
    let plain = scene.unet(&client).step(&scene.input()).map(|tensor| values(&tensor)).unwrap();
    for (stack, kind, says) in cases {
        let error = with(&scene, &client, &stack).unwrap_err();
        eprintln!("{error} ({})", error.remedy());
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.message().contains(says) && !error.remedy().is_empty(), "{error}");
        assert_eq!(values(&scene.unet(&client).step(&scene.input()).unwrap()), plain);
    }
    // Some layers of the one are called as some of the other, and are of another shape.
    let error = with(&scene, &client, &other.stack("lora@1", AdapterMode::Auto)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidModel, "{error}");
    assert!(error.message().contains("sdxl.lora.safetensors") && error.message().contains("lora_unet_"), "{error}");
    assert_eq!(values(&scene.unet(&client).step(&scene.input()).unwrap()), plain);
}

#[test]
fn adapters_beyond_the_budget_are_refused_while_others_are_in_use() {
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let of = |adapter_bytes| luna_broker::config::BrokerConfig { adapter_bytes, ..config() };
    let one_stack = {
        let _broker = broker_at(&place, of(1 << 30));
        let client = client_at(&place);
        with(&scene, &client, &scene.stack("lora@1", AdapterMode::Side)).unwrap();
        client.status().unwrap().stacks[0].bytes
    };
    let place = Place::new();
    let _broker = broker_at(&place, of(one_stack + one_stack / 2));
    let client = client_at(&place);
    // One after the other they fit.
    for strength in ["1", "0.5", "0.25"] {
        with(&scene, &client, &scene.stack(&format!("lora@{strength}"), AdapterMode::Side)).unwrap();
        assert_eq!(client.status().unwrap().stacks.len(), 1);
    }
    let settings = |strength: &str| luna_broker::service::RunSettings {
        adapters: scene.stack(&format!("lora@{strength}"), AdapterMode::Side),
        ..Default::default()
    };
    let run = scene.unet(&client).run(settings("1")).unwrap();
    assert_eq!(client.status().unwrap().stacks[0].users, 1);
    let error = scene.unet(&client).run(settings("0.5")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
    assert!(error.remedy().contains("--adapter-bytes"), "{error}");
    drop(run);
    scene.unet(&client).run(settings("0.5")).unwrap();
}

#[test]
fn what_is_prefetched_is_there_for_the_first_step() {
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let unet = scene.unet(&client);
    let stack = scene.stack("lora@0.8", AdapterMode::Side);
    let taken = unet.prefetch(&stack, &CallOptions::default()).unwrap();
    assert_eq!(taken.len(), 1);
    assert!(taken[0].layers > 0 && taken[0].unknown_keys == 0, "{taken:?}");
    assert_eq!(client.status().unwrap().stacks.len(), 1);
    assert_eq!(with(&scene, &client, &stack).unwrap().1, taken);
    assert_eq!(client.status().unwrap().stacks.len(), 1);
    assert!(unet.prefetch(&AdapterStack::default(), &CallOptions::default()).unwrap().is_empty());
}

#[test]
fn a_stack_that_is_asked_for_often_becomes_private_copies_and_one_with_a_mode_does_not() {
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let first = with(&scene, &client, &scene.stack("lora@1", AdapterMode::Auto)).unwrap().0;
    let run = scene
        .unet(&client)
        .run(luna_broker::service::RunSettings {
            adapters: scene.stack("lora@1", AdapterMode::Auto),
            ..Default::default()
        })
        .unwrap();
    let mut rounds = 0;
    while !client.status().unwrap().stacks.iter().any(|stack| stack.merged) {
        rounds += 1;
        assert!(rounds < 2000, "it was asked for {rounds} times");
        let now = with(&scene, &client, &scene.stack("lora@1", AdapterMode::Auto)).unwrap().0;
        assert!(difference(&now, &first) <= MERGED);
        with(&scene, &client, &scene.stack("lora@1", AdapterMode::Side)).unwrap();
    }
    assert_eq!(values(&run.step(&scene.step(), &[0, 1]).unwrap()), first, "a run stays with what it was opened with");
    let merged = with(&scene, &client, &scene.stack("lora@1", AdapterMode::Merged)).unwrap().0;
    assert_eq!(with(&scene, &client, &scene.stack("lora@1", AdapterMode::Auto)).unwrap().0, merged);
    let stacks = client.status().unwrap().stacks;
    let of = |mode| stacks.iter().find(|stack| stack.mode == mode).unwrap();
    assert!(!of(AdapterMode::Side).merged && of(AdapterMode::Auto).bytes > of(AdapterMode::Side).bytes);
}

#[test]
fn what_a_client_published_is_an_adapter_for_all() {
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let (one, other) = (client_at(&place), client_at(&place));
    let bytes = std::fs::read(scene.file("lora")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let all = tensors.tensors();
    let inputs = all.iter().map(|(name, view)| {
        let shape: Vec<u64> = view.shape().iter().map(|&extent| extent as u64).collect();
        let dtype = match view.dtype() {
            safetensors::Dtype::F32 => luna_broker::tensor::DType::F32,
            safetensors::Dtype::F16 => luna_broker::tensor::DType::F16,
            other => panic!("{other:?}"),
        };
        let meta = luna_broker::tensor::TensorMeta::contiguous(dtype, luna_broker::tensor::Dims::new(&shape).unwrap());
        luna_broker::client::Published { key: name, meta, bytes: view.data() }
    });
    let inputs: Vec<_> = inputs.collect();
    one.publish("a style", &inputs, &CallOptions::default()).unwrap();
    let stack = AdapterStack {
        adapters: vec![AdapterUse { name: "a style".to_owned(), strength: 1.0 }],
        mode: AdapterMode::Auto,
    };
    let expected = with(&scene, &one, &scene.stack("lora@1", AdapterMode::Auto)).unwrap().0;
    for client in [&one, &other] {
        assert_eq!(with(&scene, client, &stack).unwrap().0, expected);
    }
    one.unload("a style").unwrap();
    let error = with(&scene, &other, &stack).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ModelNotFound, "{error}");
}
