//! The UNet executor against the reference's results, which `tests/golden/make_unet.py` wrote.
#![cfg(feature = "torch")]

mod adapters;
mod first_block;
mod inputs;

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use luna_broker::device::InProcessDevice;
use luna_broker::model::torch::{LoadOptions, Patches, Target, TorchUnet, load_unet};
use luna_broker::model::{Control, ModelFile, UnetInput, WeightStorage, unet_facts};
use luna_broker::service::Precision;
use tch::Tensor;

/// Largest difference that differently ordered sums explain, for results of a size around one.
const TOLERANCE: f64 = 2e-5;

/// The generated files, or `None` with a word about how to get them.
fn golden() -> Option<PathBuf> {
    let folder = std::env::var_os("LUNA_BROKER_GOLDEN").map(|folder| Path::new(&folder).join("unet"));
    let folder = folder.filter(|folder| folder.is_dir());
    if folder.is_none() {
        eprintln!("skipped: set LUNA_BROKER_GOLDEN to a folder made by `python tests/golden/make_unet.py FOLDER`");
    }
    folder
}

fn load_with(path: &Path, storage: WeightStorage) -> TorchUnet {
    let file = Arc::new(ModelFile::open(path).expect("a valid file"));
    let facts = unet_facts(&file).unwrap_or_else(|error| panic!("{error}"));
    let seen = Cell::new((0, 0));
    let progress = |done: u64, total: u64| {
        assert!(done > seen.get().0 && done <= total, "{done} of {total} after {:?}", seen.get());
        seen.set((done, total));
    };
    let options = LoadOptions { target: &Target::Cpu, storage, memory: &InProcessDevice, progress: &progress };
    let unet = load_unet(file, options).unwrap_or_else(|error| panic!("{error}"));
    let bytes = facts.weight_bytes(Precision::F32);
    assert_eq!(seen.get(), (bytes, bytes), "progress ends with everything loaded");
    assert_eq!(unet.facts(), &facts);
    unet
}

fn load(folder: &Path, name: &str) -> TorchUnet {
    load_with(&folder.join(format!("{name}.safetensors")), WeightStorage::Mapped)
}

/// The generated cases of a model.
struct Cases(Vec<(String, Tensor)>);

impl Cases {
    fn of(folder: &Path, model: &str) -> Self {
        Self(Tensor::read_safetensors(folder.join(format!("{model}.io.safetensors"))).expect("a file of cases"))
    }

    fn names(&self) -> Vec<&str> {
        self.0.iter().filter_map(|(name, _)| name.strip_suffix(".out")).collect()
    }

    fn find(&self, name: &str) -> Option<Tensor> {
        self.0.iter().find(|(own, _)| own == name).map(|(_, tensor)| tensor.shallow_clone())
    }

    fn get(&self, name: &str) -> Tensor {
        self.find(name).unwrap_or_else(|| panic!("no {name}"))
    }

    fn list(&self, root: &str) -> Vec<Option<Tensor>> {
        let length = self.find(&format!("{root}.length")).map(|length| length.int64_value(&[]));
        let all = (0..length.unwrap_or(32)).map(|at| self.find(&format!("{root}.{at}")));
        all.take_while(|tensor| length.is_some() || tensor.is_some()).collect()
    }

    fn input(&self, case: &str) -> UnetInput<Tensor> {
        let list = |name: &str| self.list(&format!("{case}.control.{name}"));
        let control = Control { input: list("input"), middle: list("middle"), output: list("output") };
        let any = [&control.input, &control.middle, &control.output].iter().any(|list| !list.is_empty());
        UnetInput {
            x: self.get(&format!("{case}.x")),
            timesteps: self.get(&format!("{case}.timesteps")),
            context: self.get(&format!("{case}.context")),
            y: self.find(&format!("{case}.y")),
            control: any.then_some(control),
        }
    }

    fn out(&self, case: &str) -> Tensor {
        self.get(&format!("{case}.out"))
    }
}

fn forward(unet: &TorchUnet, input: &UnetInput<Tensor>) -> Tensor {
    unet.forward(input, &Patches::none()).unwrap_or_else(|error| panic!("{error}"))
}

fn difference(left: &Tensor, right: &Tensor) -> f64 {
    assert_eq!(left.size(), right.size());
    let largest = (left - right).abs().max().double_value(&[]);
    if largest.is_nan() { f64::INFINITY } else { largest }
}

/// One of each make that differs from the others in what it has and how it is put together.
const MODELS: [&str; 8] = ["inpaint", "koala", "quiet", "refiner", "sd15", "sd2", "sdxl", "ssd"];

/// All generated weight files, each with the name of its model.
fn variants(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let Some((model, rest)) = name.split_once('.') else { continue };
        if rest != "io.safetensors" && rest.ends_with(".safetensors") {
            found.push((path.clone(), model.to_owned()));
        }
    }
    found.sort();
    let mut models: Vec<_> = found.iter().map(|(_, model)| model.as_str()).collect();
    models.dedup();
    assert_eq!(models, MODELS, "what the generator makes");
    found
}

#[test]
fn every_generated_model_agrees_with_the_reference() {
    let Some(folder) = golden() else { return };
    let mut failures = Vec::new();
    for (path, model) in variants(&folder) {
        for storage in [WeightStorage::Mapped, WeightStorage::Copied] {
            let unet = load_with(&path, storage);
            let cases = Cases::of(&folder, &model);
            let mut report = String::new();
            for case in cases.names() {
                let got = forward(&unet, &cases.input(case));
                let off = difference(&got, &cases.out(case));
                report += &format!("  {case} {off:.1e}");
                if off > TOLERANCE {
                    failures.push(format!("{}: {case} is off by {off:e}", path.display()));
                }
            }
            println!("{:32}{report}", path.file_name().unwrap_or_default().to_string_lossy());
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}
