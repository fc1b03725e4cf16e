//! VAE executors on a GPU against the same on the CPU. Each test is skipped, and says why, where no GPU can be opened.
//!
//! Run from a prebuilt binary as well as by cargo: nothing here needs files or programs of the build.
#![cfg(all(feature = "torch", feature = "cuda", target_os = "linux"))]

#[path = "support/autoencoder.rs"]
mod autoencoder;
#[path = "support/mod.rs"]
mod support;
#[path = "support/tiny.rs"]
mod tiny;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use luna_broker::client::Input;
use luna_broker::config::BrokerConfig;
use luna_broker::device::cuda::Driver;
use luna_broker::device::{CudaDevice, CudaSharing, Device, InProcessDevice, Region, Span};
use luna_broker::model::torch::{CudaSwitches, LoadOptions, Target, TorchCuda, load_vae};
use luna_broker::model::{ModelError, ModelFile, ModelInput, Vae, VaeFacts, VaePlan, WeightStorage, vae_facts};
use luna_broker::service::{Precision, TileShape, Tiling, VaeCall, VaeMode, VaeOperation};
use luna_broker::tensor::{DType, Dims, TensorMeta};

/// Largest relative difference (root of summed squares) from float32 on the CPU. Float32 differs by the order of its
/// sums; TF32, which the tests switch off, would show as 1e-3.
const TOLERANCES: [(Precision, f64); 3] = [(Precision::F32, 1e-4), (Precision::Bf16, 3e-2), (Precision::F16, 5e-3)];
/// Bytes beside a slot that must stay as they were.
const MARGIN: usize = 512;
/// What a margin holds.
const UNTOUCHED: u8 = 0xa5;

/// The first GPU, for one test at a time.
struct Gpu {
    lane: TorchCuda,
    memory: Arc<CudaDevice>,
    _turn: MutexGuard<'static, ()>,
}

/// `None`, with a word about it, where there is no GPU to run on. Comes first in every test: once anything has computed
/// on the CPU, a GPU can no longer be opened in this process.
fn gpu() -> Option<Gpu> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let lane = match TorchCuda::open(0) {
        Ok(lane) => lane,
        Err(why) => {
            eprintln!("skipped: {why}");
            return None;
        }
    };
    let first = Driver::get().expect("a driver, as the tensor library found one").gpus()[0].uuid;
    let memory = CudaDevice::open(first, CudaSharing::Ipc).expect("the GPU's memory");
    // Results repeat bit by bit, and float32 is float32.
    let switches = lane.switches().expect("switches");
    lane.set_switches(CudaSwitches {
        cudnn_deterministic: true,
        tf32_convolution: false,
        tf32_matmul: false,
        ..switches
    })
    .expect("switches are set");
    Some(Gpu { lane, memory, _turn: turn })
}

impl Gpu {
    fn target(&self, precision: Precision) -> Target {
        Target::Cuda { lane: self.lane.clone(), precision: Some(precision) }
    }

    fn allocated(&self) -> u64 {
        self.lane.memory().expect("statistics").allocated_bytes
    }

    /// Occupies the GPU until only about `left` bytes are free.
    fn leave(&self, left: u64) -> Arc<dyn Region> {
        self.lane.empty_cache().expect("memory given back");
        let (free, _) = self.memory.free_and_total_bytes().expect("the driver says");
        println!("{free} bytes are free, leaving {left}");
        self.memory.allocate(usize::try_from(free - left).expect("64 bits")).expect("what is free can be allocated")
    }
}

struct Loaded {
    facts: VaeFacts,
    vae: Box<dyn Vae>,
}

fn load(path: &Path, target: &Target) -> Loaded {
    let file = Arc::new(ModelFile::open(path).expect("a valid file"));
    let facts = vae_facts(&file).unwrap_or_else(|error| panic!("{error}"));
    let facts = facts.clone().in_precision(target.precision(&facts));
    let options =
        LoadOptions { target, storage: WeightStorage::Mapped, memory: &InProcessDevice, progress: &|_, _| {} };
    Loaded { vae: load_vae(file, options).unwrap_or_else(|error| panic!("{error}")), facts }
}

/// A folder with both kinds of autoencoder.
struct Files {
    _folder: tempfile::TempDir,
    kl: PathBuf,
    tiny: PathBuf,
}

fn files() -> Files {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (kl, tiny) = (folder.path().join("kl.safetensors"), folder.path().join("taesd.safetensors"));
    autoencoder::write(&kl);
    tiny::write(&tiny, 16);
    Files { _folder: folder, kl, tiny }
}

