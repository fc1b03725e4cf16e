//! Adapters of text encoders against the reference with changed weights, which `tests/golden/make_clip_lora.py` wrote, and
//! against peft, by `tests/golden/make_peft.py`.
#![cfg(feature = "torch")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use luna_broker::device::{Device, InProcessDevice, Span};
use luna_broker::model::clip::{ClipCall, ClipKind, ClipPrompt, text_encoders};
use luna_broker::model::text::{Chunk, Token, WeightedToken};
use luna_broker::model::torch::{ClipBase, ClipStack, LoadOptions, Target, TorchClip, load_clip, set_threads};
use luna_broker::model::{Adapter, AdapterFile, LayerNames, ModelError, ModelFile, StackMaker, WeightStorage};
use luna_broker::service::AdapterMode;
use safetensors::tensor::{Dtype, TensorView};
use tch::Tensor;

/// Largest difference between weights merged in float64 and what is done here that rounding explains.
const TOLERANCE: f32 = 3e-5;
const MODES: [AdapterMode; 3] = [AdapterMode::Side, AdapterMode::Merged, AdapterMode::Auto];

/// Generated text encoders with one prompt and the reference's results.
struct Scene {
    folder: PathBuf,
    name: &'static str,
    clip: TorchClip,
    file: Arc<ModelFile>,
    call: ClipCall,
    tensors: BTreeMap<String, Tensor>,
}

#[derive(Debug, PartialEq)]
struct Encoded {
    cond: Vec<f32>,
    pooled: Vec<f32>,
}

impl Scene {
    /// `None` with a word about how to get the files.
    fn of(name: &'static str, file: &str) -> Option<Self> {
        let folder = std::env::var_os("LUNA_BROKER_GOLDEN").map(|folder| Path::new(&folder).join("clip"));
        let Some(folder) = folder.filter(|folder| folder.join("lora").is_dir()) else {
            eprintln!(
                "skipped: set LUNA_BROKER_GOLDEN to FOLDER after `python tests/golden/make_clip.py FOLDER/clip` and \
                 `python tests/golden/make_clip_lora.py FOLDER/clip`"
            );
            return None;
        };
        // Layers this small take longer to be shared out than to be computed, and other tests run beside.
        set_threads(1);
        Some(Self::new(folder.join("lora"), name, &folder.join(format!("{file}.safetensors"))))
    }

    /// The encoders in `file` with the cases in `folder`.
    fn new(folder: PathBuf, name: &'static str, file: &Path) -> Self {
        let (clip, file) = load(file);
        let io = Tensor::read_safetensors(folder.join(format!("{name}.io.safetensors"))).expect("a file of cases");
        let tensors: BTreeMap<_, _> = io.into_iter().collect();
        let prompts = tensors.iter().filter_map(|(name, ids)| {
            let kind = ClipKind::from_name(name.strip_prefix("ids.")?.split_once('.')?.1)?;
            Some(ClipPrompt { kind, chunks: chunks(ids) })
        });
        let call = ClipCall { prompts: prompts.collect(), from_end: None, project: true };
        Self { folder, name, clip, file, call, tensors }
    }

    fn all() -> impl Iterator<Item = Self> {
        [("clip_l", "clip_l.transformers"), ("sdxl", "sdxl.checkpoint")]
            .into_iter()
            .filter_map(|(name, file)| Self::of(name, file))
    }

    fn adapter(&self, name: &str) -> AdapterFile {
        read(&self.folder.join(format!("{}.{name}.safetensors", self.name)))
    }

    /// Layouts in which one adapter is written.
    fn layouts(&self) -> Vec<String> {
        let start = format!("{}.layout-", self.name);
        let entries = std::fs::read_dir(&self.folder).expect("a folder").map(|entry| entry.expect("an entry"));
        let names = entries.map(|entry| entry.file_name().into_string().expect("a name"));
        let own = |name: String| Some(name.strip_prefix(&start)?.strip_suffix(".safetensors")?.to_owned());
        names.filter_map(own).map(|layout| format!("layout-{layout}")).collect()
    }

    fn run(&self, stack: Option<&ClipStack>) -> Encoded {
        try_run(&self.clip, &self.file, &self.call, stack).unwrap_or_else(|error| panic!("{error}"))
    }

