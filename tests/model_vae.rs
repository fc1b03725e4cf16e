//! The VAE executor against the reference's results, which `tests/golden/make_vae.py` wrote.
#![cfg(feature = "torch")]

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use luna_broker::device::{Device, InProcessDevice, Span};
use luna_broker::model::torch::{LoadOptions, Target, load_vae};
use luna_broker::model::{
    ModelError, ModelFile, ModelInput, StoredDType, Vae, VaeFacts, VaePlan, WeightStorage, vae_facts,
};
use luna_broker::service::{TileShape, Tiling, VaeCall, VaeMode, VaeOperation};
use luna_broker::tensor::{DType, Dims, TensorMeta};

/// Largest difference that differently ordered sums explain.
const TOLERANCE: f32 = 1e-5;

/// The generated files, or `None` with a word about how to get them.
fn golden() -> Option<PathBuf> {
    let folder = std::env::var_os("LUNA_BROKER_GOLDEN").map(PathBuf::from).filter(|folder| folder.is_dir());
    if folder.is_none() {
        eprintln!("skipped: set LUNA_BROKER_GOLDEN to a folder made by `python tests/golden/make_vae.py FOLDER`");
    }
    folder
}

/// A file of the shared test data, or `None` with a word about where it is looked for.
fn shared(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("LUNA_BROKER_SHARED")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let path = folder.join("data").join(name);
    if path.is_file() {
        return Some(path);
    }
    eprintln!("skipped: {} is not here (LUNA_BROKER_SHARED names its folder)", path.display());
    None
}

struct Loaded {
    file: Arc<ModelFile>,
    facts: VaeFacts,
    vae: Box<dyn Vae>,
}

fn load(path: &Path, storage: WeightStorage) -> Loaded {
    let file = Arc::new(ModelFile::open(path).expect("a valid file"));
    let facts = vae_facts(&file).unwrap_or_else(|error| panic!("{error}"));
    let seen = Cell::new((0, 0));
    let progress = |done: u64, total: u64| {
        assert!(done > seen.get().0 && done <= total, "{done} of {total} after {:?}", seen.get());
        seen.set((done, total));
    };
    let options = LoadOptions { target: &Target::Cpu, storage, memory: &InProcessDevice, progress: &progress };
    let vae = load_vae(Arc::clone(&file), options).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(seen.get(), (facts.weight_bytes, facts.weight_bytes), "progress ends with everything loaded");
    Loaded { file, facts, vae }
}

/// Bytes with their description, as a session's slot holds them.
#[derive(Clone)]
struct Value {
    meta: TensorMeta,
    bytes: Vec<u8>,
}

impl Value {
    fn floats(shape: &[u64], values: &[f32]) -> Self {
        let meta = TensorMeta::contiguous(DType::F32, Dims::new(shape).expect("a rank"));
        Self { meta, bytes: values.iter().flat_map(|value| value.to_ne_bytes()).collect() }
    }

    /// The tensor `name` of a generated file.
    fn stored(file: &ModelFile, name: &str) -> Self {
        let stored = file.tensor(name).unwrap_or_else(|| panic!("no {name} in {}", file.path().display()));
        let shape: Vec<u64> = stored.shape.iter().map(|&extent| extent as u64).collect();
        let dtype = stored.element().expect("a plain type");
        let meta = TensorMeta::contiguous(dtype, Dims::new(&shape).expect("a rank"));
        Self { meta, bytes: file.bytes(stored).expect("its bytes").to_vec() }
    }

    /// The same tensor with its dimensions in another order in memory, and a gap after each innermost row.
    fn laid_out(&self, order: [usize; 4]) -> Self {
        let shape = self.meta.shape.as_slice();
        let mut strides = [0u64; 4];
        let mut next = 1;
        for (depth, &dim) in order.iter().rev().enumerate() {
            strides[dim] = next;
            next *= shape[dim];
            if depth == 0 {
                next += 5;
            }
        }
        let meta = TensorMeta::strided(self.meta.dtype, self.meta.shape, Dims::of(strides)).expect("valid strides");
        let width = meta.dtype.size_bytes();
        let mut bytes = vec![0xff; meta.span_bytes().expect("a size")];
        for (at, element) in self.bytes.chunks_exact(width).enumerate() {
            let mut rest = at as u64;
            let mut place = 0;
            for dim in (0..4).rev() {
                place += rest % shape[dim] * strides[dim];
                rest /= shape[dim];
            }
            let place = place as usize * width;
            bytes[place..place + width].copy_from_slice(element);
        }
        Self { meta, bytes }
    }

