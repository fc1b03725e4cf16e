//! What it costs that the broker, and not this process, runs a VAE: the same decode through the broker and in this
//! process, one after the other in turn. `cargo bench --bench remote_call`, or `make bench`; with the word `cuda` behind
//! it both run on the first GPU. `LUNA_BROKER_BIN` names the broker where it is not the one built along.

use std::env;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use luna_broker::client::{CallOptions, Client, Input, VaeOutput};
use luna_broker::device::cuda::{CudaStream, Driver};
use luna_broker::device::{CudaDevice, CudaSharing, Device, GpuRange, InProcessDevice, Place, Span};
use luna_broker::model::torch::{LoadOptions, Target, TorchCuda, load_vae};
use luna_broker::model::{ModelFile, ModelInput, Vae, VaePlan, WeightStorage, vae_facts};
use luna_broker::service::{Tiling, VaeCall, VaeOperation};
use luna_broker::tensor::{DType, Dims, TensorMeta};

#[path = "../tests/support/tiny.rs"]
mod tiny;

type AnyError = Box<dyn std::error::Error>;

/// Channels inside the network: those of the published TAESD.
const WIDTH: usize = 64;
/// Latent sides: an image of 1024 × 1024.
const SIDE: u64 = 128;
const CALL: VaeCall = VaeCall { operation: VaeOperation::Decode, tiling: Tiling::Auto };
/// Enough for one piece at this size.
const BUDGET_BYTES: u64 = 8 << 30;

fn main() -> Result<(), AnyError> {
    // The flags that `cargo bench` passes on are not ours; a number is.
    let rounds = env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(20);
    // Opened before anything computes: afterwards the tensor library no longer would.
    let gpu = if env::args().any(|argument| argument == "cuda") { Some(Gpu::open()?) } else { None };
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("taesd.safetensors");
    tiny::write(&path, WIDTH);
    let socket = folder.path().join("broker.sock").to_string_lossy().into_owned();
    let program = env::var_os("LUNA_BROKER_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_luna-broker").into());
    let device = if gpu.is_some() { "cuda" } else { "cpu" };
    let arguments = ["serve", "--socket", &socket, "--vae-budget", "8G", "--device", device];
    let broker = Broker(Command::new(program).args(arguments).stderr(Stdio::null()).spawn()?);
    let client = connect(&socket)?;
    let mut here = InProcess::load(&path, gpu.as_ref())?;
    let vae = client.vae(&path.to_string_lossy())?;
    let latent = here.latent()?;

    let mut remote = Vec::new();
    let mut local = Vec::new();
    for round in 0..=rounds {
        let started = Instant::now();
        let output = vae.call(CALL, here.input(&latent, gpu.as_ref())?, &CallOptions::default())?;
        if let Some(gpu) = &gpu {
            // The answer comes before the GPU is done.
            output.tensor.use_on(gpu.stream.handle())?;
            gpu.stream.synchronize()?;
        }
        let round_trip = started.elapsed();
        let started = Instant::now();
        here.run()?;
        if let Some(gpu) = &gpu {
            gpu.lane.synchronize()?;
        }
        let in_process = started.elapsed();
        if round == 0 {
            here.compare(&output)?;
            continue;
        }
        remote.push((round_trip, Duration::from_nanos(output.times.finished_ns - output.times.started_ns)));
        local.push(in_process);
    }
    drop(broker);
    println!("TAESD decode of 1024 x 1024 pixels on the {device}, {rounds} rounds, interleaved, medians");
    report(&remote, &local, gpu.is_none());
    Ok(())
}

/// The first GPU: its memory, the tensor library's lane there, and a stream of this program's own.
struct Gpu {
    lane: TorchCuda,
    memory: Arc<CudaDevice>,
    stream: CudaStream,
}

impl Gpu {
    fn open() -> Result<Self, AnyError> {
        let lane = TorchCuda::open(0)?;
        let first = Driver::get()?.gpus().first().ok_or("the driver shows no GPU")?.uuid;
        let memory = CudaDevice::open(first, CudaSharing::Ipc)?;
        Ok(Self { lane, stream: memory.stream()?, memory })
    }
}

/// Killed with this program, however that ends.
struct Broker(Child);