    fn with(&self, adapters: &[Adapter<'_>], mode: AdapterMode) -> Encoded {
        let (stack, _) = self.clip.base().adapt(adapters, mode).unwrap_or_else(|error| panic!("{error}"));
        self.run(Some(&stack))
    }

    /// A stack as the generator writes it: `lora@0.8+set@1`.
    fn with_stack(&self, stack: &str, mode: AdapterMode) -> Encoded {
        let parts: Vec<_> = stack
            .split('+')
            .map(|part| part.split_once('@').expect("a strength"))
            .map(|(name, strength)| (self.adapter(name), strength.parse().expect("a strength")))
            .collect();
        let adapters: Vec<_> = parts.iter().map(|(file, strength)| Adapter { file, strength: *strength }).collect();
        self.with(&adapters, mode)
    }

    fn expected(&self, label: &str) -> Encoded {
        let of = |part: &str| Vec::<f32>::try_from(self.tensors[&format!("{label}.{part}")].flatten(0, -1)).unwrap();
        Encoded { cond: of("cond"), pooled: of("pooled") }
    }

    /// The stacks that the reference ran.
    fn stacks(&self) -> Vec<&str> {
        self.tensors.keys().filter_map(|name| name.strip_suffix(".cond").filter(|name| name.contains('@'))).collect()
    }
}

fn load(path: &Path) -> (TorchClip, Arc<ModelFile>) {
    let file = Arc::new(ModelFile::open(path).expect("a valid file"));
    let options = LoadOptions {
        target: &Target::Cpu,
        storage: WeightStorage::Mapped,
        memory: &InProcessDevice,
        progress: &|_, _| (),
    };
    (load_clip(&[Arc::clone(&file)], options).unwrap_or_else(|error| panic!("{error}")), file)
}

fn read(path: &Path) -> AdapterFile {
    let file = ModelFile::open(path).unwrap_or_else(|error| panic!("{error}"));
    AdapterFile::read(Arc::new(file)).unwrap_or_else(|error| panic!("{error}"))
}

fn chunks(ids: &Tensor) -> Vec<Chunk> {
    let length = ids.size()[1] as usize;
    let ids = Vec::<i64>::try_from(ids.flatten(0, -1)).expect("numbers");
    let plain = |id: &i64| WeightedToken { token: Token::Id(*id as u32), weight: 1.0 };
    ids.chunks_exact(length).map(|chunk| chunk.iter().map(plain).collect()).collect()
}

fn try_run(
    clip: &TorchClip,
    file: &ModelFile,
    call: &ClipCall,
    stack: Option<&ClipStack>,
) -> Result<Encoded, ModelError> {
    let plan = text_encoders(&[file])?.plan(call)?;
    let [cond, pooled] = [plan.cond, plan.pooled].map(|meta| {
        let bytes = meta.size_bytes().expect("a size");
        Span::new(InProcessDevice.allocate(bytes).expect("memory"), 0, bytes).expect("a range")
    });
    clip.encode_with(call, stack, &cond, &pooled, &|| false)?;
    let numbers = |span: &Span| {
        let mut bytes = vec![0; span.length()];
        span.read(&mut bytes).expect("it fits");
        bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect()
    };
    Ok(Encoded { cond: numbers(&cond), pooled: numbers(&pooled) })
}

fn difference(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    let off = left.iter().zip(right).map(|(left, right)| (left - right).abs());
    off.fold(0.0, |most, one| if one.is_nan() { f32::INFINITY } else { most.max(one) })
}

fn check(what: &str, got: &Encoded, expected: &Encoded) -> f32 {
    // Changed weights make results of sizes up to a few dozen: what rounding explains grows with them.
    let size = |values: &[f32]| values.iter().fold(1.0f32, |most, one| most.max(one.abs()));
    let cond = difference(&got.cond, &expected.cond) / size(&expected.cond);
    let pooled = difference(&got.pooled, &expected.pooled) / size(&expected.pooled);
    assert!(cond <= TOLERANCE && pooled <= TOLERANCE, "{what}: {cond:e} and {pooled:e}");
    cond.max(pooled)
}

#[test]
fn every_kind_and_order_gives_what_changed_weights_do_in_each_mode() {
    for scene in Scene::all() {
        let before = scene.run(None);
        check("plain", &before, &scene.expected("plain"));
        let mut worst = 0f32;
        for stack in scene.stacks().into_iter().filter(|stack| !stack.starts_with("layout")) {
            let expected = scene.expected(stack);
            for mode in MODES {
                let what = format!("{} {stack} {mode:?}", scene.name);
                worst = worst.max(check(&what, &scene.with_stack(stack, mode), &expected));
            }
        }
        println!("{}: largest difference {worst:.1e}", scene.name);
        assert_eq!(scene.run(None), before, "the encoders are as they were");
    }
}

#[test]
fn one_adapter_means_the_same_in_every_way_of_writing_its_keys() {
    for scene in Scene::all() {
        let (expected, layouts) = (scene.expected("layout@1"), scene.layouts());
        assert!(layouts.len() >= 8, "{layouts:?}");
        for layout in layouts {
            let file = scene.adapter(&layout);
            let (stack, reports) =
                scene.clip.base().adapt(&[Adapter { file: &file, strength: 1.0 }], MODES[0]).unwrap();
            assert_eq!((reports[0].unknown.count, reports[0].unet_keys), (0, 0), "{layout}: {reports:?}");
            check(&format!("{} {layout}", scene.name), &scene.run(Some(&stack)), &expected);
        }
    }
}

#[test]
fn what_peft_and_diffusers_save_does_what_it_does_in_peft() {
    let golden = std::env::var_os("LUNA_BROKER_GOLDEN").map(PathBuf::from);
    let Some(golden) = golden.filter(|golden| golden.join("peft").is_dir()) else {
        return eprintln!("skipped: set LUNA_BROKER_GOLDEN to FOLDER after `python tests/golden/make_peft.py FOLDER`");
    };
    set_threads(1);
    let (saved, by_pipelines) = ("adapter_model", "pytorch_lora_weights");
    let cases = [
        ("clip_l", "clip_l.transformers", "lora", "clip_l.lora", saved),
        ("clip_l", "clip_l.transformers", "lora", "clip_l.lora-inner", saved),
        ("clip_l", "clip_l.transformers", "lora", "clip_l.lora", by_pipelines),
        ("clip_l", "clip_l.transformers", "dora", "clip_l.dora", saved),
        ("clip_l", "clip_l.transformers", "loha", "clip_l.loha", saved),
        // The UNet's adapter is in the same file, and each part has an alpha of its own.
        ("sdxl-text", "sdxl.checkpoint", "lora", "sdxl.lora", by_pipelines),
    ];
    for (name, model, label, folder, file) in cases {
        let model = golden.join("clip").join(format!("{model}.safetensors"));
        let scene = Scene::new(golden.join("peft"), name, &model);
        check("plain", &scene.run(None), &scene.expected("plain"));
        let file = read(&scene.folder.join(folder).join(format!("{file}.safetensors")));
        for mode in MODES {
            let (stack, reports) = scene.clip.base().adapt(&[Adapter { file: &file, strength: 1.0 }], mode).unwrap();
            let what = format!("{} {mode:?}", file.path().display());
            assert_eq!((reports[0].unknown.count, reports[0].layers > 15), (0, true), "{what}: {reports:?}");
            println!("{what}: {:.1e}", check(&what, &scene.run(Some(&stack)), &scene.expected(label)));
        }
    }
}

#[test]
fn a_strength_of_nothing_changes_nothing() {
    for scene in Scene::all() {
        let file = scene.adapter("lora");
        let (stack, _) = scene.clip.base().adapt(&[Adapter { file: &file, strength: 0.0 }], MODES[2]).unwrap();
        assert_eq!((stack.size_bytes(), scene.run(Some(&stack))), (0, scene.run(None)));
        for strength in [f64::NAN, f64::INFINITY] {
            let refused = scene.clip.base().adapt(&[Adapter { file: &file, strength }], MODES[2]);
            assert!(matches!(refused, Err(ModelError::AdapterStrength { .. })), "{refused:?}");
        }
    }
}

#[test]
fn stacks_are_made_on_other_threads_while_the_encoders_run() {
    let Some(scene) = Scene::of("sdxl", "sdxl.checkpoint") else { return };
    let stacks: Vec<_> = scene.stacks().into_iter().filter(|stack| stack.starts_with("lo")).take(4).collect();
    let plain = scene.run(None);
    let base: Arc<ClipBase> = scene.clip.base();
    let folder = &scene.folder;
    let made: Vec<(ClipStack, &str)> = std::thread::scope(|scope| {
        let makers: Vec<_> = stacks
            .iter()
            .filter(|stack| !stack.contains('+'))
            .map(|&stack| {
                let base = Arc::clone(&base);
                scope.spawn(move || {
                    let (name, strength) = stack.split_once('@').expect("a strength");
                    let file = read(&folder.join(format!("sdxl.{name}.safetensors")));
                    let adapter = Adapter { file: &file, strength: strength.parse().expect("a strength") };
                    (base.adapt(&[adapter], AdapterMode::Auto).expect("a stack").0, stack)
                })
            })
            .collect();
        for _ in 0..5 {
            assert_eq!(scene.run(None), plain);
        }
        makers.into_iter().map(|maker| maker.join().expect("no panic")).collect()
    });
    assert!(!made.is_empty());
    for (stack, label) in &made {
        check(label, &scene.run(Some(stack)), &scene.expected(label));
    }
    let file = read(&folder_of("sdxl.lora"));
    let maker: Arc<dyn StackMaker> = scene.clip.base();
    let (ready, _) = maker.make(&[Adapter { file: &file, strength: 1.0 }], AdapterMode::Side).unwrap();
    let stack = ready.tensors::<ClipStack>().expect("of this kind");
    assert_eq!(ready.size_bytes(), stack.size_bytes());
    check("made ready", &scene.run(Some(&stack)), &scene.expected("lora@1"));
    // The weights live as long as whoever makes stacks of them.
    let Scene { clip, .. } = scene;
    drop(clip);
    assert!(base.adapt(&[Adapter { file: &file, strength: 1.0 }], AdapterMode::Merged).is_ok());
}

fn folder_of(name: &str) -> PathBuf {
    let golden = std::env::var_os("LUNA_BROKER_GOLDEN").expect("looked at before");
    Path::new(&golden).join("clip/lora").join(format!("{name}.safetensors"))
}

/// Keys with shapes.
type Keys<'a> = [(&'a str, &'a [usize])];

/// Writes an adapter of tensors of ones.
fn write(path: &Path, keys: &Keys<'_>) {
    let ones: Vec<(String, Vec<usize>, Vec<u8>)> = keys
        .iter()
        .map(|(key, shape)| {
            let count: usize = shape.iter().product();
            ((*key).to_owned(), shape.to_vec(), 1f32.to_le_bytes().repeat(count))
        })
        .collect();
    let view = |(key, shape, bytes): &'_ (String, Vec<usize>, Vec<u8>)| {
        (key.clone(), TensorView::new(Dtype::F32, shape.clone(), Box::leak(bytes.clone().into_boxed_slice())).unwrap())
    };
    std::fs::write(path, safetensors::serialize(ones.iter().map(view), None).unwrap()).unwrap();
}