    fn numbers(&self) -> Vec<f32> {
        assert_eq!(self.meta.dtype, DType::F32);
        self.bytes.chunks_exact(4).map(|bytes| f32::from_ne_bytes(bytes.try_into().expect("four bytes"))).collect()
    }
}

fn span(bytes: usize) -> Span {
    // An offset shows whether a run keeps to its slot.
    Span::new(InProcessDevice.allocate(bytes + 128).expect("memory"), 64, bytes).expect("a range of the region")
}

fn run_plan(loaded: &mut Loaded, plan: &VaePlan, input: &Value, stop: &dyn Fn() -> bool) -> Result<Value, ModelError> {
    let (source, target) = (span(input.bytes.len()), span(plan.output.size_bytes().expect("a size")));
    source.write(&input.bytes).expect("it fits");
    let mode = loaded.vae.run(plan, ModelInput { meta: input.meta, memory: &source }, &target, stop)?;
    assert_eq!((mode, loaded.vae.stream()), (plan.mode, None), "what was planned ran, and is complete");
    let mut all = vec![0; target.length() + 128];
    Span::new(Arc::clone(target.region()), 0, all.len()).expect("the region").read(&mut all).expect("it fits");
    let outside = all[..64].iter().chain(&all[64 + target.length()..]);
    assert!(outside.clone().all(|&byte| byte == 0), "something was written beside the slot");
    let mut before = vec![0; input.bytes.len()];
    source.read(&mut before).expect("it fits");
    assert_eq!(before, input.bytes, "the input was written to");
    Ok(Value { meta: plan.output, bytes: all[64..64 + target.length()].to_vec() })
}

fn run(loaded: &mut Loaded, operation: VaeOperation, tiling: Tiling, input: &Value) -> Value {
    let plan = loaded.facts.plan(&VaeCall { operation, tiling }, &input.meta, u64::MAX).expect("a plan");
    run_plan(loaded, &plan, input, &|| false).unwrap_or_else(|error| panic!("{error}"))
}

fn decode(loaded: &mut Loaded, latent: &Value) -> Value {
    run(loaded, VaeOperation::Decode, Tiling::Auto, latent)
}

fn encode(loaded: &mut Loaded, image: &Value) -> Value {
    run(loaded, VaeOperation::Encode, Tiling::Auto, image)
}

fn largest_difference(left: &Value, right: &Value) -> f32 {
    assert_eq!(left.meta, right.meta);
    let differences = left.numbers().into_iter().zip(right.numbers()).map(|(left, right)| (left - right).abs());
    differences.map(|difference| if difference.is_nan() { f32::INFINITY } else { difference }).fold(0.0, f32::max)
}

fn tiles(file: &ModelFile, name: &str) -> Tiling {
    let stored = file.tensor(name).expect("tiles");
    assert_eq!((stored.dtype, stored.shape.as_slice()), (StoredDType::I64, [3].as_slice()));
    let bytes = file.bytes(stored).expect("its bytes");
    let mut numbers =
        bytes.chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().expect("eight bytes")) as u32);
    let mut next = || numbers.next().expect("three numbers");
    Tiling::Tiles(TileShape { width: next(), height: next(), overlap: next() })
}

/// All generated weight files, each with the file of its cases.
fn variants(folder: &Path) -> Vec<(PathBuf, ModelFile)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let Some((model, rest)) = name.split_once('.') else { continue };
        if rest != "io.safetensors" && rest.ends_with(".safetensors") {
            let cases = folder.join(format!("{model}.io.safetensors"));
            found.push((path, ModelFile::open(&cases).expect("a file of cases")));
        }
    }
    found.sort_by(|left, right| left.0.cmp(&right.0));
    assert!(found.len() >= 10, "only {} generated files", found.len());
    found
}