/// A tensor's bytes with their description.
struct Value {
    meta: TensorMeta,
    bytes: Vec<u8>,
}

impl Value {
    /// Float32 numbers between `low` and `high` that no layer is indifferent to.
    fn waves(shape: [u64; 4], low: f32, high: f32) -> Self {
        let meta = TensorMeta::contiguous(DType::F32, Dims::of(shape));
        let number =
            |at: usize| low + (high - low) * (0.5 + 0.5 * (at as f32 * 0.37 + (at as f32 * 0.011).sin()).sin());
        let bytes = (0..meta.elements().expect("small")).flat_map(|at| number(at).to_ne_bytes()).collect();
        Self { meta, bytes }
    }

    /// The same with the channels innermost in memory.
    fn channels_last(&self) -> Self {
        let &[samples, channels, height, width] = self.meta.shape.as_slice() else { panic!("four dimensions") };
        let strides = Dims::of([channels * height * width, 1, width * channels, channels]);
        let meta = TensorMeta::strided(self.meta.dtype, self.meta.shape, strides).expect("valid strides");
        let mut bytes = vec![0; self.bytes.len()];
        for (at, element) in self.bytes.chunks_exact(4).enumerate() {
            let at = at as u64;
            let (x, y) = (at % width, at / width % height);
            let (channel, sample) = (at / (width * height) % channels, at / (width * height * channels));
            let place = (((sample * height + y) * width + x) * channels + channel) as usize * 4;
            bytes[place..place + 4].copy_from_slice(element);
        }
        assert_eq!(samples * channels * height * width * 4, bytes.len() as u64);
        Self { meta, bytes }
    }

    fn numbers(&self) -> Vec<f32> {
        self.bytes.chunks_exact(4).map(|bytes| f32::from_ne_bytes(bytes.try_into().expect("four bytes"))).collect()
    }
}

/// Memory on `device` with a marked margin at both ends.
fn span(device: &dyn Device, bytes: usize) -> Span {
    let region = device.allocate(bytes + 2 * MARGIN).expect("memory");
    region.copy_in(0, &vec![UNTOUCHED; bytes + 2 * MARGIN]).expect("it fits");
    Span::new(region, MARGIN, bytes).expect("a range of the region")
}

fn check_margins(span: &Span) {
    let mut all = vec![0; span.length() + 2 * MARGIN];
    span.region().copy_out(0, &mut all).expect("it fits");
    let beside = all[..MARGIN].iter().chain(&all[MARGIN + span.length()..]);
    assert!(beside.clone().all(|&byte| byte == UNTOUCHED), "something was written beside the slot");
}

/// Where input and output of a call live.
#[derive(Clone, Copy)]
struct Places<'a> {
    input: &'a dyn Device,
    output: &'a dyn Device,
    /// The lane, where somebody must wait for it before the output can be read.
    lane: Option<&'a TorchCuda>,
}

const HOST: Places<'static> = Places { input: &InProcessDevice, output: &InProcessDevice, lane: None };

fn run_plan(
    loaded: &mut Loaded,
    plan: &VaePlan,
    input: &Value,
    places: Places<'_>,
) -> Result<(VaeMode, Value), ModelError> {
    let source = span(places.input, input.bytes.len());
    let target = span(places.output, plan.output.size_bytes().expect("a size"));
    source.write(&input.bytes).expect("it fits");
    let mode = loaded.vae.run(plan, ModelInput { meta: input.meta, memory: &source }, &target, &|| false)?;
    if let Some(lane) = places.lane {
        lane.synchronize()?;
    }
    check_margins(&source);
    check_margins(&target);
    let mut bytes = vec![0; target.length()];
    target.read(&mut bytes).expect("it fits");
    Ok((mode, Value { meta: plan.output, bytes }))
}

fn plan(facts: &VaeFacts, operation: VaeOperation, tiling: Tiling, input: &Value) -> VaePlan {
    facts.plan(&VaeCall { operation, tiling }, &input.meta, u64::MAX).expect("a plan")
}

fn run(loaded: &mut Loaded, operation: VaeOperation, input: &Value, places: Places<'_>) -> Value {
    let plan = plan(&loaded.facts, operation, Tiling::Auto, input);
    run_plan(loaded, &plan, input, places).unwrap_or_else(|error| panic!("{error}")).1
}

