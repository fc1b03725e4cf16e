//! The example `txt2img` against diffusers' pipelines on the same noise, through a broker.
#![cfg(feature = "torch")]

#[path = "../examples/txt2img/numbers.rs"]
mod numbers;
#[path = "../examples/txt2img/painter.rs"]
mod painter;
#[path = "../examples/txt2img/sampler.rs"]
mod sampler;
mod support;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use luna_broker::broker::Broker;
use luna_broker::client::{Client, Unet};
use luna_broker::protocol::UnetReport;
use luna_broker::service::{AdapterUse, UnetInput};
use numbers::Numbers;
use painter::{Order, Painter};
use safetensors::SafeTensors;
use sampler::{Guidance, Sampler, Step, noisy, schedule};
use serde::Deserialize;
use support::{config, local_client};

/// Of the largest number in a latent, after all steps: sums in another order, and noise levels in float64 where diffusers
/// has float32, make 6e-6.
const TOLERANCE: f32 = 2e-5;

/// Largest difference of an encoded prompt.
const PROMPT_TOLERANCE: f32 = 1e-5;
/// Largest difference of a picture whose latent was sampled here.
const PICTURE_TOLERANCE: f32 = 1e-4;

/// What was generated.
#[derive(Deserialize)]
struct Settings {
    positive: String,
    negative: String,
    steps: u32,
    guidance: f32,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    model: String,
    case: String,
    prediction: String,
    zero_terminal_snr: bool,
    sampler: String,
    loras: Vec<(String, f64)>,
}

/// The generated files, or `None` with a word about how to get them.
fn golden() -> Option<(PathBuf, Settings)> {
    let folder = std::env::var_os("LUNA_BROKER_GOLDEN").map(|folder| Path::new(&folder).join("pipeline"));
    let Some(folder) = folder.filter(|folder| folder.is_dir()) else {
        eprintln!("skipped: set LUNA_BROKER_GOLDEN to a folder made by `python tests/golden/make_pipeline.py FOLDER`");
        return None;
    };
    let settings = std::fs::read(folder.join("cases.json")).unwrap();
    Some((folder, serde_json::from_slice(&settings).unwrap()))
}

fn numbers(tensors: &SafeTensors<'_>, name: &str) -> Option<Numbers> {
    let view = tensors.tensor(name).ok()?;
    let shape: Vec<u64> = view.shape().iter().map(|&extent| extent as u64).collect();
    let floats = view.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    Some(Numbers::new(&shape, &floats.collect::<Vec<_>>()))
}

/// One case: what goes in, and what the pipeline made of it.
struct Golden {
    noise: Numbers,
    context: Numbers,
    vectors: Option<Numbers>,
    latent: Vec<f32>,
    image: Option<Vec<f32>>,
}

impl Golden {
    fn of(folder: &Path, case: &Case) -> Self {
        let bytes = std::fs::read(folder.join(format!("{}.io.safetensors", case.model))).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let one = |name: &str| numbers(&tensors, name);
        let noise = one("noise").unwrap();
        let pixels = [noise.shape()[2] * 8, noise.shape()[3] * 8];
        let vectors = one("negative.pooled")
            .zip(one("positive.pooled"))
            .map(|(negative, positive)| Numbers::joined(&vector(&negative, pixels), &vector(&positive, pixels)));
        let context = Numbers::joined(&one("negative.cond").unwrap(), &one("positive.cond").unwrap());
        let latent = one(&format!("{}.latent", case.case)).unwrap().floats();
        let image = one(&format!("{}.image", case.case)).map(|image| image.floats());
        Self { noise, context, vectors, latent, image }
    }
}

/// A pooled prompt and, behind it, sizes as SDXL takes them.
fn vector(pooled: &Numbers, [height, width]: [u64; 2]) -> Numbers {
    let mut floats = pooled.floats();
    for size in [height, width, 0, 0, height, width] {
        let angles: Vec<f64> =
            (0..128).map(|at| size as f64 * (-(10_000f64.ln()) * f64::from(at) / 128.0).exp()).collect();
        floats.extend(angles.iter().map(|angle| angle.cos() as f32));
        floats.extend(angles.iter().map(|angle| angle.sin() as f32));
    }
    Numbers::new(&[1, floats.len() as u64], &floats)
}