#[test]
fn every_generated_model_agrees_with_the_reference() {
    let Some(folder) = golden() else { return };
    let mut failures = Vec::new();
    for (path, cases) in variants(&folder) {
        let mut loaded = load(&path, WeightStorage::Mapped);
        let (can_decode, can_encode) = (loaded.facts.can_decode, loaded.facts.can_encode);
        let mut report = String::new();
        let mut check = |name: &str, operation, tiling, input: &str| {
            let got = run(&mut loaded, operation, tiling, &Value::stored(&cases, input));
            let difference = largest_difference(&got, &Value::stored(&cases, name));
            report += &format!("  {name} {difference:.1e}");
            if difference > TOLERANCE {
                failures.push(format!("{}: {name} is off by {difference:e}", path.display()));
            }
        };
        if can_decode {
            check("decoded", VaeOperation::Decode, Tiling::Auto, "latent");
            check("decoded_half", VaeOperation::Decode, Tiling::Auto, "latent_half");
            check("decoded_in_tiles", VaeOperation::Decode, tiles(&cases, "decode_tiles"), "long_latent");
        }
        if can_encode {
            check("encoded", VaeOperation::Encode, Tiling::Auto, "image");
            check("encoded_in_tiles", VaeOperation::Encode, tiles(&cases, "encode_tiles"), "long_image");
        }
        println!("{:40}{report}", path.file_name().unwrap_or_default().to_string_lossy());
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn copied_weights_give_the_same_bits_and_survive_their_file() {
    let Some(folder) = golden() else { return };
    let apart = tempfile::tempdir().expect("a temporary folder");
    for (path, cases) in variants(&folder) {
        let moved = apart.path().join(path.file_name().expect("a name"));
        std::fs::copy(&path, &moved).expect("copying");
        let mut mapped = load(&moved, WeightStorage::Mapped);
        if !mapped.facts.can_decode {
            continue;
        }
        let latent = Value::stored(&cases, "latent");
        let expected = decode(&mut mapped, &latent);
        let mut copied = load(&moved, WeightStorage::Copied);
        std::fs::remove_file(&moved).expect("removing");
        assert!(decode(&mut copied, &latent).bytes == expected.bytes, "{}", path.display());
        let plan = mapped.facts.plan(
            &VaeCall { operation: VaeOperation::Decode, tiling: Tiling::Auto },
            &latent.meta,
            u64::MAX,
        );
        let stale = run_plan(&mut mapped, &plan.expect("a plan"), &latent, &|| false);
        assert!(matches!(stale, Err(ModelError::Changed { .. })), "a mapped file that is gone must be noticed");
        assert!(mapped.file.check_unchanged().is_err());
    }
}

#[test]
fn weights_off_their_alignment_give_the_same_bits() {
    let Some(folder) = golden() else { return };
    let bytes = std::fs::read(folder.join("quiet.ldm.safetensors")).expect("a generated file");
    let (length, rest) = bytes.split_at(8);
    let length = u64::from_le_bytes(length.try_into().expect("eight bytes"));
    let apart = tempfile::tempdir().expect("a temporary folder");
    let path = apart.path().join("quiet.safetensors");
    let (header, data) = rest.split_at(length as usize);
    std::fs::write(&path, [&(length + 1).to_le_bytes(), header, b" ", data].concat()).expect("writing");
    let cases = ModelFile::open(&folder.join("quiet.io.safetensors")).expect("a file of cases");
    let latent = Value::stored(&cases, "latent");
    let expected = decode(&mut load(&folder.join("quiet.ldm.safetensors"), WeightStorage::Mapped), &latent);
    for storage in [WeightStorage::Mapped, WeightStorage::Copied] {
        assert!(decode(&mut load(&path, storage), &latent).bytes == expected.bytes);
    }
}

#[test]
fn the_order_of_dimensions_in_memory_does_not_matter() {
    let Some(folder) = golden() else { return };
    for (path, cases) in variants(&folder) {
        let mut loaded = load(&path, WeightStorage::Mapped);
        if loaded.facts.can_decode {
            for name in ["latent", "latent_half"] {
                let latent = Value::stored(&cases, name);
                let expected = decode(&mut loaded, &latent);
                let channels_last = latent.laid_out([0, 2, 3, 1]);
                assert!(decode(&mut loaded, &channels_last).bytes == expected.bytes, "{} {name}", path.display());
            }
        }
        if loaded.facts.can_encode {
            let image = Value::stored(&cases, "image");
            let expected = encode(&mut loaded, &image);
            let channels_first = image.laid_out([0, 3, 1, 2]);
            assert!(encode(&mut loaded, &channels_first).bytes == expected.bytes, "{}", path.display());
        }
    }
}

#[test]
fn a_sample_does_not_depend_on_the_batch_it_is_in() {
    let Some(folder) = golden() else { return };
    let cases = ModelFile::open(&folder.join("kl4.io.safetensors")).expect("a file of cases");
    let mut loaded = load(&folder.join("kl4.ldm.safetensors"), WeightStorage::Mapped);
    let latent = Value::stored(&cases, "latent");
    let all = decode(&mut loaded, &latent);
    let &[samples, channels, height, width] = latent.meta.shape.as_slice() else { panic!("a latent") };
    let (part, result) = (latent.bytes.len() / samples as usize, all.bytes.len() / samples as usize);
    for at in 0..samples as usize {
        let meta = TensorMeta::contiguous(DType::F32, Dims::of([1, channels, height, width]));
        let one = Value { meta, bytes: latent.bytes[at * part..(at + 1) * part].to_vec() };
        assert!(decode(&mut loaded, &one).bytes == all.bytes[at * result..(at + 1) * result]);
    }
}

#[test]
fn an_alpha_channel_is_left_out() {
    let Some(folder) = golden() else { return };
    let cases = ModelFile::open(&folder.join("kl4.io.safetensors")).expect("a file of cases");
    let mut loaded = load(&folder.join("kl4.ldm.safetensors"), WeightStorage::Mapped);
    let image = Value::stored(&cases, "image");
    let &[samples, height, width, _] = image.meta.shape.as_slice() else { panic!("an image") };
    let pixels: Vec<f32> = image.numbers().chunks_exact(3).flat_map(|rgb| [rgb[0], rgb[1], rgb[2], f32::NAN]).collect();
    let with_alpha = Value::floats(&[samples, height, width, 4], &pixels);
    assert!(encode(&mut loaded, &with_alpha).bytes == encode(&mut loaded, &image).bytes);
}

#[test]
fn nan_in_the_input_shows_in_the_output() {
    let Some(folder) = golden() else { return };
    for name in ["kl4.ldm", "tiny4.diffusers"] {
        let mut loaded = load(&folder.join(format!("{name}.safetensors")), WeightStorage::Mapped);
        let mut latent = vec![0.5; 4 * 6 * 6];
        latent[40] = f32::NAN;
        let image = decode(&mut loaded, &Value::floats(&[1, 4, 6, 6], &latent)).numbers();
        assert!(image.iter().any(|value| value.is_nan()), "{name}");
        let side = loaded.facts.ratio * 2;
        let pixels = vec![f32::NAN; (side * side * 3) as usize];
        let encoded = encode(&mut loaded, &Value::floats(&[1, side, side, 3], &pixels)).numbers();
        assert!(encoded.iter().all(|value| value.is_nan()), "{name}");
    }
}

#[test]
fn one_tile_is_the_same_as_no_tiles() {
    let Some(folder) = golden() else { return };
    for (name, weights) in [("kl4", "kl4.ldm"), ("tiny4", "tiny4.diffusers")] {
        let cases = ModelFile::open(&folder.join(format!("{name}.io.safetensors"))).expect("a file of cases");
        let mut loaded = load(&folder.join(format!("{weights}.safetensors")), WeightStorage::Mapped);
        let large = Tiling::Tiles(TileShape { width: 256, height: 256, overlap: 64 });
        for (operation, input) in [(VaeOperation::Decode, "latent"), (VaeOperation::Encode, "image")] {
            let input = Value::stored(&cases, input);
            let full = run(&mut loaded, operation, Tiling::Auto, &input);
            assert!(run(&mut loaded, operation, large, &input).bytes == full.bytes, "{name} {operation:?}");
        }
    }
}

#[test]
fn a_call_can_be_stopped_between_tiles_and_between_samples() {
    let Some(folder) = golden() else { return };
    let cases = ModelFile::open(&folder.join("kl4.io.safetensors")).expect("a file of cases");
    let mut loaded = load(&folder.join("kl4.ldm.safetensors"), WeightStorage::Mapped);
    for (tiling, input) in [(tiles(&cases, "decode_tiles"), "long_latent"), (Tiling::Auto, "latent")] {
        let latent = Value::stored(&cases, input);
        let call = VaeCall { operation: VaeOperation::Decode, tiling };
        let plan = loaded.facts.plan(&call, &latent.meta, u64::MAX).expect("a plan");
        let asked = Cell::new(0);
        let stop = || {
            asked.set(asked.get() + 1);
            asked.get() == 3
        };
        let stopped = run_plan(&mut loaded, &plan, &latent, &stop);
        assert!(matches!(stopped, Err(ModelError::Cancelled)) && asked.get() == 3, "{tiling:?}");
        assert!(run_plan(&mut loaded, &plan, &latent, &|| false).is_ok(), "the model is as before");
    }
}

#[test]
fn a_slot_that_does_not_fit_is_an_error() {
    let Some(folder) = golden() else { return };
    let mut loaded = load(&folder.join("tiny4.diffusers.safetensors"), WeightStorage::Mapped);
    let latent = Value::floats(&[1, 4, 8, 8], &[0.0; 256]);
    let call = VaeCall { operation: VaeOperation::Decode, tiling: Tiling::Auto };
    let plan = loaded.facts.plan(&call, &latent.meta, u64::MAX).expect("a plan");
    let output = TensorMeta::contiguous(DType::F32, Dims::of([1, 64, 72, 3]));
    let refused = run_plan(&mut loaded, &VaePlan { output, ..plan }, &latent, &|| false);
    assert!(matches!(refused, Err(ModelError::Executor { .. })), "the result has another shape");
    let small = span(latent.bytes.len());
    let refused = loaded.vae.run(&plan, ModelInput { meta: latent.meta, memory: &small }, &small, &|| false);
    assert!(matches!(refused, Err(ModelError::Tensor(_))), "the slot is too small for the image");
}

#[test]
fn an_allocation_that_fails_is_out_of_memory_and_the_model_goes_on() {
    let Some(folder) = golden() else { return };
    let mut loaded = load(&folder.join("tiny4.diffusers.safetensors"), WeightStorage::Mapped);
    // One element repeated: an image of 13 TB in four bytes.
    let shape = Dims::of([1, 1 << 20, 1 << 20, 3]);
    let meta = TensorMeta::strided(DType::F32, shape, Dims::of([0, 0, 0, 0])).expect("valid strides");
    let call = VaeCall { operation: VaeOperation::Encode, tiling: Tiling::Auto };
    let plan = loaded.facts.plan(&call, &meta, u64::MAX).expect("a plan");
    // The model fails before it looks at the size of the result.
    let plan = VaePlan { output: TensorMeta::contiguous(DType::F32, Dims::of([1, 4, 1, 1])), ..plan };
    let (pixel, latent) = (span(4), span(16));
    let refused = loaded.vae.run(&plan, ModelInput { meta, memory: &pixel }, &latent, &|| false);
    assert!(matches!(refused, Err(ModelError::OutOfMemory { what: "encode", .. })), "{refused:?}");
    let image = decode(&mut loaded, &Value::floats(&[1, 4, 2, 2], &[0.25; 16]));
    assert!(image.numbers().iter().all(|value| value.is_finite()));
}

/// RGB of the photograph in 0…1, with its height and width.
fn photograph(path: &Path) -> (u64, u64, Vec<f32>) {
    let file = std::io::BufReader::new(std::fs::File::open(path).expect("the photograph"));
    let mut reader = png::Decoder::new(file).read_info().expect("a PNG");
    let (height, width, kind) = (reader.info().height, reader.info().width, reader.info().color_type);
    let channels = match kind {
        png::ColorType::Rgb => 3,
        png::ColorType::Rgba => 4,
        other => panic!("{other:?}"),
    };
    let mut bytes = vec![0; height as usize * width as usize * channels];
    reader.next_frame(&mut bytes).expect("eight bits per channel");
    let pixels = bytes.chunks_exact(channels).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]);
    (u64::from(height), u64::from(width), pixels.map(|value| f32::from(value) / 255.0).collect())
}

