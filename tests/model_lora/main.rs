//! Adapters against the reference with changed weights, which `tests/golden/make_lora.py` wrote, and against peft, by
//! `tests/golden/make_peft.py`.
#![cfg(feature = "torch")]

mod interleaved;
mod peft;
mod refusals;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use luna_broker::device::InProcessDevice;
use luna_broker::model::torch::{Adapted, LoadOptions, Patches, Target, TorchUnet, load_unet, set_threads};
use luna_broker::model::{Adapter, AdapterFile, AdapterKind, ModelFile, UnetInput, WeightStorage};
use luna_broker::service::AdapterMode;
use tch::Tensor;

/// Largest difference between weights merged in float64 and what is done here that rounding explains.
const TOLERANCE: f64 = 3e-5;
const MODES: [AdapterMode; 3] = [AdapterMode::Side, AdapterMode::Merged, AdapterMode::Auto];

/// A generated model with its one input and the reference's results.
struct Scene {
    folder: PathBuf,
    name: &'static str,
    unet: TorchUnet,
    tensors: BTreeMap<String, Tensor>,
}

impl Scene {
    /// `None` with a word about how to get the files.
    fn of(name: &'static str) -> Option<Self> {
        Self::by("lora", name)
    }

    /// What one of the generators of adapters made.
    fn by(generator: &str, name: &'static str) -> Option<Self> {
        let folder = std::env::var_os("LUNA_BROKER_GOLDEN").map(PathBuf::from);
        let Some(folder) = folder.filter(|folder| folder.join(generator).is_dir()) else {
            eprintln!(
                "skipped: set LUNA_BROKER_GOLDEN to a folder made by `python tests/golden/make_unet.py FOLDER` and \
                 `python tests/golden/make_{generator}.py FOLDER`"
            );
            return None;
        };
        // Layers this small take longer to be shared out than to be computed, and other tests run beside.
        set_threads(1);
        let model = if name == "sd15" { "sd15.checkpoint" } else { "sdxl.bare" };
        let unet = load(&folder.join("unet").join(format!("{model}.safetensors")));
        let folder = folder.join(generator);
        let io = Tensor::read_safetensors(folder.join(format!("{name}.io.safetensors"))).expect("a file of cases");
        Some(Self { folder, name, unet, tensors: io.into_iter().collect() })
    }

    fn both() -> impl Iterator<Item = Self> {
        ["sd15", "sdxl"].into_iter().filter_map(Self::of)
    }

    fn adapter(&self, name: &str) -> AdapterFile {
        read(&self.folder.join(format!("{}.{name}.safetensors", self.name)))
    }

    fn adapters(&self, starts: &str) -> Vec<(String, AdapterFile)> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.folder).expect("a folder") {
            let name = entry.expect("an entry").file_name().into_string().expect("a name");
            let own =
                name.strip_suffix(".safetensors").and_then(|name| name.strip_prefix(self.name)?.strip_prefix('.'));
            let Some(own) = own.filter(|own| *own != "io" && own.starts_with(starts)) else { continue };
            found.push((own.to_owned(), self.adapter(own)));
        }
        found.sort_by(|(one, _), (other, _)| one.cmp(other));
        found
    }

    fn input(&self) -> UnetInput<Tensor> {
        let get = |name: &str| self.tensors.get(&format!("plain.{name}")).map(Tensor::shallow_clone);
        UnetInput {
            x: get("x").expect("a latent"),
            timesteps: get("timesteps").expect("timesteps"),
            context: get("context").expect("a context"),
            y: get("y"),
            control: None,
        }
    }

    fn plain(&self) -> &Tensor {
        &self.tensors["plain.out"]
    }

    fn run(&self, patches: &Patches) -> Tensor {
        self.unet.forward(&self.input(), patches).unwrap_or_else(|error| panic!("{error}"))
    }

    fn with(&self, adapters: &[Adapter<'_>], mode: AdapterMode) -> Tensor {
        self.run(&for_all_rows(self.unet.adapt(adapters, mode).unwrap_or_else(|error| panic!("{error}"))))
    }

    /// A stack as the generator writes it: `lora@0.8+set@1`.
    fn with_stack(&self, stack: &str, mode: AdapterMode) -> Tensor {
        let parts: Vec<_> = stack
            .split('+')
            .map(|part| part.split_once('@').expect("a strength"))
            .map(|(name, strength)| (self.adapter(name), strength.parse().expect("a strength")))
            .collect();
        let adapters: Vec<_> = parts.iter().map(|(file, strength)| Adapter { file, strength: *strength }).collect();
        self.with(&adapters, mode)
    }

    /// The stacks that the reference ran, with its results.
    fn results(&self) -> Vec<(&str, &Tensor)> {
        let of = |(name, out)| Some((str::strip_suffix(name, ".out").filter(|name| name.contains('@'))?, out));
        self.tensors.iter().map(|(name, out)| (name.as_str(), out)).filter_map(of).collect()
    }
}

