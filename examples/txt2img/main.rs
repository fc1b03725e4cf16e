//! A picture from a text, painted by a broker.
//!
//! `cargo run --features cli --example txt2img -- --checkpoint sd15.safetensors --prompt "a photo of a cat"` asks the
//! broker at `$LUNA_BROKER`, or this user's default one. The checkpoint has UNet, VAE and text encoders. Samplers and
//! guidance are here, in `sampler.rs`; the models are in the broker.

mod numbers;
mod painter;
mod sampler;

use std::error::Error;
use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use luna_broker::client::{Client, Tensor};
use luna_broker::service::AdapterUse;
use painter::{Order, Painter};
use sampler::Sampler;

/// Paints a picture from a text.
#[derive(Debug, Parser)]
struct Args {
    /// The broker's socket [default: that of this user]
    #[arg(long)]
    socket: Option<String>,
    /// A file, or a name the broker knows
    #[arg(long)]
    checkpoint: String,
    #[arg(long)]
    prompt: String,
    /// What the picture is led away from
    #[arg(long, default_value = "")]
    negative: String,
    #[arg(long, default_value_t = 20)]
    steps: u32,
    /// How strongly the prompt leads; 1 not at all
    #[arg(long, default_value_t = 7.0)]
    cfg: f32,
    /// WIDTHxHEIGHT in pixels, or one number for both
    #[arg(long, default_value = "512x512", value_parser = size)]
    size: (u64, u64),
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// euler or dpmpp_2m
    #[arg(long, default_value = "dpmpp_2m")]
    sampler: Sampler,
    /// An adapter; may be given several times
    #[arg(long, value_name = "FILE:STRENGTH", value_parser = lora)]
    lora: Vec<AdapterUse>,
    /// Skip most of a step that changes less than this, as 0.1
    #[arg(long, value_name = "THRESHOLD")]
    fb_cache: Option<f64>,
    #[arg(long, default_value = "txt2img.png")]
    out: PathBuf,
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<(), Box<dyn Error>> {
    let (width, height) = args.size;
    let order = Order {
        prompt: args.prompt,
        negative: args.negative,
        width,
        height,
        steps: args.steps,
        guidance: args.cfg,
        seed: args.seed,
        sampler: args.sampler,
        loras: args.lora,
        fb_cache: args.fb_cache,
    };
    let client = Client::connect(args.socket.as_deref())?;
    let painter = Painter::new(&client, &args.checkpoint)?;
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} steps {eta}")?;
    let bar = ProgressBar::new(order.steps.into()).with_style(style);
    let picture = painter.paint(&order, || bar.inc(1))?;
    bar.finish_and_clear();
    write_png(&args.out, &picture.image)?;
    println!("{}: {} steps, {} left out", args.out.display(), picture.report.steps, picture.report.hits);
    Ok(())
}

fn write_png(path: &Path, image: &Tensor) -> Result<(), Box<dyn Error>> {
    let &[_, height, width, 3] = image.meta().shape.as_slice() else { return Err("not an image".into()) };
    let mut encoder = png::Encoder::new(BufWriter::new(File::create(path)?), width.try_into()?, height.try_into()?);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let pixels: Vec<u8> = image.floats()?.iter().map(|value| (value.clamp(0.0, 1.0) * 255.0).round() as u8).collect();
    encoder.write_header()?.write_image_data(&pixels)?;
    Ok(())
}

fn size(text: &str) -> Result<(u64, u64), std::num::ParseIntError> {
    let (width, height) = text.split_once('x').unwrap_or((text, text));
    Ok((width.parse()?, height.parse()?))
}

/// `FILE:STRENGTH`, or a file alone, with a strength of one.
fn lora(text: &str) -> Result<AdapterUse, std::convert::Infallible> {
    let parts = text.rsplit_once(':').and_then(|(file, strength)| Some((file, strength.parse().ok()?)));
    let (name, strength) = parts.unwrap_or((text, 1.0));
    Ok(AdapterUse { name: name.to_owned(), strength })
}
