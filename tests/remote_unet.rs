//! UNets that the broker runs for its clients: results, rungs, what is refused, and who is served when.
#![cfg(feature = "torch")]

#[path = "support/raw.rs"]
mod raw;
mod support;
#[path = "support/unet.rs"]
mod unet_file;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use luna_broker::ErrorKind;
use luna_broker::client::{CallOptions, Client, Input, Tensor, Unet};
use luna_broker::protocol::{Operation, Outcome, Rung, SlotPlace, StepSubject, TensorSource, UnetRequest};
use luna_broker::service::{AdapterStack, Control, Service, StepInput, UnetInput};
use luna_broker::tensor::{DType, Dims, TensorMeta};
use raw::Raw;
use safetensors::SafeTensors;
use support::{Place, broker_at, client_at, config, connect, local_client};
use unet_file::{Numbers, write_sparse};

/// Largest difference that differently ordered sums explain, for results of a size around one.
const TOLERANCE: f32 = 2e-5;

/// The generated files, or `None` with a word about how to get them.
fn golden() -> Option<PathBuf> {
    let folder = std::env::var_os("LUNA_BROKER_GOLDEN").map(|folder| Path::new(&folder).join("unet"));
    let folder = folder.filter(|folder| folder.is_dir());
    if folder.is_none() {
        eprintln!("skipped: set LUNA_BROKER_GOLDEN to a folder made by `python tests/golden/make_unet.py FOLDER`");
    }
    folder
}

/// A model's generated cases: tensors by name.
struct Cases(BTreeMap<String, (TensorMeta, Vec<u8>)>);

impl Cases {
    fn of(folder: &Path, model: &str) -> Self {
        let bytes = std::fs::read(folder.join(format!("{model}.io.safetensors"))).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let one = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
            let shape: Vec<u64> = view.shape().iter().map(|&extent| extent as u64).collect();
            let dtype = if view.dtype() == safetensors::Dtype::I64 { DType::I64 } else { DType::F32 };
            (name, (TensorMeta::contiguous(dtype, Dims::new(&shape).unwrap()), view.data().to_vec()))
        };
        Self(tensors.tensors().into_iter().map(one).collect())
    }

    fn names(&self) -> Vec<&str> {
        self.0.keys().filter_map(|name| name.strip_suffix(".out")).collect()
    }

    fn find(&self, name: &str) -> Option<Input<'_>> {
        self.0.get(name).map(|(meta, bytes)| Input::new(*meta, bytes).unwrap())
    }

    fn list(&self, root: &str) -> Vec<Option<Input<'_>>> {
        let length = self.0.get(&format!("{root}.length"));
        let length = length.map(|(_, bytes)| i64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize);
        let all = (0..length.unwrap_or(32)).map(|at| self.find(&format!("{root}.{at}")));
        all.take_while(|tensor| length.is_some() || tensor.is_some()).collect()
    }

    fn input(&self, case: &str) -> UnetInput<Input<'_>> {
        let list = |name: &str| self.list(&format!("{case}.control.{name}"));
        let control = Control { input: list("input"), middle: list("middle"), output: list("output") };
        let any = [&control.input, &control.middle, &control.output].iter().any(|list| !list.is_empty());
        let of = |name: &str| self.find(&format!("{case}.{name}"));
        UnetInput {
            x: of("x").unwrap(),
            timesteps: of("timesteps").unwrap(),
            context: of("context").unwrap(),
            y: of("y"),
            control: any.then_some(control),
        }
    }

    fn out(&self, case: &str) -> Vec<f32> {
        floats(&self.0[&format!("{case}.out")].1)
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    floats(tensor.bytes().unwrap())
}

fn difference(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    left.iter()
        .zip(right)
        .map(|(left, right)| (left - right).abs())
        .fold(0.0, |most, one| if one.is_nan() { f32::INFINITY } else { most.max(one) })
}

/// The generated file of a model: each in another of the ways in which they are published.
fn file(folder: &Path, model: &str) -> String {
    let way = match model {
        "sd15" => "checkpoint",
        "sdxl" | "koala" => "bare",
        _ => "diffusers",
    };
    folder.join(format!("{model}.{way}.safetensors")).to_string_lossy().into_owned()
}

/// The UNet in a generated file.
fn unet(client: &Client, folder: &Path, model: &str) -> Unet {
    client.unet(&file(folder, model)).unwrap()
}