fn load(path: &Path) -> TorchUnet {
    let file = Arc::new(ModelFile::open(path).expect("a valid file"));
    let options = LoadOptions {
        target: &Target::Cpu,
        storage: WeightStorage::Mapped,
        memory: &InProcessDevice,
        progress: &|_, _| (),
    };
    load_unet(file, options).unwrap_or_else(|error| panic!("{error}"))
}

fn read(path: &Path) -> AdapterFile {
    let file = ModelFile::open(path).unwrap_or_else(|error| panic!("{error}"));
    AdapterFile::read(Arc::new(file)).unwrap_or_else(|error| panic!("{error}"))
}

fn for_all_rows(adapted: Adapted) -> Patches {
    let mut patches = Patches::none();
    patches.add(0, 2, Arc::new(adapted.stack)).expect("the only group");
    patches
}

fn difference(left: &Tensor, right: &Tensor) -> f64 {
    assert_eq!(left.size(), right.size());
    let largest = (left - right).abs().max().double_value(&[]);
    if largest.is_nan() { f64::INFINITY } else { largest }
}

/// All that the model computes with, bit by bit.
fn digest(unet: &TorchUnet) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut digest = DefaultHasher::new();
    for (id, stem) in unet.layers() {
        let (weight, bias) = unet.weights(id).expect("its weights");
        for tensor in std::iter::once(weight).chain(bias) {
            let values = Vec::<f32>::try_from(tensor.flatten(0, -1)).expect("numbers");
            (stem, values.iter().map(|value| value.to_bits()).collect::<Vec<_>>()).hash(&mut digest);
        }
    }
    digest.finish()
}