fn sample(unet: &Unet, golden: &Golden, case: &Case, settings: &Settings) -> Vec<f32> {
    let facts = unet.info().unet.clone().unwrap();
    let facts = UnetReport { prediction: case.prediction.clone(), zero_terminal_snr: case.zero_terminal_snr, ..facts };
    let steps = schedule(settings.steps, &facts).unwrap();
    let guidance = Guidance::new(&facts, settings.guidance).unwrap();
    let sampler: Sampler = case.sampler.parse().unwrap();
    let mut shape = golden.noise.shape().to_vec();
    shape[0] = 2;
    let denoise = |x: &[f32], step: &Step| {
        let rows = Numbers::new(&shape, &guidance.rows(x, step));
        let timesteps = Numbers::new(&[2], &[step.timestep as f32; 2]);
        let input = UnetInput {
            x: rows.input()?,
            timesteps: timesteps.input()?,
            context: golden.context.input()?,
            y: golden.vectors.as_ref().map(Numbers::input).transpose()?,
            control: None,
        };
        let output = unet.step(&input)?;
        Ok::<_, luna_broker::Error>(guidance.denoised(x, step, &output.floats()?))
    };
    sampler.run(noisy(&golden.noise.floats(), &steps), &steps, denoise).unwrap()
}

/// Beside the largest number of `expected`.
fn off(found: &[f32], expected: &[f32]) -> f32 {
    difference(found, expected) / expected.iter().fold(0f32, |most, value| most.max(value.abs()))
}

/// Of numbers of a size around one.
fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let off = found.iter().zip(expected).map(|(found, expected)| (found - expected).abs());
    off.fold(0.0, |most, one| if one.is_nan() { f32::INFINITY } else { most.max(one) })
}

fn checkpoint(folder: &Path, case: &Case) -> String {
    folder.join(format!("{}.safetensors", case.model)).to_string_lossy().into_owned()
}

fn order(folder: &Path, settings: &Settings, case: &Case, noise: &Numbers) -> Order {
    let adapter = |(name, strength): &(String, f64)| {
        let file = folder.join(format!("{}.{name}.safetensors", case.model));
        AdapterUse { name: file.to_string_lossy().into_owned(), strength: *strength }
    };
    Order {
        prompt: settings.positive.clone(),
        negative: settings.negative.clone(),
        width: noise.shape()[3] * 8,
        height: noise.shape()[2] * 8,
        steps: settings.steps,
        guidance: settings.guidance,
        seed: 1,
        sampler: case.sampler.parse().unwrap(),
        loras: case.loras.iter().map(adapter).collect(),
        fb_cache: None,
    }
}

fn client() -> Client {
    let broker = Broker::builder().config(config()).start().unwrap();
    local_client(&Arc::new(broker))
}

#[test]
fn samplers_give_what_diffusers_gives() {
    let Some((folder, settings)) = golden() else { return };
    let client = client();
    let mut compared = 0;
    for case in settings.cases.iter().filter(|case| case.loras.is_empty()) {
        let unet = client.unet(&checkpoint(&folder, case)).unwrap();
        let golden = Golden::of(&folder, case);
        let off = off(&sample(&unet, &golden, case, &settings), &golden.latent);
        println!("{} {}: {off:e}", case.model, case.case);
        assert!(off <= TOLERANCE, "{} {}: {off:e}", case.model, case.case);
        compared += 1;
    }
    assert!(compared >= 6, "{compared} cases");
}