impl Drop for Broker {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

fn connect(socket: &str) -> Result<Client, AnyError> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match Client::connect(Some(socket)) {
            Ok(client) => return Ok(client),
            Err(error) if Instant::now() > deadline => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The same model in this process, on memory that is already warm.
struct InProcess {
    vae: Box<dyn Vae>,
    plan: VaePlan,
    meta: TensorMeta,
    input: Span,
    output: Span,
}

impl InProcess {
    fn load(path: &Path, gpu: Option<&Gpu>) -> Result<Self, AnyError> {
        let file = Arc::new(ModelFile::open(path)?);
        let meta = TensorMeta::contiguous(DType::F32, Dims::of([1, vae_facts(&file)?.latent_channels, SIDE, SIDE]));
        let plan = vae_facts(&file)?.plan(&CALL, &meta, BUDGET_BYTES)?;
        let target = gpu.map_or(Target::Cpu, |gpu| Target::Cuda { lane: gpu.lane.clone(), precision: None });
        let device: &dyn Device = gpu.map_or(&InProcessDevice, |gpu| &*gpu.memory);
        let options = LoadOptions {
            target: &target,
            storage: WeightStorage::Mapped,
            memory: &InProcessDevice,
            progress: &|_, _| {},
        };
        let memory = |length: usize| Span::new(device.allocate(length)?, 0, length);
        let (input, output) = (memory(meta.size_bytes()?)?, memory(plan.output.size_bytes()?)?);
        Ok(Self { vae: load_vae(file, options)?, plan, meta, input, output })
    }

    /// A latent, also left where the model in this process reads it.
    fn latent(&self) -> Result<Vec<u8>, AnyError> {
        let values = (0..self.meta.elements()?).map(|at| (at as f32 * 0.37).sin() * 2.0);
        let bytes: Vec<u8> = values.flat_map(f32::to_ne_bytes).collect();
        self.input.write(&bytes)?;
        Ok(bytes)
    }

    /// The latent as a caller on the same device has it.
    fn input<'a>(&'a self, latent: &'a [u8], gpu: Option<&Gpu>) -> Result<Input<'a>, AnyError> {
        let Some(gpu) = gpu else { return Ok(Input::new(self.meta, latent)?) };
        let (address, length) = (self.input.address(), self.input.length());
        // SAFETY: the span lives as long as the borrow; the stream as long as the program.
        let range = unsafe { GpuRange::new(gpu.memory.gpu().uuid, address, length, gpu.stream.handle()) };
        Ok(Input::on_gpu(self.meta, range)?)
    }

    fn run(&mut self) -> Result<(), AnyError> {
        let input = ModelInput { meta: self.meta, memory: &self.input };
        self.vae.run(&self.plan, input, &self.output, &|| false)?;
        Ok(())
    }

    /// Both ways must give the same picture, or their times compare nothing. A GPU's kernels may be chosen anew in each
    /// process, and then differ in the last bits of their precision.
    fn compare(&self, output: &VaeOutput) -> Result<(), AnyError> {
        let mut here = vec![0; self.plan.output.size_bytes()?];
        self.output.read(&mut here)?;
        let there = output.tensor.to_vec()?;
        let floats =
            |bytes: &[u8]| -> Vec<f32> { bytes.as_chunks().0.iter().map(|four| f32::from_ne_bytes(*four)).collect() };
        let is_close = |(here, there): (&f32, &f32)| (here - there).abs() < 0.05;
        let is_same = match output.tensor.place() {
            Place::Host => there == here,
            Place::Gpu(_) => floats(&here).iter().zip(&floats(&there)).all(is_close),
        };
        if is_same { Ok(()) } else { Err("the broker's image differs from this process's".into()) }
    }
}

fn report(remote: &[(Duration, Duration)], local: &[Duration], waits: bool) {
    let mut overhead: Vec<f64> = remote.iter().map(|(trip, run)| (*trip - *run).as_secs_f64()).collect();
    let mut shares: Vec<f64> =
        remote.iter().map(|(trip, run)| (*trip - *run).as_secs_f64() / run.as_secs_f64()).collect();
    let mut ratios: Vec<f64> =
        remote.iter().zip(local).map(|((trip, _), local)| trip.as_secs_f64() / local.as_secs_f64()).collect();
    let mut trips: Vec<f64> = remote.iter().map(|(trip, _)| trip.as_secs_f64()).collect();
    let mut here: Vec<f64> = local.iter().map(Duration::as_secs_f64).collect();
    println!("  through the broker            {:9.3} ms", median(&mut trips) * 1e3);
    println!("  in this process               {:9.3} ms", median(&mut here) * 1e3);
    let verdict = |holds: bool| if holds { "holds" } else { "DOES NOT HOLD" };
    // The broker's clock stops when work for a GPU is enqueued, which says nothing of how long it takes.
    if waits {
        let share = median(&mut shares);
        println!("  round trip - execution        {:9.3} ms", median(&mut overhead) * 1e3);
        println!("  of the execution              {:9.3} %   at most 1 %: {}", share * 100.0, verdict(share <= 0.01));
    }
    let ratio = median(&mut ratios);
    println!("  remote / in-process           {ratio:9.3}     at most 1.03: {}", verdict(ratio <= 1.03));
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