#[test]
fn a_photograph_survives_the_trained_tiny_autoencoder() {
    let (Some(weights), Some(picture)) = (shared("taef2.safetensors"), shared("photo.png")) else { return };
    let mut loaded = load(&weights, WeightStorage::Mapped);
    assert_eq!((loaded.facts.family, loaded.facts.latent_channels), ("taesd", 32));
    let (height, width, pixels) = photograph(&picture);
    let image = Value::floats(&[1, height, width, 3], &pixels);
    let latent = encode(&mut loaded, &image);
    assert_eq!(latent.meta.shape, Dims::of([1, 32, height / 8, width / 8]));
    let restored = decode(&mut loaded, &latent).numbers();
    let squares: f64 = restored.iter().zip(&pixels).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    let psnr = -10.0 * (squares / pixels.len() as f64).log10();
    println!("PSNR {psnr:.2} dB");
    assert!(psnr > 30.0, "{psnr}");
    let call = VaeCall { operation: VaeOperation::Decode, tiling: Tiling::Auto };
    let budget = height * width * loaded.facts.decode_bytes_per_pixel - 1;
    let small = Tiling::Tiles(TileShape { width: 32, height: 32, overlap: 8 });
    let plan = loaded.facts.plan(&VaeCall { tiling: small, ..call }, &latent.meta, budget).expect("tiles fit");
    assert!(matches!(plan.mode, VaeMode::Tiled(_)));
    let tiled = run_plan(&mut loaded, &plan, &latent, &|| false).unwrap_or_else(|error| panic!("{error}")).numbers();
    let off: f64 = tiled.iter().zip(&restored).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    let psnr = -10.0 * (off / pixels.len() as f64).log10();
    println!("tiled against whole {psnr:.2} dB");
    assert!(psnr > 30.0, "tiles show: {psnr}");
}
