//! Steps of runs: conditionings by reference, and what is refused.

use std::sync::Arc;

use luna_broker::ErrorKind;
use luna_broker::service::{AdapterMode, RunSettings, StepInput};
use luna_broker::tensor::{DType, Dims, TensorMeta};

use crate::config;
use crate::support::{Place, broker_at, client_at, connect, local_client};
use crate::{MERGED, Scene, TOLERANCE, difference, given, made, values};

#[test]
fn what_crossed_once_is_referred_to_and_gives_the_same() {
    for scene in ["sd15", "sdxl"].into_iter().filter_map(Scene::of) {
        let place = Place::new();
        let broker = Arc::new(broker_at(&place, config()));
        let inline = connect(&place, |config| config.rung = Some(luna_broker::protocol::Rung::Inline));
        for client in [client_at(&place), inline, local_client(&broker)] {
            let unet = scene.unet(&client);
            let plain = values(&unet.step(&scene.input()).unwrap());
            let settings = RunSettings { adapters: scene.stack("lora@1", AdapterMode::Auto), ..RunSettings::default() };
            let run = unet.run(settings).unwrap();
            assert!(run.adapters()[0].layers > 0);
            // Two rows: a prompt's and a negative one's.
            let first = values(&run.step(&scene.step(), &[7, 3]).unwrap());
            let (_, out) = scene.results().into_iter().find(|(name, _)| *name == "lora@1").unwrap();
            assert!(difference(&first, &out) <= MERGED);
            let short = StepInput { context: None, y: None, ..scene.step() };
            assert_eq!(values(&run.step(&short, &[7, 3]).unwrap()), first);
            // The other way round, the rows' conditionings are too.
            let turned = values(&run.step(&short, &[3, 7]).unwrap());
            assert!(difference(&turned, &first) > 1e-3);
            let half = first.len() / 2;
            let row = |scene: &Scene, at: u64| {
                let (meta, bytes) = &scene.tensors["plain.x"];
                let shape = meta.shape.as_slice().to_vec();
                let each = bytes.len() / 2;
                let start = at as usize * each;
                let meta = TensorMeta::contiguous(DType::F32, Dims::of([1, shape[1], shape[2], shape[3]]));
                (meta, bytes[start..start + each].to_vec())
            };
            let steps = &scene.tensors["plain.timesteps"].1;
            let second = (made(&[1], |_| f32::from_le_bytes(steps[4..8].try_into().unwrap())), row(&scene, 1));
            let alone = StepInput { x: given(&second.1), timesteps: given(&second.0), ..short.clone() };
            let alone = values(&run.step(&alone, &[3]).unwrap());
            assert!(difference(&alone, &first[half..]) <= TOLERANCE, "one cond by itself");
            assert_eq!(run.report().steps, 4);
            assert_eq!(values(&unet.step(&scene.input()).unwrap()), plain, "the model is as it was");
        }
    }
}

#[test]
fn conds_of_different_lengths_meet_in_one_step() {
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let unet = scene.unet(&client);
    let run = unet.run(RunSettings::default()).unwrap();
    let x = made(&[1, 4, 8, 8], |at| (at as f32 * 0.37).sin());
    let timesteps = made(&[1], |_| 500.0);
    let width = unet.info().unet.as_ref().unwrap().context_width;
    let contexts =
        [made(&[1, 4, width], |at| (at as f32 * 0.11).cos()), made(&[1, 6, width], |at| (at as f32 * 0.23).sin())];
    let step = |context| StepInput { x: given(&x), timesteps: given(&timesteps), context, y: None, control: None };
    let alone: Vec<_> = contexts
        .iter()
        .zip([0, 1])
        .flat_map(|(context, cond)| values(&run.step(&step(Some(given(context))), &[cond]).unwrap()))
        .collect();
    let both = [x.1.clone(), x.1.clone()].concat();
    let both = (TensorMeta::contiguous(DType::F32, Dims::of([2, 4, 8, 8])), both);
    let two = made(&[2], |_| 500.0);
    let joint = StepInput { x: given(&both), timesteps: given(&two), ..step(None) };
    let joint = values(&run.step(&joint, &[0, 1]).unwrap());
    // Repeating all tokens changes nothing but sums' order.
    assert!(difference(&joint, &alone) <= TOLERANCE);
}