#[test]
fn every_kind_and_stack_agrees_with_the_reference_in_every_mode() {
    let mut failures = Vec::new();
    for scene in Scene::both() {
        let results = scene.results();
        assert!(results.len() > 12, "only {} results", results.len());
        for (stack, expected) in results.iter().filter(|(stack, _)| !stack.starts_with("layout")) {
            let off = MODES.map(|mode| difference(&scene.with_stack(stack, mode), expected));
            let effect = difference(scene.plain(), expected);
            let [side, merged, auto] = off;
            let figures = format!("side {side:.1e}, merged {merged:.1e}, auto {auto:.1e}, effect {effect:.2}");
            println!("{} {stack:40} {figures}", scene.name);
            if off.iter().any(|off| *off > TOLERANCE) || effect < 1e-2 {
                failures.push(format!("{} {stack}: {figures}", scene.name));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn every_way_of_writing_keys_is_the_same_adapter() {
    for scene in Scene::both() {
        let expected = &scene.tensors["layout@1.out"];
        let files = scene.adapters("layout");
        assert!(files.len() >= 13);
        for (name, file) in &files {
            let adapted = scene.unet.adapt(&[Adapter { file, strength: 1.0 }], AdapterMode::Side).expect(name);
            let report = adapted.reports[0].clone();
            let off = difference(&scene.run(&for_all_rows(adapted)), expected);
            println!("{} {name:24} {off:.1e}, {report:?}", scene.name);
            assert!(off <= TOLERANCE, "{name}: {off:e}");
            assert_eq!(report.unknown.count, 0, "{name}: {report:?}");
            assert_eq!(report.kinds, [(AdapterKind::Lora, report.layers)], "{name}");
        }
    }
}

#[test]
fn no_strength_is_no_adapter() {
    for scene in Scene::both() {
        let without = scene.run(&Patches::none());
        assert!(difference(&without, scene.plain()) <= TOLERANCE);
        for (name, file) in scene.adapters("") {
            let adapted = scene.unet.adapt(&[Adapter { file: &file, strength: 0.0 }], AdapterMode::Auto).expect(&name);
            assert_eq!(adapted.stack.size_bytes(), 0, "{name}");
            assert!(adapted.reports[0].layers > 0, "{name} is reported all the same");
            assert_eq!(scene.run(&for_all_rows(adapted)), without, "{name}");
        }
        let nothing = scene.unet.adapt(&[], AdapterMode::Auto).expect("no adapters");
        assert_eq!(scene.run(&for_all_rows(nothing)), without);
    }
}

#[test]
fn order_matters_where_it_does_in_the_reference() {
    let Some(scene) = Scene::of("sd15") else { return };
    let out = |stack: &str| scene.with_stack(stack, AdapterMode::Side);
    for (one, other, matters) in [
        ("lora@0.8", "dora-rows@1", true),
        ("dora-columns@0.8", "lora@1", true),
        ("glora@0.8", "oft@1", true),
        ("locon@0.8", "set@1", true),
        ("lora@0.8", "loha@1", false),
    ] {
        let off = difference(&out(&format!("{one}+{other}")), &out(&format!("{other}+{one}")));
        println!("{one} {other}: {off:.1e}");
        assert!(if matters { off > 1e-2 } else { off <= TOLERANCE }, "{one} {other}: {off:e}");
    }
}

#[test]
fn the_model_is_as_it_was() {
    for scene in Scene::both() {
        let before = digest(&scene.unet);
        for (name, file) in scene.adapters("") {
            for mode in MODES {
                let adapted = scene.unet.adapt(&[Adapter { file: &file, strength: 1.3 }], mode).expect(&name);
                let _ = scene.run(&for_all_rows(adapted));
            }
            assert_eq!(digest(&scene.unet), before, "after {name}");
        }
        let weight = scene.unet.layers().next().and_then(|(id, _)| scene.unet.weights(id)).expect("a layer").0;
        let _ = weight.view(-1).narrow(0, 0, 1).fill_(1234.5);
        assert_ne!(digest(&scene.unet), before, "one element would show");
    }
}

#[test]
fn modes_keep_what_they_promise() {
    let Some(scene) = Scene::of("sd15") else { return };
    let bytes = |name: &str, mode| {
        let file = scene.adapter(name);
        scene.unet.adapt(&[Adapter { file: &file, strength: 1.0 }], mode).expect(name).stack.size_bytes()
    };
    let [side, merged, auto] = MODES.map(|mode| bytes("lora", mode));
    println!("lora: {side} bytes beside the layers, {merged} merged, {auto} by itself");
    assert!(side < merged / 2);
    assert!(auto < side, "a layer of four channels is smaller than a side path of rank four");
    let [side, merged, auto] = MODES.map(|mode| bytes("loha", mode));
    assert!(side == merged && auto == merged, "what is not of low rank is merged in every mode");
    // The same mode gives the same bits.
    for mode in MODES {
        let stack = "lora@0.7+set@1+locon@0.5+loha@-0.4";
        assert_eq!(scene.with_stack(stack, mode), scene.with_stack(stack, mode), "{mode:?}");
    }
}

#[test]
fn rows_have_adapters_of_their_own() {
    let Some(scene) = Scene::of("sd15") else { return };
    let [first, second] = ["lora", "loha"].map(|name| scene.adapter(name));
    let stack = |file| {
        let adapted = scene.unet.adapt(&[Adapter { file, strength: 1.0 }], AdapterMode::Auto).expect("it fits");
        Arc::new(adapted.stack)
    };
    let mut patches = Patches::none();
    patches.add(0, 1, stack(&first)).expect("a row");
    patches.add(1, 1, stack(&second)).expect("a row");
    let out = scene.run(&patches);
    for (row, name) in [(0, "lora@1.out"), (1, "loha@1.out")] {
        let off = difference(&out.narrow(0, row, 1), &scene.tensors[name].narrow(0, row, 1));
        assert!(off <= TOLERANCE, "row {row}: {off:e}");
    }
}