#[test]
fn a_run_from_text_to_picture_is_the_pipelines() {
    let Some((folder, settings)) = golden() else { return };
    let client = client();
    let (mut adapted, mut pictures) = (0, 0);
    for case in settings.cases.iter().filter(|case| case.prediction == "eps") {
        let painter = Painter::new(&client, &checkpoint(&folder, case)).unwrap();
        let golden = Golden::of(&folder, case);
        let order = order(&folder, &settings, case, &golden.noise);
        let prompts =
            painter.encode(&order.negative, &order.prompt, [order.height, order.width], &order.loras).unwrap();
        let prompt_off = difference(&prompts.context.floats(), &golden.context.floats());
        assert!(prompt_off <= PROMPT_TOLERANCE, "{} {}: {prompt_off:e}", case.model, case.case);
        assert_eq!(prompts.vectors.is_some(), golden.vectors.is_some());
        let mut steps = 0;
        let (latent, report) = painter.sample(&order, &golden.noise, &prompts, || steps += 1).unwrap();
        assert_eq!((steps, report.steps, report.hits), (settings.steps, settings.steps.into(), 0));
        let off = off(&latent.floats(), &golden.latent);
        println!("{} {}: {off:e}", case.model, case.case);
        assert!(off <= TOLERANCE, "{} {}: {off:e}", case.model, case.case);
        adapted += usize::from(!case.loras.is_empty());
        if let Some(expected) = golden.image {
            let off = difference(&painter.decode(&latent).unwrap().floats().unwrap(), &expected);
            assert!(off <= PICTURE_TOLERANCE, "{} {}: {off:e}", case.model, case.case);
            pictures += 1;
        }
    }
    assert!(adapted >= 2 && pictures >= 2, "{adapted} with adapters, {pictures} pictures");
}

#[test]
fn a_seed_makes_one_picture_and_a_cache_leaves_steps_out() {
    let Some((folder, settings)) = golden() else { return };
    let client = client();
    let case = &settings.cases[0];
    let painter = Painter::new(&client, &checkpoint(&folder, case)).unwrap();
    let order = Order { steps: 4, ..order(&folder, &settings, case, &Golden::of(&folder, case).noise) };
    let paint = |order: &Order| painter.paint(order, || ()).unwrap();
    let (first, again) = (paint(&order), paint(&order));
    let other = paint(&Order { seed: 2, ..order.clone() });
    let pixels = first.image.floats().unwrap();
    assert!(difference(&pixels, &again.image.floats().unwrap()) <= PICTURE_TOLERANCE);
    assert!(difference(&pixels, &other.image.floats().unwrap()) > 0.01);
    let cached = paint(&Order { fb_cache: Some(1e9), ..order });
    assert_eq!((first.report.hits, cached.report.hits), (0, 3));
}

fn facts(prediction: &str, zero_terminal_snr: bool) -> UnetReport {
    UnetReport {
        variant: "plain".to_owned(),
        prediction: prediction.to_owned(),
        zero_terminal_snr,
        in_channels: 4,
        context_width: 8,
        vector_width: None,
    }
}

#[test]
fn steps_go_evenly_from_noise_to_nothing() {
    let steps = schedule(4, &facts("eps", false)).unwrap();
    assert_eq!(steps.iter().map(|step| step.timestep).collect::<Vec<_>>(), [999, 749, 499, 249]);
    assert!((steps[0].sigma - 14.6146).abs() < 1e-4);
    assert!(steps.windows(2).all(|pair| pair[0].next_sigma == pair[1].sigma));
    assert_eq!(steps[3].next_sigma, 0.0);
    assert!((schedule(3, &facts("v", true)).unwrap()[0].sigma - 4096.0).abs() < 1e-3);
    for count in [0, 1001] {
        assert!(schedule(count, &facts("eps", false)).unwrap_err().contains("between 1 and 1000"));
    }
}

#[test]
fn a_sampler_finds_what_does_not_depend_on_the_noise() {
    let picture = [0.25, -3.0, 1.5];
    let steps = schedule(7, &facts("eps", false)).unwrap();
    for sampler in [Sampler::Euler, Sampler::Dpmpp2m] {
        let found = sampler.run(noisy(&[1.0; 3], &steps), &steps, |_, _| Ok::<_, ()>(picture.to_vec()));
        assert_eq!(found, Ok(picture.to_vec()), "{sampler:?}");
    }
}

#[test]
fn what_cannot_be_sampled_is_said() {
    assert!(Guidance::new(&facts("edm", false), 7.0).unwrap_err().contains("edm"));
}