#[test]
fn every_rung_brings_the_references_results() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let broker = Arc::new(broker_at(&place, config()));
    let shared = client_at(&place);
    let inline = connect(&place, |config| config.rung = Some(Rung::Inline));
    let local = local_client(&broker);
    for model in ["sd15", "sdxl", "ssd", "sd2", "koala"] {
        let cases = Cases::of(&folder, model);
        for case in cases.names() {
            let input = cases.input(case);
            let results = [&shared, &inline, &local].map(|client| {
                let got = unet(client, &folder, model).step(&input).unwrap_or_else(|error| panic!("{case}: {error}"));
                assert_eq!(got.meta().shape.as_slice()[2..], input.x.meta().shape.as_slice()[2..]);
                values(&got)
            });
            let off = difference(&results[0], &cases.out(case));
            println!("{model} {case} {off:.1e}");
            assert!(off <= TOLERANCE, "{model} {case}: {off:e}");
            assert!(results.iter().all(|result| *result == results[0]), "{case}: rungs differ");
        }
    }
    assert!(shared.status().unwrap().lanes.iter().any(|lane| lane.service == Service::Unet && lane.completed > 0));
}

#[test]
fn what_does_not_fit_the_model_is_refused_by_name_and_harms_nobody() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let (client, bystander) = (client_at(&place), client_at(&place));
    let (plain, vector) = (Cases::of(&folder, "sd15"), Cases::of(&folder, "sdxl"));
    let (sd15, sdxl) = (unet(&client, &folder, "sd15"), unet(&client, &folder, "sdxl"));
    let first =
        |cases: &Cases| cases.names().into_iter().find(|name| cases.input(name).control.is_none()).unwrap().to_owned();
    let (plain_case, vector_case) = (first(&plain), first(&vector));
    let (good, with_y) = (plain.input(&plain_case), vector.input(&vector_case));
    let expected = values(&unet(&bystander, &folder, "sd15").step(&good).unwrap());
    let bytes = vec![0u8; 1 << 20];
    let of = |shape: &[u64]| Input::new(TensorMeta::contiguous(DType::F32, Dims::new(shape).unwrap()), &bytes).unwrap();
    let rows = good.x.meta().shape.as_slice()[0];
    let wrong = Control { input: Vec::new(), middle: vec![Some(of(&[rows, 3, 1, 1]))], output: Vec::new() };
    let flat = Control { input: Vec::new(), middle: vec![Some(of(&[rows, 3]))], output: Vec::new() };
    let cases = [
        ("context", &sd15, UnetInput { context: of(&[rows, 77, 7]), ..good.clone() }),
        ("y", &sdxl, UnetInput { y: None, ..with_y.clone() }),
        ("y", &sd15, UnetInput { y: Some(of(&[rows, 16])), ..good.clone() }),
        ("control.middle", &sd15, UnetInput { control: Some(wrong), ..good.clone() }),
        ("x", &sd15, UnetInput { x: of(&[rows, 3, 8, 8]), ..good.clone() }),
        ("timesteps", &sd15, UnetInput { timesteps: of(&[rows + 1]), ..good.clone() }),
        ("x", &sd15, UnetInput { x: of(&[rows, 4, 64]), ..good.clone() }),
        ("x", &sd15, UnetInput { x: of(&[rows, 4, 1, 8, 8]), ..good.clone() }),
        ("timesteps", &sd15, UnetInput { timesteps: of(&[rows, 1]), ..good.clone() }),
        ("timesteps", &sd15, UnetInput { timesteps: of(&[]), ..good.clone() }),
        ("context", &sd15, UnetInput { context: of(&[rows, 40]), ..good.clone() }),
        ("y", &sdxl, UnetInput { y: Some(of(&[rows])), ..with_y.clone() }),
        ("control.middle", &sd15, UnetInput { control: Some(flat), ..good.clone() }),
    ];
    for (tensor, unet, input) in cases {
        let error = unet.step(&input).unwrap_err();
        eprintln!("{tensor}: {error} ({})", error.remedy());
        assert_eq!(error.kind(), ErrorKind::InvalidTensor, "{tensor}: {error}");
        assert!(error.message().contains(tensor) && !error.remedy().is_empty(), "{tensor}: {error}");
        assert_eq!(values(&sd15.step(&good).unwrap()), expected, "the session goes on");
    }
    assert_eq!(values(&unet(&bystander, &folder, "sd15").step(&good).unwrap()), expected);
    let error = client.vae(&file(&folder, "sdxl")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidModel, "{error}");
}