#[test]
fn what_a_run_does_not_have_or_is_not_is_refused_by_name_and_the_run_goes_on() {
    let Some(scene) = Scene::of("sdxl") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let unet = scene.unet(&client);
    let run = unet.run(RunSettings::default()).unwrap();
    let short = StepInput { context: None, y: None, ..scene.step() };
    let refused = |input: &StepInput<luna_broker::client::Input<'_>>, conds: &[u32], says: &str| {
        let error = run.step(input, conds).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidTensor, "{error}");
        assert!(error.message().contains(says) && !error.remedy().is_empty(), "{error} does not say {says}");
    };
    refused(&short, &[0, 1], "cond 0 was never sent");
    refused(&StepInput { y: None, ..scene.step() }, &[0, 1], "never sent a y");
    let out = values(&run.step(&scene.step(), &[0, 1]).unwrap());
    refused(&short, &[0, 2], "cond 2 was never sent");
    run.step(&scene.step(), &[9]).unwrap();
    refused(&short, &[9, 0], "a context of 2 rows");
    refused(&short, &[0, 0], "twice");
    refused(&short, &[0, 1, 2], "cannot share");
    refused(&short, &[], "at least one");
    let wrong = made(&[2, 7, 3], |_| 0.0);
    refused(&StepInput { context: Some(given(&wrong)), ..scene.step() }, &[0, 1], "context");
    assert_eq!(values(&run.step(&short, &[0, 1]).unwrap()), out);
    run.close();
    run.close();
    let error = run.step(&short, &[0, 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
    assert!(client.status().unwrap().runs.is_empty());
    assert!(difference(&values(&unet.step(&scene.input()).unwrap()), &scene.plain()) <= TOLERANCE);
}

#[test]
fn settings_out_of_bounds_open_nothing() {
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let unet = scene.unet(&client);
    let cache = |threshold, start, end| {
        let cache = luna_broker::service::BlockCache { threshold, start, end, max_hits: None };
        RunSettings { cache: Some(cache), ..RunSettings::default() }
    };
    for (settings, says) in [
        (cache(0.1, 0.5, 0.5), "begin before it ends"),
        (cache(0.1, 0.7, 0.5), "begin before it ends"),
        (cache(f64::NAN, 0.0, 1.0), "threshold"),
        (cache(0.1, -1.0, 1.0), "shares"),
        (RunSettings { sigmas: vec![1.0, f64::NAN], ..RunSettings::default() }, "noise level"),
    ] {
        let error = unet.run(settings).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
        assert!(error.message().contains(says), "{error} does not say {says}");
    }
    let runs: Vec<_> = (0..64).map(|_| unet.run(RunSettings::default()).unwrap()).collect();
    let error = unet.run(RunSettings::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    drop(runs);
    assert!(unet.run(RunSettings::default()).is_ok(), "closed runs make room");
}

#[test]
fn a_run_survives_its_broker_with_a_step_that_leaves_nothing_out() {
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let broker = broker_at(&place, config());
    let client = client_at(&place);
    let run = scene.unet(&client).run(RunSettings::default()).unwrap();
    let out = values(&run.step(&scene.step(), &[0, 1]).unwrap());
    drop(broker);
    let _broker = broker_at(&place, config());
    let short = StepInput { context: None, ..scene.step() };
    let error = run.step(&short, &[0, 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
    assert_eq!(values(&run.step(&scene.step(), &[0, 1]).unwrap()), out);
    assert_eq!(values(&run.step(&short, &[0, 1]).unwrap()), out);
}
