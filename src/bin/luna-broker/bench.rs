use std::time::Instant;

use luna_broker::client::{Client, Input, Vae};
use luna_broker::tensor::{DType, Dims, TensorMeta};
use luna_broker::{Error, ErrorKind};
use serde::Serialize;

use crate::args::{BenchArgs, ConnectionArgs};
use crate::control::{print_json, print_text};

/// The sizes measured when none is named: images of 1, 12.6 and 100 MB.
const LATENTS: [(u64, u64); 3] = [(36, 36), (128, 128), (361, 361)];

/// A latent in float16 and its image in float32, per latent row and column.
const IMAGE_BYTES_PER_ELEMENT: u64 = 8 * 8 * 3 * 4;

#[derive(Debug, Serialize)]
struct Report {
    rung: String,
    reason: String,
    control: Percentiles,
    hand_off: Vec<HandOff>,
}

#[derive(Debug, Serialize)]
struct HandOff {
    shape: [u64; 2],
    image_bytes: u64,
    #[serde(flatten)]
    latency: Percentiles,
}

#[derive(Debug, Serialize)]
struct Percentiles {
    p50_us: f64,
    p99_us: f64,
}

/// Measures the empty round trip and the hand-off of a latent for an image.
pub(crate) fn run(connection: &ConnectionArgs, args: &BenchArgs) -> Result<(), Error> {
    if let Some(core) = args.core {
        confine_to(core)?;
    }
    let client = Client::connect_with(Some(&connection.address()), connection.client_config()?)?;
    let session = client.session();
    let (rung, reason) =
        session.rungs.first().map_or_else(Default::default, |rung| (rung.rung.to_string(), rung.reason.to_string()));
    let control = measure(args, || client.ping().map(|_| ()))?;
    let vae = client.vae("builtin:hand-off")?;
    let latents = if args.latent.is_empty() { &LATENTS[..] } else { &args.latent };
    let hand_off = latents.iter().map(|&latent| hand_off(args, &vae, latent)).collect::<Result<_, _>>()?;
    let report = Report { rung, reason, control, hand_off };
    if args.json { print_json(&report) } else { print_text(&text(&report)) }
}

fn hand_off(args: &BenchArgs, vae: &Vae, (height, width): (u64, u64)) -> Result<HandOff, Error> {
    let meta = TensorMeta::contiguous(DType::F16, Dims::of([1, 4, height, width]));
    // Zeros cross as fast as anything else; one mark shows that the answer is this latent's.
    let mut latent = vec![0u8; meta.size_bytes()?];
    let mut round = 0u8;
    let latency = measure(args, || {
        round = round % 15 + 1;
        latent[..2].copy_from_slice(&half::f16::from(round).to_ne_bytes());
        let image = vae.decode(Input::new(meta, &latent)?)?;
        let first = image.bytes()?.first_chunk::<4>().copied().unwrap_or_default();
        if f32::from_ne_bytes(first) == f32::from(round) {
            Ok(())
        } else {
            Err(Error::new(ErrorKind::Internal, "the image is not the one of this latent", "report this"))
        }
    })?;
    Ok(HandOff { shape: [height, width], image_bytes: height * width * IMAGE_BYTES_PER_ELEMENT, latency })
}

fn measure(args: &BenchArgs, mut once: impl FnMut() -> Result<(), Error>) -> Result<Percentiles, Error> {
    for _ in 0..args.warm_up {
        once()?;
    }
    let mut taken = Vec::with_capacity(args.iterations.max(1));
    for _ in 0..args.iterations.max(1) {
        let started = Instant::now();
        once()?;
        taken.push(started.elapsed());
    }
    taken.sort();
    let at = |share: f64| taken[((taken.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
    Ok(Percentiles { p50_us: at(0.5), p99_us: at(0.99) })
}

fn confine_to(core: usize) -> Result<(), Error> {
    #[cfg(target_os = "linux")]
    {
        let mut set = rustix::thread::CpuSet::new();
        set.set(core);
        rustix::thread::sched_setaffinity(None, &set).map_err(|errno| {
            Error::new(ErrorKind::Configuration, format!("core {core}: {errno}"), "name a core this machine has")
        })
    }
    #[cfg(not(target_os = "linux"))]
    Err(Error::new(ErrorKind::Unsupported, format!("--core {core} works on Linux only"), "leave it out"))
}

fn text(report: &Report) -> String {
    let mut text = format!("rung {}: {}\n", report.rung, report.reason);
    text += &format!("{:<28}{:>12}{:>12}\n", "", "p50 µs", "p99 µs");
    let mut row = |name: String, latency: &Percentiles| {
        text += &format!("{name:<28}{:>12.1}{:>12.1}\n", latency.p50_us, latency.p99_us);
    };
    row("empty round trip".to_owned(), &report.control);
    for size in &report.hand_off {
        row(format!("hand-off, {:.1} MB image", size.image_bytes as f64 / 1e6), &size.latency);
    }
    text
}