#[test]
fn files_that_hold_no_unet_that_can_be_run_are_refused_by_name_and_nothing_is_lost() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let cases = Cases::of(&folder, "sd15");
    let input = cases.input(cases.names()[0]);
    let good = unet(&client, &folder, "sd15");
    let expected = values(&good.step(&input).unwrap());
    let whole = std::fs::read(file(&folder, "sd15")).unwrap();
    std::fs::write(place.file("half.safetensors"), &whole[..whole.len() / 2]).unwrap();
    let mut upscaler = Numbers::SMALL.entries();
    upscaler.push(("label_emb.weight".to_owned(), vec![1000, 256]));
    write_sparse(&place.file("upscaler.safetensors"), &upscaler, "F16", None);
    // Cut along its tensors, so that the file itself is a valid one.
    let mut part = Numbers::SMALL.entries();
    part.truncate(part.len() / 2);
    write_sparse(&place.file("part.safetensors"), &part, "F16", None);
    write_sparse(&place.file("integers.safetensors"), &Numbers::SMALL.entries(), "I16", None);
    for (name, kind, says) in [
        ("upscaler", ErrorKind::Unsupported, "x4 upscaler"),
        ("half", ErrorKind::InvalidModel, "half.safetensors"),
        ("part", ErrorKind::Unsupported, "part.safetensors"),
        ("integers", ErrorKind::Unsupported, "element type I16"),
    ] {
        let path = place.file(&format!("{name}.safetensors")).to_string_lossy().into_owned();
        let loaded = client.load_with(Some(Service::Unet), &path, &CallOptions::default()).map(drop);
        for error in [client.unet(&path).unwrap_err(), loaded.unwrap_err()] {
            eprintln!("{name}: {error} ({})", error.remedy());
            assert_eq!(error.kind(), kind, "{name}: {error}");
            assert!(error.message().contains(says) && error.message().contains(name), "{name}: {error}");
            assert!(!error.remedy().is_empty(), "{name}");
            assert_eq!(values(&good.step(&input).unwrap()), expected, "after {name}");
        }
    }
    assert_eq!(client.status().unwrap().models.iter().filter(|model| model.loaded).count(), 1);
    assert_eq!(client.status().unwrap().sessions_lost, 0);
}

#[test]
fn clients_that_step_at_the_same_time_get_what_each_gets_alone() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let models = ["sd15", "sdxl", "ssd"];
    std::thread::scope(|scope| {
        for at in 0..6 {
            let (place, folder) = (&place, &folder);
            scope.spawn(move || {
                let model = models[at % models.len()];
                let cases = Cases::of(folder, model);
                let client = client_at(place);
                let unet = unet(&client, folder, model);
                let names = cases.names();
                let alone: Vec<_> = names.iter().map(|name| cases.out(name)).collect();
                for round in 0..10 {
                    let at = round % names.len();
                    let got = values(&unet.step(&cases.input(names[at])).unwrap());
                    assert!(difference(&got, &alone[at]) <= TOLERANCE, "{model} {} in round {round}", names[at]);
                }
            });
        }
    });
}

#[test]
fn all_parts_of_a_file_are_loaded_and_given_up_together() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let path = &file(&folder, "sd15");
    let loaded = client.load(path).unwrap();
    assert_eq!(loaded.iter().map(|part| part.service).collect::<Vec<_>>(), [Service::Unet]);
    let is_loaded = || client.status().unwrap().models.iter().any(|model| model.loaded);
    assert!(loaded[0].loaded && is_loaded());
    let report = loaded[0].unet.clone().unwrap();
    // The generator marks this one.
    assert_eq!((report.prediction.as_str(), report.variant.as_str(), report.vector_width), ("v", "plain", None));
    client.unload(path).unwrap();
    assert!(!is_loaded());
    // This file has an autoencoder as well, which cannot be run; it was not in the way.
    let other = client.load_with(Some(Service::Vae), path, &CallOptions::default()).unwrap_err();
    assert_eq!(other.kind(), ErrorKind::Unsupported, "{other}");
}

#[test]
fn inline_tensors_that_do_not_come_end_the_session_and_nobody_elses() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let bystander = client_at(&place);
    let cases = Cases::of(&folder, "sd15");
    let name = cases.names().into_iter().find(|name| cases.input(name).control.is_none()).unwrap();
    let input = cases.input(name);
    let model = file(&folder, "sd15");
    let input_of = StepInput::from(input.clone());
    let metas = input_of.try_map(&mut |input| Ok::<_, ()>(TensorSource::Inline(*input.meta()))).unwrap();
    let subject = StepSubject::Model { name: model, adapters: AdapterStack::default() };
    let request = UnetRequest { subject, input: metas, result: SlotPlace::Host };
    let mut raw = Raw::inline(&place.socket());
    // Fewer bytes than are spoken of: the request is refused, and the next frame is where it should be.
    let fault = raw.fault(Operation::Unet(Box::new(request)), &[0; 64]);
    assert_eq!(fault.kind, ErrorKind::Protocol, "{fault}");
    assert!(matches!(raw.ask(Operation::Ping, &[]), Outcome::Done));
    let got = values(&unet(&bystander, &folder, "sd15").step(&input).unwrap());
    assert!(difference(&got, &cases.out(name)) <= TOLERANCE);
}