/// Length of the difference as a part of the length of what is expected; infinite where anything is NaN.
fn relative_difference(got: &Value, expected: &Value) -> f64 {
    assert_eq!(got.meta, expected.meta);
    let (mut difference, mut length) = (0.0, 0.0);
    for (got, expected) in got.numbers().into_iter().zip(expected.numbers()) {
        difference += f64::from(got - expected).powi(2);
        length += f64::from(expected).powi(2);
    }
    if difference.is_nan() { f64::INFINITY } else { (difference / length).sqrt() }
}

/// The calls that every model is compared on: a batch, sides that are no multiples of each other, strided tiles.
fn cases(files: &Files) -> Vec<(&Path, VaeOperation, Value)> {
    vec![
        (&files.kl, VaeOperation::Decode, Value::waves([2, 4, 24, 40], -2.0, 2.0)),
        (&files.kl, VaeOperation::Encode, Value::waves([2, 47, 64, 3], 0.0, 1.0)),
        (&files.tiny, VaeOperation::Decode, Value::waves([2, 4, 12, 20], -2.0, 2.0)),
    ]
}

#[test]
fn every_precision_agrees_with_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let files = files();
    let mut failures = Vec::new();
    for (path, operation, input) in cases(&files) {
        let expected = run(&mut load(path, &Target::Cpu), operation, &input, HOST);
        for (precision, tolerance) in TOLERANCES {
            let mut loaded = load(path, &gpu.target(precision));
            let got = run(&mut loaded, operation, &input, HOST);
            let difference = relative_difference(&got, &expected);
            let what = format!("{} {operation:?} {}: {difference:.2e}", loaded.facts.family, precision.name());
            println!("{what}");
            if difference > tolerance {
                failures.push(what);
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn tiles_on_a_gpu_agree_with_tiles_on_the_cpu() {
    let Some(gpu) = gpu() else { return };
    let files = files();
    let latent = Value::waves([1, 4, 40, 56], -2.0, 2.0);
    let tiles = Tiling::Tiles(TileShape { width: 16, height: 16, overlap: 4 });
    let mut on_cpu = load(&files.tiny, &Target::Cpu);
    let plan = plan(&on_cpu.facts, VaeOperation::Decode, tiles, &latent);
    let (_, expected) = run_plan(&mut on_cpu, &plan, &latent, HOST).expect("it runs");
    let mut on_gpu = load(&files.tiny, &gpu.target(Precision::F32));
    let (mode, got) = run_plan(&mut on_gpu, &plan, &latent, HOST).expect("it runs");
    assert_eq!(mode, plan.mode);
    let difference = relative_difference(&got, &expected);
    println!("{difference:.2e}");
    assert!(difference < 1e-4, "{difference:e}");
}

#[test]
fn memory_of_the_gpu_gives_the_same_bits_as_memory_of_the_host() {
    let Some(gpu) = gpu() else { return };
    let files = files();
    let memory: &dyn Device = &*gpu.memory;
    for (path, operation, input) in cases(&files) {
        for (precision, _) in TOLERANCES {
            let mut loaded = load(path, &gpu.target(precision));
            assert_eq!(loaded.vae.stream(), Some(gpu.lane.stream()));
            let expected = run(&mut loaded, operation, &input, HOST);
            for (from, to) in [(true, false), (false, true), (true, true)] {
                let place = |gpu| if gpu { memory } else { &InProcessDevice };
                let places = Places { input: place(from), output: place(to), lane: Some(&gpu.lane) };
                let got = run(&mut loaded, operation, &input, places);
                assert!(
                    got.bytes == expected.bytes,
                    "{} {operation:?} {} {from} {to}",
                    path.display(),
                    precision.name()
                );
            }
            if operation == VaeOperation::Decode {
                let places = Places { input: memory, output: memory, lane: Some(&gpu.lane) };
                let got = run(&mut loaded, operation, &input.channels_last(), places);
                assert!(got.bytes == expected.bytes, "{} with channels innermost", path.display());
            }
        }
    }
}

#[test]
fn work_on_memory_of_the_gpu_is_enqueued_on_the_lanes_stream_and_not_waited_for() {
    let Some(gpu) = gpu() else { return };
    let files = files();
    let latent = Value::waves([1, 4, 24, 40], -2.0, 2.0);
    let mut loaded = load(&files.kl, &gpu.target(Precision::F32));
    let expected = run(&mut loaded, VaeOperation::Decode, &latent, HOST);
    let plan = plan(&loaded.facts, VaeOperation::Decode, Tiling::Auto, &latent);
    let (source, target) = (span(&*gpu.memory, latent.bytes.len()), span(&*gpu.memory, expected.bytes.len()));
    let pause = Duration::from_secs(3);
    gpu.memory.delay(gpu.lane.stream(), pause).expect("a pause");
    let started = Instant::now();
    loaded.vae.run(&plan, ModelInput { meta: latent.meta, memory: &source }, &target, &|| false).expect("it runs");
    let returned = started.elapsed();
    // Enqueued behind the pause: what is written here until it ends is what the network reads.
    source.write(&latent.bytes).expect("it fits");
    let mut early = vec![0; target.length()];
    target.read(&mut early).expect("it fits");
    println!("the call returned after {returned:?}");
    if started.elapsed() < pause / 2 {
        assert!(early.iter().all(|&byte| byte == UNTOUCHED), "the call did not wait for its stream");
    } else {
        eprintln!("skipped in part: the call took as long as the pause, so nothing can be said of who waited");
    }
    gpu.lane.synchronize().expect("the stream ends");
    let mut late = vec![0; target.length()];
    target.read(&mut late).expect("it fits");
    if started.elapsed() >= pause && returned < pause / 2 {
        assert!(late == expected.bytes, "the network read its input where the stream came to it");
    }
    check_margins(&target);
}

#[test]
fn lanes_have_streams_of_their_own() {
    let Some(gpu) = gpu() else { return };
    let other = TorchCuda::open(0).expect("it opened before");
    assert_ne!(other.stream(), gpu.lane.stream());
    assert_ne!(gpu.lane.stream().0, 0, "work of one lane does not wait for everybody's default stream");
    assert_eq!(gpu.lane.clone().stream(), gpu.lane.stream());
    assert!(matches!(TorchCuda::open(4096), Err(ModelError::Cuda(_))));
}

#[test]
fn a_call_that_does_not_fit_runs_in_tiles_and_one_that_never_does_gives_all_memory_back() {
    let Some(gpu) = gpu() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("taesd.safetensors");
    tiny::write(&path, 64);
    let mut loaded = load(&path, &gpu.target(Precision::F32));
    let latent = Value::waves([1, 4, 256, 256], -2.0, 2.0);
    let full = plan(&loaded.facts, VaeOperation::Decode, Tiling::Auto, &latent);
    let tiles = TileShape { width: 64, height: 64, overlap: 16 };
    let tiled = VaePlan { mode: VaeMode::Tiled(tiles), ..full };
    let weights = gpu.allocated();
    // Both ways run once before memory is short: kernels are loaded with their first use, and need some as well.
    let peak = |loaded: &mut Loaded, plan: &VaePlan| {
        gpu.lane.empty_cache().expect("memory given back");
        gpu.lane.reset_peak().expect("statistics");
        let (mode, image) = run_plan(loaded, plan, &latent, HOST).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(mode, plan.mode);
        (gpu.lane.memory().expect("statistics").peak_reserved_bytes, image)
    };
    let (in_tiles, expected) = peak(&mut loaded, &tiled);
    let (in_one, whole) = peak(&mut loaded, &full);
    println!(
        "peaks: {in_one} in one piece, {in_tiles} in tiles; planned {}",
        loaded.facts.decode_bytes_per_pixel << 22
    );
    assert!(in_tiles < in_one / 2);

    let filler = gpu.leave(in_tiles + (in_one - in_tiles) / 2);
    let (mode, image) = run_plan(&mut loaded, &full, &latent, HOST).expect("it fits in tiles");
    assert_eq!(mode, VaeMode::Tiled(tiles));
    assert!(image.bytes == expected.bytes, "the picture is that of tiles");
    assert_eq!(gpu.allocated(), weights, "nothing but the weights is left");
    drop(filler);

    let filler = gpu.leave(in_tiles / 4);
    let before = gpu.lane.memory().expect("statistics").reserved_bytes;
    let refused = run_plan(&mut loaded, &full, &latent, HOST);
    assert!(matches!(refused, Err(ModelError::OutOfMemory { what: "decode", .. })), "{:?}", refused.err());
    assert_eq!(gpu.allocated(), weights, "nothing but the weights is left");
    let after = gpu.lane.memory().expect("statistics").reserved_bytes;
    assert!(after <= before, "{after} bytes are kept, {before} were before");
    drop(filler);

    let (mode, image) = run_plan(&mut loaded, &full, &latent, HOST).expect("there is room again");
    assert_eq!(mode, VaeMode::Full);
    assert!(image.bytes == whole.bytes, "the model is as before");
}

#[test]
fn weights_on_a_gpu_outlive_their_file_and_go_with_the_model() {
    let Some(gpu) = gpu() else { return };
    let files = files();
    let before = gpu.allocated();
    let latent = Value::waves([1, 4, 12, 20], -2.0, 2.0);
    let mut loaded = load(&files.tiny, &gpu.target(Precision::F16));
    assert!(gpu.allocated() >= before + loaded.facts.weight_bytes);
    let expected = run(&mut loaded, VaeOperation::Decode, &latent, HOST);
    std::fs::remove_file(&files.tiny).expect("removing");
    assert!(run(&mut loaded, VaeOperation::Decode, &latent, HOST).bytes == expected.bytes);
    drop(loaded);
    assert_eq!(gpu.allocated(), before, "weights are freed");
}

#[test]
fn nan_in_the_input_shows_in_the_output() {
    let Some(gpu) = gpu() else { return };
    let files = files();
    for (path, precision) in [(&files.kl, Precision::Bf16), (&files.tiny, Precision::F32)] {
        let mut latent = Value::waves([1, 4, 12, 20], -2.0, 2.0);
        latent.bytes[400..404].copy_from_slice(&f32::NAN.to_ne_bytes());
        let image = run(&mut load(path, &gpu.target(precision)), VaeOperation::Decode, &latent, HOST);
        assert!(image.numbers().iter().any(|value| value.is_nan()), "{}", path.display());
    }
}

#[test]
fn a_model_on_the_cpu_refuses_memory_of_a_gpu() {
    let Some(gpu) = gpu() else { return };
    let files = files();
    let latent = Value::waves([1, 4, 12, 20], -2.0, 2.0);
    let mut loaded = load(&files.tiny, &Target::Cpu);
    let plan = plan(&loaded.facts, VaeOperation::Decode, Tiling::Auto, &latent);
    let places = Places { input: &*gpu.memory, ..HOST };
    let refused = run_plan(&mut loaded, &plan, &latent, places);
    assert!(matches!(refused, Err(ModelError::Executor { .. })));
}

#[test]
fn a_broker_runs_models_on_the_gpu_it_is_told_to() {
    let Some(gpu) = gpu() else { return };
    let files = files();
    let latent = Value::waves([1, 4, 24, 40], -2.0, 2.0);
    let expected = run(&mut load(&files.kl, &Target::Cpu), VaeOperation::Decode, &latent, HOST);
    for device in ["cuda:0".to_owned(), gpu.memory.gpu().uuid.to_string()] {
        let place = support::Place::new();
        let config = BrokerConfig { device, vae_precision: Some(Precision::F32), ..support::config() };
        let _broker = support::broker_at(&place, config);
        let client = support::client_at(&place);
        let vae = client.vae(&files.kl.to_string_lossy()).expect("the model is known");
        assert_eq!(vae.info().device, gpu.memory.gpu().uuid.to_string());
        let image = vae.decode(Input::new(latent.meta, &latent.bytes).expect("it fits")).expect("it runs");
        let got = Value { meta: *image.meta(), bytes: image.bytes().expect("host memory").to_vec() };
        let difference = relative_difference(&got, &expected);
        assert!(difference < 1e-4, "{difference:e}");
    }
}

#[test]
fn the_models_of_these_tests_are_models() {
    // Opened first, so that a GPU can still be used by the tests after this one.
    let _gpu = gpu();
    let files = files();
    for (path, operation, input) in cases(&files) {
        let mut loaded = load(path, &Target::Cpu);
        let result = run(&mut loaded, operation, &input, HOST);
        let reordered = run(&mut loaded, operation, &input.channels_last(), HOST);
        assert!(reordered.bytes == result.bytes, "the same numbers in another order in memory");
        let numbers = result.numbers();
        let mean = numbers.iter().sum::<f32>() / numbers.len() as f32;
        let spread = numbers.iter().map(|value| (value - mean).powi(2)).sum::<f32>() / numbers.len() as f32;
        println!("{} {operation:?}: mean {mean}, variance {spread}", loaded.facts.family);
        assert!(spread.is_finite() && spread > 1e-4, "a result that says something");
    }
    assert_eq!(load(&files.kl, &Target::Cpu).facts.ratio, autoencoder::RATIO);
}