#[test]
fn what_names_no_layer_is_reported_and_what_does_not_fit_is_refused() {
    let Some(scene) = Scene::of("clip_l", "clip_l.transformers") else { return };
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("adapter.safetensors");
    let adapt = |keys: &Keys<'_>| {
        write(&path, keys);
        let file = read(&path);
        scene
            .clip
            .base()
            .adapt(&[Adapter { file: &file, strength: 1.0 }], AdapterMode::Auto)
            .map(|(_, reports)| reports)
    };
    let q = "lora_te_text_model_encoder_layers_0_self_attn_q_proj";
    let (up, down) = (format!("{q}.lora_up.weight"), format!("{q}.lora_down.weight"));
    let own: [(&str, &[usize]); 2] = [(&up, &[128, 2]), (&down, &[2, 128])];
    let of_others: [(&str, &[usize]); 3] = [
        ("lora_unet_input_blocks_1_1_proj_in.lora_up.weight", &[4, 2]),
        ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight", &[128, 2]),
        ("lora_te_text_model_encoder_layers_99_mlp_fc1.alpha", &[]),
    ];
    let reports = adapt(&[&own[..], &of_others[..]].concat()).unwrap();
    let report = &reports[0];
    assert_eq!((report.layers, report.unet_keys, report.unknown.count), (1, 1, 2), "{report:?}");
    assert!(report.unknown.first.iter().any(|key| key.contains("lora_te2")), "{report:?}");
    let only_unet = adapt(&of_others[..1]).unwrap();
    assert_eq!((only_unet[0].layers, only_unet[0].unet_keys), (0, 1), "an adapter of a UNet alone is none of ours");
    let cases: [(&Keys<'_>, &str); 4] = [
        (&of_others[1..], "none of its 2 keys"),
        (&[(&up, &[128, 2]), (&down, &[2, 64])], "does not fit"),
        (&[(&up, &[128, 2]), (&down, &[3, 128])], "takes [128, 3]"),
        (&[(&up, &[128, 2])], "lora_down"),
    ];
    for (keys, says) in cases {
        let error = adapt(keys).unwrap_err().to_string();
        assert!(error.contains(says), "{says}: {error}");
    }
    let (other, _) = load(&scene.folder.parent().unwrap().join("clip_l.float.safetensors"));
    let file = scene.adapter("lora");
    let (stack, _) = other.base().adapt(&[Adapter { file: &file, strength: 1.0 }], AdapterMode::Auto).unwrap();
    let refused = try_run(&scene.clip, &scene.file, &scene.call, Some(&stack));
    assert!(matches!(refused, Err(ModelError::Executor { .. })), "another set's stack: {refused:?}");
    assert_eq!(scene.run(None), scene.run(None));
}

#[test]
fn names_are_told_from_headers_alone_and_lead_to_one_layer_each() {
    for scene in Scene::all() {
        let names = LayerNames::of_text_encoders(&[&scene.file]).unwrap();
        let report = scene.adapter("lora").report(&names).unwrap();
        assert_eq!((report.unknown.count, report.unet_keys), (0, 0));
        let fused = names.find(if scene.name == "sdxl" {
            "lora_te2_text_model_encoder_layers_31_self_attn_v_proj"
        } else {
            "text_encoder.text_model.encoder.layers.2.self_attn.v_proj"
        });
        let stem = names.stem(fused.expect("it is there")).expect("a stem");
        assert!(stem.ends_with("self_attn.v_proj"), "{stem}");
    }
}
