//! What it costs that the broker, and not this process, runs a VAE: the same decode through the broker and in this
//! process, one after the other in turn. `cargo bench --bench remote_call`, or `make bench`.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use luna_broker::client::{CallOptions, Client, Input, VaeOutput};
use luna_broker::device::{Device, InProcessDevice, Span};
use luna_broker::model::torch::{LoadOptions, Target, load_vae};
use luna_broker::model::{ModelFile, Vae, VaeInput, VaePlan, WeightStorage, vae_facts};
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
    let rounds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(20);
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("taesd.safetensors");
    tiny::write(&path, WIDTH);
    let socket = folder.path().join("broker.sock").to_string_lossy().into_owned();
    let broker = Broker(
        Command::new(env!("CARGO_BIN_EXE_luna-broker"))
            .args(["serve", "--socket", &socket, "--vae-budget", "8G"])
            .stderr(Stdio::null())
            .spawn()?,
    );
    let client = connect(&socket)?;
    let mut here = InProcess::load(&path)?;
    let vae = client.vae(&path.to_string_lossy())?;
    let latent = here.latent()?;

    let mut remote = Vec::new();
    let mut local = Vec::new();
    for round in 0..=rounds {
        let started = Instant::now();
        let output = vae.call(CALL, Input::new(here.meta, &latent)?, &CallOptions::default())?;
        let round_trip = started.elapsed();
        let started = Instant::now();
        here.run()?;
        let in_process = started.elapsed();
        if round == 0 {
            here.compare(&output)?;
            continue;
        }
        remote.push((round_trip, Duration::from_nanos(output.times.finished_ns - output.times.started_ns)));
        local.push(in_process);
    }
    drop(broker);
    report(rounds, &remote, &local);
    Ok(())
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
    fn load(path: &Path) -> Result<Self, AnyError> {
        let file = Arc::new(ModelFile::open(path)?);
        let meta = TensorMeta::contiguous(DType::F32, Dims::of([1, vae_facts(&file)?.latent_channels, SIDE, SIDE]));
        let plan = vae_facts(&file)?.plan(&CALL, &meta, BUDGET_BYTES)?;
        let options = LoadOptions {
            target: &Target::Cpu,
            storage: WeightStorage::Mapped,
            memory: &InProcessDevice,
            progress: &|_, _| {},
        };
        let memory = |length: usize| Span::new(InProcessDevice.allocate(length)?, 0, length);
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

    fn run(&mut self) -> Result<(), AnyError> {
        let input = VaeInput { meta: self.meta, memory: &self.input };
        self.vae.run(&self.plan, input, &self.output, &|| false)?;
        Ok(())
    }

    /// Both ways must give the same picture, or their times compare nothing.
    fn compare(&self, output: &VaeOutput) -> Result<(), AnyError> {
        let mut here = vec![0; self.plan.output.size_bytes()?];
        self.output.read(&mut here)?;
        if output.tensor.bytes()? == here {
            Ok(())
        } else {
            Err("the broker's image differs from this process's".into())
        }
    }
}

fn report(rounds: usize, remote: &[(Duration, Duration)], local: &[Duration]) {
    let mut overhead: Vec<f64> = remote.iter().map(|(trip, run)| (*trip - *run).as_secs_f64()).collect();
    let mut shares: Vec<f64> =
        remote.iter().map(|(trip, run)| (*trip - *run).as_secs_f64() / run.as_secs_f64()).collect();
    let mut ratios: Vec<f64> =
        remote.iter().zip(local).map(|((trip, _), local)| trip.as_secs_f64() / local.as_secs_f64()).collect();
    let mut trips: Vec<f64> = remote.iter().map(|(trip, _)| trip.as_secs_f64()).collect();
    let mut here: Vec<f64> = local.iter().map(Duration::as_secs_f64).collect();
    println!("TAESD decode of 1024 x 1024 pixels on the CPU, {rounds} rounds, interleaved, medians");
    println!("  through the broker            {:9.1} ms", median(&mut trips) * 1e3);
    println!("  in this process               {:9.1} ms", median(&mut here) * 1e3);
    println!("  round trip - execution        {:9.3} ms", median(&mut overhead) * 1e3);
    let verdict = |holds: bool| if holds { "holds" } else { "DOES NOT HOLD" };
    let (share, ratio) = (median(&mut shares), median(&mut ratios));
    println!("  of the execution              {:9.3} %   at most 1 %: {}", share * 100.0, verdict(share <= 0.01));
    println!("  remote / in-process           {ratio:9.3}     at most 1.03: {}", verdict(ratio <= 1.03));
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
